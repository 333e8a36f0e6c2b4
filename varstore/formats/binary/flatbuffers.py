"""Parse FlatBuffers: tables, vectors and texts, of which every offset is checked before it is followed.

A table starts with the distance to its vtable, which says where its fields are and may serve many tables. A field that
is an offset leads forward, to a table, a vector or a text. Callers follow a schema, so chains are no longer than it is
deep. No two objects of a buffer share bytes, except that any number of references may lead to the same text. So all
that is visited takes at most the bytes of the buffer; offsets that lead to the same bytes again and again are an error
once that is used up.

Format: https://flatbuffers.dev/internals/
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

import numpy as np

from varstore.errors import FormatError
from varstore.formats.binary.slices import Span
from varstore.formats.binary.source import Mapped

__all__ = ["FlatBuffer", "Table", "Vector"]

_OFFSET, _DISTANCE, _SHORT = struct.Struct("<I"), struct.Struct("<i"), struct.Struct("<H")
_FIRST_FIELD = 4
"""The bytes of a table before its fields, and those of a vtable before its entries."""


class FlatBuffer:
    """The objects in a span of a file, which must lie in the file."""

    def __init__(self, data: Mapped, span: Span, path: str) -> None:
        self._data = data
        self._start, self._end = span[0], sum(span)
        self._left = span[1]
        self._path = path
        self._vtables: dict[int, tuple[int, int]] = {}
        self._texts: dict[int, str] = {}

    def root(self) -> Table:
        """Return the table that the buffer holds.

        Raises:
            FormatError: the bytes are not a FlatBuffer, here and in all that the table leads to.
        """
        return self.table(self.target(self._start))

    def unpack(self, form: struct.Struct, at: int) -> int | float:
        """Return the number at a position."""
        self._check(at, form.size)
        number: int | float = form.unpack_from(self._data, at)[0]
        return number

    def target(self, at: int) -> int:
        """Return where the offset at a position leads."""
        self._check(at, _OFFSET.size)
        (offset,) = _OFFSET.unpack_from(self._data, at)
        if not offset:
            raise self.wrong("an offset to itself", at)
        return at + int(offset)

    def table(self, at: int) -> Table:
        """Return the table at a position."""
        self._check(at, _DISTANCE.size)
        vtable = at - _DISTANCE.unpack_from(self._data, at)[0]
        if vtable not in self._vtables:
            self._check(vtable, _FIRST_FIELD)
            size, fields = (_SHORT.unpack_from(self._data, place)[0] for place in (vtable, vtable + _SHORT.size))
            if size < _FIRST_FIELD or size % _SHORT.size or fields < _FIRST_FIELD:
                raise self.wrong("a description of a table that is too short", vtable)
            self._visit(vtable, size)
            self._vtables[vtable] = size, fields
        entries, size = self._vtables[vtable]
        self._visit(at, size)
        return Table(self, at, size, vtable, entries)

    def entry(self, table: Table, field: int) -> int:
        """Return how far a field is from the start of its table, 0 if the table does not have it."""
        at = _FIRST_FIELD + field * _SHORT.size
        return int(_SHORT.unpack_from(self._data, table.vtable + at)[0]) if at < table.entries else 0

    def vector(self, at: int, width: int) -> Span:
        """Return the span of the elements of the vector at a position, each of `width` bytes."""
        self._check(at, _OFFSET.size)
        size = _OFFSET.unpack_from(self._data, at)[0] * width
        self._visit(at, _OFFSET.size + size)
        return at + _OFFSET.size, size

    def numbers(self, span: Span) -> np.ndarray:
        """Return the integers of four bytes in a span that `vector` returned, as they lie in the file."""
        return np.frombuffer(self._data, "<u4", span[1] // _OFFSET.size, span[0])

    def text(self, at: int) -> str:
        """Return the text at a position."""
        if at not in self._texts:
            start, size = self.vector(at, 1)
            try:
                self._texts[at] = self._data[start : start + size].decode()
            except UnicodeDecodeError:
                raise self.wrong("a text that is not UTF-8", at) from None
        return self._texts[at]

    def wrong(self, found: str, at: int) -> FormatError:
        """Return the error that says that the bytes at a position are not those of a FlatBuffer."""
        return FormatError(
            "this is not a FlatBuffer",
            path=self._path,
            found=f"{found}, at byte {at}",
            hint="the file is truncated, damaged, or of another format",
        )

    def _check(self, at: int, size: int) -> None:
        if at < self._start or at + size > self._end:
            raise self.wrong(f"{size} bytes outside the buffer", at)

    def _visit(self, at: int, size: int) -> None:
        """Pay for an object that is looked at."""
        self._check(at, size)
        self._left -= size
        if self._left < 0:
            raise self.wrong("more objects than the file has bytes for", at)


class Table:
    """A table; its fields are numbered as the schema lists them, and a union takes two numbers."""

    __slots__ = ("_at", "_buffer", "_size", "entries", "vtable")

    def __init__(self, buffer: FlatBuffer, at: int, size: int, vtable: int, entries: int) -> None:
        self._buffer = buffer
        self._at, self._size = at, size
        self.vtable, self.entries = vtable, entries

    def number(self, field: int, form: str, default: int = 0) -> int | float:
        """Return a field that is a number in a form of `struct`."""
        packed = struct.Struct(f"<{form}")
        at = self._place(field, packed.size)
        return self._buffer.unpack(packed, at) if at else default

    def table(self, field: int) -> Table | None:
        """Return a field that is a table."""
        at = self._place(field, _OFFSET.size)
        return self._buffer.table(self._buffer.target(at)) if at else None

    def tables(self, field: int) -> Vector:
        """Return a field that is a vector of tables."""
        return Vector(self._buffer, self._elements(field, _OFFSET.size) or (0, 0))

    def numbers(self, field: int) -> np.ndarray:
        """Return a field that is a vector of uint32, without a copy: strangers' files may say that it is long."""
        return self._buffer.numbers(self._elements(field, _OFFSET.size) or (0, 0))

    def content(self, field: int) -> Span | None:
        """Return the span in the file of a field that is a vector of bytes."""
        return self._elements(field, 1)

    def text(self, field: int) -> str:
        """Return a field that is a text, empty if there is none."""
        at = self._place(field, _OFFSET.size)
        return self._buffer.text(self._buffer.target(at)) if at else ""

    def _elements(self, field: int, width: int) -> Span | None:
        at = self._place(field, _OFFSET.size)
        return self._buffer.vector(self._buffer.target(at), width) if at else None

    def _place(self, field: int, size: int) -> int:
        """Return where a field is, 0 if the table does not have it."""
        offset = self._buffer.entry(self, field)
        if offset and not _FIRST_FIELD <= offset <= self._size - size:
            raise self._buffer.wrong(f"a field {field} outside its table", self._at)
        return offset and self._at + offset


class Vector:
    """A vector of tables, which are parsed when they are asked for."""

    __slots__ = ("_buffer", "_span")

    def __init__(self, buffer: FlatBuffer, span: Span) -> None:
        self._buffer = buffer
        self._span = span

    def __len__(self) -> int:
        return self._span[1] // _OFFSET.size

    def __getitem__(self, index: int) -> Table:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self._buffer.table(self._buffer.target(self._span[0] + index * _OFFSET.size))

    def __iter__(self) -> Iterator[Table]:
        return (self[index] for index in range(len(self)))
