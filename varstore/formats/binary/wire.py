"""Parse and write protobuf's wire format, without loading whole messages.

The parser yields the position of each field in the file, and callers read only the fields that they need. So the cost
of opening a message depends on the number of its fields, not on its size, which may be many gigabytes. A length that
extends beyond the end of its message is an error before anything is read.

Format: https://protobuf.dev/programming-guides/encoding/
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np

from varstore.errors import FormatError
from varstore.formats.binary.slices import Span

__all__ = [
    "BYTES",
    "FIXED32",
    "FIXED64",
    "VARINT",
    "Field",
    "Wire",
    "bytes_field",
    "bytes_head",
    "int_field",
    "varints",
]

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
_WIDTH = {FIXED64: 8, FIXED32: 4}
_LONGEST = 10
_U64 = (1 << 64) - 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Field:
    """One field of a message.

    `kind` is the wire type, `value` the value of a varint. `span` is the position of the payload, `whole` that of the
    field with its key and length.
    """

    number: int
    kind: int
    value: int
    span: Span
    whole: Span

    @property
    def signed(self) -> int:
        """The value of a field of type int32 or int64."""
        return self.value - (1 << 64) if self.value >> 63 else self.value


class Wire:
    """Parse the messages in one file."""

    def __init__(self, stream: BinaryIO, path: str) -> None:
        self._stream = stream
        self._path = path

    def fields(self, span: Span, message: str) -> Iterator[Field]:
        """Yield the fields of the message in a span of the file, in order; `message` is its type, for errors.

        Raises:
            FormatError: the bytes are not a message.
        """
        position, end = span[0], sum(span)
        while position < end:
            self._stream.seek(position)
            head = self._stream.read(min(2 * _LONGEST, end - position))
            key, used = self._varint(head, 0, position, message)
            number, kind = key >> 3, key & 7
            value, start = 0, position + used
            if kind == VARINT:
                value, stop = self._varint(head, used, position, message)
                size = stop - used
            elif kind == BYTES:
                size, stop = self._varint(head, used, position, message)
                start = position + stop
            elif kind in _WIDTH:
                size = _WIDTH[kind]
            else:
                raise self.wrong(message, position, f"wire type {kind}")
            if start + size > end or not number:
                raise self.wrong(message, position, f"field {number} of {size} bytes, where {end - start} are left")
            yield Field(
                number=number, kind=kind, value=value, span=(start, size), whole=(position, start + size - position)
            )
            position = start + size

    def read(self, field: Field) -> bytes:
        """Return a field's payload."""
        self._stream.seek(field.span[0])
        return self._stream.read(field.span[1])

    def text(self, field: Field, message: str) -> str:
        """Return the payload of a string field.

        Raises:
            FormatError: the field is not a string, or not UTF-8.
        """
        if field.kind != BYTES:
            raise self.wrong(message, field.whole[0], f"wire type {field.kind} for a string")
        try:
            return self.read(field).decode()
        except UnicodeDecodeError:
            raise self.wrong(message, field.whole[0], "a string that is not UTF-8") from None

    def add_dimensions(self, found: list[int], field: Field, message: str, *, most: int) -> None:
        """Add the values of a repeated int64 field, which may be packed or not, to those of such fields before it.

        A field of more bytes than `most` values can have is refused before it is read.

        Raises:
            FormatError: the field does not contain integers, or they are more than `most` now.
        """
        if field.kind not in (VARINT, BYTES):
            raise self.wrong(message, field.whole[0], f"wire type {field.kind} for integers")
        is_short = field.span[1] <= most * _LONGEST
        values = varints(self.read(field) if is_short else b"")
        if values is None:
            raise self.wrong(message, field.whole[0], "a truncated integer")
        found += values.view(np.int64).tolist()
        if len(found) > most or not is_short:
            raise self.wrong(message, field.whole[0], f"more than {most} dimensions")

    def wrong(self, message: str, position: int, found: str) -> FormatError:
        """Return the error that says that these bytes are not a message of this type."""
        return FormatError(
            f"this is not a {message} message",
            path=self._path,
            found=f"{found}, at byte {position}",
            hint="the file is truncated, damaged, or of another format",
        )

    def _varint(self, head: bytes, start: int, position: int, message: str) -> tuple[int, int]:
        value = 0
        for index in range(start, min(start + _LONGEST, len(head))):
            value |= (head[index] & 0x7F) << 7 * (index - start)
            if head[index] < 0x80:
                return value & _U64, index + 1
        raise self.wrong(message, position, "a truncated or endless integer")


def varints(packed: bytes) -> np.ndarray | None:
    """Return the integers that are packed in these bytes, as uint64; None if the last one is truncated."""
    raw = np.frombuffer(packed, np.uint8)
    if not raw.size:
        return np.empty(0, np.uint64)
    last = raw < 0x80
    stops = np.flatnonzero(last)
    if not last[-1]:
        return None
    starts = np.concatenate(([0], stops[:-1] + 1))
    lengths = stops - starts + 1
    if lengths.max() > _LONGEST:
        return None
    values = np.zeros(stops.size, np.uint64)
    for index in range(int(lengths.max())):
        present = lengths > index
        part = raw[starts[present] + index].astype(np.uint64) & np.uint64(0x7F)
        values[present] |= part << np.uint64(7 * index)
    return values


def int_field(number: int, value: int) -> bytes:
    """Return a field with an integer."""
    return _varint_bytes(number << 3 | VARINT) + _varint_bytes(value & _U64)


def bytes_head(number: int, size: int) -> bytes:
    """Return the key and length that precede the payload of a field of `size` bytes."""
    return _varint_bytes(number << 3 | BYTES) + _varint_bytes(size)


def bytes_field(number: int, payload: bytes) -> bytes:
    """Return a field with bytes, text (UTF-8) or a message."""
    return bytes_head(number, len(payload)) + payload


def _varint_bytes(value: int) -> bytes:
    parts = bytearray()
    while value >= 0x80:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    parts.append(value)
    return bytes(parts)
