"""The tasks for checkpoints that several processes save and load together; their peers are in `tools.bench.sharded`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from tools.bench.measure import Prepared
from tools.bench.ranks import Ranks
from tools.bench.sharded import BARE
from tools.bench.tasks import Bench, Candidates, Race, nothing, read_all

_ranks: list[Ranks] = []
"""The processes, from the first task on."""


def _chosen(bench: Bench, workload: str) -> tuple[Ranks, int]:
    """Return the processes, with this workload, and its size."""
    if not _ranks:
        _ranks.append(Ranks(bench.place.fresh(keep=True)))
    (nbytes, *_) = _ranks[0].call("choose", workload, bench.scale)
    return _ranks[0], nbytes


def save_sharded(bench: Bench, workload: str, form: str, *, durable: bool) -> Race:
    ranks, nbytes = _chosen(bench, workload)

    def fresh(name: str) -> Prepared:
        return partial(ranks.call, "save", name, bench.place.fresh(), form, durable)

    candidates: Candidates = {}
    for name in _names(bench):
        if _saved(bench, ranks, name, workload, form):  # once before, so that no import is timed
            candidates[name] = partial(fresh, name)
    return Race(candidates, nbytes=nbytes)


def load_sharded(bench: Bench, workload: str, form: str) -> Race:
    """Load what was saved as rows; it is in the page cache, and what each peer loads has been looked at."""
    ranks, nbytes = _chosen(bench, workload)
    candidates: Candidates = {}
    for name in _names(bench):
        path = _saved(bench, ranks, name, workload, "rows")
        if path is None:
            continue
        read_all(path)
        if not all(ranks.call("check", name, path, form)):
            raise AssertionError(f"{name} does not load what it saved")
        candidates[name] = partial(partial, ranks.call, "load", name, path, form)
    return Race(candidates, settle=nothing, nbytes=nbytes)


def _names(bench: Bench) -> list[str]:
    return [*(peer.name for peer in bench.peers), BARE]


def _saved(bench: Bench, ranks: Ranks, name: str, workload: str, form: str) -> str | None:
    """Return the path at which a peer has saved a workload in a form, once; None if it cannot."""
    key = (name, f"{workload}, {form}")
    if key not in bench.saved_at:
        path = bench.place.fresh(keep=True)
        try:
            ranks.call("save", name, path, form, False)
        except RuntimeError as error:
            bench.log(f"left out: {name}: {error}")
            return None
        bench.saved_at[key] = path
        bench.place.settle()
    return bench.saved_at[key]


SHARDING: dict[str, Callable[[Bench], Race]] = {
    "save large, rows": partial(save_sharded, workload="large", form="rows", durable=False),
    "save large, rows, durable": partial(save_sharded, workload="large", form="rows", durable=True),
    "save large, columns": partial(save_sharded, workload="large", form="columns", durable=False),
    "load large, rows": partial(load_sharded, workload="large", form="rows"),
    "load large, rows as columns": partial(load_sharded, workload="large", form="columns"),
    "load large, rows as whole": partial(load_sharded, workload="large", form="whole"),
    "save shards": partial(save_sharded, workload="shards", form="rows", durable=False),
    "save shards, durable": partial(save_sharded, workload="shards", form="rows", durable=True),
    "load shards": partial(load_sharded, workload="shards", form="rows"),
}
