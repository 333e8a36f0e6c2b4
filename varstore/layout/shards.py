"""The encoding ``zarr``: what ``out`` and ``zarr.json`` of a variable are (FORMAT F9), as pure arithmetic and text.

``out`` is one shard of Zarr v3: the compressed chunks one after the other, and then the index, which says where each of
them lies. ``zarr.json`` says so to others. varstore does not need it: what it would learn there follows from the shape,
the type and the level, of which there are two. A document that is not, to the byte in its meaning, one that varstore
would write is not trusted.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np

from varstore.layout.chunks import Chunks, chunk_shape

__all__ = [
    "CHUNK_LIMIT",
    "DOCUMENT",
    "LEVELS",
    "SMALLEST",
    "Level",
    "Shard",
    "array_document",
    "bytes_codec",
    "chunk_link",
    "fill_value",
]

Level = Literal["fast", "small"]

LEVELS: tuple[Level, ...] = ("fast", "small")
DOCUMENT = "zarr.json"
SMALLEST = 64 << 10
"""Bytes; a variable with fewer stays raw."""
CHUNK_LIMIT = 1 << 20
"""Bytes of a chunk."""
_ENTRY = 16
"""Bytes in the index per chunk: its offset and its size."""
_SUM = 4
"""Bytes of the CRC-32C after the index."""


@dataclass(frozen=True)
class Shard:
    """The shard of a variable's values: how they are cut, and how the chunks are compressed."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @cached_property
    def chunks(self) -> Chunks:
        """The chunks of the values."""
        return Chunks(self.shape, chunk_shape(self.shape, self.dtype.itemsize, CHUNK_LIMIT))

    @cached_property
    def count(self) -> int:
        """The number of chunks."""
        return math.prod(self.chunks.counts)

    @cached_property
    def chunk_nbytes(self) -> int:
        """The size of a chunk in bytes, with padding."""
        return self.chunks.elements * self.dtype.itemsize

    @cached_property
    def index_nbytes(self) -> int:
        """The size of the index at the end of ``out``, with its checksum."""
        return _ENTRY * self.count + _SUM

    @property
    def packed_limit(self) -> int:
        """Bytes that a compressed chunk takes at most: what does not shrink grows by little."""
        return self.chunk_nbytes + self.chunk_nbytes // 64 + 4096

    @property
    def link(self) -> str:
        """The name of the symbolic link to ``out``: the key of the only chunk of the array, which is the shard."""
        return chunk_link(len(self.shape))

    def codec(self, level: Level) -> dict[str, Any]:
        """Return how chunks are compressed, as Zarr names it; chosen by measurements of trained weights."""
        size = self.dtype.itemsize
        if size == 1:
            return {"name": "zstd", "configuration": {"level": 3, "checksum": False}}
        fast, two, more = ("lz4", 5, "bitshuffle"), ("zstd", 5, "shuffle"), ("zstd", 3, "bitshuffle")
        name, effort, shuffle = fast if level == "fast" else two if size == 2 else more
        options = {"typesize": size, "cname": name, "clevel": effort, "shuffle": shuffle, "blocksize": 0}
        return {"name": "blosc", "configuration": options}

    def document(self, level: Level) -> bytes:
        """Return the content of ``zarr.json``."""
        return json.dumps(self._described(level), indent=2).encode() + b"\n"

    def level(self, document: bytes) -> Level | None:
        """Return the level that a ``zarr.json`` says; None if varstore would not write it."""
        try:
            said = json.dumps(json.loads(document, object_pairs_hook=_without_twins), sort_keys=True)
        except (ValueError, RecursionError):
            return None
        return next((level for level in LEVELS if said == json.dumps(self._described(level), sort_keys=True)), None)

    def _described(self, level: Level) -> dict[str, Any]:
        chunks = self.chunks
        whole = tuple(count * step for count, step in zip(chunks.counts, chunks.chunk, strict=True))
        sharding = {
            "chunk_shape": list(chunks.chunk),
            "codecs": [bytes_codec(self.dtype), self.codec(level)],
            "index_codecs": [bytes_codec(np.dtype("<u8")), {"name": "crc32c"}],
            "index_location": "end",
        }
        codec = {"name": "sharding_indexed", "configuration": sharding}
        return array_document(self.shape, self.dtype, chunk=whole, separator=".", codec=codec, attributes={})


def array_document(
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
    *,
    chunk: tuple[int, ...],
    separator: str,
    codec: Mapping[str, Any],
    attributes: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the ``zarr.json`` of an array (Zarr v3, array metadata)."""
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": list(shape),
        "data_type": dtype.name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(chunk)}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": separator}},
        "fill_value": fill_value(dtype),
        "codecs": [codec],
        "attributes": dict(attributes),
    }


def bytes_codec(dtype: np.dtype[Any]) -> dict[str, Any]:
    """Return the codec that stores elements as they lie in memory; its byte order is said where there is one."""
    return {"name": "bytes", **({} if dtype.itemsize == 1 else {"configuration": {"endian": "little"}})}


def _without_twins(members: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object of JSON; refuse one with a name twice, of which readers take the first or the last."""
    found = dict(members)
    if len(found) != len(members):
        raise ValueError("a name is there twice")
    return found


def chunk_link(axes: int) -> str:
    """Return the name that zarr has for the only chunk of an array with so many axes, with the separator ``.``."""
    return ".".join(["c", *(["0"] * axes)])


def fill_value(dtype: np.dtype[Any]) -> Any:
    """Return the fill value of an array of this type as its ``zarr.json`` has it: NaN where the type has it, else 0."""
    if dtype.kind == "b":
        return False
    if dtype.kind == "c":
        return ["NaN", "NaN"]
    with np.errstate(all="ignore"):
        has_nan = dtype.kind not in "iu" and bool(np.isnan(np.asarray(math.nan).astype(dtype)))
    return "NaN" if has_nan else 0
