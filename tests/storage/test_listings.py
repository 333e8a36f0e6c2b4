"""A descriptor of a folder may list only what there was when it was opened, as on btrfs, and only once, as on sshfs."""

import os
import stat
from functools import partial

import numpy as np
import pytest

import varstore as vs
from varstore.errors import CheckpointExists
from varstore.storage import claims, syscalls
from varstore.storage.claims import sign
from varstore.values.lazy import LazyArray


class Entries(list):
    """What `os.scandir` returns."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


@pytest.fixture
def stale(monkeypatch):
    """Let each descriptor list what there was when it was opened, and nothing the second time."""
    shown = {}
    listdir, scandir = os.listdir, os.scandir

    def noted(call, *args, **options):
        fd = call(*args, **options)
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            shown[fd] = {*listdir(fd)}
        return fd

    def listed(place="."):
        return sorted(shown.pop(place, ())) if isinstance(place, int) else listdir(place)

    def scanned(place="."):
        if not isinstance(place, int):
            return scandir(place)
        names = shown.pop(place, ())
        with scandir(place) as entries:
            return Entries(entry for entry in entries if entry.name in names)

    monkeypatch.setattr(os, "open", partial(noted, os.open))
    monkeypatch.setattr(syscalls, "_openat2", partial(noted, syscalls._openat2))
    monkeypatch.setattr(os, "listdir", listed)
    monkeypatch.setattr(os, "scandir", scanned)


def late(fetch):
    """Return variables of which the last one comes from a function."""
    return {"a/w": np.ones(3), "late": LazyArray((3,), np.dtype(float), fetch)}


def refuse():
    raise ArithmeticError


def test_a_save_that_fails_leaves_nothing(stale, tmp_path, monkeypatch):
    with pytest.raises(ArithmeticError):
        vs.save(tmp_path / "runs" / "c", late(refuse))
    assert os.listdir(tmp_path) == []
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ArithmeticError):
        vs.save(".", late(refuse))
    assert os.listdir(tmp_path) == []


def test_the_loser_of_two_writers_leaves_nothing(stale, tmp_path):
    def fetch():
        vs.save(tmp_path / "c", {"w": np.zeros(3)})
        return np.ones(3)

    with pytest.raises(CheckpointExists):
        vs.save(tmp_path / "c", late(fetch))
    assert os.listdir(tmp_path) == ["c"]
    vs.save(tmp_path / "c", late(partial(np.ones, 3)), overwrite=True)
    assert os.listdir(tmp_path) == ["c"]


def test_what_a_killed_save_left_in_place_goes(stale, tmp_path):
    fd = os.open(tmp_path, os.O_RDONLY)
    sign(fd, ["a"])
    os.close(fd)
    (tmp_path / "a" / "w").mkdir(parents=True)
    (tmp_path / "a" / "w" / "out").write_bytes(b"12")
    assert len(vs.clean(tmp_path)) == 2
    assert os.listdir(tmp_path) == []


@pytest.fixture
def shared(tmp_path, monkeypatch):
    """Take the file system for one that other machines change too."""
    monkeypatch.setattr(syscalls, "SHARED_FILE_SYSTEMS", {syscalls.file_system_type(str(tmp_path))})


def test_a_staging_folder_whose_note_is_not_written_yet_stays(shared, tmp_path):
    left = tmp_path / ".c.saving-0123abcd"
    (left / "w").mkdir(parents=True)
    (left / ".saving-0123abcd").write_bytes(b"")
    assert vs.clean(tmp_path) == []
    (left / ".saving-0123abcd").unlink()
    assert vs.clean(tmp_path) == [str(left)]


def test_a_list_made_while_the_marker_comes_and_the_note_goes_is_made_again(shared, tmp_path, monkeypatch):
    left = tmp_path / ".c.saving-0123abcd"
    (left / "w").mkdir(parents=True)
    missed = []

    def names_in(fd):
        missed.append(names_in_now(fd))
        if len(missed) == 2:  # the first one was made to look for the note
            (left / "snapshot_done").touch()
        return missed[-1]

    names_in_now = syscalls.names_in
    monkeypatch.setattr(syscalls, "names_in", names_in)
    assert vs.clean(tmp_path, name="c") == []
    assert missed[:2] == [["w"], ["w"]]


@pytest.mark.parametrize("target", ["c", "c.npz", "c.zarr"])
def test_what_a_cleaner_kept_a_writer_from_taking_goes_too(shared, tmp_path, monkeypatch, target):
    import varstore.disk.save.staging as staging
    import varstore.storage.appearing as appearing

    module = staging if target == "c" else appearing
    claimed, refused = module.claim_new, []

    def claim_new(fd, name, dir_fd):
        if not refused:
            refused.append(name)
            raise BlockingIOError
        return claimed(fd, name, dir_fd)

    monkeypatch.setattr(module, "claim_new", claim_new)
    vs.write(tmp_path / target, {"w": np.ones(3)})
    assert refused
    assert os.listdir(tmp_path) == [target]


def test_a_machine_that_is_a_copy_of_another_one_is_another_machine(monkeypatch):
    def writer(addresses, boot):
        monkeypatch.setattr(claims, "_hardware", lambda: addresses)
        claims._this_machine.cache_clear()
        return claims.Writer(*claims._this_machine(), "1", "0")._replace(boot=boot)

    try:
        here, copy = writer(["a"], "earlier"), writer(["b"], "earlier")
        assert (here.is_gone, copy.is_gone) == (False, True)
        assert not writer([], "earlier").is_gone  # a container: it may be the machine of another one
        assert here[0] == copy[0]
    finally:
        claims._this_machine.cache_clear()


def test_a_child_may_be_in_another_namespace(monkeypatch):
    before = claims._this_machine()
    monkeypatch.setattr(os, "readlink", lambda path: "pid:[9]")
    assert claims._this_machine() == before
    child = os.fork()
    if child == 0:
        os._exit(claims._this_machine()[3] != "pid:[9]")
    assert os.waitpid(child, 0)[1] == 0


def test_what_another_machine_still_writes_stays(stale, shared, tmp_path):
    left = tmp_path / ".c.saving-0123abcd"
    (left / "w").mkdir(parents=True)
    (left / ".saving-0123abcd").write_text("writer/elsewhere/1/2/pid:[3]/4/5")
    for path in (left / ".saving-0123abcd", left / "w", left):
        os.utime(path, (1e9, 1e9))
    (left / "w" / "out").write_bytes(b"12")
    for path in (left / "w", left):
        os.utime(path, (1e9, 1e9))
    assert vs.clean(tmp_path) == []
    assert list(vs.clean(tmp_path).kept) == [str(left)]
