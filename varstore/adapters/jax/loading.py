"""Load pytrees: into the structure of another one, in part, and sharded over the devices of many processes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax
import numpy as np
from jax.sharding import PartitionSpec, Sharding

from varstore.adapters.jax.agreement import load_in_all
from varstore.adapters.jax.shards import Wanted, placed, placed_keys, require_placeable
from varstore.adapters.jax.trees import (
    are_apart,
    array_spec,
    exact_name,
    is_array,
    is_key,
    name_of,
    places_in,
    state_of,
)
from varstore.disk.read.checkpoint import Checkpoint
from varstore.errors import UsageError, VariableMismatch
from varstore.formats.opened import ForeignCheckpoint
from varstore.formats.verbs import open_source
from varstore.model.match import Match, Missing, OnMismatch, SourceSpec, Spec, compare
from varstore.model.options import Path
from varstore.model.refusal import Demands, refuse
from varstore.model.report import LoadReport, make_report
from varstore.training.chosen import Choice, choose
from varstore.training.state import load_state
from varstore.training.tensors import BUILT, KEY, Leaf, built
from varstore.training.tree import outline
from varstore.values.arguments import checked
from varstore.values.lazy import LazyArray
from varstore.values.nodes import Unbuilt, leaves, replaced
from varstore.values.opaque import without_opaque
from varstore.values.select import Patterns, Rename, select

__all__ = ["load", "load_into", "load_sharded"]

_ANYTHING: Spec = ((), np.dtype(np.bool_))
"""Stands for the shape and type of a value of any kind, on both sides."""

_KINDS: dict[type, Any] = {bool: np.bool_, int: np.integer, float: np.floating, complex: np.complexfloating}


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
            Of arrays that are sharded over several processes, each process reads its own parts; see `load_sharded`.
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
    if like is None:
        source = open_source(path)
        return source.state(**choice) if isinstance(source, ForeignCheckpoint) else load_state(source, **choice)
    wanted = "error" if missing is None else missing
    demands = Demands(strict=strict, missing=wanted, on_mismatch=_known(on_mismatch), cast=cast, can_overlap=False)
    return _loaded(path, like, choice, demands)[0]


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
    return _loaded(source, like, choice, demands)


@checked
def load_sharded(
    path: Path | Checkpoint | ForeignCheckpoint,
    shardings: Any = None,
    *,
    like: Any = None,
    include: Patterns | None = None,
    exclude: Patterns | None = None,
    rename: Rename | None = None,
    strict: bool = True,
    missing: Missing = None,
    on_mismatch: OnMismatch = "error",
    cast: bool = False,
) -> Any:
    """Load a pytree of arrays with these shardings, of which each process reads what its own devices hold.

    Every process that has devices of these shardings makes this call. They may have another mesh than those that saved
    the checkpoint, and be more or fewer. What a process reads is compared with the digests of all blocks, and of all
    regions that a process has saved, that lie within it. Processes return when all have loaded; where one fails, all
    raise its error. To get a report as well, pass such a pytree to `load_into`.

    Args:
        path: a checkpoint, or any path that `varstore.read` opens.
        shardings: one `jax.sharding.Sharding` for all arrays, in the containers that were saved; or a pytree of
            shardings, whose structure the result has, or a dict of shardings by names such as
            ``params/Dense_0/kernel``. Other leaves of it are as for `load`, such as a number or an array.
        like: a pytree with the wanted structure, shapes and types, as for `load`. Its arrays and its leaves of the
            class `jax.ShapeDtypeStruct` have shardings, unless `shardings` is one for all, or one for each leaf.
        include, exclude, rename, strict, missing, on_mismatch, cast: see `load`. With one sharding for all and without
            `like`, the last four have no meaning.

    Raises:
        UsageError: an array cannot have its sharding; the message has its name, its shape and the sharding.
        VariableMismatch, and those of reading: see `load`.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jax.sharding import NamedSharding, PartitionSpec
        >>> from varstore.adapters.jax import load_sharded, save
        >>> checkpoint = save("params", {"kernel": jnp.ones((2, 3)), "steps": 7})
        >>> mesh = jax.make_mesh((1,), ("rows",), devices=jax.devices()[:1])
        >>> rows = NamedSharding(mesh, PartitionSpec("rows"))
        >>> load_sharded("params", {"kernel": rows, "steps": 0})
        {'kernel': Array([[1., 1., 1.],
               [1., 1., 1.]], dtype=float32), 'steps': 7}
    """
    if shardings is None and like is None:
        raise UsageError("neither shardings nor a pytree that has them", field="shardings", hint="pass one of them")
    for leaf in jax.tree_util.tree_leaves(shardings):
        if isinstance(leaf, PartitionSpec):
            raise UsageError(
                "a PartitionSpec without its mesh is not a sharding",
                field="shardings",
                found=str(leaf),
                hint="pass jax.sharding.NamedSharding(mesh, spec)",
            )
    choice: Choice = {"include": include, "exclude": exclude, "rename": rename}
    if like is None and isinstance(shardings, Sharding):
        return load_in_all(lambda source: _load_alike(source, shardings, choice), path, [shardings])
    wanted = shardings if like is None else like if shardings is None else _with_shardings(like, shardings)
    options: Any = {"strict": strict, "missing": missing, "on_mismatch": on_mismatch, "cast": cast}
    return load(path, wanted, **choice, **options)


def _with_shardings(like: Any, shardings: Any) -> Any:
    """Return a pytree whose arrays are only described, with these shardings."""

    def described(leaf: Any, sharding: Any) -> Any:
        if not is_array(leaf) or not isinstance(sharding, Sharding):
            return leaf
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    if isinstance(shardings, Sharding):
        return jax.tree_util.tree_map(lambda leaf: described(leaf, shardings), like)
    try:
        return jax.tree_util.tree_map(described, like, shardings)
    except ValueError as error:
        raise UsageError(
            "the shardings have another structure than the pytree",
            field="shardings",
            found=str(error).partition("\n")[0],
            hint="pass a sharding for each leaf of `like`, or one for all",
        ) from error


def _load_alike(source: Any, sharding: Sharding, choice: Choice) -> Any:
    """Load the saved state with one sharding for all its arrays."""
    saved = _saved_in(source, {})
    state = choose(saved, **choice, path=source.path, name_of=lambda leaf: getattr(leaf, "name", None))
    arrays: dict[int, Wanted] = {}
    for _, leaf in leaves(state):
        if (stored := _stored_in(source, leaf)) is not None and leaf.type not in BUILT:
            require_placeable(stored.shape, stored.dtype, sharding, path=source.path, name=leaf.name)
            arrays[id(leaf)] = Wanted(stored, stored.dtype, sharding)
    made = dict(zip(arrays, placed(arrays.values()), strict=True))

    def restored(leaf: Any) -> Any:
        if isinstance(leaf, Leaf) and leaf.type in BUILT:
            held = built(source[leaf.name].numpy(), leaf, "cpu")
            return placed_keys(held, sharding) if leaf.type == KEY else held
        return made.get(id(leaf), leaf)

    return replaced(state, restored)


def _loaded(path: Any, like: Any, choice: Choice, demands: Demands) -> tuple[Any, LoadReport]:
    wanted = jax.tree_util.tree_leaves(like)
    return load_in_all(lambda source: _Loading(source, like, choice, demands).run(), path, wanted)


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
        places = dict(places_in(state_of(jax.tree_util.tree_unflatten(self._structure, slots))))
        kinds = {type(leaf) for leaf in self._wanted if not is_array(leaf)}
        types = {f"{kind.__module__}.{kind.__qualname__}": kind for kind in kinds}
        found = dict(places_in(_saved_in(checkpoint, types), unlisted=self._unlisted))
        named = name_of if are_apart(places) and are_apart(found) else exact_name
        self._slots = {named(place): slot.index for place, slot in places.items()}
        self._found = {named(place): value for place, value in found.items()}

    def run(self) -> tuple[Any, LoadReport]:
        """Load, and return the pytree and the report."""
        path = self._path
        self._describe_shardings()
        match = self._match(None)
        is_vain = bool(self._slots) and bool(self._found) and not match.pairs
        refuse(match, self._demands, is_vain=is_vain, source=path, target="like", path=path, matched=self._match)
        values = list(self._wanted)
        loaded = {self._slots[pair.target]: self._found[pair.source] for pair in match.pairs}
        for name in (*match.kept, *(item.name for item in match.mismatched)):
            if isinstance(leaf := values[self._slots[name]], jax.ShapeDtypeStruct | Sharding):
                kind = "ShapeDtypeStruct" if isinstance(leaf, jax.ShapeDtypeStruct) else "sharding"
                raise UsageError(
                    f"a {kind} has no value to keep", path=path, variable=name, hint="give an array for it"
                )
        for pair in match.pairs:
            if is_array(leaf := self._wanted[self._slots[pair.target]]) and not isinstance(
                leaf, np.ndarray | np.generic
            ):
                sharding = getattr(leaf, "sharding", None)
                require_placeable(leaf.shape, leaf.dtype, sharding, path=path, name=pair.target)
        arrays = {index: one for index, value in loaded.items() if (one := self._array(self._wanted[index], value))}
        for index, array in zip(arrays, placed(arrays.values()), strict=True):
            values[index] = array
        for index, value in loaded.items():
            if index not in arrays:
                values[index] = self._restored(self._wanted[index], value)
        return jax.tree_util.tree_unflatten(self._structure, values), make_report(match, source=path, target="like")

    def _unlisted(self, leaf: Leaf) -> Any:
        return built(self._checkpoint[leaf.name].numpy(), leaf, "cpu")

    def _match(self, rename: Rename | None) -> Match:
        choice = self._choice if rename is None else {**self._choice, "rename": rename}
        selected = select(tuple(self._found), **choice, path=self._path)
        targets: dict[str, Spec] = dict.fromkeys(self._slots, _ANYTHING)
        sources: dict[str, SourceSpec] = dict.fromkeys(self._found, _ANYTHING)
        for name, origin in selected.items():
            value, wanted = self._found[origin], self._wanted[self._slots[name]] if name in self._slots else None
            if wanted is not None and is_array(wanted):
                targets[name] = array_spec(wanted)
                stored = _stored_in(self._checkpoint, value)
                sources[origin] = _plain_spec(value, wanted) if stored is None else (stored.shape, stored.dtype)
        return compare(targets, sources, selected, on_mismatch=self._demands.on_mismatch, cast=self._demands.cast)

    def _describe_shardings(self) -> None:
        """Put the shape and type of what is stored to each leaf that is a sharding, and has them from there."""
        for name, origin in select(tuple(self._found), **self._choice, path=self._path).items():
            sharding = self._wanted[self._slots[name]] if name in self._slots else None
            if isinstance(sharding, Sharding):
                shape, dtype = self._described(name, self._found[origin])
                require_placeable(shape, dtype, sharding, path=self._path, name=name)
                self._wanted[self._slots[name]] = jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    def _described(self, name: str, value: Any) -> tuple[tuple[int, ...], Any]:
        if (stored := _stored_in(self._checkpoint, value)) is not None:
            is_key_data = isinstance(value, Leaf) and value.type == KEY
            held = built(stored.numpy(), value, "cpu") if is_key_data else stored
            return held.shape, held.dtype
        if type(value) in _KINDS:  # a Python number becomes the array that jax makes of it
            return (), jax.dtypes.canonicalize_dtype(type(value))
        if not is_array(value):
            raise UsageError(
                "a sharding is for an array",
                path=self._path,
                variable=name,
                found=type(value).__name__,
                hint="give a value of the same type in its place, or None and strict=False",
            )
        return value.shape, np.dtype(value.dtype)

    def _array(self, wanted: Any, value: Any) -> Wanted | None:
        """Return what an array of jax is made of, in the place of a leaf; None for other leaves, and for typed keys."""
        if not is_array(wanted) or isinstance(wanted, np.ndarray | np.generic) or is_key(wanted):
            return None
        stored = _stored_in(self._checkpoint, value)
        return Wanted(np.asarray(value) if stored is None else stored, wanted.dtype, getattr(wanted, "sharding", None))

    def _restored(self, wanted: Any, value: Any) -> Any:
        """Return what comes in the place of a leaf that is not an array of jax; typed keys are arrays of jax too."""
        if isinstance(value, Unbuilt):
            return replaced(value, lambda item: self._restored(None, item) if isinstance(item, Leaf) else item)
        if (stored := _stored_in(self._checkpoint, value)) is not None:
            leaf = value if isinstance(value, Leaf) else Leaf(name=value.name)
            value = stored.numpy()
            if is_key(wanted):
                return placed_keys(self._keys(value, leaf, wanted), getattr(wanted, "sharding", None))
            if leaf.type == KEY and not is_array(wanted):
                return built(value, leaf, "cpu")
            if not is_array(wanted):
                return value.item() if value.shape == () else value
        return np.asarray(value).astype(wanted.dtype, copy=stored is None) if is_array(wanted) else value

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


def _saved_in(source: Any, types: Mapping[str, type]) -> Any:
    """Return the saved state, with `Leaf` objects in place of its arrays; that of a file with lazy arrays."""
    if not isinstance(source, Checkpoint):
        return without_opaque(source.tree if isinstance(source, ForeignCheckpoint) else source)[0]
    if source.manifest is None or not source.manifest.tree:
        return {name: Leaf(name=name) for name in source}  # a name is the path
    return outline(source.tree, types, path=source.path)


def _stored_in(source: Any, leaf: Any) -> Any:
    """Return the variable or lazy array that a leaf of the saved state stands for; None if it is data."""
    return source[leaf.name] if isinstance(leaf, Leaf) else leaf if isinstance(leaf, LazyArray) else None


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
