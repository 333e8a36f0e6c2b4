"""``varstore verify`` and ``check-storage``: commands whose exit status is the answer."""

from __future__ import annotations

import json

import click

import varstore as vs
from varstore.cli.output import FAILED, complain, error_text, print_report, progress

__all__ = ["check_storage", "verify"]


@click.command(short_help="Compare every byte of checkpoints with what was saved.")
@click.argument("paths", metavar="PATH...", type=click.Path(), nargs=-1, required=True)
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object per PATH, for programs.")
@click.pass_context
def verify(ctx: click.Context, paths: tuple[str, ...], as_json: bool) -> None:
    """Read every byte of each checkpoint PATH and compare it with the digests in its manifest.

    Lists everything that is wrong: bytes, sizes, "meta" files, variables that are missing or not in the manifest, the
    manifest itself, a missing marker. Digests find damage, not forgery: whoever can change the files can change the
    manifest too.

    Exit status: 0 if everything is as it was saved; 1 if something is not; 3 if a PATH could not be read (the others
    are still verified).

    \b
    Examples:
      varstore verify lenet
      varstore verify runs/*/ && rsync -a runs/ backup:
      varstore verify --json lenet | jq '.problems[]'
    """
    status = 0
    for path in paths:
        try:
            report = vs.verify(path, progress=progress())
        except vs.VarstoreError as error:
            complain(error_text(error))
            status = FAILED
            continue
        if as_json:
            click.echo(json.dumps(report.as_json(), indent=2))
        else:
            print_report(report, ok=report.ok)
        status = max(status, 0 if report.ok else 1)
    ctx.exit(status)


@click.command(short_help="Find out what a file system can promise.")
@click.argument("directory", type=click.Path())
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object, for programs.")
@click.pass_context
def check_storage(ctx: click.Context, directory: str, as_json: bool) -> None:
    """Find out what varstore can promise on the file system of DIRECTORY, with probes that leave nothing behind.

    Prints the file system's class, what is promised on it, and what the probes found: a rename onto a full folder, an
    exchange of two folders, links, locks, fsync, what is said of free space, and the resolution of file times.

    Exit status: 0 if a save is whole or absent there; 1 if not; 3 if DIRECTORY could not be checked.

    \b
    Examples:
      varstore check-storage runs
    """
    report = vs.check_storage(directory)
    if as_json:
        click.echo(json.dumps(report.as_json(), indent=2))
    else:
        print_report(report, ok=report.ok)
    ctx.exit(0 if report.ok else 1)
