"""Read the bytes of a pickle in order, and check that no length extends beyond their end."""

from __future__ import annotations

from typing import Any, NoReturn

from varstore.errors import FormatError
from varstore.formats.binary.source import Mapped

__all__ = ["Tape"]

_LONGEST_NUMBER_TEXT = 4096


class Tape:
    """A pickle that begins at `start`; `stop` is the position of the next byte, `at` that of the current opcode."""

    def __init__(self, data: Mapped, path: str, start: int) -> None:
        self.data = data
        self._end = len(data)
        self.path = path
        self.at = start
        self.stop = start

    def fail(self, problem: str, **facts: Any) -> NoReturn:
        """Raise a FormatError with the file and the position."""
        raise FormatError(problem, path=self.path, field=f"byte {self.at}", **facts)

    def skip(self, size: int) -> int:
        """Skip `size` bytes and return the position of the first one."""
        start = self.stop
        if size > self._end - start:
            self.fail("the pickle ends early", found=f"{self._end - start} bytes", expected=f"{size} bytes")
        self.stop = start + size
        return start

    def take(self, size: int) -> bytes:
        """Return the next `size` bytes."""
        start = self.stop
        stop = start + size
        if stop > self._end:
            self.skip(size)
        self.stop = stop
        return self.data[start:stop]

    def byte(self) -> int:
        """Return the next byte."""
        start = self.stop
        if start >= self._end:
            self.skip(1)
        self.stop = start + 1
        return self.data[start]

    def number(self, size: int, *, signed: bool = False) -> int:
        """Return the next `size` bytes as a little-endian integer."""
        return int.from_bytes(self.take(size), "little", signed=signed)

    def line(self) -> bytes:
        """Return the next line, without its line end."""
        end = self.data.find(b"\n", self.stop)
        if end < 0:
            self.fail("the pickle ends within a line")
        line = self.take(end - self.stop)
        self.stop += 1
        return line

    def number_text(self) -> bytes:
        """Return the next line, which should be a number."""
        line = self.line().strip()
        if len(line) > _LONGEST_NUMBER_TEXT:
            self.fail("the number is too long", found=f"{len(line)} digits")
        return line
