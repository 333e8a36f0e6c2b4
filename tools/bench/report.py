"""Print the figures as tables, and draw them in a chart, with limits as lines."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from tools.bench.records import Figure, Row
from tools.bench.sides import BEFORE
from tools.bench.targets import LIMIT

SLOWER = 1.10
"""The ratio to the earlier version from which a row is marked as slower."""


def print_row(console: Console, task: str, row: Row) -> None:
    """Print the candidates of a task, lowest first, with the ratio of varstore to each."""
    columns = ("median s", "spread") if row.unit == "s" else ("MiB", "spread")
    table = _table(task, ("", *columns, "varstore / it"), "lrrr")
    for name, figure in sorted(row.figures.items(), key=lambda pair: pair[1].median):
        ratio = f"{row.ratios[name]:.2f}" if name in row.ratios else ""
        table.add_row(name, _amount(figure.median, row.unit), _spread(figure, row.unit), ratio)
    console.print(table)


def print_comparison(console: Console, rows: Mapping[str, Row]) -> None:
    """Print the ratio of varstore now to the earlier version for each row, and mark rows that are slower."""
    columns = ("", "now", "before", "now / before", "lowest / lowest", "")
    table = _table("now and before, in one run", columns, "lrrrrl")
    compared = slower = 0
    for task, row in rows.items():
        for name, now in row.figures.items():
            before = row.figures.get(name + BEFORE)
            if before is None:
                continue
            compared += 1
            least = _TOO_LITTLE[row.unit]
            ratio, lowest = (
                max(mine or 0.0, least) / max(theirs or 0.0, least)
                for mine, theirs in ((now.median, before.median), (now.min, before.min))
            )
            slower += ratio > SLOWER
            amounts = (_amount(figure.median, row.unit) + f" {_UNITS[row.unit]}" for figure in (now, before))
            what = task if name == "varstore" else f"{task}: {name}"
            mark = "[bold red]slower[/]" if ratio > SLOWER else ""
            table.add_row(what, *amounts, f"{ratio:.2f}", f"{lowest:.2f}", mark)
    console.print(table)
    console.print(f"{slower} of {compared} rows more than {SLOWER - 1:.0%} above the earlier version's")


_UNITS = {"s": "s", "B": "MiB"}
_TOO_LITTLE = {"s": 1e-6, "B": float(1 << 20)}
"""Amounts below which a ratio does not matter."""


def _amount(value: float, unit: str) -> str:
    """Return seconds with three significant digits, or MiB."""
    if unit == "B":
        return f"{value / (1 << 20):.2f}"
    return f"{value:.{min(6, max(3, 2 - math.floor(math.log10(value))))}f}" if value > 0 else "0"


def _spread(figure: Figure, unit: str) -> str:
    if figure.min is None or figure.max is None:
        return ""
    return f"{_amount(figure.min, unit)}-{_amount(figure.max, unit)}"


def _table(title: str, columns: Sequence[str], sides: str) -> Table:
    """Return an empty table; `sides` has an "l" or "r" for each column."""
    table = Table(title=title, title_justify="left")
    for column, side in zip(columns, sides, strict=True):
        table.add_column(column, justify="left" if side == "l" else "right")
    return table


def print_targets(console: Console, rows: list[dict[str, Any]]) -> None:
    """Print the targets and the results."""
    table = _table("targets", ("", "found", "at most", "", "without any library"), "lrrll")
    for row in rows:
        found, most = (f"{row[key]:.2f}{row['unit']}" for key in ("value", "most"))
        bound = f"{row['bound']:.2f}× {row['bound is'].removeprefix(LIMIT)}" if row["bound"] else ""
        table.add_row(row["what"], found, most, "met" if row["met"] else "[bold red]missed[/]", bound)
    console.print(table)


def draw(path: str, results: Mapping[str, Row]) -> None:
    """Draw the bars of each task on a logarithmic axis, with limits as dashed lines."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    timed = {
        task: {name: figure.median for name, figure in row.figures.items()}
        for task, row in results.items()
        if row.unit == "s"
    }
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
