"""The gate before a variable's values: what lets them be read is known and agrees, or an error says what does not."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from varstore.errors import FormatError, MetaError, SizeMismatch
from varstore.layout.dtypes import dtype_of
from varstore.layout.encodings import ENCODINGS, Encoding
from varstore.layout.manifest import Entry
from varstore.layout.meta import Meta

__all__ = ["Readable", "known_meta", "readable"]


class Readable(NamedTuple):
    """A variable whose values can be read; only `readable` makes one.

    `dtype` is the type of the values in memory, `stored` of the elements as they lie on the disk: float32 where
    OneFlow wrote bfloat16 in four bytes.
    """

    entry: Entry
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    stored: np.dtype[Any]
    encoding: Encoding

    @property
    def nbytes(self) -> int:
        """Bytes of the values as they are read, before they become those of `dtype`."""
        return math.prod(self.shape) * self.stored.itemsize

    @property
    def digests(self) -> bytes:
        """The xxh3-128 of each 16 MiB of the values as they are read; empty where nothing is known of them."""
        return self.entry.digests if self.encoding.is_plain else b""


def readable(entry: Entry, *, path: str) -> Readable:
    """Return an entry of the checkpoint at `path` with all that reading its values takes.

    Raises:
        FormatError: an encoding of a later version.
        MetaError: its folder has no ``meta``.
        UnsupportedDtype: a type that numpy does not have.
        SizeMismatch: ``out`` does not hold what shape and type say.
    """
    encoding = ENCODINGS.get(entry.encoding)
    if encoding is None:
        raise FormatError(
            "an encoding that this varstore cannot read",
            path=f"{path}/{entry.folder}",
            variable=entry.name,
            found=repr(entry.encoding),
            expected=" or ".join(map(repr, ENCODINGS)),
            hint="upgrade varstore",
        )
    meta = known_meta(entry, path=path)
    dtype = meta.data_type.dtype
    if dtype is None:
        dtype = dtype_of(meta.data_type, path=f"{path}/{entry.folder}", variable=entry.name)  # raises
    stored = encoding.stored_dtype(meta, entry.nbytes)
    if stored is None:
        raise SizeMismatch(
            "out is not of the size that meta says",
            path=f"{path}/{entry.folder}/out",
            variable=entry.name,
            found=f"{entry.nbytes} bytes",
            expected=f"{meta.elements * dtype.itemsize} bytes for {list(meta.shape)} of {dtype}",
        )
    return Readable(entry, meta.shape, dtype, stored, encoding)


def known_meta(entry: Entry, *, path: str) -> Meta:
    """Return a variable's shape and data type.

    Raises:
        MetaError: its folder has no ``meta``.
    """
    if entry.meta is None:
        raise MetaError(
            "the variable has no meta, so its shape and type are not known",
            path=f"{path}/{entry.folder}",
            variable=entry.name,
            hint="load it with load_variables or load_into, which take them from the target",
        )
    return entry.meta
