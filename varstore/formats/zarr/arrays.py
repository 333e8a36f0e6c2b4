"""The metadata of one zarr array, checked, and the array that it describes, read chunk by chunk.

Types of `ml_dtypes`, which JAX's tools write, are read like all others. An array is read from what has its chunks by
name: a folder, or a database. Chunks that were never written have the fill value of the array.

Format: https://zarr-specs.readthedocs.io
"""

from __future__ import annotations

import base64
import binascii
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from varstore.errors import FormatError, UnsafeContent, UnsupportedDtype, VarstoreError
from varstore.formats.binary.budget import ARRAY, Budget
from varstore.formats.binary.source import count_elements
from varstore.formats.zarr.codecs import KNOWN, Chain, Refused, Unsafe, named_codecs
from varstore.values.lazy import LazyArray, chunked_array
from varstore.values.parts import overlap

__all__ = ["Layout", "Place", "lazy_array"]

_V2_DTYPE = re.compile(r"[<>|=]?(?:b1|[iu][1248]|f[248]|c(?:8|16)|[SUV][1-9][0-9]{0,5}|[mM]8\[[a-z]{1,7}\])")
_V3_DTYPES = {
    "bool": "?",
    **{f"{kind}{bits}": f"{kind[0]}{bits // 8}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)},
    "float16": "f2",
    "float32": "f4",
    "float64": "f8",
    "complex64": "c8",
    "complex128": "c16",
}
_ML_DTYPES = {
    dtype.name: dtype
    for dtype in map(
        np.dtype,
        (
            ml_dtypes.bfloat16,
            ml_dtypes.float8_e4m3b11fnuz,
            ml_dtypes.float8_e4m3fn,
            ml_dtypes.float8_e4m3fnuz,
            ml_dtypes.float8_e5m2,
            ml_dtypes.float8_e5m2fnuz,
        ),
    )
}
_SPECIAL = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}

Place = tuple[tuple[int, ...], str]
"""The position of a chunk in the grid, and its name below the array."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """The metadata of an array.

    `stored` is the type of the elements in chunks: for booleans and types of `ml_dtypes`, an unsigned integer.
    """

    path: str
    name: str
    shape: tuple[int, ...]
    chunk: tuple[int, ...]
    dtype: np.dtype[Any]
    stored: np.dtype[Any]
    fill: np.ndarray
    is_fortran: bool
    chain: Chain
    prefix: str
    separator: str

    @classmethod
    def parsed(cls, fields: Mapping[str, Any], *, path: str, name: str) -> Layout:
        """Return the layout in the metadata of an array of either version.

        Raises:
            FormatError: the metadata is not that of an array.
            UnsafeContent: it names a codec that is not in the table.
            UnsupportedDtype: its type is not one of plain values.
        """
        try:
            return (_from_v3 if fields.get("zarr_format") == 3 else _from_v2)(fields, path, name)
        except Unsafe as error:
            raise UnsafeContent(
                "a codec is not one of those that are known to be safe",
                path=path,
                variable=name,
                found=repr(str(error)[:100]),
                expected=f"one of {', '.join(sorted(KNOWN))}",
            ) from None
        except VarstoreError:
            raise
        except (Refused, ArithmeticError, TypeError, ValueError, LookupError, AttributeError) as error:
            raise FormatError(
                "this is not the metadata of a zarr array, or of one that can be read",
                path=path,
                variable=name,
                found=f"{error}"[:200],
            ) from None

    @property
    def grid(self) -> tuple[int, ...]:
        """The number of chunks along each axis."""
        return tuple(-(-extent // step) for extent, step in zip(self.shape, self.chunk, strict=True))

    @property
    def nbytes(self) -> int:
        """The bytes of the values."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def chunk_nbytes(self) -> int:
        """The bytes of the values of one chunk."""
        return math.prod(self.chunk) * self.dtype.itemsize

    def key(self, position: Iterable[int]) -> str:
        """Return the name of the chunk at a position in the grid."""
        numbers = self.separator.join(map(str, position))
        return self.separator.join(part for part in (self.prefix, numbers) if part) or "0"

    def position(self, key: str) -> tuple[int, ...] | None:
        """Return the position of the chunk of this name; None for other names, and for chunks outside the array."""
        rank = len(self.shape)
        parts = key.split(self.separator)
        numbers = parts[1:] if self.prefix else parts
        if not rank:
            return () if key == self.key(()) else None
        if len(numbers) != rank or not all(len(text) < 20 and text.isascii() and text.isdigit() for text in numbers):
            return None
        position = tuple(map(int, numbers))
        is_own = self.key(position) == key and all(at < end for at, end in zip(position, self.grid, strict=True))
        return position if is_own else None


def lazy_array(
    layout: Layout, chunks: Callable[[], Iterable[Place]], read: Callable[[str], bytes | None], budget: Budget
) -> LazyArray:
    """Return an array whose chunks `read` returns by name, or None for an absent one; `chunks` lists those to read.

    Raises:
        UnsafeContent: its values are out of proportion to the size of the file.
    """
    budget.charge(ARRAY, variable=layout.name)
    if layout.chunk_nbytes > budget.limit:
        raise budget.exceeded(layout.chunk_nbytes, variable=layout.name)

    def fetch(box: Sequence[range]) -> np.ndarray:
        values = np.full([len(rows) for rows in box], layout.fill)
        for position, key in chunks():
            chunk = [range(at * step, (at + 1) * step) for at, step in zip(position, layout.chunk, strict=True)]
            if (found := overlap(box, chunk)) and (raw := read(key)) is not None:
                values[found[0]] = _decoded(layout, key, raw)[found[1]]
        if layout.dtype == np.bool_:
            return np.asarray(values != 0)
        plain = values.astype(values.dtype.newbyteorder("="), copy=False)
        return plain if plain.dtype == layout.dtype else plain.view(layout.dtype)

    return chunked_array(layout.shape, layout.dtype, fetch)


def _decoded(layout: Layout, key: str, raw: bytes) -> np.ndarray:
    shape = layout.chunk[::-1] if layout.is_fortran else layout.chunk
    try:
        chunk = layout.chain.decode(raw, shape, layout.fill)
    except Refused as error:
        raise FormatError(
            "a chunk of the array cannot be read",
            path=layout.path,
            variable=layout.name,
            field=key[:100],
            found=str(error),
            hint="the file is damaged",
        ) from None
    return chunk.T if layout.is_fortran else chunk


def _from_v2(fields: Mapping[str, Any], path: str, name: str) -> Layout:
    shape, chunk = _extents(fields["shape"]), _extents(fields["chunks"])
    compressor = fields.get("compressor")
    codecs = named_codecs(fields.get("filters")) + named_codecs([] if compressor is None else [compressor])
    dtype, stored = _v2_dtype(fields["dtype"], path, name)
    count_elements(shape, dtype.itemsize, path=path, variable=name)
    chain = Chain(dtype=stored, order=None, shard=None, steps=tuple(codecs))
    chain.check()
    separator, order = fields.get("dimension_separator", "."), fields.get("order", "C")
    if separator not in (".", "/") or order not in ("C", "F") or len(chunk) != len(shape):
        raise Refused("the chunks, the order or the separator is not one of zarr's")
    return Layout(
        path=path,
        name=name,
        shape=shape,
        chunk=tuple(max(extent, 1) for extent in chunk),
        dtype=dtype,
        stored=stored,
        fill=_fill(fields.get("fill_value"), dtype, stored),
        is_fortran=order == "F",
        chain=chain,
        prefix="",
        separator=separator,
    )


def _from_v3(fields: Mapping[str, Any], path: str, name: str) -> Layout:
    shape = _extents(fields["shape"])
    grid, keys = fields["chunk_grid"], fields.get("chunk_key_encoding", {"name": "default"})
    codecs = named_codecs(fields["codecs"])
    dtype, stored = _v3_dtype(fields["data_type"], path, name)
    count_elements(shape, dtype.itemsize, path=path, variable=name)
    chunk = _extents(grid["configuration"]["chunk_shape"])
    encoding = keys["name"]
    separator = keys.get("configuration", {}).get("separator", "/" if encoding == "default" else ".")
    is_known = grid["name"] == "regular" and encoding in ("default", "v2") and separator in (".", "/")
    if not is_known or len(chunk) != len(shape) or 0 in chunk or fields.get("storage_transformers"):
        raise Refused("the grid of chunks, their names or their storage is not one of zarr's")
    if math.prod(chunk) * dtype.itemsize >= 1 << 63:
        raise Refused("no chunk can have this shape")
    return Layout(
        path=path,
        name=name,
        shape=shape,
        chunk=chunk,
        dtype=dtype,
        stored=stored,
        fill=_fill(fields["fill_value"], dtype, stored),
        is_fortran=False,
        chain=Chain.of(codecs, stored, chunk),
        prefix="c" if encoding == "default" else "",
        separator=separator,
    )


def _extents(listed: Any) -> tuple[int, ...]:
    if not isinstance(listed, list) or any(type(extent) is not int or not 0 <= extent < 1 << 63 for extent in listed):
        raise Refused("a shape is not a list of integers of 0 or more")
    return tuple(listed)


def _v2_dtype(named: Any, path: str, name: str) -> tuple[np.dtype[Any], np.dtype[Any]]:
    if isinstance(named, str) and named in _ML_DTYPES:
        return _stored_as_bits(_ML_DTYPES[named])
    if not isinstance(named, str) or not _V2_DTYPE.fullmatch(named):
        raise _unsupported(named, path, name)
    stored = np.dtype(named)
    return (np.dtype(np.bool_), np.dtype(np.uint8)) if stored.kind == "b" else (stored.newbyteorder("="), stored)


def _v3_dtype(named: Any, path: str, name: str) -> tuple[np.dtype[Any], np.dtype[Any]]:
    if isinstance(named, str) and named in _ML_DTYPES:
        return _stored_as_bits(_ML_DTYPES[named])
    if not isinstance(named, str) or named not in _V3_DTYPES:
        raise _unsupported(named, path, name)
    dtype = np.dtype(_V3_DTYPES[named])
    return dtype, np.dtype(np.uint8) if dtype == np.bool_ else dtype


def _stored_as_bits(dtype: np.dtype[Any]) -> tuple[np.dtype[Any], np.dtype[Any]]:
    return dtype, np.dtype(f"<u{dtype.itemsize}")


def _unsupported(named: Any, path: str, name: str) -> UnsupportedDtype:
    return UnsupportedDtype(
        "the type of this zarr array is not one of plain values",
        path=path,
        variable=name,
        found=repr(named)[:100],
        hint="remove the array from the tree",
    )


def _fill(value: Any, dtype: np.dtype[Any], stored: np.dtype[Any]) -> np.ndarray:
    """Return the fill value as a 0-d array of the type that is stored."""
    native = stored.newbyteorder("=")
    if value is None:
        return np.zeros((), native)
    if isinstance(value, str) and value.startswith("0x"):
        return np.asarray(int(value, 16), f"u{dtype.itemsize}").view(native)
    if stored.kind in "SV" and isinstance(value, str):
        try:
            raw = base64.b64decode(value, validate=True)
        except binascii.Error:
            raise Refused("the fill value is not base64") from None
        return np.frombuffer(raw.ljust(dtype.itemsize, b"\0")[: dtype.itemsize], native)[0:1].reshape(())
    if dtype.kind == "c" and isinstance(value, list):
        real, imaginary = (float(_SPECIAL[part] if isinstance(part, str) else part) for part in value)
        return np.asarray(complex(real, imaginary), native)
    if isinstance(value, str) and value in _SPECIAL:
        value = _SPECIAL[value]
    if not isinstance(value, (str, int, float)) or (isinstance(value, str) and stored.kind not in "UmM"):
        raise Refused("the fill value is not one of the type")
    if isinstance(value, float) and dtype.kind in "iu" and not value.is_integer():
        raise Refused("the fill value is not one of the type")
    with np.errstate(all="ignore"):
        filled = np.asarray(int(value) if dtype.kind in "iub" else value).astype(dtype)
    return filled.view(native) if filled.dtype.itemsize == native.itemsize else filled.astype(native)
