"""Hostile files of the formats without pickle: each is one clear error, in bounded time and memory."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import subprocess
import sys
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from varstore.errors import (
    CheckpointNotFound,
    DigestMismatch,
    FormatError,
    SizeMismatch,
    UnsafeContent,
    UnsupportedDtype,
    VarstoreError,
)
from varstore.formats import numpy, registry, safetensors, verbs
from varstore.formats.binary import wire
from varstore.formats.mindspore import messages as mindspore
from varstore.formats.onnx import model as onnx
from varstore.formats.zarr import tree as zarr

DATA = Path(__file__).resolve().parents[1] / "data" / "formats"
MOST_MEMORY = 32 << 20
HUGE = 1 << 40

Case = tuple[str, Callable[[Path], Any], str, type[VarstoreError], str]


def refuses(path: Path, format: str, error: type[VarstoreError], message: str) -> None:
    """Read everything: it must end in exactly this error, naming where, without much memory."""
    tracemalloc.start()
    try:
        with pytest.raises(error, match=message) as raised:
            verbs.read(path, format).state()
        assert tracemalloc.get_traced_memory()[1] < MOST_MEMORY
    finally:
        tracemalloc.stop()
    assert str(path.parent) in str(raised.value)


# safetensors


def header(text: object, data: bytes = b"", length: int | None = None) -> Callable[[Path], object]:
    raw = text if isinstance(text, bytes) else json.dumps(text).encode()
    return lambda path: path.write_bytes((len(raw) if length is None else length).to_bytes(8, "little") + raw + data)


def tensor(begin: int, end: int, shape: object = (2,), dtype: object = "U8") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


SAFETENSORS: tuple[Case, ...] = tuple(
    (name, make, "safetensors", error, message)
    for name, make, error, message in (
        ("empty", lambda path: path.write_bytes(b""), FormatError, "the file is empty"),
        ("length beyond the file", header({}, length=HUGE), SizeMismatch, "longer than the file:"),
        ("length beyond any file", header({}, length=2**64 - 1), SizeMismatch, "longer than the file:"),
        ("no JSON", header(b"{x}"), FormatError, "not valid JSON"),
        ("no UTF-8", header(b'{"\xff": 1}'), FormatError, "not valid JSON"),
        ("nested", header(b'{"a":' + b"[" * 100_000), FormatError, "not valid JSON"),
        ("long number", header(b'{"a":' + b"9" * 5000 + b"}"), FormatError, "not valid JSON"),
        ("a list", header([]), FormatError, "must be a JSON object"),
        ("twice", header(b'{"a":1,"a":2}'), FormatError, "the name 'a' occurs twice"),
        ("missing fields", header({"a": {"dtype": "U8"}}), FormatError, "must have dtype, shape"),
        ("not a dict", header({"a": 3}), FormatError, "must have dtype, shape"),
        ("type", header({"a": tensor(0, 2, dtype="X9")}, b"12"), UnsupportedDtype, "data type is unknown"),
        ("type list", header({"a": tensor(0, 2, dtype=[])}, b"12"), UnsupportedDtype, "data type is unknown"),
        ("shape", header({"a": tensor(0, 2, shape=3)}, b"12"), FormatError, "must be a list"),
        ("negative", header({"a": tensor(0, 2, shape=[-1, -2])}, b"12"), FormatError, "no array can have this shape"),
        ("fraction", header({"a": tensor(0, 2, shape=[2.0])}, b"12"), FormatError, "no array can have this shape"),
        ("true", header({"a": tensor(0, 2, shape=[True, 2])}, b"12"), FormatError, "no array can have this shape"),
        ("dimensions", header({"a": tensor(0, 1, shape=[1] * 100)}, b"1"), FormatError, "no array can have this shape"),
        (
            "overflow",
            header({"a": tensor(0, 2, shape=[2**40, 2**40])}, b"12"),
            FormatError,
            "no array can have this shape",
        ),
        (
            "empty overflow",
            header({"a": tensor(0, 0, shape=[0, 2**62, 2**62])}),
            FormatError,
            "no array can have this shape",
        ),
        ("too large", header({"a": tensor(0, 2, shape=[HUGE])}, b"12"), SizeMismatch, "does not match its shape"),
        ("too small", header({"a": tensor(0, 2, shape=[1])}, b"12"), SizeMismatch, "does not match its shape"),
        ("half a byte", header({"a": tensor(0, 2, shape=[3], dtype="F4")}, b"12"), FormatError, "whole byte"),
        ("offsets", header({"a": {**tensor(0, 2), "data_offsets": [0]}}, b"12"), FormatError, "two integers"),
        ("offset text", header({"a": {**tensor(0, 2), "data_offsets": ["0", 2]}}, b"12"), FormatError, "two integers"),
        ("overlap", header({"a": tensor(0, 2), "b": tensor(1, 3)}, b"123"), FormatError, "overlaps another"),
        ("same", header({"a": tensor(0, 2), "b": tensor(0, 2)}, b"12"), FormatError, "overlaps another"),
        ("hole", header({"a": tensor(0, 2), "b": tensor(3, 5)}, b"12345"), FormatError, "do not belong to a tensor"),
        ("hole first", header({"a": tensor(1, 3)}, b"123"), FormatError, "do not belong to a tensor"),
        ("backwards", header({"a": tensor(2, 0)}, b"12"), FormatError, "belong to no tensor|before it begins"),
        ("negative offset", header({"a": tensor(-2, 0)}, b"12"), FormatError, "overlaps another"),
        ("behind the end", header({"a": tensor(0, 2)}, b"1"), SizeMismatch, "do not end at the end of the file"),
        ("appended", header({"a": tensor(0, 2)}, b"123"), SizeMismatch, "do not end at the end of the file"),
        ("metadata", header({"__metadata__": {"a": 1}}), FormatError, "must be names and text"),
    )
)


@pytest.mark.parametrize("target", ["../x.safetensors", "/etc/passwd", "..", "", "a/b.safetensors", 3])
def test_an_index_may_not_lead_out(tmp_path, target):
    path = tmp_path / "m.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": {"a": target}}))
    refuses(path, "safetensors", UnsafeContent, "outside its folder")


def test_an_index_that_lies(tmp_path):
    path = tmp_path / "m.safetensors.index.json"
    safetensors.write(str(tmp_path / "part.safetensors"), {"b": np.ones(1)})
    path.write_text(json.dumps({"weight_map": {"a": "part.safetensors"}}))
    refuses(path, "safetensors", FormatError, r"not in their files.*\['a'\]")
    path.write_text(json.dumps({"weight_map": {"a": "no.safetensors"}}))
    with pytest.raises(CheckpointNotFound):
        safetensors.read(str(path))
    path.write_text("[]")
    refuses(path, "safetensors", FormatError, "must be a JSON object")


# numpy


def npy(descr: object, shape: object, data: bytes = b"", fortran: object = False, text: bytes | None = None) -> bytes:
    raw = repr({"descr": descr, "fortran_order": fortran, "shape": shape}).encode() if text is None else text
    return b"\x93NUMPY\x02\x00" + struct.pack("<I", len(raw)) + raw + data


def as_file(content: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(content)


def npz(
    content: bytes, name: str = "a.npy", method: int = zipfile.ZIP_STORED, edit: Callable[[bytes], bytes] = bytes
) -> Callable[[Path], object]:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        info = zipfile.ZipInfo("placeholder")
        info.compress_type = method
        info.filename = name
        archive.writestr(info, content)
    return as_file(edit(buffer.getvalue()))


def pickled_objects() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.array([print, None]), allow_pickle=True)
    return buffer.getvalue()


def with_sizes(size: int) -> Callable[[bytes], bytes]:
    """Make both headers of the only member claim `size` bytes unpacked."""

    def edit(raw: bytes) -> bytes:
        at = raw.index(b"PK\1\2")
        raw = raw[: at + 24] + struct.pack("<I", size) + raw[at + 28 :]
        return raw[:22] + struct.pack("<I", size) + raw[26:]

    return edit


def overlapping(raw: bytes) -> bytes:
    """Name the one member twice in the directory."""
    at, end = raw.index(b"PK\1\2"), raw.index(b"PK\5\6")
    entry = raw[at:end]
    other = entry.replace(b"a.npy", b"b.npy")
    tail = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 2, 2, 2 * len(entry), at, 0)
    return raw[:at] + entry + other + tail


def damaged(raw: bytes) -> bytes:
    at = raw.index(b"..DATA..")
    return raw[:at] + b"..XXXX.." + raw[at + 8 :]


STORED, DEFLATED, BZIP2 = zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2
GOOD = npy("|u1", (8,), b"..DATA..")

NUMPY: tuple[Case, ...] = tuple(
    (name, make, "numpy", error, message)
    for name, make, error, message in (
        ("nothing", as_file(b""), FormatError, "the file is empty"),
        ("version", as_file(b"\x93NUMPY\x09\x00"), FormatError, "version of the npy format is unknown"),
        ("torn header", as_file(npy("<f4", (1,))[:20]), FormatError, "ends within its header"),
        ("long header", as_file(b"\x93NUMPY\x02\x00" + struct.pack("<I", 2**31)), FormatError, "longer than 10000"),
        ("code", as_file(npy(0, 0, text=b"__import__('os').system('true')")), FormatError, "not a dictionary"),
        ("parentheses", as_file(npy(0, 0, text=b"(" * 9000)), FormatError, "not a dictionary"),
        ("fields", as_file(npy(0, 0, text=b"{'descr': '<f4'}")), FormatError, "not a dictionary"),
        ("unhashable", as_file(npy(0, 0, text=b"{[]: 1}")), FormatError, "not a dictionary"),
        ("type", as_file(npy("<q9", (1,))), FormatError, "not a dictionary"),
        ("type of types", as_file(npy(("<f4", (2,)), (1,))), FormatError, "shape, order or type is impossible"),
        ("no size", as_file(npy("|V0", (10,))), FormatError, "shape, order or type is impossible"),
        ("order", as_file(npy("<f4", (1,), b"1234", fortran=3)), FormatError, "shape, order or type is impossible"),
        ("shape", as_file(npy("<f4", [1], b"1234")), FormatError, "shape, order or type is impossible"),
        ("negative", as_file(npy("<f4", (-1,), b"1234")), FormatError, "no array can have this shape"),
        ("overflow", as_file(npy("<f4", (2**40, 2**40), b"1234")), FormatError, "no array can have this shape"),
        ("too large", as_file(npy("<f4", (HUGE,), b"1234")), SizeMismatch, "do not match its header"),
        ("appended", as_file(npy("<f4", (1,), b"12345")), SizeMismatch, "do not match its header"),
        ("objects", as_file(pickled_objects()), UnsafeContent, "is a pickle, which can run code"),
        ("objects in an archive", npz(pickled_objects()), UnsafeContent, "is a pickle, which can run code"),
        (
            "objects, compressed",
            npz(pickled_objects(), method=DEFLATED),
            UnsafeContent,
            "is a pickle, which can run code",
        ),
        (
            "object in a struct",
            as_file(npy([("a", "|O")], (1,), b"12345678")),
            UnsafeContent,
            "is a pickle, which can run code",
        ),
        ("no directory", as_file(b"PK\3\4" + bytes(50)), SizeMismatch, "ends early"),
        ("overlap", npz(GOOD, edit=overlapping), FormatError, "overlap or lie outside"),
        (
            "damaged and large",
            npz(npy("|u1", (90008,), bytes(90000) + b"..DATA.."), edit=damaged),
            DigestMismatch,
            "not those",
        ),
        ("lzma", npz(GOOD, method=zipfile.ZIP_LZMA), FormatError, "compressed with an unsupported method"),
        ("damaged", npz(GOOD, edit=damaged), DigestMismatch, "damaged|not those that were"),
        (
            "claims more than stored",
            npz(GOOD, edit=with_sizes(2**31)),
            SizeMismatch,
            "larger than its compressed bytes can be",
        ),
        (
            "claims a bomb",
            npz(npy("|u1", (2**31,)), method=DEFLATED, edit=with_sizes(2**31)),
            SizeMismatch,
            "larger than its compressed bytes can be",
        ),
        (
            "bomb behind a small shape",
            npz(npy("|u1", (8,), bytes(50 << 20)), method=DEFLATED),
            SizeMismatch,
            "do not match its header",
        ),
        (
            "bomb behind a small size",
            npz(npy("|u1", (8,), bytes(50 << 20)), method=BZIP2, edit=with_sizes(len(npy("|u1", (8,), bytes(8))))),
            FormatError,
            "damaged|does not decompress to its stated size",
        ),
        (
            "promises more than comes",
            npz(npy("|u1", (2**24,)), method=BZIP2, edit=with_sizes(len(npy("|u1", (2**24,))) + 2**24)),
            FormatError,
            "does not decompress to its stated size|damaged",
        ),
    )
)


# mindspore


def message(number: int, *parts: bytes) -> bytes:
    return wire.bytes_field(number, b"".join(parts))


def value(tag: bytes = b"w", dims: tuple[int, ...] = (2,), kind: bytes = b"UInt8", data: bytes = b"12") -> bytes:
    inner = b"".join(wire.int_field(1, extent) for extent in dims) + message(2, kind) + message(3, data)
    return message(1, message(1, tag), message(2, inner))


MINDSPORE: tuple[Case, ...] = tuple(
    (name, make, "mindspore", error, text)
    for name, make, error, text in (
        ("short content", as_file(value(data=b"1")), SizeMismatch, "does not match its shape"),
        ("long content", as_file(value(data=b"123")), SizeMismatch, "does not match its shape"),
        ("huge shape", as_file(value(dims=(HUGE, 3))), SizeMismatch, "does not match its shape"),
        ("overflow", as_file(value(dims=(2**40, 2**40))), FormatError, "no array can have this shape"),
        ("negative", as_file(value(dims=(-1, -2))), FormatError, "no array can have this shape"),
        ("dimensions", as_file(value(dims=(1,) * 100, data=b"1")), FormatError, "more than 32 dimensions"),
        ("slices differ", as_file(value(dims=(4,)) + value(dims=(5,))), FormatError, "slices of one parameter differ"),
        ("slice types differ", as_file(value(dims=(4,)) + value(dims=(4,), kind=b"Int8")), FormatError, "differ"),
        ("torn", as_file(value()[:-1]), FormatError, "not a Checkpoint message"),
        ("inner length", as_file(b"\x0a\x04\x0a\x7fab"), FormatError, "not a Value message"),
        ("length beyond any file", as_file(b"\x0a" + b"\xff" * 9 + b"\x01"), FormatError, "not a Checkpoint message"),
        ("endless varint", as_file(b"\xff" * 40), FormatError, "truncated or endless"),
        ("group", as_file(b"\x0b\x0c"), FormatError, "wire type 3"),
        ("field 0", as_file(b"\x02\x00"), FormatError, "field 0"),
        ("no tag", as_file(message(1, message(2, message(2, b"Int8")))), FormatError, "no tag"),
        ("no tensor", as_file(message(1, message(1, b"w"))), FormatError, "no tensor for 'w'"),
        ("tag", as_file(value(tag=b"\xff")), FormatError, "not UTF-8"),
        ("text", as_file(value(kind=b"str", data=b"\xff\xff\xff\xff")), FormatError, "not UTF-32"),
        ("data type is unknown", as_file(value(kind=b"Int128")), UnsupportedDtype, "Int128"),
        (
            "map slices",
            as_file(message(1, message(1, b"w"), message(3)) + value(tag=b"v", data=b"1")),
            SizeMismatch,
            "v",
        ),
        (
            "map slices of other ranks",
            as_file(
                2 * message(1, message(1, b"w") + message(3, message(1, b"\x08\1" + message(2, b"Int8"))))
                + message(1, message(1, b"w") + message(3, message(1, message(2, b"Int8"))))
            ),
            FormatError,
            "slices of one parameter differ",
        ),
    )
)


# onnx


def model(*initializers: bytes) -> Callable[[Path], object]:
    graph = b"".join(message(5, initializer) for initializer in initializers)
    return as_file(wire.int_field(1, 8) + message(7, graph))


def proto(kind: int, dims: tuple[int, ...], *fields: bytes, name: bytes = b"w") -> bytes:
    return (
        b"".join(wire.int_field(1, extent) for extent in dims)
        + wire.int_field(2, kind)
        + message(8, name)
        + b"".join(fields)
    )


def external(**entries: str) -> bytes:
    texts = (message(13, message(1, key.encode()), message(2, text.encode())) for key, text in entries.items())
    return b"".join(texts) + wire.int_field(14, 1)


ONNX: tuple[Case, ...] = tuple(
    (name, make, "onnx", error, text)
    for name, make, error, text in (
        ("does not have a graph", as_file(wire.int_field(1, 8)), FormatError, "does not have a graph"),
        ("two graphs", as_file(message(7) + message(7)), FormatError, "two graphs"),
        ("torn", as_file(wire.int_field(1, 8) + wire.bytes_head(7, HUGE)), FormatError, "not a ModelProto message"),
        ("graph length", as_file(message(7, wire.bytes_head(5, 100))), FormatError, "not a GraphProto message"),
        ("raw too short", model(proto(1, (2,), message(9, b"1234567"))), SizeMismatch, "does not match its shape"),
        ("raw too long", model(proto(1, (2,), message(9, b"123456789"))), SizeMismatch, "does not match its shape"),
        ("huge raw", model(proto(1, (HUGE,), message(9, b"1"))), SizeMismatch, "does not match its shape"),
        ("huge typed", model(proto(1, (HUGE,), message(4, bytes(8)))), SizeMismatch, "do not match its shape"),
        ("floats missing", model(proto(1, (4,), message(4, bytes(8)))), SizeMismatch, "do not match its shape"),
        ("integers missing", model(proto(6, (4,), message(5, b"\1\2\3"))), SizeMismatch, "3 integers"),
        ("integer torn", model(proto(6, (4,), message(5, b"\1\2\3\xff"))), SizeMismatch, "a truncated integer"),
        ("wrong wire type", model(proto(6, (1,), b"\x2d1234")), FormatError, "wire type 5 for values"),
        ("negative", model(proto(1, (-1,), message(9, b""))), FormatError, "no array can have this shape"),
        ("dimensions", model(proto(1, (1,) * 100, message(9, b"1234"))), FormatError, "more than 64 dimensions"),
        (
            "twice",
            model(proto(2, (1,), message(9, b"1")), proto(2, (1,), message(9, b"1"))),
            FormatError,
            "the same name",
        ),
        ("type", model(proto(99, (1,), message(9, b"1"))), UnsupportedDtype, "data type 99"),
        ("segment", model(proto(2, (1,), message(3), message(9, b"1"))), UnsupportedDtype, "a segment"),
        ("above", model(proto(2, (1,), external(location="../x"))), UnsafeContent, "leads out of the folder"),
        ("absolute", model(proto(2, (1,), external(location="/etc/passwd"))), UnsafeContent, "leads out of the folder"),
        ("itself", model(proto(2, (1,), external(location="."))), UnsafeContent, "leads out of the folder"),
        ("no location", model(proto(2, (1,), external(offset="1"))), UnsafeContent, "leads out of the folder"),
        ("NUL", model(proto(2, (1,), external(location="a\0b"))), UnsafeContent, "leads out of the folder"),
        ("link", model(proto(2, (1,), external(location="leads-out"))), UnsafeContent, "leads out of the folder"),
        ("no number", model(proto(2, (1,), external(location="data", offset="x"))), FormatError, "must be integers"),
        ("long number", model(proto(2, (1,), external(location="data", offset="9" * 5000))), FormatError, "integers"),
        (
            "behind",
            model(proto(2, (1,), external(location="data", offset="99"))),
            SizeMismatch,
            "lies outside the file",
        ),
        (
            "before",
            model(proto(2, (1,), external(location="data", offset="-1"))),
            SizeMismatch,
            "lies outside the file",
        ),
        (
            "length",
            model(proto(2, (1,), external(location="data", length="2"))),
            SizeMismatch,
            "does not match its shape",
        ),
    )
)

CASES = SAFETENSORS + NUMPY + MINDSPORE + ONNX


@pytest.mark.parametrize(("name", "make", "format", "error", "message"), CASES, ids=[f"{c[2]}: {c[0]}" for c in CASES])
def test_hostile(tmp_path, name, make, format, error, message):
    path = tmp_path / "hostile-file"
    (tmp_path / "data").write_bytes(b"1234")
    (tmp_path / "leads-out").symlink_to("/etc/passwd")
    make(path)
    refuses(path, format, error, message)


# zarr


def tree(path: Path, **changes: object) -> Path:
    metadata = {
        "zarr_format": 3, "node_type": "array", "shape": [4], "data_type": "uint8", "fill_value": 0, "attributes": {},
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [4]}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "codecs": [{"name": "bytes"}],
    }  # fmt: skip
    (path / "a/c").mkdir(parents=True)
    (path / "zarr.json").write_text('{"zarr_format": 3, "node_type": "group", "attributes": {}}')
    (path / "a/zarr.json").write_text(json.dumps(metadata | changes))
    (path / "a/c/0").write_bytes(b"1234")
    return path


def test_the_tree_that_is_changed_below_reads(tmp_path):
    assert verbs.read(tree(tmp_path / "x"))["a"].tobytes() == b"1234"


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"shape": [HUGE]}, UnsafeContent, "too many chunks"),
        ({"shape": [2**40, 2**40]}, FormatError, "not the metadata of a zarr array|no array can have this shape"),
        ({"shape": [-4]}, FormatError, "not the metadata of a zarr array"),
        ({"shape": "x"}, FormatError, "not the metadata of a zarr array"),
        (
            {"chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [HUGE]}}},
            UnsafeContent,
            "out of proportion",
        ),
        (
            {"codecs": [{"name": "bytes"}, {"name": "evil"}]},
            UnsafeContent,
            "not one of those that are known to be safe: found 'evil'",
        ),
        ({"codecs": [{"name": "numcodecs.pickle"}]}, UnsafeContent, "not one of those that are known to be safe"),
        (
            {"codecs": [{"name": "sharding_indexed", "configuration": {"index_codecs": [{"name": "pickle"}]}}]},
            UnsafeContent,
            "not one of those that are known to be safe",
        ),
        (
            {"codecs": [{"name": "bytes"}, {"name": "gzip"}]},
            FormatError,
            "not the metadata of a zarr array|cannot be read",
        ),
        ({"data_type": "object"}, UnsupportedDtype, "not one of plain values"),
        ({"data_type": "bfloat16", "fill_value": "junk"}, FormatError, "not the metadata of a zarr array"),
        ({"data_type": "bfloat16", "fill_value": [1]}, FormatError, "not the metadata of a zarr array"),
        ({"codecs": 7}, FormatError, "not the metadata of a zarr array"),
    ],
)
def test_hostile_zarr_metadata(tmp_path, changes, error, message):
    refuses(tree(tmp_path / "x.zarr", **changes), "zarr", error, message)


def test_zarr_v2_may_not_unpickle(tmp_path):
    path = tmp_path / "x.zarr"
    path.mkdir()
    fields = {"zarr_format": 2, "shape": [1], "chunks": [1], "dtype": "|O", "fill_value": 0, "order": "C"}
    (path / ".zarray").write_text(json.dumps({**fields, "compressor": None, "filters": [{"id": "pickle"}]}))
    (path / "0").write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    refuses(path, "zarr", UnsafeContent, "not one of those that are known to be safe: found 'pickle'")
    assert not Path("pwned").exists()


@pytest.mark.parametrize("link", ["a/c/0", "a/c", "a/zarr.json", "b"])
def test_zarr_links_may_not_lead_out(tmp_path, link):
    path = tree(tmp_path / "x.zarr")
    outside = tree(tmp_path / "outside")
    target = path / link
    if target.is_dir():
        (target / "0").unlink()
        target.rmdir()
    elif target.exists():
        target.unlink()
    target.symlink_to(outside / "a" if link == "b" else outside / link)
    refuses(path, "zarr", UnsafeContent, "leads out of the folder")


def test_zarr_links_may_not_go_round(tmp_path):
    path = tree(tmp_path / "x.zarr")
    (path / "group").mkdir()
    (path / "group/round").symlink_to(path / "group")
    refuses(path, "zarr", UnsafeContent, "a link is not a file or folder")


@pytest.mark.parametrize("text", ["[]", "{", "[" * 100_000, ""])
def test_zarr_metadata_that_is_none(tmp_path, text):
    path = tree(tmp_path / "x.zarr")
    (path / "a/zarr.json").write_text(text)
    with pytest.raises(FormatError, match=r"not valid JSON|must be a JSON object"):
        zarr.read(str(path))


@pytest.fixture
def pickled(tmp_path: Path) -> Iterator[Path]:
    """A tree whose array "a" hides another one, "a/b", with a codec that unpickles what leaves a file behind."""
    fields = {"zarr_format": 2, "shape": [4], "chunks": [4], "dtype": "<i4", "fill_value": 0, "order": "C"}
    path = tmp_path / "pickled"
    for folder, compressor in (("a", None), ("a\\b", None), ("a/b", {"id": "pickle", "protocol": 4})):
        (path / folder).mkdir(parents=True)
        (path / folder / ".zarray").write_text(json.dumps({**fields, "compressor": compressor, "filters": None}))
    (path / ".zgroup").write_text('{"zarr_format": 2}')

    class Payload:
        def __reduce__(self) -> tuple[object, ...]:
            return exec, (f"open({str(tmp_path / 'ran')!r}, 'w')",)

    (path / "a/b/0").write_bytes(pickle.dumps(Payload()))
    yield path
    assert not (tmp_path / "ran").exists()


def test_zarr_reads_no_folder_under_another_name(pickled):
    refuses(pickled, "zarr", UnsafeContent, r"variable 'a\\\\b': a key of the tree is not a plain path")


@pytest.mark.parametrize("keys", ["a\\b", "/a", "a/", "a//b", "./a", "a/.", "a/../a", ""])
def test_orbax_reads_no_folder_under_another_name(pickled, keys):
    leaf = {"key_metadata": [{"key": keys, "key_type": 2}], "value_metadata": {"value_type": "np.ndarray"}}
    (pickled / "_METADATA").write_text(json.dumps({"use_ocdbt": False, "tree_metadata": {"x": leaf}}))
    with pytest.raises(UnsafeContent, match="not a plain path"):
        verbs.read(pickled)


# orbax


@pytest.mark.parametrize(
    ("metadata", "error", "message"),
    [
        ("{", FormatError, "not valid JSON"),
        ("{}", FormatError, "not the metadata of Orbax"),
        ({"a": {}}, FormatError, "metadata of a leaf"),
        ({"a": {"key_metadata": [{"key": "..", "key_type": 2}, {"key": "/etc", "key_type": 2}]}}, None, "leads out"),
        ({"a": {"key_metadata": [{"key": "no", "key_type": 2}]}}, FormatError, "does not contain a zarr array"),
        ({"a": {"key_metadata": []}}, UnsafeContent, "not a plain path"),
    ],
)
def test_hostile_orbax(tmp_path, metadata, error, message):
    path = tmp_path / "ckpt"
    path.mkdir()
    if isinstance(metadata, dict):
        for leaf in metadata.values():
            if "key_metadata" in leaf:
                leaf["value_metadata"] = {"value_type": "jax.Array"}
        metadata = json.dumps({"tree_metadata": metadata, "use_ocdbt": False})
    (path / "_METADATA").write_text(metadata)
    with pytest.raises(
        error or FormatError, match=f"{message}|does not contain a zarr array" if error is None else message
    ):
        verbs.read(path)


def test_orbax_leaves_may_not_lead_out(tmp_path):
    tree(tmp_path / "secret")
    path = tmp_path / "ckpt"
    path.mkdir()
    leaf = {"key_metadata": [{"key": "x/../../secret/a", "key_type": 2}], "value_metadata": {"value_type": "jax.Array"}}
    (path / "_METADATA").write_text(json.dumps({"tree_metadata": {"a": leaf}, "use_ocdbt": False}))
    (path / "x").mkdir()
    with pytest.raises(UnsafeContent, match="not a plain path"):
        verbs.read(path)


# any file at all


READERS: dict[str, Callable[[str], Any]] = {
    "numpy/weights_c.npz": numpy.read,
    "numpy/weights.npz": numpy.read,
    "numpy/one.npy": numpy.read,
    "safetensors/model.safetensors": safetensors.read,
    "mindspore/dtypes.ckpt": mindspore.read,
    "mindspore/lenet_crc.ckpt": mindspore.read,
    "onnx/torch_export.onnx": onnx.read,
}


@pytest.mark.parametrize("fixture", READERS)
def test_a_damaged_file_reads_or_is_one_clear_error(tmp_path, fixture):
    content = (DATA / fixture).read_bytes()
    path = tmp_path / "damaged"

    @settings(max_examples=150, deadline=None)
    @given(st.lists(st.tuples(st.integers(0, len(content) - 1), st.integers(0, 255)), max_size=4), st.integers(0, 40))
    def check(changes, cut):
        damaged = bytearray(content)
        for position, byte in changes:
            damaged[position] = byte
        path.write_bytes(damaged[: len(damaged) - cut])
        for read in (READERS[fixture], verbs.read):
            try:
                opened = read(str(path))
            except VarstoreError:
                continue
            for name in opened:
                try:
                    assert opened[name].shape == opened.lazy(name).shape
                except VarstoreError:
                    continue

    check()


def test_a_file_that_changes_is_noticed(tmp_path):
    path = str(tmp_path / "x.safetensors")
    safetensors.write(path, {"a": np.zeros(2)})
    opened = safetensors.read(path)
    safetensors.write(path, {"a": np.ones(2)})
    with pytest.raises(FormatError, match="has changed since it was opened"):
        opened["a"].numpy()


def test_pipes_and_folders_are_no_files(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for read in (safetensors.read, numpy.read, mindspore.read, onnx.read):
        with pytest.raises(FormatError, match="not a regular file"):
            read(str(tmp_path / "pipe"))
        with pytest.raises(FormatError, match="not a regular file"):
            read(str(tmp_path))
        with pytest.raises(CheckpointNotFound):
            read(str(tmp_path / "none"))
    with pytest.raises(CheckpointNotFound):
        registry.detect(tmp_path / "none")


def test_no_framework_is_imported():
    script = """
import sys
from varstore.formats import mindspore, numpy, onnx, safetensors, verbs, zarr
from varstore.formats.zarr import orbax
for name in sys.argv[1:]:
    verbs.read(name).state()
found = {"torch", "onnx", "mindspore", "jax", "safetensors", "zarr", "tensorstore", "cryptography"} & set(sys.modules)
assert not found, found
"""
    files = [str(DATA / fixture) for fixture in READERS]
    done = subprocess.run([sys.executable, "-c", script, *files], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("delta", [1, 40, 1 << 20, 1 << 31])
def test_a_directory_that_begins_before_the_file(tmp_path, delta):
    """Every offset of the archive's end is too large or too small, so that zipfile seeks before the beginning."""
    numpy.write(str(tmp_path / "x.npz"), {"w": np.arange(4)})
    raw = (tmp_path / "x.npz").read_bytes()
    for field in (12, 16):
        at = raw.rindex(b"PK\5\6") + field
        for sign in (1, -1):
            value = (int.from_bytes(raw[at : at + 4], "little") + sign * delta) % (1 << 32)
            (tmp_path / "x.npz").write_bytes(raw[:at] + value.to_bytes(4, "little") + raw[at + 4 :])
            with pytest.raises(VarstoreError):
                numpy.read(str(tmp_path / "x.npz"))
            with pytest.raises(VarstoreError):
                verbs.read(tmp_path / "x.npz")
