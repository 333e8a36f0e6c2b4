"""Arrays on devices, made of values on disk: a process reads the parts that its own devices hold, each part once.

Where these parts are all of an array, it is read whole. No process waits for another one here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import numpy as np
from jax.sharding import Sharding

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
    """Return what gives these parts of stored values, after reading them."""
    count = sum(math.prod(stop - start for start, stop in box) for box in boxes)
    if count == math.prod(stored.shape):
        whole = _whole(stored)
        return lambda box: whole[_slices(box)]
    return {box: np.asarray(stored[_slices(box)]) for box in boxes}.__getitem__


def _whole(stored: Variable | LazyArray | np.ndarray) -> np.ndarray:
    return stored if isinstance(stored, np.ndarray) else stored.numpy()


def _slices(box: Box) -> tuple[slice, ...]:
    return tuple(slice(start, stop) for start, stop in box)
