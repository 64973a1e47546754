"""What the model sees: which frames of a video, at which times, at which size, as patches.

- `frame_budget` is Eq. 3 of Zoom-Zero, `frame_size` the resolution it implies. `plan_clip` turns both into frame times:
  for the coarse pass over the whole video, and for the zoom pass over a few spans.
- `decode` returns the frame shown at each time: the one with the largest presentation time <= t, whatever the
  container.
- `patchify` lays frames out as Qwen2.5-VL's vision tower takes them. Normalisation is last, so patches travel as bytes.

Differences from the paper: Eq. 3 leaves F * s unrounded, here every sampling interval that begins within the video has
a frame; frames are t_k = start + k * step with the very step that M-RoPE is told, where Qwen's utilities spread them
from end to end.

Times are float seconds from the first displayed frame. Sizes are pixels as displayed: turned upright, with square
pixels.
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
import torch
import torch.nn.functional as F
from av.sidedata.sidedata import Type as SideDataType
from av.stream import Disposition
from av.video.reformatter import VideoReformatter
from torch import Tensor

TOKEN = 28  # pixels along a side of a visual token, which is 2 x 2 patches
PATCH = 14  # pixels along a side of a patch
MAX_ASPECT = 200  # Qwen's limit for the longer side over the shorter one
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
CLOCK = 2e-6  # seconds by which a time may miss a frame's own, so that times printed with six decimals find their frame
MAX_PIXELS = 8192 * 4320  # of a frame
PAINT_AHEAD = 4  # decoded frames that may wait to be resized
SERIAL = 32768  # elements from which torch splits an operation between threads
WORTH_THREADS = 2e7  # decoded pixels from which a second worker pays

Span = tuple[float, float]
Emit = Callable[[av.VideoFrame, int, list[int]], None]  # a frame, its presentation time, the times it answers (ticks)


class VideoError(Exception):
    """A video or a request that cannot be served: the message names the file, the cause and what to do."""

    def __init__(self, path: str | Path, cause: str, advice: str):
        super().__init__(f"{path}: {cause}; {advice}")


# ---------------------------------------------------------------- how many frames, at which size


def frame_budget(
    duration: float, fps: float, budget: float, v_min: float, v_max: float, paired: bool = False
) -> tuple[int, float]:
    """The number of frames N and the visual tokens per frame V_res (a real number) for `duration` seconds at `fps`.

    F * s is rounded up, and is at least 1; L_v / V_min is rounded down, so that N * V_res never exceeds the budget L_v.
    Two frames share one temporal grid, hence its tokens: Qwen's utilities count that, Eq. 3 does not. `paired` does, by
    doubling the budget. Raises ValueError. Zoom-Zero, Eq. 3.
    """
    if not (0 < duration < math.inf and 0 < fps < math.inf):
        raise ValueError(f"duration and fps must be positive and finite, got {duration} s and {fps}")
    if not 0 < v_min <= v_max < math.inf or not v_min <= budget < math.inf:
        raise ValueError(f"need 0 < v_min <= v_max and v_min <= budget, got {v_min}, {v_max} and {budget}")
    budget = 2 * budget if paired else budget
    # Eq. 3: N = min(F * s, L_v / V_min)
    n_frames = min(max(1, math.ceil(duration * fps - 1e-6)), math.floor(budget / v_min))
    return n_frames, _tokens_per_frame(n_frames, budget, v_min, v_max)


def _tokens_per_frame(n_frames: int, budget: float, v_min: float, v_max: float) -> float:
    # Eq. 3: V_res = max(V_min, min(L_v / N, V_max))
    return float(max(v_min, min(budget / n_frames, v_max)))


def frame_size(height: int, width: int, tokens_per_frame: float, v_min: float = 1) -> tuple[int, int]:
    """(H, W) in pixels, multiples of 28, of a height x width frame shown with `tokens_per_frame` visual tokens.

    v_min <= H * W / 784 <= tokens_per_frame, whatever the frame's own size: a small one is enlarged. The grids next to
    the exact size are tried first, then all others; the one that distorts least is taken, of equal ones the largest.
    Raises ValueError for an aspect ratio over 200.
    """
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise ValueError(f"aspect ratio over {MAX_ASPECT}: {width} x {height} pixels")
    most = math.floor(tokens_per_frame + 1e-9)
    least = min(math.ceil(v_min - 1e-9), most)
    if most < 1:
        raise ValueError(f"a frame needs at least one visual token, got {tokens_per_frame}")

    def around(exact: float) -> set[int]:
        return {max(1, math.floor(exact + 1e-9)), max(1, math.ceil(exact - 1e-9))}

    rows = around(math.sqrt(tokens_per_frame * height / width))
    columns = around(math.sqrt(tokens_per_frame * width / height))
    grids = [(r, c) for r in rows for c in columns if least <= r * c <= most]
    if not grids:
        grids = [(r, c) for r in range(1, most + 1) for c in range(-(-least // r), most // r + 1)]
    r, c = min(grids, key=lambda grid: (abs(math.log(grid[1] * height / (grid[0] * width))), -grid[0] * grid[1]))
    return r * TOKEN, c * TOKEN


def smart_resize(height: int, width: int, min_pixels: float, max_pixels: float) -> tuple[int, int]:
    """(H, W) by the rule of Qwen's utilities: sides rounded to multiples of 28, then scaled into the pixel limits.

    Raises ValueError for an aspect ratio over 200.
    """
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise ValueError(f"aspect ratio over {MAX_ASPECT}: {width} x {height} pixels")
    h, w = (max(TOKEN, round(side / TOKEN) * TOKEN) for side in (height, width))
    if h * w > max_pixels:
        scale = math.sqrt(height * width / max_pixels)
        h, w = (max(TOKEN, math.floor(side / scale / TOKEN) * TOKEN) for side in (height, width))
    elif h * w < min_pixels:
        scale = math.sqrt(min_pixels / (height * width))
        h, w = (math.ceil(side * scale / TOKEN) * TOKEN for side in (height, width))
    return h, w


# ---------------------------------------------------------------- at which times


def sample_times(start: float, end: float, step: float, linspace: bool = False) -> list[float]:
    """Times start + k * step strictly below `end`, in seconds; at least one.

    `linspace` is the rule of Qwen's utilities: as many times, spread from start to end with both included. Their
    distance is not `step`, which M-RoPE is told all the same.
    """
    n = max(1, math.ceil((end - start) / step - 1e-6))
    if linspace and n > 1:
        return [start + k * (end - start) / (n - 1) for k in range(n)]
    return [start + k * step for k in range(n)]


def merge_spans(spans: Iterable[Span], info: VideoInfo, min_length: float) -> list[Span]:
    """Sorted, disjoint spans within the video, each at least `min_length` seconds long (widened about its middle).

    Overlapping and touching spans are merged. Raises VideoError for a span that is not finite, reversed or outside the
    video.
    """
    merged: list[Span] = []
    clipped = []
    for start, end in spans:
        if not (math.isfinite(start) and math.isfinite(end)):
            raise VideoError(info.path, f"span ({start}, {end}) is not finite", "give seconds")
        if start > end:
            raise VideoError(info.path, f"span ({start}, {end}) is reversed", "give its start first")
        if end < 0 or start >= info.duration:
            cause = f"span ({start}, {end}) is outside the video of {info.duration:.3f} s"
            raise VideoError(info.path, cause, "leave it out")
        start, end = max(0.0, float(start)), min(float(end), info.duration)
        if end - start < min_length:
            start = max(0.0, min((start + end - min_length) / 2, info.duration - min_length))
            end = min(start + min_length, info.duration)
        clipped.append((start, end))
    for start, end in sorted(clipped):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((start, end))
    return merged


@dataclass(frozen=True)
class ClipPlan:
    """Which frames to show: their times, the seconds between them that M-RoPE is told, and their size in pixels.

    `distinct` (a zoom clip): no frame twice, even where the file itself shows one for longer than a step.
    """

    times: tuple[float, ...]
    step: float
    height: int
    width: int
    distinct: bool = False


def plan_clip(
    info: VideoInfo,
    spans: Sequence[Span] | None,
    fps: float,
    budget: float,
    v_min: float,
    v_max: float,
    *,
    paired: bool = False,
    linspace: bool = False,
    smart: bool = False,
    min_length: float | None = None,
) -> ClipPlan:
    """Plan the coarse pass (`spans` None: the whole video) or the zoom pass over the union of `spans`.

    Eq. 3 with F = the length of the union gives frames and size; the rate is at most the source's average. A span (s,
    e) is sampled at s, s + step, ... below e, and all spans form one sequence. If that makes more than L_v / V_min
    frames, the step grows; a span keeps its first frame while there are no more spans than frames. `min_length` is in
    seconds, by default one frame of the source. `paired`: see `frame_budget`; `linspace`: see `sample_times`; `smart`:
    the size is by `smart_resize`, whose limits are V_min and V_res. Raises VideoError for bad spans and for an aspect
    ratio over 200.
    """
    if max(info.height, info.width) > MAX_ASPECT * min(info.height, info.width):
        cause = f"aspect ratio over {MAX_ASPECT}: {info.width} x {info.height} pixels"
        raise VideoError(info.path, cause, "crop it or leave it out")
    if spans is None:
        union = [(0.0, info.duration)]
    elif len(spans):
        union = merge_spans(spans, info, 1 / info.fps if min_length is None else min_length)
    else:
        raise VideoError(info.path, "an empty list of spans", "give at least one, or None for the whole video")
    fps = min(fps, info.fps)
    length = sum(end - start for start, end in union)
    n_frames, _ = frame_budget(length, fps, budget, v_min, v_max, paired)
    step = max(1 / fps, length / n_frames)
    budget = 2 * budget if paired else budget
    most = math.floor(budget / v_min)
    times = [time for start, end in union for time in sample_times(start, end, step, linspace)]
    while len(times) > max(most, len(union)):  # each span rounds its own number of frames up
        step *= len(times) / most
        times = [time for start, end in union for time in sample_times(start, end, step, linspace)]
    if len(times) > most:
        times = [times[k * len(times) // most] for k in range(most)]
    tokens = _tokens_per_frame(len(times), budget, v_min, v_max)
    if smart:
        height, width = smart_resize(info.height, info.width, v_min * TOKEN**2, tokens * TOKEN**2)
    else:
        height, width = frame_size(info.height, info.width, tokens, v_min)
    return ClipPlan(tuple(times), step, height, width, distinct=spans is not None)


# ---------------------------------------------------------------- files: what is known before decoding


@dataclass(frozen=True)
class VideoInfo:
    """What a file shows: seconds from its first frame to the end of its last, average frames per second, displayed
    size."""

    path: str
    duration: float
    fps: float
    width: int
    height: int


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
        self.container.seek(self.stream.index_entries[key].timestamp, stream=self.stream)
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


# ---------------------------------------------------------------- decoding


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


# ---------------------------------------------------------------- pixels


def resize(frames: Tensor, height: int, width: int, rule: str = "float") -> Tensor:
    """Bicubic with antialias: uint8 [N, 3, h, w] -> uint8 [N, 3, height, width].

    Rule "float" is bit-equal to Qwen's utilities (float32, then rounded), "uint8" to the transformers processor. Raises
    ValueError for another rule.
    """
    scratch: dict = {}
    images = [_resize(frame, height, width, rule, scratch) for frame in frames.permute(0, 2, 3, 1).numpy()]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()


def _resize(image: np.ndarray, height: int, width: int, rule: str, scratch: dict) -> np.ndarray:
    """One image, uint8 [h, w, 3] -> [height, width, 3]. `scratch` keeps the arrays for the next image of this size.

    torch would share even a small image out among its threads, which costs milliseconds where the cores are busy. So it
    is given pieces that it leaves to one thread: rows for the horizontal pass, which comes first, columns for the
    vertical one.
    """
    h, w, _ = image.shape
    if (h, w) == (height, width):
        return image
    if rule == "uint8":
        return _bicubic(np.ascontiguousarray(image), height, width)
    if rule != "float":
        raise ValueError(f"no resize rule {rule!r}: float, uint8")
    if (h, w, height, width) not in scratch:
        n_rows = max(1, (SERIAL - 1) // (3 * width))
        n_columns = max(n for n in range(1, width + 1) if width % n == 0 and (n == 1 or 3 * height * n < SERIAL))
        strip = np.empty((n_rows, w, 3), np.float32)
        blocks = np.empty((width // n_columns, h, n_columns, 3), np.float32)
        scratch[h, w, height, width] = strip, blocks, np.empty((height, *blocks.shape[::2], 3), np.float32)
    strip, blocks, result = scratch[h, w, height, width]
    n_rows, (n_blocks, _, n_columns, _) = len(strip), blocks.shape
    for y in range(0, h, n_rows):
        rows = strip[: min(n_rows, h - y)]
        np.copyto(rows, image[y : y + n_rows])
        narrow = _bicubic(rows, len(rows), width)
        blocks[:, y : y + n_rows] = narrow.reshape(-1, n_blocks, n_columns, 3).swapaxes(0, 1)
    for k, block in enumerate(blocks):
        result[:, k] = _bicubic(block, height, n_columns)
    np.rint(np.clip(result, 0, 255, out=result), out=result)
    return result.astype(np.uint8).reshape(height, width, 3)


def _bicubic(image: np.ndarray, height: int, width: int) -> np.ndarray:
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None]
    return F.interpolate(pixels, size=(height, width), mode="bicubic", antialias=True)[0].permute(1, 2, 0).numpy()


class _Painter:
    """Turns decoded frames into displayed pictures. It keeps scratch arrays, so every worker has its own."""

    def __init__(self, source: Source, rule: str):
        self.pixel_aspect = float(source.stream.sample_aspect_ratio or 1)
        self.rule = rule
        self.reformatter = VideoReformatter()
        self.matrix: Sequence[int] | None = None  # how the stream is turned
        self.scratch: dict = {}

    def picture(self, frame: av.VideoFrame) -> tuple[np.ndarray, tuple[int, int]]:
        """The frame upright, uint8 [h, w, 3], and the size at which it is displayed: another one if pixels are not
        square."""
        rgb = self.reformatter.reformat(frame, format="rgb24", threads=1)
        plane = rgb.planes[0]
        picture = np.ndarray((rgb.height, rgb.width, 3), np.uint8, plane, strides=(plane.line_size, 3, 1))
        height, width = rgb.height, max(1, round(rgb.width * self.pixel_aspect))
        if (
            self.matrix is None
        ):  # asked for once: a frame whose side data was touched is only freed by the cycle collector
            matrix = frame.side_data.get(SideDataType.DISPLAYMATRIX)
            self.matrix = (1, 0, 0, 0, 1) if matrix is None else np.frombuffer(matrix, np.int32)[:5].tolist()
        a, b, _, c, d = self.matrix  # x' = a x + c y, y' = b x + d y
        if abs(a) < abs(b):
            picture, height, width, a, d = picture.transpose(1, 0, 2), width, height, c, b
        picture = picture[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]
        return picture, (height, width)

    def fit(self, picture: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        """The picture at (height, width)."""
        return _resize(picture, *size, self.rule, self.scratch)


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


def _open_source(path: str | Path, max_pixels: int, cache: FrameCache | None) -> tuple[Source, tuple]:
    """A source, whose table is taken from the cache or put there, and what identifies the file's present content."""
    if cache is None or not os.path.isfile(path):
        return Source(path, max_pixels), ()
    stat = os.stat(path)
    identity = (os.path.abspath(path), stat.st_mtime_ns, stat.st_size)
    source = Source(path, max_pixels, cache.get((*identity, "table")))
    if source.table is not None:
        cache.put((*identity, "table"), source.table, 200 * len(source.table.pts))
    return source, identity


def _shares(source: Source, ticks: list[int], threads: int) -> list[list[int]]:
    """Sorted ticks, split between workers at groups of pictures so that each has about as much to decode.

    There is one share if that would not pay. If one group has most of the work, one worker gets all threads.
    """
    if threads == 1 or source.counted:
        return [ticks]
    rate = float(source.stream.average_rate or 25) * source.clock  # frames per tick
    groups = [list(group) for _, group in itertools.groupby(ticks, source.key_of)]
    costs = [1 + (group[-1] - source.key_tick(source.key_of(group[0]))) * rate for group in groups]
    if sum(costs) * source.codec.width * source.codec.height < WORTH_THREADS:
        return [ticks]
    if max(costs) > 1.2 * sum(costs) / threads:
        source.reopen(threads)
        return [ticks]
    shares: list[list[int]] = [[] for _ in range(threads)]
    middles = [total - cost / 2 for total, cost in zip(itertools.accumulate(costs), costs, strict=True)]
    for group, middle in zip(groups, middles, strict=True):
        shares[int(middle / sum(costs) * threads)] += group
    return [share for share in shares if share]


def _cut_error(source: Source) -> VideoError:
    cause = f"truncated: readable up to {max(0.0, source.seconds(source.end)):.3f} s"
    return VideoError(source.path, cause, "get it again, or allow_damage to use it up to there")


def _read(
    path: str | Path,
    requests: Sequence[tuple[Sequence[float], tuple[int, int] | None]],
    to_clock: bool,
    *,
    rule: str = "float",
    threads: int | None = None,
    cache: FrameCache | None = None,
    allow_damage: bool = False,
    max_pixels: int = MAX_PIXELS,
) -> list[tuple[Tensor, list[float]]]:
    """Frames and presentation times for each request (times, size): the union of all times is decoded, each frame once.

    `to_clock` rounds times to the stream's clock. Options as for `decode`.
    """
    for time in itertools.chain.from_iterable(times for times, _ in requests):
        if not (math.isfinite(time) and time >= -CLOCK):
            raise VideoError(path, f"no frame is shown at {time} s", "give finite seconds from 0 on")
    canvases: list[np.ndarray | None] = [None] * len(requests)  # uint8 [N, 3, H, W], made when the first frame comes
    shown = [[0.0] * len(times) for times, _ in requests]
    lock, stop = threading.Lock(), threading.Event()

    def place(r: int, row: int, image: np.ndarray, seconds: float) -> None:
        with lock:
            if canvases[r] is None:
                canvases[r] = np.empty((len(requests[r][0]), 3, *image.shape[:2]), np.uint8)
        canvases[r][row] = image.transpose(2, 0, 1)
        shown[r][row] = seconds

    source, identity = _open_source(path, max_pixels, cache)
    with source:
        places: dict[int, list[tuple[int, int]]] = {}  # tick -> (request, row)
        for r, (times, size) in enumerate(requests):
            for row, time in enumerate(times):
                tick = source.tick(time + source.clock / 2 if to_clock else time)
                if source.cut and tick >= source.end:
                    if not allow_damage or source.end <= source.start:
                        raise _cut_error(source)
                    tick = source.end - 1
                kept = None if cache is None else cache.get((*identity, rule, size, tick))
                if kept is None:
                    places.setdefault(tick, []).append((r, row))
                else:
                    place(r, row, *kept)

        def work(source: Source, ticks: list[int]) -> None:
            painter = _Painter(source, rule)

            def emit(frame: av.VideoFrame, pts: int, answered: list[int]) -> None:
                picture, natural = painter.picture(frame)
                images: dict[tuple[int, int] | None, np.ndarray] = {}
                for tick in answered:
                    for r, row in places[tick]:
                        size = requests[r][1]
                        if size not in images:
                            images[size] = painter.fit(picture, size or natural)
                        place(r, row, images[size], source.seconds(pts))
                        if cache is not None:
                            kept = (images[size].copy(), source.seconds(pts))
                            cache.put((*identity, rule, size, tick), kept, images[size].size)

            if source.threads == 1:
                _answer(source, ticks, emit, allow_damage, stop)
                return
            with ThreadPoolExecutor(1, thread_name_prefix="paint") as painting:  # in order, while decoding goes on
                ahead: deque[Future] = deque()

                def emit_later(frame: av.VideoFrame, pts: int, answered: list[int]) -> None:
                    ahead.append(painting.submit(emit, frame, pts, answered))
                    if len(ahead) > PAINT_AHEAD:
                        ahead.popleft().result()

                _answer(source, ticks, emit_later, allow_damage, stop)
                for done in ahead:
                    done.result()

        def work_alone(ticks: list[int]) -> None:
            with Source(path, max_pixels, source.table) as own:
                work(own, ticks)

        shares = _shares(source, sorted(places), threads or _cores()) if places else []
        if len(shares) == 1:
            work(source, shares[0])
        elif shares:
            with ThreadPoolExecutor(len(shares), thread_name_prefix="decode") as pool:
                try:
                    for done in [pool.submit(work_alone, share) for share in shares]:
                        done.result()
                finally:
                    stop.set()
    return [(torch.from_numpy(canvas), times) for canvas, times in zip(canvases, shown, strict=True)]


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def probe(
    path: str | Path, *, allow_damage: bool = False, cache: FrameCache | None = None, max_pixels: int = MAX_PIXELS
) -> VideoInfo:
    """What `plan_clip` needs to know about a file. Its first frame is decoded: only that tells the displayed size.

    A truncated file is an error that says up to which second it is readable; with `allow_damage` it ends there. A frame
    without a length lasts one frame period. Raises VideoError.
    """
    source, _ = _open_source(path, max_pixels, cache)
    with source:
        if source.cut and (not allow_damage or source.end <= source.start):
            raise _cut_error(source)
        painter, sizes = _Painter(source, "float"), []

        def take_size(frame: av.VideoFrame, pts: int, ticks: list[int]) -> None:
            sizes.append(painter.picture(frame)[1])

        _answer(source, [source.start], take_size, allow_damage, threading.Event())
        rate = float(source.stream.average_rate or source.stream.base_rate or 25)
        duration = source.seconds(source.find_end()) or 1 / rate
        if source.table is not None:
            rate = len(source.table.times) / duration
        return VideoInfo(str(path), duration, rate, width=sizes[-1][1], height=sizes[-1][0])


def decode(
    path: str | Path, times: Sequence[float], size: tuple[int, int] | None = None, **options
) -> tuple[Tensor, list[float]]:
    """The frames shown at `times` (any order, repeats allowed): uint8 [N, 3, H, W], and the presentation time of each.

    The frame shown at t is the one with the largest presentation time <= t, to within two microseconds; after the end
    it is the last. `size` is (height, width), by default as displayed.

    Options: `rule` that of `resize`; `threads` (default: all cores); `cache` a FrameCache; `allow_damage`: the last
    intact frame before it stands in for one that cannot be decoded, which is an error otherwise; `max_pixels` the
    largest frame accepted. Damage is what the container or the codec reports. Raises VideoError.
    """
    if not len(times):
        raise VideoError(path, "no times asked for", "give at least one")
    return _read(path, [(times, size)], False, **options)[0]


# ---------------------------------------------------------------- clips


@dataclass
class Clip:
    """Decoded frames uint8 [N, 3, H, W], the presentation time of each, and the seconds between them that M-RoPE is
    told."""

    frames: Tensor
    times: list[float]
    step: float


def load_clips(path: str | Path, plans: Sequence[ClipPlan], **options) -> list[Clip]:
    """Decode several plans of one file together: the union of their times, each frame once. Options as for `decode`.

    Times are rounded to the file's clock: where it counts milliseconds, frame 2 of 30 per second is shown at 0.067 s,
    which 2 / 30 would miss. Raises VideoError.
    """
    requests = [(plan.times, (plan.height, plan.width)) for plan in plans]
    clips = []
    for plan, (frames, times) in zip(plans, _read(path, requests, True, **options), strict=True):
        rows = [k for k in range(len(times)) if k == 0 or times[k] != times[k - 1]]
        if plan.distinct and len(rows) < len(times):
            frames, times = frames[rows], [times[k] for k in rows]
        clips.append(Clip(frames, times, plan.step))
    return clips


def load_clip(plan: ClipPlan, path: str | Path, **options) -> Clip:
    """Decode one plan; options as for `decode`. Raises VideoError."""
    return load_clips(path, [plan], **options)[0]


# ---------------------------------------------------------------- patches


def patchify_uint8(frames: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
    """CPU frames uint8 [N, 3, H, W] -> patches uint8 [T * h * w, 1176] and the grid (T, h, w): T pairs, h x w patches
    of 14 pixels.

    An odd number of frames repeats the last one. The four patches of a visual token are neighbours, as the vision tower
    wants them. Raises ValueError if H or W is not a multiple of 28.
    """
    if frames.shape[-2] % TOKEN or frames.shape[-1] % TOKEN:
        raise ValueError(f"frame sides must be multiples of {TOKEN} pixels, got {tuple(frames.shape)}")
    if len(frames) % 2:
        frames = torch.cat([frames, frames[-1:]])
    n, _, height, width = frames.shape
    t, h, w = n // 2, height // PATCH, width // PATCH
    x = frames.numpy().reshape(t, 2, 3, h // 2, 2, PATCH, w // 2, 2, PATCH)  # numpy copies this twice as fast as torch
    x = x.transpose(0, 3, 6, 4, 7, 2, 1, 5, 8)  # [T, h/2, w/2, 2, 2, 3, 2, 14, 14]
    return torch.from_numpy(x.reshape(t * h * w, 3 * 2 * PATCH * PATCH)), (t, h, w)


def normalise_patches(patches: Tensor) -> Tensor:
    """Patches uint8 [..., 1176] -> float32 with CLIP's mean and deviation, on the device of the patches."""
    mean, std = (torch.tensor(x, device=patches.device).repeat_interleave(2 * PATCH * PATCH) for x in (MEAN, STD))
    return (patches.float() / 255 - mean) / std


def patchify(frames: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
    """Frames uint8 [N, 3, H, W] -> normalised pixel values float32 [T * h * w, 1176] and the grid (T, h, w)."""
    patches, grid = patchify_uint8(frames)
    return normalise_patches(patches), grid


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
