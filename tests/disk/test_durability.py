"""The order in which a save becomes durable: at no moment does anything on the disk vouch for what is not there yet."""

import errno
import os

import numpy as np
import pytest

import varstore as vs
from varstore.disk.save import staging
from varstore.errors import StorageError
from varstore.storage import syscalls

pytestmark = pytest.mark.core

FEW = {"w": np.arange(5.0), "deep/er": np.ones((3, 2))}
MANY = {f"layer{i}/w": np.full(3, i) for i in range(20)} | {"big": np.zeros(5 << 20, np.uint8)}


class Disk:
    """What would be on the disk after a power cut: the sizes of files and the names in folders, when last synced."""

    def __init__(self, monkeypatch):
        self.durable = {}
        self.events = []
        self._fsync = os.fsync
        self._syncfs = syscalls.sync_file_system
        monkeypatch.setattr(syscalls, "sync", self.fsync)
        monkeypatch.setattr(syscalls, "sync_file_system", self.syncfs)

    def fsync(self, fd):
        self._fsync(fd)
        status = os.fstat(fd)
        self.durable[status.st_ino] = _state(os.path.realpath(f"/proc/self/fd/{fd}"))

    def syncfs(self, fd):
        self._syncfs(fd)
        for folder, _, files in os.walk(os.path.realpath(f"/proc/self/fd/{fd}")):
            for path in (folder, *(f"{folder}/{name}" for name in files)):
                self.durable[os.stat(path).st_ino] = _state(path)

    def without_syncfs(self, *_):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    def lost(self, root):
        """Return the files and folders below a directory, itself included, that a power cut would change."""
        paths = [root, *(f"{folder}/{name}" for folder, below, files in os.walk(root) for name in below + files)]
        return [path for path in paths if self.durable.get(os.stat(path).st_ino) != _state(path)]


def _state(path):
    return sorted(os.listdir(path)) if os.path.isdir(path) else os.stat(path).st_size


@pytest.fixture
def disk(monkeypatch):
    disk = Disk(monkeypatch)
    write_file, take_name, remove = syscalls.write_file, staging.Staging._take_name, staging.remove_old

    def writing(name, data, dir_fd, *, durable):
        root = os.path.realpath(f"/proc/self/fd/{dir_fd}")
        if name == "snapshot_done":
            in_place = os.path.basename(root) == "here"
            lost = {path for path in disk.lost(root) if not os.path.basename(path).startswith(".saving-")}
            assert lost <= (set() if in_place else {root})
        write_file(name, data, dir_fd, durable=durable)
        if name in ("manifest", "snapshot_done"):
            disk.events.append(name)

    def taking(self):
        assert disk.lost(self.path) == []
        take_name(self)
        disk.events.append("name")

    def removing(name, dir_fd, threads=1):
        assert disk.durable.get(os.fstat(dir_fd).st_ino) == sorted(os.listdir(dir_fd))
        remove(name, dir_fd)
        disk.events.append("removed")

    monkeypatch.setattr(syscalls, "write_file", writing)
    monkeypatch.setattr(staging.Staging, "_take_name", taking)
    monkeypatch.setattr(staging, "remove_old", removing)
    return disk


@pytest.mark.parametrize("values", [FEW, MANY], ids=["few", "many"])
@pytest.mark.parametrize("flush", ["syncfs", "without_syncfs"])
@pytest.mark.parametrize("manifest", [True, False])
def test_each_step_waits_for_the_one_before_it(tmp_path, disk, monkeypatch, values, flush, manifest):
    monkeypatch.setattr(syscalls, "sync_file_system", getattr(disk, flush))
    base = vs.save(tmp_path / "base", values)
    disk.events.clear()
    vs.save(tmp_path / "made" / "too" / "c", values | {"new": np.ones(3)}, base=base, manifest=manifest)
    assert disk.events == [*(["manifest"] if manifest else []), "snapshot_done", "name"]
    assert disk.lost(tmp_path / "made") == []
    assert disk.durable[os.stat(tmp_path).st_ino] == _state(tmp_path)


def test_a_folder_that_is_filled_in_place(tmp_path, disk, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    vs.save(".", FEW)
    assert disk.events == ["manifest", "snapshot_done"]
    assert disk.lost(tmp_path / "here") == []


@pytest.mark.parametrize("exchange", [True, False])
def test_what_is_replaced_goes_last(tmp_path, disk, monkeypatch, exchange):
    vs.save(tmp_path / "c", FEW)
    if not exchange:
        monkeypatch.setattr(syscalls, "exchange", disk.without_syncfs)
    disk.events.clear()
    vs.save(tmp_path / "c", MANY, overwrite=True)
    assert disk.events == ["manifest", "snapshot_done", "name", "removed"]
    assert os.listdir(tmp_path) == ["c"]


def test_a_save_that_is_not_durable_syncs_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(syscalls, "sync", None)
    monkeypatch.setattr(syscalls, "sync_file_system", None)
    vs.save(tmp_path / "c", MANY, durable=False)
    assert vs.verify(tmp_path / "c").ok


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_error_once_the_checkpoint_has_its_name_does_not_say_that_it_was_undone(tmp_path, monkeypatch, overwrite):
    if overwrite:
        vs.save(tmp_path / "c", {"old": np.ones(2)})
    fsync = os.fsync

    def failing(fd):
        if os.path.samestat(os.fstat(fd), os.stat(tmp_path)):
            raise OSError(errno.EIO, "this disk is broken")
        fsync(fd)

    monkeypatch.setattr(syscalls, "sync", failing)
    with pytest.raises(StorageError, match=r"the new checkpoint is saved and stands, .*this disk is broken") as caught:
        vs.save(tmp_path / "c", FEW, overwrite=overwrite)
    assert caught.value.errno == errno.EIO
    assert sorted(vs.load(tmp_path / "c")) == sorted(FEW)
    assert vs.verify(tmp_path / "c").ok
    assert len(os.listdir(tmp_path)) == 1 + overwrite  # the one that was replaced may still be what a power cut leaves
    monkeypatch.undo()
    assert len(vs.clean(tmp_path)) == overwrite
    assert os.listdir(tmp_path) == ["c"]


def test_ctrl_c_once_the_checkpoint_has_its_name_finishes_the_rest(tmp_path, monkeypatch):
    vs.save(tmp_path / "c", {"old": np.ones(2)})
    remove = staging.remove_old

    def pressed(name, dir_fd, threads=1):
        monkeypatch.setattr(staging, "remove_old", remove)
        raise KeyboardInterrupt

    monkeypatch.setattr(staging, "remove_old", pressed)
    with pytest.raises(KeyboardInterrupt):
        vs.save(tmp_path / "c", FEW, overwrite=True)
    assert sorted(vs.load(tmp_path / "c")) == sorted(FEW)
    assert os.listdir(tmp_path) == ["c"]
