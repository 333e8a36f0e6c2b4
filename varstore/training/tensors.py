"""The types of arrays in a state, torch's, jax's or numpy's: how they are described, and how they are restored.

The tree names the type of an array that is not numpy's. A framework is imported only when a state that holds its
arrays is restored. Arrays of other frameworks come back as numpy's.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from operator import itemgetter
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np

from varstore.errors import ManifestError, MissingDependency, UsageError
from varstore.values.casting import is_floating
from varstore.values.lazy import LazyArray, Place

__all__ = [
    "BUILT",
    "DEVICE",
    "GENERATOR",
    "JAX",
    "KEY",
    "LIST",
    "NDARRAY",
    "PARAMETER",
    "TENSOR",
    "Framework",
    "Leaf",
    "MapLocation",
    "as_array",
    "as_saved",
    "can_have_gradient",
    "built",
    "describe",
    "find_views",
    "framework_named",
    "locate",
    "place_of",
    "require_type_of_jax",
    "strides_of",
    "to_jax",
    "to_torch",
    "view_of",
    "wanted",
]

TENSOR = "torch.Tensor"
PARAMETER = "torch.nn.Parameter"
JAX = "jax.Array"
NDARRAY = "numpy.ndarray"
"""Said only of an array that came from a file of torch, where an array is numpy's if it is not a tensor."""

LIST = "list"
GENERATOR = "torch.Generator"
KEY = "jax.key"
BUILT = (LIST, GENERATOR, KEY)
"""What is stored as an array and is something else: a list of numbers, a generator's state, and jax's typed keys."""

_NUMBERS = {bool: np.dtype(np.bool_), int: np.dtype(np.int64), float: np.dtype(np.float64)}
_LONG = 1024
"""From this length on, a list of numbers is stored as an array."""

_DEVICES = ("cpu", "cuda", "mps", "xpu")
DEVICE = re.compile(rf"(?:{'|'.join(_DEVICES)})(?::[0-9]{{1,3}})?")
"""Devices that a tree may name. To move a tensor to another one imports a module of that name, or loses the values."""

MapLocation: TypeAlias = Any
"""A device, its name, a dict of names, or a function of (tensor, name); None for the device that each tensor had."""

Framework: TypeAlias = Literal["numpy", "torch"]
"""What all arrays are loaded as, whatever they were when they were saved."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Leaf:
    """What a tree says of an array.

    `view` is (owner, offset, strides), in elements, for a tensor within another. If the type is `optional`, because it
    is that of an array in a converted file, the array is numpy's where the framework is not installed.
    """

    name: str
    type: str = ""
    device: str = "cpu"
    impl: str = ""
    requires_grad: bool = False
    optional: bool = False
    view: tuple[str, int, tuple[int, ...]] | None = None

    __hash__ = None  # type: ignore[assignment]  # as an array, it is neither a key nor a member of a set

    @classmethod
    def of(cls, node: Mapping[str, Any]) -> Leaf:
        """Return what a node of the tree says; raise KeyError, TypeError or ValueError if it is wrong."""
        if not isinstance(node["name"], str):
            raise TypeError(f"a name that is not a string but {type(node['name']).__name__}")
        view = node.get("view")
        device = node.get("device", "cpu")
        if not DEVICE.fullmatch(device):
            raise ValueError(f"{device!r} is not a device of {', '.join(_DEVICES)}")
        return cls(
            name=node["name"],
            type=node["$"] if node["$"] in BUILT else str(node.get("type", "")),
            impl=str(node.get("impl", "")),
            device=device,
            requires_grad=bool(node.get("requires_grad", False)),
            optional=bool(node.get("optional", False)),
            view=None if view is None else (str(view["of"]), int(view["offset"]), tuple(map(int, view["strides"]))),
        )


def describe(value: Any, place: str) -> dict[str, Any]:
    """Return what the tree says of an array in addition to its name: nothing for one of numpy's.

    Raises:
        UsageError: it is of a subclass of torch's tensor, which only its own code can restore.
    """
    if isinstance(value, LazyArray):
        gradient = {"requires_grad": True} if value.requires_grad else {}
        return {"type": value.type, **gradient, "optional": True} if value.type else {}
    torch, jax = sys.modules.get("torch"), sys.modules.get("jax")
    if torch is not None and isinstance(value, torch.Tensor):
        kind = {torch.Tensor: TENSOR, torch.nn.Parameter: PARAMETER}.get(type(value))
        if kind is None:
            raise UsageError(
                f"{type(value).__name__} is a subclass of torch.Tensor, which only its own code can restore",
                field=place,
                hint="save the plain tensors that it is made of",
            )
        place = str(value.device)
        device = {"device": place} if value.device.type != "cpu" and DEVICE.fullmatch(place) else {}
        return {"type": kind, **device, **({"requires_grad": True} if value.requires_grad else {})}
    if jax is not None and isinstance(value, jax.Array):
        return {"type": JAX}
    return {}


def place_of(value: Any) -> Place | None:
    """Return where a tensor lies in its storage, which tensors of other types and of lazy bits do not share with it."""
    if isinstance(value, LazyArray):
        return value.place
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(value, torch.Tensor):
        return None
    memory = (value.untyped_storage().data_ptr(), str(value.device), value.dtype, value.is_conj(), value.is_neg())
    return Place(memory, value.storage_offset(), tuple(value.stride()))


def find_views(variables: Mapping[str, Any]) -> dict[str, tuple[str, int, tuple[int, ...]]]:
    """Return for each tensor that lies within another, contiguous one: the name of that one, offset and strides."""
    shared: dict[Any, list[_Reach]] = {}
    for name, value in variables.items():
        place = place_of(value)
        if place is not None and 0 not in value.shape:
            shared.setdefault(place.memory, []).append(_reach(name, tuple(value.shape), place))
    views = {}
    for group in shared.values():
        whole: _Reach | None = None  # of the contiguous ones so far, the one that ends last
        for reach in sorted(group, key=itemgetter(0, 1, 2)):
            if whole is not None and reach.start + reach.extent <= whole.start + whole.extent:
                views[reach.name] = whole.name, reach.start - whole.start, reach.strides
            elif not reach.is_scattered:
                whole = reach
    return views


class _Reach(NamedTuple):
    """Where a tensor starts in its storage, and how far it reaches; owners are ordered before their views."""

    start: int
    shortness: int
    is_scattered: bool
    name: str
    strides: tuple[int, ...]

    @property
    def extent(self) -> int:
        return -self.shortness


def _reach(name: str, shape: tuple[int, ...], place: Place) -> _Reach:
    extent = _extent(shape, place.strides)
    whole = strides_of(shape)
    is_whole = all(size == 1 or step == own for size, step, own in zip(shape, place.strides, whole, strict=True))
    return _Reach(place.offset, -extent, not is_whole, name, place.strides)


def strides_of(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the strides of a contiguous array, in elements."""
    strides, step = [], 1
    for extent in reversed(shape):
        strides.append(step)
        step *= max(extent, 1)
    return tuple(reversed(strides))


def _extent(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    return 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))


def wanted(leaf: Leaf, framework: Framework | None) -> Leaf:
    """Return the leaf as what the array is to become: the type that it had, or one of the named framework."""
    if leaf.type in BUILT:
        return leaf
    if framework == "numpy" or (framework is None and leaf.optional and not _is_installed(leaf.type.partition(".")[0])):
        return replace(leaf, type="", view=None)
    if framework == "torch" and leaf.type not in (TENSOR, PARAMETER, NDARRAY):
        return replace(leaf, type=TENSOR)
    return leaf


@cache
def _is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def locate(leaf: Leaf, map_location: MapLocation) -> str | Callable[[Any, str], Any]:
    """Return the device that a tensor goes to, or the caller's function that decides it."""
    if map_location is None:
        return leaf.device
    if isinstance(map_location, Mapping):
        return str({str(place): new for place, new in map_location.items()}.get(leaf.device, leaf.device))
    return map_location if callable(map_location) else str(map_location)


def to_torch(array: np.ndarray, leaf: Leaf, where: str | Callable[[Any, str], Any]) -> Any:
    """Return an array as a tensor, on the CPU in the array's own memory.

    Raises:
        UsageError: the device is not available, or torch does not have the type.
    """
    torch = framework_named("torch")
    tensor = _host_tensor(torch, array)
    moved = None if isinstance(where, str) else where(tensor, leaf.device)
    if isinstance(moved, torch.UntypedStorage | torch.storage.TypedStorage):  # as those for torch.load may return
        storage = getattr(moved, "_untyped_storage", moved)
        return tensor.new_empty(0, device=storage.device).set_(storage, 0, tensor.shape, tensor.stride())
    if moved is not None:
        return moved
    try:
        return tensor.to(where if isinstance(where, str) else leaf.device)
    except (RuntimeError, AssertionError, ImportError, AttributeError, ValueError) as error:
        raise UsageError(
            "the tensor cannot be moved to its device",
            variable=leaf.name,
            found=str(error).partition("\n")[0],
            hint='load with map_location="cpu", or with a device that is available',
        ) from error


def can_have_gradient(dtype: np.dtype[Any]) -> bool:
    """Tell whether torch lets tensors of this type require a gradient."""
    return dtype.kind == "c" or is_floating(dtype)


def as_saved(tensor: Any, leaf: Leaf) -> Any:
    """Return a tensor as a Parameter if it was one, and with the requires_grad that it had."""
    if leaf.type == PARAMETER:
        return framework_named("torch").nn.Parameter(tensor, requires_grad=leaf.requires_grad)
    return tensor.detach().requires_grad_() if leaf.requires_grad else tensor


def view_of(owner: Any, leaf: Leaf, shape: tuple[int, ...]) -> Any:
    """Return the tensor that lies within another.

    Raises:
        ManifestError: it would reach beyond the other's memory.
    """
    assert leaf.view is not None
    name, offset, strides = leaf.view
    if len(strides) != len(shape) or min((offset, *strides)) < 0 or offset + _extent(shape, strides) > owner.numel():
        raise ManifestError("the tree puts a tensor beyond the memory of its owner", variable=leaf.name, found=name)
    return owner.as_strided(shape, strides, owner.storage_offset() + offset)


def to_jax(array: np.ndarray, leaf: Leaf) -> Any:
    """Return an array as jax's.

    Raises:
        UsageError: jax would convert it to a narrower type, because 64-bit types are not enabled.
    """
    require_type_of_jax(array.dtype, leaf.name)
    return framework_named("jax").numpy.array(array)


def require_type_of_jax(dtype: np.dtype[Any], variable: str) -> None:
    """Check that jax keeps a type.

    Raises:
        UsageError: jax would convert an array of it to a narrower type, because 64-bit types are not enabled.
    """
    jax = framework_named("jax")
    try:
        kept = jax.dtypes.canonicalize_dtype(dtype)
    except TypeError as error:
        raise UsageError(
            "jax does not have this type",
            variable=variable,
            found=f"dtype {dtype}",
            hint="varstore.load gives numpy arrays",
        ) from error
    if kept != dtype:
        raise UsageError(
            "jax would convert this array to a narrower type",
            variable=variable,
            found=f"dtype {dtype}",
            hint="enable 64-bit types: jax.config.update('jax_enable_x64', True)",
        )


def as_array(value: Any) -> tuple[Any, dict[str, Any]] | None:
    """Return the array that is stored for a list of numbers, a generator or typed keys, and what the tree says of it.

    None for anything else. A list is one if it is long, and its items are all bool, int of 64 bits or float.
    """
    if type(value) is list:
        kinds = set(map(type, value)) if len(value) >= _LONG else ()
        dtype = _NUMBERS.get(next(iter(kinds))) if len(kinds) == 1 else None
        try:
            return None if dtype is None else (np.array(value, dtype), {"$": LIST})
        except OverflowError:
            return None
    torch, jax = sys.modules.get("torch"), sys.modules.get("jax")
    if torch is not None and isinstance(value, torch.Generator) and DEVICE.fullmatch(str(value.device)):
        return value.get_state().numpy(), {"$": GENERATOR, "device": str(value.device)}
    if jax is not None and isinstance(value, jax.Array) and jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key):
        with contextlib.suppress(RuntimeError):  # where its values were given away, it is refused as an array
            return jax.random.key_data(value), {"$": KEY, "impl": str(jax.random.key_impl(value))}
    return None


def built(array: np.ndarray, leaf: Leaf, where: str) -> Any:
    """Return what a leaf of `BUILT` is, of its array; a generator is one of the device `where`.

    Raises:
        ManifestError: the array is not one of such a thing.
        UsageError: the device is not available.
    """
    try:
        if leaf.type == LIST:
            if array.ndim != 1 or array.dtype not in _NUMBERS.values():
                raise ValueError(f"a list of {array.dtype}")
            return array.tolist()
        if leaf.type == KEY:
            return framework_named("jax").random.wrap_key_data(array, impl=leaf.impl)
        return _generator(array, leaf, where)
    except UsageError:
        raise
    except (TypeError, ValueError) as error:
        raise ManifestError(f"the array does not describe a {leaf.type}", variable=leaf.name, found=error) from error


def _generator(array: np.ndarray, leaf: Leaf, where: str) -> Any:
    torch = framework_named("torch")
    try:
        generator = torch.Generator(where)
        if generator.device.type != leaf.device.partition(":")[0]:
            raise RuntimeError
    except (RuntimeError, AssertionError) as error:
        raise UsageError(
            f"a generator of {leaf.device} cannot be one of this device",
            variable=leaf.name,
            found=where,
            hint="leave it out with exclude=, and make a new one",
        ) from error
    try:
        return generator.set_state(torch.from_numpy(array.copy()))
    except RuntimeError as error:
        raise ValueError(str(error).partition("\n")[0]) from error


def _host_tensor(torch: Any, array: np.ndarray) -> Any:
    try:
        if array.dtype.type.__module__ == "numpy":
            return torch.from_numpy(array) if array.ndim else torch.from_numpy(array.reshape(1)).reshape(())
        dtype = getattr(torch, array.dtype.name)
        if dtype.itemsize == array.dtype.itemsize:
            bits = array.view({1: np.uint8, 2: np.int16}[array.dtype.itemsize])
            return _host_tensor(torch, bits).view(dtype)
    except (TypeError, AttributeError, RuntimeError):
        pass
    raise UsageError(
        "torch does not have this type",
        found=f"dtype {array.dtype}",
        hint='varstore.load, or load_state with framework="numpy", gives numpy arrays',
    )


def framework_named(name: str) -> Any:
    """Import a framework.

    Raises:
        MissingDependency: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingDependency(
            f"the state holds arrays or other values of {name}, which is not installed",
            hint=f'install it: pip install {name}, or load the state with framework="numpy"',
        ) from error
