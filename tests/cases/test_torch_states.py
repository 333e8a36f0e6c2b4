"""Modules whose ``state_dict()`` hands out copies, what else has a state, and tensors that no torch has."""

import collections
import copy
import inspect

import numpy as np
import pytest

pytest.importorskip("torch")
import torch
from support.crafted import checkpoint, entry
from torch import nn
from torch.optim import lr_scheduler

import varstore as vs
from varstore.adapters import torch as vt
from varstore.errors import FormatError, UsageError, VariableMismatch

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's advice about deprecated classes and unused steps


def same(a, b):
    """Tell whether two states are equal in types, order and values."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b or a != a


# --- modules -----------------------------------------------------------------------------------------------------


class ExtraTensor(nn.Linear):
    """Keeps scales beside its weight, as TransformerEngine does."""

    def __init__(self, value):
        super().__init__(2, 2)
        self.amax = value

    def get_extra_state(self):
        return torch.tensor([self.amax])

    def set_extra_state(self, state):
        self.amax = float(state[0])

    def kept(self):
        return self.amax


class ExtraData(ExtraTensor):
    def get_extra_state(self):
        return {"amax": [self.amax], "rounds": 3}

    def set_extra_state(self, state):
        self.amax = state["amax"][0]


class ExtraNone(ExtraTensor):
    def get_extra_state(self):
        return None

    def set_extra_state(self, state):
        self.amax = 0.5


class Packed(nn.Module):
    """Keeps int8 and shows float32."""

    def __init__(self, value):
        super().__init__()
        self.q = torch.full((3,), int(value * 4), dtype=torch.int8)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        destination[prefix + "weight"] = self.q.float() / 2

    def _load_from_state_dict(self, state, prefix, *_):
        self.q = (state[prefix + "weight"] * 2).to(torch.int8)

    def kept(self):
        return self.q.tolist()


class Halved(nn.Linear):
    """Is saved in half precision, to halve the file."""

    def __init__(self, value):
        super().__init__(2, 2)
        nn.init.constant_(self.weight, value)
        self.register_state_dict_post_hook(
            lambda module, state, prefix, meta: state.update(weight=state["weight"].half())
        )

    def kept(self):
        return self.weight.tolist()


class Hooked(nn.Linear):
    """Renames as it loads."""

    def __init__(self, value):
        super().__init__(2, 2)
        nn.init.constant_(self.weight, value)
        self.register_load_state_dict_pre_hook(
            lambda module, state, prefix, *_: state.update(weight=state["weight"] + 1)
        )

    def kept(self):
        return self.weight.tolist()


class Inner(nn.Sequential):
    """Has one of them deeper."""

    def __init__(self, value):
        super().__init__(nn.Linear(2, 2), ExtraTensor(value))

    def kept(self):
        return self[1].amax


class Normed(nn.Module):
    """Has a parametrised weight."""

    def __init__(self, value):
        super().__init__()
        self.linear = nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))
        nn.init.constant_(self.linear.bias, value)

    def kept(self):
        return self.linear.bias.tolist()


@pytest.mark.parametrize("kind", [ExtraTensor, ExtraData, ExtraNone, Packed, Halved, Hooked, Inner, Normed])
def test_load_into_does_what_load_state_dict_does(tmp_path, kind):
    saved, expected, found = kind(7.0), kind(1.0), kind(1.0)
    vt.save(tmp_path / "c", saved)
    expected.load_state_dict(vt.load(tmp_path / "c"))
    vt.load_into(found, tmp_path / "c")
    assert found.kept() == expected.kept() != kind(1.0).kept()
    assert same(found.state_dict(), expected.state_dict())


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding(5, 4)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.emb.weight
        nn.init.constant_(self.emb.weight, -1)


def test_different_values_for_a_tied_parameter_are_refused(tmp_path):
    vs.save(tmp_path / "c", {"emb.weight": np.full((5, 4), 1, "f4"), "head.weight": np.full((5, 4), 2, "f4")})
    model = Tied()
    with pytest.raises(VariableMismatch, match=r"emb\.weight.*head\.weight|head\.weight.*emb\.weight"):
        vt.load_into(model, tmp_path / "c")
    assert (model.emb.weight == -1).all()


def test_equal_values_for_a_tied_parameter_are_loaded(tmp_path):
    vs.save(tmp_path / "c", {"emb.weight": np.full((5, 4), 2, "f4"), "head.weight": np.full((5, 4), 2, "f4")})
    model = Tied()
    vt.load_into(model, tmp_path / "c")
    assert (model.head.weight == 2).all()
    assert model.head.weight is model.emb.weight


# --- optimizers --------------------------------------------------------------------------------------------------


def train(model, optimizer, scheduler=None, steps=3):
    def closure():
        optimizer.zero_grad()
        loss = model(torch.ones(2, model.in_features)).pow(2).sum()
        loss.backward()
        return loss

    for _ in range(steps):
        optimizer.step(closure)
        if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
            scheduler.step(1.0)
        elif scheduler is not None:
            scheduler.step()


def adam(model=None, **options):
    model = model or nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters(), **options)
    train(model, optimizer)
    return optimizer


OPTIMIZERS = [
    kind
    for _, kind in inspect.getmembers(torch.optim, inspect.isclass)
    if issubclass(kind, torch.optim.Optimizer) and kind is not torch.optim.Optimizer
]
OPTIONS = [{}, {"amsgrad": True}, {"capturable": True}, {"lr": torch.tensor(0.01)}, {"fused": True}]


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_training_goes_on_with_an_optimizer_that_was_loaded(tmp_path, kind):
    ran = 0
    for number, options in enumerate(OPTIONS):
        torch.manual_seed(0)
        model = nn.Linear(3, 2)
        options = {"lr": 0.01, **options}

        def parameters(model):
            return [model.weight] if kind.__name__ == "Muon" else model.parameters()

        try:
            optimizer = kind(parameters(model), **options)
            train(model, optimizer)
        except (RuntimeError, TypeError, ValueError, AssertionError):
            continue  # this one does not have the option, or not here
        path = tmp_path / str(number)
        vt.save(path, {"model": model, "optimizer": optimizer})
        assert same(vt.load(path)["optimizer"], optimizer.state_dict())
        other = copy.deepcopy(model)
        resumed = kind(parameters(other), **{**options, "lr": 0.5})
        vt.load_into(resumed, path)
        assert same(resumed.state_dict(), optimizer.state_dict())
        train(model, optimizer)
        train(other, resumed)
        assert torch.equal(model.weight, other.weight)
        ran += 1
    assert ran or kind.__name__ in ("SparseAdam",)


def test_an_optimizer_of_more_parameters_or_groups_is_refused(tmp_path):
    vt.save(tmp_path / "c", adam())
    model = nn.Linear(3, 2)
    for parameters in (
        nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2)).parameters(),
        [{"params": [model.weight]}, {"params": [model.bias]}],
    ):
        with pytest.raises(VariableMismatch, match="another optimizer"):
            vt.load_into(torch.optim.Adam(parameters), tmp_path / "c")


def test_an_optimizer_of_another_class_is_refused(tmp_path):
    vt.save(tmp_path / "c", adam())
    optimizer = torch.optim.SGD(nn.Linear(3, 2).parameters(), lr=0.1, momentum=0.9)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(VariableMismatch, match="exp_avg"):
        vt.load_into(optimizer, tmp_path / "c")
    assert same(optimizer.state_dict(), before)


@pytest.mark.parametrize("has_state", [False, True])
def test_an_optimizer_of_parameters_of_other_shapes_is_refused(tmp_path, has_state):
    vt.save(tmp_path / "c", adam())
    model = nn.Linear(5, 2)
    optimizer = adam(model) if has_state else torch.optim.Adam(model.parameters())
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(VariableMismatch, match="exp_avg"):
        vt.load_into(optimizer, tmp_path / "c")
    assert same(optimizer.state_dict(), before)
    train(model, optimizer)


def test_an_optimizer_that_keeps_nothing_is_loaded(tmp_path):
    model = nn.Linear(3, 2)
    vt.save(tmp_path / "c", {"model": model, "optimizer": torch.optim.SGD(model.parameters(), lr=0.25)})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    vt.load_into(optimizer, tmp_path / "c")
    assert optimizer.param_groups[0]["lr"] == 0.25


def test_two_optimizers_are_not_one(tmp_path):
    vt.save(tmp_path / "c", {"g": adam(), "d": adam()})
    with pytest.raises(UsageError, match="2 of them"):
        vt.load_into(adam(), tmp_path / "c")


def test_an_optimizer_whose_state_is_a_defaultdict(tmp_path):
    class Wrapped(torch.optim.SGD):
        def state_dict(self):
            state = super().state_dict()
            return state | {"state": collections.defaultdict(dict, state["state"])}

    model = nn.Linear(3, 2)
    optimizer = Wrapped(model.parameters(), lr=0.1, momentum=0.9)
    train(model, optimizer)
    vt.save(tmp_path / "c", optimizer)
    resumed = Wrapped(nn.Linear(3, 2).parameters(), lr=0.1, momentum=0.9)
    vt.load_into(resumed, tmp_path / "c")
    assert same(resumed.state_dict()["state"][0], optimizer.state_dict()["state"][0])


# --- what else has a state ---------------------------------------------------------------------------------------


class Decay:
    def __init__(self):
        self.rate = 0.9

    def __call__(self, epoch):
        return self.rate**epoch


SCHEDULERS = {
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 0.9**epoch),
    "object": lambda o: lr_scheduler.LambdaLR(o, Decay()),
    "multiplicative": lambda o: lr_scheduler.MultiplicativeLR(o, lambda epoch: 0.9),
    "step": lambda o: lr_scheduler.StepLR(o, 2),
    "steps": lambda o: lr_scheduler.MultiStepLR(o, [1, 2]),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 5),
    "restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 5),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=20),
    "cyclic": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1),
    "cyclic function": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, scale_fn=lambda x: x),
    "plateau": lr_scheduler.ReduceLROnPlateau,
    "sequence": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o), lr_scheduler.ExponentialLR(o, 0.9)], [2]
    ),
    "chain": lambda o: lr_scheduler.ChainedScheduler([lr_scheduler.ConstantLR(o), lr_scheduler.ExponentialLR(o, 0.9)]),
    "swa": lambda o: torch.optim.swa_utils.SWALR(o, 0.05),
    "polynomial": lr_scheduler.PolynomialLR,
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_state_of_a_scheduler(tmp_path, name):
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scheduler = SCHEDULERS[name](optimizer)
    train(model, optimizer, scheduler)
    vt.save(tmp_path / "c", {"scheduler": scheduler})
    assert same(vt.load(tmp_path / "c")["scheduler"], scheduler.state_dict())


def test_a_scaler_and_an_averaged_model(tmp_path):
    scaler = torch.amp.GradScaler("cpu")
    model = torch.optim.swa_utils.AveragedModel(nn.Linear(2, 2))
    vt.save(tmp_path / "c", {"scaler": scaler, "model": model})
    assert same(vt.load(tmp_path / "c")["scaler"], scaler.state_dict())
    other = torch.optim.swa_utils.AveragedModel(nn.Linear(2, 2))
    vt.load_into(other, tmp_path / "c", include="model/*", rename={"model/": ""})
    assert same(other.state_dict(), model.state_dict())


# --- trees of a stranger -----------------------------------------------------------------------------------------


def array(type, **other):
    return {"$": "array", "name": "a", "type": type, **other}


TREES = [
    pytest.param(array("torch.Tensor", requires_grad=True), id="integers that require a gradient"),
    pytest.param(array("torch.nn.Parameter", requires_grad=True), id="a parameter of integers"),
    *(
        pytest.param(array("torch.Tensor", device=device), id=repr(device))
        for device in ("meta", "xla", "lazy", "\x1b]0;x\x07", "cpu:x", "hpu:0", "privateuseone")
    ),
]


@pytest.mark.parametrize("tree", TREES)
def test_a_tensor_that_torch_does_not_have(tmp_path, tree):
    path = checkpoint(tmp_path / "c", tree=tree, entries=[entry("a", size=4)], folders={"a": b"\1\2\3\4"})
    with pytest.raises(FormatError) as caught:
        vs.load_state(path)
    assert str(caught.value).isprintable()
