"""MindSpore's programs (``.mindir``): the parameters of the graph, and copies with other values in their places.

::

    ModelProto  {GraphProto graph = 7}
    GraphProto  {repeated TensorProto parameter = 3}
    TensorProto {repeated int64 dims = 1; DataType type = 2; bytes raw_data = 9; ExternalData external_data = 12;
                 string ref_key = 13; CompressionType compression_type = 16}

The name of a parameter is its ``ref_key``. Nodes of the graph are not read.

Source: https://github.com/mindspore-ai/mindspore, file mindspore/core/proto/mind_ir.proto
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from varstore.errors import FormatError, UnsupportedDtype
from varstore.formats.binary.budget import ARRAY, Budget
from varstore.formats.binary.slices import Span, array_of_spans, stream_of
from varstore.formats.binary.source import MOST_DIMENSIONS, Source
from varstore.formats.binary.wire import BYTES, VARINT, Field, Wire
from varstore.formats.opened import ForeignCheckpoint
from varstore.formats.state.copies import check_apart, write_copy
from varstore.formats.state.flat import check_fits, flat_arrays
from varstore.values.lazy import LazyArray

__all__ = ["SUFFIX", "is_program", "read_program", "write_program"]

SUFFIX = ".mindir"
_PRODUCER = b"\x12\x09MindSpore"
_GRAPH, _PARAMETER = 7, 3
_DIMS, _TYPE, _RAW, _EXTERNAL, _NAME, _COMPRESSION = 1, 2, 9, 12, 13, 16
_DTYPES: dict[int, np.dtype[Any]] = {
    number: np.dtype(scalar)
    for number, scalar in (
        (1, np.float32),
        (2, np.uint8),
        (3, np.int8),
        (4, np.uint16),
        (5, np.int16),
        (6, np.int32),
        (7, np.int64),
        (9, np.bool_),
        (10, np.float16),
        (11, np.float64),
        (12, np.uint32),
        (13, np.uint64),
        (14, np.complex64),
        (15, np.complex128),
        (16, ml_dtypes.bfloat16),
        (17, np.float64),
    )
}


def is_program(head: bytes) -> bool:
    """Tell whether a file begins like a program: with a version, then its producer."""
    return head[:1] == b"\n" and len(head) > 2 and head[2 + head[1] :].startswith(_PRODUCER)


def read_program(source: Source, budget: Budget) -> ForeignCheckpoint:
    """Open the parameters of a program, by their names.

    Raises:
        FormatError: the messages are not those of a program, or values are encoded or in another file.
        SizeMismatch: the values of a parameter do not match its shape and type.
        UnsupportedDtype: numpy does not have the type of a parameter.
    """
    arrays = {parameter.name: parameter.array for parameter in _parameters(source, budget)}
    return ForeignCheckpoint(source.path, "mindspore", arrays, {"exported": True}, budget=budget)


def write_program(path: str, state: Any, model: str) -> None:
    """Write a copy of a program in which the parameters named in `state` have other values.

    Raises:
        UsageError: the copy and the model are the same file.
        VariableNotFound, VariableMismatch: the program does not have a parameter, or not of this shape or type.
        FormatError, UnsupportedDtype: see `read_program`.
    """
    arrays = flat_arrays(state, format="MindSpore")
    source = Source(model)
    check_apart(path, model)
    parameters = _parameters(source, Budget(model, source.size))
    known = {parameter.name: parameter.array for parameter in parameters}
    for name, array in arrays.items():
        check_fits(model, name, array, known)
    write_copy(path, source, arrays, {parameter.name: parameter.span[0] for parameter in parameters})


@dataclass(frozen=True, kw_only=True, slots=True)
class _Parameter:
    """A parameter, and where its values are."""

    name: str
    span: Span
    array: LazyArray


def _parameters(source: Source, budget: Budget) -> list[_Parameter]:
    """Return the parameters in the order of the file."""
    found: dict[str, _Parameter] = {}
    with stream_of(source) as stream:
        wire = Wire(stream, source.path)
        graphs = [field.span for field in wire.fields((0, source.size), "ModelProto") if _is(field, _GRAPH)]
        if len(graphs) != 1:
            raise FormatError("not a program of MindSpore", path=source.path, found=f"{len(graphs)} graphs", expected=1)
        for field in wire.fields(graphs[0], "GraphProto"):
            if _is(field, _PARAMETER):
                budget.charge(ARRAY)
                parameter = _parameter(wire, source, field.span)
                if parameter.name in found:
                    raise FormatError(
                        "two parameters have the same name", path=source.path, variable=parameter.name[:100]
                    )
                found[parameter.name] = parameter
    return list(found.values())


def _parameter(wire: Wire, source: Source, span: Span) -> _Parameter:
    name, kind = "", 0
    dims: list[int] = []
    values: Span = (span[0], 0)
    for field in wire.fields(span, "TensorProto"):
        if field.number == _DIMS:
            wire.add_dimensions(dims, field, "TensorProto", most=MOST_DIMENSIONS)
        elif field.number == _TYPE and field.kind == VARINT:
            kind = field.value
        elif field.number == _NAME:
            name = wire.text(field, "TensorProto")
        elif field.number == _RAW and field.kind == BYTES:
            values = field.span
        elif field.number == _EXTERNAL or (field.number == _COMPRESSION and field.value):
            raise FormatError(
                "the values of a parameter are in another file, or encoded",
                path=source.path,
                variable=name or None,
                hint="export a program of less than 1 GB, without compression; or save a checkpoint",
            )
    dtype = _DTYPES.get(kind)
    if dtype is None:
        raise UnsupportedDtype("the type does not have a numpy equivalent", path=source.path, variable=name, found=kind)
    return _Parameter(name=name, span=values, array=array_of_spans(source, [values], dims, dtype, variable=name))


def _is(field: Field, number: int) -> bool:
    return field.number == number and field.kind == BYTES
