"""Read the values of a variable for their digests alone."""

from __future__ import annotations

from varstore.disk.blocks import digest_file_block, spans
from varstore.disk.read.checks import check_size
from varstore.layout.manifest import Entry
from varstore.storage.beneath import opened_file

__all__ = ["all_digests", "digest_of_block"]


def digest_of_block(root_fd: int, root: str, entry: Entry, start: int, stop: int) -> bytes:
    """Return the digest of one block of ``out`` as it lies there.

    Raises:
        FormatError: there is no such file, or it is not of the size that shape and type say.
    """
    with opened_file(root_fd, f"{entry.folder}/out", root=root, variable=entry.name) as (fd, size):
        check_size(root, entry, size)
        return digest_file_block(fd, start, stop)


def all_digests(root_fd: int, root: str, entry: Entry) -> bytes:
    """Return the digests of all blocks, one after the other."""
    return b"".join(digest_of_block(root_fd, root, entry, start, stop) for start, stop in spans(entry.nbytes))
