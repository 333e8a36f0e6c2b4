"""When to save and what to keep: small immutable objects that are combined with ``|`` or in a list, which means "or".

A policy decides by the records of the saves and by nothing else, neither a clock nor the disk. As text, it says what it
keeps; `retain` gives these texts as reasons.

Times come from clocks that may be set, back or ahead. So a time is only ever compared with the one before it in the
order of the steps, and time that seems to run backwards counts as enough time.
"""

from __future__ import annotations

import math
import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import Any, Literal, TypeAlias, get_args

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
    "keep_of",
    "looks_at_metrics",
    "policies_of",
    "retain",
    "when_of",
]

BestMode: TypeAlias = Literal["min", "max"]
_LOWER_IS_BETTER = ("loss", "error", "err", "perplexity", "ppl", "wer", "cer", "mse", "rmse", "mae")


@dataclass(frozen=True, kw_only=True, slots=True)
class Saved:
    """A complete checkpoint of a run; `time` is in seconds since the epoch. It can be used as a path."""

    step: int
    time: float
    metrics: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))
    path: str = ""

    def __fspath__(self) -> str:
        return self.path

    def __reduce__(self) -> tuple[Any, ...]:
        same = partial(type(self), step=self.step, time=self.time, metrics=dict(self.metrics), path=self.path)
        return same, ()  # a view of a dict cannot be pickled


class When(ABC):
    """Base of the policies that decide whether a step is saved."""

    @abstractmethod
    def should_save(self, step: int, now: float, last: Saved | None) -> bool:
        """Tell whether to save step `step` at the time `now`; `last` is the newest save, None before the first."""

    def __or__(self, other: When) -> When:
        return _WhenAny((*_whens(self), *_whens(other))) if isinstance(other, When) else NotImplemented


@dataclass(frozen=True, slots=True)
class EverySteps(When):
    """Save at the multiples of `n` steps.

    Example:
        >>> policy = vs.EverySteps(100)
        >>> [step for step in range(0, 301, 50) if policy.should_save(step, now=0.0, last=None)]
        [0, 100, 200, 300]
    """

    n: int

    def __post_init__(self) -> None:
        _require_count("EverySteps.n", self.n)

    def should_save(self, step: int, now: float, last: Saved | None) -> bool:  # noqa: ARG002
        """Tell whether the step is a multiple of `n`."""
        return step % self.n == 0


@dataclass(frozen=True, slots=True)
class EverySeconds(When):
    """Save when `seconds` have passed since the last save, at the first step, and if the clock was set back.

    Example:
        >>> with vs.CheckpointManager("run", save_when=vs.EverySeconds(600)) as manager:
        ...     for step in range(3):
        ...         if manager.should_save(step):
        ...             pending = manager.save(step, {"w": np.zeros(3)})
        >>> [saved.step for saved in manager.all()]
        [0]
    """

    seconds: float

    def __post_init__(self) -> None:
        _require_positive("EverySeconds.seconds", self.seconds)

    def should_save(self, step: int, now: float, last: Saved | None) -> bool:  # noqa: ARG002
        """Tell whether enough time has passed."""
        return last is None or _has_passed(self.seconds, last.time, now)


@dataclass(frozen=True, slots=True)
class AtSteps(When):
    """Save at the given steps.

    Example:
        >>> policy = vs.AtSteps([10, 1000]) | vs.EverySteps(400)
        >>> [step for step in range(1, 1001) if policy.should_save(step, now=0.0, last=None)]
        [10, 400, 800, 1000]
    """

    steps: frozenset[int]

    def __init__(self, steps: Iterable[int]) -> None:
        object.__setattr__(self, "steps", _steps("AtSteps.steps", steps))

    def should_save(self, step: int, now: float, last: Saved | None) -> bool:  # noqa: ARG002
        """Tell whether the step is one of them."""
        return step in self.steps


@dataclass(frozen=True, slots=True)
class SaveIf(When):
    """Save when a function of (step, now, last) returns True; `last` is the newest save, None before the first.

    Example:
        >>> policy = vs.SaveIf(lambda step, now, last: last is None or step >= 2 * last.step)
        >>> policy.should_save(1, now=0.0, last=None)
        True
    """

    function: Callable[[int, float, Saved | None], bool]

    def __post_init__(self) -> None:
        _require_function("SaveIf.function", self.function)

    def should_save(self, step: int, now: float, last: Saved | None) -> bool:
        """Return what the function returns."""
        return bool(self.function(step, now, last))


@dataclass(frozen=True, slots=True)
class _WhenAny(When):
    policies: tuple[When, ...]

    def should_save(self, step: int, now: float, last: Saved | None) -> bool:
        return any(policy.should_save(step, now, last) for policy in self.policies)


class Keep(ABC):
    """Base of the policies that decide which saves are kept."""

    @abstractmethod
    def kept(self, saves: Sequence[Saved]) -> set[int]:
        """Return the steps to keep of `saves`, which are in the order of their steps."""

    def __or__(self, other: Keep) -> Keep:
        return _KeepAny((*policies_of(self), *policies_of(other))) if isinstance(other, Keep) else NotImplemented


@dataclass(frozen=True, slots=True)
class Latest(Keep):
    """Keep the `n` highest steps.

    Example:
        >>> with vs.CheckpointManager("run", keep=vs.Latest(2)) as manager:
        ...     for step in range(5):
        ...         pending = manager.save(step, {"w": np.zeros(3)})
        >>> [saved.step for saved in manager.all()]
        [3, 4]
    """

    n: int = 1

    def __post_init__(self) -> None:
        _require_count("Latest.n", self.n)

    def kept(self, saves: Sequence[Saved]) -> set[int]:
        """Return the `n` highest steps."""
        return {save.step for save in saves[-self.n :]}

    def __str__(self) -> str:
        return "latest" if self.n == 1 else f"latest {self.n}"


@dataclass(frozen=True, slots=True)
class Best(Keep):
    """Keep the `n` steps with the lowest (`mode` "min") or highest ("max") value of a metric.

    Of equal values, the later step counts as better; nan counts as worst. Saves that do not have the metric are not
    kept, or all of them if `without_metric` is True. If no save has the metric, all are kept.

    Without a mode, it is "min" for a metric whose name ends in "loss", "error", "err", "perplexity", "ppl", "wer",
    "cer", "mse", "rmse" or "mae". Any other metric needs one.

    Raises:
        UsageError: `n` is not a positive integer; `mode` is unknown, or missing where the metric's name does not tell
            it.

    Example:
        >>> with vs.CheckpointManager("run", keep=vs.Best("accuracy", mode="max")) as manager:
        ...     for step, accuracy in enumerate([0.5, 0.9, 0.7]):
        ...         pending = manager.save(step, {"w": np.zeros(3)}, metrics={"accuracy": accuracy})
        >>> manager.best().step
        1
    """

    metric: str
    n: int = 1
    mode: BestMode | None = None
    without_metric: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.metric, str):
            raise UsageError("must be the name of a metric", field="Best.metric", found=repr(self.metric))
        _require_count("Best.n", self.n)
        if self.mode is None:
            object.__setattr__(self, "mode", self._mode_by_name())
        if self.mode not in get_args(BestMode):
            raise UsageError("unknown mode", field="Best.mode", found=repr(self.mode), expected="'min' or 'max'")

    def _mode_by_name(self) -> BestMode:
        if self.metric.lower().endswith(_LOWER_IS_BETTER):
            return "min"
        raise UsageError(
            f"the name {self.metric!r} does not tell which values are better",
            field="Best.mode",
            expected="'min' or 'max'",
            hint=f"pass mode='max' if a higher {self.metric} is better",
        )

    def ranked(self, saves: Sequence[Saved]) -> list[Saved]:
        """Return the saves that have the metric, best first."""
        return sorted((save for save in saves if self.metric in save.metrics), key=self._rank)

    def _rank(self, save: Saved) -> tuple[bool, float, int]:
        value = float(save.metrics[self.metric])
        if math.isnan(value):
            return True, 0.0, -save.step
        return False, value if self.mode == "min" else -value, -save.step

    def kept(self, saves: Sequence[Saved]) -> set[int]:
        """Return the `n` best steps; all if none has the metric."""
        kept = {save.step for save in self.ranked(saves)[: self.n]}
        if self.without_metric or not kept:
            kept |= {save.step for save in saves if self.metric not in save.metrics}
        return kept

    def __str__(self) -> str:
        return f"best {self.n} by {self.mode} {self.metric}"


@dataclass(frozen=True, slots=True)
class KeepEverySteps(Keep):
    """Keep the multiples of `n` steps.

    Example:
        >>> with vs.CheckpointManager("run", keep=vs.KeepEverySteps(2) | vs.Latest()) as manager:
        ...     for step in range(6):
        ...         pending = manager.save(step, {"w": np.zeros(3)})
        >>> [saved.step for saved in manager.all()]
        [0, 2, 4, 5]
    """

    n: int

    def __post_init__(self) -> None:
        _require_count("KeepEverySteps.n", self.n)

    def kept(self, saves: Sequence[Saved]) -> set[int]:
        """Return the multiples of `n`."""
        return {save.step for save in saves if save.step % self.n == 0}

    def __str__(self) -> str:
        return f"every {self.n} steps"


@dataclass(frozen=True, slots=True)
class OnePerMinutes(Keep):
    """Keep one save per `minutes`: the first, and each that is at least so much later than the last one kept.

    A save that seems to be earlier than the last one kept, because a clock was set, is kept too.

    Example:
        >>> clock = iter(range(0, 6000, 600)).__next__  # a save every ten minutes
        >>> with vs.CheckpointManager("run", keep=vs.OnePerMinutes(30), clock=clock) as manager:
        ...     for step in range(7):
        ...         pending = manager.save(step, {"w": np.zeros(3)})
        >>> [saved.step for saved in manager.all()]
        [0, 3, 6]
    """

    minutes: float

    def __post_init__(self) -> None:
        _require_positive("OnePerMinutes.minutes", self.minutes)

    def kept(self, saves: Sequence[Saved]) -> set[int]:
        """Return the first step, and each that is late enough after the one before it."""
        kept = set()
        last = -math.inf
        for save in saves:
            if _has_passed(self.minutes * 60, last, save.time):
                kept.add(save.step)
                last = save.time
        return kept

    def __str__(self) -> str:
        return f"one per {self.minutes:g} minutes"


@dataclass(frozen=True, slots=True)
class Pinned(Keep):
    """Keep the given steps.

    Example:
        >>> with vs.CheckpointManager("run", keep=vs.Pinned([1]) | vs.Latest()) as manager:
        ...     for step in range(4):
        ...         pending = manager.save(step, {"w": np.zeros(3)})
        >>> [saved.step for saved in manager.all()]
        [1, 3]
    """

    steps: frozenset[int]

    def __init__(self, steps: Iterable[int]) -> None:
        object.__setattr__(self, "steps", _steps("Pinned.steps", steps))

    def kept(self, saves: Sequence[Saved]) -> set[int]:
        """Return those of the steps that were saved."""
        return {save.step for save in saves if save.step in self.steps}

    def __str__(self) -> str:
        return "pinned"


@dataclass(frozen=True, slots=True)
class KeepIf(Keep):
    """Keep the saves for which a function returns True; it gets the save's `step`, `time` and `metrics`.

    Example:
        >>> with vs.CheckpointManager("run", keep=vs.KeepIf(lambda save: save.metrics["loss"] < 0.3)) as manager:
        ...     for step in range(4):
        ...         pending = manager.save(step, {"w": np.zeros(3)}, metrics={"loss": 1 / (step + 1)})
        >>> [saved.step for saved in manager.all()]
        [3]
    """

    function: Callable[[Saved], bool]

    def __post_init__(self) -> None:
        _require_function("KeepIf.function", self.function)

    def kept(self, saves: Sequence[Saved]) -> set[int]:
        """Return the steps for which the function returns True."""
        return {save.step for save in saves if self.function(save)}

    def __str__(self) -> str:
        return getattr(self.function, "__name__", "a function")


_WITHOUT_METRICS = (Latest, KeepEverySteps, OnePerMinutes, Pinned)


@dataclass(frozen=True, slots=True)
class _KeepAny(Keep):
    policies: tuple[Keep, ...]

    def kept(self, saves: Sequence[Saved]) -> set[int]:
        return set().union(*(policy.kept(saves) for policy in self.policies))

    def __str__(self) -> str:
        return ", ".join(map(str, self.policies))


def retain(keep: Keep | None, saves: Iterable[Saved]) -> dict[int, tuple[str, ...]]:
    """Return the steps to keep, each with the reasons: the texts of the policies that want it.

    Without a policy, all are kept. With one, the highest step is kept even if no policy wants it: a run resumes there.
    """
    ordered = sorted(saves, key=lambda save: save.step)
    if keep is None:
        return {save.step: ("no policy",) for save in ordered}
    reasons: dict[int, tuple[str, ...]] = {}
    for policy in policies_of(keep):
        for step in policy.kept(ordered):
            reasons[step] = (*reasons.get(step, ()), str(policy))
    if ordered:
        reasons.setdefault(ordered[-1].step, ("the latest",))
    return dict(sorted(reasons.items()))


def looks_at_metrics(keep: Keep | None) -> bool:
    """Tell whether a policy may decide by metrics, as `Best`, `KeepIf` and those of others do."""
    return keep is not None and not all(isinstance(policy, _WITHOUT_METRICS) for policy in policies_of(keep))


def keep_of(given: Keep | Sequence[Keep] | None, *, field: str) -> Keep | None:
    """Return the policy that an argument stands for; a list means any of its policies.

    Raises:
        UsageError: it is neither a policy nor a list of policies.
    """
    if given is None or isinstance(given, Keep):
        return given
    if _is_list_of(Keep, given):
        return _KeepAny(tuple(one for policy in given for one in policies_of(policy)))
    raise _no_policy(field, given, "as Latest(3), or [Latest(3), Best('loss')]")


def when_of(given: When | Sequence[When] | None, *, field: str) -> When | None:
    """Return the policy that an argument stands for; a list means any of its policies.

    Raises:
        UsageError: it is neither a policy nor a list of policies.
    """
    if given is None or isinstance(given, When):
        return given
    if _is_list_of(When, given):
        return _WhenAny(tuple(one for policy in given for one in _whens(policy)))
    raise _no_policy(field, given, "as EverySteps(100), or [EverySteps(100), EverySeconds(600)]")


def _is_list_of(kind: type, given: object) -> bool:
    return isinstance(given, list | tuple) and bool(given) and all(isinstance(policy, kind) for policy in given)


def _no_policy(field: str, given: object, expected: str) -> UsageError:
    return UsageError("must be a policy or a list of policies", field=field, found=repr(given), expected=expected)


def _whens(policy: When) -> tuple[When, ...]:
    return policy.policies if isinstance(policy, _WhenAny) else (policy,)


def policies_of(policy: Keep) -> tuple[Keep, ...]:
    """Return the policies that were combined with ``|``."""
    return policy.policies if isinstance(policy, _KeepAny) else (policy,)


def _has_passed(seconds: float, since: float, now: float) -> bool:
    return not 0 <= now - since < seconds


def _steps(field: str, given: Iterable[int]) -> frozenset[int]:
    try:
        return frozenset(map(operator.index, given))
    except TypeError as error:
        raise UsageError(
            "must be several integers", field=field, found=repr(given), expected="as [10, 1000]"
        ) from error


def _require_count(field: str, number: int) -> None:
    try:
        is_positive = operator.index(number) > 0
    except TypeError:
        is_positive = False
    if not is_positive:
        raise UsageError("must be a positive integer", field=field, found=repr(number))


def _require_positive(field: str, number: float) -> None:
    try:
        is_positive = number > 0
    except TypeError:
        is_positive = False
    if not is_positive:
        raise UsageError("must be a positive number", field=field, found=repr(number))


def _require_function(field: str, function: object) -> None:
    if not callable(function):
        raise UsageError("must be a function", field=field, found=repr(function))
