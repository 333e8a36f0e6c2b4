"""What not every system has: each call has its fallback here, or tells its caller to do without.

Linux is what saving is made for, and macOS and other POSIX systems do what they can: each call is looked for when it
is used, so importing never fails. Where a call raises OSError, `is_missing` says whether that means "not here" rather
than "no". Windows does not have descriptors of directories, which hold a save together: it reads, but cannot save.
No other module names what only some systems have.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import importlib
import mmap
import os
import struct
import sys
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

from varstore.errors import StorageError


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:  # Windows
        return None


fcntl = _module("fcntl")

__all__ = [
    "CAN_SAVE",
    "HAS_FOLDERS",
    "LOCK",
    "NEW",
    "READ",
    "READ_FILE",
    "READ_FOLDER",
    "READ_ONLY",
    "READ_WITHOUT_WAITING",
    "READ_FOLDER_ITSELF",
    "address_space",
    "at_fork",
    "change_mode",
    "cannot_save",
    "close_folder",
    "SHARED_FILE_SYSTEMS",
    "copy_range",
    "create",
    "create_each",
    "entries_in",
    "exchange",
    "file_system_type",
    "flock",
    "folder_in",
    "fresh_status",
    "host_name",
    "is_missing",
    "map_file",
    "names_in",
    "open_fd",
    "open_folder",
    "open_shared",
    "openat2_beneath",
    "physical_memory",
    "pread",
    "preadv",
    "preallocate",
    "process_start",
    "processors",
    "pwrite",
    "statvfs",
    "sync",
    "sync_file_system",
    "sync_names",
    "sync_path",
    "syncs_whole",
    "turn_direct",
    "write_all",
    "write_file",
    "user",
]

_CLOEXEC = getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
_NONBLOCK = getattr(os, "O_NONBLOCK", 0)
_DIRECTORY = getattr(os, "O_DIRECTORY", 0)
_NOFOLLOW = getattr(os, "O_NOFOLLOW", 0)

READ = os.O_RDONLY | _CLOEXEC
"""To open a file, following links."""
READ_WITHOUT_WAITING = READ | _NONBLOCK
"""To open what may be a pipe, which it then does not wait for, following links."""
READ_FILE = READ | _NONBLOCK | _NOFOLLOW
"""To open what may be a pipe or a link, which it then does not wait for or follow."""
READ_FOLDER = READ | _DIRECTORY
"""To open a folder."""
READ_FOLDER_ITSELF = READ_FOLDER | _NOFOLLOW
"""To open a folder, but not what a link in its place leads to."""
NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | _CLOEXEC
"""To create a file that does not exist."""
_SHARED = os.O_RDWR | os.O_CREAT | _CLOEXEC

HAS_FOLDERS = _DIRECTORY != 0 and os.open in os.supports_dir_fd
"""Whether a folder can be opened, and then the files in it; not so on Windows, where each is opened by its path."""
at_fork: Callable[..., None] = getattr(os, "register_at_fork", lambda **_: None)
"""Registers what is called around each fork; nothing where there are no forks."""
processors: Callable[[int], Collection[int]] = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))
"""The processors that a process may use; 0 is this process."""

flock: Any = getattr(fcntl, "flock", None)
LOCK: int = getattr(fcntl, "LOCK_EX", 0) | getattr(fcntl, "LOCK_NB", 0)
"""For `flock`: locks an open file for as long as it is open, or raises BlockingIOError where somebody holds it."""

CAN_SAVE = HAS_FOLDERS and flock is not None
"""Whether directories can be opened and locked, which is what holds a save together."""

READ_ONLY: int = getattr(os, "ST_RDONLY", 0)
"""The flag in what `statvfs` returns of a file system that cannot be written to."""

_NO_FOLDER = -1

SHARED_FILE_SYSTEMS = frozenset(
    {
        0x65735546,  # FUSE, and virtiofs
        0x6969,  # NFS
        0xFF534D42,  # CIFS
        0xFE534D42,  # SMB 2 and 3
        0x517B,  # SMB 1
        0x01021997,  # 9p
        0x00C36400,  # Ceph
        0x5346414F,  # AFS
        0x0BD00BD0,  # Lustre
        0x47504653,  # GPFS
        0x19830326,  # BeeGFS
        0x786F4256,  # shared folders of VirtualBox
    }
)
"""Types of file systems that other machines, or other mounts, may change without this one seeing it at once."""

_IS_LINUX = sys.platform == "linux"
_libc: Any = ctypes.CDLL(None, use_errno=True) if os.name == "posix" else None

_ATTEMPTS = 3
_RENAME_EXCHANGE = 2
_PROT_READ = 1  # on every POSIX system
_MAP_SHARED = 1
_SYS_OPENAT2 = 437  # the same number on every architecture
_RESOLVE_NO_XDEV = 0x01
_RESOLVE_NO_MAGICLINKS = 0x02
_RESOLVE_NO_SYMLINKS = 0x04
_RESOLVE_BENEATH = 0x08
_SYNCED_BY_FILE = {0x65735546, 0x01021997, 0x517B, 0xFE534D42, 0xFF534D42}
"""File systems (FUSE, 9p, SMB) whose server never hears of syncfs; it hears of fsync."""
_COPY_STEP = 1 << 20
_AT_EMPTY_PATH = 0x1000
_STATX_FORCE_SYNC = 0x2000
_STATX_BASIC = 0x7FF
_STATX_SIZE = 256
_STATX = struct.Struct("=28xH2xQQ64xqI")  # mode, number, size, and the time of the last change, of a struct statx
_STATFS_LONGS = 64  # more than a struct statfs holds on any architecture
_ENDED = {"Z", "X"}
_STAT_SIZE = 4096
_START_FIELD = 18
"""Of what follows the state in /proc/PID/stat."""
_CANNOT_COPY = {errno.EXDEV, errno.EPERM, errno.EINVAL, errno.EOPNOTSUPP, errno.EACCES, errno.ENOSYS}
_MISSING = {errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EPERM}


class _OpenHow(ctypes.Structure):
    _fields_ = (("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64))


_RESOLVE = _RESOLVE_BENEATH | _RESOLVE_NO_MAGICLINKS
_FILE_BENEATH = ctypes.byref(_OpenHow(READ | _NONBLOCK, 0, _RESOLVE))
_FOLDER_BENEATH = ctypes.byref(_OpenHow(getattr(os, "O_PATH", 0) | READ_FOLDER, 0, _RESOLVE))
_OWN = _RESOLVE_BENEATH | _RESOLVE_NO_SYMLINKS
_NEW_FILE = ctypes.byref(_OpenHow(NEW, 0o444, _OWN))
_SHARED_FILE = ctypes.byref(_OpenHow(_SHARED, 0o600, _OWN))
_OWN_FOLDER = ctypes.byref(_OpenHow(READ_FOLDER, 0, _OWN))
_OWN_FOLDER_HERE = ctypes.byref(_OpenHow(READ_FOLDER, 0, _OWN | _RESOLVE_NO_XDEV))
_OPENAT2, _HOW_SIZE = (_SYS_OPENAT2,), (ctypes.sizeof(_OpenHow),)
_PATHS = sys.getfilesystemencoding(), sys.getfilesystemencodeerrors()
_errors = iter(ctypes.get_errno, None)
"""Gives the error of the last call of the C library at each step, and never ends."""


def is_missing(error: OSError) -> bool:
    """Tell whether the error means that the kernel, sandbox or file system does not have the call."""
    return error.errno in _MISSING


def cannot_save(path: str, doing: str) -> StorageError:
    """Return the error for what needs `CAN_SAVE`."""
    return StorageError(
        f"{doing} needs a POSIX system: this one cannot open and lock directories",
        path=path,
        number=errno.ENOSYS,
        hint="do it on Linux or macOS, or write a file of another system with varstore.write",
    )


def _see_folder(path: str) -> int:
    os.scandir(path).close()
    return _NO_FOLDER


def open_fd(path: str, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
    """Open a file as `os.open` does, in one step: Ctrl-C comes before it, or when the descriptor has a name."""
    (fd,) = map(partial(os.open, dir_fd=dir_fd), (path,), (flags,), (mode,))
    return fd


open_folder: Callable[[str], int] = partial(os.open, flags=READ_FOLDER) if HAS_FOLDERS else _see_folder
"""Opens a folder; where folders do not have descriptors, only sees that it is there and can be read."""
close_folder: Callable[[int], None] = os.close if HAS_FOLDERS else lambda _: None
"""Closes what `open_folder` opened."""


def openat2_beneath(path: str, dir_fd: int, *, folder: bool = False) -> int:
    """Open a file or folder for reading below a directory, following no link that leads out of it (openat2).

    Raises:
        OSError: EXDEV where the path would leave the directory.
    """
    return _openat2(path, dir_fd, _FOLDER_BENEATH if folder else _FILE_BENEATH)


def _openat2(path: str, dir_fd: int, how: Any) -> int:
    """Open a file as `_called` calls: every small file of a save is opened here, so what is constant is made once."""
    if not _IS_LINUX:
        raise _missing(path)
    call: Callable[..., int] = _libc.syscall
    calls = map(call, _OPENAT2, (dir_fd,), (path.encode(*_PATHS),), (how,), _HOW_SIZE)
    ((fd, number),) = zip(calls, _errors, strict=False)  # as in `_called`; from here to the caller nothing is called
    if fd < 0:
        raise OSError(number, os.strerror(number), path)
    return fd


def create(path: str, dir_fd: int) -> int:
    """Create a file that nobody writes to later, for writing; no part of its path may be a link.

    Raises:
        OSError: FileExistsError if there is one, ELOOP for a link on the way to it.
    """
    try:
        return _openat2(path, dir_fd, _NEW_FILE)
    except OSError as error:
        if not is_missing(error):
            raise
    return open_fd(path, NEW, 0o444, dir_fd=dir_fd)


def create_each(paths: Iterable[str], dir_fd: int, *, private: bool) -> Iterator[int]:
    """Return an iterator that creates a file in each step, as `create` does, and gives its descriptor.

    In a folder that is `private`, to which only this user has access, nobody else can plant a link, so it is enough not
    to follow one in the last part of a path. Ctrl-C comes before a step of a ``for`` loop, or when the descriptor has a
    name.
    """
    if private:
        return map(partial(os.open, flags=NEW | _NOFOLLOW, mode=0o444, dir_fd=dir_fd), paths)
    return map(partial(create, dir_fd=dir_fd), paths)


def open_shared(path: str, dir_fd: int, *, private: bool) -> int:
    """Open a file that other processes write to as well, or create it; `private` is as for `create_each`.

    Only this user may open it, until it is complete and gets its mode.
    """
    if not private:
        try:
            return _openat2(path, dir_fd, _SHARED_FILE)
        except OSError as error:
            if not is_missing(error):
                raise
    return open_fd(path, _SHARED | _NOFOLLOW, 0o600, dir_fd=dir_fd)


def write_file(path: str, data: bytes, dir_fd: int, *, durable: bool) -> None:
    """Create a file of these bytes, and make it durable if asked; raises what `create` does."""
    fd = create(path, dir_fd)
    try:
        if data:
            write_all(fd, data)
        if durable:
            sync(fd)
    finally:
        os.close(fd)


def write_all(fd: int, data: bytes | memoryview, offset: int = 0) -> None:
    """Write all these bytes at their place, in as many calls as it takes: one may write fewer than it was given."""
    done = pwrite(fd, data, offset)
    while done < len(data):
        count = pwrite(fd, memoryview(data)[done:], offset + done)
        if count == 0:
            raise OSError(errno.EIO, "the disk takes no more bytes, and does not say why")
        done += count


def folder_in(path: str, dir_fd: int, *, same_mount: bool = False) -> int:
    """Open a folder in another one; no part of its path may be a link and, with `same_mount`, none another mount.

    Raises:
        OSError: NotADirectoryError or ELOOP for a link, EXDEV for a mount.
    """
    if "/" not in path and path != os.pardir and not same_mount:  # has no part but the last, which is not followed
        return open_fd(path, READ_FOLDER_ITSELF, dir_fd=dir_fd)
    try:
        return _openat2(path, dir_fd, _OWN_FOLDER_HERE if same_mount else _OWN_FOLDER)
    except OSError as error:
        if not is_missing(error):
            raise
    fd = open_fd(path, READ_FOLDER_ITSELF, dir_fd=dir_fd)
    if same_mount and os.fstat(fd).st_dev != os.fstat(dir_fd).st_dev:
        os.close(fd)
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), path)
    return fd


def names_in(fd: int) -> list[str]:
    """Return the names in an open folder as they are now.

    A descriptor may show what there was when it was opened, as on btrfs, or each name only once, as on sshfs. So the
    folder is opened again for each list of its names; one that was opened just for that can be listed directly.
    """
    listed = open_fd(os.curdir, READ_FOLDER, dir_fd=fd)
    try:
        return os.listdir(listed)
    finally:
        os.close(listed)


def entries_in(fd: int) -> list[tuple[str, bool]]:
    """Return the names in an open folder as they are now, each with whether it is a folder; see `names_in`."""
    listed = open_fd(os.curdir, READ_FOLDER, dir_fd=fd)
    try:
        with os.scandir(listed) as entries:
            return [(entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries]
    finally:
        os.close(listed)


def exchange(first: str, second: str, dir_fd: int) -> None:
    """Swap what two names in a directory stand for, in one step.

    Linux: renameat2 with RENAME_EXCHANGE; macOS: renameatx_np with RENAME_SWAP.
    """
    call = getattr(_libc, "renameat2", None) or getattr(_libc, "renameatx_np", None)
    if call is None:
        raise _missing(first)
    _called(second, call, dir_fd, os.fsencode(first), dir_fd, os.fsencode(second), _RENAME_EXCHANGE)


def _sync_drive(fd: int) -> None:
    try:
        fcntl.fcntl(fd, _SYNC_DRIVE)
    except OSError:  # not every file system has it
        os.fsync(fd)


_SYNC_DRIVE: int = getattr(fcntl, "F_FULLFSYNC", 0)
sync = _sync_drive if _SYNC_DRIVE else os.fsync
"""Makes an open file or folder durable; on macOS with F_FULLFSYNC, since fsync stops at the drive's cache there."""


def sync_path(path: str, *, folder: bool = False, dir_fd: int | None = None) -> None:
    """Make a file durable or, of a folder, the names in it."""
    fd = open_fd(path, READ_FOLDER_ITSELF if folder else READ_FILE, dir_fd=dir_fd)
    try:
        (sync_names if folder else sync)(fd)
    finally:
        os.close(fd)


def sync_names(fd: int) -> None:
    """Make the names in an open folder durable, where the file system can."""
    try:
        sync(fd)
    except OSError as error:
        if not is_missing(error):
            raise


def turn_direct(fd: int, *, on: bool) -> None:
    """Write past the page cache from now on, or through it again (O_DIRECT)."""
    direct = getattr(os, "O_DIRECT", 0)
    if on and not direct:
        raise _missing(None)
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    fcntl.fcntl(fd, fcntl.F_SETFL, flags | direct if on else flags & ~direct)


def copy_range(source: int, target: int, count: int, offset: int) -> int:
    """Copy bytes to the same place of another file, in the kernel where it can; return how many were copied."""
    if hasattr(os, "copy_file_range"):
        try:
            copied: int = os.copy_file_range(source, target, count, offset, offset)  # type: ignore[attr-defined, unused-ignore]
            return copied
        except OSError as error:
            if error.errno not in _CANNOT_COPY:
                raise
    return pwrite(target, pread(source, min(count, _COPY_STEP), offset), offset)


def _pread(fd: int, count: int, offset: int) -> bytes:
    os.lseek(fd, offset, os.SEEK_SET)
    return os.read(fd, count)


def _preadv(fd: int, buffers: Sequence[memoryview | bytearray], offset: int) -> int:
    done = 0
    for buffer in buffers:
        part = pread(fd, min(len(buffer), _COPY_STEP), offset + done)
        buffer[: len(part)] = part
        done += len(part)
        if len(part) < len(buffer):
            break
    return done


pread: Callable[[int, int, int], bytes] = getattr(os, "pread", _pread)
"""Reads from an offset of a file. Where it moves the file's position, a descriptor is for one thread at a time."""
preadv: Callable[[int, Sequence[memoryview | bytearray], int], int] = getattr(os, "preadv", _preadv)
"""Reads from an offset of a file into memory, perhaps less than there is room for; returns how many bytes."""
pwrite: Callable[[int, bytes | memoryview, int], int] = getattr(os, "pwrite", None)  # type: ignore[assignment]
"""Writes at an offset of a file, perhaps less than was given; for saving only."""
statvfs: Callable[[str], Any] = getattr(os, "statvfs", None)  # type: ignore[assignment]
"""Tells what is free in the file system of a path; for saving only."""
user: Callable[[], int] = getattr(os, "geteuid", None)  # type: ignore[assignment]
"""Returns the user that this process acts as; for saving only."""
_system: Callable[[], Any] = getattr(os, "uname", None)  # type: ignore[assignment]
change_mode: Callable[[int, int], None] = getattr(os, "fchmod", None)  # type: ignore[assignment]
"""Sets the mode of an open file or folder; for saving only."""


def map_file(fd: int, nbytes: int) -> memoryview:
    """Map the start of a file read-only, until nobody uses it any more (mmap).

    Python's own mmap keeps a descriptor for each file, of which a process has but a thousand; this keeps none.
    """
    if _libc is None:
        return memoryview(mmap.mmap(fd, nbytes, access=mmap.ACCESS_READ))
    map_memory, unmap = _libc.mmap, _libc.munmap
    map_memory.restype = ctypes.c_void_p
    map_memory.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
    unmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
    address = map_memory(None, nbytes, _PROT_READ, _MAP_SHARED, fd, 0)
    if address == ctypes.c_void_p(-1).value:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    memory = (ctypes.c_ubyte * nbytes).from_address(address)
    weakref.finalize(memory, unmap, address, nbytes).atexit = False  # arrays may be used until the very end
    return memoryview(memory).toreadonly()


def preallocate(fd: int, nbytes: int) -> None:
    """Reserve space for a file of this size, without the C library's slow imitation (fallocate)."""
    if not hasattr(_libc, "fallocate"):
        raise _missing(None)
    for _ in range(_ATTEMPTS):
        with contextlib.suppress(InterruptedError):  # some file systems give up, and undo it, for any signal
            _called(None, _libc.fallocate, fd, 0, ctypes.c_int64(0), ctypes.c_int64(nbytes))
            return
    raise _missing(None)


def syncs_whole(fd: int) -> bool:
    """Tell whether the file system of this descriptor can be made durable in one call that reaches the store."""
    return hasattr(_libc, "syncfs") and file_system_type(fd) not in _SYNCED_BY_FILE


def sync_file_system(fd: int) -> None:
    """Make all that was written to the file system of this descriptor durable (syncfs).

    Raises:
        OSError: `is_missing`, also where the call succeeds and does not reach the store.
    """
    if not syncs_whole(fd):
        raise _missing(None)
    _called(None, _libc.syncfs, fd)


def physical_memory() -> int:
    """Return the bytes of memory that the machine has, or the most that there could be where it cannot be asked."""
    names: Any = getattr(os, "sysconf_names", ())
    if "SC_PHYS_PAGES" not in names:
        return sys.maxsize
    ask: Callable[[str], int] = os.sysconf  # type: ignore[attr-defined, unused-ignore]
    return ask("SC_PHYS_PAGES") * ask("SC_PAGE_SIZE")


def address_space() -> int | None:
    """Return how many bytes of addresses the process may use (RLIMIT_AS), None without a limit."""
    resource = _module("resource")
    if resource is None:
        return None
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    return None if limit == resource.RLIM_INFINITY else int(limit)


def fresh_status(fd: int) -> os.stat_result:
    """Return what an open file is now, on a shared file system as its server says it (Linux: statx with a flag).

    There, only its mode, number, size and the time of its last change are known.
    """
    buffer = ctypes.create_string_buffer(_STATX_SIZE)
    if _IS_LINUX and hasattr(_libc, "statx"):
        with contextlib.suppress(OSError):
            _called(None, _libc.statx, fd, b"", _AT_EMPTY_PATH | _STATX_FORCE_SYNC, _STATX_BASIC, buffer)
            mode, number, size, seconds, nanoseconds = _STATX.unpack_from(buffer)
            changed = seconds * 10**9 + nanoseconds
            return os.stat_result((mode, number, 0, 0, 0, 0, size, 0, seconds, 0), {"st_mtime_ns": changed})
    return os.fstat(fd)


def host_name() -> str:
    """Return the name of this machine, "" where it has none; for saving only."""
    return str(_system().nodename)


def process_start(process: str = "") -> str:
    """Return when a process began, as the system counts, "" if there is none by this number, "?" if it cannot be told.

    One that has ended and waits for its parent to hear of it is none. Default: this process. Linux: /proc.
    """
    process = process or str(os.getpid())
    if not process.isdecimal():
        return ""
    try:
        with open(f"/proc/{process}/stat", "rb", buffering=0) as file:
            state, *fields = file.read(_STAT_SIZE).rpartition(b")")[2].decode().split()
        return "" if state in _ENDED else fields[_START_FIELD]
    except FileNotFoundError:
        if os.path.exists("/proc/self/stat"):
            return ""
    except (OSError, ValueError, IndexError):
        return "?"
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return ""
    except (OSError, OverflowError):
        return "?"
    return "?"


def file_system_type(place: str | int) -> int:
    """Return the magic number of the file system of a path or descriptor, 0 where it cannot be told (Linux: statfs)."""
    if not _IS_LINUX or not hasattr(_libc, "statfs"):
        return 0
    status = (ctypes.c_long * _STATFS_LONGS)()  # its first member is the type
    if isinstance(place, int):
        result = _libc.fstatfs(place, status)
    else:
        result = _libc.statfs(os.fsencode(place), status)
    if result < 0:
        return 0
    return int(status[0]) & 0xFFFFFFFF


def _missing(path: str | None) -> OSError:
    return OSError(errno.ENOSYS, os.strerror(errno.ENOSYS), path)


def _called(path: str | None, function: Callable[..., int], *arguments: Any) -> int:
    """Return the result of a function of the C library, or raise its error.

    Result and error are taken in one step of the interpreter, so that Ctrl-C does not lose a descriptor, and a signal
    handler that saves does not change the error.
    """
    calls = zip(map(function, *[(argument,) for argument in arguments]), _errors, strict=False)
    ((result, number),) = calls
    if result < 0:
        raise OSError(number, os.strerror(number), path)
    return result
