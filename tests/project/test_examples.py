"""The example scripts of tools/examples, run as a user runs them."""

import numpy as np
import pytest
from support.examples import run

import varstore as vs

BEFORE_THE_FIRST_STEP = """
import varstore.cli.demo as demo, varstore as vs, numpy as np
train = demo.Network.train
def spied(network, digits, *, epochs):
    np.savez("before.npz", **{name: v.numpy() for name, v in vs.get_all_variables().items()})
    train(network, digits, epochs=epochs)
demo.Network.train = spied
"""


def test_the_document_fine_tunes_in_its_own_order(tmp_path):
    pytest.importorskip("sklearn", reason="the data of the examples comes with scikit-learn")
    run("mlp_mnist_origin.py", tmp_path)
    first = vs.load(tmp_path / "mlp_models_1")
    assert first["System-Train-TrainStep-train_job"] == [450]

    output = run("mlp_mnist_finetune.py", tmp_path, BEFORE_THE_FIRST_STEP)
    assert "0 of 0 loaded, 5 waiting" in output
    with np.load(tmp_path / "before.npz") as before:
        for name, values in first.items():
            assert before[name].tobytes() == values.tobytes(), name
        assert set(before) - set(first) == {"dense3-weight", "dense3-bias"}
        assert before["dense3-weight"].any()

    extended = vs.load(tmp_path / "mlp_ext_models_1")
    assert extended["System-Train-TrainStep-train_job"] == [900]
    assert (extended["dense1-weight"] == first["dense1-weight"]).all()
    assert (extended["dense2-weight"] != first["dense2-weight"]).any()
    assert vs.verify(tmp_path / "mlp_ext_models_1").ok


def test_a_release_is_converted_compared_merged_and_shipped(tmp_path):
    assert "release -> shipped: 15 unchanged, 15 of them within the tolerance" in run("release.py", tmp_path)
