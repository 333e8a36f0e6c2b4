"""Known losses: faults of varstore that have not been fixed yet.

A loss that is not in the table makes the run fail, and so does a row whose losses no longer occur. Whoever fixes a
fault removes its row.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Collection
from dataclasses import dataclass
from typing import Final

__all__ = ["KNOWN", "Known", "known_losses"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Known:
    """Losses of the jobs that match the patterns."""

    command: str
    scenario: str
    fault: str
    losses: Collection[str]

    def is_about(self, command: str, scenario: str, fault: str) -> bool:
        """Return whether a job matches."""
        return (
            command == self.command
            and fnmatch.fnmatchcase(scenario, self.scenario)
            and fnmatch.fnmatchcase(fault, self.fault)
        )

    @property
    def is_pattern(self) -> bool:
        """Whether it is about more than one job, so that only a whole run can tell that it no longer occurs."""
        return "*" in self.scenario + self.fault

    def __str__(self) -> str:
        return f"{self.command}: {self.scenario}: {self.fault}: {', '.join(sorted(self.losses))}"


KNOWN: Final[tuple[Known, ...]] = ()


def known_losses(command: str, scenario: str, fault: str) -> Collection[str]:
    """Return the known losses of a job: the names of the kinds."""
    return {loss for known in KNOWN if known.is_about(command, scenario, fault) for loss in known.losses}
