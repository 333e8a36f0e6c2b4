"""One large ``out`` on its way to the disk: written by several threads, past the page cache where that pays."""

from __future__ import annotations

import errno
import fcntl
import os
import threading

import numpy as np

from varstore.disk.blocks import AlignedBuffer, write_block
from varstore.layout.manifest import BLOCK, block_count
from varstore.storage import syscalls

__all__ = ["CREATE", "OutFile"]

CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
DIRECT_FROM = 4 << 20
"""Bytes; a durable save writes variables from this size with direct I/O."""

_buffers = threading.local()


class OutFile:
    """A new file for the values of an array; `write` its blocks from any thread, and `finish` after the last.

    Its space is reserved at once: ext4 writes to reserved space in less time, and a disk that is too full says so
    now. With `durable` the blocks go there with direct I/O from aligned buffers, one a thread; not without the
    space reserved, since threads that make a file longer wait for each other. What the file system refuses is
    done without.
    """

    def __init__(self, path: str, array: np.ndarray, *, dir_fd: int, durable: bool) -> None:
        self.fd = os.open(path, CREATE, 0o444, dir_fd=dir_fd)
        self._array = array
        self._digests = [b""] * block_count(array.nbytes)
        self._left = len(self._digests)
        self._lock = threading.Lock()
        try:
            self._direct = self._reserve(array.nbytes, direct=durable and array.nbytes >= DIRECT_FROM)
        except BaseException:
            os.close(self.fd)
            raise

    def _reserve(self, nbytes: int, *, direct: bool) -> bool:
        """Reserve the space and then turn to direct I/O, if asked; tell whether writes are direct now."""
        try:
            syscalls.preallocate(self.fd, nbytes)
            if direct:
                fcntl.fcntl(self.fd, fcntl.F_SETFL, fcntl.fcntl(self.fd, fcntl.F_GETFL) | os.O_DIRECT)
        except OSError as error:
            if not syscalls.is_missing(error):
                raise
            return False
        return direct

    def _turn_buffered(self) -> None:
        self._direct = False
        fcntl.fcntl(self.fd, fcntl.F_SETFL, fcntl.fcntl(self.fd, fcntl.F_GETFL) & ~os.O_DIRECT)

    def write(self, start: int, stop: int) -> bool:
        """Write one block and note its digest; True for the block that was the last to be written."""
        try:
            digest = write_block(self.fd, self._array, start, stop, _aligned_buffer() if self._direct else None)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            self._turn_buffered()
            digest = write_block(self.fd, self._array, start, stop)
        with self._lock:
            self._digests[start // BLOCK] = digest
            self._left -= 1
            return self._left == 0

    def finish(self, *, fsync: bool) -> bytes:
        """Cut off what direct I/O padded, make the file durable if asked, close it; return the digests."""
        nbytes = self._array.nbytes
        del self._array
        try:
            if os.fstat(self.fd).st_size != nbytes:
                os.ftruncate(self.fd, nbytes)
            if fsync:
                os.fsync(self.fd)
        finally:
            self.close()
        return b"".join(self._digests)

    def close(self) -> None:
        """Give up the descriptor."""
        os.close(self.fd)


def _aligned_buffer() -> AlignedBuffer:
    if not hasattr(_buffers, "aligned"):
        _buffers.aligned = AlignedBuffer()
    buffer: AlignedBuffer = _buffers.aligned
    return buffer
