"""How a save becomes visible: a locked staging folder beside the target, made durable, then one rename.

A crash leaves the old state or the new one, and at most a staging folder whose lock is free, by which
the next save in that place, or `clean`, recognises it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import stat
from collections.abc import Iterator
from types import TracebackType

from varstore.disk.blocks import write_all
from varstore.errors import CheckpointExists, CheckpointNotFound, InvalidName
from varstore.layout.names import MANIFEST, MARKER
from varstore.storage import syscalls
from varstore.storage.appearing import target_of
from varstore.storage.failures import storage_error

__all__ = ["Staging", "clean_staging", "discard", "fsync_path", "is_staging_name", "set_aside"]

_INFIX = ".saving-"
_ASIDE = ".replaced-"
_LEFT_BEHIND = re.compile(r"\.(?P<target>.+)(?P<infix>\.saving-|\.replaced-)[0-9a-f]{8}", re.DOTALL)
_NAME_LIMIT = 255 - len(".") - len(_ASIDE) - 8
_NO_LOCKS = {errno.EBADF, errno.EINVAL, errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}


class Staging:
    """A folder that becomes the checkpoint when `commit` is called, and goes away if the block fails.

    `fd` is its directory descriptor; everything is created relative to it. Where the target is an empty
    mount point, or the working directory, it is the target itself: the marker alone then says "complete".
    """

    def __init__(self, target: str, *, overwrite: bool) -> None:
        self.target = target_of(target)
        self._shown = target
        self._overwrite = overwrite
        directory, name = os.path.split(self.target)
        if len(os.fsencode(name)) > _NAME_LIMIT:
            raise InvalidName(
                "the directory's name is too long to stage a save beside it",
                path=target,
                found=f"{len(os.fsencode(name))} bytes",
                expected=f"at most {_NAME_LIMIT}",
            )
        if os.path.isdir(directory):
            clean_staging(directory, name=name)
        self._exists, self._replaces, self._in_place = self._refuse_or_allow()
        self.path = ""
        self.fd = -1
        self._new_parents: list[str] = []

    def _refuse_or_allow(self) -> tuple[bool, bool, bool]:
        try:
            names = _content(self.target)
        except FileNotFoundError:
            return False, False, False
        except NotADirectoryError:
            raise CheckpointExists("the target is a file", path=self._shown, hint="choose another path") from None
        if not names:
            in_place = os.path.ismount(self.target) or os.path.samefile(self.target, os.curdir)
            return True, False, in_place
        if not self._overwrite:
            raise CheckpointExists(
                "the target is not empty",
                path=self._shown,
                found=_few(names),
                hint="choose a new path, or overwrite=True to replace the whole checkpoint",
            )
        if os.path.ismount(self.target) or os.path.samefile(self.target, os.curdir):
            raise CheckpointExists(
                "a mount point or the working directory cannot be replaced",
                path=self._shown,
                found=_few(names),
                hint="save to a folder in it",
            )
        if not {MARKER, MANIFEST} & set(names):
            raise CheckpointExists(
                "the target is not a checkpoint, and overwrite=True replaces nothing else",
                path=self._shown,
                found=_few(names),
                hint="remove it yourself if it may go",
            )
        return True, True, False

    def __enter__(self) -> Staging:
        if self._in_place:
            self.path, self.fd = self.target, self._lock_target()
            return self
        self._make_parents()
        mode = stat.S_IMODE(os.stat(self.target).st_mode) if self._exists else None
        while self.fd < 0:
            self.path = _beside(self.target, _INFIX)
            os.mkdir(self.path)
            with contextlib.suppress(BlockingIOError, FileNotFoundError):  # a cleaner was faster: again
                self.fd = _lock(self.path)
        if mode is not None:
            with contextlib.suppress(PermissionError):  # vfat keeps no modes
                os.fchmod(self.fd, mode)
        return self

    def _make_parents(self) -> None:
        missing = os.path.dirname(self.target)
        while not os.path.isdir(missing):
            self._new_parents.append(missing)
            missing = os.path.dirname(missing)
        os.makedirs(os.path.dirname(self.target), exist_ok=True)

    def _lock_target(self) -> int:
        try:
            fd = _lock(self.target)
        except BlockingIOError as error:
            raise self._taken("another writer is saving here") from error
        if _content(self.target):
            os.close(fd)
            raise self._taken("another writer saved here meanwhile")
        return fd

    def _taken(self, problem: str) -> CheckpointExists:
        return CheckpointExists(problem, path=self._shown, hint="its checkpoint stands; choose a new path")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is not None:
                with contextlib.suppress(FileNotFoundError):  # Ctrl-C after the rename: it stands
                    _remove_contents(self.path)
                    if not self._in_place:
                        os.rmdir(self.path)
                        self._remove_new_parents()
        finally:
            os.close(self.fd)

    def _remove_new_parents(self) -> None:
        with contextlib.suppress(OSError):  # somebody else uses them by now
            for folder in self._new_parents:
                os.rmdir(folder)

    def commit(self, manifest: bytes | None, *, durable: bool) -> None:
        """Write the manifest and the marker, and give the folder its name.

        What lies in the folder already must be durable if `durable` asks for it.

        Raises:
            CheckpointExists: another writer has taken the target meanwhile.
        """
        if manifest is not None:
            self._write(MANIFEST, manifest, durable)
        self._write(MARKER, b"", durable)
        if durable:
            os.fsync(self.fd)
        if not self._in_place:
            self._take_name()
        if durable:
            for folder in (self.target, *self._new_parents):
                fsync_path(os.path.dirname(folder))

    def _write(self, name: str, data: bytes, durable: bool) -> None:
        fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o444, dir_fd=self.fd)
        try:
            write_all(fd, data)
            if durable:
                os.fsync(fd)
        finally:
            os.close(fd)

    def _take_name(self) -> None:
        if self._replaces:
            self._replace()
            return
        try:
            os.rename(self.path, self.target)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
            raise self._taken("another writer saved here meanwhile") from error

    def _replace(self) -> None:
        try:
            syscalls.exchange(self.path, self.target)
            old = self.path
        except OSError as error:
            if not syscalls.is_missing(error):
                raise
            old = self._replace_in_two_steps()
        _remove_tree(old)

    def _replace_in_two_steps(self) -> str:
        """Where the file system cannot exchange: a crash between the steps is undone by `clean`."""
        aside = _beside(self.target, _ASIDE)
        held = _lock(self.target)
        try:
            os.rename(self.target, aside)
            try:
                os.rename(self.path, self.target)
            except OSError:
                os.rename(aside, self.target)
                raise
        finally:
            os.close(held)
        return aside


def clean_staging(directory: str | os.PathLike[str], *, name: str | None = None) -> list[str]:
    """Remove what crashed saves left in a directory, of one target or of all; return the paths removed.

    A staging folder whose writer lives is locked and stays. A checkpoint that was set aside and never
    replaced gets its name back.
    """
    directory = os.fspath(directory)
    removed = []
    for entry in _left_behind(directory):
        path = os.path.join(directory, entry[0])
        target = os.path.join(directory, entry["target"])
        if name not in (None, entry["target"]):
            continue
        try:
            fd = _lock(path, required=True)
        except OSError:
            continue
        try:
            if entry["infix"] == _ASIDE and not os.path.lexists(target):
                os.rename(path, target)
                continue
            _remove_tree(path)
        finally:
            os.close(fd)
        if not os.path.lexists(path):
            removed.append(path)
    return removed


def set_aside(path: str) -> None:
    """Take its name from a checkpoint that is to go, in one step; `clean_staging` removes what is left.

    Of a symbolic link only the link goes.
    """
    if os.path.islink(path):
        os.unlink(path)
    else:
        os.rename(path, _beside(path, _INFIX))


def discard(path: str) -> None:
    """Remove a checkpoint: first its name, in one step, then the rest."""
    directory, name = os.path.split(os.path.abspath(path))
    set_aside(os.path.join(directory, name))
    clean_staging(directory, name=name)


def is_staging_name(name: str) -> bool:
    """Tell whether a folder's name is one that only staging gives."""
    return _LEFT_BEHIND.fullmatch(name) is not None


def fsync_path(path: str) -> None:
    """Make a directory's entries durable, where the file system can."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    except OSError as error:
        if not syscalls.is_missing(error):
            raise
    finally:
        os.close(fd)


def _left_behind(directory: str) -> Iterator[re.Match[str]]:
    try:
        with os.scandir(directory) as entries:
            folders = sorted(entry.name for entry in entries if entry.is_dir(follow_symlinks=False))
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointNotFound("there is no such directory", path=directory) from None
    except OSError as error:
        raise storage_error(error, directory, "the directory cannot be read") from error
    return filter(None, map(_LEFT_BEHIND.fullmatch, folders))


def _beside(target: str, infix: str) -> str:
    directory, name = os.path.split(target)
    return os.path.join(directory, f".{name}{infix}{os.urandom(4).hex()}")


def _lock(path: str, *, required: bool = False) -> int:
    """Open a directory and hold it for as long as the descriptor is open, or raise BlockingIOError.

    Where the file system has no locks a writer goes on without, unless one is `required`.
    """
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if required or error.errno not in _NO_LOCKS:
                raise
        if not os.path.samestat(os.fstat(fd), os.stat(path)):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _content(path: str) -> list[str]:
    """Return what lies in a directory; the root of an ext file system counts as empty when it is."""
    names = os.listdir(path)
    return [name for name in names if name != "lost+found"] if os.path.ismount(path) else names


def _remove_contents(path: str) -> None:
    for name in _content(path):
        entry = os.path.join(path, name)
        if os.path.isdir(entry) and not os.path.islink(entry):
            _remove_tree(entry)
        else:
            os.unlink(entry)


def _remove_tree(path: str) -> None:
    """Remove a folder, its marker first: whoever still reads from it sees that it is going."""
    import shutil

    with contextlib.suppress(OSError):
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)  # a link in its place is not followed
        try:
            os.unlink(MARKER, dir_fd=fd)
        finally:
            os.close(fd)
    shutil.rmtree(path, ignore_errors=True)


def _few(names: list[str]) -> str:
    shown = ", ".join(repr(name) for name in sorted(names)[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
