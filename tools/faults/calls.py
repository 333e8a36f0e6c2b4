"""Run a scenario with a fault at each of its points, and check what each leaves.

After any fault, these must hold. The target contains the old or the new checkpoint, complete, which opens and verifies.
Everything else beside it is unchanged, except for at most one staging folder. The next save works, and removes that
folder. If the call ended, it closed what it had opened. It returned only if the new checkpoint is in place, durably if
requested; otherwise it raised a StorageError, which says "undone" only if the old state is in place.
"""

from __future__ import annotations

import contextlib
import enum
import os
import re
import shutil
import signal
from collections.abc import Iterator, Mapping
from functools import cache, partial
from pathlib import Path

import varstore as vs
from tools.faults.children import Run, Said, run
from tools.faults.injector import COUNT, Action, Fault, Injector, fault_named
from tools.faults.jobs import Job, Lost, Outcome
from tools.faults.readback import Found, read
from tools.faults.scenarios import ATTRIBUTES, SCENARIOS, TARGET, Scenario

__all__ = ["Loss", "count_calls", "fresh_home", "jobs", "shared_injector", "visit"]

_STAGING = re.compile(rf"\.{TARGET}\.saving-[0-9a-f]{{8}}")
_SYNCS = {"fsync", "fdatasync", "syncfs", "sync_file_range"}


class Loss(enum.StrEnum):
    """What can be lost at a point."""

    UNREACHED = "the call that was to be met never came"
    HUNG = "the work did not come back"
    HALF_DONE = "neither the old checkpoint nor the new one is there"
    STRAY = "something else lies there than before"
    SILENT = "it returned, and the new checkpoint does not stand"
    UNSYNCED = "it returned although something could not be made durable"
    WRONG_ERROR = "it ended otherwise than the fault deserves"
    UNTRUE = "it said that the save was undone, and the new checkpoint stands"
    LEAK = "a descriptor was left open"
    UNSOUND = "what is there does not open or verify"
    STUCK = "what is done next does not work"
    LEFT_OVER = "what is done next leaves the left-over there"


Judgement = Iterator[tuple[Loss, str]]
State = Mapping[str, Found | None]
"""The content of the home directory, by name."""


def jobs(*, whole: bool) -> Iterator[Job]:
    """Yield a job for each scenario with each fault."""
    del whole
    for scenario in SCENARIOS:
        for name in ("SIGKILL", "EIO"):
            fault = fault_named(name)
            yield Job(scenario=scenario.name, fault=name, run=partial(_visit_with_shared, scenario, fault))


@cache
def shared_injector() -> Injector:
    """Return the injector, which is compiled once per process."""
    return Injector()


def _visit_with_shared(scenario: Scenario, fault: Fault, place: Path) -> Outcome:
    return visit(shared_injector(), scenario, fault, place)


def count_calls(injector: Injector, scenario: Scenario, place: Path) -> tuple[str, ...]:
    """Return the file system calls that a scenario makes without a fault; `place` is an empty directory.

    Raises:
        AssertionError: the scenario fails without a fault.
    """
    _warm_up(scenario, place)
    counted, losses = _meet(injector, scenario, COUNT, 0, place)
    assert not losses, f"{scenario.name} fails without any fault: {losses}"
    return counted.calls


def visit(injector: Injector, scenario: Scenario, fault: Fault, place: Path) -> Outcome:
    """Run the scenario with the fault at each call at which it can occur."""
    points, lost = 0, []
    for number, call in enumerate(count_calls(injector, scenario, place), 1):
        met, losses = _meet(injector, scenario, fault, number, place)
        if not met.hit and fault.is_partial:
            continue
        points += 1
        if losses:
            named = {loss.name: f"{loss}: {found}" for loss, found in losses.items()}
            lost.append(Lost(point=f"call {number}, {call}({met.where})", losses=named))
    return Outcome(points=points, lost=lost)


def _warm_up(scenario: Scenario, place: Path) -> None:
    """Run once in this process everything that a child runs, so that children do not import anything."""
    with fresh_home(scenario, place) as home:
        scenario.act(home)
        scenario.act_again(home)


@contextlib.contextmanager
def fresh_home(scenario: Scenario, place: Path) -> Iterator[Path]:
    """Keep a home directory in the state before the scenario."""
    home = place / "home"
    home.mkdir()
    try:
        scenario.prepare(home)
        yield home
    finally:
        shutil.rmtree(home)


def _meet(
    injector: Injector, scenario: Scenario, fault: Fault, number: int, place: Path
) -> tuple[Run, Mapping[Loss, str]]:
    with fresh_home(scenario, place) as home:
        before = {name: read(home / name) for name in os.listdir(home)}
        met = run(injector, partial(scenario.act, home), at=number, fault=fault)
        return met, dict(_judge(scenario, fault, met, before, home))


def _judge(scenario: Scenario, fault: Fault, met: Run, before: State, home: Path) -> Judgement:
    if not met.hit and not fault.is_partial and fault.action is not Action.COUNT:
        yield Loss.UNREACHED, f"{len(met.calls)} calls were made"
    if met.killed_by == signal.SIGALRM:
        yield Loss.HUNG, f"after {len(met.calls)} calls"
    try:
        found = read(home / TARGET)
    except (OSError, ValueError) as error:
        yield Loss.HALF_DONE, str(error)
        return
    old = before.get(TARGET)
    is_new = found != old and found is not None and found.is_whole and found.contents == scenario.new
    if not is_new and found != old:
        yield Loss.HALF_DONE, "nothing" if found is None else str(found)
    yield from _judge_neighbours(met, before, home, found)
    if met.said is not None:
        yield from _judge_words(fault, met, met.said, is_new=is_new)
    elif met.killed_by != signal.SIGALRM and not (fault.kills and met.killed_by == signal.SIGKILL):
        yield Loss.WRONG_ERROR, f"ended by signal {met.killed_by}"
    if found is not None:
        yield from _judge_soundness(home, found, verifies=is_new or scenario.old_is_sound)
    yield from _judge_next(scenario, before, home)


def _judge_neighbours(met: Run, before: State, home: Path, found: Found | None) -> Judgement:
    others = set(os.listdir(home)) - {TARGET}
    staging = set(filter(_STAGING.fullmatch, others))
    if others - staging != before.keys() - {TARGET} or len(staging) > 1:
        yield Loss.STRAY, ", ".join(sorted(others))
    for name in others & before.keys():
        if read(home / name) != before[name]:
            yield Loss.STRAY, f"{name} was changed"
    if found is not None and len(found.temporary) > (met.said is None):
        yield Loss.STRAY, ", ".join(sorted(found.temporary))


def _judge_words(fault: Fault, met: Run, said: Said, *, is_new: bool) -> Judgement:
    if said.left_open:
        yield Loss.LEAK, ", ".join(said.left_open)
    if not _is_deserved(fault, said):
        yield Loss.WRONG_ERROR, f"{said.error or 'no error'}: {said.message}"
    if not said.error and not is_new:
        yield Loss.SILENT, "no error"
    if not said.error and fault.action is Action.FAIL and met.call in _SYNCS:
        yield Loss.UNSYNCED, "no error"
    if is_new and "undone" in said.message:
        yield Loss.UNTRUE, said.message


def _is_deserved(fault: Fault, said: Said) -> bool:
    """Return whether a fault may end this way; a failed call that is optional need not be an error."""
    match fault.action:
        case Action.FAIL:
            return not said.error or said.is_storage_error
        case Action.INTERRUPT:
            return said.error == "KeyboardInterrupt"
        case _:
            return not said.error


def _judge_soundness(home: Path, found: Found, *, verifies: bool) -> Judgement:
    try:
        with vs.open(home / TARGET) as checkpoint:
            if set(checkpoint) != found.contents.variables.keys() or checkpoint.attributes != ATTRIBUTES:
                yield Loss.UNSOUND, f"variables {', '.join(checkpoint)}; attributes {dict(checkpoint.attributes)}"
        report = vs.verify(home / TARGET, threads=1)
        if verifies and not report.ok:
            yield Loss.UNSOUND, str(report)
    except (vs.VarstoreError, OSError) as error:
        yield Loss.UNSOUND, f"{type(error).__name__}: {error}"


def _judge_next(scenario: Scenario, before: State, home: Path) -> Judgement:
    try:
        scenario.act_again(home)
        report = vs.verify(home / TARGET, threads=1)
        found = read(home / TARGET)
    except (vs.VarstoreError, OSError, ValueError) as error:
        yield Loss.STUCK, f"{type(error).__name__}: {error}"
        return
    if found is None or not found.is_whole or found.contents != scenario.afterwards or not report.ok:
        yield Loss.STUCK, str(report)
    left_over = set(os.listdir(home)) - before.keys() - {TARGET} | (found.temporary if found else set())
    if left_over:
        yield Loss.LEFT_OVER, ", ".join(sorted(left_over))
