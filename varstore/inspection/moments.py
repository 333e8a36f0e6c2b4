"""Statistics of values that come in pieces, for every type that varstore can read.

The mean and the squared deviations of each piece are about its own mean, and combined by the formula of Chan, Golub and
LeVeque (1979), which does not lose digits as sums of squares do. Within a part, the deviations are the difference of
two sums where that keeps the digits. Values whose squares would leave the range of float64 are scaled by a power of
two first, which is exact.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from varstore.layout.dtypes import TABLE

__all__ = [
    "AT_ONCE",
    "BINS",
    "Histogram",
    "Moments",
    "Piece",
    "as_numbers",
    "dot",
    "histogram",
    "is_numeric",
    "merged",
    "name_of",
    "piece_of",
    "quantile",
    "quiet_piece_of",
    "scale_of",
    "unscaled",
]

BINS = 4096
"""Bins of the histogram from which quantiles are read, of equal width from the least value to the largest."""
AT_ONCE = 1 << 15
"""Values that are worked on at a time: they and their squares fit the processor's cache."""
_WIDE = 300
"""Exponents of two beyond which a variable is scaled; the squares of what is not are far from the ends of float64."""
_CANCELLED = 0.01
"""The share of the squares that the deviations have to be: of less, their digits are lost in the difference."""
_ROW = 1 << 13
_NOTHING = -(1 << 20)
"""The exponent of zero, which is less than all others."""

_OF_ML_DTYPES = {row.dtype.type for row in TABLE if row.dtype is not None}

Histogram = np.ndarray


class Moments(NamedTuple):
    """Mean and summed squared deviations of finite values, which were multiplied by two to the power of `-shift`."""

    size: int
    mean: float
    deviation: float
    shift: int

    def unscaled(self) -> tuple[float, float, float]:
        """Return mean, standard deviation of the population, and Euclidean norm; an infinity beyond float64."""
        spread = self.deviation / self.size
        norm = math.sqrt(self.deviation + self.size * self.mean**2)
        shift = 0 if self.shift == _NOTHING else self.shift
        return unscaled(self.mean, shift), unscaled(math.sqrt(spread), shift), unscaled(norm, shift)


class Piece(NamedTuple):
    """What is known of a part of a variable; `low` and `high` are None if none of its values is finite."""

    size: int
    zeros: int
    nan: int
    inf: int
    low: Any
    high: Any
    moments: Moments


def is_numeric(dtype: np.dtype[Any]) -> bool:
    """Tell whether values of a type are numbers or booleans, those of ml_dtypes included."""
    return dtype.kind in "biufc" or (dtype.fields is None and dtype.type in _OF_ML_DTYPES)


@lru_cache(maxsize=64)
def name_of(dtype: np.dtype[Any]) -> str:
    """Return the name of a type, which takes numpy some microseconds."""
    return dtype.name


def piece_of(values: np.ndarray) -> Piece:
    """Return what is known of values of any shape."""
    with np.errstate(all="ignore"):
        return quiet_piece_of(values)


def quiet_piece_of(values: np.ndarray) -> Piece:
    """Return what `piece_of` does, for a caller who lets numpy ignore errors: of many small values at once."""
    if 0 < values.size <= AT_ONCE:
        return _looked_at(values.reshape(-1))
    return merged([_looked_at(part) for part in _parts(values)])


def merged(pieces: Sequence[Piece]) -> Piece:
    """Return what is known of several pieces together."""
    if len(pieces) == 1:
        return pieces[0]
    known = [piece for piece in pieces if piece.low is not None]
    low = min((piece.low for piece in known), default=None)
    high = max((piece.high for piece in known), default=None)
    return Piece(
        size=sum(piece.size for piece in pieces),
        zeros=sum(piece.zeros for piece in pieces),
        nan=sum(piece.nan for piece in pieces),
        inf=sum(piece.inf for piece in pieces),
        low=low,
        high=high,
        moments=_merged([piece.moments for piece in known]),
    )


def _merged(parts: Sequence[Moments]) -> Moments:
    if len(parts) == 1:
        return parts[0]
    size = sum(part.size for part in parts)
    if not size:
        return Moments(0, 0.0, 0.0, _NOTHING)
    shift = max(part.shift for part in parts)
    means = [math.ldexp(part.mean, max(part.shift - shift, _NOTHING)) for part in parts]
    mean = math.fsum(part.size * own for part, own in zip(parts, means, strict=True)) / size
    within = math.fsum(math.ldexp(part.deviation, 2 * max(part.shift - shift, _NOTHING)) for part in parts)
    between = math.fsum(part.size * (own - mean) ** 2 for part, own in zip(parts, means, strict=True))
    return Moments(size, mean, within + between, shift)


def histogram(values: np.ndarray, low: Any, high: Any) -> Histogram:
    """Return how many finite values lie in each of the bins between two values, which differ."""
    counts = np.zeros(BINS, np.int64)
    shift = _shift(low, high)
    first, last = math.ldexp(low, -shift), math.ldexp(high, -shift)
    with np.errstate(all="ignore"):
        for part in _parts(values):
            numbers = _scaled(_finite(as_numbers(part)), shift)
            numbers -= first
            numbers *= BINS / (last - first)
            counts += np.bincount(np.clip(numbers, 0, BINS - 1).astype(np.int64), minlength=BINS)
    return counts


def quantile(counts: Histogram, low: Any, high: Any, at: float) -> tuple[float, float]:
    """Return the quantile of a histogram's values, and how far at most it is from that of the values themselves.

    The quantile is that of ``numpy.quantile``; each of the two values that it lies between is put in the middle of its
    bin.
    """
    shift = _shift(low, high)
    first, last = math.ldexp(low, -shift), math.ldexp(high, -shift)
    width = (last - first) / BINS
    until = np.cumsum(counts)
    place = at * (int(until[-1]) - 1)
    below = math.floor(place)
    ranks = [below, min(below + 1, int(until[-1]) - 1)]
    lower, upper = (first + (int(bin) + 0.5) * width for bin in np.searchsorted(until, ranks, "right"))
    error = width / 2 + 1e-9 * width + 8 * np.finfo(np.float64).eps * max(abs(first), abs(last))
    found = min(max(lower + (place - below) * (upper - lower), first), last)
    return unscaled(found, shift), unscaled(error, shift)


def _parts(values: np.ndarray) -> Iterator[np.ndarray]:
    flat = values.reshape(-1)
    for start in range(0, flat.size, AT_ONCE):
        yield flat[start : start + AT_ONCE]


def _looked_at(part: np.ndarray) -> Piece:
    numbers = as_numbers(part)
    count = numbers.size
    zeros = count - int(np.count_nonzero(numbers != 0))
    nan = inf = 0
    low, high = _ends(numbers)
    if not (math.isfinite(low) and math.isfinite(high)):
        nan = int(np.count_nonzero(np.isnan(part)))
        inf = int(np.count_nonzero(np.isinf(numbers)))
        numbers = _finite(numbers)
        if not numbers.size:
            return Piece(count, zeros, nan, inf, None, None, Moments(0, 0.0, 0.0, _NOTHING))
        low, high = _ends(numbers)
    shift = _shift(low, high)
    scaled = _scaled(numbers, shift)
    total = float(np.add.reduce(scaled))
    mean = total / scaled.size
    square = dot(scaled, scaled)
    deviation = square - total * mean
    if deviation < _CANCELLED * square:
        scaled -= mean
        deviation = dot(scaled, scaled)
    shift = shift if low or high else _NOTHING
    return Piece(count, zeros, nan, inf, low, high, Moments(scaled.size, mean, deviation, shift))


def dot(a: np.ndarray, b: np.ndarray) -> float:
    """Return the sum of the products; BLAS starts threads of its own for longer rows."""
    if a.size <= _ROW:
        return float(np.dot(a, b))
    starts = range(0, a.size, _ROW)
    return math.fsum(float(np.dot(a[start : start + _ROW], b[start : start + _ROW])) for start in starts)


def _ends(numbers: np.ndarray) -> tuple[Any, Any]:
    """Return the least and the largest value as Python's numbers."""
    return np.minimum.reduce(numbers).item(), np.maximum.reduce(numbers).item()


def _finite(numbers: np.ndarray) -> np.ndarray:
    return numbers[np.isfinite(numbers)] if numbers.dtype.kind == "f" else numbers


def _shift(low: Any, high: Any) -> int:
    return scale_of(max(abs(low), abs(high)))


def scale_of(largest: Any) -> int:
    """Return the power of two by which to divide values of this magnitude so that their squares are in range."""
    exponent = math.frexp(largest)[1]
    return exponent if abs(exponent) > _WIDE else 0


def _scaled(numbers: np.ndarray, shift: int) -> np.ndarray:
    """Return new values of float64."""
    exact = numbers.astype(np.float64)
    return np.ldexp(exact, -shift) if shift else exact


def unscaled(value: float, shift: int) -> float:
    """Return a value times two to the power of `shift`; an infinity beyond float64."""
    try:
        return math.ldexp(value, shift)
    except OverflowError:
        return math.copysign(math.inf, value)


def as_numbers(part: np.ndarray) -> np.ndarray:
    """Return values that numpy can compare: integers as such, complex values by magnitude, all others as floats."""
    kind = part.dtype.kind
    if part.dtype.type.__module__ != "numpy":
        return part.astype(np.int8 if part.dtype.name.startswith(("int", "uint")) else np.float32)
    if kind == "b":
        return part.astype(np.uint8)
    if kind == "c":
        return np.abs(part.astype(np.complex128))
    return part.astype(np.float64) if part.dtype.itemsize > 8 else part
