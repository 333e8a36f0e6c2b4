"""Load into arrays that exist: everything is compared first, then values are read straight into their memory.

A variable whose type and layout are those of its target is read from the file into the target itself, without a copy
between. What has to be converted, cut to the shared corner, or written to a strided array goes through a buffer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, MutableMapping
from typing import Any

import numpy as np

from varstore.disk.progress import Progress, reporting
from varstore.disk.read.checkpoint import Checkpoint, retry_if_replaced
from varstore.disk.read.checks import check_files
from varstore.disk.read.whole import read_into
from varstore.errors import UsageError
from varstore.layout.collector import collector_paused
from varstore.layout.location import Location
from varstore.layout.readable import Readable
from varstore.model.match import Match, Missing, OnMismatch, OnTied, Spec, compare, spec_of
from varstore.model.moves import LateTarget, Move, OnDisk, Place, fill, move_of, nbytes_of
from varstore.model.options import Path
from varstore.model.refusal import Demands, refuse
from varstore.model.report import LoadReport, make_report, with_saturated
from varstore.model.ties import Settled, settle
from varstore.values.arguments import check_names
from varstore.values.arrays import as_source
from varstore.values.select import Patterns, Rename, select

__all__ = ["carry_out", "check_targets", "fill_targets", "from_source", "load_into", "prepare"]


def load_into(
    targets: MutableMapping[str, np.ndarray] | Mapping[str, np.ndarray],
    source: Path | Checkpoint | Mapping[str, Any],
    *,
    include: Patterns | None = None,
    exclude: Patterns | None = None,
    rename: Rename | None = None,
    strict: bool | None = None,
    on_mismatch: OnMismatch = "error",
    cast: bool = False,
    missing: Missing = None,
    on_tied: OnTied = "error",
    verify: bool = True,
    threads: int | None = None,
    progress: Progress = None,
) -> LoadReport:
    """Fill existing arrays with the variables of the same names, in place; see `varstore.load_into`."""
    check_targets(targets, "targets")
    demands = Demands(strict=bool(strict), missing=missing, on_mismatch=on_mismatch, cast=cast)

    def load_from(given: Mapping[str, Any]) -> LoadReport:
        return fill_targets(
            targets,
            given,
            lambda other: select(
                tuple(given), include=include, exclude=exclude, rename=rename if other is None else other
            ),
            demands,
            on_tied=on_tied,
            verify=verify,
            threads=threads,
            progress=progress,
        )

    return from_source(source, load_from)


def from_source(
    source: Path | Checkpoint | Mapping[str, Any], load: Callable[[Mapping[str, Any]], LoadReport]
) -> LoadReport:
    """Load from a mapping, or from a checkpoint, which is opened again if it was replaced meanwhile."""
    if isinstance(source, Mapping) and not isinstance(source, Checkpoint):
        check_names(source, "source")
        return load(source)
    return retry_if_replaced(load, source)


def fill_targets(
    targets: Mapping[str, np.ndarray | LateTarget],
    given: Mapping[str, Any],
    selected_by: Callable[[Rename | None], Mapping[str, str]],
    demands: Demands,
    *,
    on_tied: OnTied,
    verify: bool,
    threads: int | None,
    progress: Progress,
    target: str = "targets",
) -> LoadReport:
    """Fill targets from an open checkpoint, file or mapping, if the load meets the demands.

    `selected_by` returns the names in it by the targets' names; it takes a rename in place of the caller's, or None.
    `target` is the name of the targets in the report.
    """
    path = getattr(given, "path", None)  # of a checkpoint or a file
    where = path or type(given).__name__
    selected = selected_by(None)
    with collector_paused():
        sources = {name: as_source(given[name], variable=name) for name in selected.values()}
    wanted = {name: _spec_of_target(held) for name, held in targets.items()}

    def matched(rename: Rename | None) -> Match:
        chosen = selected if rename is None else selected_by(rename)
        specs = {
            name: spec_of(sources[name] if name in sources else as_source(given[name], variable=name))
            for name in chosen.values()
        }
        return compare(wanted, specs, chosen, on_mismatch=demands.on_mismatch, cast=demands.cast)

    match = matched(None)
    report = make_report(match, source=where, target=target)
    is_vain = bool(targets) and bool(given) and not match.pairs
    refuse(match, demands, is_vain=is_vain, source=where, target=target, path=path, matched=matched)
    moves = [move_of(pair, targets[pair.target], sources[pair.source]) for pair in match.pairs]
    settled = prepare(moves, names=targets, on_tied=on_tied, verify=verify, path=path)
    with reporting(progress, settled.nbytes, f"loading {where}") as advance:
        beyond = carry_out(settled, verify=verify, threads=threads, advance=advance)
    return with_saturated(report, beyond)


def _spec_of_target(target: np.ndarray | LateTarget) -> Spec:
    held = target.place if isinstance(target, LateTarget) else target
    return held.shape, held.dtype


def prepare(
    moves: list[Move], *, names: Iterable[str], on_tied: OnTied, verify: bool, path: str | None = None
) -> Settled:
    """Check what can be checked before anything changes, and decide what is written if targets share memory.

    `names` are those of all targets; their order decides which of two targets is the first.

    Raises:
        VariableMismatch: targets that share memory would get different values.
        SizeMismatch, FormatError: a file is missing, is not a regular file, or has the wrong size.
    """
    check_files((move.source.location, move.source.variable.entry) for move in moves if isinstance(move.source, OnDisk))
    return settle(moves, names=names, on_tied=on_tied, verify=verify, path=path)


def carry_out(
    settled: Settled, *, verify: bool, threads: int | None, advance: Callable[[int], None] | None = None
) -> dict[str, int]:
    """Move the values; those that are read straight into their targets are read in parallel.

    Returns:
        The number of values that were beyond the range of their target's type, by the targets' names.

    Raises:
        DigestMismatch: the bytes are not those that were saved; they have been written to the target.
    """
    direct: dict[Location, list[tuple[Readable, np.ndarray]]] = {}
    buffered: list[Move] = []
    for move in settled.free:
        pair, target, source = move
        if isinstance(source, OnDisk) and isinstance(target, np.ndarray):
            is_same_on_disk = pair.how == "exact" and source.variable.stored == target.dtype
            if is_same_on_disk and target.flags.c_contiguous:
                direct.setdefault(source.location, []).append((source.variable, target.reshape(-1).view(np.uint8)))
                continue
        buffered.append(move)
    for location, wanted in direct.items():
        read_into(location, wanted, verify=verify, threads=threads, advance=advance)
    beyond: dict[str, int] = {}
    for move in (*buffered, *settled.ordered):
        if not isinstance(move.target, Place) and (count := fill(move, verify=verify)):
            beyond[move.pair.target] = count
        if advance:
            advance(nbytes_of(move))
    return beyond


def check_targets(targets: Mapping[str, np.ndarray], field: str) -> None:
    """Check that targets are writeable arrays by name.

    Raises:
        UsageError: they are not.
    """
    if not isinstance(targets, Mapping):
        raise UsageError(
            "targets must be a mapping of names to arrays",
            field=field,
            found=type(targets).__name__,
            hint="varstore.adapters load into the modules of frameworks",
        )
    check_names(targets, field)
    for name, array in targets.items():
        if not isinstance(array, np.ndarray) or not array.flags.writeable:
            what = "a read-only array" if isinstance(array, np.ndarray) else type(array).__name__
            raise UsageError(
                "a target must be a writeable numpy array",
                variable=name,
                found=what,
                hint="varstore.load makes new arrays, and varstore.adapters load into the modules of frameworks",
            )
