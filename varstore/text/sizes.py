"""One spelling of sizes in bytes: "512 B", "1.2 kB", "498 MB", in powers of 1000."""

from __future__ import annotations

__all__ = ["size_text"]

_UNITS = ("kB", "MB", "GB", "TB", "PB", "EB")


def size_text(nbytes: int, *, exact: bool = False) -> str:
    """Return a size with at most three digits and its unit, or with `exact` the number of bytes and no unit."""
    if exact:
        return str(nbytes)
    if nbytes < 1000:
        return f"{nbytes} B"
    value: float = nbytes
    for unit in _UNITS:
        value /= 1000
        digits = 0 if value >= 99.95 else 1
        if float(f"{value:.{digits}f}") < 1000 or unit == _UNITS[-1]:
            return f"{value:.{digits}f} {unit}"
    raise AssertionError  # the last unit has returned
