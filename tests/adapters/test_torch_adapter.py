"""torch: what is loaded is what was saved, in the memory where it belongs, and training goes on as if never stopped."""

from __future__ import annotations

import json
import random
import shutil
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.wrong import FUNCTIONS, WRONG

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from varstore.adapters import torch as vt  # noqa: E402
from varstore.disk.read.checkpoint import open_checkpoint  # noqa: E402
from varstore.errors import (  # noqa: E402
    ManifestError,
    UnsupportedDtype,
    UsageError,
    VariableMismatch,
    VarstoreError,
)
from varstore.formats.verbs import convert  # noqa: E402
from varstore.inspection.verify import verify  # noqa: E402
from varstore.model.store import load, save  # noqa: E402
from varstore.training.background import save_async  # noqa: E402
from varstore.training.manager import CheckpointManager  # noqa: E402
from varstore.training.state import load_state, save_state  # noqa: E402

DTYPES = [
    "float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "uint16", "uint32",
    "uint64", "bool", "complex64", "complex128", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2",
    "float8_e5m2fnuz", "float8_e8m0fnu",
]  # fmt: skip


def bits(tensor: Any) -> bytes:
    tensor = tensor.detach().contiguous().resolve_conj()
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def same(a: Any, b: Any) -> bool:
    return type(a) is type(b) and a.dtype == b.dtype and a.shape == b.shape and bits(a) == bits(b)


def sample(dtype: Any, shape: tuple[int, ...] = (3, 4)) -> Any:
    raw = torch.arange(1, 13).reshape(3, 4)[: shape[0], : shape[1]]
    return raw.to(dtype)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3).to(memory_format=torch.channels_last)
        self.norm = nn.BatchNorm2d(4)
        self.embed = nn.Embedding(7, 16)
        self.drop = nn.Dropout(0.3)
        self.out = nn.Linear(16, 7, bias=False)
        self.out.weight = self.embed.weight
        self.fc = nn.Linear(4 * 4, 16)
        self.low = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Any) -> Any:
        self.seen += 1
        x = torch.relu(self.norm(self.conv(x)))[:, :, ::2, ::2].mean((2,)).repeat(1, 1, 2).flatten(1)[:, :16]
        return self.out(self.drop(self.fc(x))) * self.low.float().sum()


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("layout", ["plain", "transposed", "strided", "scalar", "empty"])
def test_every_type_and_layout(tmp_path: Path, name: str, layout: str) -> None:
    dtype = getattr(torch, name)
    tensor = sample(dtype)
    tensor = {
        "plain": tensor,
        "transposed": tensor.T,
        "strided": tensor[:, ::2],
        "scalar": tensor[0, 0],
        "empty": tensor[:, :0],
    }[layout]
    vt.save(tmp_path / "c", {"t": tensor})
    assert same(vt.load(tmp_path / "c")["t"], tensor)
    module = nn.Module()
    module.register_buffer("t", torch.zeros_like(tensor))
    assert vt.load_into(module, tmp_path / "c").loaded == ("t",)
    assert same(module.t, tensor)


REFUSED = {
    "quantised": lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
    "sparse": lambda: torch.eye(3).to_sparse(),
    "meta": lambda: torch.ones(2, device="meta"),
    "complex32": lambda: torch.zeros(2, dtype=torch.complex32),
}


@pytest.mark.parametrize("make", REFUSED.values(), ids=REFUSED.keys())
@pytest.mark.filterwarnings("ignore")
def test_tensors_that_no_disk_can_hold(tmp_path: Path, make: Callable[[], Any]) -> None:
    with pytest.raises(UnsupportedDtype, match="'a/t'"):
        vt.save(tmp_path / "c", {"a": {"t": make()}})
    assert list(tmp_path.iterdir()) == []


def test_a_subclass_is_refused_by_its_place(tmp_path: Path) -> None:
    class Special(torch.Tensor):
        pass

    with pytest.raises(UsageError, match=r"state\['a'\]\[0\]: Special"):
        vt.save(tmp_path / "c", {"a": [torch.ones(2).as_subclass(Special)]})


def test_conjugated_and_negated_tensors(tmp_path: Path) -> None:
    tensor = torch.tensor([1 + 2j, 3 - 4j])
    vt.save(tmp_path / "c", {"conj": tensor.conj(), "neg": tensor.conj().imag, "plain": tensor})
    back = vt.load(tmp_path / "c")
    assert back["conj"].tolist() == [1 - 2j, 3 + 4j]
    assert back["neg"].tolist() == [-2, 4]
    assert back["plain"].tolist() == [1 + 2j, 3 - 4j]
    module = nn.Module()
    module.register_buffer("plain", torch.zeros(2, dtype=torch.complex64).conj())
    vt.load_into(module, tmp_path / "c", include="plain")
    assert module.plain.tolist() == [1 + 2j, 3 - 4j]


def test_a_module_keeps_its_names_and_memory(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net, other = Net(), Net()
    net(torch.randn(2, 1, 8, 8))
    vt.save(tmp_path / "c", net)
    assert open_checkpoint(tmp_path / "c").names == tuple(net.state_dict())
    pointers = {name: item.data_ptr() for name, item in other.state_dict().items()}
    strides = other.conv.weight.stride()
    report = vt.load_into(other, tmp_path / "c")
    assert set(report.loaded) == set(net.state_dict())
    assert report.target == "Net"
    for name, item in net.state_dict().items():
        assert same(other.state_dict()[name], item), name
        assert other.state_dict()[name].data_ptr() == pointers[name], name
    assert other.out.weight is other.embed.weight
    assert other.conv.weight.stride() == strides
    assert other.seen == 1
    state = vt.load(tmp_path / "c")
    assert type(state) is OrderedDict
    fresh = Net()
    fresh.load_state_dict(state)
    assert all(same(a, b) for a, b in zip(fresh.state_dict().values(), net.state_dict().values(), strict=True))


def test_tied_parameters_are_saved_once_and_one_name_is_enough(tmp_path: Path) -> None:
    net = Net()
    vt.save(tmp_path / "c", net)
    assert (tmp_path / "c/embed.weight/out").stat().st_ino == (tmp_path / "c/out.weight/out").stat().st_ino
    state = vt.load(tmp_path / "c")
    assert state["embed.weight"].data_ptr() == state["out.weight"].data_ptr()
    other = Net()
    report = vt.load_into(other, tmp_path / "c", exclude="out.weight")
    assert report.kept == ()
    assert same(other.out.weight, net.out.weight)


def test_tensors_that_lie_within_another_do_so_again(tmp_path: Path) -> None:
    whole = torch.arange(24.0).reshape(4, 6)
    state = {
        "column": whole[:, 1],
        "whole": whole,
        "transposed": whole.T,
        "corner": whole[1:3, 2:5],
        "again": whole,
        "row": [whole[2]],
        "apart": whole.clone(),
        "parameter": nn.Parameter(whole[0]),
    }
    save_state(tmp_path / "c", state)
    back = load_state(tmp_path / "c")
    assert all(same(back[name], state[name]) for name in state if name != "row")
    back["whole"] += 100
    for name in ("column", "transposed", "corner", "again", "parameter"):
        assert torch.equal(back[name], state[name] + 100), name
    assert torch.equal(back["row"][0], whole[2] + 100)
    assert torch.equal(back["apart"], whole)
    assert back["again"] is back["whole"]
    assert verify(tmp_path / "c").ok
    assert load(tmp_path / "c")["corner"].tolist() == state["corner"].tolist()


def test_a_tensor_cannot_reach_out_of_the_one_that_holds_it(tmp_path: Path) -> None:
    nodes = {"whole": {"$": "array", "name": "whole", "type": "torch.Tensor"}}
    for owner, offset, stride in (("whole", 3, 1), ("whole", 0, -1), ("part", 0, 1), ("nothing", 0, 1)):
        view = {"of": owner, "offset": offset, "strides": [stride]}
        tree = {**nodes, "part": {"$": "array", "name": "part", "type": "torch.Tensor", "view": view}}
        save(tmp_path / "c", {"whole": np.ones(4), "part": np.ones(2)}, tree=json.dumps(tree), overwrite=True)
        with pytest.raises(ManifestError):
            load_state(tmp_path / "c")
        convert(tmp_path / "c", tmp_path / "c.pt")
        assert torch.load(tmp_path / "c.pt")["part"].tolist() == [1, 1]


def test_parameters_and_gradients_come_back_as_such(tmp_path: Path) -> None:
    state = {
        "p": nn.Parameter(torch.ones(2)),
        "frozen": nn.Parameter(torch.ones(2), requires_grad=False),
        "leaf": torch.ones(2, requires_grad=True),
        "plain": torch.ones(2),
        "array": np.ones(2),
    }
    save_state(tmp_path / "c", state)
    back = load_state(tmp_path / "c")
    assert [type(item) for item in back.values()] == [type(item) for item in state.values()]
    assert [back[n].requires_grad for n in ("p", "frozen", "leaf", "plain")] == [True, False, True, False]


def test_map_location(tmp_path: Path) -> None:
    state = {"a": torch.ones(2), "b": [torch.ones(3)], "n": np.ones(1)}
    save_state(tmp_path / "c", state)

    def devices(map_location: Any) -> list[str]:
        back = vt.load(tmp_path / "c", map_location=map_location)
        assert isinstance(back["n"], np.ndarray)
        return [back["a"].device.type, back["b"][0].device.type]

    asked = []

    def place(tensor: Any, location: str) -> Any:
        asked.append((tuple(tensor.shape), tensor.device.type, location))
        return tensor.to("meta") if tensor.numel() == 2 else None

    assert devices(None) == ["cpu", "cpu"]
    assert devices("cpu") == devices(torch.device("cpu")) == ["cpu", "cpu"]
    assert devices("meta") == devices(torch.device("meta")) == ["meta", "meta"]
    assert devices({"cpu": "meta"}) == devices({torch.device("cpu"): torch.device("meta")}) == ["meta", "meta"]
    assert devices({"cuda:0": "meta"}) == ["cpu", "cpu"]
    assert devices(place) == ["meta", "cpu"]
    assert asked == [((2,), "cpu", "cpu"), ((3,), "cpu", "cpu")]
    with pytest.raises(UsageError, match="map_location"):
        devices("cuda:0" if not torch.cuda.is_available() else "cuda:99")


def test_a_state_from_a_device_that_is_not_here(tmp_path: Path) -> None:
    tree = {"w": {"$": "array", "name": "w", "type": "torch.Tensor", "device": "cuda:77"}}
    save(tmp_path / "c", {"w": np.ones(2)}, tree=json.dumps(tree))
    with pytest.raises(UsageError, match=r"'w'.*map_location"):
        vt.load(tmp_path / "c")
    assert vt.load(tmp_path / "c", map_location={"cuda:77": "cpu"})["w"].tolist() == [1, 1]


def test_what_plain_variables_and_numpy_arrays_become(tmp_path: Path) -> None:
    net = Net()
    save(tmp_path / "plain", dict(net.state_dict()))
    assert all(isinstance(item, torch.Tensor) for item in vt.load(tmp_path / "plain").values())
    save(tmp_path / "flat", {name: item.float().numpy() for name, item in net.state_dict().items()}, manifest=False)
    with pytest.raises(VariableMismatch, match="cast=True"):
        vt.load_into(Net(), tmp_path / "flat")
    other = Net()
    other.seen.fill_(5)
    report = vt.load_into(other, tmp_path / "flat", cast=True, exclude=["seen", "norm.num*"], strict=False)
    assert set(report.kept) == {"norm.num_batches_tracked", "seen"}
    assert other.seen == 5
    assert {cast.name for cast in report.cast} == {"low"}
    assert same(other.fc.weight, net.fc.weight)


def test_loading_into_a_part_of_a_nested_checkpoint(tmp_path: Path) -> None:
    net, other = Net(), Net()
    vt.save(tmp_path / "c", {"model": net, "epoch": 3})
    with pytest.raises(VariableMismatch, match="missing"):
        vt.load_into(other, tmp_path / "c")
    vt.load_into(other, tmp_path / "c", include="model/*", rename={"model/": ""})
    assert same(other.fc.weight, net.fc.weight)
    vt.load_into(Net(), vt.load(tmp_path / "c")["model"])
    vt.load_into(Net().fc, net.state_dict(), include="fc.*", rename={"fc": ""})


def test_strict_and_mismatches_are_told_before_anything_changes(tmp_path: Path) -> None:
    vt.save(tmp_path / "c", {"weight": torch.ones(3, 2), "more": torch.ones(1)})
    layer = nn.Linear(2, 3)
    before = layer.weight.clone()
    with pytest.raises(VariableMismatch, match="1 missing, 1 unexpected"):
        vt.load_into(layer, tmp_path / "c")
    wide = nn.Linear(4, 5, bias=False)
    with pytest.raises(VariableMismatch, match=r"\(3, 2\) -> \(5, 4\)"):
        vt.load_into(wide, tmp_path / "c", strict=False)
    assert torch.equal(layer.weight, before)
    report = vt.load_into(layer, tmp_path / "c", strict=False)
    assert (report.loaded, report.kept, report.unused) == (("weight",), ("bias",), ("more",))
    kept = wide.weight.clone()
    assert vt.load_into(wide, tmp_path / "c", strict=False, on_mismatch="overlap").overlapped[0].copied == (3, 2)
    assert torch.equal(wide.weight[:3, :2], torch.ones(3, 2))
    assert torch.equal(wide.weight[3:], kept[3:])
    with pytest.raises(UsageError, match="not a module"):
        vt.load_into(3, tmp_path / "c")  # type: ignore[arg-type]


OPTIMIZERS: dict[str, Callable[[Any], Any]] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, 0.01, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW([{"params": p, "weight_decay": 0.1}], 0.01),
}
SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "sgd": lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [2, 5, 5]),
    "adam": lambda o: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "adamw": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=12),
}


class Training:
    def __init__(self, name: str, seed: int) -> None:
        torch.manual_seed(seed)
        self.net = Net()
        self.optimizer = OPTIMIZERS[name](list(self.net.parameters()))
        self.scheduler = SCHEDULERS[name](self.optimizer)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=3)

    def run(self, steps: range) -> list[float]:
        losses = []
        for step in steps:
            data = torch.Generator().manual_seed(step)
            x, y = torch.randn(8, 1, 8, 8, generator=data), torch.randint(7, (8,), generator=data)
            self.optimizer.zero_grad()
            loss = nn.functional.cross_entropy(self.net(x), y)
            self.scaler.scale(loss).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.scheduler.step()
            losses.append(loss.item())
        return losses

    def state(self) -> dict[str, Any]:
        return {
            "model": self.net,
            "optimizer": self.optimizer,
            "scheduler": self.scheduler,
            "scaler": self.scaler,
            "rng": [torch.get_rng_state(), random.getstate(), np.random.get_state()],
        }


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("how", ["load_state_dict", "load_into", "manager"])
def test_resuming_gives_the_losses_of_never_having_stopped(tmp_path: Path, name: str, how: str) -> None:
    straight = Training(name, 0)
    expected = straight.run(range(10))
    first = Training(name, 0)
    assert first.run(range(5)) == expected[:5]
    if how == "manager":
        with CheckpointManager(tmp_path, background=True) as manager:
            manager.save(5, vt.state_of(first.state()))
            first.run(range(5, 7))  # goes on while the save is written
    else:
        vt.save(tmp_path / "step-5", first.state())
    second = Training(name, 99)
    second.run(range(2))
    path = tmp_path / "step-5"
    if how == "load_into":
        vt.load_into(second.net, path, include="model/*", rename={"model/": ""})
        assert "state/0/momentum_buffer" in (report := vt.load_into(second.optimizer, path)).loaded or name != "sgd"
        assert report.target == type(second.optimizer).__name__
    state = CheckpointManager(tmp_path).restore() if how == "manager" else vt.load(path)
    if how != "load_into":
        second.net.load_state_dict(state["model"])
        second.optimizer.load_state_dict(state["optimizer"])
    second.scheduler.load_state_dict(state["scheduler"])
    second.scaler.load_state_dict(state["scaler"])
    torch.set_rng_state(state["rng"][0])
    random.setstate(state["rng"][1])
    np.random.set_state(state["rng"][2])
    assert second.run(range(5, 10)) == expected[5:]
    for a, b in zip(second.net.state_dict().values(), straight.net.state_dict().values(), strict=True):
        assert same(a, b)


def test_an_optimizer_takes_its_own_state_only(tmp_path: Path) -> None:
    training = Training("adam", 0)
    training.run(range(1))
    vt.save(tmp_path / "one", training.optimizer)
    vt.save(tmp_path / "two", {"a": training.optimizer, "b": training.optimizer})
    vt.save(tmp_path / "none", training.net)
    other = Training("adam", 1)
    assert len(vt.load_into(other.optimizer, tmp_path / "one").loaded) > 10
    vt.load_into(other.optimizer, vt.load(tmp_path / "two")["b"])
    for name in ("two", "none"):
        with pytest.raises(UsageError, match="not the state of one optimizer"):
            vt.load_into(other.optimizer, tmp_path / name)
    with pytest.raises(VariableMismatch, match="that of another optimizer"):
        vt.load_into(torch.optim.SGD([nn.Parameter(torch.ones(2))], 0.1), tmp_path / "one")
    for option in ({"rename": {"a": "b"}}, {"strict": False}, {"missing": "*"}, {"assign": True}, {"cast": True}):
        with pytest.raises(
            UsageError, match=f"{next(iter(option))}: the state of an optimizer can only be loaded whole"
        ):
            vt.load_into(other.optimizer, tmp_path / "one", **option)


def test_an_optimizers_state_that_lies_in_another_tensor(tmp_path: Path) -> None:
    parameter = nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.SGD([parameter], 0.1, momentum=0.9)
    flat = torch.arange(6.0)
    optimizer.state[parameter]["momentum_buffer"] = flat[2:5]
    vt.save(tmp_path / "a", {"flat": flat, "optimizer": optimizer})
    other = torch.optim.SGD([parameter], 0.1, momentum=0.9)
    vt.load_into(other, tmp_path / "a")
    assert other.state[parameter]["momentum_buffer"].tolist() == [2, 3, 4]


def test_names_of_an_optimizers_state(tmp_path: Path) -> None:
    training = Training("sgd", 0)
    training.run(range(2))
    vt.save(tmp_path / "c", {"optimizer": training.optimizer})
    assert "optimizer/state/0/momentum_buffer" in open_checkpoint(tmp_path / "c")


def test_a_background_save_takes_the_values_of_the_call(tmp_path: Path) -> None:
    net = Net()
    before = {name: item.clone() for name, item in net.state_dict().items()}
    pending = save_async(tmp_path / "c", net.state_dict())
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
    pending.wait()
    assert all(same(item, before[name]) for name, item in vt.load(tmp_path / "c").items())


def test_a_tied_tensor_comes_back_although_the_other_is_lost(tmp_path: Path) -> None:
    shared = torch.arange(4.0)
    with save_state(tmp_path / "c", {"first": shared, "second": shared, "part": shared[1:3]}) as checkpoint:
        shutil.rmtree(checkpoint["first"].path)
    left = load_state(open_checkpoint(tmp_path / "c", allow_incomplete=True))
    assert left.keys() == {"second", "part"}
    assert left["second"].tolist() == [0, 1, 2, 3]
    assert left["part"].tolist() == [1, 2]


LOADING = {"include": None, "exclude": None, "rename": None, "verify": True, "threads": 1, "progress": None}
MODES = {"cast": False, "missing": None, "on_mismatch": "error", "on_tied": "error"}
CALLS: dict[str, tuple[Callable[..., Any], Callable[[], dict[str, Any]]]] = {
    "save": (vt.save, lambda: {"path": "new", "state": nn.Linear(2, 2).state_dict(), "overwrite": True}),
    "load": (vt.load, lambda: {"path": "c", "map_location": None, **LOADING}),
    "load_into": (
        vt.load_into,
        lambda: {"target": nn.Linear(2, 2), "source": "c", "strict": True, "assign": False, **MODES, **LOADING},
    ),
    "load_into an optimizer": (
        vt.load_into,
        lambda: {"target": torch.optim.Adam(nn.Linear(2, 2).parameters()), "source": "o", "strict": True},
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_wrong_argument_is_an_error_of_varstore(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = nn.Linear(2, 2)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    vt.save("c", model.state_dict())
    vt.save("o", optimizer.state_dict())
    call, arguments = CALLS[name]
    call(**arguments())
    foreign = []
    for parameter in arguments():
        for label, value in {**WRONG, "tensor": torch.zeros(2), "module": model}.items():
            if callable(value) and parameter in FUNCTIONS | {"map_location"}:
                continue
            try:
                call(**{**arguments(), parameter: value})
            except VarstoreError:
                pass
            except Exception as error:
                foreign.append(f"{parameter} = {label}: {type(error).__name__}: {error}"[:200])
    assert foreign == []
