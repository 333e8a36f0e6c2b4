"""Save pytrees of JAX, including those of Flax and Optax, and restore them into a given structure.

Plain Python containers keep their types. Any other node of a pytree is saved as a dict of its fields, and gets its type
back when it is restored into a pytree of the same structure. Arrays move between the host and their devices one at a
time.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, Unpack

import jax
import numpy as np

from varstore.disk.read.checkpoint import Checkpoint, retry_if_replaced
from varstore.errors import VariableMismatch
from varstore.model.match import Spec, compare
from varstore.model.options import Path, StateOptions
from varstore.model.refusal import Demands, refuse
from varstore.text.hints import listed
from varstore.training.state import load_state, save_state
from varstore.training.tensors import Leaf
from varstore.training.tree import unflatten
from varstore.values.arguments import checked

__all__ = ["load", "save", "state_of"]


@checked
def save(path: Path, tree: Any, **save_options: Unpack[StateOptions]) -> Checkpoint:
    """Save a pytree; variables are named by their path, such as ``params/Dense_0/kernel``.

    Arrays that are sharded over the devices of this process are saved whole, and so are those that every process of a
    program has whole.

    Args:
        path: a path that does not exist, or an empty directory; see `varstore.save`.
        tree: the pytree.
        save_options: the options of `varstore.save`.

    Raises:
        UsageError: a leaf is not data.
        UnsupportedDtype: an array contains typed random keys, is spread over processes, or has another type that the
            format cannot store.
        CheckpointExists, OutOfSpace, StorageError: see `varstore.save`.

    Example:
        >>> import jax.numpy as jnp
        >>> from varstore.adapters.jax import save
        >>> save("params", {"dense": {"kernel": jnp.ones((2, 3)), "bias": jnp.zeros(3)}}).names
        ('dense/kernel', 'dense/bias')
    """
    return save_state(path, state_of(tree), **save_options)


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


@checked
def load(path: Path | Checkpoint, like: Any = None, *, strict: bool = True, cast: bool = False) -> Any:
    """Load a pytree, with the structure of `like` if it is given.

    Args:
        path: a checkpoint, or its path.
        like: a pytree with the wanted structure; the values of its leaves are ignored. A leaf that is a jax array or
            a `jax.ShapeDtypeStruct` is restored to the devices of its sharding, a numpy array as a numpy array, and
            numbers and strings as such. Without `like`, the result has the containers that were saved.
        strict: raise if the checkpoint has leaves that `like` does not have.
        cast: convert between types of the same kind, such as float32 and bfloat16.

    Raises:
        VariableMismatch: shapes, types or the structure differ; the message lists them, and nothing has been read.
        DigestMismatch, SizeMismatch: the values are not those that were saved.
        CheckpointNotFound, IncompleteCheckpoint: there is no checkpoint, or only an incomplete one.

    Example:
        >>> import jax.numpy as jnp
        >>> from varstore.adapters.jax import load, save
        >>> params = {"kernel": jnp.ones((2, 3)), "steps": 7}
        >>> checkpoint = save("params", params)
        >>> load("params", like=params)
        {'kernel': Array([[1., 1., 1.],
               [1., 1., 1.]], dtype=float32), 'steps': 7}
    """
    return retry_if_replaced(partial(_load, like=like, strict=strict, cast=cast), path)


def _load(checkpoint: Checkpoint, like: Any, *, strict: bool, cast: bool) -> Any:
    if like is None:
        return load_state(checkpoint)
    wanted, structure = jax.tree_util.tree_flatten(like)
    slots = [_Slot(index) for index in range(len(wanted))]
    places = dict(_places(state_of(jax.tree_util.tree_unflatten(structure, slots))))
    if checkpoint.manifest is not None and checkpoint.manifest.tree:
        found = dict(_places(unflatten(checkpoint.tree, lambda leaf: leaf, path=checkpoint.path)))
    else:  # plain variables: the parts of their names are the path
        found = {(name,): Leaf(name=name) for name in checkpoint}
        places = {(_name(place),): slot for place, slot in places.items()}
    _compare_structure(places, found, checkpoint.path, strict=strict)
    values = {slot.index: found[place] for place, slot in places.items()}
    _compare_arrays(checkpoint, wanted, values, cast=cast)
    return jax.tree_util.tree_unflatten(
        structure, [_restored(checkpoint, wanted[index], values[index]) for index in range(len(wanted))]
    )


class _Slot:
    """Stands for a leaf while the structure is walked."""

    def __init__(self, index: int) -> None:
        self.index = index


def _places(state: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
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
        yield from _places(item, (*place, key))


def _compare_structure(places: Mapping[Any, Any], found: Mapping[Any, Any], path: str, *, strict: bool) -> None:
    missing = [_name(place) for place in places if place not in found]
    extra = [_name(place) for place in found if place not in places]
    if missing or (strict and extra):
        sides = [f"not in the checkpoint: {listed(missing)}"] if missing else []
        sides += [f"only in the checkpoint: {listed(extra)}"] if extra else []
        raise VariableMismatch(
            "the structures differ: " + "; ".join(sides),
            path=path,
            hint=None if missing else "strict=False ignores what is only in the checkpoint",
        )


def _name(place: tuple[Any, ...]) -> str:
    return "/".join(map(str, place))


def _compare_arrays(checkpoint: Checkpoint, wanted: list[Any], values: Mapping[int, Any], *, cast: bool) -> None:
    targets: dict[str, Spec] = {}
    sources: dict[str, Spec] = {}
    for index, value in values.items():
        if isinstance(value, Leaf) and _is_array(wanted[index]):
            variable = checkpoint[value.name]
            targets[value.name] = tuple(wanted[index].shape), np.dtype(wanted[index].dtype)
            sources[value.name] = variable.shape, variable.dtype
    match = compare(targets, sources, {name: name for name in sources}, cast=cast)
    path = checkpoint.path
    refuse(match, Demands(cast=cast), is_vain=False, source=path, target="like", path=path)


def _is_array(leaf: Any) -> bool:
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")


def _restored(checkpoint: Checkpoint, wanted: Any, value: Any) -> Any:
    if isinstance(value, Leaf):
        value = checkpoint[value.name].numpy()
        if not _is_array(wanted):
            return value.item() if value.shape == () else value
    if not _is_array(wanted):
        return value
    values = np.asarray(value).astype(wanted.dtype, copy=False)
    if isinstance(wanted, np.ndarray | np.generic):
        return values
    return jax.device_put(values, getattr(wanted, "sharding", None))
