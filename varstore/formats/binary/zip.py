"""Read zip archives: `zipfile` parses the directory, everything that it states is checked, members are read in place.

Nothing is unpacked to disk. An archive's directory may lie, so these are refused: names that lead out of the archive,
two members with the same name, members that overlap or lie outside the archive, and members that claim to be larger
than their compressed bytes can be. Members are decompressed in pieces, so memory use depends on the bytes that exist,
not on the size that the directory states.

Format: https://pkware.cachefly.net/webdocs/casestudies/APPNOTE.TXT (version 6.3)
"""

from __future__ import annotations

import bz2
import io
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, BinaryIO, NoReturn

import numpy as np

from varstore.errors import DigestMismatch, FormatError, SizeMismatch, UnsafeContent, VarstoreError
from varstore.formats.binary.slices import stream_of
from varstore.formats.binary.source import Source
from varstore.storage.appearing import replacing

__all__ = ["LOCAL", "MAGIC", "Member", "Window", "archive_members", "is_zip", "leads_out", "new_archive"]

MAGIC = b"PK\3\4"
_EMPTY = b"PK\5\6"
LOCAL = struct.Struct("<4s5H3I2H")
_DRIVE = re.compile(r"[A-Za-z]:\Z")
_ENCRYPTED, _SIZE_FOLLOWS = 1, 8
_ZIP64 = 0xFFFFFFFF
_NO_END = "File is not a zip file"
"""What `zipfile` says of a file without the record at the end."""
_MOST_LOCAL = 10_000
_MOST_EXPANSION = {
    zipfile.ZIP_STORED: 1,
    zipfile.ZIP_DEFLATED: 1032,  # the limit of the format: 258 bytes from two bits
    zipfile.ZIP_BZIP2: 1_500_000,
}
_SLACK = 64
_FIRST_PIECE, _PIECE = 1 << 12, 1 << 20
_BOMB_FROM, _BOMB_RATIO = 1 << 26, 200
_LONGEST_SHOWN = 100


@contextmanager
def new_archive(path: str) -> Iterator[tuple[zipfile.ZipFile, BinaryIO]]:
    """Open a new archive of uncompressed members, and its file; it takes the place of `path` as `replacing` says.

    Raises:
        CheckpointExists, OutOfSpace, StorageError: see `replacing`.
    """
    with replacing(path) as file:
        placed: Any = _Placed(file)
        with zipfile.ZipFile(placed, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
            yield archive, file
        if placed.refusal is not None:
            raise placed.refusal


class _Placed:
    """A file for `zipfile`, which takes one whose position cannot be told for a stream, and does not say so."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.refusal: OSError | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def tell(self) -> int:
        return self._noted(self._file.tell)

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._noted(self._file.seek, offset, whence)

    def _noted(self, call: Callable[..., int], *arguments: int) -> int:
        try:
            return call(*arguments)
        except OSError as error:
            self.refusal = error
            raise


def is_zip(source: Source) -> bool:
    """Return whether the file starts like a zip archive."""
    return source.size >= 22 and source.bytes(0, 4) in (MAGIC, _EMPTY)


def leads_out(name: str) -> bool:
    """Return whether careless tools would unpack a member of this name outside their target directory."""
    parts = name.replace("\\", "/").split("/")
    return not parts[0] or _DRIVE.match(parts[0]) is not None or ".." in parts or "\0" in name


def archive_members(
    source: Source,
    base: int = 0,
    size: int | None = None,
    *,
    least: Callable[[], int] | None = None,
    are_paths: bool = True,
) -> dict[str, Member]:
    """Return the files of an archive by name; it starts at byte `base` of `source` and is `size` bytes long.

    `least` returns how long the archive is at least by what else is known of its content; it is called if the archive
    ends early. With `are_paths=False`, names may lead anywhere, because they are only keys.

    Raises:
        FormatError: it is not a zip archive, or a member is encrypted or compressed with an unsupported method.
        SizeMismatch: it ends early; a member claims to be larger than its compressed bytes can be.
        UnsafeContent: a name leads out of the archive, or two members overlap or have the same name.
    """
    window = Window(source, base, source.size - base if size is None else size)
    try:
        with stream_of(window) as file, zipfile.ZipFile(file) as archive:
            infos, limit = archive.infolist(), archive.start_dir
    except VarstoreError:
        raise
    except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error, OverflowError, OSError) as error:
        if window.refusal is not None:  # which zipfile takes for a sign that this is not a zip archive
            raise window.refusal from None
        if window.read(0, min(len(MAGIC), window.size)).tobytes() == MAGIC and _NO_END in str(error):
            raise _ends_early(window, least) from None
        raise FormatError("not a zip archive, or a truncated one", path=source.path, found=str(error)) from error
    members: dict[str, Member] = {}
    for info in sorted(infos, key=lambda info: info.header_offset, reverse=True):
        _check(info, source.path, are_paths=are_paths)
        if info.filename in members:
            raise UnsafeContent("two members of the archive have the same name", path=source.path, field=_short(info))
        if info.header_offset < 0 or info.header_offset + LOCAL.size + info.compress_size > limit:
            raise UnsafeContent("members overlap or lie outside the archive", path=source.path, field=_short(info))
        if not info.is_dir():
            members[info.filename] = Member(window, info, limit)
        limit = info.header_offset
    if members and limit:  # the directory of an archive within this one, which was the last that is whole
        raise _ends_early(window, least)
    return {info.filename: members[info.filename] for info in infos if info.filename in members}


def _ends_early(window: Window, least: Callable[[], int] | None) -> SizeMismatch:
    """Return the error for an archive that begins like one, and does not have the directory at its end."""
    known = _stated_size(window)
    if least is not None:
        with suppress(FormatError):  # it may end before what is known
            known = max(known, least())
    return SizeMismatch(
        "the zip archive ends early, because its directory, which comes last, is missing",
        path=window.path,
        found=f"{window.size:,} bytes",
        expected=f"more than {known:,} bytes" if known >= window.size else None,
        hint="copy or download it again",
    )


def _stated_size(window: Window) -> int:
    """Return where the last member begins or ends of which a local header states the size."""
    at = 0
    for _ in range(_MOST_LOCAL):
        if at + LOCAL.size > window.size:
            break
        magic, _, flags, *_, packed, _, name, extra = LOCAL.unpack(window.read(at, LOCAL.size).tobytes())
        start = at + LOCAL.size + name + extra
        if magic != MAGIC or flags & _SIZE_FOLLOWS or start > window.size:
            break
        if packed == _ZIP64:  # the field of the ZIP64 extension: tag, length, size, packed size
            field = window.read(start - extra, extra).tobytes()[:20]
            if len(field) < 20 or field[:2] != b"\1\0":
                break
            packed = int.from_bytes(field[12:20], "little")
        at = start + packed
    return at


class Window:
    """A part of a file, with offsets relative to its start."""

    def __init__(self, source: Source, base: int, size: int) -> None:
        self.source = source
        self.path = source.path
        self.base = base
        self.size = size
        self.refusal: OSError | None = None
        """The last error of the operating system."""

    def read(self, offset: int, size: int) -> np.ndarray:
        """Return a range as a new array of uint8."""
        try:
            return self.source.read(self.base + offset, size)
        except OSError as error:
            self.refusal = error
            raise


class Member:
    """One file of an archive; `read` returns any range of its decompressed content.

    `read` does not compare the checksum, because PyTorch has an option to write wrong ones. `open` does.
    """

    __slots__ = ("_limit", "_place", "_window", "crc", "method", "name", "packed", "path", "size")

    def __init__(self, window: Window, info: zipfile.ZipInfo, limit: int) -> None:
        self._window = window
        self._place = (info.header_offset, False)
        self._limit = limit
        self.path = window.path
        self.name = info.filename
        self.method = info.compress_type
        self.packed = info.compress_size
        self.size = info.file_size
        self.crc = info.CRC

    @property
    def base(self) -> int:
        """The position of the first byte of the archive in the file, which may hold an archive within another one."""
        return self._window.base

    @property
    def is_plain(self) -> bool:
        """Whether the content is stored uncompressed."""
        return self.method == zipfile.ZIP_STORED

    @property
    def span(self) -> tuple[int, int]:
        """The position of the compressed bytes in the file: (offset, length).

        Raises:
            FormatError: the member's local header is missing, or its bytes overlap with what follows.
        """
        return self._window.base + self._start(), self.packed

    def _start(self) -> int:
        start, is_content = self._place
        if is_content:
            return start
        header = LOCAL.unpack(self._window.read(start, LOCAL.size).tobytes())
        if header[0] != MAGIC:
            self._fail(
                "a member of the archive does not have a local header", found=repr(header[0]), expected=repr(MAGIC)
            )
        start += LOCAL.size + int(header[-2]) + int(header[-1])
        if start + self.packed > self._limit:
            self._fail("a member of the archive overlaps with what follows it")
        self._place = (start, True)
        return start

    def read(self, offset: int, size: int) -> np.ndarray:
        """Return a range of the content as a new array of uint8.

        Raises:
            FormatError: the member is damaged, or the range is not within it.
        """
        if offset < 0 or size < 0 or offset + size > self.size:
            self._fail("the range is not within the member", found=f"{offset} + {size} of {self.size}")
        if self.is_plain:
            return self._window.read(self._start() + offset, size)
        if self.size > _BOMB_FROM and self.size > _BOMB_RATIO * self.packed:
            self._fail("a member is a decompression bomb", found=f"{self.packed} bytes for {self.size}")
        values = np.empty(size, np.uint8)
        done = 0
        for piece in self._pieces():
            wanted = piece[max(offset - done, 0) : offset + size - done]
            first = max(done - offset, 0)
            values[first : first + len(wanted)] = np.frombuffer(wanted, np.uint8)
            done += len(piece)
            if done >= offset + size:
                break
        return values

    def read_checked(self, offset: int, size: int) -> np.ndarray:
        """Return a range as `read` does; if it is the whole content, it is compared with its checksum.

        Raises:
            DigestMismatch: it does not match the checksum in the archive.
            FormatError: see `read`.
        """
        values = self.read(offset, size)
        if size == self.size:
            self.check(zlib.crc32(values.data))
        return values

    def content(self) -> bytes:
        """Return the whole content.

        Raises:
            DigestMismatch: it does not match the checksum in the archive.
            FormatError: the member is damaged.
        """
        with self.open() as file:
            return file.read()

    def open(self) -> io.BufferedReader:
        """Return the decompressed content as a file that can be read once, from the start.

        Reading the end raises DigestMismatch if the content does not match the checksum in the archive.
        """
        return io.BufferedReader(_Reader(self._checked()), _FIRST_PIECE)

    def _checked(self) -> Iterator[bytes]:
        crc = 0
        for piece in self._pieces():
            crc = zlib.crc32(piece, crc)
            yield piece
        self.check(crc)

    def check(self, crc: int) -> None:
        """Compare the checksum of the whole content with that in the archive.

        Raises:
            DigestMismatch: it is another one.
        """
        if crc != self.crc:
            raise DigestMismatch(
                "the bytes are not those that were written",
                path=self.path,
                variable=self.name,
                found=f"CRC-32 {crc:08x}",
                expected=f"{self.crc:08x}",
                hint="the file is damaged",
            )

    def _pieces(self) -> Iterator[bytes]:
        """Yield the whole content, decompressed, in pieces."""
        done = 0
        try:
            for piece in _UNPACK[self.method](self._packed_pieces()):
                done += len(piece)
                if done > self.size:
                    break
                yield piece
        except (zlib.error, OSError, ValueError) as error:
            if isinstance(error, VarstoreError):
                raise
            self._fail("the compressed bytes of a member are damaged", found=str(error))
        if done != self.size:
            found = f"{done} bytes" if done < self.size else f"more than {self.size} bytes"
            self._fail("a member does not decompress to its stated size", found=found, expected=self.size)

    def _packed_pieces(self) -> Iterator[bytes]:
        at, size = self._start(), _FIRST_PIECE
        end = at + self.packed
        while at < end:
            piece = self._window.read(at, min(size, end - at)).tobytes()
            at += len(piece)
            size = _PIECE
            yield piece

    def _fail(self, problem: str, **facts: Any) -> NoReturn:
        raise FormatError(problem, path=self.path, field=self.name[:_LONGEST_SHOWN], **facts)


class _Reader(io.RawIOBase):
    """Present pieces of bytes as a file."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces = pieces
        self._left = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self._left:
            self._left = memoryview(next(self._pieces, b""))
        count = min(len(buffer), len(self._left))
        buffer[:count] = self._left[:count]
        self._left = self._left[count:]
        return count


def _inflate(packed: Iterator[bytes]) -> Iterator[bytes]:
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    for part in packed:
        piece = inflater.decompress(part, _PIECE)
        while piece:
            yield piece
            piece = inflater.decompress(inflater.unconsumed_tail, _PIECE)
        if inflater.eof:
            return


def _unpack_bzip2(packed: Iterator[bytes]) -> Iterator[bytes]:
    unpacker = bz2.BZ2Decompressor()
    for part in packed:
        piece = unpacker.decompress(part, _PIECE)
        while piece or not (unpacker.needs_input or unpacker.eof):
            yield piece
            piece = b"" if unpacker.eof else unpacker.decompress(b"", _PIECE)
        if unpacker.eof:
            return


_UNPACK: dict[int, Callable[[Iterator[bytes]], Iterator[bytes]]] = {
    zipfile.ZIP_STORED: iter,
    zipfile.ZIP_DEFLATED: _inflate,
    zipfile.ZIP_BZIP2: _unpack_bzip2,
}


def _check(info: zipfile.ZipInfo, path: str, *, are_paths: bool) -> None:
    name = info.orig_filename
    if leads_out(name) if are_paths else not name or "\0" in name:
        raise UnsafeContent(
            "the name of a member is empty or leads out of the archive", path=path, found=repr(info.orig_filename[:100])
        )
    expansion = _MOST_EXPANSION.get(info.compress_type)
    if info.flag_bits & _ENCRYPTED or expansion is None:
        raise FormatError(
            "a member of the archive is encrypted, or compressed with an unsupported method",
            path=path,
            field=_short(info),
            found=f"method {info.compress_type}",
            hint="unpack the archive, and pack it again without encryption, with method stored or deflated",
        )
    if info.file_size > info.compress_size * expansion + (_SLACK if expansion > 1 else 0):
        raise SizeMismatch(
            "a member claims to be larger than its compressed bytes can be",
            path=path,
            field=_short(info),
            found=f"{info.file_size} from {info.compress_size}",
            expected=f"at most {expansion} times as many",
        )


def _short(info: zipfile.ZipInfo) -> str:
    return info.filename[:_LONGEST_SHOWN]
