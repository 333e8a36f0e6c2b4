"""Read many small variables at a time: a batch goes into one buffer, of which its variables are parts."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Sequence

import numpy as np
import xxhash

from varstore.disk.blocks import read_block
from varstore.disk.read.checks import check_digest
from varstore.disk.read.regions import check_in_memory
from varstore.layout.readable import Readable
from varstore.storage import syscalls
from varstore.storage.directory import Directory

__all__ = ["BATCH_FILES", "batches", "read_batch"]

BATCH_FILES = 256
"""Files of a batch at most."""
_BATCH_BYTES = 1 << 20
_ALIGNMENT = 64


def batches(variables: Sequence[Readable], files: int) -> Iterator[range]:
    """Yield runs of neighbours that are read together: so many, or few enough to share a buffer of about a MiB."""
    first = nbytes = 0
    for index, variable in enumerate(variables):
        size = variable.entry.nbytes
        if index > first and (nbytes + size > _BATCH_BYTES or index - first == files):
            yield range(first, index)
            first, nbytes = index, 0
        nbytes += size
    if first < len(variables):
        yield range(first, len(variables))


def read_batch(directory: Directory, batch: Sequence[Readable], *, verify: bool) -> tuple[np.ndarray, list[int]]:
    """Return a buffer and where in it each variable's bytes begin; with `verify`, every digest is compared.

    The variables are of a plain encoding.

    Raises:
        FormatError: a file is missing, of another size, damaged, or not a file at all.
    """
    sizes = np.fromiter([variable.entry.nbytes for variable in batch], np.int64, len(batch))
    slots = -(-sizes // _ALIGNMENT) * _ALIGNMENT
    offsets = np.cumsum(slots) - slots
    buffer = np.empty(int(slots.sum()), np.uint8)
    starts: list[int] = offsets.tolist()
    memory = buffer.data
    too_long = bytearray(1)
    digest_of = xxhash.xxh3_128_digest
    for variable, start in zip(batch, starts, strict=True):
        entry = variable.entry
        target = memory[start : start + entry.nbytes]
        _read_one(directory, variable, target, too_long)
        if verify and entry.digests:
            digest = digest_of(target)
            if digest != entry.digests:
                check_digest(directory, entry, entry.digests, 0, digest)
        elif verify and entry.regions:
            check_in_memory(directory, entry, np.ndarray(variable.shape, variable.stored, target))
    return buffer, starts


def _read_one(directory: Directory, variable: Readable, target: memoryview, too_long: bytearray) -> None:
    """Fill the memory with the values; a byte more is asked for, which shows a file that is too long."""
    entry = variable.entry
    relative = entry.folder + "/out"
    fd = directory.open(relative, variable=entry.name)
    try:
        if syscalls.preadv(fd, (target, too_long), 0) != entry.nbytes:
            directory.check_size(entry, directory.size(fd, relative, entry.name))
            read_block(fd, np.frombuffer(target, np.uint8), 0, hashed=False)  # a call may give less than there is
    except OSError as error:
        if error.errno in (errno.ESPIPE, errno.EISDIR, errno.EAGAIN):
            raise directory.not_regular(relative, entry.name) from error
        raise
    finally:
        os.close(fd)
