"""Read a checkpoint that has no manifest: any folder that holds ``out`` is a variable (FORMAT F5, F10)."""

from __future__ import annotations

import errno
import stat
from collections.abc import Iterator, Mapping

import xxhash

from varstore.errors import FormatError
from varstore.layout.location import Location
from varstore.layout.manifest import Entry
from varstore.layout.meta import META_LIMIT, Meta, encode_meta, parse_meta
from varstore.layout.names import Folder
from varstore.storage.directory import Directory

__all__ = ["WalkedEntries", "variable_folders"]


class WalkedEntries(Mapping[str, Entry]):
    """Entries by name, which is the folder's path taken literally; ``meta`` is read when one is asked for."""

    def __init__(self, directory: Directory, location: Location) -> None:
        """List the folders of an open directory; entries are read later, if `location` is still its checkpoint's."""
        self._location = location
        self._folders = dict.fromkeys(sorted(variable_folders(directory)))
        self._made: dict[str, Entry] = {}

    def __getitem__(self, name: str) -> Entry:
        entry = self._made.get(name)
        if entry is None:
            if name not in self._folders:
                raise KeyError(name)
            entry = self._made[name] = self._read(Folder(name))
        return entry

    def __iter__(self) -> Iterator[str]:
        return iter(self._folders)

    def __len__(self) -> int:
        return len(self._folders)

    def __contains__(self, name: object) -> bool:
        return name in self._folders

    def _read(self, folder: Folder) -> Entry:
        entry = Entry(name=folder, folder=folder, meta=None, nbytes=0)
        with Directory(self._location) as directory:
            with directory.file(entry, "out") as (_, size):
                entry = entry._replace(nbytes=size)
            found = _read_meta(directory, folder)
        if found is None:
            return entry
        meta, text = found
        return entry._replace(meta=meta, meta_digest=b"" if text == encode_meta(meta) else xxhash.xxh3_128_digest(text))


def _read_meta(directory: Directory, folder: str) -> tuple[Meta, bytes] | None:
    """Return what a folder's ``meta`` says, and its text; None where there is none.

    Raises:
        MetaError: it does not describe a variable.
        FormatError: it is too large, or not a file.
    """
    relative = f"{folder}/meta"
    try:
        directory.status(relative)
    except FileNotFoundError:
        return None
    text = directory.read_small(relative, limit=META_LIMIT, variable=folder)
    return parse_meta(text, path=directory.place(relative)), text


def variable_folders(directory: Directory) -> Iterator[str]:
    """Yield every folder below the root that holds an ``out``, hidden ones too.

    A symbolic link to a folder counts as one if it holds an ``out``, but is not walked into.
    """
    pending = [""]
    while pending:
        below = pending.pop()
        for name in _subfolders(directory, below):
            folder = f"{below}/{name}" if below else name
            if _has_out(directory, folder):
                yield folder
            if not stat.S_ISLNK(directory.status(folder).st_mode):
                pending.append(folder)


def _subfolders(directory: Directory, below: str) -> list[str]:
    try:
        return directory.subfolders(below)
    except PermissionError:
        if below == "lost+found":
            return []
        raise


def _has_out(directory: Directory, folder: str) -> bool:
    try:
        directory.status(f"{folder}/out")
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            return False
        raise FormatError("the folder cannot be read", variable=folder, found=str(error)) from error
    return True
