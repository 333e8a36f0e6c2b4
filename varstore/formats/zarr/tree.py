"""Zarr trees of versions 2 and 3, read with the zarr library; the root may be a group or an array.

The metadata is read and checked here first, and the library sees only that: its store contains a single array and this
metadata. These are refused: codecs that are not in the table (numcodecs has one that unpickles), links that lead out of
the tree, and shapes that are far too large for the files. Types of `ml_dtypes`, which JAX's tools write, are read as
unsigned integers with the same bits.

Format: https://zarr-specs.readthedocs.io
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from varstore.errors import (
    FormatError,
    InvalidName,
    SizeMismatch,
    UnsafeContent,
    UnsupportedDtype,
    UsageError,
    VarstoreError,
)
from varstore.formats.binary.source import Source, count_elements
from varstore.formats.opened import ForeignCheckpoint
from varstore.formats.state.flat import fetch_plain, flat_arrays
from varstore.formats.zarr.store import (
    V2_ARRAY,
    V2_ATTRIBUTES,
    V2_GROUP,
    V3,
    check_folder,
    inside,
    library,
    store_of,
)
from varstore.storage.appearing import new_folder
from varstore.values.lazy import LazyArray
from varstore.values.nodes import BARE

__all__ = ["array_in", "read", "write"]

_V2_CODECS = {"blosc", "bz2", "crc32", "crc32c", "delta", "fixedscaleoffset", "gzip", "lz4", "lzma", "packbits", "zlib"}
_V3_CODECS = {"bytes", "blosc", "crc32c", "gzip", "sharding_indexed", "transpose"}
_CODECS = _V2_CODECS | _V3_CODECS | {"adler32", "astype", "bitround", "fletcher32", "quantize", "shuffle", "zstd"}
_BITS = {
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
_DEEPEST = 32
_MOST_METADATA = 1 << 24
_FREE = 256 << 20
_MOST_EXPANSION = 10_000
"""Arrays and chunks of more than `_FREE` bytes may be at most `_MOST_EXPANSION` times as large as their files."""


def read(path: str) -> ForeignCheckpoint:
    """Open a tree; chunks that were never written have the fill value of the array.

    Raises:
        FormatError: the metadata is not zarr's, or the library does not accept it.
        UnsafeContent: a link leads out of the tree, a codec could run code, or zarr would change a name.
        SizeMismatch: an array is far larger than its files.
        UnsupportedDtype: an array contains objects.
        MissingDependency: zarr is not installed.
    """
    library(path)
    root = os.path.realpath(path)
    if not os.path.isdir(root):
        raise FormatError("a zarr tree must be a folder", path=path)
    attributes: dict[str, Any] = {}
    arrays: dict[str, LazyArray] = {}
    nodes = 0
    for folder, record in _nodes(root, path, "", (root,)):
        nodes += 1
        if not folder:
            attributes = record.attributes
        if record.is_array:
            arrays[folder] = _array(root, path, folder, record)
    if not nodes:
        raise FormatError(
            "there is no zarr metadata in this folder", path=path, expected=f"{V3}, {V2_GROUP} or {V2_ARRAY}"
        )
    if "" in arrays:
        return ForeignCheckpoint(path, "zarr", arrays[""], attributes)
    return ForeignCheckpoint(path, "zarr", arrays, attributes)


def array_in(path: str, folder: str, name: str) -> LazyArray:
    """Return the array in one folder of a tree, for formats that store the names of arrays elsewhere.

    Raises:
        FormatError: the folder does not contain an array.
        UnsafeContent: zarr would change the name of the folder.
        SizeMismatch, UnsupportedDtype, MissingDependency: see `read`.
    """
    library(path)
    check_folder(path, folder, name)
    root = os.path.realpath(path)
    record = _record(root, path, folder)
    if record is None or not record.is_array:
        raise FormatError("the folder does not contain a zarr array", path=path, variable=name, found=folder)
    return _array(root, path, folder, record)


def write(path: str, state: Any, *, attributes: Mapping[str, Any] | None = None, zarr_format: int = 3) -> None:
    """Write a tree; each part of a name before a ``/`` is a group.

    Args:
        path: where to write; it must not exist.
        state: names and arrays, or nested state of arrays and numbers.
        attributes: JSON data to keep with the root group.
        zarr_format: the version of the format, 2 or 3.

    Raises:
        CheckpointExists: the path exists.
        InvalidName: zarr reserves a name, or a name is below that of an array.
        UnsupportedDtype: zarr does not have a type.
        UsageError: a value is not an array or a number; see `flat_arrays`.
        MissingDependency: zarr is not installed.
        StorageError: the operating system refused.
    """
    zarr = library(path)
    if zarr_format not in (2, 3):
        raise UsageError("there is no such version of the zarr format", path=path, found=zarr_format, expected="2 or 3")
    arrays = flat_arrays(state, format="zarr")
    for name, array in arrays.items():
        _check_writable(path, name, array, arrays)
    with new_folder(path) as staging:
        store = zarr.storage.LocalStore(staging)
        is_bare = set(arrays) == {BARE}
        if not is_bare:
            zarr.create_group(store, zarr_format=zarr_format, attributes=dict(attributes or {}))
        for name, array in arrays.items():
            values = fetch_plain(name, array)
            zarr.create_array(store, name=None if is_bare else name, data=values, zarr_format=zarr_format)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Record:
    """The metadata of one node: the name of its file, the fields in it, and the user's attributes."""

    file: str
    fields: dict[str, Any]
    attributes: dict[str, Any]

    @property
    def is_v3(self) -> bool:
        return self.file == V3

    @property
    def is_array(self) -> bool:
        return self.file == V2_ARRAY or self.fields.get("node_type") == "array"


def _nodes(root: str, path: str, folder: str, above: tuple[str, ...]) -> Iterator[tuple[str, _Record]]:
    record = _record(root, path, folder)
    if record is not None:
        yield folder, record
        if record.is_array:
            return
    here = os.path.join(root, folder)
    for name in sorted(os.listdir(here)):
        if not os.path.isdir(os.path.join(here, name)):
            continue
        real = inside(root, path, os.path.join(folder, name))
        if real in above:
            raise UnsafeContent(
                "a link leads to a folder that contains it", path=path, found=os.path.join(folder, name)
            )
        if len(above) > _DEEPEST:
            raise FormatError("groups are nested too deeply", path=path, found=f"more than {_DEEPEST}")
        yield from _nodes(root, path, f"{folder}/{name}" if folder else name, (*above, real))


def _record(root: str, path: str, folder: str) -> _Record | None:
    for file in (V3, V2_ARRAY, V2_GROUP):
        fields = _json(root, path, os.path.join(folder, file))
        if fields is not None:
            own = fields if file == V3 else _json(root, path, os.path.join(folder, V2_ATTRIBUTES)) or {}
            attributes = own.get("attributes", {}) if file == V3 else own
            return _Record(file=file, fields=fields, attributes=attributes if isinstance(attributes, dict) else {})
    return None


def _json(root: str, path: str, file: str) -> dict[str, Any] | None:
    if not os.path.lexists(os.path.join(root, file)):
        return None
    source = Source(inside(root, path, file))
    if source.size > _MOST_METADATA:
        raise SizeMismatch("the metadata is too long", path=source.path, found=source.size, expected=_MOST_METADATA)
    try:
        fields = json.loads(source.bytes(0, source.size))
    except (ValueError, RecursionError) as error:
        raise FormatError("the metadata is not valid JSON", path=source.path, found=str(error)) from None
    if not isinstance(fields, dict):
        raise FormatError("the metadata must be a JSON object", path=source.path)
    return fields


def _array(root: str, path: str, folder: str, record: _Record) -> LazyArray:
    name = folder or BARE
    if folder:
        check_folder(path, folder, name)
    fields = dict(record.fields)
    zarr = library(path)
    try:
        _check_codecs(path, name, fields)
        bits = _read_by_bits(fields, record)
        store = store_of(path, root, folder, (record.file, json.dumps(fields).encode()))
        array = zarr.open_array(store, path=folder, mode="r", zarr_format=3 if record.is_v3 else 2)
        _check_opened(path, name, array.metadata, fields)
        shape, dtype, chunks = tuple(map(int, array.shape)), np.dtype(array.dtype), tuple(map(int, array.chunks))
    except VarstoreError:
        raise
    except Exception as error:
        raise FormatError(
            "zarr does not accept the metadata of this array",
            path=path,
            variable=name,
            found=f"{type(error).__name__}: {error}",
        ) from error
    if dtype.hasobject:
        raise UnsupportedDtype(
            "arrays of objects are not supported",
            path=path,
            variable=name,
            found=str(dtype),
            hint="remove the array from the tree",
        )
    nbytes = count_elements(shape, dtype.itemsize, path=path, variable=name) * dtype.itemsize
    largest = max(nbytes, math.prod(chunks) * dtype.itemsize)
    if largest > _FREE and largest > _MOST_EXPANSION * _on_disk(os.path.join(root, folder)):
        raise SizeMismatch(
            "the array is far larger than its files",
            path=path,
            variable=name,
            found=f"{list(shape)} in chunks of {list(chunks)}",
            expected=f"at most {_FREE} bytes, or {_MOST_EXPANSION} times the size of the files",
        )

    def fetch() -> np.ndarray:
        try:
            values = np.asarray(array[...])
        except VarstoreError:
            raise
        except Exception as error:
            raise FormatError(
                "the array cannot be read", path=path, variable=name, found=f"{type(error).__name__}: {error}"
            ) from error
        return values.view(bits) if bits is not None else values.astype(dtype.newbyteorder("="), copy=False)

    return LazyArray(shape, bits or dtype.newbyteorder("="), fetch)


def _check_codecs(path: str, name: str, fields: Mapping[str, Any]) -> None:
    for codec in _codec_names(fields):
        if codec.removeprefix("numcodecs.") not in _CODECS:
            raise UnsafeContent(
                "a codec is not one of those that are known to be safe",
                path=path,
                variable=name,
                found=repr(codec),
                expected=f"one of {', '.join(sorted(_CODECS))}",
            )


def _check_opened(path: str, name: str, metadata: Any, fields: Mapping[str, Any]) -> None:
    """Check that zarr opened the array with these fields."""
    fields = {key: value for key, value in fields.items() if key != "attributes"}
    ours, theirs = (type(metadata).from_dict(fields).to_dict(), metadata.to_dict())
    if any(repr(ours[key]) != repr(theirs.get(key)) for key in ours.keys() - {"attributes"}):
        raise UnsafeContent("zarr did not open the metadata that was checked", path=path, variable=name)


def _codec_names(fields: Mapping[str, Any]) -> Iterator[str]:
    """Yield the name of every codec in metadata of either version, including those within shards."""
    named = [fields.get("compressor"), *(fields.get("filters") or ())]
    yield from (str(codec.get("id")) for codec in named if isinstance(codec, dict))
    for key in ("codecs", "index_codecs"):
        for codec in fields.get(key) or ():
            is_dict = isinstance(codec, dict)
            yield str(codec.get("name")) if is_dict else str(codec)
            if is_dict and isinstance(codec.get("configuration"), dict):
                yield from _codec_names(codec["configuration"])


def _read_by_bits(fields: dict[str, Any], record: _Record) -> np.dtype[Any] | None:
    """Replace a type of `ml_dtypes` by the unsigned integer of its size, and return it; None for other types."""
    key = "data_type" if record.is_v3 else "dtype"
    named = fields.get(key)
    dtype: np.dtype[Any] | None = _BITS.get(named) if isinstance(named, str) else None
    if dtype is None:
        return None
    fields[key] = f"uint{8 * dtype.itemsize}" if record.is_v3 else {1: "|u1", 2: "<u2"}[dtype.itemsize]
    fill = fields.get("fill_value")
    if isinstance(fill, str) and fill.startswith("0x"):
        fields["fill_value"] = int(fill, 16)
    elif fill is not None:
        fields["fill_value"] = int(np.asarray(float(fill)).astype(dtype).view(f"u{dtype.itemsize}"))
    return dtype


def _on_disk(folder: str) -> int:
    return sum(os.lstat(os.path.join(place, name)).st_size for place, _, names in os.walk(folder) for name in names)


def _check_writable(path: str, name: str, array: LazyArray, arrays: Mapping[str, Any]) -> None:
    if array.dtype.kind not in "biufc" or array.dtype.itemsize > 16 or array.dtype.type.__module__ != "numpy":
        raise UnsupportedDtype(
            "zarr does not have this type", path=path, variable=name, found=str(array.dtype), hint="convert it first"
        )
    parts = name.split("/")
    if any(part in ("", ".", "..", V3) or part.startswith(("__", ".z")) or "\0" in part for part in parts):
        raise InvalidName("zarr reserves such names", path=path, variable=name, hint="rename it")
    above = ["/".join(parts[:depth]) for depth in range(1, len(parts))]
    if taken := [prefix for prefix in above if prefix in arrays]:
        raise InvalidName(
            "the name is below that of an array",
            path=path,
            variable=name,
            found=repr(taken[0]),
            hint="rename one of them",
        )
