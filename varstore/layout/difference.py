"""How two checkpoints differ: the record that `diff` and `seal` return."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from varstore.layout.attached import FileEntry
from varstore.layout.encodings import is_plain
from varstore.layout.manifest import Entry
from varstore.text.hints import plural
from varstore.text.table import Table

__all__ = ["VALUES", "DiffReport", "Movement", "changed_files", "compare", "most_moved_first"]

VALUES = "values"
"""What changed of a variable of the same shape and type."""
_UNFOLDED = 40
"""Rows of variables that are printed one by one; of more, those of a block are one row."""
_ROWS_IN_A_NOTEBOOK = 100
_HEADINGS = ("name", "variables", "changed", "largest", "relative", "cosine", "")
_PART = re.compile(r"[^/.\-]+")


@dataclass(frozen=True, kw_only=True, slots=True)
class Movement:
    """How far the values of a variable moved, or of those of a block that moved together; all by float64.

    - `count`: how many values there are; `changed`: how many have other bits, or for two types, another value.
    - `beyond`: how many differ by more than ``atol + rtol * abs(b)``; None if no tolerance was given.
    - `nonfinite`: how many changed values are nan or infinite before or after; the numbers below leave them out.
    - `largest`: the largest ``abs(b - a)``; `norm`: the Euclidean norm of ``b - a``.
    - `norm_a`, `norm_b`: the norms of the values before and after.
    - `cosine`: of the angle between both, None if one of them is all zero.

    Example:
        >>> moved = vs.diff({"w": np.array([3.0, 4.0])}, {"w": np.array([3.0, 5.0])}, values=True).moved["w"]
        >>> moved.changed, moved.largest, moved.relative
        (1, 1.0, 0.2)
    """

    count: int
    changed: int
    beyond: int | None = None
    nonfinite: int = 0
    largest: float = 0.0
    norm: float = 0.0
    norm_a: float = 0.0
    norm_b: float = 0.0
    cosine: float | None = None

    @property
    def share(self) -> float:
        """The share of values that changed, from 0 to 1."""
        return self.changed / self.count if self.count else 0.0

    @property
    def relative(self) -> float:
        """``norm / norm_a``: how much moved, by which reports are sorted; infinite where all was zero before."""
        if not self.norm:
            return 0.0
        return self.norm / self.norm_a if self.norm_a else math.inf

    def as_json(self) -> dict[str, Any]:
        """Return the numbers as JSON data, with null for those beyond float64."""
        numbers = {name: getattr(self, name) for name in ("largest", "norm", "norm_a", "norm_b", "relative", "cosine")}
        return {
            **{name: getattr(self, name) for name in ("count", "changed", "beyond", "nonfinite", "share")},
            **{name: None if value is None or math.isinf(value) else value for name, value in numbers.items()},
        }


@dataclass(frozen=True, kw_only=True, slots=True, repr=False)
class DiffReport:
    """How `b` differs from `a`, by variable name. It is true if they are equal.

    - `added`, `removed`: names that only `b`, or only `a`, has.
    - `changed`: what differs of each variable that both have: shape and type as text, or ``"values"``.
    - `unchanged`: the names of all others that both have.
    - `files`: each attached file that differs is "added", "removed" or "changed".
    - `attributes`, `variable_attributes`, `state`: what differs in attributes, in those of variables, and in nested
      state besides its arrays, by keys that are joined by ``/``: ``"3 -> 4"``, ``"absent -> 4"``.
    - `moved`: with `values`, the `Movement` of each variable that has other values, those that moved most first. Some
      of them may be in `unchanged`, because the tolerance allows it.
    - `damaged`: the names of variables that differ although both have the same digests: one of them is damaged.
    - `left_out`: why the values of a variable could not be compared; it then counts as a difference.

    Example:
        >>> first, second = vs.save("a", {"w": np.zeros(3)}), vs.save("b", {"w": np.ones(3), "step": np.array(7)})
        >>> report = vs.diff(first, second)
        >>> report
        <DiffReport 'a' -> 'b': 1 added, 1 changed, 0 unchanged>
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
    attributes: Mapping[str, str] = field(default_factory=dict)
    variable_attributes: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    state: Mapping[str, str] = field(default_factory=dict)
    moved: Mapping[str, Movement] = field(default_factory=dict)
    damaged: tuple[str, ...] = ()
    left_out: Mapping[str, str] = field(default_factory=dict)

    @property
    def equal(self) -> bool:
        """Whether both have the same variables with the same values, and the same files, attributes and state."""
        variables = self.added or self.removed or self.changed or self.left_out
        return not (variables or self.files or self.attributes or self.variable_attributes or self.state)

    @property
    def ok(self) -> bool:
        """The same as `equal`."""
        return self.equal

    def __bool__(self) -> bool:
        return self.equal

    @property
    def within(self) -> tuple[str, ...]:
        """The variables that have other values, but within the tolerance."""
        return tuple(name for name in self.moved if name not in self.changed)

    @property
    def blocks(self) -> Mapping[str, Movement]:
        """How far blocks of variables moved, those that moved most first, without what is within the tolerance.

        A block is what names have in common up to their first number, as "h.11" in "h.11.attn.bias"; without a number,
        all but the last part. A block of a single variable has its whole name.
        """
        return {name: moved for name, (moved, _) in self._blocks().items()}

    def _blocks(self) -> dict[str, tuple[Movement, int]]:
        groups: dict[str, dict[str, Movement]] = {}
        for name, moved in self._counted():
            groups.setdefault(_block_of(name), {})[name] = moved
        found = {
            block if len(group) > 1 else next(iter(group)): (_together(group.values()), len(group))
            for block, group in groups.items()
        }
        return dict(sorted(found.items(), key=lambda item: most_moved_first(item[1][0])))

    def _counted(self) -> Iterator[tuple[str, Movement]]:
        return ((name, moved) for name, moved in self.moved.items() if name in self.changed)

    def as_json(self) -> dict[str, Any]:
        """Return the report as JSON data."""
        return {
            "a": self.a,
            "b": self.b,
            "ok": self.ok,
            "added": list(self.added),
            "removed": list(self.removed),
            "changed": dict(self.changed),
            "unchanged": list(self.unchanged),
            "files": dict(self.files),
            "attributes": dict(self.attributes),
            "variable_attributes": {name: dict(said) for name, said in self.variable_attributes.items()},
            "state": dict(self.state),
            "moved": {name: moved.as_json() for name, moved in self.moved.items()},
            "within": list(self.within),
            "damaged": list(self.damaged),
            "left_out": dict(self.left_out),
        }

    def _said(self, *, short: bool = False) -> str:
        counts = {"added": len(self.added), "removed": len(self.removed), "changed": len(self.changed)}
        said = [f"{count:,} {what}" for what, count in counts.items() if count and short]
        said.append(f"{len(self.unchanged)} unchanged")
        if self.within:
            said.append(f"{len(self.within):,} of them within the tolerance")
        return ", ".join(said)

    def __repr__(self) -> str:
        return f"<DiffReport {self.a!r} -> {self.b!r}: {self._said(short=True)}>"

    def __str__(self) -> str:
        return self.text()

    def text(self, *, flat: bool = False) -> str:
        """Return what differs, a line each; `flat` has a line per variable that moved, also where there are many."""
        return "\n".join(map(str, self._tables(flat=flat)))

    def _repr_html_(self) -> str:
        return "".join(table.html() for table in self._tables(most=_ROWS_IN_A_NOTEBOOK))

    def _tables(self, *, flat: bool = False, most: int | None = None) -> Iterator[Table]:
        rows = list(self._rows())
        more = [f"and {plural(len(rows[most:]), 'more difference')}"] if most is not None and rows[most:] else []
        yield Table(
            title=f"{self.a or 'a'} -> {self.b or 'b'}: {self._said()}",
            rows=rows[:most],
            notes=more,
            form="  {:<7}  {}",
        )
        moved = [(name, moved, 1) for name, moved in self._counted()]
        if not moved:
            return
        if len(moved) > _UNFOLDED and not flat:
            moved = [(name, together, count) for name, (together, count) in self._blocks().items()]
        more = [f"and {plural(len(moved[most:]), 'more row')}"] if most is not None and moved[most:] else []
        cells = [_cells(row, name, variables, self._note(name)) for name, row, variables in moved[:most]]
        headings, *shown = [*_only_used([_HEADINGS, *cells])]
        yield Table(title="moved, most first:", headings=headings, rows=shown, notes=more)

    def _note(self, name: str) -> str:
        what = self.changed.get(name, VALUES)
        return "" if what == VALUES else what

    def _rows(self) -> Iterator[tuple[str, str]]:
        yield from (("added", name) for name in self.added)
        yield from (("removed", name) for name in self.removed)
        yield from (("changed", f"{name}: {what}") for name, what in self.changed.items() if name not in self.moved)
        for name in self.damaged:
            yield "damaged", f"{name}: the digests are equal, and one of both is damaged; `varstore verify` tells which"
        yield from (("unknown", f"{name}: {why}") for name, why in self.left_out.items())
        yield from ((how, f"file {name}") for name, how in self.files.items())
        yield from (("changed", f"attribute {name}: {what}") for name, what in self.attributes.items())
        for variable, said in self.variable_attributes.items():
            yield from (("changed", f"attribute {name} of {variable}: {what}") for name, what in said.items())
        yield from (("changed", f"state {name}: {what}") for name, what in self.state.items())


def most_moved_first(moved: Movement) -> tuple[bool, float, float]:
    """Return the key that sorts movements."""
    return not moved.nonfinite, -moved.relative, -moved.largest


def _cells(moved: Movement, name: str, variables: int, note: str) -> tuple[str, ...]:
    numbers = (moved.largest, moved.relative, moved.cosine)
    shown = ["" if number is None else f"{number:.6g}" for number in numbers]
    notes = [f"{moved.nonfinite:,} nan or inf"] if moved.nonfinite else []
    return name, str(variables), f"{100 * moved.share:.3g}%", *shown, ", ".join(notes + ([note] if note else []))


def _only_used(rows: list[tuple[str, ...]]) -> Iterator[tuple[str, ...]]:
    """Yield rows without the column that says of how many variables each is, where each is of one, and empty notes."""
    is_folded = any(row[1] != "1" for row in rows[1:])
    has_notes = any(row[-1] for row in rows)
    for row in rows:
        yield (row[0], *row[1 if is_folded else 2 : -1], *([row[-1]] if has_notes else []))


def _block_of(name: str) -> str:
    """Return the beginning of a name up to its first part that is a number, or else all but its last part."""
    parts = list(_PART.finditer(name))
    for part in parts[:-1]:
        if part[0].isdigit():
            return name[: part.end()]
    return name[: parts[-2].end()] if len(parts) > 1 else name


def _together(group: Iterable[Movement]) -> Movement:
    """Return how far the variables of a block moved together."""
    rows = list(group)
    if len(rows) == 1:
        return rows[0]
    norm_a, norm_b = math.hypot(*(row.norm_a for row in rows)), math.hypot(*(row.norm_b for row in rows))
    cosine = None
    if 0 < norm_a < math.inf and 0 < norm_b < math.inf:
        cosine = math.fsum((row.cosine or 0.0) * (row.norm_a / norm_a) * (row.norm_b / norm_b) for row in rows)
    beyond = [row.beyond for row in rows if row.beyond is not None]
    return Movement(
        count=sum(row.count for row in rows),
        changed=sum(row.changed for row in rows),
        beyond=sum(beyond) if beyond else None,
        nonfinite=sum(row.nonfinite for row in rows),
        largest=max(row.largest for row in rows),
        norm=math.hypot(*(row.norm for row in rows)),
        norm_a=norm_a,
        norm_b=norm_b,
        cosine=cosine,
    )


def compare(
    a: str,
    b: str,
    first: Mapping[str, Entry],
    second: Mapping[str, Entry],
    files: tuple[Mapping[str, FileEntry], Mapping[str, FileEntry]],
) -> DiffReport:
    """Return how the second set of entries, with digests, differs from the first; `a` and `b` are paths to report.

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
        files=changed_files(*files),
    )


def changed_files(first: Mapping[str, FileEntry], second: Mapping[str, FileEntry]) -> Mapping[str, str]:
    """Return which attached files differ, and how."""
    found = dict.fromkeys((name for name in second if name not in first), "added")
    found |= dict.fromkeys((name for name in first if name not in second), "removed")
    return found | {name: "changed" for name in first if name in second and first[name] != second[name]}


def _difference(a: Entry, b: Entry) -> str:
    if a.meta is None or a.meta != b.meta:
        return f"{a.form} -> {b.form}"
    if is_plain(a.encoding) and is_plain(b.encoding):
        return "" if (a.nbytes, a.checksums) == (b.nbytes, b.checksums) else VALUES
    return "" if a.value_checksums == b.value_checksums else VALUES
