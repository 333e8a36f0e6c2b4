"""Pytrees as nested state: their nodes as plain containers, and the names and kinds of their leaves."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from varstore.model.match import Spec
from varstore.training.tensors import LIST, Leaf
from varstore.values.nodes import BARE

__all__ = ["are_apart", "array_spec", "exact_name", "is_array", "is_key", "name_of", "places_in", "state_of"]


def state_of(tree: Any) -> Any:
    """Return a pytree in which nodes that are not plain containers are replaced by dicts of their fields.

    The result can be passed to `varstore.save_state` and `varstore.CheckpointManager`.

    Example:
        >>> import dataclasses
        >>> import jax
        >>> from varstore.adapters.jax import state_of
        >>> @jax.tree_util.register_dataclass
        ... @dataclasses.dataclass
        ... class Momentum:
        ...     count: int
        ...     trace: dict
        >>> state_of(Momentum(count=3, trace={"w": 0.5}))
        {'count': 3, 'trace': {'w': 0.5}}
    """
    if isinstance(tree, jax.Array):
        return tree  # what cannot be saved is refused by name when it is saved
    if type(tree) in (dict, OrderedDict):
        return type(tree)((key, state_of(item)) for key, item in tree.items())
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*map(state_of, tree))
    if type(tree) in (list, tuple):
        return type(tree)(map(state_of, tree))
    children, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda node: node is not tree)
    if tree is None or any(not path for path, _ in children):
        return tree
    return {_part(path[0]): state_of(child) for path, child in children}


def _part(key: Any) -> Any:
    for field in ("key", "name", "idx"):
        if hasattr(key, field):
            return getattr(key, field)
    return str(key)


def places_in(
    state: Any, place: tuple[Any, ...] = (), unlisted: Callable[[Leaf], Any] | None = None
) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Yield the leaves of a state with the keys that lead to them; `unlisted` returns a list that is stored."""
    if unlisted and isinstance(state, Leaf) and state.type == LIST:
        state = unlisted(state)
    if isinstance(state, Mapping):
        items = list(state.items())
    elif isinstance(state, tuple) and hasattr(state, "_fields"):
        items = list(zip(state._fields, state, strict=True))
    elif isinstance(state, list | tuple):
        items = list(enumerate(state))
    else:
        if state is not None:  # in jax, None is a structure, not a leaf
            yield place, state
        return
    for key, item in items:
        yield from places_in(item, (*place, key), unlisted)


def name_of(place: tuple[Any, ...]) -> str:
    """Return the name of a leaf, as `varstore.save_state` gives it to an array."""
    return "/".join(map(str, place)) or BARE


def exact_name(place: tuple[Any, ...]) -> str:
    """Return a name that no other place has."""
    return "/".join(map(repr, place))


def are_apart(places: Mapping[tuple[Any, ...], Any]) -> bool:
    """Tell whether no two places have one name."""
    return len(set(map(name_of, places))) == len(places)


def is_array(leaf: Any) -> bool:
    """Tell whether a leaf has a shape and a type, as an array or a ``jax.ShapeDtypeStruct``."""
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")


def is_key(leaf: Any) -> bool:
    """Tell whether a leaf is an array of typed random keys, or stands for one."""
    return is_array(leaf) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def array_spec(leaf: Any) -> Spec:
    """Return the shape and type of an array; of typed keys, those of their data."""
    held = jax.eval_shape(jax.random.key_data, leaf) if is_key(leaf) else leaf
    return tuple(held.shape), np.dtype(held.dtype)
