"""Hugging Face's Trainer: a callback that saves through a `CheckpointManager`, and resumes from it.

::

    keeper = VarstoreCallback(CheckpointManager("run", save_when=EverySteps(100), keep=Latest(3), background=True))
    trainer = Trainer(model, TrainingArguments(..., save_strategy="no"), callbacks=[keeper], ...)
    trainer.train(resume_from_checkpoint=keeper.resume_from())
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import tempfile
from typing import Any

import numpy as np
import safetensors.torch
import torch
from transformers import TrainerCallback

from varstore.adapters.torch import load
from varstore.disk.reader import open_checkpoint
from varstore.training.manager import CheckpointManager
from varstore.training.state import restore
from varstore.training.tree import parse

__all__ = ["VarstoreCallback"]

_MODEL = "model/"


class VarstoreCallback(TrainerCallback):
    """Saves model, optimizer, scheduler, random states and the Trainer's own state when the manager says so.

    A save is made just before the next step or epoch begins, or training ends, so that it holds the metrics of an
    evaluation at its step, and all goes on from it exactly. Gradient scalers are not saved.
    """

    def __init__(self, manager: CheckpointManager) -> None:
        self.manager = manager
        self._is_due = False
        self._metrics: dict[str, float] = {}
        self._resumed: dict[str, Any] | None = None
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def resume_from(self) -> str | None:
        """Return what ``trainer.train(resume_from_checkpoint=…)`` takes, of the latest step; None where there is none.

        It is a folder for the weights and the counters alone; the callback itself restores all else.
        """
        latest = self.manager.latest()
        if latest is None:
            return None
        self._folder = tempfile.TemporaryDirectory(prefix="varstore-")
        checkpoint = open_checkpoint(latest)
        weights = {
            name.removeprefix(_MODEL): load_alone(variable)
            for name, variable in checkpoint.items()
            if name.startswith(_MODEL)
        }
        safetensors.torch.save_file(weights, os.path.join(self._folder.name, "model.safetensors"))
        state = load(checkpoint)
        return self._folder.name
