"""Run a scenario with a fault at each of its file system calls, and check what each leaves.

After any fault, these must hold. What is visible is the old state, the new one, or one that is visible between them in
a run without a fault. Of leftovers, there are at most those that a killed call may leave, and `varstore.clean` removes
them. Each checkpoint opens and verifies. The next call works, and removes the leftovers. If the call ended, it closed
what it had opened. It returned only if the new state is in place, durably if requested; otherwise it raised a
StorageError, which says "undone" only if the old state is in place.
"""

from __future__ import annotations

import contextlib
import enum
import os
import re
import shutil
import signal
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Final

import varstore as vs
from tools.faults.children import Child, Run, Said
from tools.faults.injector import COUNT, FAULTS, Action, Fault, Injector
from tools.faults.jobs import FOREIGN, Job, Lost, Outcome
from tools.faults.readback import Checkpoint, Seen, observe
from tools.faults.scenarios import SCENARIOS, Scenario

__all__ = ["PART", "Loss", "count_calls", "fresh_home", "jobs", "shared_injector", "visit"]

_HOME = "home"
_ATTEMPTS = 3
"""Runs in which a call may be met."""
_SYNCS = {"fsync", "fdatasync", "syncfs", "sync_file_range"}
_UNSYNCED = {"EIO", "ENOSPC", "EDQUOT"}
"""Errors with which a sync says that data may be lost; with others it says that the file system cannot sync."""
PART: Final = {
    "new, durable": {"SIGKILL", "torn", "short", "EIO"},
    "overwrite, durable": {"SIGKILL", "SIGINT", "EIO", "ENOSPC"},
    "base, durable": {"EIO"},
    "files of paths, durable": {"SIGKILL", "EIO"},
    "overwrite files, durable": {"SIGKILL"},
    "base files, durable": {"EIO"},
    "seal": {"SIGKILL", "EIO"},
    "manager": {"EMFILE", "EACCES"},
    "manager in background": {"SIGINT"},
    "trim": {"EMFILE"},
    "write torch": {"SIGKILL", "EIO"},
    "write zarr": {"SIGKILL"},
    "convert from numpy": {"EIO", "EINTR"},
    "convert from oneflow": {"EIO"},
}
"""The faults that each run of the tests tries at every call of a scenario."""


class Loss(enum.StrEnum):
    """What can be lost at a point."""

    UNREACHED = "the call that was to be met never came"
    HUNG = "the work did not come back"
    HALF_DONE = "neither the old state nor the new one is there"
    STRAY = "more is left over than a killed call may leave"
    SILENT = "it returned, and the new state is not there"
    UNSYNCED = "it returned although something could not be made durable"
    WRONG_ERROR = "it ended with an error that does not tell what happened"
    FOREIGN = FOREIGN
    UNTOLD = "an error ended a thread, and nobody was told"
    UNTRUE = "it said that the save was undone, and the new checkpoint stands"
    LEAK = "a descriptor was left open"
    UNSOUND = "what is there does not open or verify"
    UNCLEAN = "varstore.clean does not remove what is left over, and nothing else"
    STUCK = "what is done next does not work"
    LEFT_OVER = "what is done next leaves the left-over there"


Judgement = Iterator[tuple[Loss, str]]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Expected:
    """What a scenario leads to without a fault."""

    before: Seen
    after: Seen
    visible: Sequence[Seen]
    """All states that may be seen at any moment."""
    afterwards: Sequence[Seen]
    """The states that calling again leads to, from each of them."""


def jobs(*, whole: bool) -> Iterator[Job]:
    """Yield a job for each scenario with each fault."""
    for scenario in SCENARIOS:
        for fault in FAULTS:
            if whole or fault.name in PART.get(scenario.name, ()):
                yield Job(scenario=scenario.name, fault=fault.name, run=partial(_visit_with_shared, scenario, fault))


@cache
def shared_injector() -> Injector:
    """Return the injector, which is compiled once per process."""
    return Injector()


def _visit_with_shared(scenario: Scenario, fault: Fault, place: Path) -> Outcome:
    return visit(shared_injector(), scenario, fault, place)


def count_calls(injector: Injector, scenario: Scenario, place: Path) -> tuple[str, ...]:
    """Return the file system calls that a scenario makes without a fault; `place` is an empty directory."""
    with _Visit(injector, scenario, place) as visit:
        return visit.meet(COUNT, 0)[0].calls


def visit(injector: Injector, scenario: Scenario, fault: Fault, place: Path) -> Outcome:
    """Run the scenario with the fault at each call at which it can occur."""
    points, lost = 1, []  # the first without a fault
    with _Visit(injector, scenario, place) as visit:
        undisturbed, losses = visit.meet(COUNT, 0)
        while (before := undisturbed.calls) and not losses:  # on a busy machine, a save may go another way
            undisturbed, losses = visit.meet(COUNT, 0)
            if undisturbed.calls == before:
                break
        if losses:
            lost.append(Lost(point="no call", losses=_named(losses)))
        for number, call in enumerate(undisturbed.calls, 1):
            if not fault.can_occur_at(call):
                continue
            for _ in range(_ATTEMPTS):
                met, losses = visit.meet(fault, number)
                if Loss.UNREACHED not in losses:
                    break
            if not met.hit and fault.is_partial:
                continue
            points += 1
            if losses:
                lost.append(Lost(point=f"call {number}, {call}({met.where})", losses=_named(losses)))
    return Outcome(points=points, lost=lost)


def _named(losses: Mapping[Loss, str]) -> Mapping[str, str]:
    return {loss.name: f"{loss}: {found}" for loss, found in losses.items()}


@contextlib.contextmanager
def fresh_home(scenario: Scenario, place: Path) -> Iterator[Path]:
    """Keep a home directory in the state before the scenario, as working directory."""
    home = place / _HOME
    home.mkdir()
    os.chdir(home)
    others = {*threading.enumerate()}
    try:
        scenario.prepare(home)
        yield home
    finally:
        os.chdir(place)
        scenario.stop()
        for thread in {*threading.enumerate()} - others:  # of background saves: a fork would not copy them
            thread.join()
        if home.exists():
            shutil.rmtree(home)


def _expect(scenario: Scenario, place: Path) -> _Expected:
    """Run without a fault; this also imports everything, so that children do not import anything."""
    visible, afterwards = [], []
    for act in (lambda _: None, *scenario.stages, scenario.act):
        with fresh_home(scenario, place) as home:
            act(home)
            visible.append(observe(home))
            scenario.again(home)
            afterwards.append(observe(home))
    before, after = visible[0], visible[-1]
    for path, contents in scenario.new.items():
        found = after.units.get(path)
        assert isinstance(found, Checkpoint), f"{scenario.name}: there is no {path}: {after}"
        assert found.is_whole, f"{scenario.name}: {found}"
        assert found.contents == contents, f"{scenario.name}: {path} is not what was saved: {found}"
    assert after != before
    return _Expected(before=before, after=after, visible=visible, afterwards=afterwards)


class _Visit:
    """Meets points of one scenario, one after another.

    A home directory that is as it was before is used again. What follows from a state of it (that checkpoints open,
    that the next call works) is tried once for each state.
    """

    def __init__(self, injector: Injector, scenario: Scenario, place: Path) -> None:
        self._scenario = scenario
        self._place = place
        self._expected = _expect(scenario, place)
        self._child = Child(injector, partial(scenario.act, place / _HOME), scenario.start)
        self._home = contextlib.ExitStack()
        self._is_ready = False
        self._unsynced: frozenset[str] = frozenset()
        self._consequences: dict[object, Mapping[Loss, str]] = {}

    def __enter__(self) -> _Visit:
        return self

    def __exit__(self, *_: object) -> None:
        self._child.stop()
        self._home.close()

    def meet(self, fault: Fault, number: int) -> tuple[Run, Mapping[Loss, str]]:
        """Run the scenario with the fault at the call of this number, and return what happened and what is lost."""
        if not self._is_ready:
            self._home.close()
            self._home.enter_context(fresh_home(self._scenario, self._place))
        home = self._place / _HOME
        met = self._child.run(at=number, fault=fault)
        seen = observe(home)
        self._is_ready = seen == self._expected.before and not seen.leftovers
        if fault.action is Action.COUNT:
            self._unsynced = _unsynced(met, seen, self._expected, home)
        losses = dict(_judge(self._scenario, fault, met, seen, self._expected, home, self._unsynced))
        key = (repr(seen.units), bool(met.said and met.said.left_open), *sorted(_anonymous(home, seen.leftovers)))
        if key not in self._consequences:
            self._consequences[key] = dict(_judge_consequences(self._scenario, seen, self._expected, home))
            self._is_ready = False
        losses |= self._consequences[key]
        if losses:
            self._child.stop()  # whatever state it is in
            self._is_ready = False
        return met, losses


def _anonymous(home: Path, leftovers: Collection[str]) -> Iterator[str]:
    """Yield the paths and sizes of leftovers, without the random part of their names."""
    for leftover in leftovers:
        yield (name := re.sub("[0-9a-f]{8}", "", leftover))
        for folder, _, files in os.walk(home / leftover):
            for file in files:
                path = os.path.join(folder, file)
                yield f"{name} {os.path.relpath(path, home / leftover)} {os.lstat(path).st_size}"


def _judge(
    scenario: Scenario,
    fault: Fault,
    met: Run,
    seen: Seen,
    expected: _Expected,
    home: Path,
    unsynced: frozenset[str],
) -> Judgement:
    """Judge the state and what was said; `unsynced` is what is not synced without a fault either."""
    if not met.hit and not fault.is_partial and fault.action is not Action.COUNT:
        yield Loss.UNREACHED, f"{len(met.calls)} calls were made"
    if met.killed_by == signal.SIGALRM:
        yield Loss.HUNG, f"after {len(met.calls)} calls"
    is_known = seen in expected.visible
    if not is_known and not (scenario.is_in_place and met.said is None and _lacks_markers(home)):
        yield Loss.HALF_DONE, str(seen)
    allowed = 0 if met.said and not met.said.error and fault.action is not Action.FAIL else scenario.leftovers
    if len(seen.leftovers) > allowed:
        yield Loss.STRAY, ", ".join(sorted(seen.leftovers))
    if met.said is not None:
        yield from _judge_words(scenario, fault, met.said, is_new=seen == expected.after, is_known=is_known)
        if not met.said.error and fault.name in _UNSYNCED and met.call in _SYNCS:
            left = _unsynced(met, seen, expected, home) - unsynced
            if left or met.call == "syncfs":
                yield Loss.UNSYNCED, ", ".join(sorted(left)) or "no error"
    elif met.killed_by != signal.SIGALRM and not (fault.kills and met.killed_by == signal.SIGKILL):
        yield Loss.FOREIGN, f"ended by signal {met.killed_by}"


def _judge_consequences(scenario: Scenario, seen: Seen, expected: _Expected, home: Path) -> Judgement:
    if seen in expected.visible:
        yield from _judge_soundness(scenario, seen, expected, home)
    if seen.leftovers:
        yield from _judge_cleaning(seen, expected, home)
    yield from _judge_next(scenario, expected, home)


def _lacks_markers(home: Path) -> bool:
    return not any(home.rglob("snapshot_done"))


def _judge_words(scenario: Scenario, fault: Fault, said: Said, *, is_new: bool, is_known: bool) -> Judgement:
    if said.in_threads:
        yield Loss.UNTOLD, "; ".join(said.in_threads)
    if said.left_open:
        yield Loss.LEAK, ", ".join(said.left_open)
    error = f"{said.error or 'no error'}: {said.message}"
    if said.error and not said.is_ours and (fault.action, said.error) != (Action.INTERRUPT, "KeyboardInterrupt"):
        yield Loss.FOREIGN, error
    elif not _is_deserved(fault, said):
        yield Loss.WRONG_ERROR, error
    if not said.error and not is_new and not (fault.action is Action.FAIL and is_known and scenario.stages):
        yield Loss.SILENT, "no error"
    if is_new and "undone" in said.message:
        yield Loss.UNTRUE, said.message


def _unsynced(met: Run, seen: Seen, expected: _Expected, home: Path) -> frozenset[str]:
    """Return the new files and folders that were not synced one by one, with the folders that hold them.

    Where the sync of one fails, its data may be written to another, which takes its place.
    """
    places = [home / path for path, unit in seen.units.items() if unit != expected.before.units.get(path)]
    found = {file for place in places for file in (place.parent, place, *place.rglob("*"))}
    return frozenset(str(file.relative_to(home)) for file in found if file.lstat().st_ino not in met.synced)


def _is_deserved(fault: Fault, said: Said) -> bool:
    """Return whether a fault may end this way; a failed call that is optional need not be an error."""
    match fault.action:
        case Action.FAIL:
            return not said.error or said.is_storage_error
        case Action.INTERRUPT:
            return said.error == "KeyboardInterrupt"
        case _:
            return not said.error


def _judge_soundness(scenario: Scenario, seen: Seen, expected: _Expected, home: Path) -> Judgement:
    for path, unit in seen.units.items():
        if not isinstance(unit, Checkpoint) or not unit.is_complete:
            continue
        try:
            with vs.open(home / path) as checkpoint:
                attributes = (unit.attributes or {}).get("attributes", {})
                if set(checkpoint) != unit.variables.keys() or checkpoint.attributes != attributes:
                    yield Loss.UNSOUND, f"{path}: {', '.join(checkpoint)}; attributes {dict(checkpoint.attributes)}"
            report = vs.verify(home / path, threads=1)
            is_sound = scenario.old_is_sound or unit != expected.before.units.get(path)
            if is_sound and not report.ok:
                yield Loss.UNSOUND, str(report)
        except Exception as error:
            yield Loss.UNSOUND, f"{path}: {type(error).__name__}: {error}"


def _judge_cleaning(seen: Seen, expected: _Expected, home: Path) -> Judgement:
    """Clean each directory that contains leftovers, in a copy."""
    copy = home.parent / "copy"
    try:
        shutil.copytree(home, copy, symlinks=True, copy_function=os.link)
        for folder in {(copy / leftover).parent for leftover in seen.leftovers}:
            vs.clean(folder)
        cleaned = observe(copy)
        hidden = [path for path in cleaned.leftovers if os.path.basename(path).startswith(".")]
        if hidden or cleaned not in (seen, *expected.visible):
            yield Loss.UNCLEAN, f"{', '.join(sorted(seen.leftovers))}; then {cleaned}"
    except Exception as error:
        yield Loss.UNCLEAN, f"{type(error).__name__}: {error}"
    finally:
        shutil.rmtree(copy)


def _judge_next(scenario: Scenario, expected: _Expected, home: Path) -> Judgement:
    try:
        scenario.again(home)
        seen = observe(home)
    except Exception as error:
        yield Loss.STUCK, f"{type(error).__name__}: {error}"
        return
    if seen not in expected.afterwards:
        yield Loss.STUCK, str(seen)
    if seen.leftovers:
        yield Loss.LEFT_OVER, ", ".join(sorted(seen.leftovers))
