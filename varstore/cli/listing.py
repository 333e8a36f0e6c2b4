"""``varstore ls``: names, shapes, types and sizes; no values are read.

A terminal gets a table; a pipe, a file or a long list gets plain columns. rich is imported only for the table, because
importing it takes longer than opening a checkpoint, and a table of 10,000 rows takes it more than a second.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any

import click

import varstore as vs
from varstore.cli.output import allow_incomplete_option, is_terminal, open_path, with_flags
from varstore.text.escape import PROBLEM_LIMIT, one_line
from varstore.text.hints import plural

__all__ = ["ls", "print_listing"]

_TABLE_ROWS = 500
_HEADINGS = ("name", "shape", "type", "bytes", "")


@click.command(short_help="List the variables and files of a checkpoint.")
@click.argument("path", type=click.Path())
@click.argument("patterns", metavar="[PATTERN]...", nargs=-1)
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object, for programs.")
@allow_incomplete_option
@click.pass_context
def ls(ctx: click.Context, path: str, patterns: tuple[str, ...], as_json: bool, allow_incomplete: bool) -> None:
    """List the variables of the checkpoint PATH: name, shape, type and size in bytes; no values are read.

    Attached files are listed after them, with the type "file", unless PATTERNs are given.

    PATH can also be the folder of a single variable. If PATTERNs are given, only variables whose name matches one of
    them are listed: * matches any text, separators too; ? matches one character; [ab] matches one of several. Tied
    variables share a file, which the total counts once.

    With --allow-incomplete, damaged variables are listed on stderr, and the exit status is 1 if there are any.

    \b
    Examples:
      varstore ls lenet
      varstore ls lenet 'conv*' '*-bias'
      varstore ls lenet/conv1-weight
      varstore ls --json lenet | jq '.variables[].name'
    """
    opened = open_path(path, allow_incomplete=allow_incomplete)
    if isinstance(opened, vs.Variable):
        if patterns:
            raise click.UsageError("PATH is the folder of a single variable, so PATTERN cannot be given.")
        variables, damaged, files = [opened], {}, []
    else:
        variables, damaged = list(opened.select(patterns or None).values()), dict(opened.damaged)
        files = [] if patterns else list(opened.files.values())
    if as_json:
        click.echo(json.dumps({"path": path, **_as_json(variables, damaged, files)}, indent=2))
    else:
        print_listing(variables, files)
        for name, problem in damaged.items():
            click.echo(f"damaged: {one_line(name)}: {one_line(with_flags(problem), PROBLEM_LIMIT)}", err=True)
    ctx.exit(1 if damaged else 0)


def print_listing(variables: list[vs.Variable], files: Sequence[vs.AttachedFile] = ()) -> None:
    """Print variables and files as a table on a terminal, and as plain columns elsewhere."""
    rows = [_row(variable) for variable in variables]
    rows += [(one_line(file.name), "", "file", str(file.nbytes), "") for file in files]
    counted = plural(len(variables), "variable") + (f", {plural(len(files), 'file')}" if files else "")
    total = (counted, "", "", str(_total(variables) + sum(file.nbytes for file in files)), "")
    if is_terminal() and len(rows) <= _TABLE_ROWS:
        _print_table(rows, total)
    else:
        _print_columns(rows, total)


def _row(variable: vs.Variable) -> tuple[str, ...]:
    entry = variable.entry
    shape, dtype = _shape(variable), _dtype(variable)
    tied = f"tied to {one_line(entry.alias_of)}" if entry.alias_of else ""
    return one_line(entry.name), "?" if shape is None else one_line(shape), dtype or "?", str(entry.nbytes), tied


def _shape(variable: vs.Variable) -> list[int] | None:
    return list(variable.shape) if variable.has_meta else None


def _dtype(variable: vs.Variable) -> str | None:
    if not variable.has_meta:
        return None
    row = variable.meta.data_type
    return _name_of(row if row.dtype is None else row.dtype)


_name_of: Callable[[Any], str] = functools.cache(attrgetter("name"))  # numpy makes it anew each time


def _total(variables: list[vs.Variable]) -> int:
    files = {variable.entry.alias_of or variable.name: variable.entry.nbytes for variable in variables}
    return sum(files.values())


def _as_json(variables: list[vs.Variable], damaged: dict[str, str], files: Sequence[vs.AttachedFile]) -> dict[str, Any]:
    return {
        "nbytes": _total(variables),
        "variables": [
            {
                "name": variable.name,
                "shape": _shape(variable),
                "dtype": _dtype(variable),
                "nbytes": variable.entry.nbytes,
                "path": variable.path,
                "tied_to": variable.entry.alias_of or None,
                "attributes": dict(variable.attributes),
                "digests": list(variable.digests),
            }
            for variable in variables
        ],
        "files": [
            {
                "name": file.name,
                "nbytes": file.nbytes,
                "kind": file.kind,
                "attributes": dict(file.attributes),
                "digests": list(file.digests),
            }
            for file in files
        ],
        "damaged": damaged,
    }


def _print_columns(rows: list[tuple[str, ...]], total: tuple[str, ...]) -> None:
    lines = [_HEADINGS, *rows, total]
    name, shape, dtype, nbytes, _ = (max(map(len, column)) for column in zip(*lines, strict=True))
    form = f"{{:<{name}}}  {{:<{shape}}}  {{:<{dtype}}}  {{:>{nbytes}}}  {{}}"
    click.echo("\n".join([form.format(*line).rstrip() for line in lines]))


def _print_table(rows: list[tuple[str, ...]], total: tuple[str, ...]) -> None:
    from rich import box, filesize
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, show_footer=True, footer_style="bold")
    styles = ("cyan", "", "green", "", "dim")
    for heading, style, footer in zip(_HEADINGS, styles, total, strict=True):
        is_size = heading == "bytes"
        text = Text(filesize.decimal(int(footer)) if is_size else footer)
        table.add_column(heading, text, style=style, justify="right" if is_size else "left", overflow="fold")
    for name, shape, dtype, nbytes, tied in rows:
        table.add_row(*map(Text, (name, shape, dtype, filesize.decimal(int(nbytes)), tied)))
    Console().print(table)
