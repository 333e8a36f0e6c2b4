"""Read a zip file's members in place (PKWARE's APPNOTE 6.3, with zip64).

Nothing is unpacked to disk and nothing that the directory of the file states is believed: names that lead
out, members that overlap or lie outside the file, two of one name and absurd compression are refused.
CRCs are not looked at: PyTorch can be told to write wrong ones, and reads them.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np

from varstore.errors import FormatError, UnsafeContent
from varstore.formats.binary.source import Source

__all__ = ["Member", "Zip", "is_zip"]

_END = struct.Struct("<4s4H2LH")
_END64 = struct.Struct("<4sQ2H2L4Q")
_LOCATOR = struct.Struct("<4sLQL")
_ENTRY = struct.Struct("<4s4B4H3L5H2L")
_LOCAL = struct.Struct("<4s2B4HL2L2H")
_STORED, _DEFLATED = 0, 8
_CHUNK = 1 << 20
_BOMB_FROM = 1 << 26
_BOMB_RATIO = 200
_LONGEST_DIRECTORY = 1 << 28


@dataclass(frozen=True, kw_only=True, slots=True)
class Member:
    """One entry: `start` is its local header, `limit` where the next thing in the file begins."""

    name: str
    method: int
    packed: int
    size: int
    start: int
    limit: int


def is_zip(source: Source) -> bool:
    """Tell whether the file begins as a zip file does."""
    return source.size >= _END.size and source.bytes(0, 4) in (b"PK\3\4", b"PK\5\6")


class Zip:
    """A zip file that lies in `source` from `base`, `size` bytes long; `members` by name."""

    def __init__(self, source: Source, base: int = 0, size: int | None = None) -> None:
        self.source = source
        self.path = source.path
        self._base = base
        self._size = source.size - base if size is None else size
        self.members = self._members(*self._find_directory())

    def read(self, name: str, offset: int = 0, size: int | None = None) -> np.ndarray:
        """Return a range of a member's content as a new array of uint8.

        Raises:
            FormatError: there is no such member, it is damaged, or the range is not within it.
        """
        member = self.members.get(name)
        if member is None:
            self._fail("this part of the file is missing", name)
        size = member.size - offset if size is None else size
        if offset < 0 or size < 0 or offset + size > member.size:
            self._fail("more is asked of this part than it holds", name, found=f"{offset} + {size} of {member.size}")
        start = self._content(member)
        if member.method == _STORED:
            return self.source.read(start + offset, size)
        return self._inflate(member, start, offset, size)

    def _content(self, member: Member) -> int:
        header = self._unpack(_LOCAL, member.start, b"PK\3\4", member.name)
        start: int = member.start + _LOCAL.size + header[-2] + header[-1]
        if start + member.packed > member.limit:
            self._fail("this part reaches into what follows it", member.name)
        return self._base + start

    def _inflate(self, member: Member, start: int, offset: int, size: int) -> np.ndarray:
        if member.size > _BOMB_FROM and member.size > _BOMB_RATIO * member.packed:
            self._fail("this part is a bomb", member.name, found=f"{member.packed} bytes for {member.size}")
        values = np.empty(size, np.uint8)
        inflater = zlib.decompressobj(-zlib.MAX_WBITS)
        done, position, end = 0, start, start + member.packed
        pending = b""
        while done < offset + size:
            if not pending and position < end:
                count = min(_CHUNK, end - position)
                pending = self.source.bytes(position, count)
                position += count
            try:
                piece = inflater.decompress(pending, min(_CHUNK, offset + size - done))
            except zlib.error as error:
                self._fail("this part is damaged", member.name, found=str(error))
            if not piece and not inflater.unconsumed_tail and position >= end:
                self._fail("this part ends early", member.name, found=done, expected=member.size)
            pending = inflater.unconsumed_tail
            wanted = piece[max(offset - done, 0) :]
            first = max(done - offset, 0)
            values[first : first + len(wanted)] = np.frombuffer(wanted, np.uint8)
            done += len(piece)
        return values

    def _find_directory(self) -> tuple[int, int, int]:
        """Return the directory's offset, size and number of entries."""
        tail = min(self._size, _END.size + 0xFFFF)
        text = self.source.bytes(self._base + self._size - tail, tail)
        at = text.rfind(b"PK\5\6")
        if at < 0 or len(text) - at < _END.size:
            self._fail("the zip file has no directory at its end: it is torn, or no zip file")
        *_, count, size, offset, _comment = _END.unpack_from(text, at)
        end = self._size - tail + at
        if text[: at - _LOCATOR.size + 4].endswith(b"PK\6\7"):  # torch always writes the wide form as well
            _, _, end, _ = self._unpack(_LOCATOR, end - _LOCATOR.size, b"PK\6\7")
            *_, count, size, offset = self._unpack(_END64, end, b"PK\6\6")
        if offset + size != end or size > _LONGEST_DIRECTORY:
            self._fail("the zip file's directory is not where its end says", found=f"{offset} + {size}", expected=end)
        return offset, size, count

    def _members(self, offset: int, size: int, count: int) -> dict[str, Member]:
        text = self.source.bytes(self._base + offset, size)
        found: list[dict[str, Any]] = []
        ends: list[int] = []
        at = 0
        while at < size:
            if size - at < _ENTRY.size or text[at : at + 4] != b"PK\1\2":
                self._fail("the zip file's directory is damaged")
            entry = _ENTRY.unpack_from(text, at)
            flags, method, packed, unpacked = entry[5], entry[6], entry[10], entry[11]
            name_size, extra_size, comment_size, start = entry[12], entry[13], entry[14], entry[-1]
            at += _ENTRY.size
            name = text[at : at + name_size].decode("utf-8" if flags & 0x800 else "cp437", "replace")
            extra = text[at + name_size : at + name_size + extra_size]
            unpacked, packed, start = self._wide(extra, [unpacked, packed, start], name)
            at += name_size + extra_size + comment_size
            self._check_entry(name, flags, method, packed, unpacked)
            found.append({"name": name, "method": method, "packed": packed, "size": unpacked, "start": start})
            ends.append(start + _LOCAL.size + name_size + packed)
        if at != size or len(found) != count:
            self._fail("the zip file's directory is damaged", found=f"{len(found)} entries", expected=count)
        return self._disjoint(found, ends, offset)

    def _wide(self, extra: bytes, fields: list[int], name: str) -> list[int]:
        """Replace the fields that zip64 keeps in the extra part."""
        wide = [index for index, value in enumerate(fields) if value == 0xFFFFFFFF]
        at = 0
        while wide and len(extra) - at >= 4:
            kind, size = struct.unpack_from("<2H", extra, at)
            at += 4
            if kind == 1 and size >= 8 * len(wide) and len(extra) - at >= 8 * len(wide):
                for index, value in zip(wide, struct.unpack_from(f"<{len(wide)}Q", extra, at), strict=True):
                    fields[index] = value
                return fields
            at += size
        if wide:
            self._fail("this part's size is missing", name)
        return fields

    def _check_entry(self, name: str, flags: int, method: int, packed: int, size: int) -> None:
        parts = name.removesuffix("/").split("/")
        if "\\" in name or "\0" in name or any(part in ("", ".", "..") for part in parts) or name[1:2] == ":":
            raise UnsafeContent("the zip file has a name that leads out of it", path=self.path, found=repr(name[:100]))
        if flags & 1 or method not in (_STORED, _DEFLATED):
            self._fail("this part is encrypted or packed in a way that is not read", name, found=f"method {method}")
        if method == _STORED and packed != size:
            self._fail("this part is stored, yet two sizes are given", name, found=f"{packed} and {size}")

    def _disjoint(self, found: list[dict[str, Any]], ends: list[int], limit: int) -> dict[str, Member]:
        members: dict[str, Member] = {}
        for entry, end in sorted(zip(found, ends, strict=True), key=lambda pair: -int(pair[0]["start"])):
            name = entry["name"]
            if end > limit:
                raise UnsafeContent("parts of the zip file overlap or lie outside it", path=self.path, field=name[:100])
            if name in members:
                raise UnsafeContent("two parts of the zip file have one name", path=self.path, field=name[:100])
            members[name] = Member(limit=limit, **entry)
            limit = entry["start"]
        return dict(reversed(members.items()))

    def _unpack(self, form: struct.Struct, offset: int, magic: bytes, name: str | None = None) -> tuple[Any, ...]:
        if offset < 0 or offset + form.size > self._size:
            self._fail("the zip file is torn", name)
        fields = form.unpack(self.source.bytes(self._base + offset, form.size))
        if fields[0] != magic:
            self._fail("the zip file is damaged", name, found=f"{fields[0]!r} at byte {offset}", expected=repr(magic))
        return fields

    def _fail(self, problem: str, name: str | None = None, **facts: Any) -> NoReturn:
        raise FormatError(problem, path=self.path, field=name and name[:100], **facts)
