"""Read the values of a variable, or an attached file, for their digests alone."""

from __future__ import annotations

from varstore.disk.blocks import digest_file_block, spans
from varstore.layout.attached import FileEntry
from varstore.layout.manifest import Entry
from varstore.storage.directory import Directory

__all__ = ["all_digests"]


def all_digests(directory: Directory, entry: Entry | FileEntry) -> bytes:
    """Return the digests of all blocks of ``out``, or of an attached file, as it is now, one after the other.

    Raises:
        FormatError: there is no such file, or it is not of the size that shape and type say.
    """
    with directory.out(entry) as fd:
        return b"".join(digest_file_block(fd, start, stop) for start, stop in spans(entry.nbytes))
