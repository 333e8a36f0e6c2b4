"""``varstore convert``: from one system's files to another's, one tensor at a time."""

from __future__ import annotations

import click

import varstore as vs
from varstore.cli.output import printable, progress
from varstore.text.hints import listed, plural

__all__ = ["convert"]

_SHOWN = 5


def _renames(_: click.Context, __: click.Parameter, given: tuple[str, ...]) -> dict[str, str | None] | None:
    prefixes: dict[str, str | None] = {}
    for item in given:
        old, equals, new = item.partition("=")
        if not equals:
            raise click.BadParameter(f"{item!r} is not OLD=NEW, two prefixes of names; NEW may be empty")
        prefixes[old] = new
    return prefixes or None


@click.command(short_help="Write another system's file as a checkpoint, or the other way round.")
@click.argument("source", type=click.Path())
@click.argument("target", type=click.Path())
@click.option("--format", "format_", metavar="NAME", help="Format of TARGET, where its suffix does not tell.")
@click.option("--source-format", metavar="NAME", help="Format of SOURCE, where its content does not tell.")
@click.option("--include", multiple=True, metavar="PATTERN", help="Only names like this; may be repeated.")
@click.option("--exclude", multiple=True, metavar="PATTERN", help="No names like this; may be repeated.")
@click.option("--rename", multiple=True, metavar="OLD=NEW", callback=_renames, help="Change a prefix of names.")
@click.option("--dtype", metavar="TYPE", help="Convert floating tensors to this type, such as bfloat16.")
def convert(
    source: str,
    target: str,
    format_: str | None,
    source_format: str | None,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    rename: dict[str, str | None] | None,
    dtype: str | None,
) -> None:
    """Read SOURCE, of any format, and write it as TARGET: a new directory, or a file, which replaces one of its name.

    Nobody's framework is needed, and nothing that a file names is run: pickles are read by varstore's own
    machine. Without a suffix, TARGET is a checkpoint directory. Patterns are those of a shell, on whole names
    as SOURCE has them.

    \b
    Examples:
      varstore convert model.pt model                      PyTorch to a checkpoint
      varstore convert model model.safetensors             and on
      varstore convert a.pdparams b.ckpt --dtype float16   Paddle to MindSpore, in half the space
      varstore convert m.pt backbone --include 'net.*' --rename net.=
    """
    done = vs.convert(
        source,
        target,
        format=format_,
        source_format=source_format,
        include=include or None,
        exclude=exclude or None,
        rename=rename,
        dtype=dtype,
        progress=progress(),
    )
    count = f"{plural(len(done.names), 'tensor')}, {plural(done.nbytes, 'byte')}"
    click.echo(printable(f"{source} ({done.source_format}) -> {target} ({done.format}): {count}"))
    if done.left_out:
        left_out = listed(list(done.left_out), _SHOWN)
        click.echo(printable(f"left out, because {done.format} files hold only arrays: {left_out}"))
