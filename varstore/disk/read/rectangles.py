"""Read rectangles of variables into arrays, in parallel, compared with the digests of what lies inside them.

A rectangle that is one run of the values, as rows are, is read straight into the array. Any other is read by pieces of
16 MiB, each through a small buffer. What the digest of a block or a region covers only in part is not compared.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import chain
from typing import Any, TypeVar

import numpy as np

from varstore.disk.blocks import SMALL
from varstore.disk.encodings.stored import Stored
from varstore.disk.encodings.table import read_part
from varstore.disk.read.batches import BATCH_FILES
from varstore.disk.read.regions import Piece, lanes_in_memory, pieces, read_piece, scattered
from varstore.disk.read.stored import stored_blocks
from varstore.disk.threads import SLOW, Lane, do_here_until_slow, in_lanes, run, thread_count
from varstore.errors import UsageError
from varstore.layout.chunks import Chunks, chunk_shape
from varstore.layout.location import Location
from varstore.layout.manifest import BLOCK
from varstore.layout.readable import Readable, readable
from varstore.layout.regions import Region, inside, placing_problem, run_of
from varstore.storage.directory import Directory
from varstore.storage.failures import translated
from varstore.values import arrays
from varstore.values.parts import in_c_order, read_box

__all__ = ["in_groups", "read_new_rectangle", "read_rectangles"]

Item = TypeVar("Item")


def read_rectangles(
    wanted: Iterable[tuple[arrays.Stored, Sequence[int], Sequence[int], np.ndarray]],
    *,
    verify: bool,
    threads: int | None,
    advance: Callable[[int], None] | None = None,
) -> None:
    """Fill arrays, of any strides, with rectangles of variables, in parallel.

    Each of them is a variable, where the rectangle begins in it, its extents, and the array. With `verify`, the regions
    inside it are compared with their digests, and the blocks that it has as a whole if it is one run of the values.

    Raises:
        UsageError: a rectangle is not within its variable, or an array does not have its shape and type.
        DigestMismatch: the bytes are not those that were saved.
        FormatError: a file is missing, of another size, or not a file at all.
    """
    of_locations: dict[Location, list[_Rectangle]] = {}
    for variable, offsets, sizes, out in wanted:
        found = readable(variable.entry, path=variable.location.path)
        rectangle = _Rectangle(found, offsets, sizes, out)
        rectangle.check(variable.location.path)
        of_locations.setdefault(variable.location, []).append(rectangle)
    for location, rectangles in of_locations.items():
        _read(location, rectangles, verify=verify, threads=threads, advance=advance)


def in_groups(wanted: Iterable[Item], nbytes: Callable[[Item], int], at_most: int) -> Iterator[list[Item]]:
    """Yield neighbours to read together: as many as do not have more bytes than that, or one that has."""
    group: list[Item] = []
    total = 0
    for one in wanted:
        size = nbytes(one)
        if group and total + size > at_most:
            yield group
            group, total = [], 0
        group.append(one)
        total += size
    if group:
        yield group


def read_new_rectangle(
    location: Location, variable: Readable, offsets: Sequence[int], sizes: Sequence[int]
) -> np.ndarray:
    """Return a rectangle that lies within the variable as a new array; raises what `read_rectangles` does."""
    values = np.empty(sizes, variable.dtype)
    _read(location, [_Rectangle(variable, offsets, sizes, values)], verify=True, threads=None)
    return values


def _read(
    location: Location,
    rectangles: Sequence[_Rectangle],
    *,
    verify: bool,
    threads: int | None,
    advance: Callable[[int], None] | None = None,
) -> None:
    start = time.perf_counter()
    with translated(location.path, "reading failed"), Directory(location) as directory:
        seconds = time.perf_counter() - start
        count = thread_count(threads, seconds)
        small = [one for one in rectangles if one.nbytes < SMALL]
        large = [one for one in rectangles if one.nbytes >= SMALL]
        groups = (small[at : at + BATCH_FILES] for at in range(0, len(small), BATCH_FILES))

        def read_group(group: Sequence[_Rectangle]) -> None:
            for one in group:
                for lane in (*one.lanes(directory, verify, advance), *one.lanes_of_regions(directory, verify)):
                    while lane.step():
                        pass
                one.finish()

        reading = do_here_until_slow(groups, read_group, calls_wait=seconds > SLOW)
        run(in_lanes(chain((lane for one in large for lane in one.lanes(directory, verify, advance)), reading)), count)
        run(in_lanes(lane for one in large for lane in one.lanes_of_regions(directory, verify)), count)
        for one in large:
            one.finish()


class _Rectangle:
    """A rectangle to be read: the variable, where it begins, its extents, and the array that it goes to."""

    __slots__ = ("offsets", "out", "sizes", "target", "variable")

    def __init__(self, variable: Readable, offsets: Sequence[int], sizes: Sequence[int], out: np.ndarray) -> None:
        self.variable = variable
        self.offsets = offsets
        self.sizes = sizes
        self.out = out
        self.target = out if variable.stored == variable.dtype else np.empty(sizes, variable.stored)

    @property
    def nbytes(self) -> int:
        return self.target.nbytes

    def check(self, path: str) -> None:
        """Raise if it is not within the variable, or does not fit the array."""
        variable, out = self.variable, self.out
        place = Region(tuple(self.offsets), tuple(self.sizes))
        if (problem := placing_problem(place, variable.shape)) is not None:
            raise UsageError(f"the rectangle {problem}", path=path, variable=variable.entry.name)
        if out.shape != place.sizes or out.dtype != variable.dtype or not out.flags.writeable:
            raise UsageError(
                "the rectangle needs a writeable array of its shape and type",
                path=path,
                variable=variable.entry.name,
                found=f"{list(out.shape)} {out.dtype}",
                expected=f"{list(place.sizes)} {variable.dtype}",
            )

    def lanes(self, directory: Directory, verify: bool, advance: Callable[[int], None] | None) -> Iterator[Lane]:
        """Yield the lanes that read it."""
        variable, size = self.variable, self.variable.stored.itemsize
        if not self.target.size:
            return
        source = stored_blocks(directory, variable) if verify else Stored
        run = run_of(self.offsets, self.sizes, variable.shape, size)
        if run is not None and self.target.flags.c_contiguous:
            first, last = run[0], sum(run)
            parts: Iterable[Any] = pieces(variable, first, last)
            row = self.target.reshape(-1).view(np.uint8)

            def read(piece: Piece) -> None:
                part = row[piece.start - first : piece.stop - first]
                read_piece(directory, variable, source, part, piece, verify=verify)
                if advance:
                    advance(piece.stop - piece.start)

            yield Lane(zip(parts, strict=True), read)
            return
        chunks = Chunks(tuple(self.sizes), chunk_shape(tuple(self.sizes), size, BLOCK))
        boxes = ((chunks.box(index), advance) for index in chunks)
        yield Lane(boxes, partial(self._read_box, directory, source))

    def _read_box(
        self,
        directory: Directory,
        source: Callable[[int], Stored],
        box: list[range],
        advance: Callable[[int], None] | None,
    ) -> None:
        variable = self.variable
        place: tuple[Any, ...] = (*(slice(rows.start, rows.stop) for rows in box), ...)
        part = self.target[place]
        rows = [range(at + one.start, at + one.stop) for at, one in zip(self.offsets, box, strict=True)]
        with directory.out(variable.entry) as fd:
            stored = source(fd)

            def read(offset: int, size: int) -> np.ndarray:
                values = np.empty(size, np.uint8)
                read_part(directory, stored, variable, values, offset, hashed=False)
                return values

            read_box(in_c_order(variable.shape, variable.stored), rows, part, read)
        if advance:
            advance(part.nbytes)

    def lanes_of_regions(self, directory: Directory, verify: bool) -> Iterator[Lane]:
        """Yield the lanes that compare the regions inside it which were not hashed while they were read."""
        variable = self.variable
        regions = inside(variable.entry.regions, self.offsets, self.sizes) if verify else []
        run = regions and run_of(self.offsets, self.sizes, variable.shape, variable.stored.itemsize)
        if run and self.target.flags.c_contiguous:
            regions = scattered(variable, regions)
        yield from lanes_in_memory(directory, variable.entry, regions, self.target, self.offsets)

    def finish(self) -> None:
        """Convert what was read, if it is stored as another type."""
        if self.target is not self.out:
            self.out[...] = self.target.astype(self.out.dtype)
