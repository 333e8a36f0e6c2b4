"""OneFlow's files: the ``pickled_data`` directory, the single file of 1.0, and folders of variables.

The pickle holds the nested object; its tensors name a folder each (``{"path": "tensor_7"}``) or carry their
values. Only folders that the pickle names are live: others are leftovers of an earlier save. A path that
leads out of the directory, by its name or by a link, is refused. Folders of variables, such as those of a
saved nn.Graph, have no pickle: each folder with an ``out`` is a variable of its name.
"""

from __future__ import annotations

import os
from typing import Any

import ml_dtypes
import numpy as np

from varstore.errors import CheckpointNotFound, FormatError, SizeMismatch, UnsafeContent
from varstore.formats.binary.source import Source, lazy_array
from varstore.formats.opened import ForeignCheckpoint
from varstore.formats.pickles.arrays import PLAIN, Array
from varstore.formats.pickles.emit import Emitter, Named
from varstore.formats.pickles.machine import Machine, Opaque, Record
from varstore.formats.pickles.names import Constructor, show
from varstore.formats.pickles.tree import module_state, plain_tree
from varstore.formats.state.flat import fetch_plain
from varstore.formats.state.nested import nested_state
from varstore.layout.dtypes import BFLOAT16, BY_NAME, BY_NUMBER, data_type_of, dtype_of
from varstore.layout.meta import META_LIMIT, Meta, encode_meta, parse_meta
from varstore.storage.appearing import new_folder
from varstore.storage.containment import inside
from varstore.values.lazy import LazyArray, derived

__all__ = ["read", "write"]

PICKLE = "pickled_data"
_WRITTEN = frozenset(
    BY_NAME[name].dtype
    for name in ("kFloat", "kDouble", "kInt8", "kInt32", "kInt64", "kUInt8", "kFloat16", "kBool", "kBFloat16")
)


def read(path: str | os.PathLike[str]) -> ForeignCheckpoint:
    """Read what `flow.save` wrote: a file, a directory with ``pickled_data``, or a folder of variables.

    Raises:
        UnsafeContent: the pickle asks for code, or a path leads out of the directory.
        FormatError: a file is torn, or a variable is not whole.
    """
    root = os.fspath(path)
    if not os.path.isdir(root):
        return _read_pickle(Source(root), None)
    if os.path.lexists(os.path.join(root, PICKLE)):
        return _read_pickle(Source(inside(root, PICKLE)), root)
    return _read_folders(root)


def write(path: str | os.PathLike[str], state: Any) -> None:
    """Write a mapping or nested state as the directory that `flow.load` reads: ``pickled_data`` and tensors.

    bfloat16 is written as OneFlow does, as float32 values under its name; OneFlow 0.9 cannot load that type.

    Raises:
        CheckpointExists: the path is taken.
        UsageError: a value that is neither tensor, scalar nor container of them.
        UnsupportedDtype: a tensor of a type that OneFlow does not load.
        StorageError: the operating system refused.
    """
    tree = nested_state(state, format="oneflow", accept=lambda dtype: dtype.newbyteorder("<") in _WRITTEN)
    with new_folder(os.fspath(path)) as folder:
        count = 0

        def tensor(emitter: Emitter, array: LazyArray) -> None:
            nonlocal count
            name = f"tensor_{count}"
            count += 1
            _write_tensor(os.path.join(folder, name), array)
            emitter.instance(Named("oneflow", "Tensor"), {"path": name})

        with open(os.path.join(folder, PICKLE), "xb") as file:
            Emitter(file, 4, tensor).pickle({"protocol_version": 1, "data": tree})
            file.flush()
            os.fsync(file.fileno())


def _write_tensor(folder: str, array: LazyArray) -> None:
    row = data_type_of(array.dtype)
    values = fetch_plain(os.path.basename(folder), array)
    if row is BFLOAT16:
        values = values.astype(np.float32)
    os.mkdir(folder)
    meta = encode_meta(Meta(shape=tuple(array.shape), data_type=row))
    for name, data in (("meta", memoryview(meta)), ("out", values.reshape(-1).view(np.uint8).data)):
        with open(os.path.join(folder, name), "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())


class _Tensor(Opaque):
    """A tensor; its state says where its values are."""

    __slots__ = ()


class _Dtype(Record):
    """OneFlow's data type, by its number."""

    __slots__ = ("number",)

    def __init__(self) -> None:
        self.number = 0

    def build(self, machine: Machine, state: Any) -> None:
        if type(state) is not int:
            machine.fail("a data type is a number", found=show(state))
        self.number = state


def _read_pickle(source: Source, root: str | None) -> ForeignCheckpoint:
    machine = Machine(source.map(), path=source.path, table=_TABLE, opaque=True)
    value = machine.run()
    if not isinstance(value, dict) or value.get("protocol_version") != 1 or "data" not in value:
        raise FormatError(
            "this is no pickle of OneFlow", path=source.path, found=show(value), expected="protocol_version 1 and data"
        )

    def leaf(record: Any) -> Any:
        if isinstance(record, _Tensor):
            return _values(record, source, root)
        if isinstance(record, Array):
            return record.lazy(source.read)
        if isinstance(record, _Dtype):
            row = BY_NUMBER.get(record.number)
            return f"oneflow.{record.number if row is None or row.dtype is None else row.dtype.name}"
        if isinstance(record, Opaque) and (state := module_state(record, machine)) is not None:
            return state
        return NotImplemented

    return ForeignCheckpoint(source.path if root is None else root, "oneflow", plain_tree(value["data"], machine, leaf))


def _values(tensor: _Tensor, source: Source, root: str | None) -> LazyArray:
    state = tensor.state
    if isinstance(state, dict) and type(state.get("path")) is str and root is not None:
        return _folder(root, state["path"])
    array = state.get("data") if isinstance(state, dict) else None
    if not isinstance(array, Array):
        raise FormatError("this tensor has no values", path=source.path, found=show(state))
    plain = array.lazy(source.read)
    dtype = state.get("dtype")
    if isinstance(dtype, _Dtype) and dtype.number == BFLOAT16.number and plain.dtype == np.float32:
        return _rounded(plain)
    return plain


def _rounded(values: LazyArray) -> LazyArray:
    """Return bfloat16 values that were kept as float32, exactly."""
    kind = np.dtype(ml_dtypes.bfloat16)
    return derived(values, lambda part: part.astype(kind), kind)


def _read_folders(root: str) -> ForeignCheckpoint:
    names = sorted(entry.name for entry in os.scandir(root) if os.path.isfile(os.path.join(entry.path, "out")))
    if not names:
        raise CheckpointNotFound(
            "there is no variable in this directory", path=root, expected=f"{PICKLE}, or folders that hold 'out'"
        )
    return ForeignCheckpoint(root, "oneflow", {name: _folder(root, name) for name in names})


def _folder(root: str, name: str) -> LazyArray:
    if not name or name in (".", "..") or "/" in name or "\\" in name or "\0" in name:
        raise UnsafeContent(
            "a tensor's path leads out of the directory", path=root, found=repr(name[:100]), expected="a folder's name"
        )
    for part in ("meta", "out"):
        if not os.path.isfile(os.path.join(root, name, part)):
            raise FormatError(
                f"the variable has no {part}",
                path=root,
                variable=name,
                hint="without both, neither its shape and type nor its values are known",
            )
    meta = _meta(Source(inside(root, name, "meta")))
    source = Source(inside(root, name, "out"))
    dtype = dtype_of(meta.data_type, path=source.path, variable=name)
    size = meta.elements * dtype.itemsize
    if meta.data_type is BFLOAT16 and source.size == 2 * size:
        return _rounded(lazy_array(source.read, 0, meta.shape, np.dtype(np.float32)))
    if source.size != size:
        raise SizeMismatch(
            "the values are not as many as the shape says",
            path=source.path,
            variable=name,
            found=f"{source.size} bytes",
            expected=f"{size} bytes",
        )
    return lazy_array(source.read, 0, meta.shape, dtype)


def _meta(source: Source) -> Meta:
    if source.size > META_LIMIT:
        raise FormatError("this is no meta file", path=source.path, found=f"{source.size} bytes")
    return parse_meta(source.bytes(0, source.size), path=source.path)


def _tensor(machine: Machine) -> _Tensor:
    return _Tensor(None, machine.stop)


def _dtype(_machine: Machine) -> _Dtype:
    return _Dtype()


_TABLE = {
    **PLAIN,
    **{
        key: Constructor(new=_tensor)
        for key in (
            ("oneflow", "Tensor"),
            ("oneflow._oneflow_internal", "Tensor"),
            ("oneflow.nn", "Parameter"),
            ("oneflow.nn.parameter", "Parameter"),
        )
    },
    ("oneflow._oneflow_internal", "dtype"): Constructor(new=_dtype),
}
