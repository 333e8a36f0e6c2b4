"""``varstore ls``: names, shapes, types and sizes; no values are read.

A terminal gets a tree in which numbered blocks are folded; a pipe or a file gets plain columns with exact sizes, as
programs want them.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from operator import attrgetter
from typing import Any, NamedTuple

import click

import varstore as vs
from varstore.cli.columns import Column, Signs, columns_text, signs, terminal_width
from varstore.cli.entries import regions_json
from varstore.cli.help import variable_names
from varstore.cli.output import is_terminal, with_flags
from varstore.cli.sources import allow_incomplete_option, open_path, steps_in
from varstore.cli.state import as_plain
from varstore.text.blocks import Node, folded
from varstore.text.escape import PROBLEM_LIMIT, one_line
from varstore.text.hints import plural
from varstore.text.sizes import size_text

__all__ = ["ls", "print_listing"]

_COLUMNS = (
    Column(heading="name", style={"fg": "cyan"}),
    Column(heading="shape", rank=3),
    Column(heading="type", style={"fg": "green"}, rank=4),
    Column(heading="params", is_right=True, rank=2),
    Column(heading="share", is_right=True, rank=1),
    Column(heading="size", is_right=True, rank=5),
    Column(heading="", style={"dim": True}, rank=1, least=16),
)


class _Item(NamedTuple):
    """What is known of a variable or of an attached file without reading values."""

    name: str
    shape: tuple[int, ...] | None
    dtype: str | None
    values: int
    """How many values there are."""
    nbytes: int
    tied_to: str
    what: Any

    @property
    def note(self) -> str:
        return f"tied to {one_line(self.tied_to)}" if self.tied_to else ""


class _Layout(NamedTuple):
    """How a listing is to look."""

    is_tree: bool
    sort: str | None = None
    depth: int | None = None
    in_bytes: bool = False


@click.command(short_help="List the variables and files of a checkpoint, or the steps of a run.")
@click.argument("path", type=click.Path())
@click.argument("patterns", metavar="[PATTERN]...", nargs=-1, shell_complete=variable_names)
@click.option(
    "--tree/--flat",
    "is_tree",
    default=None,
    help="A tree with folded blocks, which a terminal gets, or a row per variable.",
)
@click.option("--depth", type=click.IntRange(min=1), metavar="N", help="Only the first N levels of the tree.")
@click.option("--sort", type=click.Choice(["size", "name", "params"]), help="The largest first, or by name.")
@click.option("-b", "--bytes", "in_bytes", is_flag=True, help="Print sizes in bytes.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object, for programs.")
@allow_incomplete_option
@click.pass_context
def ls(
    ctx: click.Context,
    path: str,
    patterns: tuple[str, ...],
    is_tree: bool | None,
    depth: int | None,
    sort: str | None,
    in_bytes: bool,
    as_json: bool,
    allow_incomplete: bool,
) -> None:
    """List the variables of PATH: name, shape, type, number of values and size; no values are read.

    PATH is a checkpoint, the folder of a single variable, or any file or folder that `varstore convert` takes. On a
    terminal, names are a tree, in which h.{0..23}. stands for 24 blocks of one structure; below it, variables of
    every type are counted. Elsewhere there is a plain row per variable, with its size in bytes. Attached files are
    listed after the variables, with the type "file", unless PATTERNs are given. Tied variables share a file, which
    totals count once.

    If PATTERNs are given, only variables whose name matches one of them are listed: * matches any text, separators
    too; ? matches one character; [ab] matches one of several.

    If PATH is the directory of a run, its steps are listed: time, metrics, size, and the bytes that are new, while the
    others are links to the files of earlier steps; and which step is the latest, the best, or incomplete.

    With --allow-incomplete, damaged variables are listed on stderr, and the exit status is 1 if there are any.

    \b
    Examples:
      varstore ls lenet
      varstore ls model.safetensors --depth 2 --sort size
      varstore ls lenet 'conv*' '*-bias'
      varstore ls lenet/conv1-weight
      varstore ls runs/a
      varstore ls --json lenet | jq '.variables[].name'
    """
    run = None if allow_incomplete else steps_in(path)
    if run is not None:
        if patterns:
            raise click.UsageError("PATH is the directory of a run, so PATTERN cannot be given.")
        click.echo(json.dumps(run.as_json(), indent=2) if as_json else _run_text(run, in_bytes=in_bytes))
        return
    opened = open_path(path, allow_incomplete=allow_incomplete)
    if isinstance(opened, vs.Variable):
        if patterns:
            raise click.UsageError("PATH is the folder of a single variable, so PATTERN cannot be given.")
        items, files, damaged = _items({opened.name: opened}), [], {}
    else:
        items = _items(opened.select(include=patterns) if patterns else opened)
        files = [] if patterns else list(getattr(opened, "files", {}).values())
        damaged = dict(getattr(opened, "damaged", {}))
    layout = _Layout(is_terminal() or depth is not None if is_tree is None else is_tree, sort, depth, in_bytes)
    if as_json:
        said = {"path": path, **_as_json(_sorted(items, sort), files), "damaged": damaged}
        click.echo(json.dumps(said, indent=2))
    else:
        _print(items, files, layout)
        for name, problem in damaged.items():
            click.echo(f"damaged: {one_line(name)}: {one_line(with_flags(problem), PROBLEM_LIMIT)}", err=True)
    ctx.exit(1 if damaged else 0)


def print_listing(variables: Mapping[str, Any]) -> None:
    """Print variables as a tree on a terminal, and as plain columns elsewhere."""
    _print(_items(variables), (), _Layout(is_terminal()))


def _items(variables: Mapping[str, Any]) -> list[_Item]:
    items = []
    first: dict[Hashable, str] = {}
    for name, array in variables.items():
        if isinstance(array, vs.Variable):
            shape, dtype = _stored_form(array)
            count = 0 if shape is None else math.prod(shape)
            items.append(_Item(name, shape, dtype, count, array.entry.nbytes, array.entry.alias_of, array))
        else:
            owner = first.setdefault(array.identity, name)
            tied_to = "" if owner == name else owner
            shape, count = tuple(array.shape), math.prod(array.shape)
            items.append(_Item(name, shape, _name_of(array.dtype), count, array.nbytes, tied_to, array))
    return items


def _stored_form(variable: vs.Variable) -> tuple[tuple[int, ...] | None, str | None]:
    if not variable.has_meta:
        return None, None
    row = variable.meta.data_type
    return variable.shape, _name_of(row if row.dtype is None else row.dtype)


_name_of: Callable[[Any], str] = functools.cache(attrgetter("name"))  # numpy makes it again each time


def _sorted(items: list[_Item], sort: str | None) -> list[_Item]:
    return items if sort is None else sorted(items, key=_ORDERS[sort])


_ORDERS: Mapping[str, Callable[[_Item], Any]] = {
    "size": lambda item: -item.nbytes,
    "params": lambda item: -item.values,
    "name": lambda item: item.name,
}


def _owned(items: Iterable[_Item]) -> list[_Item]:
    """Return one item per memory: of those that are tied to each other, the first."""
    first: dict[str, _Item] = {}
    for item in items:
        first.setdefault(item.tied_to or item.name, item)
    return list(first.values())


def _total(items: list[_Item], files: Sequence[vs.AttachedFile]) -> int:
    return sum(item.nbytes for item in _owned(items)) + sum(file.nbytes for file in files)


def _print(items: list[_Item], files: Sequence[vs.AttachedFile], layout: _Layout) -> None:
    if layout.is_tree or is_terminal():
        rows = _tree_rows(items, layout) if layout.is_tree else _flat_rows(_sorted(items, layout.sort), layout)
        rows += [[one_line(f.name), "", "file", "", "", size_text(f.nbytes, exact=layout.in_bytes), ""] for f in files]
        click.echo(columns_text(_COLUMNS, rows, width=terminal_width()))
        click.echo("\n".join(_summary(items, files, layout)))
    else:
        click.echo(_plain_columns(_sorted(items, layout.sort), files))


def _plain_columns(items: list[_Item], files: Sequence[vs.AttachedFile]) -> str:
    lines = [("name", "shape", "type", "bytes", "")]
    lines += [(one_line(i.name), _shape_text(i), i.dtype or "?", str(i.nbytes), i.note) for i in items]
    lines += [(one_line(file.name), "", "file", str(file.nbytes), "") for file in files]
    total = _total(items, files)
    counted = plural(len(items), "variable") + (f", {plural(len(files), 'file')}" if files else "")
    lines.append((counted, "", "", str(total), ""))
    name, shape, dtype, nbytes, _ = (max(map(len, column)) for column in zip(*lines, strict=True))
    form = f"{{:<{name}}}  {{:<{shape}}}  {{:<{dtype}}}  {{:>{nbytes}}}  {{}}"
    return "\n".join([form.format(*line).rstrip() for line in lines])


def _shape_text(item: _Item) -> str:
    return "?" if item.shape is None else one_line(list(item.shape))


def _flat_rows(items: list[_Item], layout: _Layout) -> list[list[str]]:
    total = sum(item.values for item in _owned(items))
    return [
        [one_line(item.name), _shape_text(item), item.dtype or "?", *_numbers([item], total, layout), item.note]
        for item in items
    ]


def _numbers(items: list[_Item], total: int, layout: _Layout) -> list[str]:
    """Return the cells of parameters, their share, and size; what is tied counts where it is not."""
    shown = [item for item in items if not item.tied_to] or items
    count, nbytes = sum(item.values for item in shown), sum(item.nbytes for item in shown)
    share = "" if all(item.tied_to for item in items) or not total else f"{count / total:.1%}"
    return [f"{count:,}", share, size_text(nbytes, exact=layout.in_bytes)]


def _tree_rows(items: list[_Item], layout: _Layout) -> list[list[str]]:
    known = {item.name: item for item in items}
    nodes = folded(known, lambda name: (known[name].shape, known[name].dtype, bool(known[name].tied_to)))
    total = sum(item.values for item in _owned(items))
    return list(_Tree(known, total, layout, signs()).rows(nodes, "", 1))


class _Tree:
    """Makes the rows of a tree."""

    def __init__(self, items: Mapping[str, _Item], total: int, layout: _Layout, drawn: Signs) -> None:
        self._items = items
        self._total = total
        self._layout = layout
        self._drawn = drawn

    def rows(self, nodes: Iterable[Node], indent: str, depth: int) -> Iterator[list[str]]:
        """Yield the rows of nodes and of what is below them."""
        known = [(node, [self._items[name] for name in node.names]) for node in nodes]
        if self._layout.sort is not None:
            known.sort(key=self._order)
        for at, (node, items) in enumerate(known):
            is_last = at == len(known) - 1
            branch = "" if depth == 1 else self._drawn.last if is_last else self._drawn.branch
            numbers = _numbers(items, self._total, self._layout)
            yield [f"{indent}{branch}{one_line(node.label)}", *self._described(node, items), *numbers, _note(items)]
            if depth != self._layout.depth:
                line = "" if depth == 1 else self._drawn.space if is_last else self._drawn.line
                yield from self.rows(node.children, indent + line, depth + 1)

    def _order(self, known: tuple[Node, list[_Item]]) -> Any:
        node, items = known
        owned = [item for item in items if not item.tied_to]
        sizes = {"size": -sum(item.nbytes for item in owned), "params": -sum(item.values for item in owned)}
        return sizes.get(self._layout.sort or "", node.label)

    def _described(self, node: Node, items: list[_Item]) -> tuple[str, str]:
        """Return what stands in the columns of shape and type."""
        if node.own:
            times = f"{len(items):,} {self._drawn.times} " if len(items) > 1 else ""
            return f"{times}{_shape_text(items[0])}", items[0].dtype or "?"
        if node.blocks > 1:
            return f"{node.blocks:,} {self._drawn.times} {plural(len(items) // node.blocks, 'variable')}", ""
        return plural(len(items), "variable"), ""


def _note(items: list[_Item]) -> str:
    notes = {item.note for item in items}
    return notes.pop() if len(notes) == 1 else "tied" if "" not in notes else ""


def _summary(items: list[_Item], files: Sequence[vs.AttachedFile], layout: _Layout) -> Iterator[str]:
    """Yield the totals, and if there are several types, those of each."""
    owned = _owned(items)
    variables = [f"{plural(len(items), 'variable')}", *([plural(len(files), "file")] if files else [])]
    total = _total(items, files)
    types = _by_type(items)
    only = [next(iter(types))] if len(types) == 1 else []
    said = [*variables, plural(sum(item.values for item in owned), "parameter"), *only]
    yield click.style(f"{', '.join(said)}, {_size(total, layout)}", bold=True)
    if len(types) > 1:
        width = max(map(len, types))
        for dtype, (count, params, nbytes) in sorted(types.items(), key=lambda row: -row[1][2]):
            numbers = f"{plural(count, 'variable')}, {plural(params, 'parameter')}, {_size(nbytes, layout)}"
            yield f"  {dtype:<{width}}  {numbers}"


def _size(nbytes: int, layout: _Layout) -> str:
    return plural(nbytes, "byte") if layout.in_bytes else size_text(nbytes)


def _by_type(items: list[_Item]) -> dict[str, tuple[int, int, int]]:
    """Return the number of variables, of their values and of their bytes, for each type."""
    types: dict[str, tuple[int, int, int]] = {}
    owned = {item.name for item in _owned(items)}
    for item in items:
        count, params, nbytes = types.get(item.dtype or "?", (0, 0, 0))
        more = (item.values, item.nbytes) if item.name in owned else (0, 0)
        types[item.dtype or "?"] = count + 1, params + more[0], nbytes + more[1]
    return types


def _as_json(items: list[_Item], files: Sequence[vs.AttachedFile]) -> dict[str, Any]:
    owned = _owned(items)
    return {
        "nbytes": sum(item.nbytes for item in owned),
        "parameters": sum(item.values for item in owned),
        "types": {
            dtype: {"variables": count, "parameters": params, "nbytes": nbytes}
            for dtype, (count, params, nbytes) in _by_type(items).items()
        },
        "variables": [
            {
                "name": item.name,
                "shape": None if item.shape is None else list(item.shape),
                "dtype": item.dtype,
                "nbytes": item.nbytes,
                "path": getattr(item.what, "path", None),
                "tied_to": item.tied_to or None,
                "attributes": as_plain(item.what.attributes),
                "digests": list(getattr(item.what, "digests", ())),
                "regions": regions_json(item.what),
            }
            for item in items
        ],
        "files": [
            {
                "name": file.name,
                "nbytes": file.nbytes,
                "kind": file.kind,
                "attributes": as_plain(file.attributes),
                "digests": list(file.digests),
            }
            for file in files
        ],
    }


def _run_text(run: vs.RunSteps, *, in_bytes: bool) -> str:
    columns = [
        Column(heading="step", is_right=True),
        Column(heading="time", rank=2),
        *(Column(heading=one_line(name, 40), is_right=True, rank=-at) for at, name in enumerate(run.metrics)),
        Column(heading="size", is_right=True, rank=3),
        Column(heading="new", is_right=True, rank=3),
        Column(heading="", rank=4, style={"fg": "green"}, least=24),
    ]
    rows = [[one_line(cell) for cell in row] for row in run.rows(exact=in_bytes)]
    table = columns_text(columns, rows, width=terminal_width())
    return f"{table}\n{click.style(run.summary(exact=in_bytes), bold=True)}"
