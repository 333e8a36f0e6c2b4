"""A part of a variable is what numpy would give of the whole, and costs no more reading than it must."""

import json
import os
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from hypothesis.extra import numpy as hnp

import varstore as vs

MIB = 1 << 20
SHAPES = [(), (1,), (7,), (0,), (4, 5), (3, 0), (0, 3), (2, 3, 4), (5, 1, 2, 3), (300, 2)]
DTYPES = [np.dtype("<f4"), np.dtype("<i8"), np.dtype(bool), np.dtype("<c8"), np.dtype(ml_dtypes.bfloat16)]


def values_of(shape, dtype):
    return (np.arange(int(np.prod(shape))) % 120).reshape(shape).astype(dtype)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("slices") / "c"
    return vs.save(path, {f"{s}/{t}": values_of(s, t) for s in SHAPES for t in DTYPES}, durable=False)


def outcome(subject, index):
    """What indexing gives, or that it is an IndexError."""
    try:
        found = subject[index]
    except IndexError:
        return "IndexError"
    return np.asarray(found).dtype, np.shape(found), np.asarray(found).tobytes(), isinstance(found, np.ndarray)


@st.composite
def indices(draw, shape):
    """Any index that numpy knows, mostly valid ones."""
    whole = hnp.basic_indices(shape, allow_newaxis=True, allow_ellipsis=True)
    rows = st.integers(-shape[0], shape[0] - 1) if shape and shape[0] else st.integers(-1, 1)
    choices = [
        whole,
        rows,
        rows.map(np.int32),
        st.lists(rows, min_size=1, max_size=5),
        st.lists(rows, min_size=1, max_size=4).map(np.array),
        st.lists(rows.filter(lambda i: -128 <= i < 128), min_size=1, max_size=4).map(lambda i: np.array(i, np.int8)),
        st.lists(rows, min_size=4, max_size=4).map(lambda i: np.array(i).reshape(2, 2)),
        st.sampled_from([True, False, None, ..., (), [], np.array(0), np.array([], int), 99, -99, [99], slice(None)]),
        hnp.arrays(bool, shape),
        st.slices(shape[0] if shape else 1),
    ]
    if shape:
        choices += [
            hnp.arrays(bool, shape[:1]),
            hnp.arrays(bool, shape[:1]).map(list),
            hnp.arrays(bool, (shape[0] + 1,)),
            st.tuples(st.lists(rows, min_size=1, max_size=3), st.just(slice(None))).map(tuple),
            st.tuples(st.slices(shape[0]), st.lists(st.integers(-1, 0), min_size=1, max_size=3)),
            st.tuples(rows, st.just(None), st.just(...)),
        ]
    return draw(st.one_of(choices))


@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_an_index_gives_what_numpy_gives(checkpoint, data):
    shape = data.draw(st.sampled_from(SHAPES))
    dtype = data.draw(st.sampled_from(DTYPES))
    index = data.draw(indices(shape))
    array = values_of(shape, dtype)
    assert outcome(checkpoint[f"{shape}/{dtype}"], index) == outcome(array, index)


@pytest.mark.parametrize("index", ["name", 1.0, (0, 0, 0), {}, np.array([0.5])])
def test_what_is_no_index_is_an_index_error(checkpoint, index):
    with pytest.raises(IndexError):
        checkpoint["(4, 5)/float32"][index]


@pytest.mark.parametrize(
    ("index", "says"), [(4, "index 4 .* axis 0 with size 4"), ((-1, -6), "index -6 .* axis 1 with size 5")]
)
def test_an_index_out_of_bounds_says_which(checkpoint, index, says):
    with pytest.raises(IndexError, match=says):
        checkpoint["(4, 5)/float32"][index]


def test_len_iteration_and_array_protocol(checkpoint):
    variable = checkpoint["(4, 5)/float32"]
    array = values_of((4, 5), "<f4")
    assert len(variable) == 4
    assert np.array_equal(np.stack(list(variable)), array)
    assert np.array_equal(np.asarray(variable), array)
    assert np.asarray(variable, np.float64).dtype == np.float64
    with pytest.raises(TypeError):
        len(checkpoint["()/float32"])
    with pytest.raises(ValueError, match="copy"):
        np.array(variable, copy=False)


ROWS = 4096
WIDTH = 4096  # float32: 64 MiB

CHILD = f"""
import json, sys
import numpy as np, varstore as vs
def read_so_far():
    return int(open("/proc/self/io").read().split()[1])
def peak():
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) * 1024
checkpoint = vs.open(sys.argv[1])
flat, table = checkpoint["flat"], checkpoint["table"]
table[0], flat[0:1]
started = peak()
facts = {{}}
for name, subject, index in [
    ("row", table, 7), ("rows", table, slice(10, 20)), ("last", table, -1), ("part", table, (5, slice(2, 9))),
    ("stepped", table, slice(0, None, {ROWS} // 4)), ("backwards", table, slice(-1, -4, -1)),
    ("picked", table, [9, 3, {ROWS} - 1, 3]), ("masked", table, np.arange({ROWS}) == 12),
    ("one", flat, 12345), ("flat part", flat, slice(1000, 2000)), ("dense", flat, slice(1000, 11000, 3)),
    ("dense backwards", flat, slice(11000, 1000, -3)), ("none", table, slice(3, 3)),
]:
    before = read_so_far()
    got = subject[index]
    facts[name] = [read_so_far() - before, got.nbytes]
facts["peak"] = [peak() - started, 0]
print(json.dumps(facts))
"""


def test_a_part_reads_little_and_keeps_little(tmp_path):
    if not os.path.exists("/proc/self/io"):
        pytest.skip("/proc/self/io does not count reads here")
    table = np.arange(ROWS * WIDTH, dtype=np.float32).reshape(ROWS, WIDTH)
    path = tmp_path / "c"
    vs.save(path, {"table": table, "flat": table.reshape(-1)}, durable=False)
    run = subprocess.run([sys.executable, "-c", CHILD, path], capture_output=True, text=True, check=True)
    facts = json.loads(run.stdout)
    row = WIDTH * 4
    few = 4096  # the reading of /proc/self/io itself
    limits = {
        "row": row, "rows": 10 * row, "last": row, "part": row, "stepped": 4 * row, "backwards": 3 * row,
        "picked": 3 * row, "masked": row, "one": 4, "flat part": 4000, "dense": 40_000, "dense backwards": 40_000,
        "none": 0,
    }  # fmt: skip
    peak = facts.pop("peak")[0]
    assert {name for name, (read, _) in facts.items() if read > limits[name] + few} == set(), facts
    assert peak < 16 * MIB


def test_a_dense_step_over_much_is_not_a_call_a_value(tmp_path):
    """Every second value of a long row: read in runs, or this takes minutes."""
    flat = np.arange(8 * MIB, dtype=np.int32)
    vs.save(tmp_path / "c", {"flat": flat}, durable=False)
    variable = vs.open(tmp_path / "c")["flat"]
    for index in (slice(None, None, 2), slice(None, None, -3), slice(5, -5, 1000), slice(None), slice(-7, 9, -100)):
        assert np.array_equal(variable[index], flat[index])
