"""The packets of a file in decode order, and what they tell about times: the `Table` of files without an index.

- `scan` reads every packet once, without decoding. Where packets tell their presentation times, these are the frames'.
- Where they do not (absent, repeated, in decode order, a clock that starts again), the whole file is decoded once: the
  decoder tells times, or the order of its frames does. Such files are `played`: read from the beginning, always.
- `play` is that sequential decode, and says of each frame whether damage can have reached it.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import av

from media.file import OpenFile, VideoError

SEGMENT = b"\x18\x53\x80\x67"  # the identifier of Matroska's outermost element
JOINT = 1.0  # seconds by which a clock must jump to be another one
WRAP = 2**32  # ticks by which it only jumps where FFmpeg takes a clock that goes back for one that has run full


@dataclass(frozen=True)
class Table:
    """Every video packet of a file in decode order; times are in ticks of the stream's clock.

    `bound[k]` is the earliest presentation time after packet k; `keys` are the numbers of the key frames, by
    presentation time; `times` are the sorted presentation times of the shown frames, `end` is when the last one ends.
    `cut`: the file ends before it should. `played`: frames are told by their order in a sequential decode, from packet
    `first` on, in which clocks are set anew at the `joints` (packet -> ticks to add). `guessed`: nothing was decoded to
    learn the times; `counted`: no frame has one.
    """

    times: list[int]
    end: int
    cut: bool
    pts: list[int | None] = field(default_factory=list)
    size: list[int] = field(default_factory=list)
    bound: list[float] = field(default_factory=list)
    keys: list[int] = field(default_factory=lambda: [0])
    played: bool = False
    guessed: bool = False
    counted: bool = False
    first: int = 0
    joints: dict[int, int] = field(default_factory=dict)


class _Entry(NamedTuple):
    """What a packet says of itself."""

    pts: int | None
    dts: int | None
    duration: int
    size: int
    is_key: bool
    is_shown: bool
    is_corrupt: bool


class Output(NamedTuple):
    """A frame of the decoder; whether no damage can have reached it; whether none can be lost between it and the output
    before, which would also put its time in doubt."""

    frame: av.VideoFrame
    is_sound: bool
    is_next: bool


def scan(file: OpenFile, closely: bool = False) -> Table:
    """Read every packet of the file; decode all of them where they do not tell enough, or if asked to look `closely`.

    Raises VideoError.
    """
    entries, cut = _read_entries(file)
    first = next((k for k, entry in enumerate(entries) if entry.is_key), 0)  # nothing before it can be decoded
    joints = _find_joints(entries, file)
    if not closely and not joints:
        find_times = _guess_times if file.container.format.name == "avi" else _trust_times
        table = find_times(file, entries, first, cut)
        if table is not None:
            return table
    return _play_times(file, first, joints, cut)


def _read_entries(file: OpenFile) -> tuple[list[_Entry], bool]:
    """The packets of the video stream, and whether the file ends before it should."""
    file.reopen(file.threads)
    entries, last_second, is_avi = [], 0.0, file.container.format.name == "avi"
    for packet in file.demux():
        if packet.pts is not None:
            last_second = max(last_second, float((packet.pts + (packet.duration or 0)) * packet.time_base))
        if packet.stream_index == file.stream.index:
            shown = (packet.is_keyframe, not packet.is_discard, packet.is_corrupt)
            pts = None if is_avi else packet.pts  # AVI has none: those are guesses
            entries.append(_Entry(pts, packet.dts, packet.duration or 0, packet.size, *shown))
    if not entries:
        raise VideoError(file.path, "it holds no frames", "it is damaged or cut off, get it again")
    return entries, file.broken or _ends_early(file, last_second)


def _ends_early(file: OpenFile, last_second: float) -> bool:
    """Whether a file has fewer bytes than its head says, or is over a second shorter where that does not tell."""
    name, length = file.container.format.name, file.container.duration or 0
    with open(file.path, "rb") as start:
        head = start.read(4096)
    if name == "avi" and head.startswith(b"RIFF"):
        return file.n_bytes < int.from_bytes(head[4:8], "little") + 8
    place = head.find(SEGMENT)
    if "matroska" in name and 0 <= place < len(head) - 12:
        n_size = 9 - head[place + 4].bit_length()  # an EBML number: as many bytes as its first one has leading zeros
        n_bytes = int.from_bytes(head[place + 4 : place + 4 + n_size], "big") & ((1 << 7 * n_size) - 1)
        if n_bytes != (1 << 7 * n_size) - 1:  # which stands for an unknown size
            return file.n_bytes < place + 4 + n_size + n_bytes
    if "flv" in name or "matroska" in name:  # with the time at which the last frame ends
        return length / av.time_base > last_second + 1
    return "mp4" in name and (length + (file.container.start_time or 0)) / av.time_base > last_second + 1


def _find_joints(entries: Sequence[_Entry], file: OpenFile) -> dict[int, int]:
    """The packets at which another recording begins, each with the ticks to add to its times and to those after it.

    There the clock goes back; or it jumps ahead where the container has lost the thread (a corrupt packet before).
    """
    joints: dict[int, int] = {}
    shift, latest, end, last = 0, None, 0, None
    for k, entry in enumerate(entries):
        if entry.pts is not None and latest is not None:
            ahead = (entry.pts + shift - latest) * file.clock
            falls = last is not None and entry.dts is not None and (last - entry.dts - shift) * file.clock > JOINT
            wraps = ahead > WRAP * file.clock
            if falls or wraps or (entry.is_key and ahead < 0):
                shift = end - entry.pts
                joints[k] = shift
            elif entry.is_key and ahead > JOINT and any(before.is_corrupt for before in entries[k - 2 : k]):
                joints[k] = shift
        if entry.pts is not None:
            latest = entry.pts + shift if latest is None else max(latest, entry.pts + shift)
            end = max(end, entry.pts + shift + (entry.duration or round(file.period)))
        if entry.dts is not None:
            last = entry.dts + shift
    return joints


def _trust_times(file: OpenFile, entries: Sequence[_Entry], first: int, cut: bool) -> Table | None:
    """The table of packets that tell their presentation times; None if they do not.

    A packet without one may hold no picture of its own; if it does, decoding finds out. Time 0 is the first picture
    that the decoder shows: those that lean on what is not there come before it.
    """
    pts = [entry.pts for entry in entries]
    known = [time for time in pts if time is not None]
    if pts[first] is None or len(set(known)) < len(known):
        return None
    frame, _ = first_picture(file, first)
    if frame is None or frame.pts is None:
        return None
    shown = sorted(e.pts for e in entries if e.pts is not None and e.is_shown and e.pts >= frame.pts)
    if not shown or shown[0] != frame.pts:
        return None
    least, bound = -math.inf, []
    for entry in entries:  # a packet without a presentation time is shown after the last decoding time
        least = least if entry.dts is None else max(least, entry.dts)
        bound.append(least if entry.pts is None else entry.pts)
    bound = [*itertools.accumulate([math.inf, *reversed(bound[1:])], min)][::-1]
    end = max(e.pts + (e.duration or round(file.period)) for e in entries if e.pts is not None and e.is_shown)
    keys = sorted(
        (k for k, entry in enumerate(entries) if k == first or (entry.is_key and entry.pts is not None)),
        key=lambda k: pts[k],
    )
    return Table(shown, end, cut, pts, [entry.size for entry in entries], bound, keys)


def _guess_times(file: OpenFile, entries: Sequence[_Entry], first: int, cut: bool) -> Table | None:
    """The table of an AVI file, whose times are those of decoding: the frame that comes when a packet goes in is shown
    at the packet's time. None if there are none.
    """
    times = [entry.dts for entry in entries]
    frame, fed = first_picture(file, first)
    if frame is None or None in times or any(a > b for a, b in itertools.pairwise(times)):
        return None
    delay, step = fed - 1 - first, entries[-1].duration or max(1, round(file.period))
    times = [*times[first + delay :], *(times[-1] + (k + 1) * step for k in range(delay))]
    return Table(times, times[-1] + step, cut, played=True, guessed=True, first=first)


def _play_times(file: OpenFile, first: int, joints: dict[int, int], cut: bool) -> Table:
    """The table of a file that has been decoded from beginning to end."""
    outputs = [(output.frame.pts, output.frame.dts) for output in play(file, first, joints)]
    if not outputs:
        raise VideoError(file.path, "no picture of it can be decoded", "get it again, or convert it to mp4")
    pts, dts = zip(*outputs, strict=True)
    counted = not any(time is not None for time in (*pts, *dts))
    times = [round(k * file.period) for k in range(len(outputs))] if counted else None
    times = times or _complete(pts, file.period) or _complete(dts, file.period)
    if times is None:
        raise VideoError(file.path, "the clock of its frames goes back and forth", "convert it to mp4")
    end = times[-1] + max(1, round(file.period))
    return Table(times, end, cut or file.broken, played=True, counted=counted, first=first, joints=joints)


def _complete(times: Sequence[int | None], period: float) -> list[int] | None:
    """Times in which those between or beside known ones are filled in; None if none is known or they go back."""
    known = [k for k, time in enumerate(times) if time is not None]
    if not known or any(times[a] > times[b] for a, b in itertools.pairwise(known)):
        return None
    full = []
    for k in range(len(times)):
        after = bisect_left(known, k)
        if after == len(known):
            full.append(times[known[-1]] + round((k - known[-1]) * period))
        elif after == 0:
            full.append(times[known[0]] - round((known[0] - k) * period))
        else:
            a, b = known[after - 1], known[after]
            full.append(times[a] + (times[b] - times[a]) * (k - a) // (b - a))
    return full


def first_picture(file: OpenFile, first: int = 0) -> tuple[av.VideoFrame | None, int]:
    """The first picture that the decoder shows if it begins with packet `first`, and how many packets that takes."""
    file.reopen(file.threads)
    number = 0
    for number, packet in enumerate(file.demux(file.stream), 1):
        frames, _ = file.feed(packet) if number > first else ([], True)
        if frames:
            return frames[0], number
    frames, _ = file.feed(None)
    return (frames[0] if frames else None), number


def play(file: OpenFile, first: int, joints: dict[int, int]) -> Iterator[Output]:
    """All frames in the order in which the decoder shows them, from packet `first` on.

    At a joint the decoder is emptied, so that nothing is decoded from pictures of another recording; packets that the
    container calls corrupt just before one are as good as any other, since it only missed the new beginning.
    """
    file.reopen(threads=1)  # an error then belongs to the packet at hand
    damage = _Damage()
    shift = 0
    for number, packet in enumerate(file.demux(file.stream)):
        if number < first:
            continue
        if number in joints:
            yield from damage.judge(file.feed(None)[0])
            file.codec.flush_buffers()
            shift = joints[number]
        packet.opaque = (number,)  # PyAV keeps it by its address: an object of its own
        packet.pts = None if packet.pts is None else packet.pts + shift
        packet.dts = None if packet.dts is None else packet.dts + shift
        is_corrupt = packet.is_corrupt and number + 1 not in joints and number + 2 not in joints
        frames, decodes = file.feed(packet)
        damage.note(number, packet.is_keyframe, is_corrupt or not decodes)
        yield from damage.judge(frames)
    if file.broken:
        damage.note(damage.fed + 1, False, True)
    yield from damage.judge(file.feed(None)[0])


class _Damage:
    """Damage spoils its own packet and all that follow, up to the next key frame."""

    def __init__(self):
        self.keys: list[int] = []
        self.spoilt: list[int] = []
        self.seen: set[int] = set()  # key frames that were shown
        self.fed = self.shown = -1  # the last packet, and that of the last frame

    def note(self, number: int, is_key: bool, is_spoilt: bool) -> None:
        self.fed = number
        if is_key:
            self.keys.append(number)
        if is_spoilt:
            self.spoilt.append(number)

    def judge(self, frames: list[av.VideoFrame]) -> Iterator[Output]:
        for frame in frames:
            (number,) = frame.opaque
            place = bisect_right(self.keys, number) - 1
            if frame.is_corrupt:
                self.spoilt = sorted({*self.spoilt, number})
            if place > 0 and self.keys[place] != number and self.keys[place] not in self.seen:
                place -= 1  # shown before its key frame: it may use pictures of the group before
            since = self.keys[place] if place >= 0 else 0
            if place >= 0 and self.keys[place] == number:
                self.seen.add(number)
            is_sound = not self._spoilt_between(since, number)
            since = number if self.shown < 0 else min(self.shown, number)
            yield Output(frame, is_sound, not self._spoilt_between(since, self.fed))
            self.shown = number

    def _spoilt_between(self, first: int, last: int) -> bool:
        place = bisect_left(self.spoilt, first)
        return place < len(self.spoilt) and self.spoilt[place] <= last
