"""A callback for `paddle.Model`, with which `fit` saves and resumes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import paddle

from varstore.adapters.paddle.loading import load, load_into
from varstore.adapters.paddle.optimizers import moved_names, set_state
from varstore.adapters.paddle.state import NAMES, known_names, parameter_names, state_of
from varstore.disk.read.checkpoint import open_checkpoint
from varstore.errors import UsageError
from varstore.training.manager import CheckpointManager

__all__ = ["VarstoreCallback"]

_PARTS = {"model", "optimizer", "done"}
"""What is saved, beside the scaler where there is one."""


class VarstoreCallback(paddle.callbacks.Callback):  # type: ignore[misc, unused-ignore]  # Any where Paddle is absent
    """Save a `paddle.Model` while `fit` runs: its network, its optimizer with the scheduler, and its gradient scaler.

    ::

        keeper = VarstoreCallback(CheckpointManager("run", keep=Latest(3)))
        done = keeper.resume(model)
        model.fit(data, epochs=10 - done, callbacks=[keeper])

    A step is saved just before the next batch or epoch begins or training ends. So the save has the metrics of an
    evaluation at its step, and what other callbacks did to the scheduler.

    An epoch that was interrupted begins again. Random states are not saved. `fit` shuffles a Dataset by the number of
    the epoch within its call: for the order of a run that was not interrupted, pass a DataLoader, and call
    ``set_epoch(done)`` of its sampler.

    Args:
        manager: which steps are saved and kept.
        each: what a step is: an "epoch", or a "batch".

    Raises:
        UsageError: `each` is neither.

    Example:
        >>> import paddle
        >>> from varstore.adapters.paddle import VarstoreCallback
        >>> model = paddle.Model(paddle.nn.Linear(2, 1))
        >>> model.prepare(paddle.optimizer.Adam(parameters=model.parameters()), paddle.nn.MSELoss())
        >>> batches = [[np.ones((4, 2), "f4"), np.ones((4, 1), "f4")]]
        >>> keeper = VarstoreCallback(vs.CheckpointManager("run", keep=vs.Latest(3)))
        >>> keeper.resume(model)
        0
        >>> model.fit(batches, epochs=2, verbose=0, callbacks=[keeper])
        >>> keeper.resume(model)
        2
    """

    def __init__(self, manager: CheckpointManager, *, each: Literal["epoch", "batch"] = "epoch") -> None:
        super().__init__()
        if each not in ("epoch", "batch"):
            raise UsageError("unknown mode", field="each", found=repr(each), expected="'epoch' or 'batch'")
        self.manager = manager
        self._each = each
        self._done = {"epoch": 0, "batch": 0}
        self._is_due = False
        self._metrics: dict[str, float] = {}

    def resume(self, model: paddle.Model) -> int:
        """Load the latest checkpoint into a prepared model, and return how many epochs it has behind it, or 0.

        Raises:
            UsageError: a `VarstoreCallback` did not save the latest checkpoint, or the model has no optimizer.
            VariableMismatch: the model is another one.
        """
        latest = self.manager.latest()
        if latest is None:
            return 0
        if model._optimizer is None:
            raise UsageError("the model is not prepared for training", hint="call its prepare with an optimizer first")
        with open_checkpoint(latest) as checkpoint:
            tree = checkpoint.tree
            if not isinstance(tree, dict) or tree.keys() - {"scaler"} != _PARTS:
                raise UsageError(
                    "VarstoreCallback did not save this checkpoint",
                    path=checkpoint.path,
                    hint="use a directory of its own for its CheckpointManager",
                )
            state = load(checkpoint, exclude="model/*")
            moved = moved_names(model.network, known_names(checkpoint))
            load_into(model.network, checkpoint, include="model/*", rename={"model/": ""})
            set_state(model._optimizer, state["optimizer"], moved, checkpoint.path)
        scaler = getattr(model, "_scaler", None)  # there is none without mixed precision
        if scaler is not None and state.get("scaler"):
            scaler.load_state_dict(state["scaler"])
        self._done = state["done"]
        return int(self._done["epoch"])

    def on_train_batch_end(self, step: int, logs: Mapping[str, Any] | None = None) -> None:  # noqa: ARG002
        """Count the batch, and ask the manager whether to save it."""
        self._count("batch")

    def on_epoch_end(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:  # noqa: ARG002
        """Count the epoch, and ask the manager whether to save it."""
        self._count("epoch")

    def on_eval_end(self, logs: Mapping[str, Any] | None = None) -> None:
        """Keep the metrics for the save of this step."""
        for name, value in (logs or {}).items():
            numbers = value if isinstance(value, list) else [value]
            if len(numbers) == 1 and isinstance(numbers[0], int | float) and name not in ("step", "batch_size"):
                self._metrics[name] = float(numbers[0])

    def on_train_batch_begin(self, step: int, logs: Mapping[str, Any] | None = None) -> None:  # noqa: ARG002
        """Save if a save is due."""
        self._save()

    def on_epoch_begin(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:  # noqa: ARG002
        """Save if a save is due."""
        self._save()

    def on_train_end(self, logs: Mapping[str, Any] | None = None) -> None:  # noqa: ARG002
        """Save if a save is due, and wait until everything is written."""
        self._save()
        self.manager.wait()

    def _count(self, what: str) -> None:
        self._done[what] += 1
        if what == self._each:
            self._is_due = self.manager.should_save(self._done[what])

    def _save(self) -> None:
        metrics, self._metrics = self._metrics, {}
        if not self._is_due:
            return
        self._is_due = False
        parts = {"model": self.model.network, "optimizer": self.model._optimizer, "done": dict(self._done)}
        if getattr(self.model, "_scaler", None) is not None:
            parts["scaler"] = self.model._scaler
        names = dict(parameter_names(parts))
        self.manager.save(self._done[self._each], state_of(parts), metrics=metrics, attributes={NAMES: names})
