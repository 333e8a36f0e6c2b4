"""A file or folder appears whole or not at all: it is written beside its target and takes the name last.

The temporary name is ``.NAME.XXXXXXXX.tmp``. It is locked while its writer lives, so that the next writer of that
name, and `varstore.clean`, remove what a killed one left. All is synced before it gets its name, and then the
directory that holds the name.

A set of files appears with the one that names the others, its index. The others get names that nothing has yet, so
that the old index finds the old files until the new one takes its place; only then do the old files go.

Such a file, or one that only one index names, as the external data of a model, is a part (`Whole.part`). It is visible
before its index is, and keeps its temporary name, which ends as its index's does, until the index has its own. So
whoever finds the temporary names of both knows that the index never appeared, and removes the part with it.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
from collections.abc import Callable, Collection, Iterator
from contextvars import ContextVar
from functools import partial
from typing import BinaryIO

from varstore.errors import CheckpointExists, VarstoreError
from varstore.storage import syscalls
from varstore.storage.claims import claim, claim_new, is_ours, mode_of_new_folder
from varstore.storage.failures import storage_error
from varstore.storage.forks import Held, no_fork
from varstore.storage.looking import kind_of
from varstore.storage.removing import remove, remove_empty, remove_file

__all__ = [
    "TEMPORARY_LIMIT",
    "Whole",
    "end_temporary",
    "is_temporary",
    "make_folders",
    "new_folder",
    "nothing_written",
    "remove_temporary",
    "replacing",
    "replacing_set",
    "replacing_whole",
    "target_of",
]

_TEMPORARY = re.compile(r"\.(?P<target>.+)\.[0-9a-f]{8}\.tmp", re.DOTALL)
_RANDOM = len(".XXXXXXXX.tmp")
TEMPORARY_LIMIT = 200
_refused: ContextVar[bool] = ContextVar("_refused", default=False)
_EACH = 16
"""Files; a folder of more is synced by flushing the file system once."""


def target_of(path: str) -> str:
    """Return the absolute path at which something new may appear: its directory is resolved, its own name is not.

    Whoever may write to the directory could plant a link there, which would turn what is written elsewhere.

    Raises:
        CheckpointExists: there is a symbolic link at `path`.
    """
    folder, name = os.path.split(path.rstrip("/") or "/")
    if name in ("", os.curdir, os.pardir):  # no name of its own, so nobody planted it
        return os.path.realpath(path)
    target = os.path.join(os.path.realpath(folder), name)
    if os.path.islink(target):
        raise CheckpointExists(
            "there is a symbolic link at this path, and what is written never follows one",
            path=path,
            found=f"a link to {os.readlink(target)!r}",
            hint="remove the link, or name the place that it leads to",
        )
    return target


def is_temporary(name: str, target: str | None = None) -> bool:
    """Tell whether a name is one that a file or folder has only while it is written, be it for one target or any."""
    match = _TEMPORARY.fullmatch(name)
    return match is not None and target in (None, match["target"])


def remove_temporary(name: str, dir_fd: int) -> bool:
    """Remove what a killed writer left under a temporary name; False if it is not ours, or its writer may live."""
    try:
        return end_temporary(name, dir_fd)
    except OSError:
        return False


def end_temporary(name: str, dir_fd: int) -> bool:
    """Remove what a killed writer left under a temporary name, and the parts that are visible of what never was.

    Raises what `claim` does if it is not ours.
    """
    mode = os.stat(name, dir_fd=dir_fd, follow_symlinks=False).st_mode
    if not (stat.S_ISDIR(mode) or stat.S_ISREG(mode)):
        return False
    claimed = [claim(name, dir_fd, folder=stat.S_ISDIR(mode))]
    try:
        if stat.S_ISDIR(mode):
            return remove(name, dir_fd)
        others = [other for other in syscalls.names_in(dir_fd) if other != name and other.endswith(name[-_RANDOM:])]
        parts = [part for part in (name, *others) if _is_part(part, dir_fd)]
        wholes = {name, *filter(is_temporary, others)} - {*parts}
        for whole in wholes - {name}:
            claimed.append(claim(whole, dir_fd, folder=False))  # its writer holds no part
        for part in parts:
            if wholes:
                os.unlink(_target(part), dir_fd=dir_fd)
            if wholes or part == name:
                os.unlink(part, dir_fd=dir_fd)
        if name in wholes:
            os.unlink(name, dir_fd=dir_fd)
    except OSError:
        return False
    finally:
        for fd in claimed:
            os.close(fd)
    return True


def _target(name: str) -> str:
    match = _TEMPORARY.fullmatch(name)
    return match["target"] if match else ""


def _is_part(name: str, dir_fd: int) -> bool:
    """Tell whether a temporary name is the second one of the file that it is for."""
    try:
        return os.path.samestat(
            os.stat(name, dir_fd=dir_fd, follow_symlinks=False),
            os.stat(_target(name), dir_fd=dir_fd, follow_symlinks=False),
        )
    except FileNotFoundError:
        return False


class _Place:
    """Where something is to appear: its directory, open where directories can be, and names in it."""

    def __init__(self, path: str) -> None:
        self.target = target_of(path)
        self.folder, self.name = os.path.split(self.target)
        self.fd: int | None = None

    def __enter__(self) -> _Place:
        if syscalls.HAS_FOLDERS:
            self.fd = syscalls.open_fd(self.folder, syscalls.READ_FOLDER)
        return self

    def __exit__(self, *_: object) -> None:
        if self.fd is not None:
            os.close(self.fd)

    def at(self, name: str) -> str:
        """Return what to call a name in the directory: itself where the descriptor goes with it, or else its path."""
        return os.path.join(self.folder, name) if self.fd is None else name

    def temporary(self, make: Callable[[str], int], random: str = "") -> tuple[str, int]:
        """Make something under a new temporary name, and lock it; return the name and its descriptor.

        The name ends with `random`, if that is given.
        """
        short = self.name[:TEMPORARY_LIMIT]
        if self.fd is not None:
            for left in syscalls.names_in(self.fd):
                if is_temporary(left, short):
                    remove_temporary(left, self.fd)
        while True:
            name = f".{short}.{random or os.urandom(4).hex()}.tmp"
            fd = make(name)
            if self.fd is None:
                return name, fd
            try:
                claim_new(fd, name, self.fd)
            except (BlockingIOError, FileNotFoundError):  # a cleaner was faster, and may have left it to us
                os.close(fd)
                if not remove_file(name, self.fd):
                    remove_empty(name, self.fd)
            except BaseException:
                os.close(fd)
                raise
            else:
                return name, fd

    def appear(self, name: str) -> None:
        """Give a temporary file its name, in one step."""
        os.replace(self.at(name), self.at(self.name), src_dir_fd=self.fd, dst_dir_fd=self.fd)

    def has(self, status: os.stat_result) -> bool:
        """Tell whether a file has the name of what is to appear."""
        try:
            return os.path.samestat(status, os.stat(self.at(self.name), dir_fd=self.fd, follow_symlinks=False))
        except FileNotFoundError:
            return False

    def sync(self) -> None:
        """Make the names in the directory durable, where the file system can."""
        if self.fd is not None:
            syscalls.sync_names(self.fd)


def make_folders(path: str) -> None:
    """Make a folder and those above it, where they are missing, and their names durable."""
    missing: list[str] = []
    while not os.path.isdir(path):
        missing.append(path)
        path = os.path.dirname(path)
    for folder in reversed(missing):
        with contextlib.suppress(FileExistsError):
            os.mkdir(folder)
        with _Place(folder) as place:
            place.sync()


@contextlib.contextmanager
def _telling(path: str, stands: list[bool]) -> Iterator[None]:
    """Say of an OSError of the block whether what was written `stands`."""
    try:
        yield
    except VarstoreError:
        raise
    except OSError as error:
        doing = "it is written and stands, but it may not survive a power cut" if stands else "writing failed"
        raise storage_error(error, path, doing) from error


class _NotOpened(Exception):
    """Raised in the place of a file that would be opened."""


@contextlib.contextmanager
def nothing_written() -> Iterator[None]:
    """End the block, without an error, where it would open a new file."""
    token = _refused.set(True)
    try:
        with contextlib.suppress(_NotOpened):
            yield
    finally:
        _refused.reset(token)


@contextlib.contextmanager
def replacing(path: str) -> Iterator[BinaryIO]:
    """Open a new file beside `path`; it becomes `path` when the block ends well and is removed otherwise.

    A file that it replaces hands on its mode.

    Raises:
        CheckpointExists: there is a symbolic link at `path`.
        OutOfSpace, StorageError: the operating system refused; what stood at `path` is untouched.
    """
    with replacing_whole(path) as (file, _):
        yield file


class Whole:
    """A file that has parts, which are visible before it is, and go if it never is."""

    def __init__(self) -> None:
        self.random = os.urandom(4).hex()
        """How the temporary names of all of them end."""
        self._process = os.getpid()
        self._parts: list[tuple[str, str]] = []
        """Path and temporary name of each part."""

    @contextlib.contextmanager
    def part(self, path: str) -> Iterator[BinaryIO]:
        """Open a new file beside `path`, which becomes `path` when the block ends well, before the whole does.

        Raises:
            CheckpointExists: there is something at `path`.
            OutOfSpace, StorageError: the operating system refused.
        """
        with _telling(path, []), _Place(path) as place:
            if os.path.lexists(place.target):
                raise _taken(path)

            def appear(name: str) -> None:
                self._parts.append((place.target, place.at(name)))
                with contextlib.suppress(OSError):  # a file system without links: a killed writer leaves the part
                    os.link(place.at(name), place.at(place.name), src_dir_fd=place.fd, dst_dir_fd=place.fd)
                    return
                place.appear(name)

            with _new_file(place, self.random, appear) as file:
                yield file
            place.sync()

    def end(self, *, stands: bool) -> None:
        """Remove the temporary names of the parts and, unless the whole `stands`, the parts themselves."""
        if os.getpid() != self._process:
            return
        for path, name in self._parts:
            for left in (() if stands else (path,)) + (os.path.join(os.path.dirname(path), name),):
                with contextlib.suppress(OSError):
                    os.unlink(left)


def _taken(path: str) -> CheckpointExists:
    return CheckpointExists("the path is taken", path=path, hint="choose another, or remove what is there")


@contextlib.contextmanager
def replacing_whole(path: str) -> Iterator[tuple[BinaryIO, Whole]]:
    """Open a new file as `replacing` does, which may have parts; raises what that does."""
    stands: list[bool] = []
    made: list[os.stat_result] = []
    whole = Whole()
    with _telling(path, stands), _Place(path) as place:
        try:
            with _new_file(place, whole.random, place.appear) as file:
                made.append(os.fstat(file.fileno()))
                yield file, whole
        except BaseException:
            whole.end(stands=any(map(place.has, made)))  # the error may have come just after it got its name
            raise
        stands.append(True)
        place.sync()
        whole.end(stands=True)


@contextlib.contextmanager
def _new_file(place: _Place, random: str, appear: Callable[[str], None]) -> Iterator[BinaryIO]:
    """Open a file under a temporary name; it is synced and may `appear` when the block ends well, and goes otherwise.

    What has the name of the place hands on its mode.
    """
    mode = _mode_of_file(place)
    if _refused.get():
        raise _NotOpened

    def make(name: str) -> int:
        # the user's alone until it is whole, since the file that it replaces may be so
        return syscalls.open_fd(place.at(name), syscalls.NEW, 0o666 if mode is None else 0o600, dir_fd=place.fd)

    name, held = "", None
    try:
        with no_fork:
            name, fd = place.temporary(make, random)
            new = open(fd, "wb")  # noqa: SIM115
            held = Held(new.raw.close)  # not what is buffered, which is for the parent to write
        with new as file:
            yield file
            file.flush()
            if mode is not None and place.fd is not None:
                with contextlib.suppress(PermissionError):  # vfat keeps no modes
                    syscalls.change_mode(fd, mode)
            syscalls.sync(fd)
            if place.fd is not None:  # while it is locked; Windows does not rename what is open
                appear(name)
        if place.fd is None:
            appear(name)
    except BaseException:
        if name and (held is None or held.is_ours):
            with contextlib.suppress(OSError):
                os.remove(place.at(name), dir_fd=place.fd)
        raise


def _mode_of_file(place: _Place) -> int | None:
    try:
        status = os.stat(place.at(place.name), dir_fd=place.fd, follow_symlinks=False)
    except FileNotFoundError:
        return None
    return stat.S_IMODE(status.st_mode) if stat.S_ISREG(status.st_mode) else None


@contextlib.contextmanager
def new_folder(path: str, *, may_replace: Callable[[str], bool] | None = None) -> Iterator[str]:
    """Make a folder beside `path`; it becomes `path` when the block ends well and is removed otherwise.

    Args:
        path: nothing, or an empty folder.
        may_replace: a function that tells whether the folder at a path may be replaced.

    Raises:
        CheckpointExists: there is something at `path` that may not be replaced, or a symbolic link.
        OutOfSpace, StorageError: the operating system refused.
    """
    stands: list[bool] = []
    with _telling(path, stands), _Place(path) as place:
        target = place.at(place.name)
        old = _mode_of_old_folder(place, path, may_replace)

        def make(name: str) -> int:
            os.mkdir(place.at(name), 0o700, dir_fd=place.fd)
            return -1 if place.fd is None else syscalls.folder_in(name, place.fd)

        name, fd, held = "", -1, None
        try:
            with no_fork:
                name, fd = place.temporary(make)
                held = Held(partial(os.close, fd))
            yield os.path.join(place.folder, name)
            if fd >= 0:
                mode = mode_of_new_folder(fd) if old is None else old
                with contextlib.suppress(PermissionError):  # vfat keeps no modes
                    syscalls.change_mode(fd, mode)
                _sync_tree(os.path.join(place.folder, name), fd)
            try:
                os.rename(place.at(name), target, src_dir_fd=place.fd, dst_dir_fd=place.fd)
            except OSError:
                if place.fd is None or may_replace is None or not may_replace(place.target):
                    raise
                syscalls.exchange(name, place.name, place.fd)
            stands.append(True)
            place.sync()
        finally:
            if name and (held is None or held.is_ours):
                held = None
                _remove(place, name, fd)  # what was not finished, or what was replaced


def _mode_of_old_folder(place: _Place, path: str, may_replace: Callable[[str], bool] | None) -> int | None:
    target = place.target
    kind = kind_of(target)
    if not kind and not os.path.lexists(target):
        return None
    if kind == stat.S_IFDIR and (not os.listdir(target) or (may_replace is not None and may_replace(target))):
        return stat.S_IMODE(os.stat(target).st_mode)
    raise _taken(path)


def _remove(place: _Place, name: str, fd: int) -> None:
    """Remove an open folder, and close it."""
    if place.fd is None:
        import shutil

        shutil.rmtree(place.at(name), ignore_errors=True)
        return
    try:
        remove(name, place.fd)
    finally:
        os.close(fd)


def _sync_tree(folder: str, fd: int) -> None:
    """Make an open folder durable, with all in it."""
    found = [(below, names) for below, _, names in os.walk(folder, topdown=False, onerror=_fail)]
    if sum(len(names) for _, names in found) > _EACH:
        with contextlib.suppress(OSError):
            syscalls.sync_file_system(fd)
            return
    for below, names in found:
        for name in names:
            syscalls.sync_path(os.path.join(below, name))
        syscalls.sync_path(below, folder=True)


def _fail(error: OSError) -> None:
    raise error


@contextlib.contextmanager
def replacing_set(
    index: str, parts: re.Pattern[str], listed: Callable[[], Collection[str]]
) -> Iterator[tuple[BinaryIO, Callable[[Callable[[str], list[str]]], list[str]], Whole]]:
    """Open a new index, for files beside it that take its place with it: readers see the old set or the new one.

    Yields the file of the index, to be written when the other files are complete, and a function that chooses their
    names, and the whole, of which the files are parts. The function takes one that makes names with a tag in them,
    which is empty unless one of the names is taken. When the block ends well, the files of other sets of this index go.

    Args:
        index: the path of the index.
        parts: what the names of all files match that any set of this index may have.
        listed: a function that returns the names which the index that is there lists, none if it cannot be read.

    Raises:
        CheckpointExists, OutOfSpace, StorageError: as `replacing`.
    """
    chosen: list[str] = []
    before = {*listed()}

    def choose(names: Callable[[str], list[str]]) -> list[str]:
        folder, new = os.path.dirname(target_of(index)), names("")
        while any(os.path.lexists(os.path.join(folder, name)) for name in new):
            new = names("-" + os.urandom(4).hex())
        chosen.extend(new)
        return new

    with replacing_whole(index) as (file, whole):
        yield file, choose, whole
    with contextlib.suppress(OSError), _Place(index) as place:
        names = os.listdir(place.folder) if place.fd is None else syscalls.names_in(place.fd)
        found = {name for name in names if parts.fullmatch(name)}
        if any(is_temporary(name, place.name[:TEMPORARY_LIMIT]) for name in names):  # of another writer, with its files
            found &= before
        for name in names:
            match = _TEMPORARY.fullmatch(name)
            if match is not None and parts.fullmatch(match["target"]) and place.fd is not None:
                remove_temporary(name, place.fd)
        _remove_parts(index, found - {*chosen, *listed()})


def _remove_parts(index: str, names: Collection[str]) -> None:
    if not names:
        return
    with contextlib.suppress(OSError), _Place(index) as place:
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                status = os.stat(place.at(name), dir_fd=place.fd, follow_symlinks=False)
                if stat.S_ISREG(status.st_mode) and (place.fd is None or is_ours(status, place.fd)):
                    os.remove(place.at(name), dir_fd=place.fd)
