"""Lightning's Trainer with the plugin: hyperparameters, the last step as a link, moved runs, files of its own."""

import argparse
import importlib
import os
import pathlib
import subprocess
import sys
import threading

import pytest

pytest.importorskip("lightning")
import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

import varstore as vs
from varstore.adapters.lightning import VarstoreCheckpointIO

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's advice about loaders and loggers


class Model(lightning.LightningModule):
    def __init__(self, configuration=None):
        super().__init__()
        self.save_hyperparameters()
        self.linear = torch.nn.Linear(4, 1)

    def training_step(self, batch, index):
        loss = self.linear(batch[0]).pow(2).mean()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), 0.1)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]


def fit(directory, *, epochs=2, model=None, plugin=None, ckpt_path=None, **keeper):
    """Train, and return the trainer."""
    lightning.seed_everything(0, verbose=False)
    data = torch.utils.data.TensorDataset(torch.ones(4, 4))
    trainer = lightning.Trainer(
        max_epochs=epochs, plugins=[] if plugin is None else [plugin], accelerator="cpu", default_root_dir=directory,
        callbacks=[ModelCheckpoint(directory, filename="e{epoch}", auto_insert_metric_name=False, **keeper)],
        logger=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(model or Model(), torch.utils.data.DataLoader(data, batch_size=2), ckpt_path=ckpt_path)
    return trainer


def entries(directory):
    return {name: (directory / name).is_symlink() for name in sorted(os.listdir(directory))}


# --- hyperparameters ---------------------------------------------------------------------------------------------

HYPERPARAMETERS = {
    "none": None,
    "dict": {"lr": 0.1, "layers": [1, 2]},
    "tuple": (1, 2),
    "Namespace": argparse.Namespace(lr=0.1),
    "Path": {"data": pathlib.Path("/d")},
    "dtype": torch.float16,
    "class": torch.nn.ReLU,
    "module": torch.nn.ReLU(),
    "function": lambda x: x,
}


@pytest.mark.parametrize("value", HYPERPARAMETERS.values(), ids=HYPERPARAMETERS)
def test_hyperparameters_of_any_kind(tmp_path, value):
    fit(tmp_path, epochs=1, model=Model(value), plugin=VarstoreCheckpointIO())
    assert os.listdir(tmp_path) == ["e0.ckpt"]
    saved = VarstoreCheckpointIO().load_checkpoint(tmp_path / "e0.ckpt")
    if value is None or isinstance(value, dict | tuple):
        assert saved["hyper_parameters"] == {"configuration": value}


def test_hyperparameters_that_are_not_data_are_named(tmp_path, caplog):
    given = {
        "lr": 0.1,
        "act": torch.nn.ReLU,
        "args": argparse.Namespace(depth=2, run=print),
        "rows": [1, torch.nn.ReLU],
    }
    plugin = VarstoreCheckpointIO()
    for epoch in (1, 2):
        plugin.save_checkpoint({"hyper_parameters": {"given": given}, "epoch": epoch}, tmp_path / "a.ckpt")
    saved = plugin.load_checkpoint(tmp_path / "a.ckpt")["hyper_parameters"]["given"]
    assert saved.keys() == {"lr", "args"}
    assert vars(saved["args"]) == {"depth": 2}
    (message,) = [record.getMessage() for record in caplog.records if record.name == "varstore"]
    assert "given/act, hyper_parameters/given/args/run, hyper_parameters/given/rows" in message


class Configured(Model):
    def __init__(self, cfg):
        super().__init__()
        self.save_hyperparameters(cfg)
        self.twice = cfg.twice


def test_hyperparameters_of_omegaconf(tmp_path):
    omegaconf = pytest.importorskip("omegaconf")
    cfg = omegaconf.OmegaConf.create({"lr": 0.1, "twice": "${lr}", "layers": [{"width": 3}]})
    fit(tmp_path, epochs=1, model=Configured(cfg), plugin=VarstoreCheckpointIO())
    vs.convert(tmp_path / "e0.ckpt", tmp_path / "out.ckpt")
    assert vs.read(tmp_path / "out.ckpt").state()["hyper_parameters"]["layers"] == [{"width": 3}]
    assert Configured.load_from_checkpoint(tmp_path / "out.ckpt").twice == 0.1
    fit(tmp_path / "nested", epochs=1, model=Model({"cfg": cfg}), plugin=VarstoreCheckpointIO())
    saved = vs.load_state(tmp_path / "nested" / "e0.ckpt")["hyper_parameters"]["configuration"]
    assert saved == {"cfg": {"lr": 0.1, "twice": 0.1, "layers": [{"width": 3}]}}


# --- the last step -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize(
    ("keeper", "expected"),
    [
        ({"save_top_k": -1}, {"e0.ckpt": False, "e1.ckpt": False}),
        ({"save_top_k": 0, "save_last": True}, {"last.ckpt": False}),
        (
            {"save_top_k": 2, "save_last": "link", "monitor": "loss"},
            {"e0.ckpt": False, "e1.ckpt": False, "last.ckpt": True},
        ),
    ],
    ids=["all", "last", "link"],
)
def test_a_run_is_kept_and_resumed(tmp_path, background, keeper, expected):
    trainer = fit(tmp_path, plugin=VarstoreCheckpointIO(background=background), **keeper)
    assert entries(tmp_path) == expected
    assert all(vs.verify(tmp_path / name).ok for name in expected)
    last = trainer.checkpoint_callback.last_model_path or trainer.checkpoint_callback.best_model_path
    resumed = fit(tmp_path, epochs=3, plugin=VarstoreCheckpointIO(background=background), ckpt_path=last, **keeper)
    assert resumed.current_epoch == 3
    assert resumed.global_step == 6


@pytest.fixture
def slow_start(monkeypatch):
    """A save in the background begins a while after the call."""
    start = threading.Thread.start

    def later(thread):
        if "varstore" not in thread.name:
            return start(thread)
        return start(threading.Timer(0.2, start, [thread]))

    monkeypatch.setattr(threading.Thread, "start", later)


@pytest.mark.usefixtures("slow_start")
def test_a_link_to_a_step_that_is_being_written(tmp_path):
    fit(tmp_path / "new", save_top_k=2, save_last="link", monitor="loss", plugin=VarstoreCheckpointIO(background=True))
    assert entries(tmp_path / "new") == {"e0.ckpt": False, "e1.ckpt": False, "last.ckpt": True}
    assert vs.verify(tmp_path / "new" / "last.ckpt").ok


@pytest.mark.usefixtures("slow_start")
def test_a_step_stays_until_its_successor_is_complete(tmp_path):
    plugin = VarstoreCheckpointIO(background=True)
    for name in ("a", "b"):
        plugin.save_checkpoint({"state_dict": {"w": torch.ones(2)}}, tmp_path / name)
    plugin.remove_checkpoint(tmp_path / "a")
    assert vs.verify(tmp_path / "a").ok
    plugin.teardown()
    assert os.listdir(tmp_path) == ["b"]


def test_a_run_that_was_moved_is_resumed(tmp_path):
    keeper = {"save_top_k": 2, "save_last": "link", "monitor": "loss"}
    fit(tmp_path / "a", plugin=VarstoreCheckpointIO(), **keeper)
    (tmp_path / "a").rename(tmp_path / "b")
    last = str(tmp_path / "b" / "last.ckpt")
    trainer = fit(tmp_path / "b", epochs=3, plugin=VarstoreCheckpointIO(), ckpt_path=last, **keeper)
    assert trainer.global_step == 6


# --- files of Lightning's own ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def its_own(tmp_path_factory):
    """A file that Lightning wrote without the plugin."""
    directory = tmp_path_factory.mktemp("own")
    fit(directory, save_last=True, save_top_k=0)
    return directory / "last.ckpt"


def test_a_run_without_the_plugin_is_resumed_with_it(tmp_path, its_own):
    trainer = fit(tmp_path, epochs=3, plugin=VarstoreCheckpointIO(), ckpt_path=str(its_own))
    assert trainer.global_step == 6


def test_a_file_of_its_own_that_was_converted_is_resumed(tmp_path, its_own):
    vs.convert(its_own, tmp_path / "c", format="varstore")
    trainer = fit(tmp_path, epochs=3, plugin=VarstoreCheckpointIO(), ckpt_path=str(tmp_path / "c"))
    assert trainer.global_step == 6


def test_files_of_its_own_give_way_to_directories(tmp_path):
    keeper = {"save_top_k": 1, "save_last": True}
    fit(tmp_path, **keeper)
    assert all(map(os.path.isfile, tmp_path.iterdir()))
    fit(tmp_path, epochs=3, plugin=VarstoreCheckpointIO(background=True), ckpt_path="last", **keeper)
    assert entries(tmp_path) == {"e2.ckpt": False, "last.ckpt": False}
    assert all(vs.verify(path).ok for path in tmp_path.iterdir())


def test_a_step_is_converted_for_load_from_checkpoint(tmp_path):
    model = Model({"lr": 0.5})
    fit(tmp_path / "run", model=model, plugin=VarstoreCheckpointIO(), save_last=True, save_top_k=0)
    out = tmp_path / "out.ckpt"
    command = [sys.executable, "-m", "varstore", "convert", tmp_path / "run" / "last.ckpt", out]
    assert "(torch)" in subprocess.run(command, check=True, capture_output=True, text=True).stdout
    loaded = Model.load_from_checkpoint(out)
    assert loaded.hparams.configuration == {"lr": 0.5}
    assert torch.equal(loaded.linear.weight, model.linear.weight)
    with open(tmp_path / "again.ckpt", "wb") as file:
        vs.write(file, vs.read(out))
    assert torch.equal(Model.load_from_checkpoint(tmp_path / "again.ckpt").linear.weight, model.linear.weight)


# --- whose Trainer it is -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lightning", "pytorch_lightning"])
def test_the_trainers_of_both_packages_take_the_plugin(tmp_path, name):
    package = importlib.import_module(name)

    class Net(package.LightningModule):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(4, 1)

        def training_step(self, batch, index):
            return self.linear(batch).mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    trainer = package.Trainer(
        max_epochs=1, plugins=[VarstoreCheckpointIO()], accelerator="cpu", default_root_dir=tmp_path, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Net(), torch.utils.data.DataLoader(torch.ones(4, 4)))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    assert vs.verify(tmp_path / "a.ckpt").ok


def test_fabric_takes_the_plugin(tmp_path):
    fabric = lightning.Fabric(plugins=[VarstoreCheckpointIO()], accelerator="cpu")
    model, optimizer = fabric.setup(net := torch.nn.Linear(2, 1), torch.optim.Adam(net.parameters()))
    expected = net.weight.detach().clone()
    fabric.save(tmp_path / "a", {"model": model, "optimizer": optimizer, "epoch": 3})
    torch.nn.init.zeros_(net.weight)
    assert fabric.load(tmp_path / "a", state := {"model": model, "optimizer": optimizer, "epoch": 0}) == {}
    assert state["epoch"] == 3
    assert torch.equal(net.weight, expected)
