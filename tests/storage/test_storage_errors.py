"""What the operating system refuses is a StorageError that says where, and nothing is lost or left open by it."""

import contextlib
import errno
import os
import resource
import shutil
import tempfile
import threading
import weakref
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from support import run_python

import varstore as vs
from varstore.disk.blocks import digest_file_block, read_block
from varstore.disk.save.large_file import OutFile
from varstore.disk.threads import Lane, in_lanes, run
from varstore.errors import StorageError
from varstore.storage import syscalls

pytestmark = pytest.mark.core

NOBODY = 65534


@pytest.fixture
def path():
    """A checkpoint that belongs to an unprivileged user, where such a one can reach it."""
    home = Path(tempfile.mkdtemp())
    vs.save(home / "c", {"a": np.arange(5), "b": np.ones((2, 2))}, attributes={"epoch": 3})
    if os.geteuid() == 0:
        for place in (home, *home.rglob("*")):
            os.chown(place, NOBODY, NOBODY)
    yield home / "c"
    for place in (home, home / "c"):
        place.chmod(0o755)
    shutil.rmtree(home)


@contextlib.contextmanager
def unprivileged():
    own = os.geteuid()
    if own == 0:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(own)


@pytest.mark.parametrize(
    "use",
    [vs.open, vs.load, vs.verify, vs.seal, vs.clean, lambda path: vs.diff(path, path), vs.checkpoint.get],
    ids=["open", "load", "verify", "seal", "clean", "diff", "get"],
)
def test_a_directory_that_may_not_be_read(path, use):
    path.chmod(0)
    with unprivileged(), pytest.raises(StorageError, match=f"^{path}: .*Permission denied") as caught:
        use(path)
    assert caught.value.errno == errno.EACCES
    assert isinstance(caught.value.__cause__, PermissionError)


@pytest.mark.parametrize("use", [vs.load, lambda path: vs.open(path)["a"][1], lambda path: vs.open(path)["a"].numpy()])
def test_a_variable_that_may_not_be_read(path, use):
    (path / "a" / "out").chmod(0)
    with unprivileged(), pytest.raises(StorageError, match=r"a/out: .*Permission denied"):
        use(path)


def test_seal_keeps_a_manifest_that_it_cannot_read(path):
    (path / "manifest").chmod(0)
    with unprivileged(), pytest.raises(StorageError, match="manifest"):
        vs.seal(path)
    (path / "manifest").chmod(0o444)
    assert vs.open(path).attributes == {"epoch": 3}
    assert vs.verify(path).ok


def test_a_file_that_becomes_shorter_is_an_error(tmp_path):
    (tmp_path / "f").write_bytes(b"12345")
    fd = os.open(tmp_path / "f", os.O_RDONLY)
    try:
        for read in (
            lambda: read_block(fd, np.empty(6, np.uint8), 0, hashed=False),
            lambda: digest_file_block(fd, 0, 6),
        ):
            with pytest.raises(OSError, match="became shorter") as caught:
                read()
            assert caught.value.errno == errno.EIO
    finally:
        os.close(fd)


def test_a_file_that_cannot_be_begun_or_finished_is_closed(tmp_path):
    folder = os.open(tmp_path, os.O_RDONLY)
    out = OutFile("out", np.zeros(10, np.uint8), dir_fd=folder, durable=False)
    os.ftruncate(out.fd, 0)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5, hard))
    try:
        with pytest.raises(OSError, match="too large"):
            out.finish(fsync=False)
        with pytest.raises(OSError, match="too large"):
            OutFile("second", np.zeros(10, np.uint8), dir_fd=folder, durable=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        os.close(folder)
    opened = {os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")}
    assert not opened & {str(tmp_path / "out"), str(tmp_path / "second")}
    assert (tmp_path / "second").exists()


def test_maps_hold_no_descriptor_and_cannot_be_written(tmp_path):
    values = {f"v{i}": np.full(3, i) for i in range(300)}
    vs.save(tmp_path / "c", values, durable=False)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 20, hard))
    try:
        mapped = vs.load(tmp_path / "c", mmap=True)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    shutil.rmtree(tmp_path / "c")
    for name, array in values.items():
        assert np.array_equal(mapped[name], array)
        with pytest.raises(ValueError, match="WRITEABLE"):
            mapped[name].flags.writeable = True
    part = mapped.pop("v7")[1:]
    maps = Path("/proc/self/maps")
    assert maps.read_text().count(f"{tmp_path}/c/v") == 300
    del mapped
    assert maps.read_text().count(f"{tmp_path}/c/v") == 1
    assert part.tolist() == [7, 7]


FEW = """
import sys, threading, time
import varstore as vs
seen = set()
threading.setprofile(lambda *_: seen.add(threading.get_ident()))  # in every thread that is started from now on
checkpoint = vs.open(sys.argv[1])
assert checkpoint["v3"].numpy().tolist() == [3, 3, 3]
assert len(vs.load(checkpoint, threads=3)) == 9
time.sleep(0.1)
assert not seen
threading.Thread(target=time.sleep, args=(0.01,)).start()
time.sleep(0.1)
assert seen, "threads are not seen"
"""


def test_a_few_small_variables_are_read_without_threads(tmp_path):
    vs.save(tmp_path / "c", {f"v{i}": np.full(3, i) for i in range(9)})
    run_python(FEW, tmp_path / "c")


def test_an_error_stops_a_job_that_has_more_to_do():
    begun = threading.Event()
    pieces = 0

    def endless():
        nonlocal pieces
        pieces += 1
        begun.set()
        return pieces < 10_000_000

    def failing():
        begun.wait()
        raise OSError(errno.EIO, "this disk is broken")

    with pytest.raises(OSError, match="this disk is broken"):
        run([endless, failing], threads=2)
    assert 0 < pieces < 10_000_000


def test_a_thread_keeps_to_a_lane_until_all_help_with_the_last():
    workers = {"long": [], "short": []}
    both_begun, helped = threading.Barrier(2, timeout=60), threading.Event()

    def long(start, _):
        workers["long"].append(threading.get_ident())
        if len(set(workers["long"])) == 2:
            helped.set()
        if start == 0:
            both_begun.wait()
        elif start == 3:
            assert helped.wait(60)

    def short(start, _):
        workers["short"].append(threading.get_ident())
        if start == 0:
            both_begun.wait()

    run(in_lanes([Lane([(i, i + 1) for i in range(9)], long), Lane([(i, i + 1) for i in range(5)], short)]), threads=2)
    assert [len(workers[name]) for name in ("long", "short")] == [9, 5]
    assert len(set(workers["short"])) == 1
    assert set(workers["long"]) > set(workers["short"])


def test_every_piece_of_every_lane_is_done_once_and_its_values_may_go_then():
    done = []
    values = np.zeros(3)
    alive = weakref.ref(values)
    lanes = [
        Lane([(i, i + 1) for i in range(count)], partial(lambda *piece: done.append(piece[1:]), values))
        for count in (1, 40, 7)
    ]
    plain = [partial(done.append, (-1, -1))]
    del values
    run(in_lanes([*lanes, *plain]), threads=3)
    assert sorted(done) == sorted([(-1, -1), *((i, i + 1) for count in (1, 40, 7) for i in range(count))])
    assert [lane.left for lane in lanes] == [0, 0, 0]
    assert alive() is None


@pytest.mark.parametrize("durable", [False, True])
def test_calls_that_write_less_than_asked_are_made_again(tmp_path, monkeypatch, durable):
    values = {
        "a/w": np.arange(700),
        "big": np.arange(300_000),
        "swapped": np.arange(9, dtype=">i4"),
        "empty": np.ones(0),
    }
    whole = vs.save(tmp_path / "whole", values)
    for module, name in ((os, "write"), (syscalls, "pwrite")):
        real = getattr(module, name)

        def short(fd, data, *offset, real=real):
            return real(fd, memoryview(data).cast("B")[: max(1, memoryview(data).nbytes * 2 // 3)], *offset)

        monkeypatch.setattr(module, name, short)
    vs.save(tmp_path / "c", values, durable=durable)
    vs.save(tmp_path / "linked", vs.open(tmp_path / "c"), manifest=False, durable=durable)
    vs.seal(tmp_path / "linked")
    for name in ("c", "linked"):
        assert vs.verify(tmp_path / name).ok
        for path in (tmp_path / "whole").rglob("*/*"):
            if path.is_file():
                assert path.read_bytes() == (tmp_path / name / path.relative_to(whole.path)).read_bytes(), path


def test_calls_that_read_little_at_a_time_lose_nothing(tmp_path, monkeypatch):
    """A network file system may give less than was asked for; a manifest cut short was sealed without attributes."""
    path = tmp_path / "a"
    vs.save(path, {"w": np.arange(100.0)}, attributes={"epoch": 3})
    real = syscalls.pread
    monkeypatch.setattr(syscalls, "pread", lambda fd, size, offset: real(fd, min(size, 7), offset))
    assert vs.open(path).attributes["epoch"] == 3
    vs.seal(path)
    assert vs.open(path).attributes["epoch"] == 3
    assert vs.verify(path).ok
