"""``varstore report``: a checkpoint as one file of HTML, to look at and to show to others."""

from __future__ import annotations

import click

from varstore.cli.output import progress
from varstore.text.escape import one_line
from varstore.text.hints import plural
from varstore.view.report import STEPS, write_report

__all__ = ["report"]


@click.command(short_help="Write a report with pictures, as one HTML file.")
@click.argument("path", type=click.Path())
@click.option(
    "-o", "--output", type=click.Path(dir_okay=False), metavar="FILE", default="report.html", show_default=True
)
@click.option(
    "--compare", metavar="OTHER", type=click.Path(), help="Also show how PATH differs from OTHER, an earlier one."
)
@click.option(
    "--steps",
    type=click.IntRange(min=0),
    default=STEPS,
    show_default=True,
    help="In how many steps of a run norms are measured; all values of these are read.",
)
def report(path: str, output: str, compare: str | None, steps: int) -> None:
    """Write a report on PATH: totals, and of each variable statistics, a histogram and, of matrices, a heat map.

    With --compare, also how far each variable moved, and the layers that moved most. Of the directory of a run, also
    its metrics, the norms and the disk that links save, over the steps; the variables are those of the latest one.

    PATH is a checkpoint, the directory of a run, or any file or folder that `varstore convert` takes. The report is one
    file of HTML, which replaces FILE if there is one. It needs no network, and shows nothing but what is in it: it can
    be sent to others as it is.

    Values are read a few MiB at a time and are not compared with the digests; `varstore verify` does that. Heat maps
    are made of the 500 largest matrices, in at most 64 x 64 blocks.

    \b
    Examples:
      varstore report lenet
      varstore report model.safetensors -o model.html
      varstore report finetuned --compare base
    """
    variables, nbytes = write_report(path, output, compare_with=compare, steps=steps, progress=progress())
    click.echo(f"{one_line(output)}: {plural(variables, 'variable')}, {plural(nbytes, 'byte')}")
