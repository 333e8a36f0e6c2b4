"""``varstore stats``: statistics of every variable; the exit status says whether values are nan or infinite."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import click

import varstore as vs
from varstore.cli.columns import Column, columns_text, terminal_width
from varstore.cli.help import variable_names
from varstore.cli.output import print_report, progress
from varstore.cli.sources import open_path
from varstore.text.escape import one_line

__all__ = ["stats"]

_ALWAYS = frozenset({"nan", "inf"})
_STYLES: Mapping[str, Mapping[str, Any]] = {
    "name": {"style": {"fg": "cyan"}},
    "shape": {"rank": -2},
    "type": {"rank": -1, "style": {"fg": "green"}},
    **{heading: {"is_right": True, "rank": 1} for heading in ("min", "max")},
    **{heading: {"is_right": True, "rank": 2} for heading in ("nan", "inf")},
    "": {"rank": 3, "style": {"fg": "red"}, "least": 16},
}
_CHOICES = ("zero", "constant", "dead", "duplicate")


@click.command(short_help="Statistics of variables; find nan and inf.")
@click.argument("path", type=click.Path())
@click.argument("patterns", metavar="[PATTERN]...", nargs=-1, shell_complete=variable_names)
@click.option(
    "--fail-on",
    metavar="MARK,...",
    default="",
    help=f"What also makes the exit status 1, of {', '.join(_CHOICES)}.",
)
@click.option("--quantiles", is_flag=True, help="Find quantiles too, for --json; large variables are read twice.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object, for programs.")
@click.pass_context
def stats(
    ctx: click.Context, path: str, patterns: tuple[str, ...], fail_on: str, quantiles: bool, as_json: bool
) -> None:
    """Print a row per variable of PATH: how many values are zero, nan and inf, and the min, max, mean, std and norm.

    PATH is a checkpoint, the folder of a single variable, or any file or folder that `varstore convert` takes. If
    PATTERNs are given, only variables whose name matches one of them are read. Min and the following are those of the
    finite values; complex numbers count by their magnitude. Values are not compared with the digests; `varstore verify`
    does that.

    Marked are variables with nan and inf, those that are all zero or constant, those with dead rows (in which all
    values are zero), and duplicates of earlier ones. Tied variables and links to one file are not duplicates.

    Exit status: 0 if no value is nan or infinite and nothing has a mark of --fail-on; 1 otherwise; 3 if PATH could not
    be read.

    \b
    Examples:
      varstore stats lenet
      varstore stats model.safetensors '*.weight' --fail-on zero,duplicate
      varstore stats --json lenet | jq '.variables[].norm'
    """
    failing = _ALWAYS | _marks(fail_on)
    opened = open_path(path)
    source = {opened.name: opened} if isinstance(opened, vs.Variable) else opened
    report = vs.stats(source, include=patterns or None, quantiles=quantiles, progress=progress())
    if as_json:
        click.echo(json.dumps(report.as_json(), indent=2))
    else:
        _print(report)
    ctx.exit(1 if any(failing.intersection(found.marks) for found in report.values()) else 0)


def _print(report: vs.StatsReport) -> None:
    width = terminal_width()
    if width is None:
        print_report(report, ok=report.ok)
        return
    table = report.table()
    columns = [Column(heading=heading, **_STYLES.get(heading, {"is_right": True})) for heading in table.headings]
    rows = [[one_line(cell) for cell in row] for row in table.rows]
    click.echo(click.style(one_line(table.title), fg="green" if report.ok else "red"))
    click.echo("\n".join([columns_text(columns, rows, width=width), *map(one_line, table.notes)]))


def _marks(given: str) -> set[str]:
    marks = {mark.strip() for mark in given.split(",") if mark.strip()}
    for mark in sorted(marks.difference(_CHOICES, _ALWAYS)):
        raise click.UsageError(f"--fail-on: {mark!r} is not one of {', '.join(_CHOICES)}.")
    return marks
