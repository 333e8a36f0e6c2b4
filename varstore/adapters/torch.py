"""Save and load PyTorch modules, optimizers and nested state, and load into existing ones.

Names are those of ``state_dict``. Parameters in host memory are read directly into their own memory. Tensors on other
devices are copied one at a time, in both directions. Nothing is pickled.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Unpack

import numpy as np
import torch

from varstore.disk.progress import Progress
from varstore.disk.read.checkpoint import Checkpoint, open_checkpoint
from varstore.errors import UsageError, VariableMismatch
from varstore.model import into
from varstore.model.match import Match, OnMismatch, Pair, SourceSpec, compare
from varstore.model.options import LoadOptions, Path, StateOptions
from varstore.model.report import LoadReport, make_report
from varstore.training.state import load_state, restore, save_state
from varstore.training.tensors import TENSOR, MapLocation
from varstore.training.tree import flatten
from varstore.values.arrays import Source, Stored, as_source
from varstore.values.lazy import LazyArray
from varstore.values.select import Patterns, Rename, select

__all__ = ["load", "load_into", "save", "state_of"]


def save(path: Path, state: Any, **save_options: Unpack[StateOptions]) -> Checkpoint:
    """Save a module, an optimizer, a state dict, or nested state that contains them.

    Every object with a method ``state_dict`` is saved as its state dict. The version numbers that torch keeps with the
    state dict of a module, in ``_metadata``, are not saved.

    Args:
        path: a path that does not exist, or an empty directory; see `varstore.save`.
        state: for example ``{"model": model, "optimizer": optimizer, "scheduler": scheduler, "epoch": 3}``.
        save_options: the options of `varstore.save`.

    Raises:
        UnsupportedDtype: a tensor is quantised, sparse or without values, or has a type that the format cannot store.
        UsageError: something is not data; see `varstore.save_state`.
        CheckpointExists, OutOfSpace, StorageError: see `varstore.save`.

    Example:
        >>> import torch
        >>> from varstore.adapters.torch import save
        >>> save("before", {"model": torch.nn.Linear(2, 3), "epoch": 3}).names
        ('model/weight', 'model/bias')
    """
    return save_state(path, state_of(state), **save_options)


def state_of(state: Any) -> Any:
    """Return nested state in which every object with a method ``state_dict`` is replaced by its state dict.

    The result can be passed to `varstore.save_state` and `varstore.CheckpointManager`.

    Example:
        >>> import torch
        >>> from varstore.adapters.torch import state_of
        >>> state_of({"model": torch.nn.Linear(2, 3), "epoch": 3})["model"].keys()
        odict_keys(['weight', 'bias'])
    """
    if isinstance(state, torch.Tensor):
        return state
    if callable(getattr(state, "state_dict", None)) and not isinstance(state, type):
        return state.state_dict()
    if type(state) is dict:
        return {key: state_of(item) for key, item in state.items()}
    return [state_of(item) for item in state] if type(state) is list else state


def load(
    path: Path | Checkpoint,
    *,
    map_location: MapLocation = None,
    verify: bool = True,
    threads: int | None = None,
    progress: Progress = None,
) -> Any:
    """Load the state that `save` saved, for ``load_state_dict``; plain variables are returned as a dict of tensors.

    Args:
        path: a checkpoint, or its path.
        map_location: a device, its name, a dict of names, or a function of (tensor on the CPU, name of the device
            that it was on). By default, tensors are loaded to the devices that they were on. See
            `varstore.load_state`.
        verify: compare the digests of the values.
        threads: the number of threads; by default, it depends on the machine.
        progress: True for a progress bar, or a function of (bytes done, bytes in total).

    Raises:
        UsageError: a device does not exist on this machine.
        CheckpointNotFound, IncompleteCheckpoint, DigestMismatch, SizeMismatch: see `varstore.load`.

    Example:
        >>> import torch
        >>> from varstore.adapters.torch import load, save
        >>> model = torch.nn.Linear(2, 3)
        >>> checkpoint = save("before", {"model": model, "epoch": 3})
        >>> state = load("before")
        >>> model.load_state_dict(state["model"])
        <All keys matched successfully>
    """
    checkpoint = path if isinstance(path, Checkpoint) else open_checkpoint(path)
    options: LoadOptions = {"verify": verify, "threads": threads, "progress": progress}
    if checkpoint.manifest is not None and checkpoint.manifest.tree:
        return load_state(checkpoint, map_location=map_location, **options)
    tree = {
        "$": "dict",
        "items": [[name, {"$": "array", "name": name, "type": TENSOR}] for name in checkpoint],
    }
    return restore(checkpoint, tree, map_location=map_location, **options)


def load_into(
    target: torch.nn.Module | torch.optim.Optimizer,
    source: Path | Checkpoint | Mapping[str, Any],
    *,
    include: Patterns | None = None,
    exclude: Patterns | None = None,
    rename: Rename | None = None,
    strict: bool = True,
    on_mismatch: OnMismatch = "error",
    cast: bool = False,
    verify: bool = True,
    threads: int | None = None,
    progress: Progress = None,
) -> LoadReport:
    """Load the parameters and buffers of a module, or the state of an optimizer, in place.

    Names, shapes and types are checked before anything changes. Tied parameters stay tied, and the source needs only
    one of their names. The state of an optimizer is loaded whole: it is the source itself, or the only such state in
    the source.

    Args:
        target: a module or an optimizer.
        source: a checkpoint, its path, or a state dict.
        include, exclude, rename: choose and rename variables of the source; see `varstore.load`. For a module in nested
            state, use ``include="model/*", rename={"model/": ""}``.
        strict: raise if the target or the source has names that the other does not have.
        on_mismatch, cast, verify, threads, progress: see `varstore.load_into`.

    Raises:
        VariableMismatch: shapes or types differ or, if `strict`, names; nothing has changed.
        UsageError: the target is neither a module nor an optimizer, or the source does not have one optimizer state.
        DigestMismatch, SizeMismatch: the values are not those that were saved.
        CheckpointNotFound, IncompleteCheckpoint: there is no checkpoint, or only an incomplete one.

    Example:
        >>> import torch
        >>> from varstore.adapters.torch import load_into, save
        >>> model = torch.nn.Linear(2, 3)
        >>> checkpoint = save("before", {"model": model, "epoch": 3})
        >>> report = load_into(model, "before", include="model/*", rename={"model/": ""})
        >>> report.loaded
        ('weight', 'bias')
    """
    given = source if isinstance(source, Mapping) else open_checkpoint(source)
    if isinstance(target, torch.optim.Optimizer):
        if include is not None or exclude is not None or rename is not None:
            raise UsageError(
                "the state of an optimizer can only be loaded whole", hint="leave out include, exclude and rename"
            )
        return _load_optimizer(target, given, verify=verify, threads=threads, progress=progress)
    if not isinstance(target, torch.nn.Module):
        raise UsageError(
            "not a module or an optimizer",
            found=type(target).__name__,
            hint="for other objects, load the state and pass it to their method load_state_dict",
        )
    tensors = {name: item for name, item in target.state_dict().items() if isinstance(item, torch.Tensor)}
    targets = {name: as_source(tensor, variable=name) for name, tensor in tensors.items()}
    selected = select(given, include=include, exclude=exclude, rename=rename)
    arrays = {name: as_source(given[name], variable=name) for name in selected.values() if _is_array(given[name])}
    selected = {name: origin for name, origin in selected.items() if origin in arrays}
    match = compare(
        {name: (value.shape, value.dtype) for name, value in targets.items() if not isinstance(value, Stored)},
        {name: _spec(value) for name, value in arrays.items()},
        selected,
        on_mismatch=on_mismatch,
        cast=cast,
        path=given.path if isinstance(given, Checkpoint) else None,
    )
    match = _with_ties(match, tensors)
    where = given.path if isinstance(given, Checkpoint) else type(given).__name__
    report = make_report(match, source=where, target=type(target).__name__)
    if strict:
        report.raise_for("kept", "unused")
    options: dict[str, Any] = {"on_mismatch": on_mismatch, "cast": cast, "verify": verify, "threads": threads}
    here = {name: _memory(tensors[name]) for pair in match.pairs if _is_own_memory(tensors[name := pair.target])}
    sources = {pair.target: given[pair.source] for pair in match.pairs}
    into.load_into(here, {name: sources[name] for name in here}, progress=progress, **options)
    for pair in match.pairs:
        if pair.target not in here:
            _through_host(tensors[pair.target], pair, sources[pair.target], options)
    return report


def _is_array(value: Any) -> bool:
    return isinstance(value, Stored | LazyArray | np.ndarray | torch.Tensor) or hasattr(value, "__array__")


def _spec(source: Source) -> SourceSpec:
    if isinstance(source, Stored):
        return (None, None) if source.entry.meta is None else (source.entry.meta.shape, source.dtype)
    return source.shape, source.dtype


def _is_own_memory(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "cpu" and not tensor.is_conj() and not tensor.is_neg()


def _memory(tensor: torch.Tensor) -> np.ndarray:
    array = as_source(tensor, variable="")
    assert isinstance(array, np.ndarray)
    return array


def _through_host(tensor: torch.Tensor, pair: Pair, source: Any, options: dict[str, Any]) -> None:
    host = tensor.detach().cpu().clone().resolve_conj().resolve_neg()
    into.load_into({pair.target: _memory(host)}, {pair.target: source}, **options)
    with torch.no_grad():
        tensor.copy_(host)


def _with_ties(match: Match, tensors: Mapping[str, torch.Tensor]) -> Match:
    """Return the match without kept names that share memory with a loaded one."""
    filled = {_identity(tensors[pair.target]) for pair in match.pairs}
    return replace(match, kept=tuple(name for name in match.kept if _identity(tensors[name]) not in filled))


def _identity(tensor: torch.Tensor) -> Any:
    alone = id(tensor) if tensor.numel() == 0 or tensor.device.type == "meta" else None
    return str(tensor.device), tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), alone


def _load_optimizer(
    optimizer: torch.optim.Optimizer, given: Mapping[str, Any], **load_options: Unpack[LoadOptions]
) -> LoadReport:
    where = given.path if isinstance(given, Checkpoint) else type(given).__name__
    if isinstance(given, Checkpoint):
        state = restore(given, _optimizer_state(given.tree, where), map_location="cpu", **load_options)
    else:
        state = _optimizer_state(given, where)
    try:
        optimizer.load_state_dict(state)
    except (ValueError, KeyError) as error:
        raise VariableMismatch(
            f"the state is that of another optimizer: {error}",
            path=where,
            hint="create the optimizer with the same parameters and groups",
        ) from error
    return LoadReport(source=where, target=type(optimizer).__name__, loaded=tuple(flatten(state).variables))


def _optimizer_state(state: Any, where: str) -> dict[str, Any]:
    """Return the only optimizer state in nested state; the tree of a manifest has the same form."""
    candidates = [state, *(state.values() if isinstance(state, Mapping) else ())]
    found = [item for item in candidates if isinstance(item, dict) and {"state", "param_groups"} <= item.keys()]
    if len(found) != 1:
        raise UsageError(
            "not the state of one optimizer",
            path=where,
            found=f"{len(found)} of them",
            hint="pass the right one: load_into(optimizer, load(path)['optimizer'])",
        )
    return found[0]
