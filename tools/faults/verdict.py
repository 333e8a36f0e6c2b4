"""Summarise the points of a scenario with a fault: what survived, what was lost, and what of that is known."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from tools.faults.campaign import Loss, Point

__all__ = ["Verdict"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """All points of a scenario with a fault, and the expected losses."""

    scenario: str
    fault: str
    points: Sequence[Point]
    known: Collection[Loss]

    @property
    def survived(self) -> int:
        """The number of points at which nothing was lost."""
        return sum(not point.losses for point in self.points)

    @property
    def lost(self) -> list[Point]:
        """The points at which something was lost that is not known."""
        return [point for point in self.points if point.losses.keys() - self.known]

    @property
    def excused(self) -> int:
        """The number of points at which losses occurred, all of them known."""
        return len(self.points) - self.survived - len(self.lost)

    @property
    def gone(self) -> set[Loss]:
        """The known losses that did not occur at any point."""
        return set(self.known).difference(*(point.losses for point in self.points))

    @property
    def ok(self) -> bool:
        """Whether there are points, and exactly the known losses occurred."""
        return bool(self.points) and not self.lost and not self.gone

    def complaints(self) -> Iterator[str]:
        """Yield a sentence for each thing that is not as it should be."""
        for point in self.lost:
            for loss in sorted(point.losses.keys() - self.known):
                yield f"{self.scenario}: {self.fault} at {point}: {loss}: {point.losses[loss]}"
        for loss in sorted(self.gone):
            yield f"{self.scenario}: {self.fault}: no point any more where {loss}: take it out of tools/faults/known.py"
        if not self.points:
            yield f"{self.scenario}: no call can have the fault {self.fault}"

    def as_json(self) -> dict[str, Any]:
        """Return the figures and all losses."""
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
