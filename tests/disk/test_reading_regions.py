"""What several processes wrote is read like any other variable, and a damaged region is found by all who read it."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from support.regions import bands, flip, record_regions, tilings

import varstore as vs
from varstore.disk.blocks import BLOCK
from varstore.disk.read.parts import read_run, row_chunks
from varstore.disk.read.rectangles import read_rectangles
from varstore.errors import DigestMismatch, UsageError
from varstore.layout.readable import readable

pytestmark = pytest.mark.core

MIB = 1 << 20
PINWHEEL = [((0, 0), (1, 2)), ((0, 2), (2, 1)), ((2, 1), (1, 2)), ((1, 0), (2, 1)), ((1, 1), (1, 1))]
LAYOUTS = {
    "a few values by rows": ((7, 64), bands((7, 64), 0, [2, 4, 6])),
    "a few values by columns": ((7, 64), bands((7, 64), 1, [16, 40])),
    "a pinwheel": ((3, 3), PINWHEEL),
    "rows": ((300, 3000), bands((300, 3000), 0, [1, 100])),
    "columns": ((300, 3000), bands((300, 3000), 1, [1, 1500])),
    "rows of more than a block": ((9, MIB), bands((9, MIB), 0, [4])),
    "columns of more than a block": ((5, MIB), bands((5, MIB), 1, [MIB - 5])),
}


def read_rectangle(variable, offsets, sizes, out, *, verify=True):
    read_rectangles([(variable, offsets, sizes, out)], verify=verify, threads=None)


def save(path: Path, shape: tuple[int, ...], rectangles, dtype=np.float32) -> np.ndarray:
    values = (np.arange(np.prod(shape, dtype=int)) % 251).reshape(shape).astype(dtype)
    vs.save(path, {"w": values, "plain": np.arange(5)}, durable=False)
    record_regions(path, {"w": rectangles})
    return values


def all_ways(path: Path, shape: tuple[int, ...]):
    """Yield what reads all values, each with its name."""
    variable = vs.open(path)["w"]
    found = readable(variable.entry, path=str(path))
    is_large = variable.nbytes > BLOCK

    def chunks():
        values = np.empty(variable.shape, variable.dtype)
        for index, part in row_chunks(variable.location, found, verify=True):
            values[index] = part
        return values

    def into(target):
        vs.load_into({"w": target}, path)
        return target

    def rectangle(target):
        read_rectangle(variable, (0,) * len(shape), shape, target)
        return target

    yield "load", lambda: vs.load(path)["w"]
    yield "load_into columns", lambda: into(np.empty(shape, variable.dtype, "F"))
    yield "rectangle", lambda: rectangle(np.empty(shape, variable.dtype))
    if is_large:
        return
    yield "load in one thread", lambda: vs.load(path, threads=1)["w"]
    yield "load_into", lambda: into(np.empty(shape, variable.dtype))
    yield "load_state", lambda: vs.load_state(path)["w"]
    yield "numpy", variable.numpy
    yield "slice", lambda: variable[...]
    yield "chunks", chunks
    yield "run", lambda: read_run(variable.location, found, 0, int(np.prod(shape))).reshape(shape)
    yield "rectangle in columns", lambda: rectangle(np.empty(shape, variable.dtype, "F"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_values_come_back_and_one_flipped_byte_is_found_in_each_region(tmp_path, layout):
    shape, rectangles = LAYOUTS[layout]
    values = save(tmp_path / "c", shape, rectangles)
    for way, read in all_ways(tmp_path / "c", shape):
        assert np.array_equal(read(), values), way
    for offsets, sizes in rectangles:
        last = np.ravel_multi_index([at + size - 1 for at, size in zip(offsets, sizes, strict=True)], shape)
        flip(tmp_path / "c/w/out", int(last) * 4 + 2)
        rows = ", ".join(f"{at}:{at + size}" for at, size in zip(offsets, sizes, strict=True))
        nbytes = int(np.prod(sizes)) * 4
        part = f"bytes {(nbytes - 1) // BLOCK * BLOCK} to {nbytes} of " if nbytes > BLOCK else ""
        for way, read in all_ways(tmp_path / "c", shape):
            with pytest.raises(DigestMismatch, match=rf"variable 'w': {part}region \[{rows}\]: out does not") as caught:
                read()
            assert caught.value.path == str(tmp_path / "c/w/out"), way
        (problem,) = vs.verify(tmp_path / "c").problems
        assert f"variable 'w': {part}region [{rows}]: out does not" in problem
        assert vs.load(tmp_path / "c", verify=False)["w"].shape == shape
        flip(tmp_path / "c/w/out", int(last) * 4 + 2)
    assert np.array_equal(vs.load(tmp_path / "c")["w"], values)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_rectangle_is_what_numpy_gives_and_every_region_inside_it_is_checked(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("rectangles") / "c"
    shape = tuple(data.draw(st.lists(st.integers(1, 5), max_size=4)))
    dtype = data.draw(st.sampled_from([np.uint8, np.int64, np.complex128, ml_dtypes.bfloat16]))
    rectangles = [(region.offsets, region.sizes) for region in data.draw(tilings(shape))]
    values = save(path, shape, rectangles, dtype)
    damaged = data.draw(st.sampled_from([None, *rectangles]))
    if damaged is not None:
        cell = [data.draw(st.integers(at, at + size - 1)) for at, size in zip(*damaged, strict=True)]
        flip(path / "w/out", (int(np.ravel_multi_index(cell, shape)) if shape else 0) * values.itemsize)
    edges = [sorted((data.draw(st.integers(0, n)), data.draw(st.integers(0, n)))) for n in shape]
    offsets, sizes = [a for a, _ in edges], [b - a for a, b in edges]
    index = tuple(slice(a, b) for a, b in edges)
    is_found = damaged is not None and all(
        at <= first and first + size <= at + extent
        for first, size, at, extent in zip(*damaged, offsets, sizes, strict=True)
    )
    variable = vs.open(path)["w"]
    targets = [np.empty(sizes, dtype), np.empty(sizes, dtype, "F")]
    targets += [np.empty([n + 1 for n in sizes], dtype)[tuple(slice(n) for n in sizes)]] if sizes else []
    for target in targets:
        if is_found:
            with pytest.raises(DigestMismatch, match="region"):
                read_rectangle(variable, offsets, sizes, target)
        else:
            read_rectangle(variable, offsets, sizes, target)
        read_rectangle(variable, offsets, sizes, target, verify=False)
        if damaged is None:
            assert np.array_equal(target, values[index])
    if is_found:
        with pytest.raises(DigestMismatch, match="region"):
            variable[index]
    elif damaged is None:
        assert np.array_equal(variable[index], values[index])
        backwards = tuple(slice(None, None, -1) for _ in shape)
        assert np.array_equal(variable[index][backwards], values[index][backwards])
    else:
        variable[index]


def test_large_rectangles_of_any_variable_are_read_in_pieces(tmp_path):
    shape = (40, 3, 200_000)
    values = save(tmp_path / "c", shape, bands(shape, 0, [3, 33]), np.float32)
    vs.save(tmp_path / "ordinary", {"w": values}, durable=False)
    vs.save(tmp_path / "packed", {"w": values}, durable=False, encoding="zarr")
    flip(tmp_path / "c/w/out", values.nbytes - 1)
    for place in ("c", "ordinary", "packed"):
        variable = vs.open(tmp_path / place)["w"]
        boxes = [
            ((1, 0, 0), (36, 3, 200_000)),
            ((0, 1, 7), (40, 2, 150_000)),
            ((5, 1, 3), (1, 1, 9)),
            ((4, 0, 0), (0, 3, 1)),
        ]
        outs = [np.empty(sizes, np.float32) for _, sizes in boxes]
        done = []
        read_rectangles(
            [(variable, *box, out) for box, out in zip(boxes, outs, strict=True)],
            verify=True,
            threads=2,
            advance=done.append,
        )
        assert sum(done) == sum(out.nbytes for out in outs)
        for (offsets, sizes), out in zip(boxes, outs, strict=True):
            assert np.array_equal(out, values[tuple(slice(a, a + n) for a, n in zip(offsets, sizes, strict=True))])


def test_a_whole_block_inside_a_rectangle_is_checked(tmp_path):
    values = np.zeros((40, MIB), np.uint8)
    vs.save(tmp_path / "c", {"w": values}, durable=False)
    flip(tmp_path / "c/w/out", 17 * MIB)
    variable = vs.open(tmp_path / "c")["w"]
    for first, last, is_found in [(16, 32, True), (15, 33, True), (17, 40, False), (16, 31, False)]:
        target = np.empty((last - first, MIB), np.uint8)
        if is_found:
            with pytest.raises(DigestMismatch, match="bytes 16777216 to 33554432"):
                read_rectangle(variable, (first, 0), target.shape, target)
        else:
            read_rectangle(variable, (first, 0), target.shape, target)


@pytest.mark.parametrize(
    ("offsets", "sizes", "target", "message"),
    [
        ((0,), (2, 3), np.empty((2, 3)), "the rectangle has 1 offset and 2 sizes in 2 dimensions"),
        ((0, 1), (2, 3), np.empty((2, 3)), r"the rectangle \[0:2, 1:4\] does not lie within \[2, 3\]"),
        ((-1, 0), (1, 3), np.empty((1, 3)), "does not lie within"),
        ((0, 0), (2, 3), np.empty((3, 2)), r"array of its shape and type: found \[3, 2\] float64, expected \[2, 3\]"),
        ((0, 0), (2, 3), np.empty((2, 3), np.float32), r"found \[2, 3\] float32, expected \[2, 3\] float64"),
        ((0, 0), (2, 3), np.broadcast_to(np.empty(3), (2, 3)), "needs a writeable array"),
    ],
)
def test_a_rectangle_that_does_not_fit_is_refused(tmp_path, offsets, sizes, target, message):
    vs.save(tmp_path / "c", {"w": np.ones((2, 3))}, durable=False)
    with pytest.raises(UsageError, match=message):
        read_rectangle(vs.open(tmp_path / "c")["w"], offsets, sizes, target)


def test_bfloat16_of_four_bytes_has_regions_too(tmp_path):
    values = np.arange(12, dtype=np.float32).reshape(3, 4)
    vs.save(tmp_path / "c", {"w": values}, durable=False)
    (tmp_path / "c/w/meta").unlink()
    (tmp_path / "c/w/meta").write_text("shape {\n  dim: 3\n  dim: 4\n}\ndata_type: kBFloat16\n")
    vs.seal(tmp_path / "c")
    record_regions(tmp_path / "c", {"w": bands((3, 4), 1, [1])})
    for way, read in all_ways(tmp_path / "c", (3, 4)):
        found = read()
        assert (found.dtype, np.array_equal(found, values.astype(ml_dtypes.bfloat16))) == (ml_dtypes.bfloat16, True), (
            way
        )
    flip(tmp_path / "c/w/out", 4)
    for _, read in all_ways(tmp_path / "c", (3, 4)):
        with pytest.raises(DigestMismatch, match=r"region \[0:3, 1:4\]"):
            read()


@pytest.mark.parametrize("shape", [(), (0, 4), (1, 1)])
def test_scalars_and_empty_variables_have_regions_too(tmp_path, shape):
    values = save(tmp_path / "c", shape, [((0,) * len(shape), shape)])
    for way, read in all_ways(tmp_path / "c", shape):
        assert np.array_equal(read(), values), way
    assert vs.verify(tmp_path / "c").ok
    vs.merge(tmp_path / "again", tmp_path / "c", verify=True, durable=False)
    assert len(vs.open(tmp_path / "again")["w"].entry.regions) == 1
