"""Words for messages: counts with their nouns, the names most similar to a wrong one, and long lists cut short."""

from __future__ import annotations

import heapq
from collections.abc import Iterable

__all__ = ["listed", "nearest", "plural", "shortened"]

_CUTOFF = 0.6
_CANDIDATES = 32


def nearest(name: str, names: Iterable[str], count: int = 3) -> tuple[str, ...]:
    """Return at most `count` names that are similar to this one, the most similar first."""
    import difflib

    wanted = _letter_pairs(name)
    plausible = (
        other
        for other in names
        if 2 * min(len(name), len(other)) >= _CUTOFF * (len(name) + len(other))  # difflib's own bound, at less cost
    )

    def shared(other: str) -> float:
        theirs = _letter_pairs(other)
        return len(wanted & theirs) / (len(wanted) + len(theirs))

    candidates = heapq.nlargest(_CANDIDATES, plausible, key=shared)
    return tuple(difflib.get_close_matches(name, candidates, n=count, cutoff=_CUTOFF))


def listed(items: list[str], limit: int = 3) -> str:
    """Return the first few items as text, and the number of those left out: "a, b, c, and 2 more"."""
    return ", ".join(shortened(items, limit))


def shortened(items: list[str], limit: int) -> list[str]:
    """Return the first few items and, in place of the others, their number: "and 2 more"."""
    return [*items[:limit], *([f"and {len(items) - limit} more"] if len(items) > limit else [])]


def plural(count: int, noun: str) -> str:
    """Return a count with its noun: "1 variable", "10,000 variables"."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _letter_pairs(name: str) -> set[str]:
    text = f" {name.casefold()} "
    return {text[i : i + 2] for i in range(len(text) - 1)}
