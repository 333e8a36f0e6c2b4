"""`varstore.salvage`: what is whole of a checkpoint becomes a new one, whatever is wrong with the old one."""

import json
import os
import shutil

import numpy as np
import pytest
from click.testing import CliRunner

import varstore as vs
from varstore.cli import main
from varstore.errors import CheckpointExists, CheckpointNotFound, FormatError, UsageError

pytestmark = pytest.mark.core

SHARED = np.arange(9.0)
STATE = {
    "model": {"w": np.ones((3, 4)), "b": np.zeros(4), "twin": np.zeros(4), "tied": SHARED, "knot": SHARED},
    "epoch": 3,
    "large": np.arange(5 << 19, dtype=np.float64),
}
NAMES = ("model/w", "model/b", "model/twin", "model/tied", "model/knot", "large")


def run(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments], prog_name="varstore")


@pytest.fixture
def path(tmp_path):
    files = {"labels.txt": b"cat, dog", "notes": b"1"}
    vs.save_state(tmp_path / "c", STATE, attributes={"a": 1}, files=files, durable=False)
    return tmp_path / "c"


def damage(path, at=0):
    if os.stat(path).st_nlink > 1:  # it is to be the only one of its names
        shutil.copy2(path, f"{path}.new")
        os.replace(f"{path}.new", path)
    os.chmod(path, 0o644)
    with open(path, "r+b") as file:
        file.seek(at)
        file.write(b"\x01\x01")


def test_of_what_is_whole_nothing_is_lost(path, tmp_path):
    report = vs.salvage(path, tmp_path / "d")
    assert (report.saved, report.files, dict(report.lost)) == (NAMES, ("labels.txt", "notes"), {})
    assert report
    assert vs.diff(path, tmp_path / "d", values=True)
    assert os.path.samefile(path / "large/out", tmp_path / "d/large/out")
    assert str(report) == f"{path} -> {tmp_path}/d: 6 variables and 2 files saved, nothing lost"
    with pytest.raises(CheckpointExists):
        vs.salvage(path, tmp_path / "d")


def test_what_is_damaged_is_lost_and_named(path, tmp_path):
    damage(path / "large/out", 17 << 20)
    os.truncate(path / "model/w/out", 8)
    damage(path / "labels.txt")
    (path / "model/w/meta").unlink()
    report = vs.salvage(path, tmp_path / "d")
    assert [*report.lost] == ["file labels.txt", "model/w", "large"]
    assert not report.ok
    assert "large: " in str(report)
    assert vs.verify(tmp_path / "d")
    state = vs.load_state(tmp_path / "d")
    assert ([*state], [*state["model"]], state["epoch"]) == (["model", "epoch"], ["b", "twin", "tied", "knot"], 3)
    assert (dict(vs.open(tmp_path / "d").attributes), [*vs.open(tmp_path / "d").files]) == ({"a": 1}, ["notes"])


def test_values_are_taken_from_another_variable_that_has_them(path, tmp_path):
    damage(path / "model/b/out")
    damage(path / "model/knot/out")
    report = vs.salvage(path, tmp_path / "d")
    assert report.ok
    assert dict(report.restored) == {"model/b": "model/twin", "model/knot": "model/tied"}
    state = vs.load_state(tmp_path / "d")["model"]
    assert state["b"].tolist() == [0] * 4
    assert state["knot"] is state["tied"]
    assert state["b"] is not state["twin"]
    assert vs.verify(tmp_path / "d")


@pytest.mark.parametrize("broken", ["marker", "manifest", "both", "no manifest", "meta"])
def test_what_cannot_be_opened_is_opened(path, tmp_path, broken):
    if broken in ("marker", "both"):
        (path / "snapshot_done").unlink()
    if broken in ("manifest", "both"):
        os.chmod(path / "manifest", 0o644)
        damage(path / "manifest", 100)
    if broken == "no manifest":
        (path / "manifest").unlink()
    if broken == "meta":
        damage(path / "large/meta")
    report = vs.salvage(path, tmp_path / "d")
    assert set(report.saved) == set(NAMES)
    assert [*report.lost] == (["the manifest"] if broken in ("manifest", "both") else [])
    assert bool(report.unchecked) == (broken not in ("marker", "meta"))
    assert vs.verify(tmp_path / "d")
    found = vs.load(tmp_path / "d")
    assert np.array_equal(found["model/w"], STATE["model"]["w"])
    assert np.array_equal(found["large"], STATE["large"])


def test_where_nothing_is_whole_nothing_is_written(path, tmp_path):
    for name in NAMES:
        os.truncate(path / name / "out", 3)
    with pytest.raises(FormatError, match="no variable is whole"):
        vs.salvage(path, tmp_path / "d")
    with pytest.raises(CheckpointNotFound):
        vs.salvage(tmp_path / "nothing", tmp_path / "d")
    manager = vs.CheckpointManager(tmp_path / "run")
    manager.save(1, {"w": np.ones(2)}).wait()
    with pytest.raises(UsageError, match="step"):
        vs.salvage(tmp_path / "run", tmp_path / "d")
    assert not (tmp_path / "d").exists()


def test_files_of_other_formats_are_read_array_by_array(tmp_path):
    vs.write(tmp_path / "m.zarr", {"a": np.arange(100.0), "b": np.arange(50.0)})
    os.truncate(tmp_path / "m.zarr/b/c/0", 5)
    report = vs.salvage(tmp_path / "m.zarr", tmp_path / "d")
    assert (report.saved, [*report.lost]) == (("a",), ["b"])
    np.savez(tmp_path / "m.npz", a=np.ones(2), words=np.array(["x"]))
    report = vs.salvage(tmp_path / "m.npz", tmp_path / "e")
    assert (report.saved, [*report.lost]) == (("a",), ["words"])


def test_the_command_and_verify_print_json(path, tmp_path):
    result = run("verify", "--json", path, path)
    decoder = json.JSONDecoder()
    found, end = decoder.raw_decode(result.output)
    assert (found["ok"], found["variables"], found["files"], found["problems"]) == (True, 6, 2, [])
    assert decoder.raw_decode(result.output[end:].strip())[0] == found
    assert run("salvage", path, tmp_path / "whole").exit_code == 0
    damage(path / "large/out")
    result = run("verify", "--json", path)
    assert (result.exit_code, json.loads(result.output)["ok"]) == (1, False)
    assert run("salvage", path, tmp_path / "whole").exit_code == 3
    result = run("salvage", path, tmp_path / "d", "--json")
    assert result.exit_code == 1
    found = json.loads(result.output)
    assert (found["ok"], [*found["lost"]]) == (False, ["large"])
    result = run("salvage", path, tmp_path / "e")
    assert result.output.splitlines()[1].startswith("  lost      large: ")
