"""Small pictures of values that come in pieces: a histogram, and a heat map of a matrix.

The width of a histogram's bins is a power of two, and their edges are its multiples. So two bins of one width make
exactly one of twice the width, and histograms of pieces can be put together in any order: their counts are exact, and
one pass over the values is enough.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from varstore.inspection.moments import AT_ONCE, as_numbers

__all__ = ["Bins", "Counted", "HeatMap", "Mosaic", "counted", "joined", "matrix_shape"]

MOST = 64
"""Bins of a histogram, and rows and columns of a heat map."""
_FINEST = 40
"""How many powers of two below the largest magnitude the width of a bin can be: its number fits float64."""
_LEAST = -1074
"""All floats are multiples of two to this power."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Bins:
    """How many finite values lie in each of at most 64 bins; `start` is the least edge, and all have one `width`.

    The width is a power of two, and at least 1 for integers; a value on an edge is in the bin above it.

    Example:
        >>> found = vs.stats({"w": np.array([0, 1, 1, 3])}, histograms=True)["w"].histogram
        >>> found.start, found.width, found.counts
        (0.0, 1.0, (1, 2, 0, 1))
    """

    start: float
    width: float
    counts: tuple[int, ...]

    def as_json(self) -> dict[str, Any]:
        """Return the histogram as JSON data."""
        return {"start": self.start, "width": self.width, "counts": list(self.counts)}


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class HeatMap:
    """A matrix in at most 64 x 64 blocks of nearly equal size: the means of their values and of their magnitudes.

    `shape` is that of the matrix: axes of length 1 are left out, and all after the first are taken as one. `means` and
    `magnitudes` are arrays of float64; a block in which a value is nan or infinite has nan in both.

    Example:
        >>> found = vs.stats({"w": np.array([[1.0, -1.0], [2.0, np.nan]])}, heat_maps=1)["w"].heat_map
        >>> found.shape, found.means.tolist(), found.magnitudes.tolist()
        ((2, 2), [[1.0, -1.0], [2.0, nan]], [[1.0, 1.0], [2.0, nan]])
    """

    shape: tuple[int, int]
    means: np.ndarray
    magnitudes: np.ndarray

    def as_json(self) -> dict[str, Any]:
        """Return the heat map as JSON data; None stands for nan."""
        rows = {"means": self.means, "magnitudes": self.magnitudes}
        found = {name: [[_or_none(value) for value in row] for row in values] for name, values in rows.items()}
        return {"shape": list(self.shape), **found}


def _or_none(value: Any) -> float | None:
    return float(value) if np.isfinite(value) else None


@dataclass(frozen=True, slots=True)
class Counted:
    """Counts of bins that are two to the power of `exponent` wide; `first` is the number of the first from zero."""

    exponent: int
    first: int
    counts: np.ndarray

    def bins(self) -> Bins:
        """Return the record; edges beyond float64 are infinite."""
        start, width = _power(self.first, self.exponent), _power(1, self.exponent)
        return Bins(start=start, width=width, counts=tuple(self.counts.tolist()))


def counted(values: np.ndarray, low: Any, high: Any) -> Counted:
    """Count the finite values of an array, of which the least and the largest are given."""
    exponent = _exponent(low, high)
    if values.dtype.kind in "biu":
        exponent = max(exponent, 0)
    first, last = _number(low, exponent), _number(high, exponent)
    counts = np.zeros(last - first + 1, np.int64)
    flat = values.reshape(-1)
    for start in range(0, flat.size, AT_ONCE):
        numbers = as_numbers(flat[start : start + AT_ONCE]).astype(np.float64)
        numbers = _numbers(numbers[np.isfinite(numbers)], exponent) - first
        # an int64 beyond 2**53 may be rounded to the next bin
        counts += np.bincount(np.clip(numbers, 0, last - first).astype(np.int64), minlength=len(counts))
    return Counted(exponent, first, counts)


def joined(parts: Sequence[Counted]) -> Counted:
    """Put histograms together; the result does not depend on how the values were divided."""
    exponent = max(part.exponent for part in parts)
    first = min(part.first >> (exponent - part.exponent) for part in parts)
    last = max((part.first + len(part.counts) - 1) >> (exponent - part.exponent) for part in parts)
    while last - first >= MOST:
        exponent, first, last = exponent + 1, first >> 1, last >> 1
    counts = np.zeros(last - first + 1, np.int64)
    for part in parts:
        at = np.arange(part.first, part.first + len(part.counts), dtype=object) >> (exponent - part.exponent)
        np.add.at(counts, (at - first).astype(np.int64), part.counts)
    return Counted(exponent, first, counts)


def _exponent(low: Any, high: Any) -> int:
    """Return the least power of two that makes at most 64 bins of all values between two."""
    largest = max(abs(low), abs(high))
    exponent = max(math.frexp(largest)[1] - _FINEST, _LEAST) if largest else _LEAST
    while _number(high, exponent) - _number(low, exponent) >= MOST:
        exponent += 1
    return exponent


def _number(value: Any, exponent: int) -> int:
    """Return the number of the bin of a value, counted from zero."""
    return math.floor(math.ldexp(value, -exponent) or -(value < 0))


def _numbers(values: np.ndarray, exponent: int) -> np.ndarray:
    scaled: np.ndarray = np.ldexp(values, -exponent)
    if exponent > 0:  # a value below zero may become zero
        scaled[(scaled == 0) & (values < 0)] = -1
    np.floor(scaled, out=scaled)
    return scaled


def _power(number: int, exponent: int) -> float:
    try:
        return math.ldexp(number, exponent)
    except OverflowError:
        return math.copysign(math.inf, number)


def matrix_shape(shape: Sequence[int]) -> tuple[int, int] | None:
    """Return the shape of the matrix that a heat map shows, None for what is not a matrix."""
    long = [length for length in shape if length != 1]
    return (long[0], math.prod(long[1:])) if len(long) > 1 and 0 not in long else None


class Mosaic:
    """The blocks of a matrix, to which pieces of it are added in any order, from any thread."""

    def __init__(self, shape: tuple[int, int]) -> None:
        self.shape = shape
        self._edges = [_edges(length) for length in shape]
        sizes = [np.diff([*edges, length]) for edges, length in zip(self._edges, shape, strict=True)]
        self._weights = 1.0 / np.outer(*sizes)
        self._sums = np.zeros((2, *self._weights.shape))
        self._lock = threading.Lock()

    def add(self, offset: int, values: np.ndarray) -> None:
        """Add values that follow each other in C order, the first of which is at `offset`: whole rows or parts of one.

        Each is divided by the size of the largest block first, so that no sum overflows.
        """
        flat = values.reshape(-1)
        columns = self.shape[1]
        rows_at_once = max(1, AT_ONCE // columns)
        with np.errstate(all="ignore"):
            if flat.size < columns:
                self._add(offset // columns, offset % columns, flat.reshape(1, -1))
                return
            for start in range(0, flat.size // columns, rows_at_once):
                rows = flat[start * columns : (start + rows_at_once) * columns]
                self._add(offset // columns + start, 0, rows.reshape(-1, columns))

    def _add(self, row: int, column: int, values: np.ndarray) -> None:
        numbers = as_numbers(values).astype(np.float64)
        at = [
            np.searchsorted(edges, np.arange(begin, begin + length), "right") - 1
            for edges, begin, length in zip(self._edges, (row, column), numbers.shape, strict=True)
        ]
        starts = [np.flatnonzero(np.diff(blocks, prepend=-1)) for blocks in at]
        rows, columns = (blocks[first] for blocks, first in zip(at, starts, strict=True))
        window = np.ix_(rows, columns)
        least = self._weights.min()
        numbers *= least
        fit = self._weights[window] / least
        sums = [
            fit * np.add.reduceat(np.add.reduceat(part, starts[1], axis=1), starts[0], axis=0)
            for part in (numbers, np.abs(numbers, out=numbers.copy()))
        ]
        with self._lock:
            for total, part in zip(self._sums, sums, strict=True):
                total[window] += part

    def heat_map(self) -> HeatMap:
        """Return the record of all that was added."""
        means, magnitudes = (np.where(np.isfinite(sums), sums, np.nan) for sums in self._sums)
        return HeatMap(shape=self.shape, means=means, magnitudes=magnitudes)


def _edges(length: int) -> np.ndarray:
    """Return where the blocks of an axis begin."""
    count = min(MOST, length)
    return np.arange(count) * length // count
