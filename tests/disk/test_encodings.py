"""An encoding is a row in two tables, and nothing else: a second one, made here, is read by every way of reading."""

import os

import numpy as np
import pytest
import xxhash
from support import assert_same

import varstore as vs
from varstore._gen import manifest_pb2
from varstore.disk.encodings import table
from varstore.errors import SizeMismatch
from varstore.layout import encodings
from varstore.layout.encodings import Encoding
from varstore.layout.manifest import BLOCK, frame

pytestmark = pytest.mark.core

HEAD = b"inverted"
VALUES = {
    "small": np.arange(60, dtype=np.int32).reshape(6, 10),
    "large": np.arange(5 << 20, dtype=np.int32).reshape(5, -1),
    "scalar": np.int32(-3),
    "empty": np.empty((0, 2), np.int32),
    "plain": np.arange(7, dtype=np.int32),
}


def stored_dtype(meta, nbytes):
    return meta.data_type.dtype if nbytes == len(HEAD) + meta.elements * meta.data_type.dtype.itemsize else None


def read(stored, variable, target, offset, hashed):
    assert not hashed  # no digests of the values are known
    data = np.frombuffer(stored.read(target.nbytes, len(HEAD) + offset), np.uint8)
    target[...] = ~data
    return b""


@pytest.fixture
def inverted(monkeypatch):
    row = Encoding(name="inverted", is_plain=False, stored_dtype=stored_dtype)
    monkeypatch.setitem(encodings.ENCODINGS, row.name, row)
    monkeypatch.setitem(table.READERS, row.name, read)


@pytest.fixture
def path(tmp_path, inverted):
    """A checkpoint whose variables are inverted, all but one."""
    path = tmp_path / "c"
    vs.save(path, VALUES, durable=False)
    body = manifest_pb2.Manifest(format_version=1)
    for name, values in VALUES.items():
        out = path / name / "out"
        if name != "plain":
            data = HEAD + (~np.frombuffer(out.read_bytes(), np.uint8)).tobytes()
            out.unlink()
            out.write_bytes(data)
        data = out.read_bytes()
        body.variables.append(
            manifest_pb2.Variable(
                name=name,
                shape=values.shape,
                data_type=5,
                size=len(data),
                encoding="" if name == "plain" else "inverted",
                digests=b"".join(
                    xxhash.xxh3_128_digest(data[start : start + BLOCK]) for start in range(0, len(data), BLOCK)
                ),
            )
        )
    (path / "manifest").unlink()
    (path / "manifest").write_bytes(frame(body.SerializeToString()))
    return path


def test_every_way_of_reading_decodes(path):
    opened = vs.open(path)
    targets = {name: np.zeros_like(values) for name, values in VALUES.items()}
    vs.load_into(targets, path)
    columns = {name: np.zeros((*np.shape(values), 2), np.int32)[..., 0] for name, values in VALUES.items()}
    vs.load_into(columns, path)
    loads = [vs.load(path), vs.load(path, threads=3), vs.load(path, verify=False)]
    for name, values in VALUES.items():
        expected = np.asarray(values)
        variable = opened[name]
        assert (variable.shape, variable.dtype, variable.nbytes) == (expected.shape, expected.dtype, expected.nbytes)
        for found in (
            *(load[name] for load in loads),
            variable.numpy(),
            variable[...],
            np.asarray(targets[name]),
            np.ascontiguousarray(columns[name]).reshape(expected.shape),
        ):
            assert_same(found, expected)
        if expected.ndim == 2 and len(expected):
            assert_same(variable[1:4, 2:7], expected[1:4, 2:7])
            assert_same(variable[-1], expected[-1])
            assert_same(variable[[2, 0]], expected[[2, 0]])
    assert vs.verify(path).ok


def test_a_save_writes_the_values_and_links_what_is_plain(path, tmp_path):
    vs.save(tmp_path / "d", vs.open(path), durable=False)
    copied = vs.load(tmp_path / "d")
    for name, values in VALUES.items():
        assert_same(copied[name], np.asarray(values))
        assert vs.open(tmp_path / "d")[name].entry.encoding == "raw"
        assert os.path.samefile(path / name / "out", tmp_path / "d" / name / "out") is (name == "plain")


def test_only_what_is_plain_is_compared_by_its_digests(path, tmp_path):
    vs.save(tmp_path / "d", VALUES, base=path, durable=False)
    for name in VALUES:
        assert os.path.samefile(path / name / "out", tmp_path / "d" / name / "out") is (name == "plain")
    assert vs.verify(tmp_path / "d").ok


def test_verify_compares_what_is_stored(path):
    (path / "large" / "out").write_bytes((path / "large" / "out").read_bytes()[:-1] + b"\x11")
    (path / "small" / "out").write_bytes(HEAD)
    problems = vs.verify(path).problems
    assert len(problems) == 2
    with pytest.raises(SizeMismatch):
        vs.load(path, include="small")
    assert "xxh3-128" in "".join(problems)
