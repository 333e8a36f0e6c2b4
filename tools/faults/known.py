"""Known losses: faults of varstore that have not been fixed yet.

A loss that is not in the table makes the run fail, and so does a row whose loss no longer occurs. Whoever fixes a fault
removes its row.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Final

__all__ = ["known_losses"]

_KNOWN: Final[Mapping[tuple[str, str, str], frozenset[str]]] = {
    ("calls", "seal", "SIGKILL"): frozenset({"LEFT_OVER"}),  # nothing removes `.manifest.*`
    ("calls", "seal", "EIO"): frozenset({"WRONG_ERROR"}),  # a folder that cannot be read is a FormatError
}


def known_losses(command: str, scenario: str, fault: str) -> Collection[str]:
    """Return the known losses of a job: the names of the kinds."""
    return _KNOWN.get((command, scenario, fault), frozenset())
