"""``varstore verify`` and ``varstore diff``: commands that answer with their exit status."""

from __future__ import annotations

import click

import varstore as vs
from varstore.cli.output import FAILED, complain, print_report, progress

__all__ = ["diff", "verify"]


@click.command(short_help="Compare every byte of checkpoints with what was saved.")
@click.argument("paths", metavar="PATH...", type=click.Path(), nargs=-1, required=True)
@click.pass_context
def verify(ctx: click.Context, paths: tuple[str, ...]) -> None:
    """Read every byte of each checkpoint PATH and compare it with the digests in its manifest.

    Lists whatever is wrong: bytes, sizes, "meta" files, variables missing or unlisted, the manifest itself, a
    missing marker. Digests find damage, not forgery: who can change the files can change the manifest too.

    Exit status: 0 all is as it was saved; 1 something is not; 3 a PATH could not be looked at (the others were).

    \b
    Examples:
      varstore verify lenet
      varstore verify runs/*/ && rsync -a runs/ backup:
    """
    status = 0
    for path in paths:
        try:
            report = vs.verify(path, progress=progress())
        except vs.VarstoreError as error:
            complain(str(error))
            status = FAILED
            continue
        print_report(report, ok=report.ok)
        status = max(status, 0 if report.ok else 1)
    ctx.exit(status)


@click.command(short_help="List the variables in which two checkpoints differ.")
@click.argument("a", type=click.Path())
@click.argument("b", type=click.Path())
@click.pass_context
def diff(ctx: click.Context, a: str, b: str) -> None:
    """Compare the checkpoints A and B by name, shape, type and values.

    Values are compared by the digests in the manifests; they are read only where a manifest is missing.

    Exit status: 0 the same variables with the same values; 1 they differ; 3 one could not be read.

    \b
    Examples:
      varstore diff mlp_models_1 mlp_ext_models_1
    """
    report = vs.diff(a, b)
    print_report(report, ok=report.equal)
    ctx.exit(0 if report.equal else 1)
