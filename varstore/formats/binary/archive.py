"""Members of an ``.npz``: stored, deflated or packed by bzip2, their checksums compared.

The directory at the archive's end is not believed: each member's own header must agree with it, members
may not overlap, names may not lead out, and no member may claim more than its compressed bytes can hold.
(`zipped` reads PyTorch's archives, whose checksums may be wrong.)
"""

from __future__ import annotations

import bz2
import io
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any

from varstore.errors import DigestMismatch, FormatError, SizeMismatch, StorageError, UnsafeContent
from varstore.formats.binary.slices import stream_of
from varstore.formats.binary.source import Source

__all__ = ["ArrayMember", "leads_out", "members", "opened"]

_LOCAL = struct.Struct("<4s5H3I2H")
_ENCRYPTED = 1
_MOST_EXPANSION = {
    zipfile.ZIP_STORED: 1,
    zipfile.ZIP_DEFLATED: 1032,  # the format's own limit: 258 bytes from two bits
    zipfile.ZIP_BZIP2: 1_500_000,
}
_SLACK = 64
_CHUNK = 1 << 16


@dataclass(frozen=True, kw_only=True, slots=True)
class ArrayMember:
    """One member; its bytes lie at `start` as they are, where `is_plain`."""

    source: Source
    info: zipfile.ZipInfo
    start: int

    @property
    def name(self) -> str:
        """Its name in the archive."""
        return self.info.filename

    @property
    def size(self) -> int:
        """Bytes once it is unpacked."""
        return self.info.file_size

    @property
    def is_plain(self) -> bool:
        """Whether it is not compressed."""
        return self.info.compress_type == zipfile.ZIP_STORED


def members(source: Source) -> list[ArrayMember]:
    """List an archive's files.

    Raises:
        FormatError: no zip archive, two members of one name, an encrypted one, or overlapping ones.
        SizeMismatch: a member that claims more than the archive holds.
        UnsafeContent: an absolute name, or one with ``..`` in it.
    """
    with stream_of(source) as file:
        try:
            with zipfile.ZipFile(file) as archive:
                infos = [info for info in archive.infolist() if not info.is_dir()]
                limit = archive.start_dir
        except StorageError:
            raise
        except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error, OverflowError, OSError) as error:
            raise FormatError("not a readable zip archive", path=source.path, found=str(error)) from error
        names: set[str] = set()
        for info in infos:
            _check_info(source, info, names)
        starts = {}
        for info in sorted(infos, key=lambda info: info.header_offset, reverse=True):
            starts[info.filename] = _start(file, source, info, limit)
            limit = info.header_offset
    return [ArrayMember(source=source, info=info, start=starts[info.filename]) for info in infos]


@contextmanager
def opened(member: ArrayMember) -> Iterator[IO[bytes]]:
    """Open one member for reading; what zlib and its like find wrong is told as the file's fault.

    Raises:
        DigestMismatch: the bytes are not those whose checksum the archive holds.
        FormatError: the compressed bytes are damaged.
    """
    where = {"path": member.source.path, "variable": member.name}
    try:
        if member.info.compress_type == zipfile.ZIP_BZIP2:
            with io.BufferedReader(_Bzip2(member), _CHUNK) as stream:
                yield stream
            return
        with stream_of(member.source) as file, zipfile.ZipFile(file) as archive, archive.open(member.info) as stream:
            yield stream
    except FormatError:
        raise
    except zipfile.BadZipFile as error:
        kind = DigestMismatch if "CRC" in str(error) else FormatError
        raise kind("damaged", found=str(error), **where) from error
    except (zlib.error, EOFError, OSError, ValueError, NotImplementedError, RuntimeError) as error:
        raise FormatError("the compressed bytes are damaged", found=str(error), **where) from error


class _Bzip2(io.RawIOBase):
    """A member packed by bzip2; zipfile would unpack whole blocks, however much comes out."""

    def __init__(self, member: ArrayMember) -> None:
        self._member = member
        self._unpacker = bz2.BZ2Decompressor()
        self._position, self._end = member.start, member.start + member.info.compress_size
        self._crc = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._unpacker.eof:
            packed = b""
            if self._unpacker.needs_input:
                packed = self._member.source.bytes(self._position, min(_CHUNK, self._end - self._position))
                if not packed:
                    raise EOFError("the packed bytes end early")
                self._position += len(packed)
            part = self._unpacker.decompress(packed, len(buffer))
            self._crc = zlib.crc32(part, self._crc)
            if part:
                buffer[: len(part)] = part
                return len(part)
        if self._crc != self._member.info.CRC:
            raise zipfile.BadZipFile(f"Bad CRC-32 {self._crc:08x}")
        return 0


def leads_out(name: str) -> bool:
    """Tell whether a member's name is one that careless tools would unpack elsewhere."""
    return name.startswith(("/", "\\")) or ".." in name.replace("\\", "/").split("/") or "\0" in name


def _check_info(source: Source, info: zipfile.ZipInfo, names: set[str]) -> None:
    name = info.filename
    if leads_out(info.orig_filename):
        raise UnsafeContent(
            "a member's name leads out of the archive", path=source.path, found=repr(info.orig_filename)
        )
    if name in names:
        raise FormatError("two members have one name", path=source.path, variable=name)
    names.add(name)
    if info.flag_bits & _ENCRYPTED:
        raise FormatError("an encrypted member", path=source.path, variable=name, hint="unpack it with its password")
    expansion = _MOST_EXPANSION.get(info.compress_type)
    if expansion is None:
        raise FormatError("unknown compression", path=source.path, variable=name, found=info.compress_type)
    if info.file_size > info.compress_size * expansion + (_SLACK if expansion > 1 else 0):
        raise SizeMismatch(
            "a member claims more bytes than its compressed ones can hold",
            path=source.path,
            variable=name,
            found=f"{info.file_size} from {info.compress_size}",
            expected=f"at most {expansion} times as many",
        )


def _start(file: IO[bytes], source: Source, info: zipfile.ZipInfo, limit: int) -> int:
    """Return where a member's bytes begin, from its own header; they must end before `limit`."""
    file.seek(max(info.header_offset, 0))
    head = file.read(_LOCAL.size)
    if info.header_offset < 0 or len(head) < _LOCAL.size or head[:4] != b"PK\3\4":
        raise FormatError("a member has no header", path=source.path, variable=info.filename)
    name_size, extra_size = _LOCAL.unpack(head)[9:]
    start: int = info.header_offset + _LOCAL.size + name_size + extra_size
    if start + info.compress_size > limit:
        raise FormatError(
            "a member overlaps what follows it",
            path=source.path,
            variable=info.filename,
            found=f"an end at {start + info.compress_size}",
            expected=f"at most {limit}",
        )
    return start
