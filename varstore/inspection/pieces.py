"""The values of variables a few MiB at a time, from whatever holds them."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

import numpy as np

from varstore.disk.blocks import SMALL
from varstore.disk.read.parts import chunk_indices
from varstore.disk.read.variable import Variable
from varstore.disk.read.whole import read_new
from varstore.disk.threads import Job, do_here_until_slow
from varstore.layout.location import Location
from varstore.layout.readable import Readable, readable
from varstore.values.arrays import Source
from varstore.values.lazy import LazyArray

__all__ = ["Pieces", "in_groups", "is_read_whole", "memory_of", "read_together"]

_TINY = 32 << 10
"""Bytes of a variable of which reading takes less time than Python's own steps."""
_GROUP = 64
"""Small variables that one thread looks at one after the other."""


class Pieces:
    """The values of a variable, piece by piece; an array that can only be read whole is one piece.

    `known` is what reading the variable of a checkpoint requires, if that is known. `itemsize` and `is_whole` are those
    of the array unless its pieces are to match those of another.
    """

    def __init__(
        self,
        name: str,
        array: Source,
        *,
        known: Readable | None = None,
        itemsize: int | None = None,
        is_whole: bool | None = None,
    ) -> None:
        self.name = name
        self.array = array
        self.readable = known
        self.shape = tuple(array.shape) if known is None else known.shape
        self.dtype = (array.dtype if known is None else known.dtype).newbyteorder("=")
        self.nbytes = math.prod(self.shape) * self.dtype.itemsize
        is_one = is_read_whole(array) if is_whole is None else is_whole
        size = self.dtype.itemsize if itemsize is None else itemsize
        self.indices = [((...,), self.shape)] if is_one else list(chunk_indices(self.shape, size))
        self.is_one = len(self.indices) == 1
        """Whether there is a single piece."""

    def size(self, at: int) -> int:
        """Return the bytes of a piece."""
        return math.prod(self.indices[at][1]) * self.dtype.itemsize

    def read(self, at: int) -> np.ndarray:
        """Read a piece, unchecked where it is not all of a variable."""
        return self.as_read(self.array[self.indices[at][0]], at)

    def as_read(self, values: Any, at: int) -> np.ndarray:
        """Return the values of a piece in C order and in the byte order of this machine."""
        return np.ascontiguousarray(values).astype(self.dtype, copy=False).reshape(self.indices[at][1])


Item = TypeVar("Item")
Piecewise = TypeVar("Piecewise", bound=Pieces)


def is_read_whole(array: Source) -> bool:
    """Tell whether an array cannot be read in parts."""
    return isinstance(array, LazyArray) and array._part is None


def memory_of(array: Source) -> Hashable:
    """Return a key that is equal for values that are one and the same."""
    if isinstance(array, LazyArray):
        return array.identity
    if isinstance(array, np.ndarray):
        at = array.__array_interface__["data"][0]
        return at, array.shape, array.strides, array.dtype.str, array.dtype.name, array.nbytes or id(array)
    return array.location, array.entry.folder


def in_groups(items: Iterable[tuple[Item, int]], do: Callable[[Sequence[Item]], None]) -> Iterator[Job]:
    """Yield jobs that do something with items, given with their sizes in bytes: large ones alone, others in groups.

    Tiny ones are done here, a group at a time, unless they wait for a server: threads would wait for the interpreter.
    """
    tiny: list[Item] = []
    group: list[Item] = []
    for item, nbytes in items:
        if nbytes < _TINY:
            tiny.append(item)
        elif nbytes >= SMALL:
            yield partial(do, [item])
        else:
            group.append(item)
            if len(group) == _GROUP:
                yield partial(do, group)
                group = []
    if group:
        yield partial(do, group)
    groups = (tiny[start : start + _GROUP] for start in range(0, len(tiny), _GROUP))
    yield from do_here_until_slow(groups, do, calls_wait=True)


def read_together(group: Sequence[Piecewise]) -> Iterator[tuple[Piecewise, np.ndarray]]:
    """Read variables of a single piece, those of one checkpoint together and unchecked."""
    stored: dict[Location, list[tuple[Piecewise, Readable]]] = {}
    for pieces in group:
        if isinstance(pieces.array, Variable):
            variable = pieces.readable or readable(pieces.array.entry, path=pieces.array.root)
            stored.setdefault(pieces.array.location, []).append((pieces, variable))
        else:
            yield pieces, pieces.read(0)
    for location, found in stored.items():
        arrays = read_new(location, [variable for _, variable in found], verify=False, threads=1)
        for (pieces, _), values in zip(found, arrays, strict=True):
            yield pieces, pieces.as_read(values, 0)
