"""Do what can happen to a run in any order, and check that retention deletes what a small model says, and nothing else.

Saves, steps back, new managers with other policies, clocks that are set, markers, manifests and records that are lost,
folders that are moved, rewinds, and kills. After each of them, the directory holds what the model says, each step has
its values, and what was deleted was named before or logged. Where a kill interrupts, the directory is between the
states before and after.

The model restates the rules in its own words. The laws that must hold whatever the rules are, are checked apart:
the step just saved and the highest whole step are there, and nothing that is not whole is deleted.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from operator import or_
from pathlib import Path
from typing import Any, ClassVar, Final

import numpy as np
from hypothesis import HealthCheck, settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

import varstore as vs
from tools.faults.jobs import Job, Lost, Outcome
from varstore.layout.names import MANIFEST, MARKER
from varstore.training.policies import Keep

__all__ = ["RetentionMachine", "jobs"]

_EXAMPLES: Final = 25
_WHOLE: Final = 2_000
_LENGTH: Final = 40
_PART: Final = "opt/*"
_METRICS = st.fixed_dictionaries({}, optional={"loss": st.integers(0, 5).map(float), "acc": st.just(float("nan"))})


@dataclass(frozen=True)
class Step:
    """A step as the model knows it: `values` tell what was saved; `record` says what is left of what was recorded."""

    values: int
    time: float
    metrics: dict[str, float]
    run: int = 0
    rewound: int = 0
    record: str = "whole"
    lost: frozenset[str] = frozenset()
    is_link: bool = False
    is_trimmed: bool = False

    @property
    def is_whole(self) -> bool:
        return not self.lost

    @property
    def is_known(self) -> bool:
        return self.record == "whole"


Steps = dict[int, Step]


@dataclass(frozen=True)
class Policy:
    """A policy, and what it keeps of whole steps in order, in the words of the model."""

    policy: Keep
    keeps: Callable[[list[tuple[int, Step]]], set[int]]
    by_metrics: bool = False


def _best(metric: str, n: int, sign: int) -> Callable[[list[tuple[int, Step]]], set[int]]:
    def keeps(steps: list[tuple[int, Step]]) -> set[int]:
        having = [(number, step.metrics[metric]) for number, step in steps if metric in step.metrics]
        if not having:
            return {number for number, _ in steps}
        having.sort(key=lambda pair: (pair[1] != pair[1], sign * pair[1] if pair[1] == pair[1] else 0, -pair[0]))
        return {number for number, _ in having[:n]}

    return keeps


def _spaced(seconds: float) -> Callable[[list[tuple[int, Step]]], set[int]]:
    def keeps(steps: list[tuple[int, Step]]) -> set[int]:
        kept: list[tuple[int, Step]] = []
        for number, step in steps:
            if not kept or step.time < kept[-1][1].time or step.time >= kept[-1][1].time + seconds:
                kept.append((number, step))
        return {number for number, _ in kept}

    return keeps


POLICIES: Final = (
    Policy(vs.Latest(1), lambda steps: {number for number, _ in steps[-1:]}),
    Policy(vs.Latest(3), lambda steps: {number for number, _ in steps[-3:]}),
    Policy(vs.KeepEverySteps(4), lambda steps: {number for number, _ in steps if number % 4 == 0}),
    Policy(vs.Pinned([2, 7]), lambda steps: {number for number, _ in steps if number in (2, 7)}),
    Policy(vs.OnePerMinutes(2), _spaced(120)),
    Policy(vs.Best("loss"), _best("loss", 1, 1), by_metrics=True),
    Policy(vs.Best("acc", 2, "max"), _best("acc", 2, -1), by_metrics=True),
    Policy(
        vs.KeepIf(lambda saved: saved.metrics.get("loss") == 0),
        lambda steps: {number for number, step in steps if step.metrics.get("loss") == 0},
        by_metrics=True,
    ),
)
KEEPS = st.lists(st.sampled_from(POLICIES), max_size=2, unique_by=lambda policy: str(policy.policy))


def _whole(steps: Steps) -> Steps:
    return {number: step for number, step in sorted(steps.items()) if step.is_whole}


def _settled(steps: Steps) -> int:
    return max((step.rewound for step in _whole(steps).values() if step.is_known), default=0)


def _last_run(steps: Steps) -> int:
    return max((step.run for step in _whole(steps).values() if step.is_known), default=0)


def _wanted(policies: Sequence[Policy], steps: list[tuple[int, Step]]) -> set[int]:
    if not policies:
        return {number for number, _ in steps}
    return set().union(*(policy.keeps(steps) for policy in policies), {number for number, _ in steps[-1:]})


def pruned(steps: Steps, keep: Sequence[Policy], part: Sequence[Policy], just_saved: int | None) -> Steps:
    """Return what is left after retention."""
    by_metrics = any(policy.by_metrics for policy in keep)
    ordinary = [
        (number, step)
        for number, step in _whole(steps).items()
        if (step.is_known and step.run <= _settled(steps)) or (step.record == "none" and not by_metrics)
    ]
    gone = {number for number, _ in ordinary} - _wanted(keep, ordinary) - {just_saved} if keep else set()
    left = {number: step for number, step in steps.items() if number not in gone}
    if part:
        kept = [(number, step) for number, step in ordinary if number in left]
        untouched = _wanted(part, kept) | {just_saved}
        for number, step in kept:
            if number not in untouched and step.is_known and not step.is_link:
                left[number] = replace(step, is_trimmed=True)
    return left


class Told(logging.Handler):
    """What varstore logs."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())

    def take(self, beginning: str) -> list[str]:
        taken = [message for message in self.messages if message.startswith(beginning)]
        self.messages = [message for message in self.messages if message not in taken]
        return taken


class RetentionMachine(RuleBasedStateMachine):
    """A run and its model."""

    place: ClassVar[str | None] = None
    actions: ClassVar[int] = 0

    def __init__(self) -> None:
        super().__init__()
        self.home = Path(tempfile.mkdtemp(dir=self.place))
        self.run = self.home / "run"
        self.now = 1_000_000.0
        self.counter = 0
        self.steps: Steps = {}
        self.since_back: set[int] = set()
        self.manager: vs.CheckpointManager
        self.told = Told()
        self.log = logging.getLogger("varstore")
        self.log.addHandler(self.told)
        self.level = self.log.level
        self.log.setLevel(logging.INFO)

    def teardown(self) -> None:
        self.log.removeHandler(self.told)
        self.log.setLevel(self.level)
        shutil.rmtree(self.home)

    # --- what can happen

    @initialize(keep=KEEPS, part=KEEPS, background=st.booleans())
    def begin(self, keep: list[Policy], part: list[Policy], background: bool) -> None:
        self._new_manager(keep, part, background)

    @rule(keep=KEEPS, part=KEEPS, background=st.booleans())
    def begin_again(self, keep: list[Policy], part: list[Policy], background: bool) -> None:
        self._new_manager(keep, part, background)

    @rule(ahead=st.integers(1, 3), seconds=st.integers(0, 90), metrics=_METRICS)
    def save_the_next(self, ahead: int, seconds: int, metrics: dict[str, float]) -> None:
        self.now += seconds
        self._save(max(_whole(self.steps), default=0) + ahead, metrics, overwrite=False)

    @rule(step=st.integers(0, 12), metrics=_METRICS, overwrite=st.booleans())
    def save_any(self, step: int, metrics: dict[str, float], overwrite: bool) -> None:
        self._save(step, metrics, overwrite=overwrite)

    @rule(leap=st.sampled_from([-86_400.0, -30.0, 86_400.0]))
    def set_the_clock(self, leap: float) -> None:
        self.now += leap

    @rule(which=st.integers(0), what=st.sampled_from([MARKER, MANIFEST, "record", "metrics", "garbage"]))
    def lose(self, which: int, what: str) -> None:
        number = self._some_whole(which)
        if number is None:
            return
        step, path = self.steps[number], self.run / f"step-{number}"
        if what in (MARKER, MANIFEST):
            (path / what).unlink()
            self.steps[number] = replace(step, lost=frozenset({what}))
            return
        with vs.open(path) as checkpoint:
            attributes: dict[str, Any]
            if what == "metrics":
                if not step.is_known:
                    return
                attributes = {"training": {**checkpoint.attributes["training"], "metrics": {}}}
                self.steps[number] = replace(step, metrics={})
            else:
                attributes = {} if what == "record" else {"training": [1]}
                record = "none" if what == "record" else "garbage"
                self.steps[number] = replace(step, metrics={}, record=record, run=0, rewound=0)
            vs.save(os.path.realpath(path), checkpoint, attributes=attributes, overwrite=True, durable=False)
        if not self.steps[number].is_known:
            self.since_back.discard(number)  # nothing says it any more
            with vs.open(path) as checkpoint:  # without a record, it is as old as its manifest
                assert checkpoint.manifest is not None
                self.steps[number] = replace(self.steps[number], time=checkpoint.manifest.time_ns / 1e9)

    @rule(which=st.integers(0))
    def move(self, which: int) -> None:
        number = self._some_whole(which)
        if number is None or self.steps[number].is_link:
            return
        self.counter += 1
        target = self.home / f"moved-{self.counter}"
        (self.run / f"step-{number}").rename(target)
        (self.run / f"step-{number}").symlink_to(target)
        self.steps[number] = replace(self.steps[number], is_link=True)

    @rule(dry_run=st.booleans())
    def prune(self, dry_run: bool) -> None:
        after = pruned(self.steps, self.keep, self.part, self.last)
        report = self.manager.prune(dry_run=dry_run)
        assert set(report.deleted) == self.steps.keys() - after.keys()
        assert set(report.kept) == _whole(after).keys()
        assert not report.held
        if not dry_run:
            self._became(after)

    @rule(which=st.integers(0, 14))
    def rewind(self, which: int) -> None:
        whole = _whole(self.steps)
        later = {number for number, step in self.steps.items() if number > which and len(step.lost) < 2}
        if later and not any(number <= which for number in whole):
            with contextlib.suppress(vs.errors.UsageError):
                self.manager.rewind(which)
                raise AssertionError("no whole step is left")
            return
        report = self.manager.rewind(which)
        assert set(report.deleted) == later
        self.since_back.clear()
        self._became(self._rewound(which))
        self.last = max(_whole(self.steps), default=None)

    @precondition(lambda self: not self.background)
    @rule(
        step=st.integers(0, 14),
        what=st.sampled_from(["save", "overwrite", "prune", "rewind"]),
        at=st.integers(1, 400),
        keep=KEEPS,
        part=KEEPS,
    )
    def kill(self, step: int, what: str, at: int, keep: list[Policy], part: list[Policy]) -> None:
        before = self.steps
        saved = self._saved(step, {})
        if what in ("save", "overwrite"):
            if step in before and (what == "save" or before[step].is_link):
                return
            between = {**before, step: saved}
            after = pruned(between, self.keep, self.part, step)
        elif what == "prune":
            between, after = before, pruned(before, self.keep, self.part, self.last)
        else:
            if not any(number <= step for number in _whole(before)):
                return
            between, after = before, self._rewound(step)
        actions: dict[str, Callable[[], object]] = {
            "save": lambda: self._call_save(step, saved, overwrite=False),
            "overwrite": lambda: self._call_save(step, saved, overwrite=True),
            "prune": self.manager.prune,
            "rewind": lambda: self.manager.rewind(step),
        }
        _killed_at(at, actions[what])
        self.manager = vs.CheckpointManager(self.run)  # removes what is left of the kill
        self.told.messages.clear()
        self.steps = self._adopted(before, between, after)
        if what in ("save", "overwrite") and self.steps.get(step) == saved:
            self._note_step_back(before, step)
        if what == "rewind":
            self.since_back.clear()
        self._new_manager(keep, part, background=False)

    @rule()
    def restore_the_latest(self) -> None:
        whole = _whole(self.steps)
        if not whole:
            with contextlib.suppress(vs.errors.CheckpointNotFound):
                self.manager.restore()
                raise AssertionError("nothing can be restored")
            assert len(self.told.take("step ")) == len(self.steps)
            return
        highest = max(whole)
        assert self.manager.restore()["w"].tolist() == [whole[highest].values]
        passed = [number for number in self.steps if number > highest]
        assert len(self.told.take("step ")) == len(passed)
        for number, step in self.steps.items():
            assert not self.manager.should_save(number)
            with contextlib.suppress(vs.errors.FormatError, vs.errors.IncompleteCheckpoint):
                assert self.manager.restore(number)["w"].tolist() == [step.values]
                assert step.is_whole

    # --- how it is done, and what it leads to

    def _new_manager(self, keep: list[Policy], part: list[Policy], background: bool) -> None:
        RetentionMachine.actions += 1
        self.keep, self.part, self.background = keep, part, background
        self.manager = vs.CheckpointManager(
            self.run,
            keep=reduce(or_, (policy.policy for policy in keep)) if keep else None,
            keep_parts={_PART: [policy.policy for policy in part]} if part else None,
            background=background,
            clock=lambda: self.now,
            durable=False,
        )
        self.last = max(_whole(self.steps), default=None)
        after = pruned(self.steps, keep, part, None)
        gone = sorted(self.steps.keys() - after.keys())
        trimmed = [number for number in after if after[number] != self.steps[number]]
        expected = [f"the next save will delete steps of this directory: {', '.join(map(str, gone))}. "] if gone else []
        if trimmed:
            named = ", ".join(map(str, sorted(trimmed)))
            expected.append(f"the next save will remove variables from steps of this directory: {named}. ")
        told = self.told.take(f"{self.run}: the next save")
        assert [text in message for text, message in zip(expected, told, strict=True)] == [True] * len(told)
        self._compare()

    def _saved(self, step: int, metrics: dict[str, float]) -> Step:
        self.counter += 1
        settled, last = _settled(self.steps), _last_run(self.steps)
        is_back = last > settled or any(number > step for number in _whole(self.steps))
        run = max(last, settled + 1) if is_back else settled
        return Step(values=self.counter, time=self.now, metrics=metrics, run=run, rewound=settled)

    def _note_step_back(self, before: Steps, step: int) -> None:
        whole = _whole(before)
        if self.since_back & whole.keys() or any(number > step for number in whole):
            self.since_back.add(step)

    def _call_save(self, step: int, saved: Step, *, overwrite: bool) -> None:
        values = {"w": np.array([saved.values]), "opt": {"m": np.array([saved.values])}}
        self.manager.save(step, values, metrics=saved.metrics, overwrite=overwrite)
        self.manager.wait()

    def _save(self, step: int, metrics: dict[str, float], *, overwrite: bool) -> None:
        before, saved = self.steps, self._saved(step, metrics)
        there = before.get(step)
        if there is not None and (not overwrite or there.is_link or len(there.lost) == 2):
            with contextlib.suppress(vs.errors.CheckpointExists):
                self._call_save(step, saved, overwrite=overwrite)
                raise AssertionError("the step is there already")
            self._compare()
            return
        self._call_save(step, saved, overwrite=overwrite)
        self.last = step
        after = pruned({**before, step: saved}, self.keep, self.part, step)
        assert step in after
        self._note_step_back(before, step)
        self.steps = {**before, step: saved}
        self._became(after)
        if _last_run(self.steps) > _settled(self.steps):
            self.told.take(f"{self.run}: step {step} is saved after a step back")
        self.told.take(f"{self.run}: no step has the metric")

    def _rewound(self, to: int) -> Steps:
        left = {number: step for number, step in self.steps.items() if number <= to or len(step.lost) == 2}
        whole = {number: step for number, step in _whole(left).items() if number <= to and step.is_known}
        if _last_run(left) > _settled(left):
            mark = max(whole, key=lambda number: (not whole[number].is_link, number))
            left[mark] = replace(left[mark], rewound=_last_run(left))
        return left

    def _adopted(self, before: Steps, between: Steps, after: Steps) -> Steps:
        """Return which of the states between two the directory is in."""
        present = {int(name.removeprefix("step-")) for name in os.listdir(self.run)} if self.run.exists() else set()
        adopted: Steps = {}
        for number in present:
            candidates = [steps[number] for steps in (before, between, after) if number in steps]
            matching = [step for step in candidates if self._is_there(number, step)]
            assert matching, f"step {number} is neither old nor new"
            adopted[number] = matching[-1]
        assert adopted.keys() >= before.keys() & after.keys()
        is_saved = all(adopted.get(number) == step for number, step in between.items() if before.get(number) != step)
        assert adopted.keys() >= (after.keys() if is_saved else before.keys())
        return adopted

    def _is_there(self, number: int, step: Step) -> bool:
        path = self.run / f"step-{number}"
        lost = {name for name in (MARKER, MANIFEST) if not (path / name).exists()}
        if lost != step.lost or path.is_symlink() != step.is_link:
            return False
        return not step.is_whole or self._as_found(path) == (step.values, step.is_trimmed, step.rewound)

    def _as_found(self, path: Path) -> tuple[int, bool, int]:
        with vs.open(path) as checkpoint:
            said = checkpoint.attributes.get("training")
            rewound = said.get("rewound", 0) if isinstance(said, dict) else 0
            return int(checkpoint["w"][0]), "opt/m" not in checkpoint, rewound

    def _became(self, after: Steps) -> None:
        """Check that what went was whole and was told, and that all else is as the model says."""
        gone = self.steps.keys() - after.keys()
        told = self.told.take("deleted ")
        assert sorted(message.split(": ")[0] for message in told) == sorted(
            f"deleted {self.run}/step-{number}" for number in gone
        )
        for number in after:
            if after[number].is_trimmed and not self.steps[number].is_trimmed:
                assert self.told.take(f"removing {_PART} from {self.run}/step-{number}")
        self.steps = after
        self.manager.wait()
        self._compare()

    def _compare(self) -> None:
        RetentionMachine.actions += 1
        found = {saved.step: saved for saved in self.manager.all()}
        whole = _whole(self.steps)
        assert list(found) == list(whole)
        for number, step in whole.items():
            assert found[number].time == step.time
            assert repr(dict(found[number].metrics)) == repr(step.metrics)
            assert self._is_there(number, step)
        others = {f"step-{number}" for number, step in self.steps.items() if not step.is_whole}
        assert self.manager.others().keys() == others
        present = set(os.listdir(self.run)) if self.run.exists() else set()
        assert present == {f"step-{number}" for number in self.steps}
        assert self.since_back <= self.steps.keys()

    def _some_whole(self, which: int) -> int | None:
        whole = list(_whole(self.steps))
        return whole[which % len(whole)] if whole else None


def _killed_at(number: int, action: Callable[[], object]) -> None:
    """Do an action in a forked process, which is killed just before its n-th call of the operating system."""
    pid = os.fork()
    if pid:
        os.waitpid(pid, 0)
        return
    calls = 0

    def count(_: Any, event: str, function: Any) -> None:
        nonlocal calls
        if event == "c_call" and getattr(function, "__module__", None) in ("posix", "fcntl"):
            calls += 1
            if calls == number:
                os.kill(os.getpid(), signal.SIGKILL)

    with contextlib.suppress(BaseException):
        sys.setprofile(count)
        action()
    os._exit(0)


def jobs(*, whole: bool) -> Iterator[Job]:
    """Yield the jobs of this command."""
    examples = _WHOLE if whole else _EXAMPLES
    yield Job(scenario="a run of a manager", fault="any series", run=lambda place: _tried(place, examples))


def _tried(place: Path, examples: int) -> Outcome:
    machine = type("Machine", (RetentionMachine,), {"place": str(place)})
    RetentionMachine.actions = 0
    lost: list[Lost] = []
    try:
        run_state_machine_as_test(machine, settings=profile(examples))
    except Exception as error:
        lost.append(Lost(point="the shortest series", losses={"retention": f"{type(error).__name__}: {error}"}))
    return Outcome(points=RetentionMachine.actions, lost=lost)


def profile(examples: int) -> settings:
    """Return the settings for a number of random series, always the same."""
    return settings(
        max_examples=examples,
        stateful_step_count=_LENGTH,
        deadline=None,
        derandomize=True,
        database=None,
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )
