"""Read many small files with a few system calls: io_uring opens, reads and closes hundreds of them at a time.

As long as the kernel may write into a buffer, the buffer is kept alive, whatever is raised meanwhile. What a file
holds beyond a regular file's bytes, or why there are none, is the caller's to find out: it gets an errno a file.

Source of the layouts and numbers: Linux, include/uapi/linux/io_uring.h.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import sys
import threading
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

import numpy as np

from varstore.errors import UsageError

__all__ = ["BATCH", "Ring"]

BATCH = 256
"""Files opened, read and closed together."""

_SETUP, _ENTER, _REGISTER = 425, 426, 427  # the same numbers on every architecture
_REGISTER_FILES, _REGISTER_FILES_UPDATE, _REGISTER_PROBE = 2, 6, 8
_OP_READ, _OP_FADVISE, _OP_OPENAT2, _OP_LINKAT = 22, 24, 28, 39
_NEEDED = (_OP_READ, _OP_FADVISE, _OP_OPENAT2, _OP_LINKAT)  # the last came with direct descriptors, in Linux 5.15
_FIXED_FILE, _ASYNC = 1, 16
_GETEVENTS = 1
_SQES_OFFSET = 0x10000000
_WRAP = 0xFFFFFFFF


def _layout(**fields: np.dtype[Any] | str) -> np.dtype[Any]:
    return np.dtype(list(fields.items()))


_OFFSETS = _layout(head="u4", tail="u4", mask="u4", entries="u4", flags="u4", cqes="u4", array="u4", rest="V12")
"""Of the submission queue (array) or the completion queue (cqes)."""
_PARAMS = _layout(sq_entries="u4", cq_entries="u4", rest="V32", sq=_OFFSETS, cq=_OFFSETS)
_SQE = _layout(
    opcode="u1", flags="u1", ioprio="u2", fd="i4", off="u8", addr="u8", len="u4", op_flags="u4",
    user_data="u8", buffer="u4", file_index="u4", rest="V16",
)  # fmt: skip
_CQE = _layout(user_data="u8", res="i4", flags="u4")
_PROBE = _layout(head="V16", ops=np.dtype((_layout(op="u2", flags="u2", rest="V4"), _OP_LINKAT + 1)))

# struct open_how: O_CLOEXEC is refused where no descriptor is made; RESOLVE_BENEATH | RESOLVE_NO_MAGICLINKS
_HOW = np.array([os.O_RDONLY | getattr(os, "O_NONBLOCK", 0), 0, 0x08 | 0x02], np.uint64)

_OPEN, _CHECK, _READ, _READ_AGAIN = range(4)
"""Requests of one file. The check, fadvise, refuses pipes, which a read would empty; some file systems cannot tell
in advance whether a read blocks, and have it done again by a thread of the kernel."""

_syscall = ctypes.CDLL(None, use_errno=True).syscall
_syscall.restype = ctypes.c_long
_syscall.argtypes = (ctypes.c_long,) * 7

_lent: dict[int, object] = {}
"""What the kernel may write into or read from: outlives a ring whose wait was interrupted."""


class Ring:
    """One io_uring with room for the files of a batch; any thread may use it, one at a time."""

    def __init__(self, fd: int, params: np.ndarray) -> None:
        self._fd = fd
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._queues: _Queues | None = _Queues(fd, params)

    @classmethod
    def open(cls) -> Ring | None:
        """Make a ring, or None where the kernel or the sandbox has none, or an older one (before Linux 5.15)."""
        if sys.platform != "linux":
            return None
        params = np.zeros(1, _PARAMS)
        try:
            fd = _call(_SETUP, (_READ_AGAIN + 1) * BATCH, params.ctypes.data)
        except OSError:
            return None
        try:
            probe = np.zeros(1, _PROBE)
            _call(_REGISTER, fd, _REGISTER_PROBE, probe.ctypes.data, _OP_LINKAT + 1)
            if not (probe["ops"]["flags"][0, _NEEDED] & 1).all():
                raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
            _call(_REGISTER, fd, _REGISTER_FILES, _NO_FILES.ctypes.data, BATCH)
            return cls(fd, params)
        except OSError:
            os.close(fd)
            return None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give the ring back to the kernel; a second time does nothing."""
        with self._lock:
            if self._queues is not None:
                self._queues = None
                os.close(self._fd)

    def read(
        self, dir_fd: int, paths: Sequence[bytes], buffer: np.ndarray, offsets: np.ndarray, sizes: np.ndarray
    ) -> np.ndarray:
        """Read the start of each file into its place in a buffer of bytes, following no link out of the directory.

        File i goes to ``buffer[offsets[i] : offsets[i] + sizes[i]]``. Returned are, as int64, the bytes read of each
        (fewer than asked for only where the file ends), or ``-errno``: ESPIPE for a pipe, EISDIR for a directory,
        EXDEV for a link that leads out. EAGAIN means that a plain call should try.

        Raises:
            UsageError: a place outside of the buffer, a path with a zero byte, a closed ring or another process's.
            OSError: the kernel takes no requests (out of memory).
        """
        names = b"\0".join(paths) + b"\0"
        _check(names, len(paths), buffer, offsets, sizes)
        if os.getpid() != self._pid:
            raise UsageError("a ring cannot be used by a forked process", hint="open another")
        ends = np.cumsum(np.fromiter(map(len, paths), np.int64, len(paths)) + 1)
        starts = np.frombuffer(names, np.uint8).ctypes.data + np.append(0, ends)
        places = buffer.ctypes.data + offsets
        results = np.empty(len(paths), np.int64)
        with self._lock:
            if self._queues is None:
                raise UsageError("the ring is closed", hint="open another")
            for first in range(0, len(paths), BATCH):
                part = slice(first, min(first + BATCH, len(paths)))
                loan = (self._queues, names, buffer)
                _lent[id(loan)] = loan
                try:
                    results[part] = self._queues.read(dir_fd, starts[part], places[part], sizes[part])
                finally:
                    self._queues.settle()
                    del _lent[id(loan)]
        return results


class _Queues:
    """The memory shared with the kernel: requests that stay there, of which each turn names some, and results."""

    def __init__(self, fd: int, params: np.ndarray) -> None:
        self._fd = fd
        sq, cq = params["sq"][0], params["cq"][0]
        entries, results = int(params["sq_entries"][0]), int(params["cq_entries"][0])
        size = max(int(sq["array"]) + entries * 4, int(cq["cqes"]) + results * _CQE.itemsize)
        flags = mmap.MAP_SHARED | mmap.MAP_POPULATE
        queues = mmap.mmap(fd, size, flags)
        self._sq_head, self._sq_tail, self._cq_head, self._cq_tail = (
            np.frombuffer(queues, np.uint32, 1, int(queue[end])) for queue in (sq, cq) for end in ("head", "tail")
        )
        self._turn = np.frombuffer(queues, np.uint32, entries, int(sq["array"]))
        self._cqes = np.frombuffer(queues, _CQE, results, int(cq["cqes"]))
        requests = mmap.mmap(fd, entries * _SQE.itemsize, flags, offset=_SQES_OFFSET)
        self._requests = np.frombuffer(requests, _SQE).reshape(-1, BATCH)
        slots = np.arange(BATCH)
        self._requests["user_data"] = slots
        self._requests["opcode"] = np.array([_OP_OPENAT2, _OP_FADVISE, _OP_READ, _OP_READ])[:, None]
        self._requests["flags"] = np.array([0, _FIXED_FILE, _FIXED_FILE, _FIXED_FILE | _ASYNC])[:, None]
        self._requests["fd"] = slots
        self._requests["off"][_OPEN] = _HOW.ctypes.data
        self._requests["len"][_OPEN] = _HOW.nbytes
        self._requests["file_index"][_OPEN] = slots + 1

    def read(self, dir_fd: int, names: np.ndarray, places: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        """Return what `Ring.read` does, for the files of one batch; names and places are addresses."""
        self._drain()  # of a batch whose wait was interrupted twice
        count = len(names)
        self._requests["fd"][_OPEN] = dir_fd
        self._requests["addr"][_OPEN, :count] = names
        self._requests["addr"][_READ:, :count] = places
        self._requests["len"][_READ:, :count] = sizes
        found = self._run(_OPEN, np.arange(count))
        found[found == 0] = self._run(_CHECK, np.flatnonzero(found == 0))
        opened = np.flatnonzero(found == 0)
        found[opened] = self._run(_READ, opened)
        again = opened[found[opened] == -errno.EAGAIN]
        found[again] = self._run(_READ_AGAIN, again)
        return found

    def settle(self) -> None:
        """Wait until the kernel has let go of everything, and close all files."""
        self._drain()
        update = np.array([0, _NO_FILES.ctypes.data], np.uint64)
        _call(_REGISTER, self._fd, _REGISTER_FILES_UPDATE, update.ctypes.data, BATCH)

    def _run(self, kind: int, slots: np.ndarray) -> np.ndarray:
        numbers = np.arange(len(slots))
        tail, head = int(self._sq_tail[0]), int(self._cq_head[0])
        self._turn[(tail + numbers) % len(self._turn)] = kind * BATCH + slots
        self._sq_tail[0] = (tail + len(slots)) & _WRAP
        self._wait()
        done = self._cqes[(head + numbers) % len(self._cqes)]
        self._cq_head[0] = self._cq_tail[0]
        results = np.empty(len(slots), np.int64)
        results[np.searchsorted(slots, done["user_data"])] = done["res"]
        return results

    def _drain(self) -> None:
        self._wait()
        self._cq_head[0] = self._cq_tail[0]

    def _wait(self) -> None:
        """Hand in what was not yet, and wait for all of it: each request has one result, so the tails meet."""
        while self._sq_tail[0] != self._cq_tail[0]:
            tail = int(self._sq_tail[0])
            waiting, unread = (tail - int(self._sq_head[0])) & _WRAP, (tail - int(self._cq_head[0])) & _WRAP
            try:
                _call(_ENTER, self._fd, waiting, unread, _GETEVENTS)
            except InterruptedError:  # Ctrl-C is raised by the interpreter, if it is meant to be
                continue


_NO_FILES = np.full(BATCH, -1, np.int32)


def _call(number: int, *arguments: int) -> int:
    result: int = _syscall(number, *arguments, *(0,) * (6 - len(arguments)))
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


def _check(names: bytes, count: int, buffer: np.ndarray, offsets: np.ndarray, sizes: np.ndarray) -> None:
    if names.count(0) != max(count, 1):
        raise UsageError("a path has a zero byte in it")
    if buffer.dtype != np.uint8 or buffer.ndim != 1 or not (buffer.flags.c_contiguous and buffer.flags.writeable):
        raise UsageError("not a writable row of bytes to read into", found=f"{buffer.dtype}, {buffer.shape}")
    if len(offsets) != count or len(sizes) != count:
        raise UsageError("a place is needed for each path", found=f"{count}, {len(offsets)}, {len(sizes)}")
    if ((offsets < 0) | (sizes < 0) | (sizes > buffer.size) | (offsets > buffer.size - sizes)).any():
        raise UsageError("a place is outside of the buffer", found=f"a buffer of {buffer.size} bytes")
