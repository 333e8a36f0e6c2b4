"""Walk a folder that a stranger may have made, before anything in it is opened.

A folder consists of regular files and folders. Pipes and devices are refused, because opening one can block, and so are
links, because they lead to other places. The exception is the links of a snapshot of the Hugging Face Hub: see
`varstore.storage.containment`.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass

from varstore.errors import FormatError, SizeMismatch, UnsafeContent
from varstore.formats.binary.source import Source
from varstore.storage.containment import inside, is_below, is_hub_link
from varstore.storage.failures import translated
from varstore.storage.looking import kind_of

__all__ = ["DEEPEST", "WalkedFolder"]

DEEPEST = 64


@dataclass(frozen=True, slots=True)
class WalkedFolder:
    """The files in a folder and all folders below it: paths relative to it, joined by ``/``, and their sizes."""

    path: str
    root: str
    """The real path."""
    files: dict[str, int]
    folders: dict[str, list[str]]
    """Maps each folder, the outermost one as ``""``, to the names of the folders in it."""
    names: dict[str, list[str]]
    """Maps each folder to the names of the files in it."""

    @classmethod
    def walked(cls, path: str) -> WalkedFolder:
        """Walk a folder; symbolic links in `path` itself are followed.

        Raises:
            UnsafeContent: there is a link that is not one of the Hub's.
            FormatError: it is not a folder, is nested too deeply, or there is a file of another kind.
            StorageError: the operating system refused.
        """
        found = cls(path, os.path.realpath(path), {}, {}, {})
        if kind_of(found.root) != stat.S_IFDIR:
            raise FormatError("this is not a folder", path=path)
        waiting = [""]
        with translated(path, "reading failed"):
            while waiting:
                waiting += found._look(waiting.pop())
        return found

    @property
    def size(self) -> int:
        """The number of bytes in all files."""
        return sum(self.files.values())

    def below(self, folder: str) -> Iterator[str]:
        """Yield the files in a folder and in all folders below it, by their paths relative to it."""
        waiting = [""]
        while waiting:
            inner = waiting.pop()
            here = f"{folder}/{inner}".strip("/")
            yield from (f"{inner}/{name}".lstrip("/") for name in self.names.get(here, ()))
            waiting += [f"{inner}/{name}".lstrip("/") for name in self.folders.get(here, ())]

    def source(self, name: str) -> Source:
        """Return one of the files, which must still be what it was.

        Raises:
            UnsafeContent: it has become a link.
            CheckpointNotFound: it was removed.
        """
        return Source(inside(self.root, name, stated_by=self.path))

    def content(self, name: str, *, most: int | None = None) -> bytes:
        """Return the content of one of the files.

        Raises:
            SizeMismatch: it is longer than `most` bytes.
            UnsafeContent, CheckpointNotFound: see `source`.
        """
        source = self.source(name)
        self._check_length(name, source.size, most)
        return source.bytes(0, source.size)

    def _check_length(self, name: str, size: int, most: int | None) -> None:
        if most is not None and size > most:
            raise SizeMismatch(
                "the metadata is too long", path=os.path.join(self.path, name), found=size, expected=f"at most {most}"
            )

    def _look(self, folder: str) -> list[str]:
        folders = self.folders[folder] = []
        files = self.names[folder] = []
        if folder.count("/") >= DEEPEST:
            raise FormatError("folders are nested too deeply", path=self.path, found=f"more than {DEEPEST}")
        with os.scandir(os.path.join(self.root, folder)) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                name = f"{folder}/{entry.name}" if folder else entry.name
                status = entry.stat(follow_symlinks=False)
                if stat.S_ISLNK(status.st_mode):
                    status = self._linked(name)
                if stat.S_ISDIR(status.st_mode):
                    folders.append(entry.name)
                elif stat.S_ISREG(status.st_mode):
                    files.append(entry.name)
                    self.files[name] = status.st_size
                else:
                    raise FormatError("this is not a regular file", path=os.path.join(self.path, name))
        return [f"{folder}/{name}" if folder else name for name in folders]

    def _linked(self, name: str) -> os.stat_result:
        place = os.path.join(self.root, name)
        if is_hub_link(place):
            return os.stat(place)
        real = os.path.realpath(place)
        leads_out = not is_below(self.root, real)
        raise UnsafeContent(
            "a link leads out of the folder" if leads_out else "a link is not a file or folder",
            path=self.path,
            found=f"{name!r} -> {os.readlink(place)!r}",
            hint="replace it by a copy, if you trust what it leads to",
        )
