"""Paddle's prefixes, programs without parameters, and the names that Paddle has for parameters."""

import shutil
from pathlib import Path

import numpy as np
import pytest

import varstore as vs

DATA = Path(__file__).resolve().parents[1] / "data" / "formats" / "paddle"


def truth(name):
    with np.load(DATA / f"{name}.expect.npz") as stored:
        return {key: stored[key] for key in stored.files}


@pytest.mark.parametrize("name", ["jit_linear", "jit_linear_old"])
@pytest.mark.parametrize("suffix", ["", "program"])
def test_a_prefix_and_a_program_stand_for_the_parameters(name, suffix):
    program = ".json" if name == "jit_linear" else ".pdmodel"
    path = DATA / (name + (program if suffix else ""))
    expected = vs.load(DATA / f"{name}.pdiparams")
    for found in (vs.load(path), vs.read(path).state(), vs.load_state(path)):
        assert {key: value.tobytes() for key, value in found.items()} == {
            key: value.tobytes() for key, value in expected.items()
        }
    assert vs.read(path).format == "paddle"


@pytest.mark.parametrize("program", ["jit_linear.json", "jit_linear_old.pdmodel"])
def test_a_program_alone_says_where_its_parameters_would_be(tmp_path, program):
    shutil.copy(DATA / program, tmp_path)
    for path in (tmp_path / program, (tmp_path / program).with_suffix("")):
        with pytest.raises(vs.errors.FormatError, match=r"program of Paddle.*\.pdiparams"):
            vs.read(path)


def test_the_pair_of_a_model(tmp_path):
    shutil.copy(DATA / "linearnet.pdparams", tmp_path / "run.pdparams")
    shutil.copy(DATA / "adam.pdopt", tmp_path / "run.pdopt")
    state = vs.read(tmp_path / "run").state()
    assert set(state) == {"model", "optimizer"}
    assert set(vs.load(tmp_path / "run", include="model/*", rename={"model/": ""})) == set(truth("linearnet.pdparams"))
    vs.convert(tmp_path / "run", tmp_path / "d")
    assert vs.load_state(tmp_path / "d").keys() == state.keys()
    (tmp_path / "run.pdopt").unlink()
    assert set(vs.read(tmp_path / "run")) == set(truth("linearnet.pdparams"))


def test_nothing_at_a_prefix_is_nothing(tmp_path):
    with pytest.raises(vs.errors.CheckpointNotFound):
        vs.read(tmp_path / "run")


def test_names_survive_both_ways(tmp_path):
    source = DATA / "linearnet.pdparams"
    names = vs.read(source).attributes["parameter_names"]
    assert set(names) == set(truth("linearnet.pdparams"))
    assert all(name != structured for structured, name in names.items())
    vs.convert(source, tmp_path / "d")
    assert vs.open(tmp_path / "d").attributes["parameter_names"] == names
    vs.convert(tmp_path / "d", tmp_path / "again.pdparams")
    assert vs.read(tmp_path / "again.pdparams").attributes["parameter_names"] == names
    vs.convert(source, tmp_path / "direct.pdparams", rename=lambda name: f"net.{name}")
    found = vs.read(tmp_path / "direct.pdparams").attributes["parameter_names"]
    assert found == {f"net.{structured}": name for structured, name in names.items()}
