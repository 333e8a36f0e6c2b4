"""One file, read by position: what every lazy reader stands on.

A file is opened, read and closed within each call, so that nothing stays open and nothing is mapped while
a program works with a checkpoint of any size; a file that changed since it was first looked at is noticed.
No size that a file states is believed: a range outside the file is an error before memory is taken.
"""

from __future__ import annotations

import mmap
import os
import stat
from collections.abc import Callable
from typing import Any

import numpy as np

from varstore.errors import CheckpointNotFound, FormatError, SizeMismatch
from varstore.storage.failures import storage_error
from varstore.values.lazy import LazyArray

__all__ = ["MOST_DIMENSIONS", "Read", "Source", "count_elements", "lazy_array"]

MOST_DIMENSIONS = 32
"""What every numpy accepts."""

Mapped = bytes | mmap.mmap
"""A whole file for parsing."""

Read = Callable[[int, int], np.ndarray]
"""Return `size` bytes at `offset` as a new or unshared array of uint8."""


class Source:
    """A regular file and its size; `read` fetches a range of it."""

    __slots__ = ("_identity", "path", "size")

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        try:
            status = os.stat(self.path)
        except (FileNotFoundError, NotADirectoryError):
            raise CheckpointNotFound("there is no such file", path=self.path) from None
        except OSError as error:
            raise storage_error(error, self.path, "the file cannot be looked at") from error
        if not stat.S_ISREG(status.st_mode):
            raise FormatError("this is not a regular file", path=self.path)
        self.size = status.st_size
        self._identity = _identity(status)

    def read(self, offset: int, size: int) -> np.ndarray:
        """Return a range of the file as a new array of uint8.

        Raises:
            SizeMismatch: the range is not within the file.
            FormatError: the file changed since it was opened.
        """
        self._check_range(offset, size)
        values = np.empty(size, np.uint8)
        left = values.data
        descriptor = self._open()
        try:
            while left:
                count = os.preadv(descriptor, [left], offset)
                if count == 0:
                    raise SizeMismatch("the file ends early", path=self.path, found=f"end at byte {offset}")
                left = left[count:]
                offset += count
        except OSError as error:
            raise storage_error(error, self.path, "reading failed") from error
        finally:
            os.close(descriptor)
        return values

    def bytes(self, offset: int, size: int) -> bytes:
        """Return a short range of the file as bytes; like `read` otherwise."""
        return self.read(offset, size).tobytes()

    def map(self) -> Mapped:
        """Return the whole file for parsing; memory is touched only where it is looked at."""
        if self.size == 0:
            return b""
        descriptor = self._open()
        try:
            return mmap.mmap(descriptor, self.size, access=mmap.ACCESS_READ)
        except OSError as error:
            raise storage_error(error, self.path, "mapping failed") from error
        finally:
            os.close(descriptor)

    def _open(self) -> int:
        try:
            descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise CheckpointNotFound("the file is gone since it was opened", path=self.path) from None
        except OSError as error:
            raise storage_error(error, self.path, "the file cannot be opened") from error
        if _identity(os.fstat(descriptor)) != self._identity:
            os.close(descriptor)
            raise FormatError("the file changed since it was opened", path=self.path, hint="open it again")
        return descriptor

    def _check_range(self, offset: int, size: int) -> None:
        if offset < 0 or size < 0 or offset + size > self.size:
            raise SizeMismatch(
                "the file states a range that lies outside itself",
                path=self.path,
                found=f"{size} bytes at byte {offset}",
                expected=f"at most {self.size} bytes in all",
            )


def count_elements(shape: tuple[Any, ...], itemsize: int, *, path: str, variable: str | None = None) -> int:
    """Return how many elements a shape read from a file has.

    Raises:
        FormatError: a dimension is not a natural number, or there are more than 32, or their product
            (zero dimensions left out) times the size of an element exceeds 2^63.
    """
    count = span = 1
    plain = len(shape) <= MOST_DIMENSIONS and all(type(extent) is int and extent >= 0 for extent in shape)
    if plain:
        for extent in shape:
            count *= extent
            span *= extent or 1
    if not plain or span * max(itemsize, 1) >= 1 << 63:
        raise FormatError(
            "this shape cannot be an array's",
            path=path,
            variable=variable,
            found=f"({', '.join(map(_shown, shape[:MOST_DIMENSIONS]))})"[:100],
            expected=f"at most {MOST_DIMENSIONS} dimensions of 0 or more, less than 2^63 bytes",
        )
    return count


def _shown(extent: Any) -> str:
    return str(extent) if type(extent) in (int, float) else type(extent).__name__


def lazy_array(
    read: Read, offset: int, shape: tuple[int, ...], dtype: np.dtype[Any], *, fortran: bool = False
) -> LazyArray:
    """Return the array whose values lie at `offset`; the caller has checked that they do."""

    def fetch() -> np.ndarray:
        count = 1
        for extent in shape:
            count *= extent
        return read(offset, count * dtype.itemsize).view(dtype).reshape(shape, order="F" if fortran else "C")

    return LazyArray(shape, dtype, fetch)


def _identity(status: os.stat_result) -> tuple[int, ...]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
