"""What crashed saves and unfinished removals leave, and how it is brought to an end.

Each leftover has a name that only varstore gives, so that it can be found, and a lock and a note that tell whether its
writer lives (see `varstore.storage.claims`):

- ``.NAME.saving-RANDOM``, a staging folder or a checkpoint that is being deleted: it is removed. One that is complete
  and whose predecessor is being removed to make place for it, which a file ``.replacing-RANDOM`` in it says, gets the
  name (see `give_way`).
  One that was replaced has first to hand on what others put there meanwhile (see `varstore.disk.save.foreign`).
- ``.NAME.replaced-RANDOM``, a checkpoint that was set aside for a new one. It gets its name back, unless the new one
  has it. Whoever removes it renames it first, in one step, to what is only removed: somebody else may be giving it its
  name back, and a visible checkpoint must not lose its files.
- ``.saving-RANDOM``, a note in a mount point or working directory that is being filled in place: what the save wrote
  is removed.
- ``.NAME.RANDOM.tmp`` and ``.manifest.RANDOM``, files and folders that had yet to get their names: they are removed.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Collection, Iterable, Iterator
from functools import partial

from varstore.disk.save.durability import sync_each
from varstore.disk.save.foreign import hand_on
from varstore.disk.threads import for_each
from varstore.layout.names import MANIFEST, MARKER
from varstore.layout.staged import (
    FILLING,
    GIVING_WAY,
    NEW_MANIFEST,
    NOTE,
    REPLACED,
    REPLACING,
    SAVING,
    STAGED,
    is_staging_name,
)
from varstore.storage import syscalls
from varstore.storage.appearing import TEMPORARY_LIMIT, end_temporary, is_temporary, remove_temporary
from varstore.storage.claims import claim, claim_new, is_ours, lock, notes_in, require_gone
from varstore.storage.failures import no_directory, storage_error, translated
from varstore.storage.removing import empty, remove, remove_file, remove_written
from varstore.text.hints import listed
from varstore.values.arguments import checked

__all__ = [
    "CHANGEABLE",
    "NAME_LIMIT",
    "beside",
    "Cleaned",
    "clean_in_place",
    "clean_staging",
    "discard",
    "few",
    "give_way",
    "is_of_another_user",
    "remove_old",
    "remove_old_manifests",
    "set_aside",
    "undo_in_place",
]

NAME_LIMIT = 255 - len(".") - len(REPLACED) - 8
CHANGEABLE = 0o333
"""Modes of an attached file that somebody may write to or execute: no save makes one."""


def _target_of_staging(name: str) -> str | None:
    match = STAGED.fullmatch(name)
    return match and match["target"]


def few(names: Iterable[str]) -> str:
    """Return names for a message."""
    return listed(list(map(repr, sorted(names))))


def beside(name: str, infix: str) -> str:
    """Return a new name for what belongs to a checkpoint and lies beside it."""
    return f".{name}{infix}{os.urandom(4).hex()}"


class Cleaned(list[str]):
    """The paths that were removed; `kept` has those that stay, each with whose it is."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: dict[str, str] = {}


@checked
def clean_staging(directory: str | os.PathLike[str], *, name: str | None = None) -> Cleaned:
    """Remove what crashed saves left in a directory, and return the paths that were removed.

    What a crashed `write`, `convert` or `seal` left is removed too, and so is what one left that saved to the directory
    itself, as to a mount point. A checkpoint that was set aside and never replaced gets its name back. What belongs to
    another user stays, and so does what a save that still runs writes. On a file system that other machines share,
    that is known of processes of this machine; what another machine left is removed when nothing in it has changed for
    a day, and so is what nobody signed, such as a file or folder of `convert`. All that stays is in `kept` of what is
    returned, each path with whose it is.

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
    try:
        names = sorted(os.listdir(directory))
    except (FileNotFoundError, NotADirectoryError):
        raise no_directory(directory) from None
    except OSError as error:
        raise storage_error(error, directory, "the directory cannot be read") from error
    left = [*_left_of_all(directory, names)] if name is None else _left_of(names, name)
    done = Cleaned()
    if not left and name is not None:
        return done
    with translated(directory, "the directory cannot be cleaned"):
        fd = syscalls.open_fd(directory, syscalls.READ_FOLDER)
        try:
            if left:  # what had a name before is not to lose its files before it has durably lost that
                syscalls.sync_names(fd)
            left.sort(key=partial(_since_aside, dir_fd=fd))
            for path in left:
                with _telling_kept(done, os.path.join(directory, path)):
                    if _end(path, fd):
                        done.append(os.path.join(directory, path))
            if name is None:
                with _telling_kept(done, directory):
                    done += [os.path.join(directory, path) for path in clean_in_place(fd)]
        finally:
            os.close(fd)
    return done


@contextlib.contextmanager
def _telling_kept(done: Cleaned, path: str) -> Iterator[None]:
    try:
        yield
    except (BlockingIOError, PermissionError) as error:
        done.kept[path] = error.strerror or str(error)
    except OSError:  # it went meanwhile, or is a link, a mount: not what a save leaves
        return


def _left_of(names: Iterable[str], target: str) -> list[str]:
    short = target[:TEMPORARY_LIMIT]
    hidden = (name for name in names if name.startswith("."))
    return [name for name in hidden if is_temporary(name, short) or _target_of_staging(name) == target]


def _left_of_all(directory: str, names: Iterable[str]) -> Iterator[str]:
    """Yield the leftovers in a directory, and those of seals in its folders."""
    for name in names:
        if is_temporary(name) or is_staging_name(name) or NEW_MANIFEST.fullmatch(name):
            yield name
        else:
            with contextlib.suppress(OSError):
                below = os.listdir(os.path.join(directory, name))
                yield from (f"{name}/{part}" for part in below if NEW_MANIFEST.fullmatch(part))


def _since_aside(path: str, dir_fd: int) -> int:
    """Return what sorts leftovers so that, of checkpoints that were set aside, the last one may have its name first."""
    match = STAGED.fullmatch(path)
    if match is not None and match["infix"] == REPLACED:
        with contextlib.suppress(OSError):
            return -os.stat(path, dir_fd=dir_fd, follow_symlinks=False).st_ctime_ns
    return 0


def _end(path: str, dir_fd: int) -> bool:
    """Bring a leftover to its end; True if it was removed.

    Raises:
        BlockingIOError, PermissionError: it is not ours, or not all in it is, and the error's text says whose; see
            `claim`.
        OSError: it cannot be opened, or is a link.
    """
    folder, _, name = path.rpartition("/")
    if folder:
        dir_fd = syscalls.folder_in(folder, dir_fd, same_mount=True)
        try:
            return _end(name, dir_fd)
        finally:
            os.close(dir_fd)
    match = STAGED.fullmatch(name)
    if match is None:
        return end_temporary(name, dir_fd)
    fd = claim(name, dir_fd, signed=match["infix"] == SAVING)  # one that was set aside is renamed, in one step
    try:
        if match["infix"] == REPLACED:
            if _renamed(name, match["target"], dir_fd):
                return False
            syscalls.sync_names(dir_fd)  # what has the name is not to be lost in a power cut when this one is gone
        elif give_way(name, match["target"], dir_fd):
            return False
        is_written = any(map(NOTE.fullmatch, syscalls.names_in(fd)))
        stay = [] if is_written else hand_on(fd, match["target"], dir_fd, path=name, seen={}, carried={})
        if not stay:
            return remove_old(name, dir_fd)
    except OSError:
        return False
    finally:
        os.close(fd)
    raise BlockingIOError(errno.EAGAIN, f"there are other people's files in it: {few(stay)}", name)


def remove_old(name: str, dir_fd: int, threads: int = 1) -> bool:
    """Remove a checkpoint that another one replaced; False if it is not gone, or somebody gave it its name back.

    More `threads` are for file systems whose calls wait for a server.
    """
    match = STAGED.fullmatch(name)
    if match is not None and match["infix"] == REPLACED:
        doomed = beside(match["target"], SAVING)
        if not _renamed(name, doomed, dir_fd):
            return False
        name = doomed
    return remove(name, dir_fd, each=partial(for_each, threads=threads))


def _renamed(name: str, target: str, dir_fd: int) -> bool:
    """Give a folder a name that nothing has, or an empty folder."""
    try:
        os.rename(name, target, src_dir_fd=dir_fd, dst_dir_fd=dir_fd)
    except OSError:
        return False
    return True


def clean_in_place(fd: int) -> list[str]:
    """Remove from an open folder what a killed save wrote into it; return the names of what is gone.

    The folder is locked from then on, for as long as the descriptor is open.

    Raises:
        BlockingIOError: its writer lives, or may live.
    """
    names = set(syscalls.names_in(fd))
    if not any(map(NOTE.fullmatch, names)):
        return []
    require_gone(fd, ".", fd)
    try:
        notes = notes_in(fd)
        if MARKER in names:  # it was complete but for this
            for note in notes:
                os.unlink(note, dir_fd=fd)
            return []
        for note, tops in notes.items():
            if not is_ours(os.stat(note, dir_fd=fd, follow_symlinks=False), fd):
                return []
            undo_in_place(fd, tops)
            os.unlink(note, dir_fd=fd)
    except OSError:
        return []
    return sorted(names - set(syscalls.names_in(fd)))


def undo_in_place(fd: int, tops: Iterable[str]) -> None:
    """Remove what a save wrote into a folder, its marker first; `tops` are the folders and files that it made there.

    A file that may be changed or executed is not one that a save made, where the file system keeps modes.
    """
    with_modes = not any(os.stat(note, dir_fd=fd).st_mode & CHANGEABLE for note in notes_in(fd))
    remove_file(MARKER, fd)
    for top in tops:
        if top and "/" not in top:
            remove_written(top, fd)
            with contextlib.suppress(OSError):
                status = os.stat(top, dir_fd=fd, follow_symlinks=False)
                if stat.S_ISREG(status.st_mode) and not (with_modes and status.st_mode & CHANGEABLE):
                    remove_file(top, fd)
    remove_file(MANIFEST, fd)


def remove_old_manifests(fd: int) -> None:
    """Remove what killed seals left in the open directory of a checkpoint."""
    for name in filter(NEW_MANIFEST.fullmatch, syscalls.names_in(fd)):
        remove_temporary(name, fd)


def give_way(
    name: str, target: str, dir_fd: int, *, sync: bool = False, begin: bool = False, replaces: bool = True
) -> bool:
    """Put a complete checkpoint in the place of one that cannot be renamed, and so not be exchanged.

    That is one in a lower layer of an overlay. It is removed where it lies, file by file; its marker goes first. Then
    the new one gets its name or, where folders cannot be renamed at all, its files are moved, and its marker last. So
    meanwhile the target is incomplete. Notes say how far this is, so that whoever comes after a crash finishes it, and
    does not take somebody's new work for what is left of the old: one in the folder that waits, that it is complete
    and in the middle of this; one in the target, that it is being emptied, or being filled.

    Args:
        name: the folder that waits; one with nothing in it only stands for the removal, and goes too.
        target: the folder that is replaced.
        dir_fd: the directory of both.
        sync: make each step durable before the next one.
        begin: this begins now; otherwise it is only finished.
        replaces: whether there is something to be removed, if this begins now; otherwise nothing may be there.

    Returns:
        Whether the target is taken; False where this had not begun, or somebody has put other things there.

    Raises:
        OSError: the operating system refused.
    """
    waits, emptying, filling = (f"{infix}{name[-8:]}" for infix in (REPLACING, REPLACED, FILLING))
    waiting = syscalls.folder_in(name, dir_fd)
    try:
        if begin:
            _note(waits, waiting, sync=sync)
        elif waits not in syscalls.names_in(waiting):
            return False
        if not _empty_target(target, dir_fd, emptying, filling, sync=sync, begin=begin and replaces):
            remove_file(waits, waiting)
            return False
        if syscalls.names_in(waiting) == [waits]:
            with contextlib.suppress(OSError):  # some overlays cannot remove a folder of a lower layer
                os.rmdir(target, dir_fd=dir_fd)
            remove(name, dir_fd, each=for_each)
        elif _renamed(name, target, dir_fd):
            os.unlink(waits, dir_fd=waiting)
        else:
            _fill(target, dir_fd, waiting, filling, waits, sync=sync)
            remove(name, dir_fd, each=for_each)
    finally:
        os.close(waiting)
    return True


def _empty_target(target: str, dir_fd: int, emptying: str, filling: str, *, sync: bool, begin: bool) -> bool:
    """Remove all that can be removed from the target; False if it holds something else."""
    try:
        fd = syscalls.folder_in(target, dir_fd, same_mount=True)
    except FileNotFoundError:
        return True
    try:
        names = syscalls.names_in(fd)
        if filling in names or not names:
            return True
        if begin:
            _note(emptying, fd, sync=sync)
        elif emptying not in names:
            return False
        remove_file(MARKER, fd)
        empty(fd, but={emptying}, each=for_each)
        if sync:
            syscalls.sync_names(fd)
        with contextlib.suppress(FileNotFoundError):  # another overwriter does the same
            if syscalls.names_in(fd) == [emptying]:
                os.unlink(emptying, dir_fd=fd)
            else:
                os.rename(emptying, filling, src_dir_fd=fd, dst_dir_fd=fd)
    finally:
        os.close(fd)
    return True


def _fill(target: str, dir_fd: int, waiting: int, filling: str, waits: str, *, sync: bool) -> None:
    with contextlib.suppress(FileExistsError):
        os.mkdir(target, 0o700, dir_fd=dir_fd)
    fd = syscalls.folder_in(target, dir_fd, same_mount=True)
    try:
        _claim_target(fd, filling)
        _note(filling, fd, sync=sync)
        folders = _move(waiting, fd, but={MARKER, waits})
        with contextlib.suppress(PermissionError):  # vfat keeps no modes
            syscalls.change_mode(fd, stat.S_IMODE(os.fstat(waiting).st_mode))
        if sync:
            sync_each(fd, (), [*reversed(folders), "."])
        with contextlib.suppress(FileNotFoundError):  # moved before a crash
            os.rename(MARKER, MARKER, src_dir_fd=waiting, dst_dir_fd=fd)
        if sync:
            syscalls.sync_names(fd)
        os.unlink(filling, dir_fd=fd)
    finally:
        os.close(fd)


def _claim_target(fd: int, filling: str) -> None:
    """Lock a target that is to be filled, and see that nobody else has filled it or had begun to.

    Raises:
        OSError: ENOTEMPTY, as a rename onto it.
    """
    with contextlib.suppress(BlockingIOError):
        lock(fd)
        names = syscalls.names_in(fd)
        others = (name for name in names if GIVING_WAY.fullmatch(name) and name != filling)
        if (filling in names or MARKER not in names) and not any(others):
            return
    raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY))


def _move(source: int, target: int, *, but: Collection[str] = ()) -> list[str]:
    """Move the files in one folder, and below, to the same places in another; return the folders of those."""
    folders = []
    for name, is_folder in syscalls.entries_in(source):
        if name in but:
            continue
        if not is_folder:
            os.rename(name, name, src_dir_fd=source, dst_dir_fd=target)
            continue
        with contextlib.suppress(FileExistsError):
            os.mkdir(name, dir_fd=target)
        below, beside = syscalls.folder_in(name, source), -1
        try:
            beside = syscalls.folder_in(name, target)
            folders += [name, *(f"{name}/{folder}" for folder in _move(below, beside))]
        finally:
            for fd in (below, beside):
                if fd >= 0:
                    os.close(fd)
    return folders


def _note(name: str, dir_fd: int, *, sync: bool) -> None:
    with contextlib.suppress(FileExistsError):  # after a crash, or another overwriter
        os.close(syscalls.create(name, dir_fd))
    if sync:
        syscalls.sync_names(dir_fd)


def is_of_another_user(path: str) -> bool:
    """Tell whether a checkpoint belongs to another user, so that it is not ours to delete; a link to one is."""
    with contextlib.suppress(OSError):
        status = os.lstat(path)
        if stat.S_ISDIR(status.st_mode):
            fd = syscalls.open_fd(os.path.dirname(os.path.abspath(path)), syscalls.READ_FOLDER)
            try:
                return not is_ours(status, fd)
            finally:
                os.close(fd)
    return False


def set_aside(path: str) -> None:
    """Rename a checkpoint that is to be deleted, in one step; `clean_staging` removes it later.

    It gets the name of an unfinished save, since `clean_staging` would restore one that was replaced. Of a symbolic
    link, only the link is removed. What cannot be renamed, in a lower layer of an overlay, is removed at once.

    Raises:
        PermissionError: it belongs to another user.
        OSError: the operating system refused.
    """
    directory, name = os.path.split(os.path.abspath(path))
    fd = syscalls.open_fd(directory, syscalls.READ_FOLDER)
    try:
        status = os.stat(name, dir_fd=fd, follow_symlinks=False)
        if stat.S_ISLNK(status.st_mode):
            os.unlink(name, dir_fd=fd)
            return
        if not is_ours(status, fd):
            raise PermissionError(errno.EPERM, "it belongs to another user", path)
        aside = beside(name, SAVING)
        try:
            os.rename(name, aside, src_dir_fd=fd, dst_dir_fd=fd)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            _remove_at_once(name, fd)
        else:
            _remove_marks(aside, fd)
    finally:
        os.close(fd)


def _remove_marks(name: str, dir_fd: int) -> None:
    """Say of a folder that it is to be removed with all in it; it has durably lost the name that it had."""
    with contextlib.suppress(OSError):
        syscalls.sync_names(dir_fd)
        fd = syscalls.folder_in(name, dir_fd, same_mount=True)
        try:
            for mark in (MARKER, MANIFEST):
                remove_file(mark, fd)
        finally:
            os.close(fd)


def _remove_at_once(name: str, dir_fd: int) -> None:
    waiting = beside(name, SAVING)
    os.mkdir(waiting, 0o700, dir_fd=dir_fd)
    held = syscalls.folder_in(waiting, dir_fd)
    try:
        claim_new(held, waiting, dir_fd)
        give_way(waiting, name, dir_fd, begin=True)
    finally:
        os.close(held)


def discard(path: str) -> None:
    """Remove a checkpoint: first its name, in one step, then the rest."""
    path = os.path.abspath(path)
    set_aside(path)
    directory, name = os.path.split(path)
    clean_staging(directory, name=name)
