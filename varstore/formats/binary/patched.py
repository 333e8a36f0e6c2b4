"""Copy a file, or a zip archive, with other bytes in some places, as long as the old ones.

All other bytes stay as they are. In an archive, the checksums of members that change are corrected where they stand: in
the header of the member, in the descriptor that may follow its content, and in the directory at the end. A member that
is an archive itself is corrected with what changes in it.
"""

from __future__ import annotations

import struct
import zipfile
import zlib
from collections.abc import Callable, Mapping
from typing import BinaryIO, Protocol

import numpy as np

from varstore.errors import FormatError
from varstore.formats.binary.slices import stream_of
from varstore.formats.binary.source import Source
from varstore.formats.binary.zip import Member, Window, archive_members

__all__ = ["Change", "PatchedCopy", "copy_archive"]

Change = Callable[[np.ndarray], np.ndarray]
"""Changes the content of a member, an array of uint8, and returns it."""

_CENTRAL = struct.Struct("<4s4B4H3L5H2L")
_CENTRAL_MAGIC, _DESCRIPTOR = b"PK\1\2", b"PK\7\10"
_FLAGS_AT, _LOCAL_CRC, _CENTRAL_CRC = 6, 14, 16
_CRC_FOLLOWS = 8
_PIECE = 1 << 24


def copy_archive(file: BinaryIO, source: Source, changes: Mapping[Member, Change]) -> None:
    """Write an archive to a new file.

    Args:
        file: where to write.
        source: the archive.
        changes: what changes members of the archive, or of archives that are members of it.

    Raises:
        FormatError: a member is compressed, or the archive is damaged.
    """
    copy = PatchedCopy(file, source)
    _change(copy, source, (0, source.size), changes)
    copy.up_to(source.size)


def _change(copy: PatchedCopy, source: Source, span: tuple[int, int], changes: Mapping[Member, Change]) -> None:
    """Copy the archive that lies in a span of the file, up to the last byte that changes."""
    base, size = span
    members = archive_members(source, base, size)
    own = {member.name: change for member, change in changes.items() if member.base == base}
    nested = {member.base for member in changes} - {base}
    with stream_of(Window(source, base, size)) as stream, zipfile.ZipFile(stream) as archive:
        infos, directory = archive.infolist(), base + archive.start_dir
    is_checked = any(info.CRC for info in infos)
    sums: dict[str, bytes] = {}
    for info in sorted(infos, key=lambda info: info.header_offset):
        member = members.get(info.filename)
        if member is None or not (info.filename in own or (nested and member.span[0] in nested)):
            continue
        if not member.is_plain:
            raise FormatError("a member that is to be changed is compressed", path=source.path, field=info.filename)
        start, length = member.span
        content = own[info.filename](source.read(start, length)) if info.filename in own else None
        found = _sum_of(source, member.span, changes) if content is None else zlib.crc32(content.data)
        crc = sums[info.filename] = struct.pack("<L", found if is_checked else 0)
        for at in sorted((start, *_checksums(source, info, base, start + length))):
            if at != start:
                copy.replace(at, crc)
            elif content is not None:
                copy.replace(at, content.data)
            else:
                _change(copy, source, member.span, changes)
                copy.up_to(start + length)
    for info in infos:
        fields = _CENTRAL.unpack(source.bytes(directory, _CENTRAL.size))
        if fields[0] != _CENTRAL_MAGIC:
            raise FormatError("the directory of the archive is damaged", path=source.path)
        if info.filename in sums:
            copy.replace(directory + _CENTRAL_CRC, sums[info.filename])
        directory += _CENTRAL.size + sum(fields[12:15])


def _sum_of(source: Source, span: tuple[int, int], changes: Mapping[Member, Change]) -> int:
    """Return the checksum that an archive within the file will have, which may stand before its first byte."""
    summed = _Summed()
    copy = PatchedCopy(summed, source, span[0])
    _change(copy, source, span, changes)
    copy.up_to(sum(span))
    return summed.crc


def _checksums(source: Source, info: zipfile.ZipInfo, base: int, end: int) -> list[int]:
    """Return where the checksum of a member is, but for the directory: in its header, or after its content, or in both.

    Where a header says that it follows the content, it need not be there, and may be in the header as well.
    """
    (flags,) = struct.unpack("<H", source.bytes(base + info.header_offset + _FLAGS_AT, 2))
    header = base + info.header_offset + _LOCAL_CRC
    if not flags & _CRC_FOLLOWS:
        return [header]
    crc = struct.pack("<L", info.CRC)
    after = source.bytes(end, min(8, source.size - end))
    found = [header] if source.bytes(header, 4) == crc else []
    return found + ([end + 4] if after == _DESCRIPTOR + crc else [end] if after.startswith(crc) else [])


class _Writable(Protocol):
    def write(self, content: bytes | memoryview, /) -> object: ...


class _Summed:
    """Takes bytes for their checksum."""

    crc = 0

    def write(self, content: bytes | memoryview) -> None:
        self.crc = zlib.crc32(content, self.crc)


class PatchedCopy:
    """A copy of a file, written from byte `start` to its end, with some of the bytes replaced."""

    def __init__(self, file: _Writable, source: Source, start: int = 0) -> None:
        self._file = file
        self._source = source
        self._at = start

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
