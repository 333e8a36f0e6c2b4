"""``varstore diff``: what differs between two checkpoints, and how far values moved; the exit status is the answer."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import click

import varstore as vs
from varstore.cli.output import print_report, progress
from varstore.cli.sources import open_path

__all__ = ["diff"]

_TOLERANCE = click.FloatRange(min=0)


@click.command(short_help="List what differs between two checkpoints.")
@click.argument("a", type=click.Path())
@click.argument("b", type=click.Path())
@click.argument("patterns", metavar="[PATTERN]...", nargs=-1)
@click.option("--values", is_flag=True, help="Read the values, and print how far each variable moved.")
@click.option("--rtol", type=_TOLERANCE, metavar="X", help="Values are equal if |b - a| <= ATOL + X |b|.")
@click.option("--atol", type=_TOLERANCE, metavar="X", help="Values are equal if |b - a| <= X + RTOL |b|.")
@click.option("--flat", is_flag=True, help="With --values: a row per variable, also if there are more than 40.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object, for programs.")
@click.pass_context
def diff(
    ctx: click.Context,
    a: str,
    b: str,
    patterns: tuple[str, ...],
    values: bool,
    rtol: float | None,
    atol: float | None,
    flat: bool,
    as_json: bool,
) -> None:
    """Compare A and B: names, shapes, types and values of their variables, attached files, attributes and state.

    A and B are checkpoints, folders of single variables, or any files or folders that `varstore convert` takes. If
    PATTERNs are given, only variables and leaves of the state whose name matches one of them are compared. Attributes
    and files are compared if both have one format.

    Values are compared by the digests in the manifests, and read only where these are missing and both are not one
    file. --values reads all but what is one file, so it also finds damage. It prints for each variable that moved: how
    many values changed, the largest |b - a|, the norm of b - a relative to that of a, and the cosine of the angle
    between a and b. What moved most comes first; more than 40 variables are printed by block, such as h.11.

    --rtol and --atol imply --values. Within them, variables are equal whatever their types: bfloat16 and float32.

    Exit status: 0 if both are equal; 1 if they differ; 3 if one could not be read.

    \b
    Examples:
      varstore diff mlp_models_1 mlp_ext_models_1
      varstore diff --values run/step-10 run/step-20 'h.*'
      varstore diff --rtol 0.01 lenet lenet.safetensors
    """
    report = vs.diff(
        _source(a),
        _source(b),
        values=values,
        rtol=rtol,
        atol=atol,
        include=patterns or None,
        progress=progress(),
    )
    report = replace(report, a=a, b=b)
    if as_json:
        click.echo(json.dumps(report.as_json(), indent=2))
    else:
        print_report(report.text(flat=flat), ok=report.ok)
    ctx.exit(0 if report.ok else 1)


def _source(path: str) -> Any:
    opened = open_path(path)
    return {opened.name: opened} if isinstance(opened, vs.Variable) else opened
