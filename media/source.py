"""Where in a file the packets are that a time needs: by the index of an mp4 file, or by the `Table` of any other.

A time is float seconds from the first displayed frame, a tick a unit of the stream's own clock.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_right
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np

from media.file import CLOCK, IrregularError, OpenFile, VideoError
from media.table import Table, first_picture, scan

UNEVEN = 0.05  # by which the average rate of a regular file may differ from that of its shortest steps
REORDERED = 16  # frames that may come out of a decoder later than their packets go in: no codec allows more


class Source(OpenFile):
    """An open file in which times are searched. A key frame goes by its number in the index or in the table."""

    def __init__(self, path: str | Path, table: Table | None = None):
        super().__init__(path)
        self.table = table
        try:
            if table is not None or not self._read_index():
                self.use_table()
        except BaseException:
            self.close()
            raise

    def _read_index(self) -> bool:
        """Whether there is a complete index; if so, learn from it and from the first few packets."""
        entries = self.stream.index_entries
        if "mp4" not in self.container.format.name or not 0 < self.stream.frames == len(entries):
            return False
        self.start, self.delay, first = math.inf, None, None
        for packet in self.demux(self.stream):
            if packet.pts is None or packet.dts is None or packet.pts < packet.dts:
                return False
            if packet.has_sidedata("encryption_info"):
                raise VideoError(self.path, "it is encrypted (DRM)", "get a copy without protection")
            if first is None:  # the index has decoding times; key frames are shown this much later
                first, self.delay = packet, packet.pts - packet.dts
            if not packet.is_discard:
                self.start = min(self.start, packet.pts)
            if packet.dts >= self.start:
                break
        if self.start == math.inf or not first.is_keyframe:
            return False
        if self.start < first.pts or not self._is_complete(first):  # maybe pictures that no decoder can show
            frame, _ = first_picture(self)
            if frame is None or frame.pts is None:
                return False
            self.start = max(self.start, frame.pts)
        # A truncated file lacks the bytes of its last packets. What is shown before the first one is decoded is there.
        entries = self.stream.index_entries  # the file may have been opened again
        lost = len(entries)
        while lost > 0 and entries[lost - 1].pos + entries[lost - 1].size > self.n_bytes:
            lost -= 1
        self.cut = lost < len(entries)
        self.end = entries[lost].timestamp if self.cut else None
        # Reordered frames with the times of decoding are the mark of a file made by copying from AVI or a raw stream.
        self.is_suspect = self.delay == 0 and self.codec.has_b_frames
        return True

    def _is_complete(self, packet: av.Packet) -> bool:
        """Whether a key frame is decoded from its packet alone. In H.264 it may be refreshed by those that follow."""
        extra = self.codec.extradata or b""
        if self.codec.name != "h264" or len(extra) < 5 or extra[0] != 1:
            return True
        data, width, place = bytes(packet), (extra[4] & 3) + 1, 0
        while place + width < len(data):
            if data[place + width] & 31 == 5:  # an IDR slice
                return True
            place += width + int.from_bytes(data[place : place + width], "big")
        return False

    def use_table(self, closely: bool = False) -> None:
        """Turn to the packet table; make it if there is none yet. Raises VideoError."""
        if self.table is None or closely:
            self.table = scan(self, closely)
        table = self.table
        self.start, self.end, self.cut, self.is_suspect = table.times[0], table.end, table.cut, False
        if not table.played:
            self.number = {pts: k for k, pts in enumerate(table.pts) if pts is not None}
            self.key_times = [table.pts[k] for k in table.keys]

    def look_closer(self) -> None:
        """What the index or the table says has turned out to be wrong: read everything, or else decode everything.

        Raises VideoError if that was done.
        """
        if self.table is not None and self.table.played and not self.table.guessed:
            raise VideoError(self.path, "its frames differ from one decoding to the next", "convert it to mp4")
        self.use_table(closely=self.table is not None)

    @property
    def played(self) -> bool:
        """Whether frames are told by their order in a sequential decode of the whole file."""
        return self.table is not None and self.table.played

    def find_end(self) -> int:
        """The tick at which the last frame ends."""
        if self.end is None:
            self.end = max((packet.pts + (packet.duration or 0) for packet in self._last_packets()), default=self.start)
        return self.end

    def _last_packets(self) -> list[av.Packet]:
        """The last packets of a file with an index."""
        entries = self.stream.index_entries
        if not self.seek(entries[max(0, len(entries) - 2 * REORDERED)].timestamp, any_frame=True):
            raise IrregularError
        packets = [packet for packet in self.demux(self.stream) if not packet.is_discard]
        if any(packet.pts is None for packet in packets):
            raise IrregularError
        return packets

    def moments(self) -> np.ndarray | None:
        """The seconds at which frames begin, float64 [N] in order; None if they are regular.

        An index has decoding times. In order, they are those at which frames are shown, some frames late; those of the
        last frames are in their packets.
        """
        if self.table is not None:
            ticks = np.array(self.table.times)
        else:
            entries, end = self.stream.index_entries, self.find_end()
            least = float(self.stream.base_rate or self.stream.average_rate or 0)
            if abs(len(entries) / ((end - self.start) * self.clock or 1) - least) < UNEVEN * least:
                return None
            ticks = np.array([entry.timestamp for entry in entries if not entry.is_discard])
            last = sorted(packet.pts for packet in self._last_packets() if packet.pts > ticks[-1])
            ticks = np.array([*ticks[ticks >= self.start], *last])
        steps = np.diff(ticks)
        if not len(steps) or steps.max() <= 1.5 * np.median(steps):
            return None
        return (ticks - self.start) * self.clock

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

    @property
    def first_key(self) -> int:
        """The first key frame."""
        return 0 if self.table is None else self.table.keys[0]

    def key_of(self, tick: int) -> int:
        """The last key frame shown at or before a tick. With an index, it can be shown later; its packet tells."""
        if self.table is None:
            return max(0, self.stream.index_entries.search_timestamp(tick - self.delay))
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
        return self._indexed_packets(key) if self.table is None else self._tabled_packets(key)

    def _indexed_packets(self, key: int) -> Iterator[tuple[av.Packet, float]]:
        # The index has decoding times, a seek is for presentation times: without the delay it goes to the key before.
        if not self.seek(self.stream.index_entries[key].timestamp + self.delay):
            raise IrregularError
        last = -math.inf
        for packet in self.demux(self.stream):
            if packet.pts is None or packet.dts is None or packet.pts < packet.dts or packet.dts < last:
                raise IrregularError
            last = packet.dts
            yield packet, last

    def _tabled_packets(self, key: int) -> Iterator[tuple[av.Packet, float]]:
        packets = self.demux(self.stream)
        first = next(packets, None) if self.seek(self.table.pts[key]) else None
        start = -1 if first is None else self.number.get(first.pts, -1)
        if 0 <= start <= key and first.size == self.table.size[start]:
            packets = itertools.chain([first], packets)
        else:  # a seek can fail, miss, or land within a packet: read on from the beginning instead
            self.reopen(self.threads)
            packets, start = self.demux(self.stream), 0
        for number, packet in enumerate(packets, start):
            if number >= key:
                yield packet, self.table.bound[number] if number < len(self.table.bound) else math.inf
