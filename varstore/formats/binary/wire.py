"""Protocol buffers on the wire: the fields of a message, found where they lie in a file and not copied.

Only what is asked for is read, so a message of many gigabytes costs as much as its structure. A length
that leads behind the end of its message is an error before anything is read.

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
    """One field: its number and wire type, a varint's value, where its payload and all of it lie."""

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
    """The messages of one file."""

    def __init__(self, stream: BinaryIO, path: str) -> None:
        self._stream = stream
        self._path = path

    def fields(self, span: Span, message: str) -> Iterator[Field]:
        """Yield the fields of the message in these bytes, in their order.

        Raises:
            FormatError: what lies there is no message.
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
                raise self.wrong(message, position, f"field {number} of {size} bytes, {end - start} are left")
            yield Field(
                number=number, kind=kind, value=value, span=(start, size), whole=(position, start + size - position)
            )
            position = start + size

    def read(self, field: Field) -> bytes:
        """Return a field's payload."""
        self._stream.seek(field.span[0])
        return self._stream.read(field.span[1])

    def text(self, field: Field, message: str) -> str:
        """Return the payload of a string.

        Raises:
            FormatError: it is not UTF-8, or no string at all.
        """
        if field.kind != BYTES:
            raise self.wrong(message, field.whole[0], f"wire type {field.kind} for a string")
        try:
            return self.read(field).decode()
        except UnicodeDecodeError:
            raise self.wrong(message, field.whole[0], "a string that is not UTF-8") from None

    def integers(self, field: Field, message: str) -> list[int]:
        """Return the values of a repeated int64, written one by one or packed.

        Raises:
            FormatError: it holds none.
        """
        if field.kind == VARINT:
            return [field.signed]
        if field.kind != BYTES:
            raise self.wrong(message, field.whole[0], f"wire type {field.kind} for integers")
        values = varints(self.read(field))
        if values is None:
            raise self.wrong(message, field.whole[0], "a cut off integer")
        return values.view(np.int64).tolist()  # type: ignore[no-any-return]

    def wrong(self, message: str, position: int, found: str) -> FormatError:
        """Return the error for a message that is none."""
        return FormatError(
            f"this is no {message} message",
            path=self._path,
            found=f"{found}, at byte {position}",
            hint="the file is cut off, damaged, or of another format",
        )

    def _varint(self, head: bytes, start: int, position: int, message: str) -> tuple[int, int]:
        value = 0
        for index in range(start, min(start + _LONGEST, len(head))):
            value |= (head[index] & 0x7F) << 7 * (index - start)
            if head[index] < 0x80:
                return value & _U64, index + 1
        raise self.wrong(message, position, "a cut off or endless integer")


def varints(packed: bytes) -> np.ndarray | None:
    """Return the integers that lie packed in these bytes as uint64, None where the last one is cut off."""
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
    """Return a field that holds an integer."""
    return _varint_bytes(number << 3 | VARINT) + _varint_bytes(value & _U64)


def bytes_head(number: int, size: int) -> bytes:
    """Return what stands before the payload of a field of this many bytes."""
    return _varint_bytes(number << 3 | BYTES) + _varint_bytes(size)


def bytes_field(number: int, payload: bytes) -> bytes:
    """Return a field that holds bytes, text (UTF-8) or a message."""
    return bytes_head(number, len(payload)) + payload


def _varint_bytes(value: int) -> bytes:
    parts = bytearray()
    while value >= 0x80:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    parts.append(value)
    return bytes(parts)
