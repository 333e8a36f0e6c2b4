"""The one table of decoders, with a row for each row of `varstore.layout.encodings.ENCODINGS`."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from varstore.disk.encodings import raw, zarr
from varstore.disk.encodings.codecs import Undecodable
from varstore.disk.encodings.stored import Stored
from varstore.errors import DigestMismatch
from varstore.layout.encodings import RAW, ZARR
from varstore.layout.readable import Readable
from varstore.storage.directory import Directory

__all__ = ["READERS", "Reader", "read_part"]

Reader = Callable[[Stored, Readable, np.ndarray, int, bool], bytes]
"""Takes the open ``out``, the variable, a row of bytes to fill, the offset in the values, and whether to
hash; returns the digest of what it gave, b"" if not hashed. Raises OSError where the file ends before, and
Undecodable where what is stored cannot be decoded."""

READERS: dict[str, Reader] = {RAW.name: raw.read, ZARR.name: zarr.read}


def read_part(
    directory: Directory, stored: Stored, variable: Readable, target: np.ndarray, offset: int, *, hashed: bool
) -> bytes:
    """Fill a row of bytes with those of the values from this offset on; return their digest, b"" if not hashed.

    The directory is only named where what is stored cannot be decoded.

    Raises:
        OSError: the file ends before the row is full.
        DigestMismatch: the stored bytes cannot be decoded.
        MissingDependency: a package that decodes them is not installed.
    """
    try:
        return READERS[variable.encoding.name](stored, variable, target, offset, hashed)
    except Undecodable as error:
        raise DigestMismatch(
            "out does not hold values that can be decoded",
            path=directory.place(variable.entry.file),
            variable=variable.entry.name,
            found=str(error),
            hint="restore it from a copy; `varstore verify` lists all that is damaged",
        ) from None
