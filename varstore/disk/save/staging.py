"""How a save becomes visible: a locked staging folder beside the target, made durable, then one rename.

The guarantee: a reader sees the old state or the new one, complete, and anything else that a save created is
recognisable and can be removed. It has two exceptions, both described below: a file system without an atomic
exchange, and a target that is filled in place. It rests on two mechanisms:

- **One rename.** All is written below ``.NAME.saving-RANDOM``, beside the target and so on its file system. One
  call gives that folder its name: a rename where nothing stands, an exchange where a checkpoint is replaced. Where
  a file system cannot exchange, two renames do it, by way of ``.NAME.replaced-RANDOM``; a crash between them leaves
  no checkpoint at the path, and `clean_staging` gives that one its name back. A mount point and the working
  directory cannot be renamed: they are filled in place, where the marker, written last, says "complete".
- **A lock that dies with its writer.** The folder's descriptor holds a ``flock`` for as long as the save lives, and
  the kernel frees it however the process ends. So whoever can take the lock of a staging folder may remove it. A
  folder is made before it is locked: a cleaner may come between, so the writer, once it holds the lock, checks that
  the path is still the folder that it locked, and begins again if not. A file system without locks is written to
  all the same, but nothing on it is ever cleaned.

The module `durability` defines the order in which all of this is made durable.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType

from varstore.disk.blocks import write_file
from varstore.disk.save.durability import Durability, sync_folder, sync_names
from varstore.errors import CheckpointExists, CheckpointNotFound, InvalidName
from varstore.layout.location import Identity, Location
from varstore.layout.manifest import digest_in
from varstore.layout.names import MANIFEST, MARKER
from varstore.storage import syscalls
from varstore.storage.appearing import target_of
from varstore.storage.directory import Directory
from varstore.storage.failures import storage_error
from varstore.values.arguments import checked

__all__ = ["Staging", "Target", "clean_staging", "discard", "examine", "is_staging_name", "set_aside"]

_INFIX = ".saving-"
_ASIDE = ".replaced-"
_LEFT_BEHIND = re.compile(r"\.(?P<target>.+)(?P<infix>\.saving-|\.replaced-)[0-9a-f]{8}", re.DOTALL)
_NAME_LIMIT = 255 - len(".") - len(_ASIDE) - 8
_NO_LOCKS = {errno.EBADF, errno.EINVAL, errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """The place that a save is to take, as `examine` found it; `shown` is the path that the caller gave."""

    path: str
    shown: str
    exists: bool = False
    replaces: bool = False
    in_place: bool = False


def examine(path: str, *, overwrite: bool) -> Target:
    """Remove what crashed saves left beside the target, and return what the target is now.

    Raises:
        CheckpointExists: something is already there, which may be a symbolic link.
        InvalidName: the directory's name is too long.
    """
    target = target_of(path)
    directory, name = os.path.split(target)
    if len(os.fsencode(name)) > _NAME_LIMIT:
        raise InvalidName(
            "the directory's name is too long to stage a save beside it",
            path=path,
            found=f"{len(os.fsencode(name))} bytes",
            expected=f"at most {_NAME_LIMIT}",
        )
    if os.path.isdir(directory):
        clean_staging(directory, name=name)
    try:
        names = _content(target)
    except FileNotFoundError:
        return Target(path=target, shown=path)
    except NotADirectoryError:
        raise CheckpointExists("the target is a file", path=path, hint="choose another path") from None
    immovable = os.path.ismount(target) or os.path.samefile(target, os.curdir)
    if names:
        _check_replaceable(path, names, overwrite=overwrite, immovable=immovable)
        return Target(path=target, shown=path, exists=True, replaces=True)
    return Target(path=target, shown=path, exists=True, in_place=immovable)


def _check_replaceable(path: str, names: list[str], *, overwrite: bool, immovable: bool) -> None:
    if not overwrite:
        raise CheckpointExists(
            "the target is not empty",
            path=path,
            found=_few(names),
            hint="choose a new path, or overwrite=True to replace the whole checkpoint",
        )
    if immovable:
        raise CheckpointExists(
            "a mount point or the working directory cannot be replaced",
            path=path,
            found=_few(names),
            hint="save to a folder in it",
        )
    if not {MARKER, MANIFEST} & set(names):
        raise CheckpointExists(
            "the target is not a checkpoint, and overwrite=True replaces nothing else",
            path=path,
            found=_few(names),
            hint="remove it yourself if it may go",
        )


class Staging:
    """A folder that becomes the checkpoint when `commit` is called, and goes away if the block fails before.

    `fd` is its directory descriptor; everything is created relative to it. Where the target is an empty
    mount point, or the working directory, it is the target itself: the marker alone then says "complete".
    """

    def __init__(self, target: Target, durability: Durability) -> None:
        self.durability = durability
        self.path = ""
        self.fd = -1
        self.stands = False
        """Whether the checkpoint has its final name; errors after that no longer undo the save."""
        self._target = target
        self._new_parents: list[str] = []
        self._replaced: str | None = None

    def __enter__(self) -> Staging:
        try:
            self._open()
        except BaseException:  # Ctrl-C among others
            self._undo()
            raise
        return self

    def _open(self) -> None:
        target = self._target
        if target.in_place:
            self.path, self.fd = target.path, self._lock_target()
            return
        self._make_parents()
        mode = stat.S_IMODE(os.stat(target.path).st_mode) if target.exists else None
        while self.fd < 0:
            self.path = _beside(target.path, _INFIX)
            os.mkdir(self.path)
            with contextlib.suppress(BlockingIOError, FileNotFoundError):  # a cleaner was faster: again
                self.fd = _lock(self.path)
        if mode is not None:
            with contextlib.suppress(PermissionError):  # vfat keeps no modes
                syscalls.change_mode(self.fd, mode)

    def _make_parents(self) -> None:
        missing = parent = os.path.dirname(self._target.path)
        while not os.path.isdir(missing):
            self._new_parents.append(missing)
            missing = os.path.dirname(missing)
        os.makedirs(parent, exist_ok=True)

    def _lock_target(self) -> int:
        try:
            fd = _lock(self._target.path)
        except BlockingIOError as error:
            raise self._taken("another writer is saving here") from error
        if _content(self._target.path):
            os.close(fd)
            raise self._taken("another writer saved here meanwhile")
        return fd

    def _taken(self, problem: str) -> CheckpointExists:
        return CheckpointExists(problem, path=self._target.shown, hint="its checkpoint stands; choose a new path")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and not self.stands:
            self._undo()
            return
        try:
            if error is not None and not isinstance(error, OSError):  # Ctrl-C
                self._settle()  # not after an error of the disk: what was replaced may be what a power cut leaves
        finally:
            os.close(self.fd)

    def _undo(self) -> None:
        """Remove all that was made, and let go of the lock."""
        try:
            with contextlib.suppress(FileNotFoundError):  # Ctrl-C just after the rename: it stands
                if self.path:
                    _remove_contents(self.path)
                    if not self._target.in_place:
                        os.rmdir(self.path)
            for folder in self._new_parents:
                with contextlib.suppress(OSError):  # somebody else uses it by now, or it was never made
                    os.rmdir(folder)
        finally:
            if self.fd >= 0:
                os.close(self.fd)

    def commit(self, manifest: bytes | None) -> Identity | None:
        """Write the manifest and the marker, and give the folder its name: steps 2 to 5 of the law of durability.

        Returns what tells this checkpoint from every other.

        Raises:
            CheckpointExists: another writer has taken the target meanwhile.
            OSError: the disk refused; if the checkpoint `stands`, only a power cut can still undo it.
        """
        sync = self.durability.durable
        if manifest is not None:
            write_file(MANIFEST, manifest, self.fd, sync=sync)
        if sync and self._target.in_place:
            sync_names(self.fd)  # the marker is not to be durable before the manifest's name is
        write_file(MARKER, b"", self.fd, sync=sync)
        if sync:
            sync_names(self.fd)
        identity: Identity | None
        if manifest is None:
            identity = Directory(Location(self.path, self.path), self.fd).identity()
        else:
            identity = digest_in(manifest)
        if not self._target.in_place:
            self._take_name()
        self.stands = True
        self._settle()
        return identity

    def _take_name(self) -> None:
        if self._target.replaces:
            self._replaced = self._replace()
            return
        try:
            os.rename(self.path, self._target.path)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
            raise self._taken("another writer saved here meanwhile") from error

    def _replace(self) -> str:
        """Take the name of the old checkpoint; return where that lies now."""
        try:
            syscalls.exchange(self.path, self._target.path)
        except OSError as error:
            if not syscalls.is_missing(error):
                raise
            return self._replace_in_two_steps()
        return self.path

    def _replace_in_two_steps(self) -> str:
        """Replace with two renames, for file systems that cannot exchange; return where the old checkpoint is now.

        If a crash comes between them, `clean_staging` restores the old checkpoint.
        """
        aside = _beside(self._target.path, _ASIDE)
        held = _lock(self._target.path)
        try:
            os.rename(self._target.path, aside)
            try:
                os.rename(self.path, self._target.path)
            except OSError:
                os.rename(aside, self._target.path)
                raise
        finally:
            os.close(held)
        return aside

    def _settle(self) -> None:
        """Make the new name durable, and then remove what had it before."""
        if self.durability.durable:
            for folder in (self._target.path, *self._new_parents):
                sync_folder(os.path.dirname(folder))
        if self._replaced is not None:
            _remove_tree(self._replaced)
            self._replaced = None


@checked
def clean_staging(directory: str | os.PathLike[str], *, name: str | None = None) -> list[str]:
    """Remove what crashed saves left in a directory, and return the paths that were removed.

    The staging folder of a save that still runs is locked, and stays. A checkpoint that was set aside and never
    replaced gets its name back.

    Args:
        directory: the directory that holds the checkpoints.
        name: of one checkpoint, whose remains alone are removed; by default those of all.

    Raises:
        CheckpointNotFound: there is no such directory.
        StorageError: the operating system refused to read it.

    Example:
        >>> checkpoint = vs.save("runs/a", {"w": np.zeros(3)})
        >>> vs.clean("runs")
        []
    """
    directory = os.fspath(directory)
    if not syscalls.CAN_SAVE:
        raise syscalls.cannot_save(directory, "cleaning")
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
    """Rename a checkpoint that is to be deleted, in one step; `clean_staging` removes it later.

    It gets the name of an unfinished save, since `clean_staging` would restore one that was replaced. Of a symbolic
    link, only the link is removed.
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
    """Open a directory and lock it for as long as the descriptor is open.

    On a file system without locks, the descriptor is returned unlocked, unless a lock is `required`.

    Raises:
        BlockingIOError: another process holds the lock.
        FileNotFoundError: the directory was removed or replaced meanwhile.
        OSError: a lock is `required`, and the file system does not have locks.
    """
    fd = os.open(path, syscalls.READ_FOLDER_ITSELF)
    try:
        try:
            syscalls.flock(fd, syscalls.LOCK)
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
    """Return the names in a directory; at a mount point, without the lost+found that ext file systems create."""
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
        fd = os.open(path, syscalls.READ_FOLDER_ITSELF)  # a link in its place is not followed
        try:
            os.unlink(MARKER, dir_fd=fd)
        finally:
            os.close(fd)
    shutil.rmtree(path, ignore_errors=True)


def _few(names: list[str]) -> str:
    shown = ", ".join(repr(name) for name in sorted(names)[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
