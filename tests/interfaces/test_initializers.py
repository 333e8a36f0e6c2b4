"""The initializers give the documented numbers: each formula is written out again here, in the plainest way."""

import inspect
import math

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, strategies as st

from varstore.errors import UnsupportedDtype, UsageError, VarstoreError
from varstore.interfaces.oneflow import initializers as flow

SEEDS = [0, 1, 20210412]
SHAPES = [(7,), (5, 3), (8, 3, 2, 2), (8, 2, 2, 3), (4, 2, 3, 5, 2), (1, 1)]
EMPTY_SHAPES = [(0,), (0, 3), (3, 0), (2, 0, 4, 4)]
FLOAT32 = np.dtype(np.float32)


def rng(seed):
    return np.random.default_rng(seed)


def run(initializer, shape, seed, dtype=FLOAT32):
    values = initializer(shape, np.dtype(dtype), rng(seed))
    assert values.shape == shape
    assert values.dtype == dtype
    assert values.flags.c_contiguous
    assert values.flags.writeable
    return values


def truncated_literally(mean, stddev, count, generator):
    kept = []
    while len(kept) < count:
        for value in generator.normal(mean, stddev, count - len(kept)):
            if abs(value - mean) < 2 * stddev:
                kept.append(value)
    return np.array(kept, dtype=np.float64)


def fans_literally(shape, data_format):
    fan_in = 1
    for extent in shape[1:]:
        fan_in = fan_in * extent
    fan_out = shape[0]
    spatial = shape[1:-1] if data_format.startswith("N") and not data_format.startswith("NC") else shape[2:]
    for extent in spatial:
        fan_out = fan_out * extent
    return fan_in, fan_out


def fan_literally(shape, mode, data_format):
    fan_in, fan_out = fans_literally(shape, data_format)
    if mode == "fan_in":
        return fan_in
    if mode == "fan_out":
        return fan_out
    return (fan_in + fan_out) / 2


def variance_scaling_literally(shape, seed, scale, mode, distribution, data_format):
    count = int(np.prod(shape))
    s = scale / fan_literally(shape, mode, data_format)
    if distribution == "truncated_normal":
        return truncated_literally(0, math.sqrt(s) / 0.87962566103423978, count, rng(seed))
    if distribution == "random_normal":
        return rng(seed).normal(0, math.sqrt(s), count)
    limit = math.sqrt(3 * s)
    return rng(seed).uniform(-limit, limit, count)


def test_names_and_defaults_are_oneflows():
    assert {
        name: str(inspect.signature(getattr(flow, name)))
        for name in flow.__all__
        if "initializer" in name or "trunc" in name
    } == {
        "constant_initializer": "(value: 'complex' = 0, dtype: 'DTypeLike' = <class 'numpy.float32'>) -> 'Initializer'",
        "zeros_initializer": "(dtype: 'DTypeLike' = <class 'numpy.float32'>) -> 'Initializer'",
        "ones_initializer": "(dtype: 'DTypeLike' = <class 'numpy.float32'>) -> 'Initializer'",
        "random_uniform_initializer": "(minval: 'float' = 0, maxval: 'float' = 1, "
        "dtype: 'DTypeLike' = <class 'numpy.float32'>) -> 'Initializer'",
        "random_normal_initializer": "(mean: 'float' = 0.0, stddev: 'float' = 1.0) -> 'Initializer'",
        "truncated_normal_initializer": "(mean: 'float' = 0.0, stddev: 'float' = 1.0) -> 'Initializer'",
        "truncated_normal": "(stddev: 'float' = 1.0) -> 'Initializer'",
        "variance_scaling_initializer": "(scale: 'float' = 1.0, mode: 'str' = 'fan_in', "
        "distribution: 'str' = 'truncated_normal', data_format: 'str' = '') -> 'Initializer'",
        "glorot_uniform_initializer": "(data_format: 'str' = '') -> 'Initializer'",
        "glorot_normal_initializer": "(data_format: 'str' = '') -> 'Initializer'",
        "xavier_uniform_initializer": "(data_format: 'str' = '') -> 'Initializer'",
        "xavier_normal_initializer": "(data_format: 'str' = '') -> 'Initializer'",
        "kaiming_initializer": "(shape: 'Sequence[int]', distribution: 'str' = 'random_normal', "
        "mode: 'str' = 'fan_in', nonlinearity: 'str | None' = 'leaky_relu', "
        "negative_slope: 'float' = 0.0, data_format: 'str' = 'NCHW') -> 'Initializer'",
    }


FUNCTIONS = {
    "constant": (flow.constant_initializer(2.5), lambda n, seed: np.full(n, 2.5)),
    "zeros": (flow.zeros_initializer(), lambda n, seed: np.zeros(n)),
    "ones": (flow.ones_initializer(), lambda n, seed: np.ones(n)),
    "uniform": (
        flow.random_uniform_initializer(),
        lambda n, seed: rng(seed).uniform(0, np.nextafter(1.0, np.inf), n),
    ),
    "uniform bounds": (
        flow.random_uniform_initializer(-3, 0.25, "float64"),
        lambda n, seed: rng(seed).uniform(-3, np.nextafter(0.25, np.inf), n),
    ),
    "uniform float32 bounds": (
        flow.random_uniform_initializer(np.float32(-0.1), np.float32(0.1)),
        lambda n, seed: rng(seed).uniform(float(np.float32(-0.1)), np.nextafter(float(np.float32(0.1)), np.inf), n),
    ),
    "uniform integers": (
        flow.random_uniform_initializer(-20, 50, np.int32),
        lambda n, seed: rng(seed).integers(-20, 50, n),
    ),
    "uniform int8": (
        flow.random_uniform_initializer(-128, 128, np.int8),
        lambda n, seed: rng(seed).integers(-128, 128, n),
    ),
    "uniform int64 whole range": (
        flow.random_uniform_initializer(-(2**63), 2**63, np.int64),
        lambda n, seed: rng(seed).integers(-(2**63), 2**63, n),
    ),
    "normal": (flow.random_normal_initializer(), lambda n, seed: rng(seed).normal(0.0, 1.0, n)),
    "normal parameters": (flow.random_normal_initializer(-1, 0.02), lambda n, seed: rng(seed).normal(-1, 0.02, n)),
    "normal of no width": (flow.random_normal_initializer(3, 0), lambda n, seed: np.full(n, 3.0)),
    "truncated": (
        flow.truncated_normal_initializer(),
        lambda n, seed: truncated_literally(0.0, 1.0, n, rng(seed)),
    ),
    "truncated parameters": (
        flow.truncated_normal_initializer(10, 0.5),
        lambda n, seed: truncated_literally(10, 0.5, n, rng(seed)),
    ),
    "truncated short": (flow.truncated_normal(0.02), lambda n, seed: truncated_literally(0.0, 0.02, n, rng(seed))),
    "truncated of no width": (flow.truncated_normal_initializer(3, 0), lambda n, seed: np.full(n, 3.0)),
}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("shape", [(), *SHAPES, *EMPTY_SHAPES, (999,)], ids=str)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_values_do_not_depend_on_the_shape(function, shape, seed):
    initializer, literally = FUNCTIONS[function]
    expected = literally(math.prod(shape), seed).reshape(shape)
    for dtype in ("float32", "float64"):
        np.testing.assert_array_equal(run(initializer, shape, seed, dtype), expected.astype(dtype))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("data_format", ["", "NCHW", "NHWC", "NC", "NCDHW", "NDHWC"])
def test_values_scaled_by_the_fan(data_format, shape, seed):
    for mode in ("fan_in", "fan_out", "fan_avg"):
        for distribution in ("truncated_normal", "random_normal", "random_uniform"):
            for scale in (1.0, 2, 0.1):
                initializer = flow.variance_scaling_initializer(scale, mode, distribution, data_format)
                expected = variance_scaling_literally(shape, seed, scale, mode, distribution, data_format)
                values = run(initializer, shape, seed, "float64")
                np.testing.assert_array_equal(values, expected.reshape(shape))
                np.testing.assert_array_equal(run(initializer, shape, seed), expected.reshape(shape).astype(np.float32))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("data_format", ["", "NCHW", "NHWC"])
def test_glorot_is_xavier_is_variance_scaling(data_format, shape, seed):
    fan_in, fan_out = fans_literally(shape, data_format)
    count = math.prod(shape)
    limit = math.sqrt(3 * (1.0 / ((fan_in + fan_out) / 2)))
    uniform = rng(seed).uniform(-limit, limit, count).reshape(shape)
    normal = rng(seed).normal(0, math.sqrt(1.0 / ((fan_in + fan_out) / 2)), count).reshape(shape)
    for function, expected in (
        (flow.glorot_uniform_initializer, uniform),
        (flow.xavier_uniform_initializer, uniform),
        (flow.glorot_normal_initializer, normal),
        (flow.xavier_normal_initializer, normal),
    ):
        np.testing.assert_array_equal(run(function(data_format), shape, seed, "float64"), expected)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("data_format", ["", "NCHW", "NHWC"])
def test_kaiming(data_format, shape, seed):
    gains = [
        (None, 0.0, 1),
        ("sigmoid", 0.0, 1),
        ("tanh", 0.0, 5 / 3),
        ("relu", 0.5, math.sqrt(2)),
        ("leaky_relu", 0.0, math.sqrt(2)),
        ("leaky_relu", 0.2, math.sqrt(2 / (1 + 0.2**2))),
        ("leaky_relu", 1, 1),
    ]
    count = math.prod(shape)
    for mode in ("fan_in", "fan_out", "fan_avg"):
        for nonlinearity, slope, gain in gains:
            stddev = gain / math.sqrt(fan_literally(shape, mode, data_format))
            bound = math.sqrt(3) * stddev
            for distribution, expected in (
                ("random_normal", rng(seed).normal(0.0, stddev, count)),
                ("random_uniform", rng(seed).uniform(-bound, np.nextafter(bound, np.inf), count)),
            ):
                initializer = flow.kaiming_initializer(shape, distribution, mode, nonlinearity, slope, data_format)
                values = run(initializer, shape, seed, "float64")
                np.testing.assert_allclose(values, expected.reshape(shape), rtol=1e-15, atol=0)


def test_kaiming_takes_the_fan_of_the_shape_it_was_given():
    initializer = flow.kaiming_initializer([2, 8], nonlinearity=None)
    np.testing.assert_array_equal(run(initializer, (3,), 4, "float64"), rng(4).normal(0.0, 1 / math.sqrt(8), 3))


@pytest.mark.parametrize(
    ("shape", "data_format", "fan_in", "fan_out", "fan_avg"),
    [
        # A dense layer of 784 inputs and 100 outputs.
        ((100, 784), "", 784, 100, 442),
        ((100, 784), "NCHW", 784, 100, 442),
        ((100, 784), "NHWC", 784, 100, 442),
        # 32 filters of 5 x 5 over one channel.
        ((32, 1, 5, 5), "", 25, 800, 412.5),
        ((32, 1, 5, 5), "NCHW", 25, 800, 412.5),
        ((32, 5, 5, 1), "NHWC", 25, 800, 412.5),
        # 64 filters of 3 x 3 over 16 channels.
        ((64, 16, 3, 3), "NCHW", 144, 576, 360),
        ((64, 3, 3, 16), "NHWC", 144, 576, 360),
        # The same dimensions read in the wrong order.
        ((64, 16, 3, 3), "NHWC", 144, 3072, 1608),
        # One and three spatial dimensions.
        ((6, 4, 7), "NCW", 28, 42, 35),
        ((6, 7, 4), "NWC", 28, 42, 35),
        ((2, 3, 4, 5, 6), "NCDHW", 360, 240, 300),
        ((2, 4, 5, 6, 3), "NDHWC", 360, 240, 300),
        ((9,), "", 1, 9, 5),
        ((9,), "NHWC", 1, 9, 5),
    ],
)
def test_fan_by_hand(shape, data_format, fan_in, fan_out, fan_avg):
    for mode, fan in (("fan_in", fan_in), ("fan_out", fan_out), ("fan_avg", fan_avg)):
        standard = rng(0).normal(0, 1, math.prod(shape)).reshape(shape)
        scaled = flow.variance_scaling_initializer(1.0, mode, "random_normal", data_format)
        np.testing.assert_allclose(run(scaled, shape, 0, "float64"), standard / math.sqrt(fan), rtol=1e-12)
        kaiming = flow.kaiming_initializer(shape, "random_normal", mode, None, 0.0, data_format)
        np.testing.assert_allclose(run(kaiming, shape, 0, "float64"), standard / math.sqrt(fan), rtol=1e-12)


@pytest.mark.parametrize(
    ("initializer", "literally"),
    [
        (flow.random_uniform_initializer(-1, 2), lambda n: rng(5).uniform(-1, np.nextafter(2.0, np.inf), n)),
        (flow.random_uniform_initializer(0, 10, "int8"), lambda n: rng(5).integers(0, 10, n)),
        (flow.random_normal_initializer(1, 2), lambda n: rng(5).normal(1, 2, n)),
    ],
)
def test_a_large_variable_is_drawn_as_if_at_once(initializer, literally):
    shape = (3, 700_001)
    np.testing.assert_array_equal(run(initializer, shape, 5), literally(3 * 700_001).reshape(shape).astype(np.float32))


def test_a_large_truncated_normal_is_drawn_as_if_at_once():
    count = 2_100_003
    generator = rng(5)
    values = np.empty(0)
    while values.size < count:
        drawn = generator.normal(1, 2, count - values.size)
        values = np.concatenate([values, drawn[np.abs(drawn - 1) < 4]])
    np.testing.assert_array_equal(run(flow.truncated_normal_initializer(1, 2), (count,), 5, "float64"), values)


@given(
    minval=st.floats(-1e6, 1e6),
    width=st.floats(0, 1e6),
    seed=st.integers(0, 2**32),
)
def test_uniform_stays_within_its_bounds(minval, width, seed):
    values = run(flow.random_uniform_initializer(minval, minval + width), (50,), seed, "float64")
    assert values.min() >= minval
    assert values.max() <= np.nextafter(minval + width, np.inf)


@given(low=st.integers(-128, 126), width=st.integers(1, 100), seed=st.integers(0, 2**32))
def test_integers_stay_below_maxval(low, width, seed):
    high = min(low + width, 128)
    values = run(flow.random_uniform_initializer(low, high, np.int8), (200,), seed, np.int8)
    assert values.min() >= low
    assert values.max() < high


@given(mean=st.floats(-100, 100), stddev=st.floats(0, 100), seed=st.integers(0, 2**32))
def test_truncated_stays_within_two_standard_deviations(mean, stddev, seed):
    values = run(flow.truncated_normal_initializer(mean, stddev), (50,), seed, "float64")
    assert (np.abs(values - mean) <= 2 * stddev).all()


def test_distributions_have_their_moments():
    count = (200, 1000)
    for distribution in ("truncated_normal", "random_normal", "random_uniform"):
        values = run(flow.variance_scaling_initializer(2.0, "fan_in", distribution), count, 0, "float64")
        assert abs(values.mean()) < 5e-4
        assert values.var() == pytest.approx(2.0 / 1000, rel=0.01)


NARROW = ["float16", *(name for name in dir(ml_dtypes) if name.startswith(("bfloat", "float")))]


@pytest.mark.parametrize("name", NARROW)
def test_narrow_types_are_cast_from_float64(name):
    dtype = np.dtype(getattr(ml_dtypes, name, name))
    for initializer, expected in (
        (flow.random_normal_initializer(), rng(3).normal(0.0, 1.0, 600)),
        (flow.random_uniform_initializer(0.5, 1, dtype), rng(3).uniform(0.5, np.nextafter(1.0, np.inf), 600)),
        (flow.truncated_normal(0.5), truncated_literally(0.0, 0.5, 600, rng(3))),
        (flow.glorot_uniform_initializer(), rng(3).uniform(-math.sqrt(3 / 25), math.sqrt(3 / 25), 600)),
        (flow.constant_initializer(0.5, dtype), np.full(600, 0.5)),
    ):
        values = run(initializer, (30, 20), 3, dtype)
        assert values.tobytes() == expected.astype(dtype).tobytes()


@pytest.mark.parametrize("dtype", ["bool", "uint8", "int64", "complex64", ml_dtypes.int4, ml_dtypes.uint2])
def test_constants_of_other_types(dtype):
    for value in (0, 1):
        values = run(flow.constant_initializer(value, dtype), (2, 3), 0, np.dtype(dtype))
        assert [int(element.real) for element in values.flat] == [value] * 6
    np.testing.assert_array_equal(run(flow.zeros_initializer(dtype), (3,), 0, np.dtype(dtype)), np.zeros(3, dtype))
    np.testing.assert_array_equal(run(flow.ones_initializer(dtype), (3,), 0, np.dtype(dtype)), np.ones(3, dtype))


def test_constants_are_exact():
    large = 2**62 + 1
    assert run(flow.constant_initializer(large, np.int64), (2,), 0, np.int64).tolist() == [large] * 2
    assert run(flow.constant_initializer(np.uint64(2**64 - 1), np.uint64), (), 0, np.uint64) == 2**64 - 1
    assert run(flow.constant_initializer(1 + 2j, np.complex128), (1,), 0, np.complex128)[0] == 1 + 2j
    assert np.isnan(run(flow.constant_initializer(math.nan), (1,), 0)[0])
    assert run(flow.constant_initializer(-math.inf), (1,), 0)[0] == -math.inf
    assert run(flow.constant_initializer(3.0), (1,), 0, np.int8)[0] == 3


def test_empty_variables_need_no_fan():
    for shape in [*EMPTY_SHAPES, (0, 0)]:
        for mode in ("fan_in", "fan_out", "fan_avg"):
            assert run(flow.variance_scaling_initializer(1.0, mode), shape, 0).size == 0


def test_initializers_are_frozen_and_comparable():
    initializer = flow.glorot_normal_initializer("NHWC")
    assert initializer == flow.xavier_normal_initializer("NHWC")
    assert initializer != flow.glorot_normal_initializer()
    assert repr(flow.constant_initializer(3)) == "Constant(value=3)"
    with pytest.raises(AttributeError):
        initializer.scale = 2.0


REFUSALS = [
    (
        lambda: flow.constant_initializer("1"),
        "value: not a constant: found '1', expected a number",
    ),
    (
        lambda: flow.constant_initializer([1, 2]),
        "value: not a constant: found [1, 2], expected a number",
    ),
    (
        lambda: flow.constant_initializer(2.5, np.int32),
        "value: int32 cannot hold this constant: found 2.5, expected an integer from -2147483648 to 2147483647. "
        "Use another value, or give the variable another dtype",
    ),
    (
        lambda: flow.constant_initializer(128, np.int8),
        "value: int8 cannot hold this constant: found 128, expected an integer from -128 to 127. "
        "Use another value, or give the variable another dtype",
    ),
    (
        lambda: flow.constant_initializer(0.5)((2,), np.dtype(np.uint8), rng(0)),
        "value: uint8 cannot hold this constant: found 0.5, expected an integer from 0 to 255. "
        "Use another value, or give the variable another dtype",
    ),
    (
        lambda: flow.constant_initializer(math.nan, np.int8),
        "value: int8 cannot hold this constant: found nan, expected an integer from -128 to 127. "
        "Use another value, or give the variable another dtype",
    ),
    (
        lambda: flow.constant_initializer(1e6, np.float16),
        "value: float16 cannot hold this constant: found 1000000.0, expected a value that is finite in this type. "
        "Use another value, or give the variable another dtype",
    ),
    (
        lambda: flow.zeros_initializer(ml_dtypes.float8_e8m0fnu),
        "value: float8_e8m0fnu cannot hold this constant: found 0, expected a value that is finite in this type. "
        "Use another value, or give the variable another dtype",
    ),
    (
        lambda: flow.constant_initializer(1j),
        "value: float32 cannot hold this constant: found 1j, expected a value that is finite in this type. "
        "Use another value, or give the variable another dtype",
    ),
    (
        lambda: flow.ones_initializer("float33"),
        "dtype: not a type: found 'float33', expected a numpy type or name",
    ),
    (
        lambda: flow.random_uniform_initializer(2, 1),
        "minval: not a range that can be drawn from: found 2 with maxval=1, "
        "expected minval <= maxval, less than the largest float apart",
    ),
    (
        lambda: flow.random_uniform_initializer(-1.7e308, 1.7e308),
        "minval: not a range that can be drawn from: found -1.7e+308 with maxval=1.7e+308, "
        "expected minval <= maxval, less than the largest float apart",
    ),
    (
        lambda: flow.random_uniform_initializer(0, math.inf),
        "maxval: not a usable number: found inf, expected a finite number",
    ),
    (
        lambda: flow.random_uniform_initializer(math.nan, 1),
        "minval: not a usable number: found nan, expected a finite number",
    ),
    (
        lambda: flow.random_uniform_initializer(3, 3, np.int8),
        "minval: not a range of integers that can be drawn from: found 3 with maxval=3, "
        "expected whole numbers, -128 <= minval < maxval <= 128 (maxval is not drawn)",
    ),
    (
        lambda: flow.random_uniform_initializer(0.5, 3, np.int32),
        "minval: not a range of integers that can be drawn from: found 0.5 with maxval=3, "
        "expected whole numbers, -2147483648 <= minval < maxval <= 2147483648 (maxval is not drawn)",
    ),
    (
        lambda: flow.random_uniform_initializer(0, 1, bool),
        "dtype: values of this type cannot be drawn: found bool, expected a floating or integer type",
    ),
    (
        lambda: flow.random_normal_initializer("0"),
        "mean: not a usable number: found '0', expected a finite number",
    ),
    (
        lambda: flow.random_normal_initializer(10**400),
        f"mean: not a usable number: found 1{'0' * 99}…{'0' * 99}, expected a finite number",
    ),
    (
        lambda: flow.random_normal_initializer(0, -1),
        "stddev: not a usable number: found -1, expected a finite number of 0 or more",
    ),
    (
        lambda: flow.truncated_normal_initializer(math.inf),
        "mean: not a usable number: found inf, expected a finite number",
    ),
    (
        lambda: flow.truncated_normal(-0.5),
        "stddev: not a usable number: found -0.5, expected a finite number of 0 or more",
    ),
    (
        lambda: flow.variance_scaling_initializer(-1),
        "scale: not a usable number: found -1, expected a finite number of 0 or more",
    ),
    (
        lambda: flow.variance_scaling_initializer(mode="fan"),
        "mode: unknown mode: found 'fan', expected one of 'fan_in', 'fan_out', 'fan_avg'",
    ),
    (
        lambda: flow.variance_scaling_initializer(distribution="normal"),
        "distribution: unknown distribution: found 'normal', "
        "expected one of 'truncated_normal', 'random_normal', 'random_uniform'",
    ),
    (
        lambda: flow.variance_scaling_initializer(data_format="CHW"),
        "data_format: unknown data_format: found 'CHW', expected 'NC…' (channels first), 'N…C' (channels last) or ''",
    ),
    (
        lambda: flow.glorot_uniform_initializer("NHW"),
        "data_format: unknown data_format: found 'NHW', expected 'NC…' (channels first), 'N…C' (channels last) or ''",
    ),
    (
        lambda: flow.glorot_normal_initializer(None),
        "data_format: unknown data_format: found None, expected 'NC…' (channels first), 'N…C' (channels last) or ''",
    ),
    (
        lambda: flow.glorot_uniform_initializer()((), FLOAT32, rng(0)),
        "shape: its fan_avg is not positive: found (), expected positive dimensions",
    ),
    (
        lambda: flow.kaiming_initializer(()),
        "shape: its fan_in is not positive: found (), expected positive dimensions",
    ),
    (
        lambda: flow.kaiming_initializer((3, 0)),
        "shape: its fan_in is not positive: found (3, 0), expected positive dimensions",
    ),
    (
        lambda: flow.kaiming_initializer((0, 3), mode="fan_out"),
        "shape: its fan_out is not positive: found (0, 3), expected positive dimensions",
    ),
    (
        lambda: flow.kaiming_initializer(3),
        "shape: not a shape: found 3, expected a sequence of sizes, like (2, 3)",
    ),
    (
        lambda: flow.kaiming_initializer((3, -1)),
        "shape: not a shape: found (3, -1), expected a sequence of sizes, like (2, 3)",
    ),
    (
        lambda: flow.kaiming_initializer((3, 1.5)),
        "shape: not a shape: found (3, 1.5), expected a sequence of sizes, like (2, 3)",
    ),
    (
        lambda: flow.kaiming_initializer((3, 3), distribution="truncated_normal"),
        "distribution: unknown distribution: found 'truncated_normal', "
        "expected one of 'random_normal', 'random_uniform'",
    ),
    (
        lambda: flow.kaiming_initializer((3, 3), mode="avg"),
        "mode: unknown mode: found 'avg', expected one of 'fan_in', 'fan_out', 'fan_avg'",
    ),
    (
        lambda: flow.kaiming_initializer((3, 3), nonlinearity="selu"),
        "nonlinearity: unknown nonlinearity: found 'selu', "
        "expected one of None, 'sigmoid', 'tanh', 'relu', 'leaky_relu'",
    ),
    (
        lambda: flow.kaiming_initializer((3, 3), negative_slope=None),
        "negative_slope: not a usable number: found None, expected a finite number",
    ),
    (
        lambda: flow.kaiming_initializer((3, 3), data_format="HWIO"),
        "data_format: unknown data_format: found 'HWIO', expected 'NC…' (channels first), 'N…C' (channels last) or ''",
    ),
]


@pytest.mark.parametrize(("refused", "message"), REFUSALS, ids=[message[:60] for _, message in REFUSALS])
def test_refusals(refused, message):
    with pytest.raises(VarstoreError) as caught:
        refused()
    assert type(caught.value) is UsageError
    assert str(caught.value) == message


def test_types_without_a_place_on_disk_are_refused():
    with pytest.raises(UnsupportedDtype, match="Python objects cannot be saved: found dtype object"):
        flow.zeros_initializer(object)
