"""``varstore show``: one variable in detail, of any type and any size; or the state and attributes of a checkpoint."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

import click
import numpy as np

import varstore as vs
from varstore.cli.columns import cut, terminal_width
from varstore.cli.entries import GRAPH, entry_text, regions_json, regions_of
from varstore.cli.grid import corner, grid, histogram_text, index_of, split_index
from varstore.cli.help import variable_names
from varstore.cli.output import LABEL, label, print_facts, progress
from varstore.cli.sources import allow_incomplete_option, open_path
from varstore.cli.state import Words, as_plain, part_lines
from varstore.errors import VarstoreError
from varstore.text.escape import one_line
from varstore.text.hints import listed, plural
from varstore.text.sizes import size_text

__all__ = ["show"]

_DIGESTS = 4
_NAMES = 8
_NEIGHBOURS = 1000
"""Folders beside a checkpoint in which links to its files are looked for."""
_MOST_VALUES = 65_536
"""Values that are printed as JSON."""

Facts = Iterator[tuple[str, str]]


@click.command(short_help="Show one variable: where it lies, statistics, values; or a checkpoint's state.")
@click.argument("path", type=click.Path())
@click.argument("name", required=False, shell_complete=variable_names)
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object, for programs.")
@allow_incomplete_option
def show(path: str, name: str | None, as_json: bool, allow_incomplete: bool) -> None:
    """Show the variable NAME of PATH, or without NAME the state and attributes of PATH as a tree.

    PATH is a checkpoint, the folder of a single variable, a run, of which the latest step is shown, or any file or
    folder that `varstore convert` takes. NAME can end in a slice, as in 'fc/weight[0:3, :5]': then values and
    statistics are those of the slice, and only it is read. A variable whose name ends so is taken by its whole name.
    NAME can also be that of an attached file: its size, kind, digests and attributes are shown.

    Prints shape and type, where the variable lies, the digests of its blocks of 16 MiB, what it is tied to and which
    checkpoints beside this one link its file; its attributes, values, and statistics of all values: how many are zero,
    nan and infinite, and of those that are finite the min, max, mean, standard deviation, norm, quantiles, and a
    histogram. Complex numbers count by their magnitude. Values are read a few MiB at a time and are not compared with
    the digests; `varstore verify` does that.

    \b
    Examples:
      varstore show lenet
      varstore show lenet conv1-weight
      varstore show model.safetensors 'fc.weight[0:3, :5]'
      varstore show lenet/conv1-weight
      varstore show --json lenet conv1-weight | jq .statistics.norm
    """
    opened = open_path(path, allow_incomplete=allow_incomplete)
    if isinstance(opened, vs.Variable):
        base, index = ("", None) if name is None else split_index(name)
        if base:
            raise click.UsageError("PATH is the folder of a single variable, so NAME cannot be given.")
        shown = _Shown({opened.name: opened}, opened.name, index)
    elif name is None:
        _show_state(path, opened, as_json=as_json)
        return
    elif name not in opened and name in getattr(opened, "files", {}):
        _show_file(opened.files[name], as_json=as_json)
        return
    else:
        base, index = (name, None) if name in opened else split_index(name)
        shown = _Shown(opened, base, index)
    if as_json:
        click.echo(json.dumps(shown.as_json(), indent=2))
    else:
        print_facts(shown.facts())
        click.echo("\n".join(shown.values()))


class _Shown:
    """A variable, or a slice of it, with what is known of it in its checkpoint."""

    def __init__(self, opened: Any, name: str, index: str | None) -> None:
        self._opened = opened
        self._name = name
        self._array = opened[name]
        self._index = index
        self._part = None if index is None else self._read(index_of(index))
        self._is_stored = isinstance(self._array, vs.Variable)

    def _read(self, index: Any) -> np.ndarray:
        try:
            return np.asarray(self._array[index])
        except (IndexError, ValueError) as error:
            raise click.UsageError(f"{self._index}: {error}.") from None

    def _statistics(self) -> vs.StatsReport:
        source = {self._name: self._array if self._part is None else self._part}
        return vs.stats(source, histograms=True, progress=progress())

    def _path(self) -> str:
        return self._array.path if self._is_stored else os.fspath(getattr(self._opened, "path", ""))

    def _tied(self) -> list[str]:
        """Return the names of the other variables that share its memory."""
        known: list[tuple[str, Any]]
        if self._is_stored:
            known = [(name, variable.entry.alias_of or name) for name, variable in self._opened.items()]
        else:
            known = [(name, array.identity) for name, array in self._opened.items()]
        own = dict(known)[self._name]
        return [name for name, memory in known if memory == own and name != self._name]

    def as_json(self) -> dict[str, Any]:
        array, report = self._array, self._statistics()
        said = {
            "name": self._name,
            "shape": list(array.shape),
            "dtype": array.dtype.name,
            "nbytes": array.nbytes,
            "path": self._path(),
            "tied_to": self._tied(),
            "linked": _links(array)[0] if self._is_stored else [],
            "attributes": as_plain(array.attributes),
            "digests": list(getattr(array, "digests", ())),
            "regions": regions_json(array),
            "slice": self._index,
            "statistics": report[self._name].as_json() if len(report) else None,
        }
        if self._part is not None and self._part.size <= _MOST_VALUES:
            said["values"] = _json_values(self._part)
        return said

    def facts(self) -> Facts:
        array = self._array
        yield "name", self._name
        yield "shape", str(list(array.shape))
        in_meta = f" ({array.meta.data_type.name} in meta)" if self._is_stored else ""
        yield "type", f"{array.dtype.name}{in_meta}"
        yield "bytes", f"{array.nbytes:,}" + (f" ({size_text(array.nbytes)})" if array.nbytes >= 1000 else "")
        yield "folder" if self._is_stored else "file", self._path()
        tied = self._tied()
        if tied:
            yield "tied to", listed([one_line(name) for name in tied], _NAMES)
        if self._is_stored:
            yield from _linked(array, len(tied))
        yield from _recorded(array)
        if self._part is not None:
            yield "slice", f"{self._index} {list(self._part.shape)}"
        report = self._statistics()
        yield from (("statistics", f"none: {why}") for why in report.left_out.values())
        for found in report.values():
            yield from found.rows()
            if found.histogram is not None:
                start, width, counts = found.histogram.start, found.histogram.width, found.histogram.counts
                yield "histogram", f"{start:.4g} [{histogram_text(counts)}] {start + width * len(counts):.4g}"

    def values(self) -> Iterator[str]:
        """Yield the values in rows, or some of them, beside their label."""
        shape, width = self._array.shape, terminal_width()
        values = self._read(corner(shape)) if self._part is None else self._part
        is_whole = self._part is not None or values.size == self._array.size
        rows = grid(values, width=None if width is None else width - len(LABEL), is_whole=is_whole)
        if self._part is None and len(shape) > 2 and values.size:
            rows.insert(0, f"[{', '.join('0' * (len(shape) - 2))}, :, :]")
        yield f"{label('values')}{rows[0]}"
        yield from (f"{LABEL}{row}" for row in rows[1:])


def _json_values(values: np.ndarray) -> Any:
    is_known = values.dtype.kind in "biuf" and values.dtype.type.__module__ == "numpy"
    if values.dtype.kind == "c":
        return as_plain(np.stack([values.real, values.imag], -1).tolist())
    return as_plain((values if is_known else values.astype(np.float64)).tolist())


def _show_file(file: vs.AttachedFile, *, as_json: bool) -> None:
    if as_json:
        said = {"name": file.name, "kind": file.kind, "nbytes": file.nbytes, "path": file.path}
        more = {"attributes": as_plain(file.attributes), "digests": list(file.digests)}
        click.echo(json.dumps({**said, **more}, indent=2))
        return
    facts = [("name", file.name), ("kind", file.kind), ("bytes", f"{file.nbytes:,}"), ("file", file.path)]
    print_facts([*facts, *_recorded(file)])


def _recorded(what: Any) -> Facts:
    digests = getattr(what, "digests", None)
    if digests is not None:
        digests = [f"{region} {one}" for region in regions_of(what) for one in region.hex_digests] or digests
        shown = digests[:_DIGESTS]
        more = f" and {len(digests) - len(shown)} more" if len(shown) < len(digests) else ""
        yield "xxh3-128", ", ".join(shown) + more if digests else "none"
    if what.attributes:
        yield "attributes", json.dumps(as_plain(what.attributes), ensure_ascii=False)


def _linked(variable: vs.Variable, tied: int) -> Facts:
    names, links = _links(variable)
    more = links - tied
    others = [one_line(name) for name in names] + ([f"{plural(more, 'file')} elsewhere"] if more > 0 else [])
    if others:
        yield "linked to", listed(others, _NAMES)


def _links(variable: vs.Variable) -> tuple[list[str], int]:
    """Return the checkpoints beside this one that hold the same file, and how many links to it are elsewhere."""
    folder, root = variable.entry.folder, os.path.abspath(variable.root)
    with suppress(OSError):
        own = os.lstat(os.path.join(variable.path, "out"))
        found = []
        for name, _ in zip(sorted(os.listdir(os.path.dirname(root))), range(_NEIGHBOURS), strict=False):
            with suppress(OSError):
                if name != os.path.basename(root) and os.path.samestat(
                    own, os.lstat(os.path.join(os.path.dirname(root), name, folder, "out"))
                ):
                    found.append(name)
        return found, max(own.st_nlink - 1 - len(found), 0)
    return [], 0


def _show_state(path: str, opened: Any, *, as_json: bool) -> None:
    """Print the state, attributes and files of what was opened; what holds only arrays is counted."""
    files = list(getattr(opened, "files", {}).values())
    state, attributes = _state_of(path, opened), dict(opened.attributes)
    unknown = list(getattr(opened, "unknown", ()))
    if as_json:
        said = {"path": path, "state": as_plain(state), "attributes": as_plain(attributes)}
        said["files"] = {f.name: {"kind": f.kind, "nbytes": f.nbytes, **as_plain(f.attributes)} for f in files}
        click.echo(json.dumps({**said, "unknown": [list(row) for row in unknown]}, indent=2))
        return
    lines = [click.style(one_line(repr(opened)[1:-1]), bold=True)]
    parts = {"state": state, "attributes": attributes, "files": {file.name: _file_row(file) for file in files}}
    for title, part in parts.items():
        is_empty = isinstance(part, Mapping | list | tuple) and not part
        if part is not None and not is_empty:
            lines += part_lines(title, part)
    if unknown:
        classes = [one_line(f"{module}.{name} ({count})") for module, name, count in unknown]
        lines.append(f"unknown to varstore, and not imported: {listed(classes, _NAMES)}")
    width = terminal_width()
    click.echo("\n".join([lines[0], *(line if width is None else cut(line, width) for line in lines[1:])]))


def _state_of(path: str, opened: Any) -> Any:
    """Return nested state with lazy arrays at its leaves."""
    if not isinstance(opened, vs.Checkpoint):
        return opened.tree
    is_nested = opened.tree is not None and not opened.damaged
    again: Any = vs.read(path) if is_nested else opened
    return again.lazy_state() if is_nested else {name: _leaf(variable) for name, variable in opened.items()}


def _leaf(variable: vs.Variable) -> Any:
    """Return a variable, or what is known of one whose type is not known or not numpy's."""
    try:
        _ = variable.dtype
    except VarstoreError:
        return Words(variable.entry.form)
    return variable


def _file_row(file: vs.AttachedFile) -> Any:
    said = Words(f"{file.kind}, {size_text(file.nbytes)}")
    if file.kind == GRAPH:
        return Words(f"{said}: {entry_text(file)}")
    return {"file": said, **file.attributes} if file.attributes else said
