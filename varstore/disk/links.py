"""Give a file a second name, or, where file systems part, a copy made in the kernel."""

from __future__ import annotations

import errno
import os
import stat

from varstore.disk.beneath import not_regular, open_file, opened_file
from varstore.disk.outfile import CREATE
from varstore.errors import SizeMismatch

__all__ = ["copy", "link", "link_beside"]

_CANNOT_LINK = {errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP, errno.EACCES, errno.ENOSYS}
_COPY_STEP = 1 << 20


def link(
    source: str, target: str, *, root_fd: int, root: str, dir_fd: int, nbytes: int, variable: str, fsync: bool
) -> bool:
    """Make `target` (relative to `dir_fd`) the same file as `source` (relative to `root_fd`); False if it cannot be.

    Raises:
        SizeMismatch: the source is not of the size that its checkpoint promised.
        UnsafeContent: the source is a link that leads out, or no regular file.
    """
    fd = open_file(root_fd, source, root=root, variable=variable)
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise not_regular(root, source, variable)
        _check_size(status.st_size, nbytes, source, root, variable)
        if not _named_again(source, target, root_fd, dir_fd):
            return False
        if not os.path.samestat(os.stat(target, dir_fd=dir_fd, follow_symlinks=False), status):
            os.unlink(target, dir_fd=dir_fd)  # a second name of a symbolic link, not of the file
            return False
        if fsync:
            os.fsync(fd)
        return True
    finally:
        os.close(fd)


def link_beside(source: str, target: str, *, root_fd: int, dir_fd: int, nbytes: int) -> bool:
    """Link a file of a folder whose other file `link` has opened; False if it is not there, or not of this size."""
    if not _named_again(source, target, root_fd, dir_fd):
        return False
    status = os.stat(target, dir_fd=dir_fd, follow_symlinks=False)
    if stat.S_ISREG(status.st_mode) and status.st_size == nbytes:
        return True
    os.unlink(target, dir_fd=dir_fd)
    return False


def _named_again(source: str, target: str, root_fd: int, dir_fd: int) -> bool:
    try:
        os.link(source, target, src_dir_fd=root_fd, dst_dir_fd=dir_fd, follow_symlinks=False)
    except FileNotFoundError:
        return False
    except OSError as error:
        if error.errno not in _CANNOT_LINK:
            raise
        return False
    return True


def copy(
    source: str, target: str, *, root_fd: int, root: str, dir_fd: int, nbytes: int, variable: str, fsync: bool
) -> None:
    """Make `target` a file of the same bytes as `source`; parameters and errors are those of `link`."""
    with opened_file(root_fd, source, root=root, variable=variable) as (opened, size):
        _check_size(size, nbytes, source, root, variable)
        fd = os.open(target, CREATE, 0o444, dir_fd=dir_fd)
        try:
            done = 0
            while done < size:
                done += _copy_range(opened, fd, size - done, done)
            if fsync:
                os.fsync(fd)
        finally:
            os.close(fd)


def _check_size(size: int, nbytes: int, source: str, root: str, variable: str) -> None:
    if size != nbytes:
        raise SizeMismatch(
            "the file is not as long as its checkpoint says",
            path=os.path.join(root, source),
            variable=variable,
            found=f"{size} bytes",
            expected=f"{nbytes} bytes",
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
