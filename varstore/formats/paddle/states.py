"""PaddlePaddle's files: pickled state dicts and checkpoints, and files of raw variables.

The pickles contain numpy arrays. Those that are tensors are listed in a table of names
(``StructuredToParameterName@@``), or are in pairs that are created by calling `tuple`. Paddle stores bfloat16 as uint16
without recording the type, so tensors of uint16 are read as bfloat16, as `paddle.load` does.

Source: https://github.com/PaddlePaddle/Paddle/blob/v3.3.1/python/paddle/framework/io.py
"""

from __future__ import annotations

import math
import os
import stat
from collections import Counter, OrderedDict
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from varstore.errors import FormatError, SizeMismatch, UsageError
from varstore.formats.binary.budget import Budget
from varstore.formats.binary.folder import WalkedFolder
from varstore.formats.binary.source import Held, Source, count_elements
from varstore.formats.opened import ForeignCheckpoint
from varstore.formats.paddle.program import (
    companion,
    files_of,
    is_beside_variables,
    is_stream,
    parameter_names,
    read_streams,
)
from varstore.formats.paddle.rewrite import PARAMETERS, write_copy
from varstore.formats.pickles.arrays import PLAIN, Array
from varstore.formats.pickles.emit import Emitter, Named
from varstore.formats.pickles.machine import ITEM, NODE, Machine, Record, Unknown
from varstore.formats.pickles.names import Constructor, show
from varstore.formats.pickles.tree import plain_tree
from varstore.formats.state.nested import SCALARS, nested_state
from varstore.storage.appearing import replacing
from varstore.storage.looking import kind_of
from varstore.text.hints import plural
from varstore.values.lazy import LazyArray
from varstore.values.nodes import leaves

__all__ = ["read", "write"]

_SCALARS = tuple(kind for kind in SCALARS if kind is not bytes)
_NAMES = "StructuredToParameterName@@"
_SLICES = "UnpackBigParamInfor@@"
_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_WRITTEN = frozenset(
    map(np.dtype, [np.bool_, np.uint8, np.int8, np.int16, np.int32, np.int64, np.float16, np.float32, np.float64])
) | {np.dtype(np.complex64), np.dtype(np.complex128), _BFLOAT16}


def read(path: str | os.PathLike[str], *, limit: int | None = None, unknown: Unknown = "opaque") -> ForeignCheckpoint:
    """Open a file that `paddle.save` or `paddle.jit.save` (``.pdiparams``) wrote, or one of raw variables.

    The path may be Paddle's prefix: that of the files of a program, or of those of `paddle.Model.save`, which become
    ``model`` and ``optimizer``. A program, ``.json`` or ``.pdmodel``, stands for the parameters beside it.

    A folder is one of ``static.save_vars``, with a file of raw values for each variable.

    A ``.pdiparams`` file does not contain names. They are read from the ``.json`` or ``.pdmodel`` file beside it, and
    structured names from ``.pdiparams.info`` if that exists. Without these files, the tensors are numbered.

    `unknown` says what becomes of names that varstore does not know: see `varstore.read`.

    Raises:
        UnsafeContent: the file asks to run code, or is out of proportion to its size.
        FormatError: it is truncated or damaged, or not a PaddlePaddle file.
        SizeMismatch: it ends within a variable.
        CheckpointNotFound: there is nothing at the path.
    """
    place = os.fspath(path)
    if not isinstance(path, Held) and kind_of(place) == stat.S_IFDIR:
        return _read_folder(place, limit)
    file, *other = files_of(place)
    if other:
        model, optimizer = (read(part, limit=limit, unknown=unknown) for part in (file, *other))
        budget = Budget(place, sum(os.stat(part).st_size for part in (file, *other)), limit=limit)
        parts = {"model": model, "optimizer": optimizer}
        names = {
            f"{part}/{name}": own
            for part, opened in parts.items()
            for name, own in opened.attributes.get("parameter_names", {}).items()
        }
        tree = {part: opened.tree for part, opened in parts.items()}
        about = {"parameter_names": names} if names else {}
        both = model.unknown + optimizer.unknown
        return ForeignCheckpoint(place, "paddle", tree, about, budget=budget, unknown=both)
    source = Source(file)
    budget = Budget(source.path, source.size, limit=limit)
    if is_stream(source):
        return _read_streams(source, budget)
    data = source.map()
    machine = Machine(
        data, path=source.path, table=_TABLE, budget=budget, encoding="latin-1", unknown=unknown
    )  # as in paddle.load
    value = machine.run()
    named: dict[str, str] = {}
    if type(value) in (dict, OrderedDict):
        value = _join_slices(value, source)
        names = value.pop(_NAMES, None)
        if isinstance(names, dict):
            plain = {str(key): machine.plain(name) for key, name in names.items()}
            named |= {key: name for key, name in plain.items() if isinstance(name, str)}
            tensors = {id(value[key]): _Tensor(value[key]) for key in names if isinstance(value.get(key), Array)}
            value.update((key, tensors[id(value[key])]) for key in names if id(value.get(key)) in tensors)

    own: dict[int, str] = {}

    def leaf(record: Any) -> Any:
        if isinstance(record, _Tensor):
            array = record.array.lazy(source.read, _meaning(record.array))
            if record.name:
                own[id(array)] = record.name
            return array
        if isinstance(record, _Joined):
            return record.lazy(source)
        return record.lazy(source.read) if isinstance(record, Array) else NotImplemented

    tree = plain_tree(value, machine, leaf)
    for name, array in leaves(tree) if own else ():
        if own.get(id(array), name) != name:
            budget.charge(NODE + len(name), variable=name)
            named[name] = own[id(array)]
    attributes: dict[str, Any] = {} if machine.stop == len(data) else {"bytes_behind": len(data) - machine.stop}
    if named:
        attributes["parameter_names"] = named
    return ForeignCheckpoint(source.path, "paddle", tree, attributes, budget=budget, unknown=machine.unknown())


def write(
    path: str | os.PathLike[str],
    state: Any,
    *,
    parameter_names: Mapping[str, str] | None = None,
    model: str | os.PathLike[str] | None = None,
) -> None:
    """Write a mapping or nested state like `paddle.save`, for `paddle.load` and `set_state_dict`.

    A path that ends in ``.pdiparams`` gets the variables of a program, which is copied with them: see `write_copy`.

    Args:
        path: the file to write.
        state: the state; for a program, names and arrays, of those variables that have other values.
        parameter_names: Paddle's own names, by the names in the state; the default is the name itself.
        model: the program that is copied: its prefix, or one of its files.

    Raises:
        UsageError: a value is not a tensor, a scalar or a container of them; or one of path and `model` is that of a
            program and the other is not.
        VariableNotFound, VariableMismatch: the program does not have a variable, or not of this shape or type.
        UnsupportedDtype: Paddle does not have the type of a tensor, or would read it as another: uint16 and float8.
        CheckpointExists: a file beside a program is in the way; see `write_copy`.
        StorageError: the operating system refused.
    """
    is_program = os.fspath(path).endswith(PARAMETERS)
    if is_program and model is not None:
        structured = read(model).attributes.get("parameter_names", {})
        write_copy(os.fspath(path), state, os.fspath(model), parameter_names or {}, structured)
        return
    if is_program or model is not None:
        raise UsageError(
            "variables of a program are written as a copy of it",
            path=path,
            hint="pass the program: write('copy.pdiparams', values, model='original.pdiparams')",
        )
    tree = nested_state(state, format="paddle", accept=_accept, scalars=_SCALARS)
    is_flat = isinstance(tree, dict) and any(isinstance(value, LazyArray) for value in tree.values())
    is_flat = is_flat and not any(_holds_array(value) for value in tree.values() if not isinstance(value, LazyArray))
    names = parameter_names or {}
    if is_flat:
        tensors = [key for key, value in tree.items() if isinstance(value, LazyArray)]
        tree = tree | {_NAMES: {key: names.get(str(key), str(key)) for key in tensors}}
    own = {id(value): names.get(name, name) for name, value in leaves(tree)} if not is_flat else {}

    def array(emitter: Emitter, array: LazyArray) -> None:
        view = np.dtype(np.uint16) if array.dtype == _BFLOAT16 else array.dtype
        if is_flat:
            emitter.numpy(array, view)
        else:
            emitter.pair(Named("builtins", "tuple"), own[id(array)], lambda: emitter.numpy(array, view))

    with replacing(os.fspath(path)) as file:
        Emitter(file, 4, array).pickle(tree)


def _accept(dtype: np.dtype[Any]) -> bool:
    return dtype.newbyteorder("=") in _WRITTEN


def _holds_array(node: Any) -> bool:
    return any(isinstance(leaf, LazyArray) for _, leaf in leaves(node))


class _Tensor(Record):
    """An array that represents a tensor."""

    __slots__ = ("array", "name")

    def __init__(self, array: Array, name: str = "") -> None:
        self.array = array
        self.name = name


class _Joined(Record):
    """A tensor that was too large for one pickled array: consecutive one-dimensional parts."""

    __slots__ = ("parts", "shape")

    def __init__(self, parts: list[Array], shape: tuple[int, ...]) -> None:
        self.parts = parts
        self.shape = shape

    def lazy(self, source: Source) -> LazyArray:
        parts = [part.lazy(source.read, _meaning(part)) for part in self.parts]

        def fetch() -> np.ndarray:
            values = np.empty(math.prod(self.shape), parts[0].dtype)
            start = 0
            for part in parts:
                values[start : start + part.shape[0]] = part.numpy()
                start += part.shape[0]
            return values.reshape(self.shape)

        return LazyArray(self.shape, parts[0].dtype, fetch)


def _meaning(array: Array) -> np.dtype[Any] | None:
    return _BFLOAT16 if array.dtype.dtype == np.uint16 else None


def _join_slices(value: dict[Any, Any], source: Source) -> dict[Any, Any]:
    """Join tensors that were written in several parts, because pickles of protocols 2 and 3 limit the size of each."""
    slices = value.pop(_SLICES, {})
    joined = {}
    for name, about in slices.items() if isinstance(slices, dict) else ():
        shape: Any = about.get("OriginShape") if isinstance(about, dict) else None
        keys: Any = about.get("slices") if isinstance(about, dict) else None
        is_named = isinstance(keys, list) and all(type(key) is str for key in keys)
        parts = [value.get(key) for key in keys] if is_named else []
        if type(shape) not in (tuple, list) or not parts or not all(_is_flat(part, parts[0]) for part in parts):
            raise FormatError("parts of the tensor are missing", path=source.path, variable=str(name))
        arrays: list[Array] = [part for part in parts if isinstance(part, Array)]
        count = count_elements(tuple(shape), arrays[0].dtype.dtype.itemsize, path=source.path, variable=str(name))
        if sum(part.shape[0] for part in arrays) != count:
            raise SizeMismatch("the parts do not cover the tensor", path=source.path, variable=str(name))
        joined[keys[0]] = (name, _Joined(arrays, tuple(shape)))
        for key in keys[1:]:
            value.pop(key, None)
    whole = type(value)()
    for key, item in value.items():
        name, item = joined.get(key, (key, item))
        whole[name] = item
    return whole


def _is_flat(part: Any, first: Any) -> bool:
    return isinstance(part, Array) and len(part.shape) == 1 and part.dtype.dtype == first.dtype.dtype


def _read_streams(source: Source, budget: Budget) -> ForeignCheckpoint:
    arrays = read_streams(source, budget)
    names = parameter_names(source)
    if names is None:
        tree: Any = arrays[0] if len(arrays) == 1 else arrays
        return ForeignCheckpoint(source.path, "paddle", tree, budget=budget)
    if len(names) != len(arrays):
        raise FormatError(
            "the number of tensors is not that in the program beside the file",
            path=source.path,
            found=plural(len(arrays), "tensor"),
            expected=f"{len(names)}",
        )
    structured = _unambiguous(names, _structured_names(source))
    tree = {structured.get(name, name): array for name, array in zip(names, arrays, strict=True)}
    about = {"parameter_names": dict(zip(tree, names, strict=True))}
    return ForeignCheckpoint(source.path, "paddle", tree, about, budget=budget)


def _read_folder(path: str, limit: int | None) -> ForeignCheckpoint:
    """Open a folder with a file for each variable, which is called like it."""
    folder = WalkedFolder.walked(path)
    budget = Budget(path, folder.size, files=len(folder.files), limit=limit)
    tree = {}
    for name in sorted(folder.files):
        if is_beside_variables(name):
            continue
        source = folder.source(name)
        arrays = read_streams(source, budget) if is_stream(source) else []
        if len(arrays) != 1:
            raise FormatError(
                "a file in a folder of variables does not hold one variable",
                path=os.path.join(path, name),
                found=plural(len(arrays), "variable") if arrays else "none",
                hint="remove it from the folder, or open the other files one by one",
            )
        tree[name] = arrays[0]
    if not tree:
        raise FormatError("there are no variables of Paddle in this folder", path=path)
    return ForeignCheckpoint(path, "paddle", tree, budget=budget)


def _structured_names(source: Source) -> dict[str, str]:
    """Return a dict of parameter names to structured names, read from ``.pdiparams.info`` like `paddle.load`."""
    info = companion(source, ".info")
    if info is None:
        return {}
    machine = Machine(info.map(), path=info.path, table={}, budget=Budget(info.path, info.size))
    value = plain_tree(machine.run(), machine, lambda _: NotImplemented)
    return {
        name: about["structured_name"]
        for name, about in (value.items() if isinstance(value, dict) else ())
        if isinstance(about, dict) and isinstance(about.get("structured_name"), str)
    }


def _unambiguous(names: list[str], structured: dict[str, str]) -> dict[str, str]:
    """Return the structured names of these parameters that no other parameter has, as either of its names."""
    counts = Counter(structured[name] for name in names if name in structured)
    taken = set(names)
    return {name: new for name, new in structured.items() if new == name or (counts[new] == 1 and new not in taken)}


def _tuple(machine: Machine, items: Any = ()) -> Any:
    if type(items) in (tuple, list) and len(items) == 2 and type(items[0]) is str and isinstance(items[1], Array):
        return _Tensor(items[1], items[0])
    machine.charge(NODE + ITEM * len(items))
    return tuple(items)


def _eval(machine: Machine, *arguments: Any) -> _Tensor:
    """Return the array of ``eval("data", {"data": array})``, the call that stands for a DenseTensor; refuse others."""
    is_dense = len(arguments) == 2 and arguments[0] == "data" and type(arguments[1]) is dict
    array = arguments[1].get("data") if is_dense and len(arguments[1]) == 1 else None
    if not isinstance(array, Array):
        machine.refuse(f"would call builtins.eval{show(arguments, most=4)}")
    return _Tensor(array)


_TABLE = {
    **PLAIN,
    **{(module, "tuple"): Constructor(call=_tuple) for module in ("builtins", "__builtin__")},
    **{(module, "eval"): Constructor(call=_eval) for module in ("builtins", "__builtin__")},
}
