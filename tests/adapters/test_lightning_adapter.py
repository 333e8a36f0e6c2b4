"""Lightning's own Trainer, saving and resuming through the plugin."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lightning")

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from varstore.adapters.lightning import VarstoreCheckpointIO
from varstore.disk.read.checkpoint import open_checkpoint
from varstore.errors import CheckpointNotFound, UsageError
from varstore.inspection.verify import verify

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's advice about loaders and loggers


class Model(lightning.LightningModule):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = torch.nn.Sequential(torch.nn.Linear(4, width), torch.nn.ReLU(), torch.nn.Linear(width, 1))
        self.losses: list[float] = []

    def training_step(self, batch: Any, index: int) -> Any:
        loss = self.net(batch[0]).pow(2).mean()
        self.losses.append(loss.item())
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), 0.05)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)]


def train(directory: Path, epochs: int, ckpt_path: str | None = None, **options: Any) -> Model:
    lightning.seed_everything(0, verbose=False)
    model = Model()
    data = torch.utils.data.TensorDataset(torch.randn(12, 4, generator=torch.Generator().manual_seed(1)))
    keeper = ModelCheckpoint(directory, filename="{epoch}", save_top_k=2, monitor="loss", save_last=True)
    trainer = lightning.Trainer(
        max_epochs=epochs, plugins=[VarstoreCheckpointIO(**options)], callbacks=[keeper], accelerator="cpu",
        default_root_dir=directory, logger=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(model, torch.utils.data.DataLoader(data, batch_size=4), ckpt_path=ckpt_path)
    return model


@pytest.mark.parametrize("background", [False, True])
def test_a_run_resumes_as_if_never_stopped(tmp_path: Path, background: bool) -> None:
    expected = train(tmp_path / "straight", 6).losses
    train(tmp_path / "run", 3, background=background)
    kept = sorted(name for name in os.listdir(tmp_path / "run"))
    assert kept == ["epoch=1.ckpt", "epoch=2.ckpt", "last.ckpt"]
    assert all(verify(tmp_path / "run" / name).ok for name in kept)
    checkpoint = open_checkpoint(tmp_path / "run/last.ckpt")
    assert "state_dict/net.0.weight" in checkpoint
    assert "optimizer_states/0/state/0/exp_avg" in checkpoint
    resumed = train(tmp_path / "run", 6, ckpt_path=str(tmp_path / "run/last.ckpt"), background=background)
    assert resumed.losses == expected[9:]


def test_the_plugin_alone(tmp_path: Path) -> None:
    plugin = VarstoreCheckpointIO()
    for value in (1.0, 2.0):
        plugin.save_checkpoint({"state_dict": {"w": torch.full((2,), value)}, "epoch": 1}, tmp_path / "a/b.ckpt")
    loaded = plugin.load_checkpoint(tmp_path / "a/b.ckpt")
    assert loaded["state_dict"]["w"].tolist() == [2, 2]
    plugin.remove_checkpoint(tmp_path / "a/b.ckpt")
    plugin.remove_checkpoint(tmp_path / "a/b.ckpt")
    assert os.listdir(tmp_path / "a") == []
    with pytest.raises(CheckpointNotFound):
        plugin.load_checkpoint(tmp_path / "a/b.ckpt")
    with pytest.raises(UsageError, match="storage_options are not supported"):
        plugin.save_checkpoint({}, tmp_path / "c", storage_options={})
    with pytest.raises(UsageError, match=r"state\['f'\]: function"):
        plugin.save_checkpoint({"f": lambda: 1}, tmp_path / "c")
