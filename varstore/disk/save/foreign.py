"""Other people's files in a checkpoint: those that it does not know (FORMAT F7, F10).

Overwriting removes a whole directory, and with it whatever somebody put there. So that is found before the first byte
is written: in the root, in the folders of variables, and in any other folder, such as a checkpoint nested in this one.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import stat
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal

from varstore.disk.save.leftovers import is_own_name
from varstore.disk.threads import for_each
from varstore.errors import CheckpointExists, FormatError
from varstore.layout.encodings import RAW, is_plain
from varstore.layout.location import Location
from varstore.layout.manifest import MANIFEST_LIMIT, Manifest
from varstore.layout.names import MANIFEST, MARKER
from varstore.storage import syscalls
from varstore.storage.directory import Directory

__all__ = ["Foreign", "Stamp", "carry", "foreign_files"]

Foreign = Literal["error", "delete", "keep"]
"""What becomes of other people's files in a checkpoint that is overwritten."""
Stamp = tuple[int, int, int]
"""Inode, size and time of a file, which tell whether it changed."""

_DROPPED = re.compile(r"\.DS_Store|\._.*|\.nfs.*|Thumbs\.db|desktop\.ini|lost\+found", re.DOTALL)
"""What systems leave in folders; nobody misses it."""
_USUAL = frozenset({"out", "meta"})
_SETTLED = 10 * 10**9
"""Nanoseconds; no file system keeps times of changes less exactly than this, not even vfat."""
_NOT_A_FOLDER = {errno.ENOTDIR, errno.ELOOP}
_ENCODED = re.compile(r"zarr\.json|c(\.\d+)*")


def foreign_files(fd: int, path: str, seen: dict[tuple[int, int], int]) -> list[str]:
    """Return the files in a checkpoint that it does not know, as paths relative to it.

    What systems drop does not count, nor do temporary names of varstore, or empty folders. Without a manifest that can
    be read, each folder that holds an ``out`` is a variable.

    All is looked at by descriptors: another checkpoint may take the path meanwhile.

    Args:
        fd: of its directory.
        path: of its directory.
        seen: the folders of variables that held no such file when they were looked at before: device and inode, and
            the time of the last change. They are listed again only if they changed since; this look adds its own.

    Raises:
        OSError: a folder cannot be listed, or the manifest cannot be read, or the checkpoint is being removed.
    """
    return sorted(_foreign(fd, _known_folders(fd, path, seen)))


@dataclass(frozen=True, kw_only=True, slots=True)
class _Known:
    """The folders of variables, each with its encoding, those above them, and the attached files.

    `seen` is as for `foreign_files`, and the time of a change that came after `settled` is not noted: the next one
    may get the same time.
    """

    variables: Mapping[str, str]
    parents: Collection[str]
    files: Collection[str]
    seen: dict[tuple[int, int], int]
    settled: int


def _known_folders(fd: int, path: str, seen: dict[tuple[int, int], int]) -> _Known | None:
    try:
        data = Directory(Location(path, path), fd).read_small(MANIFEST, limit=MANIFEST_LIMIT)
        manifest = Manifest.decode(data, path=path)
        variables = manifest.folders()
    except FormatError:
        return None
    parents: set[str] = set()
    for folder in variables:
        above: str = folder
        while (above := above.rpartition("/")[0]) and above not in parents:
            parents.add(above)
    is_shared = syscalls.file_system_type(fd) in syscalls.SHARED_FILE_SYSTEMS  # where times come from other clocks
    return _Known(
        variables=variables,
        parents=parents,
        files=manifest.files.keys(),
        seen=seen,
        settled=0 if is_shared else time.time_ns() - _SETTLED,
    )


def _foreign(root: int, known: _Known | None) -> Iterator[str]:
    """Yield the foreign files in an open checkpoint.

    It is looked at level by level, so that many folders are listed at the same time where calls wait.
    """
    level: dict[str, Collection[str]] = {"": {MANIFEST, MARKER, *(known.files if known else ())}}
    while level:
        listed: dict[str, list[tuple[str, bool]]] = {}
        for_each(level.items(), partial(_list, root=root, known=known, listed=listed))
        below: dict[str, Collection[str]] = {}
        for folder, names in listed.items():
            for name, is_folder in names:
                path = f"{folder}/{name}" if folder else name
                is_parent = known is not None and path in known.parents
                if is_folder:
                    below[path] = _USUAL if known is None or path in known.parents or path in known.variables else ()
                elif not is_parent:
                    yield path
        level = below


def _is_variable(path: str, known: _Known | None) -> bool:
    """Tell whether a path is known as the folder of a variable, with nothing below."""
    return known is not None and path in known.variables and path not in known.parents


def _list(
    folder_and_usual: tuple[str, Collection[str]],
    *,
    root: int,
    known: _Known | None,
    listed: dict[str, list[tuple[str, bool]]],
) -> None:
    """List the names in a folder that are not usual there, each with whether it is, or should be, a folder."""
    folder, usual = folder_and_usual
    is_inner = _is_variable(folder, known)
    if known is not None and known.seen and is_inner:
        status = os.stat(folder, dir_fd=root, follow_symlinks=False)
        if known.seen.get((status.st_dev, status.st_ino)) == status.st_ctime_ns:
            return
    try:
        fd = syscalls.folder_in(folder or ".", root)
    except OSError as error:
        if error.errno in _NOT_A_FOLDER and is_inner:  # a damaged checkpoint has something else there
            return
        raise
    try:
        status = os.fstat(fd)  # before it is listed: what is put there after that changes it
        with os.scandir(fd) as entries:
            found = [entry for entry in entries if entry.name not in usual]
            is_encoded = known is not None and not is_plain(known.variables.get(folder, RAW.name))
            left = listed[folder] = []
            for entry in found:
                name = entry.name
                if _is_variable(f"{folder}/{name}" if folder else name, known):
                    left.append((name, True))
                elif not (_DROPPED.fullmatch(name) or is_own_name(name) or (is_encoded and _ENCODED.fullmatch(name))):
                    left.append((name, entry.is_dir(follow_symlinks=False)))
    finally:
        os.close(fd)
    if known is not None and is_inner and not found and status.st_ctime_ns < known.settled:
        known.seen[status.st_dev, status.st_ino] = status.st_ctime_ns


def carry(files: Iterable[str], old: str, fd: int, owner: int, carried: dict[str, Stamp]) -> tuple[list[str], set[str]]:
    """Give other people's files to the checkpoint that replaces theirs; return those files and their folders.

    They are linked if they belong to the user `owner`, and copied otherwise, so that nobody can change them later.
    `carried` says which files were given to it before, and is brought up to date: a file that changed since then is
    given again, and one that went is taken away.

    Raises:
        CheckpointExists: a file would lie where the new checkpoint has one.
    """
    files = list(files)
    for path in carried.keys() - {*files}:
        _take_back(path, fd, carried)
    given: list[str] = []
    folders: set[str] = set()
    try:
        old_fd = syscalls.open_fd(old, syscalls.READ_FOLDER_ITSELF)
    except FileNotFoundError:  # another overwriter is between two renames; what it leaves is looked at again
        return given, folders
    try:
        for path in files:
            try:
                status = os.stat(path, dir_fd=old_fd, follow_symlinks=False)
                stamp = status.st_ino, status.st_size, status.st_mtime_ns
                if carried.get(path) == stamp:
                    continue
                _take_back(path, fd, carried)
                folders |= _made(os.path.dirname(path), fd)
                if _carry(path, status, old_fd, fd, owner):
                    given.append(path)
                carried[path] = stamp
            except FileNotFoundError:  # its owner took it away meanwhile
                continue
            except FileExistsError as error:
                raise CheckpointExists(
                    "a file in the checkpoint that is to be replaced is where the new one has its own",
                    path=os.path.join(old, path),
                    hint="move it away, or pass foreign='delete'",
                ) from error
    finally:
        os.close(old_fd)
    return given, folders


def _take_back(path: str, fd: int, carried: dict[str, Stamp]) -> None:
    if carried.pop(path, None):
        os.unlink(path, dir_fd=fd)


def _made(folder: str, fd: int) -> set[str]:
    """Make a folder and those above it, where they are missing, and return all of them."""
    parts = folder.split("/") if folder else []
    folders = ["/".join(parts[:depth]) for depth in range(1, len(parts) + 1)]
    for path in folders:
        with contextlib.suppress(FileExistsError):
            os.mkdir(path, dir_fd=fd)
    return set(folders)


def _carry(path: str, status: os.stat_result, old_fd: int, fd: int, owner: int) -> bool:
    """Carry one file, and tell whether it is a regular one."""
    if stat.S_ISLNK(status.st_mode):
        os.symlink(os.readlink(path, dir_fd=old_fd), path, dir_fd=fd)
        return False
    try:
        os.link(path, path, src_dir_fd=old_fd, dst_dir_fd=fd, follow_symlinks=False)
        if os.stat(path, dir_fd=fd, follow_symlinks=False).st_uid == owner:
            return stat.S_ISREG(status.st_mode)
        os.unlink(path, dir_fd=fd)
    except FileExistsError:
        raise
    except OSError:  # whatever the reason, it is copied
        pass
    source = syscalls.open_fd(path, syscalls.READ_FILE, dir_fd=old_fd)
    try:
        target = syscalls.create(path, fd)
        try:
            done = 0
            while count := syscalls.copy_range(source, target, max(1, status.st_size - done), done):
                done += count
            syscalls.change_mode(target, stat.S_IMODE(status.st_mode))
        finally:
            os.close(target)
    finally:
        os.close(source)
    return True
