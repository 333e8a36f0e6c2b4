"""A small file system that fills up, and limits that say something else: what is there stays, and the error is true."""

import contextlib
import errno
import os
import resource
import shutil
import subprocess

import numpy as np
import pytest
from support.confined import confined

import varstore as vs
from varstore.errors import OutOfSpace

KIB, MIB = 1 << 10, 1 << 20
VALUES = {"w": np.ones(50_000)}


@pytest.fixture
def disk(tmp_path):
    """An empty file system of 8 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    if shutil.which("mount") is None:
        pytest.skip("there is no mount")
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", place], check=False, capture_output=True)
    if done.returncode:
        pytest.skip(f"not permitted to mount here: {done.stderr.decode().strip()}")
    yield place
    subprocess.run(["umount", "--lazy", place], check=True)


def fill(disk, *, left=0):
    """Leave so many bytes free."""
    status = os.statvfs(disk)
    (disk / "fill").write_bytes(bytes(max(0, status.f_bavail * status.f_frsize - left)))


def steps(manager):
    return [saved.step for saved in manager.all()]


def test_a_manager_keeps_its_steps_when_the_disk_is_full(disk):
    manager = vs.CheckpointManager(disk / "run", keep=vs.Latest(2), link_unchanged=False)
    for step in range(1, 4):
        manager.save(step, {"w": np.full(MIB // 4, float(step))})
    with pytest.raises(OutOfSpace, match="nothing was written"):
        manager.save(9, {"w": np.ones(MIB // 2)})
    assert steps(manager) == [2, 3]
    assert manager.restore()["w"][0] == 3
    assert sorted(os.listdir(disk / "run")) == ["step-2", "step-3"]


def test_an_error_in_the_background_is_raised_by_the_manager_if_nobody_asked(disk):
    manager = vs.CheckpointManager(disk / "run", background=True)
    manager.save(1, {"w": np.ones(2 * MIB)})
    with pytest.raises(OutOfSpace, match="step-1"):
        manager.wait()
    manager.save(2, VALUES)
    manager.wait()
    assert steps(manager) == [2]


def test_an_error_in_the_background_is_raised_once(disk):
    manager = vs.CheckpointManager(disk / "run", background=True)
    pending = manager.save(1, {"w": np.ones(2 * MIB)})
    with pytest.raises(OutOfSpace):
        pending.wait(20)
    manager.save(2, VALUES)
    manager.wait()
    assert steps(manager) == [2]


def test_the_step_after_an_error_is_saved(disk):
    manager = vs.CheckpointManager(disk / "run", background=True)
    manager.save(1, {"w": np.ones(2 * MIB)})
    with contextlib.suppress(OutOfSpace):
        manager.save(2, VALUES)
    with contextlib.suppress(OutOfSpace):
        manager.wait()
    assert steps(manager) == [2]


@pytest.mark.parametrize("values", [{f"v{i}": np.ones(1) for i in range(2000)}, VALUES], ids=["many", "one"])
def test_a_save_that_does_not_fit_leaves_nothing(disk, values):
    fill(disk, left=300_000)
    with pytest.raises(OutOfSpace) as caught:
        vs.save(disk / "c", values)
    assert caught.value.errno == errno.ENOSPC
    assert os.listdir(disk) == ["fill"]


@pytest.mark.parametrize("there_is", ["nothing", "a file"])
@pytest.mark.parametrize("suffix", ["pt", "safetensors", "npz", "mge", "pdparams", "ckpt"])
def test_a_file_that_does_not_fit_leaves_what_was_there(disk, suffix, there_is):
    path = disk / f"f.{suffix}"
    if there_is == "a file":
        path.write_bytes(b"precious")
    before = set(os.listdir(disk))
    fill(disk, left=300_000)
    with pytest.raises(OutOfSpace, match="No space left"):
        vs.write(path, VALUES)
    assert set(os.listdir(disk)) == before | {"fill"}
    assert not before or path.read_bytes() == b"precious"


def test_an_overwrite_and_a_seal_that_do_not_fit_leave_the_old(disk):
    vs.save(disk / "c", {"w": np.ones(300_000)})
    with pytest.raises(OutOfSpace):
        vs.save(disk / "c", {"w": np.zeros(MIB)}, overwrite=True)
    fill(disk)
    with pytest.raises(OutOfSpace):
        vs.seal(disk / "c")
    assert vs.load(disk / "c")["w"].sum() == 300_000
    assert vs.verify(disk / "c").ok
    assert sorted(os.listdir(disk)) == ["c", "fill"]


def test_trimming_on_a_full_disk_loses_nothing(disk):
    options = {"keep": vs.Latest(3), "keep_parts": {"opt/*": vs.Latest(1)}}
    first = vs.CheckpointManager(disk / "run", keep=vs.Latest(3))
    for step in (1, 2):
        first.save(step, {"w": np.ones(30_000), "opt": {"m": np.full(100_000, float(step))}})
    fill(disk)
    with contextlib.suppress(OutOfSpace):
        vs.CheckpointManager(disk / "run", **options).prune()
    manager = vs.CheckpointManager(disk / "run")
    assert steps(manager) == [1, 2]
    assert all(vs.verify(saved).ok for saved in manager.all())
    assert manager.restore(1)["w"].sum() == 30_000
    assert manager.restore(2)["opt"]["m"][0] == 2


LIMITED = """
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
try:
    SAVE
except vs.errors.StorageError as error:
    said = [error.errno, str(error)]
finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
tell(said)
"""


@pytest.mark.parametrize("name", ["c", "f.pt", "f.safetensors", "f.npz"])
def test_a_limit_of_a_file_is_not_a_full_disk(tmp_path, name):
    save = "vs.save" if name == "c" else "vs.write"
    number, message = confined(LIMITED.replace("SAVE", f"{save}(argv[0], {{'w': np.ones(100_000)}})"), tmp_path / name)
    assert number == errno.EFBIG
    assert "File too large" in message
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("spare", [24, 9])
def test_few_descriptors_are_enough(tmp_path, spare):
    used = max(map(int, os.listdir("/proc/self/fd")))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + spare, hard))
    try:
        vs.save(tmp_path / "c", {f"v{i}/a": np.ones(3) for i in range(300)})
        assert len(vs.load(tmp_path / "c")) == 300
        assert vs.verify(tmp_path / "c").ok
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
