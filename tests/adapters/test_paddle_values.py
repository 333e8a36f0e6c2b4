"""Real tensors of Paddle, of dynamic and static graphs, given to `save` as they are. Skipped without Paddle."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from support import assert_same, check_checkpoint, run_python

import varstore as vs
from varstore.errors import UnsupportedDtype

paddle = pytest.importorskip("paddle")

TYPES = [
    *("bool", "uint8", "int8", "int16", "int32", "int64", "float16", "bfloat16", "float32", "float64"),
    *("complex64", "complex128", "float8_e4m3fn", "float8_e5m2"),
]


@pytest.mark.parametrize("name", TYPES)
def test_every_type_keeps_its_bits(tmp_path, name):
    if not hasattr(paddle, name):
        pytest.skip(f"Paddle {paddle.__version__} does not have the type")
    tensor = paddle.to_tensor([[0.0, 1.0, 0.5], [2.0, 4.0, 8.0]]).astype(name)
    vs.save(tmp_path / "c", {"plain": tensor, "tied": tensor, "python": 3})
    dtype = np.dtype(getattr(ml_dtypes, name, None) or name)
    values = tensor.numpy()
    expected = values if values.dtype == dtype else values.view(dtype)
    check_checkpoint(tmp_path / "c", {"plain": expected, "tied": expected, "python": np.asarray(3)})
    assert vs.load(tmp_path / "c")["plain"].astype("c16").real.reshape(-1).tolist()[:2] == [0, 1]


def test_a_layer_and_its_optimizer(tmp_path):
    layer = paddle.nn.Linear(3, 2)
    adam = paddle.optimizer.Adam(parameters=layer.parameters())
    layer(paddle.ones([4, 3])).sum().backward()
    adam.step()
    vs.save(tmp_path / "net", layer.state_dict())
    vs.save_state(tmp_path / "all", {"net": layer.state_dict(), "opt": adam.state_dict(), "epoch": 3})
    other = paddle.nn.Linear(3, 2)
    other.set_state_dict(vs.load(tmp_path / "net"))
    for name, values in layer.state_dict().items():
        assert_same(other.state_dict()[name].numpy(), values.numpy())
    loaded = vs.load_state(tmp_path / "all")
    assert loaded["epoch"] == 3
    assert set(loaded["opt"]) == set(adam.state_dict())


def test_a_tensor_of_a_static_program_without_values(tmp_path):
    tensor = paddle.base.core.LoDTensor() if hasattr(paddle.base.core, "LoDTensor") else paddle.base.core.DenseTensor()
    with pytest.raises(UnsupportedDtype, match="variable 'w': a tensor without values"):
        vs.save(tmp_path / "c", {"w": tensor})


STATIC = """
import sys, numpy as np, paddle
import varstore as vs
paddle.enable_static()
program, startup = paddle.static.Program(), paddle.static.Program()
with paddle.static.program_guard(program, startup):
    output = paddle.static.nn.fc(paddle.static.data("x", [None, 3]), 2)
executor = paddle.static.Executor()
executor.run(startup)
state = program.state_dict()
before = {name: np.array(tensor) for name, tensor in state.items()}
vs.save(sys.argv[1] + "/c", state)
vs.save_async(sys.argv[1] + "/d", state).wait()
assert vs.verify(sys.argv[1] + "/c")
for name in "cd":
    loaded = vs.load(f"{sys.argv[1]}/{name}")
    assert loaded.keys() == before.keys() and len(before) == 2
    assert all((loaded[name] == values).all() and values.dtype == "f4" for name, values in before.items())
if sys.argv[2] == "0":  # the other kind of program takes Paddle's own tensors only
    program.set_state_dict({name: values * 0 for name, values in loaded.items()})
    assert not any(np.array(tensor).any() for tensor in program.state_dict().values())
    program.set_state_dict(vs.load(sys.argv[1] + "/c"))
    assert all((np.array(tensor) == before[name]).all() for name, tensor in program.state_dict().items())
print("done")
"""


@pytest.mark.parametrize("pir", ["0", "1"])
def test_a_static_program(tmp_path, pir):
    if pir == "1" and paddle.__version__ < "3":
        pytest.skip("Paddle 2 does not make such programs")
    assert run_python(STATIC, tmp_path, pir, FLAGS_enable_pir_api=pir).stdout.endswith("done\n")


def losses(layer, optimizer, steps):
    found = []
    for step in steps:
        x = paddle.to_tensor(np.random.default_rng(step).normal(size=(8, 3)).astype("f4"))
        loss = (layer(x) - x.sum(axis=1, keepdim=True)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.clear_grad()
        found.append(float(loss))
    return found


def training():
    paddle.seed(0)
    layer = paddle.nn.Sequential(paddle.nn.Linear(3, 4), paddle.nn.ReLU(), paddle.nn.Linear(4, 1))
    return layer, paddle.optimizer.Adam(0.05, parameters=layer.parameters())


@pytest.mark.parametrize("way", ["state", "files", "prefix", "convert and back"])
def test_training_resumes_bit_for_bit(tmp_path, way):
    layer, adam = training()
    losses(layer, adam, range(5))
    vs.save_state(tmp_path / "all", {"net": layer.state_dict(), "opt": adam.state_dict()})
    paddle.save(layer.state_dict(), str(tmp_path / "run.pdparams"))
    paddle.save(adam.state_dict(), str(tmp_path / "run.pdopt"))
    expected = losses(layer, adam, range(5, 9))
    if way == "state":
        loaded = vs.load_state(tmp_path / "all")
        net, opt = loaded["net"], loaded["opt"]
    elif way == "files":
        net, opt = vs.load_state(tmp_path / "run.pdparams"), vs.load_state(tmp_path / "run.pdopt")
    elif way == "prefix":
        loaded = vs.read(tmp_path / "run").state()
        net, opt = loaded["model"], loaded["optimizer"]
    else:
        for end in ("pdparams", "pdopt"):
            vs.convert(tmp_path / f"run.{end}", tmp_path / end)
            vs.convert(tmp_path / end, tmp_path / f"again.{end}")
        net, opt = (paddle.load(str(tmp_path / f"again.{end}")) for end in ("pdparams", "pdopt"))
    other, again = training()
    names = {p.name: q.name for p, q in zip(layer.parameters(), other.parameters(), strict=True)}
    renamed = {}
    for key, value in opt.items():  # a second layer in one process has other names; a new process has the same
        old = next((name for name in names if key.startswith(name + "_")), None)
        renamed[key if old is None else names[old] + key.removeprefix(old)] = value
    other.set_state_dict(net)
    again.set_state_dict(renamed)
    assert losses(other, again, range(5, 9)) == expected


def test_a_translated_layer_is_saved_and_its_names_are_the_programs(tmp_path):
    layer, _ = training()
    spec = [paddle.static.InputSpec([None, 3], "float32", name="x")]
    paddle.jit.save(layer, str(tmp_path / "net"), input_spec=spec)
    translated = paddle.jit.load(str(tmp_path / "net"))
    vs.save(tmp_path / "c", translated.state_dict())
    found = sorted(value.tobytes() for value in vs.load(tmp_path / "c").values())
    assert found == sorted(value.numpy().tobytes() for value in layer.state_dict().values())
    read = vs.read(tmp_path / "net")  # the program's names are those of the parameters
    by_program = {parameter.name: parameter.numpy() for parameter in layer.parameters()}
    names = read.attributes["parameter_names"]
    for name, values in vs.load(tmp_path / "net").items():
        assert (values == by_program[names[name]]).all()
