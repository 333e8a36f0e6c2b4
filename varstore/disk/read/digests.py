"""Read the values of a variable, or an attached file, for their digests alone."""

from __future__ import annotations

from collections.abc import Iterable

import xxhash

from varstore.disk.blocks import digest_file_block, spans
from varstore.disk.read.checks import check_digest
from varstore.layout.attached import FileEntry
from varstore.layout.manifest import BLOCK, Entry
from varstore.storage.directory import Directory

__all__ = ["all_digests", "check_bytes", "digests_of"]


def all_digests(directory: Directory, entry: Entry | FileEntry) -> bytes:
    """Return the digests of all blocks of ``out``, or of an attached file, as it is now, one after the other.

    Raises:
        FormatError: there is no such file, or it is not of the size that shape and type say.
    """
    with directory.out(entry) as fd:
        return b"".join(digest_file_block(fd, start, stop) for start, stop in spans(entry.nbytes))


def check_bytes(directory: Directory, entry: Entry | FileEntry) -> None:
    """Read ``out``, or an attached file, and compare it with its digests; without any, look at its size alone.

    Raises:
        DigestMismatch: the bytes are not those that were saved.
        FormatError: there is no such file, or it is not of the size that shape and type say.
    """
    with directory.out(entry) as fd:
        for start, stop in spans(entry.nbytes if entry.digests else 0):
            check_digest(directory, entry, entry.digests, start // BLOCK, digest_file_block(fd, start, stop))


def digests_of(pieces: Iterable[memoryview]) -> bytes:
    """Return the digests that an ``out`` with these bytes would have."""
    found, hasher, left = b"", xxhash.xxh3_128(), BLOCK
    for data in pieces:
        while len(data) > left:
            hasher.update(data[:left])
            found, hasher, data, left = found + hasher.digest(), xxhash.xxh3_128(), data[left:], BLOCK
        hasher.update(data)
        left -= len(data)
    return found if left == BLOCK else found + hasher.digest()
