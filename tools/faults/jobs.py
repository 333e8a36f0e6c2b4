"""What a command of the campaign consists of: jobs, each of which tries one kind of fault on one scenario.

A command is a module with a function ``jobs(*, whole: bool) -> Iterator[Job]``. With `whole` it yields everything,
without it a part that takes a few seconds. A job must give the same outcome each time: random choices have fixed seeds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

__all__ = ["FOREIGN", "Command", "Job", "Lost", "Outcome", "Unavailable"]

FOREIGN: Final = "FOREIGN"
"""The loss that is counted by itself: an error that is not in varstore's tree, or ended the process."""


class Unavailable(Exception):
    """A fault cannot be injected on this machine; the message says what is missing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Lost:
    """A point at which something was lost."""

    point: str
    losses: Mapping[str, str]
    """Maps each kind of loss to what was found."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """How many points were tried, and those at which something was lost."""

    points: int
    lost: Sequence[Lost] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One kind of fault, tried at every point of one scenario."""

    scenario: str
    fault: str
    run: Callable[[Path], Outcome]
    """Is given an empty directory. It may raise `Unavailable`."""


class Command(Protocol):
    """A module that is a command."""

    def jobs(self, *, whole: bool) -> Iterator[Job]: ...
