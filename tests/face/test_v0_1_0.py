"""What version 0.1.0 wrote reads as it was given to it, and the present version writes the same.

``tests/data/v0_1_0`` was made once, by 0.1.0 with tools/make_v0_1_0.py, and truth.json there says what it holds.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import shutil
from pathlib import Path

import pytest
from support import FIXTURES, check_checkpoint

import varstore as vs
from tools import compare_versions
from tools.make_v0_1_0 import APART, GROUPS, make, seen
from varstore.errors import MissingDependency

pytestmark = pytest.mark.core

OLD = FIXTURES / "v0_1_0"
TRUTH = json.loads((OLD / "truth.json").read_text())
ITEMS = TRUTH["items"]
CHECKPOINTS = [name for name, item in ITEMS.items() if item["kind"] == "checkpoint"]
NATIVE = [group for group in GROUPS if group not in (*APART, "files", "converted")]
"""Groups that hold nothing but checkpoints, and need no framework."""


@pytest.fixture(scope="module")
def linked(tmp_path_factory):
    """Return a copy in which files are links and read-only again, as 0.1.0 left them and git does not keep them."""
    copy = tmp_path_factory.mktemp("v0_1_0") / "copy"
    shutil.copytree(OLD, copy)
    for first, *others in TRUTH["links"]:
        for other in others:
            (copy / other).unlink()
            os.link(copy / first, copy / other)
    for path in copy.rglob("*"):
        if path.is_file():
            path.chmod(0o444)
    return copy


def has(framework):
    return not framework or importlib.util.find_spec(framework) is not None


@pytest.mark.parametrize("name", ITEMS)
def test_it_reads_as_it_was_given(name):
    truth = dict(ITEMS[name])
    kind, needs = truth.pop("kind"), truth.pop("needs", "")
    if kind == "file" and not has(needs):
        pytest.skip(f"{needs} is not installed")
    if not has(needs):
        truth.pop("state")
    assert seen(OLD / name, kind, with_state=has(needs)) == truth


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_every_way_of_reading_a_checkpoint_gives_the_same(name):
    check_checkpoint(OLD / name, vs.load(OLD / name))
    assert list(vs.read(OLD / name)) == ITEMS[name]["names"]
    assert vs.diff(OLD / name, OLD / name).equal


@pytest.mark.parametrize("name", [name for name in CHECKPOINTS if ITEMS[name].get("needs")])
def test_state_of_a_framework_that_is_absent_says_so(name):
    needs = ITEMS[name]["needs"]
    if has(needs):
        pytest.skip(f"{needs} is installed")
    with pytest.raises(MissingDependency, match=needs):
        vs.load_state(OLD / name)


def test_the_run_goes_on(linked, tmp_path):
    run = shutil.copytree(linked / "manager" / "run", tmp_path / "run")
    manager = vs.CheckpointManager(run, keep=vs.Latest(2) | vs.Best("loss"))
    assert manager.others() == {}
    assert (manager.latest().step, manager.best().step) == (50, 20)
    state = manager.restore()
    manager.save(60, {**state, "step": 60}, metrics={"loss": 0.125})
    manager.wait()
    assert [saved.step for saved in manager.all()] == [50, 60]
    assert os.path.samefile(run / "step-50/frozen/out", run / "step-60/frozen/out")


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_new_save_shares_the_files_of_an_old_one(linked, tmp_path, name):
    """By links and by ``base=``; what git made of the links makes no difference to what is read."""
    with vs.open(linked / name) as old:
        check_checkpoint(linked / name, vs.load(old))
        assert vs.diff(OLD / name, linked / name).equal
        copy = vs.save(tmp_path / "copy", old)
        assert vs.diff(linked / name, copy.path).equal
        assert all(os.path.samefile(f"{old[key].path}/out", f"{copy[key].path}/out") for key in old)
        arrays = vs.load(old)
        again = vs.save(tmp_path / "again", arrays, base=linked / name)
        report = vs.diff(linked / name, again.path)
        assert (report.unchanged, report.changed, report.files) == (old.names, {}, {})
        digested = [key for key in old if old[key].digests]
        assert all(os.path.samefile(f"{old[key].path}/out", f"{again[key].path}/out") for key in digested)


def test_the_present_version_writes_the_same(linked, tmp_path):
    """The same names, links and bytes, but for the writer and the time in the manifest."""
    made = make(tmp_path, NATIVE)
    assert made["items"] == {name: item for name, item in ITEMS.items() if name.partition("/")[0] in NATIVE}
    assert made["links"] == [names for names in TRUTH["links"] if names[0].partition("/")[0] in NATIVE]
    old, new = (written(root) for root in (linked, tmp_path))
    assert list(compare_versions.compare(old, new)) == []
    assert sum(map(len, new.trees.values())) > 1000


def written(root):
    trees = {group: compare_versions.read_tree(root / group) for group in NATIVE}
    bare = {  # the modes of folders are those of whoever made them
        group: {name: dataclasses.replace(node, mode=node.mode if node.links else "") for name, node in tree.items()}
        for group, tree in trees.items()
    }
    return compare_versions.Made(version="", package="", outcomes={group: [] for group in NATIVE}, trees=bare)


def test_everything_that_lies_there_has_its_truth():
    folders = {
        path.parent for path in OLD.rglob("snapshot_done") if path.is_file() and (path.parent / "manifest").exists()
    }
    listed = {OLD / name for name in CHECKPOINTS}
    assert folders <= listed
    parts = {"mlp_external.onnx.data", *(f"sharded-0000{part}-of-00003.safetensors" for part in (1, 2, 3))}
    there = {Path(path) for group in ("files", "converted") for path in (OLD / group).iterdir()}
    assert {path.name for path in there if path.relative_to(OLD).as_posix() not in ITEMS} == parts
    assert len(ITEMS) == 104
