"""PyTorch's zip format: ``data.pkl`` and a member for each storage, in one folder of any name.

TorchScript's archives have that too, and ``constants.pkl``; the code beside it is never read.

Members may be compressed, because `torch.load` accepts such files. Where all of a storage is read, it is compared with
its checksum, unless the file has none: with ``set_crc32_options(False)``, torch writes zeros.

Source: `_load` in https://github.com/pytorch/pytorch/blob/v2.13.0/torch/serialization.py
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from varstore.errors import FormatError, UnsafeContent
from varstore.formats.binary.budget import Budget
from varstore.formats.binary.source import Source
from varstore.formats.binary.zip import LOCAL, Member, archive_members
from varstore.formats.opened import ForeignCheckpoint
from varstore.formats.pickles.machine import Machine, Unknown
from varstore.formats.pickles.tree import Leaf, plain_tree
from varstore.formats.torch.legacy import nested_load, reading
from varstore.formats.torch.names import storage_identity, torch_leaf, torch_table
from varstore.formats.torch.script import constants, script_state
from varstore.formats.torch.tensors import Storage, Storages
from varstore.values.nodes import Names
from varstore.values.parts import Read

__all__ = ["least_size", "locate", "read_members", "read_zip"]

_FREE, _MOST_EXPANSION = 1 << 20, 64
"""A pickle is a decompression bomb if it exceeds `_FREE` bytes plus `_MOST_EXPANSION` times its compressed size."""


def read_zip(
    source: Source,
    budget: Budget,
    base: int = 0,
    size: int | None = None,
    *,
    encoding: str,
    unknown: Unknown,
) -> ForeignCheckpoint:
    """Open a zip file that starts at byte `base` of `source` and is `size` bytes long; see `read` for the options.

    Raises:
        UnsafeContent: the pickle asks to run code, or is a decompression bomb, or the file is out of proportion.
        FormatError: it is truncated or damaged, or not a PyTorch file.
    """
    members = archive_members(source, base, size, least=lambda: least_size(source, base, budget))
    return read_members(source, members, budget, encoding=encoding, unknown=unknown)


def read_members(
    source: Source, members: Mapping[str, Member], budget: Budget, *, encoding: str, unknown: Unknown
) -> ForeignCheckpoint:
    """Open an archive of which these are the members, as `read_zip` does."""
    roots = [name[: -len("data.pkl")] for name in members if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(roots) != 1:
        raise FormatError(
            "not a PyTorch file", path=source.path, found=f"a zip archive with {len(roots)} data.pkl", expected="one"
        )
    read = partial(_unpickled, source.path, members, roots[0], budget, encoding, unknown)
    machine, value, leaf = read("data")
    if f"{roots[0]}constants.pkl" in members:
        tree = plain_tree(script_state(value, machine), machine, leaf)
        names = Names()
        tree = OrderedDict((names.own(name), tensor) for name, tensor in tree.items())
        of_code, value, leaf = read("constants")
        more = plain_tree(constants(value), of_code, leaf)
        tree |= {names.own(name): tensor for name, tensor in more.items()}
        unknown_names = machine.unknown() + of_code.unknown()
    else:
        tree, unknown_names = plain_tree(value, machine, leaf), machine.unknown()
    return ForeignCheckpoint(source.path, "torch", tree, budget=budget, unknown=unknown_names)


def _unpickled(
    path: str, members: Mapping[str, Member], root: str, budget: Budget, encoding: str, unknown: Unknown, stem: str
) -> tuple[Machine, Any, Leaf]:
    """Return the object of the pickle ``STEM.pkl``, whose storages are the members in the folder ``STEM``."""
    pickled = members[f"{root}{stem}.pkl"]
    if pickled.size > _FREE + _MOST_EXPANSION * pickled.packed:
        raise UnsafeContent("the pickle in this file is a decompression bomb", path=path, found=f"{pickled.size} bytes")
    budget.charge(2 * pickled.size)
    data = pickled.read(0, pickled.size).tobytes()
    read = reading(data)
    storages = Storages(budget)

    def persistent(identity: Any) -> Storage:
        _kind, kind, key, _location, count = storage_identity(identity, 5, path)
        return storages.find(kind, key, count)

    machine = Machine(
        data,
        path=path,
        table=torch_table(storages, nested_load(read, encoding=encoding, unknown=unknown)),
        budget=budget,
        persistent=persistent,
        modules=True,
        encoding=encoding,
        unknown=unknown,
    )
    value = machine.run()
    order = f"{root}byteorder"
    swapped = order in members and members[order].read(0, min(3, members[order].size)).tobytes() == b"big"
    is_checked = any(member.crc for member in members.values())
    for storage in storages.found:
        locate(storage, members.get(f"{root}{stem}/{storage.key}"), swapped, budget, is_checked=is_checked)
    return machine, value, torch_leaf(machine, read)


def least_size(source: Source, base: int, budget: Budget) -> int:
    """Return the bytes of all storages that the pickle names, which is the first member of what torch writes."""
    data = source.map()
    header = data[base : base + LOCAL.size]
    *_, name, extra = LOCAL.unpack(header) if len(header) == LOCAL.size else (0, 0)
    storages = Storages(budget)

    def persistent(identity: Any) -> Storage:
        _kind, kind, key, _location, count = storage_identity(identity, 5, source.path)
        return storages.find(kind, key, count)

    start = base + LOCAL.size + name + extra
    Machine(
        data,
        path=source.path,
        table=torch_table(storages),
        budget=budget,
        persistent=persistent,
        unknown="opaque",
        start=start,
    ).run()
    return sum(storage.size for storage in storages.found)


def locate(storage: Storage, member: Member | None, swapped: bool, budget: Budget, *, is_checked: bool) -> None:
    """Say where the values of a storage lie.

    Raises:
        FormatError: its member of the archive is missing, or has another size.
    """
    if member is None or member.size != storage.size:
        raise FormatError(
            "a storage does not have the size that its tensors state",
            path=storage.path,
            field=f"storage {storage.key[:40]!r}",
            found="none" if member is None else f"{member.size} bytes",
            expected=f"{storage.size} bytes",
        )
    storage.member = member
    storage.swapped = swapped
    storage.read = member.read_checked if is_checked else member.read
    storage.is_plain = member.is_plain
    if not member.is_plain:
        budget.unpack(member.size)
        storage.read = _Unpacked(storage, storage.read)


class _Unpacked:
    """Read a compressed storage, which is kept in memory once it is unpacked if several tensors are views of it."""

    def __init__(self, storage: Storage, read: Read) -> None:
        self._storage = storage
        self._read = read
        self._kept: np.ndarray | None = None

    def __call__(self, offset: int, size: int) -> np.ndarray:
        if self._storage.views < 2:
            return self._read(offset, size)
        if self._kept is None:
            self._kept = self._read(0, self._storage.size)
        return self._kept[offset : offset + size].copy()
