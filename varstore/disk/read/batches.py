"""Read many small variables at a time: hundreds of files with one system call where the kernel can (io_uring).

A batch goes into one buffer, of which its variables are parts.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator, Sequence
from types import TracebackType

import numpy as np
import xxhash

from varstore.disk.blocks import read_block
from varstore.disk.read.checks import check_digest, check_meta, check_size
from varstore.disk.read.ring import Ring
from varstore.layout.manifest import Entry
from varstore.layout.meta import encode_meta
from varstore.storage.beneath import not_regular, open_file

__all__ = ["SmallReader", "batches"]

_BATCH_BYTES = 1 << 20
_BATCH_FILES = 256
_ALIGNMENT = 64
_RING_FROM = 32


def batches(entries: Sequence[Entry]) -> Iterator[range]:
    """Yield runs of neighbours that are read together: few enough to share a buffer of about a MiB."""
    first = nbytes = 0
    for index, entry in enumerate(entries):
        if index > first and (nbytes + entry.nbytes > _BATCH_BYTES or index - first == _BATCH_FILES):
            yield range(first, index)
            first, nbytes = index, 0
        nbytes += entry.nbytes
    if first < len(entries):
        yield range(first, len(entries))


class SmallReader:
    """Reads batches of a checkpoint's variables, from any thread; a ring a thread, closed at the end."""

    def __init__(self, root_fd: int, root: str, *, verify: bool) -> None:
        self._root_fd = root_fd
        self._root = root
        self._verify = verify
        self._mine = threading.local()
        self._rings: list[Ring] = []

    def __enter__(self) -> SmallReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for ring in self._rings:
            ring.close()

    @property
    def is_parallel(self) -> bool:
        """Whether threads help: the kernel works while another thread computes, and not against it."""
        return self._ring(_RING_FROM) is not None

    def read(self, batch: Sequence[Entry]) -> tuple[np.ndarray, list[int]]:
        """Return a buffer and where in it each variable's bytes begin, every one checked.

        Raises:
            FormatError: a file is missing, of another size, damaged, or no file at all.
        """
        sizes = np.fromiter([entry.nbytes for entry in batch], np.int64, len(batch))
        slots = -(-(sizes + 1) // _ALIGNMENT) * _ALIGNMENT  # a byte more, which shows a file that is too long
        offsets = np.cumsum(slots) - slots
        buffer = np.empty(int(slots.sum()), np.uint8)
        ring = self._ring(len(batch))
        if ring is None:
            suspects: Sequence[int] = range(len(batch))
        else:
            paths = [f"{entry.folder}/out".encode("utf-8", "surrogateescape") for entry in batch]
            found = ring.read(self._root_fd, paths, buffer, offsets, sizes + 1)
            suspects = np.flatnonzero(found != sizes).tolist()
        starts: list[int] = offsets.tolist()
        for index in suspects:
            self._read_one(batch[index], buffer[starts[index] : starts[index] + batch[index].nbytes])
        if self._verify:
            self._check_digests(batch, buffer.data, starts)
            self._check_metas(batch, ring)
        return buffer, starts

    def _ring(self, files: int) -> Ring | None:
        if files < _RING_FROM:
            return None
        if not hasattr(self._mine, "ring"):
            self._mine.ring = Ring.open()
            if self._mine.ring is not None:
                self._rings.append(self._mine.ring)
        ring: Ring | None = self._mine.ring
        return ring

    def _read_one(self, entry: Entry, target: np.ndarray) -> None:
        relative = entry.folder + "/out"
        fd = open_file(self._root_fd, relative, root=self._root, variable=entry.name)
        try:
            size = os.preadv(fd, (target.data, bytearray(1)), 0)
            if size != entry.nbytes:
                check_size(self._root, entry, os.fstat(fd).st_size)
                read_block(fd, target, 0, hashed=False)  # a call may give less than there is
        except OSError as error:
            if error.errno in (errno.ESPIPE, errno.EISDIR, errno.EAGAIN):
                raise not_regular(self._root, relative, entry.name) from error
            raise
        finally:
            os.close(fd)

    def _check_digests(self, batch: Sequence[Entry], buffer: memoryview, starts: list[int]) -> None:
        digest_of = xxhash.xxh3_128_digest
        for entry, start in zip(batch, starts, strict=True):
            digest = digest_of(buffer[start : start + entry.nbytes])
            if digest != entry.digests and entry.digests:
                check_digest(self._root, entry, 0, digest)

    def _check_metas(self, batch: Sequence[Entry], ring: Ring | None) -> None:
        if ring is None or not self._metas_are_canonical(batch, ring):
            for entry in batch:
                check_meta(self._root_fd, self._root, entry)

    def _metas_are_canonical(self, batch: Sequence[Entry], ring: Ring) -> bool:
        """Compare all of a batch's ``meta`` at once with what the manifest says, each file a byte too long a read."""
        if not all(entry.witnessed and not entry.meta_digest and entry.meta for entry in batch):
            return False
        texts = [encode_meta(entry.meta) for entry in batch if entry.meta]
        expected = b"\0".join(texts) + b"\0"
        slots = np.fromiter([len(text) + 1 for text in texts], np.int64, len(texts))
        buffer = np.zeros(len(expected), np.uint8)
        paths = [f"{entry.folder}/meta".encode("utf-8", "surrogateescape") for entry in batch]
        found = ring.read(self._root_fd, paths, buffer, np.cumsum(slots) - slots, slots)
        return bool((found == slots - 1).all()) and buffer.tobytes() == expected
