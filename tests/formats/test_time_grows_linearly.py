"""Files that were made to be slow: each is doubled three times, and the time that it takes doubles, or less.

Each of them once took time in proportion to the square of its size, or could have.
"""

from __future__ import annotations

import contextlib
import json
import pickle
import struct
import time
import zipfile

import numpy as np
import pytest
from support.crafted import checkpoint, colliding_pairs, entry, long1, pickled, torch_file

import varstore as vs
from varstore.errors import VarstoreError
from varstore.model.report import suggest_prefixes

SLACK = 0.06
"""Seconds that a busy machine may add to any measurement."""
LONG = 0.3
"""Seconds of measurements, after which a busy machine changes little."""
PRIME = (1 << 61) - 1
ORDERED = b"ccollections\nOrderedDict\n)R"
ARRAY = (
    b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85C\x01b\x87R(K\x01K\x00\x85cnumpy\ndtype\n"
    b"\x8c\x02u1\x89\x88\x87R\x89C\x00tb"
)
MAKERS = {}


def maker(smallest):
    """Register a function that makes a file of a size; its name says what is many in it."""
    return lambda make: MAKERS.setdefault(make.__name__, (make, smallest)) and make


@maker(2000)
def keys_of_one_hash(path, count):
    keys = b"".join(b"J" + struct.pack("<i", a) + long1(b) + b"\x86N" for a, b in colliding_pairs(count))
    return pickled(path, b"}(" + keys + b"u")


@maker(1000)
def strides_of_one_hash(path, count):
    storage = b"(X\x07\0\0\0storagectorch\nByteStorage\nX\1\0\0\x000X\3\0\0\0cpuK\x01tQq\x01"
    views = b"".join(
        b"h\x00(h\x01K\x00h\x02J" + struct.pack("<i", a) + long1(b) + b"\x86\x89NtR" for a, b in colliding_pairs(count)
    )
    head = b"ctorch._utils\n_rebuild_tensor_v2\nq\x00(" + storage + b"K\x00K\x01K\x01\x86q\x02h\x02\x89NtR("
    return torch_file(path, head + views + b"t\x86", storage=b"\0")


@maker(4000)
def memos_of_far_numbers(path, count):
    return pickled(path, b"N" + b"".join(b"r" + struct.pack("<I", (i << 16) + 7) for i in range(count)))


@maker(5000)
def sets(path, count):
    return torch_file(path, b"(" + b"\x8f" * count + b"t")


@maker(4000)
def repeated_lists(path, count):
    return pickled(path, b"]q\0(" + b"h\0" * count + b"e0h\0q\1](" + b"h\1" * count + b"e")


@maker(2000)
def objects_of_one_state(path, count):
    state = b"](" + b"N" * count + b"e"
    return pickled(path, b"(cfoo\nBar\nq\0" + state + b"q\1" + b"h\0)\x81h\1b" * count + b"t")


@maker(2000)
def objects_in_objects(path, count):
    return pickled(path, b"Nq\1" + b"0cfoo\nBar\nq\0" + b"0h\0)\x81h\1bq\1" * count)


@maker(2000)
def objects_that_know_all_others(path, count):
    return pickled(path, b"cfoo\nBar\nq\x000]q\1(" + b"h\0)\x81h\1b" * count + b"e")


@maker(2000)
def keys_that_are_objects(path, count):
    return pickled(path, b"cfoo\nBar\nq\x000}(" + b"h\0)\x81N" * count + b"u")


@maker(2000)
def unknown_names(path, count):
    return pickled(path, b"(" + b"".join(b"cfoo\nb%d\n" % i for i in range(count)) + b"t")


@maker(500)
def storages_in_the_same_bytes(path, count):
    head = b"".join(pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, 1001, {}))
    stored = b"(X\7\0\0\0storagectorch\nByteStorage\nX\1\0\0\x000X\3\0\0\0cpuK\1NtQ."
    raw = head + stored + pickle.dumps(["0"], 2) + struct.pack("<q", 1) + b"\0"
    once = b"ctorch.storage\n_load_from_bytes\nq\0B" + struct.pack("<I", len(raw)) + raw + b"q\x01"
    return torch_file(path, b"(" + once + b"h\0h\1\x85R" * count + b"t", storage=b"\0")


@maker(1500)
def states_of_one_dict(path, count):
    state = b"}(" + b"".join(b"X\6\0\0\0%06dN" % i for i in range(count)) + b"u"
    given = (
        b"ctorch._utils\n_rebuild_wrapper_subclass\ncfoo\nBar\n(cfoo\nBar\nt(" + state + b"q\0" + b"h\0" * count + b"t"
    )
    return torch_file(path, b"ctorch._tensor\n_rebuild_from_type_v2\n(" + given + b"tR")


@maker(200)
def attributes_of_a_program(path, count):
    body = b"c__torch__\nM\n)\x81}(" + b"".join(b"X\6\0\0\0%06d" % i + b"](NNe" for i in range(count)) + b"ub"
    torch_file(path, body)
    with zipfile.ZipFile(path, "a") as archive:
        root = archive.namelist()[0].partition("/")[0]
        archive.writestr(f"{root}/constants.pkl", b").")
    return path


@maker(200)
def leaves_below_a_long_key(path, count):
    key = b"k" * (8 * count)
    return pickled(path, b"}X" + struct.pack("<I", len(key)) + key + b"](" + ARRAY + b"q\0" + b"h\0" * count + b"es")


@maker(40)
def views_of_a_deflated_storage(path, count):
    size = count << 16
    rest = b"K\1\x85K\1\x85\x89" + ORDERED + b"tR"
    head = b"ctorch._utils\n_rebuild_tensor_v2\n((X\7\0\0\0storagectorch\nByteStorage\nX\1\0\0\x000X\3\0\0\0cpuJ"
    views = b"".join(
        head + struct.pack("<i", size) + b"tQJ" + struct.pack("<i", size - 1 - i) + rest for i in range(count)
    )
    return torch_file(path, b"](" + views + b"e", storage=bytes(size), deflate="data/0")


@maker(150)
def members_of_an_archive(path, count):
    with zipfile.ZipFile(path, "w") as archive:
        for index in range(count):
            with archive.open(f"{index}.npy", "w") as member:
                np.lib.format.write_array(member, np.zeros(1, "i1"))
    return path


@maker(3000)
def dimensions_of_a_tensor(path, count):
    dims = b"\x0a" + varint(count) + b"\1" * count
    tensor = dims + b"\x10\x01\x42\x01t"
    graph = b"\x2a" + varint(len(tensor)) + tensor
    path.write_bytes(b"\x08\x08\x3a" + varint(len(graph)) + graph)
    return path


@maker(500)
def initializers_without_anything(path, count):
    graph = b"".join(b"\x2a\x08\x42\x06%06d" % i for i in range(count))
    path.write_bytes(b"\x08\x08\x3a" + varint(len(graph)) + graph)
    return path


@maker(500)
def names_in_a_header(path, count):
    header = {f"n{i}": {"dtype": "U8", "shape": [1], "data_offsets": [i, i + 1]} for i in range(count)}
    text = json.dumps(header | {"__metadata__": {f"m{i}": "n0" for i in range(count)}}).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(count))
    return path


@maker(60)
def arrays_in_a_tree(path, count):
    path.mkdir()
    (path / ".zgroup").write_text('{"zarr_format": 2}')
    fields = {"zarr_format": 2, "shape": [9], "chunks": [1], "dtype": "|u1", "fill_value": 0, "order": "C"}
    for index in range(count):
        (path / str(index)).mkdir()
        (path / str(index) / ".zarray").write_text(json.dumps(fields | {"compressor": None, "filters": None}))
    return path


@maker(1000)
def leaves_of_orbax_with_indices(path, count):
    path.mkdir()
    leaves = {
        str(i): {"key_metadata": [{"key": str(PRIME * i), "key_type": 1}], "value_metadata": {"value_type": "None"}}
        for i in range(count)
    }
    (path / "_METADATA").write_text(json.dumps({"use_ocdbt": False, "tree_metadata": leaves}))
    return path


@maker(2000)
def members_of_a_set_of_one_hash(path, count):
    return checkpoint(path, tree={"$": "set", "items": [PRIME * i for i in range(1, count)]})


@maker(1000)
def entries_of_a_manifest(path, count):
    return checkpoint(path, entries=[entry(f"{i}") for i in range(count)])


@maker(50)
def aliases_of_digests(path, count):
    size = 16 * count << 20
    rows = [entry("a", size=size, digests=bytes(16 * count))]
    return checkpoint(path, entries=[*rows, *(entry(f"b{i}", size=size, alias_of="a") for i in range(count))])


def varint(value):
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def seconds(path):
    """Return the processor time of opening a file and reading all of it; the least of three runs, or of long ones."""
    times = []
    while len(times) < 3 and sum(times) < LONG:
        start = time.thread_time()
        with contextlib.suppress(VarstoreError):
            opened = vs.read(path)
            repr(opened)
            if opened.format == "varstore":
                vs.verify(path)
                vs.load_state(path)
            else:
                opened.state()
        times.append(time.thread_time() - start)
    return min(times)


@pytest.mark.parametrize("name", MAKERS)
def test_twice_the_size_takes_twice_the_time(tmp_path, name):
    make, smallest = MAKERS[name]
    before, smaller = None, None
    for doubled in range(4):
        path = make(tmp_path / f"{doubled}.mge", smallest << doubled)
        took = seconds(path)
        for _ in range(5):  # a busy machine slows single measurements, and a file that is slow all of them
            if before is None or took <= 2.5 * before + SLACK:
                break
            before, took = max(before, seconds(smaller)), min(took, seconds(path))
        else:
            pytest.fail(f"{before:.3f} s, then {took:.3f} s for twice the size")
        before, smaller = took, path


def test_a_prefix_is_suggested_in_linear_time():
    before = None
    for doubled in range(4):
        names = ["a/" * (400 << doubled) + str(i) for i in range(100)]
        times = []
        for _ in range(3):
            start = time.thread_time()
            suggest_prefixes(names, [f"x/{name}" for name in names])
            times.append(time.thread_time() - start)
        if before is not None:
            assert min(times) <= 2.5 * before + SLACK
        before = min(times)


def test_an_archive_of_two_thousand_members_opens_in_half_a_second(tmp_path):
    path = members_of_an_archive(tmp_path / "x.npz", 2000)
    assert len(vs.read(path)) == 2000
    start = time.thread_time()
    vs.read(path)
    assert time.thread_time() - start < 0.5
