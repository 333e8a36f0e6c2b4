"""safetensors files: a JSON header with the type, shape and position of every tensor, then the bytes of all tensors.

The header is not trusted: the size of each tensor must match its shape and type, and the tensors must cover the rest of
the file without gaps or overlaps. An index file (``*.safetensors.index.json``) names the files of a model that is split
into several. A metadata entry whose value is the name of a tensor is another name of that tensor: huggingface_hub
writes such entries for tied tensors, which it stores once.

Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, BinaryIO, TypeVar

import ml_dtypes
import numpy as np

from varstore.errors import FormatError, InvalidName, SizeMismatch, UnsafeContent, UnsupportedDtype, UsageError
from varstore.formats.binary.budget import Budget
from varstore.formats.binary.packing import bits_of, pack, packed_size
from varstore.formats.binary.slices import array_of_spans, check_span
from varstore.formats.binary.source import Source, count_elements
from varstore.formats.opened import ForeignCheckpoint, LazyTable
from varstore.formats.state.flat import check_unicode, fetch_plain, flat_arrays
from varstore.layout.collector import collector_paused
from varstore.storage.appearing import replacing, replacing_set
from varstore.storage.containment import inside
from varstore.values.lazy import LazyArray

__all__ = ["INDEX_SUFFIX", "opened", "read", "read_index", "write"]

INDEX_SUFFIX = ".safetensors.index.json"

_MOST_HEADER = 100_000_000
_JSON = 32
"""The bytes of memory that a byte of a header takes at most, once it is parsed."""
_DTYPES: dict[str, np.dtype[Any]] = {
    name: np.dtype(scalar)
    for name, scalar in (
        ("BOOL", np.bool_),
        ("F4", ml_dtypes.float4_e2m1fn),
        ("F6_E2M3", ml_dtypes.float6_e2m3fn),
        ("F6_E3M2", ml_dtypes.float6_e3m2fn),
        ("U8", np.uint8),
        ("I8", np.int8),
        ("F8_E5M2", ml_dtypes.float8_e5m2),
        ("F8_E4M3", ml_dtypes.float8_e4m3fn),
        ("F8_E8M0", ml_dtypes.float8_e8m0fnu),
        ("F8_E4M3FNUZ", ml_dtypes.float8_e4m3fnuz),
        ("F8_E5M2FNUZ", ml_dtypes.float8_e5m2fnuz),
        ("I16", np.int16),
        ("U16", np.uint16),
        ("F16", np.float16),
        ("BF16", ml_dtypes.bfloat16),
        ("I32", np.int32),
        ("U32", np.uint32),
        ("F32", np.float32),
        ("C64", np.complex64),
        ("F64", np.float64),
        ("I64", np.int64),
        ("U64", np.uint64),
    )
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_BITS = {name: bits_of(dtype) for name, dtype in _DTYPES.items()}

Tensor = TypeVar("Tensor")
Place = tuple[Source, int, int, tuple[int, ...], np.dtype[Any], int]
"""Where a tensor lies: file, first byte, length, and its shape, type and the length that they need."""


def read(path: str, *, limit: int | None = None) -> ForeignCheckpoint:
    """Open one file, or an index file with the files that it names.

    Raises:
        FormatError: the header or the index is invalid.
        SizeMismatch: the tensors do not cover the file exactly.
        UnsafeContent: the index names a file outside its folder, or the tensors are out of proportion to the files.
        UnsupportedDtype: the type of a tensor is unknown.
        CheckpointNotFound: there is nothing at the path, or a file that the index names is missing.
    """
    return opened(Source(path), limit=limit)


def opened(source: Source, *, limit: int | None = None, folder: Budget | None = None) -> ForeignCheckpoint:
    """Open a file or an index file, as `read` does; `folder` is the budget of the folder that it is opened with."""
    budget = Budget.of(source, limit=limit, folder=folder)
    tensors, metadata = (_read_index if source.path.endswith(".json") else _read_file)(source, budget)
    tied = {
        name: tensors[other]
        for name, other in metadata.items()
        if name != "format" and name not in tensors and isinstance(other, str) and other in tensors
    }
    budget.announce(sum(place[5] for places in (tensors, tied) for place in places.values()))
    return ForeignCheckpoint(source.path, "safetensors", LazyTable(tensors | tied, _array), metadata, budget=budget)


def write(
    path: str,
    state: Any,
    *,
    metadata: Mapping[str, str] | None = None,
    shard_bytes: int = 5_000_000_000,
    shards: bool = False,
) -> None:
    """Write tensors to one file, or to an index and several files if `path` ends in ``.safetensors.index.json``.

    Args:
        path: the file to write; an existing one is replaced once the new one is complete. So is a set of several files:
            where the names of the new ones are taken, they have other names, until the index is replaced the old ones
            stay, and then they go.
        state: names and arrays, or nested state of arrays and numbers. Tied arrays are written once per name.
        metadata: the metadata of the file; `transformers` requires the default, ``{"format": "pt"}``.
        shard_bytes: the maximum size of the tensors in each of several files. A larger tensor has a file of its own.
        shards: write several files and their index beside `path` instead, if the tensors do not fit into one.

    Raises:
        UnsupportedDtype: the format does not have a type.
        UsageError: metadata is not text, packed values do not fill whole bytes, or a value is not an array or a
            number; see `flat_arrays`.
        InvalidName: the format reserves a name.
        StorageError: the operating system refused.
    """
    arrays = flat_arrays(state, format="safetensors")
    metadata = {"format": "pt"} if metadata is None else dict(metadata)
    if not all(isinstance(text, str) for item in metadata.items() for text in item):
        raise UsageError("metadata of a safetensors file must be text", path=path, found=metadata)
    for text in (part for item in metadata.items() for part in item):
        check_unicode(text)
    for name, array in arrays.items():
        _check_writable(path, name, array)
    parts = list(_shards(arrays, shard_bytes)) if shards or path.endswith(INDEX_SUFFIX) else [arrays]
    if path.endswith(INDEX_SUFFIX) or len(parts) > 1:
        _write_shards(path.removesuffix(INDEX_SUFFIX).removesuffix(".safetensors") + INDEX_SUFFIX, parts, metadata)
    else:
        _write_file(path, arrays, metadata)


def read_index(
    source: Source, open_part: Callable[[Source], tuple[Mapping[str, Tensor], Mapping[str, Any]]]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors in the files that an index names, and its metadata with theirs; safetensors or others.

    `open_part` returns the tensors in one of these files and its metadata. A file may hold more tensors than the index
    says, but of a name that the index gives to another file, that one's tensor is taken.

    Raises:
        FormatError: it is not an index, or a tensor is not in the file that it says.
        UnsafeContent: it names a file outside its folder.
        CheckpointNotFound: a file is missing.
    """
    path = source.path
    index = _json(source, source.bytes(0, source.size), "the index")
    weight_map, metadata = index.get("weight_map"), index.get("metadata", {})
    if not isinstance(weight_map, dict) or not isinstance(metadata, dict):
        raise FormatError("an index must have a weight_map of names and files", path=path, field="weight_map")
    for name, part in weight_map.items():
        if not isinstance(part, str) or os.path.basename(part) != part or part in ("", ".", ".."):
            raise UnsafeContent("the index names a file outside its folder", path=path, variable=name, found=repr(part))
    folder = os.path.dirname(path)
    files = {
        part: Source(inside(folder or ".", part, stated_by=path), shown=os.path.join(folder, part))
        for part in dict.fromkeys(weight_map.values())
    }
    tensors: dict[str, Tensor] = {}
    for part, file in files.items():
        own, own_metadata = open_part(file)
        metadata = {**own_metadata, **metadata}
        tensors.update((name, tensor) for name, tensor in own.items() if weight_map.get(name, part) == part)
    if missing := weight_map.keys() - tensors.keys():
        raise FormatError("the index names tensors that are not in their files", path=path, found=sorted(missing)[:5])
    return tensors, metadata


def _read_index(source: Source, budget: Budget) -> tuple[dict[str, Place], dict[str, Any]]:
    def open_part(file: Source) -> tuple[dict[str, Place], dict[str, Any]]:
        budget.include(file)
        return _read_file(file, budget)

    return read_index(source, open_part)


def _read_file(source: Source, budget: Budget) -> tuple[dict[str, Place], dict[str, Any]]:
    path = source.path
    check_span(source, (0, 8), "the length of the header")
    length = int.from_bytes(source.bytes(0, 8), "little")
    if length > min(_MOST_HEADER, source.size - 8):
        raise SizeMismatch(
            "the header is longer than the file",
            path=path,
            found=f"{length} bytes",
            expected=f"at most {min(_MOST_HEADER, source.size - 8)}",
            hint="it is not a safetensors file, or truncated",
        )
    budget.charge(_JSON * length)
    text = source.bytes(8, length)
    with collector_paused():
        header = _json(source, text, "the header")
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
            raise FormatError(
                "the metadata must be names and text", path=path, field="__metadata__", found=str(metadata)[:80]
            )
        places = {name: _place(source, name, info, 8 + length) for name, info in header.items()}
        _check_coverage(source, 8 + length, places)
    return places, metadata


def _json(source: Source, text: bytes, what: str) -> dict[str, Any]:
    try:
        value = json.loads(text.decode(), object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{what} is not valid JSON", path=source.path, found=str(error) or repr(error)) from None
    if not isinstance(value, dict) or text[:1] != b"{":
        raise FormatError(f"{what} must be a JSON object", path=source.path, found=repr(text[:20]))
    return value


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the name {twice!r} occurs twice")
    return value


def _place(source: Source, name: str, info: Any, start: int) -> Place:
    try:
        kind, shape, offsets = info["dtype"], info["shape"], info["data_offsets"]
    except (TypeError, KeyError, IndexError):
        raise FormatError(
            "the tensor must have dtype, shape and data_offsets", path=source.path, variable=name, found=str(info)[:80]
        ) from None
    dtype = _DTYPES.get(kind) if type(kind) is str else None
    if dtype is None:
        raise UnsupportedDtype(
            "the data type is unknown", path=source.path, variable=name, found=kind, expected=[*_DTYPES]
        )
    if type(shape) is not list:
        raise FormatError("must be a list", path=source.path, variable=name, field="shape", found=repr(shape))
    bits = _BITS[kind]
    count = count_elements(shape, dtype.itemsize, path=source.path, variable=name)
    if bits < 8 and count * bits % 8:
        raise FormatError(
            "the tensor does not end at a whole byte", path=source.path, variable=name, found=f"{count} values"
        )
    if type(offsets) is not list or len(offsets) != 2 or not type(offsets[0]) is type(offsets[1]) is int:
        raise FormatError(
            "must be two integers", path=source.path, variable=name, field="data_offsets", found=repr(offsets)
        )
    begin, end = offsets
    return source, start + begin, end - begin, tuple(shape), dtype, count * bits // 8


def _check_coverage(source: Source, start: int, places: Mapping[str, Place]) -> None:
    """Raise if tensors overlap, or bytes belong to no tensor, because readers could then disagree about the file."""
    position = start
    for begin, length, name in sorted((place[1], place[2], name) for name, place in places.items()):
        if begin != position or length < 0:
            problem = (
                "the bytes before it do not belong to a tensor"
                if begin > position
                else "the tensor overlaps another one"
            )
            raise FormatError(
                problem if length >= 0 else "the tensor ends before it begins",
                path=source.path,
                variable=name,
                found=f"data_offsets [{begin - start}, {begin - start + length}]",
                expected=f"a start at {position - start}",
            )
        position += length
    if position != source.size:
        raise SizeMismatch(
            "the tensors do not end at the end of the file",
            path=source.path,
            found=f"{source.size} bytes",
            expected=f"{position}",
            hint="the file is truncated, or something was appended",
        )
    for name, place in places.items():
        if place[2] != place[5]:
            _array(name, place)


def _array(name: str, place: Place) -> LazyArray:
    """Return the tensor of this place, or refuse one whose bytes are more or fewer than its shape needs."""
    source, begin, length, shape, dtype, _ = place
    return array_of_spans(source, [(begin, length)], shape, dtype, variable=name)


def _check_writable(path: str, name: str, array: LazyArray) -> None:
    if name == "__metadata__":
        raise InvalidName("safetensors reserves this name", path=path, variable=name, hint="rename it")
    if array.dtype.newbyteorder("=") not in _NAMES:
        raise UnsupportedDtype(
            "safetensors does not have this type",
            path=path,
            variable=name,
            found=str(array.dtype),
            expected=f"one of {', '.join(str(dtype) for dtype in _NAMES)}",
            hint="convert it first, or leave it out",
        )
    if int(np.prod(array.shape, dtype=object)) * bits_of(array.dtype) % 8:
        raise UsageError(
            "packed values must fill whole bytes", path=path, variable=name, found=f"{array.dtype} {list(array.shape)}"
        )


def _size(array: LazyArray) -> int:
    return packed_size(int(np.prod(array.shape, dtype=object)), array.dtype)


def _shards(arrays: Mapping[str, LazyArray], most: int) -> Iterator[dict[str, LazyArray]]:
    shard: dict[str, LazyArray] = {}
    size = 0
    for name, array in arrays.items():
        if shard and size + _size(array) > most:
            yield shard
            shard, size = {}, 0
        shard[name] = array
        size += _size(array)
    yield shard


def _write_shards(path: str, shards: list[dict[str, LazyArray]], metadata: Mapping[str, str]) -> None:
    folder, name = os.path.split(path)
    stem = name.removesuffix(INDEX_SUFFIX)

    def names_of(tag: str) -> list[str]:
        count = len(shards)
        return [f"{stem}{tag}-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]

    parts = re.compile(re.escape(stem) + r"(?:-[0-9a-f]{8})?-\d{5,}-of-\d{5,}\.safetensors")
    with replacing_set(path, parts, lambda: _listed(path)) as (file, choose, whole):
        weight_map: dict[str, str] = {}
        for shard, part in zip(shards, choose(names_of), strict=True):
            _write_file(os.path.join(folder, part), shard, metadata, whole.part)
            weight_map.update(dict.fromkeys(shard, part))
        total = sum(_size(array) for shard in shards for array in shard.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        file.write(json.dumps(index, indent=2, sort_keys=True).encode() + b"\n")


def _listed(path: str) -> set[str]:
    """Return the names of the files that an index lists, none if it cannot be read."""
    try:
        with open(path, "rb") as file:
            return {*json.load(file)["weight_map"].values()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return set()


def _write_file(
    path: str,
    arrays: Mapping[str, LazyArray],
    metadata: Mapping[str, str],
    appearing: Callable[[str], AbstractContextManager[BinaryIO]] = replacing,
) -> None:
    order = sorted(arrays.items(), key=lambda item: (-bits_of(item[1].dtype), item[0]))
    text = _header(order, metadata)
    if len(text) > _MOST_HEADER:
        raise UsageError("the header would be too long", path=path, found=f"{len(text)} bytes", expected=_MOST_HEADER)
    with appearing(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, array in order:
            file.write(pack(fetch_plain(name, array)).data)


def _header(order: Iterable[tuple[str, LazyArray]], metadata: Mapping[str, str]) -> bytes:
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for name, array in order:
        end = position + _size(array)
        dtype = _NAMES[array.dtype.newbyteorder("=")]
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return text + b" " * (-len(text) % 8)
