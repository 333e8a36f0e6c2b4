"""Targets that share memory: finds them, compares the values that they would get, and decides which is written.

Two targets may share memory: tied parameters, one array under two names, views that overlap. If both were written in
parallel, the last one would win by chance, and the digest of the other would not match. So the values are compared
before anything is written: by their digests if both are whole variables of checkpoints, and else value by value, in a
copy of the targets' memory layout (the shadow). Bits are compared, so a NaN equals itself and 0.0 differs from -0.0.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import numpy as np

from varstore.errors import VariableMismatch
from varstore.layout.readable import Readable
from varstore.layout.regions import equal_checksums
from varstore.model.match import OnTied
from varstore.model.moves import HOST, LateTarget, Move, OnDisk, Place, nbytes_of, parts, place_of
from varstore.text.hints import shortened
from varstore.values.casting import cast_values
from varstore.values.lazy import LazyArray

__all__ = ["Settled", "settle"]

_EFFORT: Any = 100_000
"""The most steps of numpy's search for a shared byte; after that, targets count as sharing, and are compared."""
_LINES = 10


@dataclass(frozen=True, kw_only=True, slots=True)
class Settled:
    """What to write, so that targets that share memory get the right values.

    The targets of `free` moves do not share memory. `ordered` moves are made one after the other. `winners` maps each
    target that is not written to the one that is written in its place.
    """

    free: list[Move]
    ordered: list[Move]
    winners: dict[str, str]

    @property
    def nbytes(self) -> int:
        """The number of bytes that the moves read or copy."""
        return sum(nbytes_of(move) for moves in (self.free, self.ordered) for move in moves)


def settle(
    moves: list[Move],
    *,
    names: Iterable[str],
    on_tied: OnTied,
    verify: bool,
    path: str | None = None,
    can_choose: bool = True,
) -> Settled:
    """Decide which moves are made if targets share memory; "first" and "last" refer to the order of `names`.

    `can_choose` tells whether the caller can pass another `on_tied`.

    Raises:
        VariableMismatch: two targets would get different values for the same memory; the message lists them all.
    """
    groups = _sharing(moves)
    if not groups:
        return Settled(free=moves, ordered=[], winners={})
    rank = {name: index for index, name in enumerate(names)}
    settled = Settled(free=[], ordered=[], winners={})
    conflicts: list[tuple[str, str]] = []
    for alike in groups:
        members = sorted((move for same in alike for move in same), key=lambda move: rank[move.pair.target])
        if on_tied != "last":
            members.reverse()
        if len(alike) == 1 and not any(map(_is_part, members)):
            *others, winner = members
            if on_tied == "error":
                conflicts += [_named(winner, other) for other in others if not _are_equal(winner, other, verify=verify)]
            settled.free.append(winner)
            settled.winners.update((other.pair.target, winner.pair.target) for other in others)
            continue
        if on_tied == "error" or any(isinstance(move.target, Place) for move in members):
            conflicts += _conflicts(members[::-1], verify=verify)
        else:
            conflicts += [pair for move in members if _folds(move) for pair in _conflicts([move], verify=verify)]
        settled.ordered.extend(members)
    if conflicts:
        conflicts.sort(key=lambda names: [rank[name] for name in names])
        raise _conflict_error(conflicts, path, can_choose=can_choose and on_tied == "error")
    shared = {id(move) for alike in groups for same in alike for move in same}
    settled.free.extend(move for move in moves if id(move) not in shared)
    return settled


def _sharing(moves: list[Move]) -> list[list[list[Move]]]:
    """Return the groups of moves whose targets share memory; within a group, moves to the same place form a list."""
    if _are_apart([move.target for move in moves]):
        return []
    reaches: dict[Hashable, list[tuple[int, int, int]]] = {}
    for index, move in enumerate(moves):
        memory, start, stop = _reach(move.target)
        if stop > start:
            reaches.setdefault(memory, []).append((start, stop, index))
    groups: list[list[list[Move]]] = []
    for found in reaches.values():
        for run in _runs(found):
            if len(run) == 1 and _is_plain(moves[run[0]].target):
                continue
            alike: dict[Place, list[Move]] = {}
            for index in run:
                alike.setdefault(place_of(moves[index].target), []).append(moves[index])
            connected = _connected(list(alike))
            groups += [[alike[place] for place in places] for places in connected]
    return [group for group in groups if len(group) > 1 or len(group[0]) > 1 or _folds(group[0][0])]


def _are_apart(targets: list[np.ndarray | LateTarget | Place]) -> bool:
    """Tell quickly that plain arrays do not share memory, as is usual; False means that a closer look is needed."""
    arrays = [target for target in targets if _is_plain(target)]
    if len(arrays) < len(targets):
        return False
    starts = np.fromiter((array.__array_interface__["data"][0] for array in arrays), np.uint64, len(arrays))
    stops = starts + np.fromiter((array.nbytes for array in arrays), np.uint64, len(arrays))
    order = np.argsort(starts)
    return bool((np.maximum.accumulate(stops[order])[:-1] <= starts[order][1:]).all())


def _is_plain(target: np.ndarray | LateTarget | Place) -> TypeGuard[np.ndarray]:
    return isinstance(target, np.ndarray) and target.flags.c_contiguous


def _reach(target: np.ndarray | LateTarget | Place) -> tuple[Hashable, int, int]:
    """Return the memory of a target, the address of its first byte, and the address after its last byte."""
    if _is_plain(target):
        start = target.__array_interface__["data"][0]
        return HOST, start, start + target.nbytes
    place = place_of(target)
    if 0 in place.shape:
        return place.memory, place.address, place.address
    spans = [(extent - 1) * stride for extent, stride in zip(place.shape, place.strides, strict=True)]
    below, above = sum(span for span in spans if span < 0), sum(span for span in spans if span > 0)
    return place.memory, place.address + below, place.address + above + place.dtype.itemsize


def _runs(reaches: list[tuple[int, int, int]]) -> Iterator[list[int]]:
    """Yield groups of indices of reaches that overlap, directly or through others."""
    run: list[int] = []
    end = -1
    for start, stop, index in sorted(reaches):
        if start >= end and run:
            yield run
            run = []
        run.append(index)
        end = max(end, stop)
    if run:
        yield run


def _connected(places: list[Place]) -> list[list[Place]]:
    """Return the places in groups of those that share a byte, directly or through others."""
    if len(places) == 1:
        return [places]
    groups: list[list[tuple[Place, np.ndarray]]] = []
    for place in places:
        addresses = np.asarray(_Addresses(place))
        apart, touched = [], [(place, addresses)]
        for group in groups:
            if any(_share_a_byte(addresses, other) for _, other in group):
                touched += group
            else:
                apart.append(group)
        groups = [*apart, touched]
    return [[place for place, _ in group] for group in groups]


class _Addresses:
    """The addresses of a place for numpy, which never reads the values, because they may be on a device."""

    def __init__(self, place: Place) -> None:
        self.__array_interface__ = {
            "version": 3,
            "data": (place.address, True),
            "shape": place.shape,
            "strides": place.strides,
            "typestr": f"|V{place.dtype.itemsize}",
        }


def _share_a_byte(one: np.ndarray, other: np.ndarray) -> bool:
    try:
        return np.shares_memory(one, other, max_work=_EFFORT)
    except np.exceptions.TooHardError:
        return True


def _folds(move: Move) -> bool:
    """Tell whether elements of the target may share memory with each other, as in a row that is broadcast."""
    _, _, shape, strides, dtype = place_of(move.target)
    reach = dtype.itemsize
    for stride, extent in sorted((abs(s), e) for s, e in zip(strides, shape, strict=True) if e > 1):
        if stride < reach:
            return True
        reach += stride * (extent - 1)
    return False


def _is_part(move: Move) -> bool:
    return move.pair.common != move.pair.target_shape or _folds(move)


def _are_equal(one: Move, other: Move, *, verify: bool) -> bool:
    """Tell whether two moves write the same bytes to a place."""
    known = _known_to_be_equal(one, other)
    if known or (known is False and one.pair.how == other.pair.how == "exact"):
        return known
    return not _conflicts([one, other], verify=verify)


def _known_to_be_equal(one: Move, other: Move) -> bool | None:
    """Tell without reading whether two sources have equal bytes; None if they have to be read."""
    a, b = one.source, other.source
    if isinstance(a, OnDisk) and isinstance(b, OnDisk):
        (place, variable), (elsewhere, second) = a, b
        if place == elsewhere and _file_of(variable) == _file_of(second):
            return True
        is_comparable = variable.dtype == second.dtype and variable.stored == second.stored
        return equal_checksums(variable.checksums, second.checksums) if is_comparable else None
    if isinstance(a, LazyArray) and isinstance(b, LazyArray):
        return a.identity == b.identity or None
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        return place_of(a) == place_of(b) or None
    return None


def _file_of(variable: Readable) -> str:
    return variable.entry.alias_of or variable.entry.name


def _conflicts(moves: Sequence[Move], *, verify: bool) -> list[tuple[str, str]]:
    """Return the names of both moves for each move that writes other bytes to a place than one before it."""
    shadow = _Shadow([place_of(move.target) for move in moves])
    met = [shadow.write(index, parts(move, verify=verify)) for index, move in enumerate(moves)]
    return [_named(moves[other], move) for move, other in zip(moves, met, strict=True) if other is not None]


def _named(one: Move, other: Move) -> tuple[str, str]:
    return one.pair.target, other.pair.target


class _Shadow:
    """A copy of the layout of the targets' memory, which also records who wrote each byte."""

    def __init__(self, places: Sequence[Place]) -> None:
        reaches = [_reach(place) for place in places]
        start = min(first for _, first, _ in reaches)
        size = max(stop for _, _, stop in reaches) - start
        self._bytes = np.zeros(size, np.uint8)
        self._writers = np.zeros(size, np.min_scalar_type(len(places)))
        self._places = [place._replace(address=place.address - start) for place in places]

    def write(self, index: int, values: Iterable[tuple[tuple[Any, ...], np.ndarray]]) -> int | None:
        """Write the parts of a target; return the index of a move whose bytes differ from them, if there is one."""
        place = self._places[index]
        held, writers = self._view(self._bytes, place, 1), self._view(self._writers, place, self._writers.itemsize)
        for where, part in values:
            where = where[1:] if where[:1] == (...,) else where  # the last axis is that of the bytes
            new = np.empty((*part.shape, place.dtype.itemsize), np.uint8)
            np.copyto(new.view(place.dtype)[..., 0], cast_values(part, place.dtype)[0])
            before = writers[where]
            differ = (before != 0) & (held[where] != new)
            if differ.any():
                return int(before[differ][0]) - 1
            held[where] = new
            writers[where] = index + 1
            if (held[where] != new).any():
                return index
        return None

    def _view(self, memory: np.ndarray, place: Place, size: int) -> np.ndarray:
        """Return the bytes of a target, or who wrote them; the last axis is that of the bytes of an element."""
        return np.ndarray(
            (*place.shape, place.dtype.itemsize),
            memory.dtype,
            memory.data,
            place.address * size,
            (*(stride * size for stride in place.strides), size),
        )


def _conflict_error(conflicts: list[tuple[str, str]], path: str | None, *, can_choose: bool) -> VariableMismatch:
    lines = [
        f"{one!r} and {other!r}" if one != other else f"{one!r}, whose own elements share memory"
        for one, other in conflicts
    ]
    can_choose = can_choose and any(one != other for one, other in conflicts)
    return VariableMismatch(
        "targets share memory, and the source has different values for them:",
        rows=shortened(lines, _LINES),
        path=path,
        hint='leave one out with exclude=, or pass on_tied="first" or on_tied="last" to choose whose values are taken'
        if can_choose
        else "give each of them its own memory, or leave them out with exclude=",
    )
