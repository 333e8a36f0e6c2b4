"""Where a path does not lead to a complete checkpoint, the error says what to do, and doing that helps."""

import os
import re
import threading
import time

import numpy as np
import pytest
from click.testing import CliRunner

import varstore as vs
from varstore.cli import main
from varstore.disk.read.advice import FOREIGN_NAMES
from varstore.errors import CheckpointNotFound, IncompleteCheckpoint
from varstore.formats.registry import detect

VALUES = {"w": np.arange(3.0), "b/c": np.ones(2)}
VERBS = (vs.open, vs.load, vs.load_state, vs.verify, vs.seal, lambda path: vs.diff(path, path))


@pytest.fixture
def path(tmp_path):
    vs.save(tmp_path / "lenet", VALUES, durable=False)
    return tmp_path / "lenet"


def refused(verb, path, kind):
    with pytest.raises(kind) as caught:
        verb(path)
    return caught.value


@pytest.mark.parametrize("verb", VERBS)
def test_a_name_that_is_misspelt(path, verb):
    error = refused(verb, path.with_name("lennet"), CheckpointNotFound)
    assert error.hint == f"did you mean {str(path)!r}?"
    (meant,) = re.findall(r"'(.*)'", error.hint)
    assert vs.load(meant).keys() == VALUES.keys()


def test_a_folder_that_is_misspelt(path):
    error = refused(vs.open, path.parent / "rnus" / "lenet", CheckpointNotFound)
    assert error.hint == f"the folder {str(path.parent / 'rnus')!r} does not exist either"


def test_nothing_is_made_up(tmp_path):
    (tmp_path / "lenet").mkdir()
    assert refused(vs.open, tmp_path / "lennet", CheckpointNotFound).hint is None


@pytest.mark.parametrize("verb", VERBS)
def test_a_checkpoint_that_a_crashed_save_set_aside(path, verb):
    """A crash between two renames, where directories cannot be exchanged."""
    os.rename(path, path.with_name(".lenet.replaced-0123abcd"))
    error = refused(verb, path, CheckpointNotFound)
    command = re.findall("`(.*?)`", error.hint)[0]
    assert CliRunner().invoke(main, command.split()[1:]).exit_code == 0
    assert vs.load(path).keys() == VALUES.keys()


def test_a_save_that_was_interrupted(tmp_path):
    (tmp_path / ".lenet.saving-0123abcd" / "w").mkdir(parents=True)
    error = refused(vs.open, tmp_path / "lenet", CheckpointNotFound)
    assert "'.lenet.saving-0123abcd'" in error.hint
    command = re.findall("`(.*?)`", error.hint)[0]
    assert CliRunner().invoke(main, command.split()[1:]).exit_code == 0
    assert os.listdir(tmp_path) == []


def test_the_moment_between_two_renames_is_waited_for(path):
    aside = path.with_name(".lenet.replaced-0123abcd")
    os.rename(path, aside)
    back = threading.Thread(target=lambda: (time.sleep(0.1), os.rename(aside, path)))
    back.start()
    assert vs.load(path).keys() == VALUES.keys()
    back.join()


def test_a_run(tmp_path):
    manager = vs.CheckpointManager(tmp_path / "run", durable=False)
    manager.save(3, {"w": np.ones(2)})
    for verb in (vs.open, vs.seal):
        error = refused(verb, tmp_path / "run", IncompleteCheckpoint)
        (such,) = re.findall(r"such as '(.*)'", error.hint)
        assert vs.load_state(such)["w"].tolist() == [1, 1]


def test_an_incomplete_checkpoint(path):
    (path / "snapshot_done").unlink()
    error = refused(vs.open, path, IncompleteCheckpoint)
    assert "allow_incomplete=True" in error.hint
    assert vs.open(path, allow_incomplete=True).keys() == VALUES.keys()


@pytest.mark.parametrize("inside", [[], ["notes.txt"], ["src/train.py"]])
def test_a_folder_without_variables(tmp_path, inside):
    for name in inside:
        (tmp_path / "x" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "x" / name).touch()
    (tmp_path / "x").mkdir(exist_ok=True)
    assert refused(vs.open, tmp_path / "x", IncompleteCheckpoint).hint == "check the path: no variable was found in it"


def test_a_folder_of_safetensors(tmp_path):
    (tmp_path / "x").mkdir()
    vs.write(tmp_path / "x" / "m.safetensors.index.json", VALUES, shard_bytes=16)
    assert "varstore.read opens it" in refused(vs.open, tmp_path / "x", IncompleteCheckpoint).hint
    assert vs.read(tmp_path / "x").keys() == VALUES.keys()


@pytest.mark.parametrize("name", sorted(FOREIGN_NAMES))
def test_folders_of_other_systems(tmp_path, name):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / name).touch()
    assert "varstore.read" in refused(vs.open, tmp_path / "x", IncompleteCheckpoint).hint
    assert detect(tmp_path / "x").name != "varstore"


def test_a_file(tmp_path):
    vs.write(tmp_path / "x.npz", VALUES)
    assert "varstore.read" in refused(vs.open, tmp_path / "x.npz", CheckpointNotFound).hint
    assert vs.read(tmp_path / "x.npz").keys() == VALUES.keys()
