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
from varstore.values.plan import Encode, PlannedVariable, SavePlan, may_stay

__all__ = ["equals_stored", "link_unchanged", "linked_to"]


def link_unchanged(plan: SavePlan, base: Mapping[str, Stored], threads: int) -> SavePlan:
    """Return the plan with base's variables in place of the arrays that equal them in shape, type and digest.

    Values that are yet to be fetched are left for `equals_stored`.
    """
    expected = {
        v.name: base[v.name].entry.value_digests
        for v in plan.variables
        if isinstance(v.source, np.ndarray)
        and not v.alias_of
        and _same_form(v, base.get(v.name), plan.encoding_of(v.name))
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
        variables=tuple(linked_to(v, base[v.name]) if v.name in unchanged else v for v in plan.variables),
    )


def linked_to(variable: PlannedVariable, stored: Stored) -> PlannedVariable:
    """Return the variable as one that is linked to a stored one, whose values it has."""
    return variable._replace(source=stored, nbytes=stored.entry.nbytes)


def equals_stored(variable: PlannedVariable, array: np.ndarray, stored: Stored | None, encoding: Encode) -> bool:
    """Tell whether fetched values equal a stored variable in shape, type and digest."""
    if stored is None or not _same_form(variable, stored, encoding):
        return False
    digests = [digest_block(array, start, stop) for start, stop in spans(variable.nbytes)]
    return b"".join(digests) == stored.entry.value_digests


def _same_form(variable: PlannedVariable, stored: Stored | None, encoding: Encode) -> bool:
    """Tell whether a stored variable may take the place of one to be written, as far as its size and encoding go."""
    if stored is None:
        return False
    entry = stored.entry
    return (
        entry.meta == variable.meta
        and (entry.nbytes == variable.nbytes or not is_plain(entry.encoding))
        and may_stay(entry, encoding)
        and bool(entry.value_digests)
    )
