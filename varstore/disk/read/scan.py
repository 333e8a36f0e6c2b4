"""Read a checkpoint that has no manifest: any folder that holds ``out`` is a variable (FORMAT F5, F10)."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator, Mapping

import xxhash

from varstore.disk.encodings.companions import read_level
from varstore.disk.threads import for_each
from varstore.layout.encodings import ZARR
from varstore.layout.location import Location
from varstore.layout.manifest import Entry
from varstore.layout.meta import META_LIMIT, encode_meta, parse_meta
from varstore.layout.names import Folder
from varstore.layout.shards import DOCUMENT
from varstore.storage.directory import Directory, replaced_error

__all__ = ["WalkedEntries", "read_entry", "variable_folders"]


class WalkedEntries(Mapping[str, Entry]):
    """Entries by name, which is the folder's path taken literally; ``meta`` is read when one is asked for."""

    def __init__(self, directory: Directory, location: Location) -> None:
        """List the folders of an open directory; entries are read later, if `location` is still its checkpoint's."""
        self._location = location
        self._folders = dict.fromkeys(variable_folders(directory))
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
        with Directory(self._location, confirms=False) as directory:
            return read_entry(directory, folder)


def read_entry(directory: Directory, folder: Folder) -> Entry:
    """Return what a folder's ``out`` and ``meta`` say of its variable, which has the folder's path as its name.

    Raises:
        MetaError: ``meta`` does not describe a variable.
        FormatError: ``zarr.json`` does not describe an encoded one as varstore does.
        FormatError: there is no ``out``, or one of the two is not a file.
        StorageError: the checkpoint was replaced.
    """
    relative = f"{folder}/out"
    fd = directory.open(relative, variable=folder)
    try:
        entry = Entry(name=folder, folder=folder, meta=None, nbytes=directory.size(fd, relative, folder))
    finally:
        os.close(fd)
    relative = f"{folder}/meta"
    text = directory.read_if_there(relative, limit=META_LIMIT, variable=folder)
    if text is None:
        if not directory.is_current():  # of a checkpoint that is being removed, `meta` may be the first file to go
            raise replaced_error(directory.path)
        return entry
    meta = parse_meta(text, path=directory.place(relative))
    dtype = meta.data_type.dtype
    if dtype is None or meta.elements * dtype.itemsize != entry.nbytes:
        if dtype is not None and directory.read_if_there(f"{folder}/{DOCUMENT}", limit=META_LIMIT) is not None:
            entry = entry._replace(meta=meta, encoding=ZARR.name)
            read_level(directory, entry)
        directory.check_no_pointer(entry, entry.nbytes)
    return entry._replace(meta=meta, meta_digest=b"" if text == encode_meta(meta) else xxhash.xxh3_128_digest(text))


def variable_folders(directory: Directory) -> list[str]:
    """Return every folder below the root that holds an ``out``, hidden ones too, sorted.

    A symbolic link to a folder counts as one if it holds an ``out``, but is not walked into. It is walked level by
    level, so that many folders are looked at at the same time where calls wait.
    """
    found: list[str] = []
    level = [""]
    while level:
        folders: list[str] = []
        below: list[str] = []

        def enter(above: str, folders: list[str] = folders) -> None:
            folders += [f"{above}/{name}" if above else name for name in _subfolders(directory, above)]

        def look(folder: str, below: list[str] = below) -> None:
            if _has_out(directory, folder):
                found.append(folder)
            if not stat.S_ISLNK(directory.status(folder).st_mode):
                below.append(folder)

        for_each(level, enter)
        for_each(folders, look)
        level = below
    return sorted(found)


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
        raise
    return True
