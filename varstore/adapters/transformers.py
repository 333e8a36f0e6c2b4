"""Hugging Face's Trainer: a callback that saves with a `CheckpointManager` and resumes from its checkpoints.

::

    manager = CheckpointManager("run", prefix="checkpoint-", save_when=EverySteps(100), keep=Latest(3), background=True)
    keeper = VarstoreCallback(manager)
    arguments = TrainingArguments("run", save_strategy="no")
    trainer = Trainer(model, arguments, callbacks=[keeper], train_dataset=data)
    trainer.train(resume_from_checkpoint=keeper.resume_from())

``resume_from_checkpoint`` takes the path of any step, and True if, as above, the manager has the output folder of the
Trainer and the prefix "checkpoint-". Where a callback is added after the Trainer was made, the Trainer warns of missing
keys when it resumes; they are loaded all the same.

The weights of a step become a folder for `from_pretrained` by `varstore.convert`::

    convert("run/checkpoint-100", "bert", format="huggingface", config=model.config,
            include="model/*", rename={"model/": ""})

Of a model of PEFT only the adapters are saved, as ``adapters/NAME/...``, and an adapter is converted in the same way,
with ``config=model.peft_config[NAME]``.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import sys
import tempfile
import uuid
from collections.abc import Mapping
from typing import Any

import numpy as np
import safetensors.torch
import torch
from transformers import TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import SAFE_WEIGHTS_NAME

from varstore.adapters.torch import load_into, state_of
from varstore.disk.read.checkpoint import Checkpoint, open_checkpoint
from varstore.errors import UsageError
from varstore.training.manager import CheckpointManager
from varstore.training.policies import Saved
from varstore.training.state import restore

__all__ = ["VarstoreCallback"]

_PARTS = frozenset({"optimizer", "scheduler", "rng", "trainer"})
_WEIGHTS = ("model", "adapters")
_MARK = "varstore: the weights are variables of this folder"
"""The only tensor in the file of weights that the Trainer looks for in the folder of a step."""
_SAID = "varstore"
"""Where the Trainer's state names the step; only its entries for callbacks take further keys."""
_TOKEN = "huggingface"
"""The attribute of a checkpoint by which it is known again."""


class VarstoreCallback(TrainerCallback):  # type: ignore[misc, unused-ignore]  # Any where the package is absent
    """Save model, optimizer, scheduler, random states and the state of the Trainer, at the steps of a manager's policy.

    A step is saved just before the next step or epoch begins or training ends. So the save has the metrics of an
    evaluation at its step, and training resumes bit for bit. Gradient scalers are not saved. In a distributed run, the
    first process saves, and random states are not restored.

    The manager does what some arguments of the Trainer do, and these are an error: ``save_total_limit=3`` is
    ``keep=Latest(3)``, and ``load_best_model_at_end=True`` is ``keep=Best("eval_loss")`` and then `load_best`.

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
        self._rng: dict[str, Any] | None = None
        self._hook: Any = None
        self._folder: Any = None

    def resume_from(self) -> str | None:
        """Return the argument for ``trainer.train(resume_from_checkpoint=…)``, or None if there is no checkpoint.

        It is the path of the latest step; for a step of an older release, that of a temporary folder.

        Raises:
            UsageError: a `VarstoreCallback` did not save the latest checkpoint.
        """
        latest = self.manager.latest()
        if latest is None:
            return None
        with open_checkpoint(latest) as checkpoint:
            tree = _tree(checkpoint)
            if TRAINER_STATE_NAME in checkpoint.files:
                return latest.path
            trainer = restore(checkpoint, tree["trainer"], map_location="cpu")
        self._folder = tempfile.TemporaryDirectory(prefix="varstore-resume-")
        for name, content in _files(trainer, latest.step, None).items():
            with open(os.path.join(self._folder.name, name), "wb") as file:
                file.write(content)
        return str(self._folder.name)

    def load_best(self, model: Any) -> Saved:
        """Load the weights of the best step into a model; return the record of the step.

        Raises:
            UsageError: the manager's `keep` does not contain a `Best` policy, or no step has its metric.
        """
        self.manager.wait()
        best = self.manager.best()
        if best is None:
            raise UsageError("no step has the metric to compare by", path=self.manager.directory)
        with open_checkpoint(best) as checkpoint:
            _load_weights(model, checkpoint, _tree(checkpoint))
        return best

    def on_init_end(self, args: Any, state: Any, control: Any, model: Any = None, **given: Any) -> None:  # noqa: ARG002
        """Refuse arguments of the Trainer that the manager replaces."""
        self._check(args)
        self._expect_mark(model)

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:  # noqa: ARG002
        """Restore the weights, the optimizer and the scheduler, if the Trainer resumes from a step of the manager."""
        self._check(args)
        if self._hook is not None:
            self._hook.remove()
        said = (state.stateful_callbacks or {}).pop(_SAID, None)
        if said is not None:
            self._restore(said, given, is_alone=args.world_size == 1)
            self._folder = None

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
        self._is_due = state.is_world_process_zero and self.manager.should_save(state.global_step)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Mapping[str, Any], **given: Any) -> None:  # noqa: ARG002
        """Keep the metrics for the save of this step."""
        self._metrics = {name: float(value) for name, value in metrics.items() if isinstance(value, int | float)}

    def on_train_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:  # noqa: ARG002
        """Save if a save is due, and wait until everything is written."""
        self._save(state, given)
        self.manager.wait()
        self._expect_mark(given["model"])

    def _check(self, args: Any) -> None:
        for argument, hint in _refused(args, self.manager):
            raise UsageError(
                f"{argument} is for checkpoints of the Trainer", field="TrainingArguments", hint=f"leave it out; {hint}"
            )

    def _expect_mark(self, model: Any) -> None:
        if model is not None:
            self._hook = model.register_load_state_dict_post_hook(_without_mark)

    def _save(self, state: Any, given: Mapping[str, Any]) -> None:
        metrics, self._metrics = self._metrics, {}
        if not self._is_due:
            return
        self._is_due = False
        trainer, token = dataclasses.asdict(state), uuid.uuid4().hex
        parts = {
            **_weights_of(given["model"]),
            "optimizer": given["optimizer"],
            "scheduler": given["lr_scheduler"],
            "rng": _rng(),
            "trainer": trainer,
        }
        self.manager.save(
            state.global_step,
            state_of(parts),
            metrics=metrics,
            attributes={_TOKEN: token},
            files=_files(trainer, state.global_step, token),
        )

    def _restore(self, said: Mapping[str, Any], given: Mapping[str, Any], *, is_alone: bool) -> None:
        step = said["step"]
        path = next((saved.path for saved in self.manager.all() if saved.step == step), None)
        if path is None:
            raise _of_another(self.manager, step)
        with open_checkpoint(path) as checkpoint:
            tree = _tree(checkpoint)
            if checkpoint.attributes.get(_TOKEN) != said["token"]:
                raise _of_another(self.manager, step)
            _load_weights(given["model"], checkpoint, tree)
            rest = {name: tree[name] for name in ("optimizer", "scheduler", "rng")}
            state = restore(checkpoint, rest, map_location="cpu")
        given["optimizer"].load_state_dict(state["optimizer"])
        given["lr_scheduler"].load_state_dict(state["scheduler"])
        self._rng = state["rng"] if is_alone else None

    def _restore_rng(self) -> None:
        rng, self._rng = self._rng, None
        if rng is not None:
            random.setstate(rng["python"])
            np.random.set_state(rng["numpy"])
            torch.set_rng_state(rng["torch"])
            if rng["cuda"]:
                torch.cuda.set_rng_state_all(rng["cuda"])


# --- what the Trainer is told ----------------------------------------------------------------------------------------


def _refused(args: Any, manager: CheckpointManager) -> list[tuple[str, str]]:
    """Return the arguments that are set but do nothing for the manager's checkpoints, each with what does the same."""
    refused = []
    if args.load_best_model_at_end:
        metric = f"eval_{(args.metric_for_best_model or 'loss').removeprefix('eval_')}"
        mode = "max" if args.greater_is_better else "min"
        hint = f"CheckpointManager(keep=Best({metric!r}, mode={mode!r})), then load_best(model) of the callback"
        refused.append(("load_best_model_at_end", hint))
    if args.save_total_limit is not None:
        refused.append(("save_total_limit", f"CheckpointManager(keep=Latest({args.save_total_limit}))"))
    saves = getattr(args.save_strategy, "value", args.save_strategy) != "no"
    if saves and os.path.realpath(manager.directory) == os.path.realpath(args.output_dir):
        refused.append(("save_strategy", 'save_strategy="no", because the manager saves to the same folder'))
    return refused


def _files(trainer: dict[str, Any], step: int, token: str | None) -> dict[str, bytes]:
    """Return the files by which the Trainer takes a folder for a checkpoint: its state, and nothing of the weights."""
    said = {**(trainer["stateful_callbacks"] or {}), _SAID: {"step": step, "token": token}}
    text = json.dumps({**trainer, "stateful_callbacks": said}, indent=2, sort_keys=True)
    weights = safetensors.torch.save({_MARK: torch.tensor(step)})
    return {TRAINER_STATE_NAME: f"{text}\n".encode(), SAFE_WEIGHTS_NAME: weights}


def _without_mark(model: Any, incompatible: Any) -> None:  # noqa: ARG001  # torch passes the module
    """Tell nothing of keys that are missing where the Trainer loads no weights; they are loaded when it begins."""
    if _MARK in incompatible.unexpected_keys:
        incompatible.unexpected_keys.clear()
        incompatible.missing_keys.clear()


# --- what a step holds -----------------------------------------------------------------------------------------------


def _weights_of(model: Any) -> dict[str, Any]:
    """Return the part of a state that holds the weights: the model, or the adapters of a model of PEFT."""
    peft = sys.modules.get("peft")
    if peft is None or not isinstance(model, peft.PeftModel):
        return {"model": model}
    return {"adapters": {name: peft.get_peft_model_state_dict(model, adapter_name=name) for name in model.peft_config}}


def _load_weights(model: Any, checkpoint: Checkpoint, tree: Mapping[str, Any]) -> None:
    if "model" in tree:
        load_into(model, checkpoint, include="model/*", rename={"model/": ""})
        return
    peft = sys.modules.get("peft")
    adapters = restore(checkpoint, tree["adapters"], map_location="cpu")
    known = model.peft_config if peft is not None and isinstance(model, peft.PeftModel) else {}
    if adapters.keys() != known.keys():
        raise UsageError(
            "the model does not have the adapters of PEFT that were saved",
            path=checkpoint.path,
            found=", ".join(known) or "none",
            expected=", ".join(adapters),
        )
    assert peft is not None
    for name, weights in adapters.items():
        peft.set_peft_model_state_dict(model, weights, adapter_name=name)


def _tree(checkpoint: Checkpoint) -> dict[str, Any]:
    tree = checkpoint.tree
    if not isinstance(tree, dict) or not any(tree.keys() == {*_PARTS, weights} for weights in _WEIGHTS):
        raise UsageError(
            "VarstoreCallback did not save this checkpoint",
            path=checkpoint.path,
            hint="use a directory of its own for its CheckpointManager",
        )
    return tree


def _of_another(manager: CheckpointManager, step: int) -> UsageError:
    return UsageError(
        "the Trainer resumes from a step that is not one of this manager",
        path=manager.directory,
        found=f"step {step} of another run",
        hint="give VarstoreCallback a manager of the directory that holds the step",
    )


def _rng() -> dict[str, Any]:
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }
