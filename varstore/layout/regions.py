"""The regions of a variable that several processes wrote: rectangles that tile it, with their own digests (FORMAT F5).

A process that saves a part of a variable hashes what it writes. Its part is seldom a run of whole blocks of ``out``, so
the digests are those of the region's own values in C order. All of this is arithmetic: nothing is read.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import product
from typing import Any, NamedTuple

from varstore.layout.digests import BLOCK, in_hex
from varstore.text.hints import plural

__all__ = [
    "REGIONS_LIMIT",
    "Checksums",
    "Region",
    "bands",
    "equal_checksums",
    "filled",
    "inside",
    "is_inside",
    "ordinary",
    "placing_problem",
    "run_of",
    "runs",
    "tiling_problem",
]

_FEW = 64
"""Regions whose tiling is remembered."""
_CUT_AXES = 8
"""Axes that regions may cut."""
REGIONS_LIMIT = 1 << 17
"""Regions of a variable, if they cut one axis; half as many for each axis more."""


class Region(NamedTuple):
    """A rectangle of a variable: where it begins and its extents, in elements per dimension.

    `digests` has 16 bytes for each 16 MiB of its values in C order; a region without elements has none.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    digests: bytes = b""

    @classmethod
    def whole(cls, shape: Sequence[int]) -> Region:
        """Return the region that is all of a variable of this shape, without digests."""
        return cls((0,) * len(shape), tuple(shape))

    @property
    def elements(self) -> int:
        """The number of elements."""
        return math.prod(self.sizes)

    @property
    def hex_digests(self) -> list[str]:
        """Its digests as text."""
        return in_hex(self.digests)

    def within(self, origin: Sequence[int] | None = None) -> tuple[slice, ...]:
        """Return the region as an index into the variable, or into what begins at `origin` within it."""
        starts = self.offsets if origin is None else tuple(map(operator.sub, self.offsets, origin))
        return tuple(slice(start, start + size) for start, size in zip(starts, self.sizes, strict=True))

    def __str__(self) -> str:
        rows = (f"{offset}:{offset + size}" for offset, size in zip(self.offsets, self.sizes, strict=True))
        return f"[{', '.join(rows)}]"


def runs(
    offsets: Sequence[int], sizes: Sequence[int], shape: Sequence[int], itemsize: int
) -> Iterator[tuple[int, int]]:
    """Yield (offset in ``out``, bytes) of each run of a rectangle's values in C order, as long as it can be.

    Example:
        >>> list(runs((0, 1), (2, 2), (4, 3), itemsize=4)), list(runs((1, 0), (2, 3), (4, 3), itemsize=4))
        ([(4, 8), (16, 8)], [(12, 24)])
    """
    if 0 in sizes:
        return
    strides = [itemsize * math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    cut = max((axis for axis, size in enumerate(sizes) if size < shape[axis]), default=0)
    nbytes = itemsize * math.prod(sizes[cut:])
    first = sum(map(operator.mul, offsets, strides))
    for start in _starts(first, [*zip(sizes[:cut], strides, strict=False)]):
        yield start, nbytes


def _starts(first: int, axes: Sequence[tuple[int, int]]) -> Iterator[int]:
    """Yield the starts of runs, in order, given the extent and the stride of each axis; there may be very many."""
    (size, step), *rest = axes or [(1, 1)]
    starts = range(first, first + size * step, step)
    if not rest:
        yield from starts
        return
    for start in starts:
        yield from _starts(start, rest)


def run_of(offsets: Sequence[int], sizes: Sequence[int], shape: Sequence[int], itemsize: int) -> tuple[int, int] | None:
    """Return (offset in ``out``, bytes) of a rectangle with elements that is one run there; None for another one."""
    found = runs(offsets, sizes, shape, itemsize)
    first = next(found, None)
    return first if next(found, None) is None else None


def tiling_problem(regions: Sequence[Region], shape: Sequence[int]) -> str | None:
    """Return why regions do not tile an array of this shape, each element in exactly one of them; None if they do.

    Each region adds the signed corners of its rectangle. Corners of neighbours cancel each other, and those of the
    whole array remain if, and only if, the regions tile it. So the time grows with the number of corners, n log n.
    """
    if len(regions) <= _FEW:  # the variables of a model have few shapes, which are cut in few ways
        return _tiling_problem_of_few(tuple([(offsets, sizes) for offsets, sizes, _ in regions]), tuple(shape))
    return _tiling_problem(regions, shape)


@lru_cache(maxsize=64)
def _tiling_problem_of_few(rectangles: tuple[tuple[Any, ...], ...], shape: tuple[int, ...]) -> str | None:
    return _tiling_problem([Region(*one) for one in rectangles], shape)


def _tiling_problem(regions: Sequence[Region], shape: Sequence[int]) -> str | None:
    for region in regions:
        if (problem := placing_problem(region, shape)) is not None:
            return f"the region {problem}"
    regions = filled(regions)
    cut = [axis for axis, extent in enumerate(shape) if any(region.sizes[axis] != extent for region in regions)]
    if len(cut) > _CUT_AXES or len(regions) << len(cut) > 2 * REGIONS_LIMIT:
        return f"there are too many regions: {len(regions):,} that cut {plural(len(cut), 'dimension')}"
    if not math.prod(shape):
        return None
    corners: tuple[list[tuple[int, ...]], list[tuple[int, ...]]] = ([], [])
    parities = [sum(ends) % 2 for ends in product((0, 1), repeat=len(cut))]
    for region, sign in [*((region, 0) for region in regions), (Region.whole(shape), 1)]:
        edges = [(region.offsets[axis], region.offsets[axis] + region.sizes[axis]) for axis in cut]
        for corner, parity in zip(product(*edges), parities, strict=True):
            corners[parity ^ sign].append(corner)
    if sorted(corners[0]) != sorted(corners[1]):  # sorted, not counted: a stranger can choose corners of equal hashes
        covered = sum(region.elements for region in regions)
        return f"the regions, of {plural(covered, 'element')} in all, do not tile {list(shape)}"
    return None


Checksums = bytes | tuple[Region, ...]
"""What values can be compared with: the digests of blocks, or regions with theirs; empty if nothing is known."""


def equal_checksums(a: Checksums, b: Checksums) -> bool | None:
    """Tell whether two are of equal values; None if that is not known: one is empty, or they are of other pieces."""
    if not a or not b or isinstance(a, bytes) != isinstance(b, bytes):
        return None
    if isinstance(a, tuple) and isinstance(b, tuple) and [one[:2] for one in a] != [one[:2] for one in b]:
        return None
    return a == b


def placing_problem(region: Region, shape: Sequence[int]) -> str | None:
    """Return why a region is not one of a variable of this shape; None if it is."""
    offsets, sizes, _ = region
    if not len(offsets) == len(sizes) == len(shape):
        has = f"{plural(len(offsets), 'offset')} and {plural(len(sizes), 'size')}"
        return f"has {has} in {plural(len(shape), 'dimension')}"
    if any(
        offset < 0 or size < 0 or offset + size > extent
        for offset, size, extent in zip(offsets, sizes, shape, strict=True)
    ):
        return f"{region} does not lie within {list(shape)}"
    return None


def inside(regions: Iterable[Region], offsets: Sequence[int], sizes: Sequence[int]) -> list[Region]:
    """Return the regions with elements that lie within a rectangle."""
    return [region for region in filled(regions) if is_inside(region, offsets, sizes)]


def filled(regions: Iterable[Region]) -> list[Region]:
    """Return the regions that have elements."""
    return [region for region in regions if region.elements]


def is_inside(region: Region, offsets: Sequence[int], sizes: Sequence[int]) -> bool:
    """Tell whether a region lies within a rectangle."""
    return all(
        begin <= offset and offset + size <= begin + extent
        for offset, size, begin, extent in zip(region.offsets, region.sizes, offsets, sizes, strict=True)
    )


def bands(regions: Iterable[Region], row_nbytes: int) -> list[tuple[range, list[Region]]]:
    """Group regions that tile a variable, in order, so that no two groups share a row of the first dimension.

    With each group come its rows; it has at least 16 MiB if there is another one after it.
    """
    found: list[tuple[range, list[Region]]] = []
    for region in filled(regions):
        start, size = (region.offsets[0], region.sizes[0]) if region.offsets else (0, 1)
        rows, group = found[-1] if found else (range(0), [])
        if not group or (start >= rows.stop and len(rows) * row_nbytes >= BLOCK):
            found.append((range(start, start + size), [region]))
        else:
            group.append(region)
            found[-1] = (range(rows.start, max(rows.stop, start + size)), group)
    return found


def ordinary(regions: Iterable[Region], shape: Sequence[int], itemsize: int) -> bytes | None:
    """Return the digests of ``out``, where each of the regions that tile it is a run of whole blocks; else None."""
    nbytes = math.prod(shape) * itemsize
    placed: dict[int, bytes] = {}
    for region in filled(regions):
        run = run_of(region.offsets, region.sizes, shape, itemsize)
        if run is None or run[0] % BLOCK or (sum(run) % BLOCK and sum(run) != nbytes):
            return None
        placed[run[0]] = region.digests
    return b"".join(placed[start] for start in sorted(placed))
