"""The one table of decoders, with a row for each row of `varstore.layout.encodings.ENCODINGS`."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from varstore.disk.encodings import raw
from varstore.layout.encodings import RAW
from varstore.layout.readable import Readable

__all__ = ["READERS", "Reader", "read_part"]

Reader = Callable[[int, Readable, np.ndarray, int, bool], bytes]
"""Takes the descriptor of ``out``, the variable, a row of bytes to fill, the offset in the values, and whether to
hash; returns the digest of what it gave, b"" if not hashed. Raises OSError where the file ends before."""

READERS: dict[str, Reader] = {RAW.name: raw.read}


def read_part(fd: int, variable: Readable, target: np.ndarray, offset: int, *, hashed: bool) -> bytes:
    """Fill a row of bytes with those of the values from this offset on; return their digest, b"" if not hashed.

    Raises:
        OSError: the file ends before the row is full.
    """
    return READERS[variable.encoding.name](fd, variable, target, offset, hashed)
