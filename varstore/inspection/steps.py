"""The steps in the directory of a run: time, metrics, size, what links save; the latest, the best, those not whole."""

from __future__ import annotations

import contextlib
import os
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from varstore.disk.read.checkpoint import Checkpoint
from varstore.errors import UsageError, VarstoreError
from varstore.storage.directory import Directory
from varstore.storage.failures import translated
from varstore.text.hints import plural
from varstore.text.sizes import size_text
from varstore.text.table import Shown, Table
from varstore.training.policies import Best, Saved
from varstore.training.series import Member, Series, Taken, check_files, open_step, prefixes_in
from varstore.values.arguments import checked

__all__ = ["RunStep", "RunSteps", "steps"]


@dataclass(frozen=True, kw_only=True, slots=True)
class RunStep:
    """One step of a run, as `varstore.steps` finds it; `nbytes` are those of its variables and attached files.

    `new_nbytes` are the bytes of the files that no earlier step of the directory has: the others are links.
    `own_nbytes` are those of the files that nothing else has, which deleting the step would free.
    `best` names the metrics of which it has the best value. `is_pinned` says that a `Pinned` policy named the step when
    it was saved. `problem` says why a step is not whole, "" for one that is;
    if it cannot be opened, `time` is None, and nothing else is known.

    Example:
        >>> pending = vs.CheckpointManager("run").save(7, {"w": np.zeros(3)}, metrics={"loss": 0.5})
        >>> vs.steps("run").steps[0].marks
        ('best loss', 'latest')
    """

    name: str
    step: int
    path: str
    time: float | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    variables: int = 0
    nbytes: int = 0
    new_nbytes: int = 0
    own_nbytes: int = 0
    best: tuple[str, ...] = ()
    is_latest: bool = False
    is_pinned: bool = False
    problem: str = ""

    def as_json(self) -> dict[str, Any]:
        """Return the step as JSON data."""
        metrics = {name: value if abs(value) < float("inf") else None for name, value in self.metrics.items()}
        return {
            "name": self.name,
            "step": self.step,
            "path": self.path,
            "time": self.time,
            "metrics": metrics,
            "variables": self.variables,
            "nbytes": self.nbytes,
            "new_nbytes": self.new_nbytes,
            "own_nbytes": self.own_nbytes,
            "best": list(self.best),
            "latest": self.is_latest,
            "pinned": self.is_pinned,
            "problem": self.problem or None,
        }

    @property
    def marks(self) -> tuple[str, ...]:
        """What is to be known of it, in words: the latest, the best, what is wrong."""
        best = f"best {', '.join(self.best)}" if self.best else ""
        problem = f"incomplete: {self.problem}" if self.problem else ""
        words = [word for word, holds in (("latest", self.is_latest), ("pinned", self.is_pinned)) if holds]
        return tuple(mark for mark in (best, *words, problem) if mark)


@dataclass(frozen=True, kw_only=True, slots=True, repr=False)
class RunSteps(Shown):
    """The steps in a directory of a `CheckpointManager`, in order; true if all of them are whole.

    Example:
        >>> pending = vs.CheckpointManager("run").save(7, {"w": np.zeros(3)}, metrics={"loss": 0.5})
        >>> run = vs.steps("run")
        >>> run.ok, len(run), run.steps[0].best, run.steps[0].new_nbytes
        (True, 1, ('loss',), 24)
    """

    path: str
    steps: tuple[RunStep, ...]

    @property
    def ok(self) -> bool:
        """Whether every step is whole."""
        return not any(step.problem for step in self.steps)

    def __bool__(self) -> bool:
        return self.ok

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def metrics(self) -> tuple[str, ...]:
        """The names of all metrics, in the order in which they appear."""
        return tuple(dict.fromkeys(name for step in self.steps for name in step.metrics))

    @property
    def nbytes(self) -> int:
        """The bytes that all steps would take without links."""
        return sum(step.nbytes for step in self.steps)

    @property
    def new_nbytes(self) -> int:
        """The bytes that all steps take."""
        return sum(step.new_nbytes for step in self.steps)

    def as_json(self) -> dict[str, Any]:
        """Return the steps as JSON data."""
        return {
            "path": self.path,
            "ok": self.ok,
            "nbytes": self.nbytes,
            "new_nbytes": self.new_nbytes,
            "steps": [step.as_json() for step in self.steps],
        }

    def summary(self, *, exact: bool = False) -> str:
        """Return the number of steps, what they take, and what links save; with `exact` in bytes."""
        shown, taken = (size_text(size, exact=exact) for size in (self.nbytes, self.new_nbytes))
        saved = f", {taken} on disk because of links" if self.new_nbytes < self.nbytes else ""
        broken = sum(bool(step.problem) for step in self.steps)
        return f"{plural(len(self), 'step')}, {shown}{saved}" + (f"; {broken} not whole" if broken else "")

    def rows(self, *, exact: bool = False) -> list[list[str]]:
        """Return a row per step, under `headings`."""
        names = self.metrics
        prefixed = len({step.name.removesuffix(str(step.step)) for step in self.steps}) > 1
        return [
            [
                step.name if prefixed else str(step.step),
                "" if step.time is None else time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(step.time)),
                *(f"{step.metrics[name]:.6g}" if name in step.metrics else "" for name in names),
                *(
                    ["", ""]
                    if step.time is None
                    else [size_text(n, exact=exact) for n in (step.nbytes, step.new_nbytes)]
                ),
                ", ".join(step.marks),
            ]
            for step in self.steps
        ]

    @property
    def headings(self) -> list[str]:
        """The headings of `rows`."""
        return ["step", "time", *self.metrics, "size", "new", ""]

    def table(self, most: int | None = None) -> Table:
        """Return a row per step, or for the last of them, as many as `most`."""
        rows = self.rows()
        hidden = 0 if most is None else max(len(rows) - most, 0)
        notes = [f"and {plural(hidden, 'earlier step')}"] if hidden else []
        title = f"{self.path}: {self.summary()}"
        return Table(title=title, headings=self.headings, rows=rows[hidden:], notes=notes)

    def __repr__(self) -> str:
        return f"<RunSteps {self.path!r}: {self.summary()}>"


@checked
def steps(path: str | os.PathLike[str]) -> RunSteps:
    """Return the steps in a directory of a run; nothing is read but manifests and what the system says of files.

    Raises:
        UsageError: there are no steps in it.
        StorageError: the operating system refused to read it.

    Example:
        >>> weights = {"backbone": np.zeros(1000), "head": np.zeros(10)}
        >>> with vs.CheckpointManager("run") as manager:
        ...     for step in (100, 200):
        ...         weights["head"] = weights["head"] + 1
        ...         pending = manager.save(step, weights, metrics={"loss": 1 / step})
        >>> vs.steps("run")
        <RunSteps 'run': 2 steps, 16.2 kB, 8.2 kB on disk because of links>
    """
    root = os.fspath(path)
    taken = [found for prefix in sorted(prefixes_in(root)) for found in Series(root, prefix).taken()]
    if not taken:
        raise UsageError("there are no steps of a run here", path=root)
    seen = _Files()
    looked_at = [_step(found, seen) for found in taken]
    own = seen.own_bytes()
    looked_at = [replace(step, own_nbytes=own[step.path]) for step in looked_at]
    latest = _latest(looked_at)
    best = _best([step for step in looked_at if not step.problem])
    found = [replace(step, best=best.get(step.path, ()), is_latest=step is latest) for step in looked_at]
    return RunSteps(path=root, steps=tuple(found))


def _step(taken: Taken, seen: _Files) -> RunStep:
    name = os.path.basename(taken.path)
    if not isinstance(taken.found, Member):
        return RunStep(name=name, step=taken.step, path=taken.path, problem=taken.found.problem)
    saved = taken.found.saved
    try:
        with open_step(taken.path) as checkpoint:
            return RunStep(
                name=name,
                step=taken.step,
                path=taken.path,
                time=saved.time,
                metrics=saved.metrics,
                is_pinned=bool(taken.found.record and taken.found.record.pinned),
                variables=len(checkpoint),
                nbytes=checkpoint.nbytes + sum(file.nbytes for file in checkpoint.files.values()),
                new_nbytes=seen.add(checkpoint, taken.path),
            )
    except VarstoreError as error:
        return RunStep(name=name, step=taken.step, path=taken.path, problem=error.problem)


class _Files:
    """The files of all steps, of which several names can be one file."""

    def __init__(self) -> None:
        self._files: dict[tuple[int, int], _File] = {}

    def add(self, checkpoint: Checkpoint, path: str) -> int:
        """Add the files of a step; return the bytes of those that are new."""
        new = 0
        names = [
            *(e.file for e in checkpoint.content.entries.values()),
            *(f.entry.file for f in checkpoint.files.values()),
        ]
        with translated(checkpoint.path, "its files cannot be looked at"), Directory(checkpoint.location) as directory:
            for name in names:
                with contextlib.suppress(FileNotFoundError):  # `_latest` says so of the step where it matters
                    status = directory.status(name)
                    file = self._files.get((status.st_dev, status.st_ino))
                    if file is None:
                        file = self._files[status.st_dev, status.st_ino] = _File(path, status.st_size, status.st_nlink)
                        new += file.nbytes
                    file.known += 1
                    file.is_own = file.is_own and file.path == path
        return new

    def own_bytes(self) -> Counter[str]:
        """Return the bytes of the files that only one step has, all of whose names are known, by its path."""
        own: Counter[str] = Counter()
        for file in self._files.values():
            if file.is_own and file.known >= file.links:
                own[file.path] += file.nbytes
        return own


@dataclass(slots=True)
class _File:
    """A file: the first step that has it, whether it is the only one, and how many of its names are known."""

    path: str
    nbytes: int
    links: int
    known: int = 0
    is_own: bool = True


def _latest(steps: list[RunStep]) -> RunStep | None:
    """Return the step that `CheckpointManager.latest` gives; of those passed over, note the problem."""
    for at in sorted(range(len(steps)), key=lambda at: -steps[at].step):
        step = steps[at]
        if not step.problem:
            try:
                check_files(Saved(step=step.step, time=0.0, path=step.path))
            except VarstoreError as error:
                steps[at] = replace(step, problem=error.problem)
            else:
                return step
    return None


def _best(steps: list[RunStep]) -> dict[str, tuple[str, ...]]:
    """Return the metrics of which a step has the best value, by its path.

    Metrics are left out whose names do not tell which values are better.
    """
    saves = [Saved(step=step.step, time=0.0, metrics=step.metrics, path=step.path) for step in steps]
    found: dict[str, tuple[str, ...]] = {}
    for metric in dict.fromkeys(name for step in steps for name in step.metrics):
        with contextlib.suppress(UsageError):
            best = Best(metric).ranked(saves)[0]
            found[best.path] = (*found.get(best.path, ()), metric)
    return found
