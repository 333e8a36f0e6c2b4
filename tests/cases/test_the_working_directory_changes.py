"""A relative path means the directory that was the working directory at the call, whatever ``chdir`` does later."""

import os
import threading

import numpy as np
import pytest

import varstore as vs

VALUES = {"w": np.arange(6.0), "v/x": np.ones((2, 3), "f4")}
OTHERS = {"w": np.zeros(6), "v/x": np.zeros((2, 3), "f4")}


@pytest.fixture
def places(tmp_path, monkeypatch):
    """Two directories; the first is the working directory."""
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    monkeypatch.chdir(here)
    return here, there


@pytest.fixture
def moving_thread(places, monkeypatch):
    """The working directory changes between the call and the first step of the thread that it starts."""
    start = threading.Thread.start

    def moved(thread):
        os.chdir(places[1])
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", moved)


def assert_holds(path, values):
    found = vs.load(path)
    assert {name: array.tolist() for name, array in found.items()} == {
        name: array.tolist() for name, array in values.items()
    }


def test_a_background_save_goes_where_it_was_meant(places, moving_thread):
    here, there = places
    pending = vs.save_async("c", VALUES)
    pending.wait(20)
    assert os.listdir(there) == []
    assert_holds(here / "c", VALUES)
    assert_holds(pending.result(), VALUES)


def test_a_background_save_of_state_goes_where_it_was_meant(places, moving_thread):
    here, there = places
    vs.save_state_async("c", {"state": VALUES}).wait(20)
    assert os.listdir(there) == []
    assert (here / "c").is_dir()


def test_the_result_of_a_background_save_is_that_checkpoint(places):
    there = places[1]
    pending = vs.save_async("c", VALUES)
    pending.wait(20)
    os.chdir(there)
    assert_holds(pending.result(), VALUES)


def test_a_save_during_which_the_directory_changes(places):
    here, there = places
    saved = vs.save("c", VALUES, progress=lambda done, total: os.chdir(there))
    assert os.listdir(there) == []
    assert_holds(here / "c", VALUES)
    assert_holds(saved, VALUES)


def test_a_manager_saves_where_it_was_made(places, moving_thread):
    here, there = places
    manager = vs.CheckpointManager("run", background=True)
    manager.save(1, VALUES)
    manager.wait()
    assert os.listdir(there) == []
    assert_holds(here / "run" / "step-1", VALUES)
    assert manager.latest().path == str(here / "run" / "step-1")


def into(checkpoint, targets):
    vs.load_into(targets, checkpoint, include="w")
    return targets


USES = {
    "numpy": lambda checkpoint: checkpoint["w"].numpy(),
    "mmap": lambda checkpoint: checkpoint["w"].numpy(mmap=True),
    "slice": lambda checkpoint: checkpoint["w"][:],
    "load": lambda checkpoint: vs.load(checkpoint)["w"],
    "load_into": lambda checkpoint: into(checkpoint, {"w": np.zeros(6)})["w"],
    "link": lambda checkpoint: vs.load(vs.save("copy", checkpoint))["w"],
    "base": lambda checkpoint: vs.load(vs.save("copy", VALUES, base=checkpoint))["w"],
}


@pytest.mark.parametrize("there_is", ["nothing", "folder", "checkpoint"])
@pytest.mark.parametrize("use", USES)
def test_a_handle_stays_where_it_was_opened(places, use, there_is):
    there = places[1]
    vs.save("c", VALUES)
    checkpoint = vs.open("c")
    os.chdir(there)
    if there_is == "folder":
        os.mkdir("c")
    if there_is == "checkpoint":
        vs.save(there / "c", OTHERS)
    assert USES[use](checkpoint).tolist() == [*range(6)]
    checkpoint.close()


@pytest.mark.parametrize("suffix", ["safetensors", "npz", "pt", "mge", "zarr", "of", "pdparams"])
def test_a_file_of_another_system_stays_where_it_was_opened(places, suffix):
    there = places[1]
    vs.write(f"f.{suffix}", {"w": np.arange(6.0)})
    opened = vs.read(f"f.{suffix}")
    os.chdir(there)
    vs.write(f"f.{suffix}", {"w": np.zeros(6)})
    assert np.asarray(opened["w"]).tolist() == [*range(6)]
