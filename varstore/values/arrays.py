"""Convert the values that a caller passes to `save`: arrays and tensors of every kind, without importing a framework.

A value becomes an ndarray immediately if that does not copy it. A tensor on a device or in a file becomes a
`LazyArray`, whose values are read when it is written.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Hashable, Iterable, Mapping
from functools import partial
from typing import Any, TypeVar

import numpy as np

from varstore.errors import UnsupportedDtype, UsageError, VarstoreError
from varstore.layout.dtypes import TABLE
from varstore.layout.location import Location
from varstore.layout.manifest import Entry
from varstore.values.lazy import LazyArray
from varstore.values.methods import NumpyMethods
from varstore.values.opaque import Opaque

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
Answer = TypeVar("Answer")

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
            return _asked(value, variable, reader, value, variable)
    if hasattr(value, "__array__") and hasattr(value, "shape") and hasattr(value, "dtype"):
        return _late(value, variable, lambda: np.asarray(value))
    raise UsageError(
        "not an array, a scalar or a variable of a checkpoint",
        variable=variable,
        found=type(value).__name__,
        hint=_way_to_save(value),
    )


def _way_to_save(value: Any) -> str:
    if hasattr(value, "state_dict"):
        return "save its state_dict() with save_state"
    if isinstance(value, str | bytes | Mapping | set):
        return "use save_state, which saves nested state"
    if isinstance(value, Opaque):
        return "leave it out: it is an object of a class that varstore does not know"
    return "make it an array with numpy.asarray, or use save_state for nested state"


def _asked(value: Any, variable: str, ask: Callable[..., Answer], *arguments: Any) -> Answer:
    """Return what a framework answers about a value; an error of the framework becomes one of varstore's.

    Wrappers of tensors refuse some questions, and an array may have been donated before its values are read.
    """
    try:
        return ask(*arguments)
    except (VarstoreError, MemoryError):
        raise
    except Exception as error:
        raise UsageError(
            f"the values of this {type(value).__name__} cannot be read",
            variable=variable,
            found=f"{type(error).__name__}: {error}",
            hint="save the plain tensors that it is made of",
        ) from error


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


def _late_of_framework(
    value: Any, variable: str, fetch: Callable[[], np.ndarray], identity: Hashable = None
) -> LazyArray:
    return _late(value, variable, partial(_asked, value, variable, fetch), identity)


def _refuse(refusals: Iterable[tuple[Any, str, str]], variable: str) -> None:
    """Raise for the first of the rows (whether it applies, what the value is, what to do) that applies."""
    for applies, what, hint in refusals:
        if applies:
            raise UnsupportedDtype(f"{what} cannot be saved", variable=variable, hint=hint)


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


_WRAPPERS = {
    "DTensor": (
        "a tensor that is spread over processes",
        "save it with varstore.adapters.torch_distributed.save, which every rank calls",
    ),
    "MaskedTensor": ("a masked tensor, which would lose its mask,", "save its get_data() and get_mask() apart"),
    "NestedTensor": ("a nested tensor", "save its values() and offsets() apart"),
    "FakeTensor": ("a fake tensor, which has no values,", "save the tensor that it stands for"),
}
"""Tensors that are made of others, by the names of their classes."""


def _torch(tensor: Any, variable: str) -> Source:
    torch = sys.modules["torch"]
    kind = type(tensor)
    what, hint = _WRAPPERS.get(kind.__name__, (f"a {kind.__name__}, which is made of other tensors,", ""))
    is_wrapper = isinstance(tensor, torch.Tensor) and kind.__torch_dispatch__ is not torch.Tensor.__torch_dispatch__
    _refuse(
        [
            (not isinstance(tensor, torch.Tensor), f"a {kind.__name__}", "save a tensor that uses it"),
            (is_wrapper or kind.__name__ in _WRAPPERS, what, hint or "save these, or its dequantize() if it has one"),
        ],
        variable,
    )
    is_lazy = torch.nn.parameter.is_lazy(tensor)
    _refuse([(is_lazy, "a parameter that is not initialized yet", "run its module once first")], variable)
    _refuse(
        [
            (tensor.is_nested, "a nested tensor", "save its values() and offsets() apart"),
            (tensor.layout is not torch.strided, "a sparse tensor", "save its indices and values apart"),
            (tensor.is_quantized, "a quantised tensor", "save int_repr() and its scales apart, or dequantize() it"),
            (tensor.device.type == "meta", "a tensor on the meta device, which has no values", "materialise it first"),
            (torch._is_functional_tensor(tensor), "a functional tensor", "save outside of functionalize"),
        ],
        variable,
    )
    tensor = tensor.detach()
    _refuse([(_is_freed(tensor), "a tensor whose memory was freed", "gather its values first")], variable)
    identity = ("torch", str(tensor.device), tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), str(tensor.dtype))
    late = _late_of_framework(tensor, variable, lambda: _torch_values(tensor, late.dtype), identity)
    return late.numpy() if tensor.device.type == "cpu" else late


def _is_freed(tensor: Any) -> bool:
    """Tell whether a tensor's storage is shorter than the tensor, as that of a sharded module between its steps."""
    if not tensor.numel():
        return False
    last = sum((extent - 1) * stride for extent, stride in zip(tensor.shape, tensor.stride(), strict=True))
    reach: int = (tensor.storage_offset() + last + 1) * tensor.element_size()
    return bool(tensor.untyped_storage().nbytes() < reach)


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


def _jax(array: Any, variable: str) -> Source:
    jax = sys.modules.get("jax")
    is_traced = jax is not None and isinstance(array, jax.core.Tracer)
    is_deleted = getattr(array, "is_deleted", bool)
    _refuse(
        [
            (is_traced, "a tracer, which has no values,", "save outside of jit, grad and vmap"),
            (not hasattr(array, "__array__"), f"a {type(array).__name__}, which is not an array,", "save arrays"),
            (str(array.dtype).startswith("key<"), "a typed random key", "save jax.random.key_data(key) instead"),
            (
                not is_traced and is_deleted(),
                "an array that was donated or deleted",
                "save it before the call that it is donated to, or give that call a copy",
            ),
            (
                not is_traced
                and not getattr(array, "is_fully_addressable", True)
                and not getattr(array, "is_fully_replicated", True),
                "an array that is spread over processes",
                "save it with varstore.adapters.jax.save_sharded, which every process calls",
            ),
        ],
        variable,
    )
    return _by_method("__array__")(array, variable)


def _by_method(method: str) -> Callable[[Any, str], Source]:
    def read(tensor: Any, variable: str) -> Source:
        late = _late_of_framework(tensor, variable, lambda: _same_type(getattr(tensor, method)(), late.dtype))
        return late

    return read


def _mindspore(tensor: Any, variable: str) -> Source:
    def values() -> np.ndarray:
        if late.dtype.name == "bfloat16":  # asnumpy refuses it
            return np.frombuffer(tensor.contiguous().get_bytes(), late.dtype).reshape(late.shape)
        return _same_type(tensor.asnumpy(), late.dtype)

    late = _late_of_framework(tensor, variable, values)
    return late


def _same_type(values: Any, dtype: np.dtype[Any]) -> np.ndarray:
    """Restore bfloat16, which frameworks represent by its bits as uint16 or its values as float32."""
    array = np.asarray(values)
    if array.dtype != dtype and array.dtype.itemsize == dtype.itemsize:
        return array.view(dtype)
    return array if array.dtype == dtype else array.astype(dtype)


_FRAMEWORKS: dict[str, Callable[[Any, str], Source]] = {
    "jax": _jax,
    "jaxlib": _jax,
    "megengine": _by_method("numpy"),
    "mindspore": _mindspore,
    "oneflow": _by_method("numpy"),
    "paddle": _paddle,
    "torch": _torch,
}
