"""Read a checkpoint that has no manifest: any folder that holds ``out`` is a variable (FORMAT F5, F10)."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator, Mapping

import xxhash

from varstore.errors import FormatError
from varstore.layout.manifest import Entry
from varstore.layout.meta import META_LIMIT, Meta, encode_meta, parse_meta
from varstore.layout.names import Folder
from varstore.storage.beneath import opened_file, read_small

__all__ = ["WalkedEntries", "read_meta", "variable_folders"]


class WalkedEntries(Mapping[str, Entry]):
    """Entries by name, which is the folder's path taken literally; ``meta`` is read when one is asked for."""

    def __init__(self, root_fd: int, root: str) -> None:
        self._root = root
        self._folders = dict.fromkeys(sorted(variable_folders(root_fd)))
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
        root_fd = os.open(self._root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            with opened_file(root_fd, f"{folder}/out", root=self._root, variable=folder) as (_, size):
                meta = read_meta(root_fd, self._root, folder)
            if meta is None:
                return Entry(name=folder, folder=folder, meta=None, nbytes=size)
            described, text = meta
            digest = b"" if text == encode_meta(described) else xxhash.xxh3_128_digest(text)
            return Entry(name=folder, folder=folder, meta=described, nbytes=size, meta_digest=digest)
        finally:
            os.close(root_fd)


def read_meta(root_fd: int, root: str, folder: str) -> tuple[Meta, bytes] | None:
    """Return what a folder's ``meta`` says, and its text; None where there is none.

    Raises:
        MetaError: it does not describe a variable.
        FormatError: it is too large, or not a file.
    """
    relative = f"{folder}/meta"
    try:
        os.stat(relative, dir_fd=root_fd, follow_symlinks=False)
    except FileNotFoundError:
        return None
    text = read_small(root_fd, relative, root=root, limit=META_LIMIT, variable=folder)
    return parse_meta(text, path=os.path.join(root, relative)), text


def variable_folders(root_fd: int) -> Iterator[str]:
    """Yield every folder below the root that holds an ``out``, hidden ones too.

    A symbolic link to a folder counts as one if it holds an ``out``, but is not walked into.
    """
    pending = [""]
    while pending:
        below = pending.pop()
        for name in _subfolders(root_fd, below):
            folder = f"{below}/{name}" if below else name
            if _has_out(root_fd, folder):
                yield folder
            if not _is_link(root_fd, folder):
                pending.append(folder)


def _subfolders(root_fd: int, below: str) -> list[str]:
    try:
        fd = os.open(below or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=root_fd)
    except PermissionError:
        if below == "lost+found":
            return []
        raise
    try:
        with os.scandir(fd) as entries:
            return [entry.name for entry in entries if entry.is_symlink() or entry.is_dir()]
    finally:
        os.close(fd)


def _has_out(root_fd: int, folder: str) -> bool:
    try:
        os.stat(f"{folder}/out", dir_fd=root_fd, follow_symlinks=False)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            return False
        raise FormatError("the folder cannot be read", variable=folder, found=str(error)) from error
    return True


def _is_link(root_fd: int, folder: str) -> bool:
    return stat.S_ISLNK(os.stat(folder, dir_fd=root_fd, follow_symlinks=False).st_mode)
