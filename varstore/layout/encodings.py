"""The table of encodings: the type of the elements in ``out``, given its size, shape and data type (FORMAT F9).

The code that decodes bytes is in `varstore.disk.encodings`, which has a row for each of these.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from varstore.layout.dtypes import BFLOAT16
from varstore.layout.meta import Meta
from varstore.layout.shards import Shard

__all__ = ["ENCODINGS", "RAW", "ZARR", "Encoding", "is_plain"]

_FLOAT32 = np.dtype("<f4")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Encoding:
    """One row of the table, compared by identity.

    `stored_dtype` takes the content of ``meta`` and the size of ``out``, and returns the type of the elements in
    ``out``, or None if the size does not match. `is_plain` means that ``out`` consists of these elements in C order.
    """

    name: str
    is_plain: bool
    stored_dtype: Callable[[Meta, int], np.dtype[Any] | None]

    def __reduce__(self) -> tuple[Callable[[str], Encoding], tuple[str]]:
        return _named, (self.name,)


def _named(name: str) -> Encoding:
    return ENCODINGS[name]


@lru_cache(maxsize=4096)
def _of_plain(meta: Meta, nbytes: int) -> np.dtype[Any] | None:
    """Return the numpy type of the data type, or float32 if OneFlow wrote bfloat16 with four bytes per element."""
    dtype = meta.data_type.dtype
    if meta.data_type is BFLOAT16 and nbytes == meta.elements * _FLOAT32.itemsize != 0:
        return _FLOAT32
    return dtype if dtype is not None and nbytes == meta.elements * dtype.itemsize else None


@lru_cache(maxsize=4096)
def _of_encoded(meta: Meta, nbytes: int) -> np.dtype[Any] | None:
    """Return the numpy type of the data type; an encoded ``out`` is smaller than the values, and has an index."""
    dtype = meta.data_type.dtype
    if dtype is None or not Shard(meta.shape, dtype).index_nbytes < nbytes < meta.elements * dtype.itemsize:
        return None
    return dtype


RAW = Encoding(name="raw", is_plain=True, stored_dtype=_of_plain)
ZARR = Encoding(name="zarr", is_plain=False, stored_dtype=_of_encoded)

ENCODINGS: dict[str, Encoding] = {row.name: row for row in (RAW, ZARR)}


def is_plain(name: str) -> bool:
    """Return whether ``out`` consists of the plain values in this encoding; False for an unknown encoding."""
    row = ENCODINGS.get(name)
    return row is not None and row.is_plain
