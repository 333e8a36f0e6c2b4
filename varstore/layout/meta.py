"""Encode and parse the text of a ``meta`` file: shape and data type (FORMAT F2).

The canonical form is the output of protobuf's text printer. It is written from a template and recognised by a regular
expression, because importing and calling protobuf takes much longer. Every other legal spelling goes through protobuf's
parser. A property test checks that both ways agree.
"""

from __future__ import annotations

import math
import re
from functools import lru_cache
from typing import NamedTuple

from varstore.errors import MetaError
from varstore.layout.dtypes import BY_NAME, BY_NUMBER, DataType
from varstore.layout.pointers import FETCH, is_pointer
from varstore.text.hints import plural

__all__ = ["META_LIMIT", "Meta", "encode_meta", "parse_meta", "shape_problem"]

META_LIMIT = 1 << 20
"""The maximum size of a ``meta`` file in bytes; a larger one is refused without reading it."""

_SIZE_LIMIT = 1 << 63
_NDIM_LIMIT = 64  # as in numpy

_CANONICAL = re.compile(rb"shape \{\n((?:  dim: (?:0|[1-9][0-9]{0,18})\n)*)\}\ndata_type: (k[A-Za-z0-9]+)\n\Z")
_EXTENT = re.compile(rb"[0-9]+")


class Meta(NamedTuple):
    """The content of a ``meta`` file."""

    shape: tuple[int, ...]
    data_type: DataType

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@lru_cache(maxsize=4096)
def encode_meta(meta: Meta) -> bytes:
    """Return the canonical text, byte for byte as protobuf's text printer and OneFlow write it."""
    dims = "".join([f"  dim: {extent}\n" for extent in meta.shape])
    return f"shape {{\n{dims}}}\ndata_type: {meta.data_type.name}\n".encode()


def parse_meta(text: bytes, *, path: str) -> Meta:
    """Return the shape and data type in a ``meta`` file, in any legal spelling; without a ``shape``, it is 0-d.

    Raises:
        MetaError: the text is not UTF-8, a field is unknown or repeated, a dimension is negative, the dimensions
            overflow, or the data type is missing or unknown. The message contains `path`.
    """
    match = _CANONICAL.match(text)
    if match is not None and (row := BY_NAME.get(match[2].decode())) is not None:
        return _checked(tuple(map(int, _EXTENT.findall(match[1]))), row, path)
    if is_pointer(text):
        raise MetaError("this is a pointer of Git LFS, not a meta", path=path, hint=FETCH)
    return _checked(*_parse_any_spelling(text, path), path)


def shape_problem(meta: Meta) -> str | None:
    """Return what is wrong with a shape that was read from disk, or None if an array can have this shape."""
    if len(meta.shape) > _NDIM_LIMIT:
        return f"too many dimensions: found {len(meta.shape)}, expected at most {_NDIM_LIMIT}"
    if any(extent < 0 for extent in meta.shape):
        return f"a dimension is negative: found {list(meta.shape)}"
    itemsize = 1 if meta.data_type.dtype is None else meta.data_type.dtype.itemsize
    if math.prod(extent for extent in meta.shape if extent) * itemsize >= _SIZE_LIMIT:
        found = f"{list(meta.shape)} of {plural(itemsize, 'byte')} each"
        return f"the dimensions overflow: found {found}, expected less than 2^63 bytes"
    return None


def _checked(shape: tuple[int, ...], row: DataType, path: str) -> Meta:
    meta = Meta(shape=shape, data_type=row)
    problem = shape_problem(meta)
    if problem is not None:
        raise MetaError(problem, path=path, field="shape")
    return meta


def _parse_any_spelling(text: bytes, path: str) -> tuple[tuple[int, ...], DataType]:
    from google.protobuf import text_format

    from varstore._gen import variable_meta_pb2

    try:
        message = text_format.Parse(text.decode("utf-8"), variable_meta_pb2.VariableMeta())
    except UnicodeDecodeError as error:
        raise MetaError("not UTF-8 text", path=path, found=f"byte {text[error.start]:#04x} at {error.start}") from error
    except text_format.ParseError as error:
        raise MetaError(
            "not a description of a variable",
            path=path,
            found=str(error),
            expected="protobuf text such as 'shape { dim: 2 dim: 3 } data_type: kFloat'",
        ) from error
    if message.data_type not in BY_NUMBER:
        raise MetaError("the data type is missing", path=path, field="data_type", expected="a name such as kFloat")
    return tuple(message.shape.dim), BY_NUMBER[message.data_type]
