"""MegEngine's files: pickles of numpy arrays, of its tensors, or of whole modules.

Ordinary state dicts hold plain numpy arrays; tensors and modules name MegEngine's classes, which stay inert
here. Quantised values are integers whose type carries the scale: it becomes the array's attribute
``mgb_dtype``. Dumped graphs, which share the suffix, are programs and are refused.
"""

from __future__ import annotations

import math
import os
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np

from varstore.errors import FormatError
from varstore.formats.binary.magic import is_megengine_graph
from varstore.formats.binary.source import Source
from varstore.formats.opened import ForeignCheckpoint
from varstore.formats.pickles.arrays import PLAIN, Array
from varstore.formats.pickles.emit import Emitter, Named
from varstore.formats.pickles.machine import Machine, Opaque
from varstore.formats.pickles.names import Constructor
from varstore.formats.pickles.tree import DEEPEST, plain_tree
from varstore.formats.state.nested import nested_state
from varstore.storage.appearing import replacing
from varstore.values.lazy import LazyArray, derived

__all__ = ["read", "write"]

_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_BRAIN = Named("megengine.core._imperative_rt", "pybfloat16")
_BRAIN_FLAGS = 112


def read(path: str | os.PathLike[str]) -> ForeignCheckpoint:
    """Read a file of `megengine.save`; whole modules become their state dict.

    Raises:
        UnsafeContent: the file asks for code.
        FormatError: it is torn, or a dumped graph.
    """
    source = Source(path)
    if is_megengine_graph(source.bytes(0, min(12, source.size))):
        raise FormatError(
            "this is a dumped MegEngine graph, which is a program and not read",
            path=source.path,
            hint="save the module's state_dict() with megengine.save",
        )
    data = source.map()
    machine = Machine(data, path=source.path, table=_TABLE, opaque=True)
    value = machine.run()

    def leaf(record: Any) -> Any:
        if isinstance(record, _Tensor):
            return record.array if isinstance(record.array, Array) else NotImplemented
        if isinstance(record, Array):
            return _lazy(record, source)
        if _is_module(record):
            return OrderedDict(_variables(record, "", machine, 0))
        return NotImplemented

    attributes = {} if machine.stop == len(data) else {"bytes_behind": len(data) - machine.stop}
    return ForeignCheckpoint(source.path, "megengine", plain_tree(value, machine, leaf), attributes)


def write(path: str | os.PathLike[str], state: Any) -> None:
    """Write a mapping or nested state as numpy arrays, as `Module.state_dict` gives them to `megengine.save`.

    Raises:
        UsageError: a value that is neither tensor, scalar nor container of them.
        UnsupportedDtype: a tensor of a type that numpy 1 and MegEngine lack.
        StorageError: the operating system refused.
    """
    tree = nested_state(state, format="megengine", accept=lambda dtype: dtype.kind in "biufc" or dtype == _BFLOAT16)

    def array(emitter: Emitter, array: LazyArray) -> None:
        is_brain = array.dtype == _BFLOAT16
        emitter.numpy(array, _BFLOAT16 if is_brain else array.dtype, (_BRAIN, _BRAIN_FLAGS) if is_brain else None)

    with replacing(os.fspath(path)) as file:
        Emitter(file, 4, array).pickle(tree)


class _Tensor(Opaque):
    """A tensor: its array is an argument today, and was part of the state before version 1."""

    __slots__ = ("array",)

    def __init__(self, array: Any, offset: int) -> None:
        super().__init__(None, offset)
        self.array = array

    def build(self, _machine: Machine, state: Any) -> None:
        self.state = state
        if self.array is None and isinstance(state, dict):
            self.array = state.get("data")


def _tensor(machine: Machine, array: Any = None, *_: Any) -> _Tensor:
    return _Tensor(array, machine.stop)


def _lazy(array: Array, source: Source) -> LazyArray:
    plain = array.lazy(source.read)
    about = array.dtype.metadata
    quantised = about.get("mgb_dtype") if isinstance(about, dict) else None
    if not isinstance(quantised, dict):
        return plain
    numbers = {key: value for key, value in quantised.items() if isinstance(value, (str, int, float, type(None)))}
    return derived(plain, attributes={"mgb_dtype": numbers})


def _is_module(value: Any) -> bool:
    return isinstance(value, Opaque) and isinstance(value.state, dict) and isinstance(value.state.get("_modules"), list)


def _variables(module: Opaque, prefix: str, machine: Machine, depth: int) -> Iterator[tuple[str, Any]]:
    """Yield what `Module.state_dict` holds: the tensors among the attributes, in the order of their names."""
    is_norm = (
        module.type and (module.type.module, module.type.name) in _NORMS
    ) or "track_running_stats" in module.state
    for name, value in _expand(module.state, prefix, machine, depth):
        is_own = isinstance(value, _Tensor) and "." not in name[len(prefix) :]
        yield name, _flat(value) if is_norm and is_own else value


def _expand(value: Any, name: str, machine: Machine, depth: int) -> Iterator[tuple[str, Any]]:
    """Yield the tensors in a value; `name` ends with a dot unless it is a tensor's."""
    machine.charge(1 + len(name))
    if depth > DEEPEST:
        machine.fail(f"modules are nested deeper than {DEEPEST}")
    if isinstance(value, _Tensor):
        yield name.removesuffix("."), value
    elif _is_module(value):
        yield from _variables(value, name, machine, depth + 1)
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _expand(item, f"{name}{index}.", machine, depth + 1)
    elif isinstance(value, dict):
        for key in sorted(key for key in value if isinstance(key, str)):
            yield from _expand(value[key], f"{name}{key}.", machine, depth + 1)


def _flat(tensor: _Tensor) -> _Tensor:
    """Return a tensor of a normalisation, kept in four dimensions, in the one that its state dict gives it."""
    if not isinstance(tensor.array, Array):
        return tensor
    array = Array()
    array.shape = (math.prod(tensor.array.shape),)
    array.dtype, array.data, array.path = tensor.array.dtype, tensor.array.data, tensor.array.path
    return _Tensor(array, tensor.offset)


_NORMS = frozenset(
    {
        *(("megengine.module.batchnorm", name) for name in ("BatchNorm1d", "BatchNorm2d", "SyncBatchNorm")),
        *(("megengine.module.normalization", name) for name in ("GroupNorm", "InstanceNorm", "LayerNorm")),
    }
)
"""The classes whose variables `Module.state_dict` makes flat."""


def _first(_machine: Machine, value: Any, *_: Any) -> Any:
    """Give what says which one it is of an enumeration or of the quantised types."""
    return value


_TABLE = {
    **PLAIN,
    ("megengine.core.tensor.dtype", "QuantDtypeMeta"): Constructor(new=_first),
    ("megengine.quantization.utils", "QuantMode"): Constructor(call=_first),
    **{
        (module, name): Constructor(new=_tensor)
        for module in ("megengine.tensor", "megengine.core.tensor", "megengine.tensor_nn")
        for name in ("Tensor", "Parameter", "Buffer")
    },
    (_BRAIN.module, _BRAIN.name): _BFLOAT16,
}
