"""Many small files at a time by io_uring: what is read, what is refused, and that nothing hangs or is lost."""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from varstore.disk.read import ring as module
from varstore.disk.read.ring import BATCH, Ring
from varstore.errors import UsageError

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="io_uring is Linux's")

_FILLER = 0xEE


@pytest.fixture
def ring() -> Iterator[Ring]:
    made = Ring.open()
    if made is None:
        pytest.skip("no io_uring here")
    with made:
        yield made


def read(ring: Ring, root: Path, paths: list[bytes], sizes: list[int]) -> list[bytes | int]:
    """Each file's bytes or -errno; also checks that nothing is written outside of the files' places."""
    asked = np.array(sizes, np.int64)
    offsets = np.cumsum(asked + 3) - asked
    buffer = np.full(int((asked + 3).sum()), _FILLER, np.uint8)
    fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        found = ring.read(fd, paths, buffer, offsets, asked)
    finally:
        os.close(fd)
    assert found.dtype == np.int64
    rest = buffer.copy()
    answers: list[bytes | int] = []
    for offset, count in zip(offsets.tolist(), found.tolist(), strict=True):
        answers.append(buffer[offset : offset + count].tobytes() if count >= 0 else count)
        rest[offset : offset + max(count, 0)] = _FILLER
    assert (rest == _FILLER).all()
    return answers


def make(root: Path, count: int, sizes: list[int]) -> dict[bytes, bytes]:
    random = np.random.default_rng(count)
    files = {}
    for number in range(count):
        content = random.bytes(sizes[number % len(sizes)])
        (root / f"v{number}").mkdir()
        (root / f"v{number}" / "out").write_bytes(content)
        files[b"v%d/out" % number] = content
    return files


@pytest.mark.parametrize("count", [0, 1, 2, BATCH - 1, BATCH, BATCH + 1, 3 * BATCH + 7])
def test_reads_every_byte_of_every_file(ring: Ring, tmp_path: Path, count: int) -> None:
    files = make(tmp_path, count, [0, 1, 7, 511, 4095, 4096, 4097, 70_001])
    for _ in range(2):
        answers = read(ring, tmp_path, list(files), [len(content) + 1 for content in files.values()])
        assert answers == list(files.values())


def test_counters_of_the_queues_wrap_around(ring: Ring, tmp_path: Path) -> None:
    files = make(tmp_path, 250, [5, 9])  # no divisor of the queue's length
    for _ in range(12):
        assert read(ring, tmp_path, list(files), [10] * 250) == list(files.values())


def test_longer_shorter_and_empty(ring: Ring, tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"0123456789")
    asked = [0, 4, 10, 11, 20_000]
    assert read(ring, tmp_path, [b"f"] * 5, asked) == [b"", b"0123", b"0123456789", b"0123456789", b"0123456789"]


def test_what_is_no_file_of_the_directory_is_refused_and_the_others_are_read(ring: Ring, tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "sub").mkdir(parents=True)
    (tmp_path / "secret").write_bytes(b"secret")
    (root / "good").write_bytes(b"good")
    (root / "out").symlink_to("../secret")
    (root / "absolute").symlink_to(tmp_path / "secret")
    (root / "in").symlink_to("good")
    (root / "sub" / "in").symlink_to("../good")
    (root / "loop").symlink_to("loop")
    os.mkfifo(root / "pipe")
    cases = {
        b"good": b"good",
        b"missing": -errno.ENOENT,
        b"good/below": -errno.ENOTDIR,
        b"": -errno.ENOENT,
        b"x" * 300: -errno.ENAMETOOLONG,
        b"y/" * 4000: -errno.ENAMETOOLONG,
        b"sub": -errno.EISDIR,
        b"out": -errno.EXDEV,
        b"absolute": -errno.EXDEV,
        b"../secret": -errno.EXDEV,
        os.fsencode(tmp_path / "secret"): -errno.EXDEV,
        b"in": b"good",
        b"sub/in": b"good",
        b"loop": -errno.ELOOP,
        b"pipe": -errno.ESPIPE,
    }
    paths = list(cases) * 40 + [b"good"]
    assert read(ring, root, paths, [16] * len(paths)) == [*(list(cases.values()) * 40), b"good"]


def test_a_pipe_with_something_in_it_is_not_read(ring: Ring, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    fd = os.open(tmp_path / "pipe", os.O_RDWR)
    try:
        os.write(fd, b"content")
        assert read(ring, tmp_path, [b"pipe"], [7]) == [-errno.ESPIPE]
        assert os.read(fd, 100) == b"content"
    finally:
        os.close(fd)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(ring: Ring, tmp_path: Path) -> None:
    (tmp_path / "f").touch(mode=0)
    assert read(ring, tmp_path, [b"f"], [1]) == [-errno.EACCES]


def test_no_file_stays_open(ring: Ring, tmp_path: Path) -> None:
    before = sorted(os.listdir("/proc/self/fd"))
    (tmp_path / "f").write_bytes(b"x")
    assert read(ring, tmp_path, [b"f"] * 10, [2] * 10) == [b"x"] * 10
    assert sorted(os.listdir("/proc/self/fd")) == before
    os.mkfifo(tmp_path / "pipe")
    read(ring, tmp_path, [b"pipe"], [1])
    deadline = time.monotonic() + 5  # older kernels let go a little later
    while held_for_reading(tmp_path / "pipe"):
        assert time.monotonic() < deadline


def held_for_reading(pipe: Path) -> bool:
    try:
        os.close(os.open(pipe, os.O_WRONLY | os.O_NONBLOCK))
    except OSError as error:
        if error.errno == errno.ENXIO:
            return False
        raise
    return True


def test_closing_gives_back_all_descriptors(tmp_path: Path) -> None:
    before = sorted(os.listdir("/proc/self/fd"))
    ring = Ring.open()
    if ring is None:
        pytest.skip("no io_uring here")
    with ring:
        assert sorted(os.listdir("/proc/self/fd")) != before
    ring.close()
    assert sorted(os.listdir("/proc/self/fd")) == before
    with pytest.raises(UsageError, match="closed"):
        read(ring, tmp_path, [b"f"], [1])


_BUFFER = np.zeros(8, np.uint8)


@pytest.mark.parametrize(
    ("paths", "buffer", "offsets", "sizes"),
    [
        ([b"f\0g"], _BUFFER, [0], [1]),
        ([b"f"], _BUFFER, [0], [9]),
        ([b"f"], _BUFFER, [8], [1]),
        ([b"f"], _BUFFER, [-1], [2]),
        ([b"f"], _BUFFER, [2], [-1]),
        ([b"f"], _BUFFER, [2**63 - 1], [8]),
        ([b"f"], _BUFFER, [0, 1], [1]),
        ([b"f"], _BUFFER, [0], [1, 1]),
        ([b"f"], _BUFFER[::2], [0], [1]),
        ([b"f"], _BUFFER.view(np.uint16), [0], [1]),
        ([b"f"], np.frombuffer(b"12345678", np.uint8), [0], [1]),
    ],
)
def test_a_wrong_call_is_refused(
    ring: Ring, paths: list[bytes], buffer: np.ndarray, offsets: list[int], sizes: list[int]
) -> None:
    with pytest.raises(UsageError):
        ring.read(-1, paths, buffer, np.array(offsets, np.int64), np.array(sizes, np.int64))


@pytest.mark.parametrize("shared", [False, True])
def test_threads(ring: Ring, tmp_path: Path, shared: bool) -> None:
    files = make(tmp_path, 300, [3000, 5])
    failures: list[object] = []

    def work() -> None:
        mine = ring if shared else Ring.open()
        try:
            assert mine is not None
            for _ in range(10):
                assert read(mine, tmp_path, list(files), [3001] * 300) == list(files.values())
        except BaseException as error:
            failures.append(error)
        finally:
            if mine is not None and not shared:
                mine.close()

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


class _Interrupted(Exception):
    pass


def test_signals_at_any_moment_leave_a_ring_that_works(ring: Ring, tmp_path: Path) -> None:
    files = make(tmp_path, 600, [4096, 100])

    def interrupt(*_: object) -> None:
        raise _Interrupted

    old = signal.signal(signal.SIGALRM, interrupt)
    interrupted = 0
    stop = time.monotonic() + 1.0
    try:
        while time.monotonic() < stop:
            try:
                signal.setitimer(signal.ITIMER_REAL, 0.0002 + 0.00005 * (interrupted % 60))
                for _ in range(20):
                    read(ring, tmp_path, list(files), [4097] * 600)
            except _Interrupted:
                interrupted += 1
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
    except _Interrupted:
        interrupted += 1
    finally:
        signal.signal(signal.SIGALRM, old)
    assert interrupted > 3
    assert read(ring, tmp_path, list(files), [4097] * 600) == list(files.values())
    module._lent.clear()  # an interruption between the end of the wait and the end of the loan leaves one


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # numpy has threads of its own
def test_a_forked_process_is_refused(ring: Ring, tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"x")
    child = os.fork()
    if child == 0:
        try:
            read(ring, tmp_path, [b"f"], [1])
        except UsageError:
            os._exit(7)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert read(ring, tmp_path, [b"f"], [1]) == [b"x"]


_FORBID = """
import ctypes, struct, sys
call, code = int(sys.argv[1]), int(sys.argv[2])
program = b"".join([
    struct.pack("=HBBI", 0x20, 0, 0, 0),               # load the number of the call
    struct.pack("=HBBI", 0x15, 0, 1, call),            # if it is this one
    struct.pack("=HBBI", 0x06, 0, 0, 0x50000 | code),  # fail with this errno
    struct.pack("=HBBI", 0x06, 0, 0, 0x7FFF0000),      # else go on
])
class Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))
prctl = ctypes.CDLL(None, use_errno=True).prctl
if prctl(38, 1, 0, 0, 0) or prctl(22, 2, ctypes.byref(Program(4, program)), 0, 0):
    sys.exit(3)
import os
from varstore.disk.read.ring import Ring
before = sorted(os.listdir("/proc/self/fd"))
print(Ring.open(), sorted(os.listdir("/proc/self/fd")) == before)
"""


@pytest.mark.skipif(platform.machine() not in ("x86_64", "aarch64"), reason="the calls' numbers")
@pytest.mark.parametrize("call", [425, 427])
@pytest.mark.parametrize("code", [errno.EPERM, errno.ENOSYS])
def test_where_a_sandbox_forbids_it_there_is_no_ring(call: int, code: int) -> None:
    done = subprocess.run([sys.executable, "-c", _FORBID, str(call), str(code)], capture_output=True, text=True)
    if done.returncode == 3:
        pytest.skip("no seccomp here")
    assert (done.stdout, done.stderr) == ("None True\n", "")


def test_the_layouts_are_those_of_the_kernel() -> None:
    sizes = [layout.itemsize for layout in (module._PARAMS, module._SQE, module._CQE)]
    assert sizes == [120, 64, 16]
    assert module._SQE.fields is not None
    assert [module._SQE.fields[name][1] for name in ("off", "addr", "len", "user_data", "file_index")] == [
        8, 16, 24, 32, 44
    ]  # fmt: skip
    assert ctypes.sizeof(ctypes.c_long) == 8
