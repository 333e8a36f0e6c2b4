"""The Linux calls that Python's `os` lacks; where the kernel or file system has none, the caller is told.

Each raises OSError as `os` would; `is_missing` says whether that means "not here" rather than "no".
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import sys
import weakref

__all__ = ["exchange", "is_missing", "map_file", "openat2_beneath", "preallocate", "sync_file_system"]

_IS_LINUX = sys.platform == "linux"
_libc = ctypes.CDLL(None, use_errno=True)
_mmap = ctypes.CDLL(None, use_errno=True).mmap
_mmap.restype = ctypes.c_void_p
_mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
_munmap = ctypes.CDLL(None).munmap
_munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)

_ATTEMPTS = 3
_RENAME_EXCHANGE = 2
_AT_FDCWD = -100
_SYS_OPENAT2 = 437  # the same number on every architecture
_RESOLVE_NO_MAGICLINKS = 0x02
_RESOLVE_BENEATH = 0x08
_MISSING = {errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EPERM}


class _OpenHow(ctypes.Structure):
    _fields_ = (("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64))


_RESOLVE = _RESOLVE_BENEATH | _RESOLVE_NO_MAGICLINKS
_FILE_BENEATH = ctypes.byref(_OpenHow(os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC, 0, _RESOLVE))
_FOLDER_BENEATH = ctypes.byref(_OpenHow(getattr(os, "O_PATH", 0) | os.O_DIRECTORY | os.O_CLOEXEC, 0, _RESOLVE))
_OPEN_HOW_SIZE = ctypes.sizeof(_OpenHow)


def is_missing(error: OSError) -> bool:
    """Tell whether the error means that the kernel, sandbox or file system does not have the call."""
    return error.errno in _MISSING


def openat2_beneath(path: str, dir_fd: int, *, folder: bool = False) -> int:
    """Open a file or folder for reading below a directory, following no link that leads out of it (openat2).

    Raises:
        OSError: EXDEV where the path would leave the directory.
    """
    if not _IS_LINUX:
        raise _missing(path)
    how = _FOLDER_BENEATH if folder else _FILE_BENEATH
    return _checked(_libc.syscall(_SYS_OPENAT2, dir_fd, os.fsencode(path), how, _OPEN_HOW_SIZE), path)


def exchange(first: str, second: str) -> None:
    """Swap what two paths name, in one step (renameat2 with RENAME_EXCHANGE)."""
    if not hasattr(_libc, "renameat2"):
        raise _missing(first)
    _checked(_libc.renameat2(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE), second)


def map_file(fd: int, nbytes: int) -> memoryview:
    """Map the start of a file read-only, until nobody uses it any more (mmap).

    Python's own mmap keeps a descriptor for each file, of which a process has but a thousand; this keeps none.
    """
    address = _mmap(None, nbytes, mmap.PROT_READ, mmap.MAP_SHARED, fd, 0)
    if address == ctypes.c_void_p(-1).value:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    memory = (ctypes.c_ubyte * nbytes).from_address(address)
    weakref.finalize(memory, _munmap, address, nbytes).atexit = False  # arrays may be used until the very end
    return memoryview(memory).toreadonly()


def preallocate(fd: int, nbytes: int) -> None:
    """Reserve space for a file of this size, without the C library's slow imitation (fallocate)."""
    if not hasattr(_libc, "fallocate"):
        raise _missing(None)
    for _ in range(_ATTEMPTS):
        with contextlib.suppress(InterruptedError):  # some file systems give up, and undo it, for any signal
            _checked(_libc.fallocate(fd, 0, ctypes.c_int64(0), ctypes.c_int64(nbytes)), None)
            return
    raise _missing(None)


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
