"""Moves of values into existing memory: one per variable, a few MiB at a time."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from varstore.disk.read.parts import row_chunks
from varstore.disk.read.variable import Variable
from varstore.layout.location import Location
from varstore.layout.readable import Readable, readable
from varstore.model.match import Pair, Shape
from varstore.values.arrays import Source, Stored
from varstore.values.casting import cast_values
from varstore.values.lazy import LazyArray

__all__ = ["HOST", "LateTarget", "Move", "OnDisk", "Place", "fill", "move_of", "nbytes_of", "parts", "place_of"]

HOST = "cpu"
"""The memory that numpy arrays are in."""


class Place(NamedTuple):
    """Where an array is: the memory, the address in it, the shape, the strides in bytes, and the type of an element."""

    memory: Hashable
    address: int
    shape: Shape
    strides: tuple[int, ...]
    dtype: np.dtype[Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class LateTarget:
    """A target that numpy cannot write to, such as one on a device; it is given its values as a whole.

    `present` returns a copy of its values, and `hand_over` sets them.
    """

    place: Place
    present: Callable[[], np.ndarray]
    hand_over: Callable[[np.ndarray], None]


class OnDisk(NamedTuple):
    """A source that is a readable variable of a checkpoint."""

    location: Location
    variable: Readable


class Move(NamedTuple):
    """The move of one variable. A target that is only a `Place` takes part in checks, and the caller fills it."""

    pair: Pair
    target: np.ndarray | LateTarget | Place
    source: np.ndarray | LazyArray | OnDisk


def move_of(pair: Pair, target: np.ndarray | LateTarget | Place, source: Source) -> Move:
    """Return the move of a pair; a variable without a ``meta`` file takes its shape and type from the target.

    Raises:
        FormatError, UnsupportedDtype: the values cannot be read; see `varstore.layout.readable`.
    """
    if not isinstance(source, Stored):
        return Move(pair, target, source)
    if isinstance(source, Variable) and not source.has_meta:
        source = source.known_as(pair.target_shape, pair.target_dtype)
    return Move(pair, target, OnDisk(source.location, readable(source.entry, path=source.location.path)))


def place_of(target: np.ndarray | LateTarget | Place) -> Place:
    """Return where a target is."""
    if isinstance(target, np.ndarray):
        return Place(HOST, target.__array_interface__["data"][0], target.shape, target.strides, target.dtype)
    return target.place if isinstance(target, LateTarget) else target


def nbytes_of(move: Move) -> int:
    """Return the number of bytes that a move reads or copies."""
    source = move.source
    return source.variable.entry.nbytes if isinstance(source, OnDisk) else source.nbytes


def fill(move: Move, *, verify: bool) -> int:
    """Copy through a buffer: other types, other layouts, corners, and values that are not in a checkpoint.

    Returns:
        The number of values that were beyond the range of the target's type.
    """
    pair, target, source = move
    if isinstance(target, LateTarget):
        host = target.present() if pair.how == "overlap" else np.empty(pair.target_shape, pair.target_dtype)
        beyond = fill(Move(pair, host, source), verify=verify)
        target.hand_over(host)
        return beyond
    assert isinstance(target, np.ndarray)
    beyond = 0
    for index, values in parts(move, verify=verify):
        if values.dtype != target.dtype:
            values, count = cast_values(values, target.dtype)
            beyond += count
        np.copyto(target[index], values)
    return beyond


def parts(move: Move, *, verify: bool) -> Iterator[tuple[tuple[Any, ...], np.ndarray]]:
    """Yield the values that move, in the source's type, each part with its index in the target.

    Raises:
        DigestMismatch: with `verify`, after the parts of a damaged block.
    """
    pair, _, source = move
    chunks: Iterable[tuple[tuple[Any, ...], np.ndarray]]
    if isinstance(source, OnDisk):
        chunks = row_chunks(*source, verify=verify)
    else:
        chunks = [((...,), source.numpy() if isinstance(source, LazyArray) else source)]
    for index, values in chunks:
        corner = _corner(index, pair.common)
        if corner is not None:
            into, part = corner
            yield into, values[part]


def _corner(index: tuple[Any, ...], common: Shape) -> tuple[tuple[Any, ...], tuple[Any, ...]] | None:
    """Return the target's index and the chunk's index of what a chunk and the common corner share, None if nothing."""
    if index == (...,):
        whole = (..., *(slice(0, extent) for extent in common))
        return whole, whole
    *lead, rows = index
    axis = len(lead)
    if any(at >= extent for at, extent in zip(lead, common, strict=False)) or rows.start >= common[axis]:
        return None
    stop = min(rows.stop, common[axis])
    rest = tuple(slice(0, extent) for extent in common[axis + 1 :])
    return (*lead, slice(rows.start, stop), *rest), (slice(0, stop - rows.start), *rest)
