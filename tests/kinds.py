"""Files of the kinds that readers get wrong, and what they show: made from videos with a number in every frame."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable
from fractions import Fraction
from pathlib import Path

import av
import pytest
from av.bitstream import BitStreamFilterContext

from tests.numbered import (
    FILES,
    HEIGHT,
    IRREGULAR,
    OPEN_GOP,
    WIDTH,
    X264,
    coded_picture,
    get,
    same_priority,
    texture,
    write_video,
)

Truth = tuple[Path, list[float], list[int]]  # a file, the time and the number of each of its frames
REFRESH = {**X264, "x264-params": "intra-refresh=1:keyint=20:bframes=0"}


def read_packets(path: Path) -> list[av.Packet]:
    with av.open(str(path)) as file:
        return [packet for packet in file.demux(video=0) if packet.size]


def copy_packets(
    source: Path, target: Path, change: Callable[[list[av.Packet]], Iterable[av.Packet]], options: dict | None = None
) -> Path:
    """Write the packets of a file to another one, without encoding, after a change."""
    with av.open(str(source)) as file, av.open(str(target), "w", options=options or {}) as out:
        stream = out.add_stream_from_template(file.streams.video[0])
        for packet in change([packet for packet in file.demux(video=0) if packet.size]):
            packet.stream = stream
            out.mux(packet)
    return target


def regular(path: Path, numbers: Iterable[int]) -> Truth:
    """What a file shows at 25 frames per second."""
    numbers = list(numbers)
    return path, [k / 25 for k in range(len(numbers))], numbers


def from_key(key: int, shift: bool = False) -> Callable[[list[av.Packet]], list[av.Packet]]:
    """The packets from a key frame on (by its place among them); with `shift`, it is shown at 0."""

    def change(packets: list[av.Packet]) -> list[av.Packet]:
        packets = packets[[k for k, packet in enumerate(packets) if packet.is_keyframe][key] :]
        start = packets[0].pts if shift else 0
        for packet in packets:
            packet.pts, packet.dts = packet.pts - start, None if packet.dts is None else packet.dts - start
        return packets

    return change


def decode_order(packets: list[av.Packet]) -> list[av.Packet]:
    for packet in packets:
        packet.pts = packet.dts
    return packets


def unknown_time(folder: Path) -> Truth:
    """Matroska whose second packet is shown before time 0: it has no time, and no picture."""
    whole = write_video(folder / "uneven.mp4", pts=IRREGULAR, clock=Fraction(1, 1000), options=OPEN_GOP)
    path = copy_packets(whole, folder / "unknown.mkv", from_key(1, True), {"avoid_negative_ts": "disabled"})
    assert [packet.pts for packet in read_packets(path)][1] is None
    return path, [(time - IRREGULAR[16]) / 1000 for time in IRREGULAR[16:]], list(range(16, 60))


def hidden_packets(folder: Path) -> Truth:
    """AV1 whose frames, shown and hidden, have packets of their own."""
    path, ground = folder / "hidden.mkv", texture(WIDTH, HEIGHT)
    if "libsvtav1" not in av.codecs_available:
        pytest.skip("this PyAV has no encoder libsvtav1")
    with same_priority(), av.open(str(path), "w") as file:
        stream = file.add_stream("libsvtav1", rate=25, options=FILES["av1.mkv"]["options"])
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        splitter = BitStreamFilterContext("av1_frame_split", stream)
        for k in range(61):
            picture = coded_picture(k, WIDTH, HEIGHT, ground)
            for packet in stream.encode(av.VideoFrame.from_ndarray(picture, format="yuv420p") if k < 60 else None):
                file.mux(splitter.filter(packet))
    return regular(path, range(60))


def joined(*names: str) -> Callable[[Path], Truth]:
    """Files one after the other, each with a clock of its own."""

    def make(folder: Path) -> Truth:
        path = folder / f"joined_{len(names)}_{names[0]}"
        path.write_bytes(b"".join(get(folder, name).read_bytes() for name in names))
        return regular(path, [*range(60)] * len(names))

    return make


def jump_ahead(folder: Path) -> Truth:
    """Two transport streams, the clock of the second 100 s ahead."""

    def later(packets: list[av.Packet]) -> list[av.Packet]:
        for packet in packets:
            packet.pts, packet.dts = packet.pts + 100 * 90000, packet.dts + 100 * 90000
        return packets

    first, path = get(folder, "b.ts"), folder / "ahead.ts"
    copy_packets(first, folder / "second.ts", later)
    path.write_bytes(first.read_bytes() + (folder / "second.ts").read_bytes())
    times = [k / 25 for k in range(60)]
    return path, [*times, *(time + 100 for time in times)], [*range(60), *range(60)]


def early_edit(folder: Path) -> Truth:
    """HEVC in mp4 whose edit list begins before its key frame, with pictures that cannot be decoded."""
    path = copy_packets(get(folder, "hevc.mp4"), folder / "early.mp4", from_key(1, True))
    data = bytearray(path.read_bytes())
    place = data.index(b"elst") + 4
    count = struct.unpack(">I", data[place + 4 : place + 8])[0]
    edit = place + 8 + 12 * (count - 1)  # the last one: its length in milliseconds, where it begins in the stream
    length = struct.unpack(">I", data[edit : edit + 4])[0]
    data[edit : edit + 8] = struct.pack(">II", length + 200, 0)
    path.write_bytes(data)
    return regular(path, range(24, 60))


def copied_avi(folder: Path) -> Truth:
    """mp4 copied from AVI: B-frames with the times of decoding."""
    return regular(copy_packets(get(folder, "mpeg4.avi"), folder / "copied.mp4", decode_order), range(60))


def copied_stream(folder: Path) -> Truth:
    """mp4 copied from a raw H.264 stream."""

    def count(packets: list[av.Packet]) -> list[av.Packet]:
        for k, packet in enumerate(packets):
            packet.pts = packet.dts = k
            packet.time_base, packet.duration = Fraction(1, 25), 1
        return packets

    return regular(copy_packets(get(folder, "raw.h264"), folder / "copied264.mp4", count), range(60))


def dropped(codec: str, options: dict) -> Callable[[Path], Truth]:
    """AVI with B-frames and empty chunks, for frames that were dropped."""

    def make(folder: Path) -> Truth:
        places = [k for k in range(100) if k % 20 not in range(5, 10)][:60]
        path = folder / f"dropped_{codec}.avi"
        write_video(path, codec=codec, options=options, pts=places, clock=Fraction(1, 25))
        return path, [place / 25 for place in places], list(range(60))

    return make


def late(folder: Path) -> Truth:
    """Matroska that begins at 3 s."""
    path = write_video(folder / "late.mkv", pts=[k + 75 for k in range(60)], clock=Fraction(1, 25))
    return regular(path, range(60))


def piece(name: str, key: int, first: int, suffix: str = ".ts") -> Callable[[Path], Truth]:
    """The end of a file, cut at a key frame: pictures that lean on what is not there are never shown."""

    def make(folder: Path) -> Truth:
        path = folder / f"piece_{Path(name).stem}{suffix}"
        return regular(copy_packets(get(folder, name), path, from_key(key)), range(first, 60))

    return make


def cut_refresh(folder: Path) -> Truth:
    """A capture that begins within a gradual refresh, as no recording does: shown from the next one's end on."""
    whole = write_video(folder / "refresh.ts", options=REFRESH)
    path = copy_packets(whole, folder / "piece_refresh.ts", lambda packets: packets[7:])
    with av.open(str(path)) as file:
        n = sum(1 for _ in file.decode(video=0))
    assert 30 < n < 53
    return regular(path, range(60 - n, 60))


def refresh_piece(folder: Path) -> Truth:
    """mp4 whose first picture is refreshed gradually: it is shown when that is done."""
    whole = write_video(folder / "refresh.ts", options=REFRESH)
    path = copy_packets(whole, folder / "piece_refresh.mp4", from_key(1))
    with av.open(str(path)) as file:
        n = sum(1 for _ in file.decode(video=0))
    assert 20 < n < 40
    return regular(path, range(60 - n, 60))


def raw_mjpeg(folder: Path) -> Truth:
    """JPEG pictures one after the other."""
    path = folder / "raw.mjpeg"
    write_video(path, codec="mjpeg", options={}, pix_fmt="yuvj420p", format="mjpeg")
    return regular(path, range(60))


def exif(folder: Path) -> Truth:
    """Motion JPEG with EXIF data in every frame."""
    tag = b"Exif\0\0II*\0" + struct.pack("<IHHHIHHI", 8, 1, 0x0112, 3, 1, 1, 0, 0)
    segment = b"\xff\xe1" + struct.pack(">H", len(tag) + 2) + tag

    def add(packets: list[av.Packet]) -> Iterable[av.Packet]:
        for packet in packets:
            data = bytes(packet)
            new = av.Packet(data[:2] + segment + data[2:])
            new.pts, new.dts, new.time_base, new.is_keyframe = packet.pts, packet.dts, packet.time_base, True
            yield new

    plain = write_video(folder / "plain.mkv", codec="mjpeg", options={}, pix_fmt="yuvj420p")
    return regular(copy_packets(plain, folder / "exif.mkv", add), range(60))


KINDS: dict[str, Callable[[Path], Truth]] = {
    "a packet without a time, Matroska": unknown_time,
    "hidden frames in packets of their own, AV1": hidden_packets,
    "a clock that restarts, MPEG-PS": joined("mpeg2.mpg", "mpeg2.mpg"),
    "a clock that restarts, MPEG-TS": joined("b.ts", "b.ts"),
    "a clock that jumps ahead, MPEG-TS": jump_ahead,
    "an edit list before the key frame, HEVC": early_edit,
    "B-frames with decoding times, mp4 from AVI": copied_avi,
    "B-frames with decoding times, mp4 from raw H.264": copied_stream,
    "dropped frames, MPEG-4 in AVI": dropped("mpeg4", {"bf": "2", "g": "12"}),
    "dropped frames, H.264 in AVI": dropped("libx264", OPEN_GOP),
    "first time 3 s, Matroska": late,
    "piece with leading B-frames, MPEG-2": piece("mpeg2.ts", 1, 12),
    "piece of an open GOP, H.264": piece("open.ts", 1, 16),
    "piece of an open GOP, H.264 in Matroska": piece("open.ts", 1, 16, ".mkv"),
    "piece with RASL pictures, HEVC": piece("hevc.ts", 1, 24),
    "capture within a gradual refresh": cut_refresh,
    "piece that begins with a gradual refresh, mp4": refresh_piece,
    "raw motion JPEG": raw_mjpeg,
    "EXIF in every frame": exif,
}
