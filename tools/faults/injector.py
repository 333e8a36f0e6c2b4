"""Compile and load the injector, and define at which call it injects which fault.

Counting: ``injector.c`` intercepts all file system calls of its process and numbers those that are made while
`Plan.armed` is set. The n-th call is the same in every run, as long as one thread does the same work. So a run without
a fault determines the number of points, and one run per number covers them all.

Arming: the plan is in memory that parent and child share. The parent writes the number of the call. The child, which
is forked afterwards, installs the filter, sets `armed` just before the work and clears it just after, so that only
the work is counted. The result stays readable if the child is killed.
"""

from __future__ import annotations

import ctypes
import enum
import errno
import mmap
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from itertools import count, takewhile
from pathlib import Path
from typing import Final

from tools.faults.jobs import Unavailable

__all__ = ["COUNT", "FAULTS", "Action", "Fault", "Injector", "fault_named"]

_SOURCE: Final = Path(__file__).with_name("injector.c")
_MACHINES: Final = ("x86_64", "aarch64")
_LOGGED: Final = 4096
_WHERE: Final = 256
_SYNCED: Final = 512


class Action(enum.IntEnum):
    """The kinds of faults; the numbers are those in ``injector.c``."""

    COUNT = 0
    KILL = 1
    FAIL = 2
    SHORT = 3
    TORN = 4
    INTERRUPT = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    """A fault that is injected at one call."""

    name: str
    meaning: str
    action: Action
    error: int = 0
    calls: str = r"\w+"
    """A pattern of the calls at which it can occur."""

    @property
    def kills(self) -> bool:
        """Whether the fault ends the process."""
        return self.action in (Action.KILL, Action.TORN)

    @property
    def is_partial(self) -> bool:
        """Whether the fault can occur only at calls that transfer bytes."""
        return self.action in (Action.SHORT, Action.TORN)

    def can_occur_at(self, call: str) -> bool:
        """Return whether the fault can occur at the call of this name."""
        return re.fullmatch(self.calls, call) is not None


COUNT: Final = Fault(name="none", meaning="nothing", action=Action.COUNT)
_OPEN, _WRITE = "open|openat|openat2|creat", "write|pwrite64|writev|pwritev2?|copy_file_range|sendfile|splice"
_MAKE = "mkdir|mkdirat|link|linkat|symlink|symlinkat|mknodat|rename|renameat|renameat2"
_GROW = f"{_OPEN}|{_WRITE}|{_MAKE}|fallocate|truncate|ftruncate|close|f?setxattr"
_REMOVE = "unlink|unlinkat|rmdir"
_LOOK = "stat|lstat|newfstatat|statx|access|faccessat2?|readlink|readlinkat|statfs|chdir|l?getxattr|listxattr"
_CHANGE = f"{_MAKE}|{_REMOVE}|f?truncate|f?chmod|fchmodat|f?chown|fchownat|utimensat|f?setxattr"
_SYNC = "fsync|fdatasync|syncfs|sync_file_range"
_SLOW = f"{_OPEN}|{_WRITE}|{_SYNC}|read|pread64|readv|preadv2?|close|flock|fcntl|fallocate|f?truncate|f?statfs"
_ERRNOS: Final = {
    "EIO": r"\w+",
    "ESTALE": r"\w+",
    "ENOSPC": f"{_GROW}|{_SYNC}",
    "EDQUOT": f"{_GROW}|{_SYNC}",
    "EMFILE": _OPEN,
    "ENFILE": _OPEN,
    "ENOMEM": f"{_OPEN}|{_LOOK}|{_MAKE}|{_REMOVE}|getdents64|fstat",
    "EACCES": f"{_OPEN}|{_LOOK}|{_CHANGE}",
    "EPERM": f"{_OPEN}|{_CHANGE}|fallocate|flock",
    "EROFS": f"{_OPEN}|{_CHANGE}|{_SYNC}",
    "EINTR": _SLOW,
    "EBUSY": f"{_MAKE}|{_REMOVE}",
    "EMLINK": _MAKE,
    "EXDEV": "link|linkat|rename|renameat|renameat2|copy_file_range",
    "EFBIG": f"{_WRITE}|fallocate|f?truncate",
    "ENOLCK": "flock|fcntl",
    "EINVAL": f"renameat2|copy_file_range|fallocate|fadvise64|flock|{_SYNC}",
    "EOPNOTSUPP": "link|linkat|renameat2|copy_file_range|fallocate|fadvise64|flock|ioctl|f?[gs]etxattr",
    "ENOSYS": "renameat2|copy_file_range|fallocate|syncfs|sync_file_range|preadv2|pwritev2|flock",
}
"""Maps each errno to a pattern of the calls that can fail with it, by their manual pages."""
FAULTS: Final = (
    Fault(name="SIGKILL", meaning="the process is killed before the call", action=Action.KILL),
    Fault(name="torn", meaning="the call moves half of the bytes, and the process is killed", action=Action.TORN),
    Fault(name="SIGINT", meaning="Ctrl-C before the call", action=Action.INTERRUPT),
    Fault(name="short", meaning="the call moves half of the bytes", action=Action.SHORT),
    *(
        Fault(
            name=name,
            meaning=f"the call fails with {name}",
            action=Action.FAIL,
            error=getattr(errno, name),
            calls=calls,
        )
        for name, calls in _ERRNOS.items()
    ),
)


def fault_named(name: str) -> Fault:
    """Return the fault of this name.

    Raises:
        KeyError: there is no such fault.
    """
    return {fault.name: fault for fault in FAULTS}[name]


class Plan(ctypes.Structure):
    """The plan and its result; the fields are those of ``struct plan``."""

    _fields_ = (
        ("at", ctypes.c_int64),
        ("action", ctypes.c_int32),
        ("error", ctypes.c_int32),
        ("armed", ctypes.c_int32),
        ("hit", ctypes.c_int32),
        ("count", ctypes.c_int64),
        ("calls", ctypes.c_int16 * _LOGGED),
        ("where", ctypes.c_char * _WHERE),
        ("syncs", ctypes.c_int64),
        ("synced", ctypes.c_int64 * _SYNCED),
    )


class Injector:
    """The loaded injector; one per process, and one child at a time."""

    def __init__(self) -> None:
        self._library = _load()
        names = (self._library.faults_name(place) for place in count())
        self.names = [name.decode() for name in takewhile(lambda name: name is not None, names)]
        """The calls that are counted, in the order of the table."""
        self._plan = Plan.from_buffer(mmap.mmap(-1, ctypes.sizeof(Plan)))

    def plan(self, at: int, fault: Fault) -> None:
        """Reset the count, and plan a fault at a call, counted from 1; 0 means no fault."""
        ctypes.memset(ctypes.byref(self._plan), 0, ctypes.sizeof(Plan))
        self._plan.at, self._plan.action, self._plan.error = at, fault.action, fault.error

    def install(self) -> None:
        """Intercept the calls of this process until it ends.

        Raises:
            Unavailable: the kernel or a sandbox does not allow it.
        """
        if self._library.faults_install(ctypes.byref(self._plan)) != 0:
            raise Unavailable(f"no seccomp filter can be installed: {os.strerror(ctypes.get_errno())}")

    def arm(self) -> None:
        """Start counting."""
        self._plan.armed = 1

    def disarm(self) -> None:
        """Stop counting."""
        self._plan.armed = 0

    @property
    def calls(self) -> list[str]:
        """The names of the calls that were made, in order."""
        if self._plan.count > _LOGGED:
            raise OverflowError(f"{self._plan.count} calls were made, and {_LOGGED} can be told apart")
        return [self.names[place] for place in self._plan.calls[: self._plan.count]]

    @property
    def synced(self) -> frozenset[int]:
        """The inodes of the files and folders that were synced one by one."""
        if self._plan.syncs > _SYNCED:
            raise OverflowError(f"{self._plan.syncs} files were synced, and {_SYNCED} can be told apart")
        return frozenset(self._plan.synced[: self._plan.syncs])

    @property
    def hit(self) -> bool:
        """Whether the planned fault was injected."""
        return bool(self._plan.hit)

    @property
    def where(self) -> str:
        """The file of the call at which the fault was injected."""
        return os.fsdecode(self._plan.where)


def _load() -> ctypes.CDLL:
    if sys.platform != "linux" or platform.machine() not in _MACHINES:
        raise Unavailable(f"the injector is for Linux on {' or '.join(_MACHINES)}")
    compiler = shutil.which("cc")
    if compiler is None:
        raise Unavailable("there is no C compiler: cc is not installed")
    with tempfile.TemporaryDirectory(prefix="varstore-faults-") as folder:
        path = os.path.join(folder, "injector.so")
        command = [compiler, "-O2", "-Wall", "-Wextra", "-shared", "-fPIC", "-o", path, str(_SOURCE)]
        subprocess.run(command, check=True)
        library = ctypes.CDLL(path, use_errno=True)  # stays in memory when its file is gone
    library.faults_name.restype = ctypes.c_char_p
    return library
