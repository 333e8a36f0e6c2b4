"""Compare two sets of entries by name, shape, data type and digests."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from varstore.layout.attached import FileEntry
from varstore.layout.manifest import Entry
from varstore.text.table import Table

__all__ = ["DiffReport", "compare"]


@dataclass(frozen=True, kw_only=True, slots=True)
class DiffReport:
    """How checkpoint `b` differs from checkpoint `a`, by variable name; `changed` maps each name to what changed.

    `files` maps the name of each attached file that differs to "added", "removed" or "changed".

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
    files: Mapping[str, str] = field(default_factory=dict)

    @property
    def equal(self) -> bool:
        """Whether both checkpoints contain the same variables with the same values, and the same files."""
        return not (self.added or self.removed or self.changed or self.files)

    def __str__(self) -> str:
        rows = [("added", name) for name in self.added]
        rows += [("removed", name) for name in self.removed]
        rows += [("changed", f"{name}: {what}") for name, what in self.changed.items()]
        rows += [(how, f"file {name}") for name, how in self.files.items()]
        return str(Table(title=f"{self.a} -> {self.b}: {len(self.unchanged)} unchanged", rows=rows, form="  {:<7}  {}"))


def compare(
    a: str,
    b: str,
    first: Mapping[str, Entry],
    second: Mapping[str, Entry],
    files: tuple[Mapping[str, FileEntry], Mapping[str, FileEntry]],
) -> DiffReport:
    """Return how the second set of entries differs from the first; `a` and `b` are the paths to report.

    `files` are the attached files of both.
    """
    changed = {name: _difference(first[name], second[name]) for name in first if name in second}
    return DiffReport(
        a=a,
        b=b,
        added=tuple(name for name in second if name not in first),
        removed=tuple(name for name in first if name not in second),
        changed={name: what for name, what in changed.items() if what},
        unchanged=tuple(name for name, what in changed.items() if not what),
        files=_compared(*files),
    )


def _compared(first: Mapping[str, FileEntry], second: Mapping[str, FileEntry]) -> Mapping[str, str]:
    found = dict.fromkeys((name for name in second if name not in first), "added")
    found |= dict.fromkeys((name for name in first if name not in second), "removed")
    return found | {name: "changed" for name in first if name in second and first[name] != second[name]}


def _difference(a: Entry, b: Entry) -> str:
    if a.meta is None or a.meta != b.meta:
        return f"{a.form} -> {b.form}"
    return "" if (a.nbytes, a.digests) == (b.nbytes, b.digests) else "values"
