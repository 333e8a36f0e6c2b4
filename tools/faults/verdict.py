"""Sum up the points of a scenario under a fault: what survived, what was lost, what is known of it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from tools.faults.campaign import Loss, Point

__all__ = ["Verdict"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """All points of a scenario under a fault, and the losses that were expected."""

    scenario: str
    fault: str
    points: Sequence[Point]
    known: Collection[Loss]

    @property
    def survived(self) -> int:
        """Points at which nothing was lost."""
        return sum(not point.losses for point in self.points)

    @property
    def lost(self) -> list[Point]:
        """Points at which something was lost that is not known."""
        return [point for point in self.points if point.losses.keys() - self.known]

    @property
    def excused(self) -> int:
        """Points at which only known things were lost."""
        return len(self.points) - self.survived - len(self.lost)

    @property
    def gone(self) -> set[Loss]:
        """What is known to be lost and was not, at any point."""
        return set(self.known).difference(*(point.losses for point in self.points))

    @property
    def ok(self) -> bool:
        """Whether there are points, and exactly the known losses."""
        return bool(self.points) and not self.lost and not self.gone

    def complaints(self) -> Iterator[str]:
        """Yield a sentence for all that is not as it should be."""
        for point in self.lost:
            for loss in sorted(point.losses.keys() - self.known):
                yield f"{self.scenario}: {self.fault} at {point}: {loss}: {point.losses[loss]}"
        for loss in sorted(self.gone):
            yield f"{self.scenario}: {self.fault}: no point any more where {loss}: take it out of tools/faults/known.py"
        if not self.points:
            yield f"{self.scenario}: no call can have the fault {self.fault}"

    def as_json(self) -> dict[str, Any]:
        """Return the figures and every loss."""
        return {
            "scenario": self.scenario,
            "fault": self.fault,
            "points": len(self.points),
            "survived": self.survived,
            "known": self.excused,
            "lost": len(self.lost),
            "losses": [
                {"call": str(point), "loss": loss.name, "found": found}
                for point in self.points
                for loss, found in point.losses.items()
            ],
        }
