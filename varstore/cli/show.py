"""``varstore show``: one variable in detail, of any type and any size."""

from __future__ import annotations

import json
from collections.abc import Iterator

import click

import varstore as vs
from varstore.cli.output import print_facts
from varstore.cli.sources import allow_incomplete_option, open_path

__all__ = ["show"]

_HEAD = 8
_DIGESTS = 4


@click.command(short_help="Show one variable: shape, digests, statistics, first values.")
@click.argument("path", type=click.Path())
@click.argument("name", required=False)
@allow_incomplete_option
def show(path: str, name: str | None, allow_incomplete: bool) -> None:
    """Show the variable NAME of the checkpoint PATH. Without NAME, PATH is the folder of the variable.

    NAME can also be that of an attached file: its size, kind, digests and attributes are shown.

    Prints its shape, type and folder, the digests of its blocks of 16 MiB, its attributes, its first values, and
    statistics of all values: how many are zero, nan and infinite, and the min, max, mean, standard deviation and norm
    of those that are finite. Complex numbers count by their magnitude. Values are read a few MiB at a time and are not
    compared with the digests; `varstore verify` does that.

    \b
    Examples:
      varstore show lenet conv1-weight
      varstore show lenet/conv1-weight
    """
    opened = open_path(path, allow_incomplete=allow_incomplete)
    if isinstance(opened, vs.Checkpoint):
        if name is None:
            raise click.UsageError("PATH is a checkpoint, so give the NAME of a variable; `varstore ls` lists them.")
        if name not in opened and name in opened.files:
            print_facts(_described_file(opened.files[name]))
            return
        opened = opened[name]
    elif name is not None:
        raise click.UsageError("PATH is the folder of a single variable, so NAME cannot be given.")
    print_facts(_described(opened))
    print_facts(_measured(opened))


def _described(variable: vs.Variable) -> Iterator[tuple[str, str]]:
    yield "name", variable.name
    yield "shape", str(list(variable.shape))
    yield "type", f"{variable.dtype.name} ({variable.meta.data_type.name} in meta)"
    yield "bytes", f"{variable.entry.nbytes:,}"
    yield "folder", variable.path
    if variable.entry.alias_of:
        yield "tied to", variable.entry.alias_of
    yield from _recorded(variable)


def _described_file(file: vs.AttachedFile) -> Iterator[tuple[str, str]]:
    yield "name", file.name
    yield "kind", file.kind
    yield "bytes", f"{file.nbytes:,}"
    yield "file", file.path
    yield from _recorded(file)


def _recorded(what: vs.Variable | vs.AttachedFile) -> Iterator[tuple[str, str]]:
    if what.digests:
        shown = what.digests[:_DIGESTS]
        more = f" and {len(what.digests) - len(shown)} more" if len(shown) < len(what.digests) else ""
        yield "xxh3-128", ", ".join(shown) + more
    else:
        yield "xxh3-128", "none"
    if what.attributes:
        yield "attributes", json.dumps(dict(what.attributes), ensure_ascii=False)


def _measured(variable: vs.Variable) -> Iterator[tuple[str, str]]:
    first = variable.numpy(mmap=True).reshape(-1)[:_HEAD]
    yield "values", " ".join([*map(str, first), *(["…"] if variable.size > _HEAD else [])]) or "none"
    yield from vs.stats({variable.name: variable}, quantiles=False)[variable.name].rows()
