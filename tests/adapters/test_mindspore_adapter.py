"""MindSpore itself: training with the callback, Parameters from checkpoints, and training that resumes bit for bit."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

mindspore = pytest.importorskip("mindspore")

from mindspore import nn  # noqa: E402
from mindspore.train import CheckpointConfig, Model  # noqa: E402

import varstore as vs  # noqa: E402
from varstore.adapters.mindspore import ModelCheckpoint, load_checkpoint  # noqa: E402

ROWS = json.loads((Path(__file__).parents[1] / "data/mindspore/model_checkpoint_names.json").read_text())["rows"]


def network():
    mindspore.set_seed(0)
    return nn.SequentialCell(nn.Dense(3, 4), nn.ReLU(), nn.Dense(4, 1))


def data(batches):
    rng = np.random.default_rng(0)
    rows = [(rng.normal(size=3).astype("f4"), rng.normal(size=1).astype("f4")) for _ in range(batches * 2)]
    return mindspore.dataset.GeneratorDataset(rows, ["x", "y"], shuffle=False).batch(2)


def train(callback, epochs=2, batches=3, net=None):
    net = net or network()
    optimizer = nn.Momentum(net.trainable_params(), learning_rate=0.1, momentum=0.9)
    model = Model(net, nn.MSELoss(), optimizer)
    model.train(epochs, data(batches), callbacks=callback, dataset_sink_mode=False)
    return net, optimizer


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("most", [1, 3])
def test_it_saves_what_the_real_one_saves(tmp_path, steps, most):
    for run in range(2):
        settings = {"save_checkpoint_steps": steps, "keep_checkpoint_max": most}
        train(ModelCheckpoint("net", tmp_path / "ours", vs.CheckpointConfig(**settings)), epochs=2 + run)
        real = mindspore.train.ModelCheckpoint("net", str(tmp_path / "theirs"), CheckpointConfig(**settings))
        train(real, epochs=2 + run)
        theirs = [name.removesuffix(".ckpt") for name in os.listdir(tmp_path / "theirs") if name.endswith(".ckpt")]
        assert sorted(os.listdir(tmp_path / "ours")) == sorted(theirs)
        for name in theirs:
            expected = mindspore.load_checkpoint(str(tmp_path / "theirs" / f"{name}.ckpt"))
            found = load_checkpoint(tmp_path / "ours" / name)
            assert set(found) == set(expected)
            for key, parameter in expected.items():
                assert type(found[key]) is type(parameter)
                assert (found[key].asnumpy() == parameter.asnumpy()).all(), key


def test_the_real_configuration_is_taken(tmp_path):
    callback = ModelCheckpoint("net", tmp_path, CheckpointConfig(save_checkpoint_steps=2, keep_checkpoint_max=2))
    train(callback, epochs=1, batches=5)
    assert sorted(os.listdir(tmp_path)) == ["net-1_4", "net-1_5"]
    assert callback.latest_ckpt_file_name == str(tmp_path / "net-1_5")
    with pytest.raises(vs.errors.UsageError, match="enc_key"):
        ModelCheckpoint("net", tmp_path, CheckpointConfig(enc_key=b"0123456789abcdef"))
    with pytest.raises(vs.errors.UsageError, match="dict"):
        ModelCheckpoint("net", tmp_path, {})


@pytest.mark.parametrize("kind", ["checkpoint", "ckpt"])
def test_the_real_load_param_into_net_takes_what_is_loaded(tmp_path, kind):
    net = network()
    if kind == "ckpt":
        mindspore.save_checkpoint(net, str(tmp_path / "c.ckpt"))
        path = tmp_path / "c.ckpt"
    else:
        path = vs.save(tmp_path / "c", {parameter.name: parameter for parameter in net.get_parameters()}).path
    other = nn.SequentialCell(nn.Dense(3, 4), nn.ReLU(), nn.Dense(4, 1))
    assert mindspore.load_param_into_net(other, load_checkpoint(path), strict_load=True) == ([], [])
    third = nn.SequentialCell(nn.Dense(3, 4), nn.ReLU(), nn.Dense(4, 1))
    load_checkpoint(path, third)
    for parameter, found, again in zip(
        net.get_parameters(), other.get_parameters(), third.get_parameters(), strict=True
    ):
        assert (parameter.asnumpy() == found.asnumpy()).all()
        assert (parameter.asnumpy() == again.asnumpy()).all()


@pytest.mark.parametrize("kind", ["checkpoint", "ckpt"])
def test_training_resumes_bit_for_bit(tmp_path, kind):
    """Momentum, from a checkpoint of the callback and from a .ckpt that MindSpore wrote."""
    net, optimizer = train(ModelCheckpoint("run", tmp_path), epochs=1)
    saved = tmp_path / "run-1_3"
    if kind == "ckpt":
        mindspore.save_checkpoint([{"name": p.name, "data": p} for p in optimizer.get_parameters()],
                                  str(tmp_path / "run.ckpt"))  # fmt: skip
        saved = tmp_path / "run.ckpt"

    def losses(net, optimizer):
        step = nn.TrainOneStepCell(nn.WithLossCell(net, nn.MSELoss()), optimizer)
        return [float(step(*batch).asnumpy()) for batch in data(3)]

    other = nn.SequentialCell(nn.Dense(3, 4), nn.ReLU(), nn.Dense(4, 1))
    again = nn.Momentum(other.trainable_params(), learning_rate=0.1, momentum=0.9)
    loaded = load_checkpoint(saved)
    mindspore.load_param_into_net(other, loaded)
    mindspore.load_param_into_net(again, loaded)
    assert losses(other, again) == losses(net, optimizer)


def test_bfloat16_keeps_its_bits(tmp_path):
    tensor = mindspore.Tensor(np.array([[1.5, -0.0], [np.inf, 3e-39]], np.float32)).astype(mindspore.bfloat16)
    parameter = mindspore.Parameter(tensor.float(), name="p")
    parameter.set_dtype(mindspore.bfloat16)
    vs.save(tmp_path / "c", {"w": tensor, "p": parameter})
    arrays = vs.load(tmp_path / "c")
    assert arrays["w"].dtype.name == "bfloat16"
    assert arrays["w"].tobytes() == tensor.get_bytes()
    loaded = load_checkpoint(tmp_path / "c")
    assert loaded["p"].dtype == mindspore.bfloat16
    assert loaded["p"].get_bytes() == tensor.get_bytes()
    net = nn.Dense(2, 2)
    net.weight.set_dtype(mindspore.bfloat16)
    vs.save(tmp_path / "d", {"weight": tensor})
    vs.load_param_into_net(net, vs.load_checkpoint(tmp_path / "d"))
    assert net.weight.get_bytes() == tensor.get_bytes()


def test_a_type_that_mindspore_does_not_have_is_named(tmp_path):
    import ml_dtypes

    vs.save(tmp_path / "c", {"w": np.ones(2, ml_dtypes.float8_e8m0fnu)})
    with pytest.raises(vs.errors.UnsupportedDtype, match="float8_e8m0fnu"):
        load_checkpoint(tmp_path / "c")
