"""Hugging Face's own Trainer, stopped anywhere and resumed through the callback."""

from __future__ import annotations

import json
import logging
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

import varstore as vs
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


CONFIG = BertConfig(vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)


def trainer(folder: Path, seed: int, *callbacks: Any, model: Any = None, **arguments: Any) -> Any:
    torch.manual_seed(seed)
    model = model or BertForSequenceClassification(CONFIG)  # it has dropout, so the random states matter
    rows = torch.randint(20, (20, 6), generator=torch.Generator().manual_seed(3))
    data = [{"input_ids": row, "labels": row[0] % 2} for row in rows]
    given = {
        "num_train_epochs": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "logging_steps": 1, "seed": 5,
        "save_strategy": "no", "eval_strategy": "steps", "eval_steps": 2, "report_to": [], "use_cpu": True,
        "disable_tqdm": True, **arguments,
    }  # fmt: skip
    given = TrainingArguments(str(folder), **given)
    return Trainer(model, given, train_dataset=data, eval_dataset=data, callbacks=list(callbacks))


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def path_of_step(keeper: VarstoreCallback) -> str | bool | None:
    return keeper.manager.latest().path


def output_folder(keeper: VarstoreCallback) -> str | bool | None:
    assert path_of_step(keeper)
    return True


def older_release(keeper: VarstoreCallback) -> str | bool | None:
    """Make the step one that has no files for the Trainer."""
    latest = keeper.manager.latest()
    with open_checkpoint(latest) as checkpoint:
        kept = {"training": checkpoint.attributes["training"]}
    vs.save_state(latest.path, vs.load_state(latest.path), attributes=kept, overwrite=True)
    return keeper.resume_from()


HOW = [(3, 5, VarstoreCallback.resume_from), (4, 5, output_folder), (5, 7, path_of_step), (6, 7, older_release)]


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Any:
    run = trainer(tmp_path_factory.mktemp("straight"), 0)
    run.train()
    return run


@pytest.mark.parametrize(("saved", "stopped", "how"), HOW)
def test_a_run_resumes_as_if_never_stopped(
    tmp_path: Path, straight: Any, saved: int, stopped: int, how: Any,
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    expected = losses(straight)
    assert len(expected) == 10

    def keeper(*, background: bool) -> VarstoreCallback:
        save_when = AtSteps([saved])
        manager = CheckpointManager(tmp_path / "run", prefix="checkpoint-", save_when=save_when, background=background)
        return VarstoreCallback(manager)

    first = keeper(background=True)
    assert first.resume_from() is None
    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path / "run", 0, first, Stop(stopped)).train()
    first.manager.wait()
    again = keeper(background=False)
    resumed = trainer(tmp_path / "run", 1, again)
    resumed.train(resume_from_checkpoint=how(again))
    assert losses(resumed) == expected
    for a, b in zip(straight.model.state_dict().values(), resumed.model.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert "keys in the checkpoint" not in caplog.text


def test_a_step_of_another_run_is_refused(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 1)):
        manager = CheckpointManager(tmp_path / name, save_when=AtSteps([2]))
        trainer(tmp_path / "hf", seed, VarstoreCallback(manager), max_steps=2).train()
    resumed = trainer(tmp_path / "hf", 0, VarstoreCallback(manager), max_steps=4)
    with pytest.raises(UsageError, match="not one of this manager"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "step-2"))


def test_a_checkpoint_of_the_trainers_own_is_resumed(tmp_path: Path) -> None:
    first = trainer(tmp_path / "hf", 0, max_steps=2, save_strategy="steps", save_steps=2)
    first.train()
    manager = CheckpointManager(tmp_path / "run", save_when=AtSteps([3]))
    resumed = trainer(tmp_path / "hf", 1, VarstoreCallback(manager), max_steps=3)
    resumed.train(resume_from_checkpoint=True)
    assert manager.latest().step == 3
    assert losses(resumed)[:2] == losses(first)


@pytest.mark.parametrize(
    ("argument", "hint"),
    [
        ({"save_total_limit": 3}, r"keep=Latest\(3\)"),
        ({"load_best_model_at_end": True}, r"keep=Best\('eval_loss', mode='min'\)"),
        ({}, 'save_strategy="no"'),
    ],
)
def test_what_the_manager_does_is_refused_of_the_trainer(tmp_path: Path, argument: dict[str, Any], hint: str) -> None:
    keeper = VarstoreCallback(CheckpointManager(tmp_path))
    with pytest.raises(UsageError, match=hint):
        trainer(tmp_path, 0, keeper, save_strategy="steps", save_steps=2, **argument)
    assert (keeper.manager.all(), keeper.manager.others()) == ((), {})


# --- PEFT ------------------------------------------------------------------------------------------------------------


def adapted(folder: Path, seed: int, *callbacks: Any) -> Any:
    peft = pytest.importorskip("peft")
    torch.manual_seed(7)
    base = BertForSequenceClassification(CONFIG)
    torch.manual_seed(seed)
    config = peft.LoraConfig(r=2, target_modules=["query", "value"], modules_to_save=["classifier"])
    return trainer(folder, seed, *callbacks, model=peft.get_peft_model(base, config))


def test_adapters_of_peft_are_saved_resumed_and_exported(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    straight = adapted(tmp_path / "straight", 0)
    straight.train()
    manager = CheckpointManager(tmp_path / "run", prefix="checkpoint-", save_when=AtSteps([3]))
    with pytest.raises(KeyboardInterrupt):
        adapted(tmp_path / "run", 0, VarstoreCallback(manager), Stop(4)).train()
    assert all(
        "lora_" in name or "classifier" in name for name in open_checkpoint(manager.latest()).select("adapters/*")
    )
    resumed = adapted(tmp_path / "run", 1, VarstoreCallback(manager))
    resumed.train(resume_from_checkpoint=True)
    assert losses(resumed) == losses(straight)
    vs.save_state(tmp_path / "end", {"adapters": {"default": peft.get_peft_model_state_dict(resumed.model)}})
    vs.convert(
        tmp_path / "end", tmp_path / "adapter", format="huggingface", config=resumed.model.peft_config["default"],
        include="adapters/default/*", rename={"adapters/default/": ""},
    )  # fmt: skip
    torch.manual_seed(7)
    exported = peft.PeftModel.from_pretrained(BertForSequenceClassification(CONFIG), tmp_path / "adapter").eval()
    ids = torch.arange(6)[None]
    assert torch.equal(exported(ids).logits, resumed.model.eval()(ids).logits)
    with pytest.raises(UsageError, match="adapters of PEFT"):
        trainer(tmp_path / "run", 0, VarstoreCallback(manager)).train(resume_from_checkpoint=True)


# --- policies --------------------------------------------------------------------------------------------------------


def test_the_manager_decides_what_is_saved_and_kept(tmp_path: Path) -> None:
    manager = CheckpointManager(
        tmp_path / "run",
        save_when=EverySteps(2),
        keep=Latest(1) | Best("eval_loss"),
        keep_parts={"optimizer/*": Latest(1)},
    )
    keeper = VarstoreCallback(manager)
    run = trainer(tmp_path / "hf", 0, keeper)
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
    assert keeper.load_best(run.model).step == best
    assert run.evaluate()["eval_loss"] == evaluated[best]
    vs.convert(
        manager.best(), tmp_path / "bert", format="huggingface", config=run.model.config,
        include="model/*", rename={"model/": ""},
    )  # fmt: skip
    exported = BertForSequenceClassification.from_pretrained(tmp_path / "bert")
    for name, value in run.model.state_dict().items():
        assert torch.equal(exported.state_dict()[name], value)


def test_a_directory_of_something_else(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path)
    manager.save(1, {"w": torch.ones(2)})
    with pytest.raises(UsageError, match="VarstoreCallback"):
        VarstoreCallback(manager).resume_from()
