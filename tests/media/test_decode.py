"""`source.py`, `decode.py` against a plain sequential decode: files with a number in every frame, real and bad ones."""

import gc
import itertools
import json
import math
import os
import random
import re
import struct
import threading
import time
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import av
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from media.decode import SideDataType, _can_skip, _needed, _Painter, probe
from media.file import VideoError
from media.source import Source
from tests.numbered import (
    B_FRAMES,
    FILES,
    HEIGHT,
    IRREGULAR,
    WIDTH,
    X264,
    edited,
    get,
    read_number,
    sequential,
    times_of,
    write_video,
)
from video import Budget, decode, load_clip, plan_clip, resize

REAL = Path(__file__).resolve().parents[3] / "shared" / "realdata" / "videos"
FIXED = settings(derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))


def shown_at(times: list[float], t: float) -> int:
    return max(k for k, time in enumerate(times) if time <= t + 2e-6)


# ---------------------------------------------------------------- exact frames


@pytest.mark.parametrize("name", FILES)
def test_any_times_give_the_frames_of_a_sequential_decode(folder, name):
    path, times = get(folder, name), times_of(name)
    frames = sequential(path)
    assert len(frames) == len(times)
    found = probe(path)
    assert found.duration == pytest.approx(
        times[-1] + (0.04 if "pts" not in FILES[name] else found.duration - times[-1]), abs=2e-3
    )
    own, shown = decode(path, times)
    assert shown == pytest.approx(times, abs=1.1e-3)  # Matroska and FLV count milliseconds
    assert all(torch.equal(a, b) for a, b in zip(own, frames, strict=True))
    times = shown

    @settings(FIXED, max_examples=12)
    @given(
        st.lists(st.one_of(st.floats(0, times[-1] + 1), st.sampled_from(times)), min_size=1, max_size=12),
        st.integers(1, 3),
    )
    def check(wanted, threads):
        got, at = decode(path, wanted, threads=threads)
        for t, frame, shown_time in zip(wanted, got, at, strict=True):
            k = shown_at(times, t)
            assert shown_time == times[k]
            assert torch.equal(frame, frames[k])

    check()


def test_numbers_are_read_back(folder):
    path = get(folder, "open.mp4")
    for size in (None, (HEIGHT, WIDTH), (56, 112)):
        assert [read_number(frame) for frame in decode(path, times_of("open.mp4"), size)[0]] == list(range(60))


def test_several_workers_give_the_same(folder, monkeypatch):
    path, times = get(folder, "b.mp4"), times_of("b.mp4")
    alone, _ = decode(path, times, (56, 84), threads=1)
    opened = []
    monkeypatch.setattr("media.decode.WORTH_THREADS", 0)
    monkeypatch.setattr(
        Source, "_open", lambda self, real=Source._open: (opened.append(threading.get_ident()), real(self))
    )
    for threads in (2, 3):
        opened.clear()
        assert torch.equal(decode(path, times, (56, 84), threads=threads)[0], alone)
        assert len(set(opened)) > 1
    opened.clear()
    assert torch.equal(
        decode(path, times[:15], (56, 84), threads=2)[0], alone[:15]
    )  # one group: threads within the codec
    assert len(set(opened)) == 1


def test_edit_list(plain, tmp_path):
    with av.open(str(plain)) as file:
        ticks = round(1 / 25 / file.streams.video[0].time_base)
    path = edited(plain, tmp_path / "edited.mp4", 7 * ticks)  # starts within the first group of pictures
    assert probe(path).duration == pytest.approx(53 / 25)
    wanted = [0, 1, 52 / 25, 0.5, 0.04, 14 / 25]
    assert [read_number(frame) for frame in decode(path, wanted)[0]] == [7, 32, 59, 19, 8, 21]


def test_late_start(folder):
    path = write_video(folder / "late.mp4", pts=[t + 5000 for t in IRREGULAR], clock=Fraction(1, 1000))
    times = [(t - IRREGULAR[0]) / 1000 for t in IRREGULAR]
    frames, shown = decode(path, times)
    assert shown == pytest.approx(times) and [read_number(f) for f in frames] == list(range(60))


def test_repeated_times(folder):
    """Of two frames with the same time, the later one is shown."""
    path = write_video(
        folder / "repeated.mkv",
        pts=[0, 40, 80, 80, 120, 160],
        n=6,
        clock=Fraction(1, 1000),
        options={**X264, "bf": "0"},
    )
    with av.open(str(path)) as file:
        stored = [packet.pts for packet in file.demux(video=0) if packet.size]
    frames, _ = decode(path, [t / 1000 for t in stored])
    assert [read_number(frame) for frame in frames] == [max(k for k in range(6) if stored[k] == t) for t in stored]


@pytest.mark.parametrize("rotation", [90, 180, 270])
def test_rotation(folder, rotation):
    path = write_video(folder / f"turned{rotation}.mp4", rotation=rotation)
    upright = sequential(path)[3]
    got = decode(path, [3 / 25])[0][0]
    with av.open(str(path)) as file:
        turns = round(next(file.decode(video=0)).rotation / 90)
    assert turns % 4 == rotation // 90
    assert torch.equal(got, torch.rot90(upright, turns, (1, 2)))
    found = probe(path)
    assert (found.height, found.width) == got.shape[1:]
    small = decode(path, [3 / 25], (56, 28))[0]
    assert torch.equal(small, resize(got[None], 56, 28))


def test_mirror(plain):
    """A display matrix that mirrors: x' = width - x."""

    class Frame:
        side_data: ClassVar[dict] = {
            SideDataType.DISPLAYMATRIX: struct.pack("9i", -65536, 0, 0, 0, 65536, 0, WIDTH << 16, 0, 1 << 30)
        }

    picture = np.arange(WIDTH * HEIGHT * 3, dtype=np.uint32).astype(np.uint8).reshape(HEIGHT, WIDTH, 3)

    class Reformatter:
        def reformat(self, frame, format, threads):
            return av.VideoFrame.from_ndarray(picture, format="rgb24")

    with Source(plain) as source:
        painter = _Painter(source)
        painter.reformatter = Reformatter()
        got = painter.picture(Frame(), source.start)
    assert got.size == (HEIGHT, WIDTH) and np.array_equal(got.pixels, picture[:, ::-1])


def test_pixel_aspect(folder):
    path = write_video(folder / "wide.mp4", pixel_aspect=Fraction(4, 3))
    found = probe(path)
    assert (found.width, found.height) == (213, 96)
    frames, _ = decode(path, [1.0])
    assert frames.shape == (1, 3, 96, 213)
    assert torch.equal(frames, resize(sequential(path)[25][None], 96, 213))


@pytest.mark.parametrize("name", ["b.mp4", "open.mp4", "hevc.mp4"])
def test_a_seek_goes_to_the_key_frame_itself(folder, name):
    """Not to the one before, which would cost a whole group of pictures more."""
    with Source(get(folder, name)) as source:
        entries = source.stream.index_entries
        keys = [k for k in range(len(entries)) if entries[k].is_keyframe]
        assert source.table is None and source.delay > 0 and len(keys) > 2
        for key in reversed(keys):
            packet, _ = next(source.packets(key))
            assert packet.is_keyframe and packet.dts == entries[key].timestamp


def test_non_reference_frames_are_skipped(folder, monkeypatch):
    """One frame per second of a file with B-frames takes fewer decoded frames than there are, and the same ones come
    out."""
    path, painted = get(folder, "b.mp4"), []
    monkeypatch.setattr(
        _Painter,
        "picture",
        lambda self, f, pts, real=_Painter.picture: (painted.append(pts), real(self, f, pts))[1],
    )
    skipped = []
    with Source(path) as source:
        assert _can_skip(source)
        for packet, wanted in _needed(source.packets(0), [source.tick(0.6)], {}):
            skipped.append((packet.pts, wanted))
    assert sum(wanted for _, wanted in skipped) == 1
    frames, _ = decode(path, [0.0, 1.0, 2.0])
    assert [read_number(f) for f in frames] == [0, 25, 50] and len(painted) == 3
    with Source(get(folder, "layers.mp4")) as source:
        assert not _can_skip(source)


# ---------------------------------------------------------------- real files


def facts() -> dict:
    if not REAL.is_dir():
        pytest.skip(f"no real videos at {REAL}")
    return json.loads((REAL / "facts.json").read_text())["files"]


REAL_NAMES = [
    "av1_video.mkv",
    "cursed-vfr.mp4",
    "demo.mp4",
    "fire2.mp4",
    "hevc.ts",
    "nasa_13013.mp4",
    "no_duration.webm",
    "test.avi",
]


@pytest.mark.parametrize("name", [*REAL_NAMES, "video_90.mov"])
def test_real_files(name):
    known = facts()[name]["ffprobe_decode_v0"]["time"]
    times = [t - known[0] for t in known if t is not None]  # test.avi: the last one has none
    frames, shown = decode(REAL / name, times, (56, 56))
    assert shown == pytest.approx(times, abs=2e-6)
    rng = random.Random(name)
    for n in (1, 3, 20):
        rows = [rng.randrange(len(times)) for _ in range(n)]
        some, at = decode(REAL / name, [times[k] for k in rows], (56, 56))
        assert at == [shown[k] for k in rows] and torch.equal(some, frames[rows])


def test_real_sizes_and_lengths():
    facts()
    known = {
        "video_90.mov": (0.1, 320, 568),
        "fire2.mp4": (2.379767, 1280, 720),
        "demo.mp4": (10.0, 427, 256),
        "nasa_13013.mp4": (13.0, 320, 180),
        "cursed-vfr.mp4": (8.725503, 3026, 1386),
        "hevc.ts": (5.0, 1920, 1080),
    }
    for name, (duration, width, height) in known.items():
        found = probe(REAL / name)
        assert (found.width, found.height) == (width, height)
        assert found.duration == pytest.approx(duration, abs=1e-5)


def test_real_damage():
    """corrupted.mp4 is damaged from 2.9 s on; up to there it is as good as any file."""
    facts()
    path = REAL / "corrupted.mp4"
    times = [k / 10 for k in range(50)]
    with pytest.raises(VideoError, match=r"damaged: the frame shown at 2.900 s cannot be decoded; "):
        decode(path, times, (56, 56))
    assert decode(path, times[:29], (56, 56))[1] == pytest.approx(times[:29])


# ---------------------------------------------------------------- damage


def test_truncated(plain, tmp_path):
    path = tmp_path / "cut.mp4"
    write_video(tmp_path / "whole.mp4", options=B_FRAMES, container={"movflags": "faststart"})
    data = (tmp_path / "whole.mp4").read_bytes()
    path.write_bytes(data[: len(data) * 2 // 3])
    with pytest.raises(VideoError, match=r"cut.mp4: truncated: readable up to \d\.\d+ s; ") as error:
        probe(path)
    end = float(re.search(r"up to (\d\.\d+) s", str(error.value))[1])
    assert 0.5 < end < 2
    whole = sequential(tmp_path / "whole.mp4")
    n = round(end * 25)
    frames, _ = decode(path, [k / 25 for k in range(n)])  # what is readable needs no option
    assert all(torch.equal(a, b) for a, b in zip(frames, whole[:n], strict=True))
    with pytest.raises(VideoError, match="truncated"):
        decode(path, [2.2])
    with pytest.raises(VideoError, match="truncated"):
        decode(path, [n / 25])


def test_truncated_matroska(folder, tmp_path):
    data = get(folder, "b.mkv").read_bytes()
    path = tmp_path / "cut.mkv"
    path.write_bytes(data[: len(data) // 3])
    with pytest.raises(VideoError, match=r"truncated: readable up to \d\.\d+ s") as error:
        probe(path)
    assert 0.1 < float(re.search(r"up to (\d\.\d+) s", str(error.value))[1]) < 1.5


def damaged(path: Path, target: Path) -> Path:
    """A copy with a packet in the middle overwritten by zeros."""
    with av.open(str(path)) as file:
        packet = [p for p in file.demux(video=0) if p.size][25]
    data = bytearray(path.read_bytes())
    data[packet.pos + 16 : packet.pos + 700] = bytes(684)
    target.write_bytes(data)
    return target


@pytest.mark.parametrize("name", ["b.mp4", "open.mp4"])
def test_damage_in_the_middle(folder, tmp_path, name):
    """Never a wrong picture without an error."""
    path = get(folder, name)
    whole, times, broken = sequential(path), times_of(name), damaged(path, tmp_path / name)
    failed = 0
    for k, t in enumerate(times):
        try:
            frames, _ = decode(broken, [t])
        except VideoError as error:
            assert "damaged" in str(error)
            failed += 1
        else:
            assert torch.equal(frames[0], whole[k])
    assert 0 < failed < len(times)


def test_lost_packets(folder, tmp_path):
    """Matroska's reader drops what it cannot parse: frames are gone without a trace, those that refer to them tell."""
    path = get(folder, "b.mkv")
    broken = damaged(path, tmp_path / "b.mkv")
    with pytest.raises(VideoError, match="damaged"):
        decode(broken, times_of("b.mkv"))
    assert torch.equal(decode(broken, [0.5, 2.0])[0], decode(path, [0.5, 2.0])[0])


@pytest.mark.parametrize("name", ["b.mp4", "b.mkv", "b.ts", "vp9.webm", "mpeg4.avi", "b.flv", "raw.h264"])
def test_random_damage_never_hangs_or_crashes(folder, tmp_path, name):
    data, rng = get(folder, name).read_bytes(), random.Random(0)
    for trial in range(25):
        broken = bytearray(data if trial % 3 else data[: rng.randrange(1, len(data))])
        for _ in range(rng.choice([1, 3, 10])):
            place = rng.randrange(len(broken))
            broken[place : place + 50] = rng.randbytes(min(50, len(broken) - place))
        path = tmp_path / name
        path.write_bytes(broken)
        began = time.monotonic()
        try:
            found = probe(path)
            frames, shown = decode(path, [0.0, found.duration / 2])
            assert frames.shape[0] == len(shown) == 2
        except VideoError as error:
            assert str(error).startswith(f"{path}: ") and "; " in str(error)
        assert time.monotonic() - began < 60


def test_a_stream_that_appears_late_does_no_harm(plain):
    """As in a damaged FLV file: PyAV reads everything, then stumbles over a stream that it does not know."""
    with Source(plain) as source:
        packets = [packet for packet in source.container.demux(source.stream) if packet.size]

        def demux(*streams):
            yield from packets
            raise IndexError("list index out of range")

        source.container = SimpleNamespace(demux=demux, close=source.container.close)
        assert list(source.demux(source.stream)) == packets and len(packets) > 50 and not source.broken


# ---------------------------------------------------------------- bad input


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def png(width: int = 8, height: int = 8) -> bytes:
    codec = av.CodecContext.create("png", "w")
    codec.width, codec.height, codec.pix_fmt, codec.time_base = width, height, "rgb24", Fraction(1, 25)
    frame = av.VideoFrame.from_ndarray(np.zeros((height, width, 3), np.uint8), format="rgb24")
    return b"".join(bytes(packet) for packet in codec.encode(frame))


def write_audio(path: Path) -> Path:
    with av.open(str(path), "w") as file:
        stream = file.add_stream("mp3" if path.suffix == ".mp3" else "aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return path


def write_mp3_with_cover(path: Path) -> Path:
    sound = write_audio(path.with_name("sound.mp3")).read_bytes()
    if sound[:3] == b"ID3":
        size = sound[6] << 21 | sound[7] << 14 | sound[8] << 7 | sound[9]
        sound = sound[10 + size :]
    picture = b"\x00image/png\x00\x03\x00" + png()
    frame = b"APIC" + struct.pack(">I", len(picture)) + b"\x00\x00" + picture
    size = len(frame)
    path.write_bytes(
        b"ID3\x03\x00\x00" + bytes([size >> 21 & 127, size >> 14 & 127, size >> 7 & 127, size & 127]) + frame + sound
    )
    return path


def bad_files(folder: Path) -> dict[str, tuple[Path, str]]:
    """Unusable files, each with the cause that the message names."""
    whole = get(folder, "cfr.mp4").read_bytes()
    made = {}

    def put(name: str, data: bytes, cause: str) -> None:
        path = folder / name
        path.write_bytes(data)
        made[name] = (path, cause)

    put("empty.mp4", b"", "the file is empty")
    put("text.txt", b"this is not a video\n" * 50, "text file|not a video")
    put("text.mp4", b"this is not a video\n" * 50, "text file|not a video")
    put("no_moov.mp4", whole[: whole.index(b"moov") - 4], "moov")
    made["missing.mp4"] = (folder / "missing.mp4", "no such file")
    made["folder"] = (folder, "not a regular file")
    made["audio.m4a"] = (write_audio(folder / "audio.m4a"), r"no video stream \(audio only\)")
    made["cover.mp3"] = (write_mp3_with_cover(folder / "cover.mp3"), r"no video stream \(a cover picture\)")
    return made


BAD = ["empty.mp4", "text.txt", "text.mp4", "no_moov.mp4", "missing.mp4", "folder", "audio.m4a", "cover.mp3"]


@pytest.mark.parametrize("name", BAD)
def test_bad_files(folder, name):
    path, cause = bad_files(folder)[name]
    for use in (probe, lambda p: decode(p, [0.0])):
        with pytest.raises(VideoError, match=rf"{path}: .*({cause}).*; \w+"):
            use(path)


@pytest.mark.parametrize("t", [-0.1, math.nan, math.inf])
def test_bad_times(plain, t):
    with pytest.raises(VideoError, match=r"no frame is shown at .*; "):
        decode(plain, [0.0, t])


def test_no_times(plain):
    with pytest.raises(VideoError, match="no times"):
        decode(plain, [])


def test_one_pixel(tmp_path):
    path = tmp_path / "pixel.mkv"
    with av.open(str(path), "w") as file:
        stream = file.add_stream("ffv1", rate=25)
        stream.width, stream.height, stream.pix_fmt = 1, 1, "bgr0"
        for k in range(3):
            frame = av.VideoFrame.from_ndarray(np.full((1, 1, 3), 80 * k, np.uint8), format="rgb24")
            file.mux(stream.encode(frame.reformat(format="bgr0")))
        file.mux(stream.encode())
    frames, _ = decode(path, [0.0, 0.04, 0.08])
    assert frames.flatten().tolist() == [0] * 3 + [80] * 3 + [160] * 3
    found = probe(path)
    clip = load_clip(plan_clip(found, None, 25, Budget(64, 4, 16)), path)
    assert clip.frames.shape == (3, 3, 112, 112)


def test_one_frame(folder):
    found = probe(get(folder, "one.mp4"))
    assert found.duration == pytest.approx(0.04)
    assert len(plan_clip(found, None, 2, Budget(64, 4, 16)).times) == 1
    assert len(plan_clip(found, [(0, 0)], 2, Budget(64, 4, 16)).times) == 1


def test_a_still_picture_is_a_video_of_one_frame(tmp_path):
    path = tmp_path / "still.png"
    path.write_bytes(png(64, 32))
    found = probe(path)
    assert (found.width, found.height) == (64, 32) and found.duration > 0
    assert decode(path, [0.0])[0].shape == (1, 3, 32, 64)


def test_large_frames_are_refused_before_decoding(tmp_path, monkeypatch):
    path = tmp_path / "large.mkv"
    with av.open(str(path), "w") as file:
        stream = file.add_stream("ffv1", rate=25)
        stream.width, stream.height, stream.pix_fmt = 8192, 4324, "gray"
        file.mux(stream.encode(av.VideoFrame(8192, 4324, "gray")))
        file.mux(stream.encode())
    monkeypatch.setattr("media.decode._answer", None)  # nothing is decoded
    with pytest.raises(VideoError, match=r"8192 x 4324 pixels are more than 35389440; "):
        probe(path)


def test_large_frames_are_refused_as_displayed(folder, monkeypatch):
    path = write_video(folder / "wide.mp4", pixel_aspect=Fraction(4, 3))
    monkeypatch.setattr("media.decode.MAX_PIXELS", 20000)  # of 213 x 96, from 160 x 96
    with pytest.raises(VideoError, match="213 x 96 pixels, as displayed, are more than 20000; "):
        probe(path)


def test_reading_is_bounded():
    """A demuxer that never ends is an error after as many packets as the file has bytes."""

    class Endless:
        def demux(self, *streams):
            return itertools.repeat(av.Packet(b"x"))

    source = Source.__new__(Source)
    source.path, source.n_bytes, source.container = "endless.ts", 500, Endless()
    with pytest.raises(VideoError, match=r"endless\.ts: reading does not end after 1501 packets; "):
        list(source.demux())


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="counts file descriptors in /proc")
def test_a_thousand_opens_leak_nothing(folder, plain):
    bad = [path for path, _ in bad_files(folder).values()]
    seen = []
    for k in range(1000):
        if k % 2:
            decode(plain, [0.5], (28, 28))
        else:
            with pytest.raises(VideoError):
                probe(bad[k // 2 % len(bad)])
        if k in (299, 999):
            gc.collect()
            seen.append((len(os.listdir("/proc/self/fd")), resident(), threading.active_count()))
    (files, memory, threads), (files_after, memory_after, threads_after) = seen
    assert files_after <= files and threads_after <= threads
    assert memory_after - memory < 8e6


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_decoding_leaves_nothing_behind(plain, monkeypatch, error):
    """What stops a worker reaches the caller, and no worker stays."""
    before, count = threading.active_count(), itertools.count()

    def picture(self, frame, pts, real=_Painter.picture):
        if next(count) == 5:
            raise error
        return real(self, frame, pts)

    monkeypatch.setattr("media.decode.WORTH_THREADS", 0)
    monkeypatch.setattr(_Painter, "picture", picture)
    with pytest.raises(error):
        decode(plain, times_of("b.mp4"), (56, 56), threads=2)
    assert threading.active_count() == before
