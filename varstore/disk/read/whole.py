"""Read whole variables into memory: many at once, in parallel, every byte checked on the way."""

from __future__ import annotations

import itertools
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np

from varstore.disk.blocks import SMALL, read_block, spans
from varstore.disk.read.batches import batches, read_batch
from varstore.disk.read.checks import check_digest, check_readable, check_size
from varstore.disk.threads import Job, Lane, in_lanes, run, thread_count
from varstore.layout.manifest import BLOCK, Entry
from varstore.storage.beneath import open_root, opened_file
from varstore.storage.failures import translated

__all__ = ["read_into", "read_new", "read_values"]

Advance = Callable[[int], None] | None

_QUICK = 100e-6
"""Seconds per small file; of calls that take longer, the disk or a server does most."""


def read_new(
    root: str, entries: Sequence[Entry], *, verify: bool, threads: int | None, advance: Advance = None
) -> list[np.ndarray]:
    """Read variables into new arrays of their stored type; small ones that are read together share a buffer.

    With `verify`, the values are compared with their digests. The entries must be readable.

    Raises:
        FormatError: a file is missing, of another size, damaged, or not a file at all.
    """
    new = _NewArrays(entries)
    _read(root, entries, new, verify=verify, threads=threads, advance=advance)
    return new.arrays


def read_into(
    root: str,
    wanted: Sequence[tuple[Entry, np.ndarray]],
    *,
    verify: bool,
    threads: int | None,
    advance: Advance = None,
) -> None:
    """Fill rows of bytes, each of the size of its entry, with the variables' values.

    Raises:
        FormatError: as for `read_new`; rows may have been filled before.
    """
    entries = [entry for entry, _ in wanted]
    rows = _Rows([row for _, row in wanted])
    _read(root, entries, rows, verify=verify, threads=threads, advance=advance)


def read_values(root: str, entry: Entry, dtype: np.dtype[Any]) -> np.ndarray:
    """Read one variable into a new array of its type."""
    check_readable(root, entry)
    (values,) = read_new(root, [entry], verify=True, threads=None)
    return values if values.dtype == dtype else values.astype(dtype)


class _Destination(ABC):
    """Where values go: a row of bytes to fill for a large variable, the place in a buffer for a small one."""

    @abstractmethod
    def row(self, index: int) -> np.ndarray:
        """Return the memory of a large variable."""

    @abstractmethod
    def take(self, indices: list[int], buffer: np.ndarray, starts: list[int]) -> None:
        """Take small variables from where they were read to."""


class _NewArrays(_Destination):
    def __init__(self, entries: Sequence[Entry]) -> None:
        self._entries = entries
        self.arrays: list[np.ndarray] = [_NOTHING] * len(entries)

    def row(self, index: int) -> np.ndarray:
        entry = self._entries[index]
        assert entry.meta is not None
        array = self.arrays[index] = np.empty(entry.meta.shape, entry.stored_dtype)
        return array.reshape(-1).view(np.uint8)

    def take(self, indices: list[int], buffer: np.ndarray, starts: list[int]) -> None:
        for index, start in zip(indices, starts, strict=True):
            entry = self._entries[index]
            assert entry.meta is not None
            self.arrays[index] = np.ndarray(entry.meta.shape, entry.stored_dtype, buffer, start)


_NOTHING = np.empty(0)


class _Rows(_Destination):
    def __init__(self, rows: Sequence[np.ndarray]) -> None:
        self._rows = rows

    def row(self, index: int) -> np.ndarray:
        return self._rows[index]

    def take(self, indices: list[int], buffer: np.ndarray, starts: list[int]) -> None:
        for index, start in zip(indices, starts, strict=True):
            row = self._rows[index]
            row[...] = buffer[start : start + row.nbytes]


def _read(
    root: str,
    entries: Sequence[Entry],
    destination: _Destination,
    *,
    verify: bool,
    threads: int | None,
    advance: Advance,
) -> None:
    small = [index for index, entry in enumerate(entries) if entry.nbytes < SMALL]
    groups = [small[part.start : part.stop] for part in batches([entries[index] for index in small])]
    with translated(root, "reading failed"), open_root(root) as root_fd:
        work = _Work(root_fd, root, entries, destination, verify, advance)
        run(work.jobs(groups), thread_count(threads))


class _Work:
    """The jobs of one reading."""

    def __init__(
        self,
        root_fd: int,
        root: str,
        entries: Sequence[Entry],
        destination: _Destination,
        verify: bool,
        advance: Advance,
    ) -> None:
        self._root_fd = root_fd
        self._root = root
        self._entries = entries
        self._destination = destination
        self._verify = verify
        self._advance = advance

    def jobs(self, groups: list[list[int]]) -> Iterator[Job]:
        """Return the jobs of large variables, then those of small ones, a batch at a time."""
        return in_lanes(itertools.chain(self._lanes(), self._small_jobs(groups)))

    def _small_jobs(self, groups: list[list[int]]) -> Iterator[Job]:
        """Read batches here while that is quick, and yield them where threads would help: they wait for the disk.

        Threads that make quick calls wait for the interpreter longer than they save.
        """
        calls_are_slow = False
        for group in groups:
            if calls_are_slow:
                yield partial(self._read_batch, group)
                continue
            start = time.perf_counter()
            self._read_batch(group)
            calls_are_slow = time.perf_counter() - start > _QUICK * len(group)

    def _lanes(self) -> Iterator[Lane]:
        for index, entry in enumerate(self._entries):
            if entry.nbytes >= SMALL:
                yield Lane(spans(entry.nbytes), partial(self._read_block, entry, self._destination.row(index)))

    def _read_block(self, entry: Entry, row: np.ndarray, start: int, stop: int) -> None:
        target = row[start:stop]
        relative = f"{entry.folder}/out"
        with opened_file(self._root_fd, relative, root=self._root, variable=entry.name) as (fd, size):
            check_size(self._root, entry, size)
            digest = read_block(fd, target, start, hashed=self._verify and bool(entry.digests))
        if self._verify:
            check_digest(self._root, entry, start // BLOCK, digest)
        if self._advance:
            self._advance(target.nbytes)

    def _read_batch(self, indices: list[int]) -> None:
        batch = [self._entries[index] for index in indices]
        buffer, starts = read_batch(self._root_fd, self._root, batch, verify=self._verify)
        self._destination.take(indices, buffer, starts)
        if self._advance:
            self._advance(sum(entry.nbytes for entry in batch))
