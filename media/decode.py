"""The picture a video shows at a time: the one with the largest presentation time <= t, whatever the container.

- `show_pictures` decodes what the asked times need, each group of pictures from its key frame on, in several threads,
  and hands the pictures out one by one. At any sign of damage a group is decoded again, with care: damage is an error,
  never a wrong picture.
- `probe` tells a file's length, rate and size.

Times and ticks are those of `source.py`. Sizes are pixels as displayed: turned upright, with square pixels.
"""

from __future__ import annotations

import itertools
import math
import os
import threading
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
from av.sidedata.sidedata import Type as SideDataType
from av.video.reformatter import VideoReformatter

from media.file import CLOCK, MAX_PIXELS, IrregularError, VideoError
from media.frames import FrameCache
from media.source import REORDERED, Source
from media.table import play

UPRIGHT = (1, 0, 0, 0, 1)
SHOW_AHEAD = 4  # decoded frames that may wait to be shown
WORTH_THREADS = 2e7  # decoded pixels from which a second worker pays


# ---------------------------------------------------------------- frames

Emit = Callable[[av.VideoFrame, int, list[int]], None]  # a frame, its presentation time, the times it answers (ticks)


def _needed(
    packets: Iterable[tuple[av.Packet, float]], ticks: list[int], answers: dict[int, list[int]], more: int = 0
) -> Iterator[tuple[av.Packet, bool]]:
    """Packets to decode, in order, up to the last one needed, each with whether its frame answers a tick (sorted).

    The answer to a tick is the largest presentation time <= tick. It is known once no later packet can come between. It
    is in `answers` (presentation time -> ticks), complete, before its packet is handed out. A packet without a
    presentation time is always needed. At the end, up to `more` packets are handed out that are not needed.
    """
    packets = iter(packets)
    waiting: deque[av.Packet] = deque()
    shown: list[int] = []  # presentation times of the packets seen, sorted
    k = 0  # the first tick without an answer
    n_due = 0  # answers whose packets are still waiting
    for packet, bound in itertools.chain(packets, [(None, math.inf)]):
        if packet is not None:
            waiting.append(packet)
            if not packet.is_discard and packet.pts is not None:
                place = bisect_right(shown, packet.pts)
                if place and shown[place - 1] == packet.pts:
                    raise IrregularError  # the same time twice
                shown.insert(place, packet.pts)
        while k < len(ticks) and ticks[k] < bound:
            place = bisect_right(shown, ticks[k])
            if not place:
                raise IrregularError  # nothing is shown yet
            n_due += shown[place - 1] not in answers
            answers.setdefault(shown[place - 1], []).append(ticks[k])
            k += 1
        while waiting:
            if k == len(ticks) and n_due == 0:
                rest = itertools.chain(waiting, (packet for packet, _ in packets))
                yield from ((packet, False) for packet in itertools.islice(rest, more))
                return
            pts = waiting[0].pts
            if pts is None:
                yield waiting.popleft(), True
                continue
            next_tick = bisect_left(ticks, pts, k)  # the first open one that this frame could answer
            place = bisect_right(shown, pts)
            if next_tick < len(ticks) and (place == len(shown) or shown[place] > ticks[next_tick]):
                break  # nothing comes between them so far
            wanted = pts in answers and not waiting[0].is_discard
            n_due -= wanted
            yield waiting.popleft(), wanted


def _can_skip(source: Source) -> bool:
    """Whether frames that no other frame refers to are marked, so that leaving them out changes nothing else.

    H.264 marks them. HEVC marks them within their temporal layer, so there must be a single layer (as mp4 files tell).
    """
    extra = source.codec.extradata or b""
    if source.codec.name == "hevc":
        return len(extra) > 22 and extra[0] == 1 and (extra[21] >> 3) & 7 == 1  # hvcC: numTemporalLayers
    return source.codec.name == "h264"


class _Attempt:
    """The decoding of one group of pictures for the sorted ticks, as far as it goes well."""

    def __init__(self, ticks: list[int], emit: Emit, first: av.Packet):
        self.emit, self.start = emit, first.pts
        self.answers: dict[int, list[int]] = {}
        self.is_sound, self.latest = True, -math.inf
        self.due = set(ticks)
        if not first.is_discard:
            self.due.add(first.pts)  # where a picture is refreshed gradually, its "key frame" is not shown

    def take(self, frames: list[av.VideoFrame]) -> None:
        """Emit those that answer ticks. Raises IrregularError if times contradict the order of the frames."""
        for frame in frames:
            if frame.pts is None or frame.pts < self.latest:
                raise IrregularError
            self.latest = frame.pts
            if frame.is_corrupt and frame.pts >= self.start:
                self.is_sound = False
                continue
            self.due.discard(frame.pts)
            if frame.pts in self.answers:
                self.emit(frame, frame.pts, self.answers[frame.pts])
                self.due.difference_update(self.answers[frame.pts])


def _decode_quickly(source: Source, ticks: list[int], emit: Emit, stop: threading.Event) -> bool:
    """Answer the sorted ticks of one group of pictures from its key frame on, decoding only what they need.

    Returns False at any sign of damage, or if an answer does not come.
    """
    key: int | None = source.key_of(ticks[0])
    while True:
        packets = source.packets(key)
        first, bound = next(packets, (None, 0))
        if first is not None and first.is_keyframe and first.pts is not None and first.pts <= ticks[0]:
            break
        key = source.key_before(key)
        if key is None:
            return False
    codec, can_skip = source.codec, _can_skip(source) and not source.is_suspect
    attempt = _Attempt(ticks, emit, first)
    more = REORDERED if source.is_suspect else 0  # enough to see whether the decoder reorders these
    codec.flush_buffers()
    try:
        for packet, is_wanted in _needed(itertools.chain([(first, bound)], packets), ticks, attempt.answers, more):
            if stop.is_set():
                return True
            if packet.is_corrupt:
                return False
            if can_skip:
                codec.skip_frame = "DEFAULT" if is_wanted else "NONREF"
            attempt.take(codec.decode(packet))
        attempt.take(codec.decode(None))
    except av.error.FFmpegError:
        return False
    return attempt.is_sound and not attempt.due and not source.broken


class _Fed(NamedTuple):
    """A packet that was given to the decoder."""

    time: int | None
    is_key: bool
    is_shown: bool
    is_corrupt: bool


def _outputs(
    source: Source, key: int, last: int, fed: list[_Fed], stop: threading.Event
) -> Iterator[tuple[av.VideoFrame | None, int]]:
    """Decode from a key frame to what is shown at tick `last`: frames, each with the number of its packet.

    The frame is None where decoding fails. `fed` receives every packet. Raises IrregularError for a frame without time.
    """

    def packets() -> Iterator[av.Packet | None]:
        for packet, bound in source.packets(key):
            packet.opaque = (len(fed),)  # PyAV keeps it by its address: an object of its own
            fed.append(_Fed(packet.pts, packet.is_keyframe, not packet.is_discard, packet.is_corrupt))
            yield packet
            if bound > last or stop.is_set():
                break
        yield None  # what is still in the decoder

    source.codec.flush_buffers()
    source.codec.skip_frame = "DEFAULT"
    for packet in packets():
        frames, decodes = source.feed(packet)
        if not decodes:
            yield None, len(fed) - 1
        for frame in frames:
            if frame.pts is None:
                raise IrregularError
            yield frame, frame.opaque[0]


def _decode_carefully(source: Source, key: int, ticks: list[int], emit: Emit, stop: threading.Event) -> bool:
    """Answer sorted ticks by decoding all from a key frame on, twice: to see which frames are intact, then to emit.

    Damage spoils what is decoded after it, up to the next key frame. Returns False if decoding has to start earlier.
    Raises VideoError for damage, IrregularError if there is none that would explain why nothing is shown.
    """
    fed: list[_Fed] = []
    outputs, spoilt = [], []
    for frame, number in _outputs(source, key, ticks[-1], fed, stop):
        if frame is None or (frame.is_corrupt and frame.pts >= fed[0].time):
            spoilt.append(number)
        if frame is not None:
            outputs.append((number, frame.pts))
    if source.broken:
        spoilt.append(len(fed))
    spoilt = sorted(spoilt + [k for k, packet in enumerate(fed) if packet.is_corrupt])
    if not spoilt and any(a > b for (_, a), (_, b) in itertools.pairwise(outputs)):
        raise IrregularError
    if key != source.first_key and fed and fed[0].is_shown and outputs and outputs[0][1] > fed[0].time:
        return False  # a gradual refresh, or a damaged key frame
    keys = [k for k, packet in enumerate(fed) if packet.is_key and packet.time is not None]

    def intact(number: int, time: int) -> bool:
        place = bisect_right(keys, number) - 1
        if place > 0 and fed[keys[place]].time > time:
            place -= 1  # shown before its key frame: it may use pictures of the group before
        after = bisect_left(spoilt, keys[place] if place >= 0 else 0)
        return after == len(spoilt) or spoilt[after] > number

    good = sorted(time for number, time in outputs if intact(number, time))
    every = sorted(packet.time for packet in fed if packet.is_shown and packet.time is not None) if spoilt else good
    chosen: dict[int, list[int]] = {}
    for tick in ticks:
        best, true = bisect_right(good, tick) - 1, bisect_right(every, tick) - 1
        if best < 0 or true < 0:
            if key == source.first_key and not spoilt and not stop.is_set():
                raise IrregularError
            return False
        if good[best] != every[true]:
            raise _damage(source, tick)
        chosen.setdefault(good[best], []).append(tick)
    for frame, number in _outputs(source, key, ticks[-1], [], stop):
        if frame is not None and frame.pts in chosen and intact(number, frame.pts):
            emit(frame, frame.pts, chosen[frame.pts])
    return True


def _damage(source: Source, tick: int) -> VideoError:
    cause = f"damaged: the frame shown at {source.seconds(tick):.3f} s cannot be decoded"
    return VideoError(source.path, cause, "get it again, or ask for other times")


def _answer_playing(source: Source, ticks: list[int], emit: Emit, stop: threading.Event) -> None:
    """Emit the frames shown at the sorted ticks while the file is decoded from its beginning."""
    times, before, k, number = source.table.times, None, 0, -1
    for number, output in enumerate(play(source, source.table.first, source.table.joints)):
        if source.table.guessed and (number >= len(times) or output.frame.dts not in (None, times[number])):
            raise IrregularError
        after = bisect_left(ticks, times[min(number, len(times) - 1)], k)
        if after > k:
            if before is None or not (before.is_sound and before.is_next and output.is_next):
                raise _damage(source, ticks[k])
            emit(before.frame, times[number - 1], ticks[k:after])
            k = after
        if k == len(ticks) or stop.is_set():
            return
        before = output if before is None or before.is_sound or not source.table.counted else before
    if number + 1 < len(times):  # there are fewer frames than packets
        raise IrregularError
    if before is None or not (before.is_sound and before.is_next):
        raise _damage(source, ticks[k])
    emit(before.frame, times[-1], ticks[k:])


def _answer(source: Source, ticks: list[int], emit: Emit, stop: threading.Event) -> None:
    """Emit the frames shown at the sorted ticks, group of pictures by group of pictures."""
    if source.played:
        _answer_playing(source, ticks, emit, stop)
        return
    while ticks and not stop.is_set():
        key = source.key_of(ticks[0])
        group = list(itertools.takewhile(lambda tick, key=key: source.key_of(tick) == key, ticks))
        if not _decode_quickly(source, group, emit, stop):
            source.reopen(threads=1)  # an error then belongs to the packet at hand
            starts = [key, source.key_before(key), source.first_key]
            starts = [start for start in dict.fromkeys(starts) if start is not None]
            if not any(_decode_carefully(source, start, group, emit, stop) for start in starts):
                cause = f"damaged: there is no intact frame up to {source.seconds(group[0]):.3f} s"
                raise VideoError(source.path, cause, "get it again, or ask for later times only")
        ticks = ticks[len(group) :]


# ---------------------------------------------------------------- pictures


class Picture(NamedTuple):
    """A frame turned upright, uint8 [h, w, 3]; the (height, width) at which it is displayed, another one if pixels are
    not square; its presentation time in seconds."""

    pixels: np.ndarray
    size: tuple[int, int]
    seconds: float


Show = Callable[[Picture, list[int]], None]  # a picture and the ticks it answers


class _Painter:
    """Turns the frames of a source into pictures. Every worker has its own."""

    def __init__(self, source: Source):
        self.source = source
        self.pixel_aspect = float(source.stream.sample_aspect_ratio or 1)
        self.reformatter = VideoReformatter()
        self.matrix: Sequence[int] | None = None  # how the stream is turned

    def picture(self, frame: av.VideoFrame, pts: int) -> Picture:
        rgb = self.reformatter.reformat(frame, format="rgb24", threads=1)
        plane = rgb.planes[0]
        pixels = np.ndarray((rgb.height, rgb.width, 3), np.uint8, plane, strides=(plane.line_size, 3, 1))
        height, width = rgb.height, max(1, round(rgb.width * self.pixel_aspect))
        if height * width > MAX_PIXELS:
            cause = f"{width} x {height} pixels, as displayed, are more than {MAX_PIXELS}"
            raise VideoError(self.source.path, cause, "scale it down")
        if self.matrix is None:  # asked once: only the cycle collector frees a frame whose side data was touched
            self.matrix = _display_matrix(frame)
        a, b, _, c, d = self.matrix  # x' = a x + c y, y' = b x + d y
        if abs(a) < abs(b):
            pixels, height, width, a, d = pixels.transpose(1, 0, 2), width, height, c, b
        pixels = pixels[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]
        return Picture(pixels, (height, width), self.source.seconds(pts))


def _display_matrix(frame: av.VideoFrame) -> Sequence[int]:
    """a, b, _, c, d with x' = a x + c y, y' = b x + d y for the way a frame is to be turned."""
    try:
        matrix = frame.side_data.get(SideDataType.DISPLAYMATRIX)
    except ValueError:  # side data of a kind that PyAV does not know; it still tells the angle
        return {90: (0, -1, 0, 1, 0), 180: (-1, 0, 0, 0, -1), -90: (0, 1, 0, -1, 0)}.get(frame.rotation, UPRIGHT)
    return UPRIGHT if matrix is None else np.frombuffer(matrix, np.int32)[:5].tolist()


def _shares(source: Source, ticks: list[int], threads: int) -> tuple[list[list[int]], bool]:
    """Sorted ticks, split between workers at groups of pictures so that each has about as much to decode.

    There is one share if that would not pay, or if one group has most of the work. In that case the second value is
    true: pictures are then shown in a thread of their own, and the decoder gets all others.
    """
    if threads == 1 or source.played:
        return [ticks], False
    rate = float(source.stream.average_rate or 25) * source.clock  # frames per tick
    groups = [list(group) for _, group in itertools.groupby(ticks, source.key_of)]
    costs = [1 + (group[-1] - source.key_tick(source.key_of(group[0]))) * rate for group in groups]
    if sum(costs) * source.codec.width * source.codec.height < WORTH_THREADS:
        return [ticks], False
    if max(costs) > 1.2 * sum(costs) / threads:
        if threads > 2:
            source.reopen(threads - 1)
        return [ticks], True
    shares: list[list[int]] = [[] for _ in range(threads)]
    middles = [total - cost / 2 for total, cost in zip(itertools.accumulate(costs), costs, strict=True)]
    for group, middle in zip(groups, middles, strict=True):
        shares[int(middle / sum(costs) * threads)] += group
    return [share for share in shares if share], False


def all_cores() -> int:
    """The cores that the processes of this program have on this machine."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cores() -> int:
    """This process' share of them."""
    return max(1, all_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def _paint(source: Source, ticks: list[int], show: Show, stop: threading.Event, apart: bool = False) -> None:
    """Show the pictures at sorted ticks, `apart`: in another thread, while decoding goes on."""
    painter = _Painter(source)

    def emit(frame: av.VideoFrame, pts: int, answered: list[int]) -> None:
        show(painter.picture(frame, pts), answered)

    if not apart:
        _answer(source, ticks, emit, stop)
        return
    with ThreadPoolExecutor(1, thread_name_prefix="show") as showing:
        ahead: deque[Future] = deque()

        def emit_later(frame: av.VideoFrame, pts: int, answered: list[int]) -> None:
            ahead.append(showing.submit(emit, frame, pts, answered))
            if len(ahead) > SHOW_AHEAD:
                ahead.popleft().result()

        _answer(source, ticks, emit_later, stop)
        for done in ahead:
            done.result()


def show_pictures(source: Source, ticks: list[int], show: Show, *, threads: int | None = None) -> None:
    """Call `show` with each picture that answers some of the sorted ticks, and with those ticks.

    The answer to a tick is the picture with the largest presentation time <= it. Calls come from up to `threads`
    threads (default: the process' share of the cores) at the same time. Where a group of pictures is decoded again, a
    tick is answered again: the last answer counts. A picture that cannot be decoded is an error. Raises VideoError.
    """
    stop = threading.Event()

    def paint_alone(ticks: list[int]) -> None:
        with Source(source.path, source.table) as own:
            _paint(own, ticks, show, stop)

    if not ticks:
        return
    (first, *others), apart = _shares(source, ticks, threads or cores())
    with ThreadPoolExecutor(max(1, len(others)), thread_name_prefix="decode") as pool:
        try:
            working = [pool.submit(paint_alone, share) for share in others]
            _paint(source, first, show, stop, apart)
            for done in working:
                done.result()
        finally:
            stop.set()


# ---------------------------------------------------------------- files


@dataclass(frozen=True)
class VideoInfo:
    """What a file shows: seconds from its first frame to the end of its last, average frames per second, displayed
    size. `moments`: the seconds at which frames begin, float64 [N], where they are not regular. `begin`: the first
    frame's time by the file's own clock, in seconds."""

    path: str
    duration: float
    fps: float
    width: int
    height: int
    moments: np.ndarray | None = field(default=None, repr=False, compare=False)
    begin: float = 0.0

    @property
    def period(self) -> float:
        """The usual time from a frame to the next, in seconds."""
        if self.moments is None or len(self.moments) < 2:
            return 1 / self.fps
        return max(float(np.median(np.diff(self.moments))), CLOCK)

    def rate(self, spans: Iterable[tuple[float, float]]) -> float:
        """Frames per second within disjoint spans of the video, at least one in each."""
        if self.moments is None:
            return self.fps
        starts, ends = np.array(list(spans)).T
        n = np.searchsorted(self.moments, ends - CLOCK) - np.searchsorted(self.moments, starts + CLOCK) + 1
        return float(n.sum() / (ends - starts).sum())


TABLES = FrameCache(64 << 20)  # those of the files read last: a file without an index is read through once


def read(path: str | Path, use: Callable[[Source, tuple], None]) -> None:
    """Call `use` with an open source and what identifies the file's present content.

    It is called again with a source that knows better, if what the file says about itself turns out to be wrong. Raises
    VideoError, whatever is wrong with the file.
    """
    try:
        stat = os.stat(path) if os.path.exists(path) else None
        identity = stat and (os.path.abspath(path), stat.st_mtime_ns, stat.st_size)
        with Source(path, TABLES.get(identity)) as source:
            while True:
                if source.table is not None:
                    TABLES.put(identity, source.table, 100 * (len(source.table.times) + len(source.table.pts)))
                try:
                    return use(source, (*identity, source.start))
                except IrregularError:
                    source.look_closer()
    except (av.error.FFmpegError, OSError) as error:
        raise VideoError(path, f"it cannot be read ({error})", "get it again, or convert it to mp4") from error


def probe(path: str | Path) -> VideoInfo:
    """What `plan_clip` needs to know about a file. Its first frame is decoded: only that tells the displayed size.

    A truncated file is an error that says up to which second it is readable. A frame without a length lasts one frame
    period. Raises VideoError.
    """
    found: list[VideoInfo] = []

    def look(source: Source, _) -> None:
        if source.cut:
            raise source.cut_error()
        shown: list[Picture] = []
        show_pictures(source, [source.start], lambda picture, _: shown.append(picture), threads=1)
        height, width = shown[-1].size
        rate = float(source.stream.average_rate or source.stream.base_rate or 25)
        duration = source.seconds(source.find_end()) or 1 / rate
        moments = source.moments()
        if source.table is not None or moments is not None:
            rate = len(source.table.times if moments is None else moments) / duration
        found.append(VideoInfo(str(path), duration, rate, width, height, moments, source.start * source.clock))

    read(path, look)
    return found[-1]
