"""Folders of Zarr and Orbax that name what was not checked, or chunks that are no chunks."""

import bz2
import json
import os
import pickle
import zlib

import numpy as np
import pytest
from support.confined import confined

import varstore as vs
from varstore.errors import FormatError, UnsafeContent

pytest.importorskip("zarr")
pytestmark = pytest.mark.lowest

MIB = 1 << 20
READ = """
values = vs.read(argv[0])
tell({name: np.asarray(values[name]).tolist() for name in values})
"""


def v2(shape=(4,), chunks=(4,), dtype="|u1", **other):
    facts = {"zarr_format": 2, "shape": shape, "chunks": chunks, "dtype": dtype, "order": "C"}
    return facts | {"compressor": None, "fill_value": 0, "filters": None} | other


def v3(shape, chunks, codecs):
    return {
        "zarr_format": 3, "node_type": "array", "shape": shape, "data_type": "uint8", "fill_value": 0, "codecs": codecs,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunks}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}}, "attributes": {},
    }  # fmt: skip


def tree(path, arrays, chunks=(), *, version=2):
    """Write a group of arrays, by path below it, and chunks by theirs; return its path."""
    name, group = {2: (".zgroup", {}), 3: ("zarr.json", {"node_type": "group", "attributes": {}})}[version]
    path.mkdir()
    (path / name).write_text(json.dumps({"zarr_format": version} | group))
    for array, facts in arrays.items():
        (path / array).mkdir(parents=True, exist_ok=True)
        (path / array / {2: ".zarray", 3: "zarr.json"}[version]).write_text(json.dumps(facts))
    for chunk, data in dict(chunks).items():
        (path / chunk).parent.mkdir(parents=True, exist_ok=True)
        (path / chunk).write_bytes(data)
    return path


def orbax(path, arrays, chunks, keys):
    """Write a folder as Orbax does without OCDBT, whose metadata lists these keys."""
    tree(path, arrays, chunks)
    (path / ".zgroup").unlink()
    entries = {
        f"({key!r},)": {
            "key_metadata": [{"key": key, "key_type": 2}],
            "value_metadata": {"value_type": "np.ndarray", "skip_deserialize": False},
        }
        for key in keys
    }
    (path / "_METADATA").write_text(json.dumps({"use_ocdbt": False, "tree_metadata": entries}))
    return path


class Payload:
    """What a pickle runs when it is read: it writes a file."""

    def __init__(self, canary):
        self.canary = os.fspath(canary)

    def __reduce__(self):
        return exec, (f"open({self.canary!r}, 'w').close()",)


WRITE = {"zarr": lambda path, arrays, chunks: tree(path, {"a": v2(), **arrays}, chunks)}
WRITE["orbax"] = lambda path, arrays, chunks: orbax(path, arrays, chunks, ["a\\b"])


@pytest.mark.parametrize("system", WRITE)
def test_a_codec_that_was_not_checked_does_not_run(tmp_path, system):
    """zarr opens ``a/b`` for the folder ``a\\b``, whose metadata alone was checked."""
    arrays = {"a\\b": v2(dtype="<i4"), "a/b": v2(dtype="<i4", compressor={"id": "pickle", "protocol": 4})}
    path = WRITE[system](tmp_path / "t", arrays, {"a/b/0": pickle.dumps(Payload(tmp_path / "canary"))})
    with pytest.raises(FormatError):
        confined(READ, path)
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("system", WRITE)
def test_a_name_that_the_library_rewrites_is_refused(tmp_path, system):
    path = WRITE[system](
        tmp_path / "t", {"a\\b": v2(), "a/b": v2((2,), (2,))}, {"a/b/0": b"\1\2", "a\\b/0": b"\3\4\5\6"}
    )
    with pytest.raises(FormatError, match=r"a\\\\b"):
        vs.read(path)


@pytest.mark.parametrize("key", ["a\\b", "a//b", "/a", "a/", "./a", "a/./b", "../a", "..", ".", "a/../b", ""])
def test_keys_of_orbax_that_are_no_path_below_it(tmp_path, key):
    arrays = {"a": v2(), "b": v2(), "a/b": v2()}
    chunks = {"a/0": b"\1\2\3\4", "b/0": b"\1\2\3\4", "a/b/0": b"\1\2\3\4"}
    with pytest.raises(FormatError):
        confined(READ, orbax(tmp_path / "t", arrays, chunks, [key]))


def test_keys_of_orbax_that_are_paths_below_it(tmp_path):
    path = orbax(tmp_path / "t", {"a": v2(), "b": v2()}, {"a/0": b"\1\2\3\4", "b/0": b"\4\3\2\1"}, ["a", "b"])
    assert confined(READ, path) == {"a": [1, 2, 3, 4], "b": [4, 3, 2, 1]}


def test_a_chunk_that_is_a_pipe(tmp_path):
    path = tree(tmp_path / "t", {"x": v2()})
    os.mkfifo(path / "x" / "0")
    with pytest.raises(FormatError, match="regular"):
        confined(READ, path)


def test_a_chunk_that_leads_out(tmp_path):
    path = tree(tmp_path / "t", {"x": v2()})
    (path / "x" / "0").symlink_to("/etc/hostname")
    with pytest.raises(UnsafeContent, match="leads out"):
        confined(READ, path)


def bz2_of_zeros(mib):
    return bz2.compress(bytes(32 * MIB)) * (mib // 32)


def zlib_of_zeros(mib, times):
    data = bytes(mib * MIB)
    for _ in range(times):
        data = zlib.compress(data, 1)
    return data


ZLIB = {"id": "zlib", "level": 1}
BOMBS = {
    "bz2": (v2(compressor={"id": "bz2", "level": 9}), bz2_of_zeros(256)),
    "zlib": (v2(compressor=ZLIB), zlib_of_zeros(256, 1)),
    "zlib thrice": (v2(compressor=ZLIB, filters=[ZLIB, ZLIB]), zlib_of_zeros(256, 3)),
    "lz4": (v2(compressor={"id": "lz4", "acceleration": 1}), (2_000_000_000).to_bytes(4, "little") + bytes(16)),
    "blosc": (
        v2(compressor={"id": "blosc", "cname": "lz4", "clevel": 5, "shuffle": 1}),
        bytes([2, 1, 1, 1]) + np.array([2_000_000_000, 2_000_000_000, 32], "<u4").tobytes() + bytes(16),
    ),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_chunk_that_inflates_beyond_its_size(tmp_path, name):
    facts, data = BOMBS[name]
    assert len(data) < 2 * MIB
    path = tree(tmp_path / "t", {"x": facts}, {"x/0": data})
    with pytest.raises(FormatError):
        confined(READ, path, seconds=20, memory=160 * MIB)


@pytest.mark.parametrize("bits", [20, 26, 40])
def test_a_shard_of_more_chunks_than_its_file_could_hold(tmp_path, bits):
    bytes_, crc = {"name": "bytes"}, {"name": "crc32c"}
    sharding = {
        "chunk_shape": [1],
        "codecs": [bytes_],
        "index_codecs": [bytes_ | {"configuration": {"endian": "little"}}, crc],
    }
    codecs = [{"name": "sharding_indexed", "configuration": {**sharding, "index_location": "end"}}]
    path = tree(tmp_path / "t", {"x": v3([1], [1 << bits], codecs)}, {"x/c/0": bytes(64)}, version=3)
    with pytest.raises(FormatError):
        confined(READ, path, seconds=20, cpu=2, memory=128 * MIB)


def test_more_absent_chunks_than_a_tree_of_its_size_may_have(tmp_path):
    with pytest.raises(FormatError, match="chunks"):
        confined(READ, tree(tmp_path / "t", {"x": v2([100_000], [1])}), seconds=20, cpu=2)


def test_zeros_that_are_not_written_are_read(tmp_path):
    path = tree(tmp_path / "t", {"x": v2([65_000], [65]), "y": v2()})
    assert confined(READ, path, seconds=20) == {"x": [0] * 65_000, "y": [0] * 4}
