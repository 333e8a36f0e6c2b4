"""What the page shows of a run over its steps: metrics, the norms of its variables, and the disk that links save."""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Iterator, Sequence
from typing import Any

import varstore as vs
from varstore.errors import UsageError
from varstore.text.escape import one_line
from varstore.view.survey import number_of

__all__ = ["follow", "steps_at"]

_METRICS = 60
_NAME = 200
_LONG = 256 << 20
"""Bytes of a step from which reading it has a progress bar."""


def steps_at(path: str) -> vs.RunSteps | None:
    """Return the steps in a directory of a run, None if it is not one."""
    if not os.path.isdir(path):
        return None
    try:
        return vs.steps(path)
    except UsageError:
        return None


def follow(data: dict[str, Any], opened: Any, run: vs.RunSteps, *, most: int, progress: bool = False) -> None:
    """Add the steps of a run to the data of the page, whose variables are those of the latest one.

    Norms are measured in at most so many steps, evenly chosen. A file that steps share is read once.
    """
    whole = [step for step in run.steps if not step.problem]
    looked = _chosen(whole, most)
    data["run"] = {
        "said": one_line(run.summary(), 1000),
        "steps": [
            {
                "step": step.step,
                "time": "" if step.time is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(step.time)),
                "nbytes": step.nbytes,
                "own": step.new_nbytes,
                "marks": one_line(", ".join(step.marks), 500),
            }
            for step in run.steps
        ],
        "metrics": [
            [one_line(name, _NAME), [number_of(step.metrics.get(name)) for step in run.steps]]
            for name in run.metrics[:_METRICS]
        ],
    }
    numbers = {name: number for number, name in enumerate(opened)}
    for name in numbers:
        data["variables"][numbers[name]]["norms"] = []
    known: dict[tuple[int, int], float | None] = {}
    found: list[tuple[int, float]] = []
    for step in looked:
        with contextlib.suppress(vs.VarstoreError, OSError):  # a training may go on, and delete it
            norms = _norms(step.path, known, progress=progress)
            found.append((step.step, math.hypot(*(norm for norm in norms.values() if norm is not None))))
            for name, number in numbers.items():
                data["variables"][number]["norms"].append(_short(norms.get(name)))
    data["run"]["looked"] = [step for step, _ in found]
    data["run"]["norms"] = [_short(norm) for _, norm in found]


def _chosen(steps: Sequence[vs.RunStep], most: int) -> list[vs.RunStep]:
    """Return at most so many of the steps, the first and the last among them."""
    if len(steps) <= most:
        return list(steps)
    places = {round(at * (len(steps) - 1) / max(most - 1, 1)) for at in range(most)}
    return [step for at, step in enumerate(reversed(steps)) if at in places][::-1]


def _norms(path: str, known: dict[tuple[int, int], float | None], *, progress: bool) -> dict[str, float | None]:
    """Return the norm of each variable of a step; those of files that are known are not read again."""
    with vs.open(path) as checkpoint:
        files = dict(_files(checkpoint))
        new = {name: checkpoint[name] for name, file in files.items() if file not in known}
        is_long = sum(variable.nbytes for variable in new.values()) > _LONG
        report = vs.stats(new, quantiles=False, progress=progress and is_long)
        known |= {files[name]: report[name].norm if name in report else None for name in new}
        return {name: known[file] for name, file in files.items()}


def _files(checkpoint: vs.Checkpoint) -> Iterator[tuple[str, tuple[int, int]]]:
    for name, variable in checkpoint.items():
        found = os.stat(os.path.join(variable.path, "out"))
        yield name, (found.st_dev, found.st_ino)


def _short(norm: float | None) -> Any:
    return None if norm is None else number_of(float(f"{norm:.6g}"))
