"""Videos with a number in every frame, as files of many kinds."""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch

WIDTH, HEIGHT, BITS = 160, 96, 20
X264 = {"preset": "veryfast", "crf": "23"}


def texture(width: int, height: int, detail: int = 6) -> np.ndarray:
    """A smooth random picture, larger than the frame, uint8."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(40, 216, (height // detail + 64, width // detail + 64)).astype(np.float32)
    return coarse.repeat(detail, 0).repeat(detail, 1).astype(np.uint8)


def coded_picture(number: int, width: int, height: int, ground: np.ndarray) -> np.ndarray:
    """Planar YUV 4:2:0 of a moving texture, whose top eighth shows the number in binary as black and white blocks."""
    dy, dx = abs(number % 200 - 100), abs(3 * number % 200 - 100)
    luma = ground[dy : dy + height, dx : dx + width].copy()
    block = width // BITS
    for bit in range(BITS):
        luma[: height // 8, bit * block : (bit + 1) * block] = 235 if number >> bit & 1 else 16
    chroma = np.full((2, height // 2, width // 2), 128, np.uint8)
    chroma[0, height // 4 :] = 90 + number % 64
    return np.concatenate([luma.ravel(), chroma.ravel()]).reshape(-1, width)


def read_number(frame: torch.Tensor) -> int:
    """The number shown by a decoded frame, uint8 [3, H, W] of any size."""
    height, width = frame.shape[-2:]
    row = frame[1, max(1, height // 32) : max(2, 3 * height // 32)].float().mean(0)
    block = width / BITS
    middles = [int((bit + 0.5) * block) for bit in range(BITS)]
    return sum(1 << bit for bit, x in enumerate(middles) if row[x] > 128)


@contextlib.contextmanager
def same_priority() -> Iterator[None]:
    """SVT-AV1, where it may (as root), puts the thread that opens it at a real-time priority: not beyond this block."""
    before = (os.sched_getscheduler(0), os.sched_getparam(0)) if hasattr(os, "sched_getscheduler") else None
    try:
        yield
    finally:
        if before:
            os.sched_setscheduler(0, *before)


def write_video(
    path: str | Path,
    n: int = 60,
    *,
    codec: str = "libx264",
    options: dict | None = None,
    rate: int = 25,
    size: tuple[int, int] = (WIDTH, HEIGHT),
    pts: list[int] | None = None,
    clock: Fraction | None = None,
    container: dict | None = None,
    format: str | None = None,
    rotation: int = 0,
    pixel_aspect: Fraction | None = None,
    pix_fmt: str = "yuv420p",
) -> Path:
    """Write frames 0 .. n - 1, at `rate` or at the given presentation times in units of `clock`."""
    width, height = size
    ground = texture(width, height)
    with same_priority(), av.open(str(path), "w", format=format, options=container or {}) as file:
        stream = file.add_stream(codec, rate=rate, options=X264 if options is None else options)
        stream.width, stream.height, stream.pix_fmt = width, height, pix_fmt
        if clock is not None:
            stream.codec_context.time_base = clock
        if rotation:
            stream.set_display_rotation(rotation)
        if pixel_aspect is not None:
            stream.codec_context.sample_aspect_ratio = pixel_aspect
        for k in range(n):
            frame = av.VideoFrame.from_ndarray(coded_picture(k, width, height, ground), format="yuv420p")
            if pts is not None:
                frame.pts, frame.time_base = pts[k], clock
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return Path(path)


def sequential(path: Path) -> list[torch.Tensor]:
    """Every frame in display order, by the plainest use of PyAV."""
    with av.open(str(path)) as file:
        frames = [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]
    return [torch.from_numpy(frame).permute(2, 0, 1) for frame in frames]


IRREGULAR = np.random.default_rng(1).integers(10, 120, 60).cumsum().tolist()
X265 = {"preset": "veryfast", "x265-params": "open-gop=1:keyint=24:bframes=4:log-level=none"}
B_FRAMES = {**X264, "x264-params": "keyint=20:bframes=4:b-pyramid=normal"}
OPEN_GOP = {**X264, "x264-params": "open-gop=1:keyint=16:bframes=4"}
FILES = {
    "cfr.mp4": {},
    "b.mp4": {"options": B_FRAMES},
    "open.mp4": {"options": OPEN_GOP},
    "hevc.mp4": {"codec": "libx265", "options": X265},
    "layers.mp4": {
        "codec": "libx265",
        "options": {"preset": "veryfast", "x265-params": "temporal-layers=3:keyint=24:bframes=4:log-level=none"},
    },
    "vp9.webm": {"codec": "libvpx-vp9", "options": {"cpu-used": "8", "g": "20", "lag-in-frames": "12"}},
    "vp9.mp4": {"codec": "libvpx-vp9", "options": {"cpu-used": "8", "g": "20", "lag-in-frames": "12"}},
    "av1.mkv": {"codec": "libsvtav1", "options": {"preset": "12", "g": "20"}},
    "b.mkv": {"options": B_FRAMES},
    "b.ts": {"options": B_FRAMES},
    "open.ts": {"options": OPEN_GOP},
    "hevc.ts": {"codec": "libx265", "options": X265},
    "mpeg2.ts": {"codec": "mpeg2video", "options": {"bf": "2", "g": "12"}},
    "mpeg2.mpg": {"codec": "mpeg2video", "options": {"bf": "2", "g": "12"}},
    "mpeg4.avi": {"codec": "mpeg4", "options": {"bf": "2", "g": "12"}},
    "raw.h264": {"format": "h264", "options": B_FRAMES},
    "b.flv": {"options": {**X264, "x264-params": "keyint=20:bframes=3"}},
    "fragments.mp4": {"container": {"movflags": "frag_keyframe+empty_moov"}, "options": {**X264, "g": "20"}},
    "interlaced.mp4": {"options": {**X264, "flags": "+ildct+ilme", "x264-params": "tff=1:keyint=20:bframes=2"}},
    "refresh.mp4": {"options": {**X264, "x264-params": "intra-refresh=1:keyint=20:bframes=0"}},
    "vfr.mp4": {"pts": IRREGULAR, "clock": Fraction(1, 1000), "options": B_FRAMES},
    "vfr.mkv": {"pts": IRREGULAR, "clock": Fraction(1, 1000)},
    "one.mp4": {"n": 1},
}


def times_of(name: str) -> list[float]:
    """The presentation times that a file of FILES was written with."""
    options = FILES[name]
    if "pts" in options:
        return [(t - options["pts"][0]) / 1000 for t in options["pts"]]
    return [k / 25 for k in range(options.get("n", 60))]


def get(folder: Path, name: str) -> Path:
    """The file of this name, written when it is first asked for."""
    path = folder / name
    if not path.exists():
        codec = FILES[name].get("codec", "libx264")
        if codec not in av.codecs_available:
            pytest.skip(f"this PyAV has no encoder {codec}")
        write_video(path, **FILES[name])
    return path


def edited(source: Path, target: Path, skip_ticks: int) -> Path:
    """A copy of an mp4 file whose edit list starts this much later."""
    data = bytearray(source.read_bytes())
    place = data.index(b"elst") + 4
    version, count = data[place], struct.unpack(">I", data[place + 4 : place + 8])[0]
    assert (version, count) == (0, 1)
    duration, start = struct.unpack(">Ii", data[place + 8 : place + 16])
    data[place + 8 : place + 16] = struct.pack(">Ii", duration, start + skip_ticks)
    target.write_bytes(data)
    return target
