"""Whose a temporary file or folder is, and whether its writer still lives.

Everything that is written gets its name last, and lies under a temporary name until then. Two facts decide who may
remove it later. It belongs to the user who made it, and nobody else removes it or gives it another name, since
whoever may write to a directory can plant there what looks like a leftover. And its writer holds a lock on it, which
the kernel frees however the process ends: whoever can take the lock of a leftover knows that nobody writes to it.
"""

from __future__ import annotations

import errno
import os

from varstore.storage import syscalls

__all__ = ["claim", "claim_new", "is_named", "is_ours", "lock", "mode_of_new_folder"]

_NO_LOCKS = {errno.EBADF, errno.EINVAL, errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}


def claim(name: str, dir_fd: int, *, folder: bool = True) -> int:
    """Open what a writer left behind and lock it; it is ours for as long as the descriptor is open.

    Raises:
        BlockingIOError: its writer lives.
        FileNotFoundError: it was removed or replaced meanwhile.
        PermissionError: it belongs to another user.
        OSError: it is a link or another mount, or the file system does not have locks.
    """
    fd = (
        syscalls.folder_in(name, dir_fd, same_mount=True)
        if folder
        else syscalls.open_fd(name, syscalls.READ_FILE, dir_fd=dir_fd)
    )
    try:
        if not is_ours(os.fstat(fd), dir_fd):
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM), name)
        syscalls.flock(fd, syscalls.LOCK)
        if not is_named(fd, name, dir_fd):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name)
    except BaseException:
        os.close(fd)
        raise
    return fd


def claim_new(fd: int, name: str, dir_fd: int) -> os.stat_result:
    """Lock what was just made and opened, and see that it is what has this name; return its owner, mode and the rest.

    On a file system without locks, it is not locked.

    Raises:
        BlockingIOError, FileNotFoundError: a cleaner was faster; make another one.
        PermissionError: somebody else's lies there.
    """
    lock(fd)
    status = os.fstat(fd)
    if not os.path.samestat(status, os.stat(name, dir_fd=dir_fd, follow_symlinks=False)):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name)
    if not is_ours(status, dir_fd):
        raise PermissionError(errno.EPERM, "another user put something in its place", name)
    return status


def lock(fd: int) -> None:
    """Lock an open file or folder for as long as it is open, where the file system has locks.

    Raises:
        BlockingIOError: somebody else holds the lock.
    """
    try:
        syscalls.flock(fd, syscalls.LOCK)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise


def is_named(fd: int, name: str, dir_fd: int) -> bool:
    """Tell whether a name in a directory stands for this open file or folder."""
    try:
        return os.path.samestat(os.fstat(fd), os.stat(name, dir_fd=dir_fd, follow_symlinks=False))
    except FileNotFoundError:
        return False


def is_ours(status: os.stat_result, dir_fd: int) -> bool:
    """Tell whether a file in a directory belongs to this user.

    Some file systems say that all files belong to one user (vfat), or that root's are nobody's (NFS): what a new
    file's owner is there decides.
    """
    return status.st_uid == syscalls.user() or status.st_uid == _owner_of_new(dir_fd)


def _owner_of_new(dir_fd: int) -> int:
    """Return whom a new file in a directory belongs to, -1 where none can be made."""
    name = f".owner.{os.urandom(4).hex()}.tmp"
    try:
        fd = syscalls.create(name, dir_fd)
    except OSError:
        return -1
    try:
        os.unlink(name, dir_fd=dir_fd)
        return os.fstat(fd).st_uid
    finally:
        os.close(fd)


def mode_of_new_folder(dir_fd: int) -> int:
    """Return the mode that a new folder gets here, by the umask and the directory's defaults."""
    name = f".mode.{os.urandom(4).hex()}.tmp"
    os.mkdir(name, dir_fd=dir_fd)
    try:
        return os.stat(name, dir_fd=dir_fd, follow_symlinks=False).st_mode & 0o7777
    finally:
        os.rmdir(name, dir_fd=dir_fd)
