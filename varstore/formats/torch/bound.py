"""Exported programs of PyTorch (``.pt2``) whose weights lie elsewhere: archives without the members that hold them.

The index of the archive still says what each weight is, so the members can be made again from other values. What the
program takes and gives is in its JSON; the graph itself is never read.

Source: https://github.com/pytorch/pytorch/blob/v2.13.0/torch/_export/serde/schema.py
"""

from __future__ import annotations

import io
import re
import zipfile
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import numpy as np

from varstore.errors import FormatError, UnsafeContent
from varstore.formats.binary.budget import Budget
from varstore.formats.binary.source import Source
from varstore.formats.binary.zip import Member, archive_members, new_archive
from varstore.formats.torch.export import (
    TYPES,
    index_of,
    is_big_endian,
    listed_weights,
    read_json,
    stored_weight,
)
from varstore.formats.torch.member import add_member
from varstore.formats.torch.rewrite import Change, changed, elements_of, opened_program
from varstore.formats.torch.tensors import Storages, storage_of
from varstore.values.lazy import LazyArray

__all__ = ["TorchProgram", "is_apart", "open_program", "without", "write_whole"]

_SYMBOL = re.compile(r"Symbol\('(\w+)'[^()]*\)|(\w+)", re.ASCII)


class TorchProgram(NamedTuple):
    """A program, its weights by name, and its inputs and outputs."""

    source: Source
    members: dict[str, Member]
    weights: Mapping[str, LazyArray]
    inputs: list[dict[str, Any]]
    outputs: list[dict[str, Any]]


def open_program(source: Source) -> TorchProgram:
    """Read what a program says of itself; values are not read.

    Raises:
        FormatError: it is not an exported program of PyTorch 2.9 or later, or has several models.
        SizeMismatch, UnsafeContent: see `varstore.read`.
    """
    weights, members = opened_program(source), archive_members(source)
    found = index_of(members)
    model = None if found is None else members.get(f"{found[1].name.partition('/')[0]}/models/{found[0]}.json")
    if model is None:
        raise FormatError(
            "the weights of this program do not lie apart from it",
            path=source.path,
            expected="one program, as PyTorch 2.9 or later writes it",
            hint="load it with a later version of PyTorch, and save it again",
        )
    said = read_json(source, model, Budget(source.path, source.size))
    try:
        graph, signature = said["graph_module"]["graph"], said["graph_module"]["signature"]
        inputs = _ports(graph, signature["input_specs"], "user_input")
        outputs = _ports(graph, signature["output_specs"], "user_output")
    except (LookupError, TypeError, AttributeError) as error:
        raise FormatError(
            "the program does not say what it takes and gives", path=source.path, found=str(error)[:100]
        ) from None
    return TorchProgram(source, members, weights, inputs, outputs)


def _ports(graph: dict[str, Any], specs: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    """Return the tensors and variable integers among the arguments of a kind."""
    ports = []
    for spec in specs:
        argument = spec.get(kind, {}).get("arg", {})
        if "as_tensor" in argument:
            name = argument["as_tensor"]["name"]
            meta = graph["tensor_values"][name]
            dtype = TYPES.get(meta["dtype"], f"type {meta['dtype']}")
            ports.append({"name": str(name), "type": dtype, "shape": [_extent(size) for size in meta["sizes"]]})
        elif "as_sym_int" in argument:
            ports.append({"name": str(argument["as_sym_int"].get("as_name")), "type": "int64", "shape": []})
    return ports


def _extent(size: dict[str, Any]) -> int | str | None:
    """Return a number, the name of one, or None for what is computed from others."""
    if type(size.get("as_int")) is int:
        return int(size["as_int"])
    symbol = _SYMBOL.fullmatch(str(size["as_expr"]["expr_str"]))
    return None if symbol is None else symbol[1] or symbol[2]


def is_apart(array: LazyArray) -> bool:
    """Tell whether the elements of a weight are bytes of a member, which can lie elsewhere or be replaced."""
    storage = storage_of(array)
    return storage is not None and storage.member is not None and storage.member.base == 0


def without(program: TorchProgram, names: Collection[str]) -> bytes:
    """Return a copy of a program that does not have the bytes of these weights.

    The bytes stay where a weight is only a part of what its member holds; `write_whole` replaces them.
    """
    bound = [(program.weights[name], storage_of(program.weights[name])) for name in names]
    gone = {
        storage.member.name
        for array, storage in bound
        if storage is not None and storage.member is not None and _fills(array, storage.size)
    }
    read = _reader(program.members, Budget(program.source.path, program.source.size))
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for member in program.members.values():
            if member.name not in gone:
                add_member(archive, file, member.name, read(member))
    return file.getvalue()


def _fills(array: LazyArray, size: int) -> bool:
    """Tell whether each byte of a storage is one of a weight, and of one element only."""
    assert array.place is not None
    expected = 1
    for step, extent in sorted(zip(array.place.strides, array.shape, strict=True)):
        if extent > 1 and step != expected:
            return False
        expected *= extent
    return array.place.offset == 0 and array.nbytes == size > 0


def _reader(members: Mapping[str, Member], budget: Budget) -> Callable[[Member], np.ndarray]:
    """Return what reads a member, compared with its checksum if the archive has any."""
    is_checked = any(member.crc for member in members.values())

    def read(member: Member) -> np.ndarray:
        if not member.is_plain:
            budget.unpack(member.size)
        return (member.read_checked if is_checked else member.read)(0, member.size)

    return read


def write_whole(target: str, source: Source, values: Mapping[str, LazyArray], *, name: str) -> None:
    """Write a program with the values of its weights as one file, which `torch.export.load` takes.

    Args:
        target: the file; an existing one is replaced.
        source: what `without` returned.
        values: all weights whose bytes it does not have, and others that get these values.
        name: what to call the program in errors.

    Raises:
        UnsafeContent: the program does not have a weight, or has it with another shape or type, or lacks others.
        VariableMismatch: two weights that are one in the program have different values.
        FormatError: it is damaged.
        CheckpointExists, StorageError: it cannot be written.
    """
    members, budget = archive_members(source), Budget(source.path, source.size)
    found = index_of(members)
    if found is None:
        raise FormatError("not an exported program of PyTorch", path=name)
    storages = Storages(budget)
    weights: dict[str, tuple[str, LazyArray]] = {}
    lacking: set[str] = set()
    for weight, place, about in listed_weights(source, found[1], budget):
        if weight in values:
            size = members[place].size if place in members else values[weight].nbytes
            weights[weight] = place, stored_weight(storages, place, size, about, weight)
        elif place not in members:
            lacking.add(place)
    made: dict[str, list[Change]] = {}
    sizes: dict[str, int] = {}
    for storage in storages.found:
        storage.swapped = is_big_endian(members, found[1])
        sizes[storage.key] = storage.size
    for weight, (place, array) in weights.items():
        memory, value = storage_of(array), values[weight]
        if memory is None or (array.shape, array.dtype) != (value.shape, value.dtype.newbyteorder("=")):
            raise UnsafeContent("the graph is not what its entry says", path=name, variable=weight)
        if value.size:  # the offset of an empty weight need not be in its member
            made.setdefault(place, []).append((weight, value, elements_of(array, memory)))
    if unknown := (values.keys() - weights.keys()) or (lacking - made.keys()):
        raise UnsafeContent("the graph is not what its entry says", path=name, found=min(unknown)[:100])
    read = _reader(members, budget)
    with new_archive(target) as (archive, file):
        for member in members.values():
            add_member(archive, file, member.name, changed(made.pop(member.name, []), name, read(member)))
        for place, changes in made.items():
            add_member(archive, file, place, changed(changes, name, np.zeros(sizes[place], np.uint8)))
