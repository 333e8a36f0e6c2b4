"""MegEngine's files: pickles of numpy arrays, of tensors, or of whole modules.

Ordinary state dicts contain plain numpy arrays. Tensors and modules refer to MegEngine's classes, which stay inert
here. Quantised values are integers whose type carries the scale, which becomes the attribute ``mgb_dtype`` of the
array. Dumped graphs have the same suffix: see `varstore.formats.megengine.program`.

Source: https://github.com/MegEngine/MegEngine/blob/v1.13.0/imperative/python/megengine/serialization.py
"""

from __future__ import annotations

import math
import os
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np

from varstore.formats.binary.budget import ARRAY, Budget
from varstore.formats.binary.magic import is_megengine_graph
from varstore.formats.binary.source import Source
from varstore.formats.megengine.program import read_program, write_program
from varstore.formats.opened import ForeignCheckpoint
from varstore.formats.pickles.arrays import PLAIN, Array
from varstore.formats.pickles.emit import Emitter, Named
from varstore.formats.pickles.machine import Instance, Machine, Unknown
from varstore.formats.pickles.names import Constructor
from varstore.formats.pickles.tree import DEEPEST, plain_tree
from varstore.formats.state.nested import nested_state
from varstore.storage.appearing import replacing
from varstore.values.lazy import LazyArray, derived, retyped

__all__ = ["read", "write"]

_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_BRAIN = Named("megengine.core._imperative_rt", "pybfloat16")
_BRAIN_FLAGS = 112
_NAME = 200
_CLASSES = {f"megengine.{name}": Named("megengine.tensor", name) for name in ("Tensor", "Parameter")}
_DEVICE = "xpux:0"  # whichever there is, as MegEngine writes it


def read(path: str | os.PathLike[str], *, limit: int | None = None, unknown: Unknown = "opaque") -> ForeignCheckpoint:
    """Open a file that `megengine.save` wrote, or a dumped graph: see `read_program`.

    A whole module, also a traced one, is read as its state dict. `unknown` says what becomes of names that varstore
    does not know: see `varstore.read`.

    Raises:
        UnsafeContent: the file asks to run code, or is out of proportion to its size.
        FormatError: it is truncated or damaged, or not a file of MegEngine.
        CheckpointNotFound: there is nothing at the path.
    """
    source = Source(path)
    budget = Budget(source.path, source.size, limit=limit)
    if is_megengine_graph(source.bytes(0, min(12, source.size))):
        return read_program(source, budget)
    data = source.map()
    machine = Machine(data, path=source.path, table=_TABLE, budget=budget, modules=True, unknown=unknown)
    value = machine.run()

    def leaf(record: Any) -> Any:
        if isinstance(record, _Tensor):
            array = record.array
            return retyped(_lazy(array, source), record.type_name) if isinstance(array, Array) else NotImplemented
        if isinstance(record, Array):
            return _lazy(record, source)
        if _module_of(record):
            tensors = _variables(record, "", machine, 0)
            return OrderedDict((name, t.array if isinstance(t.array, Array) else t) for name, t in tensors)
        return NotImplemented

    attributes = {} if machine.stop == len(data) else {"bytes_behind": len(data) - machine.stop}
    tree = plain_tree(value, machine, leaf)
    return ForeignCheckpoint(source.path, "megengine", tree, attributes, budget=budget, unknown=machine.unknown())


def _accept(dtype: np.dtype[Any]) -> bool:
    """Tell whether a pickle can name the type: `ml_dtypes` has one of kind "f" that numpy does not know."""
    return (dtype.kind in "biufc" and dtype.type.__module__ == "numpy") or dtype == _BFLOAT16


def write(path: str | os.PathLike[str], state: Any, *, model: str | os.PathLike[str] | None = None) -> None:
    """Write a mapping or nested state as a pickle of numpy arrays, like `megengine.save` of a state dict.

    What was a Tensor in a file of MegEngine, such as a loss, is written as one. With `model`, a dumped graph, the file
    is a copy of it with other values: see `write_program`.

    Raises:
        UsageError: a value is not a tensor, a scalar or a container of them.
        UnsupportedDtype: neither numpy 1 nor MegEngine has the type of a tensor.
        StorageError: the operating system refused.
    """
    if model is not None:
        write_program(os.fspath(path), state, os.fspath(model))
        return
    tree = nested_state(state, format="megengine", accept=_accept)

    def array(emitter: Emitter, array: LazyArray) -> None:
        dtype = array.dtype.newbyteorder("=")
        own = (_BRAIN, _BRAIN_FLAGS) if dtype == _BFLOAT16 else None
        kind = _CLASSES.get(array.type)
        if kind is None:
            emitter.numpy(array, dtype, own)
            return
        arguments = (
            lambda: emitter.numpy(array, dtype, own),
            lambda: emitter.dtype(dtype, own),
            lambda: emitter.value(_DEVICE),
        )
        emitter.object(kind, arguments, {})

    with replacing(os.fspath(path)) as file:
        Emitter(file, 4, array).pickle(tree)


class _Tensor(Instance):
    """A tensor; its array is an argument of the class since version 1, and was part of the state before."""

    __slots__ = ("array", "type_name")

    def __init__(self, array: Any, offset: int, type_name: str = "megengine.Tensor") -> None:
        super().__init__(None, offset)
        self.array = array
        self.type_name = type_name

    def build(self, _machine: Machine, state: Any) -> None:
        self.state = state
        if self.array is None and isinstance(state, dict):
            self.array = state.get("data")


def _tensor(machine: Machine, array: Any = None, *_: Any) -> _Tensor:
    return _Tensor(array, machine.stop)


def _parameter(machine: Machine, array: Any = None, *_: Any) -> _Tensor:
    return _Tensor(array, machine.stop, "megengine.Parameter")


def _lazy(array: Array, source: Source) -> LazyArray:
    plain = array.lazy(source.read)
    about = array.dtype.metadata
    quantised = about.get("mgb_dtype") if isinstance(about, dict) else None
    if not isinstance(quantised, dict):
        return plain
    numbers = {key: value for key, value in quantised.items() if isinstance(value, (str, int, float, type(None)))}
    return derived(plain, attributes={"mgb_dtype": numbers})


def _module_of(value: Any) -> tuple[Any, dict[Any, Any]] | None:
    """Return the class of a module and its state, None for what is not a module.

    A TracedModule holds the modules of MegEngine's own classes as a `_ModuleState`, which names the class.
    """
    if not isinstance(value, Instance) or not isinstance(value.state, dict):
        return None
    kind: Any = (value.type.module, value.type.name) if value.type else None
    state: Any = value.state
    if kind == _WITHIN_A_TRACED_MODULE:
        kind, state = state.get("module"), state.get("state")
        kind = kind if type(kind) is tuple and all(type(part) is str for part in kind) else None
    is_one = isinstance(state, dict) and isinstance(state.get("_modules"), list)
    return (kind, state) if is_one else None


def _variables(module: Instance, prefix: str, machine: Machine, depth: int) -> Iterator[tuple[str, Any]]:
    """Yield the items of `Module.state_dict`: the tensors among the attributes, in the order of their names."""
    found = _module_of(module)
    assert found is not None
    kind, state = found
    is_norm = kind in _NORMS or "track_running_stats" in state
    for name, value in _expand(state, prefix, machine, depth):
        is_own = isinstance(value, _Tensor) and "." not in name[len(prefix) :]
        yield name, _flat(value, machine) if is_norm and is_own else value


def _expand(value: Any, name: str, machine: Machine, depth: int) -> Iterator[tuple[str, Any]]:
    """Yield the tensors in a value; `name` ends with a dot unless it is the name of a tensor."""
    machine.charge(_NAME + 4 * len(name))
    if depth > DEEPEST:
        machine.fail(f"modules are nested deeper than {DEEPEST}")
    if isinstance(value, _Tensor):
        yield name.removesuffix("."), value
    elif _module_of(value):
        yield from _variables(value, name, machine, depth + 1)
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _expand(item, f"{name}{index}.", machine, depth + 1)
    elif isinstance(value, dict):
        for key in sorted(key for key in value if isinstance(key, str)):
            yield from _expand(value[key], f"{name}{key}.", machine, depth + 1)


def _flat(tensor: _Tensor, machine: Machine) -> _Tensor:
    """Return a tensor of a normalisation layer, which has four dimensions, in one dimension like its state dict."""
    if not isinstance(tensor.array, Array) or tensor.array.foreign is not None:
        return tensor
    machine.charge(ARRAY)
    array = Array()
    array.shape = (math.prod(tensor.array.shape),)
    array.dtype, array.data, array.path = tensor.array.dtype, tensor.array.data, tensor.array.path
    return _Tensor(array, tensor.offset)


_WITHIN_A_TRACED_MODULE = ("megengine.traced_module.serialization", "_ModuleState")
_NORMS = frozenset(
    {
        *(("megengine.module.batchnorm", name) for name in ("BatchNorm1d", "BatchNorm2d", "SyncBatchNorm")),
        *(("megengine.module.normalization", name) for name in ("GroupNorm", "InstanceNorm", "LayerNorm")),
    }
)
"""The classes whose tensors are one-dimensional in `Module.state_dict`."""


def _first(_machine: Machine, value: Any, *_: Any) -> Any:
    """Return the value that identifies a member of an enumeration or a quantised type."""
    return value


_TABLE = {
    **PLAIN,
    ("megengine.core.tensor.dtype", "QuantDtypeMeta"): Constructor(new=_first),
    ("megengine.quantization.utils", "QuantMode"): Constructor(call=_first),
    **{
        (module, name): Constructor(new=_parameter if name == "Parameter" else _tensor)
        for module in ("megengine.tensor", "megengine.core.tensor", "megengine.tensor_nn")
        for name in ("Tensor", "Parameter", "Buffer")
    },
    (_BRAIN.module, _BRAIN.name): _BFLOAT16,
}
