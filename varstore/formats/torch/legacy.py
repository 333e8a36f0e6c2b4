"""PyTorch's format before version 1.6: five pickles, then the size and values of each storage, ordered by key.

Source: `_legacy_load` in https://github.com/pytorch/pytorch/blob/v2.13.0/torch/serialization.py
"""

from __future__ import annotations

import struct
from typing import Any

from varstore.errors import FormatError
from varstore.formats.binary.budget import Budget
from varstore.formats.binary.magic import TORCH_LEGACY
from varstore.formats.binary.source import Source
from varstore.formats.opened import ForeignCheckpoint
from varstore.formats.pickles.machine import Machine, Unknown
from varstore.formats.pickles.names import internal, show
from varstore.formats.pickles.tree import plain_tree
from varstore.formats.torch.names import storage_identity, torch_leaf, torch_table
from varstore.formats.torch.tensors import Storage, Storages
from varstore.values.parts import Read

__all__ = ["read_legacy"]

_PROTOCOL = 1001


def read_legacy(
    source: Source, budget: Budget, *, encoding: str = "utf-8", unknown: Unknown = "error"
) -> ForeignCheckpoint:
    """Open a file in the older format; see `read` for `encoding` and `unknown`.

    Raises:
        UnsafeContent: a pickle asks to run code, or the file is out of proportion to its size.
        FormatError: the file is truncated or damaged, or not a PyTorch file.
    """
    data = source.map()
    storages = Storages(budget)
    parents: dict[int, tuple[Storage, int]] = {}

    def persistent(identity: Any) -> Storage:
        if type(identity) is tuple and len(identity) == 5:  # before 0.4, there was no view
            identity = (*identity, None)
        _kind, kind, key, _location, count, view = storage_identity(identity, 6, source.path)
        storage = storages.find(kind, key, count)
        if view is None:
            return storage
        view_key, offset, view_count = map(internal, view)
        if type(view_key) is not str:
            raise FormatError("a view of a storage does not have a name", path=source.path, found=show(view_key))
        part = storages.find(kind, f"{key}/{view_key}", view_count)
        if type(offset) is not int or not 0 <= offset <= count - view_count:
            raise FormatError(
                "a view of a storage lies outside the storage", path=source.path, found=show(view, most=3)
            )
        parents[id(part)] = (storage, offset * part.size // max(view_count, 1))
        return part

    position = 0

    def one(**options: Any) -> tuple[Machine, Any]:
        nonlocal position
        machine = Machine(data, path=source.path, budget=budget, start=position, **options)
        value = machine.run()
        position = machine.stop
        return machine, value

    plain = torch_table(storages)
    magic, protocol = one(table={})[1], one(table={})[1]
    if magic != TORCH_LEGACY or protocol != _PROTOCOL:
        raise FormatError("not a file of torch.save", path=source.path, found=show((magic, protocol)))
    system = one(table={})[1]
    machine, value = one(table=plain, persistent=persistent, modules=True, encoding=encoding, unknown=unknown)
    keys = one(table={})[1]
    swapped = isinstance(system, dict) and system.get("little_endian") is False
    whole = {storage.key: storage for storage in storages.found if id(storage) not in parents}
    _place(whole, keys, source, position, swapped)
    for part in storages.found:
        if id(part) in parents:
            _attach(part, *parents[id(part)])
    tree = plain_tree(value, machine, torch_leaf(machine, source.read))
    return ForeignCheckpoint(source.path, "torch", tree, budget=budget, unknown=machine.unknown())


def _place(whole: dict[str, Storage], keys: Any, source: Source, position: int, swapped: bool) -> None:
    """Locate the storages after the pickles; each is a number of elements and the values, in the order of `keys`."""
    if type(keys) is not list or any(type(key) is not str for key in keys) or sorted(keys) != sorted(whole):
        raise FormatError(
            "the list of storages in the file does not match the tensors",
            path=source.path,
            found=show(keys),
            expected=len(whole),
        )
    for key in keys:
        storage = whole[key]
        (count,) = struct.unpack("<q", source.bytes(position, 8))
        itemsize = 1 if storage.dtype is None else storage.dtype.itemsize
        position += 8
        if count * itemsize != storage.size or position + storage.size > source.size:
            raise FormatError(
                "a storage does not have the size that its tensors state",
                path=source.path,
                field=f"storage {key[:40]!r}",
                found=f"{count} elements, {source.size - position} bytes left",
                expected=f"{storage.size} bytes",
            )
        storage.swapped = swapped
        storage.read = _shifted(source.read, position)
        position += storage.size


def _attach(part: Storage, parent: Storage, offset: int) -> None:
    part.swapped = parent.swapped
    part.read = _shifted(parent.read, offset)


def _shifted(read: Read, start: int) -> Read:
    return lambda offset, size: read(start + offset, size)
