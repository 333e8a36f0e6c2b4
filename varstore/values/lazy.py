"""An array whose values are fetched when they are needed: from a file, from a device, or from another array."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Any

import numpy as np

from varstore.values.methods import NumpyMethods

__all__ = ["LazyArray", "derived"]


class LazyArray(NumpyMethods):
    """Shape and type are known; `numpy` and ``np.asarray`` read the values, ``[]`` what the index asks for.

    `attributes` is what the file says of the array beyond that, such as the scale of quantised values; `name` is its
    name there. Nothing is kept: each use reads anew. Two arrays with equal `identity` share memory.
    """

    __slots__ = ("_fetch", "_identity", "_part", "attributes", "dtype", "name", "shape")

    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    def __init__(
        self,
        shape: tuple[int, ...],
        dtype: np.dtype[Any],
        fetch: Callable[[], np.ndarray],
        attributes: Mapping[str, Any] | None = None,
        *,
        part: Callable[[Any], Any] | None = None,
        identity: Hashable = None,
        name: str = "",
    ) -> None:
        self.shape = shape
        self.dtype = dtype
        self.attributes = dict(attributes or {})
        self.name = name
        self._fetch = fetch
        self._part = part
        self._identity = identity

    @property
    def identity(self) -> Hashable:
        """What tells these values from any others: equal for arrays that share memory."""
        return id(self) if self._identity is None else self._identity

    def numpy(self) -> np.ndarray:
        """Read the values into a new array."""
        return self._fetch()

    read = numpy

    def __getitem__(self, index: Any) -> Any:
        if self._part is not None:
            return self._part(index)
        values = self.numpy()
        found = values[index]
        is_small = isinstance(found, np.ndarray) and 2 * found.size < values.size
        return found.copy() if is_small else found

    def __repr__(self) -> str:
        name = f" {self.name!r}" if self.name else ""
        return f"<LazyArray{name}: {self.dtype} {list(self.shape)}, {self.nbytes:,} bytes>"


def derived(
    array: LazyArray,
    convert: Callable[[Any], Any] | None = None,
    dtype: np.dtype[Any] | None = None,
    attributes: Mapping[str, Any] | None = None,
) -> LazyArray:
    """Return an array of the values of another after `convert`, which changes each element and not the shape."""
    change = convert or (lambda values: values)
    return LazyArray(
        array.shape,
        array.dtype if dtype is None else dtype,
        lambda: change(array.numpy()),
        array.attributes if attributes is None else attributes,
        part=lambda index: change(array[index]),
        name=array.name,
    )
