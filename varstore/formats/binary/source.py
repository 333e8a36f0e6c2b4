"""Read ranges of a file; all lazy readers are built on this module.

Each call opens the file, reads and closes it. So a program can keep any number of files as lazy mappings without
running out of file descriptors or address space. Each call also checks that the file is still the one that was
examined first, because its offsets would be wrong for any other.

Sizes that a file states are not trusted: a range outside the file is an error before memory is allocated for it.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any, BinaryIO

import numpy as np

from varstore.errors import CheckpointNotFound, FormatError, SizeMismatch, UsageError
from varstore.storage import syscalls
from varstore.storage.failures import storage_error, translated

__all__ = ["MOST_DIMENSIONS", "Held", "Source", "count_elements", "files_noted", "is_unchanged", "name_of"]

MOST_DIMENSIONS = 32
"""The number of dimensions that every version of numpy accepts."""

Mapped = bytes | mmap.mmap
"""The content of a whole file, for parsing."""


_noted: ContextVar[dict[str, tuple[int, ...]] | None] = ContextVar("_noted", default=None)


@contextlib.contextmanager
def files_noted() -> Iterator[dict[str, tuple[int, ...]]]:
    """Note each file that is opened within the block: its absolute path, and what tells it from a later one."""
    noted: dict[str, tuple[int, ...]] = {}
    token = _noted.set(noted)
    try:
        yield noted
    finally:
        _noted.reset(token)


def is_unchanged(path: str, identity: tuple[int, ...]) -> bool:
    """Tell whether a file that was noted is still the same file."""
    try:
        return _identity(os.stat(path)) == identity
    except OSError:
        return False


def name_of(file: BinaryIO) -> str:
    """Return the path of a file object; empty if it does not have one."""
    given = getattr(file, "name", None)
    return given if isinstance(given, str) else ""


class Held(str):
    """The content of a file object, under the name that messages show in the place of a path."""

    __slots__ = ("content",)
    content: bytes

    @classmethod
    def named(cls, name: str, content: bytes) -> Held:
        """Return content that was read already, under a name."""
        return _held(name, content)

    def __reduce__(self) -> tuple[Callable[[str, bytes], Held], tuple[str, bytes]]:
        return _held, (str(self), self.content)

    @classmethod
    def of(cls, file: BinaryIO) -> Held:
        """Read a file object from where it is to its end.

        Raises:
            UsageError: it gives text.
            StorageError: the operating system refused.
        """
        name = name_of(file) or f"<{type(file).__name__}>"
        with translated(name, "reading failed"):
            content: object = file.read()
        if not isinstance(content, bytes):
            raise UsageError("the file was opened as text", path=name, hint='open it with mode "rb"')
        return _held(name, content)


def _held(name: str, content: bytes) -> Held:
    held = Held(name)
    held.content = content
    return held


class Source:
    """A regular file and its size, or the content of a file object; `read` fetches a range of it.

    It stays the same file when the working directory changes. `shown` is the path for errors, if it is another one.
    `identity` tells this file from all others.
    """

    __slots__ = ("_content", "_place", "identity", "path", "size")

    def __init__(self, path: str | os.PathLike[str], *, shown: str | None = None) -> None:
        self.path = shown or os.fspath(path)
        self._content = path.content if isinstance(path, Held) else None
        if self._content is not None:
            self.size = len(self._content)
            self.identity: tuple[int, ...] = (id(self._content),)
            return
        try:
            self._place = os.path.abspath(path)
            status = os.stat(self._place)
        except (FileNotFoundError, NotADirectoryError):
            raise CheckpointNotFound("there is no such file", path=self.path) from None
        except OSError as error:
            raise storage_error(error, self.path, "the file cannot be examined") from error
        if not stat.S_ISREG(status.st_mode):
            raise FormatError("this is not a regular file", path=self.path)
        self.size = status.st_size
        self.identity = _identity(status)
        if (noted := _noted.get()) is not None:
            noted[self._place] = self.identity

    def read(self, offset: int, size: int) -> np.ndarray:
        """Return a range of the file as a new array of uint8.

        Raises:
            SizeMismatch: the range is not within the file.
            FormatError: the file has changed since it was opened.
            CheckpointNotFound: the file was removed.
            StorageError: the operating system refused.
        """
        self._check_range(offset, size)
        if self._content is not None:
            return np.frombuffer(self._content, np.uint8, size, offset).copy()
        values = np.empty(size, np.uint8)
        left = values.data
        with self._opened("reading failed") as descriptor:
            while left:
                count = syscalls.preadv(descriptor, (left,), offset)
                if count == 0:
                    raise SizeMismatch("the file ends early", path=self.path, found=f"end at byte {offset}")
                left = left[count:]
                offset += count
        return values

    def bytes(self, offset: int, size: int) -> bytes:
        """Return a short range of the file as bytes; raises what `read` raises."""
        return self.read(offset, size).tobytes()

    def map(self) -> Mapped:
        """Return the whole file as a memory map, for parsing; only the pages that are accessed are read."""
        if self._content is not None:
            return self._content
        if self.size == 0:
            return b""
        with self._opened("mapping failed") as descriptor:
            return mmap.mmap(descriptor, self.size, access=mmap.ACCESS_READ)

    @contextlib.contextmanager
    def _opened(self, failure: str) -> Iterator[int]:
        """Keep the file open, if it is still the one that was examined."""
        try:
            descriptor = syscalls.open_fd(self._place, syscalls.READ)
        except FileNotFoundError:
            raise CheckpointNotFound("the file was removed after it was opened", path=self.path) from None
        except OSError as error:
            raise storage_error(error, self.path, "the file cannot be opened") from error
        try:
            with translated(self.path, failure):
                if _identity(os.fstat(descriptor)) != self.identity:
                    raise FormatError("the file has changed since it was opened", path=self.path, hint="open it again")
                yield descriptor
        finally:
            with contextlib.suppress(OSError):  # what was read, was read
                os.close(descriptor)

    def _check_range(self, offset: int, size: int) -> None:
        if offset < 0 or size < 0 or offset + size > self.size:
            raise SizeMismatch(
                "the file refers to a range outside itself",
                path=self.path,
                found=f"{size} bytes at byte {offset}",
                expected=f"at most {self.size} bytes in all",
            )


def count_elements(shape: Sequence[Any], itemsize: int, *, path: str, variable: str | None = None) -> int:
    """Return the number of elements of a shape that was read from a file.

    Raises:
        FormatError: an extent is not an integer of 0 or more, there are more than 32 dimensions, or the product of
            the extents (zeros left out) times the size of an element reaches 2^63.
    """
    count = span = 1
    plain = len(shape) <= MOST_DIMENSIONS
    for extent in shape if plain else ():
        if type(extent) is not int or extent < 0:
            plain = False
            break
        count *= extent
        span *= extent or 1
    if not plain or span * max(itemsize, 1) >= 1 << 63:
        raise FormatError(
            "no array can have this shape",
            path=path,
            variable=variable,
            found=f"({', '.join(map(_shown, shape[:MOST_DIMENSIONS]))})"[:100],
            expected=f"at most {MOST_DIMENSIONS} dimensions of 0 or more, less than 2^63 bytes",
        )
    return count


def _shown(extent: Any) -> str:
    return str(extent) if type(extent) in (int, float) else type(extent).__name__


def _identity(status: os.stat_result) -> tuple[int, ...]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
