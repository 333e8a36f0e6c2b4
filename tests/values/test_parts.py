"""A part of an array that lies among bytes is what numpy gives of the whole, and few bytes are read for it."""

import math

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from hypothesis.extra import numpy as hnp

from varstore.values import parts
from varstore.values.parts import Placed, bounds, in_c_order, in_fortran_order, read_all, read_indexed

MIB = 1 << 20


class Bytes:
    """Bytes that tell what was read of them."""

    def __init__(self, data):
        self.data = np.frombuffer(data, np.uint8)
        self.reads = []

    def __call__(self, offset, size):
        assert 0 <= offset <= offset + size <= len(self.data)
        self.reads.append((offset, size))
        return self.data[offset : offset + size].copy()


@st.composite
def placed_arrays(draw):
    """An array as it lies among bytes, and what numpy makes of them."""
    dtype = np.dtype(draw(st.sampled_from(["<f4", "u1", "<i8", "<c8"])))
    shape = draw(hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=6))
    start = draw(st.integers(0, 9))
    kind = draw(st.sampled_from(["C", "F", "any"]))
    if kind == "any":
        strides = tuple(draw(st.integers(0, 12)) for _ in shape)
        placed = Placed(shape, dtype, strides, start)
    else:
        placed = (in_c_order if kind == "C" else in_fortran_order)(shape, dtype, start)
    count = (
        sum((extent - 1) * step for extent, step in zip(shape, placed.strides, strict=True)) + 1
        if 0 not in shape
        else 0
    )
    data = np.random.default_rng(0).integers(0, 60, start + count * dtype.itemsize, np.uint8).tobytes()
    steps = [step * dtype.itemsize for step in placed.strides]
    array = np.ndarray(shape, dtype, data, start, steps) if count else np.empty(shape, dtype)
    return placed, Bytes(data), array


@st.composite
def indices(draw, shape):
    """Any index, with some that are wrong."""
    if not shape or draw(st.integers(0, 3)) == 0:
        return draw(hnp.basic_indices(shape, allow_newaxis=True, allow_ellipsis=True))
    tokens, axis = [], 0
    while axis < len(shape) and draw(st.integers(0, 5)):
        extent = shape[axis]
        rows = st.integers(-extent, max(extent - 1, 0)) if draw(st.integers(0, 9)) else st.integers(-9, 9)
        kind = draw(st.sampled_from(["slice", "int", "list", "array", "mask", "none", "masks", "int8"]))
        if kind == "none":
            tokens.append(None)
            continue
        if kind == "masks" and axis + 2 <= len(shape):
            tokens.append(draw(hnp.arrays(bool, shape[axis : axis + 2])))
            axis += 2
            continue
        token = {
            "slice": st.slices(extent),
            "int": rows,
            "list": st.lists(rows, max_size=3),
            "array": hnp.arrays(np.int64, draw(st.sampled_from([(), (1,), (2,), (2, 1), (0,)])), elements=rows),
            "int8": hnp.arrays(np.int8, (2,), elements=rows),
        }
        tokens.append(draw(token.get(kind, hnp.arrays(bool, (extent,)))))
        axis += 1
    if draw(st.booleans()):
        tokens.insert(draw(st.integers(0, len(tokens))), Ellipsis)
    return tokens[0] if len(tokens) == 1 and draw(st.booleans()) else tuple(tokens)


def outcome(call):
    try:
        found = call()
    except IndexError as error:
        return type(error), str(error)
    return type(found), found.dtype, found.shape, found.tobytes()


@settings(max_examples=600, deadline=None)
@given(data=st.data(), at_once=st.sampled_from([1, 40, 4096]), dense=st.sampled_from([-(1 << 40), 0, 20, 4096]))
def test_a_part_is_what_numpy_gives(data, at_once, dense):
    placed, read, array = data.draw(placed_arrays())
    index = data.draw(indices(placed.shape))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(parts, "_AT_ONCE", at_once)
        patched.setattr(parts, "_DENSE", dense)
        assert outcome(lambda: read_all(placed, read)) == outcome(array.copy)
        expected = outcome(lambda: array[index])
        read.reads.clear()
        whole = lambda: read_all(placed, read)  # noqa: E731
        assert outcome(lambda: read_indexed(placed, index, read, whole)) == expected
        wide = lambda values: values.astype("c16")  # noqa: E731
        assert outcome(lambda: read_indexed(placed, index, read, lambda: wide(whole()), wide)) == outcome(
            lambda: wide(array)[index]
        )
        read.reads.clear()
        outcome(lambda: read_indexed(placed, index, read, whole))
    if expected[0] is IndexError:
        assert read.reads == []


TABLE = np.arange(1024 * 1024, dtype=np.float32).reshape(1024, 1024)
ROW = 4096
READS = {
    "a row": (7, ROW, 1),
    "the last row": (-1, ROW, 1),
    "rows": (slice(10, 20), 10 * ROW, 1),
    "rows backwards": (slice(20, 10, -1), 10 * ROW, 1),
    "two rows of many": ([3, 900, 3], 2 * ROW, 2),
    "neighbours and another": ([900, 4, 3], 3 * ROW, 2),
    "a mask of rows": (np.arange(1024) == 12, ROW, 1),
    "a part of a row": ((5, slice(2, 9)), 28, 1),
    "an element": ((5, 6), 4, 1),
    "a corner": ((slice(4), slice(256)), 4 * 1024 + 3 * (ROW - 1024), 1),
    "a column": ((slice(None), 3), 1024 * 4 + 1023 * (ROW - 4), 2),
    "elements here and there": (([1, 500, 900], [5, 6, 7]), 12, 3),
    "a mask of elements": (TABLE == 5000, 4, 1),
    "every third of a part of a row": ((0, slice(0, 300, 3)), 4 * 298, 1),
    "none": (slice(3, 3), 0, 0),
    "with a new axis": ((None, 5, ..., None), ROW, 1),
}


@pytest.mark.parametrize("name", READS)
def test_what_is_read_for_a_part(name):
    index, most, calls = READS[name]
    read = Bytes(TABLE.tobytes())
    placed = in_c_order(TABLE.shape, TABLE.dtype)
    found = read_indexed(placed, index, read, lambda: pytest.fail("read whole"))
    assert np.array_equal(found, TABLE[index])
    assert sum(size for _, size in read.reads) <= most
    assert len(read.reads) <= calls


def test_far_elements_are_read_one_by_one():
    wide = np.arange(16 * 20000, dtype=np.float32).reshape(16, 20000)
    read = Bytes(wide.tobytes())
    found = read_indexed(
        in_c_order(wide.shape, wide.dtype), (slice(None), [1, 10000]), read, lambda: pytest.fail("whole")
    )
    assert np.array_equal(found, wide[:, [1, 10000]])
    assert read.reads == [(row * 80000 + 4 * column, 4) for row in range(16) for column in (1, 10000)]


@pytest.mark.parametrize("order", ["rows", "columns"])
def test_reads_are_of_bounded_size_unless_they_are_the_result(order):
    large = np.arange(6 * MIB, dtype=np.uint8).reshape(3, 2 * MIB)
    read = Bytes(large.tobytes())
    placed = (
        Placed((2 * MIB, 3), large.dtype, (1, 2 * MIB)) if order == "columns" else in_c_order(large.shape, large.dtype)
    )
    assert np.array_equal(read_all(placed, read), large.T if order == "columns" else large)
    assert max(size for _, size in read.reads) <= (4 * MIB if order == "columns" else large.nbytes)
    assert sum(size for _, size in read.reads) == large.nbytes
    read.reads.clear()
    index = np.s_[:, ::2]
    assert np.array_equal(read_indexed(in_c_order(large.shape, large.dtype), index, read, list), large[index])
    assert max(size for _, size in read.reads) <= 4 * MIB


def test_one_read_becomes_the_array_itself():
    """No second copy of a large array is in memory."""
    made = []

    def read(_, size):
        made.append(np.zeros(size, np.uint8))
        return made[-1]

    for placed in (in_c_order((1, 3, 1, 4), np.dtype("f4")), in_fortran_order((3, 1, 4), np.dtype("f4"))):
        found = read_all(placed, read)
        assert np.shares_memory(found, made[-1])
        assert found.nbytes == math.prod(placed.shape) * 4


def test_records_are_read_whole():
    dtype = np.dtype([("x", "f4"), ("y", "i2")])
    array = np.zeros(5, dtype)
    assert read_indexed(in_c_order((5,), dtype), "x", Bytes(b""), lambda: array).dtype == np.float32


INDICES = st.one_of(
    st.integers(-4, 3), st.slices(6), st.just(Ellipsis), st.none(), st.booleans(), st.just([0]), st.just(np.int8(0))
)


@given(hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=6), st.lists(INDICES, max_size=3), st.booleans())
def test_the_block_around_an_index_holds_what_it_selects(shape, given_index, is_bare):
    array = np.arange(math.prod(shape)).reshape(shape)
    index = given_index[0] if is_bare and given_index else tuple(given_index)
    try:
        expected = array[index]
    except IndexError:
        return
    found = bounds(shape, index)
    if found is None:
        assert any(token is None or isinstance(token, bool | list) for token in given_index)
        return
    box, inner = found
    block = array[tuple(slice(rows.start, rows.stop) for rows in box)]
    assert block.shape == tuple(map(len, box))
    np.testing.assert_array_equal(block[inner], expected)
    assert np.shape(block[inner]) == np.shape(expected)
    if all(isinstance(token, int) for token in inner):
        assert block.size == 1
