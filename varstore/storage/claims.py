"""Whose a temporary file or folder is, and whether its writer still lives.

Everything that is written gets its name last, and lies under a temporary name until then. Three facts decide who may
remove it later:

- It belongs to the user who made it, and nobody else removes it or gives it another name, since whoever may write to a
  directory can plant there what looks like a leftover.
- Its writer holds a lock on it, which the kernel frees however the process ends. On a local file system, whoever can
  take the lock of a leftover knows that nobody writes to it.
- On a shared file system a lock is often known to one mount only, and says nothing about writers on others. So a save
  signs its folder: a note in it, ``.saving-RANDOM``, names the machine, its boot, and the process. A process of this
  machine can be looked for. What tells machines apart is their name, their id, and the addresses of their network
  hardware: copies of a virtual machine share the first two. A container does not see the last, so it can tell only of
  processes of the same boot. A leftover of another machine, or one that nobody signed, may be removed when nothing in
  it has changed for a day, by the clock of the file system.

The note is the first file in the folder and goes when the marker is there, just before the folder gets its name. So a
folder without a note is empty (nothing but an empty folder is then removed), or complete (it is left alone for a
day, as its writer may be about to rename it), or its marker is gone (it is being removed).
"""

from __future__ import annotations

import binascii
import contextlib
import errno
import functools
import os
import stat
from collections.abc import Iterable
from functools import partial
from typing import NamedTuple

from varstore.layout.names import MARKER
from varstore.layout.staged import NOTE, SAVING, is_staging_name
from varstore.storage import syscalls

__all__ = [
    "claim",
    "claim_new",
    "host",
    "is_named",
    "is_ours",
    "lock",
    "mode_of_new_folder",
    "notes_in",
    "require_gone",
    "sign",
]

_NO_LOCKS = {errno.EBADF, errno.EINVAL, errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}
_SIGNATURE = "writer"
_NOTE_LIMIT = 1 << 26
_DAY = 86400 * 10**9
_CARDS = "/sys/class/net"


class Writer(NamedTuple):
    """A process that writes: on which machine, since which boot of it, among which processes, and since when."""

    host: str
    machine: str
    boot: str
    space: str
    process: str
    began: str

    def __str__(self) -> str:
        return f"process {self.process} on {self.host}"

    @property
    def is_gone(self) -> bool:
        """Whether it is known that it does not run any more; only one of this machine can be looked for."""
        host, machine, boot, space = _this_machine()
        if (self.host, self.machine) != (host, machine):
            return False
        if self.boot != boot:
            return bool(machine and boot and self.boot)  # nothing outlives a boot, if it is the same machine
        return self.space == space and syscalls.process_start(self.process) not in (self.began, "?")


@functools.lru_cache(maxsize=1)
def _this_machine() -> tuple[str, str, str, str]:
    """Return all of a `Writer` that is the same for each process that this one forks."""
    machine, boot = (_text_of(path) for path in ("/etc/machine-id", "/proc/sys/kernel/random/boot_id"))
    addresses = _hardware()
    known = machine and addresses and "".join((machine, *addresses)).encode()
    machine = f"{binascii.crc32(known):08x}" if known else ""  # the id itself is not for others
    space = ""
    with contextlib.suppress(OSError):
        space = os.readlink("/proc/self/ns/pid")
    return syscalls.host_name().replace("/", "-"), machine, boot, space


def host() -> str:
    """Return what two processes have in common if, and only if, one kernel runs both; a container has its host's."""
    name, _, boot, _ = _this_machine()
    return boot or name


syscalls.at_fork(after_in_child=_this_machine.cache_clear)  # a child may be in another namespace


def _hardware() -> list[str]:
    """Return the addresses of the network hardware: copies of one machine have the same name and id, but not these.

    A container does not have any of its own, as a rule.
    """
    try:
        cards = [card.path for card in os.scandir(_CARDS) if os.path.exists(f"{card.path}/device")]
    except OSError:
        return []
    return sorted(_text_of(f"{card}/address") for card in cards)


def _text_of(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read().strip().replace("/", "-")
    except OSError:
        return ""


def sign(fd: int, more: Iterable[str] = ()) -> str:
    """Note in an open folder that this process writes to it, and other lines; return the name of the note."""
    name = SAVING + os.urandom(4).hex()
    text = "\n".join((_signature(os.getpid()), *more))
    with open(name, "xb", opener=partial(os.open, mode=0o444, dir_fd=fd)) as file:
        file.write(text.encode("utf-8", "surrogateescape"))
    return name


@functools.lru_cache(maxsize=1)
def _signature(process: int) -> str:
    """Return the line that says who this process is; a child's is another one."""
    return "/".join((_SIGNATURE, *Writer(*_this_machine(), str(process), syscalls.process_start())))


syscalls.at_fork(after_in_child=_signature.cache_clear)


def notes_in(fd: int) -> dict[str, list[str]]:
    """Return the lines of each note in an open folder: who writes to it, and what was added to that."""
    return {name: _lines_of(name, fd) for name in syscalls.names_in(fd) if NOTE.fullmatch(name)}


def _lines_of(name: str, dir_fd: int) -> list[str]:
    fd = syscalls.open_fd(name, syscalls.READ_FILE, dir_fd=dir_fd)
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            return []
        lines = syscalls.pread(fd, min(status.st_size, _NOTE_LIMIT), 0).decode("utf-8", "surrogateescape").split("\n")
        return lines if status.st_size <= _NOTE_LIMIT else lines[:-1]  # the last one is cut
    finally:
        os.close(fd)


def _writer_of(fd: int) -> Writer | None:
    """Return who signed an open file or folder, None where nobody did."""
    if not stat.S_ISDIR(os.fstat(fd).st_mode):
        return None
    for lines in notes_in(fd).values():
        for line in lines:
            signature, *parts = line.split("/")
            if signature == _SIGNATURE and len(parts) == len(Writer._fields):
                return Writer(*parts)
    return None


def claim(name: str, dir_fd: int, *, folder: bool = True, signed: bool = True) -> int:
    """Open what a writer left behind and lock it; it is ours for as long as the descriptor is open.

    Without `signed`, it is something that no writer signs, and the lock alone says whether it may be touched.

    Raises:
        BlockingIOError: its writer lives, or may live; the error's text says who it is.
        FileNotFoundError: it was removed or replaced meanwhile.
        PermissionError: it belongs to another user, whom the error's text names.
        OSError: it is a link or another mount.
    """
    fd = (
        syscalls.folder_in(name, dir_fd, same_mount=True)
        if folder
        else syscalls.open_fd(name, syscalls.READ_FILE, dir_fd=dir_fd)
    )
    try:
        status = os.fstat(fd)
        if not is_ours(status, dir_fd):
            raise PermissionError(errno.EPERM, f"user {status.st_uid}", name)
        if signed:
            require_gone(fd, name, dir_fd)
        else:
            syscalls.flock(fd, syscalls.LOCK)
        if not is_named(fd, name, dir_fd):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name)
    except BaseException:
        os.close(fd)
        raise
    return fd


def require_gone(fd: int, name: str, dir_fd: int) -> None:
    """Lock an open file or folder that a writer left behind, and see that this writer does not live.

    Raises:
        BlockingIOError: it lives, or may live; the error's text says who it is.
    """
    is_known_by_lock = syscalls.file_system_type(fd) not in syscalls.SHARED_FILE_SYSTEMS
    try:
        syscalls.flock(fd, syscalls.LOCK)
    except BlockingIOError:
        raise _living(_writer_of(fd), name) from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        is_known_by_lock = False
    if is_known_by_lock:
        return
    writer = _writer_of(fd)
    is_gone = writer.is_gone if writer else is_staging_name(name) and _is_being_removed(fd)
    if not is_gone and _is_younger(fd, _new_file(dir_fd).st_mtime_ns - _DAY):
        raise _living(writer, name)


def _living(writer: Writer | None, name: str) -> BlockingIOError:
    return BlockingIOError(errno.EAGAIN, str(writer or "a process that is not known"), name)


def _is_being_removed(fd: int) -> bool:
    """Tell whether a staging folder that nobody signed has lost its marker, and is not one that was just made.

    A note that says nothing has yet to be written. A list that was made while the marker came and the note went may
    have neither; the next one has the marker.
    """
    if not stat.S_ISDIR(os.fstat(fd).st_mode):
        return False
    for _ in range(2):
        names = syscalls.names_in(fd)
        if not names or MARKER in names or any(map(NOTE.fullmatch, names)):
            return False
    return True


def _is_younger(fd: int, time_ns: int) -> bool:
    """Tell whether an open file or folder, or anything in it, has changed since a time of the file system's clock."""
    if syscalls.fresh_status(fd).st_mtime_ns > time_ns:
        return True
    if not stat.S_ISDIR(os.fstat(fd).st_mode):
        return False
    return any(_is_younger_below(name, fd, time_ns, folder=folder) for name, folder in syscalls.entries_in(fd))


def _is_younger_below(name: str, dir_fd: int, time_ns: int, *, folder: bool) -> bool:
    try:
        if not folder:
            return os.stat(name, dir_fd=dir_fd, follow_symlinks=False).st_mtime_ns > time_ns
        fd = syscalls.folder_in(name, dir_fd)
    except FileNotFoundError:  # it has just gone
        return True
    try:
        return _is_younger(fd, time_ns)
    finally:
        os.close(fd)


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
    try:
        return _new_file(dir_fd).st_uid
    except OSError:
        return -1


def _new_file(dir_fd: int) -> os.stat_result:
    """Return what the system says of a file that was just made in a directory, and is gone again."""
    name = f".new.{os.urandom(4).hex()}.tmp"
    fd = syscalls.create(name, dir_fd)
    try:
        syscalls.write_all(fd, b"now")  # so that the server sets its time
        return os.fstat(fd)
    finally:
        os.close(fd)
        os.unlink(name, dir_fd=dir_fd)


def mode_of_new_folder(dir_fd: int) -> int:
    """Return the mode that a new folder gets here, by the umask and the directory's defaults."""
    name = f".mode.{os.urandom(4).hex()}.tmp"
    os.mkdir(name, dir_fd=dir_fd)
    try:
        return os.stat(name, dir_fd=dir_fd, follow_symlinks=False).st_mode & 0o7777
    finally:
        os.rmdir(name, dir_fd=dir_fd)
