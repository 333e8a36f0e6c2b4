"""Decode the chunks of zarr arrays: a closed list of codecs, of which no library sees more than the bytes of a chunk.

The codecs of a file are looked up in the tables here, never in a registry, where any installed package can add codecs
that run code. A chunk has at most one compressor. It is decoded into a buffer of exactly the size that its shape and
type require, and what the compressed bytes say about their size is compared with it first.

Format: https://zarr-specs.readthedocs.io/en/latest/v3/codecs, https://numcodecs.readthedocs.io
"""

from __future__ import annotations

import bz2
import lzma
import math
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from varstore.disk.encodings.codecs import blosc_size, crc32c, load_numcodecs, zstd_size

__all__ = ["KNOWN", "Chain", "Codec", "Refused", "Unsafe", "named_codecs"]

_NUMBER = re.compile(r"[<>|]?(?:[iu][1248]|f[248])")
_LZMA_MEMORY = 128 << 20
_NONE = (1 << 64) - 1
"""Offset and size in the index of a shard of a chunk that is absent."""


class Refused(ValueError):
    """Metadata or bytes that cannot be decoded; the text says why."""


class Unsafe(Refused):
    """Metadata names a codec that is not in the tables."""


class Codec(NamedTuple):
    """A codec as metadata names it."""

    name: str
    options: Mapping[str, Any]


def named_codecs(listed: Any) -> list[Codec]:
    """Return the codecs in a list of metadata of either version; None is an empty list.

    Raises:
        Refused: it is not a list of codecs.
        Unsafe: a codec is not in the tables.
    """
    if not isinstance(listed, (list, tuple, type(None))):
        raise Refused(f"a list of codecs is {type(listed).__name__}")
    codecs = []
    for codec in listed or ():
        if isinstance(codec, str):
            codec = {"name": codec}
        name = codec.get("id", codec.get("name")) if isinstance(codec, dict) else None
        options = codec.get("configuration", {}) if isinstance(codec, dict) and "id" not in codec else codec
        if not isinstance(name, str) or not isinstance(options, dict):
            raise Refused("a codec does not have a name")
        plain = name.removeprefix("numcodecs.")
        if plain not in KNOWN:
            raise Unsafe(name)
        codecs.append(Codec(plain, options))
    return codecs


@dataclass(frozen=True, kw_only=True, slots=True)
class Chain:
    """The codecs of an array, in the order in which they encode; `dtype` is the type of the stored elements."""

    dtype: np.dtype[Any]
    order: tuple[int, ...] | None
    shard: Shard | None
    steps: tuple[Codec, ...]

    @classmethod
    def of(cls, codecs: Sequence[Codec], dtype: np.dtype[Any], shape: tuple[int, ...], depth: int = 0) -> Chain:
        """Return the chain of version 3 for chunks of a shape.

        Raises:
            Refused: the codecs do not fit together.
        """
        order: tuple[int, ...] | None = None
        shard = None
        rest = list(codecs)
        while rest and rest[0].name == "transpose":
            listed = rest.pop(0).options.get("order")
            if (
                order is not None
                or not isinstance(listed, list)
                or sorted(map(repr, listed)) != sorted(map(repr, range(len(shape))))
            ):
                raise Refused("the order of a transposed chunk is not one of its dimensions")
            order = tuple(listed)
        if not rest or rest[0].name not in ("bytes", "sharding_indexed"):
            raise Refused("the codecs do not turn an array into bytes")
        first = rest.pop(0)
        if first.name == "bytes":
            endian = first.options.get("endian", "little")
            if endian not in ("little", "big"):
                raise Refused("the order of bytes is neither little nor big")
            dtype = dtype.newbyteorder("<" if endian == "little" else ">")
        else:
            shard = Shard.of(first.options, dtype, shape if order is None else tuple(shape[i] for i in order), depth)
        chain = cls(dtype=dtype, order=order, shard=shard, steps=tuple(rest))
        chain.check()
        return chain

    def check(self) -> None:
        """Raise Refused if there is more than one compressor, or a codec that does not turn bytes into bytes."""
        compressors = [step.name for step in self.steps if step.name in _COMPRESSORS]
        if len(compressors) > 1 or (compressors and self.shard is not None):
            raise Refused("chunks are compressed more than once")
        for step in self.steps:
            if step.name not in _COMPRESSORS and step.name not in _FILTERS and step.name not in _CHECKSUMS:
                raise Refused(f"{step.name} is in a place where no such codec can be")

    def decode(self, raw: bytes, shape: tuple[int, ...], fill: np.ndarray) -> np.ndarray:
        """Return the values of one chunk.

        Raises:
            Refused: the bytes are damaged, or do not have the size that the shape requires.
        """
        stored = shape if self.order is None else tuple(shape[axis] for axis in self.order)
        size = math.prod(stored) * self.dtype.itemsize
        sums = sum(step.name in _CHECKSUMS for step in self.steps)
        for step in reversed(self.steps):
            if step.name in _CHECKSUMS:
                sums -= 1
                raw = _without_checksum(step, raw)
            elif step.name in _FILTERS:
                raw = _FILTERS[step.name](raw, step.options)
            else:
                raw = _decompressed(step, raw, size + 4 * sums)
        if self.shard is not None:
            values = self.shard.decode(raw, stored, fill)
        else:
            if len(raw) != size:
                raise Refused(f"a chunk has {len(raw)} bytes instead of {size}")
            values = np.frombuffer(raw, self.dtype).reshape(stored)
        return values if self.order is None else values.transpose(np.argsort(self.order))


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """The codec ``sharding_indexed``: chunks within a chunk, and an index of their places."""

    chunk: tuple[int, ...]
    chain: Chain
    at_end: bool
    has_sum: bool

    @classmethod
    def of(cls, options: Mapping[str, Any], dtype: np.dtype[Any], shape: tuple[int, ...], depth: int) -> Shard:
        chunk, index = options.get("chunk_shape"), [codec.name for codec in named_codecs(options.get("index_codecs"))]
        codecs = named_codecs(options.get("codecs"))
        if (
            depth
            or not isinstance(chunk, list)
            or len(chunk) != len(shape)
            or any(
                type(inner) is not int or inner < 1 or outer % inner for inner, outer in zip(chunk, shape, strict=True)
            )
        ):
            raise Refused("the chunks of a shard do not cover it")
        place = options.get("index_location", "end")
        if index not in (["bytes"], ["bytes", "crc32c"]) or place not in ("start", "end"):
            raise Refused(f"the index of a shard is encoded by {index}")
        chain = Chain.of(codecs, dtype, tuple(chunk), depth + 1)
        return cls(chunk=tuple(chunk), chain=chain, at_end=place == "end", has_sum=len(index) == 2)

    def decode(self, raw: bytes, shape: tuple[int, ...], fill: np.ndarray) -> np.ndarray:
        """Return the values of a shard; `fill` is that of its absent chunks."""
        grid = tuple(outer // inner for outer, inner in zip(shape, self.chunk, strict=True))
        count = math.prod(grid)
        size = 16 * count + 4 * self.has_sum
        if size > len(raw):
            raise Refused(f"the index of a shard takes {size} bytes of {len(raw)}")
        index = raw[len(raw) - size :] if self.at_end else raw[:size]
        if self.has_sum:
            index = _without_checksum(Codec("crc32c", {}), index)
        places = np.frombuffer(index, "<u8").reshape(count, 2)
        present = np.flatnonzero((places != _NONE).any(axis=1))
        values = np.full(shape, fill)
        for at, (offset, length) in zip(present.tolist(), places[present].tolist(), strict=True):
            if offset + length > len(raw):
                raise Refused("a chunk lies outside its shard")
            first = np.unravel_index(at, grid) if grid else ()
            where = tuple(slice(int(i) * e, (int(i) + 1) * e) for i, e in zip(first, self.chunk, strict=True))
            values[where] = self.chain.decode(raw[offset : offset + length], self.chunk, fill)
        return values


def _decompressed(codec: Codec, raw: bytes, size: int) -> bytes:
    try:
        found = _COMPRESSORS[codec.name](raw, size)
    except (
        zlib.error,
        lzma.LZMAError,
        OSError,
        ValueError,
        RuntimeError,
        EOFError,
        MemoryError,
    ) as error:
        raise Refused(f"the compressed bytes of a chunk are damaged: {error}") from None
    if len(found) != size:
        raise Refused(f"a chunk decompresses to {len(found)} bytes or more instead of {size}")
    return found


def _deflated(raw: bytes, size: int) -> bytes:
    inflater = zlib.decompressobj(zlib.MAX_WBITS + 32)
    return _ended(inflater, inflater.decompress(raw, size + 1), size)


def _bz2(raw: bytes, size: int) -> bytes:
    unpacker = bz2.BZ2Decompressor()
    return _ended(unpacker, unpacker.decompress(raw, size + 1), size)


def _lzma(raw: bytes, size: int) -> bytes:
    unpacker = lzma.LZMADecompressor(memlimit=_LZMA_MEMORY)
    return _ended(unpacker, unpacker.decompress(raw, size + 1), size)


def _ended(unpacker: Any, found: bytes, size: int) -> bytes:
    if len(found) == size and not unpacker.eof:  # the end may lie after the last value
        found += unpacker.decompress(getattr(unpacker, "unconsumed_tail", b""), 1)
    if len(found) <= size and (not unpacker.eof or unpacker.unused_data):
        raise Refused("the compressed bytes of a chunk are truncated, or something follows them")
    return found


def _blosc(raw: bytes, size: int) -> bytes:
    _require_size(blosc_size(raw), size)
    return load_numcodecs()[0].decompress(raw, bytearray(size)) if size else b""


def _lz4(raw: bytes, size: int) -> bytes:
    _require_size(int.from_bytes(raw[:4], "little") if len(raw) >= 4 else None, size)
    return load_numcodecs()[1].decompress(raw, bytearray(size)) if size else b""


def _zstd(raw: bytes, size: int) -> bytes:
    stated = zstd_size(raw)
    if stated is not None:
        _require_size(stated, size)
    return load_numcodecs()[2].decompress(raw, bytearray(size)) if size else b""


def _require_size(stated: int | None, size: int) -> None:
    if stated != size:
        raise Refused(f"a chunk states {stated} bytes instead of {size}")


_COMPRESSORS: dict[str, Callable[[bytes, int], bytes]] = {
    "blosc": _blosc,
    "bz2": _bz2,
    "gzip": _deflated,
    "lz4": _lz4,
    "lzma": _lzma,
    "zlib": _deflated,
    "zstd": _zstd,
}


def _without_checksum(codec: Codec, raw: bytes) -> bytes:
    checksum, default = _CHECKSUMS[codec.name]
    at_end = codec.options.get("location", default) == "end"
    content, stated = (raw[:-4], raw[-4:]) if at_end else (raw[4:], raw[:4])
    if len(stated) != 4 or checksum(content) != int.from_bytes(stated, "little"):
        raise Refused(f"the bytes of a chunk do not match their {codec.name}")
    return content


_CHECKSUMS: dict[str, tuple[Callable[[bytes], int], str]] = {
    "adler32": (zlib.adler32, "start"),
    "crc32": (zlib.crc32, "start"),
    "crc32c": (crc32c, "end"),
}


def _unshuffled(raw: bytes, options: Mapping[str, Any]) -> bytes:
    width = options.get("elementsize", 4)
    if type(width) is not int or width < 1:
        raise Refused("the size of shuffled elements is not a number")
    whole = len(raw) // width * width
    flat = np.frombuffer(raw, np.uint8)
    return flat[:whole].reshape(width, -1).T.tobytes() + flat[whole:].tobytes()


def _summed(raw: bytes, options: Mapping[str, Any]) -> bytes:
    named = options.get("dtype")
    dtype = np.dtype(named) if isinstance(named, str) and _NUMBER.fullmatch(named) else None
    if dtype is None or options.get("astype", named) != named or len(raw) % dtype.itemsize:
        raise Refused("differences are stored in a type that is not supported")
    return np.cumsum(np.frombuffer(raw, dtype), dtype=dtype).astype(dtype).tobytes()


_FILTERS: dict[str, Callable[[bytes, Mapping[str, Any]], bytes]] = {
    "bitround": lambda raw, _: raw,
    "delta": _summed,
    "shuffle": _unshuffled,
}

KNOWN = {*_COMPRESSORS, *_CHECKSUMS, *_FILTERS, "bytes", "sharding_indexed", "transpose"}
"""The names of all codecs that are decoded."""
