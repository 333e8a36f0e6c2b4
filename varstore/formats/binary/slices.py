"""Arrays that are stored in a file as plain bytes: their position is checked first, and they are read on demand.

Lengths that a file states are not trusted: a span must lie in the file, and the spans of an array must have exactly the
size that its shape and type require. So no allocation is larger than the file.
"""

from __future__ import annotations

import bisect
import errno
import io
import itertools
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from varstore.errors import SizeMismatch, VarstoreError
from varstore.formats.binary.packing import bits_of, packed_size, unpack
from varstore.formats.binary.source import count_elements
from varstore.values.lazy import LazyArray, placed_array
from varstore.values.parts import Read, in_c_order, in_fortran_order

__all__ = ["Content", "MemoryContent", "Span", "array_of_spans", "check_span", "refused_array", "stream_of"]

Span = tuple[int, int]
"""The position of bytes in a file: (offset, length)."""

_BUFFER = 1 << 16


class Content(Protocol):
    """Bytes that can be read by position: a `Source`, or a file that was decompressed or decrypted into memory."""

    path: str
    size: int

    def read(self, offset: int, size: int, /) -> np.ndarray:
        """Return a range as an array of uint8."""


class MemoryContent:
    """The content of a file that was decompressed or decrypted into memory."""

    def __init__(self, path: str, data: bytes | memoryview) -> None:
        self.path = path
        self.size = len(data)
        self._data = data

    def read(self, offset: int, size: int) -> np.ndarray:
        """Return a copy of a range as uint8."""
        return np.frombuffer(self._data, np.uint8, size, offset).copy()


class _Stream(io.RawIOBase):
    def __init__(self, content: Content) -> None:
        self._content = content
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._content.size}[whence]
        if base + offset < 0:
            raise OSError(errno.EINVAL, f"seek to {base + offset}")
        self._position = base + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        count = max(min(len(buffer), self._content.size - self._position), 0)
        if count:
            buffer[:count] = self._content.read(self._position, count).data
            self._position += count
        return count


def stream_of(content: Content) -> io.BufferedReader:
    """Return the content as a file, positioned at the start."""
    return io.BufferedReader(_Stream(content), _BUFFER)


def check_span(content: Content, span: Span, what: str) -> None:
    """Check that a span lies in the file; `what` describes it, for errors.

    Raises:
        SizeMismatch: it extends beyond the file.
    """
    offset, length = span
    if offset < 0 or length < 0 or offset + length > content.size:
        raise SizeMismatch(
            f"{what} lies outside the file",
            path=content.path,
            found=f"{length} bytes at byte {offset}",
            expected=f"at most {content.size} bytes in all",
            hint="the file is truncated or damaged",
        )


def array_of_spans(
    content: Content,
    spans: Sequence[Span],
    shape: Sequence[int],
    dtype: np.dtype[Any],
    *,
    variable: str,
    fortran: bool = False,
) -> LazyArray:
    """Return the array whose bytes are the concatenation of these spans; types of less than a byte are packed.

    Raises:
        FormatError: no array can have this shape.
        SizeMismatch: the spans extend beyond the file, or do not have the size that shape and type require.
    """
    shape = tuple(shape)
    count = count_elements(shape, dtype.itemsize, path=content.path, variable=variable)
    expected, found = packed_size(count, dtype), sum(length for _, length in spans)
    for span in spans:
        check_span(content, span, f"tensor {variable!r}")
    if found != expected:
        raise SizeMismatch(
            "the size of the tensor does not match its shape and type",
            path=content.path,
            variable=variable,
            found=f"{found} bytes",
            expected=f"{expected} for {dtype} {list(shape)}",
            hint="the file is truncated or damaged",
        )
    read, start = (content.read, spans[0][0]) if len(spans) == 1 else (_joined(content, spans), 0)
    if bits_of(dtype) != 8 * dtype.itemsize:
        return LazyArray(shape, dtype, lambda: unpack(read(start, expected), count, dtype).reshape(shape))
    place = in_fortran_order if fortran else in_c_order
    if dtype == np.bool_:
        return placed_array(read, place(shape, np.dtype(np.uint8), start), lambda values: values != 0, dtype)
    native = dtype if dtype.fields else dtype.newbyteorder("=")
    if native != dtype:
        return placed_array(read, place(shape, dtype, start), lambda values: values.astype(native), native)
    return placed_array(read, place(shape, dtype, start))


def _joined(content: Content, spans: Sequence[Span]) -> Read:
    """Return what reads spans as if they lay end to end."""
    ends = [*itertools.accumulate(length for _, length in spans)]

    def read(offset: int, size: int) -> np.ndarray:
        joined = np.empty(size, np.uint8)
        done = 0
        at = bisect.bisect_right(ends, offset)
        while done < size:
            begin, length = spans[at]
            skipped = offset + done - (ends[at] - length)
            step = min(length - skipped, size - done)
            joined[done : done + step] = content.read(begin + skipped, step)
            done += step
            at += 1
        return joined

    return read


def refused_array(shape: Sequence[int], error: VarstoreError) -> LazyArray:
    """Return an array that can be listed, but raises this error when it is read."""

    def fetch() -> np.ndarray:
        raise error

    return LazyArray(tuple(shape), np.dtype(object), fetch)
