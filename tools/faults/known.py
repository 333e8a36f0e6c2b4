"""Known losses: faults of varstore that have not been fixed yet.

A loss that is not in the table makes the run fail, and so does a row whose loss no longer occurs. Whoever fixes a fault
removes its row.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Final

from tools.faults.campaign import Loss

__all__ = ["known_losses"]

_KNOWN: Final[Mapping[tuple[str, str], frozenset[Loss]]] = {
    ("seal", "SIGKILL"): frozenset({Loss.LEFT_OVER}),  # nothing removes `.manifest.*`
    ("seal", "EIO"): frozenset({Loss.WRONG_ERROR}),  # a folder that cannot be read is a FormatError
}


def known_losses(scenario: str, fault: str) -> Collection[Loss]:
    """Return the known losses of a scenario with a fault."""
    return _KNOWN.get((scenario, fault), frozenset())
