"""Parse ONNX's TensorProto: name, type, shape, and values in one of several places.

Values in ``raw_data`` and in external files are read in place. The other fields have a type of their own:
``int32_data`` also contains the bit patterns of 16-bit floats and, packed into bytes, types of four bits or less.
Tensors of strings cannot be read as arrays.

Format: https://github.com/onnx/onnx/blob/main/onnx/onnx.proto (TensorProto)
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np

from varstore.errors import FormatError, SizeMismatch, UnsupportedDtype
from varstore.formats.binary.budget import Budget
from varstore.formats.binary.packing import bits_of, packed_size, unpack
from varstore.formats.binary.slices import Span, array_of_spans, refused_array, stream_of
from varstore.formats.binary.source import Source, count_elements
from varstore.formats.binary.wire import BYTES, FIXED32, FIXED64, VARINT, Wire, bytes_field, int_field, varints
from varstore.storage.containment import inside
from varstore.values.lazy import LazyArray

__all__ = ["DTYPES", "RAW", "TensorRecord", "array_of", "external_fields", "parse", "without_values"]

DIMS, TYPE, SEGMENT, NAME, RAW, EXTERNAL, LOCATION = 1, 2, 3, 8, 9, 13, 14
_FLOATS, _INT32S, _STRINGS, _INT64S, _DOUBLES, _UINT64S = 4, 5, 6, 7, 10, 11
VALUES = frozenset({_FLOATS, _INT32S, _STRINGS, _INT64S, RAW, _DOUBLES, _UINT64S, EXTERNAL, LOCATION})
"""The fields that contain values or their location."""

_IS_EXTERNAL = 1
_INT32 = 0xFFFFFFFF
_STRING = 8
_MOST_DIMENSIONS = 64


def _row(scalar: Any, typed: int) -> tuple[np.dtype[Any], int]:
    return np.dtype(scalar), typed


_ROWS: dict[int, tuple[np.dtype[Any], int]] = {
    1: _row(np.float32, _FLOATS),
    2: _row(np.uint8, _INT32S),
    3: _row(np.int8, _INT32S),
    4: _row(np.uint16, _INT32S),
    5: _row(np.int16, _INT32S),
    6: _row(np.int32, _INT32S),
    7: _row(np.int64, _INT64S),
    9: _row(np.bool_, _INT32S),
    10: _row(np.float16, _INT32S),
    11: _row(np.float64, _DOUBLES),
    12: _row(np.uint32, _UINT64S),
    13: _row(np.uint64, _UINT64S),
    14: _row(np.complex64, _FLOATS),
    15: _row(np.complex128, _DOUBLES),
    16: _row(ml_dtypes.bfloat16, _INT32S),
    17: _row(ml_dtypes.float8_e4m3fn, _INT32S),
    18: _row(ml_dtypes.float8_e4m3fnuz, _INT32S),
    19: _row(ml_dtypes.float8_e5m2, _INT32S),
    20: _row(ml_dtypes.float8_e5m2fnuz, _INT32S),
    21: _row(ml_dtypes.uint4, _INT32S),
    22: _row(ml_dtypes.int4, _INT32S),
    23: _row(ml_dtypes.float4_e2m1fn, _INT32S),
    24: _row(ml_dtypes.float8_e8m0fnu, _INT32S),
    25: _row(ml_dtypes.uint2, _INT32S),
    26: _row(ml_dtypes.int2, _INT32S),
    27: _row(ml_dtypes.float6_e2m3fn, _INT32S),
    28: _row(ml_dtypes.float6_e3m2fn, _INT32S),
}
DTYPES = {number: dtype for number, (dtype, _) in _ROWS.items()}


@dataclass(kw_only=True, slots=True)
class TensorRecord:
    """One TensorProto, whose values have not been read."""

    span: Span
    name: str = ""
    type: int = 0
    dims: list[int] = field(default_factory=list)
    raw: Span | None = None
    is_external: bool = False
    external: dict[str, str] = field(default_factory=dict)
    is_segment: bool = False


def parse(wire: Wire, span: Span) -> TensorRecord:
    """Return the record of the TensorProto in a span of the file.

    Raises:
        FormatError: the bytes are not a TensorProto.
    """
    record = TensorRecord(span=span)
    for part in wire.fields(span, "TensorProto"):
        if part.number == DIMS:
            wire.add_dimensions(record.dims, part, "TensorProto", most=_MOST_DIMENSIONS)
        elif part.number == TYPE:
            record.type = part.value
        elif part.number == NAME:
            record.name = wire.text(part, "TensorProto")
        elif part.number == RAW and part.kind == BYTES:
            record.raw = part.span
        elif part.number == EXTERNAL and part.kind == BYTES:
            items = (item for item in wire.fields(part.span, "TensorProto") if item.number in (1, 2))
            entry = {item.number: wire.text(item, "TensorProto") for item in items}
            if record.external.setdefault(key := entry.get(1, ""), text := entry.get(2, "")) != text:
                raise wire.wrong("TensorProto", part.whole[0], f"two values of {key!r} in external data")
        elif part.number == LOCATION:
            record.is_external = part.value & _INT32 == _IS_EXTERNAL
        elif part.number == SEGMENT:
            record.is_segment = True
    return record


def without_values(source: Source, wire: Wire, record: TensorRecord) -> bytes:
    """Return the fields of a TensorProto that are neither its values nor their location."""
    parts = wire.fields(record.span, "TensorProto")
    return b"".join(source.bytes(*part.whole) for part in parts if part.number not in VALUES)


def external_fields(location: str, offset: int, length: int) -> bytes:
    """Return the fields of a TensorProto whose values lie in another file."""
    said = {"location": location, "offset": str(offset), "length": str(length)}
    entries = [bytes_field(1, key.encode()) + bytes_field(2, text.encode()) for key, text in said.items()]
    return b"".join(bytes_field(EXTERNAL, entry) for entry in entries) + int_field(LOCATION, _IS_EXTERNAL)


def array_of(source: Source, record: TensorRecord, budget: Budget) -> LazyArray:
    """Return the tensor; whether the number of values in a typed field is right is checked when they are read.

    Raises:
        FormatError, SizeMismatch: the values do not match the shape and type, or lie outside their file.
        UnsafeContent: external data is outside the folder of the model.
        CheckpointNotFound: a file with external data is missing.
    """
    row = _ROWS.get(record.type)
    if row is None or record.is_segment:
        error = UnsupportedDtype(
            "tensors of strings are not supported"
            if record.type == _STRING
            else "this kind of tensor is not supported",
            path=source.path,
            variable=record.name,
            found="a segment" if record.is_segment else f"data type {record.type}",
            hint="leave it out",
        )
        return refused_array(record.dims, error)
    dtype, typed = row
    if record.is_external:
        content, span = _external(source, record, dtype)
        budget.include(content)
        return array_of_spans(content, [span], record.dims, dtype, variable=record.name)
    if record.raw is not None:
        return array_of_spans(source, [record.raw], record.dims, dtype, variable=record.name)
    shape = tuple(record.dims)
    count = count_elements(shape, dtype.itemsize, path=source.path, variable=record.name)
    if packed_size(count, dtype) > 8 * record.span[1]:
        raise _misfit(source, record, f"{record.span[1]} bytes of message", f"{count} values")
    return LazyArray(shape, dtype, lambda: _typed(source, record, typed, count, dtype).reshape(shape))


def _external(source: Source, record: TensorRecord, dtype: np.dtype[Any]) -> tuple[Source, Span]:
    location = record.external.get("location", "")
    folder = os.path.dirname(source.path) or "."
    data = Source(inside(folder, location, stated_by=source.path, variable=record.name))
    count = count_elements(tuple(record.dims), dtype.itemsize, path=source.path, variable=record.name)
    try:
        offset = int(record.external.get("offset") or 0)
        length = int(record.external.get("length") or packed_size(count, dtype))
    except ValueError:
        raise FormatError(
            "offset and length of external data must be integers",
            path=source.path,
            variable=record.name,
            found=str(record.external)[:120],
        ) from None
    return data, (offset, length)


def _typed(source: Source, record: TensorRecord, typed: int, count: int, dtype: np.dtype[Any]) -> np.ndarray:
    """Return the values of a typed field, whose elements may be written one by one, or packed in one or more parts."""
    width = {_FLOATS: FIXED32, _DOUBLES: FIXED64}.get(typed)
    collected = bytearray()
    with stream_of(source) as stream:
        wire = Wire(stream, source.path)
        for part in wire.fields(record.span, "TensorProto"):
            if part.number != typed:
                continue
            if part.kind not in (BYTES, VARINT if width is None else width):
                raise wire.wrong("TensorProto", part.whole[0], f"wire type {part.kind} for values")
            collected += wire.read(part)
    if width is not None:
        raw = np.frombuffer(bytes(collected), np.uint8)
        if raw.size != count * dtype.itemsize:
            raise _misfit(source, record, f"{raw.size} bytes", f"{count * dtype.itemsize} for {count} values")
        return raw.copy().view(dtype)
    values = varints(bytes(collected))
    narrow = bits_of(dtype) in (2, 4)
    expected = packed_size(count, dtype) if narrow else count
    if values is None or values.size != expected:
        found = "a truncated integer" if values is None else f"{values.size} integers"
        raise _misfit(source, record, found, f"{expected} for {count} values")
    if narrow:
        return unpack(values.astype(np.uint8), count, dtype)
    bits: np.ndarray = values != 0 if dtype == np.bool_ else values.astype(f"u{dtype.itemsize}")
    return bits.view(dtype)


def _misfit(source: Source, record: TensorRecord, found: str, expected: str) -> SizeMismatch:
    return SizeMismatch(
        "the values of the tensor do not match its shape and type",
        path=source.path,
        variable=record.name,
        found=found,
        expected=expected,
        hint="the file is damaged",
    )
