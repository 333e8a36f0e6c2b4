"""Prepare nested state for formats that are pickles: containers with tensors and scalars as leaves.

The whole state is examined before anything is written. Each tensor becomes a `LazyArray`, whose values are read when it
is written. A tensor that occurs in several places becomes one object, and so do several tensors that share memory.
Anything that cannot be written is refused, with its place in the state.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import numpy as np

from varstore.errors import UnsupportedDtype, UsageError
from varstore.formats.opened import ForeignCheckpoint
from varstore.formats.state.flat import check_unicode
from varstore.training.tensors import place_of
from varstore.values.arrays import Stored, as_source
from varstore.values.lazy import LazyArray
from varstore.values.nodes import BARE

__all__ = ["SCALARS", "nested_state"]

SCALARS = (type(None), bool, int, float, complex, str, bytes)
_DEEPEST = 100
_LONGEST_INT = 2040


def nested_state(
    state: Any, *, format: str, accept: Callable[[np.dtype[Any]], bool], scalars: tuple[type, ...] = SCALARS
) -> Any:
    """Return the state with a `LazyArray` for each tensor, plain scalars, and only plain containers.

    Args:
        state: dicts, lists, tuples and sets; a mapping of variables; or the result of a format's `read`.
        format: the name of the format, for errors.
        accept: a function that returns whether the format has a type of array.
        scalars: the types of scalars that the format has.

    Raises:
        UsageError: a value or key is not data, or containers are nested deeper than 100.
        UnsupportedDtype: the format does not have the type of a tensor.
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
                raise UsageError(
                    f"{self._format} files cannot contain {type(value).__name__} values", variable="/".join(path)
                )
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
            raise UsageError(
                "the integer is too long for a pickle", variable="/".join(path), found=f"{value.bit_length()} bits"
            )
        return value

    def _key(self, key: Any, path: tuple[str, ...]) -> Any:
        if type(key) not in SCALARS:
            raise UsageError(
                "a key must be a string or a number", variable="/".join(path), found=f"{key!r} ({type(key).__name__})"
            )
        return self._scalar(key, path)

    def _array(self, value: Any, name: str) -> LazyArray:
        if isinstance(value, LazyArray) and value.dtype.hasobject:
            value.numpy()  # an array that must not be read raises here
        late = _late(as_source(value, variable=name), value)
        if not self._accept(late.dtype):
            raise UnsupportedDtype(
                f"{self._format} does not have this type",
                variable=name,
                found=f"dtype {late.dtype}",
                hint="convert it first",
            )
        late.place = late.place or place_of(value)
        return self._known.setdefault((late.identity, late.type, late.requires_grad), late)


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
