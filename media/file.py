"""An open video file: what may be opened, which of its streams is the video, its packets one by one.

Formats that only point to other files or addresses (playlists, patterns of numbered pictures, devices) are not opened.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import av
from av.codec.context import Flags
from av.stream import Disposition

CLOCK = 2e-6  # seconds by which a time may miss a frame's own, so that times printed with six decimals find their frame
MAX_PIXELS = 8192 * 4320  # of a frame
POINTERS = {
    *("alsa", "concat", "dash", "fbdev", "hls", "image2", "imf", "kmsgrab", "lavfi", "oss", "rtp", "rtsp", "sap"),
    *("sdp", "tty", "video4linux2,v4l2", "webm_dash_manifest", "x11grab"),
}
CONTAINERS = ",".join(sorted(av.formats_available - POINTERS))
STILLS = {"bmp", "gif", "jpegls", "jpeg2000", "mjpeg", "png", "tiff", "webp"}  # codecs of cover pictures
PLAYLISTS = (b"#EXTM3U", b"ffconcat", b"v=0")


class VideoError(Exception):
    """A video or a request that cannot be served: the message names the file, the cause and what to do."""

    def __init__(self, path: str | Path, cause: str, advice: str):
        super().__init__(f"{path}: {cause}; {advice}")


class IrregularError(Exception):
    """What a file says about its packets is not what its decoder shows: it takes a closer look."""


class OpenFile:
    """An open file and its video stream. `clock`: the length of a tick in seconds; `broken`: whether reading failed."""

    def __init__(self, path: str | Path):
        self.path, self.threads, self.broken = path, 1, False
        self._open()

    def _open(self) -> None:
        path = self.path
        if not os.path.exists(path):
            if re.match(r"\w[\w+.-]+:/", str(path)):
                raise VideoError(path, "an address, not a file", "download it and give the file's path")
            raise VideoError(path, "no such file", "check the path")
        if not os.path.isfile(path):
            raise VideoError(path, "not a regular file", "give the path of a video file")
        try:
            self.n_bytes = os.path.getsize(path)
            with open(path, "rb") as file:
                head = file.read(64)
        except OSError as error:
            raise VideoError(path, f"it cannot be read ({error.strerror})", "check its permissions") from error
        if self.n_bytes == 0:
            raise VideoError(path, "the file is empty", "get it again")
        try:
            # An absolute path: what stands before a colon in a relative one would be taken for a protocol.
            options = {"format_whitelist": CONTAINERS, "protocol_whitelist": "file"}
            self.container = av.open(os.path.abspath(path), container_options=options, metadata_errors="replace")
        except (av.error.FFmpegError, OSError) as error:
            raise VideoError(path, *_why_closed(head, error)) from error
        try:
            self.stream = self._pick_stream(head)
        except BaseException:
            self.container.close()
            raise
        self.codec = self.stream.codec_context
        self.codec.options = {"max_pixels": str(MAX_PIXELS)}
        self.codec.flags |= Flags.copy_opaque  # a frame then tells which packet it comes from
        self.codec.thread_type = "FRAME" if self.threads > 1 else "SLICE"
        self.codec.thread_count = self.threads
        self.clock = float(self.stream.time_base)
        rate = self.stream.average_rate or self.stream.base_rate or 25
        self.period = 1 / float(rate) / self.clock  # ticks from frame to frame, if they are regular

    def _pick_stream(self, head: bytes) -> av.VideoStream:
        """The video stream, checked before anything is decoded: no cover picture, by default the one so flagged."""
        videos = self.container.streams.video
        streams = [s for s in videos if not s.disposition & Disposition.attached_pic]
        films = [s for s in streams if s.codec_context is None or s.codec_context.name not in STILLS]
        streams = sorted(films or streams, key=lambda s: (s.frames == 1, not s.disposition & Disposition.default))
        if not streams:
            kinds = ", ".join(sorted({s.type for s in self.container.streams} - {"video"}))
            found = "a cover picture" if videos else f"{kinds} only" if kinds else "no stream at all"
            raise VideoError(self.path, f"no video stream ({found})", "give a file that has one")
        codec = streams[0].codec_context
        if codec is None:
            raise VideoError(self.path, "its codec is not known here", "convert it to H.264")
        if codec.name == "webp" and b"ANIM" in head:
            raise VideoError(self.path, "an animated WebP, which is not decoded here", "convert it to mp4")
        if codec.width * codec.height > MAX_PIXELS:
            cause = f"{codec.width} x {codec.height} pixels are more than {MAX_PIXELS}"
            raise VideoError(self.path, cause, "scale it down")
        return streams[0]

    def reopen(self, threads: int) -> None:
        """Go back to the first packet, with this number of decoding threads."""
        self.close()
        self.threads = threads
        self._open()

    def close(self) -> None:
        self.container.close()

    def __enter__(self):
        return self

    def __exit__(self, *exc) -> None:
        self.close()

    def demux(self, *streams) -> Iterator[av.Packet]:
        """Packets with content, up to the end of the file or to where reading fails (`broken`)."""
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

    def seek(self, tick: int, any_frame: bool = False) -> bool:
        """Go to the last key frame at or before a tick, or to any frame; whether the file can."""
        try:
            self.container.seek(tick, stream=self.stream, any_frame=any_frame)
        except (av.error.FFmpegError, OverflowError):
            return False
        return True

    def feed(self, packet: av.Packet | None) -> tuple[list[av.VideoFrame], bool]:
        """What the decoder hands out for a packet (None: the last frames it holds), and whether it decodes."""
        try:
            return self.codec.decode(packet), True
        except av.error.FFmpegError:
            return [], False


def _why_closed(head: bytes, error: Exception) -> tuple[str, str]:
    """Why a file cannot be opened, and what to do."""
    if head.startswith(PLAYLISTS) or b"<MPD" in head:
        return "a list of other files, not a video", "give the path of each video"
    if b"ftyp" in head[:12]:
        return (
            "an mp4 file without a readable index (moov atom)",
            "its recording or download did not finish, get it again",
        )
    if b"\0" not in head and all(byte < 128 for byte in head):
        return "a text file", "give the path of a video file"
    return f"not a video ({error.strerror})", "convert it to mp4"
