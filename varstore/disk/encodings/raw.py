"""The encoding ``raw``: ``out`` is the values, so an offset in one is an offset in the other."""

from __future__ import annotations

import numpy as np

from varstore.disk.blocks import read_block
from varstore.disk.encodings.stored import Stored
from varstore.layout.readable import Readable

__all__ = ["read"]


def read(stored: Stored, _variable: Readable, target: np.ndarray, offset: int, hashed: bool) -> bytes:
    """Fill a row of bytes with those of the values from this offset on; see `varstore.disk.encodings.table`."""
    return read_block(stored.fd, target, offset, hashed=hashed)
