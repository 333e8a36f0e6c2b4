"""PyTorch's distributed checkpoints: a folder with ``.metadata`` and the ``.distcp`` files of the ranks.

``.metadata`` is a pickle of plain records: for each tensor its size, type and chunks; for each chunk the range of a
file that contains a torch zip file. Chunks are opened when they are read. A value that is not a tensor is a zip file
too, and is read when the folder is opened.

Source: https://github.com/pytorch/pytorch/blob/v2.13.0/torch/distributed/checkpoint/metadata.py
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

import numpy as np

from varstore.errors import FormatError, SizeMismatch
from varstore.formats.binary.budget import ARRAY, Budget
from varstore.formats.binary.folder import WalkedFolder
from varstore.formats.binary.source import Source, count_elements
from varstore.formats.opened import ForeignCheckpoint
from varstore.formats.pickles.machine import NODE, Instance, Machine, Unknown
from varstore.formats.pickles.names import Constructor, Global, show
from varstore.formats.pickles.tree import DEEPEST
from varstore.formats.torch.names import torch_table
from varstore.formats.torch.tensors import Storages
from varstore.formats.torch.zip import read_zip
from varstore.layout.keys import packed
from varstore.storage.containment import inside
from varstore.values.lazy import LazyArray, chunked_array
from varstore.values.nodes import BARE
from varstore.values.parts import overlap

__all__ = ["METADATA", "read_distributed"]

METADATA = ".metadata"
_MOST_EXPANSION = 1032  # the limit of deflate
_KEY_LIMIT = 1 << 61  # integers below it are their own hash


def read_distributed(root: str, *, limit: int | None = None, encoding: str, unknown: Unknown) -> ForeignCheckpoint:
    """Open a folder that `torch.distributed.checkpoint.save` wrote, nested like the saved state.

    `encoding` and `unknown` are for the values that are not tensors, see `read`; the metadata contains no objects of
    others.

    Raises:
        UnsafeContent: the metadata asks to run code, a path leads out of the folder, there is a link in it, or the
            values are out of proportion to the files.
        FormatError: the metadata contradicts itself or the files.
        SizeMismatch: the chunks of a tensor do not cover it.
    """
    folder = WalkedFolder.walked(root)
    budget = Budget(root, folder.size, files=len(folder.files), limit=limit)
    source = Source(inside(root, METADATA))
    machine = Machine(
        source.map(), path=source.path, table={**torch_table(Storages(budget)), **_RECORDS}, budget=budget
    )
    metadata = machine.run()
    machine.refuse_unclaimed()
    reader = _Reader(root, source.path, _fields(metadata, "Metadata", source.path), budget, encoding, unknown)
    tree = reader.tree()
    return ForeignCheckpoint(root, "torch", tree, {"distributed": True}, budget=budget, unknown=tuple(reader.unknown))


class _Object(Instance):
    """A record of the metadata."""

    __slots__ = ()


class _Reader:
    def __init__(
        self, root: str, path: str, fields: dict[str, Any], budget: Budget, encoding: str, unknown: Unknown
    ) -> None:
        self._encoding = encoding
        self._mode: Unknown = unknown
        self.unknown: list[tuple[str, str, int]] = []
        self._root = root
        self._budget = budget
        self._path = path
        self._about = self._dict(fields.get("state_dict_metadata"), "state_dict_metadata")
        self._paths = fields.get("planner_data")
        self._sources: dict[str, Source] = {}
        self._taken: dict[str, int] = {}  # bytes read from each file when opening; none may be read twice
        self._places: dict[bytes, dict[str, Any]] = {}
        for index, place in self._dict(fields.get("storage_data"), "storage_data").items():
            key = _fields(index, "MetadataIndex", path)
            offset = key.get("offset")
            if offset is not None and (type(offset) is not tuple or any(type(part) is not int for part in offset)):
                self._fail("the place of a variable", show(key.get("fqn")), show(offset))
            name = key.get("fqn")
            if type(name) is not str:
                self._fail("the name of a variable", "", show(name))
            self._places[packed(name, offset)] = _fields(place, "_StorageInfo", path)

    def tree(self) -> Any:
        """Return the state, nested by the paths in the metadata, or flat by full names if there are none."""
        paths = self._paths if isinstance(self._paths, dict) else {}
        root: dict[Any, Any] = {}
        for name, about in self._about.items():
            path = paths.get(name, (name,))
            if type(path) is not tuple or not 0 < len(path) <= DEEPEST or not all(map(_is_key, path)):
                self._fail("a variable's place in the state", str(name), show(path))
            node = root
            for key in path[:-1]:
                node = node.setdefault(key, {})
                if type(node) is not dict:
                    self._fail("a variable's place in the state", str(name), show(path))
            if path[-1] in node:
                self._fail("a variable's place in the state", str(name), show(path))
            node[path[-1]] = self._value(str(name), about)
        return _lists(root)

    def _value(self, name: str, about: Any) -> Any:
        if isinstance(about, _Object) and about.state is None:  # BytesStorageMetadata: a value that is not a tensor
            source, start, size = self._place(name, None)
            self._taken[source.path] = self._taken.get(source.path, 0) + size
            if self._taken[source.path] > source.size:
                self._fail("the place of a variable", name, "the place of other variables")
            opened = read_zip(source, self._budget, start, size, encoding=self._encoding, unknown=self._mode)
            self.unknown += opened.unknown
            return _Value(opened.tree)
        fields = _fields(about, "TensorStorageMetadata", self._path)
        properties = fields.get("properties")
        state = properties.state if isinstance(properties, _Object) else None
        kind = state[0] if isinstance(state, tuple) and state else None
        dtype = kind.entry if isinstance(kind, Global) and isinstance(kind.entry, np.dtype) else None
        shape = fields.get("size")
        if dtype is None or dtype.shape or type(shape) is not tuple:
            self._fail("a tensor's type or shape", name, show((kind, shape)))
        count = count_elements(shape, dtype.itemsize, path=self._path, variable=name)
        return _tensor(shape, dtype, list(self._chunks(name, fields.get("chunks"), shape, dtype, count)))

    def _chunks(
        self, name: str, chunks: Any, shape: tuple[int, ...], dtype: np.dtype[Any], count: int
    ) -> Iterator[tuple[tuple[slice, ...], LazyArray]]:
        covered = 0
        for chunk in chunks if isinstance(chunks, list) else ():
            self._budget.charge(ARRAY, variable=name)
            fields = _fields(chunk, "ChunkStorageMetadata", self._path)
            offsets, sizes = fields.get("offsets"), fields.get("sizes")
            if type(offsets) is not tuple or type(sizes) is not tuple or not len(offsets) == len(sizes) == len(shape):
                self._fail("a chunk", name, show((offsets, sizes)))
            covered += count_elements(sizes, dtype.itemsize, path=self._path, variable=name)
            if any(type(o) is not int or o < 0 or o + s > e for o, s, e in zip(offsets, sizes, shape, strict=True)):
                self._fail("a chunk", name, show((offsets, sizes)))
            where = tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))
            yield where, self._chunk(name, offsets, sizes, dtype)
        if covered != count:
            raise SizeMismatch(
                "the chunks do not cover the tensor", path=self._path, variable=name, found=covered, expected=count
            )

    def _chunk(self, name: str, offsets: tuple[int, ...], sizes: tuple[int, ...], dtype: np.dtype[Any]) -> LazyArray:
        source, start, size = self._place(name, offsets)
        if math.prod(sizes) * dtype.itemsize > _MOST_EXPANSION * size:
            self._fail("a chunk", name, f"{list(sizes)} of {dtype} in {size} bytes")

        def tensor() -> LazyArray:
            budget = Budget(source.path, size, limit=self._budget.limit)
            values = read_zip(source, budget, start, size, encoding="utf-8", unknown="error")
            if list(values) != [BARE] or values[BARE].shape != sizes or values[BARE].dtype != dtype:
                self._fail("a chunk", name, show({name: repr(values[name]) for name in values}))
            return values[BARE]

        return LazyArray(sizes, dtype, lambda: tensor().numpy(), part=lambda index, _: tensor()[index])

    def _place(self, name: str, offsets: tuple[int, ...] | None) -> tuple[Source, int, int]:
        place = self._places.get(packed(name, offsets)) or self._places.get(packed(name, None), {})
        file, start, size = (place.get(key) for key in ("relative_path", "offset", "length"))
        if (
            type(file) is not str
            or type(start) is not int
            or type(size) is not int
            or place.get("transform_descriptors")
        ):
            self._fail("the place of a variable", name, show((file, start, size), most=3))
        if file not in self._sources:
            self._sources[file] = Source(inside(self._root, file))
        source = self._sources[file]
        if not 0 <= start <= start + size <= source.size:
            self._fail("the place of a variable", name, f"{size} bytes at {start} of {source.size}")
        return source, start, size

    def _dict(self, value: Any, what: str) -> dict[Any, Any]:
        if not isinstance(value, dict):
            raise FormatError("not the metadata of a distributed checkpoint", path=self._path, field=what)
        return value

    def _fail(self, what: str, name: str, found: str) -> NoReturn:
        raise FormatError(f"{what} is wrong in the metadata", path=self._path, variable=name[:100], found=found)


def _is_key(key: Any) -> bool:
    return type(key) is str or (type(key) is int and abs(key) < _KEY_LIMIT)


class _Value:
    """A value that is not a tensor; wrapped, so that it is not taken for a container of the state."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value


def _tensor(shape: tuple[int, ...], dtype: np.dtype[Any], chunks: list[tuple[Any, LazyArray]]) -> LazyArray:
    if len(chunks) == 1:
        return chunks[0][1]

    def fetch(box: Sequence[range]) -> np.ndarray:
        values = np.zeros([len(rows) for rows in box], dtype)
        for where, chunk in chunks:
            if found := overlap(box, [range(rows.start, rows.stop) for rows in where]):
                values[found[0]] = chunk[found[1]]
        return values

    return chunked_array(shape, dtype, fetch)


def _lists(node: Any) -> Any:
    """Turn dicts whose keys are the indices of a list back into lists."""
    if isinstance(node, _Value):
        return node.value
    if type(node) is not dict:
        return node
    values = {key: _lists(value) for key, value in node.items()}
    is_list = bool(values) and set(values) == set(range(len(values))) and all(type(key) is int for key in values)
    return [values[index] for index in range(len(values))] if is_list else values


def _fields(record: Any, kind: str, path: str) -> dict[str, Any]:
    if not isinstance(record, _Object) or not isinstance(record.state, dict):
        raise FormatError("not the metadata of a distributed checkpoint", path=path, found=show(record), expected=kind)
    return record.state


def _object(machine: Machine) -> _Object:
    machine.charge(NODE)
    return _Object(None, machine.stop)


def _path(_machine: Machine, *parts: Any) -> str:
    return os.sep.join([part for part in parts if type(part) is str])


def _encoding(_machine: Machine, number: Any) -> Any:
    return number


_RECORDS = {
    **{
        (module, name): Constructor(new=_object)
        for module in ("torch.distributed.checkpoint.metadata", "torch.distributed._shard.sharded_tensor.metadata")
        for name in (
            *("Metadata", "TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata"),
            *("MetadataIndex", "BytesStorageMetadata", "StorageMeta"),
        )
    },
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): Constructor(new=_object),
    ("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"): Constructor(call=_encoding),
    ("torch.distributed._shard.sharded_tensor.metadata", "MEM_FORMAT_ENCODING"): Constructor(call=_encoding),
    **{("pathlib", name): Constructor(call=_path) for name in ("PosixPath", "WindowsPath", "PurePosixPath")},
}
