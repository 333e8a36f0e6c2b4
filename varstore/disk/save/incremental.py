"""Find the variables that a base checkpoint holds already, so that they are linked and not written again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial

import numpy as np

from varstore.disk.blocks import digest_block, part_of, spans
from varstore.disk.threads import run
from varstore.layout.encodings import is_plain
from varstore.layout.manifest import BLOCK, DIGEST_SIZE
from varstore.layout.regions import Checksums, filled
from varstore.values.arrays import Stored
from varstore.values.plan import Encode, PlannedVariable, SavePlan, may_stay

__all__ = ["equals_stored", "link_unchanged", "linked_to"]


def link_unchanged(plan: SavePlan, base: Mapping[str, Stored], threads: int) -> SavePlan:
    """Return the plan with base's variables in place of the arrays that equal them in shape, type and digest.

    Values that are yet to be fetched are left for `equals_stored`.
    """
    expected = {
        v.name: base[v.name].entry.value_checksums
        for v in plan.variables
        if isinstance(v.source, np.ndarray)
        and not v.alias_of
        and _same_form(v, base.get(v.name), plan.encoding_of(v.name))
    }
    changed: set[str] = set()

    def compare(name: str, array: np.ndarray, start: int, stop: int, digest: bytes) -> None:
        if name not in changed and digest_block(array, start, stop) != digest:
            changed.add(name)

    def jobs() -> Iterator[Callable[[], None]]:
        for variable in plan.variables:
            if variable.name in expected and isinstance(variable.source, np.ndarray):
                for block in _blocks(variable.source, expected[variable.name]):
                    yield partial(compare, variable.name, *block)

    if not expected:
        return plan
    run(jobs(), threads if plan.nbytes > 2 * BLOCK else 1)
    unchanged = expected.keys() - changed
    variables = tuple(linked_to(v, base[v.name]) if v.name in unchanged else v for v in plan.variables)
    return plan._replace(variables=variables)


def linked_to(variable: PlannedVariable, stored: Stored) -> PlannedVariable:
    """Return the variable as one that is linked to a stored one, whose values it has."""
    return variable._replace(source=stored, nbytes=stored.entry.nbytes)


def equals_stored(variable: PlannedVariable, array: np.ndarray, stored: Stored | None, encoding: Encode) -> bool:
    """Tell whether fetched values equal a stored variable in shape, type and digest."""
    if stored is None or not _same_form(variable, stored, encoding):
        return False
    blocks = _blocks(array, stored.entry.value_checksums)
    return all(digest_block(part, start, stop) == digest for part, start, stop, digest in blocks)


def _blocks(array: np.ndarray, checksums: Checksums) -> Iterator[tuple[np.ndarray, int, int, bytes]]:
    """Yield the blocks of an array's values, or of its regions: what they are of, their bytes in it, and the digest."""
    if isinstance(checksums, bytes):
        parts = [(array, checksums)]
    else:
        parts = [(part_of(array, region), region.digests) for region in filled(checksums)]
    for part, digests in parts:
        for at, (start, stop) in enumerate(spans(part.nbytes)):
            yield part, start, stop, digests[at * DIGEST_SIZE : (at + 1) * DIGEST_SIZE]


def _same_form(variable: PlannedVariable, stored: Stored | None, encoding: Encode) -> bool:
    """Tell whether a stored variable may take the place of one to be written, as far as its size and encoding go."""
    if stored is None:
        return False
    entry = stored.entry
    return (
        entry.meta == variable.meta
        and (entry.nbytes == variable.nbytes or not is_plain(entry.encoding))
        and may_stay(entry, encoding)
        and bool(entry.value_checksums)
    )
