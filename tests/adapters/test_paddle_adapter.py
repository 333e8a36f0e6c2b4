"""Layers, optimizers and `paddle.Model` itself: saved, loaded in place, and resumed bit for bit."""

from __future__ import annotations

import contextlib
import sys
import time
import types

import ml_dtypes
import numpy as np
import pytest
from support import run_python

import varstore as vs
from varstore.errors import UnsupportedDtype, UsageError, VariableMismatch, VariableNotFound
from varstore.values.nodes import leaves

paddle = pytest.importorskip("paddle")
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{text}")  # of Paddle's own code
    for text in ("When training, we now always track", "To copy construct from a tensor")
]

from varstore.adapters.paddle import VarstoreCallback, load, load_into, save  # noqa: E402


def network():
    return paddle.nn.Sequential(paddle.nn.Linear(3, 4), paddle.nn.BatchNorm1D(4), paddle.nn.Linear(4, 1))


OPTIMIZERS = {
    "sgd": lambda net: paddle.optimizer.SGD(0.05, parameters=net.parameters()),
    "momentum": lambda net: paddle.optimizer.Momentum(0.05, parameters=net.parameters()),
    "adamw": lambda net: paddle.optimizer.AdamW(0.05, parameters=net.parameters()),
    "scheduler": lambda net: paddle.optimizer.Adam(
        paddle.optimizer.lr.StepDecay(0.05, step_size=2), parameters=net.parameters()
    ),
    "groups": lambda net: paddle.optimizer.Adam(
        0.05, parameters=[{"params": net[0].parameters()}, {"params": net[2].parameters(), "learning_rate": 0.1}]
    ),
}


def losses(net, optimizer, steps):
    found = []
    for step in steps:
        x = paddle.to_tensor(np.random.default_rng(step).normal(size=(8, 3)).astype("f4"))
        loss = (net(x) - x.sum(axis=1, keepdim=True)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.clear_grad()
        if isinstance(optimizer._learning_rate, paddle.optimizer.lr.LRScheduler):
            optimizer._learning_rate.step()
        found.append(float(loss))
    return found


def same(one, other):
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all((one[name].numpy() == other[name].numpy()).all() for name in one)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("has_stepped", [False, True])
@pytest.mark.parametrize("source", ["checkpoint", "pair", "converted"])
def test_training_resumes_bit_for_bit_in_a_layer_with_other_names(tmp_path, name, has_stepped, source):
    if name == "sgd" and source != "checkpoint":
        pytest.skip("Paddle writes no .pdopt without state")
    net = network()
    optimizer = OPTIMIZERS[name](net)
    losses(net, optimizer, range(4))
    if source == "checkpoint":
        path = save(tmp_path / "run", {"model": net, "optimizer": optimizer, "epoch": 3}).path
    else:
        paddle.save(net.state_dict(), str(tmp_path / "run.pdparams"))
        paddle.save(optimizer.state_dict(), str(tmp_path / "run.pdopt"))
        path = tmp_path / "run"
        if source == "converted":
            vs.convert(path, tmp_path / "converted")
            path = tmp_path / "converted"
    expected = losses(net, optimizer, range(4, 8))
    other = network()
    again = OPTIMIZERS[name](other)
    assert {p.name for p in other.parameters()}.isdisjoint(p.name for p in net.parameters())
    if has_stepped:
        losses(other, again, range(9, 12))
    assert load_into(other, path, include="model/*", rename={"model/": ""}).loaded == tuple(net.state_dict())
    if name == "sgd":
        load_into(again, load(path)["optimizer"], layer=other)
    else:
        report = load_into(again, path, layer=other)
        assert len(report.loaded) == len([v for v in optimizer.state_dict().values() if isinstance(v, paddle.Tensor)])
    assert losses(other, again, range(4, 8)) == expected


@pytest.mark.parametrize("has_stepped", [False, True])
def test_a_second_optimizer_of_the_same_parameters(tmp_path, has_stepped):
    """Its tensors have other numbers in Paddle, whose own call fails at the next step, or finds nothing."""
    net = network()
    first = OPTIMIZERS["adamw"](net)
    losses(net, first, range(3))
    save(tmp_path / "run", {"model": net, "optimizer": first})
    expected = losses(net, first, range(3, 6))
    second = OPTIMIZERS["adamw"](net)
    if has_stepped:
        losses(net, second, range(6, 8))
    load_into(net, tmp_path / "run", include="model/*", rename={"model/": ""})
    load_into(second, tmp_path / "run")
    assert losses(net, second, range(3, 6)) == expected


def test_a_state_that_was_loaded_and_not_used_yet_is_saved(tmp_path):
    net = network()
    adam = OPTIMIZERS["adamw"](net)
    losses(net, adam, range(3))
    save(tmp_path / "run", {"model": net, "optimizer": adam})
    expected = losses(net, adam, range(3, 6))
    for at, source in (("again", "run"), ("third", "again")):
        other = network()
        again = OPTIMIZERS["adamw"](other)
        load_into(other, tmp_path / source, include="model/*", rename={"model/": ""})
        load_into(again, tmp_path / source, layer=other)
        save(tmp_path / at, {"model": other, "optimizer": again})
    assert losses(other, again, range(3, 6)) == expected


@pytest.mark.parametrize("names", [None, 3, ["x"], {"model/0.weight": ["x"]}])
def test_names_that_are_none_are_no_names(tmp_path, names):
    net = network()
    adam = OPTIMIZERS["adamw"](net)
    losses(net, adam, range(2))
    save(tmp_path / "run", {"model": net, "optimizer": adam}, attributes={"parameter_names": names})
    load_into(adam, tmp_path / "run", layer=net)
    with pytest.raises(VariableMismatch, match="missing"):
        load_into(net, tmp_path / "run", include="model/*", use_structured_name=False)


def test_the_face_loads_layers_and_optimizers(tmp_path):
    net = network()
    optimizer = OPTIMIZERS["adamw"](net)
    losses(net, optimizer, range(3))
    save(tmp_path / "run", {"model": net, "optimizer": optimizer})
    expected = losses(net, optimizer, range(3, 6))
    report = vs.load_into(net, tmp_path / "run", include="model/*", rename={"model/": ""})
    assert "Sequential: 8 of 8 loaded" in str(report)
    vs.load_into(optimizer, tmp_path / "run")
    assert losses(net, optimizer, range(3, 6)) == expected


def test_a_state_that_is_not_the_optimizers_is_refused_before_anything_changes(tmp_path):
    net, other = network(), network()
    adam, momentum = OPTIMIZERS["adamw"](net), OPTIMIZERS["momentum"](other)
    losses(net, adam, range(2))
    save(tmp_path / "adam", {"model": net, "optimizer": adam})
    with pytest.raises(UsageError, match="not the state of one optimizer"):
        load_into(momentum, tmp_path / "adam")
    with pytest.raises(VariableMismatch, match="the optimizer does not have it"):
        load_into(momentum, load(tmp_path / "adam")["optimizer"])
    losses(other, momentum, range(2))
    before = {name: value.numpy() for name, value in momentum.state_dict().items()}
    with pytest.raises(VariableMismatch, match="velocity_0: not in the state"):
        load_into(momentum, tmp_path / "adam", layer=other)
    assert all((value.numpy() == before[name]).all() for name, value in momentum.state_dict().items())
    scheduled = OPTIMIZERS["scheduler"](net)
    with pytest.raises(VariableMismatch, match="LR_Scheduler: not in the state"):
        load_into(scheduled, tmp_path / "adam")
    losses(net, scheduled, range(2))
    save(tmp_path / "scheduled", scheduled)
    assert load_into(OPTIMIZERS["adamw"](net), load(tmp_path / "scheduled")).unused == ("LR_Scheduler",)
    for option in ({"include": "optimizer/*"}, {"strict": False}, {"missing": "*"}, {"cast": True}):
        with pytest.raises(
            UsageError, match=f"{next(iter(option))}: the state of an optimizer can only be loaded whole"
        ):
            load_into(adam, tmp_path / "adam", **option)
    with pytest.raises(UsageError, match="not a layer or an optimizer"):
        load_into({}, tmp_path / "adam")


def test_a_layer_is_compared_before_it_changes(tmp_path):
    net = network()
    state = {name: np.asarray(value.numpy()) for name, value in net.state_dict().items()}
    vs.save(tmp_path / "wider", {**state, "0.bias": np.zeros(5, np.float32), "2.weight": state["2.weight"] + 1})
    with pytest.raises(VariableMismatch, match=r"'0.bias': \(5,\) -> \(4,\)"):
        load_into(net, tmp_path / "wider")
    assert (net[2].weight.numpy() == state["2.weight"]).all()
    with pytest.raises(VariableMismatch, match="missing"):
        load_into(net, {"0.bias": state["0.bias"]})
    with pytest.raises(VariableMismatch, match="unexpected"):
        load_into(net, {**state, "more": state["0.bias"]})
    report = load_into(net, tmp_path / "wider", on_mismatch="overlap")
    assert [item.name for item in report.overlapped] == ["0.bias"]
    assert (net[2].weight.numpy() == state["2.weight"] + 1).all()
    report = load_into(net, {"0.bias": np.ones(4), "more": np.ones(4)}, strict=False, cast=True)
    assert report.unused == ("more",)
    assert (net[0].bias.numpy() == 1).all()
    with pytest.raises(VariableNotFound):
        load_into(net, state, include="encoder*")


def test_tied_parameters_stay_tied(tmp_path):
    first, second = paddle.nn.Linear(3, 3), paddle.nn.Linear(3, 3)
    second.weight = first.weight
    net = paddle.nn.Sequential(first, second)
    state = {name: np.asarray(value.numpy()) for name, value in net.state_dict().items()}
    with pytest.raises(VariableMismatch, match="different values"):
        load_into(net, {**state, "1.weight": state["1.weight"] + 1})
    load_into(net, {**state, "1.weight": state["1.weight"] + 1}, on_tied="last")
    assert net[0].weight is net[1].weight
    assert (net[0].weight.numpy() == state["0.weight"] + 1).all()
    save(tmp_path / "net", net)
    assert len(load_into(net, tmp_path / "net", use_structured_name=False).loaded) == 3


def test_names_of_parameters_that_are_not_unique_are_refused(tmp_path):
    with paddle.utils.unique_name.guard():
        first = paddle.nn.Linear(3, 3)
    with paddle.utils.unique_name.guard():
        second = paddle.nn.Linear(3, 3)
    both = paddle.nn.Sequential(first, second)
    save(tmp_path / "both", both)
    with pytest.raises(VariableMismatch, match=r"linear_0\.w_0: 0\.weight and 1\.weight"):
        load_into(first, tmp_path / "both", use_structured_name=False)
    before = first.weight.numpy()
    assert load_into(first, tmp_path / "both", use_structured_name=False, include="0.*").loaded
    save(tmp_path / "one", second)
    with pytest.raises(UsageError, match="two parameters of the layer have one name"):
        load_into(both, tmp_path / "one", use_structured_name=False)
    assert (first.weight.numpy() == before).all()


@pytest.mark.parametrize("name", ["float16", "bfloat16", "float64", "int64", "uint8", "bool", "float8_e4m3fn"])
def test_types_of_parameters_keep_their_bits(tmp_path, name):
    if not hasattr(paddle, name):
        pytest.skip(f"Paddle {paddle.__version__} does not have the type")
    dtype = np.dtype(getattr(ml_dtypes, name, name))
    values = np.array([[0, 1, 2], [0.5, -1, 240]]).astype(dtype)
    layer = paddle.nn.Layer()
    layer.register_buffer("b", paddle.zeros([2, 3]).astype(name))
    vs.save(tmp_path / "c", {"b": values, "scalar": np.asarray(1).astype(dtype)})
    load_into(layer, tmp_path / "c", include="b")
    save(tmp_path / "again", layer)
    assert vs.load(tmp_path / "again")["b"].tobytes() == values.tobytes()
    tensors = load(tmp_path / "c")
    assert all(isinstance(tensor, paddle.Tensor) for tensor in tensors.values())
    assert list(tensors["scalar"].shape) == []
    vs.save(tmp_path / "tensors", tensors)
    assert vs.load(tmp_path / "tensors")["b"].tobytes() == values.tobytes()


@pytest.mark.parametrize("name", ["uint16", "uint32", "uint64", "float8_e8m0fnu"])
def test_a_type_that_paddle_does_not_have_is_named(tmp_path, name):
    vs.save(tmp_path / "c", {"w": np.ones(2, getattr(ml_dtypes, name, name))})
    with pytest.raises(UnsupportedDtype, match=name):
        load(tmp_path / "c")


def mixed(kind):
    net = paddle.nn.Linear(3, 2)
    net.to(dtype="bfloat16")
    return net, getattr(paddle.optimizer, kind)(0.05, parameters=net.parameters(), multi_precision=True)


def step(net, optimizer, steps):
    """Make steps; where Paddle has no kernel for the CPU, make only the state that a step makes first."""
    if isinstance(optimizer, paddle.optimizer.Adam):
        optimizer.helper = paddle.base.layer_helper.LayerHelper("Adam")
        optimizer._create_accumulators(paddle.static.default_main_program().global_block(), net.parameters())
        return [value.numpy().tolist() for _, value in leaves(optimizer.state_dict())]
    for step in steps:
        for parameter in net.parameters():
            values = np.random.default_rng(step).normal(size=parameter.shape).astype("f4")
            parameter.grad = paddle.to_tensor(values).astype("bfloat16")
        optimizer.step()
    return [parameter.astype("float32").numpy().tolist() for parameter in net.parameters()]


@pytest.mark.parametrize("kind", ["SGD", "Adam"])
@pytest.mark.parametrize("way", ["load_into", "load", "pair", "converted"])
def test_master_weights_of_mixed_precision_are_found_again(tmp_path, kind, way):
    with paddle.utils.unique_name.guard():
        net, optimizer = mixed(kind)
        step(net, optimizer, range(3))
    for name, value in optimizer.state_dict().items():
        if name != "master_weights":
            value.set_value(paddle.full_like(value, 0.25))
    save(tmp_path / "run", {"model": net, "optimizer": optimizer})
    paddle.save(optimizer.state_dict(), str(tmp_path / "run.pdopt"))
    paddle.save(net.state_dict(), str(tmp_path / "run.pdparams"))
    names = {key: value.name for key, value in optimizer.state_dict()["master_weights"].items()}
    expected = step(net, optimizer, range(3, 6))
    has_same_names = way in ("load", "converted")  # as in another process
    with paddle.utils.unique_name.guard() if has_same_names else contextlib.nullcontext():
        other, again = mixed(kind)
        load_into(other, tmp_path / "run", include="model/*", rename={"model/": ""})
        if not has_same_names:
            load_into(again, tmp_path / "run" if way == "load_into" else vs.read(tmp_path / "run"), layer=other)
        else:
            if way == "load":
                state = load(tmp_path / "run")["optimizer"]
            else:
                vs.convert(tmp_path / "run.pdopt", tmp_path / "opt")
                vs.convert(tmp_path / "opt", tmp_path / "again.pdopt")
                state = paddle.load(str(tmp_path / "again.pdopt"))
            assert {key: value.name for key, value in state["master_weights"].items()} == names
            again.set_state_dict(state)
        assert step(other, again, range(3, 6)) == expected


class Dataset(paddle.io.Dataset):
    def __getitem__(self, index):
        x = np.random.default_rng(index).normal(size=3).astype("f4")
        return x, x.sum(keepdims=True)

    def __len__(self):
        return 24


def prepared(scheduler=False):
    paddle.seed(0)
    net = network()
    model = paddle.Model(net)
    model.prepare(OPTIMIZERS["scheduler" if scheduler else "adamw"](net), paddle.nn.MSELoss())
    return model


def fit(model, epochs, *callbacks):
    model.fit(Dataset(), batch_size=8, shuffle=False, epochs=epochs, verbose=0, callbacks=list(callbacks))


class Stop(paddle.callbacks.Callback):
    def __init__(self, after):
        super().__init__()
        self.after = after

    def on_train_batch_begin(self, step, logs=None):
        if not self.after:
            raise KeyboardInterrupt
        self.after -= 1


@pytest.mark.parametrize("scheduler", [False, True])
def test_fit_resumes_bit_for_bit(tmp_path, scheduler):
    whole = prepared(scheduler)
    fit(whole, 5)
    keeper = VarstoreCallback(vs.CheckpointManager(tmp_path / "run", keep=vs.Latest(2)))
    assert keeper.resume(prepared(scheduler)) == 0
    with pytest.raises(KeyboardInterrupt):
        fit(prepared(scheduler), 5, keeper, Stop(after=10))  # in the fourth epoch
    keeper = VarstoreCallback(vs.CheckpointManager(tmp_path / "run", keep=vs.Latest(2)))
    resumed = prepared(scheduler)
    assert keeper.resume(resumed) == 3
    fit(resumed, 5 - 3, keeper)
    assert same(resumed.network, whole.network)
    assert [saved.step for saved in keeper.manager.all()] == [4, 5]
    if scheduler:
        assert resumed._optimizer.get_lr() == whole._optimizer.get_lr() != 0.05


def test_a_run_with_mixed_precision_resumes_without_it_and_not_without_an_optimizer(tmp_path):
    keeper = VarstoreCallback(vs.CheckpointManager(tmp_path / "run"))
    fit(prepared(), 1, keeper)
    state = load(keeper.manager.latest())
    names = vs.open(keeper.manager.latest()).attributes["parameter_names"]
    keeper.manager.save(2, {**state, "scaler": {"scale": 2.0}}, attributes={"parameter_names": names})
    assert keeper.resume(prepared()) == 1
    with pytest.raises(UsageError, match="not prepared"):
        keeper.resume(paddle.Model(network()))


def test_fit_saves_batches_and_metrics(tmp_path):
    manager = vs.CheckpointManager(tmp_path / "run", save_when=vs.EverySteps(2), background=True)
    keeper = VarstoreCallback(manager, each="batch")
    model = prepared(scheduler=True)
    model.fit(Dataset(), Dataset(), batch_size=8, epochs=2, verbose=0, shuffle=False, callbacks=[keeper])
    assert [saved.step for saved in manager.all()] == [2, 4, 6]
    assert [sorted(saved.metrics) for saved in manager.all()] == [[], [], ["loss"]]
    state = load(manager.all()[0])
    assert state["done"] == {"epoch": 0, "batch": 2}
    assert state["optimizer"]["LR_Scheduler"]["last_epoch"] == 2
    keeper = VarstoreCallback(vs.CheckpointManager(tmp_path / "epochs"))
    model.fit(Dataset(), Dataset(), batch_size=8, epochs=2, verbose=0, callbacks=[keeper])
    assert all(saved.metrics.keys() == {"loss"} for saved in keeper.manager.all())
    vs.CheckpointManager(tmp_path / "other").save(1, {"w": np.ones(2)})
    with pytest.raises(UsageError, match="did not save this checkpoint"):
        VarstoreCallback(vs.CheckpointManager(tmp_path / "other")).resume(model)
    with pytest.raises(UsageError, match="each"):
        VarstoreCallback(manager, each="step")


TRANSLATED = """
import sys, numpy as np, paddle
import varstore as vs
from varstore.adapters.paddle import load_into, save
at = sys.argv[1]
net = paddle.nn.Sequential(paddle.nn.Linear(3, 4), paddle.nn.BatchNorm1D(4), paddle.nn.Linear(4, 1))
net.eval()
paddle.jit.save(net, at + "/net", input_spec=[paddle.static.InputSpec([None, 3], "float32", name="x")])
translated = paddle.jit.load(at + "/net")
save(at + "/c", translated)
assert vs.open(at + "/c").names[0].startswith("param_"), vs.open(at + "/c").names
expected = {name: np.array(value.numpy()) for name, value in net.state_dict().items()}
for source in (at + "/c", at + "/net"):  # what was saved of the layer, and the files of its program
    for value in net.state_dict().values():
        value.set_value(value * 0)
    report = load_into(net, source, use_structured_name=False)
    assert len(report.loaded) == 8 and all((net.state_dict()[n].numpy() == v).all() for n, v in expected.items())
for value in translated.state_dict().values():
    value.set_value(value * 0)
assert load_into(translated, at + "/c").kept == ()
x = paddle.ones([2, 3])
assert (translated(x).numpy() == net(x).numpy()).all()
print("done")
"""


@pytest.mark.parametrize("pir", ["0", "1"])
def test_the_names_of_a_translated_layer_are_mapped_by_its_program(tmp_path, pir):
    if pir == "1" and paddle.__version__ < "3":
        pytest.skip("Paddle 2 does not make such programs")
    assert run_python(TRANSLATED, tmp_path, pir, FLAGS_enable_pir_api=pir).stdout.endswith("done\n")


def test_names_of_many_parameters_are_found_in_linear_time():
    adapter = sys.modules["varstore.adapters.paddle.optimizers"]
    names = {f"linear_{number}.w_0" for number in range(20_000)} | {"a", "a_b", ""}
    group = [types.SimpleNamespace(name=name) for name in names]
    optimizer = types.SimpleNamespace(_parameter_list=[*group[:3], {"params": group[3:]}])
    owner = adapter._Beginnings(optimizer).owner
    assert [owner(key) for key in ("a_b_c", "a_bc", "a", "b_a", 3, "", "_")] == ["a_b", "a"] + ["a"] + [""] * 4
    known = {f"net/{name}": name for name in names} | {"_" * 100_000: "x"}

    class Layer:
        def state_dict(self, **_):
            return {name: types.SimpleNamespace(name=f"new_{name}") for name in names if name}

    start = time.perf_counter()
    keys = [f"{name}_moment1_0" for name in names]
    assert {owner(key) for key in keys} == names
    assert owner("_" * 1_000_000) == ""
    assert len(adapter.moved_names(Layer(), known)) == len(names) - 1
    assert time.perf_counter() - start < 10
