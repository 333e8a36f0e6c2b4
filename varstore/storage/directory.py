"""Open the files of a checkpoint for reading, and reject links that lead out of it, pipes and devices.

A `Directory` holds one file descriptor, and all files are opened relative to it. So all reads come from the same
checkpoint, even if another checkpoint is moved to its path in the meantime. When a checkpoint is opened again, it
must be the same one: its `Location` holds the digest from the manifest's header or, without a manifest, the inode
and modification time of the marker. The check costs one small read.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from types import TracebackType
from typing import Protocol

from varstore.errors import CheckpointNotFound, FormatError, StorageError, UnsafeContent
from varstore.layout.location import Identity, Location
from varstore.layout.manifest import HEADER_SIZE, digest_in
from varstore.layout.names import MANIFEST, MARKER
from varstore.storage import syscalls
from varstore.storage.failures import storage_error
from varstore.text.hints import plural

__all__ = ["Directory", "locate"]

_ATTEMPTS = 100
"""Attempts to open a file: openat2 fails with EAGAIN if a rename races with a link that contains ``..``."""


class _Variable(Protocol):
    """What has a folder in a checkpoint."""

    @property
    def name(self) -> str: ...
    @property
    def folder(self) -> str: ...


def locate(path: str | os.PathLike[str]) -> Location:
    """Return the location of a path, made absolute now, without tying it to a particular checkpoint."""
    given = os.fspath(path)
    if os.path.isabs(given):
        return Location(given, given)
    try:
        return Location(given, os.path.join(os.getcwd(), given))
    except FileNotFoundError:  # the working directory was removed, so nothing exists below it
        return Location(given, given)


class Directory:
    """A checkpoint's directory, open for as long as the ``with`` block; `fd` is its descriptor."""

    __slots__ = ("_owns", "fd", "location")

    def __init__(self, location: Location, fd: int = -1) -> None:
        """Prepare to open the directory; if `fd` is given, it is already open and the caller closes it."""
        self.location = location
        self.fd = fd
        self._owns = fd < 0

    def __enter__(self) -> Directory:
        """Open it.

        Raises:
            CheckpointNotFound: there is no such directory.
            StorageError: the operating system refuses it, or the checkpoint was replaced.
        """
        if self._owns:
            self.fd = self._opened()
            try:
                self._check_identity()
            except BaseException:
                syscalls.close_folder(self.fd)
                raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._owns:
            syscalls.close_folder(self.fd)

    @property
    def path(self) -> str:
        """The path that the caller gave."""
        return self.location.path

    def place(self, relative: str) -> str:
        """Return the path of a file in it, for messages."""
        return os.path.join(self.location.path, relative)

    def identity(self) -> Identity | None:
        """Return what tells the checkpoint from another at this path; None without manifest and marker."""
        return self._manifest_digest() or self._marker_identity()

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
    def file(self, variable: _Variable, name: str) -> Iterator[tuple[int, int]]:
        """Hold a file of a variable's folder open: its descriptor and its size in bytes.

        Raises:
            UnsafeContent: not a regular file, or a link that leads out.
            FormatError: there is no such file.
        """
        relative = f"{variable.folder}/{name}"
        fd = self.open(relative, variable=variable.name)
        try:
            yield fd, self.size(fd, relative, variable.name)
        finally:
            os.close(fd)

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

    def size(self, fd: int, relative: str, variable: str | None) -> int:
        """Return the size of an opened file in bytes.

        Raises:
            UnsafeContent: it is not a regular file.
        """
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise self.not_regular(relative, variable)
        return status.st_size

    def not_regular(self, relative: str, variable: str | None) -> UnsafeContent:
        """Return the error for a pipe, device or directory where a file belongs."""
        return UnsafeContent("not a regular file", path=self.place(relative), variable=variable)

    def _opened(self) -> int:
        try:
            return syscalls.open_folder(self.location.absolute)
        except FileNotFoundError:
            raise CheckpointNotFound("there is no checkpoint here", path=self.path) from None
        except NotADirectoryError:
            raise CheckpointNotFound(
                "a file, not a checkpoint's directory",
                path=self.path,
                hint="other systems' files are opened by varstore.read",
            ) from None
        except OSError as error:
            raise storage_error(error, self.path, "the directory cannot be opened") from error

    def is_at_its_path(self) -> bool:
        """Tell whether its path still leads to it; where a folder cannot be held open, whether to some folder."""
        try:
            found = os.stat(self.location.absolute)
        except FileNotFoundError:
            return False
        return not syscalls.HAS_FOLDERS or os.path.samestat(found, os.fstat(self.fd))

    def _at(self, relative: str) -> tuple[str, int | None]:
        """Return what a call of the system takes as path and ``dir_fd``."""
        if syscalls.HAS_FOLDERS:
            return relative, self.fd
        return os.path.join(self.location.absolute, relative), None

    def _open_at(self, relative: str, flags: int) -> int:
        path, dir_fd = self._at(relative)
        return os.open(path, flags, dir_fd=dir_fd)

    def _check_identity(self) -> None:
        expected = self.location.identity
        if expected is None:
            return
        found = self._manifest_digest() if isinstance(expected, bytes) else self._marker_identity()
        if found != expected:
            raise StorageError("the checkpoint was replaced since it was opened", path=self.path, hint="open it again")

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

    def _marker_identity(self) -> tuple[int, int] | None:
        try:
            status = self.status(MARKER)
        except FileNotFoundError:
            return None
        return status.st_ino, status.st_mtime_ns

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
                hint="restore it from a copy; after a change on purpose, run `varstore seal`",
            )
        if error.errno in (errno.ENXIO, errno.ENODEV):
            return self.not_regular(relative, variable)
        return storage_error(error, path, "the file cannot be opened")


def _folders_in(folder: int | str) -> list[str]:
    with os.scandir(folder) as entries:
        return [entry.name for entry in entries if entry.is_symlink() or entry.is_dir()]


def _read_from_start(fd: int, size: int) -> bytes:
    """Return the first bytes of a file, `size` of them unless it is shorter, however few a call gives."""
    parts: list[bytes] = []
    done = 0
    while done < size and (part := syscalls.pread(fd, size - done, done)):
        parts.append(part)
        done += len(part)
    return b"".join(parts)
