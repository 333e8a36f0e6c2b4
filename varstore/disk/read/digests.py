"""Read the values of a variable for their digests alone."""

from __future__ import annotations

from varstore.disk.blocks import digest_file_block, spans
from varstore.disk.read.checks import check_size
from varstore.layout.manifest import Entry
from varstore.storage.directory import Directory

__all__ = ["all_digests", "digest_of_block"]


def digest_of_block(directory: Directory, entry: Entry, start: int, stop: int) -> bytes:
    """Return the digest of one block of ``out`` as it lies there.

    Raises:
        FormatError: there is no such file, or it is not of the size that shape and type say.
    """
    with directory.file(entry, "out") as (fd, size):
        check_size(directory, entry, size)
        return digest_file_block(fd, start, stop)


def all_digests(directory: Directory, entry: Entry) -> bytes:
    """Return the digests of all blocks, one after the other; raises what `digest_of_block` does."""
    with directory.file(entry, "out") as (fd, size):
        check_size(directory, entry, size)
        return b"".join(digest_file_block(fd, start, stop) for start, stop in spans(size))
