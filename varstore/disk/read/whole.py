"""Read whole variables into memory: many at once, in parallel, every byte checked on the way."""

from __future__ import annotations

import itertools
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np

from varstore.disk.blocks import SMALL, spans
from varstore.disk.encodings.stored import Stored
from varstore.disk.encodings.table import read_part
from varstore.disk.read.batches import BATCH_FILES, batches, read_batch
from varstore.disk.read.checks import check_digest
from varstore.disk.read.regions import Piece, lanes_in_memory, pieces, read_piece, scattered
from varstore.disk.read.stored import stored_blocks
from varstore.disk.threads import SLOW, Job, Lane, do_here_until_slow, in_lanes, piece, run, thread_count
from varstore.errors import UsageError
from varstore.layout.location import Location
from varstore.layout.manifest import BLOCK
from varstore.layout.readable import Readable
from varstore.layout.regions import filled
from varstore.storage import syscalls
from varstore.storage.directory import Directory
from varstore.storage.failures import translated

__all__ = ["map_values", "read_into", "read_new", "read_values"]

Advance = Callable[[int], None] | None


def read_new(
    location: Location, variables: Sequence[Readable], *, verify: bool, threads: int | None, advance: Advance = None
) -> list[np.ndarray]:
    """Read variables of a checkpoint into new arrays; small ones that are read together share a buffer.

    With `verify`, the values are compared with their digests.

    Raises:
        FormatError: a file is missing, of another size, damaged, or not a file at all.
    """
    new = _NewArrays(variables)
    _read(location, variables, new, verify=verify, threads=threads, advance=advance)
    return new.arrays()


def read_into(
    location: Location,
    wanted: Sequence[tuple[Readable, np.ndarray]],
    *,
    verify: bool,
    threads: int | None,
    advance: Advance = None,
) -> None:
    """Fill rows of bytes with the variables' values as they are stored.

    Raises:
        FormatError: as for `read_new`; rows may have been filled before.
    """
    variables = [variable for variable, _ in wanted]
    rows = _Rows([row for _, row in wanted])
    _read(location, variables, rows, verify=verify, threads=threads, advance=advance)


def read_values(location: Location, variable: Readable) -> np.ndarray:
    """Read one variable into a new array."""
    (values,) = read_new(location, [variable], verify=True, threads=None)
    return values


def map_values(location: Location, variables: Sequence[Readable]) -> list[np.ndarray]:
    """Map variables read-only, unchecked; those whose file is not what lies in memory are read.

    Raises:
        UsageError: a variable is encoded, so that there is nothing to map.
        FormatError: a file is missing, of another size, or not a file at all.
    """
    with translated(location.path, "mapping failed"), Directory(location) as directory:
        return [_mapped(directory, variable) for variable in variables]


def _mapped(directory: Directory, variable: Readable) -> np.ndarray:
    if not variable.encoding.is_plain:
        raise UsageError(
            "an encoded variable cannot be mapped",
            path=directory.place(variable.entry.file),
            variable=variable.entry.name,
            found=f"encoding {variable.encoding.name!r}",
            expected="encoding 'raw'",
            hint="read it without mmap=True, or write raw values with varstore.unpack(source, target)",
        )
    if variable.stored != variable.dtype or variable.nbytes == 0:
        return read_values(directory.location, variable)
    with directory.out(variable.entry) as fd:
        mapped = syscalls.map_file(fd, variable.nbytes)
    return np.frombuffer(mapped, variable.dtype).reshape(variable.shape)


class _Destination(ABC):
    """Where values go: a row of bytes to fill for a large variable, the place in a buffer for a small one."""

    @abstractmethod
    def row(self, index: int) -> np.ndarray:
        """Return the memory of a large variable."""

    @abstractmethod
    def values(self, index: int) -> np.ndarray:
        """Return the values of a variable, once it was read: as they are stored, or as bytes."""

    @abstractmethod
    def take(self, indices: Sequence[int], buffer: np.ndarray, starts: list[int]) -> None:
        """Take small variables from where they were read to."""


class _NewArrays(_Destination):
    def __init__(self, variables: Sequence[Readable]) -> None:
        self._variables = variables
        self._arrays: list[np.ndarray] = [_NOTHING] * len(variables)

    def row(self, index: int) -> np.ndarray:
        variable = self._variables[index]
        array = self._arrays[index] = np.empty(variable.shape, variable.stored)
        return array.reshape(-1).view(np.uint8)

    def take(self, indices: Sequence[int], buffer: np.ndarray, starts: list[int]) -> None:
        for index, start in zip(indices, starts, strict=True):
            variable = self._variables[index]
            self._arrays[index] = np.ndarray(variable.shape, variable.stored, buffer, start)

    def values(self, index: int) -> np.ndarray:
        return self._arrays[index]

    def arrays(self) -> list[np.ndarray]:
        """Return the arrays, of the variables' own types."""
        for index, variable in enumerate(self._variables):
            if variable.stored is not variable.dtype:
                self._arrays[index] = self._arrays[index].astype(variable.dtype, copy=False)
        return self._arrays


_NOTHING = np.empty(0)


class _Rows(_Destination):
    def __init__(self, rows: Sequence[np.ndarray]) -> None:
        self._rows = rows

    def row(self, index: int) -> np.ndarray:
        return self._rows[index]

    def values(self, index: int) -> np.ndarray:
        return self._rows[index]

    def take(self, indices: Sequence[int], buffer: np.ndarray, starts: list[int]) -> None:
        for index, start in zip(indices, starts, strict=True):
            row = self._rows[index]
            row[...] = buffer[start : start + row.nbytes]


def _read(
    location: Location,
    variables: Sequence[Readable],
    destination: _Destination,
    *,
    verify: bool,
    threads: int | None,
    advance: Advance,
) -> None:
    start = time.perf_counter()
    with translated(location.path, "reading failed"), Directory(location) as directory:
        seconds = time.perf_counter() - start
        work = _Work(directory, variables, destination, verify, advance)
        run(work.jobs(calls_wait=seconds > SLOW), thread_count(threads, seconds))
        if verify and any(variable.entry.regions for variable in variables):
            run(in_lanes(work.lanes_of_regions()), thread_count(threads, seconds))


class _Work:
    """The jobs of one reading."""

    def __init__(
        self,
        directory: Directory,
        variables: Sequence[Readable],
        destination: _Destination,
        verify: bool,
        advance: Advance,
    ) -> None:
        self._directory = directory
        self._variables = variables
        self._destination = destination
        self._verify = verify
        self._advance = advance

    def jobs(self, *, calls_wait: bool) -> Iterator[Job]:
        """Return the jobs of large variables, then those of small ones, a batch at a time."""
        small: list[int] = []
        large: list[int] = []
        for index, variable in enumerate(self._variables):
            is_small = variable.entry.nbytes < SMALL and variable.encoding.is_plain
            (small if is_small else large).append(index)
        at_once = min(BATCH_FILES, piece(len(small))) if calls_wait else BATCH_FILES
        parts = batches([self._variables[index] for index in small], at_once)
        groups = (small[part.start : part.stop] for part in parts)
        reading = do_here_until_slow(groups, self._read_batch, calls_wait=calls_wait)
        return in_lanes(itertools.chain(self._lanes(large), reading))

    def _lanes(self, indices: list[int]) -> Iterator[Lane]:
        for index in indices:
            variable, row = self._variables[index], self._destination.row(index)
            source = stored_blocks(self._directory, variable) if self._verify else Stored
            if variable.entry.regions:
                found = zip(pieces(variable, 0, variable.nbytes), strict=True)
                yield Lane(found, partial(self._read_piece, variable, source, row))
            else:
                yield Lane(spans(variable.nbytes), partial(self._read_block, variable, source, row))

    def _read_block(
        self, variable: Readable, source: Callable[[int], Stored], row: np.ndarray, start: int, stop: int
    ) -> None:
        entry = variable.entry
        target = row[start:stop]
        with self._directory.out(entry) as fd:
            is_hashed = self._verify and bool(variable.digests)
            digest = read_part(self._directory, source(fd), variable, target, start, hashed=is_hashed)
        if self._verify:
            check_digest(self._directory, entry, variable.digests, start // BLOCK, digest)
        if self._advance:
            self._advance(target.nbytes)

    def _read_piece(self, variable: Readable, source: Callable[[int], Stored], row: np.ndarray, piece: Piece) -> None:
        read_piece(self._directory, variable, source, row[piece.start : piece.stop], piece, verify=self._verify)
        if self._advance:
            self._advance(piece.stop - piece.start)

    def lanes_of_regions(self) -> Iterator[Lane]:
        """Return the lanes that compare regions which were not hashed while they were read."""
        for index, variable in enumerate(self._variables):
            is_large = variable.entry.regions and variable.entry.nbytes >= SMALL
            if is_large and (regions := scattered(variable, filled(variable.entry.regions))):
                values = self._destination.values(index).view(variable.stored).reshape(variable.shape)
                origin = (0,) * len(variable.shape)
                yield from lanes_in_memory(self._directory, variable.entry, regions, values, origin)

    def _read_batch(self, indices: Sequence[int]) -> None:
        batch = [self._variables[index] for index in indices]
        buffer, starts = read_batch(self._directory, batch, verify=self._verify)
        self._destination.take(indices, buffer, starts)
        if self._advance:
            self._advance(sum(variable.entry.nbytes for variable in batch))
