"""Optimizers and schedulers get what ``load_state_dict`` gives, and a state that does not fit is an error."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch.optim import lr_scheduler  # noqa: E402

from varstore.adapters import torch as vt  # noqa: E402
from varstore.disk.read.checkpoint import open_checkpoint  # noqa: E402
from varstore.errors import VariableMismatch  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")

CLASSES = {
    name: cls
    for name, cls in inspect.getmembers(torch.optim, inspect.isclass)
    if issubclass(cls, torch.optim.Optimizer) and cls is not torch.optim.Optimizer
}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "amsgrad": {"amsgrad": True},
    "momentum": {"momentum": 0.9},
    "centered": {"centered": True},
    "capturable": {"capturable": True},
    "fused": {"fused": True},
    "foreach": {"foreach": True},
    "a tensor as rate": {"lr": torch.tensor(0.01)},
}


class Lion(torch.optim.Optimizer):
    """Stands for optimizers that are not torch's."""

    def __init__(self, params: Any, lr: float = 0.01) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        if closure is not None:
            with torch.enable_grad():
                closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                state.setdefault("exp_avg", torch.zeros_like(parameter)).lerp_(parameter.grad, 0.1)
                if parameter.ndim == 2:
                    state.setdefault("side", torch.eye(parameter.shape[0]))
                parameter.sub_(state["exp_avg"].sign(), alpha=group["lr"])


class Averaging(torch.optim.SGD):
    """Torch's step, and something beside its state."""


def net(width: int = 3) -> Any:
    return nn.Sequential(nn.Linear(width, 4), nn.Linear(4, 2))


def parameters_of(cls: type, module: Any) -> list[Any]:
    return [one for one in module.parameters() if one.ndim == 2 or cls.__name__ != "Muon"]


def made(cls: type, options: dict[str, Any], module: Any) -> Any:
    """Return an optimizer, None for one that does not take these options."""
    taken = inspect.signature(cls).parameters
    if not options.keys() <= taken.keys():
        return None
    try:
        return cls(parameters_of(cls, module), **options)
    except (RuntimeError, ValueError):
        return None


def train(module: Any, optimizer: Any, scheduler: Any = None, steps: int = 3) -> None:
    width = module[0].weight.shape[1]
    for _ in range(steps):

        def closure() -> Any:
            optimizer.zero_grad()
            loss = module(torch.ones(2, width)).pow(2).sum()
            loss.backward()
            if isinstance(optimizer, torch.optim.SparseAdam):
                for one in module.parameters():
                    one.grad = one.grad.to_sparse()
            return loss

        optimizer.step(closure)
        if scheduler is not None:
            scheduler.step(*([1.0] if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) else []))


def facts(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return type(value).__name__, str(value.dtype), value.tolist()
    if isinstance(value, dict):
        return {key: facts(item) for key, item in value.items()}
    return [type(value).__name__, *map(facts, value)] if isinstance(value, list | tuple) else value


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", [*CLASSES, "Lion", "Averaging"])
def test_it_is_what_load_state_dict_gives(tmp_path: Path, name: str, options: str) -> None:
    cls = {**CLASSES, "Lion": Lion, "Averaging": Averaging}[name]
    torch.manual_seed(0)
    module = net()
    optimizer = made(cls, OPTIONS[options], module)
    if optimizer is None:
        pytest.skip("it has no such option")
    if options == "capturable":
        pytest.skip("only on devices")
    train(module, optimizer)
    vt.save(tmp_path / "c", {"model": module, "optimizer": optimizer})
    expected, found, stepped = (copy.deepcopy(module) for _ in range(3))
    by_torch, by_us, after_steps = (made(cls, {}, one) for one in (expected, found, stepped))
    by_torch.load_state_dict(vt.load(tmp_path / "c")["optimizer"])
    report = vt.load_into(by_us, tmp_path / "c")
    train(stepped, after_steps)
    vt.load_into(after_steps, vt.load(tmp_path / "c")["optimizer"])
    assert facts(by_us.state_dict()) == facts(by_torch.state_dict()) == facts(after_steps.state_dict())
    assert len(report.loaded) == sum(name.startswith("optimizer/") for name in open_checkpoint(tmp_path / "c"))
    train(module, optimizer)
    train(found, by_us)
    assert facts(dict(found.state_dict())) == facts(dict(module.state_dict()))


def works(cls: type, source: Any) -> bool:
    """Tell whether an optimizer uses all of another one's state: it takes it, has no more, and goes on."""
    module = net()
    optimizer = made(cls, {}, module)
    try:
        optimizer.load_state_dict(copy.deepcopy(source.state_dict()))
        train(module, optimizer)
    except Exception:
        return False
    return source.state_dict()["state"][0].keys() <= state_names(cls)


def state_names(cls: type) -> set[str]:
    """Return the names of all state that a class may have."""
    names: set[str] = set()
    for options in ({}, {"momentum": 0.9}, {"amsgrad": True}, {"centered": True}):
        module = net()
        optimizer = made(cls, options, module)
        if optimizer is not None:
            train(module, optimizer)
            names |= {name for held in optimizer.state.values() for name in held}
    return names


@pytest.mark.parametrize("name", CLASSES)
def test_the_state_of_every_other_class(name: str) -> None:
    """Each state is loaded that holds nothing which this optimizer would not have, and no other."""
    module = net()
    optimizer = made(CLASSES[name], {}, module)
    before = facts(optimizer.state_dict())
    loaded = []
    for other, cls in CLASSES.items():
        theirs = net()
        source = made(cls, {"momentum": 0.9} if "momentum" in inspect.signature(cls).parameters else {}, theirs)
        train(theirs, source)
        count = len(source.param_groups[0]["params"])
        if count == len(optimizer.param_groups[0]["params"]) and works(CLASSES[name], source):
            vt.load_into(made(CLASSES[name], {}, net()), source.state_dict())
            loaded.append(other)
            continue
        with pytest.raises(VariableMismatch, match="that of another optimizer"):
            pytest.fail(f"{other}: {vt.load_into(optimizer, source.state_dict())}")
        assert facts(optimizer.state_dict()) == before
    assert name in loaded


def test_the_message_names_what_does_not_fit(tmp_path: Path) -> None:
    module = net()
    adam = torch.optim.Adam(module.parameters())
    train(module, adam)
    vt.save(tmp_path / "c", adam)
    with pytest.raises(VariableMismatch, match="state/0: SGD does not have step, exp_avg, exp_avg_sq\n"):
        vt.load_into(torch.optim.SGD(net().parameters(), 0.1), tmp_path / "c")
    with pytest.raises(VariableMismatch, match=r"state/0/exp_avg: \(4, 3\) -> \(4, 5\)\n"):
        vt.load_into(torch.optim.Adam(net(5).parameters()), tmp_path / "c")
    pairs = [{"params": part.parameters()} for part in net()]
    with pytest.raises(VariableMismatch, match=r"groups of \[4\] parameters, for those of \[2, 2\]"):
        vt.load_into(torch.optim.Adam(pairs), tmp_path / "c")


@pytest.mark.parametrize("steps", [0, 1])
@pytest.mark.parametrize("name", [*CLASSES, "Lion", "Averaging"])
def test_parameters_of_other_shapes(name: str, steps: int) -> None:
    cls = {**CLASSES, "Lion": Lion, "Averaging": Averaging}[name]
    module, other = net(), net(5)
    options = {"momentum": 0.9} if name in ("SGD", "Averaging") else {}
    source, optimizer = made(cls, options, module), made(cls, options, other)
    train(module, source)
    train(other, optimizer, steps=steps)
    before = facts(optimizer.state_dict())
    with pytest.raises(VariableMismatch, match="state/0/"):
        vt.load_into(optimizer, source.state_dict())
    assert facts(optimizer.state_dict()) == before


def test_an_optimizer_that_is_not_torchs_and_has_state() -> None:
    module, other = net(), net()
    source, lion = torch.optim.Adam(module.parameters()), Lion(other.parameters())
    train(module, source)
    train(other, lion)
    with pytest.raises(VariableMismatch, match="Lion does not have step, exp_avg_sq"):
        vt.load_into(lion, source.state_dict())


def test_state_that_an_option_left_behind(tmp_path: Path) -> None:
    module = net()
    sgd = torch.optim.SGD(module.parameters(), 0.1, momentum=0.9)
    train(module, sgd)
    sgd.param_groups[0]["momentum"] = 0
    vt.save(tmp_path / "c", sgd)
    found = torch.optim.SGD(net().parameters(), 0.1)
    vt.load_into(found, tmp_path / "c")
    assert facts(found.state_dict()) == facts(sgd.state_dict())
    state = found.state_dict()
    state["state"][0]["momentum_buffer"] = None  # as versions of old had it
    state["state"][1] = {}
    vt.load_into(torch.optim.SGD(net().parameters(), 0.1), state)


def test_own_code_of_an_optimizer_decides() -> None:
    module = net()
    adam = torch.optim.Adam(module.parameters())
    train(module, adam)
    found = torch.optim.SGD(net().parameters(), 0.1, momentum=0.9)

    def translate(optimizer: Any, state: Any) -> Any:
        held = {key: {"momentum_buffer": item["exp_avg"]} for key, item in state["state"].items()}
        return {"state": held, "param_groups": optimizer.state_dict()["param_groups"]}

    found.register_load_state_dict_pre_hook(translate)
    vt.load_into(found, adam.state_dict())
    assert torch.equal(found.state_dict()["state"][0]["momentum_buffer"], adam.state_dict()["state"][0]["exp_avg"])


@pytest.mark.parametrize(
    "state",
    [
        {"state": {}, "param_groups": [{}]},
        {"state": {}, "param_groups": [3]},
        {"state": [], "param_groups": [{"params": [0, 1, 2, 3]}]},
        {"state": {0: 3}, "param_groups": [{"params": [0, 1, 2, 3]}]},
        {"state": {}, "param_groups": 7},
        {"state": {}, "param_groups": []},
    ],
)
def test_what_is_not_a_state(state: Any) -> None:
    with pytest.raises(VariableMismatch, match="that of another optimizer"):
        vt.load_into(torch.optim.SGD(net().parameters(), 0.1), state)


def test_nothing_of_an_optimizer_changes_while_its_state_is_looked_at() -> None:
    module = net()
    adam = torch.optim.Adam(module.parameters(), foreach=True)
    called: list[int] = []
    adam.register_step_pre_hook(lambda *_: called.append(1))
    scheduler = lr_scheduler.StepLR(adam, 1)
    source = torch.optim.Adam(net().parameters())
    counts = adam._opt_called if hasattr(adam, "_opt_called") else None
    vt.load_into(adam, source.state_dict())
    assert (called, scheduler.last_epoch) == ([], 0)
    assert counts == (adam._opt_called if hasattr(adam, "_opt_called") else None)
    assert all(one.grad is None for one in module.parameters())


# --- schedulers --------------------------------------------------------------------------------------------------


class Decay:
    def __init__(self, rate: float) -> None:
        self.rate = rate

    def __call__(self, epoch: int) -> float:
        return self.rate**epoch


SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 0.9**epoch),
    "an object": lambda o: lr_scheduler.LambdaLR(o, Decay(0.9)),
    "multiplicative": lambda o: lr_scheduler.MultiplicativeLR(o, lambda _: 0.9),
    "step": lambda o: lr_scheduler.StepLR(o, 2),
    "multi-step": lambda o: lr_scheduler.MultiStepLR(o, [1, 2, 2]),
    "exponential": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 5),
    "restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 5),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=20),
    "cyclic": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1),
    "cyclic by function": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, scale_fn=lambda x: x),
    "plateau": lr_scheduler.ReduceLROnPlateau,
    "sequential": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o), lr_scheduler.ExponentialLR(o, 0.9)], [2]
    ),
    "chained": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "polynomial": lr_scheduler.PolynomialLR,
    "averaging": lambda o: torch.optim.swa_utils.SWALR(o, 0.05),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_go_on_as_if_never_stopped(tmp_path: Path, name: str) -> None:
    def training() -> Any:
        torch.manual_seed(0)
        module = net()
        optimizer = torch.optim.SGD(module.parameters(), 0.1, momentum=0.9)
        return module, optimizer, SCHEDULERS[name](optimizer)

    module, optimizer, scheduler = training()
    train(module, optimizer, scheduler)
    vt.save(tmp_path / "c", {"model": module, "optimizer": optimizer, "scheduler": scheduler})
    again, second, resumed = training()
    vt.load_into(again, tmp_path / "c", include="model/*", rename={"model/": ""})
    vt.load_into(second, tmp_path / "c")
    resumed.load_state_dict(vt.load(tmp_path / "c")["scheduler"])
    assert facts(vt.load(tmp_path / "c")["scheduler"]) == facts(scheduler.state_dict())
    assert facts(resumed.state_dict()) == facts(scheduler.state_dict())
    train(module, optimizer, scheduler)
    train(again, second, resumed)
    assert facts(dict(again.state_dict())) == facts(dict(module.state_dict()))
    assert second.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]


def test_a_state_without_steps_tells_its_class_by_its_options() -> None:
    adam, found = torch.optim.Adam(net().parameters()), torch.optim.SGD(net().parameters(), 0.1)
    before = facts(found.state_dict())
    with pytest.raises(VariableMismatch, match="param_groups/0: without 'momentum'"):
        vt.load_into(found, adam.state_dict())
    assert facts(found.state_dict()) == before
