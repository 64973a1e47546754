"""Many samples in little memory: a million need about 100 MB."""

from __future__ import annotations

import marshal
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields
from operator import attrgetter

from annotations.rows import Sample

BLOCK = 64  # samples that are packed together
VALUES = attrgetter(*(f.name for f in fields(Sample)))


class Packed(Sequence[Sample]):
    """Samples kept compressed, a block of them at a time; the block that was read last is kept as it is."""

    def __init__(self, samples: Iterable[Sample]):
        self.blocks: list[bytes] = []
        self.length = 0
        self.last: tuple[int, list[tuple]] = (-1, [])
        block: list[tuple] = []
        for sample in samples:
            block.append(VALUES(sample))
            if len(block) == BLOCK:
                self._add(block)
                block = []
        if block:
            self._add(block)

    def _add(self, block: list[tuple]) -> None:
        self.blocks.append(zlib.compress(marshal.dumps(block), level=1))
        self.length += len(block)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Sample:
        if not -self.length <= index < self.length:
            raise IndexError(f"sample {index} of {self.length}")
        number, place = divmod(index % self.length, BLOCK)
        kept, block = self.last  # read once: another thread may read another block
        if kept != number:
            block = marshal.loads(zlib.decompress(self.blocks[number]))
            self.last = (number, block)
        return Sample(*block[place])

    def __iter__(self) -> Iterator[Sample]:
        return (self[index] for index in range(self.length))
