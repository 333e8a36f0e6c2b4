"""``varstore log`` and ``du``: the steps of a run, how metrics and norms went, and what each step takes."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import click
import numpy as np

import varstore as vs
from varstore.cli.columns import Column, columns_text, signs, terminal_width
from varstore.text.escape import one_line
from varstore.text.hints import plural
from varstore.text.sizes import size_text

__all__ = ["du", "log"]

_WIDE, _NARROW = 48, 16
"""Signs of a trajectory, where there are more steps; the second on a terminal of less than 100 columns."""
_LARGE = 100
_COLUMNS = (
    Column(heading="name"),
    Column(heading="first", is_right=True, rank=4),
    Column(heading="trajectory", rank=6),
    Column(heading="last", is_right=True, rank=5),
    Column(heading="least", is_right=True, rank=3),
    Column(heading="at", is_right=True, rank=1),
    Column(heading="largest", is_right=True, rank=2),
    Column(heading="at", is_right=True, rank=1),
)


@click.command(short_help="Show how metrics, or norms of variables, went over a run.")
@click.argument("run", type=click.Path())
@click.argument("names", metavar="[NAME]...", nargs=-1)
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object, for programs.")
def log(run: str, names: tuple[str, ...], as_json: bool) -> None:
    """Print the trajectory of each metric over the steps of RUN, the directory of a CheckpointManager.

    A NAME is a metric or a variable; of a variable, the Euclidean norm is taken, and what steps share is read once.
    Each sign of a trajectory is a step or, where there are many, the mean of several; a cross is nan or infinite.

    \b
    Examples:
      varstore log run
      varstore log run loss model/fc.weight
      varstore log run --json | jq '.series[0].values'
    """
    found = vs.steps(run)
    series = {name: _metric(found, name) for name in (names or found.metrics) if name in found.metrics}
    for name in names:
        if name not in series:
            history = vs.history(run, name)
            series[name] = dict(zip(history.steps, history.norms().tolist(), strict=True))
    if as_json:
        click.echo(json.dumps(_as_json(run, found, {name: series[name] for name in names or series}), indent=2))
        return
    click.echo(f"{one_line(run)}: {plural(len(found), 'step')}")
    if not series:
        click.echo("no metrics were saved; name a variable, as in `varstore log RUN NAME`")
        return
    width = terminal_width()
    most = _NARROW if width is not None and width < _LARGE else _WIDE
    rows = [_row(name, series[name], most) for name in names or series]
    click.echo(columns_text(_COLUMNS, rows, width=width))


def _metric(found: vs.RunSteps, name: str) -> dict[int, float]:
    return {step.step: step.metrics[name] for step in found.steps if name in step.metrics}


def _as_json(run: str, found: vs.RunSteps, series: Mapping[str, Mapping[int, float]]) -> dict[str, Any]:
    said = [
        {
            "name": name,
            "kind": "metric" if name in found.metrics else "norm",
            "steps": list(values),
            "values": [value if math.isfinite(value) else None for value in values.values()],
        }
        for name, values in series.items()
    ]
    return {"path": run, "series": said}


def _row(name: str, values: Mapping[int, float], most: int) -> list[str]:
    known = {step: value for step, value in values.items() if math.isfinite(value)}
    ends = [f"{value:.6g}" for value in values.values()]
    extremes = [pick(known, key=known.__getitem__) for pick in (min, max)] if known else []
    said = [text for step in extremes for text in (f"{known[step]:.6g}", str(step))]
    return [one_line(name), ends[0], _trajectory(list(values.values()), most), ends[-1], *(said or [""] * 4)]


def _trajectory(values: Sequence[float], most: int) -> str:
    """Return a sign per value, or of more than `most` values, per group of them."""
    groups = np.array_split(np.array(values, np.float64), min(most, len(values)))
    means = [float(group.mean()) for group in groups]
    finite = [mean for mean in means if math.isfinite(mean)]
    low, high = (min(finite), max(finite)) if finite else (0.0, 0.0)
    bars = signs().bars[1:]
    return "".join(bars[_level(mean, low, high, len(bars))] if math.isfinite(mean) else signs().times for mean in means)


def _level(value: float, low: float, high: float, count: int) -> int:
    if low == high:
        return count // 2
    return min(int((value / 2 - low / 2) / (high / 2 - low / 2) * count), count - 1)


@click.command(short_help="Show what each step of a run takes on disk.")
@click.argument("run", type=click.Path())
@click.option("-b", "--bytes", "exact", is_flag=True, help="Print sizes in bytes.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object, for programs.")
def du(run: str, exact: bool, as_json: bool) -> None:
    """Print for each step of RUN how large it is, and how much of that is its own or shared with others by links.

    Deleting a step frees what is its own. What several steps share is freed with the last of them. The size of a step
    that cannot be opened is not known.

    \b
    Examples:
      varstore du run
    """
    found = vs.steps(run)
    if as_json:
        click.echo(json.dumps(found.as_json(), indent=2))
        return
    click.echo(f"{one_line(run)}: {found.summary(exact=exact)}")
    rows = []
    for step in found.steps:
        sizes = (step.nbytes, step.own_nbytes, step.nbytes - step.own_nbytes)
        texts = ["" if step.time is None else size_text(size, exact=exact) for size in sizes]
        rows.append([one_line(step.name), *texts, one_line(f"incomplete: {step.problem}") if step.problem else ""])
    headings = ("step", "size", "own", "shared", "")
    columns = [Column(heading=heading, is_right=heading in headings[1:4]) for heading in headings]
    click.echo(columns_text(columns, rows, width=terminal_width()))
