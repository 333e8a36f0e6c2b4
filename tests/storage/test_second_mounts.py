"""A store that is mounted twice, as on two machines: what one mount replaces or removes, the other one sees late."""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import varstore as vs
from tools.faults.races import BY_PATH, FILLINGS, filling_of, losses, overwriting, save, values_of
from varstore.errors import CheckpointExists, CheckpointNotFound, DigestMismatch, IncompleteCheckpoint, StorageError
from varstore.storage import syscalls
from varstore.storage.directory import is_shared

USES = {name: BY_PATH[name] for name in ("open", "load", "load mapped", "load_into", "verify", "seal")}
USES["slice"] = lambda path: filling_of({name: variable[...] for name, variable in vs.open(path).items()})


@pytest.fixture(scope="module")
def mounts():
    """The same directory twice; each mount has a process and caches of its own."""
    if shutil.which("bindfs") is None or os.geteuid() != 0:
        pytest.skip("bindfs is not installed, or nothing can be mounted")
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as folder:
        store, here, there = (Path(folder, name) for name in ("store", "here", "there"))
        for place in (store, here, there):
            place.mkdir()
        with contextlib.ExitStack() as mounted:
            for place in (here, there):
                done = subprocess.run(["bindfs", store, place], capture_output=True, text=True)
                if done.returncode:
                    pytest.skip(f"bindfs cannot mount: {done.stderr.strip()[-200:]}")
                mounted.callback(subprocess.run, ["umount", "--lazy", place], check=False)
            assert is_shared(here)
            yield here, there


@pytest.fixture
def places(mounts):
    """A folder in both mounts."""
    name = os.urandom(4).hex()
    (mounts[0] / name).mkdir()
    yield tuple(mount / name for mount in mounts)
    shutil.rmtree(mounts[0] / name, ignore_errors=True)


@pytest.mark.parametrize("manifest", [True, False], ids=["manifest", "plain"])
@pytest.mark.parametrize("use", USES)
def test_nothing_is_mixed_and_no_damage_is_told_beside_a_writer_elsewhere(places, use, manifest):
    here, there = places
    save(here / "c", FILLINGS[0], manifest=manifest)
    told = []
    with overwriting(here / "c", manifest):
        until = time.monotonic() + 5
        for _ in range(25):
            if time.monotonic() < until:
                told += losses(USES[use], there / "c")
    assert {kind for kind, _ in told} <= {"ERROR"}, told


@pytest.mark.parametrize("manifest", [True, False], ids=["manifest", "plain"])
def test_a_removal_elsewhere_leaves_all_variables_or_an_error(places, manifest):
    here, there = places
    values = values_of(1)
    whole = 0
    for at in range(2 * len(values) + 3):
        path = f"c{at}"
        save(here / path, 1, manifest=manifest)
        assert filling_of(vs.load(there / path)) == 1  # it is in the caches now
        files = [os.path.join(folder, name) for folder, _, names in os.walk(here / path) for name in names]
        files.remove(str(here / path / "snapshot_done"))
        random.Random(at).shuffle(files)
        for file in [here / path / "snapshot_done", *files][:at]:
            os.unlink(file)
        try:
            assert filling_of(vs.load(there / path)) == 1
            whole += 1
        except (IncompleteCheckpoint, CheckpointNotFound, StorageError):
            assert at
    assert whole >= 1


@pytest.mark.parametrize("manifest", [True, False], ids=["manifest", "plain"])
def test_what_nobody_touched_is_not_replaced(places, manifest):
    here, there = places
    save(here / "c", 1, manifest=manifest)
    handle = vs.open(there / "c")
    assert not handle.is_replaced
    assert filling_of(vs.load(handle)) == 1


def test_damage_is_still_told(places):
    here, there = places
    save(here / "c", 1, manifest=True)
    (here / "c" / "v1" / "out").unlink()
    (here / "c" / "v1" / "out").write_bytes(np.zeros(41, np.int16).tobytes())
    with pytest.raises(DigestMismatch, match="v1"):
        vs.load(there / "c")
    assert not vs.verify(there / "c").ok


SAVER = """
import sys, time
from functools import partial
import numpy as np
import varstore as vs
from varstore.values.lazy import LazyArray
def late(i):
    time.sleep(float(sys.argv[2]))
    return np.full(9, i, np.float32)
values = {f"v{i}": LazyArray((9,), np.dtype("f4"), partial(late, i)) for i in range(10)}
print("ready", flush=True)
vs.save(sys.argv[1], values, threads=1, durable=sys.argv[3] == "durable")
"""


@contextlib.contextmanager
def saving(path, seconds, *, durable=False):
    """Start a process that takes some seconds to save ten variables, and wait until it has signed its folder."""
    arguments = [str(path), str(seconds / 10), "durable" if durable else ""]
    command = [sys.executable, "-c", SAVER, *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == "ready\n"
            deadline = time.monotonic() + 10
            while process.poll() is None and not signed_in(path.parent) and time.monotonic() < deadline:
                time.sleep(0.01)
            yield process
        finally:
            process.kill()


def staged(folder):
    return [name for name in os.listdir(folder) if ".saving-" in name]


def signed_in(folder):
    """Return the notes that say whose a save's folder is, in a bindfs mount's store, which is never seen late."""
    notes = (folder.parents[1] / "store" / folder.name).glob(".*.saving-*/.saving-*")
    with contextlib.suppress(FileNotFoundError):
        return [note for note in notes if note.stat().st_size]  # a moment before, it has no text
    return []


def age(folder):
    """Make everything in a folder two days old."""
    for place, folders, files in os.walk(folder, topdown=False):
        for name in (*folders, *files):
            os.utime(os.path.join(place, name), (time.time() - 2 * 86400,) * 2)
    os.utime(folder, (time.time() - 2 * 86400,) * 2)


def signed(folder, **changes):
    """Give the note of a staging folder another writer."""
    (note,) = (name for name in os.listdir(folder) if name.startswith(".saving-"))
    signature, *parts = (folder / note).read_text().split("/")
    fields = dict(zip(("host", "machine", "boot", "space", "process", "began"), parts, strict=True)) | changes
    (folder / note).unlink()
    (folder / note).write_text("/".join((signature, *fields.values())))


def abandoned(here):
    """Leave what a killed save leaves, and return the path of it."""
    with saving(here / "killed", 30) as process:
        process.send_signal(signal.SIGKILL)
    (name,) = staged(here)
    return here / name


@pytest.mark.parametrize("durable", [False, True], ids=["", "durable"])
def test_a_slow_save_succeeds_beside_cleaning_saving_and_a_manager_elsewhere(places, durable):
    here, there = places
    with saving(here / "c", 5, durable=durable) as process:
        rounds = 0
        while process.poll() is None:
            cleaned = vs.clean(there)
            assert cleaned == []
            if rounds < 3:  # while it writes
                (whose,) = cleaned.kept.values()
                assert whose == f"process {process.pid} on {os.uname().nodename}"
            vs.CheckpointManager(there)
            vs.save(there / "other", values_of(1), overwrite=True, durable=False)
            rounds += 1
    assert process.returncode == 0
    assert rounds > 3
    assert vs.verify(there / "c").ok
    assert sorted(os.listdir(there)) == ["c", "other"]
    assert not [name for name in os.listdir(here / "c") if name.startswith(".")]


def test_a_save_to_the_same_name_elsewhere_leaves_the_slow_one_alone(places):
    here, there = places
    with saving(here / "c", 2) as process:
        vs.save(there / "c", values_of(1))
        assert staged(there)
        assert "CheckpointExists" in process.communicate()[1]
    assert filling_of(vs.load(here / "c")) == 1
    assert os.listdir(there) == ["c"]


def test_what_a_killed_save_of_this_machine_left_goes_at_once(places):
    here, there = places
    left = abandoned(here)
    assert vs.clean(there) == [str(there / left.name)]
    assert os.listdir(here) == []


@pytest.mark.parametrize("by", ["clean", "save", "manager"])
def test_what_another_machine_left_goes_when_it_is_a_day_old(places, by):
    here, there = places
    uses = {
        "clean": lambda: vs.clean(there),
        "save": lambda: vs.save(there / "killed", values_of(1), overwrite=True),
        "manager": lambda: vs.CheckpointManager(there),
    }
    left = abandoned(here)
    signed(left, host="elsewhere", boot="another")
    uses[by]()
    assert (there / left.name).exists()
    kept = vs.clean(there).kept
    assert list(kept) == [str(there / left.name)]
    assert kept[str(there / left.name)].endswith(" on elsewhere")
    age(there / left.name)
    uses[by]()
    assert not (there / left.name).exists()


def test_a_process_of_another_boot_is_gone_and_one_in_another_container_may_live(places):
    here, there = places
    left = abandoned(here)
    signed(left, space="pid:[1]")
    assert vs.clean(there) == []
    signed(left, boot="an earlier one")
    assert vs.clean(there) == [str(there / left.name)]


def test_a_folder_that_nobody_signed_goes_by_its_lock(places):
    here, there = places
    for name in (".c.saving-0123abcd", ".d.saving-0123abcd"):
        (here / name / "w").mkdir(parents=True)
        (here / name / "w" / "out").write_bytes(b"12")
    fd = os.open(there / ".d.saving-0123abcd", os.O_RDONLY)
    syscalls.flock(fd, syscalls.LOCK)
    assert vs.clean(there) == [str(there / ".c.saving-0123abcd")]
    os.close(fd)
    assert vs.clean(there) == [str(there / ".d.saving-0123abcd")]


def test_a_folder_of_another_format_that_is_being_written_stays_for_a_day(places):
    here, there = places
    left = there / ".c.zarr.0123abcd.tmp"
    (here / left.name).mkdir()
    (here / left.name / "zarr.json").write_text("{}")
    cleaned = vs.clean(there)
    assert cleaned == []
    assert cleaned.kept == {str(left): "a process that is not known"}
    age(left)
    assert vs.clean(there) == [str(left)]


def test_a_folder_that_is_complete_and_waits_for_its_name_is_left(places):
    here, there = places
    vs.save(here / "c", values_of(1))
    os.rename(here / "c", here / ".c.saving-0123abcd")
    assert vs.clean(there) == []
    assert staged(here)
    age(there / ".c.saving-0123abcd")
    assert len(vs.clean(there)) == 1


def test_a_checkpoint_that_a_manager_deleted_goes_at_once(places):
    here, there = places
    manager = vs.CheckpointManager(here, keep=vs.Latest(1))
    for step in range(3):
        manager.save(step, values_of(1))
    manager.wait()
    assert os.listdir(there) == ["step-2"]


@pytest.mark.parametrize("durable", [False, True])
def test_two_writers_on_two_mounts(places, durable):
    for turn in range(8):
        told = {}
        start = threading.Barrier(2)

        def write(filling, path, told=told, start=start):
            start.wait()
            try:
                vs.save(path, values_of(filling), durable=durable)
                told[filling] = "saved"
            except vs.VarstoreError as error:
                told[filling] = type(error)

        threads = [
            threading.Thread(target=write, args=(filling, place / f"c{turn}"))
            for filling, place in zip(FILLINGS, places, strict=True)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        (winner,) = (filling for filling, what in told.items() if what == "saved")
        assert CheckpointExists in told.values()
        assert filling_of(vs.load(places[0] / f"c{turn}")) == winner
    assert not staged(places[0])
