"""Check that the values of a variable can be read: everything that reading requires is known and consistent."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from varstore.errors import FormatError, SizeMismatch
from varstore.layout.dtypes import dtype_of
from varstore.layout.encodings import ENCODINGS, Encoding
from varstore.layout.manifest import Entry, known_meta
from varstore.layout.regions import Checksums
from varstore.text.hints import plural

__all__ = ["Readable", "readable"]


class Readable(NamedTuple):
    """A variable whose values can be read; only `readable` creates it.

    `dtype` is the type of the values in memory, `stored` that of the elements on disk: float32 if OneFlow wrote
    bfloat16 with four bytes per element.
    """

    entry: Entry
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    stored: np.dtype[Any]
    encoding: Encoding

    @property
    def nbytes(self) -> int:
        """The size of the values in bytes as they are read, before they are converted to `dtype`."""
        return math.prod(self.shape) * self.stored.itemsize

    @property
    def digests(self) -> bytes:
        """The xxh3-128 digest of each 16 MiB of the values as they are read; empty if no digests are known."""
        return self.entry.digests if self.encoding.is_plain else self.entry.content_digests

    @property
    def checksums(self) -> Checksums:
        """What the values can be compared with as they are read; empty if nothing is known."""
        return self.digests or self.entry.regions


def readable(entry: Entry, *, path: str) -> Readable:
    """Return an entry of the checkpoint at `path` with everything that reading its values requires.

    Raises:
        FormatError: the encoding is unknown, for example that of a later version.
        MetaError: the folder does not contain ``meta``.
        UnsupportedDtype: numpy does not have the type.
        SizeMismatch: the size of ``out`` does not match the shape and type.
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
    meta = entry.meta
    if meta is None:
        meta = known_meta(entry, path=path)  # raises
    dtype = meta.data_type.dtype
    if dtype is None:
        dtype = dtype_of(meta.data_type, path=f"{path}/{entry.folder}", variable=entry.name)  # raises
    stored = encoding.stored_dtype(meta, entry.nbytes)
    if stored is None:
        raise SizeMismatch(
            "out is not of the size that meta says",
            path=f"{path}/{entry.folder}/out",
            variable=entry.name,
            found=plural(entry.nbytes, "byte"),
            expected=f"{plural(meta.elements * dtype.itemsize, 'byte')} for {list(meta.shape)} of {dtype}",
        )
    return Readable(entry, meta.shape, dtype, stored, encoding)
