"""Save and load nested state: one checkpoint holds model, optimizer, epoch and loss."""

from __future__ import annotations

import os
from typing import Any, Unpack

import numpy as np

from varstore.disk.progress import Progress
from varstore.disk.read.checkpoint import Checkpoint, open_checkpoint
from varstore.errors import ManifestError
from varstore.model.options import LoadOptions, StateOptions
from varstore.model.store import load, save
from varstore.training.tensors import (
    JAX,
    PARAMETER,
    TENSOR,
    Leaf,
    MapLocation,
    as_saved,
    locate,
    to_jax,
    to_torch,
    view_of,
)
from varstore.training.tree import flatten, unflatten

__all__ = ["load_state", "save_state"]


def save_state(path: str | os.PathLike[str], state: Any, **save_options: Unpack[StateOptions]) -> Checkpoint:
    """Save nested state: all of it, or nothing.

    Dicts with keys of any plain kind, OrderedDicts, Counters, lists, tuples, named tuples, sets, None, bools,
    numbers of any size, strings, bytes and numpy scalars are kept exactly, in the manifest. Arrays, tensors and
    variables of other checkpoints become variables named by their path, such as
    ``optimizer/state/0/momentum_buffer``, each readable by itself as in any checkpoint. Tensors that are one in
    memory, or lie within another one, are so again when they are loaded. Arrays come back in C order and the
    machine's byte order; containers that stand in two places come back as two. Nothing is pickled.

    Args:
        save_options: those of `varstore.save`.

    Raises:
        UsageError: something that is not data; says where, before the first byte.
        InvalidName, UnsupportedDtype, CheckpointExists, OutOfSpace, StorageError: see `varstore.save`.
    """
    flat = flatten(state)
    return save(path, flat.variables, tree=flat.tree, **save_options)


def load_state(
    path: str | os.PathLike[str] | Checkpoint,
    *,
    map_location: MapLocation = None,
    verify: bool = True,
    threads: int | None = None,
    progress: Progress = None,
) -> Any:
    """Load what `save_state` saved, each thing of the type that it was; of plain variables, a dict by name.

    Args:
        map_location: where torch's tensors go, in torch's own forms: a device, its name, a dict of names, or a
            function of (tensor on the CPU, name of the device that it was on) that returns the tensor to keep, or
            None; without it, they go where they were.
        verify, threads, progress: see `varstore.load`. Tensors that go to a device are read one at a time.

    Raises:
        MissingDependency: the state holds arrays of a framework that is not installed.
        UsageError: a device is not there, or jax would make an array narrower.
        ManifestError: the tree in the manifest does not fit the variables.
        CheckpointNotFound, IncompleteCheckpoint, DigestMismatch, SizeMismatch: see `varstore.load`.
    """
    checkpoint = path if isinstance(path, Checkpoint) else open_checkpoint(path)
    options: LoadOptions = {"verify": verify, "threads": threads, "progress": progress}
    if checkpoint.manifest is None or not checkpoint.manifest.tree:
        return load(checkpoint, **options)
    return restore(checkpoint, checkpoint.tree, map_location=map_location, **options)


def restore(
    checkpoint: Checkpoint, tree: Any, *, map_location: MapLocation, **load_options: Unpack[LoadOptions]
) -> Any:
    """Put the state of a tree together from a checkpoint's variables; see `load_state`."""
    restoring = _Restoring(checkpoint, map_location)
    unflatten(tree, restoring.note, path=checkpoint.path)
    restoring.load(**load_options)
    return unflatten(tree, restoring.array, path=checkpoint.path)


class _Restoring:
    """Reads in parallel what stays in the host's memory, and one at a time what goes to a device."""

    def __init__(self, checkpoint: Checkpoint, map_location: MapLocation) -> None:
        self._checkpoint = checkpoint
        self._map_location = map_location
        self._leaves: dict[str, Leaf] = {}
        self._arrays: dict[str, np.ndarray] = {}
        self._tensors: dict[str, Any] = {}
        self._made: dict[Any, Any] = {}

    def note(self, leaf: Leaf) -> None:
        """Collect the leaves before anything is read, and refuse what the checkpoint cannot give."""
        for name in (leaf.name, *(leaf.view or ())[:1]):
            if name not in self._checkpoint:
                raise ManifestError(
                    "the tree names a variable that is not there", path=self._checkpoint.path, variable=name
                )
        self._leaves[leaf.name] = leaf

    def load(self, **options: Unpack[LoadOptions]) -> None:
        """Read all that stays in the host's memory."""
        here = [name for name, leaf in self._leaves.items() if leaf.view is None and self._stays(leaf)]
        if here:
            whole = len(here) == len(self._checkpoint)
            self._arrays = load(self._checkpoint, include=None if whole else here, **options)

    def _stays(self, leaf: Leaf) -> bool:
        return leaf.type not in (TENSOR, PARAMETER) or locate(leaf, self._map_location) == "cpu"

    def array(self, leaf: Leaf) -> Any:
        """Return one array as what it was; arrays that were one in memory are one again."""
        if leaf.type in (TENSOR, PARAMETER):
            identity = (leaf.type, leaf.requires_grad, self._place(leaf))
            if identity not in self._made:
                self._made[identity] = as_saved(self._tensor(leaf), leaf)
            return self._made[identity]
        array = self._read(leaf.name)
        return to_jax(array, leaf) if leaf.type == JAX else array

    def _place(self, leaf: Leaf) -> Any:
        entry = self._checkpoint[leaf.name].entry
        first = entry.alias_of or leaf.name
        owner, offset, strides = leaf.view or (first, 0, ())
        return first if owner == first else (owner, offset, strides, entry.meta)

    def _tensor(self, leaf: Leaf) -> Any:
        owner = self._leaves.get(leaf.view[0]) if leaf.view is not None else None
        if leaf.view is not None and owner is not None:  # what is restored alone has its own values too
            if owner.view is not None or owner.type not in (TENSOR, PARAMETER):
                raise ValueError(f"{owner.name!r} cannot hold {leaf.name!r}")
            return view_of(self._tensor(owner), leaf, self._checkpoint[leaf.name].shape)
        first = self._checkpoint[leaf.name].entry.alias_of or leaf.name
        if first not in self._tensors:
            self._tensors[first] = to_torch(self._read(leaf.name), leaf, locate(leaf, self._map_location))
        return self._tensors[first]

    def _read(self, name: str) -> np.ndarray:
        array = self._arrays.get(name)
        return self._checkpoint[name].numpy() if array is None else array
