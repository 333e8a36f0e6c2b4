"""Other users of the machine, who plant links and folders where we save, clean and read: two users, played by root."""

import contextlib
import os
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import pytest

import varstore as vs
from varstore.storage import syscalls

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="acts as two users, which only root can")

VICTIM, ATTACKER = 2001, 2002


@contextlib.contextmanager
def acting_as(uid):
    groups = os.getgroups()
    os.setgroups([])
    os.setegid(uid)
    os.seteuid(uid)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)
        os.setgroups(groups)


@pytest.fixture(scope="module", autouse=True)
def imported(tmp_path_factory):
    """Import all that is imported when it is first needed: other users may not read this interpreter."""
    place = tmp_path_factory.mktemp("imported")
    for _ in range(2):
        for suffix in ("safetensors", "npz", "pt", "mge", "pdparams", "npy", "of", "zarr"):
            with contextlib.suppress(vs.errors.CheckpointExists):
                vs.write(place / f"f.{suffix}", {"x": np.arange(3, dtype="f4")})
        vs.save(place / "c", {"a": np.arange(3)}, overwrite=True)
        vs.save(place / "d", vs.open(place / "c"), overwrite=True)
    vs.clean(place)
    with pytest.raises(vs.VarstoreError):
        vs.save(place / "c" / "a" / "out", {"a": np.arange(3)})


@pytest.fixture
def place():
    """A directory that everybody can reach, with a home of the victim and a directory for all, as /tmp is."""
    place = Path(tempfile.mkdtemp())
    mask = os.umask(0o022)
    place.chmod(0o755)
    (place / "home").mkdir()
    os.chown(place / "home", VICTIM, VICTIM)
    (place / "all").mkdir()
    (place / "all").chmod(0o1777)
    yield place
    os.umask(mask)
    shutil.rmtree(place)


@pytest.fixture
def home(place):
    return place / "home"


@pytest.fixture
def everybody(place):
    return place / "all"


def mode(path):
    return stat.S_IMODE(os.lstat(path).st_mode)


def owner(path):
    return os.lstat(path).st_uid


# --- links at the target -----------------------------------------------------------------------------------------

SAVES = {
    "save": lambda path: vs.save(path, {"junk": np.arange(1)}, overwrite=True),
    "save_async": lambda path: vs.save_async(path, {"junk": np.arange(1)}, overwrite=True).wait(20),
    "manager": lambda path: vs.CheckpointManager(path.parent).save(7, {"junk": np.arange(1)}, overwrite=True),
}


@pytest.mark.parametrize("save", SAVES)
def test_a_dangling_link_at_the_target_is_refused(home, everybody, save):
    with acting_as(ATTACKER):
        (everybody / "step-7").symlink_to(home / "autoload")
    with acting_as(VICTIM), pytest.raises(vs.VarstoreError, match="step-7"):
        SAVES[save](everybody / "step-7")
    assert os.listdir(home) == []
    assert os.listdir(everybody) == ["step-7"]


@pytest.mark.parametrize("save", SAVES)
def test_a_link_at_the_target_does_not_replace_what_it_leads_to(home, everybody, save):
    with acting_as(VICTIM):
        vs.save(home / "best", {"precious": np.arange(5)})
    with acting_as(ATTACKER):
        (everybody / "step-7").symlink_to(home / "best")
    with acting_as(VICTIM), pytest.raises(vs.VarstoreError, match="step-7"):
        SAVES[save](everybody / "step-7")
    assert vs.load(home / "best")["precious"].tolist() == [*range(5)]
    assert os.listdir(everybody) == ["step-7"]


@pytest.mark.parametrize("suffix", ["safetensors", "npz", "pt", "mge", "of", "zarr"])
def test_a_link_at_the_target_of_write_is_not_followed(home, everybody, suffix):
    with acting_as(VICTIM):
        vs.write(home / f"best.{suffix}", {"precious": np.arange(5, dtype="f4")})
    with acting_as(ATTACKER):
        (everybody / f"x.{suffix}").symlink_to(home / f"best.{suffix}")
    with acting_as(VICTIM), contextlib.suppress(vs.VarstoreError):
        vs.write(everybody / f"x.{suffix}", {"junk": np.arange(1, dtype="f4")})
    assert list(vs.read(home / f"best.{suffix}")) == ["precious"]


# --- modes and owners --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["safetensors", "npz", "pt", "mge", "pdparams", "npy"])
def test_a_file_that_is_replaced_keeps_its_mode(home, suffix):
    path = home / f"x.{suffix}"
    with acting_as(VICTIM):
        vs.write(path, {"x": np.arange(3)})
        path.chmod(0o600)
        vs.write(path, {"x": np.arange(4)})
    assert oct(mode(path)) == oct(0o600)


def test_a_checkpoint_that_is_replaced_keeps_its_mode(home):
    with acting_as(VICTIM):
        vs.save(home / "c", {"a": np.arange(3)})
        (home / "c").chmod(0o700)
        vs.save(home / "c", {"a": np.arange(4)}, overwrite=True)
    assert oct(mode(home / "c")) == oct(0o700)


@pytest.mark.parametrize("overwrite", [False, True], ids=["new", "overwrite"])
def test_a_checkpoint_that_is_being_written_is_ours_alone(home, overwrite):
    if overwrite:
        vs.save(home / "c", {"a": np.arange(3)})
        (home / "c").chmod(0o777)
    seen = set()

    def look(done, total):
        seen.update(oct(mode(home / name)) for name in os.listdir(home) if ".saving-" in name)

    os.umask(0)
    vs.save(home / "c", {"a": np.arange(4)}, overwrite=overwrite, progress=look)
    assert mode(home / "c") == 0o777
    assert seen == {oct(0o700)}


USES = {
    "copy": lambda path, source: vs.save(path, vs.open(source)),
    "base": lambda path, source: vs.save(path, {"w": np.arange(4, dtype=np.int8)}, base=source),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("user", [pytest.param(0, id="root"), pytest.param(VICTIM, id="user")])
def test_files_of_another_user_are_copied_not_linked(place, home, everybody, use, user):
    with acting_as(ATTACKER):
        (everybody / "theirs").mkdir()
        vs.save(everybody / "theirs" / "m", {"w": np.arange(4, dtype=np.int8)})
    with acting_as(user):
        USES[use](home / "copy", everybody / "theirs" / "m")
    with acting_as(ATTACKER):
        out = everybody / "theirs" / "m" / "w" / "out"
        out.chmod(0o644)
        out.write_bytes(b"\x63\x01\x02\x03")
    assert vs.open(home / "copy")["w"][:2].tolist() == [0, 1]
    assert {owner(path) for path in (home / "copy").rglob("*")} == {user}


def test_a_variable_is_not_explained_by_a_directory_of_another_owner(everybody):
    with acting_as(ATTACKER):
        vs.save(everybody / "evil", {"vv/conv1": np.arange(4, dtype=np.int8).reshape(2, 2)}, attributes={"evil": True})
    with acting_as(VICTIM):
        (everybody / "vv" / "conv1").mkdir(parents=True)
        (everybody / "vv/conv1/out").write_bytes(b"\1\2\3\4")
        (everybody / "vv/conv1/meta").write_text("shape {\n  dim: 4\n}\ndata_type: kInt8\n")
    with acting_as(ATTACKER):
        shutil.copy(everybody / "evil/manifest", everybody / "manifest")
        (everybody / "snapshot_done").touch()
    with acting_as(VICTIM), pytest.raises(vs.errors.IncompleteCheckpoint):
        vs.checkpoint.get(everybody / "vv" / "conv1")


# --- what is removed ---------------------------------------------------------------------------------------------

CLEANS = {
    "clean": vs.clean,
    "save": lambda place: vs.save(place / "model", {"a": np.arange(2)}),
    "manager": vs.CheckpointManager,
}


@pytest.mark.parametrize("clean", CLEANS)
def test_what_another_user_left_is_not_ours_to_remove(everybody, clean):
    with acting_as(VICTIM):
        (everybody / ".model.saving-00000000" / "x").mkdir(parents=True)
        (everybody / ".model.saving-00000000" / "x" / "important").touch()
    CLEANS[clean](everybody)
    assert (everybody / ".model.saving-00000000" / "x" / "important").exists()


@pytest.mark.parametrize("clean", CLEANS)
def test_what_another_user_set_aside_is_not_given_a_name(everybody, clean):
    with acting_as(ATTACKER):
        vs.save(everybody / "evil", {"evil": np.arange(2)})
        (everybody / "evil").rename(everybody / ".model.replaced-00000000")
        vs.save(everybody / "evil", {"evil": np.arange(2)})
        (everybody / "evil").rename(everybody / ".step-7.replaced-00000000")
    CLEANS[clean](everybody)
    assert vs.CheckpointManager(everybody).latest() is None
    assert not (everybody / "model" / "evil").exists()


def test_a_link_that_takes_the_place_of_a_leftover_is_not_followed(place, everybody, monkeypatch):
    vs.save(place / "best", {"precious": np.arange(5)})
    (everybody / ".x.saving-00000000").mkdir()
    (everybody / ".x.saving-00000000" / "f").touch()
    flock, swapped = syscalls.flock, []

    def swapping(fd, operation):
        flock(fd, operation)
        if not swapped:
            (everybody / ".x.saving-00000000").rename(everybody / "moved")
            (everybody / ".x.saving-00000000").symlink_to(place / "best")
            swapped.append(fd)

    monkeypatch.setattr(syscalls, "flock", swapping)
    vs.clean(everybody)
    assert swapped
    assert (place / "best" / "snapshot_done").exists()
    assert vs.verify(place / "best").ok


def test_a_directory_that_takes_the_place_of_the_staging_folder_is_not_used(everybody, monkeypatch):
    made, taken = os.mkdir, []

    def mkdir(path, *arguments, dir_fd=None, **options):
        made(path, *arguments, dir_fd=dir_fd, **options)
        if ".saving-" in os.fspath(path) and not taken:
            taken.append(path)
            os.rename(path, f"{path}.moved", src_dir_fd=dir_fd, dst_dir_fd=dir_fd)
            made(path, dir_fd=dir_fd)
            os.chown(path, ATTACKER, ATTACKER, dir_fd=dir_fd)
            os.chmod(path, 0o777, dir_fd=dir_fd)

    monkeypatch.setattr(os, "mkdir", mkdir)
    with contextlib.suppress(vs.errors.StorageError):
        vs.save(everybody / "c", {"a": np.arange(3)})
    assert taken
    assert not (everybody / "c").exists() or owner(everybody / "c") == 0


@pytest.mark.parametrize("where", ["beside the target", "where modes are not kept", "in place"])
def test_a_link_in_the_place_of_a_variable_is_not_written_through(place, everybody, monkeypatch, where):
    made, elsewhere, home = os.mkdir, place / "elsewhere", everybody / "home"
    for folder in (elsewhere, home):
        made(folder)
        os.chmod(folder, 0o777)
    os.umask(0)
    tried, swapped = [], []

    def mkdir(path, mode=0o777, *, dir_fd=None):
        is_open_to_all = where == "where modes are not kept" and mode == 0o700
        made(path, 0o777 if is_open_to_all else mode, dir_fd=dir_fd)
        if os.path.basename(path) == "conv":
            tried.append(path)
            with acting_as(ATTACKER), contextlib.suppress(PermissionError):
                os.rename(path, f"{path}.moved", src_dir_fd=dir_fd, dst_dir_fd=dir_fd)
                os.symlink(elsewhere, path, dir_fd=dir_fd)
                swapped.append(path)

    monkeypatch.setattr(os, "mkdir", mkdir)
    monkeypatch.chdir(home)
    with contextlib.suppress(vs.errors.StorageError):
        vs.save("." if where == "in place" else "c", {"conv/w": np.arange(3)})
    assert tried
    assert bool(swapped) == (where != "beside the target")
    assert os.listdir(elsewhere) == []


def test_a_mount_in_a_leftover_is_not_emptied(place, everybody):
    inside = everybody / ".y.saving-00000000" / "mnt"
    inside.mkdir(parents=True)
    (place / "data").mkdir()
    (place / "data" / "keep").touch()
    if subprocess.run(["mount", "--bind", place / "data", inside], check=False, capture_output=True).returncode:
        pytest.skip("not permitted to mount here")
    try:
        vs.clean(everybody)
        assert (place / "data" / "keep").exists()
    finally:
        subprocess.run(["umount", "--lazy", inside], check=True)


def test_retention_removes_a_link_and_not_what_it_leads_to(place):
    run, far = place / "run", place / "far"
    run.mkdir()
    vs.save(far / "step-1", {"a": np.arange(2)})
    (run / "step-1").symlink_to(far / "step-1")
    manager = vs.CheckpointManager(run, keep=vs.Latest(1))
    assert [saved.step for saved in manager.all()] == [1]
    manager.save(2, {"a": np.arange(3)})
    assert os.listdir(run) == ["step-2"]
    assert os.listdir(far) == ["step-1"]
    assert vs.verify(far / "step-1").ok


@pytest.mark.parametrize("user", [0, ATTACKER])
def test_retention_leaves_the_steps_of_another_user(everybody, user):
    run = everybody / "run"
    run.mkdir()
    run.chmod(0o777)
    with acting_as(VICTIM):
        vs.CheckpointManager(run).save(1, {"a": np.arange(2)})
    with acting_as(user):
        manager = vs.CheckpointManager(run, keep=vs.Latest(1))
        manager.save(2, {"a": np.arange(3)})
        assert "another user" in manager.prune(dry_run=True).held[1]
        manager.save(3, {"a": np.arange(3)})
        manager.wait()
    assert sorted(os.listdir(run)) == ["step-1", "step-3"]
    assert owner(run / "step-1") == VICTIM
    assert vs.verify(run / "step-1").ok
