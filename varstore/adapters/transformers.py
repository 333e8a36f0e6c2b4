"""Hugging Face's Trainer: a callback that saves with a `CheckpointManager` and resumes from its checkpoints.

::

    keeper = VarstoreCallback(CheckpointManager("run", save_when=EverySteps(100), keep=Latest(3), background=True))
    trainer = Trainer(model, TrainingArguments("run", save_strategy="no"), callbacks=[keeper], train_dataset=data)
    trainer.train(resume_from_checkpoint=keeper.resume_from())
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import tempfile
from collections.abc import Mapping
from typing import Any

import numpy as np
import safetensors.torch
import torch
from transformers import TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import SAFE_WEIGHTS_NAME

from varstore.adapters.torch import state_of
from varstore.disk.read.checkpoint import Checkpoint, open_checkpoint
from varstore.errors import UsageError
from varstore.training.manager import CheckpointManager
from varstore.training.state import restore

__all__ = ["VarstoreCallback"]

_PARTS = frozenset({"model", "optimizer", "scheduler", "rng", "trainer"})


class VarstoreCallback(TrainerCallback):  # type: ignore[misc, unused-ignore]  # Any where the package is absent
    """Save model, optimizer, scheduler, random states and the state of the Trainer, at the steps of a manager's policy.

    A step is saved just before the next step or epoch begins or training ends. So the save has the metrics of an
    evaluation at its step, and training resumes bit for bit. Gradient scalers are not saved.

    Example:
        >>> from varstore.adapters.transformers import VarstoreCallback
        >>> keeper = VarstoreCallback(vs.CheckpointManager("run", save_when=vs.EverySteps(100), keep=vs.Latest(3)))
        >>> keeper.resume_from() is None
        True
    """

    def __init__(self, manager: CheckpointManager) -> None:
        self.manager = manager
        self._is_due = False
        self._metrics: dict[str, float] = {}
        self._resumed: dict[str, Any] = {}

    def resume_from(self) -> str | None:
        """Return the argument for ``trainer.train(resume_from_checkpoint=…)``, or None if there is no checkpoint.

        It is a temporary folder from which the Trainer reads the weights and counters of the latest step. The callback
        restores everything else when training begins.

        Raises:
            UsageError: a `VarstoreCallback` did not save the latest checkpoint.
        """
        latest = self.manager.latest()
        if latest is None:
            return None
        with open_checkpoint(latest) as checkpoint:
            state = restore(checkpoint, _tree(checkpoint), map_location="cpu")
        folder = tempfile.TemporaryDirectory(prefix="varstore-resume-")
        weights = {name: tensor.clone() for name, tensor in state.pop("model").items()}
        safetensors.torch.save_file(weights, os.path.join(folder.name, SAFE_WEIGHTS_NAME))
        with open(os.path.join(folder.name, TRAINER_STATE_NAME), "w", encoding="utf-8") as file:
            json.dump(state.pop("trainer"), file)
        self._resumed = {**state, "folder": folder}
        return folder.name

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:  # noqa: ARG002
        """Restore the optimizer and the scheduler."""
        if self._resumed:
            given["optimizer"].load_state_dict(self._resumed.pop("optimizer"))
            given["lr_scheduler"].load_state_dict(self._resumed.pop("scheduler"))
            self._resumed.pop("folder").cleanup()

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:  # noqa: ARG002
        """Save if a save is due; restore the random states if the run stopped between two epochs."""
        self._save(state, given)
        if float(state.epoch or 0).is_integer():
            self._restore_rng()

    def on_step_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:  # noqa: ARG002
        """Save if a save is due; restore the random states if the run stopped within an epoch."""
        self._save(state, given)
        self._restore_rng()

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:  # noqa: ARG002
        """Ask the manager whether to save this step."""
        self._is_due = self.manager.should_save(state.global_step)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Mapping[str, Any], **given: Any) -> None:  # noqa: ARG002
        """Keep the metrics for the save of this step."""
        self._metrics = {name: float(value) for name, value in metrics.items() if isinstance(value, int | float)}

    def on_train_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:  # noqa: ARG002
        """Save if a save is due, and wait until everything is written."""
        self._save(state, given)
        self.manager.wait()

    def _save(self, state: Any, given: Mapping[str, Any]) -> None:
        metrics, self._metrics = self._metrics, {}
        if not self._is_due:
            return
        self._is_due = False
        parts = {
            "model": given["model"],
            "optimizer": given["optimizer"],
            "scheduler": given["lr_scheduler"],
            "rng": _rng(),
            "trainer": dataclasses.asdict(state),
        }
        self.manager.save(state.global_step, state_of(parts), metrics=metrics)

    def _restore_rng(self) -> None:
        rng = self._resumed.pop("rng", None)
        if rng is not None:
            random.setstate(rng["python"])
            np.random.set_state(rng["numpy"])
            torch.set_rng_state(rng["torch"])
            if rng["cuda"]:
                torch.cuda.set_rng_state_all(rng["cuda"])


def _tree(checkpoint: Checkpoint) -> dict[str, Any]:
    tree = checkpoint.tree
    if not isinstance(tree, dict) or tree.keys() != _PARTS:
        raise UsageError(
            "VarstoreCallback did not save this checkpoint",
            path=checkpoint.path,
            hint="use a directory of its own for its CheckpointManager",
        )
    return tree


def _rng() -> dict[str, Any]:
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }
