"""The text of ``meta``: what we write is what protobuf and OneFlow write, what we read is any legal spelling."""

from __future__ import annotations

import math

import numpy as np
import pytest
from google.protobuf import text_format
from hypothesis import example, given, settings, strategies as st
from support import FIXTURES, load_facts

from varstore._gen import variable_meta_pb2
from varstore.errors import MetaError
from varstore.layout.dtypes import BY_NAME, BY_NUMBER, TABLE, data_type_of
from varstore.layout.meta import Meta, encode_meta, parse_meta

pytestmark = pytest.mark.core

shapes = (
    st.lists(st.one_of(st.integers(0, 9), st.integers(0, 1 << 20)), max_size=6)
    .map(tuple)
    .filter(lambda shape: math.prod(extent or 1 for extent in shape) * 16 < 1 << 63)
)
metas = st.builds(lambda shape, row: Meta(shape=shape, data_type=row), shapes, st.sampled_from(TABLE))

WRITTEN = [
    ((2, 3), "kFloat", "shape {\n  dim: 2\n  dim: 3\n}\ndata_type: kFloat\n"),
    ((), "kInt64", "shape {\n}\ndata_type: kInt64\n"),
    ((0, 4), "kBool", "shape {\n  dim: 0\n  dim: 4\n}\ndata_type: kBool\n"),
    ((1,), "kFloat8E4M3FN", "shape {\n  dim: 1\n}\ndata_type: kFloat8E4M3FN\n"),
    ((1 << 60,), "kInt8", "shape {\n  dim: 1152921504606846976\n}\ndata_type: kInt8\n"),
]

LEGAL = [
    ("shape { dim: 2 dim: 3 } data_type: kFloat", (2, 3), "kFloat"),
    ("shape{dim:2 dim:3}data_type:kFloat", (2, 3), "kFloat"),
    ("shape: { dim: [2, 3] } data_type: kFloat", (2, 3), "kFloat"),
    ("shape { dim: [] } data_type: kFloat", (), "kFloat"),
    ("shape < dim: 2; dim: 3 >; data_type: kFloat;", (2, 3), "kFloat"),
    ("data_type: kFloat, shape { dim: 2, dim: 3, }", (2, 3), "kFloat"),
    ("data_type: kFloat shape { dim: 2 dim: [3] }", (2, 3), "kFloat"),
    ("data_type: 2 shape { dim: 0x2 dim: 03 }", (2, 3), "kFloat"),
    ("data_type: 1003 shape { dim: 2 }", (2,), "kFloat8E4M3FN"),
    ("# by hand\nshape {\n\tdim: 2 # rows\n}\n\n\ndata_type: kFloat # é", (2,), "kFloat"),
    ("shape {\r\n  dim: 2\r\n}\r\ndata_type: kFloat\r\n", (2,), "kFloat"),
    ("data_type: kInt64", (), "kInt64"),
    ("shape {} data_type: kInt64", (), "kInt64"),
    ("shape { dim: 0 } data_type: kChar", (0,), "kChar"),
    ("shape { dim: 2 } data_type: kOFRecord", (2,), "kOFRecord"),
    ("shape { dim: 0 dim: 4611686018427387904 } data_type: kInt8", (0, 1 << 62), "kInt8"),
    ("shape { dim: 9223372036854775807 } data_type: kInt8", ((1 << 63) - 1,), "kInt8"),
]

REFUSED = {
    "empty": (b"", "data_type: the data type is missing: expected a name such as kFloat"),
    "no data type": (b"shape {\n  dim: 2\n}\n", "data_type: the data type is missing"),
    "invalid data type": (b"shape {\n}\ndata_type: kInvalidDataType\n", "data_type: the data type is missing"),
    "unknown type name": (b"shape {\n}\ndata_type: kFloat7\n", "kFloat7"),
    "unknown type number": (b"shape {\n}\ndata_type: 99\n", "99"),
    "unknown field": (b"shape {\n}\ndata_type: kFloat\nstrides: 3\n", "strides"),
    "unknown field of shape": (b"shape { dim: 1 rank: 1 } data_type: kFloat", "rank"),
    "repeated shape": (b"shape { dim: 1 } shape { dim: 2 } data_type: kFloat", "shape"),
    "repeated data type": (b"shape { } data_type: kFloat data_type: kFloat", "data_type"),
    "negative dimension": (b"shape { dim: 2 dim: -3 } data_type: kFloat", r"shape: a dimension is negative: .*2, -3"),
    "minus one": (b"shape { dim: -1 } data_type: kFloat", r"shape: a dimension is negative: found \[-1\]"),
    "not an integer": (b"shape { dim: 2.5 } data_type: kFloat", "2.5"),
    "beyond int64": (b"shape {\n  dim: 9223372036854775808\n}\ndata_type: kInt8\n", "overflow.* less than 2\\^63"),
    "far beyond int64": (b"shape { dim: 18446744073709551617 } data_type: kInt8", "18446744073709551617"),
    "overflow of the product": (
        b"shape {\n  dim: 4294967296\n  dim: 2147483648\n}\ndata_type: kInt8\n",
        r"shape: the dimensions overflow: found \[4294967296, 2147483648\] of 1 byte each, expected less than 2\^63",
    ),
    "overflow that wraps to a small size": (
        b"shape {\n  dim: 4294967296\n  dim: 4294967296\n  dim: 3\n}\ndata_type: kFloat\n",
        "the dimensions overflow",
    ),
    "overflow in bytes only": (b"shape {\n  dim: 2305843009213693952\n}\ndata_type: kFloat\n", "of 4 bytes each"),
    "overflow beside a zero": (
        b"shape {\n  dim: 0\n  dim: 4294967296\n  dim: 2147483648\n}\ndata_type: kInt8\n",
        "the dimensions overflow",
    ),
    "too many dimensions": (
        b"shape {\n" + b"  dim: 1\n" * 65 + b"}\ndata_type: kInt8\n",
        "shape: too many dimensions: found 65, expected at most 64",
    ),
    "byte-order mark": (b"\xef\xbb\xbfshape {\n}\ndata_type: kFloat\n", "not a description of a variable"),
    "not UTF-8": (b"shape {\n}\ndata_type: k\xe9\n", "not UTF-8 text: found byte 0xe9 at 22"),
    "UTF-16": ("shape {\n}\n".encode("utf-16"), "not UTF-8 text: found byte 0xff at 0"),
    "NUL": (b"shape {\n}\ndata_type: kFloat\n\0", "not a description of a variable"),
    "torn": (b"shape {\n  dim: 2\n  di", "not a description of a variable"),
    "binary": (b"\x12\x04\x08\x02\x08\x03\x18\x02", "not a description of a variable"),
    "JSON": (b'{"shape": [2, 3], "data_type": "kFloat"}', "not a description of a variable"),
    "extension": (b"data_type: kFloat [google.protobuf.Any] { }", "not a description of a variable"),
    "deep": (b"shape " + b"{ shape " * 5000, "not a description of a variable"),
}


def parsed(text: bytes) -> tuple[tuple[int, ...], int] | None:
    try:
        meta = parse_meta(text, path="v/meta")
    except MetaError:
        return None
    return meta.shape, meta.data_type.number


def parsed_by_protobuf(text: bytes) -> tuple[tuple[int, ...], int] | None:
    try:
        message = text_format.Parse(text.decode(), variable_meta_pb2.VariableMeta())
    except (UnicodeDecodeError, text_format.ParseError):
        return None
    shape = tuple(message.shape.dim)
    if message.data_type not in BY_NUMBER or len(shape) > 64 or min(shape, default=0) < 0:
        return None
    dtype = BY_NUMBER[message.data_type].dtype
    size = math.prod(extent or 1 for extent in shape) * (1 if dtype is None else dtype.itemsize)
    return None if size >= 1 << 63 else (shape, message.data_type)


def printed_by_protobuf(meta: Meta) -> bytes:
    message = variable_meta_pb2.VariableMeta(data_type=meta.data_type.number)
    message.shape.SetInParent()
    message.shape.dim.extend(meta.shape)
    return text_format.MessageToString(message).encode()


# --- writing -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "name", "text"), WRITTEN)
def test_the_text_is_exactly_this_in_both_directions(shape, name, text):
    meta = Meta(shape=shape, data_type=BY_NAME[name])
    assert encode_meta(meta) == text.encode()
    assert parse_meta(text.encode(), path="v/meta") == meta


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.name)
def test_every_type_is_written_as_protobuf_prints_it(row):
    for shape in [(), (0,), (7,), (2, 0, 3)]:
        meta = Meta(shape=shape, data_type=row)
        assert encode_meta(meta) == printed_by_protobuf(meta)


@given(metas)
def test_any_shape_is_written_as_protobuf_prints_it_and_comes_back(meta):
    text = encode_meta(meta)
    assert text == printed_by_protobuf(meta)
    assert parse_meta(text, path="v/meta") == meta
    assert meta.elements == np.prod(meta.shape, dtype=object)


@pytest.mark.parametrize("fixture", ["dtypes_legacy", "lenet_legacy", "lenet_legacy_nometa"])
def test_oneflow_wrote_the_same_bytes(fixture):
    tensors = load_facts(FIXTURES / "oneflow" / fixture)["tensors"]
    seen = 0
    for name, facts in tensors.items():
        path = FIXTURES / "oneflow" / fixture / name / "meta"
        if "meta_file" in facts:  # the truth says: absent
            assert not path.exists()
            continue
        meta = Meta(shape=tuple(facts["shape"]), data_type=data_type_of(np.dtype(facts["dtype"])))
        assert path.read_bytes() == encode_meta(meta)
        assert parse_meta(path.read_bytes(), path=str(path)) == meta
        seen += 1
    assert seen >= len(tensors) - 1 >= 8


# --- reading -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "shape", "name"), LEGAL)
def test_any_legal_spelling_is_read(text, shape, name):
    assert parse_meta(text.encode(), path="v/meta") == Meta(shape=shape, data_type=BY_NAME[name])


@pytest.mark.parametrize("case", REFUSED)
def test_each_refusal_names_the_file_and_the_fault(case):
    text, fault = REFUSED[case]
    with pytest.raises(MetaError, match=f"(?s)^ckpt/v/meta: .*{fault}") as caught:
        parse_meta(text, path="ckpt/v/meta")
    assert caught.value.path == "ckpt/v/meta"
    assert parsed_by_protobuf(text) is None


TOKENS = [
    *(b"", b"\n", b" ", b"\t", b"\r", b"\0", b"#", b"0", b"1", b"9", b"-", b"+", b".", b"x", b"u", b"_", b"'", b'"'),
    *(
        b"shape",
        b"dim",
        b"data_type",
        b": ",
        b":",
        b"{",
        b"}",
        b"<",
        b">",
        b"[",
        b"]",
        b",",
        b";",
        b"/",
        b"\\",
        b"\xff",
    ),
    *(b"  dim: 2\n", b"shape {\n}\n", b"data_type: kFloat\n", b"kFloat", b"kInt8", b"kChar", b"k", b"float", b"2"),
    *(b"9223372036854775807", b"9223372036854775808", b"99999999999999999999", b"1e3", b"0x7f", b"017", b"08", b"inf"),
    *(
        "é".encode(),
        "\ufeff".encode(),
        "２".encode(),
        "\u2028".encode(),
        b"[a.b/c]",
        b"true",
        b"\x0c",
        b"\x0b",
        b"\x85",
    ),
]


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    text = encode_meta(draw(metas))
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(text)))
        stop = min(len(text), start + draw(st.integers(0, 8)))
        text = text[:start] + draw(st.sampled_from(TOKENS)) + text[stop:]
    return text


@settings(max_examples=500)
@given(mutated())
@example(b"shape {\n  dim: 00\n}\ndata_type: kFloat\n")
@example(b"shape {\n  dim: 01\n}\ndata_type: kFloat\n")
@example(b"shape {\n  dim: 9999999999999999999\n}\ndata_type: kInt8\n")
@example(b"shape {\n}\ndata_type: kInvalidDataType\n")
@example(b"shape {\n}\ndata_type: kFloat\n\n")
def test_the_pattern_and_protobufs_parser_agree_on_any_text(text):
    assert parsed(text) == parsed_by_protobuf(text)


@given(st.one_of(st.binary(max_size=40), st.lists(st.sampled_from(TOKENS), max_size=12).map(b"".join)))
def test_no_text_raises_anything_but_meta_error(text):
    assert parsed(text) == parsed_by_protobuf(text)
