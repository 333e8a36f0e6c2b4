"""Give a file a second name, or, where file systems part, a copy made in the kernel."""

from __future__ import annotations

import errno
import os
import stat
from typing import NamedTuple

from varstore.disk.save.large_file import CREATE
from varstore.errors import SizeMismatch
from varstore.storage.beneath import not_regular, open_file, opened_file

__all__ = ["Origin", "copy", "link"]

_CANNOT_LINK = {errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP, errno.EACCES, errno.ENOSYS}
_COPY_STEP = 1 << 20


class Origin(NamedTuple):
    """A variable's file of `nbytes`, at `path` below the checkpoint `root`, of which `root_fd` is the descriptor."""

    root_fd: int
    root: str
    path: str
    nbytes: int
    variable: str


def link(origin: Origin, target: str, *, dir_fd: int, fsync: bool, content: bytes | None = None) -> bool:
    """Make `target`, relative to `dir_fd`, the same file, if that can be, and if it holds the `content` given.

    Raises:
        SizeMismatch: the file is not of the size that its checkpoint promised.
        UnsafeContent: it is a link that leads out, or no regular file.
        FormatError: there is no such file.
    """
    fd = open_file(origin.root_fd, origin.path, root=origin.root, variable=origin.variable)
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise not_regular(origin.root, origin.path, origin.variable)
        _check_size(status.st_size, origin)
        if content is not None and os.pread(fd, origin.nbytes, 0) != content:
            return False
        try:
            os.link(origin.path, target, src_dir_fd=origin.root_fd, dst_dir_fd=dir_fd, follow_symlinks=False)
        except OSError as error:
            if error.errno not in _CANNOT_LINK:
                raise
            return False
        if not os.path.samestat(os.stat(target, dir_fd=dir_fd, follow_symlinks=False), status):
            os.unlink(target, dir_fd=dir_fd)  # a second name of a symbolic link, not of the file
            return False
        if fsync:
            os.fsync(fd)
        return True
    finally:
        os.close(fd)


def copy(origin: Origin, target: str, *, dir_fd: int, fsync: bool) -> None:
    """Make `target`, relative to `dir_fd`, a file of the same bytes; raises what `link` does."""
    with opened_file(origin.root_fd, origin.path, root=origin.root, variable=origin.variable) as (source, size):
        _check_size(size, origin)
        fd = os.open(target, CREATE, 0o444, dir_fd=dir_fd)
        try:
            done = 0
            while done < size:
                done += _copy_range(source, fd, size - done, done)
            if fsync:
                os.fsync(fd)
        finally:
            os.close(fd)


def _check_size(size: int, origin: Origin) -> None:
    if size != origin.nbytes:
        raise SizeMismatch(
            "the file is not as long as its checkpoint says",
            path=os.path.join(origin.root, origin.path),
            variable=origin.variable,
            found=f"{size} bytes",
            expected=f"{origin.nbytes} bytes",
            hint="verify that checkpoint",
        )


def _copy_range(source: int, target: int, count: int, offset: int) -> int:
    try:
        copied = os.copy_file_range(source, target, count, offset, offset)
    except OSError as error:
        if error.errno not in _CANNOT_LINK | {errno.EINVAL}:
            raise
        copied = os.pwrite(target, os.pread(source, min(count, _COPY_STEP), offset), offset)
    if copied == 0:
        raise OSError(errno.EIO, "the file became shorter while it was copied")
    return copied
