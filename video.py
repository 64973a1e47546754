"""What the model sees: which frames of a video, at which times, at which size, as patches.

- `frame_budget` is Eq. 3 of Zoom-Zero, `frame_size` the resolution it implies. `plan_clip` turns both into frame times:
  for the coarse pass over the whole video, and for the zoom pass over a few spans.
- `decode` returns the frames shown at given times, `load_clips` those of several plans; each is resized, by the rule of
  Qwen's utilities, as soon as it is decoded.
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
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from media.decode import Picture, VideoInfo, open_source, show_pictures
from media.decode import probe as probe
from media.frames import FrameCache
from media.source import CLOCK, MAX_PIXELS, VideoError

TOKEN = 28  # pixels along a side of a visual token, which is 2 x 2 patches
PATCH = 14  # pixels along a side of a patch
MAX_ASPECT = 200  # Qwen's limit for the longer side over the shorter one
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
SERIAL = 32768  # elements from which torch splits an operation between threads

Span = tuple[float, float]


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


# ---------------------------------------------------------------- pixels


class _Scratch(threading.local):
    """Arrays that `_resize` keeps for the next image of the same size, for each thread its own."""

    def __init__(self):
        self.arrays: dict[tuple[int, int, int, int], tuple[np.ndarray, np.ndarray]] = {}


def resize(frames: Tensor, height: int, width: int, rule: str = "float") -> Tensor:
    """Bicubic with antialias: uint8 [N, 3, h, w] -> uint8 [N, 3, height, width].

    Rule "float" is bit-equal to Qwen's utilities (float32, then rounded), "uint8" to the transformers processor. Raises
    ValueError for another rule.
    """
    scratch = _Scratch()
    images = [_resize(frame, height, width, rule, scratch) for frame in frames.permute(0, 2, 3, 1).numpy()]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()


def _resize(image: np.ndarray, height: int, width: int, rule: str, scratch: _Scratch) -> np.ndarray:
    """One image, uint8 [h, w, 3] -> [height, width, 3].

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


Put = Callable[[int, np.ndarray, float], None]  # row, image uint8 [H, W, 3], presentation time; from several threads


def _read(
    path: str | Path,
    requests: Sequence[tuple[Sequence[float], tuple[int, int] | None, Put]],
    to_clock: bool,
    *,
    rule: str = "float",
    threads: int | None = None,
    cache: FrameCache | None = None,
    allow_damage: bool = False,
    max_pixels: int = MAX_PIXELS,
) -> None:
    """Put the frame shown at each time of each request (times, size, put): the union of all times is decoded, each
    frame once.

    `to_clock` rounds times to the stream's clock. Options as for `decode`.
    """
    if not all(len(times) for times, _, _ in requests):
        raise VideoError(path, "no times asked for", "give at least one")
    for time in itertools.chain.from_iterable(times for times, _, _ in requests):
        if not (math.isfinite(time) and time >= -CLOCK):
            raise VideoError(path, f"no frame is shown at {time} s", "give finite seconds from 0 on")
    scratch = _Scratch()
    source, identity = open_source(path, max_pixels, cache)
    with source:
        places: dict[int, list[tuple[int, int]]] = {}  # tick -> (request, row)
        for r, (times, size, put) in enumerate(requests):
            for row, time in enumerate(times):
                tick = source.tick(time + source.clock / 2 if to_clock else time)
                if source.cut and tick >= source.end:
                    if not allow_damage or source.end <= source.start:
                        raise source.cut_error()
                    tick = source.end - 1
                kept = None if cache is None else cache.get((*identity, rule, size, tick))
                if kept is None:
                    places.setdefault(tick, []).append((r, row))
                else:
                    put(row, *kept)

        def show(picture: Picture, ticks: list[int]) -> None:
            images: dict[tuple[int, int] | None, np.ndarray] = {}
            for tick in ticks:
                for r, row in places[tick]:
                    _, size, put = requests[r]
                    if size not in images:
                        images[size] = _resize(picture.pixels, *(size or picture.size), rule, scratch)
                    put(row, images[size], picture.seconds)
                    if cache is not None:
                        kept = (images[size].copy(), picture.seconds)
                        cache.put((*identity, rule, size, tick), kept, images[size].size)

        show_pictures(source, sorted(places), show, threads=threads, allow_damage=allow_damage)


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

    Options: `rule` that of `resize`; `threads` (default: all cores); `cache` a FrameCache; `allow_damage`: the last
    intact frame before it stands in for one that cannot be decoded, which is an error otherwise; `max_pixels` the
    largest frame accepted. Damage is what the container or the codec reports. Raises VideoError.
    """
    frames = _Frames(len(times))
    _read(path, [(times, size, frames.put)], False, **options)
    return torch.from_numpy(frames.frames), frames.times


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
    received = [_Frames(len(plan.times)) for plan in plans]
    requests = [(p.times, (p.height, p.width), r.put) for p, r in zip(plans, received, strict=True)]
    _read(path, requests, True, **options)
    clips = []
    for plan, r in zip(plans, received, strict=True):
        frames, times = torch.from_numpy(r.frames), r.times
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
    _check_sides(*frames.shape[-2:])
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
    return _normalise(patches.to(torch.float32, copy=True), mean, std)


def _normalise(pixels, mean, std):
    """In place; torch tensors or numpy arrays."""
    pixels /= 255
    pixels -= mean
    pixels /= std
    return pixels


def patchify(frames: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
    """Frames uint8 [N, 3, H, W] -> normalised pixel values float32 [T * h * w, 1176] and the grid (T, h, w)."""
    patches, grid = patchify_uint8(frames)
    return normalise_patches(patches), grid


def decode_patches(
    path: str | Path, times: Sequence[float], size: tuple[int, int], **options
) -> tuple[Tensor, tuple[int, int, int], list[float]]:
    """`decode` and `patchify` in one, in less memory: every frame goes to its place in the pixel values at once.

    Returns pixel values float32 [T * h * w, 1176], the grid (T, h, w) and the presentation time of each frame. Options
    and errors as for both.
    """
    _check_sides(*size)
    n, (t, h, w) = len(times), ((len(times) + 1) // 2, size[0] // PATCH, size[1] // PATCH)
    values, shown = np.empty((t, h // 2, w // 2, 2, 2, 3, 2, PATCH, PATCH), np.float32), [0.0] * n
    mean, std = (np.array(x, np.float32)[:, None, None] for x in (MEAN, STD))

    def put(row: int, image: np.ndarray, seconds: float) -> None:
        pixels = _normalise(image.transpose(2, 0, 1).astype(np.float32, order="C"), mean, std)
        patches = pixels.reshape(3, h // 2, 2, PATCH, w // 2, 2, PATCH).transpose(1, 4, 2, 5, 0, 3, 6)
        for half in range(row % 2, 2 if row == n - 1 else row % 2 + 1):  # an odd last frame is both
            values[row // 2, ..., half, :, :] = patches
        shown[row] = seconds

    _read(path, [(times, size, put)], False, **options)
    return torch.from_numpy(values.reshape(t * h * w, -1)), (t, h, w), shown


def _check_sides(height: int, width: int) -> None:
    if height % TOKEN or width % TOKEN:
        raise ValueError(f"frame sides must be multiples of {TOKEN} pixels, got {height} x {width}")
