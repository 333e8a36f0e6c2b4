"""Time candidates against each other: in turn, each in a fresh place, several rounds, medians.

No file is deleted before the end, and after each write the disk is left to finish outside the clock: for minutes
after files were deleted, ext4 looks at each of their inodes before it gives a new one, which makes the making of
files several times slower. Wait as long after a run before the next one.
"""

from __future__ import annotations

import contextlib
import os
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

Prepared = Callable[[], Any]
_LARGE = 1 << 20


@dataclass(kw_only=True)
class Timing:
    """Seconds of one candidate at one task, a figure a round."""

    seconds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        """The figure to quote."""
        return statistics.median(self.seconds)

    @property
    def spread(self) -> str:
        """The fastest and slowest round."""
        return f"{min(self.seconds):.3f}-{max(self.seconds):.3f}"


class Place:
    """A folder on the disk to be measured that hands out fresh paths and goes away with all at the end."""

    def __init__(self, directory: str | None) -> None:
        self.path = tempfile.mkdtemp(prefix="varstore-bench-", dir=directory)
        self._count = 0

    def fresh(self) -> str:
        """Return a path that does not exist."""
        self._count += 1
        return os.path.join(self.path, f"{self._count:04d}")

    def give_back(self, kept: Collection[str]) -> None:
        """Give large files' space back to the disk, but not their inodes."""
        for entry in list(os.scandir(self.path)):
            if entry.path not in kept:
                for file in files_of(entry.path):
                    if os.stat(file).st_size >= _LARGE:
                        os.chmod(file, 0o644)
                        os.truncate(file, 0)
        os.sync()

    def remove(self) -> None:
        """Delete everything."""
        shutil.rmtree(self.path, ignore_errors=True)


def alternate(
    candidates: dict[str, Callable[[], Prepared]],
    rounds: int,
    settle: Callable[[], None],
    log: Callable[[str], None],
) -> dict[str, Timing]:
    """Time each candidate once a round, in another order each round: some profit from what the one before freed.

    A candidate is a function that prepares, outside the clock, and returns what is timed. One that raises is
    left out by name.
    """
    timings: dict[str, Timing] = {name: Timing() for name in candidates}
    names = list(candidates)
    shuffled = random.Random(0)
    for round_ in range(rounds):
        names = names[::-1] if round_ % 2 else shuffled.sample(names, len(names))
        for name in names:
            if name not in timings:
                continue
            try:
                timed = candidates[name]()
                start = time.perf_counter()
                kept = timed()
                timings[name].seconds.append(time.perf_counter() - start)
                del kept
            except NotImplementedError:
                del timings[name]
            except Exception as error:
                log(f"left out: {name}: {type(error).__name__}: {error}")
                del timings[name]
            settle()
    return timings


def fill_memory(place: Place) -> None:
    """Fill free memory with page cache, from a file of nothing but holes.

    A virtual machine gets memory from its host page by page at first use, and gives free memory back: a write
    to the page cache then costs more than one to the disk, and which candidate pays is chance. Where memory is
    full, all take what has been used before.
    """
    with open("/proc/meminfo") as facts:
        free = next(int(line.split()[1]) for line in facts if line.startswith("MemFree:")) * 1024
    path = place.fresh()
    with open(path, "wb", buffering=0) as holes:
        holes.truncate(free)
    with open(path, "rb", buffering=0) as holes:
        block = bytearray(16 << 20)
        while holes.readinto(block):
            pass


def sync() -> None:
    """Let the disk finish what it has to write."""
    os.sync()


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


def whole_process(*arguments: str) -> float:
    """Return the seconds that a fresh Python takes from start to exit."""
    start = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start
