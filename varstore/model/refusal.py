"""Refuse a load before anything changes: all that is wrong with it in one error, with what would let it pass.

Names that only need another prefix hide everything else that is wrong: no shape can be compared. So where the rename of
a prefix would help, the error also lists what would then be wrong.
"""

from __future__ import annotations

import glob
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, replace

from varstore.errors import UsageError, VariableMismatch
from varstore.model.match import (
    Match,
    Mismatch,
    OnMismatch,
    common_corner,
    is_same_kind,
    is_same_type,
    is_transposed,
)
from varstore.model.report import listed_as, make_report, rename_that_helps
from varstore.text.hints import listed, plural, shortened
from varstore.values.select import SEPARATOR, Patterns, Rename, matcher, patterns_of

__all__ = ["Demands", "refuse"]

_LINES = 10
_PATTERNS = 4
_CATEGORIES = ("kept", "unused", "mismatched")


@dataclass(frozen=True, kw_only=True, slots=True)
class Demands:
    """What a caller demands of a load, with the parameters of `varstore.load_into`; `missing` becomes a tuple.

    Where targets cannot be filled in part, `can_overlap` is False; where shapes and types must be the same, `must_fit`
    is True.

    Raises:
        UsageError: `missing` is not a pattern or several.
    """

    strict: bool = False
    missing: Patterns | None = None
    on_mismatch: OnMismatch = "error"
    cast: bool = False
    can_overlap: bool = True
    must_fit: bool = False

    def __post_init__(self) -> None:
        if self.missing is not None:
            is_word = isinstance(self.missing, str) and self.missing == "error"
            object.__setattr__(self, "missing", () if is_word else patterns_of("missing", self.missing))

    def wrong(self, match: Match) -> Match:
        """Return what of a match is not allowed."""
        stays = matcher(tuple(self.missing or ()))
        is_complete = self.strict or self.missing is not None
        return Match(
            pairs=(),
            kept=tuple(name for name in match.kept if not stays(name)) if is_complete else (),
            unused=match.unused if self.strict else (),
            mismatched=() if self.on_mismatch == "skip" else match.mismatched,
        )


def refuse(
    match: Match,
    demands: Demands,
    *,
    is_vain: bool,
    source: str,
    target: str,
    path: str | None,
    matched: Callable[[Rename], Match] | None = None,
) -> None:
    """Raise an error if a match is not what is demanded, or if it `is_vain`: nothing would be loaded.

    Args:
        source, target: the names of the two sides in messages.
        path: of the source, if it has one.
        matched: returns the match with another rename.

    Raises:
        VariableMismatch: lists all that is wrong.
    """
    wrong = demands.wrong(match)
    is_vain = is_vain and not wrong.mismatched
    if is_vain:
        wrong = replace(match, pairs=())
    elif wrong == Match(pairs=()):
        return
    elif not wrong.kept and not wrong.unused:
        count = plural(len(wrong.mismatched), "variable")
        raise VariableMismatch(
            f"shapes or types of {count} differ, source -> target:",
            rows=_by_difference(wrong.mismatched),
            path=path,
            hint=_ways_for_shapes(wrong.mismatched, demands, others=bool(match.pairs)),
        )
    problem = "" if match.pairs else "nothing is loaded: "
    counts, rows = _listed(wrong, source, target)
    hints = list(make_report(match, source=source, target=target).hints)
    suggestion = rename_that_helps(match)
    if suggestion is not None and matched is not None:
        rename, _ = suggestion
        with suppress(UsageError):  # two names would become one, or what is not an array would be taken for one
            match, is_vain = matched(rename), False
            wrong = demands.wrong(match)
            _, others = _listed(wrong, source, target)
            rows += [f"with rename={rename}:", *others] if others else []
    if is_vain and not hints and not wrong.mismatched:
        hints.append("pair the names with rename=, and choose others with include= and exclude=")
    if not is_vain and (wrong.kept or wrong.unused):
        hints.append(_ways_for_names(wrong, demands))
    if wrong.mismatched:
        hints.append(_ways_for_shapes(wrong.mismatched, demands, others=bool(match.pairs)))
    raise VariableMismatch(f"{source} -> {target}: {problem}{counts}", rows=rows, hint="; ".join(hints))


def _listed(wrong: Match, source: str, target: str) -> tuple[str, list[str]]:
    return listed_as(make_report(wrong, source=source, target=target), _CATEGORIES)


def _by_difference(mismatched: Iterable[Mismatch]) -> list[str]:
    alike: dict[str, list[str]] = {}
    for mismatch in mismatched:
        alike.setdefault(str(mismatch), []).append(mismatch.name)
    lines = [f"{listed(list(map(repr, names)))}: {difference}" for difference, names in alike.items()]
    return shortened(lines, _LINES)


# --- what would let it pass ------------------------------------------------------------------------------------------


def _ways_for_names(wrong: Match, demands: Demands) -> str:
    """Return the hint for names that are missing or unexpected."""
    both = "strict=False to load only the names that both sides have"
    if not wrong.kept:
        return f"pass {both}"
    patterns = _patterns(wrong.kept, tuple(demands.missing or ()))
    stay = f"missing={patterns} to let these targets keep their values"
    if demands.missing is not None:
        return f"pass {stay}" + (f", and {both}" if wrong.unused else "")
    if wrong.unused:
        return f"pair the names with rename=, or pass {both}"
    return f"pass {stay}, or {both}"


def _patterns(names: tuple[str, ...], given: tuple[str, ...]) -> str:
    """Return `missing` as Python text: the given patterns and those of more names."""
    groups: dict[str, list[str]] = {}
    for name in names:
        first = SEPARATOR.search(name)
        groups.setdefault(name[: first.end()] if first else name, []).append(name)
    patterns = [*given, *map(_pattern, groups.values())]
    if len(patterns) > _PATTERNS:
        return "[…], with patterns of these targets,"
    return repr(patterns[0] if len(patterns) == 1 else patterns)


def _names(names: list[str]) -> str:
    """Return names as Python text; a pattern for several might match others too."""
    return repr(names[0] if len(names) == 1 else names) if len(names) <= _PATTERNS else "[…], with these names,"


def _pattern(names: list[str]) -> str:
    if len(names) == 1:
        return names[0]
    first, last = min(names), max(names)
    same = next(at for at, (a, b) in enumerate(zip(first, f"{last}\0", strict=False)) if a != b)
    return glob.escape(first[: [cut.end() for cut in SEPARATOR.finditer(first, 0, same)][-1]]) + "*"


def _ways_for_shapes(mismatched: tuple[Mismatch, ...], demands: Demands, *, others: bool) -> str:
    """Return the hint: the options that would let at least one of these be loaded, or, beside `others`, stay as it is.

    Nothing but targets that stay as they are would be an error.
    """
    if demands.must_fit:
        left_out = _names([item.source_name for item in mismatched])
        stay = _names([*(demands.missing or ()), *(item.name for item in mismatched)])
        return f"pass exclude={left_out} and missing={stay} to leave these targets as they are"
    lacking = {_lacking(mismatch, demands) for mismatch in mismatched if _can_be_allowed(mismatch, demands)}
    ways = []
    if ("cast",) in lacking:
        ways.append("cast=True to convert between types of the same kind")
    if ("overlap",) in lacking:
        ways.append('on_mismatch="overlap" to copy the corner that two shapes share')
    if lacking == {("cast", "overlap")}:
        ways.append('cast=True and on_mismatch="overlap" together to convert the corner that two shapes share')
    if others:
        ways.append('on_mismatch="skip" to leave these targets as they are')
    if not ways:
        return "change the values yourself, and pass a dict of names and arrays as the source"
    return "pass " + (", ".join([*ways[:-1], f"or {ways[-1]}"]) if len(ways) > 1 else ways[0])


def _lacking(mismatch: Mismatch, demands: Demands) -> tuple[str, ...]:
    needs_cast = not demands.cast and not is_same_type(mismatch.source_dtype, mismatch.target_dtype)
    needs_overlap = demands.on_mismatch != "overlap" and mismatch.source_shape != mismatch.target_shape
    return ("cast",) * needs_cast + ("overlap",) * needs_overlap


def _can_be_allowed(mismatch: Mismatch, demands: Demands) -> bool:
    """Tell whether `cast` and "overlap" together would let it be loaded, with values that mean the same."""
    source, target = mismatch.source_dtype, mismatch.target_dtype
    fits = is_same_type(source, target) or is_same_kind(source, target)
    shapes = mismatch.source_shape, mismatch.target_shape
    if shapes[0] != shapes[1] and not demands.can_overlap:
        return False
    return fits and common_corner(*shapes) is not None and not is_transposed(*shapes)
