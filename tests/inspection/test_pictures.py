"""Histograms and heat maps beside numpy: exact counts, means of blocks, the same however the values were divided."""

import json
import math
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given, settings, strategies as st
from hypothesis.extra import numpy as hnp

import varstore as vs
from varstore.inspection.moments import piece_of
from varstore.inspection.pictures import Mosaic, counted, joined, matrix_shape

FLOATS = hnp.arrays(np.float64, st.integers(1, 200), elements=st.floats(allow_nan=True, allow_infinity=True))
INTEGERS = hnp.arrays(np.int32, st.integers(1, 200))


def histogram_of(values):
    piece = piece_of(values)
    return None if piece.low is None else counted(values, piece.low, piece.high)


@given(FLOATS | INTEGERS)
@example(np.array([0.0]))
@example(np.array([5e-324, 0.0]))
@example(np.array([1.7e308, -1.7e308]))
@example(np.array([-1e-30, 1.0]))
def test_every_finite_value_is_in_its_bin(values):
    found = histogram_of(values)
    finite = values[np.isfinite(values)]
    if found is None:
        assert not finite.size
        return
    assert 1 <= len(found.counts) <= 64
    assert found.counts[0]
    assert found.counts[-1]
    assert found.exponent >= 0 or values.dtype.kind == "f"
    width = Fraction(2) ** found.exponent
    numbers = [math.floor(Fraction(float(value)) / width) for value in finite]
    assert [numbers.count(found.first + at) for at in range(len(found.counts))] == found.counts.tolist()


@settings(max_examples=200)
@given(FLOATS | INTEGERS, st.lists(st.integers(0, 200), max_size=5), st.randoms())
@example(np.array([0.0, 1e-30, 2e-30]), [1], None)
def test_a_histogram_does_not_depend_on_how_the_values_are_divided(values, cuts, order):
    whole = histogram_of(values)
    parts = [
        histogram_of(part) for part in np.split(values, sorted(min(cut, len(values)) for cut in cuts)) if len(part)
    ]
    parts = [part for part in parts if part is not None]
    if order:
        order.shuffle(parts)
    if whole is None:
        assert not parts
        return
    found = joined(parts)
    assert (found.exponent, found.first, found.counts.tolist()) == (whole.exponent, whole.first, whole.counts.tolist())


@given(st.tuples(st.integers(1, 150), st.integers(1, 150)), st.integers(0, 2**32), st.lists(st.integers(0, 150)))
def test_a_heat_map_has_the_means_of_blocks(shape, seed, cuts):
    values = np.random.default_rng(seed).normal(size=shape)
    mosaic = Mosaic(shape)
    for first, last in zip(
        edges := sorted({0, *(min(cut, shape[0] - 1) for cut in cuts)}), [*edges[1:], shape[0]], strict=True
    ):
        mosaic.add(first * shape[1], values[first:last])
    found = mosaic.heat_map()
    starts = [np.arange(min(64, length)) * length // min(64, length) for length in shape]
    sizes = np.outer(*(np.diff([*begin, length]) for begin, length in zip(starts, shape, strict=True)))
    for part, of in ((found.means, values), (found.magnitudes, np.abs(values))):
        sums = np.add.reduceat(np.add.reduceat(of, starts[0], axis=0), starts[1], axis=1)
        np.testing.assert_allclose(part, sums / sizes, rtol=1e-9, atol=1e-12)


def test_parts_of_one_row_make_the_same_heat_map():
    values = np.arange(600.0).reshape(2, 300)
    mosaic = Mosaic((2, 300))
    for start in range(0, 600, 100):
        mosaic.add(start, values.reshape(-1)[start : start + 100])
    whole = Mosaic((2, 300))
    whole.add(0, values)
    np.testing.assert_allclose(mosaic.heat_map().means, whole.heat_map().means)


def test_sums_beyond_the_range_of_float64_are_means_within_it():
    mosaic = Mosaic((200, 200))
    mosaic.add(0, np.full((200, 200), 1.7e308))
    np.testing.assert_allclose(mosaic.heat_map().means, 1.7e308)


@pytest.mark.parametrize(
    ("shape", "matrix"),
    [((), None), ((5,), None), ((1, 5), None), ((0, 5), None), ((1, 3, 1, 4), (3, 4)), ((2, 3, 4), (2, 12))],
)
def test_which_variables_are_matrices(shape, matrix):
    assert matrix_shape(shape) == matrix


def test_pictures_come_with_the_statistics_where_they_are_asked_for(tmp_path):
    large = np.random.default_rng(1).normal(size=(1500, 1100)).astype(np.float32)  # more than one piece
    variables = {
        "large": large,
        "small": np.eye(3, dtype=ml_dtypes.bfloat16),
        "tiny": np.eye(2),
        "vector": np.array([True, False, True]),
        "bad": np.array([[np.nan, np.inf]]),
    }
    vs.save(tmp_path / "all", variables)
    report = vs.stats(tmp_path / "all", histograms=True, heat_maps=2, quantiles=False)
    assert [name for name, found in report.items() if found.heat_map] == ["large", "small"]
    assert report["large"].heat_map.means.shape == (64, 64)
    assert report["large"].heat_map.means.mean() == pytest.approx(large.mean(), abs=1e-3)
    assert sum(report["large"].histogram.counts) == large.size
    assert report["vector"].histogram.as_json() == {"start": 0.0, "width": 1.0, "counts": [1, 2]}
    assert report["bad"].histogram is None
    json.dumps(report.as_json(), allow_nan=False)
    plain = vs.stats(tmp_path / "all")
    assert {(found.histogram, found.heat_map) for found in plain.values()} == {(None, None)}
