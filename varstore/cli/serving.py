"""``varstore export`` and ``check``: the graphs of a checkpoint, for other programs, and run once."""

from __future__ import annotations

import click

import varstore as vs
from varstore.cli.output import print_report
from varstore.text.escape import one_line

__all__ = ["check", "export"]


@click.command(short_help="Write a graph of a checkpoint with its values, for the system that runs it.")
@click.argument("path", type=click.Path())
@click.argument("target", type=click.Path())
@click.option("--entry", metavar="NAME", help='The graph, if it is neither "forward" nor the only one.')
def export(path: str, target: str, entry: str | None) -> None:
    """Write the graph of the checkpoint PATH and the values that it uses to TARGET. Prints what it wrote.

    An ONNX model, or a program that PyTorch exported, becomes one file, which needs nothing else to run. A program of
    Paddle becomes the files of the prefix TARGET, with those of the layer's other methods. A graph of OneFlow becomes a
    folder. `varstore show PATH` lists the entries.

    \b
    Examples:
      varstore export run/step-9 model.onnx
      varstore export run/step-9 out/net
    """
    for written in vs.export(path, target, entry=entry):
        click.echo(one_line(written))


@click.command(short_help="Run the ONNX graphs of a checkpoint once, on random inputs.")
@click.argument("path", type=click.Path())
@click.option("--entry", metavar="NAME", help="Only this graph.")
@click.option("--against", type=click.Path(), metavar="OTHER", help="Compare the results with those of OTHER.")
@click.pass_context
def check(ctx: click.Context, path: str, entry: str | None, against: str | None) -> None:
    """Run each ONNX graph of the checkpoint PATH once with onnxruntime, and print the time and what it gives.

    The inputs are random numbers of the shapes that the graph states; extents that it leaves open are 1. With
    --against, the graphs of the checkpoint OTHER get the same inputs, and the largest differences are printed.

    Exit status: 0 if every graph ran; 1 if one did not.

    \b
    Examples:
      varstore check run/step-9
      varstore check run/step-9 --against run/step-8
    """
    try:
        from varstore.adapters import onnx
    except ImportError as error:
        raise vs.errors.MissingDependency(
            "this needs onnxruntime", hint="install it: pip install onnxruntime"
        ) from error
    report = onnx.check(path, entry=entry, against=against)
    print_report(report, ok=report.ok)
    ctx.exit(0 if report.ok else 1)
