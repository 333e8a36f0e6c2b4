"""Find the variables that a base checkpoint holds already, so that they are linked and not written again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial

import numpy as np

from varstore.disk.blocks import digest_block, spans
from varstore.disk.threads import run
from varstore.layout.encodings import is_plain
from varstore.layout.manifest import BLOCK, DIGEST_SIZE
from varstore.values.arrays import Stored
from varstore.values.plan import PlannedVariable, SavePlan

__all__ = ["equals_stored", "link_unchanged"]


def link_unchanged(plan: SavePlan, base: Mapping[str, Stored], threads: int) -> SavePlan:
    """Return the plan with base's variables in place of the arrays that equal them in shape, type and digest.

    Values that are yet to be fetched are left for `equals_stored`.
    """
    expected = {
        v.name: base[v.name].entry.digests
        for v in plan.variables
        if isinstance(v.source, np.ndarray) and not v.alias_of and _same_form(v, base.get(v.name))
    }
    changed: set[str] = set()

    def compare(name: str, array: np.ndarray, start: int, stop: int) -> None:
        at = start // BLOCK * DIGEST_SIZE
        if name not in changed and digest_block(array, start, stop) != expected[name][at : at + DIGEST_SIZE]:
            changed.add(name)

    def jobs() -> Iterator[Callable[[], None]]:
        for variable in plan.variables:
            if variable.name in expected and isinstance(variable.source, np.ndarray):
                for start, stop in spans(variable.nbytes):
                    yield partial(compare, variable.name, variable.source, start, stop)

    if not expected:
        return plan
    run(jobs(), threads if plan.nbytes > 2 * BLOCK else 1)
    unchanged = expected.keys() - changed
    return replace(
        plan,
        variables=tuple(v._replace(source=base[v.name]) if v.name in unchanged else v for v in plan.variables),
    )


def equals_stored(variable: PlannedVariable, array: np.ndarray, stored: Stored | None) -> bool:
    """Tell whether fetched values equal a stored variable in shape, type and digest."""
    if stored is None or not _same_form(variable, stored):
        return False
    digests = [digest_block(array, start, stop) for start, stop in spans(variable.nbytes)]
    return b"".join(digests) == stored.entry.digests


def _same_form(variable: PlannedVariable, stored: Stored | None) -> bool:
    if stored is None:
        return False
    entry = stored.entry
    return (
        entry.meta == variable.meta
        and entry.nbytes == variable.nbytes
        and is_plain(entry.encoding)
        and bool(entry.digests)
    )
