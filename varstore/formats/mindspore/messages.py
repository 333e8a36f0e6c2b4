"""MindSpore's ``.ckpt`` files: a sequence of Checkpoint messages, each with a slice of one parameter.

::

    Checkpoint  {repeated Value value = 1}
    Value       {required string tag = 1; oneof {TensorProto tensor = 2; MapTensorProto maptensor = 3}}
    TensorProto {repeated int64 dims = 1; required string tensor_type = 2; required bytes tensor_content = 3}

Consecutive values with the same tag are slices of one tensor; if a tag occurs again later, the last occurrence counts.
``dims: 0`` alone means a scalar. The messages may be followed by ``crc_num`` and their CRC-32. MindSpore silently
accepts content that is too short or too long; this reader refuses both.

Source: https://github.com/mindspore-ai/mindspore, files mindspore/ccsrc/utils/checkpoint.proto and
mindspore/python/mindspore/train/serialization.py
"""

from __future__ import annotations

import itertools
import os
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from varstore.errors import DigestMismatch, FormatError, UnsupportedDtype, UsageError
from varstore.formats.binary.budget import ARRAY, Budget
from varstore.formats.binary.slices import Content, Span, array_of_spans, refused_array, stream_of
from varstore.formats.binary.source import MOST_DIMENSIONS, Source
from varstore.formats.binary.wire import BYTES, Wire, bytes_field, bytes_head, int_field
from varstore.formats.mindspore.cipher import decrypted, is_encrypted
from varstore.formats.mindspore.program import SUFFIX, is_program, read_program, write_program
from varstore.formats.opened import ForeignCheckpoint
from varstore.formats.state.flat import check_unicode, fetch_plain, flat_arrays
from varstore.storage.appearing import replacing
from varstore.values.lazy import LazyArray

__all__ = ["read", "write"]

_TAG, _TENSOR, _MAP = 1, 2, 3
_DIMS, _TYPE, _CONTENT = 1, 2, 3
_TEXT = "str"
_LOADABLE: dict[str, np.dtype[Any]] = {
    name: np.dtype(scalar)
    for name, scalar in (
        ("Bool", np.bool_),
        ("Int8", np.int8),
        ("UInt8", np.uint8),
        ("Int16", np.int16),
        ("UInt16", np.uint16),
        ("Int32", np.int32),
        ("UInt32", np.uint32),
        ("Int64", np.int64),
        ("UInt64", np.uint64),
        ("Float16", np.float16),
        ("Float32", np.float32),
        ("Float64", np.float64),
        ("BFloat16", ml_dtypes.bfloat16),
    )
}
_NAMES = {dtype: name for name, dtype in _LOADABLE.items()}
_DTYPES = _LOADABLE | {
    "Int4": np.dtype(np.int8),  # two values per byte, which MindSpore itself returns as int8
    "Complex64": np.dtype(np.complex64),
    "Complex128": np.dtype(np.complex128),
    "Float8E4M3FN": np.dtype(ml_dtypes.float8_e4m3fn),
    "Float8E5M2": np.dtype(ml_dtypes.float8_e5m2),
    **{name.lower(): dtype for name, dtype in _LOADABLE.items()},  # as in map parameters
}
_CRC_MARK, _CRC_TAIL = b"crc_num", 17
_SLICE = 512 << 20
_MOST_PARTS = 8
_HEAD = 512
_STEP = 1 << 22


@dataclass(kw_only=True, slots=True)
class _Tensor:
    dims: list[int] = field(default_factory=list)
    type: str = ""
    spans: list[Span] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Value:
    tag: str
    tensors: list[_Tensor]
    is_map: bool


def read(
    path: str, *, key: bytes | None = None, crc_check: bool = False, limit: int | None = None
) -> ForeignCheckpoint:
    """Open a checkpoint, or the parameters of a program; an encrypted checkpoint is decrypted into memory.

    Parameters that are text are in ``state()``; a map parameter is a list of its keys, values and statuses.

    Args:
        path: the file.
        key: the key of an encrypted file: 16, 24 or 32 bytes.
        crc_check: read the whole file once and compare its CRC-32, if it has one.
        limit: see `varstore.read`.

    Raises:
        UnsafeContent: the file is out of proportion to its size.
        FormatError, SizeMismatch: the messages are not what MindSpore writes.
        DigestMismatch: the CRC-32 does not match, or the key is wrong.
        UsageError: the file is encrypted, and there is no key or one of a wrong length.
        MissingDependency: the file is encrypted, and the package `cryptography` is not installed.
        CheckpointNotFound: there is nothing at the path.
    """
    source = Source(path)
    budget = Budget(path, source.size, limit=limit)
    if is_program(source.bytes(0, min(_HEAD, source.size))):
        return read_program(source, budget)
    content: Content = decrypted(source, key) if is_encrypted(source) else source
    size = content.size
    attributes = {}
    if size >= _CRC_TAIL:
        tail = content.read(size - _CRC_TAIL, _CRC_TAIL).tobytes()
        if tail.startswith(_CRC_MARK):
            size -= _CRC_TAIL
            attributes["crc_num"] = int.from_bytes(tail[len(_CRC_MARK) :], "big")
            if crc_check:
                _check_crc(content, size, attributes["crc_num"])
    with stream_of(content) as stream:
        tree = _tree(Wire(stream, path), content, size, budget)
    return ForeignCheckpoint(path, "mindspore", tree, attributes, budget=budget)


def write(path: str, state: Any, *, model: str | os.PathLike[str] | None = None) -> None:
    """Write a file that `mindspore.load_checkpoint` reads; MindSpore requires a name that ends in ``.ckpt``.

    Values of the outermost mapping may be text. 0-d arrays become scalars. A path that ends in ``.mindir`` gets a copy
    of the program `model` with other values: see `write_program`.

    Raises:
        UnsupportedDtype: MindSpore cannot load a type.
        UsageError: an array has the shape (0,), which the format cannot distinguish from a scalar, or a value is not an
            array or a number, see `flat_arrays`; or one of `path` and `model` is a program's and the other is not.
        StorageError: the operating system refused.
    """
    is_program = path.endswith(SUFFIX)
    if is_program and model is not None:
        write_program(path, state, os.fspath(model))
        return
    if is_program or model is not None:
        raise UsageError(
            "a program can only be written as a copy of one with other values",
            path=path,
            hint="pass the program: write('copy.mindir', values, model='original.mindir')",
        )
    texts = {}
    if isinstance(state, Mapping) and not isinstance(state, ForeignCheckpoint):
        texts = {str(name): value for name, value in state.items() if isinstance(value, str)}
        state = {name: value for name, value in state.items() if not isinstance(value, str)}
    arrays = flat_arrays(state, format="MindSpore")
    for name, array in arrays.items():
        if array.dtype.newbyteorder("=") not in _NAMES:
            raise UnsupportedDtype(
                "MindSpore cannot load this type",
                path=path,
                variable=name,
                found=str(array.dtype),
                expected=f"one of {', '.join(str(dtype) for dtype in _NAMES)}",
                hint="convert it first, or leave it out",
            )
        if array.shape == (0,):
            raise UsageError(
                "the format cannot distinguish an empty vector from a scalar",
                path=path,
                variable=name,
                hint="leave it out",
            )
    for name, text in texts.items():
        check_unicode(name)
        check_unicode(text)
    with replacing(path) as file:
        for name, array in arrays.items():
            _write_array(file, name, array)
        for name, text in texts.items():
            raw = np.frombuffer((text or "\0").encode("utf-32-le"), np.uint8)
            _write_slice(file, name, (0,), _TEXT, raw)


def _check_crc(content: Content, size: int, expected: int) -> None:
    crc = 0
    for start in range(0, size, _STEP):
        crc = zlib.crc32(content.read(start, min(_STEP, size - start)).data, crc)
    if crc != expected:
        raise DigestMismatch(
            "the bytes are not those that were written",
            path=content.path,
            found=f"CRC-32 {crc:08x}",
            expected=f"{expected:08x}",
            hint="the file is damaged",
        )


def _tree(wire: Wire, content: Content, size: int, budget: Budget) -> dict[str, Any]:
    merged: dict[str, _Value] = {}
    previous = None
    for value in _values(wire, size, budget):
        if value.tag == previous and value.is_map == merged[value.tag].is_map:
            _append(content.path, merged[value.tag], value)
        else:
            merged.pop(value.tag, None)
            merged[value.tag] = value
        previous = value.tag
    tree: dict[str, Any] = {}
    for tag, value in merged.items():
        leaves = [_leaf(content, tag, tensor, is_map=value.is_map) for tensor in value.tensors]
        tree[tag] = leaves if value.is_map else leaves[0]
    return tree


def _append(path: str, value: _Value, piece: _Value) -> None:
    """Append a slice to a parameter; slices of a map parameter are joined along the first axis."""
    if len(value.tensors) != len(piece.tensors):
        raise FormatError("slices of one parameter differ in shape or type", path=path, variable=value.tag)
    for tensor, part in zip(value.tensors, piece.tensors, strict=True):
        is_row = value.is_map and tensor.dims and part.dims
        alike = tensor.dims[1:] == part.dims[1:] if is_row else tensor.dims == part.dims
        if tensor.type != part.type or not alike:
            raise FormatError(
                "slices of one parameter differ in shape or type",
                path=path,
                variable=value.tag,
                found=f"{part.type} {part.dims}",
                expected=f"{tensor.type} {tensor.dims}",
            )
        tensor.spans += part.spans
        if is_row:
            tensor.dims[0] += part.dims[0]


def _values(wire: Wire, size: int, budget: Budget) -> Iterator[_Value]:
    for outer in wire.fields((0, size), "Checkpoint"):
        if outer.number != 1 or outer.kind != BYTES:
            continue
        budget.charge(ARRAY)
        tag, tensors, is_map = None, None, False
        for inner in wire.fields(outer.span, "Value"):
            if inner.number == _TAG:
                tag = wire.text(inner, "Value")
            elif inner.number == _TENSOR and inner.kind == BYTES:
                tensors, is_map = [_tensor(wire, inner.span)], False
            elif inner.number == _MAP and inner.kind == BYTES:
                parts = wire.fields(inner.span, "MapTensorProto")
                spans = (part.span for part in parts if part.kind == BYTES)
                tensors, is_map = [_tensor(wire, span) for span in itertools.islice(spans, _MOST_PARTS + 1)], True
                if len(tensors) > _MOST_PARTS:
                    raise wire.wrong("MapTensorProto", inner.whole[0], f"more than {_MOST_PARTS} tensors")
        if tag is None or tensors is None:
            raise wire.wrong("Value", outer.whole[0], "no tag" if tag is None else f"no tensor for {tag!r}")
        yield _Value(tag=tag, tensors=tensors, is_map=is_map)


def _tensor(wire: Wire, span: Span) -> _Tensor:
    tensor = _Tensor()
    for part in wire.fields(span, "TensorProto"):
        if part.number == _DIMS:
            wire.add_dimensions(tensor.dims, part, "TensorProto", most=MOST_DIMENSIONS)
        elif part.number == _TYPE:
            tensor.type = wire.text(part, "TensorProto")
        elif part.number == _CONTENT and part.kind == BYTES:
            tensor.spans = [part.span]
    return tensor


def _leaf(content: Content, tag: str, tensor: _Tensor, *, is_map: bool) -> LazyArray | str:
    if tensor.type == _TEXT:
        return _text(content, tag, tensor.spans)
    shape = () if tensor.dims == [0] and not is_map else tuple(tensor.dims)
    dtype = _DTYPES.get(tensor.type)
    if dtype is None:
        error = UnsupportedDtype(
            "the type does not have a numpy equivalent",
            path=content.path,
            variable=tag,
            found=tensor.type,
            hint="leave it out",
        )
        return refused_array(shape, error)
    return array_of_spans(content, tensor.spans, shape, dtype, variable=tag)


def _text(content: Content, tag: str, spans: list[Span]) -> str:
    raw = b"".join(content.read(*span).tobytes() for span in spans)
    try:
        return raw.decode("utf-32-le").rstrip("\0")
    except UnicodeDecodeError as error:
        raise FormatError("the text is not UTF-32", path=content.path, variable=tag, found=str(error)) from None


def _write_array(file: BinaryIO, name: str, array: LazyArray) -> None:
    raw = fetch_plain(name, array).reshape(-1).view(np.uint8)
    kind = _NAMES[array.dtype.newbyteorder("=")]
    for start in range(0, max(raw.size, 1), _SLICE):
        _write_slice(file, name, array.shape or (0,), kind, raw[start : start + _SLICE])


def _write_slice(file: BinaryIO, name: str, dims: tuple[int, ...], kind: str, raw: np.ndarray) -> None:
    head = b"".join(int_field(_DIMS, extent) for extent in dims) + bytes_field(_TYPE, kind.encode())
    head += bytes_head(_CONTENT, raw.size)
    tag = bytes_field(_TAG, name.encode())
    inner = bytes_head(_TENSOR, len(head) + raw.size)
    file.write(bytes_head(1, len(tag) + len(inner) + len(head) + raw.size) + tag + inner + head)
    file.write(raw.data)
