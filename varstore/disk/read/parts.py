"""Read a part of a variable: what an index asks for, or all values a few MiB at a time."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from types import TracebackType
from typing import Any

import numpy as np
import xxhash

from varstore.disk.blocks import read_block
from varstore.disk.encodings.stored import Stored
from varstore.disk.encodings.table import read_part
from varstore.disk.read.checks import check_digest
from varstore.disk.read.rectangles import read_new_rectangle
from varstore.disk.read.regions import RegionChecks, check_regions_in_run
from varstore.disk.read.stored import stored_blocks
from varstore.disk.read.whole import read_values
from varstore.layout.location import Location
from varstore.layout.manifest import BLOCK
from varstore.layout.readable import Readable
from varstore.storage.directory import Directory
from varstore.storage.failures import translated
from varstore.values.parts import bounds, in_c_order, read_indexed

__all__ = ["chunk_indices", "read_index", "read_run", "row_chunks"]

_AT_ONCE = 4 << 20
"""Bytes of a chunk."""
_SHORT = 2 << 20
"""Bytes of an encoded ``out`` that is read whole for a slice: that takes about as long as to decode a chunk."""


def read_index(location: Location, variable: Readable, index: Any) -> Any:
    """Return ``array[index]`` of the variable's values, reading the elements that it needs and few others.

    Digests cover whole blocks, so they are checked only where the index needs all values, or ``out`` is encoded and so
    short that a part of it takes as long to read. Those of regions are checked where it selects a rectangle that they
    lie inside.

    Raises:
        DigestMismatch: the bytes are not those that were saved.
    """
    if type(index) is int and _is_row_in_one_piece(variable, index):
        return _read_row(location, variable, index % variable.shape[0])
    if variable.entry.regions and (rectangle := _rectangle(variable, index)) is not None:
        box, inner = rectangle
        offsets, sizes = [rows.start for rows in box], [len(rows) for rows in box]
        return read_new_rectangle(location, variable, offsets, sizes)[inner]
    with translated(location.path, "reading failed"), _Out(location, variable) as out:
        return read_indexed(
            in_c_order(variable.shape, variable.stored),
            index,
            out.read,
            whole=lambda: read_values(location, variable),
            convert=lambda values: values.astype(variable.dtype, copy=False),
        )


def _rectangle(variable: Readable, index: Any) -> tuple[list[range], tuple[int | slice, ...]] | None:
    """Return the rows along each axis that a valid index selects, and the index into them; None if it selects others.

    Raises:
        IndexError: numpy's own.
    """
    shape = variable.shape
    np.ndarray(shape, np.bool_, b"\0", 0, (0,) * len(shape))[index]
    found = bounds(shape, index)
    if found is None or not all(found[0]) or [len(rows) for rows in found[0]] == list(shape):
        return None
    return found if all(part.step in (1, -1) for part in found[1] if isinstance(part, slice)) else None


def _is_row_in_one_piece(variable: Readable, index: int) -> bool:
    """Tell whether an index is that of one of several rows, which lies in ``out`` as it is and has no digest."""
    shape, entry = variable.shape, variable.entry
    has_rows = len(shape) > 1 and shape[0] > 1 and entry.nbytes > 0 and variable.encoding.is_plain
    return has_rows and not entry.regions and -shape[0] <= index < shape[0]


def _read_row(location: Location, variable: Readable, index: int) -> np.ndarray:
    """Return a row: programs that draw single samples wait less for it than for what any index may need."""
    row = np.empty(variable.shape[1:], variable.stored)
    with translated(location.path, "reading failed"), Directory(location) as directory:
        fd = directory.open_out(variable.entry)
        try:
            read_block(fd, row.reshape(-1).view(np.uint8), index * row.nbytes, hashed=False)
        finally:
            os.close(fd)
    return row.astype(variable.dtype, copy=False)


class _Out:
    """A variable's ``out``, open from the first read on: an index that is wrong, or needs nothing, opens nothing."""

    __slots__ = ("_directory", "_fd", "_is_open", "_source", "_variable")

    def __init__(self, location: Location, variable: Readable) -> None:
        self._variable = variable
        self._directory = Directory(location)
        self._is_open = False
        self._fd = -1
        is_short = variable.entry.nbytes <= _SHORT
        self._source = stored_blocks(self._directory, variable) if is_short else Stored

    def __enter__(self) -> _Out:
        return self

    def read(self, offset: int, size: int) -> np.ndarray:
        """Return `size` bytes of the values from this offset on."""
        if not self._is_open:
            self._directory.__enter__()
            self._is_open = True
            self._fd = self._directory.open_out(self._variable.entry)
        values = np.empty(size, np.uint8)
        read_part(self._directory, self._source(self._fd), self._variable, values, offset, hashed=False)
        return values

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if self._fd >= 0:
                os.close(self._fd)
        finally:
            if self._is_open:
                self._directory.__exit__(kind, error, trace)


def read_run(location: Location, variable: Readable, start: int, stop: int) -> np.ndarray:
    """Return the elements from `start` to `stop` in C order, as a row; every byte is compared with its digest.

    Digests cover blocks of 16 MiB, so the blocks that the run begins and ends in are read whole, of what is stored if
    that is encoded; of regions, those are compared that lie inside the run.

    Raises:
        DigestMismatch: the bytes are not those that were saved.
    """
    entry, size = variable.entry, variable.stored.itemsize
    values = np.empty(stop - start, variable.stored)
    flat, first, last = values.view(np.uint8), start * size, stop * size
    with translated(location.path, "reading failed"), Directory(location) as directory, directory.out(entry) as fd:
        source = stored_blocks(directory, variable)
        if source is not Stored or not variable.digests:
            read_part(directory, source(fd), variable, flat, first, hashed=False)
            check_regions_in_run(directory, variable, start, values)
            return values.astype(variable.dtype, copy=False)
        for block in range(first // BLOCK, -(-last // BLOCK)):
            begin, end = block * BLOCK, min((block + 1) * BLOCK, variable.nbytes)
            is_inside = first <= begin and end <= last
            row = flat[begin - first : end - first] if is_inside else np.empty(end - begin, np.uint8)
            digest = read_part(directory, Stored(fd), variable, row, begin, hashed=True)
            check_digest(directory, entry, variable.digests, block, digest)
            if not is_inside:
                wanted = slice(max(first, begin), min(last, end))
                flat[wanted.start - first : wanted.stop - first] = row[wanted.start - begin : wanted.stop - begin]
    return values.astype(variable.dtype, copy=False)


def row_chunks(location: Location, variable: Readable, *, verify: bool) -> Iterator[tuple[tuple[Any, ...], np.ndarray]]:
    """Yield (index, values) pairs that cover the variable in order, a few MiB at a time.

    Raises:
        DigestMismatch: after the pairs of a block that is damaged.
    """
    entry, digests = variable.entry, variable.digests
    hasher = xxhash.xxh3_128()
    offset = 0
    with (
        translated(location.path, "reading failed"),
        Directory(location) as directory,
        directory.out(entry) as fd,
    ):
        source = stored_blocks(directory, variable) if verify else Stored
        checks = RegionChecks(directory, entry) if verify and entry.regions else None
        for index, shape in chunk_indices(variable.shape, variable.stored.itemsize):
            values = np.empty(shape, variable.stored)
            flat = values.reshape(-1).view(np.uint8)
            done = 0
            while done < flat.nbytes:
                step = min(BLOCK - (offset + done) % BLOCK, flat.nbytes - done)
                piece = flat[done : done + step]
                read_part(directory, source(fd), variable, piece, offset + done, hashed=False)
                done += step
                if verify and digests:
                    hasher.update(piece.data)
                    if (offset + done) % BLOCK == 0 or offset + done == variable.nbytes:
                        check_digest(directory, entry, digests, (offset + done - 1) // BLOCK, hasher.digest())
                        hasher.reset()
            offset += done
            if checks is not None:
                checks.update(_rows_of(index, variable.shape), values)
            yield index, values.astype(variable.dtype, copy=False)


def _rows_of(index: tuple[Any, ...], shape: tuple[int, ...]) -> list[range]:
    """Return the rows along each axis of what an index of `chunk_indices` selects."""
    *lead, last = index
    if last is ...:
        return [range(extent) for extent in shape]
    rest = [range(extent) for extent in shape[len(index) :]]
    return [*(range(at, at + 1) for at in lead), range(last.start, last.stop), *rest]


def chunk_indices(shape: tuple[int, ...], itemsize: int) -> Iterator[tuple[tuple[Any, ...], tuple[int, ...]]]:
    """Yield indices and the shapes of what they select, in C order, each of at most a few MiB."""
    if math.prod(shape) * itemsize <= _AT_ONCE:
        yield (...,), shape
        return
    axis = 0
    while math.prod(shape[axis + 1 :]) * itemsize > _AT_ONCE:
        axis += 1
    at_once = _AT_ONCE // (math.prod(shape[axis + 1 :]) * itemsize)
    for lead in np.ndindex(*shape[:axis]):
        for start in range(0, shape[axis], at_once):
            stop = min(start + at_once, shape[axis])
            yield (*lead, slice(start, stop)), (stop - start, *shape[axis + 1 :])
