"""Programs of Paddle with their variables: made by Paddle, trained on in varstore, and run again by Paddle."""

from __future__ import annotations

import os

import numpy as np
import pytest

import varstore as vs
from varstore.errors import VariableMismatch, VariableNotFound

paddle = pytest.importorskip("paddle")
pytestmark = pytest.mark.filterwarnings("ignore")
SUFFIX = ".json" if paddle.__version__.startswith("3") else ".pdmodel"
METHODS = SUFFIX == ".json"
"""Whether several methods are saved: the wheel of Paddle 2 leaves out the program of forward then."""
SPEC = [paddle.static.InputSpec([None, 784], "float32", name="image")]


class LinearNet(paddle.nn.Layer):
    """The layer of Paddle's guide, with two methods."""

    def __init__(self):
        super().__init__()
        self._linear = paddle.nn.Linear(784, 10)
        self._linear_2 = paddle.nn.Linear(784, 10)
        self.unused = paddle.nn.Linear(3, 3)

    def forward(self, x):
        """Return the scores of images."""
        return self._linear(x)

    def another_forward(self, x):
        """Return other scores."""
        return self._linear_2(x)


def saved(prefix):
    """Return a layer that was saved with its methods."""
    layer = LinearNet()
    layer.eval()
    if METHODS:
        for name in ("forward", "another_forward"):
            setattr(layer, name, paddle.jit.to_static(getattr(layer, name), input_spec=SPEC, full_graph=True))
    paddle.jit.save(layer, str(prefix), **({} if METHODS else {"input_spec": SPEC}))
    return layer


def predicted(prefix, x, file=None):
    from paddle import inference

    predictor = inference.create_predictor(inference.Config(f"{prefix}{SUFFIX}", f"{prefix}.pdiparams"))
    if file is not None:  # what the entry says is what Paddle itself says
        for kind, names in (("inputs", predictor.get_input_names()), ("outputs", predictor.get_output_names())):
            assert [port["name"] for port in file.attributes[kind]] == names
    predictor.get_input_handle(predictor.get_input_names()[0]).copy_from_cpu(x)
    predictor.run()
    return predictor.get_output_handle(predictor.get_output_names()[0]).copy_to_cpu()


def test_a_layer_with_two_methods_runs_with_the_values_of_its_checkpoints(tmp_path):
    layer = saved(tmp_path / "net")
    graphs = {"forward": tmp_path / f"net{SUFFIX}"}
    if METHODS:
        graphs["another_forward"] = tmp_path / f"net.another_forward{SUFFIX}"
    first = vs.bundle(tmp_path / "run/step-0", layer.state_dict(), graphs=graphs, include_only_used=True)
    parts = ("_linear", "_linear_2")[: len(graphs)]
    assert set(first) == {f"{part}.{name}" for part in parts for name in ("weight", "bias")}
    assert {file.attributes.get("entry") for file in first.files.values()} >= set(graphs)
    changed = {name: variable.numpy() for name, variable in first.items()}
    for part in parts:
        changed[f"{part}.bias"] += 1
    with vs.CheckpointManager(tmp_path / "run") as manager:
        manager.save(1, changed, graphs_from=first)
        with pytest.raises(VariableMismatch, match=r"_linear\.bias"):
            manager.save(2, {**changed, "_linear.bias": np.zeros(11, np.float32)}, graphs_from=first)
    assert os.path.samefile(first.files[f"net{SUFFIX}"].path, tmp_path / f"run/step-1/net{SUFFIX}")
    x = np.random.default_rng(1).standard_normal((2, 784)).astype(np.float32)
    for step, new in ((0, 0), (1, 1)):
        (tmp_path / f"out{step}").mkdir()
        prefix = tmp_path / f"out{step}/net"
        written = vs.export(tmp_path / f"run/step-{step}", prefix)
        assert set(map(os.path.basename, written)) == {
            path.name for path in tmp_path.glob("net*") if path.suffix != ".info" or SUFFIX == ".pdmodel"
        }
        expected = layer._linear(paddle.to_tensor(x)).numpy() + new
        loaded = paddle.jit.load(str(prefix))
        np.testing.assert_allclose(loaded(paddle.to_tensor(x)).numpy(), expected, atol=1e-5)
        if METHODS:
            another = layer._linear_2(paddle.to_tensor(x)).numpy() + new
            np.testing.assert_allclose(loaded.another_forward(paddle.to_tensor(x)).numpy(), another, atol=1e-5)
        np.testing.assert_allclose(predicted(prefix, x, first.files[f"net{SUFFIX}"]), expected, atol=1e-5)
        (port,) = first.files[f"net{SUFFIX}"].attributes["inputs"]
        assert port == {"name": "image", "type": "float32", "shape": [None, 784]}
    for path in tmp_path.glob("net*"):
        assert (tmp_path / "out0" / path.name).read_bytes() == path.read_bytes()


def test_a_pruned_program_of_static_mode_runs_with_new_values(tmp_path):
    paddle.enable_static()
    try:
        main, startup = paddle.static.Program(), paddle.static.Program()
        with paddle.static.program_guard(main, startup):
            image = paddle.static.data("img", [None, 64], "float32")
            label = paddle.static.data("label", [None, 1], "int64")
            hidden = paddle.static.nn.fc(image, 32, name="hidden")
            predict = paddle.static.nn.fc(hidden, 10, name="predict")
            side = paddle.static.nn.fc(hidden, 10, name="side")
            loss = paddle.mean(paddle.nn.functional.cross_entropy(predict + side, label))
            paddle.optimizer.Adam(0.1).minimize(loss)
        executor = paddle.static.Executor(paddle.CPUPlace())
        executor.run(startup)
        prefix = str(tmp_path / "pruned")
        paddle.static.save_inference_model(prefix, [image], [predict], executor, program=main)
        values = {name: array.numpy() for name, array in vs.read(prefix).items()}
        assert not any("side" in name for name in values)
        state = {**values, "side.w_0": np.zeros((32, 10), np.float32), "moment": np.zeros(3)}
        values = {name: array + 0.5 for name, array in values.items()}
        first = vs.bundle(tmp_path / "c", state, graphs={"forward": f"{prefix}{SUFFIX}"}, include_only_used=True)
        assert set(first) == set(values)
        second = vs.bundle(tmp_path / "d", values, graphs=first)
        x = np.random.default_rng(2).standard_normal((3, 64)).astype(np.float32)
        for checkpoint, shift in ((first, 0), (second, 0.5)):
            out = str(tmp_path / f"out-{shift}/net")
            os.mkdir(os.path.dirname(out))
            vs.export(checkpoint, out)
            program, feeds, fetches = paddle.static.load_inference_model(out, executor)
            (found,) = executor.run(program, feed={feeds[0]: x}, fetch_list=fetches)
            weights = {name: variable.numpy() for name, variable in checkpoint.items()}
            layers = [
                [next(w for n, w in weights.items() if part in n and w.ndim == rank) for rank in (2, 1)]
                for part in ("hidden", "predict")
            ]
            (w1, b1), (w2, b2) = layers
            np.testing.assert_allclose(found, (x @ w1 + b1) @ w2 + b2, rtol=1e-4, atol=1e-4)
            np.testing.assert_allclose(predicted(out, x, first.files[f"pruned{SUFFIX}"]), found, rtol=1e-5)
            (port,) = first.files[f"pruned{SUFFIX}"].attributes["outputs"]
            assert (port["type"], port["shape"]) == ("float32", [None, 10])
    finally:
        paddle.disable_static()


def test_a_program_needs_all_its_parameters(tmp_path):
    layer = saved(tmp_path / "net")
    values = {name: tensor.numpy() for name, tensor in layer.state_dict().items()}
    (tmp_path / "alone").mkdir()
    (tmp_path / f"net{SUFFIX}").rename(tmp_path / f"alone/net{SUFFIX}")
    graphs = {"forward": tmp_path / f"alone/net{SUFFIX}"}
    with pytest.raises(VariableNotFound, match="rename="):
        vs.bundle(tmp_path / "c", values, graphs=graphs)
    names = {name: tensor.name for name, tensor in layer.state_dict().items()}
    checkpoint = vs.bundle(tmp_path / "c", values, graphs=graphs, rename=names)
    assert checkpoint.files[f"net{SUFFIX}"].attributes["bindings"][names["_linear.bias"]]["variable"] == "_linear.bias"
