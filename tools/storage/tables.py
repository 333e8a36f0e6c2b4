"""The tables of the guide of `varstore.storage`, as Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Final

from varstore.inspection.storage import PROMISED, PROMISES

__all__ = ["promises_table", "results_table"]

_GROUPS: Final = {
    "save, load, verify": ("save, durable", "save", "load", "slices", "mmap", "verify", "seal", "convert"),
    "base=": ("base=",),
    "overwrite": ("overwrite", "image layer"),
    "two writers": ("two writers", "two writers, two mounts"),
    "readers beside a writer": ("load beside overwrites", "load beside overwrites, second mount"),
    "kill and clean": ("kill -9, clean", "save beside clean", "save beside clean, second mount"),
    "manager": ("manager",),
}
"""The columns, each with the checks that it sums up."""


def promises_table() -> str:
    """Return what is promised on each class of file system."""
    return _table(("file system", *PROMISED), [(name, *promised) for name, promised in PROMISES.items()])


def results_table(results: Mapping[str, Mapping[str, str] | str]) -> str:
    """Return what the checks found on each file system that could be mounted."""
    rows = [(name, *_cells(found)) for name, found in results.items() if not isinstance(found, str)]
    return _table(("seen on", *_GROUPS), rows)


def _cells(found: Mapping[str, str]) -> Iterator[str]:
    for checks in _GROUPS.values():
        said = {found.get(check, "–") for check in checks} - {"–"}
        yield "–" if not said else "yes" if said == {"yes"} else "in part" if "yes" in said else "no"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
