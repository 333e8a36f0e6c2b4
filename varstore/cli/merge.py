"""``varstore merge``: one checkpoint of several, by links or by means."""

from __future__ import annotations

import click

import varstore as vs
from varstore.cli.convert import renames
from varstore.cli.output import progress
from varstore.text.escape import one_line
from varstore.text.hints import listed, plural
from varstore.text.sizes import size_text

__all__ = ["merge"]

_SHOWN = 5


def _numbers(_: click.Context, __: click.Parameter, given: str | None) -> list[float] | None:
    try:
        return None if given is None else [float(number) for number in given.split(",")]
    except ValueError:
        raise click.BadParameter(f"{given!r} is not a list of numbers like 3,1") from None


@click.command(short_help="Make a new checkpoint of several, by links.")
@click.argument("out", type=click.Path())
@click.argument("sources", metavar="SRC...", type=click.Path(), nargs=-1, required=True)
@click.option("--include", multiple=True, metavar="PATTERN", help="Take only names that match; may be repeated.")
@click.option("--exclude", multiple=True, metavar="PATTERN", help="Leave out names that match; may be repeated.")
@click.option(
    "--rename", multiple=True, metavar="OLD=NEW", callback=renames, help="Replace a prefix of names; may be repeated."
)
@click.option("--last-wins", is_flag=True, help="Of a name that several have, take that of the last SRC.")
@click.option("--average", is_flag=True, help="Take the means of the values instead, as for a model soup.")
@click.option("--weights", metavar="N,...", callback=_numbers, help="With --average: a number per SRC, such as 3,1.")
@click.option("--verify", is_flag=True, help="Compare what is linked with its digests first.")
@click.option("--overwrite", is_flag=True, help="Replace OUT if it is a checkpoint.")
def merge(
    out: str,
    sources: tuple[str, ...],
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    rename: dict[str, str | None] | None,
    last_wins: bool,
    average: bool,
    weights: list[float] | None,
    verify: bool,
    overwrite: bool,
) -> None:
    """Make a checkpoint OUT of the variables of every SRC: checkpoints, or any files that `varstore convert` takes.

    Variables of checkpoints are linked, so no data moves; those of other files are copied. One SRC can be given too, to
    choose from it or to rename. A name that two have is an error without --last-wins. Attributes and attached files are
    kept, but for those of one name and different content.

    With --average, every SRC has the same variables, and each becomes the mean of their values, accumulated in float32.

    \b
    Examples:
      varstore merge model backbone head
      varstore merge encoder model --include 'encoder.*' --rename encoder.=
      varstore merge soup run/step-10 run/step-20 --average --weights 1,3
    """
    made = vs.merge(
        out,
        sources,
        include=include or None,
        exclude=exclude or None,
        rename=rename,
        last_wins=last_wins,
        average=average,
        weights=weights,
        verify=verify,
        overwrite=overwrite,
        progress=progress(),
    )
    count = f"{plural(len(made), 'variable')} of {plural(len(sources), 'source')}, {size_text(made.nbytes)}"
    click.echo(f"{one_line(out)}: {count}")
    if made.left_out:
        click.echo(f"left out: {listed(list(map(one_line, made.left_out)), _SHOWN)}")
