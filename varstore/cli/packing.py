"""``varstore pack`` and ``unpack``: the same variables in less space, and back."""

from __future__ import annotations

import click

import varstore as vs
from varstore.cli.output import progress
from varstore.text.escape import one_line
from varstore.text.hints import plural

__all__ = ["pack", "unpack"]


@click.command(short_help="Compress a checkpoint, for archives and slow connections.")
@click.argument("source", type=click.Path())
@click.argument("target", type=click.Path())
@click.option(
    "--level",
    type=click.Choice(["fast", "small"]),
    default="fast",
    help="fast (the default) decompresses quickly, small takes less space.",
)
@click.option("--verify", is_flag=True, help="Compare what is linked with its digests first.")
@click.option("--overwrite", is_flag=True, help="Replace the checkpoint TARGET.")
def pack(source: str, target: str, level: str, verify: bool, overwrite: bool) -> None:
    """Save the checkpoint SOURCE again as TARGET, with its variables compressed. Nothing is lost.

    All commands read TARGET as any other checkpoint; OneFlow, cat and memory maps need raw values, which unpack writes.
    Variables with less than 64 KiB, and those that hardly shrink, stay raw and are linked.

    \b
    Examples:
      varstore pack runs/a/step-1000 archive
      varstore pack --level small runs/a/step-1000 archive
    """
    saved = vs.pack(
        source,
        target,
        level="small" if level == "small" else "fast",
        verify=verify,
        overwrite=overwrite,
        progress=progress(),
    )
    _print_sizes(saved)


@click.command(short_help="Write a packed checkpoint with raw values.")
@click.argument("source", type=click.Path())
@click.argument("target", type=click.Path())
@click.option("--verify", is_flag=True, help="Compare what is linked with its digests first.")
@click.option("--overwrite", is_flag=True, help="Replace the checkpoint TARGET.")
def unpack(source: str, target: str, verify: bool, overwrite: bool) -> None:
    """Save the checkpoint SOURCE again as TARGET, with raw values in each out.

    \b
    Examples:
      varstore unpack archive lenet
    """
    _print_sizes(vs.unpack(source, target, verify=verify, overwrite=overwrite, progress=progress()))


def _print_sizes(saved: vs.Checkpoint) -> None:
    own = [variable for variable in saved.values() if variable.tied_to is None]
    values, stored = sum(variable.nbytes for variable in own), sum(variable.stored_nbytes for variable in own)
    share = f" ({stored / values:.0%})" if values else ""
    click.echo(f"{one_line(saved.path)}: {plural(len(saved), 'variable')}, {stored:,} of {values:,} bytes{share}")
