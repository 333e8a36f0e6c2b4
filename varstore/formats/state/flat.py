"""Flatten nested state for formats that contain only named tensors.

A name consists of the keys and indices that lead to a tensor, joined by ``/``, as in `ForeignCheckpoint`. Python
numbers become 0-d arrays. Anything else is refused, because it would be lost. Values are read one tensor at a time.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from varstore.errors import InvalidName, UsageError, VariableMismatch, VariableNotFound
from varstore.text.hints import nearest
from varstore.values.arrays import Stored, as_source
from varstore.values.lazy import LazyArray
from varstore.values.nodes import leaves

__all__ = ["check_fits", "check_unicode", "fetch_plain", "flat_arrays", "flat_leaves"]


def flat_leaves(state: Any) -> dict[str, Any]:
    """Return every leaf of a mapping or nested state by name, unchanged.

    Raises:
        InvalidName: a name is not valid Unicode.
        UsageError: two leaves would get the same name.
    """
    found: dict[str, Any] = {}
    for name, value in leaves(state):
        if name in found:
            raise UsageError(
                "two tensors have the same name when their keys are joined by '/'",
                variable=name,
                hint="rename one of them",
            )
        check_unicode(name)
        found[name] = value
    return found


def flat_arrays(state: Any, *, format: str) -> dict[str, LazyArray]:
    """Return every array of a mapping or nested state by name, without reading its values.

    Raises:
        InvalidName: see `flat_leaves`.
        UsageError: see `flat_leaves`; or a leaf is not an array or a number.
        UnsupportedDtype: see `as_source`.
        UnsafeContent: an array comes from a file that must not be trusted with it, such as a pickle in an ``.npy``.
    """
    return {name: _late(name, value, format) for name, value in flat_leaves(state).items()}


def fetch_plain(name: str, array: LazyArray) -> np.ndarray:
    """Read the values of an array, in C order and little-endian.

    Raises:
        VariableMismatch: they do not have the shape and type that the array stated.
    """
    values = np.asarray(array.numpy())
    if values.shape != array.shape or values.dtype != array.dtype:
        raise VariableMismatch(
            "the values do not have the shape and type that the array stated",
            variable=name,
            found=f"{values.dtype} {list(values.shape)}",
            expected=f"{array.dtype} {list(array.shape)}",
        )
    return np.asarray(values, dtype=array.dtype.newbyteorder("<"), order="C")


def check_fits(model: str, name: str, array: LazyArray, known: Mapping[str, LazyArray], *, hint: str = "") -> None:
    """Check that an array can take the place of the one of its name in a model; `hint` says why it may lack a name.

    Raises:
        VariableNotFound: the model does not have a variable of this name.
        VariableMismatch: its shape or type is another one.
    """
    if name not in known:
        near = ", ".join(map(repr, nearest(name, known)))
        ways = filter(None, (near and f"the nearest are {near}", hint))
        raise VariableNotFound(
            "the model does not have a variable of this name",
            path=model,
            variable=name,
            hint="; ".join(ways) or "leave it out",
        )
    expected = known[name]
    if array.shape != expected.shape or array.dtype.newbyteorder("=") != expected.dtype:
        raise VariableMismatch(
            "the graph of the model expects another shape or type",
            path=model,
            variable=name,
            found=f"{array.dtype} {list(array.shape)}",
            expected=f"{expected.dtype} {list(expected.shape)}",
        )


def check_unicode(name: str) -> None:
    """Check that a text is valid Unicode, because no file format can store a lone surrogate.

    Raises:
        InvalidName: it contains a lone surrogate.
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
            f"{format} files contain only tensors and numbers",
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
