"""Arrays on devices, made of values on disk: a process reads the parts that its own devices hold, each part once.

The more is read in one piece, the more digests lie within it and are compared. So parts that make up one rectangle, or
all of an array, are read as that. No process waits for another one here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import repeat
from typing import Any, TypeAlias

import jax
import numpy as np
from jax.sharding import Sharding

from varstore.disk.read.rectangles import read_rectangles
from varstore.disk.read.variable import Variable
from varstore.errors import UsageError
from varstore.training.tensors import require_type_of_jax
from varstore.values.lazy import LazyArray

__all__ = ["Box", "box_of", "own_boxes", "placed", "placed_keys", "require_placeable"]

Box: TypeAlias = tuple[tuple[int, int], ...]
"""A part of an array: where it starts and stops along each axis."""


def placed(stored: Variable | LazyArray | np.ndarray, dtype: np.dtype[Any], sharding: Sharding | None) -> Any:
    """Return stored values as an array of jax with a type and a sharding; without one, on the default device."""
    if sharding is None:
        return jax.device_put(_whole(stored).astype(dtype, copy=False))
    parts = _parts(stored, own_boxes(stored.shape, sharding))

    def part(index: tuple[slice, ...]) -> np.ndarray:
        return parts(box_of(index, stored.shape)).astype(dtype, copy=False)

    return jax.make_array_from_callback(stored.shape, sharding, part, dtype=dtype)


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


def _parts(stored: Variable | LazyArray | np.ndarray, boxes: list[Box]) -> Callable[[Box], np.ndarray]:
    """Return what gives these parts of stored values, after reading them; no two of them overlap."""
    if not boxes:
        return dict[Box, np.ndarray]().__getitem__
    around = tuple(
        (min(start for start, _ in rows), max(stop for _, stop in rows)) for rows in zip(*boxes, strict=True)
    )
    if sum(map(_count, boxes)) < _count(around):
        return dict(zip(boxes, _read(stored, boxes), strict=True)).__getitem__
    (values,) = _read(stored, [around])

    def part(box: Box) -> np.ndarray:
        return values[tuple(slice(at - first, to - first) for (at, to), (first, _) in zip(box, around, strict=True))]

    return part


def _read(stored: Variable | LazyArray | np.ndarray, boxes: list[Box]) -> list[np.ndarray]:
    if _count(boxes[0]) == math.prod(stored.shape):
        return [_whole(stored)]
    if not isinstance(stored, Variable):
        return [np.asarray(stored[tuple(slice(start, stop) for start, stop in box)]) for box in boxes]
    offsets = [[start for start, _ in box] for box in boxes]
    sizes = [[stop - start for start, stop in box] for box in boxes]
    found = [np.empty(extents, stored.dtype) for extents in sizes]
    read_rectangles(zip(repeat(stored), offsets, sizes, found, strict=False), verify=True, threads=None)
    return found


def _count(box: Box) -> int:
    """Return the number of elements."""
    return math.prod(stop - start for start, stop in box)


def _whole(stored: Variable | LazyArray | np.ndarray) -> np.ndarray:
    return stored if isinstance(stored, np.ndarray) else stored.numpy()
