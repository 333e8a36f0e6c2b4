"""Words that help: the names nearest to a wrong one, and long lists cut short."""

from __future__ import annotations

import heapq
from collections.abc import Iterable

__all__ = ["listed", "nearest"]

_CUTOFF = 0.6
_CANDIDATES = 32


def nearest(name: str, names: Iterable[str], count: int = 3) -> tuple[str, ...]:
    """Return the names that look most like this one, best first; few or none where nothing is near."""
    import difflib

    wanted = _letter_pairs(name)
    plausible = (
        other
        for other in names
        if 2 * min(len(name), len(other)) >= _CUTOFF * (len(name) + len(other))  # difflib's bound, without its cost
    )

    def shared(other: str) -> float:
        theirs = _letter_pairs(other)
        return len(wanted & theirs) / (len(wanted) + len(theirs))

    candidates = heapq.nlargest(_CANDIDATES, plausible, key=shared)
    return tuple(difflib.get_close_matches(name, candidates, n=count, cutoff=_CUTOFF))


def listed(items: list[str], limit: int = 3, between: str = ", ") -> str:
    """Return the first few items as text, and how many more there are."""
    more = [f"and {len(items) - limit} more"] if len(items) > limit else []
    return between.join([*items[:limit], *more])


def _letter_pairs(name: str) -> set[str]:
    text = f" {name.casefold()} "
    return {text[i : i + 2] for i in range(len(text) - 1)}
