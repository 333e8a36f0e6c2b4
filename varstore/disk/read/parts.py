"""Read a part of a variable: the rows that an index asks for, or all of them a few at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import xxhash

from varstore.disk.encodings.table import read_part
from varstore.disk.read.checks import check_digest, check_size
from varstore.disk.read.whole import read_values
from varstore.layout.location import Location
from varstore.layout.manifest import BLOCK
from varstore.layout.readable import Readable
from varstore.storage.directory import Directory
from varstore.storage.failures import translated

__all__ = ["read_index", "row_chunks"]

_AT_ONCE = 4 << 20
"""Bytes of rows that are in memory beside the result."""
_DENSE = 4096
"""Bytes; rows that are nearer to each other than this are read with what lies between them."""


def read_index(location: Location, variable: Readable, index: Any) -> Any:
    """Return ``array[index]`` of the variable's values, reading the rows of the first axis that it needs.

    Integers and slices, and one integer or boolean array on the first axis, read no other rows; every
    other index reads the variable and takes its part. Digests are not checked: they cover whole blocks.
    """
    parts = index if isinstance(index, tuple) else (index,)
    shape = variable.shape
    picked = _picked(parts[0], shape[0]) if shape and len(parts) == 1 else None
    if picked is not None:
        needed, places = np.unique(picked, return_inverse=True)
        return _read_rows(location, variable, shape, 0, needed)[places.reshape(picked.shape)]
    if not (shape and parts and all(map(_is_basic, parts)) and isinstance(parts[0], (int, np.integer, slice))):
        return read_values(location, variable)[index]
    rest = list(parts)
    offset = 0
    while rest and shape and isinstance(rest[0], (int, np.integer)):
        at, axis, extent = rest.pop(0), len(parts) - len(rest) - 1, shape[0]
        if not -extent <= at < extent:
            raise IndexError(f"index {at} is out of bounds for axis {axis} with size {extent}")
        shape = shape[1:]
        offset += (at % extent) * math.prod(shape) * variable.stored.itemsize
    if rest and shape and isinstance(rest[0], slice):
        return _read_slice(location, variable, shape, offset, tuple(rest))
    found = np.asarray(_read_rows(location, variable, (1, *shape), offset, np.zeros(1, np.intp))[0])[tuple(rest)]
    return found.copy() if isinstance(found, np.ndarray) else found


def _read_slice(
    location: Location, variable: Readable, shape: tuple[int, ...], offset: int, parts: tuple[Any, ...]
) -> np.ndarray:
    """Return ``part[parts]`` of the part of the values of this shape at this byte; the first index is a slice."""
    result = np.empty(np.broadcast_to(np.empty((), variable.dtype), shape)[parts].shape, variable.dtype)
    rows = range(shape[0])[parts[0]]
    width = math.prod(shape[1:]) * variable.stored.itemsize
    stride = abs(rows.step) if abs(rows.step) * width <= _DENSE else 1
    at_once = max(1, _AT_ONCE // max(1, width * stride))
    for start in range(0, len(rows) if result.size else 0, at_once):
        part = rows[start : start + at_once]
        read = range(min(part[0], part[-1]), max(part[0], part[-1]) + 1) if stride > 1 else part
        chunk = _read_rows(location, variable, shape, offset, np.arange(read.start, read.stop, read.step))
        every = slice(None, None, rows.step) if stride > 1 else slice(None)
        result[start : start + at_once] = chunk[(every, *parts[1:])]
    return result


def _picked(part: Any, extent: int) -> np.ndarray | None:
    """Return the rows that an integer or boolean array picks, None for any other index."""
    if not isinstance(part, (list, np.ndarray)):
        return None
    index = np.asarray(part)
    if index.dtype == np.bool_ and index.shape == (extent,):
        return np.flatnonzero(index)
    if index.dtype.kind not in "iu":
        return None
    rows = index.astype(np.intp)
    rows = np.where(rows < 0, rows + extent, rows)
    if rows.size and not 0 <= rows.min() <= rows.max() < extent:
        raise IndexError(f"an index is out of bounds for axis 0 with size {extent}")
    return rows


def _is_basic(part: Any) -> bool:
    return (
        part is None or part is Ellipsis or (isinstance(part, (slice, int, np.integer)) and not isinstance(part, bool))
    )


def _read_rows(
    location: Location, variable: Readable, shape: tuple[int, ...], offset: int, rows: np.ndarray
) -> np.ndarray:
    """Read rows of the part of the values that has this shape and begins at this byte, neighbours in one call."""
    values = np.empty((len(rows), *shape[1:]), variable.stored)
    width = math.prod(shape[1:]) * variable.stored.itemsize
    if values.nbytes:
        target = values.reshape(-1).view(np.uint8)
        breaks = np.flatnonzero(np.diff(rows) != 1) + 1
        with (
            translated(location.path, "reading failed"),
            Directory(location) as directory,
            directory.file(variable.entry, "out") as (fd, size),
        ):
            check_size(directory, variable.entry, size)
            for first, last in zip([0, *breaks], [*breaks, len(rows)], strict=True):
                begin = offset + int(rows[first]) * width
                read_part(fd, variable, target[first * width : last * width], begin, hashed=False)
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
        directory.file(entry, "out") as (fd, size),
    ):
        check_size(directory, entry, size)
        for index, shape in _chunk_indices(variable.shape, variable.stored.itemsize):
            values = np.empty(shape, variable.stored)
            flat = values.reshape(-1).view(np.uint8)
            done = 0
            while done < flat.nbytes:
                step = min(BLOCK - (offset + done) % BLOCK, flat.nbytes - done)
                piece = flat[done : done + step]
                read_part(fd, variable, piece, offset + done, hashed=False)
                done += step
                if verify and digests:
                    hasher.update(piece.data)
                    if (offset + done) % BLOCK == 0 or offset + done == variable.nbytes:
                        check_digest(directory, entry, digests, (offset + done - 1) // BLOCK, hasher.digest())
                        hasher.reset()
            offset += done
            yield index, values.astype(variable.dtype, copy=False)


def _chunk_indices(shape: tuple[int, ...], itemsize: int) -> Iterator[tuple[tuple[Any, ...], tuple[int, ...]]]:
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
