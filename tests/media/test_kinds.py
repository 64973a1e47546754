"""Any file: the right picture at any time, or an error that names the cause."""

import builtins
import os
import struct
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import av
import pytest
import torch
from av.stream import Disposition

from media import table
from media.decode import TABLES, probe, show_pictures
from media.file import OpenFile, VideoError
from media.source import Source
from tests.kinds import KINDS, copy_packets, read_packets
from tests.numbered import get, read_number, write_video
from video import decode


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_shows_its_frames_at_their_times(folder, kind):
    path, times, numbers = KINDS[kind](folder)
    ends = [*times[1:], times[-1] + 0.04]
    found = probe(path)
    assert found.duration == pytest.approx(ends[-1], abs=0.1)
    middles = [(start + end) / 2 for start, end in zip(times, ends, strict=True)]
    frames, at = decode(path, [*times, *middles])
    assert [read_number(frame) for frame in frames] == numbers * 2
    assert at == pytest.approx(times * 2, abs=1.1e-3)
    for k in (len(times) - 1, 0, len(times) // 2):
        assert read_number(decode(path, [middles[k]])[0][0]) == numbers[k]


@pytest.mark.skipif(not hasattr(os, "sched_getscheduler"), reason="a scheduler that cannot be asked")
def test_making_a_file_leaves_the_process_its_priority(tmp_path):
    before = os.sched_getscheduler(0), os.sched_getparam(0)
    get(tmp_path, "av1.mkv")
    assert (os.sched_getscheduler(0), os.sched_getparam(0)) == before


def test_a_clock_that_goes_back_and_forth_is_refused(folder, monkeypatch):
    times = [0, 80, 40, 120]
    frames = [SimpleNamespace(pts=time, dts=time) for time in times]
    monkeypatch.setattr("media.table.play", lambda *_: [table.Output(frame, True, True) for frame in frames])
    with Source(get(folder, "b.mkv")) as source, pytest.raises(VideoError, match="its frames goes back and forth; "):
        source.use_table(closely=True)
    assert table._complete(times, 40) is None
    assert table._complete([None, 80, None, 160, None], 40) == [40, 80, 120, 160, 200]
    assert table._complete([None, None], 40) is None


def test_a_row_without_a_picture_is_an_error(plain, monkeypatch):
    monkeypatch.setattr("video.show_pictures", lambda source, ticks, show, **_: show_pictures(source, ticks[:1], show))
    with pytest.raises(VideoError, match=r"b\.mp4: nothing is shown at 1\.000 s; "):
        decode(plain, [0.0, 1.0])


def test_damage_in_a_file_that_is_played_is_never_a_wrong_picture(folder, tmp_path):
    whole = get(folder, "mpeg4.avi")
    packet = read_packets(whole)[25]
    data = bytearray(whole.read_bytes())
    data[packet.pos : packet.pos + 300] = bytes(300)  # with its header, which its decoder misses
    path = tmp_path / "broken.avi"
    path.write_bytes(data)
    seen = []
    for k in range(60):
        try:
            seen.append(torch.equal(decode(path, [k / 25])[0], decode(whole, [k / 25])[0]))
        except VideoError as error:
            assert "damaged" in str(error)
            seen.append(None)
    assert False not in seen and 20 < seen.count(True) < 60


@pytest.mark.parametrize("suffix", ["mkv", "avi"])
def test_a_last_frame_that_lasts_is_not_truncation(tmp_path, suffix):
    """A stated length beyond the last packet is no sign of missing bytes; missing bytes are."""
    options = {"preset": "veryfast", "bf": "0"}
    path = write_video(tmp_path / f"still.{suffix}", 26, pts=[*range(25), 125], clock=Fraction(1, 25), options=options)
    assert probe(path).duration == pytest.approx(5.04, abs=0.01)
    data = path.read_bytes()
    if suffix == "mkv":  # padding in place of the last packet, as if the frame before had lasted
        place = read_packets(path)[25].pos
        n = len(data) - place - 9
        path.write_bytes(data[:place] + b"\xec" + (n | 1 << 56).to_bytes(8) + bytes(n))
        assert probe(path).duration == pytest.approx(1)
    path.write_bytes(data[: len(data) * 3 // 4])
    with pytest.raises(VideoError, match="truncated: readable up to"):
        probe(path)


def test_no_picture_is_shown_before_its_time_where_frames_are_lost(folder, tmp_path):
    """AVI whose last packets hold nothing that can be decoded: there are fewer frames than packets."""
    whole = get(folder, "mpeg4.avi")
    data = bytearray(whole.read_bytes())
    for packet in read_packets(whole)[40:]:
        data[packet.pos : packet.pos + packet.size] = bytes(packet.size)
    path = tmp_path / "lost.avi"
    path.write_bytes(data)
    for t in [k / 25 for k in range(60)]:
        try:
            frames, (at,) = decode(path, [t])
        except VideoError:
            continue
        assert at <= t + 1e-6 and torch.equal(frames, decode(whole, [at])[0])


# ---------------------------------------------------------------- names, streams, causes


@pytest.mark.parametrize("name", ["12:30 clip.mp4", "2024-01-01T10:00:00.mp4", "concat:b.mp4", "a%03d.mp4"])
def test_any_name(plain, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    Path(name).write_bytes(plain.read_bytes())
    assert probe(name).duration == pytest.approx(2.4)
    assert read_number(decode(name, [1.0])[0][0]) == 25


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("list.m3u8", "#EXTM3U\n#EXT-X-TARGETDURATION:3\n#EXTINF:2.4,\nb.ts\n#EXT-X-ENDLIST\n"),
        ("list.txt", "ffconcat version 1.0\nfile b.ts\n"),
        ("list.sdp", "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n"),
    ],
)
def test_a_list_of_other_files_is_not_followed(folder, tmp_path, name, text):
    (tmp_path / "b.ts").write_bytes(get(folder, "b.ts").read_bytes())
    (tmp_path / name).write_text(text)
    with pytest.raises(VideoError, match="a list of other files, not a video; "):
        probe(tmp_path / name)


def test_an_address_is_not_a_file():
    for name in ("https://example.org/a.mp4", Path("https://example.org/a.mp4")):
        with pytest.raises(VideoError, match="an address, not a file; download it"):
            probe(name)


def test_an_unreadable_file(plain, monkeypatch):
    def forbidden(path, *rest, real=open, **options):
        if str(path) == str(plain):
            raise PermissionError(13, "Permission denied")
        return real(path, *rest, **options)

    monkeypatch.setattr(builtins, "open", forbidden)
    with pytest.raises(VideoError, match=r"it cannot be read \(Permission denied\); check its permissions"):
        probe(plain)


def test_protected_and_animated_files_are_named(plain, tmp_path):
    protected = tmp_path / "drm.mp4"
    key = {"encryption_scheme": "cenc-aes-ctr", "encryption_key": "00" * 16, "encryption_kid": "11" * 16}
    copy_packets(plain, protected, lambda packets: packets, key)
    with pytest.raises(VideoError, match=r"encrypted \(DRM\); "):
        probe(protected)
    animated = tmp_path / "animated.webp"
    chunk = (
        b"VP8X" + struct.pack("<I", 10) + bytes([2, 0, 0, 0, 7, 0, 0, 7, 0, 0]) + b"ANIM" + struct.pack("<IIH", 6, 0, 0)
    )
    animated.write_bytes(b"RIFF" + struct.pack("<I", len(chunk) + 4) + b"WEBP" + chunk)
    with pytest.raises(VideoError, match="an animated WebP, which is not decoded here; "):
        probe(animated)


@pytest.mark.parametrize("first", ["cover", "other"])
def test_the_stream_that_is_the_video(folder, tmp_path, first):
    """Not a picture that comes before it; the one with the default flag."""
    path = tmp_path / "two.mkv"
    cover = write_video(tmp_path / "cover.mkv", 1, codec="mjpeg", options={}, pix_fmt="yuvj420p")
    other = write_video(tmp_path / "other.mkv", 60, pts=[0, *range(101, 160)], clock=Fraction(1, 25))
    with (
        av.open(str(cover if first == "cover" else other)) as before,
        av.open(str(get(folder, "b.mkv"))) as film,
        av.open(str(path), "w") as out,
    ):
        streams = [out.add_stream_from_template(file.streams.video[0]) for file in (before, film)]
        streams[0].disposition, streams[1].disposition = 0, Disposition.default
        for file, stream in zip((before, film), streams, strict=True):
            for packet in file.demux(video=0):
                if packet.size:
                    packet.stream = stream
                    out.mux(packet)
    assert read_number(decode(path, [1.0])[0][0]) == 25


# ---------------------------------------------------------------- errors


def test_a_file_that_cannot_seek_is_read_from_its_beginning(folder, monkeypatch):
    paths = [get(folder, "b.mkv"), get(folder, "b.mp4")]
    before = [decode(path, [1.0, 2.0])[0] for path in paths]
    monkeypatch.setattr(OpenFile, "seek", lambda *_, **__: False)
    for path, frames in zip(paths, before, strict=True):
        assert torch.equal(decode(path, [1.0, 2.0])[0], frames)


def test_nothing_but_video_errors_comes_out(plain, monkeypatch):
    for error in (av.error.ArgumentError(22, "Invalid argument"), OSError("gone")):

        def fail(*_, error=error, **__):
            raise error

        monkeypatch.setattr("media.decode.show_pictures", fail)
        with pytest.raises(VideoError, match=r"b\.mp4: it cannot be read .*; "):
            probe(plain)


def test_a_file_without_an_index_is_read_through_once(folder, tmp_path, monkeypatch):
    path = tmp_path / "once.ts"
    path.write_bytes(get(folder, "b.ts").read_bytes())
    scans = []
    monkeypatch.setattr("media.source.scan", lambda *a, real=table.scan: (scans.append(a), real(*a))[1])
    probe(path)
    decode(path, [0.5])
    decode(path, [1.5], (28, 28), threads=2)
    assert len(scans) == 1
    path.write_bytes(get(folder, "open.ts").read_bytes())
    os.utime(path, ns=(1, 1))
    probe(path)
    assert len(scans) == 2
    assert TABLES.n_bytes <= TABLES.max_bytes
