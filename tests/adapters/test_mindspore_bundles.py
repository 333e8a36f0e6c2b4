"""A network that MindSpore exports to ONNX runs from its checkpoints, with values that it gets later."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
from support import ROOT

import varstore as vs

mindspore = pytest.importorskip("mindspore")
pytestmark = pytest.mark.filterwarnings("ignore")
RUN = """
import sys, numpy as np
from varstore.adapters.onnx import session
x = np.load(sys.argv[1])
for path in sys.argv[2:]:
    opened = session(path)
    np.save(path + ".npy", opened.run(None, {opened.get_inputs()[0].name: x})[0])
"""


def test_a_network_runs_with_the_values_of_each_step(tmp_path):
    python = Path(os.environ.get("VARSTORE_ENVS", ROOT / ".envs")) / "onnx/bin/python"
    if not python.exists():
        pytest.skip("no environment onnx: run tools/make_envs.sh onnx")
    nn = mindspore.nn
    net = nn.SequentialCell(
        nn.Conv2d(3, 16, 3, pad_mode="valid", has_bias=True),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dense(16 * 36, 300),
    )
    net.set_train(False)
    x = np.random.default_rng(4).standard_normal((2, 3, 8, 8)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    mindspore.export(net, mindspore.Tensor(x), file_name=str(tmp_path / "net"), file_format="ONNX")
    expected = {}
    with vs.CheckpointManager(tmp_path / "run") as manager:
        for step in range(3):
            state = {parameter.name: parameter for parameter in net.get_parameters()}
            if step:
                manager.save(step, state, graphs_from=manager.latest())
            else:
                vs.bundle(tmp_path / "run/step-0", state, graphs={"forward": tmp_path / "net.onnx"})
            expected[step] = net(mindspore.Tensor(x)).asnumpy()
            for name in ("4.weight",) if step == 0 else ("0.bias", "1.beta"):  # a file, and copies in the graph
                state[name].set_data(mindspore.Tensor(state[name].asnumpy() + np.float32(0.25)))
    linked = [
        os.path.samefile(tmp_path / f"run/step-{step}/net.onnx", tmp_path / "run/step-0/net.onnx") for step in (1, 2)
    ]
    assert linked == [True, False]
    paths = [str(tmp_path / f"run/step-{step}") for step in expected]
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [python, "-c", RUN, tmp_path / "x.npy", *paths], capture_output=True, text=True, timeout=120, env=environ
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for step, path in zip(expected, paths, strict=True):
        np.testing.assert_allclose(np.load(f"{path}.npy"), expected[step], atol=1e-4)
    assert np.abs(expected[1] - expected[2]).max() > 0.01
