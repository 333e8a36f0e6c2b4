"""How far values moved, for pieces of a variable before and after, of every type that varstore can read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from varstore.inspection.moments import dot, scale_of, unscaled
from varstore.layout.difference import Movement

__all__ = ["Moved", "Tolerance", "movement", "moved"]

_AT_ONCE = 1 << 15
"""Values that are compared at a time: they and their squares fit the processor's cache."""
_LEAST, _MOST = 2.0**-500, 2.0**500
"""Sums of squares of values that need not be scaled, and are all finite."""
_EXACT = 8
"""Bytes of the integers that float64 does not hold."""


class Tolerance(NamedTuple):
    """Values are equal if they differ by at most ``atol + rtol * abs(b)``, and nan equals nan."""

    rtol: float
    atol: float


class Moved(NamedTuple):
    """What is known of a part. The sums are of finite values that were multiplied by two to the power of `-shift`."""

    values: int
    changed: int
    beyond: int
    nonfinite: int
    largest: float
    shift: int
    aa: float
    bb: float
    ab: float
    dd: float


def moved(a: np.ndarray, b: np.ndarray, tolerance: Tolerance | None, *, is_all: bool = False) -> Moved:
    """Compare two pieces of one shape, whose types may differ; with `is_all` they are all of a variable.

    What is equal and all of a variable has no norms: nothing is compared to them.
    """
    first, second = a.reshape(-1), b.reshape(-1)
    if is_all and a.dtype == b.dtype and not (a.size and np.any(_differs(first, second))):
        return Moved(a.size, 0, 0, 0, 0.0, 0, 0.0, 0.0, 0.0, 0.0)
    with np.errstate(all="ignore"):
        return _together(
            [
                _compared(first[start : start + _AT_ONCE], second[start : start + _AT_ONCE], tolerance)
                for start in range(0, first.size, _AT_ONCE)
            ]
        )


def movement(pieces: Sequence[Moved], *, has_tolerance: bool) -> Movement:
    """Return how far all pieces of a variable moved."""
    whole = _together(pieces)
    norms = math.sqrt(whole.aa), math.sqrt(whole.bb)
    return Movement(
        count=whole.values,
        changed=whole.changed,
        beyond=whole.beyond if has_tolerance else None,
        nonfinite=whole.nonfinite,
        largest=whole.largest,
        norm=unscaled(math.sqrt(whole.dd), whole.shift),
        norm_a=unscaled(norms[0], whole.shift),
        norm_b=unscaled(norms[1], whole.shift),
        cosine=max(-1.0, min(1.0, whole.ab / norms[0] / norms[1])) if all(norms) else None,
    )


def _together(parts: Sequence[Moved]) -> Moved:
    if len(parts) == 1:
        return parts[0]
    shift = max((part.shift for part in parts), default=0)

    def total(sums: str) -> float:
        return math.fsum(math.ldexp(getattr(part, sums), 2 * (part.shift - shift)) for part in parts)

    return Moved(
        values=sum(part.values for part in parts),
        changed=sum(part.changed for part in parts),
        beyond=sum(part.beyond for part in parts),
        nonfinite=sum(part.nonfinite for part in parts),
        largest=max((part.largest for part in parts), default=0.0),
        shift=shift,
        aa=total("aa"),
        bb=total("bb"),
        ab=total("ab"),
        dd=total("dd"),
    )


def _compared(a: np.ndarray, b: np.ndarray, tolerance: Tolerance | None) -> Moved:
    differs = _differs(a, b)
    changed = int(np.count_nonzero(differs))
    if not changed and a.dtype == b.dtype:
        return _unmoved(a)
    x, y = _numbers(a, b)
    is_finite = np.isfinite(x) & np.isfinite(y)
    nonfinite = beyond = 0
    if not is_finite.all():
        other = ~is_finite
        nonfinite = int(np.count_nonzero(differs & other))
        if tolerance:
            u, v = x[other], y[other]
            beyond = int(np.count_nonzero((u != v) & ~(np.isnan(u) & np.isnan(v))))
        x, y = x[is_finite], y[is_finite]
    if not x.size:
        return Moved(a.size, changed, beyond, nonfinite, 0.0, 0, 0.0, 0.0, 0.0, 0.0)
    shift = scale_of(max(np.abs(x).max(), np.abs(y).max()))
    if shift:
        x, y = _scaled(x, shift), _scaled(y, shift)
    far = y - x
    by = np.abs(far)
    if tolerance:
        allowed = unscaled(tolerance.atol, -shift) + tolerance.rtol * np.abs(y)
        beyond += int(np.count_nonzero(by > allowed))
    return Moved(
        values=a.size,
        changed=changed,
        beyond=beyond,
        nonfinite=nonfinite,
        largest=unscaled(float(by.max()), shift),
        shift=shift,
        aa=_dot(x, x),
        bb=_dot(y, y),
        ab=_dot(x, y),
        dd=_dot(far, far),
    )


def _unmoved(a: np.ndarray) -> Moved:
    """Return what is known where nothing changed: the norm, to which that of the other parts is compared."""
    x = _as_floats(a)
    shift, square = 0, _dot(x, x)
    if not _LEAST < square < _MOST:
        x = x[np.isfinite(x)]
        shift = scale_of(np.abs(x).max()) if x.size else 0
        x = _scaled(x, shift) if shift else x
        square = _dot(x, x)
    return Moved(a.size, 0, 0, 0, 0.0, shift, square, square, square, 0.0)


def _differs(a: np.ndarray, b: np.ndarray) -> Any:
    """Tell which values have other bits; those of two types, and long doubles, which are not all bits, by number."""
    if a.dtype == b.dtype and a.dtype.char not in "gG":
        if a.dtype.itemsize <= _EXACT:
            bits = np.dtype(f"u{a.dtype.itemsize}")
            return a.view(bits) != b.view(bits)
        return (a.view(np.uint64).reshape(a.size, -1) != b.view(np.uint64).reshape(a.size, -1)).any(axis=1)
    x, y = _numbers(a, b)
    return (x != y) & ~(np.isnan(x) & np.isnan(y))


def _numbers(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return both as numbers whose differences are exact, or as near as the machine can: of float64 or complex."""
    if any(part.dtype.kind in "iu" and part.dtype.itemsize == _EXACT for part in (a, b)):
        return _as_floats(a, np.longdouble), _as_floats(b, np.longdouble)
    return _as_floats(a), _as_floats(b)


def _as_floats(part: np.ndarray, kind: Any = np.float64) -> np.ndarray:
    return part.astype(np.complex128 if part.dtype.kind == "c" else kind)


def _scaled(x: np.ndarray, shift: int) -> np.ndarray:
    scaled: np.ndarray = np.ldexp(x.view(np.float64) if x.dtype.kind == "c" else x, -shift)
    return scaled.view(x.dtype)


def _dot(x: np.ndarray, y: np.ndarray) -> float:
    """Return the sum of the products, of complex values of both parts."""
    if x.dtype.kind == "c" or y.dtype.kind == "c":
        x, y = x.astype(np.complex128).view(np.float64), y.astype(np.complex128).view(np.float64)
    return dot(x, y)
