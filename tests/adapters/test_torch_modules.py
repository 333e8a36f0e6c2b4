"""Modules get what ``load_state_dict`` gives them, whatever code they run, and straight where they run none."""

from __future__ import annotations

import copy
import cProfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch.nn.utils import parametrizations, prune  # noqa: E402

import varstore as vs  # noqa: E402
from varstore.adapters import torch as vt  # noqa: E402
from varstore.errors import DigestMismatch, FormatError, UsageError, VariableMismatch  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")


# --- modules with code of their own ------------------------------------------------------------------------------


class Extra(nn.Linear):
    """Keeps something beside its parameters, as TransformerEngine does its scales."""

    def __init__(self, kept: Any = None) -> None:
        super().__init__(3, 2)
        self.kept = kept

    def get_extra_state(self) -> Any:
        return self.kept

    def set_extra_state(self, state: Any) -> None:
        self.kept = ("set", state)


class Packed(nn.Module):
    """Keeps int8 and shows float32."""

    def __init__(self) -> None:
        super().__init__()
        self.q = torch.zeros(3, dtype=torch.int8)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[prefix + "weight"] = self.q.float() * 0.5

    def _load_from_state_dict(self, state: Any, prefix: str, *rest: Any) -> None:
        self.q = (state.pop(prefix + "weight") * 2).to(torch.int8)


class Plain(nn.Module):
    """Has a number, a list and a tensor in its state, and takes them itself."""

    def __init__(self) -> None:
        super().__init__()
        self.settings: dict[str, Any] = {"scale": 0.5, "axes": [1, 2], "zero": None}
        self.weight = nn.Parameter(torch.zeros(2))

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.update({prefix + name: value for name, value in self.settings.items()})

    def _load_from_state_dict(self, state: Any, prefix: str, *rest: Any) -> None:
        self.settings = {name: state.pop(prefix + name) for name in self.settings}
        super()._load_from_state_dict(state, prefix, *rest)


class Grows(nn.Module):
    """Takes buffers of any length."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(length))

    def _load_from_state_dict(self, state: Any, prefix: str, *rest: Any) -> None:
        self.seen = torch.zeros(len(state[prefix + "seen"]))
        super()._load_from_state_dict(state, prefix, *rest)


class Forgiving(nn.Linear):
    """Has a default for what older states do not have."""

    def _load_from_state_dict(self, state: Any, prefix: str, *rest: Any) -> None:
        state.setdefault(prefix + "bias", torch.full((2,), 9.0))
        super()._load_from_state_dict(state, prefix, *rest)


class OwnVerb(nn.Linear):
    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        return super().load_state_dict({name: item + 1 for name, item in state_dict.items()}, strict, assign)


class Shares(nn.Module):
    """A tied parameter, a buffer within a parameter, one module in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(4, 3)
        self.head = nn.Linear(3, 4, bias=False)
        self.head.weight = self.embed.weight
        self.first = nn.Linear(3, 3)
        self.again = self.first
        self.register_buffer("row", self.first.weight.detach()[1])


class Buffers(nn.Module):
    def __init__(self, fill: float = 0.0) -> None:
        super().__init__()
        self.register_buffer("kept", torch.full((2,), fill))
        self.register_buffer("own", torch.full((2,), fill), persistent=False)
        self.register_buffer("nothing", None)
        self.register_parameter("none", None)
        self.scalar = nn.Parameter(torch.tensor(fill))
        self.empty = nn.Parameter(torch.zeros(0, 3))
        self.also_empty = nn.Parameter(torch.zeros(0, 3))
        self.brief = nn.Parameter(torch.full((3, 2), fill, dtype=torch.bfloat16))
        self.frozen = nn.Parameter(torch.full((3, 2), fill).T, requires_grad=False)
        self.wide = nn.Parameter(torch.full((2, 3, 4, 4), fill).to(memory_format=torch.channels_last))
        self.register_buffer("wave", torch.full((2,), fill * 1j, dtype=torch.complex64).conj())
        self.register_buffer("small", torch.full((2,), fill).to(torch.float8_e4m3fn))
        self.register_buffer("count", torch.tensor(int(fill)))


class Special(torch.Tensor):
    pass


def hooked(module: nn.Module, *, pre: Any = None, post: Any = None, save: Any = None) -> nn.Module:
    if pre is not None:
        module.register_load_state_dict_pre_hook(pre)
    if post is not None:
        module.register_load_state_dict_post_hook(post)
    if save is not None:
        module.register_state_dict_post_hook(save)
    return module


def transposed(module: Any, state: Any, prefix: str, *rest: Any) -> None:
    state[prefix + "weight"] = state[prefix + "weight"].T


def renamed(module: Any, state: Any, prefix: str, *rest: Any) -> None:
    for name in [name for name in state if name.startswith(prefix + "old.")]:
        state[prefix + name[len(prefix) + 4 :]] = state.pop(name)


def noted(module: Any, keys: Any) -> None:
    module.sum_after = float(sum(item.float().sum() for item in module.parameters()))


def forgiven(module: Any, keys: Any) -> None:
    keys.missing_keys.clear()
    keys.unexpected_keys.clear()


def in_half(module: Any, state: Any, prefix: str, metadata: Any) -> None:
    state[prefix + "weight"] = state[prefix + "weight"].half()


def with_weight(module: nn.Module, value: torch.Tensor) -> nn.Module:
    module.weight = nn.Parameter(value)
    return module


def normed(module: Any) -> Any:
    for part in module.modules():
        if isinstance(part, nn.modules.batchnorm._NormBase) and part.running_mean is not None:
            part.running_mean.normal_()
            part.num_batches_tracked.fill_(7)
    return module


def trained(net: Any, *shape: int) -> Any:
    net(torch.randn(*shape))
    return net


def averaged(net: Any) -> Any:
    net.update_parameters(nn.Linear(3, 2))
    return net


def pruned() -> nn.Module:
    return prune.random_unstructured(nn.Linear(3, 2), "weight", amount=2)


def observer() -> Any:
    return torch.ao.quantization.PerChannelMinMaxObserver()


MODULES: dict[str, Callable[[], Any]] = {
    "linear": lambda: nn.Linear(3, 2),
    "convolution": lambda: nn.Conv2d(2, 3, 3).to(memory_format=torch.channels_last),
    "sequential": lambda: nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 3, bias=False)),
    "batch norm": lambda: normed(nn.Sequential(nn.Conv1d(2, 3, 1), nn.BatchNorm1d(3))),
    "batch norm without statistics": lambda: nn.BatchNorm1d(3, track_running_stats=False),
    "instance norm": lambda: normed(nn.InstanceNorm2d(3, affine=True, track_running_stats=True)),
    "layer norm": lambda: nn.LayerNorm(3),
    "lstm": lambda: nn.LSTM(3, 4, 2, bidirectional=True),
    "gru": lambda: nn.GRU(3, 4),
    "attention": lambda: nn.MultiheadAttention(4, 2, kdim=3, vdim=3),
    "transformer": lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 8), 2),
    "embedding bag": lambda: nn.EmbeddingBag(4, 3),
    "parameter list": lambda: nn.ParameterList([torch.randn(2), torch.randn(3)]),
    "parameter dict": lambda: nn.ParameterDict({"a": torch.randn(2), "b": torch.randn(3)}),
    "module dict": lambda: nn.ModuleDict({"a": nn.Linear(3, 2), "b": nn.PReLU()}),
    "shared memory": Shares,
    "buffers": lambda: Buffers(3.0),
    "extra state, a tensor": lambda: Extra(torch.tensor([7.0])),
    "extra state, an array": lambda: Extra(np.array([7.0])),
    "extra state, plain": lambda: nn.Sequential(Extra({"calibrated": [1, 2], "rounds": 3}), nn.Linear(2, 2)),
    "extra state, None": lambda: Extra(None),
    "extra state, nested": lambda: nn.Sequential(
        Extra({"scale": torch.ones(2), "more": [torch.zeros(1), {"_extra_state": 3}]}), Extra((torch.ones(1), "text"))
    ),
    "extra state and hooks": lambda: hooked(nn.Sequential(Extra({"a": torch.ones(2)})), pre=renamed, post=noted),
    "packed": lambda: nn.Sequential(Packed(), nn.Linear(3, 2)),
    "plain values": lambda: nn.Sequential(Plain(), nn.Linear(3, 2)),
    "grows": lambda: nn.Sequential(Grows(5)),
    "forgiving": lambda: Forgiving(3, 2),
    "own load_state_dict": lambda: OwnVerb(3, 2),
    "a hook that casts what is saved": lambda: hooked(nn.Linear(3, 2), save=in_half),
    "a hook that transposes": lambda: nn.Sequential(hooked(nn.Linear(2, 2), pre=transposed), nn.Linear(3, 2)),
    "a hook around others": lambda: hooked(nn.Sequential(nn.Linear(3, 2), Packed(), nn.BatchNorm1d(2)), pre=renamed),
    "a hook after loading": lambda: nn.Sequential(hooked(nn.Linear(3, 2), post=noted), nn.Linear(3, 2)),
    "weight norm": lambda: parametrizations.weight_norm(nn.Linear(3, 2)),
    "weight norm of old": lambda: nn.utils.weight_norm(nn.Linear(3, 2)),
    "spectral norm": lambda: trained(parametrizations.spectral_norm(nn.Linear(3, 2)), 4, 3),
    "spectral norm of old": lambda: trained(nn.utils.spectral_norm(nn.Linear(3, 2)), 4, 3),
    "orthogonal": lambda: parametrizations.orthogonal(nn.Linear(3, 3)),
    "pruned": pruned,
    "lazy linear, initialised": lambda: trained(nn.LazyLinear(2), 4, 3),
    "lazy": lambda: trained(nn.Sequential(nn.LazyLinear(2), nn.LazyBatchNorm1d()), 4, 3),
    "averaged": lambda: averaged(torch.optim.swa_utils.AveragedModel(nn.Linear(3, 2), use_buffers=True)),
    "data parallel": lambda: nn.DataParallel(nn.Linear(3, 2)),
    "scripted": lambda: torch.jit.script(nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))),
    "compiled": lambda: torch.compile(nn.Sequential(nn.Linear(3, 2), nn.ReLU())),
    "observer": lambda: trained(observer(), 4, 3),
    "fake quantised": lambda: trained(torch.ao.quantization.FakeQuantize(), 4, 3),
    "a tensor of another class": lambda: with_weight(nn.Linear(3, 2), torch.randn(2, 3).as_subclass(Special)),
}
TARGETS: dict[str, Callable[[], Any]] = {
    "buffers": Buffers,
    "extra state, a tensor": Extra,
    "extra state, an array": Extra,
    "extra state, plain": lambda: nn.Sequential(Extra(), nn.Linear(2, 2)),
    "extra state, None": lambda: Extra("something"),
    "extra state, nested": lambda: nn.Sequential(Extra(), Extra()),
    "grows": lambda: nn.Sequential(Grows(2)),
    "lazy": lambda: nn.Sequential(nn.LazyLinear(2), nn.LazyBatchNorm1d()),
    "averaged": lambda: torch.optim.swa_utils.AveragedModel(nn.Linear(3, 2), use_buffers=True),
    "observer": observer,
    "fake quantised": torch.ao.quantization.FakeQuantize,
}
NOT_ON_DISK = {"a tensor of another class"}


def touched(name: str, seed: int = 0) -> Any:
    """Return a module of random values."""
    torch.manual_seed(seed)
    module = MODULES[name]()
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.is_floating_point() and "fake" not in name:
                parameter.copy_(torch.randn(parameter.shape))
    for part in module.modules():
        if isinstance(part, Packed):
            part.q = torch.tensor([4, -2, 7], dtype=torch.int8)
        if isinstance(part, Grows):
            part.seen = torch.arange(5.0)
    return module


def fresh(name: str) -> Any:
    torch.manual_seed(99)
    return TARGETS.get(name, MODULES[name])()


def facts(value: Any) -> Any:
    """Return what is compared of a value: of a tensor the type, layout and bits, of a container what it holds."""
    if isinstance(value, torch.nn.parameter.UninitializedTensorMixin):
        return type(value).__name__
    if isinstance(value, torch.Tensor):
        plain = value.detach().as_subclass(torch.Tensor).resolve_conj()
        bits = plain.contiguous().reshape(-1).view(torch.uint8).tolist() if plain.numel() else []
        return type(value).__name__, str(value.dtype), tuple(value.shape), value.requires_grad, bits
    if isinstance(value, np.ndarray):
        return "array", str(value.dtype), value.tolist()
    if isinstance(value, dict):
        return {key: facts(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value).__name__, [facts(item) for item in value]
    return value if isinstance(value, int | float | str | type(None)) else type(value).__name__


def everything(module: Any) -> dict[str, Any]:
    """Return the facts of all that a module and those in it hold, and which names are one memory."""
    found: dict[str, Any] = {}
    for prefix, part in module.named_modules(remove_duplicate=False):
        found[prefix] = {
            "class": type(part).__name__,
            "parameters": facts(dict(part._parameters.items())),
            "buffers": facts(dict(part._buffers.items())),
            "attributes": facts({k: v for k, v in vars(part).items() if not k.startswith("_")}),
        }
    owners: dict[int, list[str]] = {}
    for name, item in (*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)):
        owners.setdefault(id(item), []).append(name)
    return found | {"shared": sorted(owners.values())}


def source_of(kind: str, module: Any, path: Path) -> Any:
    if kind == "checkpoint":
        vt.save(path, module)
        return path
    if kind == "open checkpoint":
        return vt.save(path, module)
    return copied(module.state_dict())


def copied(state: Any) -> Any:
    new = copy.copy(state)
    new.update({name: v.clone() if isinstance(v, torch.Tensor) else copy.deepcopy(v) for name, v in state.items()})
    return new


@pytest.mark.parametrize("kind", ["checkpoint", "state dict"])
@pytest.mark.parametrize("name", MODULES)
def test_it_is_what_load_state_dict_gives(tmp_path: Path, name: str, kind: str) -> None:
    if kind == "checkpoint" and name in NOT_ON_DISK:
        pytest.skip("a tensor subclass is not saved")
    module = touched(name)
    source = source_of(kind, module, tmp_path / "c")
    expected, found = fresh(name), fresh(name)
    expected.load_state_dict(copied(source) if kind == "state dict" else vt.load(source))
    report = vt.load_into(found, source)
    assert everything(found) == everything(expected)
    assert set(report.loaded) == set(module.state_dict())
    assert (report.kept, report.unused, report.mismatched) == ((), (), ())


@pytest.mark.parametrize("kind", ["open checkpoint", "state dict"])
@pytest.mark.parametrize("name", MODULES)
def test_it_is_what_load_state_dict_gives_with_assign(tmp_path: Path, name: str, kind: str) -> None:
    if name in NOT_ON_DISK or "memory" in name:
        pytest.skip("not saved, or tied in other ways")
    source = source_of(kind, touched(name), tmp_path / "c")
    expected, found = fresh(name), fresh(name)
    expected.load_state_dict(copied(source) if kind == "state dict" else vt.load(source), assign=True)
    vt.load_into(found, source, assign=True)
    assert everything(found) == everything(expected)


@pytest.mark.parametrize("name", MODULES)
def test_it_is_what_load_state_dict_gives_within_another_checkpoint(tmp_path: Path, name: str) -> None:
    if name in NOT_ON_DISK:
        pytest.skip("a tensor subclass is not saved")
    vt.save(tmp_path / "c", {"nets": [{"a": touched(name), "b": touched(name, 1)}], "epoch": 3})
    expected, found = fresh(name), fresh(name)
    expected.load_state_dict(vt.load(tmp_path / "c")["nets"][0]["b"])
    vt.load_into(found, tmp_path / "c", include="nets/0/b/*", rename={"nets/0/b/": ""})
    assert everything(found) == everything(expected)


@pytest.mark.parametrize("name", MODULES)
def test_names_that_do_not_fit_are_what_load_state_dict_says(name: str) -> None:
    state = copied(touched(name).state_dict())
    gone = next((key for key in state if key.endswith("bias")), None)
    state["nobody"] = torch.ones(1)
    if gone is not None:
        del state[gone]
    expected, found = fresh(name), fresh(name)
    keys = expected.load_state_dict(copied(state), strict=False)
    missing = [key for key in keys.missing_keys if key != "first.bias"]  # of two names, one is enough
    report = vt.load_into(found, state, strict=False)
    assert (sorted(report.kept), sorted(report.unused)) == (sorted(missing), sorted(keys.unexpected_keys))
    assert everything(found) == everything(expected)
    if keys.missing_keys or keys.unexpected_keys:
        with pytest.raises(VariableMismatch, match=r"\d missing|\d unexpected|Missing key"):
            vt.load_into(fresh(name), state)


# --- what runs no code is read straight into its memory ----------------------------------------------------------

RUN_NO_CODE = [
    *("linear", "convolution", "sequential", "batch norm", "layer norm", "lstm", "gru", "attention", "transformer"),
    *("embedding bag", "parameter list", "parameter dict", "module dict", "shared memory", "buffers", "pruned"),
    *("weight norm of old", "orthogonal", "data parallel", "compiled", "averaged", "lazy linear, initialised"),
]


def refuses(self: Any, state_dict: Any, strict: bool = True, assign: bool = False) -> None:
    raise AssertionError("load_state_dict was called")


@pytest.mark.parametrize("name", RUN_NO_CODE)
def test_memory_stays_and_load_state_dict_is_not_called(tmp_path: Path, monkeypatch: Any, name: str) -> None:
    vt.save(tmp_path / "c", touched(name))
    found = fresh(name)
    pointers = {key: item.data_ptr() for key, item in found.state_dict().items()}
    with monkeypatch.context() as during:  # the function stays the same one, by which own ones are told
        during.setattr(nn.Module.load_state_dict, "__code__", refuses.__code__)
        vt.load_into(found, tmp_path / "c")
    assert {key: item.data_ptr() for key, item in found.state_dict().items()} == pointers


def test_parts_without_code_are_read_straight_beside_others(tmp_path: Path, monkeypatch: Any) -> None:
    def net() -> Any:
        return nn.Sequential(nn.Linear(3, 2), Packed(), hooked(nn.Sequential(nn.Linear(2, 2)), pre=renamed), Extra(1))

    vt.save(tmp_path / "c", net())
    found, given = net(), []
    is_tensor_like = torch.overrides.is_tensor_like

    def spy(item: Any) -> bool:  # torch asks it of every value that it copies
        given.append(item)
        return is_tensor_like(item)

    monkeypatch.setattr(torch.overrides, "is_tensor_like", spy)
    vt.load_into(found, tmp_path / "c")
    own = {id(item): name for name, item in found.named_parameters()}
    assert [own.get(id(item)) for item in given] == ["0.weight", "0.bias", None, None, "3.weight", "3.bias"]


# --- the meta device, lazy modules, assign -----------------------------------------------------------------------


def test_a_module_on_the_meta_device(tmp_path: Path) -> None:
    vt.save(tmp_path / "c", touched("shared memory"))
    with torch.device("meta"):
        found = nn.Sequential(nn.Linear(3, 2))
    with pytest.raises(UsageError, match=r"meta device.*'0.weight', '0.bias'.*assign=True"):
        vt.load_into(found, {"0.weight": torch.ones(2, 3), "0.bias": torch.ones(2)})
    vt.load_into(found, {"0.weight": torch.ones(2, 3), "0.bias": torch.ones(2)}, assign=True)
    assert (found[0].weight == 1).all()
    with torch.device("meta"):
        found = Shares()
    vt.load_into(found, tmp_path / "c", assign=True, exclude=["head.weight", "again.*"])
    assert found.head.weight is found.embed.weight
    assert found.again is found.first
    expected = touched("shared memory").state_dict()
    assert facts(dict(found.state_dict())) == facts(dict(expected))
    with torch.device("meta"):
        found = Shares()
    found = found.to_empty(device="cpu")
    vt.load_into(found, tmp_path / "c")
    assert facts(dict(found.state_dict())) == facts(dict(expected))


@pytest.mark.parametrize("name", RUN_NO_CODE)
def test_any_module_on_the_meta_device(tmp_path: Path, name: str) -> None:
    if name in ("buffers", "lazy linear, initialised", "orthogonal", "averaged", "shared memory"):
        pytest.skip("cannot be made there, or tied in other ways")
    vt.save(tmp_path / "c", touched(name))
    expected, found = fresh(name).to("meta"), fresh(name).to("meta")
    expected.load_state_dict(vt.load(tmp_path / "c"), assign=True)
    vt.load_into(found, tmp_path / "c", assign=True)
    assert everything(found) == everything(expected)


def test_assign_keeps_requires_grad_and_shares_what_is_shared_in_the_source(tmp_path: Path) -> None:
    weight = torch.randn(4, 4)
    vt.save(tmp_path / "c", {"0.weight": weight, "1.weight": weight})

    def net() -> Any:
        return nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)).requires_grad_(False)

    expected, found = net(), net()
    expected.load_state_dict(vt.load(tmp_path / "c"), assign=True)
    vt.load_into(found, tmp_path / "c", assign=True)
    assert everything(found) == everything(expected)
    assert (expected[0].weight.data_ptr() == expected[1].weight.data_ptr()) is True
    assert found[0].weight.data_ptr() == found[1].weight.data_ptr()


def test_modules_that_replace_their_parameters_in_conversions() -> None:
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        source = touched("transformer")
        expected, found = fresh("transformer"), fresh("transformer")
        expected.load_state_dict(source.state_dict())
        vt.load_into(found, source.state_dict())
        assert everything(found) == everything(expected)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


# --- states of other versions, other names, other types ----------------------------------------------------------


def test_batch_normalisation_from_before_it_counted(tmp_path: Path) -> None:
    source = touched("batch norm")
    state = copied(source.state_dict())
    del state["1.num_batches_tracked"]
    with pytest.raises(RuntimeError, match="num_batches_tracked"):
        fresh("batch norm").load_state_dict(state)
    with pytest.raises(VariableMismatch, match="num_batches_tracked"):
        vt.load_into(fresh("batch norm"), state)
    del state._metadata
    vs.save(tmp_path / "c", dict(state))
    for old in (state, tmp_path / "c"):
        found = fresh("batch norm")
        found[1].num_batches_tracked.fill_(5)
        assert vt.load_into(found, old).kept == ("1.num_batches_tracked",)
        assert found[1].num_batches_tracked == 5
        assert torch.equal(found[1].running_mean, source[1].running_mean)


def test_names_that_a_hook_translates(tmp_path: Path) -> None:
    old = nn.utils.weight_norm(nn.Linear(3, 2))
    vt.save(tmp_path / "c", {"0": old})
    expected, found = ([parametrizations.weight_norm(nn.Linear(3, 2)), nn.Linear(3, 2)] for _ in range(2))
    nn.Sequential(*expected).load_state_dict({f"0.{k}": v for k, v in old.state_dict().items()}, strict=False)
    report = vt.load_into(nn.Sequential(*found), tmp_path / "c", rename={"0/": "0."}, strict=False)
    assert everything(found[0]) == everything(expected[0])
    assert set(report.loaded) == {"0.weight_g", "0.weight_v", "0.bias"}
    assert (report.kept, report.unused) == (("1.weight", "1.bias"), ())


def test_shapes_that_only_the_module_can_judge() -> None:
    module = nn.Sequential(Grows(2), nn.Linear(3, 2))
    state = {"0.seen": torch.arange(7.0), **{f"1.{k}": v for k, v in nn.Linear(3, 2).state_dict().items()}}
    vt.load_into(module, state)
    assert module[0].seen.tolist() == list(range(7))
    assert vt.load_into(module, {**state, "0.seen": torch.ones(9)}, on_mismatch="skip").mismatched[0].name == "0.seen"
    assert module[0].seen.tolist() == list(range(7))
    assert vt.load_into(module, {**state, "0.seen": torch.ones(4)}, on_mismatch="overlap").overlapped[0].copied == (4,)
    assert module[0].seen.tolist() == [1, 1, 1, 1, 4, 5, 6]
    before = module[1].weight.clone()
    with pytest.raises(VariableMismatch, match=r"\(4, 4\) -> \(2, 3\)"):
        vt.load_into(module, {**state, "0.seen": torch.zeros(1), "1.weight": torch.ones(4, 4)})
    assert module[0].seen.tolist() == [1, 1, 1, 1, 4, 5, 6]
    assert torch.equal(module[1].weight, before)


def test_types_of_what_a_hook_casts(tmp_path: Path) -> None:
    vt.save(tmp_path / "c", nn.Linear(3, 2).double())
    with pytest.raises(VariableMismatch, match=r"'weight', 'bias': float64 -> float32.*cast=True|(?s:.*)cast=True"):
        vt.load_into(hooked(nn.Linear(3, 2), save=in_half), tmp_path / "c")
    found = hooked(nn.Linear(3, 2), save=in_half)
    vt.load_into(found, tmp_path / "c", cast=True)
    assert torch.equal(found.weight, vt.load(tmp_path / "c")["weight"].float())


def test_quantised_modules_from_a_state_dict() -> None:
    def net() -> Any:
        return torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(3, 2), nn.ReLU()), {nn.Linear})

    source, found = net(), net()
    vt.load_into(found, source.state_dict())
    x = torch.randn(4, 3)
    assert torch.equal(found(x), source(x))


def test_variables_without_meta(tmp_path: Path) -> None:
    source = nn.Linear(3, 2)
    vs.save(tmp_path / "c", dict(source.state_dict()), manifest=False)
    for file in tmp_path.glob("c/*/meta"):
        file.unlink()
    for found in (nn.Linear(3, 2), hooked(nn.Linear(3, 2), pre=renamed)):
        vt.load_into(found, tmp_path / "c")
        assert torch.equal(found.weight, source.weight)


def test_extra_state_of_a_plain_checkpoint_and_of_variables(tmp_path: Path) -> None:
    state = {**nn.Linear(3, 2).state_dict(), "_extra_state": torch.tensor([3.0])}
    checkpoint = vs.save(tmp_path / "c", state)
    for source in (checkpoint, dict(checkpoint), checkpoint.select(), state):
        found = Extra()
        assert "_extra_state" in vt.load_into(found, source).loaded
        assert found.kept == ("set", state["_extra_state"])
    found = Extra()
    with pytest.raises(VariableMismatch, match="1 missing"):
        vt.load_into(found, tmp_path / "c", exclude="_extra_state")
    assert found.kept is None
    assert vt.load_into(found, tmp_path / "c", exclude="_extra_state", strict=False).kept == ("_extra_state",)
    assert found.kept is None
    with pytest.raises(VariableMismatch, match="1 unexpected"):
        vt.load_into(nn.Linear(3, 2), tmp_path / "c")


def test_what_is_not_a_tensor_where_one_belongs() -> None:
    state = {**nn.Linear(3, 2).state_dict(), "bias": 3, "epoch": 4}
    with pytest.raises(VariableMismatch, match="2 unexpected"):
        vt.load_into(nn.Linear(3, 2), state)
    assert vt.load_into(nn.Linear(3, 2), state, strict=False).unused == ("bias", "epoch")


# --- who says what is missing ------------------------------------------------------------------------------------


def test_a_hook_after_loading_may_forgive(tmp_path: Path) -> None:
    vs.save(tmp_path / "c", {"0.weight": np.ones((2, 3), np.float32), "0.more": np.ones(1)})

    def net(post: Any) -> Any:
        return nn.Sequential(hooked(nn.Linear(3, 2), post=post))

    found = net(forgiven)
    assert vt.load_into(found, tmp_path / "c").loaded == ("0.weight",)
    found = net(noted)
    with pytest.raises(VariableMismatch, match=r"(?s)1 missing, 1 unexpected.*has changed"):
        vt.load_into(found, tmp_path / "c")
    assert (found[0].weight == 1).all()
    assert found[0].sum_after
    report = vt.load_into(net(noted), tmp_path / "c", strict=False)
    assert (report.kept, report.unused) == (("0.bias",), ("0.more",))
    with pytest.raises(VariableMismatch, match="1 missing"):
        vt.load_into(net(noted), tmp_path / "c", strict=False, missing="error")


def test_missing_names_by_request(tmp_path: Path) -> None:
    vs.save(tmp_path / "c", {"weight": np.ones((2, 3), np.float32), "more": np.ones(1)})
    found = nn.Linear(3, 2)
    before = found.weight.clone()
    with pytest.raises(VariableMismatch, match="1 missing"):
        vt.load_into(found, tmp_path / "c", strict=False, missing="error")
    assert torch.equal(found.weight, before)
    report = vt.load_into(nn.Linear(3, 2, bias=False), tmp_path / "c", strict=False, missing="error")
    assert report.unexpected == ("more",)


def test_a_module_given_to_load_into_is_loaded_strictly(tmp_path: Path) -> None:
    vs.save(tmp_path / "c", {"0.weight": np.ones((2, 3), np.float32), "0.bias": np.ones(2, np.float32)})
    found = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    before = copied(found.state_dict())
    with pytest.raises(VariableMismatch, match="2 missing") as caught:
        vs.load_into(found, tmp_path / "c")
    assert caught.value.hint is not None
    assert (
        "pass missing='1.*' to let these targets keep their values, or strict=False to load only" in caught.value.hint
    )
    with pytest.raises(VariableMismatch, match=r"1 missing\n.*1\.weight"):
        vs.load_into(found, tmp_path / "c", missing="*.bias")
    assert all(torch.equal(found.state_dict()[name], before[name]) for name in before)
    for options in ({"missing": "1.*"}, {"strict": False}, {"missing": ["1.bias", "1.weight"]}):
        report = vs.load_into(found, tmp_path / "c", **options)
        assert (report.loaded, report.missing) == (("0.weight", "0.bias"), ("1.weight", "1.bias"))
        assert (found[0].weight == 1).all()


def test_all_that_is_wrong_is_told_at_once() -> None:
    state = {f"module.{name}": torch.ones(shape) for name, shape in {"0.weight": (3, 2), "0.bias": (2,)}.items()}
    found = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    with pytest.raises(VariableMismatch) as caught:
        vs.load_into(found, state)
    for part in ("module.0.weight", "rename={'module.': ''}", "(3, 2) -> (2, 3), transposed", "1.weight, 1.bias"):
        assert part in str(caught.value)
    assert "overlap" not in str(caught.value)
    report = vs.load_into(found, state, rename={"module.": ""}, missing="1.*", on_mismatch="skip")
    assert report.loaded == ("0.bias",)


def test_a_load_of_nothing_into_a_module_is_an_error(tmp_path: Path) -> None:
    vs.save(tmp_path / "c", {"other": np.ones(3)})
    with pytest.raises(VariableMismatch, match="nothing is loaded"):
        vs.load_into(nn.Linear(3, 2), tmp_path / "c", strict=False)
    with pytest.raises(VariableMismatch, match="nothing is loaded"):
        vt.load_into(nn.Linear(3, 2), {"weight": torch.ones(3, 3)}, strict=False, on_mismatch="skip")
    assert vs.load_into(nn.ReLU(), tmp_path / "c", strict=False).unexpected == ("other",)


def test_what_a_modules_own_code_raises_is_left_as_it_is() -> None:
    found = nn.Sequential(Packed())
    with pytest.raises(KeyError, match="weight"):
        vt.load_into(found, {"0.other": torch.ones(3)})
    with pytest.raises(VariableMismatch, match=r"refused the values(?s:.*)size mismatch"):
        vt.load_into(hooked(nn.Linear(3, 2), pre=renamed), {"weight": torch.ones(5), "bias": torch.ones(2)})


# --- tied parameters ---------------------------------------------------------------------------------------------


TIED = {
    "plain": Shares,
    "behind a hook": lambda: hooked(Shares(), pre=renamed),
    "beside extra state": lambda: nn.ModuleDict({"net": Shares(), "extra": Extra(1)})["net"],
}


@pytest.mark.parametrize("kind", ["checkpoint", "state dict"])
@pytest.mark.parametrize("where", TIED)
@pytest.mark.parametrize("assign", [False, True])
def test_different_values_for_tied_parameters(tmp_path: Path, kind: str, where: str, assign: bool) -> None:
    state = copied(TIED[where]().state_dict())
    state["embed.weight"] = torch.full((4, 3), 1.0)
    state["head.weight"] = torch.full((4, 3), 2.0)
    source = state if kind == "state dict" else vs.save(tmp_path / "c", dict(state))
    found = TIED[where]()
    before = facts(dict(found.state_dict()))
    with pytest.raises(VariableMismatch, match=r"'embed.weight' and 'head.weight'\n"):
        vt.load_into(found, source, assign=assign)
    assert facts(dict(found.state_dict())) == before
    for on_tied, value in (("first", 1), ("last", 2)):
        found = TIED[where]()
        vt.load_into(found, source, on_tied=on_tied, assign=assign)
        assert (found.embed.weight == value).all()
        assert found.head.weight is found.embed.weight
    with pytest.raises(UsageError, match="on_tied"):
        vt.load_into(found, source, on_tied="any")


@pytest.mark.parametrize("where", TIED)
def test_a_buffer_within_a_parameter(where: str) -> None:
    state = copied(TIED[where]().state_dict())
    state["row"] = torch.full((3,), 5.0)
    with pytest.raises(VariableMismatch, match="'row'"):
        vt.load_into(TIED[where](), state)
    state["row"] = state["first.weight"][1].clone()
    found = TIED[where]()
    vt.load_into(found, state)
    assert torch.equal(found.row, state["row"])


@pytest.mark.parametrize("where", TIED)
def test_one_of_two_names_is_enough(tmp_path: Path, where: str) -> None:
    state = dict(copied(TIED[where]().state_dict()))
    del state["embed.weight"], state["again.bias"]
    vs.save(tmp_path / "c", state)
    found = TIED[where]()
    assert vt.load_into(found, tmp_path / "c").kept == ()
    assert torch.equal(found.embed.weight, state["head.weight"])
    assert torch.equal(found.first.bias, state["first.bias"])


# --- nothing changes before all is compared ----------------------------------------------------------------------


class Everywhere(nn.Module):
    """Parts of all kinds: straight, conjugate, with hooks, packed, with extra state."""

    def __init__(self, fill: float) -> None:
        super().__init__()
        self.a = nn.Linear(3, 2)
        self.b = nn.Sequential(hooked(nn.Linear(3, 2), pre=renamed))
        self.c = Packed()
        self.d = Extra({"scale": torch.full((2,), fill)})
        self.register_buffer("e", torch.full((2,), fill + 0j).conj())
        self.f = nn.Linear(3, 2)


@pytest.mark.parametrize("damage", ["gone", "short", "a folder"])
@pytest.mark.parametrize("name", ["a.weight", "b.0.bias", "c.weight", "d._extra_state/scale", "e", "f.bias"])
def test_nothing_changes_if_a_file_is_wrong(tmp_path: Path, name: str, damage: str) -> None:
    checkpoint = vt.save(tmp_path / "c", Everywhere(1.0))
    out = Path(checkpoint[name].path) / "out"
    data = out.read_bytes()
    out.unlink()
    if damage == "short":
        out.write_bytes(data[:-1])
    elif damage == "a folder":
        out.mkdir()
    found = Everywhere(2.0)
    before = everything(found)
    with pytest.raises(FormatError):
        vt.load_into(found, tmp_path / "c")
    assert everything(found) == before


def test_damage_is_noticed_wherever_it_is(tmp_path: Path) -> None:
    checkpoint = vt.save(tmp_path / "c", Everywhere(1.0))
    for name in checkpoint:
        out = Path(checkpoint[name].path) / "out"
        data = out.read_bytes()
        out.chmod(0o644)
        out.write_bytes(bytes([data[0] ^ 1, *data[1:]]))
        with pytest.raises(DigestMismatch, match=name):
            vt.load_into(Everywhere(2.0), tmp_path / "c")
        out.write_bytes(data)
    vt.load_into(Everywhere(2.0), tmp_path / "c")


def test_progress_counts_all_bytes(tmp_path: Path) -> None:
    checkpoint, seen = vt.save(tmp_path / "c", Everywhere(1.0)), []
    vt.load_into(Everywhere(2.0), checkpoint, progress=lambda *now: seen.append(now))
    total = sum(variable.nbytes for name, variable in checkpoint.items() if "_extra_state" not in name)
    assert (seen[0], seen[-1]) == ((0, total), (total, total))


def calls_of(function: Callable[[], Any]) -> int:
    function()
    profile = cProfile.Profile()
    profile.runcall(function)
    return sum(entry.callcount for entry in profile.getstats())


def test_a_load_into_a_module_makes_few_more_calls_than_one_into_arrays(tmp_path: Path) -> None:
    """For each tensor, at most as many calls as the arrays' load again; the time of a load is that of its calls."""
    found = nn.Sequential(*[nn.Linear(8, 8) for _ in range(100)])
    vs.save(tmp_path / "c", found.state_dict(), durable=False)
    arrays = {name: np.zeros(tensor.shape, np.float32) for name, tensor in found.state_dict().items()}
    into_arrays = calls_of(lambda: vs.load_into(arrays, tmp_path / "c", threads=1))
    into_module = calls_of(lambda: vs.load_into(found, tmp_path / "c", threads=1))
    assert into_module <= 2 * into_arrays
