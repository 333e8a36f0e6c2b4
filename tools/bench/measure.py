"""Time candidates against each other: in turn, each in a fresh place, several rounds, medians.

No file is deleted before the end, large ones are truncated instead, outside the clock: for minutes after files were
deleted, ext4 looks at each of their inodes before it gives a new one, which makes the making of files several times
slower. Wait as long after a run before the next one.
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
"""Bytes of free memory that are left alone, for whatever else the machine does."""
TOLD_AFTER = 2.5
"""Seconds of free memory until a virtual machine's host knows, and some."""
_LONG_ENOUGH = 0.05
_REPEATS = 9


class Place:
    """A folder on the disk to be measured that hands out fresh paths."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._count = 0
        self._passing: list[str] = []

    def fresh(self, *, keep: bool = False) -> str:
        """Return a path that does not exist; what is written there loses its space in `settle`, unless kept."""
        self._count += 1
        path = os.path.join(self.path, f"{self._count:04d}")
        if not keep:
            self._passing.append(path)
        return path

    def settle(self) -> None:
        """Give large files' space back to the disk, but not their inodes, and let it finish what it has to write."""
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
    """Make a folder on the disk to be measured, and delete it with all that is in it at the end."""
    path = os.path.abspath(tempfile.mkdtemp(prefix="varstore-bench-", dir=directory))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def alternate(candidates: dict[str, Callable[[], float | None]], rounds: int) -> dict[str, list[float]]:
    """Measure each candidate once per round, in another order each round: some profit from what the one before freed.

    A candidate returns what it measured, or None to be left out.
    """
    values: dict[str, list[float]] = {name: [] for name in candidates}
    names = list(candidates)
    shuffled = random.Random(0)
    for round_ in range(rounds):
        names = names[::-1] if round_ % 2 else shuffled.sample(names, len(names))
        for name in names:
            if name not in values:
                continue
            value = candidates[name]()
            if value is None:
                del values[name]
            else:
                values[name].append(value)
    return values


def seconds(prepare: Callable[[], Prepared], *, repeats: bool) -> float:
    """Return the seconds that what `prepare` returns takes.

    What takes no time is repeated and its median returned, if that is allowed: a single call of a millisecond says
    more about the machine's moment than about the candidate.
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
    """Use this much of free memory once and give it back, so that whoever runs next finds it ready.

    A virtual machine gets memory from its host at first use, and tells it of what has been free for two seconds. A
    page then costs up to twenty times as much, and which candidate pays is chance. What has become free before is
    told while this is held; what is given back at the end is safe for two seconds.

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
    """Drop files from the page cache: all of it where that is allowed, else these files."""
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
    """Return the path of every file in a folder, or of the file itself."""
    if os.path.isfile(path):
        return [path]
    return [os.path.join(folder, file) for folder, _, names in os.walk(path) for file in names]


@contextlib.contextmanager
def peak_memory() -> Iterator[list[int]]:
    """Measure by how many bytes the block raises the process's largest resident size; for a fresh process."""
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
    """Return the bytes that read calls fetched meanwhile; what is mapped and touched does not show in it."""
    before = _read_so_far()
    read()
    return float(_read_so_far() - before)


def _read_so_far() -> int:
    with open("/proc/self/io") as counters:
        return next(int(line.split()[1]) for line in counters if line.startswith("rchar:"))


def whole_process(cache: str, *arguments: str) -> float:
    """Return the seconds that a fresh Python takes from start to exit.

    Bytecode is kept in the folder `cache`, wherever modules lie and whatever the caller's environment says of it: a
    process that compiles what it imports measures the compiler. So the first run of a command is for filling it.
    """
    environment = {**os.environ, "PYTHONPYCACHEPREFIX": cache}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    start = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL, env=environment)
    return time.perf_counter() - start
