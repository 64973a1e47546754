"""Many samples in little memory: a million need about 100 MB."""

from __future__ import annotations

import marshal
import zlib
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields
from operator import attrgetter

from annotations.records import Usual, usual_sample
from annotations.rows import Sample

BLOCK = 128  # samples that are packed together, at most
RAW = -15  # zlib's name of compressed bytes without a checksum
NAMES = [f.name for f in fields(Sample)]  # one more than a usual record has fields
VALUES = attrgetter(*NAMES)


class Packed(Sequence[Sample]):
    """Samples kept compressed, a block of them at a time; the block that was read last is kept as it is.

    A usual record stays one: its sample is made when it is asked for.
    """

    def __init__(self, samples: Iterable[Sample | Usual]):
        self.blocks: list[bytes] = []
        self.starts: list[int] = []  # the index of each block's first sample
        self.length = 0
        self.last: tuple[int, list[tuple]] = (-1, [])
        block: list[tuple] = []
        for sample in samples:
            block.append(sample if isinstance(sample, tuple) else VALUES(sample))
            if len(block) == BLOCK:
                self._add(block)
                block = []
        if block:
            self._add(block)

    def _add(self, block: list[tuple]) -> None:
        compressed = memoryview(zlib.compress(marshal.dumps(block), level=1, wbits=RAW))
        self.blocks.append(bytes(compressed))  # a copy is no larger than it must be: zlib's buffer is
        self.starts.append(self.length)
        self.length += len(block)

    def extend(self, later: Packed) -> None:
        """Put others behind these."""
        self.blocks += later.blocks
        self.starts += [self.length + start for start in later.starts]
        self.length += later.length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Sample:
        if not -self.length <= index < self.length:
            raise IndexError(f"sample {index} of {self.length}")
        index %= self.length
        number = bisect_right(self.starts, index) - 1
        kept, block = self.last  # read once: another thread may read another block
        if kept != number:
            block = marshal.loads(zlib.decompress(self.blocks[number], wbits=RAW))
            self.last = (number, block)
        values = block[index - self.starts[number]]
        return Sample(*values) if len(values) == len(NAMES) else usual_sample(values)

    def __iter__(self) -> Iterator[Sample]:
        return (self[index] for index in range(self.length))
