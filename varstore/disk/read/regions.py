"""Compare regions with their digests: on the way into memory, in memory, or as the values come in order (FORMAT F5).

A region that is one run in ``out`` is hashed while it is read. The values of any other one lie in many places, so it is
hashed where they lie in memory after all of them were read. Where there is no memory for all of a variable, its values
come a few MiB at a time, in C order, in which those of each region come in C order too.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np

from varstore.disk.blocks import digest_block, digest_of, part_of, spans
from varstore.disk.encodings.stored import Stored
from varstore.disk.encodings.table import read_part
from varstore.disk.read.checks import check_digest, check_region
from varstore.disk.regions import RegionHashers, digest_regions
from varstore.disk.threads import Lane
from varstore.layout.manifest import BLOCK, DIGEST_SIZE, Entry
from varstore.layout.readable import Readable
from varstore.layout.regions import Region, filled, run_of
from varstore.storage.directory import Directory

__all__ = [
    "Piece",
    "RegionChecks",
    "check_in_memory",
    "check_regions",
    "check_regions_in_run",
    "lanes_in_memory",
    "pieces",
    "read_piece",
    "runs_of_regions",
    "scattered",
]


class Piece(NamedTuple):
    """Bytes of the values that are read at a time, and the digest that covers them: `block` is -1 if there is none.

    It is the digest of a block of a region, or of the values if there is no region.
    """

    start: int
    stop: int
    region: Region | None = None
    block: int = -1


def pieces(variable: Readable, first: int, last: int) -> Iterator[Piece]:
    """Cut a run of bytes of the values into pieces, so that those which a digest covers are a piece."""
    if not variable.entry.regions:
        for start in range(first - first % BLOCK, last, BLOCK):
            stop = min(start + BLOCK, variable.nbytes)
            is_whole = bool(variable.digests) and first <= start and stop <= last
            yield Piece(max(start, first), min(stop, last), None, start // BLOCK if is_whole else -1)
        return
    at = first
    for region, start, nbytes in runs_of_regions(variable):
        if first <= start and start + nbytes <= last:
            yield from _uncovered(at, start)
            for begin, end in spans(nbytes):
                yield Piece(start + begin, start + end, region, begin // BLOCK)
            at = start + nbytes
    yield from _uncovered(at, last)


def _uncovered(first: int, last: int) -> Iterator[Piece]:
    for start in range(first, last, BLOCK):
        yield Piece(start, min(start + BLOCK, last))


def runs_of_regions(variable: Readable) -> list[tuple[Region, int, int]]:
    """Return the regions that are one run of the values, each with its first byte and its size, in order."""
    found = [(region, _run(variable, region)) for region in filled(variable.entry.regions)]
    return [(region, *run) for region, run in found if run is not None]


def scattered(variable: Readable, regions: Iterable[Region]) -> list[Region]:
    """Return those of the regions that are not one run of the values."""
    return [region for region in regions if _run(variable, region) is None]


def _run(variable: Readable, region: Region) -> tuple[int, int] | None:
    return run_of(region.offsets, region.sizes, variable.shape, variable.stored.itemsize)


def read_piece(
    directory: Directory,
    variable: Readable,
    source: Callable[[int], Stored],
    target: np.ndarray,
    piece: Piece,
    *,
    verify: bool,
) -> None:
    """Fill a row of bytes with a piece of the values, and compare it with its digest if it has one.

    `source` gives the stored bytes, given a descriptor of ``out``.

    Raises:
        DigestMismatch: the bytes are not those that were saved.
    """
    start, _, region, block = piece
    is_hashed = verify and block >= 0
    with directory.out(variable.entry) as fd:
        digest = read_part(directory, source(fd), variable, target, start, hashed=is_hashed)
    if is_hashed and region is not None:
        check_region(directory, variable.entry, region, block, digest)
    elif is_hashed:
        check_digest(directory, variable.entry, variable.digests, block, digest)


def lanes_in_memory(
    directory: Directory, entry: Entry, regions: Sequence[Region], values: np.ndarray, origin: Sequence[int]
) -> Iterator[Lane]:
    """Yield lanes that compare regions, whose values lie in an array that begins at `origin` within the variable."""
    for region in regions:
        part = part_of(values, region, origin)
        yield Lane(spans(part.nbytes), partial(_check_in_memory, directory, entry, region, part))


def check_in_memory(directory: Directory, entry: Entry, values: np.ndarray) -> None:
    """Compare all regions of a small variable, whose values are in memory; raises what `read_piece` does."""
    for region in filled(entry.regions):
        check_region(directory, entry, region, 0, digest_of(part_of(values, region)))


def _check_in_memory(
    directory: Directory, entry: Entry, region: Region, values: np.ndarray, start: int, stop: int
) -> None:
    check_region(directory, entry, region, start // BLOCK, digest_block(values, start, stop))


def check_regions_in_run(directory: Directory, variable: Readable, start: int, values: np.ndarray) -> None:
    """Compare the regions that lie inside a run of the values, which begins with the element `start`.

    Raises:
        DigestMismatch: the bytes are not those that were saved.
    """
    size, shape = variable.stored.itemsize, variable.shape
    steps = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    for region in filled(variable.entry.regions):
        first = sum(map(operator.mul, region.offsets, steps)) - start
        last = first + sum((extent - 1) * step for extent, step in zip(region.sizes, steps, strict=True))
        if first >= 0 and last < len(values):
            strides = [step * size for step in steps]
            part = np.ndarray(region.sizes, variable.stored, values, first * size, strides)
            for begin, end in spans(part.nbytes):
                _check_in_memory(directory, variable.entry, region, part, begin, end)


class RegionChecks:
    """Compares the regions of a variable while its values come in C order, a rectangle at a time."""

    def __init__(self, directory: Directory, entry: Entry) -> None:
        self._directory = directory
        self._entry = entry
        self._hashers = RegionHashers(entry.regions)

    def update(self, box: Sequence[range], values: np.ndarray) -> None:
        """Take the values of the next rectangle, which is a run of the values.

        Raises:
            DigestMismatch: the values of a region that ends in it are not those that were saved.
        """
        for region, digests in self._hashers.update(box, values):
            _check_all(self._directory, self._entry, region, digests)


def check_regions(directory: Directory, entry: Entry, fd: int, band: tuple[range, list[Region]] | None = None) -> None:
    """Read an open ``out``, or a band of it, a few MiB at a time, and compare each region.

    Raises:
        DigestMismatch: the bytes are not those that were saved.
    """
    for region, digests in digest_regions(fd, entry, band):
        _check_all(directory, entry, region, digests)


def _check_all(directory: Directory, entry: Entry, region: Region, digests: bytes) -> None:
    for block, start in enumerate(range(0, len(digests), DIGEST_SIZE)):
        check_region(directory, entry, region, block, digests[start : start + DIGEST_SIZE])
