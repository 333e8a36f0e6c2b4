"""Statistics of values that come in parts, for every type that a checkpoint can hold.

The means and squared deviations of the parts are combined by the formula of Chan, Golub and LeVeque (1979), which does
not lose digits as sums of squares do.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

__all__ = ["summarize"]


def summarize(parts: Iterable[np.ndarray]) -> list[tuple[str, str]]:
    """Return rows of (label, value): count, zeros, nan and inf, and min, max, mean and std of the finite values.

    `std` is that of the population. Complex values count by their magnitude, and booleans as 0 and 1. Integers keep all
    their digits in min and max.
    """
    count = zeros = nan = infinite = finite = 0
    mean = deviation = 0.0
    extremes: list[Any] = []
    with np.errstate(all="ignore"):
        for part in parts:
            values = _as_numbers(part)
            count += values.size
            zeros += values.size - int(np.count_nonzero(values))
            nan += int(np.count_nonzero(np.isnan(values)))
            infinite += int(np.count_nonzero(np.isinf(values)))
            values = values[np.isfinite(values)]
            if not values.size:
                continue
            extremes = [min([*extremes[:1], values.min()]), max([*extremes[1:], values.max()])]
            part_mean, part_size = float(values.mean(dtype=np.float64)), values.size
            part_deviation = float(np.square(values.astype(np.float64) - part_mean).sum())
            shift = part_mean - mean
            finite, before = finite + part_size, finite
            mean += shift * part_size / finite
            deviation += part_deviation + shift * shift * before * part_size / finite
    rows = [("count", str(count)), ("zeros", str(zeros)), ("nan", str(nan)), ("inf", str(infinite))]
    if finite:
        low, high = extremes
        std = (deviation / finite) ** 0.5
        rows += [("min", _shown(low)), ("max", _shown(high)), ("mean", f"{mean:.6g}"), ("std", f"{std:.6g}")]
    return rows


def _shown(value: Any) -> str:
    return f"{value:.9g}" if isinstance(value, np.floating) else str(value)


def _as_numbers(part: np.ndarray) -> np.ndarray:
    """Return values that numpy can compare and add: integers as they are, everything else as float64."""
    if part.dtype.kind == "b":
        return part.astype(np.uint8)
    if part.dtype.kind in "iu":
        return part
    if part.dtype.kind == "c":
        return np.abs(part.astype(np.complex128))
    return part.astype(np.float64)
