"""Train with Lightning, keep the best two steps and a link to the last, resume, and hand on the best one as a file.

    python tools/examples/lightning_topk.py

`ModelCheckpoint` decides what is saved and kept, as always. The run that is resumed ends as one that never stopped.
"""

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

import varstore as vs
from varstore.adapters.lightning import VarstoreCheckpointIO


class Net(lightning.LightningModule):
    """Two layers, whose activation is a hyperparameter that is code."""

    def __init__(self, width: int = 32, activation: type[torch.nn.Module] = torch.nn.ReLU) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = torch.nn.Sequential(torch.nn.Linear(16, width), activation(), torch.nn.Linear(width, 1))

    def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
        return (self.net(batch) - batch.sum(1, keepdim=True)).pow(2).mean()

    def validation_step(self, batch: torch.Tensor, index: int) -> None:
        self.log("loss", self.training_step(batch, index))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 0.02)


def fit(folder: str, epochs: int, ckpt_path: str | None = None) -> lightning.Trainer:
    lightning.seed_everything(0, verbose=False)
    rows = torch.randn(96, 16, generator=torch.Generator().manual_seed(1))
    train, test = (torch.utils.data.DataLoader(part, batch_size=16) for part in (rows[:64], rows[64:]))
    keep = ModelCheckpoint(folder, save_top_k=2, monitor="loss", save_last="link")
    trainer = lightning.Trainer(
        plugins=[VarstoreCheckpointIO(background=True)], callbacks=[keep], max_epochs=epochs, accelerator="cpu",
        logger=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Net(activation=torch.nn.GELU), train, test, ckpt_path=ckpt_path)
    return trainer


if __name__ == "__main__":
    straight = fit("straight", 6)
    fit("run", 3)
    trainer = fit("run", 6, ckpt_path="run/last.ckpt")
    weights = trainer.lightning_module.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in straight.lightning_module.state_dict().items())
    print("resumed as if never stopped")

    best = trainer.checkpoint_callback.best_model_path
    print(f"best of {len(trainer.checkpoint_callback.best_k_models)}: {vs.open(best).nbytes} bytes")
    vs.convert(best, "best.ckpt")
    net = Net.load_from_checkpoint("best.ckpt", activation=torch.nn.GELU)
    for name, value in net.state_dict().items():
        assert torch.equal(value, torch.from_numpy(vs.load(best, include=f"state_dict/{name}")[f"state_dict/{name}"]))
    print("load_from_checkpoint loads the best step")
