"""Open the files of a checkpoint for reading, and reject links that lead out of it, pipes and devices.

A `Directory` holds one file descriptor, and all files are opened relative to it. So all reads come from the same
checkpoint, even if another checkpoint is moved to its path in the meantime. When a checkpoint is opened again, it
must be the same one: its `Location` holds the digest from the manifest's header or, without a manifest, the inode
and modification time of the marker. The check costs one small read.

What a reader finds while another checkpoint takes the place of its own is not damage. A checkpoint that was replaced
is removed, marker first, so files are missing, shorter, or (where a file system finds files by their path, as FUSE
does) those of the new one. Each error that leaves the ``with`` block is therefore judged: if the path leads elsewhere
by now, the error is that the checkpoint was replaced, and its number is ESTALE. Where a block ends well and no digest
vouches for what was read, the checkpoint must still be the same one.

On a shared file system, the marker is opened, not looked up: a mount may remember the name of a file that another
machine removed.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import stat
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from functools import partial
from types import TracebackType
from typing import Protocol

from varstore.errors import (
    CheckpointNotFound,
    FormatError,
    IncompleteCheckpoint,
    SizeMismatch,
    StorageError,
    UnsafeContent,
    VarstoreError,
)
from varstore.layout.location import Identity, Location
from varstore.layout.manifest import HEADER_SIZE, digest_in
from varstore.layout.names import MANIFEST, MARKER
from varstore.layout.pointers import FETCH, POINTER_LIMIT, is_pointer, size_behind
from varstore.storage import syscalls
from varstore.storage.failures import storage_error
from varstore.text.hints import plural

__all__ = [
    "closing",
    "PAUSES",
    "Directory",
    "is_shared",
    "locate",
    "marker_identity",
    "replaced_error",
    "says_replaced",
]

PAUSES = (0.1, 1.2, 2.4)
"""Seconds between looks at a shared file system, where what other machines did may be seen a second late."""
_GONE = {errno.ENOENT, errno.ENOTDIR, errno.ESTALE}
_ATTEMPTS = 100
"""Attempts to open a file: openat2 fails with EAGAIN if a rename races with a link that contains ``..``."""


class _Variable(Protocol):
    """What has a folder in a checkpoint with a `file` in it, or, with the folder "", an attached file."""

    @property
    def name(self) -> str: ...
    @property
    def folder(self) -> str: ...
    @property
    def file(self) -> str: ...
    @property
    def nbytes(self) -> int: ...


def replaced_error(path: str) -> StorageError:
    """Return the error for a checkpoint that is no longer the one that was opened."""
    return StorageError(
        "the checkpoint was replaced since it was opened", number=errno.ESTALE, path=path, hint="open it again"
    )


def says_replaced(error: BaseException) -> bool:
    """Tell whether an error is that of a checkpoint, or one of its files, that is no longer the one that was opened."""
    return isinstance(error, StorageError) and error.errno == errno.ESTALE


def is_shared(path: str) -> bool:
    """Tell whether a path is on a file system that others may change behind this machine's back, or behind FUSE."""
    kind = syscalls.file_system_type(path) or syscalls.file_system_type(os.path.dirname(path) or os.curdir)
    return kind in syscalls.SHARED_FILE_SYSTEMS


def locate(path: str | os.PathLike[str]) -> Location:
    """Return the location of a path, made absolute now, without tying it to a particular checkpoint."""
    given = os.fspath(path)
    if os.path.isabs(given):
        return Location(given, given)
    try:
        return Location(given, os.path.join(os.getcwd(), given))
    except FileNotFoundError:  # the working directory was removed, so nothing exists below it
        return Location(given, given)


def closing(descriptors: list[int]) -> Generator[None, None, None]:
    """Return what closes these descriptors, and those added to the list until then: its `close`, or its own end.

    Ctrl-C comes after any call into C, and before the first step of any function, so an ``__exit__`` that would close
    them may never begin. A generator is closed by Python with its owner, if nobody did before. A descriptor joins the
    list in the step after `syscalls.open_fd`.
    """
    held = _held(descriptors)
    next(held)
    return held


def _held(descriptors: list[int]) -> Generator[None, None, None]:
    # made here, so that it is one step there
    close_all: Callable[[], object] = partial(deque, map(os.close, descriptors), maxlen=0)
    try:
        yield
    finally:
        try:
            close_all()
        finally:
            close_all()  # those after one that could not be closed


class Directory:
    """A checkpoint's directory, open for as long as the ``with`` block; `fd` is its descriptor."""

    __slots__ = ("_closing", "_confirms", "_has_waited", "_owns", "fd", "location")

    def __init__(self, location: Location, fd: int = -1, *, confirms: bool = True) -> None:
        """Prepare to open the directory; if `fd` is given, it is already open and the caller closes it.

        Without `confirms`, nothing is checked after reading: for what is of no use without a later read, which is.
        """
        self.location = location
        self._confirms = confirms
        self.fd = fd
        self._owns = fd < 0
        self._has_waited = False
        self._closing: Generator[None, None, None] | None = None

    def __enter__(self) -> Directory:
        """Open it.

        Raises:
            CheckpointNotFound: there is no such directory.
            StorageError: the operating system refuses it, or the checkpoint was replaced.
        """
        if self._owns:
            opened: list[int] = []
            self._closing = closing(opened)
            self.fd = self._opened()
            if syscalls.HAS_FOLDERS:
                opened.append(self.fd)
            try:
                self.check_identity()
            except BaseException:
                self._close()
                raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close it.

        Raises:
            StorageError: the checkpoint was replaced, which is why the block failed, or what it read may be a mixture.
        """
        if not self._owns:
            return
        try:
            if error is None:
                if self._confirms or _known_to_be_shared(self.location.absolute):
                    self._confirm()
            elif _may_mean_replaced(error) and self._is_replaced(error):
                raise replaced_error(self.path) from error
        finally:
            self._close()

    def _close(self) -> None:
        if self._closing is not None:
            self._closing.close()

    @property
    def path(self) -> str:
        """The path that the caller gave."""
        return self.location.path

    def place(self, relative: str) -> str:
        """Return the path of a file in it, for messages."""
        return os.path.join(self.location.path, relative)

    def identity(self) -> Identity | None:
        """Return what tells the checkpoint from another at this path; None without manifest and marker."""
        return self._manifest_digest() or marker_identity(self.marker())

    def marker(self) -> os.stat_result | None:
        """Return what the marker is, None where there is none."""
        if not _known_to_be_shared(self.location.absolute):
            return self._marker_at_a_glance()
        try:
            fd = self._open_at(MARKER, syscalls.READ_FILE)
        except FileNotFoundError:
            return None
        except OSError:  # a link, a socket, a file that only others may read, one that another machine replaced
            return self._marker_at_a_glance()
        try:
            return syscalls.fresh_status(fd)
        finally:
            os.close(fd)

    def is_current(self) -> bool:
        """Tell whether the path still leads to this checkpoint, which has its marker if it had one."""
        try:
            (fd,) = map(syscalls.open_folder, (self.location.absolute,))
        except OSError as error:
            return error.errno not in _GONE
        try:
            return self._is_same(Directory(self.location, fd))
        except FormatError:
            return False
        except OSError as error:  # it cannot be told
            return error.errno not in _GONE
        finally:
            syscalls.close_folder(fd)

    def check_still_there(self) -> None:
        """Check that what is wrong with the checkpoint is not that it was replaced.

        Raises:
            StorageError: it was.
        """
        if self._is_replaced():
            raise replaced_error(self.path)

    def open(self, relative: str, *, variable: str | None = None, folder: bool = False) -> int:
        """Open a file or folder in the directory. Read files only with pread or preadv, which fail on pipes.

        Raises:
            UnsafeContent: a symbolic link leads out of the checkpoint.
            FormatError: there is no such file.
            StorageError: the operating system refuses it.
        """
        for attempt in range(_ATTEMPTS):
            try:
                return syscalls.openat2_beneath(relative, self.fd, folder=folder)
            except OSError as error:
                if error.errno in (errno.EXDEV, errno.ELOOP):
                    raise self._leads_out(relative, variable) from error
                if error.errno == errno.EAGAIN and attempt < _ATTEMPTS - 1:
                    continue
                if not syscalls.is_missing(error):
                    raise self._cannot_open(error, relative, variable) from error
                break
        return self._open_without_openat2(relative, variable, syscalls.READ_FOLDER if folder else syscalls.READ_FILE)

    @contextlib.contextmanager
    def out(self, variable: _Variable) -> Iterator[int]:
        """Hold a variable's ``out``, or an attached file, open, which is as long as it should be: its descriptor.

        Raises:
            SizeMismatch: it is longer or shorter.
            UnsafeContent: not a regular file, or a link that leads out.
            FormatError: there is no such file.
        """
        fd = self.open_out(variable)
        try:
            yield fd
        finally:
            os.close(fd)

    def open_out(self, variable: _Variable) -> int:
        """Open a variable's ``out``; raises what `out` does."""
        name = _name_of(variable)
        fd = self.open(variable.file, variable=name)
        try:
            self.check_size(variable, self.size(fd, variable.file, name))
        except BaseException:
            os.close(fd)
            raise
        return fd

    def check_size(self, variable: _Variable, size: int) -> None:
        """Check the size of an ``out``.

        Raises:
            SizeMismatch: it is not what was saved.
        """
        if size != variable.nbytes and not self._becomes(f"{variable.folder}/out", variable.nbytes):
            self.check_no_pointer(variable, size)
            raise SizeMismatch(
                f"{os.path.basename(variable.file)} is not as long as it was saved",
                path=self.place(variable.file),
                variable=_name_of(variable),
                found=plural(size, "byte"),
                expected=plural(variable.nbytes, "byte"),
                hint="restore it from a copy; after a change on purpose, run `varstore seal`",
            )

    def _becomes(self, relative: str, size: int) -> bool:
        """Tell whether a file has another size a moment later, as gocryptfs says that of a new link a second late.

        That is waited for once: what is damaged may have many such files.
        """
        if self._has_waited or not is_shared(self.location.absolute):
            return False
        self._has_waited = True
        for pause in PAUSES[:2]:
            time.sleep(pause)
            with contextlib.suppress(OSError):
                if self.status(relative).st_size == size:
                    return True
        return False

    def check_no_pointer(self, variable: _Variable, size: int) -> None:
        """Check that an ``out`` of a size that is wrong is not a pointer of Git LFS.

        Raises:
            SizeMismatch: it is.
        """
        if size >= POINTER_LIMIT:
            return
        name = _name_of(variable)
        head = self.read_small(variable.file, limit=POINTER_LIMIT, variable=name)
        if is_pointer(head):
            raise SizeMismatch(
                f"{os.path.basename(variable.file)} is a pointer of Git LFS, not the {'values' if name else 'content'}",
                path=self.place(variable.file),
                variable=name,
                found=plural(size, "byte"),
                expected=size_behind(head),
                hint=FETCH,
            )

    def read_small(self, relative: str, *, limit: int, variable: str | None = None) -> bytes:
        """Read a whole small file.

        Raises:
            FormatError: it is larger than `limit` bytes, or not a file of the checkpoint.
        """
        fd = self.open(relative, variable=variable)
        try:
            size = self.size(fd, relative, variable)
            if size > limit:
                raise FormatError(
                    "the file is too large to be what its name says",
                    path=self.place(relative),
                    variable=variable,
                    found=plural(size, "byte"),
                    expected=f"at most {limit}",
                )
            return _read_from_start(fd, size)
        finally:
            os.close(fd)

    def check_regular(self, relative: str) -> None:
        """Check that a name is that of a regular file, and not of a link to one.

        Raises:
            UnsafeContent: it is not.
            FormatError: there is no such file.
        """
        try:
            status = self.status(relative)
        except OSError as error:
            raise self._cannot_open(error, relative, None) from error
        if not stat.S_ISREG(status.st_mode):
            raise self.not_regular(relative, None)

    def status(self, relative: str) -> os.stat_result:
        """Return what the system knows of a file or folder in it, or of a link itself.

        Raises:
            FileNotFoundError: there is none.
        """
        path, dir_fd = self._at(relative)
        return os.stat(path, dir_fd=dir_fd, follow_symlinks=False)

    def subfolders(self, relative: str) -> list[str]:
        """Return the names of the folders in a folder of it, "" for itself; links are among them."""
        if not syscalls.HAS_FOLDERS:
            return _folders_in(self._at(relative)[0])
        fd = self._open_at(relative or ".", syscalls.READ_FOLDER)
        try:
            return _folders_in(fd)
        finally:
            os.close(fd)

    def read_if_there(self, relative: str, *, limit: int, variable: str | None = None) -> bytes | None:
        """Read a whole small file, None where nothing has its name; raises what `read_small` does."""
        try:
            return self.read_small(relative, limit=limit, variable=variable)
        except FormatError as error:
            if isinstance(error.__cause__, FileNotFoundError) and not self._has(relative):
                return None
            raise

    def size(self, fd: int, relative: str, variable: str | None) -> int:
        """Return the size of an opened file in bytes.

        Raises:
            UnsafeContent: it is not a regular file.
        """
        shared = _known_to_be_shared(self.location.absolute)
        status = syscalls.fresh_status(fd) if shared else os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise self.not_regular(relative, variable)
        return status.st_size

    def not_regular(self, relative: str, variable: str | None) -> UnsafeContent:
        """Return the error for a pipe, device or directory where a file belongs."""
        return UnsafeContent("not a regular file", path=self.place(relative), variable=variable)

    def _opened(self) -> int:
        try:
            (fd,) = map(syscalls.open_folder, (self.location.absolute,))  # a step that Ctrl-C does not divide
            return fd
        except FileNotFoundError:
            raise CheckpointNotFound("there is no checkpoint here", path=self.path) from None
        except NotADirectoryError:
            raise CheckpointNotFound(
                "a file, not a checkpoint's directory",
                path=self.path,
                hint="varstore.read opens other systems' files, and `varstore convert` makes checkpoints of them",
            ) from None
        except OSError as error:
            raise storage_error(error, self.path, "the directory cannot be opened") from error

    def _at(self, relative: str) -> tuple[str, int | None]:
        """Return what a call of the system takes as path and ``dir_fd``."""
        if syscalls.HAS_FOLDERS:
            return relative, self.fd
        return os.path.join(self.location.absolute, relative), None

    def _open_at(self, relative: str, flags: int) -> int:
        path, dir_fd = self._at(relative)
        (fd,) = map(partial(os.open, dir_fd=dir_fd), (path,), (flags,))
        return fd

    def check_identity(self) -> None:
        """Check that this is the checkpoint of the location, with the fewest calls that notice another one.

        Raises:
            StorageError: it is another one.
        """
        expected = self.location.identity
        if expected is None:
            return
        if isinstance(expected, bytes):
            found: Identity | None = self._manifest_digest()
        else:
            found = marker_identity(self.marker())
        if not self._is(found):
            raise replaced_error(self.path)

    def _is(self, found: Identity | None) -> bool:
        """Tell whether an identity is the location's; a shared file system may give a file another inode each time."""
        expected = self.location.identity
        if found == expected:
            return True
        if not (isinstance(found, tuple) and isinstance(expected, tuple)):
            return False
        return found[1] == expected[1] and is_shared(self.location.absolute)

    def _is_same(self, there: Directory) -> bool:
        """Tell whether what is at the path now, and open, is this checkpoint; see `is_current`."""
        marker = there.marker()
        shared = not syscalls.HAS_FOLDERS or is_shared(self.location.absolute)
        if not shared and not os.path.samestat(os.fstat(there.fd), os.fstat(self.fd)):
            return False
        if self.location.identity is None:
            return not shared or (marker is None) == (self.marker() is None)
        if marker is None and self.location.has_marker:
            return False
        return self._is(
            there._manifest_digest() if isinstance(self.location.identity, bytes) else marker_identity(marker)
        )

    def _is_replaced(self, error: BaseException | None = None) -> bool:
        """Tell whether an error may have come of a replacement; a shared file system is given time to show it."""
        if isinstance(error, OSError) and error.errno == errno.ESTALE:
            return True
        if not self.is_current():
            return True
        is_opening = self.location.identity is None  # whoever opens it tries again
        if is_opening or isinstance(error, IncompleteCheckpoint) or not is_shared(self.location.absolute):
            return False
        return any(self._is_replaced_after(pause) for pause in PAUSES)

    def _is_replaced_after(self, pause: float) -> bool:
        time.sleep(pause)
        return not self.is_current()

    def _confirm(self) -> None:
        """Check after reading that it was the same checkpoint all the time, where digests alone do not say so."""
        identity = self.location.identity
        if isinstance(identity, tuple):
            current = self._is(marker_identity(self.marker()))
        else:
            current = identity is None or not _known_to_be_shared(self.location.absolute) or self._is(self.identity())
        if not current:
            raise replaced_error(self.path)

    def _manifest_digest(self) -> bytes | None:
        try:
            fd = self._open_at(MANIFEST, syscalls.READ_FILE)
        except OSError:  # not there, or a link: told apart with care
            try:
                fd = self.open(MANIFEST)
            except FormatError:
                return None
        try:
            return digest_in(_read_from_start(fd, HEADER_SIZE))
        except OSError as error:
            if error.errno in (errno.ESPIPE, errno.EISDIR, errno.EAGAIN):
                return None
            raise
        finally:
            os.close(fd)

    def _marker_at_a_glance(self) -> os.stat_result | None:
        try:
            return self.status(MARKER)
        except FileNotFoundError:
            return None

    def _has(self, relative: str) -> bool:
        try:
            self.status(relative)
        except FileNotFoundError:
            return False
        return True

    def _open_without_openat2(self, relative: str, variable: str | None, flags: int) -> int:
        home = os.path.realpath(self.location.absolute)
        real = os.path.realpath(os.path.join(home, relative))
        if os.path.commonpath([home, real]) != home:
            raise self._leads_out(relative, variable)
        try:
            return self._open_at(os.path.relpath(real, home), flags)
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise self._leads_out(relative, variable) from error
            raise self._cannot_open(error, relative, variable) from error

    def _leads_out(self, relative: str, variable: str | None) -> UnsafeContent:
        return UnsafeContent(
            "a symbolic link leads out of the checkpoint",
            path=self.place(relative),
            variable=variable,
            hint="put a copy of the file in its place if it belongs here",
        )

    def _cannot_open(self, error: OSError, relative: str, variable: str | None) -> Exception:
        path = self.place(relative)
        if error.errno in (errno.ENOENT, errno.ENOTDIR):
            return FormatError(
                "the file is missing",
                path=path,
                variable=variable,
                hint="restore it from a copy, or let `varstore salvage` make a checkpoint of what is whole; after a "
                "change on purpose, run `varstore seal`",
            )
        if error.errno in (errno.ENXIO, errno.ENODEV):
            return self.not_regular(relative, variable)
        return storage_error(error, path, "the file cannot be opened")


def _name_of(variable: _Variable) -> str | None:
    """Return the name for messages: of an attached file, the path says it."""
    return variable.name if variable.folder else None


def _folders_in(folder: int | str) -> list[str]:
    with os.scandir(folder) as entries:
        return [entry.name for entry in entries if entry.is_symlink() or entry.is_dir()]


def marker_identity(marker: os.stat_result | None) -> Identity | None:
    """Return what tells a marker from that of another checkpoint at the same path."""
    return None if marker is None else (marker.st_ino, marker.st_mtime_ns)


def _may_mean_replaced(error: BaseException) -> bool:
    """Tell whether an error is of a kind that reading a checkpoint raises while it is replaced or removed."""
    if isinstance(error, FormatError | IncompleteCheckpoint):
        return True
    return isinstance(error, OSError) and (isinstance(error, StorageError) or not isinstance(error, VarstoreError))


@functools.lru_cache(maxsize=1024)
def _known_to_be_shared(path: str) -> bool:
    return is_shared(path)


def _read_from_start(fd: int, size: int) -> bytes:
    """Return the first bytes of a file, `size` of them unless it is shorter, however few a call gives."""
    parts: list[bytes] = []
    done = 0
    while done < size and (part := syscalls.pread(fd, size - done, done)):
        parts.append(part)
        done += len(part)
    return b"".join(parts)
