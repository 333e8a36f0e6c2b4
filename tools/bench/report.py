"""Print the figures as tables, write them as JSON, draw them as a chart with the limits as lines."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from tools.bench.measure import Timing
from tools.bench.targets import LIMIT


def print_timings(console: Console, task: str, timings: Mapping[str, Timing]) -> None:
    """Print one task's candidates, fastest first, with varstore's ratio to each."""
    table = Table(title=task, title_justify="left")
    for column, side in (("", "left"), ("median s", "right"), ("spread", "right"), ("varstore / it", "right")):
        table.add_column(column, justify=side)  # type: ignore[arg-type]
    own = next((timing.median for name, timing in timings.items() if name.startswith("varstore")), None)
    for name, timing in sorted(timings.items(), key=lambda pair: pair[1].median):
        ratio = f"{own / timing.median:.2f}" if own and not name.startswith("varstore") else ""
        table.add_row(name, f"{timing.median:.4f}", timing.spread, ratio)
    console.print(table)


def print_memory(console: Console, task: str, peaks: Mapping[str, float]) -> None:
    """Print one task's peaks of extra memory."""
    table = Table(title=task, title_justify="left")
    table.add_column("")
    table.add_column("MiB", justify="right")
    for name, peak in sorted(peaks.items(), key=lambda pair: pair[1]):
        table.add_row(name, f"{peak / (1 << 20):.0f}")
    console.print(table)


def print_targets(console: Console, rows: list[dict[str, Any]]) -> None:
    """Print what was promised and what was found."""
    table = Table(title="targets", title_justify="left")
    columns = (("", "left"), ("found", "right"), ("at most", "right"), ("", "left"), ("without any library", "left"))
    for column, side in columns:
        table.add_column(column, justify=side)  # type: ignore[arg-type]
    for row in rows:
        found, most = (f"{row[key]:.2f}{row['unit']}" for key in ("value", "most"))
        bound = f"{row['bound']:.2f}× {row['bound is'].removeprefix(LIMIT)}" if row["bound is"] else ""
        table.add_row(row["what"], found, most, "met" if row["met"] else "[bold red]missed[/]", bound)
    console.print(table)


def write_json(path: str, results: Mapping[str, Any], targets: list[dict[str, Any]], scale: float) -> None:
    """Write every figure of the run."""
    record = {"machine": platform.platform(), "scale": scale, "results": results, "targets": targets}
    with open(path, "w") as file:
        json.dump(record, file, indent=1)


def draw(path: str, results: Mapping[str, Mapping[str, float]]) -> None:
    """Draw one row of bars a task, on a logarithmic axis, limits as dashed lines."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    timed = {task: medians for task, medians in results.items() if not task.startswith("memory")}
    columns = 3
    rows = -(-len(timed) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(16, 2.6 * rows), squeeze=False, layout="constrained")
    for axis in axes.flat[len(timed) :]:
        axis.axis("off")
    for axis, (task, medians) in zip(axes.flat, timed.items(), strict=False):
        bars = sorted((pair for pair in medians.items() if not pair[0].startswith(LIMIT)), key=lambda pair: -pair[1])
        colours = ["tab:orange" if name.startswith("varstore") else "tab:blue" for name, _ in bars]
        axis.barh([name for name, _ in bars], [seconds for _, seconds in bars], color=colours)
        for name, seconds in medians.items():
            if name.startswith(LIMIT):
                axis.axvline(seconds, color="black", linestyle="--", linewidth=1, label=name.removeprefix(LIMIT))
                axis.legend(fontsize=7)
        axis.set(title=task, xlabel="seconds", xscale="log")
        axis.tick_params(labelsize=8)
    figure.savefig(path, dpi=110)
