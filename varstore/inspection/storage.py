"""Check what a file system can promise: probes in a folder that is gone again, and a table of classes.

A file system belongs to a class by its name in the table of mounts, unless a probe shows that it does not do what the
class promises. `PROMISES` says what varstore can promise on each class; the guide of `varstore.storage` shows the same
table, and ``python -m tools.storage`` tries it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from varstore.storage import syscalls
from varstore.storage.directory import is_shared
from varstore.storage.failures import no_directory, translated
from varstore.storage.removing import remove
from varstore.text.table import Shown, Table
from varstore.values.arguments import checked

__all__ = ["PROMISED", "PROMISES", "StorageReport", "check_storage"]

PROMISED = ("whole or absent", "two writers", "durable", "links", "readers elsewhere")
"""What is promised, or not: the columns of `PROMISES`."""

PROMISES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "local": ("yes", "one succeeds", "yes", "yes; copies on vfat and exFAT", "not shared"),
        "image layer": ("yes; replacing takes a moment", "one succeeds", "yes", "yes; copied up first", "not shared"),
        "read-only image": ("only read", "none can save", "only read", "only read", "yes"),
        "read-only mount": ("only read", "none can save", "only read", "only read", "old, new, or an error"),
        "NFS": ("yes", "one succeeds", "yes", "yes", "old, new, or an error"),
        "FUSE, pass-through or encrypted": ("yes", "one succeeds", "as its store is", "yes", "old, new, or an error"),
        "sshfs": ("yes; replacing takes a moment", "one succeeds", "as its server is", "yes", "old, new, or an error"),
        "FUSE that renames in parts": ("no", "not kept apart", "no", "copies", "mixtures are found, not prevented"),
        "other shared": ("as its rename is", "as its rename is", "as its fsync is", "if it has them", "not known"),
    }
)
"""By class. The last but one has object stores, and unions that keep a folder on several branches."""

_OBJECTS = (
    "rclone",
    "s3fs",
    "s3ql",
    "goofys",
    "geesefs",
    "gcsfuse",
    "blobfuse",
    "blobfuse2",
    "juicefs",
    "mountpoint-s3",
)
_IMAGES = frozenset({"squashfs", "erofs", "iso9660", "cramfs"})
_CLASSES: Mapping[str, str] = MappingProxyType(
    {
        **dict.fromkeys(_IMAGES, "read-only image"),
        **dict.fromkeys(("nfs", "nfs4"), "NFS"),
        "overlay": "image layer",
        "fuse.sshfs": "sshfs",
        **{f"fuse.{name}": "FUSE that renames in parts" for name in _OBJECTS},
        "fuseblk": "FUSE, pass-through or encrypted",
    }
)
_MERGES = "merges the two"
_ESCAPED = re.compile(r"\\(\d{3})")
_MOUNTS = "/proc/self/mountinfo"
_STEPS = 64


@dataclass(frozen=True, kw_only=True, slots=True, repr=False)
class StorageReport(Shown):
    """What a directory's file system is, what varstore promises on it, and what the probes found.

    `type` is its name in the table of mounts, "unknown" where there is none; `kind` is its class; `promises` says what
    varstore promises on that class, and `found` what each probe found.

    Example:
        >>> report = vs.check_storage(".")
        >>> sorted(report.promises)
        ['durable', 'links', 'readers elsewhere', 'two writers', 'whole or absent']
    """

    path: str
    type: str
    kind: str
    promises: Mapping[str, str]
    found: Mapping[str, str]

    @property
    def ok(self) -> bool:
        """Whether a save here is whole or absent."""
        return self.promises[PROMISED[0]].startswith("yes")

    def __bool__(self) -> bool:
        return self.ok

    def as_json(self) -> dict[str, Any]:
        """Return the report as an object that JSON can hold."""
        promises, found = dict(self.promises), dict(self.found)
        return {"path": self.path, "type": self.type, "class": self.kind, "promises": promises, "found": found}

    def table(self, most: int | None = None) -> Table:
        """Return a row per promise and per probe."""
        rows = [*self.promises.items(), *self.found.items()]
        notes = [] if self.ok or self.found.get("read-only") else [_ADVICE]
        return Table(title=f"{self.path}: {self.type}, {self.kind}", rows=rows[:most], notes=notes, form="  {:<28}{}")


_ADVICE = "save to a local disk, and copy the checkpoint here, the file 'snapshot_done' last"


@checked
def check_storage(directory: str | os.PathLike[str]) -> StorageReport:
    """Find out what varstore can promise on a directory's file system.

    The probes make files in a new folder in the directory, and remove it.

    Args:
        directory: one that exists.

    Raises:
        CheckpointNotFound: there is no such directory.
        StorageError: the operating system refuses a call that every file system supports.

    Example:
        >>> report = vs.check_storage(".")
        >>> report.found["rename onto a full folder"]
        'refused: ENOTEMPTY'
        >>> report.ok
        True
    """
    path = os.fspath(directory)
    if not os.path.isdir(path):
        raise no_directory(path)
    if not syscalls.CAN_SAVE:
        raise syscalls.cannot_save(path, "checking storage")
    kind = _type_of(path)
    with translated(path, "the probes failed"):
        found = {"free": _free(path)}
        if syscalls.statvfs(path).f_flag & syscalls.READ_ONLY:
            found["read-only"] = "yes"
        else:
            found |= _probed(path)
    known = _class_of(kind, path, found)
    return StorageReport(
        path=path,
        type=kind,
        kind=known,
        promises=MappingProxyType(dict(zip(PROMISED, PROMISES[known], strict=True))),
        found=MappingProxyType(found),
    )


def _class_of(kind: str, path: str, found: Mapping[str, str]) -> str:
    if "read-only" in found:
        return "read-only image" if kind in _IMAGES else "read-only mount"
    if found["rename onto a full folder"] == _MERGES:
        return "FUSE that renames in parts"
    if kind in _CLASSES:
        return _CLASSES[kind]
    if kind.startswith("fuse"):
        return "FUSE, pass-through or encrypted"
    return "other shared" if is_shared(path) else "local"


def _type_of(path: str) -> str:
    """Return the name of a path's file system in the table of mounts (Linux)."""
    real, best, name = os.path.realpath(path), "", "unknown"
    with contextlib.suppress(OSError), open(_MOUNTS, encoding="utf-8", errors="surrogateescape") as mounts:
        for line in mounts:
            before, _, after = line.partition(" - ")
            place = _ESCAPED.sub(lambda match: chr(int(match[1], 8)), before.split()[4])
            if len(place) >= len(best) and f"{real}/".startswith(f"{place.rstrip('/')}/"):
                best, name = place, after.split()[0]
    return name


def _free(path: str) -> str:
    status = syscalls.statvfs(path)
    if not status.f_blocks or not status.f_bavail:
        return "not told"
    return f"{status.f_bavail * status.f_frsize:,} bytes, {status.f_favail or 'any number of'} files"


def _probed(path: str) -> Iterator[tuple[str, str]]:
    """Yield what each probe finds in a new folder, which is removed at the end."""
    name = f".check.{os.urandom(4).hex()}.tmp"
    directory = syscalls.open_fd(path, syscalls.READ_FOLDER)
    try:
        os.mkdir(name, 0o700, dir_fd=directory)
        try:
            fd = syscalls.folder_in(name, directory)
            try:
                syscalls.write_file("file", b"1", fd, durable=False)
                for what, probe in _PROBES.items():
                    yield what, probe(fd)
            finally:
                os.close(fd)
        finally:
            remove(name, directory)
    finally:
        os.close(directory)


def _told(error: OSError) -> str:
    return errno.errorcode.get(error.errno or 0, str(error.errno))


def _rename_onto(fd: int) -> str:
    for folder in ("old", "new"):
        os.mkdir(folder, dir_fd=fd)
        syscalls.write_file(f"{folder}/{folder}", b"1", fd, durable=False)
    try:
        os.rename("new", "old", src_dir_fd=fd, dst_dir_fd=fd)
    except OSError as error:
        return f"refused: {_told(error)}"
    folder_fd = syscalls.folder_in("old", fd)
    try:
        return _MERGES if len(syscalls.names_in(folder_fd)) > 1 else "replaces it"
    finally:
        os.close(folder_fd)


def _exchange(fd: int) -> str:
    for folder in ("one", "other"):
        os.mkdir(folder, dir_fd=fd)
    try:
        syscalls.exchange("one", "other", fd)
    except OSError as error:
        return f"no: {_told(error)}"
    return "yes"


def _link(fd: int) -> str:
    try:
        os.link("file", "linked", src_dir_fd=fd, dst_dir_fd=fd, follow_symlinks=False)
    except OSError as error:
        return f"no: {_told(error)}"
    first, second = (os.stat(name, dir_fd=fd, follow_symlinks=False) for name in ("file", "linked"))
    return "yes" if os.path.samestat(first, second) else "yes, shown as two files"


def _lock(fd: int) -> str:
    first, second = (syscalls.open_fd("file", syscalls.READ_FILE, dir_fd=fd) for _ in range(2))
    try:
        syscalls.flock(first, syscalls.LOCK)
        try:
            syscalls.flock(second, syscalls.LOCK)
        except BlockingIOError:
            shared = syscalls.file_system_type(fd) in syscalls.SHARED_FILE_SYSTEMS
            return "kept, perhaps by this mount only" if shared else "kept"
        return "not kept"
    except OSError as error:
        return f"no: {_told(error)}"
    finally:
        os.close(first)
        os.close(second)


def _sync(fd: int) -> str:
    file = syscalls.open_fd("file", syscalls.READ_FILE, dir_fd=fd)
    try:
        for opened, what in ((file, "files"), (fd, "folders")):
            try:
                syscalls.sync(opened)
            except OSError as error:
                return f"not of {what}: {_told(error)}"
    finally:
        os.close(file)
    return "yes"


def _time_step(fd: int) -> str:
    """Find the least difference between times of files, to a power of ten, and how far its clock is from this one."""
    times = []
    for number in range(_STEPS):
        name = f"time{number}"
        syscalls.write_file(name, b"1", fd, durable=False)
        times.append(os.stat(name, dir_fd=fd, follow_symlinks=False).st_mtime_ns)
    step = next((10**power for power in range(9, -1, -1) if all(at % 10**power == 0 for at in times)), 1)
    ahead = times[-1] / 1e9 - time.time()
    clock = "" if abs(ahead) < 1 + step / 1e9 else f"; its clock is {ahead:+.0f} s from this machine's"
    return f"{step:,} ns{clock}"


_PROBES: Mapping[str, Callable[[int], str]] = MappingProxyType(
    {
        "rename onto a full folder": _rename_onto,
        "exchange of two folders": _exchange,
        "hard links": _link,
        "locks": _lock,
        "fsync": _sync,
        "times in steps of": _time_step,
    }
)
