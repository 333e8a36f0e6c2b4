"""Read many small variables at a time: a batch goes into one buffer, of which its variables are parts."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Sequence

import numpy as np
import xxhash

from varstore.disk.blocks import read_block
from varstore.disk.read.checks import check_digest, check_size
from varstore.layout.manifest import Entry
from varstore.storage.beneath import not_regular, open_file

__all__ = ["batches", "read_batch"]

_BATCH_BYTES = 1 << 20
_BATCH_FILES = 256
_ALIGNMENT = 64


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


def read_batch(root_fd: int, root: str, batch: Sequence[Entry], *, verify: bool) -> tuple[np.ndarray, list[int]]:
    """Return a buffer and where in it each variable's bytes begin; with `verify`, every digest is compared.

    Raises:
        FormatError: a file is missing, of another size, damaged, or not a file at all.
    """
    sizes = np.fromiter([entry.nbytes for entry in batch], np.int64, len(batch))
    slots = -(-sizes // _ALIGNMENT) * _ALIGNMENT
    offsets = np.cumsum(slots) - slots
    buffer = np.empty(int(slots.sum()), np.uint8)
    starts: list[int] = offsets.tolist()
    memory = buffer.data
    too_long = bytearray(1)
    digest_of = xxhash.xxh3_128_digest
    for entry, start in zip(batch, starts, strict=True):
        target = memory[start : start + entry.nbytes]
        _read_one(root_fd, root, entry, target, too_long)
        if verify and entry.digests:
            digest = digest_of(target)
            if digest != entry.digests:
                check_digest(root, entry, 0, digest)
    return buffer, starts


def _read_one(root_fd: int, root: str, entry: Entry, target: memoryview, too_long: bytearray) -> None:
    """Fill the memory with the values; a byte more is asked for, which shows a file that is too long."""
    relative = entry.folder + "/out"
    fd = open_file(root_fd, relative, root=root, variable=entry.name)
    try:
        if os.preadv(fd, (target, too_long), 0) != entry.nbytes:
            check_size(root, entry, os.fstat(fd).st_size)
            read_block(fd, np.frombuffer(target, np.uint8), 0, hashed=False)  # a call may give less than there is
    except OSError as error:
        if error.errno in (errno.ESPIPE, errno.EISDIR, errno.EAGAIN):
            raise not_regular(root, relative, entry.name) from error
        raise
    finally:
        os.close(fd)
