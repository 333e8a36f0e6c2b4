"""A store that is mounted twice, as on two machines: what one mount replaces or removes, the other one sees late."""

import contextlib
import os
import random
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest

import varstore as vs
from tools.faults.races import BY_PATH, FILLINGS, filling_of, losses, overwriting, save, values_of
from varstore.errors import CheckpointNotFound, DigestMismatch, IncompleteCheckpoint, StorageError
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
