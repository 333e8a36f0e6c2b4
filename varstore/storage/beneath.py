"""Open the files of a checkpoint for reading, and nothing else: no link that leads out, no pipe, no device."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator

from varstore.errors import CheckpointNotFound, FormatError, StorageError, UnsafeContent
from varstore.layout.names import MARKER
from varstore.storage import syscalls
from varstore.storage.failures import storage_error

__all__ = ["Root", "identity_of", "open_file", "open_root", "opened_file", "read_small"]

_FLAGS = os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC
_ATTEMPTS = 100
"""A link with ``..`` in it cannot be followed safely while anything is renamed anywhere: the kernel says, again."""


class Root(str):
    """The path of an opened checkpoint, and what tells it from another that may have the path later."""

    identity: tuple[int, ...] | None

    def __new__(cls, path: str, identity: tuple[int, ...] | None) -> Root:
        """Make the path of the checkpoint that has this identity now."""
        root = super().__new__(cls, path)
        root.identity = identity
        return root


def identity_of(root_fd: int) -> tuple[int, ...] | None:
    """Return what a checkpoint has of its own: the marker, which is made once and never changed; None without one."""
    try:
        status = os.stat(MARKER, dir_fd=root_fd, follow_symlinks=False)
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino, status.st_mtime_ns


@contextlib.contextmanager
def open_root(path: str) -> Iterator[int]:
    """Hold a descriptor of a checkpoint's directory; of a `Root`, only if it is still the same checkpoint.

    Raises:
        CheckpointNotFound: there is no such directory.
        StorageError: the operating system refuses it, or the checkpoint was replaced.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise CheckpointNotFound("there is no checkpoint here", path=path) from None
    except NotADirectoryError:
        raise CheckpointNotFound(
            "a file, not a checkpoint's directory", path=path, hint="other systems' files are opened by varstore.read"
        ) from None
    except OSError as error:
        raise storage_error(error, path, "the directory cannot be opened") from error
    try:
        if isinstance(path, Root) and path.identity not in (None, identity_of(fd)):
            raise StorageError("the checkpoint was replaced since it was opened", path=path, hint="open it again")
        yield fd
    finally:
        os.close(fd)


def open_file(root_fd: int, relative: str, *, root: str, variable: str | None = None) -> int:
    """Open a file below a checkpoint; whoever reads from it must use preadv, which refuses pipes.

    Raises:
        UnsafeContent: a symbolic link leads out of the checkpoint.
        FormatError: there is no such file.
        StorageError: the operating system refuses it.
    """
    for attempt in range(_ATTEMPTS):
        try:
            return syscalls.openat2_beneath(relative, root_fd)
        except OSError as error:
            if error.errno in (errno.EXDEV, errno.ELOOP):
                raise _leads_out(root, relative, variable) from error
            if error.errno == errno.EAGAIN and attempt < _ATTEMPTS - 1:
                continue
            if not syscalls.is_missing(error):
                raise _cannot_open(error, root, relative, variable) from error
            break
    return _open_without_openat2(root_fd, relative, root, variable)


def _open_without_openat2(root_fd: int, relative: str, root: str, variable: str | None) -> int:
    home = os.path.realpath(root)
    real = os.path.realpath(os.path.join(home, relative))
    if os.path.commonpath([home, real]) != home:
        raise _leads_out(root, relative, variable)
    try:
        return os.open(os.path.relpath(real, home), _FLAGS, dir_fd=root_fd)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise _leads_out(root, relative, variable) from error
        raise _cannot_open(error, root, relative, variable) from error


@contextlib.contextmanager
def opened_file(root_fd: int, relative: str, *, root: str, variable: str | None = None) -> Iterator[tuple[int, int]]:
    """Hold a regular file open: its descriptor and its size in bytes.

    Raises:
        UnsafeContent: not a regular file, or a link that leads out.
        FormatError: there is no such file.
    """
    fd = open_file(root_fd, relative, root=root, variable=variable)
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise not_regular(root, relative, variable)
        yield fd, status.st_size
    finally:
        os.close(fd)


def read_small(root_fd: int, relative: str, *, root: str, limit: int, variable: str | None = None) -> bytes:
    """Read a whole small file.

    Raises:
        FormatError: it is larger than `limit` bytes, or none of a checkpoint's files.
    """
    with opened_file(root_fd, relative, root=root, variable=variable) as (fd, size):
        if size > limit:
            raise FormatError(
                "the file is too large to be what its name says",
                path=os.path.join(root, relative),
                variable=variable,
                found=f"{size} bytes",
                expected=f"at most {limit}",
            )
        return os.pread(fd, size, 0)


def not_regular(root: str, relative: str, variable: str | None) -> UnsafeContent:
    """Return the error for a pipe, device or directory where a file belongs."""
    return UnsafeContent("not a regular file", path=os.path.join(root, relative), variable=variable)


def _leads_out(root: str, relative: str, variable: str | None) -> UnsafeContent:
    return UnsafeContent(
        "a symbolic link leads out of the checkpoint",
        path=os.path.join(root, relative),
        variable=variable,
        hint="put a copy of the file in its place if it belongs here",
    )


def _cannot_open(error: OSError, root: str, relative: str, variable: str | None) -> Exception:
    path = os.path.join(root, relative)
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        return FormatError(
            "the file is missing",
            path=path,
            variable=variable,
            hint="restore it from a copy; after a change on purpose, run `varstore seal`",
        )
    if error.errno in (errno.ENXIO, errno.ENODEV):
        return not_regular(root, relative, variable)
    return storage_error(error, path, "the file cannot be opened")
