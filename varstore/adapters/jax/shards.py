"""Arrays on devices, made of values on disk: a process reads the parts that its own devices hold, each part once.

The more is read in one piece, the more digests lie within it and are compared. So parts that make up one rectangle, or
all of an array, are read as that. No process waits for another one here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, TypeAlias

import jax
import numpy as np
from jax.sharding import Sharding

from varstore.disk.read.rectangles import in_groups, read_rectangles
from varstore.disk.read.variable import Variable
from varstore.errors import UsageError
from varstore.training.tensors import require_type_of_jax
from varstore.values.lazy import LazyArray

__all__ = ["Box", "Wanted", "box_of", "own_boxes", "placed", "placed_keys", "require_placeable"]

Box: TypeAlias = tuple[tuple[int, int], ...]
"""A part of an array: where it starts and stops along each axis."""

_AT_ONCE = 64 << 20
"""Bytes of values that are read before they go to their devices."""


class Wanted(NamedTuple):
    """An array to make: the stored values, the type that it gets, and its sharding; None is the default device."""

    stored: Variable | LazyArray | np.ndarray
    dtype: np.dtype[Any]
    sharding: Sharding | None


def placed(wanted: Iterable[Wanted]) -> Iterator[Any]:
    """Yield arrays of jax. Small ones are read together, in parallel; the host has at most 64 MiB of them, or one."""
    for group in in_groups(((one, _boxes(one)) for one in wanted), _size, _AT_ONCE):
        yield from _placed(group)


def _size(wanted: tuple[Wanted, list[Box]]) -> int:
    one, boxes = wanted
    return sum(map(_count, boxes)) * one.stored.dtype.itemsize


def _placed(group: list[tuple[Wanted, list[Box]]]) -> Iterator[Any]:
    read: list[list[np.ndarray]] = []
    rectangles = []
    for (stored, _, _), boxes in group:
        if isinstance(stored, Variable):
            read.append([np.empty([stop - start for start, stop in box], stored.dtype) for box in boxes])
            found = zip(boxes, read[-1], strict=True)
            rectangles += [(stored, [start for start, _ in box], part.shape, part) for box, part in found]
        else:
            read.append([_part_of(stored, box) for box in boxes])
    read_rectangles(rectangles, verify=True, threads=None)
    for (one, boxes), parts in zip(group, read, strict=True):
        yield _made(one, dict(zip(boxes, parts, strict=True)))
        parts.clear()


def _made(wanted: Wanted, parts: dict[Box, np.ndarray]) -> Any:
    stored, dtype, sharding = wanted
    if sharding is None:
        return jax.device_put(next(iter(parts.values())).astype(dtype, copy=False))

    def values(index: tuple[slice, ...]) -> np.ndarray:
        if not parts:  # jax asks for the values of replicas also where no device is this process's
            return np.broadcast_to(np.zeros((), dtype), stored.shape)
        box = box_of(index, stored.shape)
        if (found := parts.get(box)) is None:
            ((around, found),) = parts.items()
            found = found[
                tuple(slice(at - first, to - first) for (at, to), (first, _) in zip(box, around, strict=True))
            ]
        return found.astype(dtype, copy=False)

    return jax.make_array_from_callback(stored.shape, sharding, values, dtype=dtype)


def _boxes(wanted: Wanted) -> list[Box]:
    """Return the rectangles to read: this process's parts, which do not overlap; or one, if they make it up."""
    stored, _, sharding = wanted
    if sharding is None:
        return [tuple((0, extent) for extent in stored.shape)]
    boxes = own_boxes(stored.shape, sharding)
    if len(boxes) < 2:
        return boxes
    around = tuple(
        (min(start for start, _ in rows), max(stop for _, stop in rows)) for rows in zip(*boxes, strict=True)
    )
    return boxes if sum(map(_count, boxes)) < _count(around) else [around]


def _part_of(stored: LazyArray | np.ndarray, box: Box) -> np.ndarray:
    """Return a part in memory of its own, since jax may make an array of that memory."""
    index = tuple(slice(start, stop) for start, stop in box)
    if isinstance(stored, np.ndarray):
        return stored[index].copy()
    return stored.numpy() if _count(box) == math.prod(stored.shape) else np.asarray(stored[index])


def _count(box: Box) -> int:
    """Return the number of elements."""
    return math.prod(stop - start for start, stop in box)


def placed_keys(keys: Any, sharding: Sharding | None) -> Any:
    """Return typed keys of the default device with another sharding."""
    if sharding is None:
        return keys
    return jax.make_array_from_callback(keys.shape, sharding, keys.__getitem__, dtype=keys.dtype)


def require_placeable(shape: tuple[int, ...], dtype: Any, sharding: Sharding | None, *, path: str, name: str) -> None:
    """Check that an array can have a sharding, and that jax keeps its type.

    Raises:
        UsageError: the sharding does not divide this shape, or jax would convert the array to a narrower type.
    """
    if not jax.dtypes.issubdtype(dtype, jax.dtypes.extended):
        require_type_of_jax(np.dtype(dtype), name)
    if sharding is None:
        return
    try:
        sharding.shard_shape(shape)
        sharding.addressable_devices_indices_map(shape)
    except Exception as error:  # jax has no class for these: it raises what it meets, such as an IndexError
        raise UsageError(
            "the variable cannot have this sharding",
            path=path,
            variable=name,
            found=f"shape {shape}, {sharding}",
            hint="give it a sharding that divides each extent evenly, or replicate it: PartitionSpec()",
        ) from error


def own_boxes(shape: tuple[int, ...], sharding: Sharding) -> list[Box]:
    """Return the parts of an array that the devices of this process hold; those of replicas once."""
    indices = sharding.addressable_devices_indices_map(shape).values()
    return list(dict.fromkeys(box_of(index, shape) for index in indices))


def box_of(index: tuple[slice, ...], shape: tuple[int, ...]) -> Box:
    """Return the part that jax's index of a shard stands for."""
    return tuple((rows.indices(extent)[0], rows.indices(extent)[1]) for rows, extent in zip(index, shape, strict=True))
