"""Convert the values that a caller passes to `save`: arrays and tensors of every kind, without importing a framework.

A value becomes an ndarray immediately if that does not copy it. A tensor on a device or in a file becomes a
`LazyArray`, whose values are read when it is written.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Hashable
from typing import Any

import numpy as np

from varstore.errors import UnsupportedDtype, UsageError
from varstore.layout.dtypes import TABLE
from varstore.layout.location import Location
from varstore.layout.manifest import Entry
from varstore.values.lazy import LazyArray
from varstore.values.methods import NumpyMethods

__all__ = ["Source", "Stored", "as_source"]


class Stored(NumpyMethods):
    """Values that are stored in a checkpoint already; saving them in another one links their file.

    This does not derive from `abc.ABC`, because `isinstance`, which is called for every variable of a save, would take
    ten times as long.
    """

    entry: Entry
    location: Location
    """The location of the checkpoint, which differs from that of a later checkpoint at the same path."""


Source = np.ndarray | LazyArray | Stored

_BY_NUMPY_NAME = {row.dtype.name: row.dtype for row in TABLE if row.dtype is not None}


def as_source(value: Any, variable: str) -> Source:
    """Return a value in a form that can be written.

    Raises:
        UnsupportedDtype: neither numpy nor ml_dtypes has the type of a tensor, or it is sparse, quantised or without
            values.
        UsageError: the value is not an array.
    """
    if type(value) is np.ndarray or isinstance(value, Stored | LazyArray):
        return value
    if isinstance(value, np.ma.MaskedArray):
        raise UsageError(
            "a masked array would lose its mask", variable=variable, hint="save .filled(), or .data and .mask apart"
        )
    if isinstance(value, np.ndarray):
        return np.asarray(value)
    if isinstance(value, (bool, int, float, complex, np.generic)):
        return _scalar(value, variable)
    for base in type(value).__mro__:
        reader = _FRAMEWORKS.get(base.__module__.partition(".")[0])
        if reader is not None and (hasattr(value, "dtype") or (reader is _paddle and hasattr(value, "_dtype"))):
            return reader(value, variable)
    if hasattr(value, "__array__") and hasattr(value, "shape") and hasattr(value, "dtype"):
        return _late(value, variable, lambda: np.asarray(value))
    raise UsageError(
        "not an array, a scalar or a variable of a checkpoint",
        variable=variable,
        found=type(value).__name__,
        hint="make it an array with numpy.asarray, or use save_state for nested state",
    )


def _scalar(value: Any, variable: str) -> np.ndarray:
    array = np.asarray(value)
    if array.dtype == object:
        raise UnsupportedDtype(
            "the integer does not fit 64 bits", variable=variable, found=value, hint="keep it in attributes"
        )
    return array


def _late(value: Any, variable: str, fetch: Callable[[], np.ndarray], identity: Hashable = None) -> LazyArray:
    shape = tuple(int(extent) for extent in value.shape)
    dtype = _numpy_type(value.dtype, variable)
    return LazyArray(shape, dtype, fetch, identity=id(value) if identity is None else identity)


def _numpy_type(dtype: Any, variable: str) -> np.dtype[Any]:
    if isinstance(dtype, np.dtype):
        return dtype
    for spelling in (getattr(dtype, "name", ""), dtype):  # names in Paddle 2 are like "FP32", its text is not
        known = _BY_NUMPY_NAME.get(str(spelling).rpartition(".")[2].lower().removesuffix("_"))
        if known is not None:
            return known
    raise UnsupportedDtype(
        "this tensor's type has no place on disk", variable=variable, found=str(dtype), hint="convert it first"
    )


def _torch(tensor: Any, variable: str) -> Source:
    torch = sys.modules["torch"]
    refusals = (
        (torch.nn.parameter.is_lazy(tensor), "a parameter that is not initialized yet", "run its module once first"),
        (tensor.is_nested, "a nested tensor", "save its values() and offsets() apart"),
        (tensor.layout is not torch.strided, "a sparse tensor", "save its indices and values apart"),
        (tensor.is_quantized, "a quantised tensor", "save int_repr() and its scales apart, or dequantize() it"),
        (tensor.device.type == "meta", "a tensor on the meta device, which has no values", "materialise it first"),
    )
    for refused, what, hint in refusals:
        if refused:
            raise UnsupportedDtype(f"{what} cannot be saved", variable=variable, hint=hint)
    tensor = tensor.detach()
    identity = ("torch", str(tensor.device), tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), str(tensor.dtype))
    late = _late(tensor, variable, lambda: _torch_values(tensor, late.dtype), identity)
    return late.numpy() if tensor.device.type == "cpu" else late


def _torch_values(tensor: Any, dtype: np.dtype[Any]) -> np.ndarray:
    torch = sys.modules["torch"]
    tensor = tensor.resolve_conj().resolve_neg().cpu()
    if dtype.type.__module__ != "numpy":
        tensor = tensor.view({1: torch.uint8, 2: torch.int16}[dtype.itemsize])
    values: np.ndarray = tensor.numpy()
    return values.view(dtype)


def _paddle(tensor: Any, variable: str) -> Source:
    """Return a tensor of dynamic Paddle or of a static program, in which shape and type are methods."""
    if not callable(tensor.shape):
        return _by_method("numpy")(tensor, variable)
    if not tensor._is_initialized():
        raise UnsupportedDtype(
            "a tensor without values cannot be saved", variable=variable, hint="run the startup program first"
        )
    dtype = _numpy_type(tensor._dtype(), variable)
    return LazyArray(tuple(tensor.shape()), dtype, lambda: _same_type(tensor, dtype), identity=id(tensor))


def _by_method(method: str) -> Callable[[Any, str], Source]:
    def read(tensor: Any, variable: str) -> Source:
        late = _late(tensor, variable, lambda: _same_type(getattr(tensor, method)(), late.dtype))
        return late

    return read


def _same_type(values: Any, dtype: np.dtype[Any]) -> np.ndarray:
    """Restore bfloat16, which frameworks represent by its bits as uint16 or its values as float32."""
    array = np.asarray(values)
    if array.dtype != dtype and array.dtype.itemsize == dtype.itemsize:
        return array.view(dtype)
    return array if array.dtype == dtype else array.astype(dtype)


_FRAMEWORKS: dict[str, Callable[[Any, str], Source]] = {
    "jax": _by_method("__array__"),
    "jaxlib": _by_method("__array__"),
    "megengine": _by_method("numpy"),
    "mindspore": _by_method("asnumpy"),
    "oneflow": _by_method("numpy"),
    "paddle": _paddle,
    "torch": _torch,
}
