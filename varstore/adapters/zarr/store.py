"""The store: it answers zarr's questions about keys from a checkpoint, and has no keys but those that it made."""

from __future__ import annotations

import asyncio
import builtins
import json
import math
import os
from collections.abc import AsyncIterator, Iterable, Iterator
from typing import Any

import numpy as np
from zarr.abc.store import ByteRequest, OffsetByteRequest, RangeByteRequest, Store, SuffixByteRequest
from zarr.core.buffer import Buffer, BufferPrototype, default_buffer_prototype

from varstore.adapters.zarr.data_types import register_data_types
from varstore.adapters.zarr.paths import Hierarchy
from varstore.disk.read.checkpoint import Checkpoint, open_checkpoint
from varstore.disk.read.parts import read_run
from varstore.layout.chunks import Chunks, chunk_shape
from varstore.layout.manifest import Entry
from varstore.layout.readable import Readable, readable
from varstore.layout.shards import array_document, bytes_codec

__all__ = ["CheckpointStore"]

_AT_MOST = 16 << 20
"""Bytes of a chunk."""
_DOCUMENT = "zarr.json"


class CheckpointStore(Store):
    """A checkpoint as a read-only store for `zarr.open_group`, xarray and dask.

    Opening it reads the manifest. A chunk is read, and compared with its digests, when zarr asks for it; of what
    several processes wrote, only the regions that lie inside it are compared. The store can be pickled: another process
    on this machine reads the same checkpoint, or is told that it was replaced.

    Args:
        checkpoint: the path of a checkpoint, or an open one.

    Raises:
        CheckpointNotFound, IncompleteCheckpoint, ManifestError: see `varstore.load`.
        UsageError: a variable has no path in a Zarr hierarchy.
        DigestMismatch: when zarr reads a chunk whose bytes are not those that were saved.

    Example:
        >>> import zarr
        >>> from varstore.adapters.zarr import CheckpointStore
        >>> checkpoint = vs.save("lenet", {"fc/weight": np.arange(6.0).reshape(2, 3)}, attributes={"epoch": 10})
        >>> group = zarr.open_group(CheckpointStore("lenet"), mode="r")
        >>> group.attrs["epoch"], group["fc/weight"].shape
        (10, (2, 3))
        >>> group["fc/weight"][1, 1:]
        array([4., 5.])
    """

    supports_writes = False
    supports_deletes = False
    supports_listing = True

    def __init__(self, checkpoint: str | os.PathLike[str] | Checkpoint) -> None:
        super().__init__(read_only=True)
        self._checkpoint = checkpoint if isinstance(checkpoint, Checkpoint) else open_checkpoint(checkpoint)
        self._known: Hierarchy | None = None
        register_data_types()

    def __reduce__(self) -> tuple[type[CheckpointStore], tuple[Checkpoint]]:
        return CheckpointStore, (self._checkpoint,)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CheckpointStore) and self._checkpoint.location == other._checkpoint.location

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"<CheckpointStore of {self._checkpoint!r}>"

    def __str__(self) -> str:
        return f"varstore://{self._checkpoint.path}"

    @property
    def checkpoint(self) -> Checkpoint:
        """The checkpoint."""
        return self._checkpoint

    def with_read_only(self, read_only: bool = False) -> CheckpointStore:
        """Return the store; it cannot be written to.

        Raises:
            ValueError: `read_only` is false.
        """
        if not read_only:
            raise ValueError("a CheckpointStore is read-only; save a new checkpoint with varstore.save")
        return self

    # What the keys are.

    @property
    def _hierarchy(self) -> Hierarchy:
        if self._known is None:
            entries = map(self._checkpoint.entry, self._checkpoint)
            self._known = Hierarchy(entries, path=self._checkpoint.path)
        return self._known

    def _chunk_of(self, key: str) -> tuple[_Array, tuple[int, ...]] | None:
        """Return the array and the index of a key such as ``conv/weight/c/0/1``; None if it is not a chunk's key."""
        parts = key.split("/")
        end = len(parts)
        while end and parts[end - 1].isascii() and parts[end - 1].isdigit():
            end -= 1
        if not end or parts[end - 1] != "c":
            return None
        entry = self._hierarchy.arrays.get("/".join(parts[: end - 1]))
        if entry is None:
            return None
        array, index = self._array(entry), tuple(map(int, parts[end:]))
        return (array, index) if index in array.chunks and _key(index) == "/".join(parts[end - 1 :]) else None

    def _array(self, entry: Entry) -> _Array:
        return _Array(readable(entry, path=self._checkpoint.path))

    def _document(self, key: str) -> bytes | None:
        """Return the ``zarr.json`` of an array or a group; None if the key is not that of one."""
        path, _, name = key.rpartition("/")
        if name != _DOCUMENT:
            return None
        entry = self._hierarchy.arrays.get(path)
        if entry is not None:
            return _dumped(self._array(entry).document(path, self._hierarchy))
        if path in self._hierarchy.groups:
            attributes = {} if path else dict(self._checkpoint.attributes)
            return _dumped({"zarr_format": 3, "node_type": "group", "attributes": attributes})
        return None

    def _keys(self, prefix: str = "") -> Iterator[str]:
        for group in self._hierarchy.groups:
            yield from _below(group, [_DOCUMENT], prefix)
        for path, entry in self._hierarchy.arrays.items():
            if path.startswith(prefix[: len(path)]):
                yield from _below(path, self._array(entry).keys(), prefix)

    # zarr's questions.

    async def get(
        self, key: str, prototype: BufferPrototype | None = None, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        """Return what lies under a key, or a part of it; None if there is no such key."""
        value: Any = self._document(key)
        if value is None:
            chunk = self._chunk_of(key)
            if chunk is None:
                return None
            value = await asyncio.to_thread(self._read, *chunk)
        buffer = (prototype or default_buffer_prototype()).buffer
        part = _part(value, byte_range)
        return buffer.from_bytes(part) if isinstance(part, bytes) else buffer.from_array_like(part)

    def _read(self, array: _Array, index: tuple[int, ...]) -> np.ndarray:
        start, stop = array.chunks.run(index)
        values = read_run(self._checkpoint.location, array.variable, start, stop)
        if len(values) < array.chunks.elements:
            padded = np.zeros(array.chunks.elements, values.dtype)
            padded[: len(values)] = values
            values = padded
        return values.view(np.uint8)

    async def get_partial_values(
        self, prototype: BufferPrototype, key_ranges: Iterable[tuple[str, ByteRequest | None]]
    ) -> builtins.list[Buffer | None]:
        """Return parts of what lies under several keys."""
        return await asyncio.gather(*(self.get(key, prototype, part) for key, part in key_ranges))

    async def exists(self, key: str) -> bool:
        """Return whether there is a key."""
        return self._document(key) is not None or self._chunk_of(key) is not None

    async def getsize(self, key: str) -> int:
        """Return the size in bytes of what lies under a key, without reading values."""
        document = self._document(key)
        if document is not None:
            return len(document)
        chunk = self._chunk_of(key)
        if chunk is None:
            raise FileNotFoundError(key)
        return chunk[0].nbytes

    async def list(self) -> AsyncIterator[str]:
        """Yield all keys."""
        for key in self._keys():
            yield key

    async def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        """Yield the keys that begin with a text."""
        for key in self._keys(prefix):
            yield key

    async def list_dir(self, prefix: str) -> AsyncIterator[str]:
        """Yield the names directly below a path."""
        for name in self._names(prefix.rstrip("/")):
            yield name

    def _names(self, path: str) -> Iterable[str]:
        group = self._hierarchy.groups.get(path)
        if group is not None:
            return [_DOCUMENT, *group]
        entry = self._hierarchy.arrays.get(path)
        if entry is not None:
            chunks = self._array(entry).chunks
            return [_DOCUMENT, *(["c"] if math.prod(chunks.counts) else [])]
        return dict.fromkeys(key[len(path) + 1 :].partition("/")[0] for key in self._keys(f"{path}/"))

    async def set(self, key: str, value: Buffer) -> None:  # noqa: ARG002
        """Refuse: the store is read-only.

        Raises:
            ValueError: always.
        """
        self._check_writable()

    async def delete(self, key: str) -> None:  # noqa: ARG002
        """Refuse: the store is read-only.

        Raises:
            ValueError: always.
        """
        self._check_writable()


class _Array:
    """A variable as zarr sees it: its chunks, and its ``zarr.json``."""

    def __init__(self, variable: Readable) -> None:
        self.variable = variable
        itemsize = variable.dtype.itemsize
        self.chunks = Chunks(variable.shape, chunk_shape(variable.shape, itemsize, _AT_MOST))
        self.nbytes = self.chunks.elements * itemsize

    def keys(self) -> Iterator[str]:
        """Yield the keys below the array's path."""
        yield _DOCUMENT
        yield from map(_key, self.chunks)

    def document(self, path: str, hierarchy: Hierarchy) -> dict[str, Any]:
        """Return its ``zarr.json`` (Zarr v3, array metadata)."""
        entry, dtype = self.variable.entry, self.variable.dtype
        named = {} if entry.name == path else {"varstore_name": entry.name}
        document = array_document(
            self.variable.shape,
            dtype,
            chunk=self.chunks.chunk,
            separator="/",
            codec=bytes_codec(dtype),
            attributes={**entry.attributes, **named},
        )
        return {**document, "dimension_names": _dimensions(path, len(self.variable.shape), hierarchy)}


def _dimensions(path: str, count: int, hierarchy: Hierarchy) -> list[str]:
    """Return a name per axis that no other array of the group has as its own name, or as that of an axis."""
    name, line = path.rpartition("/")[2], "_"
    siblings = hierarchy.siblings(path)
    while any(f"{name}{line}{axis}" in siblings for axis in range(count)):
        line += "_"
    return [f"{name}{line}{axis}" for axis in range(count)]


def _key(index: tuple[int, ...]) -> str:
    return "/".join(["c", *map(str, index)])


def _below(path: str, names: Iterable[str], prefix: str) -> Iterator[str]:
    for name in names:
        key = f"{path}/{name}" if path else name
        if key.startswith(prefix):
            yield key


def _dumped(document: dict[str, Any]) -> bytes:
    return json.dumps(document, indent=2).encode()


def _part(value: Any, wanted: ByteRequest | None) -> Any:
    if isinstance(wanted, RangeByteRequest):
        return value[wanted.start : wanted.end]
    if isinstance(wanted, OffsetByteRequest):
        return value[wanted.offset :]
    if isinstance(wanted, SuffixByteRequest):
        return value[max(len(value) - wanted.suffix, 0) :]
    return value
