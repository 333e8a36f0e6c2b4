"""What the machine itself can do, measured in the same run: the lines that no library can cross."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np

from tools.bench.workloads import Arrays

BLOCK = 16 << 20
CHUNK = 1 << 20


def threads() -> int:
    """Return the number of threads that varstore takes by default."""
    return min(8, len(os.sched_getaffinity(0)))


def memory_copy(arrays: Arrays, targets: Arrays) -> None:
    """Copy every array with all threads."""
    jobs = [
        partial(np.copyto, _flat(targets[name])[start : start + BLOCK], _flat(array)[start : start + BLOCK])
        for name, array in arrays.items()
        for start in range(0, array.nbytes, BLOCK)
    ]
    _run(jobs)


def parallel_write(path: str, arrays: Arrays) -> None:
    """Write the same bytes to as many files with all threads, each to one of its own: no hashing, nothing else."""
    os.mkdir(path)

    def write(name: str, flat: np.ndarray) -> None:
        fd = os.open(os.path.join(path, name), os.O_WRONLY | os.O_CREAT, 0o644)
        os.posix_fallocate(fd, 0, flat.nbytes)
        for start in range(0, flat.nbytes, CHUNK):
            os.write(fd, flat[start : start + CHUNK].data)
        os.close(fd)

    _run(partial(write, name, _flat(array)) for name, array in arrays.items())


def direct_write(path: str, arrays: Arrays) -> None:
    """Write the same bytes with direct I/O from aligned memory with all threads, and make them durable."""
    os.mkdir(path)
    buffer = np.frombuffer(mmap.mmap(-1, CHUNK), np.uint8)
    buffer[:] = 7

    def write(fd: int, nbytes: int, start: int) -> None:
        size = -(-min(CHUNK, nbytes - start) // 4096) * 4096
        os.pwrite(fd, buffer[:size].data, start)

    fds = {n: os.open(os.path.join(path, n), os.O_WRONLY | os.O_CREAT | os.O_DIRECT, 0o644) for n in arrays}
    for name, fd in fds.items():
        os.posix_fallocate(fd, 0, arrays[name].nbytes)
    _run(
        partial(write, fds[name], array.nbytes, start)
        for name, array in arrays.items()
        for start in range(0, array.nbytes, CHUNK)
    )
    for fd in fds.values():
        os.fsync(fd)
        os.close(fd)


def bare_calls(path: str, arrays: Arrays) -> None:
    """Make the system calls of the layout, and nothing else: mkdir, then open, write, close twice."""
    os.mkdir(path)
    folder = os.open(path, os.O_RDONLY)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    meta = b"shape {\n  dim: 1024\n}\ndata_type: kFloat\n"
    for name, array in arrays.items():
        os.mkdir(name, dir_fd=folder)
        for file, data in (("/meta", meta), ("/out", array.data)):
            fd = os.open(name + file, flags, 0o444, dir_fd=folder)
            os.write(fd, data)
            os.close(fd)
    os.close(folder)


def bare_reads(path: str, arrays: Arrays) -> Arrays:
    """Open, read and close the ``out`` of every variable, and nothing else."""
    folder = os.open(path, os.O_RDONLY)
    targets = {name: np.empty_like(array) for name, array in arrays.items()}
    for name, array in targets.items():
        fd = os.open(f"{name}/out", os.O_RDONLY, dir_fd=folder)
        os.preadv(fd, [array.data], 0)
        os.close(fd)
    os.close(folder)
    return targets


def parallel_read(path: str, arrays: Arrays) -> Arrays:
    """Read what `parallel_write` wrote into new memory with all threads."""
    targets = {name: np.empty_like(array) for name, array in arrays.items()}
    read_into(path, targets)
    return targets


def read_into(path: str, targets: Arrays, *, workers: int | None = None, direct: bool = False) -> None:
    """Read the same bytes into memory that exists."""

    def read(fd: int, flat: np.ndarray, start: int) -> None:
        os.preadv(fd, [flat[start : start + BLOCK].data], start)

    flags = os.O_RDONLY | (os.O_DIRECT if direct else 0)
    fds = {name: os.open(os.path.join(path, name), flags) for name in targets}
    _run(
        (
            partial(read, fds[name], _flat(array), start)
            for name, array in targets.items()
            for start in range(0, array.nbytes, BLOCK)
        ),
        workers,
    )
    for fd in fds.values():
        os.close(fd)


def aligned_like(arrays: Arrays) -> Arrays:
    """Return arrays of the same shapes on page boundaries, for direct I/O."""
    return {
        name: np.frombuffer(mmap.mmap(-1, array.nbytes), array.dtype).reshape(array.shape)
        for name, array in arrays.items()
    }


def _flat(array: np.ndarray) -> np.ndarray:
    return array.reshape(-1).view(np.uint8)


def _run(jobs: Iterable[Callable[[], object]], workers: int | None = None) -> None:
    with ThreadPoolExecutor(workers or threads()) as pool:
        for future in [pool.submit(job) for job in jobs]:
            future.result()
