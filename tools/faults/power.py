"""Cut the power at each moment of each durable scenario, in a model, and check what the disk may then show.

strace records what a scenario does: it writes into files, changes names in folders, and syncs. After a power cut, what
was synced is on disk. Of the rest, a file system may have written back anything, in any order: a rename without the
data of the files that it makes visible, a marker without the names beside it. The model builds such states. In each,
what is visible must be what was visible at some moment of the run, with all its data; and once the call has returned,
it must be the new state.

The states for a moment are bounded: of what is not synced, each beginning in the order of the calls, everything but
one step, and one step alone; just before each sync and at the end also everything but two steps. A step that a call
makes in one go, such as a rename, is never torn: file systems guarantee that.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

from tools.faults.calls import fresh_home
from tools.faults.jobs import Job, Lost, Outcome
from tools.faults.readback import is_visible
from tools.faults.scenarios import SCENARIOS, Scenario
from tools.faults.tracing import trace

__all__ = ["Data", "Names", "Sync", "Trace", "cut", "jobs", "record"]

PART: Final = {"new, durable", "overwrite, durable", "in place, durable", "write torch"}
"""The scenarios of which each run of the tests tries every moment."""
_PAIRS: Final = 60
"""At most so many steps are dropped in pairs."""


@dataclass(frozen=True, slots=True)
class Names:
    """Names that change in one step: folder, name, and the file or folder that it leads to, None for none."""

    changes: tuple[tuple[int, str, int | None], ...]

    def __str__(self) -> str:
        return ", ".join(f"{'no' if leads_to is None else 'new'} {name}" for _, name, leads_to in self.changes)


@dataclass(frozen=True, slots=True)
class Data:
    """Bytes or the size of a file change."""

    file: int

    def __str__(self) -> str:
        return f"bytes of file {self.file}"


@dataclass(frozen=True, slots=True)
class Sync:
    """A file's bytes, or the names in a folder, are made durable; None: all of the file system."""

    of: int | None


Step = Names | Data | Sync
Folders = Mapping[int, Mapping[str, int]]
"""The names in each folder."""
View = frozenset[tuple[str, int, frozenset[int]]]
"""What is visible: each path, its file or folder, and the steps that wrote into it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Trace:
    """What was on disk before, all of it durable, and what a scenario did then."""

    root: int
    before: Folders
    steps: Sequence[Step]


def jobs(*, whole: bool) -> Iterator[Job]:
    """Yield a job for each durable scenario."""
    for scenario in SCENARIOS:
        if scenario.is_durable and (whole or scenario.name in PART):
            yield Job(scenario=scenario.name, fault="power loss", run=partial(_cut_power, scenario))


def _cut_power(scenario: Scenario, place: Path) -> Outcome:
    with fresh_home(scenario, place) as home:
        scenario.act(home)  # imports everything
    return cut(record(scenario, place), is_in_place=scenario.is_in_place, harmless=scenario.harmless)


def cut(recorded: Trace, *, is_in_place: bool = False, harmless: str = "") -> Outcome:
    """Cut the power at each moment.

    Filled in place, a folder may be in any state as long as it has no marker. What is visible may contain more files,
    with harmless names.
    """
    steps = recorded.steps
    shown = [_view(recorded, range(moment)) for moment in range(len(steps) + 1)]
    new = shown[-1] - shown[0]
    lost, tried = [], set()
    for moment in range(len(steps) + 1):
        is_over = moment == len(steps)
        is_barrier = is_over or isinstance(steps[moment], Sync)
        for survivors in _states(steps, moment, is_barrier=is_barrier):
            if (survivors, is_over) in tried:
                continue
            tried.add((survivors, is_over))
            view = _view(recorded, sorted(survivors))
            losses = {}
            if not (_is_known(view, shown, harmless) or (is_in_place and not _has_marker(view))):
                losses["TORN"] = f"what is visible was never so: {_difference(view, shown)}"
            if is_over and not new <= view:
                losses["FORGOTTEN"] = f"the call returned, and this is gone: {_paths(new - view)}"
            if losses:
                gone = [i for i in range(moment) if i not in survivors and not isinstance(steps[i], Sync)]
                lost.append(Lost(point=f"step {moment} without {_listed([steps[i] for i in gone])}", losses=losses))
    return Outcome(points=len(tried), lost=lost)


def _is_known(view: View, shown: Sequence[View], harmless: str) -> bool:
    if view in shown or not harmless:
        return view in shown
    return any(all(re.fullmatch(harmless, path) for path, _, _ in view - other) for other in shown if other <= view)


def _listed(steps: Sequence[Step]) -> str:
    return ", ".join(map(str, steps[:4])) + (f" and {len(steps) - 4} more" if len(steps) > 4 else "")


def _states(steps: Sequence[Step], moment: int, *, is_barrier: bool) -> Iterator[frozenset[int]]:
    """Yield the sets of steps before a moment that may have survived."""
    durable = _durable(steps, moment)
    loose = [i for i in range(moment) if i not in durable and not isinstance(steps[i], Sync)]
    everything = durable | set(loose)
    for length in range(len(loose) + 1):
        yield frozenset(durable | set(loose[:length]))
    for step in loose:
        yield frozenset(everything - {step})
        yield frozenset(durable | {step})
    if is_barrier and len(loose) <= _PAIRS:
        for pair in itertools.combinations(loose, 2):
            yield frozenset(everything.difference(pair))


def _durable(steps: Sequence[Step], moment: int) -> set[int]:
    """Return the steps that are synced before a moment; a change in two folders is when both are."""
    durable = set()
    waiting = {i: _places(step) for i, step in enumerate(steps[:moment])}
    for number, sync in enumerate(steps[:moment]):
        if not isinstance(sync, Sync):
            continue
        for i in [i for i in waiting if i < number]:
            waiting[i] -= waiting[i] if sync.of is None else {sync.of}
            if not waiting[i]:
                durable.add(i)
                del waiting[i]
    return durable - {i for i, step in enumerate(steps) if isinstance(step, Sync)}


def _places(step: Step) -> set[int]:
    match step:
        case Names(changes):
            return {folder for folder, _, _ in changes}
        case Data(file):
            return {file}
        case _:
            return set()


def _view(recorded: Trace, survivors: Sequence[int]) -> View:
    folders = {folder: dict(names) for folder, names in recorded.before.items()}
    written: dict[int, set[int]] = {}
    for number in survivors:
        match recorded.steps[number]:
            case Names(changes):
                for folder, name, leads_to in changes:
                    names = folders.setdefault(folder, {})
                    names.pop(name, None)
                    if leads_to is not None:
                        names[name] = leads_to
            case Data(file):
                written.setdefault(file, set()).add(number)
    return frozenset(_walk(folders, written, recorded.root, ""))


def _walk(
    folders: Folders, written: Mapping[int, set[int]], folder: int, path: str
) -> Iterator[tuple[str, int, frozenset[int]]]:
    for name, leads_to in folders.get(folder, {}).items():
        if is_visible(name):
            yield path + name, leads_to, frozenset(written.get(leads_to, ()))
            yield from _walk(folders, written, leads_to, f"{path}{name}/")


def _has_marker(view: View) -> bool:
    return any(path.endswith("snapshot_done") for path, _, _ in view)


def _paths(view: View) -> str:
    return ", ".join(sorted(path for path, _, _ in view)) or "nothing"


def _difference(view: View, shown: Sequence[View]) -> str:
    nearest = min(shown, key=lambda other: len(other ^ view))
    return f"without {_paths(nearest - view)}; with {_paths(view - nearest)}"


_CALLS: Final = (
    "open openat openat2 creat mkdir mkdirat rename renameat renameat2 link linkat symlink symlinkat "
    "unlink unlinkat rmdir write pwrite64 writev pwritev pwritev2 copy_file_range sendfile splice ftruncate truncate "
    "fallocate fsync fdatasync syncfs sync"
)
_LINE: Final = re.compile(r"\d+ +(?P<call>\w+)\((?P<arguments>.*)\) += (?P<result>\d+)(?:<(?P<opened>.*)>)?$")
_PLACE: Final = re.compile(r'(?:(?:AT_FDCWD|\d+)<(?P<folder>[^>]*)>(?:, )?)?(?:"(?P<path>(?:[^"\\]|\\.)*)"(?!\.))?')


def record(scenario: Scenario, place: Path) -> Trace:
    """Run a scenario under strace, and return what it did."""
    with fresh_home(scenario, place) as home:
        recorder = _Recorder(home)
        chosen = "trace=" + ",".join(f"?{name}" for name in _CALLS.split())
        text = trace(partial(scenario.act, home), ["-y", "-s", "0", "-e", chosen], place, start=scenario.start)
    for line in _whole_lines(text):
        recorder.take(line)
    return Trace(root=recorder.root, before=recorder.before, steps=recorder.steps)


def _whole_lines(text: str) -> Iterator[str]:
    """Yield the lines, with a call that another thread's interrupts put together again where it ends."""
    unfinished: dict[str, str] = {}
    for line in text.splitlines():
        thread = line.split(" ", 1)[0]
        if line.endswith("<unfinished ...>"):
            unfinished[thread] = line.removesuffix("<unfinished ...>").rstrip()
        elif "resumed>" in line:
            rest = re.sub(r"^\d+ +<\.\.\. \w+ resumed>", "", line)
            yield unfinished.pop(thread) + re.sub(r"^\s*(?=\))", "", rest)
        else:
            yield line


class _Recorder:
    """Turns the lines of strace into steps; keeps every name as it is after each."""

    def __init__(self, home: Path) -> None:
        self._home = os.fspath(home)
        self._folders: dict[int, dict[str, int]] = {}
        self._added = itertools.count(-1, -1)
        self.root = self._scan(home)
        self.before = {folder: dict(names) for folder, names in self._folders.items()}
        self.steps: list[Step] = []

    def _scan(self, path: Path) -> int:
        number = path.lstat().st_ino
        if path.is_dir() and not path.is_symlink():
            self._folders[number] = {name: self._scan(path / name) for name in os.listdir(path)}
        return number

    def take(self, line: str) -> None:
        """Take one line; a call that failed, or is about another directory, is not a step."""
        matched = _LINE.match(line)
        if matched is None:
            return
        call, arguments = matched["call"], matched["arguments"]
        paths = [_joined(found) for found in _PLACE.finditer(arguments) if found[0]]
        match call:
            case "open" | "openat" | "openat2" | "creat":
                self._open(paths[0], arguments)
            case "mkdir" | "mkdirat":
                folder = self._change(paths[0], next(self._added))
                if folder is not None:
                    self._folders[folder] = {}
            case "unlink" | "unlinkat" | "rmdir":
                self._change(paths[0], None)
            case "symlink" | "symlinkat":
                self._change(paths[-1], next(self._added))
            case "link" | "linkat":
                self._change(paths[1], self._find(paths[0]))
            case "rename" | "renameat" | "renameat2":
                self._rename(*paths[:2], is_exchange="RENAME_EXCHANGE" in arguments)
            case "fsync" | "fdatasync":
                self._append(Sync, paths[0], line)
            case "syncfs" | "sync":
                self.steps.append(Sync(None))
            case "copy_file_range":
                self._append(Data, paths[1], line)
            case _ if call in ("ftruncate", "truncate", "fallocate") or matched["result"] != "0":
                self._append(Data, paths[0], line)

    def _find(self, path: str) -> int | None:
        """Return what a path leads to, None if it is outside or has no name any more."""
        if path != self._home and not path.startswith(f"{self._home}/"):
            return None
        at: int | None = self.root
        for name in path[len(self._home) :].split("/"):
            if name not in ("", ".") and at is not None:
                at = self._folders.get(at, {}).get(name)
        return at

    def _open(self, path: str, arguments: str) -> None:
        found = self._find(path)
        if found is None and "O_CREAT" in arguments:
            self._change(path, next(self._added))
        elif found is not None and "O_TRUNC" in arguments:
            self.steps.append(Data(found))

    def _append(self, step: type[Data] | type[Sync], path: str, line: str) -> None:
        """Take a step at an open file, which must be known if it has a name here."""
        found = self._find(path)
        if found is not None:
            self.steps.append(step(found))
        elif path.startswith(f"{self._home}/") and "(deleted)" not in line:
            raise ValueError(f"nobody made {path}: {line}")

    def _change(self, path: str, leads_to: int | None) -> int | None:
        """Let a name lead elsewhere, and return where to; None if the folder is outside."""
        folder, name = self._find(os.path.dirname(path)), os.path.basename(path)
        if folder is None:
            return None
        self._apply(((folder, name, leads_to),))
        return leads_to

    def _rename(self, source: str, target: str, *, is_exchange: bool) -> None:
        moved, replaced = self._find(source), self._find(target) if is_exchange else None
        places = [(self._find(os.path.dirname(path)), os.path.basename(path)) for path in (source, target)]
        (old_folder, old_name), (new_folder, new_name) = places
        assert moved is not None
        assert old_folder is not None
        assert new_folder is not None
        self._apply(((old_folder, old_name, replaced), (new_folder, new_name, moved)))

    def _apply(self, changes: tuple[tuple[int, str, int | None], ...]) -> None:
        for folder, name, leads_to in changes:
            self._folders[folder].pop(name, None)
            if leads_to is not None:
                self._folders[folder][name] = leads_to
        self.steps.append(Names(changes))


def _joined(found: re.Match[str]) -> str:
    return os.path.normpath(os.path.join(found["folder"] or "", found["path"] or ""))
