"""Hash regions of a variable while its values come in C order, in which those of each region come in C order too."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from varstore.disk.blocks import BlockHasher, read_block
from varstore.layout.chunks import Chunks, chunk_shape
from varstore.layout.manifest import Entry
from varstore.layout.regions import Region, filled
from varstore.values.parts import overlap

__all__ = ["RegionHashers", "digest_regions"]

_AT_ONCE = 4 << 20
"""Bytes that are read and hashed at a time."""


class RegionHashers:
    """Hashes regions, which are in the order of their offsets."""

    def __init__(self, regions: Iterable[Region]) -> None:
        self._waiting = deque(filled(regions))
        self._begun: list[tuple[Region, list[range], BlockHasher]] = []

    def update(self, box: Sequence[range], values: np.ndarray) -> Iterator[tuple[Region, bytes]]:
        """Take the values of the next rectangle, which is a run of all values; yield the regions that end in it.

        With each of them come the digests that it has.
        """
        if not values.size:
            return
        last = tuple(rows[-1] for rows in box)
        while self._waiting and self._waiting[0].offsets <= last:
            region = self._waiting.popleft()
            own = [range(at, at + size) for at, size in zip(region.offsets, region.sizes, strict=True)]
            self._begun.append((region, own, BlockHasher()))
        values = values.reshape([len(rows) for rows in box])
        for _, own, hasher in self._begun:
            if (shared := overlap(own, box)) is not None:
                hasher.update(np.ascontiguousarray(values[shared[1]]).reshape(-1).view(np.uint8).data)
        ended = [(region, hasher) for region, own, hasher in self._begun if tuple(rows[-1] for rows in own) <= last]
        self._begun = [one for one in self._begun if tuple(rows[-1] for rows in one[1]) > last]
        for region, hasher in ended:
            yield region, hasher.digests()


def digest_regions(fd: int, entry: Entry) -> Iterator[tuple[Region, bytes]]:
    """Read an open ``out`` a few MiB at a time; yield its regions, each with the digests that it has now.

    Raises:
        OSError: the file ends before.
    """
    assert entry.meta is not None
    shape, size = entry.meta.shape, entry.nbytes // max(entry.meta.elements, 1)
    hashers = RegionHashers(entry.regions)
    chunks = Chunks(shape, chunk_shape(shape, max(size, 1), _AT_ONCE))
    for index in chunks:
        start, stop = chunks.run(index)
        row = np.empty((stop - start) * size, np.uint8)
        read_block(fd, row, start * size, hashed=False)
        yield from hashers.update(chunks.box(index), row.view(f"V{size}"))
