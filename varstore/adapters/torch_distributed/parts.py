"""Read rectangles of variables into the memory of tensors, in parallel, and check a share of all values."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from functools import partial

import numpy as np

from varstore.adapters.torch_distributed.targets import Shard, hand_over, host_array
from varstore.disk.blocks import spans
from varstore.disk.read.parts import read_run
from varstore.disk.read.rectangles import in_groups, read_rectangles
from varstore.disk.read.regions import check_regions
from varstore.disk.read.variable import Variable
from varstore.disk.read.whole import read_into
from varstore.disk.regions import bands_of
from varstore.disk.threads import Job, run
from varstore.layout.location import Location
from varstore.layout.readable import Readable, readable
from varstore.layout.regions import Region
from varstore.storage.directory import Directory

__all__ = ["check_share", "read_parts"]

_AT_ONCE = 256 << 20
"""Bytes in the host's memory on their way to a device, if a rectangle does not have more."""


def read_parts(location: Location, wanted: Iterable[tuple[Variable, Shard]], *, verify: bool, threads: int) -> None:
    """Fill parts of tensors from the variables of one checkpoint; the values are converted to the tensors' types.

    With `verify`, the blocks and regions that lie inside a part are compared with their digests.

    Raises:
        DigestMismatch: the bytes are not those that were saved.
        FormatError: a file is missing, of another size, or not a file at all.
    """
    whole: list[tuple[Readable, np.ndarray]] = []
    parts: list[tuple[Variable, Shard, np.ndarray]] = []
    elsewhere: list[tuple[Variable, Shard]] = []
    for variable, shard in wanted:
        source = readable(variable.entry, path=location.path)
        array = host_array(shard.memory)
        if array is None or array.dtype != source.dtype:
            elsewhere.append((variable, shard))
        elif array.flags.c_contiguous and source.stored == source.dtype and shard.sizes == source.shape:
            whole.append((source, array.reshape(-1).view(np.uint8)))
        else:
            parts.append((variable, shard, array))
    read_into(location, whole, verify=verify, threads=threads)
    read_rectangles([(it, *shard[:2], array) for it, shard, array in parts], verify=verify, threads=threads)
    for group in in_groups(elsewhere, _size, _AT_ONCE):
        arrays = [np.empty(shard.sizes, variable.dtype) for variable, shard in group]
        rectangles = [(it, *shard[:2], array) for (it, shard), array in zip(group, arrays, strict=True)]
        read_rectangles(rectangles, verify=verify, threads=threads)
        for (_, shard), array in zip(group, arrays, strict=True):
            hand_over(shard.memory, array)


def _size(wanted: tuple[Variable, Shard]) -> int:
    variable, shard = wanted
    return math.prod(shard.sizes) * variable.dtype.itemsize


def check_share(variables: Iterable[Variable], share: int, shares: int, *, threads: int) -> None:
    """Compare a share of all values with their digests; no block or region is in two shares.

    Raises:
        DigestMismatch: the bytes are not those that were saved.
        FormatError: a file is missing, of another size, or not a file at all.
    """
    own_files = (variable for variable in variables if variable.has_meta and variable.tied_to is None)
    checks = [check for variable in own_files for check in _checks(variable)]
    total = sum(nbytes for nbytes, _ in checks)
    own: list[Job] = []
    before = 0
    for nbytes, check in checks:
        if before * shares // total == share:
            own.append(check)
        before += nbytes
    run(own, threads)


def _checks(variable: Variable) -> Iterator[tuple[int, Job]]:
    """Yield the size of each block or region with a digest, and what reads it, and compares it on the way."""
    source = readable(variable.entry, path=variable.root)
    size = source.stored.itemsize
    if variable.entry.regions:
        row = source.nbytes // source.shape[0]
        for band in bands_of(variable.entry):
            yield len(band[0]) * row, partial(_check_band, variable, band)
    if source.digests:
        for start, stop in spans(source.nbytes):
            yield stop - start, partial(_read_block, variable, source, start // size, stop // size)


def _check_band(variable: Variable, band: tuple[range, list[Region]]) -> None:
    with Directory(variable.location) as directory, directory.out(variable.entry) as fd:
        check_regions(directory, variable.entry, fd, band)


def _read_block(variable: Variable, source: Readable, start: int, stop: int) -> None:
    read_run(variable.location, source, start, stop)
