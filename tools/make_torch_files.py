"""Make files of PyTorch that hold more than a state dict, with their truth: ``make_torch_files.py FOLDER [NAME ...]``.

Run it in the environment of the framework; without names it makes what that environment can make. A file is small, so
that it can lie in the repository. Its truth comes from the objects that were saved, and never from reading the file:
``X.expect.npz`` holds the tensors, ``X.expect.json`` says what the rest is made of.
"""

from __future__ import annotations

import argparse
import collections
import copyreg
import dataclasses
import datetime
import enum
import json
import pathlib
import pickle
import sys
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

MAKERS: dict[str, Callable[[Path], dict[str, Any]]] = {}
"""By the name of the file, what writes it and returns the tensors and objects that it should hold."""


def maker(name: str) -> Callable[[Callable[[Path], dict[str, Any]]], None]:
    """Register the maker of a file."""

    def register(make: Callable[[Path], dict[str, Any]]) -> None:
        MAKERS[name] = make

    return register


class Net(nn.Module):  # type: ignore[misc]
    """A small module with a buffer that is saved, one that is not, tied weights, and bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 2)
        self.head = nn.Linear(3, 2)
        self.head.weight = self.fc.weight
        self.extra = nn.Parameter(torch.tensor([1.5, -2.0]).bfloat16())
        self.register_buffer("scale", torch.ones(2))
        self.register_buffer("temporary", torch.zeros(1), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return something that uses each tensor."""
        return self.fc(x) * self.scale + self.head(x) + self.temporary + self.extra


def net() -> Net:
    """Return the same module each time."""
    torch.manual_seed(3)
    model = Net()
    model.eval()
    return model


class Split(enum.Enum):
    """What scripts choose from."""

    TRAIN = "train"


@dataclasses.dataclass
class Config:
    """What scripts are configured with."""

    width: int
    rate: float
    names: list[str]


def invented(module: str, name: str) -> type:
    """Return a class of a module that is not installed."""
    parts = module.split(".")
    for end in range(len(parts)):
        path = ".".join(parts[: end + 1])
        sys.modules[path] = types.ModuleType(path)
    kind = type(name, (), {"__module__": module})
    setattr(sys.modules[module], name, kind)
    return kind


# --- beside a state dict -----------------------------------------------------------------------------------------


@maker("script_checkpoint.pt")
def script_checkpoint(path: Path) -> dict[str, Any]:
    """Write what training scripts put beside a model."""
    model = net()
    args = argparse.Namespace(lr=0.1, data=pathlib.PurePosixPath("/data/set"), split=Split.TRAIN, layers=[1, 2])
    objects = {
        "args": args,
        "started": datetime.datetime(2024, 5, 6, 7, 8, 9),
        "config": Config(3, 0.5, ["a", "b"]),
        "split": Split.TRAIN,
        "last": collections.deque([0.5, 0.25], 3),
        "generator": np.random.default_rng(7),
        "class": Config,
    }
    plain = {"counts": collections.defaultdict(int, {"a": 1}), "epoch": 3}
    torch.save({"model": model.state_dict(), **objects, **plain}, path)
    return {"tensors": {"model": model.state_dict()}, "objects": objects, "scalars": {"counts/a": 1, "epoch": 3}}


@maker("history_buffer.pth")
def history_buffer(path: Path) -> dict[str, Any]:
    """Write a file as mmengine's runner does, with a class of the name and the attributes of its HistoryBuffer."""
    buffer = invented("mmengine.logging.history_buffer", "HistoryBuffer")()
    vars(buffer).update(_max_length=10, _log_history=np.array([0.5, 0.25]), _count_history=np.array([1, 1]))
    state = net().state_dict()
    torch.save({"meta": {"epoch": 1}, "state_dict": state, "message_hub": {"log_scalars": {"loss": buffer}}}, path)
    return {
        "tensors": {"state_dict": state},
        "objects": {"message_hub/log_scalars/loss": buffer},
        "scalars": {"meta/epoch": 1},
    }


@maker("stranger.pt")
def stranger(path: Path) -> dict[str, Any]:
    """Write a file whose arguments are of a class in a module that must not be imported."""
    arguments = invented("stranger_module", "Arguments")()
    vars(arguments)["lr"] = 0.1
    state = net().state_dict()
    torch.save({"model": {"weights": state, "args": arguments}}, path)
    return {"tensors": {"model/weights": state}, "objects": {"model/args": arguments}}


@maker("wrapper_subclass.pt")
def wrapper_subclass(path: Path) -> dict[str, Any]:
    """Write a tensor without values of its own, whose attributes have them."""
    from torch.testing._internal.two_tensor import TwoTensor

    a, b = torch.arange(4.0), torch.arange(4.0) * 2
    torch.save({"w": TwoTensor(a, b), "plain": a}, path)
    return {
        "tensors": {"w/a": a, "w/b": b, "plain": a},
        "scalars": {"w/class": "torch.testing._internal.two_tensor.TwoTensor"},
    }


@maker("pickled_tensors.pkl")
def pickled_tensors(path: Path) -> dict[str, Any]:
    """Write tensors with `pickle.dump`: each storage is a file of `torch.save` in the pickle."""
    state = net().state_dict()
    view = torch.arange(12.0).reshape(3, 4).T[1:]
    path.write_bytes(pickle.dumps({"state": dict(state), "view": view, "args": argparse.Namespace(lr=1)}))
    objects = {"args": argparse.Namespace(lr=1)}
    return {"tensors": {"state": dict(state), "view": view.contiguous()}, "objects": objects}


# --- modules and programs ----------------------------------------------------------------------------------------


@maker("whole_module_legacy.pth")
def whole_module_legacy(path: Path) -> dict[str, Any]:
    """Write a module in the older format, which keeps the source of its class beside it."""
    model = net()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save(model, path, _use_new_zipfile_serialization=False)
    return {"tensors": model.state_dict()}


def attributes(model: Net) -> dict[str, Any]:
    """Return the tensors that TorchScript keeps: buffers that are not persistent are not marked in it."""
    return {**model.state_dict(), "temporary": model.temporary}


@maker("graph_module.pt")
def graph_module(path: Path) -> dict[str, Any]:
    """Write a module that was traced by torch.fx, whose code is text in the pickle."""
    model = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).eval())
    torch.save(model, path)
    return {"tensors": model.state_dict()}


@maker("torchscript.pt")
def torchscript(path: Path) -> dict[str, Any]:
    """Write a scripted module."""
    model = net()
    torch.jit.script(model).save(str(path))
    return {"tensors": attributes(model)}


@maker("torchscript_traced.pt")
def torchscript_traced(path: Path) -> dict[str, Any]:
    """Write a traced module."""
    model = net()
    torch.jit.trace(model, torch.ones(1, 3)).save(str(path))
    return {"tensors": attributes(model)}


@maker("torchscript_frozen.pt")
def torchscript_frozen(path: Path) -> dict[str, Any]:
    """Write a frozen module, whose parameters are constants of its code."""
    model = nn.Linear(3, 2).eval()
    torch.jit.freeze(torch.jit.script(model)).save(str(path))
    return {"tensors": {"c0": model.weight, "c1": model.bias}}


class Scaled(nn.Module):  # type: ignore[misc]
    """A layer beside a tensor that has the name of a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 2)
        self.c0 = torch.arange(3.0)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """Return the output of the layer for scaled values."""
        return self.fc(values * self.c0)


@maker("torchscript_frozen_in_part.pt")
def torchscript_frozen_in_part(path: Path) -> dict[str, Any]:
    """Write a frozen module that keeps one of its tensors."""
    model = Scaled().eval()
    torch.jit.freeze(torch.jit.script(model), preserved_attrs=["c0"]).save(str(path))
    return {"tensors": {"c0": model.c0, "c0~2": model.fc.weight, "c1": model.fc.bias}}


def program(path: Path) -> dict[str, Any]:
    """Write an exported program."""
    model = net()
    torch.export.save(torch.export.export(model, (torch.ones(1, 3),)), path)
    return {"tensors": model.state_dict()}


MAKERS[f"program_{'_'.join(torch.__version__.split('.')[:2])}.pt2"] = program


# --- other libraries ---------------------------------------------------------------------------------------------


@maker("omegaconf.pt")
def omegaconf(path: Path) -> dict[str, Any]:
    """Write a configuration of OmegaConf, each node of which knows the one above it."""
    from omegaconf import OmegaConf

    config = OmegaConf.create({"lr": 0.1, "model": {"width": 3}})
    torch.save({"w": torch.ones(2), "cfg": config}, path)
    return {"tensors": {"w": torch.ones(2)}, "objects": {"cfg": config}}


@maker("lightning.ckpt")
def lightning(path: Path) -> dict[str, Any]:
    """Write a checkpoint of a Trainer, with hyperparameters that are a Namespace in a Namespace."""
    from lightning import LightningModule, Trainer

    class LitModel(LightningModule):  # type: ignore[misc]
        def __init__(self, inner: Any, rate: float = 0.1) -> None:  # noqa: ARG002
            super().__init__()
            self.save_hyperparameters()
            self.layer = nn.Linear(2, 1)

        def training_step(self, batch: Any, _index: int) -> Any:
            return self.layer(batch[0]).sum()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    torch.manual_seed(3)
    inner = argparse.Namespace(width=3, split=Split.TRAIN)
    model = LitModel(inner)
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.ones(4, 2)), batch_size=2)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = Trainer(max_epochs=1, enable_checkpointing=False, **quiet)
    trainer.fit(model, data)
    trainer.save_checkpoint(path)
    return {"tensors": {"state_dict": model.state_dict()}, "objects": {"hyper_parameters/inner": inner}, "rest": True}


# --- truth -------------------------------------------------------------------------------------------------------


def record(value: Any, above: tuple[int, ...] = ()) -> Any:
    """Return what a pickle says of an object, as JSON: its class, and what it is made of."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, bytes):
        return {"bytes": value.hex()}
    if isinstance(value, (np.ndarray, torch.Tensor)):
        return {"array": value.tolist()}
    if isinstance(value, type) and value.__module__ == "builtins":
        return f"__builtin__.{value.__qualname__}"  # the name of what is known is text
    if isinstance(value, type):
        return {"name": f"{value.__module__}.{value.__qualname__}"}
    above = (*above, id(value))
    if type(value) in (dict, collections.defaultdict, list, tuple):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        rows = {key: {"again": True} if id(item) in above else record(item, above) for key, item in items}
        return rows if isinstance(value, dict) else list(rows.values())
    reduced: Any = value.__reduce_ex__(2)
    function, arguments, state, items, pairs = (*reduced, None, None, None, None)[:5]
    if function is copyreg.__newobj__:  # type: ignore[attr-defined]
        function, *arguments = arguments
    said: dict[str, Any] = {"name": f"{function.__module__}.{function.__qualname__}", "arguments": list(arguments)}
    if state is not None:
        said["state"] = state
    if items is not None or pairs is not None:
        said["items"] = list(items or ()) or dict(pairs or ())
    return {part: record(content, above) if part != "name" else content for part, content in said.items()}


def flat(node: Any, path: tuple[str, ...] = ()) -> dict[str, torch.Tensor]:
    """Return the tensors of nested dicts, by their joined keys."""
    if isinstance(node, torch.Tensor):
        return {"/".join(path): node.detach()}
    return {name: item for key, value in node.items() for name, item in flat(value, (*path, key)).items()}


def write(folder: Path, name: str) -> None:
    """Write a file and its truth."""
    made = MAKERS[name](folder / name)
    tensors = flat(made["tensors"])
    facts: dict[str, Any] = {
        "framework": "torch",
        "version": torch.__version__,
        "written_by": f"tools/make_torch_files.py {name}",
        "note": (MAKERS[name].__doc__ or "").split(".")[0],
        "tensors": {},
        "scalars": made.get("scalars", {}),
        "containers": {},
        "objects": {key: record(value) for key, value in made.get("objects", {}).items()},
    }
    if made.get("rest"):
        facts["rest"] = True
    arrays = {}
    for key, tensor in tensors.items():
        kind = str(tensor.dtype).removeprefix("torch.")
        facts["tensors"][key] = {"shape": list(tensor.shape), "dtype": kind}
        if tensor.dtype == torch.bfloat16:
            facts["tensors"][key]["stored_as"] = "uint16"
            tensor = tensor.view(torch.uint16)
        arrays[key] = tensor.contiguous().numpy()
    np.savez(folder / f"{name}.expect.npz", **arrays)
    (folder / f"{name}.expect.json").write_text(json.dumps(facts, indent=1) + "\n")


def main(folder: Path, names: list[str]) -> None:
    """Write the files, all that can be made if none is named."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names or MAKERS:
        try:
            write(folder, name)
        except ImportError as error:
            print(f"{name}: left out, {error}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
