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


KNOWN: Final = (
    # Ctrl-C between the return of os.open and the assignment of its result
    Known(command="calls", scenario="*", fault="SIGINT", losses={"LEAK"}),
    # Ctrl-C while what was replaced is removed becomes an error of the close that follows
    Known(command="calls", scenario="overwrite*", fault="SIGINT", losses={"WRONG_ERROR"}),
    # nothing removes the temporary files of a killed write, nor `.manifest.*`
    Known(command="calls", scenario="write torch", fault="SIGKILL", losses={"LEFT_OVER", "UNCLEAN"}),
    Known(command="calls", scenario="seal", fault="SIGKILL", losses={"LEFT_OVER", "UNCLEAN"}),
    # zipfile takes an lseek that fails for a file that cannot seek
    Known(command="calls", scenario="write torch", fault="EIO", losses={"HALF_DONE", "SILENT"}),
    # a folder that cannot be read is a FormatError
    Known(command="calls", scenario="seal", fault="EIO", losses={"WRONG_ERROR"}),
    # what is written for other systems does not sync the folder that holds its name
    Known(command="power", scenario="*to *", fault="*", losses={"FORGOTTEN"}),
    Known(command="power", scenario="write *", fault="*", losses={"FORGOTTEN"}),
    Known(command="power", scenario="*oneflow", fault="*", losses={"TORN"}),
    Known(command="power", scenario="*sharded*", fault="*", losses={"TORN"}),
    # a step that is to be deleted loses its files before the loss of its name is durable
    Known(command="power", scenario="manager*", fault="*", losses={"TORN"}),
    Known(command="power", scenario="trim", fault="*", losses={"TORN"}),
    Known(command="power", scenario="ModelCheckpoint", fault="*", losses={"FORGOTTEN", "TORN"}),
)


def known_losses(command: str, scenario: str, fault: str) -> Collection[str]:
    """Return the known losses of a job: the names of the kinds."""
    return {loss for known in KNOWN if known.is_about(command, scenario, fault) for loss in known.losses}
