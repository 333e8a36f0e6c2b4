"""An ``out`` that several processes write, each its own region: a rectangle of the variable.

A region is written as the runs of ``out`` that it consists of, and hashed on the way, by its own values in C order.
Runs of 4 KiB and more go there by one call each. A column of a matrix has many short ones, and a call for each would
take far longer than the copy; so these are copied into the mapped file, if all processes run on one machine, whose
kernel has each page once. Several machines have a page each, and the one that writes it back last would undo what the
other wrote beside it; there, every run is a call.

Bytes that are written to a mapping have their place on the disk before: a disk that is full could not refuse them
later but by ending the process. So a file is only mapped where its space can be reserved.
"""

from __future__ import annotations

import math
import mmap
import threading
from array import array
from collections.abc import Iterator
from itertools import chain

import numpy as np
import xxhash

from varstore.disk.blocks import CHUNK, SMALL, digest_block, spans
from varstore.layout.manifest import BLOCK, block_count
from varstore.layout.regions import Region, runs
from varstore.storage import syscalls
from varstore.storage.directory import closing

__all__ = ["SharedFile"]

_SHORT = 4096
"""Bytes; runs that are shorter are copied into the mapped file."""
_FEW = 16
"""Short runs that are written by a call each all the same: to map a file takes longer."""


class SharedFile:
    """The region of a file that this process has: `write` its pieces from any thread, and `finish` after the last.

    The file is created by the first who comes. With `maps`, all of its writers run on this machine.
    """

    def __init__(
        self,
        path: str,
        region: Region,
        values: np.ndarray,
        shape: tuple[int, ...],
        *,
        dir_fd: int,
        private: bool,
        maps: bool,
    ) -> None:
        self._region = region
        self._values = np.ascontiguousarray(values, values.dtype.newbyteorder("<")).reshape(region.sizes)
        self._shape = shape
        itemsize = values.dtype.itemsize
        found = runs(region.offsets, region.sizes, shape, itemsize)
        first, self._run = next(found)  # all runs of a rectangle are equally long
        self._nbytes = math.prod(shape) * itemsize
        self._digests = [b""] * block_count(self._values.nbytes)
        self._left = 0
        self._lock = threading.Lock()
        opened: list[int] = []
        self._closing = closing(opened)
        self.fd = syscalls.open_shared(path, dir_fd, private=private)
        opened.append(self.fd)
        try:
            is_mapped = maps and self._run < _SHORT and self._values.nbytes // self._run > _FEW
            self._is_mapped = (is_mapped or self._nbytes >= SMALL) and self._reserve() and is_mapped
            # where the runs begin; if they have a few bytes, a list of them takes many times the memory of the values
            starts = chain([first], (start for start, _ in found))
            self._starts = array("Q", () if self._is_mapped else starts)
        except BaseException:
            self.close()
            raise

    def _reserve(self) -> bool:
        """Reserve the space of the whole file, whoever is first; False where the file system cannot."""
        try:
            syscalls.preallocate(self.fd, self._nbytes)
        except OSError as error:
            if not syscalls.is_missing(error):
                raise
            return False
        return True

    def pieces(self) -> Iterator[tuple[int, int]]:
        """Yield what to `write`, each piece once: bytes of the region, from start to stop."""
        every = [(0, self._values.nbytes)] if self._is_mapped else [*spans(self._values.nbytes)]
        self._left = len(every)
        yield from every

    def write(self, start: int, stop: int) -> bool:
        """Write a piece and note its digests; True for the piece that was the last to be written."""
        if self._is_mapped:
            self._copy()
            digests = [digest_block(self._values, *span) for span in spans(stop)]
        else:
            digests = [self._write_runs(start, stop)]
        with self._lock:
            first = start // BLOCK
            self._digests[first : first + len(digests)] = digests
            self._left -= 1
            return not self._left

    def _copy(self) -> None:
        with mmap.mmap(self.fd, self._nbytes) as memory:
            target = np.ndarray(self._shape, self._values.dtype, memory)
            target[self._region.within()] = self._values
            del target  # memory that is in use cannot be given back

    def _write_runs(self, start: int, stop: int) -> bytes:
        hasher = xxhash.xxh3_128()
        flat = self._values.reshape(-1).view(np.uint8).data
        for begin in range(start, stop, CHUNK):
            end = min(begin + CHUNK, stop)
            hasher.update(flat[begin:end])
            while begin < end:
                number, within = divmod(begin, self._run)
                upto = min(begin + self._run - within, end)
                syscalls.write_all(self.fd, flat[begin:upto], self._starts[number] + within)
                begin = upto
        return hasher.digest()

    def finish(self, *, fsync: bool) -> bytes:
        """Make the file durable if asked, close it, and return the digests of the region."""
        del self._values
        try:
            if fsync:
                syscalls.sync(self.fd)
        finally:
            self.close()
        return b"".join(self._digests)

    def close(self) -> None:
        """Give up the descriptor."""
        self._closing.close()
