"""What the model sees: which frames of a video, at which times, at which size, as patches.

- `frame_budget` is Eq. 3 of Zoom-Zero, `frame_size` the resolution it implies. `plan_clip` turns both into frame times:
  for the coarse pass over the whole video, and for the zoom pass over a few spans.
- `decode` returns the frames shown at given times, `load_clips` those of several plans; each is resized, by the rule of
  Qwen's utilities, as soon as it is decoded.
- `patchify_uint8` lays frames out as Qwen's vision towers take them. Normalisation is last: patches travel as bytes.

Differences from the paper: Eq. 3 leaves F * s unrounded, here every sampling interval that begins within the video has
a frame; frames are t_k = start + k * step with the very step that M-RoPE is told, where Qwen's utilities spread them
from end to end.

Times are float seconds from the first displayed frame. Sizes are pixels as displayed: turned upright, with square
pixels.
"""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from media.decode import Picture, VideoInfo, read, show_pictures
from media.decode import probe as probe
from media.file import CLOCK, VideoError
from media.frames import FrameCache
from media.source import Source
from prompts import Span, Spans

PATCH = 14  # pixels along a side of a patch of Qwen2.5-VL; a visual token is 2 x 2 patches
MAX_ASPECT = 200  # Qwen's limit for the longer side over the shorter one
# CLIP's mean and deviation of each colour, as Qwen2.5-VL has them.
CLIP_PIXELS = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
SERIAL = 32768  # elements from which torch splits an operation between threads


# ---------------------------------------------------------------- how many frames, at which size


@dataclass(frozen=True)
class Budget:
    """Visual tokens of a clip (L_v of Eq. 3), and of one of its frames at least (V_min) and at most (V_max).

    `paired`: two frames, which share one temporal grid, count once. Qwen's utilities count so, Eq. 3 does not. `patch`:
    pixels along a side of the model's patches.
    """

    tokens: float
    v_min: float
    v_max: float
    paired: bool = False
    patch: int = PATCH


def frame_budget(
    duration: float, fps: float, budget: float, v_min: float, v_max: float, paired: bool = False
) -> tuple[int, float]:
    """The number of frames N and the visual tokens per frame V_res (a real number) for `duration` seconds at `fps`.

    F * s is rounded up, and is at least 1; L_v / V_min is rounded down, so that N * V_res never exceeds the budget L_v.
    `paired` (see `Budget`) doubles the budget. Raises ValueError. Zoom-Zero, Eq. 3.
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


def frame_size(
    height: int, width: int, tokens_per_frame: float, v_min: float = 1, patch: int = PATCH
) -> tuple[int, int]:
    """(H, W) in pixels, multiples of 2 patches, of a height x width frame shown with `tokens_per_frame` visual tokens.

    v_min <= H * W / (2 patch)^2 <= tokens_per_frame, whatever the frame's own size: a small one is enlarged. The grids
    next to the exact size are tried first, then all others; the one that distorts least is taken, of equal ones the
    largest. Raises ValueError for an aspect ratio over 200.
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
    return 2 * patch * r, 2 * patch * c


# ---------------------------------------------------------------- at which times


def sample_times(start: float, end: float, step: float) -> list[float]:
    """Times start + k * step strictly below `end`, in seconds; at least one."""
    n = max(1, math.ceil((end - start) / step - 1e-6))
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
    """Which frames to show: their times, the seconds between them that M-RoPE is told, and their size in pixels, of
    which a `patch` has so many along a side.

    `distinct` (a zoom clip): no frame twice, even where the file itself shows one for longer than a step.
    """

    times: tuple[float, ...]
    step: float
    height: int
    width: int
    distinct: bool = False
    patch: int = PATCH


def plan_clip(info: VideoInfo, spans: Sequence[Span] | None, fps: float, budget: Budget) -> ClipPlan:
    """Plan the coarse pass (`spans` None: the whole video) or the zoom pass over the union of `spans`.

    Eq. 3 with F = the length of the union gives frames and size; the rate is at most that of the frames there. A span
    (s, e) is sampled at s, s + step, ... below e, and all spans form one sequence. If that makes more than L_v / V_min
    frames, the step grows; a span keeps its first frame while there are no more spans than frames. A span is at least
    one frame of the source long. Raises VideoError for bad spans and for an aspect ratio over 200.
    """
    if max(info.height, info.width) > MAX_ASPECT * min(info.height, info.width):
        cause = f"aspect ratio over {MAX_ASPECT}: {info.width} x {info.height} pixels"
        raise VideoError(info.path, cause, "crop it or leave it out")
    if spans is None:
        union = [(0.0, info.duration)]
    elif len(spans):
        union = merge_spans(spans, info, info.period)
    else:
        raise VideoError(info.path, "an empty list of spans", "give at least one, or None for the whole video")
    fps = min(fps, info.rate(union))
    length = sum(end - start for start, end in union)
    n_frames, _ = frame_budget(length, fps, budget.tokens, budget.v_min, budget.v_max, budget.paired)
    step = max(1 / fps, length / n_frames)
    tokens = 2 * budget.tokens if budget.paired else budget.tokens
    most = math.floor(tokens / budget.v_min)
    times = [time for start, end in union for time in sample_times(start, end, step)]
    while len(times) > max(most, len(union)):  # each span rounds its own number of frames up
        step *= len(times) / most
        times = [time for start, end in union for time in sample_times(start, end, step)]
    if len(times) > most:
        times = [times[k * len(times) // most] for k in range(most)]
    tokens_per_frame = _tokens_per_frame(len(times), tokens, budget.v_min, budget.v_max)
    height, width = frame_size(info.height, info.width, tokens_per_frame, budget.v_min, budget.patch)
    return ClipPlan(tuple(times), step, height, width, distinct=spans is not None, patch=budget.patch)


# ---------------------------------------------------------------- pixels


class _Scratch(threading.local):
    """Arrays that `_resize` keeps for the next image of the same size, for each thread its own."""

    def __init__(self):
        self.arrays: dict[tuple[int, int, int, int], tuple[np.ndarray, np.ndarray]] = {}


def resize(frames: Tensor, height: int, width: int) -> Tensor:
    """Bicubic with antialias, uint8 [N, 3, h, w] -> uint8 [N, 3, height, width], bit-equal to Qwen's utilities."""
    scratch = _Scratch()
    images = [_resize(frame, height, width, scratch) for frame in frames.permute(0, 2, 3, 1).numpy()]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()


def _resize(image: np.ndarray, height: int, width: int, scratch: _Scratch) -> np.ndarray:
    """One image, uint8 [h, w, 3] -> [height, width, 3].

    torch would share even a small image out among its threads, which costs milliseconds where the cores are busy. So it
    is given pieces that it leaves to one thread: rows for the horizontal pass, which comes first, columns for the
    vertical one.
    """
    h, w, _ = image.shape
    if (h, w) == (height, width):
        return image
    if (h, w, height, width) not in scratch.arrays:
        n_rows = max(1, (SERIAL - 1) // (3 * width))
        n_columns = max(n for n in range(1, width + 1) if width % n == 0 and (n == 1 or 3 * height * n < SERIAL))
        strip = np.empty((n_rows, w, 3), np.float32)
        scratch.arrays[h, w, height, width] = strip, np.empty((width // n_columns, h, n_columns, 3), np.float32)
    strip, blocks = scratch.arrays[h, w, height, width]
    n_rows, (n_blocks, _, n_columns, _) = len(strip), blocks.shape
    for y in range(0, h, n_rows):
        rows = strip[: min(n_rows, h - y)]
        np.copyto(rows, image[y : y + n_rows])
        narrow = _bicubic(rows, len(rows), width)
        blocks[:, y : y + n_rows] = narrow.reshape(-1, n_blocks, n_columns, 3).swapaxes(0, 1)
    result = np.empty((height, n_blocks, n_columns, 3), np.uint8)
    for k, block in enumerate(blocks):
        small = _bicubic(block, height, n_columns)
        result[:, k] = np.rint(np.clip(small, 0, 255, out=small), out=small)
    return result.reshape(height, width, 3)


def _bicubic(image: np.ndarray, height: int, width: int) -> np.ndarray:
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None]
    return F.interpolate(pixels, size=(height, width), mode="bicubic", antialias=True)[0].permute(1, 2, 0).numpy()


# ---------------------------------------------------------------- frames


class _Request(NamedTuple):
    """Frames shown at `times`, resized to `size` (None: as displayed), each handed to `put` with its row."""

    times: Sequence[float]
    size: tuple[int, int] | None
    put: Callable[[int, np.ndarray, float], None]  # row, image uint8 [H, W, 3], its time; from several threads


def _read(
    path: str | Path,
    requests: Sequence[_Request],
    *,
    to_clock: bool,
    threads: int | None = None,
    cache: FrameCache | None = None,
) -> None:
    """Put the frames of all requests: the union of their times is decoded, each frame once.

    `to_clock` rounds times to the stream's clock. Options as for `decode`.
    """
    if not all(len(request.times) for request in requests):
        raise VideoError(path, "no times asked for", "give at least one")
    for time in itertools.chain.from_iterable(request.times for request in requests):
        if not (math.isfinite(time) and time >= -CLOCK):
            raise VideoError(path, f"no frame is shown at {time} s", "give finite seconds from 0 on")
    scratch = _Scratch()
    rows: list[set[int]] = [set() for _ in requests]  # those that were put

    def put(r: int, row: int, image: np.ndarray, seconds: float) -> None:
        requests[r].put(row, image, seconds)
        rows[r].add(row)

    def use(source: Source, identity: tuple) -> None:
        places: dict[int, list[tuple[int, int]]] = {}  # tick -> (request, row)
        for r, request in enumerate(requests):
            for row, time in enumerate(request.times):
                tick = source.tick(time + source.clock / 2 if to_clock else time)
                if source.cut and tick >= source.end:
                    raise source.cut_error()
                kept = None if cache is None else cache.get((*identity, request.size, tick))
                if kept is None:
                    places.setdefault(tick, []).append((r, row))
                else:
                    put(r, row, *kept)

        def show(picture: Picture, ticks: list[int]) -> None:
            images: dict[tuple[int, int] | None, np.ndarray] = {}
            for tick in ticks:
                for r, row in places[tick]:
                    size = requests[r].size
                    if size not in images:
                        images[size] = _resize(picture.pixels, *(size or picture.size), scratch)
                    put(r, row, images[size], picture.seconds)
                    if cache is not None:
                        kept = (images[size].copy(), picture.seconds)
                        cache.put((*identity, size, tick), kept, images[size].size)

        show_pictures(source, sorted(places), show, threads=threads)

    read(path, use)
    for request, received in zip(requests, rows, strict=True):
        missing = [time for row, time in enumerate(request.times) if row not in received]
        if missing:
            raise VideoError(path, f"nothing is shown at {missing[0]:.3f} s", "convert it to mp4")


class _Frames:
    """What a request for n frames receives: uint8 [n, 3, H, W] and presentation times."""

    def __init__(self, n: int):
        self.frames: np.ndarray | None = None  # made when the first one comes: it knows the size
        self.times = [0.0] * n
        self.lock = threading.Lock()

    def put(self, row: int, image: np.ndarray, seconds: float) -> None:
        with self.lock:
            if self.frames is None:
                self.frames = np.empty((len(self.times), 3, *image.shape[:2]), np.uint8)
        self.frames[row] = image.transpose(2, 0, 1)
        self.times[row] = seconds


def decode(
    path: str | Path, times: Sequence[float], size: tuple[int, int] | None = None, **options
) -> tuple[Tensor, list[float]]:
    """The frames shown at `times` (any order, repeats allowed): uint8 [N, 3, H, W], and the presentation time of each.

    The frame shown at t is the one with the largest presentation time <= t, to within two microseconds; after the end
    it is the last. `size` is (height, width), by default as displayed.

    Options: `threads` (default: the process' share of the cores); `cache` a FrameCache. A frame that cannot be decoded
    is an error; damage is what the container or the codec reports. Raises VideoError.
    """
    frames = _Frames(len(times))
    _read(path, [_Request(times, size, frames.put)], to_clock=False, **options)
    return torch.from_numpy(frames.frames), frames.times


# ---------------------------------------------------------------- clips


@dataclass
class Clip:
    """Decoded frames uint8 [N, 3, H, W], the presentation time of each, the seconds between them that M-RoPE is told,
    and the pixels along a side of the model's patches."""

    frames: Tensor
    times: list[float]
    step: float
    patch: int = PATCH

    @property
    def visual_tokens(self) -> int:
        """Pairs of frames, 2x2 patches."""
        n, _, height, width = self.frames.shape
        return math.ceil(n / 2) * (height // (2 * self.patch)) * (width // (2 * self.patch))


def load_clips(path: str | Path, plans: Sequence[ClipPlan], **options) -> list[Clip]:
    """Decode several plans of one file together: the union of their times, each frame once. Options as for `decode`.

    Times are rounded to the file's clock: where it counts milliseconds, frame 2 of 30 per second is shown at 0.067 s,
    which 2 / 30 would miss. Raises VideoError.
    """
    received = [_Frames(len(plan.times)) for plan in plans]
    requests = [_Request(p.times, (p.height, p.width), r.put) for p, r in zip(plans, received, strict=True)]
    _read(path, requests, to_clock=True, **options)
    clips = []
    for plan, r in zip(plans, received, strict=True):
        frames, times = torch.from_numpy(r.frames), r.times
        rows = [k for k in range(len(times)) if k == 0 or times[k] != times[k - 1]]
        if plan.distinct and len(rows) < len(times):
            frames, times = frames[rows], [times[k] for k in rows]
        clips.append(Clip(frames, times, plan.step, plan.patch))
    return clips


def load_clip(plan: ClipPlan, path: str | Path, **options) -> Clip:
    """Decode one plan; options as for `decode`. Raises VideoError."""
    return load_clips(path, [plan], **options)[0]


def to_video_time(spans: Spans | None, clip: Clip, duration: float) -> Spans | None:
    """Spans in a clip's own time, where frame k is at k * step, as spans of the video, in seconds.

    A span over a seam of the clip becomes two; what lies after the clip's end is cut off.
    """
    if spans is None:
        return None
    placed: Spans = []
    for start, end in spans:
        for k, frame_time in enumerate(clip.times):
            low, high = max(start - k * clip.step, 0.0), min(end - k * clip.step, clip.step)
            if low >= high:
                continue
            first, last = frame_time + low, min(frame_time + high, duration)
            # The next frame continues this span unless there is a seam between them.
            if placed and k > 0 and start < k * clip.step and frame_time - clip.times[k - 1] < 1.5 * clip.step:
                placed[-1] = (placed[-1][0], last)
            else:
                placed.append((first, last))
    return placed


# ---------------------------------------------------------------- patches


def patchify_uint8(frames: Tensor, patch: int = PATCH) -> tuple[Tensor, tuple[int, int, int]]:
    """CPU frames uint8 [N, 3, H, W] -> patches uint8 [T * h * w, 6 * patch^2] and the grid (T, h, w): T pairs, h x w
    patches of so many pixels a side.

    An odd number of frames repeats the last one. The four patches of a visual token are neighbours, as the vision tower
    wants them. Raises ValueError if H or W is not a multiple of 2 patches.
    """
    if frames.shape[-2] % (2 * patch) or frames.shape[-1] % (2 * patch):
        sides = f"{frames.shape[-2]} x {frames.shape[-1]}"
        raise ValueError(f"frame sides must be multiples of {2 * patch} pixels, got {sides}")
    if len(frames) % 2:
        frames = torch.cat([frames, frames[-1:]])
    n, _, height, width = frames.shape
    t, h, w = n // 2, height // patch, width // patch
    x = frames.numpy().reshape(t, 2, 3, h // 2, 2, patch, w // 2, 2, patch)  # numpy copies this twice as fast as torch
    x = x.transpose(0, 3, 6, 4, 7, 2, 1, 5, 8)  # [T, h/2, w/2, 2, 2, 3, 2, patch, patch]
    return torch.from_numpy(x.reshape(t * h * w, 6 * patch * patch)), (t, h, w)


@lru_cache
def _repeated(values: tuple[tuple[float, ...], ...], times: int, device: torch.device) -> Tensor:
    """Each colour's value so often, [2, 3 * times]; copied to a device once, since the host waits for such a copy."""
    return torch.tensor(values, device=device).repeat_interleave(times, dim=1)


def normalise_patches(patches: Tensor, pixels: tuple[tuple[float, ...], tuple[float, ...]] = CLIP_PIXELS) -> Tensor:
    """Patches uint8 [..., 6 * patch^2] -> float32 with this mean and deviation of each colour, on the device of the
    patches."""
    mean, std = _repeated(pixels, patches.shape[-1] // 3, patches.device)
    return patches.to(torch.float32, copy=True).div_(255).sub_(mean).div_(std)
