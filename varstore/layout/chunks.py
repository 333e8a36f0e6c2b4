"""How an array is cut into chunks that are runs of its values in C order (FORMAT F9), as pure arithmetic.

A chunk has the extent 1 along the leading axes, a part of one axis, and the whole of all later axes. So its values are
one run of the array's values, and an offset in the chunk is an offset in the run.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import product

__all__ = ["Chunks", "chunk_shape"]


def chunk_shape(shape: tuple[int, ...], itemsize: int, limit: int) -> tuple[int, ...]:
    """Return the extents of the chunks: at most `limit` bytes, or one element, each; never 0.

    The axis that is cut is cut into parts that are as equal as they can be, so that little of the last one is padding.

    Example:
        >>> chunk_shape((12, 577, 1024), 4, 1 << 20)
        (1, 193, 1024)
    """
    chunk = [1] * len(shape)
    size = itemsize
    for axis in reversed(range(len(shape))):
        extent = max(shape[axis], 1)
        parts = -(-extent // max(limit // size, 1))
        chunk[axis] = -(-extent // parts)
        if parts > 1:
            break
        size *= extent
    return tuple(chunk)


@dataclass(frozen=True)
class Chunks:
    """The chunks of an array: its shape, and the extents of a chunk, as `chunk_shape` returns them."""

    shape: tuple[int, ...]
    chunk: tuple[int, ...]

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """The number of chunks along each axis."""
        return tuple(-(-extent // step) for extent, step in zip(self.shape, self.chunk, strict=True))

    @cached_property
    def elements(self) -> int:
        """The number of elements of a chunk, with the padding of the last one along an axis."""
        return math.prod(self.chunk)

    def __contains__(self, index: object) -> bool:
        return (
            isinstance(index, tuple)
            and len(index) == len(self.shape)
            and all(0 <= i < count for i, count in zip(index, self.counts, strict=True))
        )

    def __iter__(self) -> Iterator[tuple[int, ...]]:
        return product(*map(range, self.counts))

    def box(self, index: tuple[int, ...]) -> list[range]:
        """Return the rows of a chunk along each axis; without padding."""
        return [
            range(at * step, min((at + 1) * step, extent))
            for at, step, extent in zip(index, self.chunk, self.shape, strict=True)
        ]

    def run(self, index: tuple[int, ...]) -> tuple[int, int]:
        """Return where a chunk's values begin and end among those of the array, in elements; without padding."""
        number = 0
        for count, i in zip(self.counts, index, strict=True):
            number = number * count + i
        return self.numbered(number)

    def numbered(self, number: int) -> tuple[int, int]:
        """Return what `run` does for a chunk by its number in C order."""
        row, parts = self._row
        first, part = divmod(number, parts)
        start = first * row + part * self.elements
        return start, min(start + self.elements, (first + 1) * row)

    def covering(self, start: int, stop: int) -> range:
        """Return the numbers of the chunks that hold these elements."""
        if start >= stop:
            return range(0)
        row, parts = self._row
        first, last = (at // row * parts + at % row // self.elements for at in (start, stop - 1))
        return range(first, last + 1)

    @cached_property
    def _row(self) -> tuple[int, int]:
        """The number of elements of which one chunk after the other is cut, and into how many chunks they go."""
        cut = next((axis for axis in reversed(range(len(self.shape))) if self.chunk[axis] < self.shape[axis]), 0)
        return math.prod(self.shape[cut:]), math.prod(self.counts[cut : cut + 1])
