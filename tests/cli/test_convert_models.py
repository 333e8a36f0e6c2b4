"""`varstore convert --model`: a copy of a model with the values of a checkpoint, from the command line."""

from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import varstore as vs
from varstore.cli import main

MODEL = Path(__file__).resolve().parents[1] / "data" / "formats" / "onnx" / "mlp_inline.onnx"


@pytest.fixture
def values():
    return {name: array.numpy() + 1 for name, array in vs.read(MODEL).items()}


def run(*arguments):
    return CliRunner().invoke(main, ["convert", *map(str, arguments)])


def test_the_model_gets_the_values(tmp_path, values):
    vs.save(tmp_path / "c", values)
    done = run(tmp_path / "c", tmp_path / "new.onnx", "--model", MODEL)
    assert done.exit_code == 0, done.output
    found = vs.load(tmp_path / "new.onnx")
    assert {name: array.tolist() for name, array in found.items()} == {
        name: array.tolist() for name, array in values.items()
    }


def test_what_the_model_lacks_is_an_error_or_listed(tmp_path, values):
    vs.save(tmp_path / "c", {**values, "optimizer/step": np.ones(1)})
    done = run(tmp_path / "c", tmp_path / "new.onnx", "--model", MODEL)
    assert done.exit_code == 3, done.output
    assert "optimizer/step" in done.output
    assert not (tmp_path / "new.onnx").exists()
    done = run(tmp_path / "c", tmp_path / "new.onnx", "--model", MODEL, "--ignore-extra")
    assert done.exit_code == 0, done.output
    assert "left out, because the model does not have it: optimizer/step" in done.output
    report = vs.convert(tmp_path / "c", tmp_path / "new.onnx", model=str(MODEL), ignore_extra=True)
    assert report.left_out == ("optimizer/step",)
    assert sorted(report.names) == sorted(values)


def test_without_a_model_the_error_says_what_is_needed(tmp_path, values):
    vs.save(tmp_path / "c", values)
    done = run(tmp_path / "c", tmp_path / "new.onnx")
    assert done.exit_code == 3
    assert "--model" in done.output


def test_a_separator(tmp_path):
    vs.save(tmp_path / "c", {"a/b": np.ones(1, np.float32)})
    done = run(tmp_path / "c", tmp_path / "d", "--format", "oneflow-legacy", "--separator", "-")
    assert done.exit_code == 0, done.output
    assert list(vs.open(tmp_path / "d")) == ["a-b"]
