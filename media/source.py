"""Where the packets of a video file are: an open file, its video stream, its index or the table of its packets.

The index of an mp4 or mov file is searched, so that only the packets needed are read. Any other file is read through
once, without decoding, for its `Table`.

A time is float seconds from the first displayed frame, a tick a unit of the stream's own clock.
"""

from __future__ import annotations

import itertools
import math
import os
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import av
from av.stream import Disposition

CLOCK = 2e-6  # seconds by which a time may miss a frame's own, so that times printed with six decimals find their frame
MAX_PIXELS = 8192 * 4320  # of a frame


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


class IrregularError(Exception):
    """The index of an mp4 file cannot be trusted: it takes a `Table`."""


class Source:
    """An open file and its first video stream that is not a cover picture.

    The index of an mp4 or mov file is searched, so that only the packets needed are read. Any other file is read
    through once, without decoding, for its `Table`. A key frame goes by its number in the index or in the table.
    """

    def __init__(self, path: str | Path, table: Table | None = None):
        self.path, self.table, self.threads = path, table, 1
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
        """For a truncated file: up to where it can be read."""
        cause = f"truncated: readable up to {max(0.0, self.seconds(self.end)):.3f} s"
        return VideoError(self.path, cause, "get it again")

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
                raise IrregularError
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
