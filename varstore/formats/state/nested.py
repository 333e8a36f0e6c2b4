"""What the formats that are pickles can take: nested state with tensors and scalars at its leaves.

The whole state is looked at before a byte is written: each tensor becomes a `LazyArray`, fetched when its
turn comes, one that stands in two places (or two that share memory) stays one, and whatever cannot be
written is refused by its place in the state.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import numpy as np

from varstore.errors import UnsupportedDtype, UsageError
from varstore.formats.nodes import BARE
from varstore.formats.opened import ForeignCheckpoint
from varstore.formats.state.flat import check_unicode
from varstore.values.arrays import Stored, as_source
from varstore.values.lazy import LazyArray

__all__ = ["SCALARS", "nested_state"]

SCALARS = (type(None), bool, int, float, complex, str, bytes)
_DEEPEST = 100
_LONGEST_INT = 2040


def nested_state(
    state: Any, *, format: str, accept: Callable[[np.dtype[Any]], bool], scalars: tuple[type, ...] = SCALARS
) -> Any:
    """Return the state with a `LazyArray` for each tensor, plain scalars, and only plain containers.

    Args:
        state: dicts, lists, tuples and sets; a mapping of variables; what a format's `read` returned.
        format: whose name errors tell.
        accept: tells whether the format has a type of array.
        scalars: the types of plain values that the format keeps.

    Raises:
        UsageError: a value or key that is not data, or containers nested deeper than 100.
        UnsupportedDtype: a tensor of a type that the format lacks.
    """
    if isinstance(state, ForeignCheckpoint):
        state = state.tree
    return _Plan(format, accept, scalars).node(state, ())


class _Plan:
    def __init__(self, format: str, accept: Callable[[np.dtype[Any]], bool], scalars: tuple[type, ...]) -> None:
        self._format = format
        self._scalars = scalars
        self._accept = accept
        self._known: dict[Hashable, LazyArray] = {}

    def node(self, value: Any, path: tuple[str, ...]) -> Any:
        if len(path) > _DEEPEST:
            raise UsageError(f"the state is nested deeper than {_DEEPEST}, or contains itself", variable="/".join(path))
        if isinstance(value, np.generic):
            value = value.item()
        if type(value) in SCALARS:
            if type(value) not in self._scalars:
                raise UsageError(f"{self._format} does not keep {type(value).__name__}", variable="/".join(path))
            return self._scalar(value, path)
        if isinstance(value, Mapping):
            items = {self._key(key, path): self.node(item, (*path, str(key))) for key, item in _items(value)}
            return OrderedDict(items) if isinstance(value, OrderedDict) else items
        if isinstance(value, (list, tuple)):
            nodes = [self.node(item, (*path, str(index))) for index, item in enumerate(value)]
            return tuple(nodes) if isinstance(value, tuple) else nodes
        if isinstance(value, (set, frozenset)):
            return {self._key(item, path) for item in value}
        return self._array(value, "/".join(path) or BARE)

    def _scalar(self, value: Any, path: tuple[str, ...]) -> Any:
        if isinstance(value, str):
            check_unicode(value)
        if isinstance(value, int) and value.bit_length() > _LONGEST_INT:
            raise UsageError("the integer is too long for a pickle", variable="/".join(path), found="a long integer")
        return value

    def _key(self, key: Any, path: tuple[str, ...]) -> Any:
        if type(key) not in SCALARS:
            raise UsageError(
                "a key must be a string or a number", variable="/".join(path), found=f"{key!r} ({type(key).__name__})"
            )
        return self._scalar(key, path)

    def _array(self, value: Any, name: str) -> LazyArray:
        if isinstance(value, LazyArray) and value.dtype.hasobject:
            value.numpy()  # an array that its own file forbids to read says why
        late = _late(as_source(value, variable=name), value)
        if not self._accept(late.dtype):
            raise UnsupportedDtype(
                f"{self._format} has no such type", variable=name, found=f"dtype {late.dtype}", hint="convert it first"
            )
        return self._known.setdefault(late.identity, late)


def _items(value: Mapping[Any, Any]) -> Any:
    if isinstance(value, ForeignCheckpoint):
        return value.tree.items() if isinstance(value.tree, dict) else ((name, value.lazy(name)) for name in value)
    return value.items()


def _late(source: Any, value: Any) -> LazyArray:
    if isinstance(source, LazyArray):
        return source
    if isinstance(source, Stored):
        return LazyArray(tuple(value.shape), source.dtype, source.numpy, identity=id(source))
    memory = ("numpy", source.__array_interface__["data"], source.shape, source.strides, source.dtype.str)
    identity = memory if source.nbytes else id(value)
    return LazyArray(source.shape, source.dtype, lambda: source, identity=identity)
