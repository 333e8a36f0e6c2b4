"""PaddlePaddle's raw variables, and the programs that contain their names.

A variable is ``uint32 0, uint64 levels, levels x (uint64 size, bytes), uint32 0, int32 n``, n bytes of the message
TensorDesc (fields: 1 data_type, 2 dims) and the values. A file contains one or more of them without names, in the
lexicographic order of the parameter names in the program.

Source: framework.proto and dense_tensor_serialize.cc in
https://github.com/PaddlePaddle/Paddle/tree/v3.3.1/paddle/phi/core/framework
"""

from __future__ import annotations

import itertools
import json
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from varstore.errors import FormatError, SizeMismatch, UnsupportedDtype
from varstore.formats.binary.budget import ARRAY, Budget
from varstore.formats.binary.slices import stream_of
from varstore.formats.binary.source import MOST_DIMENSIONS, Held, Source, count_elements
from varstore.formats.binary.wire import BYTES, Field, Wire, int_field
from varstore.storage.containment import inside
from varstore.values.lazy import LazyArray, placed_array
from varstore.values.parts import in_c_order

__all__ = [
    "PROGRAMS",
    "Stream",
    "companion",
    "files_of",
    "is_beside_variables",
    "is_prefix",
    "is_stream",
    "names_in",
    "parameter_names",
    "ports_in",
    "read_streams",
    "stream_head",
    "streams_of",
]

_DTYPES: dict[int, np.dtype[Any]] = {
    0: np.dtype(np.bool_),
    1: np.dtype(np.int16),
    2: np.dtype(np.int32),
    3: np.dtype(np.int64),
    4: np.dtype(np.float16),
    5: np.dtype(np.float32),
    6: np.dtype(np.float64),
    20: np.dtype(np.uint8),
    21: np.dtype(np.int8),
    22: np.dtype(ml_dtypes.bfloat16),
    23: np.dtype(np.complex64),
    24: np.dtype(np.complex128),
    32: np.dtype(ml_dtypes.float8_e4m3fn),
    33: np.dtype(ml_dtypes.float8_e5m2),
}
_TENSOR_KINDS = frozenset({7, 8})
"""The VarTypes of dense and sparse-row tensors; variables of other types (feed, fetch, raw) do not have values."""

_PAIR = (".pdparams", ".pdopt")
PROGRAMS = (".json", ".pdmodel")
"""The suffixes of a program, of the present format and of the older one."""
_LONGEST_DESCRIPTION = 4096
_MOST_LEVELS = 64
_LONGEST_PROGRAM = 1 << 28
_TENSOR, _DATA, _FETCH = "0.t_dtensor", ("1.data", "1.feed"), "1.fetch"
_PIR_TYPES = {
    **{f"0.t_i{bits}": f"int{bits}" for bits in (8, 16, 32, 64)},
    **{f"0.t_f{bits}": f"float{bits}" for bits in (16, 32, 64)},
    "0.t_bool": "bool",
    "0.t_ui8": "uint8",
    "0.t_bf16": "bfloat16",
    "0.t_c64": "complex64",
    "0.t_c128": "complex128",
    "0.t_f8e4m3fn": "float8_e4m3fn",
    "0.t_f8e5m2": "float8_e5m2",
}


def is_prefix(path: str) -> bool:
    """Return whether there is nothing at a path, but files of Paddle are called like it, with suffixes."""
    suffixes = (*_PAIR, ".pdiparams", *PROGRAMS)
    return not os.path.lexists(path) and any(os.path.lexists(path + suffix) for suffix in suffixes)


def files_of(path: str) -> list[str]:
    """Return the files that a path stands for: itself, the pair of `paddle.Model.save`, or a program's parameters.

    Raises:
        FormatError: there is only a program.
    """
    stem, suffix = os.path.splitext(path)
    if isinstance(path, Held) or (os.path.lexists(path) and suffix not in PROGRAMS):
        return [path]
    is_program = os.path.lexists(path)
    if not is_program:
        stem = path
    pair = [stem + end for end in _PAIR if os.path.lexists(stem + end)]
    if len(pair) == len(_PAIR) and not is_program:
        return pair
    found = pair or [stem + end for end in (".pdiparams",) if os.path.lexists(stem + end)]
    programs = [stem + end for end in PROGRAMS if os.path.lexists(stem + end)]
    if programs and not found:
        raise FormatError(
            "this is a program of Paddle, which does not hold parameters",
            path=programs[0],
            expected=f"its parameters in {stem + '.pdiparams'!r}",
            hint="bring the file along; a program without parameters has none to read",
        )
    return found[:1] or [path]


def is_beside_variables(name: str) -> bool:
    """Tell whether a file in a folder of variables is the program that they belong to, or is hidden."""
    name = name.rpartition("/")[2]
    return name == "__model__" or name.startswith(".") or name.endswith(PROGRAMS)


def is_stream(source: Source) -> bool:
    """Return whether the file starts like a raw variable: with zeros, which no pickle does."""
    return source.size >= 20 and source.bytes(0, 4) == bytes(4)


def read_streams(source: Source, budget: Budget) -> list[LazyArray]:
    """Return the variables in a file, in order.

    Raises:
        FormatError: a header is damaged.
        SizeMismatch: the file ends within a variable.
        UnsupportedDtype: the type of a variable is unknown.
        UnsafeContent: the variables are out of proportion to the size of the file.
    """
    return [variable.array for variable in streams_of(source, budget)]


@dataclass(frozen=True, kw_only=True, slots=True)
class Stream:
    """One variable in a file: the positions of its first byte, of its values and of its end, and the values."""

    start: int
    values: int
    end: int
    array: LazyArray


def streams_of(source: Source, budget: Budget) -> list[Stream]:
    """Return the variables in a file with their positions; see `read_streams`."""
    found: list[Stream] = []
    with stream_of(source) as stream:
        wire = Wire(stream, source.path)
        while (position := found[-1].end if found else 0) < source.size:
            budget.charge(ARRAY)
            found.append(_stream(source, wire, position))
    return found


def _stream(source: Source, wire: Wire, start: int) -> Stream:
    version, levels = struct.unpack("<IQ", source.bytes(start, 12))
    position = start + 12
    if version != 0 or levels > _MOST_LEVELS:
        raise _damaged(source, start, "the header of a variable", f"version {version}, {levels} levels")
    for _ in range(levels):
        position += 8 + int(struct.unpack("<Q", source.bytes(position, 8))[0])
    version, size = struct.unpack("<Ii", source.bytes(position, 8))
    position += 8
    if version != 0 or not 0 <= size <= min(_LONGEST_DESCRIPTION, source.size - position):
        raise _damaged(source, start, "the description of a variable", f"version {version}, {size} bytes")
    number = 0
    shape: list[int] = []
    for field in wire.fields((position, size), "TensorDesc"):
        if field.number == 1:
            number = field.value
        elif field.number == 2:
            wire.add_dimensions(shape, field, "TensorDesc", most=MOST_DIMENSIONS)
    position += size
    dtype = _DTYPES.get(number)
    if dtype is None:
        raise UnsupportedDtype("the PaddlePaddle data type is unknown", path=source.path, found=number)
    count = count_elements(tuple(shape), dtype.itemsize, path=source.path)
    end = position + count * dtype.itemsize
    if end > source.size:
        raise SizeMismatch(
            "the file ends within a variable", path=source.path, found=f"{source.size} bytes", expected=f"{end} bytes"
        )
    array = placed_array(source.read, in_c_order(tuple(shape), dtype, position))
    return Stream(start=start, values=position, end=end, array=array)


def parameter_names(source: Source) -> list[str] | None:
    """Return the names of the variables in a ``.pdiparams`` file, in order; None if there is no program beside it.

    Raises:
        FormatError: the program is damaged, or names two variables alike.
    """
    if not source.path.endswith(".pdiparams"):
        return None
    for suffix in PROGRAMS:
        program = companion(source, suffix, instead=".pdiparams")
        if program is not None:
            return names_in(program)
    return None


def names_in(program: Source) -> list[str]:
    """Return the names of the variables of a program, in the order in which its ``.pdiparams`` file has them.

    Raises:
        FormatError: it is damaged, or names two variables alike.
    """
    if program.size > _LONGEST_PROGRAM:
        raise _damaged(program, 0, "the program", f"{program.size} bytes")
    found = sorted((_names_in_json if program.path.endswith(".json") else _names_in_protobuf)(program))
    if twice := [name for name, after in itertools.pairwise(found) if name == after]:
        raise FormatError("the program names two variables alike", path=program.path, variable=twice[0])
    return found


Ports = tuple[list[dict[str, Any]], list[dict[str, Any]]]
"""Inputs and outputs, each with `name`, `type` and `shape`; an extent of any size is None, and so is a shape of any."""


def ports_in(program: Source) -> Ports:
    """Return the inputs and outputs of a program, as its operations feed and fetch say them; none if they do not.

    Raises:
        FormatError: it is damaged.
    """
    return (_ports_in_json if program.path.endswith(".json") else _ports_in_protobuf)(program)


def _port(name: str, type: str = "", shape: list[int] | None = None) -> dict[str, Any]:
    known = None if shape is None else [extent if extent >= 0 else None for extent in shape]
    return {"name": name, "type": type, "shape": known}


def stream_head(array: LazyArray) -> bytes:
    """Return the bytes before the values of a variable, as Paddle writes them.

    Raises:
        UnsupportedDtype: Paddle does not have its type.
    """
    number = next((number for number, dtype in _DTYPES.items() if dtype == array.dtype.newbyteorder("=")), None)
    if number is None:
        raise UnsupportedDtype("Paddle does not have this type", variable=array.name or None, found=str(array.dtype))
    description = int_field(1, number) + b"".join(int_field(2, extent) for extent in array.shape)
    return struct.pack("<IQIi", 0, 0, 0, len(description)) + description


def companion(source: Source, suffix: str, *, instead: str = "") -> Source | None:
    """Return the file beside this one whose name has another suffix, or one more; None if there is no such file.

    Raises:
        UnsafeContent: it is a link that leads out of the folder.
    """
    folder, name = os.path.split(source.path)
    beside = name.removesuffix(instead) + suffix
    if not os.path.lexists(os.path.join(folder, beside)):
        return None
    return Source(inside(folder or ".", beside, stated_by=source.path))


def _names_in_json(program: Source) -> list[str]:
    """Return the names of the parameters, the operations ``p``, of a PIR program."""
    try:
        names = [operation["A"][3] for operation in _operations(program) if operation["#"] == "p"]
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise _damaged(program, 0, "the program", str(error)[:100]) from None
    if not all(isinstance(name, str) for name in names):
        raise _damaged(program, 0, "the program", "a parameter without a name")
    return names


def _operations(program: Source) -> Any:
    return json.loads(program.bytes(0, program.size))["program"]["regions"][0]["blocks"][0]["ops"]


def _ports_in_json(program: Source) -> Ports:
    inputs: list[dict[str, Any]] = []
    outputs: list[dict[str, Any]] = []
    try:
        for operation in _operations(program):
            if operation["#"] in (*_DATA, _FETCH):
                said = {one["N"]: one["AT"]["D"] for one in operation["A"]}
                tensor = operation["O"][0]["TT"]
                (kind, shape, *_) = tensor["D"] if tensor["#"] == _TENSOR else ({"#": ""}, None)
                port = _port(str(said["name"]), _PIR_TYPES.get(kind["#"], ""), shape)
                (outputs if operation["#"] == _FETCH else inputs).append(port)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return [], []
    return inputs, outputs


def _names_in_protobuf(program: Source) -> list[str]:
    """Return the names of the persistable tensors of a ProgramDesc.

    Fields of a program: 1 blocks; of a block: 3 vars; of a variable: 1 name, 2 type (with field 1 kind), 3 persistable.
    """
    names = []
    with stream_of(program) as stream:
        wire = Wire(stream, program.path)
        for block in _messages(wire, (0, program.size), 1, "ProgramDesc"):
            for variable in _messages(wire, block.span, 3, "BlockDesc"):
                parts = wire.fields(variable.span, "VarDesc")
                fields = {field.number: field for field in parts if field.number in (1, 2, 3)}
                kinds = (
                    []
                    if 2 not in fields
                    else [f.value for f in wire.fields(fields[2].span, "VarType") if f.number == 1]
                )
                if 1 in fields and 3 in fields and fields[3].value == 1 and kinds and kinds[0] in _TENSOR_KINDS:
                    names.append(wire.text(fields[1], "VarDesc"))
    return names


def _ports_in_protobuf(program: Source) -> Ports:
    """Return the ports of the first block of a ProgramDesc.

    Fields of a block: 3 vars, 4 ops; of an operation: 1 inputs and 2 outputs (with field 2 names), 3 type, 4 attributes
    (1 name, 3 integer); of a variable: 1 name, 2 type (with field 3 tensor: field 1 TensorDesc).
    """
    with stream_of(program) as stream:
        wire = Wire(stream, program.path)
        blocks = [block.span for block in _messages(wire, (0, program.size), 1, "ProgramDesc")]
        found: dict[str, list[tuple[int, str]]] = {"feed": [], "fetch": []}
        for operation in _messages(wire, blocks[0], 4, "BlockDesc") if blocks else ():
            kind, column, names = _feed_or_fetch(wire, operation)
            if kind in found:
                found[kind] += [(column, name) for name in names]
        wanted = {name for rows in found.values() for _, name in rows}
        known: dict[str, dict[str, Any]] = {name: _port(name) for name in wanted}
        for variable in _messages(wire, blocks[0], 3, "BlockDesc") if wanted else ():
            fields = {field.number: field for field in wire.fields(variable.span, "VarDesc")}
            name = wire.text(fields[1], "VarDesc") if 1 in fields else ""
            if name in wanted and 2 in fields:
                known[name] = _described(wire, name, fields[2])
    inputs, outputs = ([known[name] for _, name in sorted(rows)] for rows in found.values())
    return inputs, outputs


def _feed_or_fetch(wire: Wire, operation: Field) -> tuple[str, int, list[str]]:
    """Return the type of an operation, which column it feeds or fetches, and the names of those variables."""
    fields = list(wire.fields(operation.span, "OpDesc"))
    kind = next((wire.text(field, "OpDesc") for field in fields if field.number == 3), "")
    column, names = 0, []
    for field in fields if kind in ("feed", "fetch") else ():
        parts = list(wire.fields(field.span, "OpDesc")) if field.number in (1, 2, 4) and field.kind == BYTES else []
        if field.number == 4 and any(part.number == 1 and wire.read(part) == b"col" for part in parts):
            column = next((part.value for part in parts if part.number == 3), 0)
        elif field.number == (2 if kind == "feed" else 1):
            names += [wire.text(part, "OpDesc") for part in parts if part.number == 2]
    return kind, column, names


def _described(wire: Wire, name: str, type: Field) -> dict[str, Any]:
    """Return a port as the type of its variable says, a VarType."""
    for tensor in _messages(wire, type.span, 3, "VarType"):
        for description in _messages(wire, tensor.span, 1, "VarType"):
            number, shape = -1, list[int]()
            for field in wire.fields(description.span, "TensorDesc"):
                if field.number == 1:
                    number = field.value
                elif field.number == 2:
                    wire.add_dimensions(shape, field, "TensorDesc", most=MOST_DIMENSIONS)
            dtype = _DTYPES.get(number)
            return _port(name, dtype.name if dtype is not None else "", shape)
    return _port(name)


def _messages(wire: Wire, span: tuple[int, int], number: int, message: str) -> Iterator[Field]:
    return (field for field in wire.fields(span, message) if field.number == number and field.kind == BYTES)


def _damaged(source: Source, position: int, what: str, found: str) -> FormatError:
    return FormatError(f"{what} is damaged", path=source.path, field=f"byte {position}", found=found)
