"""What a file may cost: each account of the budget, what raises it, and that hints work when followed."""

from __future__ import annotations

import json
import re
import struct
import sys

import numpy as np
import pytest
from support import FIXTURES
from support.crafted import pickled, torch_file

import varstore as vs
from varstore.errors import FormatError, UnsafeContent
from varstore.formats.binary.budget import Budget
from varstore.layout.keys import KeyTable, are_far_apart, packed

MIB = 1 << 20
DATA = FIXTURES / "formats"


def test_the_accounts():
    budget = Budget("f", MIB, files=3)
    budget.charge(128 * MIB)
    with pytest.raises(UnsafeContent, match="f: opening this file would use memory out of proportion"):
        budget.charge(1)
    budget.announce(68 * MIB)
    with pytest.raises(UnsafeContent, match=r"f: variable 'w': .* limit=\d+"):
        budget.announce(1, variable="w")
    budget.absent(1 << 16, variable="w")
    with pytest.raises(UnsafeContent, match="too many chunks"):
        budget.absent(1, variable="w")
    Budget("f", 0, files=1025).absent(64 * 1025, variable="w")
    budget.unpack(68 * MIB)
    with pytest.raises(UnsafeContent, match="limit"):
        budget.unpack(1)


def test_a_limit_raises_and_does_not_lower():
    Budget("f", 0, limit=100 * MIB).announce(100 * MIB)
    Budget("f", 0, limit=1).announce(64 * MIB)


@pytest.fixture(params=["npz", "pt", "zarr", "onnx"])
def zeros(request, tmp_path):
    """A small file that announces 80 MiB of zeros."""
    path, count = tmp_path / f"zeros.{request.param}", 80 * MIB
    if request.param == "npz":
        np.savez_compressed(path, w=np.zeros(count, np.uint8))
    elif request.param == "pt":
        rest = b"J" + struct.pack("<i", count) + b"\x85K\0\x85\x89ccollections\nOrderedDict\n)RtR"
        storage = b"(X\7\0\0\0storagectorch\nByteStorage\nX\1\0\0\x000X\3\0\0\0cpuK\1tQK\0"
        torch_file(path, b"}X\1\0\0\0wctorch._utils\n_rebuild_tensor_v2\n(" + storage + rest + b"s", storage=b"\0")
    elif request.param == "zarr":
        path.mkdir()
        fields = {"zarr_format": 2, "shape": [count], "chunks": [MIB], "dtype": "|u1", "fill_value": 0, "order": "C"}
        (path / ".zgroup").write_text('{"zarr_format": 2}')
        (path / "w").mkdir()
        (path / "w/.zarray").write_text(json.dumps(fields | {"compressor": None, "filters": None}))
    else:
        pytest.skip("values in a model are not compressed")
    return path, count


def test_values_beyond_the_limit_are_refused_and_the_hint_works(zeros, tmp_path):
    path, count = zeros
    with pytest.raises(UnsafeContent, match="out of proportion") as caught:
        vs.read(path)
    limit = int(re.search(r"limit=(\d+)", caught.value.hint)[1])
    assert vs.read(path, limit=limit)["w"].nbytes == count
    assert not vs.read(path, limit=count)["w"].numpy().any()
    with pytest.raises(UnsafeContent):
        vs.convert(path, tmp_path / "c.npy")
    vs.convert(path, tmp_path / "c.npy", limit=limit)
    assert (tmp_path / "c.npy").stat().st_size > count


def test_an_array_of_many_names_is_paid_for_once_per_name(tmp_path):
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\0\x85C\1b\x87R(K\1J"
        + struct.pack("<i", MIB) + b"\x85cnumpy\ndtype\n\x8c\x02u1\x89\x88\x87R\x89B" + struct.pack("<I", MIB)
        + bytes(MIB) + b"tbq\0"
    )  # fmt: skip
    assert len(vs.read(pickled(tmp_path / "a.mge", b"](" + array + b"h\0" * 60 + b"e"))) == 61
    with pytest.raises(UnsafeContent, match="limit"):
        vs.read(pickled(tmp_path / "b.mge", b"](" + array + b"h\0" * 100 + b"e"))


def test_tied_tensors_of_safetensors_are_paid_for_once_per_name(tmp_path):
    path = tmp_path / "x.safetensors"
    for aliases, is_refused in ((60, False), (100, True)):
        about = {"__metadata__": {f"t{i}": "w" for i in range(aliases)}}
        header = json.dumps(about | {"w": {"dtype": "U8", "shape": [MIB], "data_offsets": [0, MIB]}}).encode()
        path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(MIB))
        if is_refused:
            with pytest.raises(UnsafeContent, match="limit"):
                vs.read(path)
        else:
            assert len(vs.read(path)) == aliases + 1


def test_values_in_other_files_count(tmp_path):
    """The external data of a model, and the files of an index, are part of its size."""
    vs.write(
        tmp_path / "m.safetensors.index.json", {f"w{i}": np.zeros(30 * MIB, "u1") for i in range(3)}, shard_bytes=1
    )
    assert vs.read(tmp_path / "m.safetensors.index.json")["w2"].nbytes == 30 * MIB


@pytest.mark.parametrize("format", ["onnx", "mindspore"])
def test_packed_dimensions_are_not_unpacked(tmp_path, format):
    count = 3_000_000
    dims = b"\x0a" + _varint(count) + b"\1" * count
    message = dims + (b"\x10\x01\x42\x01t" if format == "onnx" else b"\x12\x05Int32\x1a\x00")
    if format == "onnx":
        graph = b"\x2a" + _varint(len(message)) + message
        data = b"\x08\x08\x3a" + _varint(len(graph)) + graph
    else:
        value = b"\x0a\x01t\x12" + _varint(len(message)) + message
        data = b"\x0a" + _varint(len(value)) + value
    (tmp_path / "x").write_bytes(data)
    with pytest.raises(FormatError, match=r"more than (64|32) dimensions"):
        vs.read(tmp_path / "x", format)


def _varint(value):
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def test_every_fixture_is_far_within_its_budget(monkeypatch):
    """What frameworks write takes a hundredth of what would be refused, so that no user meets the limit."""
    made = []
    real = Budget.__init__
    monkeypatch.setattr(Budget, "__init__", lambda self, *a, **k: (real(self, *a, **k), made.append(self))[0])
    paths = [path for path in DATA.glob("*/*") if ".expect." not in path.name and path.name != "ocdbt"]
    assert len(paths) > 30
    for path in paths:
        made.clear()
        try:
            vs.read(path)
        except vs.VarstoreError:
            continue
        for budget in made:
            assert budget._memory > 0.95 * (64 * MIB + 64 * budget.size), path
            assert budget._values > 0.9 * budget.limit, path


PRIME = (1 << 61) - 1


@pytest.mark.parametrize("is_set", [False, True])
@pytest.mark.parametrize(
    "keys",
    [
        [*range(20_000)],
        [*range(-10_000, 10_000)],
        [*range(20_000, 0, -1)],
        [i << 20 for i in range(20_000)],
        [i << 40 for i in range(20_000)],
        [i * 1000 for i in range(20_000)],
        [i / 7 for i in range(20_000)],
        [float(i) for i in range(20_000)],
        [(i, str(i)) for i in range(20_000)],
        [(i // 100, i % 100) for i in range(20_000)],
        [hash(str(i)) for i in range(20_000)],
        ["k" * 5, b"k", None, True, 1.5, 3],
        [PRIME * i for i in range(64)],
        [*range(5)] * 5000,
    ],
)
def test_keys_that_programs_use_are_admitted(keys, is_set):
    assert are_far_apart(keys, is_set=is_set)


def along_one_way():
    """Return integers whose searches for a place lead along those that are taken already, as an attacker finds them."""
    random = np.random.default_rng(1)
    size, first, at = 1 << 13, [], 0
    taken = np.zeros(size, bool)
    for _ in range(4000):  # places that are neighbours in the order in which a search visits them
        first.append(at)
        taken[at] = True
        at = (5 * at + 1) % size
    others = []
    while len(others) < 400:
        left = random.integers(1 << 58, 1 << 59, 200_000)
        hashes, at = left, left % size
        for _ in range(14):
            walks = taken[at]
            hashes, left, at = hashes[walks], left[walks] >> 5, at[walks]
            at = (5 * at + 1 + left) % size
        others += hashes.tolist()
    return first + others


def test_searches_that_lead_along_the_same_places_are_refused():
    keys = along_one_way()
    assert len(set(map(hash, keys))) == len(keys) < 4500
    assert not are_far_apart(keys)
    assert are_far_apart(keys[:4000])


@pytest.mark.parametrize("is_set", [False, True])
def test_keys_of_one_hash_are_refused(is_set):
    assert not are_far_apart([PRIME * i for i in range(1, 2000)], is_set=is_set)
    with pytest.raises(TypeError):
        are_far_apart([[]], is_set=is_set)


@pytest.mark.skipif(sys.implementation.name != "cpython", reason="the model is of CPython's tables")
@pytest.mark.parametrize("is_set", [False, True])
def test_the_model_grows_as_the_table_does(is_set):
    model, real = KeyTable(is_set=is_set), set() if is_set else {}
    sizes = []
    for key in range(300_000):
        model.admits(key)
        real.add(key) if is_set else real.__setitem__(key, None)
        if len(model._places) != (sizes[-1][0] if sizes else 0):
            sizes.append((len(model._places), sys.getsizeof(real)))
    assert len({real for _, real in sizes}) == len(sizes) > 6, "it grows when Python's does"
    one = 16 if is_set else None
    assert one is None or all(abs(real - one * size) < 300 for size, real in sizes)


def test_packed_keys_differ_as_their_values_do():
    values = [(1,), (1, 2), (12,), ("1",), (None,), ((1, 2),), ("1, 2",), (True,), (1 << 70,), ("\ud800",), (), ("",)]
    assert len({packed(*value) for value in values}) == len(values)
