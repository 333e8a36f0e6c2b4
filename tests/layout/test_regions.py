"""The arithmetic of regions, with numpy as the judge: which bytes they are, whether they tile, what lies inside."""

from __future__ import annotations

import time
from itertools import pairwise, product

import numpy as np
import pytest
import xxhash
from hypothesis import given, strategies as st
from support import crafted
from support.regions import tilings

from varstore.layout.digests import BLOCK, DIGEST_SIZE
from varstore.layout.manifest import region_digests_problem
from varstore.layout.regions import Region, bands, inside, ordinary, run_of, runs, tiling_problem

pytestmark = pytest.mark.core

shapes = st.lists(st.integers(1, 5), max_size=4).map(tuple)


@st.composite
def rectangles(draw: st.DrawFn, shape: tuple[int, ...], smallest: int = 0) -> Region:
    bounds = [sorted((draw(st.integers(0, n - smallest)), draw(st.integers(smallest, n)))) for n in shape]
    return Region(
        tuple(first for first, _ in bounds),
        tuple(max(last - first, smallest) for first, last in bounds),
    )


@given(st.data(), shapes, st.sampled_from([1, 2, 4]))
def test_the_runs_of_a_rectangle_are_its_bytes_in_order_and_as_long_as_can_be(data, shape, itemsize):
    region = data.draw(rectangles(shape))
    array = np.arange(np.prod(shape, dtype=int)).reshape(shape)
    elements = array[region.within()].reshape(-1).tolist()
    found = list(runs(region.offsets, region.sizes, shape, itemsize))
    covered = [byte for offset, nbytes in found for byte in range(offset, offset + nbytes)]
    assert covered == [byte for element in elements for byte in range(element * itemsize, (element + 1) * itemsize)]
    assert all(a + n < b for (a, n), (b, _) in pairwise(found))
    assert run_of(region.offsets, region.sizes, shape, itemsize) == (found[0] if len(found) == 1 else None)


@given(st.data(), shapes)
def test_regions_tile_if_each_element_is_in_one_of_them_and_only_then(data, shape):
    regions = list(data.draw(tilings(shape)))
    for _ in range(data.draw(st.integers(0, 2))):
        change = data.draw(st.sampled_from(["add", "drop", "alter"]))
        if change != "add" and regions:
            regions.pop(data.draw(st.integers(0, len(regions) - 1)))
        if change != "drop":
            regions.append(data.draw(rectangles(shape)))
    count = np.zeros(shape, int)
    for region in regions:
        count[region.within()] += 1
    assert (tiling_problem(regions, shape) is None) == bool((count == 1).all())


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1, 1)])
def test_scalars_and_what_has_no_elements_are_one_region_or_any_empty_ones(shape):
    whole = Region((0,) * len(shape), shape)
    assert tiling_problem([whole], shape) is None
    assert (tiling_problem([], shape) is None) == (0 in shape)
    assert (tiling_problem([whole, whole], shape) is None) == (0 in shape)
    assert list(runs(whole.offsets, whole.sizes, shape, 4)) == ([] if 0 in shape else [(0, 4)])


PINWHEEL = [((0, 0), (1, 2)), ((0, 2), (2, 1)), ((2, 1), (1, 2)), ((1, 0), (2, 1)), ((1, 1), (1, 1))]


def test_a_pinwheel_which_no_cut_divides_tiles():
    assert tiling_problem([Region(*one) for one in PINWHEEL], (3, 3)) is None
    assert tiling_problem([Region(*one) for one in PINWHEEL[:-1]], (3, 3)) == (
        "the regions, of 8 elements in all, do not tile [3, 3]"
    )


@pytest.mark.parametrize(
    ("offsets", "sizes", "message"),
    [
        ((0,), (2, 3), "the region has 1 offset and 2 sizes in 2 dimensions"),
        ((0, 0), (2, 3, 1), "the region has 2 offsets and 3 sizes in 2 dimensions"),
        ((), (), "the region has 0 offsets"),
        ((-1, 0), (2, 3), r"the region \[-1:1, 0:3\] does not lie within \[2, 3\]"),
        ((1, 0), (-1, 3), r"the region \[1:0, 0:3\] does not lie within"),
        ((0, 1), (2, 3), r"the region \[0:2, 1:4\] does not lie within"),
        (((1 << 63) - 1, 0), ((1 << 63) - 1, 3), "does not lie within"),
    ],
)
def test_a_region_elsewhere_is_named(offsets, sizes, message):
    with pytest.raises(AssertionError, match=message):
        assert tiling_problem([Region((0, 0), (2, 3)), Region(offsets, sizes)], (2, 3)) is None


def test_a_great_many_regions_take_time_in_proportion_or_are_refused():
    count = 10_000
    rows = [Region((row,), (1,)) for row in reversed(range(count))]
    start = time.process_time()
    assert tiling_problem(rows, (count,)) is None
    assert "do not tile" in str(tiling_problem([*rows[1:], rows[1]], (count,)))
    twisted = [Region(pair, (1, 1)) for pair in crafted.colliding_pairs(5_000)]  # corners whose tuples hash alike
    assert "do not tile" in str(tiling_problem(twisted, (1 << 62, 1 << 62)))
    assert time.process_time() - start < 5
    assert "too many regions" in str(tiling_problem(rows * 14, (count,)))
    cells = [Region(corner, (1,) * 9) for corner in product((0, 1), repeat=9)]
    assert "512 that cut 9 dimensions" in str(tiling_problem(cells, (2,) * 9))
    assert tiling_problem([Region((0,) * 64, (1,) * 64)], (1,) * 64) is None


@given(st.data(), shapes)
def test_what_lies_inside_a_rectangle_is_what_it_covers(data, shape):
    regions, rectangle = data.draw(tilings(shape)), data.draw(rectangles(shape))
    mask = np.zeros(shape, bool)
    mask[rectangle.within()] = True
    found = inside(regions, rectangle.offsets, rectangle.sizes)
    assert found == [region for region in regions if mask[region.within()].all()]
    values = np.arange(mask.size).reshape(shape)
    for region in found:
        part = values[rectangle.within()][region.within(rectangle.offsets)]
        assert part.tolist() == values[region.within()].tolist()


@given(st.data(), shapes, st.sampled_from([1, BLOCK // 2, BLOCK]))
def test_bands_share_no_rows_and_have_each_region_once(data, shape, row_nbytes):
    regions = sorted(data.draw(tilings(shape)))
    found = bands(regions, row_nbytes)
    assert [region for _, group in found for region in group] == regions
    assert [row for rows, _ in found for row in rows] == list(range(shape[0] if shape else 1))
    for rows, group in found:
        assert sum(region.elements for region in group) == len(rows) * np.prod(shape[1:], dtype=int)
    assert all(len(rows) * row_nbytes >= BLOCK for rows, _ in found[:-1])


@pytest.mark.parametrize(
    ("shape", "cuts", "is_ordinary"),
    [
        ((3, BLOCK // 8), [0, 1, 3], False),  # half a block per row
        ((5, BLOCK // 8), [0, 2, 4, 5], True),
        ((5, BLOCK // 8), [0, 4, 5], True),
        ((5, BLOCK // 8), [0, 2, 3, 5], False),
        ((0, 7), [0, 0], True),
    ],
)
def test_regions_of_whole_blocks_have_the_digests_of_out(shape, cuts, is_ordinary):
    values = np.arange(np.prod(shape), dtype=np.int32).reshape(shape)

    def digests(array: np.ndarray) -> bytes:
        flat = array.tobytes()
        return b"".join(xxhash.xxh3_128_digest(flat[at : at + BLOCK]) for at in range(0, len(flat), BLOCK))

    regions = [Region((a, 0), (b - a, *shape[1:]), digests(values[a:b])) for a, b in pairwise(cuts)]
    assert region_digests_problem(regions, 4) is None
    assert ordinary(regions[::-1], shape, 4) == (digests(values) if is_ordinary else None)
    if values.size:
        assert ordinary([Region((0, 0), (shape[0], 1)), Region((0, 1), (shape[0], shape[1] - 1))], shape, 4) is None


@pytest.mark.parametrize(("sizes", "count"), [((2, 3), 1), ((0, 3), 0), ((1, BLOCK), 4), ((1, BLOCK // 4 + 1), 2)])
def test_a_region_has_a_digest_for_each_16_mib(sizes, count):
    good = Region((0, 0), sizes, bytes(count * DIGEST_SIZE))
    assert region_digests_problem([good], 4) is None
    for wrong in (count * DIGEST_SIZE + 1, (count + 1) * DIGEST_SIZE, count * DIGEST_SIZE - 1):
        if wrong >= 0:
            assert "of digests cannot cover" in str(region_digests_problem([good._replace(digests=bytes(wrong))], 4))
