"""PyTorch's format before version 1.6: five pickles, then the size and values of each storage, ordered by key.

Source: `_legacy_load` in https://github.com/pytorch/pytorch/blob/v2.13.0/torch/serialization.py
"""

from __future__ import annotations

import struct
from typing import Any

import numpy as np

from varstore.errors import FormatError, UnsafeContent
from varstore.formats.binary.budget import Budget
from varstore.formats.binary.magic import TORCH_LEGACY
from varstore.formats.binary.source import Mapped, Source
from varstore.formats.opened import ForeignCheckpoint
from varstore.formats.pickles.machine import Machine, Unknown
from varstore.formats.pickles.names import Global, OldString, Span, internal, show
from varstore.formats.pickles.tree import plain_tree
from varstore.formats.torch.names import Load, storage_identity, torch_leaf, torch_table
from varstore.formats.torch.tensors import Storage, Storages
from varstore.values.parts import Read

__all__ = ["nested_load", "read_legacy", "read_pickle", "reading"]

_PROTOCOL = 1001
_HEAD = 1 << 16
"""The bytes in which the pickles of a file end that holds one storage."""
_COST = 16
"""What each of these bytes is charged, because a pickle can ask for the same ones again and again."""


def read_legacy(source: Source, budget: Budget, *, encoding: str, unknown: Unknown) -> ForeignCheckpoint:
    """Open a file in the older format; see `read` for `encoding` and `unknown`.

    Raises:
        UnsafeContent: a pickle asks to run code, or the file is out of proportion to its size.
        FormatError: the file is truncated or damaged, or not a PyTorch file.
    """
    load = nested_load(source.read, encoding=encoding, unknown=unknown)
    machine, value = _sequence(
        source.map(), source.read, source.size, source.path, budget, load, encoding=encoding, unknown=unknown
    )
    return _opened(source, value, machine, budget)


def read_pickle(source: Source, budget: Budget, *, encoding: str, unknown: Unknown) -> ForeignCheckpoint:
    """Open a pickle that `pickle.dump` made of tensors: each storage in it is the bytes of a file in the older format.

    Raises:
        UnsafeContent, FormatError: see `read_legacy`.
    """
    load = nested_load(source.read, encoding=encoding, unknown=unknown)
    table = torch_table(Storages(budget), load)
    machine = Machine(
        source.map(), path=source.path, table=table, budget=budget, modules=True, encoding=encoding, unknown=unknown
    )
    return _opened(source, machine.run(), machine, budget)


def _opened(source: Source, value: Any, machine: Machine, budget: Budget) -> ForeignCheckpoint:
    tree = plain_tree(value, machine, torch_leaf(machine, source.read))
    return ForeignCheckpoint(source.path, "torch", tree, budget=budget, unknown=machine.unknown())


def nested_load(read: Read, *, encoding: str, unknown: Unknown) -> Load:
    """Return what stands for ``torch.storage._load_from_bytes`` in a pickle of which `read` reads ranges.

    The bytes are a file in the older format that holds one storage. They are read by the same machine, with the same
    table but for this function, and paid for from the same budget. The values stay where they are.
    """

    def load(machine: Machine, data: Any) -> Storage:
        if type(data) is Span and not data.recoded and (data.text is None or data.old):
            start, size = data.offset, data.size
            head, inner = bytes(machine.data[start : start + min(size, _HEAD)]), _shifted(read, start)
        else:
            head = data.raw if type(data) is OldString else machine.plain(data)
            if type(head) is not bytes:
                machine.refuse(f"would call torch.storage._load_from_bytes({show(data)})")
            size, inner = len(head), reading(head)
        machine.charge(_COST * len(head))
        try:
            within, value = _sequence(
                head, inner, size, machine.path, machine.budget, None, encoding=encoding, unknown=unknown
            )
        except UnsafeContent:
            raise
        except FormatError as error:
            machine.refuse(f"would call torch.storage._load_from_bytes of something else ({error.problem})")
        within.refuse_unclaimed()
        if type(value) is not Storage:
            machine.refuse(f"would call torch.storage._load_from_bytes of {show(value)}")
        return value

    return load


def _sequence(
    data: Mapped,
    read: Read,
    size: int,
    path: str,
    budget: Budget,
    load: Load | None,
    *,
    encoding: str,
    unknown: Unknown,
) -> tuple[Machine, Any]:
    """Return the object of the pickles at the beginning of `data`, with its storages placed within `size` bytes."""
    storages = Storages(budget)
    parents: dict[int, tuple[Storage, int]] = {}

    def persistent(identity: Any) -> Storage | Global:
        if _is_source_record(identity):
            return identity[1]  # type: ignore[no-any-return]
        if type(identity) is tuple and len(identity) == 5:  # before 0.4, there was no view
            identity = (*identity, None)
        _kind, kind, key, _location, count, view = storage_identity(identity, 6, path)
        storage = storages.find(kind, key, count)
        if view is None:
            return storage
        view_key, offset, view_count = map(internal, view)
        if type(view_key) is not str:
            raise FormatError("a view of a storage does not have a name", path=path, found=show(view_key))
        part = storages.find(kind, f"{key}/{view_key}", view_count)
        if type(offset) is not int or not 0 <= offset <= count - view_count:
            raise FormatError("a view of a storage lies outside the storage", path=path, found=show(view, most=3))
        parents[id(part)] = (storage, offset * part.size // max(view_count, 1))
        return part

    position = 0

    def one(**options: Any) -> tuple[Machine, Any]:
        nonlocal position
        machine = Machine(data, path=path, budget=budget, start=position, **options)
        value = machine.run()
        position = machine.stop
        return machine, value

    plain = torch_table(storages, load)
    magic, protocol = one(table={})[1], one(table={})[1]
    if magic != TORCH_LEGACY or protocol != _PROTOCOL:
        raise FormatError("not a file of torch.save", path=path, found=show((magic, protocol)))
    system = one(table={})[1]
    machine, value = one(table=plain, persistent=persistent, modules=True, encoding=encoding, unknown=unknown)
    keys = one(table={})[1]
    swapped = isinstance(system, dict) and system.get("little_endian") is False
    whole = {storage.key: storage for storage in storages.found if id(storage) not in parents}
    _place(whole, keys, read, size, path, position, swapped)
    for part in storages.found:
        if id(part) in parents:
            _attach(part, *parents[id(part)])
    return machine, value


def _is_source_record(identity: Any) -> bool:
    """Tell whether a persistent id is the class of a module, with the path and the text of its source, which stay."""
    return (
        type(identity) is tuple
        and len(identity) == 4
        and internal(identity[0]) == "module"
        and type(identity[1]) is Global
    )


def _place(
    whole: dict[str, Storage], keys: Any, read: Read, size: int, path: str, position: int, swapped: bool
) -> None:
    """Locate the storages after the pickles; each is a number of elements and the values, in the order of `keys`."""
    if type(keys) is not list or any(type(key) is not str for key in keys) or sorted(keys) != sorted(whole):
        raise FormatError(
            "the list of storages in the file does not match the tensors",
            path=path,
            found=show(keys),
            expected=len(whole),
        )
    for key in keys:
        storage = whole[key]
        (count,) = struct.unpack("<q", _bytes(read, position, size, path))
        itemsize = 1 if storage.dtype is None else storage.dtype.itemsize
        position += 8
        if count * itemsize != storage.size or position + storage.size > size:
            raise FormatError(
                "a storage does not have the size that its tensors state",
                path=path,
                field=f"storage {key[:40]!r}",
                found=f"{count} elements, {size - position} bytes left",
                expected=f"{storage.size} bytes",
            )
        storage.swapped = swapped
        storage.read = _shifted(read, position)
        position += storage.size


def _attach(part: Storage, parent: Storage, offset: int) -> None:
    part.swapped = parent.swapped
    part.read = _shifted(parent.read, offset)


def _shifted(read: Read, start: int) -> Read:
    return lambda offset, size: read(start + offset, size)


def reading(data: bytes) -> Read:
    """Return what reads ranges of bytes in memory, as a copy."""
    return lambda offset, size: np.frombuffer(data, np.uint8, size, offset).copy()


def _bytes(read: Read, position: int, size: int, path: str) -> bytes:
    if position + 8 > size:
        raise FormatError("the file ends early", path=path, found=f"{max(size - position, 0)} bytes left", expected=8)
    return read(position, 8).tobytes()
