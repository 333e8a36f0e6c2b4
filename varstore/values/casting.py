"""Convert values to another type, as torch does, and count those that a floating type cannot hold.

A value beyond the range of ``float8_e4m3fn``, which does not have infinities, becomes its largest value, 448, with the
sign; so do the infinities. In the other types of 8 bits or more, such a value becomes an infinity, or NaN if the type
has none. Python's `ml_dtypes` makes it NaN in ``float8_e4m3fn`` too. In the types of 4 and 6 bits it becomes the
largest value, and NaN becomes zero, because they have neither.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

__all__ = ["cast_values", "is_floating"]

_SATURATED = {"float8_e4m3fn": 448.0}
"""The types whose largest value stands for all that lie beyond, and is not set by `ml_dtypes`."""
_POWERS = "float8_e8m0fnu"
"""The type of powers of two, which makes NaN of zero and of what is below."""
_FINITE = frozenset({"float4_e2m1fn", "float6_e2m3fn", "float6_e3m2fn"})
"""The types that have neither infinities nor NaN."""


def cast_values(values: np.ndarray, dtype: np.dtype[Any]) -> tuple[np.ndarray, int]:
    """Return the values as another type, and how many of them are beyond its range."""
    with np.errstate(over="ignore", invalid="ignore"):
        new = np.asarray(values.astype(dtype))
    if not _can_exceed(values.dtype, dtype):
        return new, 0
    largest = _SATURATED.get(new.dtype.name)
    if largest is not None:
        beyond = np.isnan(new) & ~np.isnan(values)
        new[beyond] = np.copysign(np.float32(largest), values[beyond].astype(np.float32)).astype(dtype)
    elif new.dtype.name in _FINITE:
        beyond = ~(np.abs(values.astype(np.float64)) <= _largest(dtype))
    else:
        beyond = ~np.isfinite(new) & np.isfinite(values)
    return new, int(np.count_nonzero(beyond))


def _can_exceed(source: np.dtype[Any], target: np.dtype[Any]) -> bool:
    """Tell whether a value of one type can be beyond what another, a floating type, can hold."""
    if not is_floating(target):
        return False
    if source.kind in "biu" or "int" in source.name:
        largest = 1.0 if source.kind == "b" else _largest(source)
    elif is_floating(source):
        largest = _largest(source)
    else:
        return False
    return largest > _largest(target) or target.name == _POWERS


def is_floating(dtype: np.dtype[Any]) -> bool:
    """Tell whether a type is a floating-point one, of numpy or of ml_dtypes."""
    return dtype.kind == "f" or dtype.name.startswith(("float", "bfloat"))


def _largest(dtype: np.dtype[Any]) -> float:
    limits: Any = ml_dtypes.finfo if is_floating(dtype) else ml_dtypes.iinfo
    return float(limits(dtype).max)
