"""Hash regions of a variable while its values come in C order, in which those of each region come in C order too."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from varstore.disk.blocks import BlockHasher, read_block
from varstore.layout.chunks import Chunks, chunk_shape
from varstore.layout.manifest import Entry
from varstore.layout.regions import Region, bands, filled
from varstore.values.parts import overlap

__all__ = ["RegionHashers", "bands_of", "digest_regions"]

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
            own = [range(at, at + size) for at, size in zip(region.offsets, region.sizes, strict=True)] or [range(1)]
            self._begun.append((region, own, BlockHasher()))
        box = box or [range(1)]
        values = values.reshape([len(rows) for rows in box])
        for _, own, hasher in self._begun:
            if (shared := overlap(own, box)) is not None:
                hasher.update(np.ascontiguousarray(values[shared[1]]).reshape(-1).view(np.uint8).data)
        ended = [(region, hasher) for region, own, hasher in self._begun if tuple(rows[-1] for rows in own) <= last]
        self._begun = [one for one in self._begun if tuple(rows[-1] for rows in one[1]) > last]
        for region, hasher in ended:
            yield region, hasher.digests()


def bands_of(entry: Entry) -> list[tuple[range, list[Region]]]:
    """Return the groups of an entry's regions that can be hashed apart from each other, each with its rows."""
    return bands(entry.regions, entry.nbytes // max(_shape(entry)[0], 1))


def digest_regions(
    fd: int, entry: Entry, band: tuple[range, list[Region]] | None = None
) -> Iterator[tuple[Region, bytes]]:
    """Read an open ``out`` a few MiB at a time; yield its regions, each with the digests that it has now.

    With a `band` of `bands_of`, only its rows are read.

    Raises:
        OSError: the file ends before.
    """
    shape = _shape(entry)
    size = entry.nbytes // max(math.prod(shape), 1)
    rows, regions = band or (range(shape[0]), entry.regions)
    hashers = RegionHashers(regions)
    first = rows.start * math.prod(shape[1:])
    shape = (len(rows), *shape[1:])
    chunks = Chunks(shape, chunk_shape(shape, max(size, 1), _AT_ONCE))
    for index in chunks:
        start, stop = chunks.run(index)
        row = np.empty((stop - start) * size, np.uint8)
        read_block(fd, row, (first + start) * size, hashed=False)
        outer, *inner = chunks.box(index)
        box = [range(rows.start + outer.start, rows.start + outer.stop), *inner]
        yield from hashers.update(box, row.view(f"V{size}"))


def _shape(entry: Entry) -> tuple[int, ...]:
    """Return the shape of a variable, as a row if it has no dimension."""
    assert entry.meta is not None
    return entry.meta.shape or (1,)
