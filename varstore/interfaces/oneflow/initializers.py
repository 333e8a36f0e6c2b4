"""OneFlow's initializers: the values of a variable before anything is loaded into it.

An initializer is a callable ``(shape, dtype, rng) -> array``. Those here are immutable records of numbers that are
checked when the initializer is made. Random values are drawn from the generator in float64 (or int64), in C order, one
block after another, and then cast. So the numbers depend only on the seed and not on the size of a block, and the only
memory in addition to the result is one block.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from varstore.errors import UsageError
from varstore.layout.dtypes import data_type_of

if TYPE_CHECKING:
    from numpy.typing import DTypeLike

__all__ = [
    "Initializer",
    "as_dtype",
    "as_shape",
    "constant_initializer",
    "glorot_normal_initializer",
    "glorot_uniform_initializer",
    "kaiming_initializer",
    "ones_initializer",
    "random_normal_initializer",
    "random_uniform_initializer",
    "truncated_normal",
    "truncated_normal_initializer",
    "variance_scaling_initializer",
    "xavier_normal_initializer",
    "xavier_uniform_initializer",
    "zeros_initializer",
]

Initializer = Callable[[tuple[int, ...], np.dtype[Any], "np.random.Generator"], np.ndarray]
"""A function that returns an array of a shape and type; its only source of randomness is the generator."""

_BLOCK = 1 << 20
_LARGEST = sys.float_info.max
_TRUNCATED_STDDEV = 0.87962566103423978
"""Standard deviation of a standard normal distribution that is truncated at two."""

_MODES: dict[str, Callable[[int, int], float]] = {
    "fan_in": lambda fan_in, _: fan_in,
    "fan_out": lambda _, fan_out: fan_out,
    "fan_avg": lambda fan_in, fan_out: (fan_in + fan_out) / 2,
}
_GAINS: dict[str | None, Callable[[float], float]] = {
    None: lambda _: 1.0,
    "sigmoid": lambda _: 1.0,
    "tanh": lambda _: 5 / 3,
    "relu": lambda _: math.sqrt(2),
    "leaky_relu": lambda slope: math.sqrt(2 / (1 + slope**2)),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Constant:
    """The same number everywhere."""

    value: complex

    def __call__(self, shape: tuple[int, ...], dtype: np.dtype[Any], _: np.random.Generator) -> np.ndarray:
        _check_constant(self.value, dtype)
        return np.full(shape, self.value, dtype)


@dataclass(frozen=True, kw_only=True, slots=True)
class Drawn:
    """Independent values of a distribution with two parameters."""

    distribution: str
    parameters: tuple[float, float]

    def __call__(self, shape: tuple[int, ...], dtype: np.dtype[Any], rng: np.random.Generator) -> np.ndarray:
        draw = _DRAWS[self.distribution]
        values = np.empty(shape, dtype)
        flat = values.reshape(-1)
        for start in range(0, flat.size, _BLOCK):
            block = flat[start : start + _BLOCK]
            block[...] = draw(rng, *self.parameters, block.size)
        return values


@dataclass(frozen=True, kw_only=True, slots=True)
class VarianceScaling:
    """Values with mean zero, and a variance of `scale` divided by the fan of the shape."""

    scale: float
    mode: str
    distribution: str
    channels_last: bool

    def __call__(self, shape: tuple[int, ...], dtype: np.dtype[Any], rng: np.random.Generator) -> np.ndarray:
        if 0 in shape:
            return np.empty(shape, dtype)
        variance = self.scale / _fan(shape, self.mode, self.channels_last)
        distribution, parameters = _BY_VARIANCE[self.distribution]
        return Drawn(distribution=distribution, parameters=parameters(variance))(shape, dtype, rng)


def _draw_truncated(rng: np.random.Generator, mean: float, stddev: float, count: int) -> np.ndarray:
    if stddev == 0:
        return np.full(count, mean)
    values = np.empty(count)
    done = 0
    while done < count:
        drawn = rng.normal(mean, stddev, count - done)
        kept = drawn[np.abs(drawn - mean) < 2 * stddev]
        values[done : done + kept.size] = kept
        done += kept.size
    return values


_DRAWS: dict[str, Callable[..., np.ndarray]] = {
    "integers": lambda rng, low, high, count: rng.integers(low, high, count),
    "normal": lambda rng, mean, stddev, count: rng.normal(mean, stddev, count),
    "truncated_normal": _draw_truncated,
    "uniform": lambda rng, low, high, count: rng.uniform(low, high, count),
}
_BY_VARIANCE: dict[str, tuple[str, Callable[[float], tuple[float, float]]]] = {
    "truncated_normal": ("truncated_normal", lambda variance: (0.0, math.sqrt(variance) / _TRUNCATED_STDDEV)),
    "random_normal": ("normal", lambda variance: (0.0, math.sqrt(variance))),
    "random_uniform": ("uniform", lambda variance: (-math.sqrt(3 * variance), math.sqrt(3 * variance))),
}


def constant_initializer(value: complex = 0, dtype: DTypeLike = np.float32) -> Initializer:
    """Fill a variable with one number.

    Args:
        value: the number.
        dtype: the type that `value` is checked against now. The variable's own type decides what is stored.

    Raises:
        UsageError: `value` is not a number, an integer type cannot hold it exactly, or a floating type cannot hold it
            as a finite number. This is checked for `dtype` now, and for the variable's type when it is filled.

    Example:
        >>> vs.get_variable("alpha", shape=(2,), initializer=vs.constant_initializer(0.5)).numpy()
        array([0.5, 0.5], dtype=float32)
    """
    number = _plain(value)
    if not isinstance(number, (int, float, complex)):
        raise UsageError("not a constant", field="value", found=repr(value), expected="a number")
    _check_constant(number, as_dtype(dtype))
    return Constant(value=number)


def zeros_initializer(dtype: DTypeLike = np.float32) -> Initializer:
    """Fill a variable with zeros; see `constant_initializer`.

    Example:
        >>> vs.get_variable("bias", shape=(2,), initializer=vs.zeros_initializer()).numpy()
        array([0., 0.], dtype=float32)
    """
    return constant_initializer(0, dtype)


def ones_initializer(dtype: DTypeLike = np.float32) -> Initializer:
    """Fill a variable with ones; see `constant_initializer`.

    Example:
        >>> vs.get_variable("scale", shape=(2,), initializer=vs.ones_initializer()).numpy()
        array([1., 1.], dtype=float32)
    """
    return constant_initializer(1, dtype)


def random_uniform_initializer(minval: float = 0, maxval: float = 1, dtype: DTypeLike = np.float32) -> Initializer:
    """Draw values from a uniform distribution between `minval` and `maxval`.

    With a floating `dtype`, both ends are included, and rounding may give the float64 next to `maxval`. With an integer
    `dtype`, integers are drawn, and `maxval` is excluded. The values are cast to the variable's own type.

    Raises:
        UsageError: the bounds are not finite numbers in order, or `dtype` is an integer type and they are not integers.

    Example:
        >>> initializer = vs.random_uniform_initializer(-0.1, 0.1)
        >>> values = vs.get_variable("weight", shape=(64, 32), initializer=initializer).numpy()
        >>> bool((abs(values) <= 0.1).all())
        True
    """
    as_type = as_dtype(dtype)
    if as_type.kind in "bc":
        raise UsageError(
            "values of this type cannot be drawn", field="dtype", found=as_type, expected="a floating or integer type"
        )
    minval, maxval = _number("minval", minval), _number("maxval", maxval)
    limits = _integer_limits(as_type)
    if limits is not None:
        return _integers(minval, maxval, limits)
    high = math.nextafter(maxval, math.inf)
    if not minval <= maxval or math.isinf(high - minval):
        raise UsageError(
            "not a range that can be drawn from",
            field="minval",
            found=f"{minval} with maxval={maxval}",
            expected="minval <= maxval, less than the largest float apart",
        )
    return Drawn(distribution="uniform", parameters=(float(minval), high))


def random_normal_initializer(mean: float = 0.0, stddev: float = 1.0) -> Initializer:
    """Draw values from a normal distribution.

    Raises:
        UsageError: `mean` or `stddev` is not a finite number, or `stddev` is negative.

    Example:
        >>> initializer = vs.random_normal_initializer(stddev=0.02)
        >>> values = vs.get_variable("embedding", shape=(1000, 64), initializer=initializer).numpy()
        >>> round(float(values.std()), 3)
        0.02
    """
    return _normal("normal", mean, stddev)


def truncated_normal_initializer(mean: float = 0.0, stddev: float = 1.0) -> Initializer:
    """Draw values from a normal distribution, and draw again those two standard deviations or more from the mean.

    With a `stddev` of zero, all values are the mean, and nothing is drawn.

    Raises:
        UsageError: `mean` or `stddev` is not a finite number, or `stddev` is negative.

    Example:
        >>> initializer = vs.truncated_normal_initializer(mean=1.0, stddev=0.5)
        >>> values = vs.get_variable("weight", shape=(64, 32), initializer=initializer).numpy()
        >>> bool((abs(values - 1) < 1).all())
        True
    """
    return _normal("truncated_normal", mean, stddev)


def truncated_normal(stddev: float = 1.0) -> Initializer:
    """Draw values from a truncated normal distribution with mean zero; see `truncated_normal_initializer`.

    Example:
        >>> values = vs.get_variable("weight", shape=(64, 32), initializer=vs.truncated_normal(0.02)).numpy()
        >>> bool((abs(values) < 0.04).all())
        True
    """
    return truncated_normal_initializer(0.0, stddev)


def variance_scaling_initializer(
    scale: float = 1.0,
    mode: str = "fan_in",
    distribution: str = "truncated_normal",
    data_format: str = "",
) -> Initializer:
    """Draw values with mean zero and the variance `scale` / fan, so that a layer preserves the scale of its input.

    The fan comes from the variable's shape. ``fan_in`` is prod(shape[1:]). ``fan_out`` is shape[0] times the spatial
    dimensions, which are shape[2:] for channels first and shape[1:-1] for channels last. ``fan_avg`` is their mean.
    Uniform values lie within ±sqrt(3 scale / fan). A truncated normal distribution is widened, so that its variance
    after truncation is `scale` / fan. A shape without elements gives an empty array, whatever its fan.

    Args:
        scale: the factor of the variance.
        mode: "fan_in", "fan_out" or "fan_avg".
        distribution: "truncated_normal", "random_normal" or "random_uniform".
        data_format: "NC…" or "" for channels first, "N…C" for channels last.

    Raises:
        UsageError: `scale` is not a finite number, or is negative; another argument is unknown. When the variable is
            filled: it does not have a dimension.

    Example:
        >>> initializer = vs.variance_scaling_initializer(2.0, "fan_in", "random_normal")
        >>> values = vs.get_variable("weight", shape=(256, 512), initializer=initializer).numpy()
        >>> round(float(values.var() * 512), 1)
        2.0
    """
    scale = float(_number("scale", scale, least=0))
    _check_choice("mode", mode, _MODES)
    _check_choice("distribution", distribution, _BY_VARIANCE)
    last = _is_channels_last(data_format)
    return VarianceScaling(scale=scale, mode=mode, distribution=distribution, channels_last=last)


def glorot_uniform_initializer(data_format: str = "") -> Initializer:
    """Draw uniform values within ±sqrt(6 / (fan_in + fan_out)), as Glorot and Bengio (2010).

    `variance_scaling_initializer` defines the fans and `data_format`.

    Example:
        >>> initializer = vs.glorot_uniform_initializer()
        >>> values = vs.get_variable("weight", shape=(64, 32), initializer=initializer).numpy()
        >>> bool((abs(values) <= (6 / (32 + 64)) ** 0.5).all())
        True
    """
    return variance_scaling_initializer(1.0, "fan_avg", "random_uniform", data_format)


def glorot_normal_initializer(data_format: str = "") -> Initializer:
    """Draw normally distributed values with the variance 2 / (fan_in + fan_out), as Glorot and Bengio (2010).

    `variance_scaling_initializer` defines the fans and `data_format`.

    Example:
        >>> initializer = vs.glorot_normal_initializer()
        >>> values = vs.get_variable("weight", shape=(256, 512), initializer=initializer).numpy()
        >>> round(float(values.var() * (512 + 256)), 1)
        2.0
    """
    return variance_scaling_initializer(1.0, "fan_avg", "random_normal", data_format)


xavier_uniform_initializer = glorot_uniform_initializer
xavier_normal_initializer = glorot_normal_initializer


def kaiming_initializer(
    shape: Sequence[int],
    distribution: str = "random_normal",
    mode: str = "fan_in",
    nonlinearity: str | None = "leaky_relu",
    negative_slope: float = 0.0,
    data_format: str = "NCHW",
) -> Initializer:
    """Draw values with mean zero and the standard deviation gain / sqrt(fan of `shape`), as He et al. (2015).

    The gain is 1 for None and "sigmoid", 5/3 for "tanh", sqrt(2) for "relu", and sqrt(2 / (1 + negative_slope²)) for
    "leaky_relu". Uniform values lie within sqrt(3) standard deviations, both ends included.

    Args:
        shape: the shape that the fan comes from; usually that of the variable.
        distribution: "random_normal" or "random_uniform".
        mode: "fan_in", "fan_out" or "fan_avg"; see `variance_scaling_initializer`.
        nonlinearity: what follows the layer; None for nothing.
        negative_slope: that of "leaky_relu".
        data_format: see `variance_scaling_initializer`.

    Raises:
        UsageError: `shape` does not have a dimension, or its fan is zero; an argument is unknown; `negative_slope` is
            not finite.

    Example:
        >>> initializer = vs.kaiming_initializer((256, 512), nonlinearity="relu")
        >>> values = vs.get_variable("weight", shape=(256, 512), initializer=initializer).numpy()
        >>> round(float(values.var() * 512), 1)
        2.0
    """
    _check_choice("distribution", distribution, ("random_normal", "random_uniform"))
    _check_choice("mode", mode, _MODES)
    _check_choice("nonlinearity", nonlinearity, _GAINS)
    fan = _fan(as_shape(shape), mode, _is_channels_last(data_format))
    stddev = _GAINS[nonlinearity](_number("negative_slope", negative_slope)) / math.sqrt(fan)
    if distribution == "random_normal":
        return random_normal_initializer(0.0, stddev)
    bound = math.sqrt(3) * stddev
    return random_uniform_initializer(-bound, bound)


def as_dtype(dtype: DTypeLike) -> np.dtype[Any]:
    """Return the numpy type, in native byte order, that a type, its name or a scalar type stands for.

    Raises:
        UsageError: it is not a type.
        UnsupportedDtype: the type cannot be stored.
    """
    try:
        found = np.dtype(dtype)
    except (TypeError, ValueError) as error:
        raise UsageError("not a type", field="dtype", found=repr(dtype), expected="a numpy type or name") from error
    data_type_of(found)
    return found.newbyteorder("=")


def as_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """Return a shape as a tuple of Python integers.

    Raises:
        UsageError: it is not a sequence of integers, or one is negative.
    """
    try:
        extents = tuple(extent.__index__() for extent in shape)
    except (TypeError, AttributeError):
        extents = (-1,)
    if min(extents, default=0) < 0:
        raise UsageError("not a shape", field="shape", found=repr(shape), expected="a sequence of sizes, like (2, 3)")
    return extents


def _fan(shape: tuple[int, ...], mode: str, channels_last: bool) -> float:
    spatial = shape[1:-1] if channels_last else shape[2:]
    fan = _MODES[mode](math.prod(shape[1:]), shape[0] * math.prod(spatial)) if shape else 0
    if fan == 0:
        raise UsageError(f"its {mode} is not positive", field="shape", found=shape, expected="positive dimensions")
    return fan


def _is_channels_last(data_format: str) -> bool:
    if isinstance(data_format, str):
        if data_format == "" or data_format.startswith("NC"):
            return False
        if data_format.startswith("N") and data_format.endswith("C"):
            return True
    raise UsageError(
        "unknown data_format",
        field="data_format",
        found=repr(data_format),
        expected="'NC…' (channels first), 'N…C' (channels last) or ''",
    )


def _normal(distribution: str, mean: float, stddev: float) -> Drawn:
    parameters = (float(_number("mean", mean)), float(_number("stddev", stddev, least=0)))
    return Drawn(distribution=distribution, parameters=parameters)


def _integers(minval: float, maxval: float, limits: tuple[int, int]) -> Drawn:
    lowest, end = max(limits[0], -(2**63)), min(limits[1] + 1, 2**63)
    if minval != int(minval) or maxval != int(maxval) or not lowest <= minval < maxval <= end:
        raise UsageError(
            "not a range of integers that can be drawn from",
            field="minval",
            found=f"{minval} with maxval={maxval}",
            expected=f"whole numbers, {lowest} <= minval < maxval <= {end} (maxval is not drawn)",
        )
    return Drawn(distribution="integers", parameters=(int(minval), int(maxval)))


def _check_constant(value: complex, dtype: np.dtype[Any]) -> None:
    limits = _integer_limits(dtype)
    if isinstance(value, complex):
        held = dtype.kind == "c"
    elif limits is not None:
        held = limits[0] <= value <= limits[1] and value == int(value)
    else:
        with np.errstate(over="ignore", invalid="ignore"):
            held = bool(np.isfinite(np.float64(value).astype(dtype))) or not math.isfinite(value)
    if not held:
        raise UsageError(
            f"{dtype} cannot hold this constant",
            field="value",
            found=value,
            expected="a value that is finite in this type"
            if limits is None
            else f"an integer from {limits[0]} to {limits[1]}",
            hint="use another value, or give the variable another dtype",
        )


def _integer_limits(dtype: np.dtype[Any]) -> tuple[int, int] | None:
    try:
        info = ml_dtypes.iinfo(dtype)  # type: ignore[no-untyped-call]
    except ValueError:
        return None
    return int(info.min), int(info.max)


def _number(field: str, value: float, *, least: float = -_LARGEST) -> float:
    number = _plain(value)
    if not isinstance(number, (int, float)) or not least <= number <= _LARGEST:
        expected = "a finite number" if least == -_LARGEST else f"a finite number of {least} or more"
        raise UsageError("not a usable number", field=field, found=repr(value), expected=expected)
    return number


def _plain(value: Any) -> Any:
    """Return a numpy scalar as Python's own, whose comparisons are exact and do not overflow."""
    return value.item() if isinstance(value, np.generic) else value


def _check_choice(field: str, value: str | None, choices: Collection[str | None]) -> None:
    if not isinstance(value, str | None) or value not in choices:
        expected = "one of " + ", ".join(map(repr, choices))
        raise UsageError(f"unknown {field}", field=field, found=repr(value), expected=expected)
