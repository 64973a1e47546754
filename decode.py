"""The picture a video shows at a time: the one with the largest presentation time <= t, whatever the container.

- `Source` finds the packets: by the index of an mp4 file, by reading any other file through once.
- `show_pictures` decodes what the asked times need, each group of pictures from its key frame on, in several threads,
  and hands the pictures out one by one. At any sign of damage a group is decoded again, with care: damage is an error
  or an intact picture from before, never a wrong one.
- `probe` tells a file's length, rate and size. `FrameCache` saves work, `Prefetcher` does it in the background.

A time is float seconds from the first displayed frame, a tick a unit of the stream's own clock. Sizes are pixels as
displayed: turned upright, with square pixels.
"""

from __future__ import annotations

import itertools
import math
import os
import threading
from bisect import bisect_left, bisect_right
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
from av.sidedata.sidedata import Type as SideDataType
from av.stream import Disposition
from av.video.reformatter import VideoReformatter

CLOCK = 2e-6  # seconds by which a time may miss a frame's own, so that times printed with six decimals find their frame
MAX_PIXELS = 8192 * 4320  # of a frame
SHOW_AHEAD = 4  # decoded frames that may wait to be shown
WORTH_THREADS = 2e7  # decoded pixels from which a second worker pays


class VideoError(Exception):
    """A video or a request that cannot be served: the message names the file, the cause and what to do."""

    def __init__(self, path: str | Path, cause: str, advice: str):
        super().__init__(f"{path}: {cause}; {advice}")


# ---------------------------------------------------------------- packets


@dataclass(frozen=True)
class Table:
    """Every video packet of a file in decode order; times are in ticks of the stream's clock.

    `bound[k]` is the earliest presentation time after packet k; `keys` are the numbers of the key frames, by
    presentation time; `times` are the sorted presentation times of the shown frames, `end` is when the last one ends.
    With `counted`, packets do not tell their presentation times (absent, repeated or, in AVI, guessed), so frames are
    told by counting. `cut`: the file ends before it should.
    """

    pts: list[int]
    size: list[int]
    bound: list[float]
    keys: list[int]
    times: list[int]
    end: int
    counted: bool
    cut: bool


class _IrregularError(Exception):
    """The index of an mp4 file cannot be trusted: it takes a `Table`."""


class Source:
    """An open file and its first video stream that is not a cover picture.

    The index of an mp4 or mov file is searched, so that only the packets needed are read. Any other file is read
    through once, without decoding, for its `Table`. A key frame goes by its number in the index or in the table.
    """

    def __init__(self, path: str | Path, max_pixels: int = MAX_PIXELS, table: Table | None = None):
        self.path, self.max_pixels, self.table, self.threads = path, max_pixels, table, 1
        self._open()
        try:
            if table is not None or not self._read_index():
                self.use_table()
        except BaseException:
            self.close()
            raise

    def _open(self) -> None:
        path = self.path
        if not os.path.exists(path):
            raise VideoError(path, "no such file", "check the path")
        if not os.path.isfile(path):
            raise VideoError(path, "not a regular file", "give the path of a video file")
        self.n_bytes = os.path.getsize(path)
        if self.n_bytes == 0:
            raise VideoError(path, "the file is empty", "get it again")
        try:
            self.container = av.open(str(path), metadata_errors="replace")
        except av.error.FFmpegError as error:
            with open(path, "rb") as file:
                if b"ftyp" in file.read(12):
                    cause = "an mp4 file without a readable index (moov atom)"
                    raise VideoError(path, cause, "its recording or download did not finish, get it again") from error
            raise VideoError(path, f"not a video ({error.strerror})", "convert it to mp4") from error
        try:
            self.stream = self._pick_stream()
        except BaseException:
            self.container.close()
            raise
        self.codec = self.stream.codec_context
        self.codec.thread_type = "FRAME" if self.threads > 1 else "SLICE"
        self.codec.thread_count = self.threads
        self.clock = float(self.stream.time_base)

    def _pick_stream(self) -> av.VideoStream:
        """The first real video stream, checked before anything is decoded."""
        if self.container.format.name == "tty":
            raise VideoError(self.path, "a text file", "give the path of a video file")
        videos = self.container.streams.video
        streams = [s for s in videos if not s.disposition & Disposition.attached_pic]
        if not streams:
            kinds = ", ".join(sorted({s.type for s in self.container.streams} - {"video"}))
            found = "a cover picture" if videos else f"{kinds} only" if kinds else "no stream at all"
            raise VideoError(self.path, f"no video stream ({found})", "give a file that has one")
        codec = streams[0].codec_context
        if codec is None:
            raise VideoError(self.path, "its codec is not known here", "convert it to H.264")
        if codec.width * codec.height > self.max_pixels:
            cause = f"{codec.width} x {codec.height} pixels are more than max_pixels={self.max_pixels}"
            raise VideoError(self.path, cause, "scale it down or raise the limit")
        return streams[0]

    def reopen(self, threads: int) -> None:
        """Go back to the first packet, with this number of decoding threads."""
        self.close()
        self.threads = threads
        self._open()

    def close(self) -> None:
        self.container.close()

    def __enter__(self) -> Source:
        return self

    def __exit__(self, *exc) -> None:
        self.close()

    def _demux(self, *streams) -> Iterator[av.Packet]:
        """Packets with content, up to the end of the file or to where reading fails (`self.broken`)."""
        self.broken = False
        most = self.n_bytes + 1000  # a packet takes at least a byte of the file
        try:
            for count, packet in enumerate(self.container.demux(*streams)):
                if count > most:
                    raise VideoError(self.path, f"reading does not end after {count} packets", "convert it to mp4")
                if packet.size:
                    yield packet
        except IndexError:
            pass  # everything is read; PyAV then wants to flush a stream that appeared within the file
        except av.error.FFmpegError:
            self.broken = True

    def _read_index(self) -> bool:
        """Whether there is a complete index; if so, learn from it and from the first few packets."""
        entries = self.stream.index_entries
        if "mp4" not in self.container.format.name or not 0 < self.stream.frames == len(entries):
            return False
        self.start, self.delay = math.inf, None
        for packet in self._demux(self.stream):
            if packet.pts is None or packet.dts is None or packet.pts < packet.dts:
                return False
            if self.delay is None:  # the index has decoding times; key frames are shown this much later
                self.delay = packet.pts - packet.dts
            if not packet.is_discard:
                self.start = min(self.start, packet.pts)
            if packet.dts >= self.start:
                break
        if self.start == math.inf:
            return False
        # A truncated file lacks the bytes of its last packets. What is shown before the first one is decoded is there.
        lost = len(entries)
        while lost > 0 and entries[lost - 1].pos + entries[lost - 1].size > self.n_bytes:
            lost -= 1
        self.cut = lost < len(entries)
        self.end = entries[lost].timestamp if self.cut else None
        return True

    def use_table(self) -> None:
        """Turn to the packet table; make it if there is none yet."""
        if self.table is None:
            self.table = self._scan()
        table = self.table
        self.start, self.end, self.cut = table.times[0], table.end, table.cut
        if not table.counted:
            self.number = {pts: k for k, pts in enumerate(table.pts)}
            self.key_times = [table.pts[k] for k in table.keys]

    @property
    def counted(self) -> bool:
        return self.table is not None and self.table.counted

    def _scan(self) -> Table:
        """Read every packet of the file once."""
        self.reopen(self.threads)
        period = 1 / float(self.stream.average_rate or self.stream.base_rate or 25) / self.clock
        pts, dts, size, keys, shown = [], [], [], [], []
        end, last_second = 0.0, 0.0
        for packet in self._demux():
            if packet.pts is not None:
                last_second = max(last_second, float((packet.pts + (packet.duration or 0)) * packet.time_base))
            if packet.stream_index != self.stream.index:
                continue
            if packet.is_keyframe:
                keys.append(len(pts))
            pts.append(packet.pts)
            dts.append(packet.dts)
            size.append(packet.size)
            if packet.pts is not None and not packet.is_discard:
                shown.append(packet.pts)
                end = max(end, packet.pts + (packet.duration or period))
        if not pts:
            raise VideoError(self.path, "it holds no frames", "it is damaged or cut off, get it again")
        cut = self.broken
        if any(
            name in self.container.format.name for name in ("matroska", "mp4", "flv", "avi")
        ):  # with a stated duration
            said, begin = self.container.duration or 0, self.container.start_time or 0
            cut = cut or (said + begin) / av.time_base > last_second + 1
        guessed = None in pts or self.container.format.name == "avi"
        if guessed or not shown or len(set(pts)) < len(pts):
            if guessed or not shown:
                shown = dts if None not in dts else [round(k * period) for k in range(len(pts))]
                end = max(shown) + period
            return Table(pts, size, [], [0], sorted(shown), round(end), True, cut)
        bound: list[float] = [math.inf] * len(pts)
        for k in range(len(pts) - 1, 0, -1):
            bound[k - 1] = min(bound[k], pts[k])
        keys = sorted(keys or [0], key=lambda k: pts[k])
        return Table(pts, size, bound, keys, sorted(shown), round(end), False, cut)

    def find_end(self) -> int:
        """The tick at which the last frame ends."""
        if self.end is None:
            entries = self.stream.index_entries
            tail = entries[max(0, len(entries) - 32)].timestamp  # 32: more than any codec reorders
            self.container.seek(tail, stream=self.stream, any_frame=True)
            shown = (packet for packet in self._demux(self.stream) if not packet.is_discard)
            self.end = max((packet.pts + (packet.duration or 0) for packet in shown), default=self.start)
        return self.end

    def cut_error(self) -> VideoError:
        """For a truncated file: up to where it can be used."""
        cause = f"truncated: readable up to {max(0.0, self.seconds(self.end)):.3f} s"
        return VideoError(self.path, cause, "get it again, or allow_damage to use it up to there")

    def tick(self, time: float) -> int:
        """The last tick at or before a time in seconds."""
        return self.start + math.floor((time + CLOCK) / self.clock)

    def seconds(self, tick: int) -> float:
        """Seconds from the first displayed frame to a tick."""
        return (tick - self.start) * self.clock

    def key_of(self, tick: int) -> int:
        """The last key frame shown at or before a tick. With an index, it can be shown later; its packet tells."""
        if self.table is None:
            return max(0, self.stream.index_entries.search_timestamp(tick - self.delay))
        if self.table.counted:
            return 0
        return self.table.keys[max(0, bisect_right(self.key_times, tick) - 1)]

    def key_before(self, key: int) -> int | None:
        """The key frame before a key frame."""
        if self.table is None:
            entries = self.stream.index_entries
            key = entries.search_timestamp(entries[key].timestamp - 1)
            return key if key >= 0 else None
        place = self.table.keys.index(key)
        return self.table.keys[place - 1] if place else None

    def key_tick(self, key: int) -> int:
        """About when a key frame is shown."""
        return self.stream.index_entries[key].timestamp if self.table is None else self.table.pts[key]

    def packets(self, key: int) -> Iterator[tuple[av.Packet, float]]:
        """Packets in decode order from a key frame on, each with a bound: no later packet is shown before that tick."""
        if self.table is None:
            yield from self._indexed_packets(key)
        elif self.table.counted:
            self.reopen(self.threads)
            yield from ((packet, -math.inf) for packet in self._demux(self.stream))
        else:
            yield from self._tabled_packets(key)

    def _indexed_packets(self, key: int) -> Iterator[tuple[av.Packet, float]]:
        # The index has decoding times, a seek is for presentation times: without the delay it goes to the key before.
        self.container.seek(self.stream.index_entries[key].timestamp + self.delay, stream=self.stream)
        last = -math.inf
        for packet in self._demux(self.stream):
            if packet.pts is None or packet.dts is None or packet.pts < packet.dts or packet.dts < last:
                raise _IrregularError
            last = packet.dts
            yield packet, last

    def _tabled_packets(self, key: int) -> Iterator[tuple[av.Packet, float]]:
        self.container.seek(self.table.pts[key], stream=self.stream)
        packets = self._demux(self.stream)
        first = next(packets, None)
        start = -1 if first is None else self.number.get(first.pts, -1)
        if 0 <= start <= key and first.size == self.table.size[start]:
            packets = itertools.chain([first], packets)
        else:  # a seek can miss, or land within a packet: read on from the beginning instead
            self.reopen(self.threads)
            packets, start = self._demux(self.stream), 0
        for number, packet in enumerate(packets, start):
            if number >= key:
                yield packet, self.table.bound[number]


# ---------------------------------------------------------------- frames

Emit = Callable[[av.VideoFrame, int, list[int]], None]  # a frame, its presentation time, the times it answers (ticks)


def _needed(
    packets: Iterable[tuple[av.Packet, float]], ticks: list[int], answers: dict[int, list[int]]
) -> Iterator[tuple[av.Packet, bool]]:
    """Packets to decode, in order, up to the last one needed, each with whether its frame answers a tick (sorted).

    The answer to a tick is the largest presentation time <= tick. It is known once no later packet can come between. It
    is in `answers` (presentation time -> ticks), complete, before its packet is handed out.
    """
    waiting: deque[av.Packet] = deque()
    shown: list[int] = []  # presentation times of the packets seen, sorted
    k = 0  # the first tick without an answer
    n_due = 0  # answers whose packets are still waiting
    for packet, bound in itertools.chain(packets, [(None, math.inf)]):
        if packet is not None:
            waiting.append(packet)
            if not packet.is_discard:
                place = bisect_right(shown, packet.pts)
                if place and shown[place - 1] == packet.pts:
                    raise _IrregularError  # the same time twice
                shown.insert(place, packet.pts)
        while k < len(ticks) and ticks[k] < bound:
            place = bisect_right(shown, ticks[k])
            if not place:
                raise _IrregularError  # nothing is shown yet
            n_due += shown[place - 1] not in answers
            answers.setdefault(shown[place - 1], []).append(ticks[k])
            k += 1
        while waiting:
            if k == len(ticks) and n_due == 0:
                return
            pts = waiting[0].pts
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


def _decode_quickly(source: Source, ticks: list[int], emit: Emit, stop: threading.Event) -> bool:
    """Answer the sorted ticks of one group of pictures from its key frame on, decoding only what they need.

    Returns False at any sign of damage, or if an answer does not come.
    """
    key: int | None = source.key_of(ticks[0])
    while True:
        packets = source.packets(key)
        first, bound = next(packets, (None, 0))
        if first is not None and first.is_keyframe and first.pts <= ticks[0]:
            break
        key = source.key_before(key)
        if key is None:
            return False
    codec, can_skip = source.codec, _can_skip(source)
    answers: dict[int, list[int]] = {}
    sound, due = True, set(ticks)
    if not first.is_discard:
        due.add(first.pts)  # where a picture is refreshed gradually, its "key frame" is not shown

    def take(frames: list[av.VideoFrame]) -> None:
        nonlocal sound
        for frame in frames:
            if frame.pts is None or (frame.is_corrupt and frame.pts >= first.pts):
                sound = False
                continue
            due.discard(frame.pts)
            if frame.pts in answers:
                emit(frame, frame.pts, answers[frame.pts])
                due.difference_update(answers[frame.pts])

    codec.flush_buffers()
    try:
        for packet, wanted in _needed(itertools.chain([(first, bound)], packets), ticks, answers):
            if stop.is_set():
                return True
            if packet.is_corrupt:
                return False
            if can_skip:
                codec.skip_frame = "DEFAULT" if wanted else "NONREF"
            take(codec.decode(packet))
        take(codec.decode(None))
    except av.error.FFmpegError:
        return False
    return sound and not due and not source.broken


class _Fed(NamedTuple):
    """A packet that was given to the decoder."""

    time: int
    is_key: bool
    is_shown: bool
    is_corrupt: bool


def _outputs(
    source: Source, key: int, last: int, fed: list[_Fed], stop: threading.Event
) -> Iterator[tuple[av.VideoFrame | None, int, int | None]]:
    """Decode from a key frame to what is shown at tick `last`: (frame, number of its packet, presentation time).

    The frame is None where decoding fails. `fed` receives every packet. Where frames are told by counting, an error
    puts the count in doubt, so only the first key frame counts as one.
    """
    times = source.table.times if source.counted else None
    number_of: dict[int, int] = {}
    count = 0

    def packets() -> Iterator[av.Packet | None]:
        for packet, bound in source.packets(key):
            number_of[packet.pts] = len(fed)
            if times is None:
                fed.append(_Fed(packet.pts, packet.is_keyframe, not packet.is_discard, packet.is_corrupt))
            else:
                fed.append(_Fed(times[min(len(fed), len(times) - 1)], not fed, True, packet.is_corrupt))
                bound = times[count] if count < len(times) else math.inf
            yield packet
            if bound > last or stop.is_set():
                break
        yield None  # what is still in the decoder

    source.codec.flush_buffers()
    source.codec.skip_frame = "DEFAULT"
    for packet in packets():
        try:
            frames = source.codec.decode(packet)
        except av.error.FFmpegError:
            yield None, len(fed) - 1 if times is None else count, None
            continue
        for frame in frames:
            if times is None:
                yield frame, number_of.get(frame.pts, len(fed) - 1), frame.pts
            else:
                yield frame, count, times[min(count, len(times) - 1)]
            count += 1


def _decode_carefully(
    source: Source, key: int, ticks: list[int], emit: Emit, allow_damage: bool, stop: threading.Event
) -> bool:
    """Answer sorted ticks by decoding all from a key frame on, twice: to see which frames are intact, then to emit.

    Damage spoils what is decoded after it, up to the next key frame. Returns False if decoding has to start earlier.
    """
    fed: list[_Fed] = []
    outputs, spoilt = [], []
    for frame, number, time in _outputs(source, key, ticks[-1], fed, stop):
        if frame is None or time is None or (frame.is_corrupt and time >= fed[0].time):
            spoilt.append(number)
        if time is not None:
            outputs.append((number, time))
    if source.broken:
        spoilt.append(len(fed))
    spoilt = sorted(spoilt + [k for k, packet in enumerate(fed) if packet.is_corrupt])
    if key and fed and fed[0].is_shown and outputs and outputs[0][1] > fed[0].time:
        return False  # a gradual refresh, or a damaged key frame
    keys = [k for k, packet in enumerate(fed) if packet.is_key]

    def intact(number: int, time: int) -> bool:
        place = bisect_right(keys, number) - 1
        if place > 0 and fed[keys[place]].time > time:
            place -= 1  # shown before its key frame: it may use pictures of the group before
        after = bisect_left(spoilt, keys[place] if place >= 0 else 0)
        return after == len(spoilt) or spoilt[after] > number

    good = sorted(time for number, time in outputs if intact(number, time))
    every = sorted(packet.time for packet in fed if packet.is_shown) if spoilt else good
    chosen: dict[int, list[int]] = {}
    for tick in ticks:
        best, true = bisect_right(good, tick) - 1, bisect_right(every, tick) - 1
        if best < 0 or true < 0:
            return False
        if good[best] != every[true] and not allow_damage:
            cause = f"damaged: the frame shown at {source.seconds(tick):.3f} s cannot be decoded"
            raise VideoError(source.path, cause, "get it again, or allow_damage to see the last intact frame before")
        chosen.setdefault(good[best], []).append(tick)
    for frame, number, time in _outputs(source, key, ticks[-1], [], stop):
        if frame is not None and time in chosen and intact(number, time):
            emit(frame, time, chosen[time])
    return True


def _answer(source: Source, ticks: list[int], emit: Emit, allow_damage: bool, stop: threading.Event) -> None:
    """Emit the frames shown at the sorted ticks, group of pictures by group of pictures."""
    while ticks and not stop.is_set():
        key = source.key_of(ticks[0])
        group = list(itertools.takewhile(lambda tick, key=key: source.key_of(tick) == key, ticks))
        try:
            if source.counted or not _decode_quickly(source, group, emit, stop):
                source.reopen(threads=1)  # an error then belongs to the packet at hand
                starts = [start for start in dict.fromkeys([key, source.key_before(key), 0]) if start is not None]
                if not any(_decode_carefully(source, start, group, emit, allow_damage, stop) for start in starts):
                    cause = f"damaged: there is no intact frame up to {source.seconds(group[0]):.3f} s"
                    raise VideoError(source.path, cause, "get it again, or ask for later times only")
        except _IrregularError:
            source.use_table()
        else:
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
        if self.matrix is None:  # asked once: only the cycle collector frees a frame whose side data was touched
            matrix = frame.side_data.get(SideDataType.DISPLAYMATRIX)
            self.matrix = (1, 0, 0, 0, 1) if matrix is None else np.frombuffer(matrix, np.int32)[:5].tolist()
        a, b, _, c, d = self.matrix  # x' = a x + c y, y' = b x + d y
        if abs(a) < abs(b):
            pixels, height, width, a, d = pixels.transpose(1, 0, 2), width, height, c, b
        pixels = pixels[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]
        return Picture(pixels, (height, width), self.source.seconds(pts))


def _shares(source: Source, ticks: list[int], threads: int) -> tuple[list[list[int]], bool]:
    """Sorted ticks, split between workers at groups of pictures so that each has about as much to decode.

    There is one share if that would not pay, or if one group has most of the work. In that case the second value is
    true: pictures are then shown in a thread of their own, and the decoder gets all others.
    """
    if threads == 1 or source.counted:
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


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _paint(
    source: Source, ticks: list[int], show: Show, allow_damage: bool, stop: threading.Event, apart: bool = False
) -> None:
    """Show the pictures at sorted ticks, `apart`: in another thread, while decoding goes on."""
    painter = _Painter(source)

    def emit(frame: av.VideoFrame, pts: int, answered: list[int]) -> None:
        show(painter.picture(frame, pts), answered)

    if not apart:
        _answer(source, ticks, emit, allow_damage, stop)
        return
    with ThreadPoolExecutor(1, thread_name_prefix="show") as showing:
        ahead: deque[Future] = deque()

        def emit_later(frame: av.VideoFrame, pts: int, answered: list[int]) -> None:
            ahead.append(showing.submit(emit, frame, pts, answered))
            if len(ahead) > SHOW_AHEAD:
                ahead.popleft().result()

        _answer(source, ticks, emit_later, allow_damage, stop)
        for done in ahead:
            done.result()


def show_pictures(
    source: Source, ticks: list[int], show: Show, *, threads: int | None = None, allow_damage: bool = False
) -> None:
    """Call `show` with each picture that answers some of the sorted ticks, and with those ticks.

    The answer to a tick is the picture with the largest presentation time <= it. Calls come from up to `threads`
    threads (default: all cores) at the same time. Where a group of pictures is decoded again, a tick is answered again:
    the last answer counts. With `allow_damage`, the last intact picture before it stands in for one that cannot be
    decoded, which is an error otherwise. Raises VideoError.
    """
    stop = threading.Event()

    def paint_alone(ticks: list[int]) -> None:
        with Source(source.path, source.max_pixels, source.table) as own:
            _paint(own, ticks, show, allow_damage, stop)

    if not ticks:
        return
    (first, *others), apart = _shares(source, ticks, threads or _cores())
    with ThreadPoolExecutor(max(1, len(others)), thread_name_prefix="decode") as pool:
        try:
            working = [pool.submit(paint_alone, share) for share in others]
            _paint(source, first, show, allow_damage, stop, apart)
            for done in working:
                done.result()
        finally:
            stop.set()


# ---------------------------------------------------------------- files


@dataclass(frozen=True)
class VideoInfo:
    """What a file shows: seconds from its first frame to the end of its last, average frames per second, displayed
    size."""

    path: str
    duration: float
    fps: float
    width: int
    height: int


class FrameCache:
    """The most recently used resized frames and packet tables, up to `max_bytes`; it can be shared between threads."""

    def __init__(self, max_bytes: int):
        self.max_bytes, self.n_bytes = max_bytes, 0
        self.items: OrderedDict[tuple, tuple[object, int]] = OrderedDict()
        self.lock = threading.Lock()

    def get(self, key: tuple):
        """What is kept under a key, or None."""
        with self.lock:
            if key not in self.items:
                return None
            self.items.move_to_end(key)
            return self.items[key][0]

    def put(self, key: tuple, value: object, n_bytes: int) -> None:
        """Keep a value, in place of those least recently used. One larger than the whole cache is not kept."""
        with self.lock:
            if key in self.items:
                self.n_bytes -= self.items.pop(key)[1]
            if n_bytes <= self.max_bytes:
                self.items[key] = (value, n_bytes)
                self.n_bytes += n_bytes
            while self.n_bytes > self.max_bytes:
                self.n_bytes -= self.items.popitem(last=False)[1][1]


def open_source(path: str | Path, max_pixels: int, cache: FrameCache | None) -> tuple[Source, tuple]:
    """A source, whose table is taken from the cache or put there, and what identifies the file's present content."""
    if cache is None or not os.path.isfile(path):
        return Source(path, max_pixels), ()
    stat = os.stat(path)
    identity = (os.path.abspath(path), stat.st_mtime_ns, stat.st_size)
    source = Source(path, max_pixels, cache.get((*identity, "table")))
    if source.table is not None:
        cache.put((*identity, "table"), source.table, 200 * len(source.table.pts))
    return source, identity


def probe(
    path: str | Path, *, allow_damage: bool = False, cache: FrameCache | None = None, max_pixels: int = MAX_PIXELS
) -> VideoInfo:
    """What `plan_clip` needs to know about a file. Its first frame is decoded: only that tells the displayed size.

    A truncated file is an error that says up to which second it is readable; with `allow_damage` it ends there. A frame
    without a length lasts one frame period. Raises VideoError.
    """
    source, _ = open_source(path, max_pixels, cache)
    with source:
        if source.cut and (not allow_damage or source.end <= source.start):
            raise source.cut_error()
        shown: list[Picture] = []
        show_pictures(
            source, [source.start], lambda picture, _: shown.append(picture), threads=1, allow_damage=allow_damage
        )
        height, width = shown[-1].size
        rate = float(source.stream.average_rate or source.stream.base_rate or 25)
        duration = source.seconds(source.find_end()) or 1 / rate
        if source.table is not None:
            rate = len(source.table.times) / duration
        return VideoInfo(str(path), duration, rate, width, height)


# ---------------------------------------------------------------- working ahead


class Prefetcher:
    """Results of jobs in order, computed in background threads up to `ahead` items before they are asked for.

    A job's exception is raised when its own result is asked for; the next call goes on with the next job. Use it as a
    context manager: on leaving, jobs that have not begun are dropped, and those at work are waited for.
    """

    def __init__(self, jobs: Iterable[Callable[[], object]], ahead: int = 2, workers: int = 1):
        self.jobs = iter(jobs)
        self.ahead = ahead
        self.pool = ThreadPoolExecutor(workers, thread_name_prefix="prefetch")
        self.waiting: deque[Future] = deque()

    def __iter__(self) -> Prefetcher:
        return self

    def __next__(self):
        while len(self.waiting) <= self.ahead and (future := self._start_next()) is not None:
            self.waiting.append(future)
        if not self.waiting:
            self.close()
            raise StopIteration
        return self.waiting.popleft().result()

    def _start_next(self) -> Future | None:
        try:
            return self.pool.submit(next(self.jobs))
        except StopIteration:
            return None
        except Exception as error:  # of the jobs' own iterator: it belongs to the item that could not be made
            self.jobs = iter(())
            failed: Future = Future()
            failed.set_exception(error)
            return failed

    def close(self) -> None:
        """Drop what has not begun and wait for what has."""
        self.jobs = iter(())
        self.waiting.clear()
        self.pool.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> Prefetcher:
        return self

    def __exit__(self, *exc) -> None:
        self.close()


def prefetch(jobs: Iterable[Callable[[], object]], ahead: int = 2, workers: int = 1) -> Prefetcher:
    """Results of `jobs` in order, computed in the background up to `ahead` items before they are asked for."""
    return Prefetcher(jobs, ahead, workers)
