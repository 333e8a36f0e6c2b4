"""``varstore seal`` and ``varstore clean``: commands that change a directory, and say what they changed."""

from __future__ import annotations

import click

import varstore as vs
from varstore.cli.output import print_report, printable, progress

__all__ = ["clean", "seal"]


@click.command(short_help="Record what lies in a checkpoint's folders now.")
@click.argument("path", type=click.Path())
def seal(path: str) -> None:
    """Write a manifest for the checkpoint PATH that records what lies in its folders now.

    For a checkpoint that has none, such as OneFlow's, and after a deliberate change by hand with rm, cp or mv.
    Values are read once for their digests and are not changed. Prints what the new manifest changes.

    \b
    Examples:
      varstore seal lenet_from_oneflow
      rm -r lenet/optimizer && varstore seal lenet
    """
    print_report(vs.seal(path, progress=progress()), ok=True)


@click.command(short_help="Remove what crashed saves left behind.")
@click.argument("directory", type=click.Path())
def clean(directory: str) -> None:
    """Remove from DIRECTORY, the parent of checkpoints, the staging folders of saves that crashed.

    They are named .NAME.saving-XXXXXXXX. One whose save still runs is locked and stays. Finished checkpoints
    are never touched. Prints each folder that was removed.

    \b
    Examples:
      varstore clean runs
    """
    for removed in vs.clean(directory):
        click.echo(printable(f"removed {removed}"))
