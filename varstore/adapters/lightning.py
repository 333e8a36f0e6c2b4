"""Lightning: a `CheckpointIO` plugin, with which a `Trainer` or a `Fabric` reads and writes checkpoints with varstore.

::

    keep = ModelCheckpoint("run", save_top_k=2, monitor="loss", save_last="link")
    trainer = Trainer(plugins=[VarstoreCheckpointIO(background=True)], callbacks=[keep])
    trainer.fit(model, ckpt_path="run/last.ckpt")

It is a plugin of ``lightning`` and of ``pytorch_lightning``, whatever is installed. What works, and how:

- All of `ModelCheckpoint`. A path that ends in ``.ckpt`` is the directory of a checkpoint.
- Everything that takes a ``ckpt_path``, "best" and "last" too. A file that Lightning wrote is read without running
  code of it, and a run that began with such files goes on with directories.
- ``load_from_checkpoint`` reads its path itself, which must be a file of Lightning's:
  ``varstore convert run/last.ckpt out.ckpt`` writes one. In it, paths and types among the hyperparameters are text, and
  namespaces are dicts.
- ``save_hyperparameters`` of any kind. What is not data, such as a class, a module or a function, is left out, and a
  warning names it; it is passed as in ``load_from_checkpoint("out.ckpt", net=net)``. Configurations of OmegaConf are
  saved as dicts and lists, with their interpolations resolved.
- Anything else that is not data, from a hook or a callback, is an error.
- Strategies that write checkpoints themselves, such as FSDP and DeepSpeed, do not use plugins like this.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import logging
import os
import sys
from typing import Any, Unpack

from varstore.adapters.torch import load, save, state_of
from varstore.disk.save.leftovers import discard
from varstore.errors import UnsupportedDtype, UsageError
from varstore.model.options import StateOptions, check_options
from varstore.storage.failures import translated
from varstore.text.escape import one_line
from varstore.text.hints import listed
from varstore.training.background import BackgroundSaver, PendingSave
from varstore.training.tensors import MapLocation
from varstore.training.tree import flatten

__all__ = ["VarstoreCheckpointIO"]

_HYPERPARAMETERS = ("hyper_parameters", "datamodule_hyper_parameters")
_TYPES = ("hparams_type", "datamodule_hparams_type")
_NAMED = 20
_log = logging.getLogger("varstore")


def _bases() -> tuple[Any, ...]:
    """Return the class of plugins of each package that is installed; each Trainer knows only that of its own."""
    packages = [name for name in ("lightning", "lightning_fabric") if importlib.util.find_spec(name)]
    if not packages:
        raise ModuleNotFoundError("No module named 'lightning'", name="lightning")
    modules = ["lightning.fabric.plugins" if name == "lightning" else f"{name}.plugins" for name in packages]
    return tuple(importlib.import_module(name).CheckpointIO for name in modules)


class VarstoreCheckpointIO(*_bases()):  # type: ignore[misc]  # classes of packages that may be absent
    """Save, load and remove the checkpoints of a Lightning `Trainer` or `Fabric`.

    Args:
        background: write in a thread while training continues. Reading and the end of a run wait for it, and what
            is to be removed meanwhile is removed when it is written.
        save_options: the options of `varstore.save`, for every save.

    Example:
        >>> import torch
        >>> from varstore.adapters.lightning import VarstoreCheckpointIO
        >>> plugin = VarstoreCheckpointIO()
        >>> plugin.save_checkpoint({"state_dict": {"w": torch.ones(2)}, "epoch": 3}, "last.ckpt")
        >>> plugin.load_checkpoint("last.ckpt")
        {'state_dict': {'w': tensor([1., 1.])}, 'epoch': 3}
    """

    def __init__(self, *, background: bool = False, **save_options: Unpack[StateOptions]) -> None:
        check_options(save_options, StateOptions, "VarstoreCheckpointIO()")
        self._saver = BackgroundSaver() if background else None
        self._save_options: StateOptions = {"overwrite": True, "foreign": "keep", **save_options}
        self._pending: PendingSave | None = None
        self._unwanted: list[str] = []
        self._warned: set[str] = set()

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any | None = None
    ) -> None:
        """Save a checkpoint, replacing an earlier one at this path.

        Raises:
            UsageError: `storage_options` is not None, or something in the checkpoint beside hyperparameters is not
                data.
            StorageError: the operating system refused.
        """
        if storage_options is not None:
            raise UsageError(
                "storage_options are not supported", path=path, hint="pass save options to VarstoreCheckpointIO"
            )
        self._finish()
        if os.path.islink(path):  # save_last="link" made it, and a save never follows one
            os.unlink(path)
        elif os.path.isfile(path):  # Lightning wrote it, and it goes when its successor is complete
            aside = f"{os.path.abspath(path)}.before"
            os.replace(path, aside)
            self._unwanted.append(aside)
        state = self._without_code(checkpoint)
        if self._saver is None:
            save(path, state, **self._save_options)
            self._finish()
            return
        with translated(os.fspath(path), "the directory cannot be made"):  # save_last="link" needs it at once
            os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
        flat = flatten(state_of(state))
        self._pending = self._saver.save(path, flat.variables, tree=flat.tree, **self._save_options)

    def load_checkpoint(
        self,
        path: str | os.PathLike[str],
        map_location: MapLocation = None,
        weights_only: bool | None = None,  # noqa: ARG002  # nothing but data is ever loaded
    ) -> dict[str, Any]:
        """Load a checkpoint, by default to the CPU; `map_location` is that of `varstore.load_state`."""
        self._finish()
        loaded: dict[str, Any] = load(path, map_location="cpu" if map_location is None else map_location)
        return loaded

    def remove_checkpoint(self, path: str | os.PathLike[str]) -> None:
        """Remove a checkpoint if it exists; it disappears in one step, before its files are deleted."""
        self._unwanted.append(os.path.abspath(path))
        if self._pending is None or self._pending.done():
            self._finish()

    def teardown(self) -> None:
        """Wait until everything is written."""
        self._finish()

    def _finish(self) -> None:
        """Wait for the save in the background, then remove what was to be removed meanwhile."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.wait()
        while self._unwanted:
            _remove(self._unwanted.pop(0))

    def _without_code(self, checkpoint: dict[str, Any]) -> dict[str, Any]:
        """Return a checkpoint whose hyperparameters are data; warn once of each that is left out."""
        state = {**checkpoint}
        lost: list[str] = []
        for name in _HYPERPARAMETERS:
            if name in state:
                state[name] = _data_in(state[name], name, lost)
        for name in _TYPES:  # that of OmegaConf; Lightning takes its name for that of a dict with attributes
            if isinstance(state.get(name), type):
                state[name] = state[name].__name__
        if new := [name for name in lost if name not in self._warned]:
            self._warned.update(new)
            names = listed(list(map(one_line, new)), _NAMED)
            _log.warning("hyperparameters that are not data are left out; pass them to load_from_checkpoint: %s", names)
        return state


_LOST = object()


def _data_in(value: Any, name: str, lost: list[str]) -> Any:
    """Return a hyperparameter without what is not data; `lost` gets the names of that."""
    if _is_data(value):
        return value
    if type(value).__module__.startswith("omegaconf."):
        return _plain(value)
    if isinstance(value, argparse.Namespace):
        return argparse.Namespace(**_data_in(vars(value), name, lost))
    if isinstance(value, dict) and all(_is_data({key: None}) for key in value):
        kept = {key: _data_in(item, f"{name}/{key}", lost) for key, item in value.items()}
        return {key: item for key, item in kept.items() if item is not _LOST}
    lost.append(name)
    return _LOST


def _is_data(value: Any) -> bool:
    try:
        flatten(value)
    except (UsageError, UnsupportedDtype):
        return False
    return True


def _plain(config: Any) -> Any:
    """Return a configuration of OmegaConf as dicts and lists; what cannot be resolved stays as it is written."""
    omegaconf = sys.modules["omegaconf"]
    try:
        return omegaconf.OmegaConf.to_container(config, resolve=True)
    except omegaconf.errors.OmegaConfBaseException:
        return omegaconf.OmegaConf.to_container(config)


def _remove(path: str) -> None:
    if os.path.isdir(path):
        discard(path)
    elif os.path.lexists(path):  # a file that Lightning wrote
        os.unlink(path)
