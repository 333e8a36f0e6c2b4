"""Chunks are runs of the values in C order, of bounded size, that cover an array exactly."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, strategies as st

from varstore.layout.chunks import Chunks, chunk_shape

pytestmark = pytest.mark.core
MIB = 1 << 20


@st.composite
def shapes(draw, axes=8, elements=1 << 40):
    """Any shape up to 2^40 elements."""
    left, shape = elements, []
    for _ in range(draw(st.integers(0, axes))):
        extent = draw(st.one_of(st.integers(0, min(left, 9)), st.integers(0, left)))
        left //= max(extent, 1)
        shape.append(extent)
    return tuple(draw(st.permutations(shape)))


@given(shapes(), st.sampled_from([1, 2, 4, 8, 16, 3 * MIB]), st.sampled_from([1, 100, MIB, 16 * MIB]))
def test_a_chunk_is_a_run_of_bounded_size(shape, itemsize, limit):
    chunk = chunk_shape(shape, itemsize, limit)
    assert len(chunk) == len(shape)
    assert min(chunk, default=1) >= 1
    assert math.prod(chunk) * itemsize <= max(limit, itemsize)
    cut = next((axis for axis in range(len(shape)) if chunk[axis] > 1), len(shape))
    assert chunk[cut + 1 :] == tuple(max(extent, 1) for extent in shape[cut + 1 :]), "what is below the cut is whole"
    # No larger run would do: one more step along the cut axis is too much, or everything is in one chunk.
    if math.prod(Chunks(shape, chunk).counts) > 1:
        parts = -(-shape[cut] // chunk[cut]) if cut < len(shape) else 1
        below = math.prod(chunk[cut + 1 :]) * itemsize
        assert cut == len(shape) or parts == 1 or -(-shape[cut] // (parts - 1)) * below > limit


@given(shapes(axes=4, elements=600), st.integers(1, 600))
def test_chunks_cover_an_array_exactly(shape, limit):
    chunks = Chunks(shape, chunk_shape(shape, 1, limit))
    array = np.arange(math.prod(shape)).reshape(shape)
    found = []
    for index in chunks:
        assert index in chunks
        part = array[tuple(slice(i * step, (i + 1) * step) for i, step in zip(index, chunks.chunk, strict=True))]
        start, stop = chunks.run(index)
        assert part.reshape(-1).tolist() == list(range(start, stop))
        assert stop - start <= chunks.elements
        found += range(start, stop)
    assert found == list(range(array.size))
    assert chunks.counts not in chunks or not shape
    assert (-1,) * len(shape) not in chunks or not shape


@pytest.mark.parametrize(
    ("shape", "itemsize", "chunk"),
    [
        ((1, 1 << 31), 1, (1, MIB)),
        ((1 << 31,), 1, (MIB,)),
        ((1, 577, 1024), 4, (1, 193, 1024)),
        ((7, 64), 4, (7, 64)),
        ((), 8, ()),
        ((0, 5), 8, (1, 5)),
        ((5, 0), 8, (5, 1)),
        ((3, 2 * MIB), 1, (1, MIB)),
    ],
)
def test_chunks_of_a_mebibyte(shape, itemsize, chunk):
    assert chunk_shape(shape, itemsize, MIB) == chunk
