"""The variables that OneFlow's ``model.mlir`` names, each with its shape and data type.

The file is MLIR as text. Each operation is one line, and that of a variable has the attributes ``op_name``, which is
the folder of the variable, ``data_type``, a number of FORMAT F3, and ``shape``:

    %1 = "oneflow.variable"() {data_type = 2 : i32, op_name = "m.fc.weight", shape = [20 : si64, 16 : si64], …}
"""

from __future__ import annotations

import re

from varstore.errors import FormatError
from varstore.layout.dtypes import BY_NUMBER
from varstore.layout.meta import Meta

__all__ = ["MOST", "PROGRAM", "variables_of"]

PROGRAM = "model.mlir"
MOST = 1 << 28
"""The most bytes that are looked through."""

_VARIABLE = re.compile(rb'"oneflow\.variable"\([^\n]*')
_NAME = re.compile(rb'\bop_name = "((?:[^"\\]|\\.)*)"')
_TYPE = re.compile(rb"\bdata_type = (\d+)")
_SHAPE = re.compile(rb"\bshape = \[([^\]]*)\]")
_EXTENT = re.compile(rb"(-?\d+) *:")
_ESCAPE = re.compile(rb"\\([0-9A-Fa-f]{2}|.)")


def variables_of(program: bytes, *, path: str) -> dict[str, Meta]:
    """Return the variables of a program by name.

    Raises:
        FormatError: a variable does not have a name, shape and known type, or two that differ have one name.
    """
    found: dict[str, Meta] = {}
    for match in _VARIABLE.finditer(program):
        line = match[0]
        name, number, shape = _NAME.search(line), _TYPE.search(line), _SHAPE.search(line)
        row = None if number is None else BY_NUMBER.get(int(number[1]))
        if name is None or row is None or shape is None:
            raise FormatError(
                "a variable of the program does not have a name, a shape and a known type",
                path=path,
                field=f"byte {match.start()}",
                found=line[:200].decode(errors="replace"),
            )
        meta = Meta(shape=tuple(map(int, _EXTENT.findall(shape[1]))), data_type=row)
        text = _ESCAPE.sub(_unescaped, name[1]).decode(errors="replace")
        if found.setdefault(text, meta) != meta:
            raise FormatError("two variables of the program have one name", path=path, variable=text)
    return found


def _unescaped(match: re.Match[bytes]) -> bytes:
    code = match[1]
    return bytes([int(code, 16)]) if len(code) == 2 else code
