"""Save and load nested state, such as a model, its optimizer, the epoch and the loss in one checkpoint."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from typing import Any, Unpack

import numpy as np

from varstore.disk.progress import Progress
from varstore.disk.read.checkpoint import Checkpoint, retry_if_replaced
from varstore.errors import ManifestError
from varstore.model.options import LoadOptions, StateOptions
from varstore.model.store import load, save
from varstore.text.escape import one_line
from varstore.text.hints import listed
from varstore.training.chosen import Choice, choose
from varstore.training.kinds import Types, checked_types
from varstore.training.tensors import (
    BUILT,
    JAX,
    PARAMETER,
    TENSOR,
    Framework,
    Leaf,
    MapLocation,
    as_saved,
    built,
    can_have_gradient,
    locate,
    to_jax,
    to_torch,
    view_of,
    wanted,
)
from varstore.training.tree import flatten, outline, prune
from varstore.values.arguments import checked
from varstore.values.nodes import leaves, replaced
from varstore.values.select import Patterns, Rename

__all__ = ["filled", "load_state", "outlined", "plain_tree", "restore", "save_state"]

_NAMED = 20
_log = logging.getLogger("varstore")


@checked
def save_state(path: str | os.PathLike[str], state: Any, **save_options: Unpack[StateOptions]) -> Checkpoint:
    """Save nested state as a checkpoint, either complete or absent; nothing is pickled.

    Arrays, tensors and variables of other checkpoints become variables that are named by their path, such as
    ``optimizer/state/0/momentum_buffer``. Each can be read by itself, as in any checkpoint. Everything else is stored
    exactly, in the manifest: dicts with keys of any plain type, defaultdicts, OrderedDicts, Counters, lists, deques,
    tuples, named tuples, sets, None, bools, numbers of any size, strings, bytes, bytearrays, numpy scalars, paths,
    dates and times, and torch's sizes, types, devices and generators. Long lists of numbers, such as a history of
    losses, are stored as arrays and come back as lists.

    Dataclasses, Enum members, namespaces of argparse and subclasses of dict are saved as records: what they hold,
    and the name of their class. They come back as a ``SimpleNamespace`` or a dict, or as objects of the classes that
    `load_state` is given as `types`.

    Tensors that share memory, or lie within another tensor, do so again after `load_state`. Arrays come back in C
    order and the machine's byte order. Tensors on devices other than cpu, cuda, mps and xpu come back on the CPU. A
    container that is in two places comes back as two containers. Objects of classes that varstore does not know, which
    `varstore.read` found in another system's file, are left out, and so are attributes that are not a dataclass's
    fields or a dict's items; the result's `left_out` names them.

    Args:
        path: as for `varstore.save`.
        state: the nested state; often a dict.
        save_options: the options of `varstore.save`.

    Raises:
        UsageError: a value is not data; the message says where it is. Nothing was written.
        InvalidName, UnsupportedDtype, CheckpointExists, OutOfSpace, StorageError: see `varstore.save`.

    Example:
        >>> weight = np.zeros((10, 84), np.float32)
        >>> state = {"model": {"fc.weight": weight}, "optimizer": {"lr": 0.1, "betas": (0.9, 0.999)}, "epoch": 3}
        >>> checkpoint = vs.save_state("run-3", state)
        >>> checkpoint.names
        ('model/fc.weight',)
        >>> vs.load_state("run-3")["optimizer"]
        {'lr': 0.1, 'betas': (0.9, 0.999)}
    """
    flat = flatten(state)
    checkpoint = save(path, flat.variables, tree=flat.tree, **save_options)
    checkpoint.left_out = flat.left_out
    return checkpoint


def load_state(
    path: str | os.PathLike[str] | Checkpoint,
    *,
    include: Patterns | None = None,
    exclude: Patterns | None = None,
    rename: Rename | None = None,
    map_location: MapLocation = None,
    framework: Framework | None = None,
    types: Types | None = None,
    verify: bool = True,
    threads: int | None = None,
    progress: Progress = None,
) -> Any:
    """Load the state that `save_state` saved, every value of the type that it had; see `varstore.load_state`."""
    options: LoadOptions = {"verify": verify, "threads": threads, "progress": progress}
    classes = checked_types(types)
    choice: Choice = {"include": include, "exclude": exclude, "rename": rename}

    def load_from(checkpoint: Checkpoint) -> Any:
        if checkpoint.damaged:
            lost = listed(list(map(one_line, checkpoint.damaged)), limit=_NAMED)
            _log.warning("%s: the state comes back without the variables that are lost: %s", checkpoint.path, lost)
        if checkpoint.manifest is not None and checkpoint.manifest.tree:
            tree = checkpoint.tree
        elif framework == "torch":
            tree = plain_tree(checkpoint)
        else:
            return load(checkpoint, **choice, **options)
        return restore(
            checkpoint, tree, choice, map_location=map_location, framework=framework, types=classes, **options
        )

    return retry_if_replaced(load_from, path)


def restore(
    checkpoint: Checkpoint,
    tree: Any,
    choice: Choice | None = None,
    *,
    map_location: MapLocation,
    framework: Framework | None = None,
    types: Types | None = None,
    **load_options: Unpack[LoadOptions],
) -> Any:
    """Return the state that a tree describes, with a checkpoint's variables as its arrays; see `load_state`."""
    state = outlined(checkpoint, tree, choice, types=types)
    return filled(checkpoint, state, map_location=map_location, framework=framework, **load_options)


def outlined(checkpoint: Checkpoint, tree: Any, choice: Choice | None = None, *, types: Types | None = None) -> Any:
    """Return what is chosen of the state that a tree describes, with a `Leaf` for each array; nothing is read."""
    if checkpoint.damaged:
        tree = prune(tree, checkpoint.damaged.__contains__)
    state = outline(tree, types, path=checkpoint.path)
    return state if choice is None else choose(state, **choice, path=checkpoint.path, name_of=_name_of)


def filled(
    checkpoint: Checkpoint,
    state: Any,
    *,
    map_location: MapLocation,
    framework: Framework | None = None,
    **load_options: Unpack[LoadOptions],
) -> Any:
    """Return a state that `outlined` returned, or a part of one, with a checkpoint's variables as its arrays."""
    restoring = _Restoring(checkpoint, map_location, framework)
    for _, leaf in leaves(state):
        if isinstance(leaf, Leaf):
            restoring.note(leaf)
    restoring.load(**load_options)
    return replaced(state, lambda leaf: restoring.array(leaf) if isinstance(leaf, Leaf) else leaf)


def plain_tree(names: Iterable[str]) -> Any:
    """Return the tree of a checkpoint that does not have one: a dict of its variables."""
    return {"$": "dict", "items": [[name, {"$": "array", "name": name}] for name in names]}


def _name_of(leaf: Any) -> str | None:
    return leaf.name if isinstance(leaf, Leaf) else None


class _Restoring:
    """The arrays of a state while it is restored.

    What stays in the host's memory is read in parallel. What goes to a device is read one variable at a time, so that
    the host never holds more than one of them.
    """

    def __init__(self, checkpoint: Checkpoint, map_location: MapLocation, framework: Framework | None) -> None:
        self._checkpoint = checkpoint
        self._framework = framework
        self._map_location = map_location
        self._leaves: dict[str, Leaf] = {}
        self._arrays: dict[str, np.ndarray] = {}
        self._tensors: dict[str, Any] = {}
        self._made: dict[Any, Any] = {}

    def note(self, leaf: Leaf) -> None:
        """Collect a leaf; called for all of them before anything is read, so that a wrong tree costs nothing."""
        for name in (leaf.name, *(leaf.view or ())[:1]):
            if name not in self._checkpoint:
                raise ManifestError(
                    "the tree names a variable that does not exist", path=self._checkpoint.path, variable=name
                )
        if leaf.requires_grad and not can_have_gradient(self._checkpoint[leaf.name].dtype):
            raise ManifestError(
                "the tree says that a tensor of this type has a gradient",
                path=self._checkpoint.path,
                variable=leaf.name,
                found=str(self._checkpoint[leaf.name].dtype),
            )
        self._leaves[leaf.name] = wanted(leaf, self._framework)

    def load(self, **options: Unpack[LoadOptions]) -> None:
        """Read all arrays that stay in the host's memory."""
        names = [name for name, leaf in self._leaves.items() if leaf.view is None and self._is_on_host(leaf)]
        if names:
            is_whole = len(names) == len(self._checkpoint)
            self._arrays = load(self._checkpoint, include=None if is_whole else names, **options)

    def _is_on_host(self, leaf: Leaf) -> bool:
        return leaf.type not in (TENSOR, PARAMETER) or locate(leaf, self._map_location) == "cpu"

    def array(self, leaf: Leaf) -> Any:
        """Return an array of the type that it had; arrays that shared memory share it again."""
        leaf = wanted(leaf, self._framework)
        if leaf.type in (TENSOR, PARAMETER):
            identity = (leaf.type, leaf.requires_grad, self._place(leaf))
            if identity not in self._made:
                self._made[identity] = as_saved(self._tensor(leaf), leaf)
            return self._made[identity]
        array = self._read(leaf.name)
        if leaf.type in BUILT:
            where = locate(leaf, self._map_location)
            return built(array, leaf, where if isinstance(where, str) else leaf.device)
        return to_jax(array, leaf) if leaf.type == JAX else array

    def _place(self, leaf: Leaf) -> Any:
        entry = self._checkpoint[leaf.name].entry
        first = entry.alias_of or leaf.name
        owner, offset, strides = leaf.view or (first, 0, ())
        return first if owner == first else (owner, offset, strides, entry.meta)

    def _tensor(self, leaf: Leaf) -> Any:
        owner = self._leaves.get(leaf.view[0]) if leaf.view is not None else None
        if leaf.view is not None and owner is not None:  # without its owner, it has its own values
            if owner.view is not None or owner.type not in (TENSOR, PARAMETER):
                raise ManifestError(
                    "the tree puts a tensor within one that cannot hold it",
                    path=self._checkpoint.path,
                    variable=leaf.name,
                    found=owner.name,
                )
            return view_of(self._tensor(owner), leaf, self._checkpoint[leaf.name].shape)
        first = self._checkpoint[leaf.name].entry.alias_of or leaf.name
        if first not in self._tensors:
            self._tensors[first] = to_torch(self._read(leaf.name), leaf, locate(leaf, self._map_location))
        return self._tensors[first]

    def _read(self, name: str) -> np.ndarray:
        array = self._arrays.get(name)
        return self._checkpoint[name].numpy() if array is None else array
