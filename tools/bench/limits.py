"""Measure what the machine can do without a library, in the same run.

Bytes are transferred by as many threads as varstore uses. The system calls for small variables are made by one thread,
as a simple program would make them.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np

from tools.bench.workloads import Arrays

Share = list[tuple[str, int]]
"""The pieces that one thread transfers: file names and offsets."""
BLOCK = 16 << 20
CHUNK = 1 << 20
DIRECT_CHUNK = 2 << 20
_libc = ctypes.CDLL(None)
META = b"shape {\n  dim: 1024\n}\ndata_type: kFloat\n"


def threads() -> int:
    """Return the number of threads that varstore uses by default when it does not wait for the disk."""
    return min(8, len(os.sched_getaffinity(0)))


def memory_copy(arrays: Arrays, targets: Arrays) -> None:
    """Copy every array with all threads."""
    jobs = [
        partial(np.copyto, _flat(targets[name])[start : start + BLOCK], _flat(array)[start : start + BLOCK])
        for name, array in arrays.items()
        for start in range(0, array.nbytes, BLOCK)
    ]
    _run(jobs, threads())


def parallel_write(path: str, arrays: Arrays) -> None:
    """Write the same bytes to the same number of files with all threads, without hashing or anything else."""
    _write(path, arrays, os.O_WRONLY | os.O_CREAT, threads(), CHUNK, lambda flat, start: flat[start : start + CHUNK])


def direct_write(path: str, arrays: Arrays) -> None:
    """Write the same number of bytes with direct I/O from aligned memory, twice as many threads, and a final sync."""
    aligned = np.frombuffer(mmap.mmap(-1, DIRECT_CHUNK), np.uint8)
    aligned[:] = 7
    flags = os.O_WRONLY | os.O_CREAT | os.O_DIRECT

    def piece(flat: np.ndarray, start: int) -> np.ndarray:
        return aligned[: -(-(flat.nbytes - start) // 4096) * 4096]

    _write(path, arrays, flags, 2 * threads(), DIRECT_CHUNK, piece)
    flush(path)


def flush(path: str) -> None:
    """Make all of a file system durable."""
    fd = os.open(path, os.O_RDONLY)
    _libc.syncfs(fd)
    os.close(fd)


def _write(
    path: str,
    arrays: Arrays,
    flags: int,
    workers: int,
    chunk: int,
    data: Callable[[np.ndarray, int], np.ndarray],
) -> None:
    os.mkdir(path)
    fds = {name: os.open(os.path.join(path, name), flags, 0o644) for name in arrays}
    for name, fd in fds.items():
        _libc.fallocate(fd, 0, ctypes.c_int64(0), ctypes.c_int64(arrays[name].nbytes))

    def write(share: Share) -> None:
        for name, start in share:
            os.pwrite(fds[name], data(_flat(arrays[name]), start).data, start)

    _run([partial(write, share) for share in _shares(arrays, workers, chunk)], workers)
    for fd in fds.values():
        os.close(fd)


def bare_calls(path: str, arrays: Arrays) -> None:
    """Make only the system calls of the layout: mkdir, then open, write and close, twice."""
    os.mkdir(path)
    folder = os.open(path, os.O_RDONLY)
    for name, array in arrays.items():
        os.mkdir(name, dir_fd=folder)
        bare_write(name + "/meta", META, folder)
        bare_write(name + "/out", _flat(array).data, folder)
    os.close(folder)


def bare_links(path: str, sources: dict[str, str]) -> None:
    """Make only the system calls of a checkpoint of links: mkdir, then link, twice."""
    os.mkdir(path)
    folder = os.open(path, os.O_RDONLY)
    roots = {root: os.open(root, os.O_RDONLY) for root in set(sources.values())}
    for name, root in sources.items():
        os.mkdir(name, dir_fd=folder)
        for file in (name + "/meta", name + "/out"):
            os.link(file, file, src_dir_fd=roots[root], dst_dir_fd=folder)
    for fd in (folder, *roots.values()):
        os.close(fd)


def bare_write(path: str, data: bytes | memoryview, folder: int) -> None:
    """Create a file in an open folder."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o444, dir_fd=folder)
    os.write(fd, data)
    os.close(fd)


def bare_reads(path: str, arrays: Arrays) -> Arrays:
    """Only open, read and close the ``meta`` and ``out`` of every variable."""
    folder = os.open(path, os.O_RDONLY)
    targets = {name: np.empty_like(array) for name, array in arrays.items()}
    meta = bytearray(len(META) + 1)
    for name, array in targets.items():
        _bare_read(name + "/meta", meta, folder)
        _bare_read(name + "/out", _flat(array).data, folder)
    os.close(folder)
    return targets


def _bare_read(path: str, target: bytearray | memoryview, folder: int) -> None:
    fd = os.open(path, os.O_RDONLY, dir_fd=folder)
    os.preadv(fd, [target], 0)
    os.close(fd)


def parallel_read(path: str, arrays: Arrays) -> Arrays:
    """Read what `parallel_write` wrote into new memory with all threads."""
    targets = {name: np.empty_like(array) for name, array in arrays.items()}
    read_into(path, targets)
    return targets


def read_into(path: str, targets: Arrays, *, workers: int | None = None, direct: bool = False) -> None:
    """Read the same bytes into existing memory."""
    flags = os.O_RDONLY | (os.O_DIRECT if direct else 0)
    fds = {name: os.open(os.path.join(path, name), flags) for name in targets}

    def read(share: Share) -> None:
        for name, start in share:
            os.preadv(fds[name], [_flat(targets[name])[start : start + BLOCK].data], start)

    workers = workers or threads()
    _run([partial(read, share) for share in _shares(targets, workers, BLOCK)], workers)
    for fd in fds.values():
        os.close(fd)


def aligned_like(arrays: Arrays) -> Arrays:
    """Return arrays of the same shapes that are aligned to pages, for direct I/O."""
    return {
        name: np.frombuffer(mmap.mmap(-1, array.nbytes), array.dtype).reshape(array.shape)
        for name, array in arrays.items()
    }


def _flat(array: np.ndarray) -> np.ndarray:
    return array.reshape(-1).view(np.uint8)


def _shares(arrays: Arrays, workers: int, piece: int) -> list[Share]:
    """Split all bytes into equal runs, so that threads rarely share a file, which would make them wait."""
    each = -(-sum(array.nbytes for array in arrays.values()) // workers)
    shares: list[Share] = [[] for _ in range(workers)]
    offset = 0
    for name, array in arrays.items():
        for start in range(0, array.nbytes, piece):
            shares[(offset + start) // each].append((name, start))
        offset += array.nbytes
    return shares


def _run(jobs: Sequence[Callable[[], object]], workers: int) -> None:
    with ThreadPoolExecutor(workers) as pool:
        for future in [pool.submit(job) for job in jobs]:
            future.result()
