"""The large ``out`` files of a save: written a block at a time by several threads, past the page cache where that pays.

Each file is a lane: a thread keeps to one file, since threads that write to one file wait for each other in the
kernel, and only at the end do all help with what is left. Blocks of 16 MiB are also what one digest covers, so the
thread that writes a block hashes it, while its bytes are in the cache.

Values that had to be fetched (from a device, or from another file) must not pile up in memory. While such a variable
is being written, nothing else is begun: every thread helps with it, and the thread that makes the jobs waits in
`wait_for_fetched` before the next one is fetched. A failing write will never finish its variable, so `fail` ends
the wait; `failed` says that it was ended so. The wait is for a plain lock that is held meanwhile: Ctrl-C within the
methods of a `threading.Condition` can leave it taken, and every other thread waiting.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import threading
from collections.abc import Callable, Hashable, Iterator
from functools import partial
from typing import Any, Protocol

import numpy as np

from varstore.disk.blocks import AlignedBuffer, spans, write_block
from varstore.disk.save.staging import Place
from varstore.disk.threads import Job, Lane
from varstore.layout.manifest import BLOCK, block_count
from varstore.storage import syscalls
from varstore.storage.directory import closing
from varstore.values.plan import PlannedVariable

__all__ = ["File", "LargeFiles", "OutFile"]

DIRECT_FROM = 4 << 20
"""Bytes; a durable save writes variables from this size with direct I/O."""

_buffers = threading.local()


class File(Protocol):
    """A file that is being written: `write` its pieces from any thread, and `finish` where that returns True."""

    def pieces(self) -> Iterator[tuple[int, int]]:
        """Yield what to write: the bytes of the values, from start to stop."""

    def write(self, start: int, stop: int) -> bool:
        """Write a piece; True for the one that was the last to be written."""

    def finish(self, *, fsync: bool) -> bytes:
        """End the file and return the digests of what was written."""

    def close(self) -> None:
        """Give up the descriptor."""


class LargeFiles:
    """Makes the jobs that write large variables; their digests go to `digests`, by name."""

    def __init__(self, staging: Place, digests: dict[Any, bytes], advance: Callable[[int], None] | None) -> None:
        self._staging = staging
        self._digests = digests
        self._advance = advance
        self.open_files: set[File] = set()
        """Files that threads are writing, or are about to."""
        self._writing_fetched = threading.Lock()
        self.failed = False

    def jobs(self, variable: PlannedVariable, array: np.ndarray, *, fetched: bool) -> Iterator[Lane | Job]:
        """Create the file and yield the jobs that write it."""
        durable = self._staging.durability.durable
        create = partial(OutFile, variable.file, array, dir_fd=self._staging.fd, durable=durable)
        return self.jobs_of(variable.name, create, fetched=fetched)

    def jobs_of(self, key: Hashable, create: Callable[[], File], *, fetched: bool) -> Iterator[Lane | Job]:
        """Create a file and yield the jobs that write its pieces; the digests are noted by the key."""
        if fetched:
            self.begin_fetched()
        out = create()
        del create  # which holds the values
        self.open_files.add(out)
        lane = Lane(out.pieces(), partial(self._write_piece, key, out, fetched))
        yield lane
        if fetched:  # all help with it: nothing else is begun until it is written
            yield from itertools.repeat(lane.step, lane.left)

    def _write_piece(self, key: Hashable, out: File, fetched: bool, start: int, stop: int) -> None:
        if out.write(start, stop):
            self._digests[key] = out.finish(fsync=self._staging.durability.each)
            self.open_files.remove(out)
            if fetched:
                self.end_fetched()
        if self._advance:
            self._advance(stop - start)

    def wait_for_fetched(self) -> None:
        """Wait until no fetched values are being written any more, or a write has failed."""
        with self._writing_fetched:
            pass

    def fail(self) -> None:
        """Wake whoever waits for a block that will not be written any more."""
        self.failed = True
        self.end_fetched()

    def begin_fetched(self) -> None:
        """Make `wait_for_fetched` wait, because values that were fetched are about to be written."""
        self._writing_fetched.acquire(blocking=False)

    def end_fetched(self) -> None:
        """End the wait: they are written, or nothing will be."""
        with contextlib.suppress(RuntimeError):  # ended already
            self._writing_fetched.release()

    def close(self) -> None:
        """Give up the files of a save that failed."""
        for out in self.open_files:
            out.close()


class OutFile:
    """A new file for the values of an array; `write` its blocks from any thread, and `finish` after the last.

    Its space is reserved at once: ext4 writes to reserved space in less time, and a disk that is too full says so
    now. With `durable` the blocks go there with direct I/O from aligned buffers, one a thread; not without the
    space reserved, since threads that make a file longer wait for each other. What the file system refuses is
    done without. One that takes bytes only in their order (rclone without a cache) refuses a block that comes too
    early with ESPIPE: those blocks are written at the end, one after the other.
    """

    def __init__(self, path: str, array: np.ndarray, *, dir_fd: int, durable: bool) -> None:
        opened: list[int] = []
        self._closing = closing(opened)
        self.fd = syscalls.create(path, dir_fd)
        opened.append(self.fd)
        self._array = array
        self._digests = [b""] * block_count(array.nbytes)
        self._left = len(self._digests)
        self._refused: list[tuple[int, int]] = []
        """Blocks that came too early for a file system that takes them in their order."""
        self._lock = threading.Lock()
        try:
            self._direct = self._reserve(array.nbytes, direct=durable and array.nbytes >= DIRECT_FROM)
        except BaseException:
            self.close()
            raise

    def _reserve(self, nbytes: int, *, direct: bool) -> bool:
        """Reserve the space and then turn to direct I/O, if asked; tell whether writes are direct now."""
        try:
            syscalls.preallocate(self.fd, nbytes)
            if direct:
                syscalls.turn_direct(self.fd, on=True)
        except OSError as error:
            if not syscalls.is_missing(error):
                raise
            return False
        return direct

    def _turn_buffered(self) -> None:
        self._direct = False
        syscalls.turn_direct(self.fd, on=False)

    def pieces(self) -> Iterator[tuple[int, int]]:
        """Yield the blocks to write."""
        return spans(self._array.nbytes)

    def write(self, start: int, stop: int) -> bool:
        """Write one block and note its digest; True for the block that was the last to be written."""
        try:
            digest = self._write_direct(start, stop) if self._direct else self._write_buffered(start, stop)
        except OSError as error:
            if error.errno == errno.ESPIPE and len(self._digests) > 1:
                return self._refuse(start, stop)
            if error.errno != errno.EINVAL:
                raise
            self._turn_buffered()
            digest = self._write_buffered(start, stop)
        return self._note(start, digest)

    def _note(self, start: int, digest: bytes) -> bool:
        with self._lock:
            self._digests[start // BLOCK] = digest
            self._left -= 1
            return self._ended()

    def _refuse(self, start: int, stop: int) -> bool:
        with self._lock:
            self._refused.append((start, stop))
            return self._ended()

    def _ended(self) -> bool:
        """Tell whether each block was written or refused; the refused ones are written by the one who asks then."""
        if self._left > len(self._refused):
            return False
        for start, stop in sorted(self._refused):
            self._digests[start // BLOCK] = self._write_buffered(start, stop)
        return True

    def _write_buffered(self, start: int, stop: int) -> bytes:
        return write_block(self.fd, self._array, start, stop)

    def _write_direct(self, start: int, stop: int) -> bytes:
        """Write from this thread's aligned buffer, which nobody else finds: a signal handler may save meanwhile."""
        mine = _buffers.__dict__
        buffer: AlignedBuffer = mine.pop("aligned", None) or AlignedBuffer()
        try:
            return write_block(self.fd, self._array, start, stop, buffer)
        finally:
            mine["aligned"] = buffer

    def finish(self, *, fsync: bool) -> bytes:
        """Cut off what direct I/O padded, make the file durable if asked, close it; return the digests."""
        nbytes = self._array.nbytes
        del self._array
        try:
            if os.fstat(self.fd).st_size != nbytes:
                os.ftruncate(self.fd, nbytes)
            if fsync:
                syscalls.sync(self.fd)
        finally:
            self.close()
        return b"".join(self._digests)

    def close(self) -> None:
        """Give up the descriptor."""
        self._closing.close()
