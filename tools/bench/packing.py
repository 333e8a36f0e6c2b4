"""The tasks for packed checkpoints: how much space they take, and how long it takes to pack, load and slice them.

They have peers of their own (`tools.bench.packed`), and weights that were really trained: noise does not shrink.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np

from tools.bench import measure
from tools.bench.packed import Packed
from tools.bench.tasks import Bench, Candidates, Race, at_fresh, load, nothing
from tools.bench.trained import TRAINED

RAW = "raw values"
"""The candidate whose size is that of the values themselves."""
_REGION = 4096
"""Bytes of a slice at most."""


def size(bench: Bench, workload: str) -> Race:
    """Count the bytes of the files."""
    saved = _saved(bench, workload)
    sizes: Candidates = {name: partial(partial, _size, path) for name, (_, path) in saved.items()}
    raw = sum(array.nbytes for array in bench.arrays(workload).values())
    return Race({**sizes, RAW: lambda: lambda: raw}, settle=nothing, unit="B")


def _size(path: str) -> int:
    found = [os.lstat(file) for file in measure.files_of(path)]
    return sum({status.st_ino: status.st_size for status in found}.values())


def pack(bench: Bench, workload: str) -> Race:
    saved = _saved(bench, workload)
    arrays = bench.arrays(workload)
    return Race(
        {name: at_fresh(bench, partial(lambda p, at: p.save(at, arrays), peer)) for name, (peer, _) in saved.items()}
    )


def load_packed(bench: Bench, workload: str) -> Race:
    _saved(bench, workload)
    return load(bench, workload)


def slice_packed(bench: Bench, workload: str) -> Race:
    """Read a region of at most 4 KiB from the middle of the largest variable."""
    saved = _saved(bench, workload)
    arrays = bench.arrays(workload)
    name = max(arrays, key=lambda name: arrays[name].nbytes)
    region = _region(arrays[name])
    return Race(
        {title: partial(partial, peer.row, path, name, region) for title, (peer, path) in saved.items()},
        settle=nothing,
    )


def _region(array: np.ndarray) -> Any:
    """Return an index of a run of values from the middle of an array, which does not go beyond its end."""
    index: list[Any] = []
    rest = array
    while rest.nbytes > _REGION and rest.ndim > 1:
        index.append(len(rest) // 2)
        rest = rest[0]
    return (*index, slice(0, min(len(rest), _REGION // array.itemsize))) if rest.ndim else ()


def _saved(bench: Bench, workload: str) -> dict[str, Any]:
    """Return the peers with the paths at which each has saved the workload, so that no import is timed later."""
    arrays = bench.arrays(workload)
    for peer in bench.peers:
        if isinstance(peer, Packed):
            peer.ready(partial(bench.place.fresh, keep=True), arrays)
    return bench.loadable(workload, "load")


def _tasks() -> Iterator[tuple[str, Callable[[Bench], Race]]]:
    for workload in TRAINED:
        yield f"size of {workload}, packed", partial(size, workload=workload)
        yield f"pack {workload}", partial(pack, workload=workload)
        yield f"load {workload}, packed", partial(load_packed, workload=workload)
        yield f"slice of {workload}, packed", partial(slice_packed, workload=workload)


PACKING: dict[str, Callable[[Bench], Race]] = dict(_tasks())
