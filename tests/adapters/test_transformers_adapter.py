"""Hugging Face's own Trainer, stopped anywhere and resumed through the callback."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from varstore.adapters.transformers import VarstoreCallback
from varstore.disk.read.checkpoint import open_checkpoint
from varstore.errors import UsageError
from varstore.inspection.verify import verify
from varstore.training.manager import CheckpointManager
from varstore.training.policies import AtSteps, Best, EverySteps, Latest

pytestmark = pytest.mark.filterwarnings("ignore")  # advice of the Trainer's


class Stop(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


def trainer(folder: Path, seed: int, *callbacks: Any) -> Any:
    torch.manual_seed(seed)
    config = BertConfig(vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    model = BertForSequenceClassification(config)  # it has dropout, so the random states matter
    rows = torch.randint(20, (20, 6), generator=torch.Generator().manual_seed(3))
    data = [{"input_ids": row, "labels": row[0] % 2} for row in rows]
    arguments = TrainingArguments(
        str(folder), num_train_epochs=2, per_device_train_batch_size=4, learning_rate=1e-2, logging_steps=1, seed=5,
        save_strategy="no", eval_strategy="steps", eval_steps=2, report_to=[], use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    return Trainer(model, arguments, train_dataset=data, eval_dataset=data, callbacks=list(callbacks))


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize(("saved", "stopped"), [(3, 5), (4, 5), (5, 7)])
def test_a_run_resumes_as_if_never_stopped(tmp_path: Path, saved: int, stopped: int) -> None:
    straight = trainer(tmp_path / "hf", 0)
    straight.train()
    expected = losses(straight)
    assert len(expected) == 10
    keeper = VarstoreCallback(CheckpointManager(tmp_path / "run", save_when=AtSteps([saved]), background=True))
    assert keeper.resume_from() is None
    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path / "hf", 0, keeper, Stop(stopped)).train()
    keeper.manager.wait()
    again = VarstoreCallback(CheckpointManager(tmp_path / "run", save_when=AtSteps([saved])))
    resumed = trainer(tmp_path / "hf", 1, again)
    resumed.train(resume_from_checkpoint=again.resume_from())
    assert losses(resumed) == expected
    for a, b in zip(straight.model.state_dict().values(), resumed.model.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_the_manager_decides_what_is_saved_and_kept(tmp_path: Path) -> None:
    manager = CheckpointManager(
        tmp_path / "run",
        save_when=EverySteps(2),
        keep=Latest(1) | Best("eval_loss"),
        keep_parts={"optimizer/*": Latest(1)},
    )
    run = trainer(tmp_path / "hf", 0, VarstoreCallback(manager))
    run.train()
    evaluated = {entry["step"]: entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry}
    best = min(evaluated, key=lambda step: (evaluated[step], -step))
    assert [saved.step for saved in manager.all()] == sorted({best, 10})
    assert {saved.step: saved.metrics["eval_loss"] for saved in manager.all()} == {n: evaluated[n] for n in {best, 10}}
    checkpoint = open_checkpoint(manager.latest())
    assert "model/classifier.weight" in checkpoint
    assert "optimizer/state/0/exp_avg" in checkpoint
    assert verify(checkpoint.path).ok
    assert json.dumps(manager.restore()["trainer"]["global_step"]) == "10"


def test_a_directory_of_something_else(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path)
    manager.save(1, {"w": torch.ones(2)})
    with pytest.raises(UsageError, match="VarstoreCallback"):
        VarstoreCallback(manager).resume_from()
