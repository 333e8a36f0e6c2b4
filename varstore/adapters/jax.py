"""Save pytrees of JAX, including those of Flax and Optax, and restore them into a given structure.

Plain Python containers keep their types. Any other node of a pytree is saved as a dict of its fields, and gets its type
back when it is restored into a pytree of the same structure. Arrays move between the host and their devices one at a
time.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, Unpack

import jax
import numpy as np

from varstore.disk.read.checkpoint import Checkpoint, retry_if_replaced
from varstore.errors import UsageError, VariableMismatch
from varstore.formats.opened import ForeignCheckpoint
from varstore.formats.verbs import open_source
from varstore.model.match import Match, Missing, OnMismatch, SourceSpec, Spec, compare
from varstore.model.options import Path, StateOptions
from varstore.model.refusal import Demands, refuse
from varstore.model.report import LoadReport, make_report
from varstore.training.chosen import Choice
from varstore.training.state import load_state, save_state
from varstore.training.tensors import KEY, LIST, Leaf, built
from varstore.training.tree import outline
from varstore.values.arguments import checked
from varstore.values.lazy import LazyArray
from varstore.values.nodes import BARE, Unbuilt, replaced
from varstore.values.opaque import without_opaque
from varstore.values.select import Patterns, Rename, select

__all__ = ["load", "load_into", "save", "state_of"]

_ANYTHING: Spec = ((), np.dtype(np.bool_))
"""Stands for the shape and type of a value of any kind, on both sides."""

_KINDS: dict[type, Any] = {bool: np.bool_, int: np.integer, float: np.floating, complex: np.complexfloating}


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
        UnsupportedDtype: an array is spread over processes, or has a type that the format cannot store.
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
def load(
    path: Path | Checkpoint | ForeignCheckpoint,
    like: Any = None,
    *,
    include: Patterns | None = None,
    exclude: Patterns | None = None,
    rename: Rename | None = None,
    strict: bool = True,
    missing: Missing = None,
    on_mismatch: OnMismatch = "error",
    cast: bool = False,
) -> Any:
    """Load a pytree, with the structure of `like` if it is given.

    Args:
        path: a checkpoint, or any path that `varstore.read` opens.
        like: a pytree with the wanted structure, such as a state of Flax or Optax, whose classes come back. A leaf that
            is a jax array or a `jax.ShapeDtypeStruct` is restored to the devices of its sharding, a numpy array as a
            numpy array, and numbers and strings as such. Without `like`, the result has the containers that were saved.
        include, exclude, rename: choose and rename leaves of the checkpoint, by names such as
            ``params/Dense_0/kernel``; see `varstore.load_state`.
        strict: raise if the checkpoint has leaves that `like` does not have.
        missing: patterns of leaves of `like` that the checkpoint need not have, and that keep their values. By
            default, it must have all.
        on_mismatch: what to do where shapes or types differ: "error", or "skip" to keep the value in `like`.
        cast: convert between types of the same kind, such as float32 and bfloat16.

    Raises:
        VariableMismatch: shapes, types or the structure differ; the message lists them, and nothing has been read.
        UsageError: a leaf that is to keep its value does not have one.
        DigestMismatch, SizeMismatch, CheckpointNotFound, IncompleteCheckpoint: see `varstore.load`.
        UnsafeContent, FormatError, MissingDependency: see `varstore.read`.

    Example:
        >>> import jax.numpy as jnp
        >>> from varstore.adapters.jax import load, save
        >>> params = {"kernel": jnp.ones((2, 3)), "steps": 7}
        >>> checkpoint = save("params", params)
        >>> load("params", like=params)
        {'kernel': Array([[1., 1., 1.],
               [1., 1., 1.]], dtype=float32), 'steps': 7}
    """
    choice: Choice = {"include": include, "exclude": exclude, "rename": rename}
    source = open_source(path)
    if like is None:
        return source.state(**choice) if isinstance(source, ForeignCheckpoint) else load_state(source, **choice)
    wanted = "error" if missing is None else missing
    demands = Demands(strict=strict, missing=wanted, on_mismatch=_known(on_mismatch), cast=cast, can_overlap=False)
    return _loaded(source, like, choice, demands)[0]


@checked
def load_into(
    like: Any,
    source: Path | Checkpoint | Mapping[str, Any],
    *,
    include: Patterns | None = None,
    exclude: Patterns | None = None,
    rename: Rename | None = None,
    strict: bool = True,
    missing: Missing = None,
    on_mismatch: OnMismatch = "error",
    cast: bool = False,
) -> tuple[Any, LoadReport]:
    """Return a pytree with the values of a checkpoint in place of its own, and a report of what was loaded.

    Arrays of jax cannot be changed, so the pytree itself stays as it is.

    Args:
        like: the pytree; see `load`.
        source: a checkpoint, any path that `varstore.read` opens, or nested state of arrays.
        include, exclude, rename, on_mismatch, cast: see `load`.
        strict: raise if the pytree or the checkpoint has leaves that the other does not have.
        missing: patterns of leaves of the pytree that the checkpoint need not have; they keep their values.

    Raises:
        VariableMismatch, UsageError, and those of reading: see `load`.

    Example:
        >>> import jax.numpy as jnp
        >>> from varstore.adapters.jax import load_into, save
        >>> checkpoint = save("before", {"params": {"body": jnp.ones(2)}})
        >>> params = {"body": jnp.zeros(2), "head": jnp.zeros(1)}
        >>> params, report = load_into(params, "before", rename={"params/": ""}, missing="head")
        >>> report.loaded, report.missing
        (('body',), ('head',))
    """
    choice: Choice = {"include": include, "exclude": exclude, "rename": rename}
    demands = Demands(strict=strict, missing=missing, on_mismatch=_known(on_mismatch), cast=cast, can_overlap=False)
    return _loaded(open_source(source), like, choice, demands)


def _loaded(
    source: Path | Checkpoint | Mapping[str, Any], like: Any, choice: Choice, demands: Demands
) -> tuple[Any, LoadReport]:
    if isinstance(source, Mapping) and not isinstance(source, Checkpoint):
        return _Loading(source, like, choice, demands).run()
    return retry_if_replaced(lambda checkpoint: _Loading(checkpoint, like, choice, demands).run(), source)


def _known(on_mismatch: OnMismatch) -> OnMismatch:
    if on_mismatch == "overlap":
        raise UsageError("a pytree takes whole leaves", field="on_mismatch", found="'overlap'", hint='pass "skip"')
    return on_mismatch


class _Slot:
    """Stands for a leaf while the structure is walked."""

    def __init__(self, index: int) -> None:
        self.index = index


class _Loading:
    """One load into one structure; `_wanted` are its leaves in order, `_slots` the indices of them by name."""

    def __init__(self, checkpoint: Checkpoint | Mapping[str, Any], like: Any, choice: Choice, demands: Demands) -> None:
        self._path: str = getattr(checkpoint, "path", None) or type(checkpoint).__name__
        self._checkpoint, self._choice, self._demands = checkpoint, choice, demands
        self._wanted, self._structure = jax.tree_util.tree_flatten(like)
        slots = [_Slot(index) for index in range(len(self._wanted))]
        places = dict(_places(state_of(jax.tree_util.tree_unflatten(self._structure, slots))))
        found = dict(_places(self._saved(), unlisted=self._unlisted))
        named = _name if _are_apart(places) and _are_apart(found) else _exact_name
        self._slots = {named(place): slot.index for place, slot in places.items()}
        self._found = {named(place): value for place, value in found.items()}

    def run(self) -> tuple[Any, LoadReport]:
        """Load, and return the pytree and the report."""
        path = self._path
        match = self._match(None)
        is_vain = bool(self._slots) and bool(self._found) and not match.pairs
        refuse(match, self._demands, is_vain=is_vain, source=path, target="like", path=path, matched=self._match)
        values = list(self._wanted)
        loaded = {self._slots[pair.target]: self._found[pair.source] for pair in match.pairs}
        for name in (*match.kept, *(item.name for item in match.mismatched)):
            if isinstance(values[self._slots[name]], jax.ShapeDtypeStruct):
                raise UsageError(
                    "a ShapeDtypeStruct has no value to keep", path=path, variable=name, hint="give an array for it"
                )
        for index, value in loaded.items():
            values[index] = self._restored(self._wanted[index], value)
        return jax.tree_util.tree_unflatten(self._structure, values), make_report(match, source=path, target="like")

    def _saved(self) -> Any:
        """Return the checkpoint's state, with `Leaf` objects in place of its arrays; a file's with lazy arrays."""
        checkpoint = self._checkpoint
        if not isinstance(checkpoint, Checkpoint):
            return without_opaque(checkpoint.tree if isinstance(checkpoint, ForeignCheckpoint) else checkpoint)[0]
        if checkpoint.manifest is None or not checkpoint.manifest.tree:
            return {name: Leaf(name=name) for name in checkpoint}  # a name is the path
        kinds = {type(leaf) for leaf in self._wanted if not _is_array(leaf)}
        types = {f"{kind.__module__}.{kind.__qualname__}": kind for kind in kinds}
        return outline(checkpoint.tree, types, path=checkpoint.path)

    def _unlisted(self, leaf: Leaf) -> Any:
        return built(self._checkpoint[leaf.name].numpy(), leaf, "cpu")

    def _match(self, rename: Rename | None) -> Match:
        choice = self._choice if rename is None else {**self._choice, "rename": rename}
        selected = select(tuple(self._found), **choice, path=self._path)
        targets: dict[str, Spec] = dict.fromkeys(self._slots, _ANYTHING)
        sources: dict[str, SourceSpec] = dict.fromkeys(self._found, _ANYTHING)
        for name, origin in selected.items():
            value, wanted = self._found[origin], self._wanted[self._slots[name]] if name in self._slots else None
            if wanted is not None and _is_array(wanted):
                targets[name] = _spec(wanted)
                stored = self._stored(value)
                sources[origin] = _plain_spec(value, wanted) if stored is None else (stored.shape, stored.dtype)
        return compare(targets, sources, selected, on_mismatch=self._demands.on_mismatch, cast=self._demands.cast)

    def _stored(self, value: Any) -> Any:
        """Return the variable or lazy array that a leaf of the checkpoint's state stands for; None if it is data."""
        return (
            self._checkpoint[value.name] if isinstance(value, Leaf) else value if isinstance(value, LazyArray) else None
        )

    def _restored(self, wanted: Any, value: Any) -> Any:
        if isinstance(value, Unbuilt):
            return replaced(value, lambda item: self._restored(None, item) if isinstance(item, Leaf) else item)
        if (stored := self._stored(value)) is not None:
            leaf = value if isinstance(value, Leaf) else Leaf(name=value.name)
            value = stored.numpy()
            if _is_key(wanted):
                return jax.device_put(self._keys(value, leaf, wanted), getattr(wanted, "sharding", None))
            if leaf.type == KEY and not _is_array(wanted):
                return built(value, leaf, "cpu")
            if not _is_array(wanted):
                return value.item() if value.shape == () else value
        if not _is_array(wanted):
            return value
        values = np.asarray(value).astype(wanted.dtype, copy=False)
        if isinstance(wanted, np.ndarray | np.generic):
            return values
        return jax.device_put(values, getattr(wanted, "sharding", None))

    def _keys(self, data: np.ndarray, leaf: Leaf, wanted: Any) -> Any:
        """Return typed keys of the wanted kind."""
        impl = str(jax.random.key_impl(wanted)) if isinstance(wanted, jax.Array) else leaf.impl
        keys = built(data, replace(leaf, type=KEY, impl=impl), "cpu") if impl else None
        if keys is None or keys.dtype != wanted.dtype or (leaf.impl and leaf.impl != impl):
            raise VariableMismatch(
                "the keys are for another generator",
                path=self._path,
                variable=leaf.name,
                found=leaf.impl or "plain numbers",
                expected=str(wanted.dtype),
            )
        return keys


def _places(
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
        yield from _places(item, (*place, key), unlisted)


def _name(place: tuple[Any, ...]) -> str:
    return "/".join(map(str, place)) or BARE


def _exact_name(place: tuple[Any, ...]) -> str:
    return "/".join(map(repr, place))


def _are_apart(places: Mapping[tuple[Any, ...], Any]) -> bool:
    """Tell whether no two places have one name."""
    return len(set(map(_name, places))) == len(places)


def _is_array(leaf: Any) -> bool:
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")


def _is_key(leaf: Any) -> bool:
    return _is_array(leaf) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _spec(leaf: Any) -> Spec:
    """Return the shape and type of an array; of typed keys, those of their data."""
    held = jax.eval_shape(jax.random.key_data, leaf) if _is_key(leaf) else leaf
    return tuple(held.shape), np.dtype(held.dtype)


def _plain_spec(value: Any, wanted: Any) -> SourceSpec:
    """Return the shape and type of a value that is not stored as an array.

    A Python number has no width: as in jax, it has the type of the wanted array if that is of its kind and can hold it.
    """
    given = np.asarray(value)
    kind = _KINDS.get(type(value))
    is_alike = kind is not None and jax.numpy.issubdtype(wanted.dtype, kind)
    if is_alike and kind is np.integer:
        limits = jax.numpy.iinfo(wanted.dtype)
        is_alike = limits.min <= value <= limits.max
    return given.shape, np.dtype(wanted.dtype) if is_alike else given.dtype
