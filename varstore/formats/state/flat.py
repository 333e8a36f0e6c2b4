"""What a format that knows nothing but named tensors can take: a nested state, made flat.

Keys and indices on the way to a tensor are joined by ``/``, as `ForeignCheckpoint` names them; Python's
numbers become 0-d arrays; anything else is refused, for it would be lost. Values are fetched one by one.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from varstore.errors import InvalidName, UsageError, VariableMismatch
from varstore.formats.nodes import leaves
from varstore.values.arrays import Stored, as_source
from varstore.values.lazy import LazyArray

__all__ = ["check_unicode", "fetch_plain", "flat_arrays", "flat_leaves"]


def flat_leaves(state: Any) -> dict[str, Any]:
    """Return every leaf of a mapping or nested state by name, as it is.

    Raises:
        InvalidName: a name that is not valid Unicode.
        UsageError: two names fall together.
    """
    found: dict[str, Any] = {}
    for name, value in leaves(state):
        if name in found:
            raise UsageError(
                "two tensors have this name when their keys are joined by '/'", variable=name, hint="rename one"
            )
        check_unicode(name)
        found[name] = value
    return found


def flat_arrays(state: Any, *, format: str) -> dict[str, LazyArray]:
    """Return every array of a mapping or nested state by name, unread.

    Raises:
        InvalidName: see `flat_leaves`.
        UsageError: see `flat_leaves`; or a leaf is neither array nor number.
        UnsupportedDtype: see `as_source`.
        UnsafeContent: an array that its own file forbids to read.
    """
    return {name: _late(name, value, format) for name, value in flat_leaves(state).items()}


def fetch_plain(name: str, array: LazyArray) -> np.ndarray:
    """Fetch the values: C order, little-endian, of the shape and type that were planned.

    Raises:
        VariableMismatch: the values are not what was announced.
    """
    values = np.asarray(array.numpy())
    if values.shape != array.shape or values.dtype != array.dtype:
        raise VariableMismatch(
            "the values are not what the variable announced",
            variable=name,
            found=f"{values.dtype} {list(values.shape)}",
            expected=f"{array.dtype} {list(array.shape)}",
        )
    return np.asarray(values, dtype=array.dtype.newbyteorder("<"), order="C")


def check_unicode(name: str) -> None:
    """Refuse a lone surrogate, which no file format can hold.

    Raises:
        InvalidName: there is one.
    """
    if name.isascii():
        return
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise InvalidName(
            "a name must be valid Unicode", variable=name, found=f"a lone surrogate at character {error.start}"
        ) from None


def _late(name: str, value: Any, format: str) -> LazyArray:
    if value is None or isinstance(value, (str, bytes)):
        raise UsageError(
            f"{format} files hold tensors and numbers only",
            variable=name,
            found=f"{type(value).__name__} {value!r}"[:80],
            hint="leave it out, or use a format that keeps nested state",
        )
    if isinstance(value, LazyArray) and value.dtype.hasobject:
        value.numpy()
    source = as_source(value, variable=name)
    if isinstance(source, LazyArray):
        return source
    if isinstance(source, Stored):
        return LazyArray(tuple(value.shape), source.dtype, source.numpy, identity=id(source))
    return LazyArray(source.shape, source.dtype, lambda: source, identity=id(source))
