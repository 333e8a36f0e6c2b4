"""The demo, run as it is: it is the main job of the project on real data."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import varstore as vs

STEP = "System-Train-TrainStep-train_job"
BASE = {"dense1-weight", "dense1-bias", "dense2-weight", "dense2-bias", STEP}
TOP = {"dense3-weight", "dense3-bias"}


def run(directory, **changes):
    command = [sys.executable, "-m", "varstore", "demo", str(directory)]
    env = {**os.environ, **changes}
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, env=env)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    pytest.importorskip("sklearn", reason="the demo's data comes with scikit-learn")
    directory = tmp_path_factory.mktemp("demo") / "new"
    result = run(directory)
    assert (result.returncode, result.stderr) == (0, "")
    return directory, result.stdout


def test_both_models_learn_the_digits(demo):
    directory, output = demo
    scores = [float(score) for score in re.findall(r"test accuracy ([\d.]+)%", output)]
    assert len(scores) == 4
    assert scores[1] > 90
    assert scores[3] > 90
    for name, score in (("mlp_models_1", scores[1]), ("mlp_ext_models_1", scores[3])):
        assert vs.open(directory / name).attributes["accuracy"] == pytest.approx(score / 100, abs=0.001)


def test_the_saved_model_itself_names_the_digits(demo):
    """Not what the demo says of itself: its files, read without varstore, applied to all digits."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    folder = demo[0] / "mlp_models_1"
    shapes = {"dense1-weight": (64, 64), "dense1-bias": (64,), "dense2-weight": (10, 64), "dense2-bias": (10,)}
    w1, b1, w2, b2 = (np.fromfile(folder / name / "out", "<f4").reshape(shape) for name, shape in shapes.items())
    scores = np.maximum((images / 16) @ w1.T + b1, 0) @ w2.T + b2
    assert (scores.argmax(axis=1) == labels).mean() > 0.9


def test_the_second_model_loads_what_it_shares_and_keeps_the_rest(demo):
    _, output = demo
    assert "session: 5 of 7 loaded" in output
    assert re.search(r"missing +2 +dense3-weight, dense3-bias", output)


def test_both_checkpoints_hold_what_they_should(demo):
    directory, _ = demo
    first, extended = (vs.open(directory / name) for name in ("mlp_models_1", "mlp_ext_models_1"))
    assert set(first) == BASE
    assert set(extended) == BASE | TOP
    for checkpoint, steps in ((first, 450), (extended, 900)):
        assert checkpoint[STEP].dtype == np.int64
        assert checkpoint[STEP].numpy().tolist() == [steps]
        assert vs.verify(checkpoint.path).ok


def test_frozen_variables_are_linked_and_all_others_changed(demo):
    directory, output = demo
    report = vs.diff(directory / "mlp_models_1", directory / "mlp_ext_models_1")
    assert set(report.unchanged) == {"dense1-weight", "dense1-bias"}
    assert set(report.added) == TOP
    for name in BASE:
        for file in ("out", "meta"):
            one, other = (directory / model / name / file for model in ("mlp_models_1", "mlp_ext_models_1"))
            assert os.path.samefile(one, other) == (name in report.unchanged)
    assert output.count("(one file in both checkpoints)") == 8


def test_what_it_prints_is_what_lies_there(demo):
    directory, output = demo
    meta = directory / "mlp_ext_models_1" / "dense3-weight" / "meta"
    assert f"$ cat {meta}\n{meta.read_text()}" in output
    assert output.count("every byte as it was saved") == 2
    tree = output.partition("3. What is on the disk\n")[2].partition("\n$ cat")[0]
    for path in Path(directory).rglob("*"):
        assert re.search(rf"^ +{re.escape(path.name)}(/|  \d)", tree, re.MULTILINE), path


def test_a_second_run_touches_nothing(demo):
    directory, _ = demo
    before = {path: path.stat().st_mtime_ns for path in Path(directory).rglob("*")}
    result = run(directory)
    assert result.returncode == 3
    assert re.fullmatch(r"varstore: .*mlp_models_1: the target is not empty.*\n", result.stderr)
    assert {path: path.stat().st_mtime_ns for path in Path(directory).rglob("*")} == before


def test_without_scikit_learn_it_says_what_to_install(tmp_path):
    (tmp_path / "sklearn.py").write_text("raise ImportError('as if it were not installed')")
    result = run(tmp_path / "demo", PYTHONPATH=str(tmp_path))
    assert result.returncode == 3
    assert result.stderr.startswith("varstore: the demo needs scikit-learn")
    assert "pip install varstore[demo]" in result.stderr
    assert not (tmp_path / "demo").exists()
