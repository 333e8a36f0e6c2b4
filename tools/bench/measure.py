"""Time candidates against each other: in turn, each at a new path, in several rounds, as medians; one of seconds once.

No file is deleted before the end; large ones are truncated instead, outside the measured time. For minutes after files
are deleted, ext4 examines each of their inodes before it allocates a new one, which makes creating files several times
slower. For the same reason, wait some minutes between two runs.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

Prepared = Callable[[], Any]
_LARGE = 1 << 20
_SPARE = 512 << 20
"""The number of bytes of free memory that are not used, for other processes."""
TOLD_AFTER = 2.5
"""The seconds after which the host of a virtual machine knows that memory is free, with a margin."""
_LONG_ENOUGH = 0.05
_REPEATS = 9
_ONCE = 4.0
"""Seconds; what takes longer is measured in one round only, since chance is a small part of it."""


class Place:
    """A folder on the measured disk that provides new paths."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._count = 0
        self._passing: list[str] = []

    def fresh(self, *, keep: bool = False) -> str:
        """Return a path that does not exist; `settle` frees the space of files written there, unless `keep` is set."""
        self._count += 1
        path = os.path.join(self.path, f"{self._count:04d}")
        if not keep:
            self._passing.append(path)
        return path

    def settle(self) -> None:
        """Free the space of large files, but not their inodes, and wait until everything is on disk."""
        for path in self._passing:
            for file in files_of(path):
                status = os.stat(file)
                if status.st_size >= _LARGE and status.st_nlink == 1:
                    os.chmod(file, 0o644)
                    os.truncate(file, 0)
        self._passing.clear()
        os.sync()


@contextlib.contextmanager
def temporary_folder(directory: str | None) -> Iterator[str]:
    """Create a folder on the measured disk, and delete it with its contents at the end."""
    path = os.path.abspath(tempfile.mkdtemp(prefix="varstore-bench-", dir=directory))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def alternate(candidates: dict[str, Callable[[], float | None]], rounds: int) -> dict[str, list[float]]:
    """Measure each candidate once per round, in a different order each time, because they influence each other.

    A candidate returns the measured value, or None to be left out.
    """
    values: dict[str, list[float]] = {name: [] for name in candidates}
    names = list(candidates)
    shuffled = random.Random(0)
    for round_ in range(rounds):
        names = names[::-1] if round_ % 2 else shuffled.sample(names, len(names))
        for name in names:
            if name not in values or max(values[name], default=0) > _ONCE:
                continue
            value = candidates[name]()
            if value is None:
                del values[name]
            else:
                values[name].append(value)
    return values


def seconds(prepare: Callable[[], Prepared], *, repeats: bool) -> float:
    """Return the seconds that the function returned by `prepare` takes.

    With `repeats`, a short call is repeated and the median returned, because a single call of a millisecond depends
    more on the state of the machine than on the candidate.
    """
    found: list[float] = []
    while not found or (repeats and sum(found) < _LONG_ENOUGH and len(found) < _REPEATS):
        timed = prepare()
        start = time.perf_counter()
        kept = timed()
        found.append(time.perf_counter() - start)
        del kept
    return statistics.median(found)


def ready_memory(nbytes: int) -> None:
    """Use this amount of free memory once and free it, so that it is ready for the next candidate.

    A virtual machine gets memory from its host on first use, and returns memory that has been free for two seconds. A
    page then costs up to twenty times as much, and it is a matter of chance which candidate pays for it. Memory that
    was free before is returned while this function waits; the memory that it frees is ready for two seconds.

    Source of the two seconds: Linux, mm/page_reporting.c.
    """
    size = max(_LARGE, min(nbytes, _free_memory() - _SPARE))
    held = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):
        held.madvise(mmap.MADV_HUGEPAGE)
    np.frombuffer(held, np.uint8)[:: mmap.PAGESIZE] = 1
    time.sleep(TOLD_AFTER)
    held.close()


def _free_memory() -> int:
    with open("/proc/meminfo") as facts:
        return next(int(line.split()[1]) for line in facts if line.startswith("MemFree:")) * 1024


def forget(path: str) -> None:
    """Drop the page cache, or only these files from it if the process may not drop all of it."""
    os.sync()
    with contextlib.suppress(OSError):
        with open("/proc/sys/vm/drop_caches", "w") as switch:
            switch.write("1")
        return
    for file in files_of(path):
        fd = os.open(file, os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def files_of(path: str) -> list[str]:
    """Return the path of every file in a folder, or the path itself if it is a file."""
    if os.path.isfile(path):
        return [path]
    return [os.path.join(folder, file) for folder, _, names in os.walk(path) for file in names]


@contextlib.contextmanager
def peak_memory() -> Iterator[list[int]]:
    """Measure by how many bytes the block increases the peak resident size of a new process."""
    grown = [0]
    with open("/proc/self/clear_refs", "w") as switch:
        switch.write("5")
    before = _resident()
    yield grown
    grown[0] = _peak() - before


def _resident() -> int:
    with open("/proc/self/statm") as status:
        return int(status.read().split()[1]) * resource.getpagesize()


def _peak() -> int:
    with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def bytes_read(read: Callable[[], object]) -> float:
    """Return the number of bytes that read calls returned during a call; memory maps are not counted."""
    before = _read_so_far()
    read()
    return float(_read_so_far() - before)


def _read_so_far() -> int:
    with open("/proc/self/io") as counters:
        return next(int(line.split()[1]) for line in counters if line.startswith("rchar:"))


def whole_process(cache: str, *arguments: str) -> float:
    """Return the seconds that a new Python process takes from start to exit.

    Bytecode is cached in the folder `cache`, for all modules and whatever the environment says, because a process that
    compiles its imports would measure the compiler. So the first run of a command only fills the cache.
    """
    environment = {**os.environ, "PYTHONPYCACHEPREFIX": cache}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    start = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL, env=environment)
    return time.perf_counter() - start
