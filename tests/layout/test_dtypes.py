"""The one table of data types: equal to the proto, to FORMAT F3, and complete."""

from __future__ import annotations

import re

import ml_dtypes
import numpy as np
import pytest
from support import all_dtypes

from varstore._gen import variable_meta_pb2
from varstore.errors import UnsupportedDtype
from varstore.layout.dtypes import BY_NAME, BY_NUMBER, TABLE, data_type_of, dtype_of

pytestmark = pytest.mark.core

F3 = {
    "kChar": (1, "int8"),
    "kFloat": (2, "float32"),
    "kDouble": (3, "float64"),
    "kInt8": (4, "int8"),
    "kInt32": (5, "int32"),
    "kInt64": (6, "int64"),
    "kUInt8": (7, "uint8"),
    "kOFRecord": (8, None),
    "kFloat16": (9, "float16"),
    "kTensorBuffer": (10, None),
    "kBFloat16": (11, "bfloat16"),
    "kBool": (12, "bool"),
    "kUInt16": (13, "uint16"),
    "kUInt32": (14, "uint32"),
    "kUInt64": (15, "uint64"),
    "kUInt128": (16, None),
    "kInt16": (17, "int16"),
    "kInt128": (18, None),
    "kComplex32": (19, None),
    "kComplex64": (20, "complex64"),
    "kComplex128": (21, "complex128"),
    # varstore's own: once given, never changed
    "kFloat8E3M4": (1000, "float8_e3m4"),
    "kFloat8E4M3": (1001, "float8_e4m3"),
    "kFloat8E4M3B11FNUZ": (1002, "float8_e4m3b11fnuz"),
    "kFloat8E4M3FN": (1003, "float8_e4m3fn"),
    "kFloat8E4M3FNUZ": (1004, "float8_e4m3fnuz"),
    "kFloat8E5M2": (1005, "float8_e5m2"),
    "kFloat8E5M2FNUZ": (1006, "float8_e5m2fnuz"),
    "kFloat8E8M0FNU": (1007, "float8_e8m0fnu"),
    "kFloat6E2M3FN": (1008, "float6_e2m3fn"),
    "kFloat6E3M2FN": (1009, "float6_e3m2fn"),
    "kFloat4E2M1FN": (1010, "float4_e2m1fn"),
    "kInt4": (1011, "int4"),
    "kUInt4": (1012, "uint4"),
    "kInt2": (1013, "int2"),
    "kUInt2": (1014, "uint2"),
}
NEWER_THAN_THE_PINNED_ML_DTYPES = {"int1", "uint1", "complex32", "bcomplex32"}  # 0.6; the minimum is 0.5.1


def test_the_table_is_the_law():
    assert {row.name: (row.number, row.dtype and row.dtype.name) for row in TABLE} == F3


def test_the_table_is_the_enum_of_the_proto():
    enum = dict(variable_meta_pb2.DataType.items())
    assert enum.pop("kInvalidDataType") == 0
    assert {row.name: row.number for row in TABLE} == enum


def test_names_and_numbers_are_unique_and_types_little_endian():
    assert len(BY_NAME) == len(BY_NUMBER) == len(TABLE)
    assert all(row.dtype.str[0] in "<|" for row in TABLE if row.dtype is not None)


def test_every_type_of_ml_dtypes_has_a_row():
    scalars = {name for name, value in vars(ml_dtypes).items() if isinstance(value, type) and name[-1].isalnum()}
    types = {name for name in scalars if re.fullmatch(r"b?(float|u?int|complex)\d+(_\w+)?", name)}
    missing = types - {row.dtype.name for row in TABLE if row.dtype is not None} - NEWER_THAN_THE_PINNED_ML_DTYPES
    assert not missing, f"ml_dtypes {ml_dtypes.__version__} has types without a row in the table: {missing}"
    assert {"bfloat16", "float8_e4m3fn", "float6_e2m3fn", "float4_e2m1fn", "int4", "uint2"} <= types


@pytest.mark.parametrize("row", [row for row in TABLE if row.written], ids=lambda row: row.name)
def test_a_type_that_is_written_comes_back(row):
    assert dtype_of(row) == row.dtype
    assert data_type_of(row.dtype) is row
    assert data_type_of(row.dtype.newbyteorder(">")) is row


def test_one_byte_holds_one_element_of_a_sub_byte_type():
    assert {dtype.itemsize for dtype in all_dtypes if dtype.name.startswith(("int4", "uint4", "int2", "uint2"))} == {1}
    assert {dtype.itemsize for dtype in all_dtypes if dtype.name.startswith(("float4_", "float6_", "float8_"))} == {1}


def test_char_is_read_as_int8_and_never_written():
    assert dtype_of(BY_NAME["kChar"]) == np.int8
    assert data_type_of(np.dtype(np.int8)).name == "kInt8"


@pytest.mark.parametrize("char", "?bhilqBHILQefdFD")
def test_every_plain_type_of_c_has_its_row(char):
    dtype = np.dtype(char)
    assert data_type_of(dtype).dtype == dtype


@pytest.mark.parametrize(
    ("dtype", "what"),
    [
        ("O", "Python objects cannot be saved: found dtype object"),
        ("S3", r"byte strings cannot be saved: found dtype \|S3"),
        ("U3", "text cannot be saved: found dtype <U3"),
        ("M8[s]", r"dates cannot be saved: found dtype datetime64\[s\]"),
        ("m8[s]", r"time differences cannot be saved: found dtype timedelta64\[s\]"),
        ("V4", r"structured or void values cannot be saved: found dtype \|V4"),
        ([("x", "f4"), ("y", "f4")], "structured or void values cannot be saved"),
        (np.dtype((np.float32, (2,))), "cannot be saved"),
        ("g", "long doubles cannot be saved: found dtype float128"),
        ("G", "complex long doubles cannot be saved: found dtype complex256"),
    ],
)
def test_other_types_are_refused_by_name(dtype, what):
    with pytest.raises(UnsupportedDtype, match=f"variable 'v': .*{what}") as caught:
        data_type_of(np.dtype(dtype), variable="v")
    assert "expected a boolean, integer, floating or complex type. Leave the variable out, convert it" in str(
        caught.value
    )


@pytest.mark.skipif(not hasattr(np.dtypes, "StringDType"), reason="numpy 2 has it")
def test_variable_width_strings_are_refused():
    with pytest.raises(UnsupportedDtype, match="text cannot be saved"):
        data_type_of(np.dtypes.StringDType())


@pytest.mark.parametrize("name", sorted(NEWER_THAN_THE_PINNED_ML_DTYPES))
def test_types_of_a_newer_ml_dtypes_are_refused_and_not_confused(name):
    if not hasattr(ml_dtypes, name):
        pytest.skip(f"this ml_dtypes has no {name}")
    with pytest.raises(UnsupportedDtype, match=f"found dtype {name}"):
        data_type_of(np.dtype(getattr(ml_dtypes, name)))


@pytest.mark.parametrize("name", [row.name for row in TABLE if row.dtype is None])
def test_a_type_without_numpy_equivalent_is_an_error_that_says_so(name):
    with pytest.raises(UnsupportedDtype) as caught:
        dtype_of(BY_NAME[name], path="p", variable="v")
    assert str(caught.value) == (
        "p: variable 'v': this data type has no numpy equivalent and cannot be read: "
        f"found {name} ({BY_NAME[name].number}). Leave the variable out with exclude="
    )
