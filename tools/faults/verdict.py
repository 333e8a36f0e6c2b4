"""Judge the outcome of a job: what survived, what was lost, and what of that is known; and record it as JSON."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tools.faults.jobs import FOREIGN, Lost, Outcome
from tools.faults.known import Known

__all__ = ["Verdict", "outcome_of", "stale"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """The outcome of a job, and the losses that are known."""

    command: str
    scenario: str
    fault: str
    outcome: Outcome
    known: Collection[str]

    @property
    def points(self) -> int:
        return self.outcome.points

    @property
    def survived(self) -> int:
        """The number of points at which nothing was lost."""
        return self.points - len(self.outcome.lost)

    @property
    def lost(self) -> list[Lost]:
        """The points at which something was lost that is not known."""
        return [point for point in self.outcome.lost if point.losses.keys() - self.known]

    @property
    def foreign(self) -> int:
        """The number of them at which there was a foreign error."""
        return sum(FOREIGN in point.losses for point in self.lost)

    @property
    def excused(self) -> int:
        """The number of points at which losses occurred, all of them known."""
        return len(self.outcome.lost) - len(self.lost)

    @property
    def ok(self) -> bool:
        """Whether there are points, and only known losses occurred."""
        return self.points > 0 and not self.lost

    def complaints(self) -> Iterator[str]:
        """Yield a sentence for each thing that is not as it should be: of each kind of loss, one point of all."""
        where = f"{self.command}: {self.scenario}: {self.fault}"
        for loss in sorted({loss for point in self.lost for loss in point.losses.keys() - self.known}):
            first, *others = [point for point in self.lost if loss in point.losses]
            more = f" (and {len(others)} more)" if others else ""
            yield f"{where} at {first.point}{more}: {loss}: {first.losses[loss]}"
        if not self.points:
            yield f"{where}: no point can have this fault"

    def as_json(self) -> dict[str, Any]:
        """Return the figures and all losses."""
        return {
            "command": self.command,
            "scenario": self.scenario,
            "fault": self.fault,
            "points": self.points,
            "survived": self.survived,
            "known": self.excused,
            "lost": len(self.lost),
            "foreign": self.foreign,
            "losses": [{"point": point.point, **point.losses} for point in self.outcome.lost],
        }


def stale(rows: Iterable[Known], verdicts: Iterable[Verdict], *, is_all: bool) -> Iterator[str]:
    """Yield a sentence for each known loss that did not occur; `is_all` says that every job has its verdict."""
    verdicts = list(verdicts)
    for row in rows:
        about = [v for v in verdicts if row.is_about(v.command, v.scenario, v.fault)]
        occurred = {loss for verdict in about for point in verdict.outcome.lost for loss in point.losses}
        if (about or is_all) and (is_all or not row.is_pattern) and not occurred.issuperset(row.losses):
            yield f"{row}: does not occur at any point any more: take it out of tools/faults/known.py"


def outcome_of(row: Mapping[str, Any]) -> Outcome:
    """Return the outcome that a row of `Verdict.as_json` records."""
    losses = [dict(loss) for loss in row["losses"]]
    return Outcome(points=row["points"], lost=[Lost(point=loss.pop("point"), losses=loss) for loss in losses])
