"""Load into arrays that exist: everything is compared first, then values are read straight into their memory.

A variable whose type and layout are those of its target is read from the file into the target itself, without a copy
between. What has to be converted, cut to the shared corner, or written to a strided array goes through a buffer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, MutableMapping
from typing import Any

import numpy as np

from varstore.disk.progress import Progress, reporting
from varstore.disk.read.checkpoint import Checkpoint
from varstore.disk.read.checks import check_files
from varstore.disk.read.parts import row_chunks
from varstore.disk.read.variable import Variable
from varstore.disk.read.whole import read_into
from varstore.errors import UsageError
from varstore.layout.location import Location
from varstore.layout.readable import Readable, readable
from varstore.model.match import OnMismatch, Pair, compare, spec_of
from varstore.model.options import Path
from varstore.model.report import LoadReport, make_report
from varstore.model.store import CheckpointVariables, retry_if_replaced
from varstore.values.arrays import Source, Stored, as_source
from varstore.values.lazy import LazyArray
from varstore.values.select import Patterns, Rename, select

__all__ = ["load_into"]


def load_into(
    targets: MutableMapping[str, np.ndarray] | Mapping[str, np.ndarray],
    source: Path | Checkpoint | Mapping[str, Any],
    *,
    include: Patterns | None = None,
    exclude: Patterns | None = None,
    rename: Rename | None = None,
    on_mismatch: OnMismatch = "error",
    cast: bool = False,
    verify: bool = True,
    threads: int | None = None,
    progress: Progress = None,
) -> LoadReport:
    """Fill existing arrays with the variables of the same names, in place.

    Names, shapes, types and file sizes are checked before the first array changes. A digest can be compared only
    after its bytes have been read into the array: after `DigestMismatch`, the arrays hold a mixture.

    Args:
        targets: writeable arrays by name, in any layout.
        source: a checkpoint, or a mapping of names to arrays or to variables of checkpoints.
        include: as for `load`, on the source's names.
        exclude: as for `load`, on the source's names.
        rename: as for `load`; it turns the source's names into the targets' names.
        on_mismatch: what to do where shapes or types differ: "error"; "skip" leaves the target as it is and reports
            it; "overlap" copies the corner that both shapes share, for a vocabulary that grew.
        cast: convert between types of the same kind, such as float32 and bfloat16.
        verify: as for `load`.
        threads: as for `load`.
        progress: as for `load`.

    Returns:
        A report of what was loaded, what was missing in the source, and what was unexpected in it.

    Raises:
        VariableMismatch: shapes or types differ; the message lists them all, and nothing has changed.
        UsageError: a target is not a writeable array.
        DigestMismatch, SizeMismatch, ManifestError: the files are not what was saved.

    Example:
        >>> checkpoint = vs.save("lenet", {"conv1/bias": np.ones(6, np.float32), "fc/weight": np.ones((10, 84))})
        >>> model = {"conv1/bias": np.zeros(6, np.float32), "fc/weight": np.zeros((12, 84)), "head/bias": np.zeros(3)}
        >>> report = vs.load_into(model, "lenet", on_mismatch="overlap")
        >>> print(report)
        lenet -> targets: 2 of 3 loaded
        loaded          1  conv1/bias
        loaded          1  fc/weight
        kept            1  head/bias  (missing in the source: keeps its values)
        overlapped      1  fc/weight  (10, 84) -> (12, 84), copied (10, 84)
        >>> int(model["fc/weight"].sum())
        840
    """
    _check_targets(targets)

    def fill(given: Mapping[str, Any]) -> LoadReport:
        selected = select(tuple(given), include=include, exclude=exclude, rename=rename)
        modes: dict[str, Any] = {"on_mismatch": on_mismatch, "cast": cast}
        return _load_into(targets, given, selected, modes, verify=verify, threads=threads, progress=progress)

    if isinstance(source, Mapping) and not isinstance(source, Checkpoint):
        return fill(source)
    return retry_if_replaced(source, fill)


def _load_into(
    targets: Mapping[str, np.ndarray],
    given: Mapping[str, Any],
    selected: Mapping[str, str],
    modes: Mapping[str, Any],
    *,
    verify: bool,
    threads: int | None,
    progress: Progress,
) -> LoadReport:
    path = given.path if isinstance(given, Checkpoint | CheckpointVariables) else None
    where = path or type(given).__name__
    sources = {name: as_source(given[name], variable=name) for name in selected.values()}
    match = compare(
        {name: (array.shape, array.dtype) for name, array in targets.items()},
        {name: spec_of(value) for name, value in sources.items()},
        selected,
        path=path,
        **modes,
    )
    work = [(pair, targets[pair.target], _with_meta(sources[pair.source], pair)) for pair in match.pairs]
    direct: dict[Location, list[tuple[Readable, np.ndarray]]] = {}
    buffered: list[tuple[Pair, np.ndarray, Source]] = []
    for pair, target, value in work:
        if isinstance(value, Stored):
            variable = readable(value.entry, path=value.location.path)
            if pair.how == "exact" and target.flags.c_contiguous and variable.stored == target.dtype:
                direct.setdefault(value.location, []).append((variable, target.reshape(-1).view(np.uint8)))
                continue
        buffered.append((pair, target, value))
    check_files([(value.location, value.entry) for _, _, value in work if isinstance(value, Stored)])
    total = sum(value.entry.nbytes if isinstance(value, Stored) else value.nbytes for _, _, value in work)
    with reporting(progress, total, f"loading {where}") as advance:
        for location, wanted in direct.items():
            read_into(location, wanted, verify=verify, threads=threads, advance=advance)
        for pair, target, value in buffered:
            _fill(pair, target, value, verify=verify)
            if advance:
                advance(value.entry.nbytes if isinstance(value, Stored) else value.nbytes)
    return make_report(match, source=where, target="targets")


def _check_targets(targets: Mapping[str, np.ndarray]) -> None:
    for name, array in targets.items():
        if not isinstance(array, np.ndarray) or not array.flags.writeable:
            what = "a read-only array" if isinstance(array, np.ndarray) else type(array).__name__
            raise UsageError(
                "a target must be a writeable numpy array",
                variable=name,
                found=what,
                hint="varstore.load makes new arrays, and varstore.adapters load into the modules of frameworks",
            )


def _with_meta(source: Source, pair: Pair) -> Source:
    if isinstance(source, Variable) and not source.has_meta:
        return source.known_as(pair.target_shape, pair.target_dtype)
    return source


def _fill(pair: Pair, target: np.ndarray, source: Source, *, verify: bool) -> None:
    """Copy through a buffer: other types, other layouts, corners, and values that are not in a checkpoint."""
    if isinstance(source, Stored):
        variable = readable(source.entry, path=source.location.path)
        chunks: Iterable[tuple[tuple[Any, ...], np.ndarray]] = row_chunks(source.location, variable, verify=verify)
    else:
        chunks = [((...,), source.numpy() if isinstance(source, LazyArray) else source)]
    for index, values in chunks:
        corner = _corner(index, pair.common)
        if corner is not None:
            into, part = corner
            np.copyto(target[into], values[part], casting="unsafe")


def _corner(index: tuple[Any, ...], common: tuple[int, ...]) -> tuple[tuple[Any, ...], tuple[Any, ...]] | None:
    """Return the target's index and the chunk's index of what a chunk and the common corner share, None if nothing."""
    if index == (...,):
        whole = (..., *(slice(0, extent) for extent in common))
        return whole, whole
    *lead, rows = index
    axis = len(lead)
    if any(at >= extent for at, extent in zip(lead, common, strict=False)) or rows.start >= common[axis]:
        return None
    stop = min(rows.stop, common[axis])
    rest = tuple(slice(0, extent) for extent in common[axis + 1 :])
    return (*lead, slice(rows.start, stop), *rest), (slice(0, stop - rows.start), *rest)
