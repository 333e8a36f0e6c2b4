"""``varstore stats``: statistics of every variable; the exit status says whether values are nan or infinite."""

from __future__ import annotations

import json

import click

import varstore as vs
from varstore.cli.output import print_report, progress
from varstore.cli.sources import open_path

__all__ = ["stats"]

_ALWAYS = frozenset({"nan", "inf"})
_CHOICES = ("zero", "constant", "dead", "duplicate")


@click.command(short_help="Statistics of variables; find nan and inf.")
@click.argument("path", type=click.Path())
@click.argument("patterns", metavar="[PATTERN]...", nargs=-1)
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
        print_report(report, ok=report.ok)
    ctx.exit(1 if any(failing.intersection(found.marks) for found in report.values()) else 0)


def _marks(given: str) -> set[str]:
    marks = {mark.strip() for mark in given.split(",") if mark.strip()}
    for mark in sorted(marks.difference(_CHOICES, _ALWAYS)):
        raise click.UsageError(f"--fail-on: {mark!r} is not one of {', '.join(_CHOICES)}.")
    return marks
