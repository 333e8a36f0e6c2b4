"""Compare two sets of entries by name, shape, data type and digests."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from varstore.layout.manifest import Entry
from varstore.text.table import Table

__all__ = ["DiffReport", "compare"]


@dataclass(frozen=True, kw_only=True, slots=True)
class DiffReport:
    """How checkpoint `b` differs from checkpoint `a`, by variable name; `changed` maps each name to what changed.

    Example:
        >>> first, second = vs.save("a", {"w": np.zeros(3)}), vs.save("b", {"w": np.ones(3), "step": np.array(7)})
        >>> report = vs.diff(first, second)
        >>> report.equal, report.added, dict(report.changed)
        (False, ('step',), {'w': 'values'})
    """

    a: str
    b: str
    added: tuple[str, ...]
    removed: tuple[str, ...]
    changed: Mapping[str, str]
    unchanged: tuple[str, ...]

    @property
    def equal(self) -> bool:
        """Whether both checkpoints contain the same variables with the same values."""
        return not (self.added or self.removed or self.changed)

    def __str__(self) -> str:
        rows = [("added", name) for name in self.added]
        rows += [("removed", name) for name in self.removed]
        rows += [("changed", f"{name}: {what}") for name, what in self.changed.items()]
        return str(Table(title=f"{self.a} -> {self.b}: {len(self.unchanged)} unchanged", rows=rows, form="  {:<7}  {}"))


def compare(a: str, b: str, first: Mapping[str, Entry], second: Mapping[str, Entry]) -> DiffReport:
    """Return how the second set of entries differs from the first; `a` and `b` are the paths to report."""
    changed = {name: _difference(first[name], second[name]) for name in first if name in second}
    return DiffReport(
        a=a,
        b=b,
        added=tuple(name for name in second if name not in first),
        removed=tuple(name for name in first if name not in second),
        changed={name: what for name, what in changed.items() if what},
        unchanged=tuple(name for name, what in changed.items() if not what),
    )


def _difference(a: Entry, b: Entry) -> str:
    if a.meta is None or a.meta != b.meta:
        return f"{a.form} -> {b.form}"
    return "" if (a.nbytes, a.digests) == (b.nbytes, b.digests) else "values"
