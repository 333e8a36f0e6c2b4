"""Read rectangles of variables into the memory of tensors, in parallel."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import numpy as np

from varstore.adapters.torch_distributed.targets import Shard, hand_over, host_array
from varstore.disk.read.parts import read_run
from varstore.disk.read.variable import Variable
from varstore.disk.read.whole import read_into
from varstore.disk.threads import Job, run as run_jobs
from varstore.layout.location import Location
from varstore.layout.readable import Readable, readable
from varstore.layout.regions import Region, run_of

__all__ = ["read_parts"]


def read_parts(location: Location, wanted: Iterable[tuple[Variable, Shard]], *, verify: bool, threads: int) -> None:
    """Fill parts of tensors from the variables of one checkpoint; the values are converted to the tensors' types.

    Raises:
        DigestMismatch: the bytes are not those that were saved.
        FormatError: a file is missing, of another size, or not a file at all.
    """
    whole: list[tuple[Readable, np.ndarray]] = []
    parts: list[Job] = []
    for variable, shard in wanted:
        source = readable(variable.entry, path=location.path)
        array = host_array(shard.memory)
        is_same = array is not None and array.flags.c_contiguous and array.dtype == source.stored == source.dtype
        if array is not None and is_same and shard.sizes == source.shape:
            whole.append((source, array.reshape(-1).view(np.uint8)))
        else:
            parts.append(partial(_read_part, variable, shard, array, verify=verify))
    read_into(location, whole, verify=verify, threads=threads)
    run_jobs(parts, threads)


def _read_part(variable: Variable, shard: Shard, array: np.ndarray | None, *, verify: bool) -> None:
    values = _rectangle(variable, shard, verify=verify)
    if array is None or array.dtype != values.dtype:
        hand_over(shard.memory, values)
    else:
        np.copyto(array, values)


def _rectangle(variable: Variable, shard: Shard, *, verify: bool) -> np.ndarray:
    """Return the values of a rectangle; with `verify`, all blocks that they lie in are checked."""
    region = Region(shard.offsets, shard.sizes)
    source = readable(variable.entry, path=variable.root)
    run = run_of(*region[:2], source.shape, source.stored.itemsize) if verify else None
    if run is not None:
        start, stop = (at // source.stored.itemsize for at in (run[0], sum(run)))
        return read_run(variable.location, source, start, stop).reshape(shard.sizes)
    return np.asarray((variable.numpy() if verify else variable)[region.within()])
