"""Copy a file, or a zip archive, with other bytes in some places, as long as the old ones.

All other bytes stay as they are. In an archive, the checksums of members that change are corrected where they stand: in
the header of the member, in the descriptor that may follow its content, and in the directory at the end.
"""

from __future__ import annotations

import struct
import zipfile
import zlib
from collections.abc import Callable, Mapping
from typing import BinaryIO

import numpy as np

from varstore.errors import FormatError
from varstore.formats.binary.slices import stream_of
from varstore.formats.binary.source import Source
from varstore.formats.binary.zip import Member

__all__ = ["PatchedCopy", "copy_archive"]

_CENTRAL = struct.Struct("<4s4B4H3L5H2L")
_CENTRAL_MAGIC, _DESCRIPTOR = b"PK\1\2", b"PK\7\10"
_FLAGS_AT, _LOCAL_CRC, _CENTRAL_CRC = 6, 14, 16
_CRC_FOLLOWS = 8
_PIECE = 1 << 24


def copy_archive(
    file: BinaryIO,
    source: Source,
    members: Mapping[str, Member],
    contents: Mapping[str, Callable[[np.ndarray], np.ndarray]],
) -> None:
    """Write an archive to a new file.

    Args:
        file: where to write.
        source: the archive.
        members: its members, as `archive_members` returns them.
        contents: functions that change the content of a member, an array of uint8, and return it.

    Raises:
        FormatError: a member is compressed, or the archive is damaged.
    """
    with stream_of(source) as stream, zipfile.ZipFile(stream) as archive:
        infos, directory = archive.infolist(), archive.start_dir
    is_checked = any(info.CRC for info in infos)
    copy = PatchedCopy(file, source)
    sums: dict[str, bytes] = {}
    for info in sorted(infos, key=lambda info: info.header_offset):
        if info.filename not in contents:
            continue
        member = members[info.filename]
        if not member.is_plain:
            raise FormatError("a member that is to be changed is compressed", path=source.path, field=info.filename)
        start, size = member.span
        content = contents[info.filename](source.read(start, size))
        crc = sums[info.filename] = struct.pack("<L", zlib.crc32(content.data) if is_checked else 0)
        for at in sorted((start, *_checksums(source, info, start + size))):
            copy.replace(at, content.data if at == start else crc)
    for info in infos:
        fields = _CENTRAL.unpack(source.bytes(directory, _CENTRAL.size))
        if fields[0] != _CENTRAL_MAGIC:
            raise FormatError("the directory of the archive is damaged", path=source.path)
        if info.filename in sums:
            copy.replace(directory + _CENTRAL_CRC, sums[info.filename])
        directory += _CENTRAL.size + sum(fields[12:15])
    copy.up_to(source.size)


def _checksums(source: Source, info: zipfile.ZipInfo, end: int) -> list[int]:
    """Return where the checksum of a member is, but for the directory: in its header, or after its content, or in both.

    Where a header says that it follows the content, it need not be there, and may be in the header as well.
    """
    (flags,) = struct.unpack("<H", source.bytes(info.header_offset + _FLAGS_AT, 2))
    header = info.header_offset + _LOCAL_CRC
    if not flags & _CRC_FOLLOWS:
        return [header]
    crc = struct.pack("<L", info.CRC)
    after = source.bytes(end, min(8, source.size - end))
    found = [header] if source.bytes(header, 4) == crc else []
    return found + ([end + 4] if after == _DESCRIPTOR + crc else [end] if after.startswith(crc) else [])


class PatchedCopy:
    """A copy of a file, written from its start to its end, with some of the bytes replaced."""

    def __init__(self, file: BinaryIO, source: Source) -> None:
        self._file = file
        self._source = source
        self._at = 0

    def up_to(self, end: int) -> None:
        """Copy what comes before a position."""
        for start in range(self._at, end, _PIECE):
            self._file.write(self._source.read(start, min(_PIECE, end - start)).data)
        self._at = end

    def replace(self, start: int, content: bytes | memoryview) -> None:
        """Copy what comes before a position, and write other bytes in place of those that are there."""
        self.up_to(start)
        self._file.write(content)
        self._at = start + len(content)
