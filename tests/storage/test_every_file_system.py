"""What a user does, on each file system that this machine can mount."""

import errno
import os
import threading

import numpy as np
import pytest

import varstore as vs
from tools.storage.__main__ import results_on, unexpected
from tools.storage.mounts import FILE_SYSTEMS
from varstore.errors import StorageError
from varstore.storage import syscalls

SLOW = {name: "*save*" for name in FILE_SYSTEMS if name.startswith("rclone")}
"""File systems on which each save waits for seconds, with the checks that are made on them here."""


@pytest.mark.parametrize("name", FILE_SYSTEMS)
def test_all_that_is_promised_holds(name):
    if os.geteuid() != 0:
        pytest.skip("only root can mount file systems")
    found = results_on(name, SLOW.get(name, "*"))
    if isinstance(found, str):
        pytest.skip(found)
    assert "yes" in found.values()
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
