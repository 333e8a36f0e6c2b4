"""OneFlow's files: directories with ``pickled_data``, single files (since 1.0), and folders of variables.

The pickle contains the nested object. Each tensor in it either refers to a folder (``{"path": "tensor_7"}``) or
contains its values. Only folders that the pickle refers to are read, because others may be left over from an earlier
save. A path that leads out of the directory, by its name or by a link, is refused. Folders of variables, such as those
of a saved nn.Graph, do not have a pickle: each folder that contains ``out`` is a variable, named like the folder.

Source: https://github.com/Oneflow-Inc/oneflow/blob/v1.0.0/python/oneflow/framework/check_point_v2.py
"""

from __future__ import annotations

import os
import stat
from typing import Any

import ml_dtypes
import numpy as np

from varstore.errors import CheckpointNotFound, FormatError, UnsafeContent
from varstore.formats.binary.budget import ARRAY, Budget
from varstore.formats.binary.folder import WalkedFolder
from varstore.formats.binary.source import Source
from varstore.formats.opened import ForeignCheckpoint
from varstore.formats.pickles.arrays import PLAIN, Array
from varstore.formats.pickles.emit import Emitter, Named
from varstore.formats.pickles.machine import NODE, Instance, Machine, Record, Unknown
from varstore.formats.pickles.names import Constructor, show
from varstore.formats.pickles.tree import module_state, plain_tree
from varstore.formats.state.flat import fetch_plain
from varstore.formats.state.nested import nested_state
from varstore.layout.dtypes import BFLOAT16, BY_NAME, BY_NUMBER, data_type_of
from varstore.layout.manifest import Entry
from varstore.layout.meta import META_LIMIT, Meta, encode_meta, parse_meta
from varstore.layout.names import Folder
from varstore.layout.readable import readable
from varstore.storage.appearing import new_folder
from varstore.storage.containment import inside
from varstore.storage.looking import kind_of
from varstore.values.lazy import LazyArray, derived, placed_array
from varstore.values.parts import in_c_order

__all__ = ["read", "write", "write_tensor"]

PICKLE = "pickled_data"
_WRITTEN = frozenset(
    BY_NAME[name].dtype
    for name in ("kFloat", "kDouble", "kInt8", "kInt32", "kInt64", "kUInt8", "kFloat16", "kBool", "kBFloat16")
)


def read(path: str | os.PathLike[str], *, limit: int | None = None, unknown: Unknown = "opaque") -> ForeignCheckpoint:
    """Open what `flow.save` wrote: a file, a directory with ``pickled_data``, or a folder of variables.

    `unknown` says what becomes of names that varstore does not know: see `varstore.read`.

    Raises:
        UnsafeContent: the pickle asks to run code, a path leads out of the directory, or the file is out of
            proportion to its size.
        FormatError: a file is truncated or damaged, or a variable is incomplete.
        SizeMismatch: the values of a variable do not match its shape.
        CheckpointNotFound: there is nothing at the path, or a folder without variables.
    """
    root = os.fspath(path)
    if kind_of(root) != stat.S_IFDIR:
        source = Source(root)
        return _read_pickle(source, None, Budget(root, source.size, limit=limit), unknown)
    folder = WalkedFolder.walked(root)
    budget = Budget(root, folder.size, files=len(folder.files), limit=limit)
    if PICKLE in folder.files:
        return _read_pickle(folder.source(PICKLE), root, budget, unknown)
    return _read_folders(root, budget)


def write(path: str | os.PathLike[str], state: Any, *, overwrite: bool = False) -> None:
    """Write a mapping or nested state as a directory that `flow.load` reads: ``pickled_data`` and tensors.

    bfloat16 is written as OneFlow writes it, with float32 values; OneFlow 0.9 cannot load that type. With `overwrite`,
    a directory with ``pickled_data`` is replaced whole, in one step.

    Raises:
        CheckpointExists: the path exists.
        UsageError: a value is not a tensor, a scalar or a container of them.
        UnsupportedDtype: OneFlow cannot load the type of a tensor.
        StorageError: the operating system refused.
    """
    tree = nested_state(state, format="oneflow", accept=lambda dtype: dtype.newbyteorder("<") in _WRITTEN)
    may_replace = _has_pickle if overwrite else None
    with new_folder(os.fspath(path), may_replace=may_replace) as folder:
        count = 0

        def tensor(emitter: Emitter, array: LazyArray) -> None:
            nonlocal count
            name = f"tensor_{count}"
            count += 1
            write_tensor(os.path.join(folder, name), array)
            emitter.instance(Named("oneflow", "Tensor"), {"path": name})

        with open(os.path.join(folder, PICKLE), "xb") as file:
            Emitter(file, 4, tensor).pickle({"protocol_version": 1, "data": tree})


def _has_pickle(path: str) -> bool:
    return kind_of(os.path.join(path, PICKLE)) != 0


def write_tensor(folder: str, array: LazyArray) -> None:
    """Write the folder of a variable as OneFlow does, bfloat16 as float32."""
    row = data_type_of(array.dtype)
    values = fetch_plain(os.path.basename(folder), array)
    if row is BFLOAT16:
        values = values.astype(np.float32)
    os.mkdir(folder)
    meta = encode_meta(Meta(shape=tuple(array.shape), data_type=row))
    for name, data in (("meta", memoryview(meta)), ("out", values.reshape(-1).view(np.uint8).data)):
        with open(os.path.join(folder, name), "xb") as file:
            file.write(data)


class _Tensor(Instance):
    """A tensor; its state says where the values are."""

    __slots__ = ()


class _Dtype(Record):
    """A data type of OneFlow, by its number."""

    __slots__ = ("number",)

    def __init__(self) -> None:
        self.number = 0

    def build(self, machine: Machine, state: Any) -> None:
        if type(state) is not int:
            machine.fail("a data type is not a number", found=show(state))
        self.number = state


def _read_pickle(source: Source, root: str | None, budget: Budget, unknown: Unknown) -> ForeignCheckpoint:
    machine = Machine(source.map(), path=source.path, table=_TABLE, budget=budget, modules=True, unknown=unknown)
    value = machine.run()
    if not isinstance(value, dict) or value.get("protocol_version") != 1 or "data" not in value:
        raise FormatError(
            "not a pickle of OneFlow", path=source.path, found=show(value), expected="protocol_version 1 and data"
        )

    def leaf(record: Any) -> Any:
        if isinstance(record, _Tensor):
            machine.charge(ARRAY)
            return _values(record, source, root)
        if isinstance(record, Array):
            return record.lazy(source.read)
        if isinstance(record, _Dtype):
            row = BY_NUMBER.get(record.number)
            return f"oneflow.{record.number if row is None or row.dtype is None else row.dtype.name}"
        if isinstance(record, Instance) and (state := module_state(record, machine)) is not None:
            return state
        return NotImplemented

    tree = plain_tree(value["data"], machine, leaf)
    place = source.path if root is None else root
    return ForeignCheckpoint(place, "oneflow", tree, budget=budget, unknown=machine.unknown())


def _values(tensor: _Tensor, source: Source, root: str | None) -> LazyArray:
    state = tensor.state
    if isinstance(state, dict) and type(state.get("path")) is str and root is not None:
        return _folder(root, state["path"])
    array = state.get("data") if isinstance(state, dict) else None
    if not isinstance(array, Array):
        raise FormatError("a tensor does not have values", path=source.path, found=show(state))
    plain = array.lazy(source.read)
    dtype = state.get("dtype")
    if isinstance(dtype, _Dtype) and dtype.number == BFLOAT16.number and plain.dtype == np.float32:
        return _rounded(plain)
    return plain


def _rounded(values: LazyArray) -> LazyArray:
    """Return bfloat16 values that are stored as float32, which represents them exactly."""
    kind = np.dtype(ml_dtypes.bfloat16)
    return derived(values, lambda part: part.astype(kind), kind)


def _read_folders(root: str, budget: Budget) -> ForeignCheckpoint:
    names = sorted(entry.name for entry in os.scandir(root) if kind_of(os.path.join(entry.path, "out")) == stat.S_IFREG)
    if not names:
        raise CheckpointNotFound(
            "there are no variables in this directory", path=root, expected=f"{PICKLE}, or folders that contain 'out'"
        )
    return ForeignCheckpoint(root, "oneflow", {name: _folder(root, name) for name in names}, budget=budget)


def _folder(root: str, name: str) -> LazyArray:
    if not name or name in (".", "..") or "/" in name or "\\" in name or "\0" in name:
        raise UnsafeContent(
            "the path of a tensor leads out of the directory",
            path=root,
            found=repr(name[:100]),
            expected="the name of a folder",
        )
    for part in ("meta", "out"):
        if kind_of(os.path.join(root, name, part)) != stat.S_IFREG:
            raise FormatError(
                f"the variable does not have a file {part}",
                path=root,
                variable=name,
                hint="its folder must contain meta, with its shape and data type, and out, with its values",
            )
    meta = _meta(Source(inside(root, name, "meta")))
    source = Source(inside(root, name, "out"))
    entry = Entry(name=name, folder=Folder(name), meta=meta, nbytes=source.size)
    variable = readable(entry, path=root)
    values = placed_array(source.read, in_c_order(variable.shape, variable.stored))
    return values if variable.stored == variable.dtype else _rounded(values)


def _meta(source: Source) -> Meta:
    if source.size > META_LIMIT:
        raise FormatError("not a meta file", path=source.path, found=f"{source.size} bytes")
    return parse_meta(source.bytes(0, source.size), path=source.path)


def _tensor(machine: Machine) -> _Tensor:
    machine.charge(NODE)
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
