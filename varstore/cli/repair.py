"""``varstore seal``, ``salvage``, ``clean`` and ``links``: commands that write, and print what they did."""

from __future__ import annotations

import json

import click

import varstore as vs
from varstore.cli.output import print_report, progress
from varstore.text.escape import one_line

__all__ = ["clean", "links", "salvage", "seal"]


@click.command(short_help="Record what is in a checkpoint's folders now.")
@click.argument("path", type=click.Path())
@click.option(
    "--complete", is_flag=True, help="Also seal what OneFlow wrote for a graph, if all that model.mlir names is there."
)
def seal(path: str, complete: bool) -> None:
    """Write a manifest for the checkpoint PATH that records what is in its folders now.

    Use it for a checkpoint that does not have a manifest, such as OneFlow's, and after you have changed one on purpose
    with rm, cp or mv. Values are read once to compute their digests, and are not changed. Prints how the new manifest
    differs from the old one.

    \b
    Examples:
      varstore seal lenet_from_oneflow
      varstore seal --complete graph_from_oneflow
      rm -r lenet/optimizer && varstore seal lenet
    """
    print_report(vs.seal(path, complete=complete, progress=progress()), ok=True)


@click.command(short_help="Save what is whole of a damaged checkpoint.")
@click.argument("source", metavar="SRC", type=click.Path())
@click.argument("target", metavar="DST", type=click.Path())
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object, for programs.")
@click.pass_context
def salvage(ctx: click.Context, source: str, target: str, as_json: bool) -> None:
    """Make a new checkpoint DST of what is whole of SRC, which is damaged or was never finished.

    Each variable and attached file is compared with its digests, and linked if it is whole. One whose file is damaged
    is taken from another with the same digests, if there is one. Prints what is lost, and why. SRC can also be a file
    that `varstore convert` takes, and is not changed.

    Exit status: 0 if nothing is lost; 1 if something is; 3 if no variable is whole, or DST cannot be written.

    \b
    Examples:
      varstore salvage lenet lenet_rescued
    """
    report = vs.salvage(source, target, progress=progress())
    if as_json:
        click.echo(json.dumps(report.as_json(), indent=2))
    else:
        print_report(report, ok=report.ok)
    ctx.exit(0 if report.ok else 1)


@click.command(short_help="Remove what crashed saves left.")
@click.argument("directory", type=click.Path())
def clean(directory: str) -> None:
    """Remove the staging folders of crashed saves from DIRECTORY, the parent directory of checkpoints.

    These folders are named .NAME.saving-XXXXXXXX. The folder of a save that is still running stays, and so does what
    another user left, and on a shared file system what another machine changed within the last day. Complete
    checkpoints are never changed. Prints each folder that was removed, and each that stays with whose it is.

    \b
    Examples:
      varstore clean runs
    """
    done = vs.clean(directory)
    for removed in done:
        click.echo(f"removed {one_line(removed)}")
    for path, whose in done.kept.items():
        click.echo(f"kept {one_line(path)}, which belongs to {one_line(whose)}")


@click.command(short_help="Make equal files of a run one file again, after a copy.")
@click.argument("directory", type=click.Path())
@click.option("--dry-run", is_flag=True, help="Change nothing, and print what would be done.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object, for programs.")
def links(directory: str, dry_run: bool, as_json: bool) -> None:
    """Make equal files of the checkpoints in DIRECTORY one file again, as links, and print what that frees.

    Use it after cp -r, git, or a download, which turn each link into a file of its own. Files are found by their
    digests, and then compared byte for byte. Each is replaced in one step, so checkpoints can be read meanwhile.
    Files of other users and of other file systems are left as they are, as are checkpoints without a manifest.

    \b
    Examples:
      varstore links runs/a
      varstore links --dry-run runs/a
    """
    report = vs.links(directory, dry_run=dry_run, progress=progress())
    if as_json:
        click.echo(json.dumps(report.as_json(), indent=2))
    else:
        print_report(report, ok=True)
