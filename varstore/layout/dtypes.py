"""The table of data types: name and number on disk, and the numpy type (FORMAT F3).

Numbers below 1000 are OneFlow's own. Numbers from 1000 up are varstore's, for types of `ml_dtypes` that OneFlow never
had. Checkpoints contain these names and numbers, so a number never changes its meaning.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from varstore.errors import UnsupportedDtype

__all__ = ["BFLOAT16", "BY_NAME", "BY_NUMBER", "TABLE", "DataType", "data_type_of", "dtype_of"]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class DataType:
    """One row of the table, compared by identity.

    `dtype` is None for a type that OneFlow has and numpy does not. `written` is false for a type that is only read.
    """

    name: str
    number: int
    dtype: np.dtype[Any] | None
    written: bool = True

    def __reduce__(self) -> tuple[Callable[[int], DataType], tuple[int]]:
        return _numbered, (self.number,)


def _numbered(number: int) -> DataType:
    return BY_NUMBER[number]


def _row(name: str, number: int, scalar: Any, *, written: bool = True) -> DataType:
    dtype = None if scalar is None else np.dtype(scalar).newbyteorder("<")
    return DataType(name=name, number=number, dtype=dtype, written=written and dtype is not None)


TABLE: tuple[DataType, ...] = (
    _row("kChar", 1, np.int8, written=False),
    _row("kFloat", 2, np.float32),
    _row("kDouble", 3, np.float64),
    _row("kInt8", 4, np.int8),
    _row("kInt32", 5, np.int32),
    _row("kInt64", 6, np.int64),
    _row("kUInt8", 7, np.uint8),
    _row("kOFRecord", 8, None),
    _row("kFloat16", 9, np.float16),
    _row("kTensorBuffer", 10, None),
    _row("kBFloat16", 11, ml_dtypes.bfloat16),
    _row("kBool", 12, np.bool_),
    _row("kUInt16", 13, np.uint16),
    _row("kUInt32", 14, np.uint32),
    _row("kUInt64", 15, np.uint64),
    _row("kUInt128", 16, None),
    _row("kInt16", 17, np.int16),
    _row("kInt128", 18, None),
    _row("kComplex32", 19, None),
    _row("kComplex64", 20, np.complex64),
    _row("kComplex128", 21, np.complex128),
    _row("kFloat8E3M4", 1000, ml_dtypes.float8_e3m4),
    _row("kFloat8E4M3", 1001, ml_dtypes.float8_e4m3),
    _row("kFloat8E4M3B11FNUZ", 1002, ml_dtypes.float8_e4m3b11fnuz),
    _row("kFloat8E4M3FN", 1003, ml_dtypes.float8_e4m3fn),
    _row("kFloat8E4M3FNUZ", 1004, ml_dtypes.float8_e4m3fnuz),
    _row("kFloat8E5M2", 1005, ml_dtypes.float8_e5m2),
    _row("kFloat8E5M2FNUZ", 1006, ml_dtypes.float8_e5m2fnuz),
    _row("kFloat8E8M0FNU", 1007, ml_dtypes.float8_e8m0fnu),
    _row("kFloat6E2M3FN", 1008, ml_dtypes.float6_e2m3fn),
    _row("kFloat6E3M2FN", 1009, ml_dtypes.float6_e3m2fn),
    _row("kFloat4E2M1FN", 1010, ml_dtypes.float4_e2m1fn),
    _row("kInt4", 1011, ml_dtypes.int4),
    _row("kUInt4", 1012, ml_dtypes.uint4),
    _row("kInt2", 1013, ml_dtypes.int2),
    _row("kUInt2", 1014, ml_dtypes.uint2),
)

BY_NAME: dict[str, DataType] = {row.name: row for row in TABLE}
BY_NUMBER: dict[int, DataType] = {row.number: row for row in TABLE}
BFLOAT16: DataType = BY_NAME["kBFloat16"]

_BY_SCALAR = {row.dtype.type: row for row in TABLE if row.dtype is not None and row.written}
# numpy has separate types for C's long and long long, even on platforms where both have the same size. The table
# contains only one of them, so the other is mapped to the row of its size.
_BY_SCALAR |= {np.dtype(char).type: _BY_SCALAR[np.dtype(np.dtype(char).str).type] for char in "lLqQ"}
_NOT_PLAIN = {
    "O": "Python objects",
    "S": "byte strings",
    "U": "text",
    "T": "text",
    "g": "long doubles",
    "G": "complex long doubles",
    "M": "dates",
    "m": "time differences",
    "V": "structured or void values",
}


def data_type_of(dtype: np.dtype[Any], *, variable: str | None = None) -> DataType:
    """Return the row for values of this numpy type, in any byte order.

    Raises:
        UnsupportedDtype: the format cannot store the type (objects, text, dates, structs, long doubles).
    """
    row = _BY_SCALAR.get(dtype.type)
    if row is not None and dtype.fields is None and dtype.subdtype is None:
        return row
    what = "structured or void values" if dtype.fields is not None else _NOT_PLAIN.get(dtype.char, "such values")
    raise UnsupportedDtype(
        f"{what} cannot be saved",
        variable=variable,
        found=f"dtype {dtype}",
        expected="a boolean, integer, floating or complex type",
        hint="leave the variable out, convert it, or store it in attributes if it is JSON",
    )


def dtype_of(row: DataType, *, path: str | None = None, variable: str | None = None) -> np.dtype[Any]:
    """Return the numpy type of a row, little-endian.

    Raises:
        UnsupportedDtype: numpy does not have the type.
    """
    if row.dtype is None:
        raise UnsupportedDtype(
            "this data type has no numpy equivalent and cannot be read",
            path=path,
            variable=variable,
            found=f"{row.name} ({row.number})",
            hint="leave the variable out with exclude=",
        )
    return row.dtype
