"""What loading did, on one page: `LoadReport`, its table and its hints.

The table does not grow with the model: names are folded by their first part, and the counts of the rows add up to
the number of variables. Hints are computed once, when the report is made, and not when it is printed.
"""

from __future__ import annotations

import heapq
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import numpy as np

from varstore.errors import UsageError, VariableMismatch
from varstore.model.match import Match, Mismatch, Shape, is_same_type, is_transposed
from varstore.text.hints import nearest, plural
from varstore.text.table import Shown, Table
from varstore.values.select import SEPARATOR, select

__all__ = [
    "Cast",
    "LoadReport",
    "Overlap",
    "fold",
    "listed_as",
    "make_report",
    "rename_that_helps",
    "suggest_prefixes",
    "with_saturated",
]

_CATEGORIES = {
    "kept": "(not in the source: keeps its values)",
    "unused": "(not in the target)",
    "waiting": "(not declared yet: loaded when it is)",
    "mismatched": "",
    "overlapped": "",
    "cast": "",
}
_WORDS = {"kept": "missing", "unused": "unexpected"}
"""What is printed in place of the names of attributes; `LoadReport.raise_for` takes both."""
_ATTRIBUTES = {word: attribute for attribute, word in _WORDS.items()}
_ROWS = 4
_HINTS = 5
_LABEL_WIDTH = 60
_NOTE_COLUMN = 40
_CHOICES = 4
_TRIED_PREFIXES = 8
_TRIED_NAMES = 50
_MOST_PARTS = 32
_NEARLY = 0.75


@dataclass(frozen=True, kw_only=True, slots=True)
class Overlap:
    """A variable of which only a corner was loaded, of the shape `copied`."""

    name: str
    source_shape: Shape
    target_shape: Shape
    copied: Shape

    def __str__(self) -> str:
        note = ", transposed" if is_transposed(self.source_shape, self.target_shape) else ""
        return f"{self.source_shape} -> {self.target_shape}{note}, copied {self.copied}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Cast:
    """A variable whose values were converted to another type.

    `saturated` is the number of values beyond the range of the new type: they became its largest value if it is
    ``float8_e4m3fn``, and otherwise an infinity, or NaN if the type has none.
    """

    name: str
    source_dtype: np.dtype[Any]
    target_dtype: np.dtype[Any]
    saturated: int = 0

    def __str__(self) -> str:
        beyond = f", {plural(self.saturated, 'value')} out of range" if self.saturated else ""
        return f"{self.source_dtype} -> {self.target_dtype}{beyond}"


@dataclass(frozen=True, kw_only=True, slots=True, repr=False)
class LoadReport(Shown):
    """Which variables were loaded, which were not, and why.

    `print` shows it as a table on one page, with hints; a notebook shows it as HTML.

    - `loaded`: the names of all targets that got values, including those in `overlapped` and `cast`.
    - `missing`, or `kept`: names of targets that the source does not have; they keep their values.
    - `unexpected`, or `unused`: names in the source that the target does not have.
    - `waiting`: in place of `unexpected` after a load into a session: a variable declared later takes its value.
    - `mismatched`: variables that both have, in different shapes or types, and that were not loaded.
    - `overlapped`: variables of which only the corner was loaded that both shapes share.
    - `renamed`: the names in the source of targets that have other names there, by the names of the targets.
    - `cast`: variables whose values were converted to the target's type.
    - `hints`: suggestions for a rename, and names that differ in spelling only.

    Example:
        >>> model = {"backbone.bias": np.zeros(6), "head.bias": np.zeros(3)}
        >>> report = vs.load_into(model, {"net.bias": np.ones(6)}, rename={"net": "backbone"})
        >>> report.loaded, report.missing
        (('backbone.bias',), ('head.bias',))
        >>> print(report.raise_for("unexpected", "mismatched"))
        dict -> targets: 1 of 2 loaded
        loaded          1  backbone.bias  (net.* in the source)
        missing         1  head.bias      (not in the source: keeps its values)
    """

    source: str
    target: str
    loaded: tuple[str, ...]
    kept: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    waiting: tuple[str, ...] = ()
    mismatched: tuple[Mismatch, ...] = ()
    overlapped: tuple[Overlap, ...] = ()
    cast: tuple[Cast, ...] = ()
    hints: tuple[str, ...] = ()
    renamed: Mapping[str, str] = field(default_factory=dict)

    @property
    def missing(self) -> tuple[str, ...]:
        """The same as `kept`."""
        return self.kept

    @property
    def unexpected(self) -> tuple[str, ...]:
        """The same as `unused`."""
        return self.unused

    def raise_for(self, *categories: str) -> LoadReport:
        """Return the report itself if these categories are empty; raise an error if one is not.

        Args:
            categories: of "missing" (or "kept"), "unexpected" (or "unused"), "waiting", "mismatched", "overlapped" and
                "cast".

        Raises:
            VariableMismatch: a category is not empty; the message lists its variables and the hints.
            UsageError: a category is unknown.
        """
        categories = tuple(_ATTRIBUTES.get(str(category), category) for category in categories)
        for category in categories:
            if not isinstance(category, str) or category not in _CATEGORIES:
                known = " or ".join(repr(_WORDS.get(name, name)) for name in _CATEGORIES)
                raise UsageError("unknown category", found=repr(category), expected=known)
        wrong = [category for category in _CATEGORIES if category in categories and getattr(self, category)]
        if not wrong:
            return self
        counts, rows = listed_as(self, wrong)
        raise VariableMismatch(
            f"{self.source} -> {self.target}: {counts}",
            rows=rows,
            hint="; ".join(self.hints) or "pair the names with rename=, and leave the rest out with exclude=",
        )

    def _title(self) -> str:
        wanted = len(self.loaded) + len(self.kept) + len(self.mismatched)
        waiting = f", {len(self.waiting)} waiting" if self.waiting else ""
        return f"{self.source} -> {self.target}: {len(self.loaded)} of {wanted} loaded{waiting}"

    def table(self, most: int | None = None) -> Table:
        """Return rows of all categories, of which each has a few names."""
        rows = [row for category in ("loaded", *_CATEGORIES) for row in self._rows(category)][:most]
        notes = [f"hint: {hint}" for hint in self.hints[:_HINTS]]
        return Table(title=self._title(), rows=rows, notes=notes, form=_form(rows))

    def _rows(self, category: str) -> list[tuple[str, int, str, str]]:
        meaning = _CATEGORIES.get(category, "")
        items = getattr(self, category)
        noted = ((item, meaning) if isinstance(item, str) else (item.name, str(item)) for item in items)
        if category == "loaded":
            noted = ((name, _origin(name, self.renamed)) for name in self.loaded)
        return [(_WORDS.get(category, category), *row) for row in fold(noted, _ROWS)]


def listed_as(report: LoadReport, categories: Iterable[str]) -> tuple[str, list[str]]:
    """Return how many variables the categories have, and the rows that list them."""
    held = [category for category in categories if getattr(report, category)]
    counts = ", ".join(f"{len(getattr(report, category))} {_WORDS.get(category, category)}" for category in held)
    return counts, _lines([row for category in held for row in report._rows(category)])


def _origin(name: str, renamed: Mapping[str, str]) -> str:
    """Return the note that a target has another name in the source: the beginning of it that is another."""
    source = renamed.get(name)
    if source is None:
        return ""
    shared = next((name[cut:] for cut in _part_starts(name) if source.endswith(name[cut:])), "")
    if shared == source:
        return f"(without {name.removesuffix(shared)!r} in the source)"
    return f"({source.removesuffix(shared)}* in the source)" if shared else f"({source} in the source)"


def make_report(match: Match, *, source: str, target: str, unused_waits: bool = False) -> LoadReport:
    """Return the report of a match; `source` and `target` are the names of the two sides in messages."""
    unused = "waiting" if unused_waits else "unused"
    return LoadReport(
        source=source,
        target=target,
        loaded=tuple(pair.target for pair in match.pairs),
        kept=match.kept,
        **{unused: match.unused},
        mismatched=match.mismatched,
        overlapped=tuple(
            Overlap(
                name=pair.target,
                source_shape=pair.source_shape,
                target_shape=pair.target_shape,
                copied=pair.common,
            )
            for pair in match.pairs
            if pair.how == "overlap"
        ),
        cast=tuple(
            Cast(name=pair.target, source_dtype=pair.source_dtype, target_dtype=pair.target_dtype)
            for pair in match.pairs
            if not is_same_type(pair.source_dtype, pair.target_dtype)
        ),
        hints=_hints(match, unused),
        renamed={pair.target: pair.source for pair in match.pairs if pair.target != pair.source},
    )


def with_saturated(report: LoadReport, counts: Mapping[str, int]) -> LoadReport:
    """Return a report with the numbers of values that were beyond the range of their new type, by name."""
    if not counts:
        return report
    return replace(report, cast=tuple(replace(cast, saturated=counts.get(cast.name, 0)) for cast in report.cast))


def suggest_prefixes(source_names: Iterable[str], target_names: Iterable[str]) -> tuple[str, str, int] | None:
    """Find the prefix rename that makes the most names match: (old, new, number of targets that then match).

    The result is None if half of the targets match already, if no rename makes more than half of the smaller side
    match, or if many renames do equally well, because then only an ending like ``.weight`` is shared.
    """
    sources, targets = list(source_names), dict.fromkeys(target_names)
    matched = sum(name in targets for name in sources)
    if 2 * matched >= len(targets):
        return None
    by_suffix: dict[str, list[str]] = {}
    for name in targets:
        for cut in _part_starts(name):
            prefixes = by_suffix.setdefault(name[cut:], [])
            if len(prefixes) < _CHOICES:
                prefixes.append(name[:cut])
    votes: Counter[tuple[str, str]] = Counter()
    for name in sources:
        shared = next(
            (cut for cut in _part_starts(name) if name[cut:] in by_suffix), None
        )  # the longest suffix comes first
        if shared is not None:
            votes.update((name[:shared], prefix) for prefix in by_suffix[name[shared:]])
    counted = [(_count_matches(sources, targets, *pair), *pair) for pair, _ in votes.most_common(_TRIED_PREFIXES)]
    count, old, new = max(counted, key=lambda best: best[0], default=(0, "", ""))
    is_clear = sum(count == other for other, _, _ in counted) <= _CHOICES
    is_worth_it = count > matched and 2 * count > min(len(sources), len(targets))
    return (old, new, count) if is_clear and is_worth_it else None


def fold(notes: Iterable[tuple[str, str]], limit: int) -> list[tuple[int, str, str]]:
    """Fold pairs of (name, note) into at most `limit` rows of (count, label, note); the counts add up.

    Names that have the same note and the same first part become one row. Up to three short names are written out;
    more become their longest common prefix and ``*``. If there are too many rows, the smallest become one.
    """
    groups: dict[tuple[str, str], list[str]] = {}
    for name, note in notes:
        first = SEPARATOR.search(name)
        groups.setdefault((name[: first.end()] if first else "", note), []).append(name)
    rows = [(len(names), _label(names), note) for (_, note), names in groups.items()]
    if len(rows) <= limit:
        return rows
    largest = heapq.nlargest(limit - 1, range(len(rows)), key=lambda index: rows[index][0])
    shown = [rows[index] for index in sorted(largest)]
    return [*shown, (sum(row[0] for row in rows) - sum(row[0] for row in shown), "… more", "")]


def _label(names: list[str]) -> str:
    if len(names) == 1 or (len(names) <= 3 and sum(map(len, names)) <= _LABEL_WIDTH):
        return ", ".join(names)
    first, last = min(names), max(names)
    same = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    cuts = [cut.end() for cut in SEPARATOR.finditer(first, 0, same)]
    return f"{first[: cuts[-1]]}*" if cuts else f"{names[0]}, … {names[-1]}"


def _lines(rows: list[tuple[str, int, str, str]]) -> list[str]:
    return str(Table(title="", rows=rows, form=_form(rows))).split("\n")[1:]


def _form(rows: list[tuple[str, int, str, str]]) -> str:
    width = min(_NOTE_COLUMN, max((len(label) for _, _, label, note in rows if note), default=0))
    return f"{{:<10}} {{:>6}}  {{:<{width}}}  {{}}"


def rename_that_helps(match: Match) -> tuple[dict[str, str], int] | None:
    """Return the rename of a prefix that makes more names match, where few do, and the number that then match."""
    sources = [pair.source for pair in match.pairs] + [item.source_name for item in match.mismatched]
    targets = [pair.target for pair in match.pairs] + [item.name for item in match.mismatched]
    if 2 * len(targets) >= len(targets) + len(match.kept):
        return None
    suggestion = suggest_prefixes([*sources, *match.unused], [*targets, *match.kept])
    if suggestion is None or suggestion[2] <= len(targets):
        return None
    old, new, count = suggestion
    return {old: new}, count


def _hints(match: Match, unused: str) -> tuple[str, ...]:
    suggestion = rename_that_helps(match)
    if suggestion is not None:
        rename, count = suggestion
        wanted = len(match.pairs) + len(match.mismatched) + len(match.kept)
        return (f"try rename={rename}: {count} of {wanted} names would match",)
    return _near_misses(match.kept, match.unused, "unexpected" if unused == "unused" else unused)


def _near_misses(kept: tuple[str, ...], unused: tuple[str, ...], word: str) -> tuple[str, ...]:
    """Pair names that differ only in spelling: equally many parts, the same numbers, each part nearly the same."""
    comparable: dict[object, list[str]] = {}
    for name in unused:
        comparable.setdefault(_outline(name), []).append(name)
    hints: list[str] = []
    for name in [name for name in kept if _outline(name) in comparable][:_TRIED_NAMES]:
        others = comparable[_outline(name)]
        near = next((other for other in nearest(name, others) if _is_nearly(name, other)), None)
        if near is not None and len(hints) < _HINTS:
            others.remove(near)
            hints.append(f"{name!r} is missing and {near!r} is {word}; is one of them misspelt?")
    return tuple(hints)


def _outline(name: str) -> tuple[int, tuple[str, ...]]:
    return len(SEPARATOR.findall(name)), tuple(re.findall(r"\d+", name))


def _is_nearly(name: str, other: str) -> bool:
    import difflib

    parts = zip(SEPARATOR.split(name.casefold()), SEPARATOR.split(other.casefold()), strict=True)
    return all(a == b or difflib.SequenceMatcher(None, a, b).ratio() >= _NEARLY for a, b in parts)


def _part_starts(name: str) -> list[int]:
    """Return where the parts of a name start; of one with many parts, those at which a prefix of a program can end."""
    cuts = (cut.end() for cut in SEPARATOR.finditer(name) if cut.end() < len(name))
    return [0, *islice(cuts, _MOST_PARTS)]


def _count_matches(sources: list[str], targets: dict[str, None], old: str, new: str) -> int:
    try:
        return sum(name in targets for name in select(sources, rename={old: new}))
    except UsageError:
        return 0
