"""Read the values of a variable, or an attached file, for their digests alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial

import numpy as np

from varstore.disk.blocks import SMALL, BlockHasher, digest_file_block, read_block, spans
from varstore.disk.encodings.stored import Stored
from varstore.disk.encodings.table import read_part
from varstore.disk.progress import Progress, reporting
from varstore.disk.read.checks import check_digest
from varstore.disk.read.regions import check_in_memory, check_regions
from varstore.disk.threads import run, thread_count
from varstore.layout.attached import FileEntry
from varstore.layout.location import Location
from varstore.layout.manifest import BLOCK, Entry
from varstore.layout.readable import Readable
from varstore.storage.directory import Directory
from varstore.storage.failures import translated

__all__ = ["all_digests", "check_bytes", "check_linked", "content_digests", "digests_of"]


def all_digests(directory: Directory, entry: Entry | FileEntry) -> bytes:
    """Return the digests of all blocks of ``out``, or of an attached file, as it is now, one after the other.

    Raises:
        FormatError: there is no such file, or it is not of the size that shape and type say.
    """
    with directory.out(entry) as fd:
        return b"".join(digest_file_block(fd, start, stop) for start, stop in spans(entry.nbytes))


def check_bytes(directory: Directory, entry: Entry | FileEntry) -> None:
    """Read ``out``, or an attached file, and compare it with the digests that are known; without any, with its size.

    Raises:
        DigestMismatch: the bytes are not those that were saved.
        FormatError: there is no such file, or it is not of the size that shape and type say.
    """
    with directory.out(entry) as fd:
        if isinstance(entry, Entry) and entry.regions and entry.nbytes < SMALL:
            assert entry.meta is not None
            row = np.empty(entry.nbytes, np.uint8)
            read_block(fd, row, 0, hashed=False)
            values = row.view(f"V{entry.nbytes // max(entry.meta.elements, 1) or 1}").reshape(entry.meta.shape)
            check_in_memory(directory, entry, values)
        elif isinstance(entry, Entry) and entry.regions:
            check_regions(directory, entry, fd)
        for start, stop in spans(entry.nbytes if entry.digests else 0):
            check_digest(directory, entry, entry.digests, start // BLOCK, digest_file_block(fd, start, stop))


def check_linked(
    files: Sequence[tuple[Location, Entry | FileEntry]], threads: int | None, progress: Progress = None
) -> None:
    """Compare files that are to be linked with their digests; those without any are not looked at.

    Raises:
        DigestMismatch: the bytes of one are not those that were saved.
        FormatError: there is no such file, or it is not of the size that shape and type say.
    """
    known = [(location, entry) for location, entry in files if entry.checksums]
    total = sum(entry.nbytes for _, entry in known)
    with reporting(progress, total, "verifying") as advance:

        def check(location: Location, entry: Entry | FileEntry) -> None:
            with translated(location.path, "verifying failed"), Directory(location) as directory:
                check_bytes(directory, entry)
            if advance:
                advance(entry.nbytes)

        run((partial(check, *file) for file in known), min(thread_count(threads), max(1, len(known))))


def digests_of(pieces: Iterable[memoryview]) -> bytes:
    """Return the digests that an ``out`` with these bytes would have."""
    hasher = BlockHasher()
    for data in pieces:
        hasher.update(data)
    return hasher.digests()


def content_digests(directory: Directory, variable: Readable) -> bytes:
    """Return the digests of each 16 MiB of the values of an encoded variable, one after the other.

    Raises:
        DigestMismatch: ``out`` cannot be decoded.
        FormatError: there is no such file, or it is not of the size that it had.
    """
    digests = []
    with directory.out(variable.entry) as fd:
        for start, stop in spans(variable.nbytes):
            row = np.empty(stop - start, np.uint8)
            digests.append(read_part(directory, Stored(fd), variable, row, start, hashed=True))
    return b"".join(digests)
