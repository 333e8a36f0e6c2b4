"""The allow-list of names in PyTorch's pickles, and what each of them becomes.

Source: https://github.com/pytorch/pytorch/blob/v2.13.0/torch/_utils.py and torch/storage.py
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from varstore.errors import UnsafeContent, UnsupportedDtype
from varstore.formats.binary.budget import ARRAY
from varstore.formats.pickles.arrays import PLAIN, Array
from varstore.formats.pickles.machine import ITEM, NODE, Instance, Machine
from varstore.formats.pickles.names import Constructor, Global, Table, internal, show
from varstore.formats.pickles.tree import module_state
from varstore.formats.torch.tensors import DTYPES, STORAGES, Storage, StorageClass, Storages, whole_storage
from varstore.training.tensors import NDARRAY, PARAMETER, TENSOR
from varstore.values.lazy import LazyArray, derived, retyped
from varstore.values.parts import Read

__all__ = ["Load", "storage_identity", "torch_leaf", "torch_table"]

Load = Callable[[Machine, Any], Storage]
"""Returns the storage that the bytes of another file hold."""

_OTHER_NAMES = {
    "half": "float16",
    "float": "float32",
    "double": "float64",
    "short": "int16",
    "int": "int32",
    "long": "int64",
    "cfloat": "complex64",
    "cdouble": "complex128",
    "chalf": "complex32",
}


def storage_identity(identity: Any, size: int, path: str) -> Any:
    """Return the parts of a persistent id, which must be that of a storage.

    Raises:
        UnsafeContent: it is something else.
    """
    if type(identity) is not tuple or len(identity) != size or internal(identity[0]) != "storage":
        raise UnsafeContent("a persistent id is not that of a storage", path=path, found=show(identity, most=6))
    return tuple(map(internal, identity))


def torch_leaf(machine: Machine, read: Read) -> Callable[[Any], Any]:
    """Return the function that converts records of a torch pickle to arrays and state dicts, for `plain_tree`."""

    def leaf(value: Any) -> Any:
        if type(value) is Storage:
            return whole_storage(value)
        if type(value) is Array:
            return retyped(value.lazy(read), NDARRAY)
        if type(value) is Instance and (state := module_state(value, machine)) is not None:
            return state
        return NotImplemented

    return leaf


def torch_table(storages: Storages, load: Load | None = None) -> Table:
    """Return the allow-list for a PyTorch pickle whose tensors are views of these storages.

    `load` is what stands for ``_load_from_bytes``; without it, that is a name like others.
    """

    def tensor(_m: Machine, storage: Any, offset: Any, shape: Any, stride: Any, *rest: Any) -> LazyArray:
        found = storages.view(storage, offset, shape, stride, None, rest[2] if len(rest) > 2 else None)
        return storages.typed(found, TENSOR, True) if rest and rest[0] is True else found

    def typed(_m: Machine, storage: Any, offset: Any, shape: Any, stride: Any, *rest: Any) -> LazyArray:
        found = storages.view(storage, offset, shape, stride, _dtype_of(_m, rest[2]), rest[3] if rest[3:] else None)
        return storages.typed(found, TENSOR, True) if rest[0] is True else found

    def parameter(_m: Machine, data: Any, requires_grad: Any = False, *_: Any) -> Any:
        return storages.typed(data, PARAMETER, requires_grad) if type(data) is LazyArray and data.type else data

    def quantised(_m: Machine, storage: Any, offset: Any, shape: Any, stride: Any, scheme: Any, *_: Any) -> LazyArray:
        values = storages.view(storage, offset, shape, stride, None)
        names = {3: ("qscheme", "scale", "zero_point"), 4: ("qscheme", "scales", "zero_points", "axis")}[len(scheme)]
        if any(type(part) not in (int, float, LazyArray) for part in scheme[1:]):
            _m.fail("a quantisation scheme does not consist of numbers", found=show(scheme, most=4))
        attributes = dict(zip(names, (show(scheme[0]), *scheme[1:]), strict=True))
        _m.charge(ARRAY)
        return derived(values, attributes=attributes)

    utils: dict[str, Callable[..., Any]] = {
        "_rebuild_tensor": tensor,
        "_rebuild_tensor_v2": tensor,
        "_rebuild_tensor_v3": typed,
        "_rebuild_qtensor": quantised,
        "_rebuild_sparse_tensor": _sparse,
        "_rebuild_parameter": parameter,
        "_rebuild_parameter_with_state": parameter,
    }
    table = _TABLE | {("torch._utils", name): Constructor(call=call) for name, call in utils.items()}
    return table if load is None else table | {("torch.storage", "_load_from_bytes"): Constructor(call=load)}


def _dtype_of(machine: Machine, value: Any) -> np.dtype[Any]:
    if type(value) is Global and isinstance(value.entry, np.dtype):
        return value.entry
    raise UnsupportedDtype(
        "numpy does not have this type",
        path=machine.path,
        found=show(value),
        hint="convert the tensor before saving it",
    )


def _subclass(machine: Machine, function: Any, kind: Any, arguments: Any, state: Any = None) -> Any:
    if isinstance(kind, Global):
        kind.claim()  # only the values are kept, not the class
    if type(function) is not Global or (function.module, function.name) != ("torch._utils", _WRAPPER):
        return machine.call(function, arguments)
    if type(arguments) is tuple and arguments and isinstance(arguments[0], Global):
        arguments[0].claim()
    parts = _attributes(machine, state)
    if any(type(part) in (LazyArray, dict) for part in parts.values()):
        return {"class": str(kind), **parts}
    return machine.call(function, arguments)


def _attributes(machine: Machine, state: Any) -> dict[Any, Any]:
    """Return the attributes in the state of an object, which is a dict, or a pair with one for the slots.

    Another state is that of a class with a `__setstate__` of its own, and does not have attributes.
    """
    both = state if type(state) is tuple else (state, None)
    if len(both) != 2 or any(part is not None and type(part) is not dict for part in both):
        return {}
    machine.charge(NODE + 20 * ITEM * sum(len(part or ()) for part in both))
    machine.check_keys([key for part in both for key in part or ()])
    return {key: value for part in both for key, value in (part or {}).items()}


def _wrapper(machine: Machine, kind: Any, *arguments: Any) -> Any:
    """Return what stands for a tensor that has no values of its own, but attributes that are tensors."""
    if type(kind) is not Global:
        machine.refuse(f"would create a tensor of class {show(kind)}")
    machine.charge(NODE)
    kind.made += 1
    return Instance(kind, machine.at, arguments)


def _graph_module(machine: Machine, body: Any, *_: Any) -> Instance:
    """Return a traced module, which is pickled as a dict of its attributes and the code made of its graph."""
    machine.charge(NODE)
    made = Instance(Global("torch.fx.graph_module", "GraphModule", None, machine.at), machine.at)
    made.state = body
    return made


def _first(_m: Machine, value: Any, _type: Any = None) -> Any:
    """Return a list or other value of TorchScript, which is pickled with its type."""
    return value


_SCRIPT = ("build_boollist", "build_doublelist", "build_intlist", "build_tensorlist", "restore_type_tag")
_WRAPPER = "_rebuild_wrapper_subclass"
_SPARSE = {
    "torch.sparse_coo": ("indices", "values", "size", "is_coalesced"),
    "torch.sparse_csr": ("crow_indices", "col_indices", "values", "size"),
    "torch.sparse_csc": ("ccol_indices", "row_indices", "values", "size"),
    "torch.sparse_bsr": ("crow_indices", "col_indices", "values", "size"),
    "torch.sparse_bsc": ("ccol_indices", "row_indices", "values", "size"),
}


def _sparse(machine: Machine, layout: Any, data: Any) -> dict[str, Any]:
    names = _SPARSE.get(layout) if isinstance(layout, str) else None
    if names is None or type(data) is not tuple or len(data) > len(names):
        machine.fail("a sparse tensor has an unknown layout", found=show(layout))
    machine.charge(NODE + 10 * ITEM * len(names))
    return {"layout": layout, **dict(zip(names, data, strict=False))}


def _size(machine: Machine, extents: Any = ()) -> tuple[Any, ...]:
    machine.charge(NODE + ITEM * len(extents))
    return tuple(extents)


def _device(_m: Machine, kind: Any, index: Any = None) -> str:
    kind = internal(kind)
    return show(kind).strip("'") if index is None else f"{show(kind)}:{show(index)}".replace("'", "")


def _layout(machine: Machine, name: Any) -> str:
    name = internal(name)
    if type(name) is not str:
        machine.fail("a layout does not have a name", found=show(name))
    return name


_TABLE: dict[tuple[str, str], Any] = {
    **PLAIN,
    **{("torch", name): dtype for name, dtype in DTYPES.items()},
    **{("torch", name): DTYPES[other] for name, other in _OTHER_NAMES.items()},
    **{
        (module, name): StorageClass(DTYPES[dtype] if dtype else None)
        for name, dtype in STORAGES.items()
        for module in ("torch", "torch.storage", "torch.cuda")
    },
    **{
        ("torch", name): f"torch.{name}"
        for name in (
            *(
                "strided",
                "sparse_coo",
                "sparse_csr",
                "sparse_csc",
                "sparse_bsr",
                "sparse_bsc",
                "qint8",
                "quint8",
                "qint32",
            ),
            *("per_tensor_affine", "per_channel_affine", "per_tensor_symmetric", "per_channel_symmetric", "Tensor"),
        )
    },
    ("torch.nn.parameter", "Parameter"): "torch.nn.parameter.Parameter",
    ("torch.nn.parameter", "Buffer"): "torch.nn.parameter.Buffer",
    ("torch", "Size"): Constructor(call=_size),
    ("torch", "device"): Constructor(call=_device),
    ("torch.serialization", "_get_layout"): Constructor(call=_layout),
    ("torch._tensor", "_rebuild_from_type_v2"): Constructor(call=_subclass),
    **{("torch.jit._pickle", name): Constructor(call=_first) for name in _SCRIPT},
    ("torch.fx.graph_module", "reduce_graph_module"): Constructor(call=_graph_module),
    ("torch._utils", _WRAPPER): Constructor(call=_wrapper),
}
