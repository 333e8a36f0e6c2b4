"""Give a file a second name, or, where file systems part, a copy made in the kernel."""

from __future__ import annotations

import errno
import os

from varstore.disk.beneath import opened_file
from varstore.disk.outfile import CREATE
from varstore.errors import SizeMismatch

__all__ = ["link_or_copy"]

_CANNOT_LINK = {errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP, errno.EACCES, errno.ENOSYS}
_COPY_STEP = 1 << 20


def link_or_copy(
    source: str, target: str, *, root_fd: int, root: str, dir_fd: int, nbytes: int, variable: str, fsync: bool
) -> None:
    """Make `target`, relative to `dir_fd`, the same file as `source`, relative to `root_fd`.

    Raises:
        SizeMismatch: the source is not of the size that its checkpoint promised.
        UnsafeContent: the source is a link that leads out, or no regular file.
    """
    with opened_file(root_fd, source, root=root, variable=variable) as (fd, size):
        if size != nbytes:
            raise SizeMismatch(
                "the file is not as long as its checkpoint says",
                path=os.path.join(root, source),
                variable=variable,
                found=f"{size} bytes",
                expected=f"{nbytes} bytes",
                hint="verify that checkpoint",
            )
        if not _link(source, target, root_fd, dir_fd, fd):
            _copy(fd, size, target, dir_fd, fsync=fsync)
        elif fsync:
            os.fsync(fd)


def _link(source: str, target: str, root_fd: int, dir_fd: int, opened: int) -> bool:
    try:
        os.link(source, target, src_dir_fd=root_fd, dst_dir_fd=dir_fd, follow_symlinks=False)
    except OSError as error:
        if error.errno not in _CANNOT_LINK:
            raise
        return False
    if os.path.samestat(os.stat(target, dir_fd=dir_fd, follow_symlinks=False), os.fstat(opened)):
        return True
    os.unlink(target, dir_fd=dir_fd)  # a second name of a symbolic link, not of the file
    return False


def _copy(source: int, size: int, target: str, dir_fd: int, *, fsync: bool) -> None:
    fd = os.open(target, CREATE, 0o444, dir_fd=dir_fd)
    try:
        done = 0
        while done < size:
            done += _copy_range(source, fd, size - done, done)
        if fsync:
            os.fsync(fd)
    finally:
        os.close(fd)


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
