"""The Linux calls that Python's `os` lacks; where the kernel or file system has none, the caller is told.

Each raises OSError as `os` would; `is_missing` says whether that means "not here" rather than "no".
"""

from __future__ import annotations

import ctypes
import errno
import os
import sys

__all__ = ["exchange", "is_missing", "openat2_beneath", "preallocate", "sync_file_system"]

_IS_LINUX = sys.platform == "linux"
_libc = ctypes.CDLL(None, use_errno=True)

_RENAME_EXCHANGE = 2
_AT_FDCWD = -100
_SYS_OPENAT2 = 437  # the same number on every architecture
_RESOLVE_NO_MAGICLINKS = 0x02
_RESOLVE_BENEATH = 0x08
_MISSING = {errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EPERM}


class _OpenHow(ctypes.Structure):
    _fields_ = (("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64))


_READ_BENEATH = ctypes.byref(
    _OpenHow(os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC, 0, _RESOLVE_BENEATH | _RESOLVE_NO_MAGICLINKS)
)
_OPEN_HOW_SIZE = ctypes.sizeof(_OpenHow)


def is_missing(error: OSError) -> bool:
    """Tell whether the error means that the kernel, sandbox or file system does not have the call."""
    return error.errno in _MISSING


def openat2_beneath(path: str, dir_fd: int) -> int:
    """Open for reading below a directory, following no link that leads out of it (openat2).

    Raises:
        OSError: EXDEV where the path would leave the directory.
    """
    if not _IS_LINUX:
        raise _missing(path)
    return _checked(_libc.syscall(_SYS_OPENAT2, dir_fd, os.fsencode(path), _READ_BENEATH, _OPEN_HOW_SIZE), path)


def exchange(first: str, second: str) -> None:
    """Swap what two paths name, in one step (renameat2 with RENAME_EXCHANGE)."""
    if not hasattr(_libc, "renameat2"):
        raise _missing(first)
    _checked(_libc.renameat2(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE), second)


def preallocate(fd: int, nbytes: int) -> None:
    """Reserve space for a file of this size, without the C library's slow imitation (fallocate)."""
    if not hasattr(_libc, "fallocate"):
        raise _missing(None)
    _checked(_libc.fallocate(fd, 0, ctypes.c_int64(0), ctypes.c_int64(nbytes)), None)


def sync_file_system(fd: int) -> None:
    """Make all that was written to the file system of this descriptor durable (syncfs)."""
    if not hasattr(_libc, "syncfs"):
        raise _missing(None)
    _checked(_libc.syncfs(fd), None)


def _missing(path: str | None) -> OSError:
    return OSError(errno.ENOSYS, os.strerror(errno.ENOSYS), path)


def _checked(result: int, path: str | None) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), path)
    return result
