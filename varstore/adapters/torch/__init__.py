"""Save and load PyTorch modules, optimizers and nested state, and load into existing ones.

Names are those of ``state_dict``. Parameters in host memory are read directly into their own memory. Tensors on other
devices are copied one at a time, in both directions. Nothing is pickled.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Unpack

import torch

from varstore import live
from varstore.adapters.torch.modules import ModuleOptions, load_into_module
from varstore.adapters.torch.optimizers import load_into_optimizer
from varstore.disk.progress import Progress
from varstore.disk.read.checkpoint import Checkpoint, retry_if_replaced
from varstore.errors import UsageError
from varstore.formats.opened import ForeignCheckpoint
from varstore.formats.registry import detect
from varstore.formats.verbs import open_source, read
from varstore.model.into import from_source
from varstore.model.match import Missing, OnMismatch, OnTied
from varstore.model.options import LoadOptions, Path, StateOptions
from varstore.model.report import LoadReport
from varstore.training.chosen import Choice
from varstore.training.state import load_state, save_state
from varstore.training.tensors import Framework, MapLocation
from varstore.values.arguments import checked, described
from varstore.values.select import Patterns, Rename

__all__ = ["load", "load_into", "save", "state_of"]


@checked
def save(path: Path, state: Any, **save_options: Unpack[StateOptions]) -> Checkpoint:
    """Save a module, an optimizer, a state dict, or nested state that contains them.

    Every object with a method ``state_dict`` is saved as its state dict, with the version numbers that torch keeps with
    that of a module, in ``_metadata``.

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
    return live.state_of(state)


@checked
def load(
    path: Path | Checkpoint | ForeignCheckpoint,
    *,
    include: Patterns | None = None,
    exclude: Patterns | None = None,
    rename: Rename | None = None,
    map_location: MapLocation = None,
    encoding: str | None = None,
    verify: bool = True,
    threads: int | None = None,
    progress: Progress = None,
) -> Any:
    """Load the state that `save` saved, for ``load_state_dict``; plain variables are returned as a dict of tensors.

    A file of another system is loaded as its nested state, with tensors.

    Args:
        path: a checkpoint, its path, or any path that `varstore.read` opens.
        include, exclude, rename: what of it to load, and where to put it; see `varstore.load_state`.
        map_location: a device, its name, a dict of names, or a function of (tensor on the CPU, name of the device
            that it was on). By default, tensors are loaded to the devices that they were on. See
            `varstore.load_state`.
        encoding: of a file of torch, the encoding of strings that Python 2 pickled, or "bytes"; see `varstore.read`.
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
    choice: Choice = {"include": include, "exclude": exclude, "rename": rename}
    source = open_source(path) if encoding is None else _read(path, encoding)
    if isinstance(source, ForeignCheckpoint):
        return source.state(**choice, framework="torch", map_location=map_location)
    options: LoadOptions = {"verify": verify, "threads": threads, "progress": progress}

    def load_from(checkpoint: Checkpoint) -> Any:
        is_nested = checkpoint.manifest is not None and bool(checkpoint.manifest.tree)
        framework: Framework | None = None if is_nested else "torch"
        return load_state(checkpoint, **choice, map_location=map_location, framework=framework, **options)

    return retry_if_replaced(load_from, source)


def _read(path: Any, encoding: str) -> ForeignCheckpoint:
    if isinstance(path, Mapping) or detect(path).name != "torch":
        raise UsageError(
            "an encoding is for files of torch",
            field="encoding",
            found=described(path),
            expected="the path of such a file",
            hint="leave it out",
        )
    opened = read(path, "torch", encoding=encoding)
    assert isinstance(opened, ForeignCheckpoint)
    return opened


@checked
def load_into(
    target: torch.nn.Module | torch.optim.Optimizer,
    source: Path | Checkpoint | Mapping[str, Any],
    *,
    include: Patterns | None = None,
    exclude: Patterns | None = None,
    rename: Rename | None = None,
    strict: bool = True,
    assign: bool = False,
    on_mismatch: OnMismatch = "error",
    cast: bool = False,
    missing: Missing = None,
    on_tied: OnTied = "error",
    verify: bool = True,
    threads: int | None = None,
    progress: Progress = None,
) -> LoadReport:
    """Load the parameters and buffers of a module, or the state of an optimizer, in place.

    The result is that of ``load_state_dict``. Values are read directly into the memory of parameters and buffers,
    without a copy. Only what code of the module has to see, such as its hooks, is passed to it in a state dict.

    Names, shapes and types are compared before anything changes, except where such code decides what fits. Tied
    parameters stay tied, and the source needs only one of their names. The state of an optimizer is loaded whole,
    without other options than those of reading: it is the source itself, or the only such state in the source. It is an
    error if the optimizer would not have such state for its parameters.

    Args:
        target: a module or an optimizer.
        source: a checkpoint, any path that `varstore.read` opens, or a state dict.
        include, exclude, rename, strict, on_mismatch, cast, missing, on_tied: see `varstore.load_into`. For a module in
            nested state, use ``include="model/*", rename={"model/": ""}``. With ``strict=False, missing="error"``, only
            the source may have other names.
        assign: replace the module's tensors by new ones on the CPU, like ``load_state_dict(assign=True)``. A module on
            the meta device, which does not have memory for values, is loaded like this.
        verify, threads, progress: see `varstore.load`.

    Raises:
        VariableMismatch: see `varstore.load_into`. Or code of the module refuses what it is passed; the message says
            that the module has changed.
        UsageError: the target is neither a module nor an optimizer, or is on the meta device, the source does not have
            one optimizer state, or an optimizer is given another option.
        DigestMismatch, SizeMismatch, CheckpointNotFound, IncompleteCheckpoint: see `varstore.load`.

    Example:
        >>> import torch
        >>> from varstore.adapters.torch import load_into, save
        >>> model = torch.nn.Linear(2, 3)
        >>> checkpoint = save("before", {"model": model, "epoch": 3})
        >>> report = load_into(model, "before", include="model/*", rename={"model/": ""})
        >>> report.loaded
        ('weight', 'bias')
    """
    load_options: LoadOptions = {"verify": verify, "threads": threads, "progress": progress}
    options: ModuleOptions = {
        "include": include,
        "exclude": exclude,
        "rename": rename,
        "strict": strict,
        "assign": assign,
        "on_mismatch": on_mismatch,
        "cast": cast,
        "missing": missing,
        "on_tied": on_tied,
    }
    if isinstance(target, torch.optim.Optimizer):
        live.refuse_options(**options)
    elif not isinstance(target, torch.nn.Module):
        raise UsageError(
            "not a module or an optimizer",
            found=type(target).__name__,
            hint="for other objects, load the state and pass it to their method load_state_dict",
        )

    def load_from(given: Mapping[str, Any]) -> LoadReport:
        if isinstance(target, torch.optim.Optimizer):
            return load_into_optimizer(target, given, **load_options)
        return load_into_module(target, given, options, load_options)

    return from_source(open_source(source), load_from)
