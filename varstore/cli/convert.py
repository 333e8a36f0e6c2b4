"""``varstore convert``: convert one system's files to another's, one tensor at a time."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any, TextIO

import click

import varstore as vs
from varstore.cli.output import progress
from varstore.text.escape import one_line
from varstore.text.hints import listed, plural

__all__ = ["convert", "renames"]

_SHOWN = 5


def renames(_: click.Context, __: click.Parameter, given: tuple[str, ...]) -> dict[str, str | None] | None:
    """Return prefixes and what replaces them, of options like OLD=NEW."""
    prefixes: dict[str, str | None] = {}
    for item in given:
        old, equals, new = item.partition("=")
        if not equals:
            raise click.BadParameter(f"{item!r} is not OLD=NEW, two prefixes of names of which NEW may be empty")
        prefixes[old] = new
    return prefixes or None


@click.command(short_help="Convert another system's file to a checkpoint, or a checkpoint to a file.")
@click.argument("source", type=click.Path())
@click.argument("target", type=click.Path())
@click.option("--format", "format_", metavar="NAME", help="Format of TARGET, if its suffix does not tell.")
@click.option("--source-format", metavar="NAME", help="Format of SOURCE, if its content does not tell.")
@click.option("--include", multiple=True, metavar="PATTERN", help="Convert only names that match; may be repeated.")
@click.option("--exclude", multiple=True, metavar="PATTERN", help="Leave out names that match; may be repeated.")
@click.option(
    "--rename", multiple=True, metavar="OLD=NEW", callback=renames, help="Replace a prefix of names; may be repeated."
)
@click.option("--dtype", metavar="TYPE", help="Convert floating-point tensors to this type, such as bfloat16.")
@click.option(
    "--limit", type=int, metavar="BYTES", help="How large the values may be, if the file is compressed a lot."
)
@click.option("--encoding", metavar="NAME", help="torch: the encoding of strings that Python 2 pickled, or bytes.")
@click.option(
    "--model",
    metavar="MODEL",
    help="ONNX, Paddle, .pt2, .mindir, .mge: the model of which TARGET is a copy, with the values of SOURCE.",
)
@click.option("--ignore-extra", is_flag=True, help="Leave out what MODEL does not have.")
@click.option("--separator", metavar="TEXT", help="oneflow-legacy: what replaces each / in a name.")
@click.option(
    "--config", type=click.File(encoding="utf-8"), metavar="FILE", help="huggingface: the config.json of the model."
)
@click.option("--shard-bytes", type=int, metavar="BYTES", help="safetensors, huggingface: how large a file may be.")
@click.option("--overwrite", is_flag=True, help="Replace TARGET if it is a folder of the format.")
@click.option("--dry-run", is_flag=True, help="Print what would be done, and write nothing.")
def convert(
    source: str,
    target: str,
    format_: str | None,
    source_format: str | None,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    rename: dict[str, str | None] | None,
    dtype: str | None,
    limit: int | None,
    encoding: str | None,
    model: str | None,
    ignore_extra: bool,
    separator: str | None,
    config: TextIO | None,
    shard_bytes: int | None,
    overwrite: bool,
    dry_run: bool,
) -> None:
    """Read SOURCE in any format and write it to TARGET, a directory or a file.

    An existing file is replaced, and a folder of the same format with --overwrite.

    The frameworks need not be installed, and no code that a file asks for is run, because varstore reads pickles
    itself. A TARGET without a suffix is a checkpoint directory. A PATTERN is compared with the whole name that SOURCE
    has: * matches any text, separators too; ? matches one character; [ab] matches one of several.

    \b
    Examples:
      varstore convert model.pt model                      PyTorch to a checkpoint
      varstore convert model model.safetensors             a checkpoint to safetensors
      varstore convert a.pdparams b.ckpt --dtype float16   Paddle to MindSpore, with half the bytes
      varstore convert m.pt backbone --include 'net.*' --rename net.=
      varstore convert step-9 new.onnx --model net.onnx    a model with the values of a checkpoint
      varstore convert step-9 bert --format huggingface --config config.json
    """
    given = {"model": model, "separator": separator, "config": _json_in(config), "shard_bytes": shard_bytes}
    options: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    options["overwrite"] = overwrite
    is_replaced = os.path.isfile(target) or (overwrite and os.path.isdir(target))
    done = vs.convert(
        source,
        target,
        format=format_,
        source_format=source_format,
        include=include or None,
        exclude=exclude or None,
        rename=rename,
        dtype=dtype,
        limit=limit,
        encoding=encoding,
        ignore_extra=ignore_extra,
        dry_run=dry_run,
        progress=progress(),
        **options,
    )
    done_to = (
        f"{one_line(target)} ({done.format}){', replaced' if is_replaced else ''}{', not written' if dry_run else ''}"
    )
    count = f"{plural(len(done.names), 'tensor')}, {plural(done.nbytes, 'byte')}"
    click.echo(f"{one_line(source)} ({done.source_format}) -> {done_to}: {count}")
    for change, names in _by_value(done.changed).items():
        click.echo(f"changed type, {one_line(change)}: {listed(names, _SHOWN)}")
    if done.saturated:
        counts = [f"{one_line(name)} ({plural(count, 'value')})" for name, count in done.saturated.items()]
        click.echo(f"beyond the range of {one_line(dtype)}: {listed(counts, _SHOWN)}")
    if done.absent_chunks:
        counts = [f"{one_line(name)} ({plural(count, 'chunk')})" for name, count in done.absent_chunks.items()]
        click.echo(f"absent from the source, and taken for the fill value: {listed(counts, _SHOWN)}")
    if done.unknown:
        names = [f"{one_line(f'{module}.{name}')} ({count})" for module, name, count in done.unknown]
        click.echo(f"unknown to varstore, and not imported: {listed(names, _SHOWN)}")
    for reason, left_out in _by_value(done.reasons).items():
        click.echo(f"left out, because {one_line(reason)}: {listed(left_out, _SHOWN)}")


def _json_in(file: TextIO | None) -> Any:
    try:
        return None if file is None else json.load(file)
    except ValueError as error:
        raise click.BadParameter(f"it is not JSON: {error}", param_hint="--config") from None


def _by_value(of: Mapping[str, str]) -> dict[str, list[str]]:
    """Return the names that have a value, for each value."""
    alike: dict[str, list[str]] = {}
    for name, value in of.items():
        alike.setdefault(value, []).append(one_line(name))
    return alike
