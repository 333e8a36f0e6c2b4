"""What a user does, on each file system that this machine can mount."""

import errno
import os
import subprocess
import threading

import numpy as np
import pytest

import varstore as vs
from tools.storage.__main__ import results_on, unexpected
from tools.storage.mounts import FILE_SYSTEMS
from varstore.errors import SizeMismatch, StorageError
from varstore.storage import syscalls
from varstore.storage.directory import PAUSES, Directory

SLOW = {name: "load" for name in FILE_SYSTEMS if name.startswith("rclone")}
"""File systems on which each save waits for seconds, with the checks that are made on them here."""


@pytest.mark.parametrize("name", FILE_SYSTEMS)
def test_all_that_is_promised_holds(name):
    if os.geteuid() != 0:
        pytest.skip("only root can mount file systems")
    found = results_on(name, SLOW.get(name, "*"))
    if isinstance(found, str):
        pytest.skip(found)
    assert found
    assert unexpected(name, found) == {}


def in_order(monkeypatch, *, always=False):
    """Let files take their bytes only in order, as rclone's do where nothing is cached."""
    ends, lock, refused = {}, threading.Lock(), []
    pwrite = syscalls.pwrite

    def ordered(fd, data, offset):
        key = os.fstat(fd).st_ino
        with lock:
            if ends.get(key, 0) != offset or (always and offset):
                refused.append(offset)
                raise OSError(errno.ESPIPE, os.strerror(errno.ESPIPE))
            done = pwrite(fd, data, offset)
            ends[key] = offset + done
        return done

    def missing(fd, nbytes):
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(syscalls, "pwrite", ordered)
    monkeypatch.setattr(syscalls, "preallocate", missing)
    return refused


@pytest.mark.parametrize("durable", [False, True])
def test_a_file_system_that_takes_bytes_in_order(tmp_path, monkeypatch, durable):
    large = np.random.default_rng(1).integers(0, 255, (6 << 24) + 77, np.uint8)
    refused = in_order(monkeypatch)
    for turn in range(4):
        vs.save(tmp_path / f"c{turn}", {"large": large, "small": np.ones(9)}, threads=4, durable=durable)
        if refused:
            break
    assert refused
    assert vs.verify(tmp_path / f"c{turn}").ok
    assert np.array_equal(vs.load(tmp_path / f"c{turn}")["large"], large)


def test_one_that_takes_them_in_no_order_is_told_with_a_hint(tmp_path, monkeypatch):
    in_order(monkeypatch, always=True)
    with pytest.raises(StorageError, match="--vfs-cache-mode") as caught:
        vs.save(tmp_path / "c", {"large": np.zeros(3 << 24, np.uint8)})
    assert caught.value.errno == errno.ESPIPE
    assert os.listdir(tmp_path) == []


def test_a_size_that_is_right_a_moment_later_is_not_damage(tmp_path, monkeypatch):
    checkpoint = vs.save(tmp_path / "c", {"w": np.arange(9.0)})
    monkeypatch.setattr("varstore.storage.directory.is_shared", lambda path: True)
    monkeypatch.setattr("varstore.storage.directory._known_to_be_shared", lambda path: True)
    slept = []
    monkeypatch.setattr("varstore.storage.directory.time.sleep", slept.append)
    directory = Directory(checkpoint.location)
    with directory:
        directory.check_size(checkpoint["w"].entry, 72 + 4096)
    assert slept == [PAUSES[0]]
    (tmp_path / "c" / "w" / "out").unlink()
    (tmp_path / "c" / "w" / "out").write_bytes(b"short")
    with directory:
        with pytest.raises(SizeMismatch):
            directory.check_size(checkpoint["w"].entry, 5)
        assert len(slept) == 1  # it was waited for already
    with Directory(checkpoint.location) as again:
        with pytest.raises(SizeMismatch):
            again.check_size(checkpoint["w"].entry, 5)
        with pytest.raises(SizeMismatch):
            again.check_size(checkpoint["w"].entry, 5)
    assert len(slept) == 3


def test_a_read_only_file_system_gives_no_plain_error(tmp_path):
    if os.geteuid() != 0:
        pytest.skip("only root can mount file systems")
    values = {"w": np.ones(3, np.float32)}
    with FILE_SYSTEMS["tmpfs"](tmp_path) as mounted:
        place = mounted.here
        manager = vs.CheckpointManager(place / "run")
        for step in range(3):
            manager.save(step, values)
        manager = vs.CheckpointManager(place / "run", keep=[vs.Latest(1)])
        subprocess.run(["mount", "-o", "remount,ro", place], check=True)
        with pytest.raises(StorageError):
            manager.prune()
        with pytest.raises(StorageError):
            manager.rewind(1)
        for name in ("m.safetensors", "m.npz", "m.pt", "m.zarr", "m.pdparams", "missing/m.npz"):
            with pytest.raises(StorageError):
                vs.write(place / name, values)
