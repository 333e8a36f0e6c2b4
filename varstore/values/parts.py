"""Read the part of an array that an index asks for: its elements, and few others.

An index is first tried on an array of the same shape that takes no memory, so that a wrong index raises numpy's own
error. It then becomes a block and a simpler index into that block. The block has one axis for each axis of the
array, or for each row of integer arrays in the index, and holds every element that the index needs, once, in the order
of the file. Elements are named by their offsets from the first one, so an array of any strides is read the same way.

The block is filled from the outermost axis inwards. Where the gaps between needed elements are small, they are read
with what lies between them and picked in memory; otherwise each dense piece is a read of its own. Reads are of a few
MiB, so that little memory is needed beyond that of the result.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

__all__ = [
    "Placed",
    "Read",
    "bounds",
    "in_c_order",
    "in_fortran_order",
    "overlap",
    "read_all",
    "read_box",
    "read_indexed",
    "taken",
]

Read = Callable[[int, int], np.ndarray]
"""Return `size` bytes at `offset` as a new array of uint8."""

Offsets = range | np.ndarray
"""Distances in elements, ascending."""

_AT_ONCE = 4 << 20
"""Bytes of one read."""
_DENSE = 16384
"""Bytes; elements that are nearer to each other than this are read with what lies between them."""


class Placed(NamedTuple):
    """Where the elements of an array lie among bytes; strides are in elements, and not negative."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    strides: tuple[int, ...]
    start: int = 0
    """The byte of the first element."""
    is_fortran: bool = False
    """Whether arrays that are made of them have Fortran's order in memory too."""


def in_c_order(shape: tuple[int, ...], dtype: np.dtype[Any], start: int = 0) -> Placed:
    """Place an array whose last axis is the innermost."""
    return Placed(shape, dtype, _strides(shape), start)


def in_fortran_order(shape: tuple[int, ...], dtype: np.dtype[Any], start: int = 0) -> Placed:
    """Place an array whose first axis is the innermost."""
    return Placed(shape, dtype, _strides(shape[::-1])[::-1], start, is_fortran=True)


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides = []
    step = 1
    for extent in reversed(shape):
        strides.append(step)
        step *= max(extent, 1)
    return tuple(reversed(strides))


def taken(values: np.ndarray, index: Any) -> Any:
    """Return ``values[index]``, copied if it would keep a much larger array in memory."""
    found = values[index]
    return found.copy() if isinstance(found, np.ndarray) and 2 * found.size < values.size else found


def bounds(shape: tuple[int, ...], index: Any) -> tuple[list[range], tuple[int | slice, ...]] | None:
    """Return the smallest block that holds what an index selects, as rows along each axis, and the index into it.

    The index has been checked. Returns None unless it consists of integers, slices and at most one ellipsis.
    """
    tokens = [*index] if isinstance(index, tuple) else [index]
    places = [at for at, token in enumerate(tokens) if token is Ellipsis]
    rest = [slice(None)] * (len(shape) - len(tokens) + len(places))
    tokens = tokens[: places[0]] + rest + tokens[places[0] + 1 :] if places else tokens + rest
    box: list[range] = []
    inner: list[int | slice] = []
    for extent, token in zip(shape, tokens, strict=False):
        if isinstance(token, slice):
            rows = range(extent)[token]
            first, last = (min(rows[0], rows[-1]), max(rows[0], rows[-1])) if rows else (0, -1)
            end = rows[-1] - first + (1 if rows.step > 0 else -1) if rows else 0
            inner.append(slice(rows[0] - first if rows else 0, None if end < 0 else end, rows.step if rows else 1))
        elif isinstance(token, int | np.integer) and not isinstance(token, bool):
            first = last = range(extent)[int(token)]
            inner.append(0)
        else:
            return None
        box.append(range(first, last + 1))
    return (box, tuple(inner)) if len(tokens) == len(shape) else None


def overlap(box: Sequence[range], chunk: Sequence[range]) -> tuple[tuple[slice, ...], tuple[slice, ...]] | None:
    """Return what two blocks have in common, as an index into the first and into the second; None for nothing."""
    shared = [range(max(a.start, b.start), min(a.stop, b.stop)) for a, b in zip(box, chunk, strict=True)]
    if not all(shared):
        return None

    def within(block: Sequence[range]) -> tuple[slice, ...]:
        return tuple(slice(s.start - own.start, s.stop - own.start) for s, own in zip(shared, block, strict=True))

    return within(box), within(chunk)


def read_all(placed: Placed, read: Read) -> np.ndarray:
    """Read the whole array."""
    axes = [_steps(range(extent), stride) for extent, stride in zip(placed.shape, placed.strides, strict=True)]
    return _spread(_block(placed, axes, read), placed.shape)


def read_box(placed: Placed, box: Sequence[range], target: np.ndarray, read: Read) -> None:
    """Fill an array with the elements in these rows along each axis, which are next to each other."""
    if target.size:
        axes: list[Offsets] = [_steps(rows, stride) for rows, stride in zip(box, placed.strides, strict=True)]
        _fill(target, axes, 0, _elements(placed, read))


def read_indexed(
    placed: Placed,
    index: Any,
    read: Read,
    whole: Callable[[], np.ndarray],
    convert: Callable[[np.ndarray], np.ndarray] | None = None,
) -> Any:
    """Return what ``array[index]`` gives.

    Args:
        read: gives ranges of the bytes that the array is placed among.
        whole: gives the array, for an index that needs all of it.
        convert: turns elements as they are stored, a block of them, into those of the array.

    Raises:
        IndexError: numpy's own, before anything is read.
    """
    if placed.dtype.fields:
        return taken(whole(), index)
    np.ndarray(placed.shape, np.bool_, b"\0", 0, (0,) * len(placed.shape))[index]
    needed = _needed(index, placed)
    if needed is None:
        return taken(whole(), index)
    axes, shape, simple = needed
    block = _block(placed, axes, read)
    return _spread(block if convert is None else np.asarray(convert(block)), shape)[simple]


def _spread(block: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Repeat a block along the axes of stride 0, whose elements are one and the same in the file."""
    return block if block.shape == shape else np.broadcast_to(block, shape).copy()


# --- from an index to a block ----------------------------------------------------------------------------------------


def _needed(index: Any, placed: Placed) -> tuple[list[Offsets], tuple[int, ...], tuple[Any, ...]] | None:
    """Return the offsets along each axis of the block, its shape, and the index into it; None for a whole array."""
    tokens = _tokens(index if isinstance(index, tuple) else (index,))
    if tokens is None:
        return None
    left = [*zip(placed.shape, placed.strides, strict=True)]
    axes: list[Offsets] = []
    shape: list[int] = []
    simple: list[Any] = []

    def add(offsets: Offsets, extent: int) -> None:
        axes.append(offsets)
        shape.append(extent)

    def add_rows(rows: range) -> None:
        _, stride = left.pop(0)
        add(_steps(rows, stride), len(rows))

    while tokens:
        token = tokens.pop(0)
        if token is None:
            simple.append(None)
        elif token is Ellipsis:
            simple.append(Ellipsis)
            for _ in range(len(left) - sum(later is not None for later in tokens)):
                add_rows(range(left[0][0]))
        elif isinstance(token, slice):
            rows = range(left[0][0])[token]
            simple.append(slice(None, None, -1 if rows.step < 0 else None))
            add_rows(rows[::-1] if rows.step < 0 else rows)
        else:
            picks = [token]
            while tokens and isinstance(tokens[0], int | np.ndarray):
                picks.append(tokens.pop(0))
            places = sum(_places(pick, *left.pop(0)) for pick in picks)
            if isinstance(places, int):
                add(range(places, places + 1), 1)
                simple.append(0)
                continue
            offsets, position = np.unique(places, return_inverse=True)
            add(_evenly(offsets), len(offsets))
            simple.append(position.reshape(places.shape))
    while left:
        add_rows(range(left[0][0]))
    is_whole = len(axes) == len(placed.shape) and shape == list(placed.shape)
    return None if is_whole and 0 not in shape else (axes, tuple(shape), tuple(simple))


def _tokens(parts: tuple[Any, ...]) -> list[Any] | None:
    """Return the parts of a valid index as None, ..., slices, ints and integer arrays; None if it has any other."""
    tokens: list[Any] = []
    for part in parts:
        if part is None or part is Ellipsis or isinstance(part, slice) or type(part) is int:
            tokens.append(part)
            continue
        try:
            array = np.asarray(part if isinstance(part, np.ndarray | bool | np.bool_) else operator.index(part))
        except TypeError:
            array = np.asarray(part)
            array = array if array.size else array.astype(np.intp)
        if array.dtype == np.bool_ and array.ndim:
            tokens.extend(array.nonzero())
        elif array.dtype.kind in "iu":
            tokens.append(array if array.ndim else int(array))
        else:
            return None
    return tokens


def _places(pick: Any, extent: int, stride: int) -> Any:
    if isinstance(pick, int):
        return pick % extent * stride
    rows = pick.astype(np.intp)
    return np.where(rows < 0, rows + extent, rows) * stride


def _steps(rows: range, stride: int) -> range:
    """Return the offsets of rows; an axis of stride 0 has a single element in the file."""
    return range(rows.start * stride, rows.stop * stride, rows.step * stride) if stride else range(min(len(rows), 1))


def _evenly(offsets: np.ndarray) -> Offsets:
    """Return offsets as a range if they are evenly spaced."""
    if len(offsets) < 2:
        return range(int(offsets[0]), int(offsets[0]) + 1) if len(offsets) else range(0)
    first, last, step = int(offsets[0]), int(offsets[-1]), int(offsets[1] - offsets[0])
    is_even = last - first == step * (len(offsets) - 1) and bool((np.diff(offsets) == step).all())
    return range(first, last + 1, step) if is_even else offsets


# --- from a block to reads -------------------------------------------------------------------------------------------


def _block(placed: Placed, axes: Sequence[Offsets], read: Read) -> np.ndarray:
    shape = tuple(map(len, axes))
    elements = _elements(placed, read)
    if 0 in shape:
        return np.empty(shape, placed.dtype)
    order: Literal["C", "F"] = "F" if placed.is_fortran else "C"
    longer = [axis for axis, extent in enumerate(shape) if extent > 1]
    kept = [axes[axis] for axis in (longer[::-1] if placed.is_fortran else longer)]
    if _is_one_piece(kept):
        return elements(sum([int(offsets[0]) for offsets in axes]), _span(kept)).reshape(shape, order=order)
    outwards = sorted(longer, key=lambda axis: -_step(axes[axis]))
    kept = [axes[axis] for axis in outwards]
    block = np.empty(shape, placed.dtype, order)
    at = sum(int(offsets[0]) for offsets in axes if len(offsets) == 1)
    inside = block.squeeze(tuple(axis for axis, extent in enumerate(shape) if extent == 1))
    _fill(inside.transpose([longer.index(axis) for axis in outwards]), kept, at, elements)
    return block


def _elements(placed: Placed, read: Read) -> Read:
    """Return what reads a number of elements, from one on."""
    itemsize = placed.dtype.itemsize
    return lambda first, count: read(placed.start + first * itemsize, count * itemsize).view(placed.dtype)


def _fill(target: np.ndarray, axes: list[Offsets], at: int, elements: Read) -> None:
    """Read what lies at `at` plus an offset of each axis, the outermost first, into the target."""
    while axes and len(axes[0]) == 1:
        at += int(axes[0][0])
        axes, target = axes[1:], target[0, ...]
    itemsize = target.itemsize
    span = _span(axes)
    if not axes or (span * itemsize <= _AT_ONCE and _is_dense(axes, itemsize)):
        target[...] = _picked(elements(at + sum(int(offsets[0]) for offsets in axes), span), axes)
        return
    inner = axes[1:]
    for first, last in _groups(axes[0], _span(inner), _is_dense(inner, itemsize), itemsize):
        part = axes[0][first:last]
        _fill(target[first:last], [part if isinstance(part, range) else _evenly(part), *inner], at, elements)


def _groups(offsets: Offsets, inner: int, is_dense: bool, itemsize: int) -> Iterator[tuple[int, int]]:
    """Yield the runs of an axis that are read together, where what is needed at each of its places spans `inner`."""
    count, most = len(offsets), max(_AT_ONCE // itemsize - inner, 0)
    if isinstance(offsets, range) or not is_dense:
        together = most // _step(offsets) + 1 if is_dense and (_step(offsets) - inner) * itemsize <= _DENSE else 1
        yield from ((first, min(first + together, count)) for first in range(0, count, together))
        return
    gaps = np.flatnonzero((np.diff(offsets) - inner) * itemsize > _DENSE) + 1
    first = 0
    for last in (*gaps.tolist(), count):
        while first < last:
            end = int(np.searchsorted(offsets[first:last], offsets[first] + most, "right"))
            yield first, first + end
            first += end


def _picked(values: np.ndarray, axes: Sequence[Offsets]) -> np.ndarray:
    """Return the elements at the offsets, counted from the first one."""
    if all(isinstance(offsets, range) for offsets in axes):
        strides = [_step(offsets) * values.itemsize for offsets in axes]
        return np.ndarray([len(offsets) for offsets in axes], values.dtype, values, 0, strides)
    places = np.zeros((), np.intp)
    for offsets in axes:
        places = places[..., np.newaxis] + (np.asarray(offsets) - offsets[0])
    return values[places]


def _span(axes: Sequence[Offsets]) -> int:
    """Return how many elements lie from the first needed one to the last."""
    return sum([int(offsets[-1]) - int(offsets[0]) for offsets in axes]) + 1


def _step(offsets: Offsets) -> int:
    """Return the largest distance of neighbours, at least 1."""
    if isinstance(offsets, range):
        return offsets.step if len(offsets) > 1 else 1
    return int(np.diff(offsets).max())


def _is_dense(axes: Sequence[Offsets], itemsize: int) -> bool:
    span = 1
    for offsets in reversed(axes):
        if len(offsets) > 1 and (_step(offsets) - span) * itemsize > _DENSE:
            return False
        span += int(offsets[-1]) - int(offsets[0])
    return True


def _is_one_piece(axes: Sequence[Offsets]) -> bool:
    """Tell whether the elements lie end to end, the last axis innermost."""
    count = 1
    for offsets in reversed(axes):
        if len(offsets) > 1:
            if not isinstance(offsets, range) or offsets.step != count:
                return False
            count *= len(offsets)
    return True
