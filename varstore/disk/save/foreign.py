"""Other people's files in a checkpoint: those that it does not know (FORMAT F7, F10).

Overwriting removes a whole directory, and with it whatever somebody put there. So that is found before the first byte
is written: in the root, in the folders of variables, and in any other folder, such as a checkpoint nested in this one.

What somebody puts there later is found when the old checkpoint has lost its name, so that nothing more can come, and
is given to the new one before the old one goes (see `hand_on`). Whoever comes after a crash does the same: a checkpoint
that was replaced has its marker or its manifest until it was looked at.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import stat
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from functools import partial
from typing import BinaryIO, Literal, NamedTuple

from varstore.disk.save.durability import sync_each
from varstore.disk.threads import for_each
from varstore.errors import FormatError
from varstore.layout.encodings import RAW, is_plain
from varstore.layout.location import Location
from varstore.layout.manifest import MANIFEST_LIMIT, Manifest
from varstore.layout.names import MANIFEST, MARKER
from varstore.layout.staged import is_passing_name
from varstore.storage import syscalls
from varstore.storage.appearing import is_temporary
from varstore.storage.claims import is_named
from varstore.storage.directory import Directory

__all__ = ["Foreign", "Seen", "Stamp", "carry", "foreign_files", "hand_on", "is_own_name"]

Foreign = Literal["error", "delete", "keep"]
"""What becomes of other people's files in a checkpoint that is overwritten."""
Seen = dict[tuple[int, int], tuple[int, list[tuple[str, bool]]]]
"""Folders in which nothing foreign was: of each, device and inode, the time of its last change, and those in it."""
Stamp = tuple[tuple[int, int, int], tuple[int, int, int]]
"""Inode, size and time of a file, which tell whether it changed, and those of what was given for it."""

_DROPPED = re.compile(r"\.DS_Store|\._.*|\.nfs.*|Thumbs\.db|desktop\.ini|lost\+found", re.DOTALL)
"""What systems leave in folders; nobody misses it."""
_USUAL = frozenset({"out", "meta"})
_SETTLED = 3 * 10**9
"""Nanoseconds; no local file system keeps times of changes less exactly than this, not even vfat (two seconds)."""
_NOT_A_FOLDER = {errno.ENOTDIR, errno.ELOOP}
_ENCODED = re.compile(r"zarr\.json|c(\.\d+)*")
_ATTEMPTS = 100
_PART = 1 << 20


def is_own_name(name: str) -> bool:
    """Tell whether a name is one that varstore gives to what is temporary."""
    return is_temporary(name) or is_passing_name(name)


def foreign_files(fd: int, path: str, seen: Seen) -> list[str]:
    """Return the files in a checkpoint that it does not know, as paths relative to it.

    What systems drop does not count, nor do temporary names of varstore, or empty folders. Without a manifest that can
    be read, each folder that holds an ``out`` is a variable.

    All is looked at by descriptors: another checkpoint may take the path meanwhile.

    Args:
        fd: of its directory.
        path: of its directory.
        seen: what an earlier look found: folders are listed again only if they changed since; this look adds its own.

    Raises:
        OSError: a folder cannot be listed, or the manifest cannot be read, or the checkpoint is being removed.
    """
    return sorted(_foreign(fd, _known_folders(fd, path, seen)))


class _Known(NamedTuple):
    """The folders of variables, each with its encoding, these and those above them, and the attached files.

    `seen` is as for `foreign_files`, and `is_again` tells whether there was an earlier look. The time of a change that
    came after `settled` is not noted: the next one may get the same time.
    """

    variables: Mapping[str, str]
    folders: Collection[str]
    files: Collection[str]
    seen: Seen
    is_again: bool
    settled: int


def _known_folders(fd: int, path: str, seen: Seen) -> _Known | None:
    try:
        data = Directory(Location(path, path), fd).read_small(MANIFEST, limit=MANIFEST_LIMIT)
        manifest = Manifest.decode(data, path=path)
        variables = manifest.folders()
    except FormatError:
        return None
    folders = set(variables)
    for folder in variables:
        above: str = folder
        while (above := above.rpartition("/")[0]) and above not in folders:
            folders.add(above)
    is_shared = syscalls.file_system_type(fd) in syscalls.SHARED_FILE_SYSTEMS  # where times come from other clocks
    return _Known(
        variables=variables,
        folders=folders,
        files=manifest.files.keys(),
        seen=seen,
        is_again=bool(seen),
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
                if is_folder:
                    below[path] = _USUAL if known is None or path in known.folders else ()
                else:
                    yield path
        level = below


def _list(
    folder_and_usual: tuple[str, Collection[str]],
    *,
    root: int,
    known: _Known | None,
    listed: dict[str, list[tuple[str, bool]]],
) -> None:
    """List the names in a folder that are not usual there, each with whether it is, or should be, a folder."""
    folder, usual = folder_and_usual
    folders = known.folders if known is not None else ()
    is_known = folder in folders
    if known is not None and known.is_again and is_known:
        status = os.stat(folder, dir_fd=root, follow_symlinks=False)
        changed, before = known.seen.get((status.st_dev, status.st_ino), (None, []))
        if changed == status.st_ctime_ns:
            listed[folder] = before
            return
    try:
        fd = syscalls.folder_in(folder or ".", root)
    except OSError as error:
        if error.errno in _NOT_A_FOLDER and is_known:  # a damaged checkpoint has something else there
            return
        raise
    try:
        status = os.fstat(fd)  # before it is listed: what is put there after that changes it
        with os.scandir(fd) as entries:
            found = [entry for entry in entries if entry.name not in usual]
            left = listed[folder] = []
            is_clean = True
            for entry in found:
                name = entry.name
                if (f"{folder}/{name}" if folder else name) in folders:
                    left.append((name, True))
                elif not (_DROPPED.fullmatch(name) or is_own_name(name) or _is_of_encoding(name, folder, known)):
                    left.append((name, entry.is_dir(follow_symlinks=False)))
                    is_clean = False
    finally:
        os.close(fd)
    if known is not None and is_known and is_clean and status.st_ctime_ns < known.settled:
        known.seen[status.st_dev, status.st_ino] = status.st_ctime_ns, left


def _is_of_encoding(name: str, folder: str, known: _Known | None) -> bool:
    """Tell whether a name is one that an encoding gives to a file in the folder of a variable."""
    is_encoded = known is not None and not is_plain(known.variables.get(folder, RAW.name))
    return is_encoded and _ENCODED.fullmatch(name) is not None


def hand_on(old: int, target: str, dir_fd: int, *, path: str, seen: Seen, carried: dict[str, Stamp]) -> list[str]:
    """Give other people's files in a checkpoint that was replaced to the one that has its name; return those that stay.

    Whoever puts a file there has found the place by its name, so when the old checkpoint has lost that, all that came
    is seen. Nothing is given from what is being removed: whoever does that has looked before.

    Args:
        old: of the directory of the old checkpoint.
        target: the name of the new one, in the directory `dir_fd`.
        path: of the old one, for messages.
        seen: as for `foreign_files`.
        carried: as for `carry`; of other checkpoints that take the name meanwhile, it is not known.

    Raises:
        OSError: a folder cannot be listed, or the manifest cannot be read.
    """
    marks = _marks(old)
    if not marks:
        return []
    try:
        files = foreign_files(old, path, seen)
    except FileNotFoundError:
        files = []
    if not (files or carried) or _marks(old) != marks:
        return []
    for _ in range(_ATTEMPTS):
        try:
            fd = syscalls.folder_in(target, dir_fd)
        except OSError:
            return files
        try:
            if not _marks(fd):
                return files
            stay: list[str] = []
            before = {*carried.items()}
            given, folders = carry(files, old, fd, carried, stay)
            if before != {*carried.items()}:  # nothing is to be lost in a power cut when the old one is gone
                sync_each(fd, given, [*folders, "."])
            if is_named(fd, target, dir_fd):
                return stay
        finally:
            os.close(fd)
        carried = {}
    return files


def _marks(fd: int) -> set[str]:
    return {MARKER, MANIFEST} & {*syscalls.names_in(fd)}


def carry(
    files: Iterable[str], old: int, fd: int, carried: dict[str, Stamp], stay: list[str]
) -> tuple[list[str], list[str]]:
    """Give other people's files to a checkpoint; return the regular ones, and the folders of all, from the lowest up.

    They are linked if they belong to the user whose checkpoint that is, and copied otherwise, so that nobody can change
    them later. `carried` says which files were given to it before, and is brought up to date: a file that changed since
    then is given again, and one that went is taken away, unless somebody has changed it in its new place. Files that
    cannot be given, where the new checkpoint has its own, are added to those that `stay`.

    Raises:
        OSError: the operating system refused.
    """
    files = list(files)
    owner = os.fstat(fd).st_uid
    for path in carried.keys() - {*files}:
        _take_back(path, fd, carried)
    given: list[str] = []
    folders: set[str] = set()
    for path in files:
        try:
            status = os.stat(path, dir_fd=old, follow_symlinks=False)
            stamp = _stamp(status)
            if path in carried and carried[path][0] == stamp:
                continue
            if _is_same(path, old, fd):
                continue
            _take_back(path, fd, carried)
            folders |= _made(os.path.dirname(path), fd)
            if _carry(path, status, old, fd, owner):
                given.append(path)
            carried[path] = stamp, _stamp(os.stat(path, dir_fd=fd, follow_symlinks=False))
        except FileNotFoundError:  # its owner took it away meanwhile
            continue
        except (FileExistsError, NotADirectoryError):
            stay.append(path)
    return given, sorted(folders, reverse=True)


def _stamp(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_ino, status.st_size, status.st_mtime_ns


def _is_same(path: str, old: int, fd: int) -> bool:
    """Tell whether another folder has the same file, or a copy of it, or the same link at a path."""
    try:
        first, second = (os.stat(path, dir_fd=folder, follow_symlinks=False) for folder in (old, fd))
        if os.path.samestat(first, second):
            return True
        if stat.S_ISLNK(first.st_mode) and stat.S_ISLNK(second.st_mode):
            return os.readlink(path, dir_fd=old) == os.readlink(path, dir_fd=fd)
        if not (stat.S_ISREG(first.st_mode) and stat.S_ISREG(second.st_mode)) or first.st_size != second.st_size:
            return False
        with _opened(path, old) as one, _opened(path, fd) as other:
            while (part := one.read(_PART)) == other.read(_PART):
                if not part:
                    return True
    except FileNotFoundError:
        pass
    return False


def _opened(path: str, dir_fd: int) -> BinaryIO:
    return open(path, "rb", opener=lambda name, _: syscalls.open_fd(name, syscalls.READ_FILE, dir_fd=dir_fd))


def _take_back(path: str, fd: int, carried: dict[str, Stamp]) -> None:
    """Take away a file that was given to a checkpoint, if it is still that one."""
    if path in carried:
        _, given = carried.pop(path)
        with contextlib.suppress(FileNotFoundError):
            if _stamp(os.stat(path, dir_fd=fd, follow_symlinks=False)) == given:
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
