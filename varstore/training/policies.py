"""When to save and what to keep: small pure objects that combine with ``|``, any of them deciding.

A policy looks at records of saves and at nothing else: no clock, no disk. Each says of itself, in words, what it
asks for; those words are the reasons that `retain` gives.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal, TypeAlias, get_args

from varstore.errors import UsageError

__all__ = [
    "AtSteps",
    "Best",
    "BestMode",
    "EverySeconds",
    "EverySteps",
    "Keep",
    "KeepEverySteps",
    "KeepIf",
    "Latest",
    "OnePerMinutes",
    "Pinned",
    "SaveIf",
    "Saved",
    "When",
    "policies_of",
    "retain",
]

BestMode: TypeAlias = Literal["min", "max"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Saved:
    """One complete checkpoint of a series; `time` in seconds since the epoch. It is its own path."""

    step: int
    time: float
    metrics: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))
    path: str = ""

    def __fspath__(self) -> str:
        return self.path


class When(ABC):
    """Decides whether a step is saved; `last` is the newest save, None before the first."""

    @abstractmethod
    def should_save(self, step: int, now: float, last: Saved | None) -> bool:
        """Tell whether to save at this step, at this time."""

    def __or__(self, other: When) -> When:
        return _WhenAny((*_whens(self), *_whens(other)))


@dataclass(frozen=True, slots=True)
class EverySteps(When):
    """At multiples of `n` steps."""

    n: int

    def __post_init__(self) -> None:
        _require_positive("EverySteps", self.n)

    def should_save(self, step: int, now: float, last: Saved | None) -> bool:  # noqa: ARG002
        """Tell whether the step is a multiple."""
        return step % self.n == 0


@dataclass(frozen=True, slots=True)
class EverySeconds(When):
    """When `seconds` have passed since the last save, and at the first step."""

    seconds: float

    def __post_init__(self) -> None:
        _require_positive("EverySeconds", self.seconds)

    def should_save(self, step: int, now: float, last: Saved | None) -> bool:  # noqa: ARG002
        """Tell whether it is time."""
        return last is None or now - last.time >= self.seconds


@dataclass(frozen=True, slots=True)
class AtSteps(When):
    """At the given steps."""

    steps: frozenset[int]

    def __init__(self, steps: Iterable[int]) -> None:
        object.__setattr__(self, "steps", frozenset(steps))

    def should_save(self, step: int, now: float, last: Saved | None) -> bool:  # noqa: ARG002
        """Tell whether the step is one of them."""
        return step in self.steps


@dataclass(frozen=True, slots=True)
class SaveIf(When):
    """Whenever a function of (step, now, last) says so."""

    function: Callable[[int, float, Saved | None], bool]

    def should_save(self, step: int, now: float, last: Saved | None) -> bool:
        """Ask the function."""
        return bool(self.function(step, now, last))


@dataclass(frozen=True, slots=True)
class _WhenAny(When):
    policies: tuple[When, ...]

    def should_save(self, step: int, now: float, last: Saved | None) -> bool:
        return any(policy.should_save(step, now, last) for policy in self.policies)


class Keep(ABC):
    """Decides which saves are kept, of `saves` in the order of their steps."""

    @abstractmethod
    def kept(self, saves: Sequence[Saved]) -> set[int]:
        """Return the steps that this policy wants kept."""

    def __or__(self, other: Keep) -> Keep:
        return _KeepAny((*policies_of(self), *policies_of(other)))


@dataclass(frozen=True, slots=True)
class Latest(Keep):
    """The `n` of the highest steps."""

    n: int = 1

    def __post_init__(self) -> None:
        _require_positive("Latest", self.n)

    def kept(self, saves: Sequence[Saved]) -> set[int]:
        """Return the last steps."""
        return {save.step for save in saves[-self.n :]}

    def __str__(self) -> str:
        return "latest" if self.n == 1 else f"latest {self.n}"


@dataclass(frozen=True, slots=True)
class Best(Keep):
    """The `n` with the lowest or highest metric, among equals the later ones; nan is no better than anything.

    Saves without the metric are all kept if `without_metric` says so.
    """

    metric: str
    n: int = 1
    mode: BestMode = "min"
    without_metric: bool = False

    def __post_init__(self) -> None:
        _require_positive("Best", self.n)
        if self.mode not in get_args(BestMode):
            raise UsageError("no such mode", field="Best.mode", found=repr(self.mode), expected="'min' or 'max'")

    def ranked(self, saves: Sequence[Saved]) -> list[Saved]:
        """Return the saves that have the metric, best first."""
        return sorted((save for save in saves if self.metric in save.metrics), key=self._rank)

    def _rank(self, save: Saved) -> tuple[bool, float, int]:
        value = float(save.metrics[self.metric])
        if math.isnan(value):
            return True, 0.0, -save.step
        return False, value if self.mode == "min" else -value, -save.step

    def kept(self, saves: Sequence[Saved]) -> set[int]:
        """Return the best steps."""
        kept = {save.step for save in self.ranked(saves)[: self.n]}
        if self.without_metric:
            kept |= {save.step for save in saves if self.metric not in save.metrics}
        return kept

    def __str__(self) -> str:
        return f"best {self.n} by {self.mode} {self.metric}"


@dataclass(frozen=True, slots=True)
class KeepEverySteps(Keep):
    """Multiples of `n` steps."""

    n: int

    def __post_init__(self) -> None:
        _require_positive("KeepEverySteps", self.n)

    def kept(self, saves: Sequence[Saved]) -> set[int]:
        """Return the multiples."""
        return {save.step for save in saves if save.step % self.n == 0}

    def __str__(self) -> str:
        return f"every {self.n} steps"


@dataclass(frozen=True, slots=True)
class OnePerMinutes(Keep):
    """The oldest of each window of `minutes`; a window begins with the first save that the one before leaves out."""

    minutes: float

    def __post_init__(self) -> None:
        _require_positive("OnePerMinutes", self.minutes)

    def kept(self, saves: Sequence[Saved]) -> set[int]:
        """Return the first step of each window."""
        kept = set()
        begin = -math.inf
        for save in sorted(saves, key=lambda save: (save.time, save.step)):
            if save.time - begin >= self.minutes * 60:
                kept.add(save.step)
                begin = save.time
        return kept

    def __str__(self) -> str:
        return f"one per {self.minutes:g} minutes"


@dataclass(frozen=True, slots=True)
class Pinned(Keep):
    """The given steps."""

    steps: frozenset[int]

    def __init__(self, steps: Iterable[int]) -> None:
        object.__setattr__(self, "steps", frozenset(steps))

    def kept(self, saves: Sequence[Saved]) -> set[int]:
        """Return those that were saved."""
        return {save.step for save in saves if save.step in self.steps}

    def __str__(self) -> str:
        return "pinned"


@dataclass(frozen=True, slots=True)
class KeepIf(Keep):
    """Whatever a function of a save wants kept."""

    function: Callable[[Saved], bool]

    def kept(self, saves: Sequence[Saved]) -> set[int]:
        """Ask the function."""
        return {save.step for save in saves if self.function(save)}

    def __str__(self) -> str:
        return getattr(self.function, "__name__", "a function")


@dataclass(frozen=True, slots=True)
class _KeepAny(Keep):
    policies: tuple[Keep, ...]

    def kept(self, saves: Sequence[Saved]) -> set[int]:
        return set().union(*(policy.kept(saves) for policy in self.policies))

    def __str__(self) -> str:
        return ", ".join(map(str, self.policies))


def retain(keep: Keep | None, saves: Iterable[Saved]) -> dict[int, tuple[str, ...]]:
    """Return the steps that stay, each with its reasons: what the policies say together, never nothing.

    Without a policy all stay; where the policies want none, the last one does.
    """
    ordered = sorted(saves, key=lambda save: save.step)
    if keep is None:
        return {save.step: ("no policy",) for save in ordered}
    reasons: dict[int, tuple[str, ...]] = {}
    for policy in policies_of(keep):
        for step in policy.kept(ordered):
            reasons[step] = (*reasons.get(step, ()), str(policy))
    if not reasons and ordered:
        reasons[ordered[-1].step] = ("the only one left",)
    return dict(sorted(reasons.items()))


def _whens(policy: When) -> tuple[When, ...]:
    return policy.policies if isinstance(policy, _WhenAny) else (policy,)


def policies_of(policy: Keep) -> tuple[Keep, ...]:
    """Return the policies that ``|`` made one of."""
    return policy.policies if isinstance(policy, _KeepAny) else (policy,)


def _require_positive(what: str, number: float) -> None:
    if not number > 0:
        raise UsageError("must be more than nothing", field=what, found=number)
