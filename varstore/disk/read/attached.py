"""One attached file of a checkpoint: what it is is known, its bytes stay on disk until asked for."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from varstore.disk.blocks import read_block, spans
from varstore.disk.read.checks import check_digest
from varstore.layout.attached import FileEntry
from varstore.layout.location import Location
from varstore.layout.manifest import BLOCK, DIGEST_SIZE
from varstore.storage.directory import Directory
from varstore.storage.failures import translated
from varstore.text.hints import plural
from varstore.values.attached import StoredFile

__all__ = ["AttachedFile"]


class AttachedFile(StoredFile):
    """A file that was saved with a checkpoint, beside its variables; given to `save` as one of `files`, it is linked.

    `read` compares it with its digests. Others open it by its `path`. It can be pickled, as a `Variable` can.

    Example:
        >>> checkpoint = vs.save("lenet", {"fc/bias": np.zeros(10)}, files={"labels.txt": b"cat, dog"})
        >>> labels = checkpoint.files["labels.txt"]
        >>> labels.nbytes, labels.read()
        (8, b'cat, dog')
        >>> labels.path
        'lenet/labels.txt'
    """

    __slots__ = ("entry", "location")

    def __init__(self, location: Location, entry: FileEntry) -> None:
        self.location = location
        self.entry = entry

    def __reduce__(self) -> tuple[type[AttachedFile], tuple[Location, FileEntry]]:
        return AttachedFile, (self.location, self.entry)

    @property
    def name(self) -> str:
        """The name, in the root of the checkpoint."""
        return self.entry.name

    @property
    def nbytes(self) -> int:
        """The size in bytes."""
        return self.entry.nbytes

    @property
    def digests(self) -> tuple[str, ...]:
        """xxh3-128 of each 16 MiB block in hex; of one block, what ``xxhsum -H2`` prints."""
        whole = self.entry.digests
        return tuple(whole[start : start + DIGEST_SIZE].hex() for start in range(0, len(whole), DIGEST_SIZE))

    @property
    def kind(self) -> str:
        """What it is: ``"graph"``, ``"text"`` or, if nothing else is known, ``"data"``."""
        return self.entry.kind

    @property
    def attributes(self) -> Mapping[str, Any]:
        """The JSON data that is kept with it."""
        return self.entry.attributes

    @property
    def path(self) -> str:
        """Its path, for other programs; its bytes are not compared with the digests.

        Raises:
            UnsafeContent: what lies there is not a regular file.
            SizeMismatch: it is longer or shorter than it was saved.
            FormatError: there is no such file.
            StorageError: the checkpoint was replaced.
        """
        with translated(self.location.path, "reading failed"), Directory(self.location) as directory:
            directory.check_regular(self.entry.file)
            with directory.out(self.entry):
                return os.path.join(self.location.path, self.entry.file)

    def read(self) -> bytes:
        """Return its bytes.

        Raises:
            DigestMismatch: they are not those that were saved.
            UnsafeContent: it is not a regular file.
            SizeMismatch: it is longer or shorter than it was saved.
            FormatError: there is no such file.
            StorageError: the checkpoint was replaced.
        """
        with translated(self.location.path, "reading failed"), Directory(self.location) as directory:
            directory.check_regular(self.entry.file)
            with directory.out(self.entry) as fd:
                content = np.empty(self.nbytes, np.uint8)
                for start, stop in spans(self.nbytes):
                    found = read_block(fd, content[start:stop], start, hashed=True)
                    check_digest(directory, self.entry, self.entry.digests, start // BLOCK, found)
        return content.tobytes()

    def __repr__(self) -> str:
        return f"<AttachedFile {self.name!r}: {plural(self.nbytes, 'byte')}>"
