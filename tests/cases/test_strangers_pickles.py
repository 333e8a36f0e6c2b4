"""Pickles that ask for more time, memory or values than they are worth, each a few hundred kilobytes at most."""

import contextlib
import struct

import numpy as np
import pytest
from support.confined import confined
from support.crafted import colliding_pairs, long1, pickled, torch_file

import varstore as vs
from varstore.errors import FormatError

MIB = 1 << 20
OPEN = "tell(len(vs.read(argv[0])))"
ORDERED = b"ccollections\nOrderedDict\n)R"


def tensor(storage, size, offset=0, shape=b"K\x01\x85", strides=b"K\x01\x85"):
    """Return the opcodes of a tensor of the file's one storage."""
    head = f"(X\x07\0\0\0storagectorch\n{storage}Storage\nX\1\0\0\x000X\3\0\0\0cpu".encode()
    place = head + b"J" + struct.pack("<i", size) + b"tQJ" + struct.pack("<i", offset)
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + place + shape + strides + b"\x89" + ORDERED + b"tR"


def assert_cheap(make, count, *, code=OPEN, **limits):
    """Assert that the file for a count of 3 opens, and that the one for `count` is read or refused within limits."""
    assert len(vs.read(make(3))) >= 0
    with contextlib.suppress(FormatError):
        confined(code, make(count), seconds=20, **limits)


def test_keys_that_collide(tmp_path):
    def make(count):
        keys = b"".join(b"J" + struct.pack("<i", a) + long1(b) + b"\x86N" for a, b in colliding_pairs(count))
        return pickled(tmp_path / f"{count}.mge", b"}(" + keys + b"u")

    assert_cheap(make, 12_000, cpu=1)


def test_long_doubles_that_collide(tmp_path):
    scalar = b"cnumpy.core.multiarray\nscalar\nq\x000"
    dtype = b"cnumpy\ndtype\n\x8c\x03f16\x89\x88\x87Rq\x010"

    def make(count):
        values = (np.longdouble(2) ** 2000 * (1 + i) for i in range(count))
        keys = b"".join(b"h\x00h\x01C\x10" + value.tobytes() + b"\x86RN" for value in values)
        return pickled(tmp_path / f"{count}.mge", scalar + dtype + b"}(" + keys + b"u")

    assert_cheap(make, 16_000, cpu=1)


def test_strides_that_collide(tmp_path):
    rebuild = b"ctorch._utils\n_rebuild_tensor_v2\nq\x00"
    storage = b"(X\x07\0\0\0storagectorch\nByteStorage\nX\1\0\0\x000X\3\0\0\0cpuK\x01tQq\x01"

    def make(count):
        views = (
            b"h\x00(h\x01K\x00h\x02J" + struct.pack("<i", a) + long1(b) + b"\x86\x89NtR"
            for a, b in colliding_pairs(count)
        )
        code = rebuild + b"(" + storage + b"K\x00K\x01K\x01\x86q\x02h\x02\x89NtR(" + b"".join(views) + b"t\x86"
        return torch_file(tmp_path / f"{count}.pt", code, storage=b"\0")

    assert_cheap(make, 8000, cpu=1)


def test_marks_without_end(tmp_path):
    path = pickled(tmp_path / "x.mge", b"(" * MIB)
    with pytest.raises(FormatError):
        confined(OPEN, path, seconds=20, cpu=3, memory=192 * MIB)


def test_a_pickle_of_one_opcode_deflated(tmp_path):
    path = torch_file(tmp_path / "x.pt", b"(" + b"\x8f" * (2 * MIB) + b"t", deflate="data.pkl")
    with pytest.raises(FormatError, match="bomb"):
        confined(OPEN, path, seconds=20, cpu=3, memory=96 * MIB)


def test_sets_that_inflate(tmp_path):
    def make(count):
        noise = (struct.pack(">I", i * 2654435761 % (1 << 32)) for i in range(count))
        code = b"(" + b"".join(b"\x8f" * 590 + b"C\x04" + four + b"0" for four in noise) + b"t"
        return torch_file(tmp_path / f"{count}.pt", code, deflate="data.pkl")

    assert make(700).stat().st_size < 20_000
    assert_cheap(make, 700, memory=128 * MIB)


def test_tensors_that_repeat_one_element(tmp_path):
    shape, strides = b"J" + struct.pack("<i", 16 * MIB) + b"\x85", b"K\x00\x85"
    code = b"](" + b"".join(tensor("Float", 1024, i, shape, strides) for i in range(200)) + b"e"
    path = torch_file(tmp_path / "x.pt", code, storage=bytes(4096))
    with pytest.raises(FormatError, match="limit"):
        vs.read(path)


def test_tensors_at_the_end_of_a_deflated_storage(tmp_path):
    size = 32 * MIB

    def make(count):
        code = b"](" + b"".join(tensor("Byte", size, size - 1 - i) for i in range(count)) + b"e"
        return torch_file(tmp_path / f"{count}.pt", code, storage=bytes(size), deflate="data/0")

    assert_cheap(make, 300, code="tell(len(vs.read(argv[0]).state()))", cpu=1)


def test_a_long_key_above_many_leaves(tmp_path):
    key = ("\U0001f600" * 50_000).encode()
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85C\x01b\x87R(K\x01K\x00\x85cnumpy\ndtype\n"
        b"\x8c\x02u1\x89\x88\x87R\x89C\x00tbq\x00"
    )

    def make(count):
        code = b"}X" + struct.pack("<I", len(key)) + key + b"](" + array + b"h\x00" * (count - 1) + b"es"
        return pickled(tmp_path / f"{count}.mge", code)

    assert_cheap(make, 2600, memory=128 * MIB)
