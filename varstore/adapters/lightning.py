"""Lightning: a `CheckpointIO` plugin, with which a `Trainer` reads and writes its checkpoints with varstore.

Pass it as ``Trainer(plugins=[VarstoreCheckpointIO()])``. ``ModelCheckpoint``, ``ckpt_path=`` and so on work as before;
paths that end in ``.ckpt`` are directories.
"""

from __future__ import annotations

import os
from typing import Any, Unpack

from lightning.fabric.plugins import CheckpointIO

from varstore.adapters.torch import load, save, state_of
from varstore.disk.save.leftovers import discard
from varstore.errors import UsageError
from varstore.model.options import StateOptions, check_options
from varstore.training.background import BackgroundSaver, PendingSave
from varstore.training.tensors import MapLocation
from varstore.training.tree import flatten

__all__ = ["VarstoreCheckpointIO"]


class VarstoreCheckpointIO(CheckpointIO):  # type: ignore[misc, unused-ignore]  # Any where the package is absent
    """Save, load and remove the checkpoints of a Lightning `Trainer`.

    Args:
        background: write in a thread while training continues. Reading, removing and the end of a run wait for it.
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

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any | None = None
    ) -> None:
        """Save a checkpoint, replacing an earlier one at this path.

        Raises:
            UsageError: `storage_options` is not None, or something in the checkpoint is not data.
            StorageError: the operating system refused.
        """
        if storage_options is not None:
            raise UsageError(
                "storage_options are not supported", path=path, hint="pass save options to VarstoreCheckpointIO"
            )
        self._finish()
        if os.path.islink(path):  # save_last="link" made it, and a save never follows one
            os.unlink(path)
        if self._saver is None:
            save(path, checkpoint, **self._save_options)
            return
        flat = flatten(state_of(checkpoint))
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
        self._finish()
        if os.path.isdir(path):
            discard(os.fspath(path))

    def teardown(self) -> None:
        """Wait until everything is written."""
        self._finish()

    def _finish(self) -> None:
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.wait()
