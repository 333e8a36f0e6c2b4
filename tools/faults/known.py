"""What is lost today: faults of varstore that are known and not mended yet.

The table is strict both ways: a loss that it does not list fails the run, and so does one that it lists and that
occurs no more. Whoever mends a fault takes its row out.
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
    """Return what is known to be lost in a scenario by a fault."""
    return _KNOWN.get((scenario, fault), frozenset())
