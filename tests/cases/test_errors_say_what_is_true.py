"""What an error says of the disk is true, and of two errors the first is told."""

import errno
import os

import numpy as np
import pytest
from support.confined import confined

import varstore as vs
from varstore.errors import StorageError
from varstore.storage import syscalls


@pytest.fixture
def broken_parent(monkeypatch, tmp_path):
    """Syncing the directory of the target fails, as on a disk that dies after the rename; lists the failures."""
    failures = []
    sync = os.fsync

    def failing(fd):
        if os.path.samestat(os.fstat(fd), os.stat(tmp_path)):
            failures.append(fd)
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        sync(fd)

    monkeypatch.setattr(syscalls, "sync", failing)
    return failures


@pytest.mark.parametrize("overwrite", [False, True], ids=["new", "overwrite"])
def test_an_error_after_the_rename_says_that_the_checkpoint_stands(tmp_path, broken_parent, overwrite):
    if overwrite:
        vs.save(tmp_path / "c", {"a": np.full(9, 1)}, durable=False)
    with pytest.raises(StorageError, match="Input/output error") as caught:
        vs.save(tmp_path / "c", {"a": np.full(9, 2)}, overwrite=overwrite)
    assert len(broken_parent) == 1
    assert caught.value.errno == errno.EIO
    if (tmp_path / "c").exists() and vs.load(tmp_path / "c")["a"][0] == 2:
        assert vs.verify(tmp_path / "c").ok
        assert "undone" not in str(caught.value)
        assert "stands" in str(caught.value)
    else:
        assert "undone" in str(caught.value)


FEW_DESCRIPTORS = """
import os, resource, shutil
os.chdir(argv[0])
size = int(argv[2])
values = lambda filling: {f"v{i}": np.full(size, filling, "u1") for i in range(6)}
def new():
    vs.save("c", values(2))
def overwrite():
    vs.save("c", values(2), overwrite=True)
save = locals()[argv[1]]
soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
vs.save("warm", values(0)); vs.load("warm")
story = []
for spare in range(7):
    shutil.rmtree("c", ignore_errors=True)
    if save is overwrite:
        vs.save("c", values(1))
    used = max(map(int, os.listdir("/proc/self/fd")))
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + spare, hard))
    try:
        save()
        error = None
    except vs.errors.StorageError as caught:
        error = [caught.errno, str(caught)]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    holds = int(vs.load("c")["v0"][0]) if os.path.exists("c") else 0
    vs.save("c", values(3), overwrite=True)
    story.append([error, holds, vs.verify("c").ok, sorted(os.listdir("."))])
tell(story)
"""


@pytest.mark.parametrize("save", ["new", "overwrite"])
@pytest.mark.parametrize("size", [9, 1 << 20])
def test_the_error_told_is_the_first_when_descriptors_run_out(tmp_path, save, size):
    story = confined(FEW_DESCRIPTORS, tmp_path, save, size, seconds=20)
    assert story[-1][0] is None
    assert story[0][0] is not None
    for error, holds, ok, left in story:
        assert ok
        assert left == ["c", "warm"]
        if error is None:
            assert holds == 2
            continue
        assert holds == (1 if save == "overwrite" else 0)
        assert "Too many open files" in error[1]
        assert error[0] == errno.EMFILE
