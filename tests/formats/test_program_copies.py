"""Exported programs of PyTorch with other weights: unchanged bytes stay, and PyTorch itself runs the copies."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import zipfile
from pathlib import Path

import numpy as np
import pytest
from support import FIXTURES, ROOT

import varstore as vs
from varstore.errors import FormatError, UsageError, VariableMismatch, VariableNotFound

DATA = FIXTURES / "formats/torch"
MODEL = DATA / "program_2_13.pt2"
MODELS = [DATA / "program_2_6.pt2", DATA / "program_2_8.pt2", MODEL]
"""One of each layout."""
RUN = """
import json, sys, torch
torch.manual_seed(0)
class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = torch.nn.Linear(3, 2)
        self.register_buffer("scale", torch.tensor([2.0, 3.0]))
    def forward(self, x):
        return self.fc(x) * self.scale
if sys.argv[1] == "save":
    torch.export.save(torch.export.export(Net(), (torch.ones(2, 3),)), sys.argv[2])
else:
    program = torch.export.load(sys.argv[2])
    shape = program.example_inputs[0][0].shape
    print(json.dumps(program.module()(torch.arange(float(shape.numel())).reshape(shape)).tolist()))
    print(json.dumps({name: value.tolist() for name, value in program.state_dict.items()}))
"""


def in_torch(*arguments: object) -> list[str]:
    python = Path(os.environ.get("VARSTORE_ENVS", ROOT / ".envs")) / "torch/bin/python"
    if not python.exists():
        pytest.skip("no environment torch: run tools/make_envs.sh torch")
    done = subprocess.run([python, "-c", RUN, *map(str, arguments)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()


@pytest.mark.parametrize("model", MODELS, ids=lambda path: path.stem)
def test_a_copy_without_changes_is_the_same_bytes(tmp_path, model):
    for values in ({}, dict(vs.read(model))):
        vs.write(tmp_path / "copy.pt2", values, model=model)
        assert (tmp_path / "copy.pt2").read_bytes() == model.read_bytes()


@pytest.mark.parametrize("model", MODELS, ids=lambda path: path.stem)
def test_the_checksums_of_what_changed_are_right_everywhere(tmp_path, model):
    opened = vs.read(model)
    changed = {name: np.full(array.shape, 1, array.dtype) for name, array in opened.items()}
    vs.write(tmp_path / "copy.pt2", changed, model=model)
    with zipfile.ZipFile(tmp_path / "copy.pt2") as archive:
        assert archive.testzip() is None
        assert archive.namelist() == zipfile.ZipFile(model).namelist()
        for name in archive.namelist():
            if name.endswith(".pt"):
                assert zipfile.ZipFile(io.BytesIO(archive.read(name))).testzip() is None
    again = vs.read(tmp_path / "copy.pt2")
    assert {name: array.tobytes() for name, array in again.items()} == {n: a.tobytes() for n, a in changed.items()}
    before, after = model.read_bytes(), (tmp_path / "copy.pt2").read_bytes()
    assert len(before) == len(after)
    vs.write(tmp_path / "back.pt2", opened, model=tmp_path / "copy.pt2")
    assert (tmp_path / "back.pt2").read_bytes() == before


def test_torch_runs_the_copy(tmp_path):
    in_torch("save", tmp_path / "model.pt2")
    weight, scale = np.arange(6, dtype=np.float32).reshape(2, 3), np.ones(2, np.float32)
    values = {"fc.weight": weight, "scale": scale}
    vs.write(tmp_path / "copy.pt2", values, model=tmp_path / "model.pt2")
    result, state = map(json.loads, in_torch("run", tmp_path / "copy.pt2"))
    bias = vs.read(tmp_path / "model.pt2")["fc.bias"].numpy()
    np.testing.assert_array_equal(state["fc.weight"], weight)
    np.testing.assert_array_equal(np.float32(state["fc.bias"]), bias)
    np.testing.assert_allclose(result, weight @ weight.T + bias, rtol=1e-6)


@pytest.mark.parametrize("model", MODELS[:2], ids=lambda path: path.stem)
def test_torch_runs_a_copy_of_what_earlier_versions_wrote(tmp_path, model):
    opened = vs.read(model)
    weight = np.arange(6, dtype=np.float32).reshape(2, 3)
    changed = {"fc.weight": weight, "head.weight": weight, "scale": np.float32([2, 3])}
    vs.write(tmp_path / "copy.pt2", changed, model=model)
    result, state = map(json.loads, in_torch("run", tmp_path / "copy.pt2"))
    assert set(state) == set(opened)
    values = {name: np.float32(value) for name, value in state.items()}
    for name, array in (dict(opened) | changed).items():
        np.testing.assert_array_equal(values[name], np.float32(array))
    products = np.arange(3, dtype=np.float32) @ weight.T
    expected = (products + values["fc.bias"]) * [2, 3] + products + values["head.bias"] + values["extra"]
    np.testing.assert_allclose(result, [expected], rtol=1e-6)


def test_a_checkpoint_is_converted_into_a_copy(tmp_path):
    name, array = next((name, array) for name, array in vs.read(MODEL).items() if array.dtype == np.float32)
    vs.save(tmp_path / "c", {name: np.full(array.shape, 3, np.float32), "epoch": np.ones(1)})
    done = vs.convert(tmp_path / "c", tmp_path / "copy.pt2", model=MODEL, ignore_extra=True)
    assert (done.names, done.left_out) == ((name,), ("epoch",))
    assert (vs.read(tmp_path / "copy.pt2")[name].numpy() == 3).all()


def test_what_does_not_fit_is_refused(tmp_path):
    name, array = next((name, array) for name, array in vs.read(MODEL).items() if array.dtype == np.float32)
    for values, error in (
        ({"nothing": np.zeros(1, np.float32)}, VariableNotFound),
        ({name: np.zeros((*array.shape, 1), np.float32)}, VariableMismatch),
        ({name: np.zeros(array.shape, np.float64)}, VariableMismatch),
    ):
        with pytest.raises(error):
            vs.write(tmp_path / "copy.pt2", values, model=MODEL)
    with pytest.raises(UsageError, match="as a copy"):
        vs.write(tmp_path / "copy.pt2", {})
    with pytest.raises(FormatError, match="not an exported program"):
        vs.write(tmp_path / "copy.pt2", {}, model=DATA / "torchscript.pt")
    shutil.copyfile(MODEL, tmp_path / "m.pt2")
    with pytest.raises(UsageError, match="are the same"):
        vs.write(tmp_path / "m.pt2", {}, model=tmp_path / "m.pt2")
    assert not (tmp_path / "copy.pt2").exists()


@pytest.mark.parametrize("model", MODELS, ids=lambda path: path.stem)
def test_weights_that_are_one_do_not_get_two_values(tmp_path, model):
    opened = vs.read(model)
    groups: dict[object, list[str]] = {}
    for name, array in opened.items():
        groups.setdefault(array.identity, []).append(name)
    tied = max(groups.values(), key=len)
    assert len(tied) == 2
    first, second = (
        np.full(opened[name].shape, value, opened[name].dtype) for name, value in zip(tied, (1, 2), strict=True)
    )
    with pytest.raises(VariableMismatch, match="are one"):
        vs.write(tmp_path / "copy.pt2", dict(zip(tied, (first, second), strict=True)), model=model)
    vs.write(tmp_path / "copy.pt2", dict(zip(tied, (first, first), strict=True)), model=model)


def test_an_empty_weight_may_have_an_offset_beyond_its_bytes(tmp_path):
    index = "program_2_13/data/weights/model_weights_config.json"
    with zipfile.ZipFile(MODEL) as given, zipfile.ZipFile(tmp_path / "model.pt2", "w") as copy:
        for member in given.namelist():
            content = given.read(member)
            if member == index:
                about = json.loads(content)
                about["config"]["fc.bias"]["tensor_meta"] |= {
                    "sizes": [{"as_int": 0}],
                    "storage_offset": {"as_int": 1 << 20},
                }
                content = json.dumps(about).encode()
            copy.writestr(member, content)
    values = {"fc.bias": np.zeros(0, np.float32), "fc.weight": np.ones((2, 3), np.float32)}
    vs.write(tmp_path / "copy.pt2", values, model=tmp_path / "model.pt2")
    found = vs.read(tmp_path / "copy.pt2")
    assert (found["fc.bias"].shape, found["fc.weight"].numpy().tolist()) == ((0,), [[1, 1, 1], [1, 1, 1]])


@pytest.mark.parametrize("in_header", [False, True])
def test_a_checksum_that_does_not_follow_the_content_is_not_written_there(tmp_path, in_header):
    content = bytearray(MODEL.read_bytes())
    with zipfile.ZipFile(MODEL) as given, zipfile.ZipFile(tmp_path / "model.pt2", "w") as copy:
        for member in given.namelist():
            copy.writestr(member, given.read(member))
        headers = [info.header_offset for info in copy.infolist()]
    content = bytearray((tmp_path / "model.pt2").read_bytes())
    for at in headers:
        content[at + 6] |= 8
        if not in_header:
            content[at + 14 : at + 18] = bytes(4)
    (tmp_path / "model.pt2").write_bytes(content)
    vs.write(tmp_path / "copy.pt2", {"fc.weight": np.ones((2, 3), np.float32)}, model=tmp_path / "model.pt2")
    with zipfile.ZipFile(tmp_path / "copy.pt2") as archive:
        assert archive.testzip() is None
    assert vs.read(tmp_path / "copy.pt2")["fc.weight"].tolist() == [[1, 1, 1], [1, 1, 1]]
    changed = [
        at
        for at, (old, new) in enumerate(zip(content, (tmp_path / "copy.pt2").read_bytes(), strict=True))
        if old != new
    ]
    assert len(changed) <= 24 + 4 + 4 * in_header


@pytest.mark.parametrize(("name", "model"), [("a.pt", MODEL), ("a.ckpt", FIXTURES / "formats/mindspore/net.mindir")])
def test_a_copy_is_called_like_a_program(tmp_path, name, model):
    with pytest.raises(UsageError, match="as a copy of one"):
        vs.write(tmp_path / name, {}, model=model)
    vs.write(held := io.BytesIO(), {}, "torch" if name == "a.pt" else "mindspore", model=model)
    assert held.getvalue() == model.read_bytes()
    assert not (tmp_path / name).exists()


def test_a_dry_run_copies_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("varstore.formats.torch.rewrite.copy_archive", None)
    name, array = next((name, array) for name, array in vs.read(MODEL).items() if array.dtype == np.float32)
    vs.save(tmp_path / "c", {name: np.ones(array.shape, np.float32)})
    assert vs.convert(tmp_path / "c", tmp_path / "a.pt2", model=MODEL, dry_run=True).names == (name,)
    with pytest.raises(vs.errors.StorageError):
        vs.convert(tmp_path / "c", tmp_path / "nowhere/a.pt2", model=MODEL, dry_run=True)


def test_strings_of_python_2_in_a_program_are_read_as_the_caller_says(tmp_path):
    inner = io.BytesIO()
    with zipfile.ZipFile(inner, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}U\x01aU\x01\xe9s.")
        archive.writestr("archive/version", "3")
    with zipfile.ZipFile(tmp_path / "a.pt2", "w") as archive:
        archive.writestr("a/archive_format", "pt2")
        archive.writestr("a/data/weights/model.pt", inner.getvalue())
    assert vs.read(tmp_path / "a.pt2", encoding="latin-1").state() == {"a": "é"}
    assert vs.read(tmp_path / "a.pt2", encoding="bytes").state() == {b"a": b"\xe9"}
    with pytest.raises(FormatError, match="encoding='latin-1'"):
        vs.read(tmp_path / "a.pt2")
