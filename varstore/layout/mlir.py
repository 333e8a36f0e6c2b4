"""The variables, inputs and outputs that OneFlow's ``model.mlir`` names, each with its shape and data type.

The file is MLIR as text. Each operation is one line, and that of a variable has the attributes ``op_name``, which is
the folder of the variable, ``data_type``, a number of FORMAT F3, and ``shape``:

    %1 = "oneflow.variable"() {data_type = 2 : i32, op_name = "m.fc.weight", shape = [20 : si64, 16 : si64], …}

So have the operations of inputs and outputs. An input says which argument of the job it is, and the job returns what
its outputs give, in the order of these:

    %output = "oneflow.input"(%arg0) {data_type = 2 : i32, op_name = "_G_0_input.0.0_2", shape = [2 : si64], …}
    %output_6 = "oneflow.output"(%2) {…}
    oneflow.return %output_6 : tensor<2x20xf32>
"""

from __future__ import annotations

import re
from typing import Any

from varstore.errors import FormatError
from varstore.layout.dtypes import BY_NUMBER, DataType
from varstore.layout.meta import Meta

__all__ = ["MOST", "PROGRAM", "ports_of", "variables_of"]

PROGRAM = "model.mlir"
MOST = 1 << 28
"""The most bytes that are looked through."""

_PORT = re.compile(rb'%([\w$.-]+) = "oneflow\.(input|output)"\((?:%arg(\d{1,9})\b)?[^\n]*')
_RETURN = re.compile(rb"\boneflow\.return ([^:\n]*)")
_VARIABLE = re.compile(rb'"oneflow\.variable"\([^\n]*')
_NAME = re.compile(rb'\bop_name = "((?:[^"\\]|\\.)*)"')
_TYPE = re.compile(rb"\bdata_type = (\d{1,9})\b")
_SHAPE = re.compile(rb"\bshape = \[([^\]]*)\]")
_EXTENT = re.compile(rb"(?<![\d-])(-?\d{1,18}) *:")
_ESCAPE = re.compile(rb"\\([0-9A-Fa-f]{2}|.)")


def variables_of(program: bytes, *, path: str) -> dict[str, Meta]:
    """Return the variables of a program by name.

    Raises:
        FormatError: a variable does not have a name, shape and known type, or two that differ have one name.
    """
    found: dict[str, Meta] = {}
    for match in _VARIABLE.finditer(program):
        line = match[0]
        text, row, shape = _said(line)
        if text is None or row is None or shape is None:
            raise FormatError(
                "a variable of the program does not have a name, a shape and a known type",
                path=path,
                field=f"byte {match.start()}",
                found=line[:200].decode(errors="replace"),
            )
        meta = Meta(shape=tuple(shape), data_type=row)
        if found.setdefault(text, meta) != meta:
            raise FormatError("two variables of the program have one name", path=path, variable=text)
    return found


def ports_of(program: bytes) -> dict[str, list[dict[str, Any]]]:
    """Return the ``inputs`` and ``outputs`` of a program in order, each with its ``name``, ``type`` and ``shape``."""
    returned = _RETURN.search(program)
    results = [] if returned is None else [name.strip().removeprefix(b"%") for name in returned[1].split(b",")]
    order = {name: index for index, name in enumerate(results)}
    found: dict[bytes, list[tuple[int, int, dict[str, Any]]]] = {b"input": [], b"output": []}
    for match in _PORT.finditer(program):
        name, row, shape = _said(match[0])
        type = "" if row is None else row.name if row.dtype is None else row.dtype.name
        place = int(match[3] or 0) if match[2] == b"input" else order.get(match[1], len(order))
        found[match[2]].append((place, match.start(), {"name": name or "", "type": type, "shape": shape}))
    in_order = {kind: sorted(rows, key=lambda row: row[:2]) for kind, rows in found.items()}
    return {f"{kind.decode()}s": [port for *_, port in rows] for kind, rows in in_order.items()}


def _said(line: bytes) -> tuple[str | None, DataType | None, list[int] | None]:
    """Return the name, type and shape that an operation says, each None if it does not."""
    name, number, shape = _NAME.search(line), _TYPE.search(line), _SHAPE.search(line)
    return (
        None if name is None else _ESCAPE.sub(_unescaped, name[1]).decode(errors="replace"),
        None if number is None else BY_NUMBER.get(int(number[1])),
        None if shape is None else [*map(int, _EXTENT.findall(shape[1]))],
    )


def _unescaped(match: re.Match[bytes]) -> bytes:
    code = match[1]
    return bytes([int(code, 16)]) if len(code) == 2 else code
