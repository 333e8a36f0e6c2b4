"""Programs of Paddle with other values: unchanged values are the same bytes, and Paddle itself runs the copies."""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support import FIXTURES, ROOT

import varstore as vs
from varstore.errors import (
    CheckpointExists,
    FormatError,
    StorageError,
    UnsafeContent,
    UsageError,
    VariableMismatch,
    VariableNotFound,
)
from varstore.storage.appearing import _Place

DATA = FIXTURES / "formats/paddle"
NAMES = ["generated_tensor_0", "linear_0.b_0", "linear_0.w_0", "linear_1.b_0", "linear_1.w_0"]
RUN = """
import sys, numpy as np, paddle
from paddle import inference
prefix, suffix, width, methods = sys.argv[1:]
x = np.arange(2 * int(width), dtype=np.float32).reshape(2, -1)
layer = paddle.jit.load(prefix)
np.save(prefix + ".forward.npy", layer(paddle.to_tensor(x)).numpy())
if methods == "yes":
    np.save(prefix + ".encode.npy", layer.encode(paddle.to_tensor(x)).numpy())
predictor = inference.create_predictor(inference.Config(prefix + suffix, prefix + ".pdiparams"))
predictor.get_input_handle(predictor.get_input_names()[0]).copy_from_cpu(x)
predictor.run()
np.save(prefix + ".predicted.npy", predictor.get_output_handle(predictor.get_output_names()[0]).copy_to_cpu())
"""


def run(prefix: Path, suffix: str, width: int, *, methods: bool) -> dict[str, np.ndarray]:
    """Run a program in Paddle, and return the results of its methods and of the predictor."""
    python = Path(os.environ.get("VARSTORE_ENVS", ROOT / ".envs")) / "paddle/bin/python"
    if not python.exists():
        pytest.skip("no environment paddle: run tools/make_envs.sh paddle")
    command = [python, "-c", RUN, prefix, suffix, str(width), "yes" if methods else "no"]
    environ = {**os.environ, "GLOG_v": "0", "FLAGS_enable_pir_api": "1" if suffix == ".json" else "0"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environ)
    assert done.returncode == 0, done.stderr[-3000:]
    return {path.name.split(".")[-2]: np.load(path) for path in prefix.parent.glob(f"{prefix.name}.*.npy")}


def original(folder: Path, stem: str) -> Path:
    folder.mkdir()
    for file in DATA.glob(f"{stem}*"):
        if ".expect." not in file.name:
            shutil.copyfile(file, folder / file.name)
    return folder / stem


@pytest.mark.parametrize("stem", ["methods", "jit_linear", "jit_linear_old"])
def test_a_copy_without_changes_is_the_same_bytes(tmp_path, stem):
    model = original(tmp_path / "model", stem)
    vs.write(tmp_path / "copy.pdiparams", vs.read(f"{model}.pdiparams"), model=model)
    files = sorted(path for path in (tmp_path / "model").iterdir() if not path.name.startswith(f"{stem}_old"))
    assert len(files) >= 2
    for file in files:
        assert (tmp_path / file.name.replace(stem, "copy", 1)).read_bytes() == file.read_bytes()


def test_paddle_runs_the_copy_and_all_its_methods(tmp_path):
    model = original(tmp_path / "model", "methods")
    values = {name: np.asarray(array) for name, array in vs.read(model).items()}
    assert list(values) == NAMES
    changed = {
        name: np.float32(2) * values[name] + 1 for name in ("linear_0.w_0", "linear_0.b_0", "generated_tensor_0")
    }
    vs.write(tmp_path / "copy.pdiparams", changed, model=f"{model}.json")
    assert {name: vs.read(tmp_path / "copy")[name].tolist() for name in changed} == {
        name: array.tolist() for name, array in changed.items()
    }
    x, now = np.arange(6, dtype=np.float32).reshape(2, 3), values | changed
    encoded = x @ now["linear_0.w_0"] + now["linear_0.b_0"]
    expected = (encoded @ now["linear_1.w_0"] + now["linear_1.b_0"]) * now["generated_tensor_0"]
    found = run(tmp_path / "copy", ".json", 3, methods=True)
    np.testing.assert_allclose(found["encode"], encoded, rtol=1e-5)
    np.testing.assert_allclose(found["forward"], expected, rtol=1e-5)
    np.testing.assert_allclose(found["predicted"], expected, rtol=1e-5)


def test_paddle_runs_a_copy_of_the_older_format(tmp_path):
    model = original(tmp_path / "model", "jit_linear_old")
    opened = vs.read(f"{model}.pdiparams")
    changed = {name: np.full(array.shape, 2, array.dtype) for name, array in opened.items()}
    assert list(changed) == ["_linear.bias", "_linear.weight"], "structured names, from the file beside it"
    vs.write(tmp_path / "copy.pdiparams", changed, model=model)
    found = run(tmp_path / "copy", ".pdmodel", 7, methods=False)
    expected = np.arange(14).reshape(2, 7) @ changed["_linear.weight"] + changed["_linear.bias"]
    np.testing.assert_allclose(found["forward"], expected)
    np.testing.assert_allclose(found["predicted"], expected)


def test_a_checkpoint_that_knows_paddles_names_is_converted(tmp_path):
    model = original(tmp_path / "model", "methods")
    names = {"fc1.bias": "linear_0.b_0", "fc1.weight": "linear_0.w_0"}
    vs.save(
        tmp_path / "c",
        {"fc1.bias": np.ones(2, np.float32), "fc1.weight": np.zeros((3, 2), np.float32), "epoch": np.ones(1)},
        attributes={"parameter_names": names},
    )
    with pytest.raises(VariableNotFound, match="epoch"):
        vs.convert(tmp_path / "c", tmp_path / "copy.pdiparams", model=model)
    assert not (tmp_path / "copy.pdiparams").exists()
    done = vs.convert(tmp_path / "c", tmp_path / "copy.pdiparams", model=model, ignore_extra=True)
    assert done.left_out == ("epoch",)
    assert vs.read(tmp_path / "copy")["linear_0.b_0"].tolist() == [1, 1]


def test_what_does_not_fit_is_refused(tmp_path):
    model = original(tmp_path / "model", "methods")
    for values, error in (
        ({"linear_0.w": np.zeros((3, 2), np.float32)}, VariableNotFound),
        ({"linear_0.w_0": np.zeros((2, 3), np.float32)}, VariableMismatch),
        ({"linear_0.w_0": np.zeros((3, 2), np.float64)}, VariableMismatch),
    ):
        with pytest.raises(error):
            vs.write(tmp_path / "copy.pdiparams", values, model=model)
    for path, given in ((tmp_path / "a.pdiparams", None), (tmp_path / "a.pdparams", model)):
        with pytest.raises(UsageError, match="as a copy of it"):
            vs.write(path, {"w": np.zeros(1, np.float32)}, "paddle", model=given)
    with pytest.raises(UsageError, match="are the same"):
        vs.write(f"{model}.pdiparams", {}, model=model)
    (tmp_path / "model/methods.json").unlink()
    with pytest.raises(FormatError, match="not beside"):
        vs.write(tmp_path / "copy.pdiparams", {}, model=f"{model}.pdiparams")
    assert not list(tmp_path.glob("copy*"))


@pytest.mark.parametrize("file", ["methods.json", "methods.encode.pdiparams", "methods.encode.json"])
def test_no_file_beside_is_followed_out_of_the_folder(tmp_path, file):
    model = original(tmp_path / "model", "methods")
    (tmp_path / "model" / file).rename(tmp_path / "elsewhere")
    (tmp_path / "model" / file).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UnsafeContent):
        vs.write(tmp_path / "copy.pdiparams", {}, model=f"{model}.pdiparams")


def test_two_names_of_one_variable_are_refused(tmp_path):
    model = original(tmp_path / "model", "methods")
    one = np.ones((3, 2), np.float32)
    with pytest.raises(VariableMismatch, match=r"linear_0\.w_0.*'fc\.weight' and 'linear_0\.w_0'"):
        vs.write(
            tmp_path / "copy.pdiparams",
            {"fc.weight": one, "linear_0.w_0": 2 * one},
            model=model,
            parameter_names={"fc.weight": "linear_0.w_0"},
        )
    assert not list(tmp_path.glob("copy*"))


def test_a_program_that_names_two_variables_alike_is_refused(tmp_path):
    model = original(tmp_path / "model", "jit_linear")
    program = model.with_suffix(".json")
    first, second = list(vs.read(model))[:2]
    program.write_text(program.read_text().replace(f'"{second}"', f'"{first}"'))
    for act in (
        lambda: vs.read(model),
        lambda: vs.write(tmp_path / "copy.pdiparams", {}, model=model),
    ):
        with pytest.raises(FormatError, match="names two variables alike"):
            act()


@pytest.mark.parametrize("shared", ["fc", "second"])
def test_a_structured_name_that_is_not_unique_is_not_taken(tmp_path, shared):
    model = original(tmp_path / "model", "jit_linear")
    names = list(vs.read(model))
    assert len(names) == 2
    values = [vs.read(model)[name].numpy().tolist() for name in names]
    new = "fc" if shared == "fc" else names[1]
    about = {names[0]: {"structured_name": new}} | ({names[1]: {"structured_name": new}} if shared == "fc" else {})
    Path(f"{model}.pdiparams.info").write_bytes(pickle.dumps(about, protocol=2))
    opened = vs.read(model)
    assert [(name, array.numpy().tolist()) for name, array in opened.items()] == list(zip(names, values, strict=True))
    Path(f"{model}.pdiparams.info").write_bytes(pickle.dumps({names[0]: {"structured_name": "fc"}}, protocol=2))
    assert list(vs.read(model)) == ["fc", names[1]]


def test_the_files_of_a_copy_appear_together(tmp_path, monkeypatch):
    model = original(tmp_path / "model", "methods")
    appear = _Place.appear

    def visible():
        return sorted(path.name for path in tmp_path.glob("copy*"))

    def killed(self, name):
        if self.name == "copy.pdiparams":
            assert len(visible()) == 3
            raise OSError(5, "killed")
        appear(self, name)

    monkeypatch.setattr(_Place, "appear", killed)
    with pytest.raises(StorageError):
        vs.write(tmp_path / "copy.pdiparams", {}, model=model)
    assert visible() == []
    monkeypatch.undo()
    changed = {name: array.numpy() + 1 for name, array in vs.read(model).items()}
    for values in (changed, {}):
        code = "import os, pickle, sys, varstore as vs; from varstore.storage.appearing import _Place as place; " + (
            "old = place.appear; place.appear = lambda self, name: self.name == 'copy.pdiparams' and os._exit(9) or "
            "old(self, name); vs.write(sys.argv[1], pickle.load(sys.stdin.buffer), model=sys.argv[2])"
        )
        command = [sys.executable, "-c", code, tmp_path / "copy.pdiparams", model]
        assert subprocess.run(command, input=pickle.dumps(values), timeout=60).returncode == 9
        assert len(visible()) == 3
    vs.write(tmp_path / "copy.pdiparams", {}, model=model)
    assert len(visible()) == 4
    assert [path.name for path in tmp_path.glob(".*")] == []
    assert vs.read(tmp_path / "copy")["linear_0.w_0"].tolist() == vs.read(model)["linear_0.w_0"].tolist()


def test_of_a_copy_that_is_there_only_the_values_are_replaced(tmp_path):
    model = original(tmp_path / "model", "jit_linear")
    new = {name: np.full(array.shape, 5, array.dtype) for name, array in vs.read(model).items()}
    for _ in range(2):
        vs.write(tmp_path / "copy.pdiparams", new, model=model)
    assert all((array.numpy() == 5).all() for array in vs.read(tmp_path / "copy").values())
    before = (tmp_path / "copy.pdiparams").read_bytes()
    program = tmp_path / "copy.json"
    for other in (program.read_bytes() + b" ", program.read_bytes()[:-1], b""):
        program.write_bytes(other)
        with pytest.raises(CheckpointExists, match=r"copy\.json"):
            vs.write(tmp_path / "copy.pdiparams", {}, model=model)
        assert (program.read_bytes(), (tmp_path / "copy.pdiparams").read_bytes()) == (other, before)
    program.unlink()
    program.symlink_to(tmp_path / "model/jit_linear.json")
    with pytest.raises(CheckpointExists, match=r"copy\.json"):
        vs.write(tmp_path / "copy.pdiparams", {}, model=model)
