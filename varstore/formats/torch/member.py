"""The members of archives that PyTorch writes: uncompressed, and each at a multiple of 64 bytes."""

from __future__ import annotations

import struct
import zipfile
from typing import BinaryIO

import numpy as np

__all__ = ["ALIGNMENT", "add_member"]

ALIGNMENT = 64
_PADDING = 0x4246  # the extra field with which torch pads
_LOCAL_HEADER = 30
_WIDE_EXTRA = 20
_BLOCK = 1 << 22
_DATE = (1980, 1, 1, 0, 0, 0)


def add_member(archive: zipfile.ZipFile, file: BinaryIO, name: str, data: np.ndarray) -> None:
    """Write a member to a new archive, with bytes as its content."""
    info = zipfile.ZipInfo(name, _DATE)
    info.file_size = data.size
    wide = data.size * 1.05 > zipfile.ZIP64_LIMIT
    position = file.tell() + _LOCAL_HEADER + len(name.encode()) + (_WIDE_EXTRA if wide else 0) + 4
    fill = -position % ALIGNMENT
    info.extra = struct.pack("<2H", _PADDING, fill) + b"Z" * fill
    with archive.open(info, "w", force_zip64=wide) as member:
        for start in range(0, data.size, _BLOCK):
            member.write(data[start : start + _BLOCK].data)
