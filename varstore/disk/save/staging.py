"""How a save becomes visible: a locked staging folder beside the target, made durable, then one rename.

The guarantee: a reader sees the old state or the new one, complete, and anything else that a save created is
recognisable and can be removed. It has three exceptions, all described below: a file system without an atomic
exchange, a checkpoint that cannot be renamed, and a target that is filled in place. It rests on three mechanisms:

- **One rename.** All is written below ``.NAME.saving-RANDOM``, beside the target and so on its file system. One
  call gives that folder its name: a rename where nothing stands, an exchange where a checkpoint is replaced. Where
  a file system cannot exchange, two renames do it, by way of ``.NAME.replaced-RANDOM``; a crash between them leaves
  no checkpoint at the path, and `clean_staging` gives that one its name back. A checkpoint in a lower layer of an
  overlay cannot be renamed at all: it is removed where it lies, while the new one waits, complete; after a crash,
  `clean_staging` finishes that (see `give_way`). A mount point and the working directory cannot be renamed either: they
  are filled in place, where the marker, written last, says "complete".
- **A lock that dies with its writer.** The folder's descriptor holds a ``flock`` for as long as the save lives, and
  the kernel frees it however the process ends. So whoever can take the lock of a staging folder may remove it. A
  folder is made before it is locked: a cleaner may come between, so the writer, once it holds the lock, checks that
  the path is still the folder that it locked, and begins again if not. Where locks are missing or known to one mount
  only, a note in the folder says who writes to it (see `varstore.storage.claims`).
- **Descriptors.** Others may write to the directory that holds the target, and plant links and folders in it. The
  staging folder is this user's alone until it is complete: what is locked must be what this user made. All that is
  made, renamed and removed goes by the descriptor of the folder that holds it, and follows no link.

The module `durability` defines the order in which all of this is made durable, and `leftovers` what is done about the
remains of a crash.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import sys
import time
from collections.abc import Collection
from types import TracebackType
from typing import NamedTuple, Protocol

from varstore.disk.save.durability import Durability, sync_each
from varstore.disk.save.foreign import Foreign, Seen, Stamp, carry, foreign_files, hand_on
from varstore.disk.save.leftovers import (
    NAME_LIMIT,
    beside,
    clean_in_place,
    clean_staging,
    few,
    give_way,
    remove_old,
    undo_in_place,
)
from varstore.disk.threads import for_each
from varstore.errors import CheckpointExists, InvalidName, StorageError
from varstore.layout.location import Identity, Location
from varstore.layout.manifest import digest_in
from varstore.layout.names import MANIFEST, MARKER
from varstore.layout.staged import REPLACED, SAVING, is_giving_way
from varstore.storage import syscalls
from varstore.storage.appearing import target_of
from varstore.storage.claims import claim_new, is_named, lock, mode_of_new_folder, sign
from varstore.storage.directory import Directory, closing
from varstore.storage.forks import no_fork, tell_children
from varstore.storage.removing import empty, remove_empty

__all__ = ["Place", "Staging", "Target", "prepare_target"]

_ATTEMPTS = 100
_PAUSES = (0.05, 0.2, 0.5, 1.0, *(1.5,) * 6)
"""Seconds between looks at a checkpoint that just got its name: rclone's cache writes back after 5."""
_TAKEN = {errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR}


class Target(NamedTuple):
    """The place that a save is to take, as `prepare_target` found it; `shown` is the path that the caller gave.

    `mode` is that of the folder there, if there is one, and `kept` are the files in it that the new checkpoint gets.
    `seen` is as for `foreign_files`. Of a save that many processes make `together`, each of them is a part.
    """

    path: str
    shown: str
    seen: Seen
    foreign: Foreign = "error"
    overwrite: bool = False
    replaces: bool = False
    in_place: bool = False
    mode: int | None = None
    kept: tuple[str, ...] = ()
    together: bool = False


def prepare_target(path: str, *, overwrite: bool, foreign: Foreign, together: bool = False) -> Target:
    """Remove what crashed saves left beside the target, and return what the target is now.

    Raises:
        CheckpointExists: something is already there, which may be a symbolic link, or other people's files are in it.
        InvalidName: the directory's name is too long.
    """
    target = target_of(path)
    directory, name = os.path.split(target)
    if len(os.fsencode(name)) > NAME_LIMIT:
        raise InvalidName(
            "the directory's name is too long to stage a save beside it",
            path=path,
            found=f"{len(os.fsencode(name))} bytes",
            expected=f"at most {NAME_LIMIT}",
        )
    if os.path.isdir(directory):
        clean_staging(directory, name=name)
    return _look(Target(path=target, shown=path, seen={}, foreign=foreign, overwrite=overwrite, together=together))


def _look(target: Target, *, files: bool = True) -> Target:
    """Return what the target is now; while other writers replace it, what one of them put there.

    Without `files`, other people's are not looked for.
    """
    for attempt in range(_ATTEMPTS):
        try:
            (fd,) = map(os.open, (target.path,), (syscalls.READ_FOLDER_ITSELF,))  # not to be divided by Ctrl-C
        except FileNotFoundError:
            return target._replace(replaces=False, mode=None)
        except NotADirectoryError:
            raise CheckpointExists("the target is a file", path=target.shown, hint="choose another path") from None
        try:
            return _looked_at(target, fd, files=files)
        except (CheckpointExists, OSError) as error:
            is_going = isinstance(error, FileNotFoundError) or not _is_at(target.path, fd)
            if attempt == _ATTEMPTS - 1 or not is_going:
                raise
        finally:
            os.close(fd)
    raise AssertionError("unreachable")


def _is_at(path: str, fd: int) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except FileNotFoundError:
        return False


def _looked_at(target: Target, fd: int, *, files: bool) -> Target:
    status = os.fstat(fd)
    immovable = _is_mount_point(fd, status) or os.path.samestat(status, os.stat(os.curdir))
    if immovable:
        with contextlib.suppress(BlockingIOError):  # another save fills it
            clean_in_place(fd)
    names = _content(fd)
    mode = stat.S_IMODE(status.st_mode)
    if not names:
        return target._replace(replaces=False, in_place=immovable, mode=mode)
    _check_replaceable(target, names, immovable=immovable)
    if not files:
        return target._replace(replaces=True, mode=mode)
    kept: tuple[str, ...] = ()
    if target.foreign != "delete" and not is_giving_way(names):
        kept = tuple(foreign_files(fd, target.path, target.seen))
    if kept and target.foreign == "error":
        raise CheckpointExists(
            "in the checkpoint that is to be replaced there are files that it does not know",
            path=target.shown,
            found=few(kept),
            hint="move them away, or pass foreign='keep' to give them to the new one, or foreign='delete' to lose them",
        )
    return target._replace(replaces=True, mode=mode, kept=kept)


def _for_ranks(hint: str, target: Target) -> str:
    """Return a hint with what helps where every process of a program may have saved by itself."""
    function = None if target.together else _saves_together()
    if function is None:
        return hint
    return (
        f"if every process of this distributed run saves here, save in the one of rank 0 only, or with {function} in "
        f"all of them together; otherwise, {hint}"
    )


def _saves_together() -> str | None:
    """Return what saves in all processes, if jax or a launcher, such as torchrun, says that several run one program."""
    jax = sys.modules.get("jax._src.distributed")
    if jax is not None and (getattr(jax.global_state, "num_processes", None) or 1) > 1:
        return "varstore.adapters.jax.save_sharded"
    if os.environ.get("WORLD_SIZE", "1") != "1":
        return "varstore.adapters.torch_distributed.save"
    return None


def _check_replaceable(target: Target, names: list[str], *, immovable: bool) -> None:
    if not target.overwrite:
        raise CheckpointExists(
            "the target is not empty",
            path=target.shown,
            found=few(names),
            hint=_for_ranks("choose a new path, or overwrite=True to replace the whole checkpoint", target),
        )
    if immovable:
        raise CheckpointExists(
            "a mount point or the working directory cannot be replaced",
            path=target.shown,
            found=few(names),
            hint="save to a folder in it",
        )
    if not {MARKER, MANIFEST} & set(names) and not is_giving_way(names):
        raise CheckpointExists(
            "the target is not a checkpoint, and overwrite=True replaces nothing else",
            path=target.shown,
            found=few(names),
            hint="remove it yourself if it may go",
        )


class Place(Protocol):
    """Where the files of a save are made: the staging folder, in the process that made it or in another one."""

    durability: Durability
    fd: int
    is_private: bool


class Staging:
    """A folder that becomes the checkpoint when `commit` is called, and goes away if the block fails before.

    `fd` is its directory descriptor; everything is created relative to it. Where the target is an empty
    mount point, or the working directory, it is the target itself: the marker alone then says "complete". `tops` are
    the folders and files that will be made in it.
    """

    def __init__(self, target: Target, durability: Durability, tops: Collection[str]) -> None:
        self.durability = durability
        self.target = target
        self.path = ""
        self.fd = -1
        self.owner = -1
        """The user to whom files belong that are made here."""
        self.is_private = False
        """Whether only this user can make or replace anything in it, at any depth, until the save is complete."""
        self.threads = 1
        """With how many the old checkpoint is removed: more than one where calls wait for a server."""
        self.seconds = 0.0
        """How long it took to make the folder and to lock it: a few calls, which tell of those to come."""
        self.is_visible = False
        """Whether the checkpoint has its final name; errors after that no longer undo the save."""
        self._tops = tops
        self._is_shared = False
        """Whether this is a file system that other mounts may change."""
        self._note = ""
        """The name of the file that says who writes here."""
        self._parent = -1
        self._opened: list[int] = []
        self._closing = closing(self._opened)
        self._carried: dict[str, Stamp] = {}
        self._made: list[tuple[int, str]] = []
        """Folders above the target that the save made, each with the descriptor of the one that holds it."""
        self._final = os.path.basename(target.path)
        self._name = ""
        self._aside = ""
        """Where the old checkpoint lies between two renames."""
        self._remains: list[str] = []
        """Where old checkpoints lie that other overwriters replaced meanwhile."""
        self._gives_way = False
        """Whether the old checkpoint is being removed where it lies."""
        self._is_parents = False
        """Whether this process is a child, and the process that forked it goes on with the save."""

    def _in_child(self) -> None:
        """Let go of the lock, and of everything that the parent still needs."""
        self._is_parents = True
        self._closing.close()

    def __enter__(self) -> Staging:
        start = time.perf_counter()
        try:
            self._open()
            self.seconds = time.perf_counter() - start
        except BaseException:  # Ctrl-C among others
            self._undo()
            raise
        return self

    def _open(self) -> None:
        if not self.target.in_place:
            self._open_parent()
        tell_children(self, Staging._in_child)  # before the lock is taken
        if self.target.in_place:
            self._open_target()
            return
        while self.fd < 0:
            self._name = beside(self._final, SAVING)
            os.mkdir(self._name, 0o700, dir_fd=self._parent)
            try:
                with no_fork:
                    self.fd = syscalls.folder_in(self._name, self._parent)
                    self._opened.append(self.fd)
                self._is_shared = syscalls.file_system_type(self.fd) in syscalls.SHARED_FILE_SYSTEMS
                claimed = claim_new(self.fd, self._name, self._parent)
                self.owner, mode = claimed.st_uid, stat.S_IMODE(claimed.st_mode)
                self.is_private = self.owner == syscalls.user() and not mode & (stat.S_IRWXG | stat.S_IRWXO)
                self._note = sign(self.fd)
            except (BlockingIOError, FileNotFoundError):  # a cleaner was faster: again
                remove_empty(self._name, self._parent)  # it may have left the folder to us
                if self.fd >= 0:
                    self._opened.remove(self.fd)
                    os.close(self.fd)
                self.fd = self.owner = -1
            except PermissionError:
                if self.owner < 0:  # another user's folder is in its place, and is nothing to be undone
                    self._name = ""
                raise
        self.path = os.path.join(os.path.dirname(self.target.path), self._name)

    def _open_parent(self) -> None:
        """Open the directory of the target, and make it and those above it where they are missing."""
        path, missing = os.path.dirname(self.target.path), []
        while self._parent < 0:
            try:
                (self._parent,) = map(os.open, (path,), (syscalls.READ_FOLDER,))
            except FileNotFoundError:
                path, name = os.path.split(path)
                missing.append(name)
        self._opened.append(self._parent)
        for name in reversed(missing):
            self._made.append((self._parent, name))
            try:
                os.mkdir(name, dir_fd=self._parent)
            except FileExistsError:
                self._made.pop()
            self._parent = syscalls.folder_in(name, self._parent)
            self._opened.append(self._parent)

    def _open_target(self) -> None:
        self.path = self.target.path
        with no_fork:
            self.fd = syscalls.open_fd(self.path, syscalls.READ_FOLDER_ITSELF)
            self._opened.append(self.fd)
        try:
            lock(self.fd)
        except BlockingIOError as error:
            raise self._taken("another writer is saving here") from error
        if _content(self.fd):
            raise self._taken("another writer saved here meanwhile")
        self._note = sign(self.fd, self._tops)
        self.owner = os.stat(self._note, dir_fd=self.fd, follow_symlinks=False).st_uid

    def _taken(self, problem: str) -> CheckpointExists:
        return CheckpointExists(
            problem, path=self.target.shown, hint=_for_ranks("its checkpoint stands; choose a new path", self.target)
        )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._is_parents:
            return
        if error is not None and not self.is_visible:
            self._undo()
            return
        try:
            if error is not None and not isinstance(error, OSError):  # Ctrl-C
                self._settle()  # not after an error of the disk: what was replaced may be what a power cut leaves
        finally:
            self._closing.close()

    def _undo(self) -> None:
        """Remove all that was made, and let go of the lock; an error of that would hide why the save is undone."""
        try:
            with contextlib.suppress(OSError):
                if self._gives_way:
                    self._finish_giving_way()
                if self._has_name():  # Ctrl-C just after the rename: it stands
                    self.is_visible = True
                    self._settle()
            if self.is_visible or self._gives_way:  # the new one is complete, and may be all that there is
                return
            with contextlib.suppress(OSError):
                if self._aside:
                    self._rename(self._aside, self._final)
            self._undo_in_place()
            if self._name:
                if self.owner >= 0:
                    empty(self.fd, each=for_each)
                remove_empty(self._name, self._parent)
            for fd, name in reversed(self._made):
                with contextlib.suppress(OSError):  # somebody else uses it by now, or it was never made
                    os.rmdir(name, dir_fd=fd)
        finally:
            self._closing.close()

    def _undo_in_place(self) -> None:
        if self._note and self.target.in_place:
            with contextlib.suppress(OSError):
                undo_in_place(self.fd, self._tops)
                os.unlink(self._note, dir_fd=self.fd)

    def _has_name(self) -> bool:
        if self.target.in_place or self.fd < 0:
            return False
        return is_named(self.fd, self._final, self._parent)

    def carry(self) -> None:
        """Give the new checkpoint the other people's files that it is to keep, as they are now.

        Raises:
            CheckpointExists: one of them lies where the new checkpoint has its own.
        """
        try:
            old = syscalls.folder_in(self._final, self._parent)
        except FileNotFoundError:  # another overwriter is between two renames
            return
        stay: list[str] = []
        try:
            files, folders = carry(self.target.kept, old, self.fd, self._carried, stay)
        finally:
            os.close(old)
        if stay:
            raise CheckpointExists(
                "a file in the checkpoint that is to be replaced is where the new one has its own",
                path=os.path.join(self.target.shown, stay[0]),
                hint="move it away, or pass foreign='delete'",
            )
        if self.durability.durable:
            sync_each(self.fd, files, folders)

    def commit(self, manifest: bytes | None) -> Identity | None:
        """Write the manifest and the marker, and give the folder its name: steps 2 to 5 of the law of durability.

        Returns what tells the checkpoint from every other if it has no manifest, whose digest does that.

        Raises:
            CheckpointExists: another writer has taken the target meanwhile.
            OSError: the disk refused; if the checkpoint `is_visible`, only a power cut can still undo it.
        """
        durable = self.durability.durable
        marker: Identity | None = None
        mode = None if self.target.in_place else self._mode()
        if manifest is not None:
            syscalls.write_file(MANIFEST, manifest, self.fd, durable=durable)
        if durable and self.target.in_place:
            syscalls.sync_names(self.fd)  # the marker is not to be durable before the manifest's name is
        syscalls.write_file(MARKER, b"", self.fd, durable=durable)
        if not self.target.in_place:
            os.unlink(self._note, dir_fd=self.fd)
        if mode is not None:
            with contextlib.suppress(PermissionError):  # vfat keeps no modes
                syscalls.change_mode(self.fd, mode)
        if durable:
            syscalls.sync_names(self.fd)
        if manifest is None:
            marker = Directory(Location(self.path, self.path), self.fd).identity()
        if not self.target.in_place:
            self._take_name()
            self._check_name(manifest)
        self.is_visible = True
        self._settle()
        return marker

    def _mode(self) -> int:
        """Return the mode of what is replaced or, of a new checkpoint, what other folders get that are made here."""
        if self.target.mode is not None:
            return self.target.mode
        for top in self._tops:
            status = os.stat(top, dir_fd=self.fd, follow_symlinks=False)
            if stat.S_ISDIR(status.st_mode):
                return stat.S_IMODE(status.st_mode)
        return mode_of_new_folder(self.fd)

    def _take_name(self) -> None:
        """Rename the folder to its target; an overwriter takes turns with others that do the same."""
        for attempt in range(_ATTEMPTS):
            if self.target.replaces or attempt:
                self.target = _look(self.target, files=False)
            try:
                if self.target.replaces:
                    self._replace()
                else:
                    self._take_free_name()
            except FileNotFoundError:  # another program removed the old one
                if not self.target.replaces:
                    raise
            except OSError as error:
                if error.errno not in _TAKEN:
                    raise
                self._gives_way = False
                if not self.target.overwrite:
                    raise self._taken("another writer saved here meanwhile") from error
            else:
                return
        raise self._taken("other writers replace the checkpoint all the time")

    def _is_taken(self) -> bool:
        """Tell whether something has the target's name; what a rename onto it raises depends on the file system."""
        try:
            fd = syscalls.folder_in(self._final, self._parent)
        except OSError as error:
            return error.errno != errno.ENOENT
        try:
            return bool(syscalls.names_in(fd))
        finally:
            os.close(fd)

    def _rename_to_target(self) -> None:
        """Rename the folder to its target.

        Raises:
            OSError: one of `_TAKEN` if something is there, whatever the file system says of that.
        """
        if self._is_shared and self._is_taken():  # some would merge the two folders
            raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), self._final)
        try:
            self._rename(self._name, self._final)
        except OSError as error:
            if error.errno in _TAKEN or not self._is_taken():
                raise
            raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), self._final) from error

    def _check_name(self, manifest: bytes | None) -> None:
        """See that what lies at the target is what was saved, where a rename may have merged it with another one.

        An overwriter may find what another one has put there since. Some file systems give back what was written a
        few seconds after it was renamed; others never do.

        Raises:
            CheckpointExists: something else lies there.
            StorageError: what lies there cannot be read.
        """
        if manifest is None or not self._is_shared:
            return
        for pause in (*_PAUSES, None):
            found = self._digest_there()
            if found == digest_in(manifest) or (found is not None and self.target.overwrite):
                return
            if found is not None:
                raise self._taken("another writer saved here meanwhile")
            if pause is not None:
                time.sleep(pause)
        self.is_visible = True  # so that what it replaced is not removed
        raise StorageError(
            "the checkpoint has its name, but the file system does not give back what was written",
            number=errno.EIO,
            path=self.target.shown,
            hint="save to a local disk and copy the checkpoint, the file 'snapshot_done' last",
        )

    def _digest_there(self) -> bytes | None:
        """Return the digest in the manifest at the target, None where it cannot be read now."""
        path = self.target.path
        try:
            fd = syscalls.folder_in(self._final, self._parent)
            try:
                found = Directory(Location(path, path), fd).identity()
            finally:
                os.close(fd)
        except OSError:
            return None
        return found if isinstance(found, bytes) else None

    def _take_free_name(self) -> None:
        try:
            self._rename_to_target()
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            self._give_way()
        else:
            self._name = ""

    def _replace(self) -> None:
        """Take the name of the old checkpoint, and leave the old one under the name of the staging folder."""
        try:
            syscalls.exchange(self._name, self._final, self._parent)
        except OSError as error:
            if error.errno == errno.EXDEV:
                self._give_way()
            elif syscalls.is_missing(error):
                self._replace_in_two_steps()
            else:
                raise

    def _replace_in_two_steps(self) -> None:
        """Replace with two renames, for file systems that cannot exchange.

        If a crash comes between them, `clean_staging` restores the old checkpoint.
        """
        self._aside = beside(self._final, REPLACED)
        try:
            self._rename(self._final, self._aside)
        except OSError as error:
            self._aside = ""
            if error.errno != errno.EXDEV:
                raise
            self._give_way()
            return
        try:
            self._rename_to_target()
        except OSError as error:
            if error.errno in _TAKEN:  # by another overwriter
                self._remains.append(self._aside)
                self._aside = ""
            raise
        self._name, self._aside = self._aside, ""

    def _give_way(self) -> None:
        """Have the old checkpoint removed where it lies, for one that cannot be renamed.

        Others still find that place, so what they put there is looked for just before.
        """
        self.target = _look(self.target)
        if self.target.kept or self._carried:
            self.carry()
            if self.durability.durable:
                syscalls.sync_names(self.fd)
        self._gives_way = True
        self._finish_giving_way(begin=True)

    def _finish_giving_way(self, *, begin: bool = False) -> None:
        sync, replaces = self.durability.durable, self.target.replaces
        if not give_way(self._name, self._final, self._parent, sync=sync, begin=begin, replaces=replaces):
            raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), self._final)
        self.is_visible = True
        self._gives_way = False
        self._name = ""

    def _rename(self, old: str, new: str) -> None:
        os.rename(old, new, src_dir_fd=self._parent, dst_dir_fd=self._parent)

    def _settle(self) -> None:
        """Make the new name durable, and then remove what had it before."""
        if self.target.in_place:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._note, dir_fd=self.fd)
            if self.durability.durable:
                syscalls.sync_names(self.fd)
            return
        if self.durability.durable:
            for fd in (self._parent, *(fd for fd, _ in self._made)):
                syscalls.sync_names(fd)
        for name in filter(None, (self._name, *self._remains)):
            if self.target.foreign != "delete":
                self._hand_on(name)
            remove_old(name, self._parent, self.threads)
        self._name = ""

    def _hand_on(self, name: str) -> None:
        """Give the new checkpoint what others put into the one that it replaced, while it was written.

        Raises:
            StorageError: it cannot be given; the old one stays.
        """
        try:
            old = syscalls.folder_in(name, self._parent)
        except FileNotFoundError:  # a cleaner has done this
            return
        try:
            path, seen = os.path.join(os.path.dirname(self.target.path), name), self.target.seen
            stay = hand_on(old, self._final, self._parent, path=path, seen=seen, carried=self._carried)
        finally:
            os.close(old)
        if stay:
            raise StorageError(
                "the new checkpoint is saved and stands; others put files into the old one where this has its own",
                number=errno.EEXIST,
                path=path,
                found=few(stay),
                hint="move them away, and run `varstore clean`",
            )


def _content(fd: int) -> list[str]:
    """Return the names in a directory; at a mount point, without the lost+found that ext file systems create."""
    names = syscalls.names_in(fd)
    if "lost+found" in names and _is_mount_point(fd, os.fstat(fd)):
        names.remove("lost+found")
    return names


def _is_mount_point(fd: int, status: os.stat_result) -> bool:
    """Tell as `os.path.ismount` does whether an open directory is one, of which `status` is known.

    That one follows the path from the top, twice, which takes as long as writing a variable.
    """
    try:
        above = os.stat(os.pardir, dir_fd=fd)
    except OSError:  # it was removed
        return False
    return status.st_dev != above.st_dev or status.st_ino == above.st_ino
