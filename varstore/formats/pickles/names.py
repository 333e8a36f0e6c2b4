"""Values of the pickle machine: names, entries of the table of known names, and long strings left in the file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

from varstore.formats.binary.source import Mapped
from varstore.formats.pickles.code import runs_code

__all__ = ["SPAN_FROM", "Constructor", "Global", "OldString", "Span", "Table", "internal", "shorten", "show"]

SPAN_FROM = 256
"""The size in bytes from which strings are left in the file."""

_SHOWN = 80
_LONGEST_SHOWN = 256


@dataclass(frozen=True, slots=True)
class Constructor:
    """A function that stands for a name: `call` for the opcodes REDUCE, OBJ and INST, `new` for NEWOBJ.

    Both take the machine, then the arguments in the file. An opcode whose function is None is refused.
    """

    call: Callable[..., Any] | None = None
    new: Callable[..., Any] | None = None


Table = Mapping[tuple[str, str], Any]
"""Maps (module, name) to a `Constructor`, or to an inert value that stands for the named object."""


class Global:
    """A name in the file; `entry` is its entry in the table, or None; `made` counts the inert objects by this name."""

    __slots__ = ("claimed", "entry", "made", "module", "name", "offset")

    def __init__(self, module: str, name: str, entry: Any, offset: int) -> None:
        self.module = module
        self.name = name
        self.entry = entry
        self.offset = offset
        self.claimed = entry is not None
        self.made = 0

    def claim(self) -> None:
        """Account for the name, whose object is not wanted; not for one that has no use but to run code."""
        self.claimed = self.claimed or not runs_code(self.module, self.name)

    def __str__(self) -> str:
        return shorten(repr(f"{self.module}.{self.name}")[1:-1])


@dataclass(frozen=True, slots=True, eq=False)
class Span:
    """A long string left in the file: `size` bytes of the pickle at `offset`.

    `text` is the encoding of a str, or None for bytes. `recoded` means that the value is bytes, one per character of
    the text, as protocol 2 stores them. `old` means a str of Python 2, which may be text or the values of an array.
    """

    offset: int
    size: int
    text: str | None = None
    recoded: bool = False
    old: bool = False

    def __str__(self) -> str:
        return f"<{self.size} bytes>"

    def value(self, data: Mapped) -> str | bytes:
        """Return a copy of the string."""
        raw = data[self.offset : self.offset + self.size]
        if self.text is None:
            return raw
        text = raw.decode(self.text, "strict" if self.old else "surrogatepass")
        return text.encode("latin-1") if self.recoded else text


@dataclass(frozen=True, slots=True, eq=False)
class OldString:
    """A short str of Python 2 that is not ASCII: text in the encoding that the caller named, or values of an array."""

    raw: bytes
    encoding: str

    def __str__(self) -> str:
        return shorten(repr(self.raw))


def internal(value: Any) -> Any:
    """Return what a framework itself wrote as text, such as the name of a device: bytes if all strings are to be."""
    return value.decode() if type(value) is bytes and value.isascii() else value


def show(value: Any, *, most: int = 2, depth: int = 2) -> str:
    """Return a short description of a value for messages: `most` items at each of `depth` levels."""
    if isinstance(value, (tuple, list, dict, set, frozenset)):
        return _show_items(value, most, depth)
    if isinstance(value, (str, bytes)):
        return shorten(repr(value[:_SHOWN]))
    if isinstance(value, int) and value.bit_length() > _LONGEST_SHOWN:
        return "a long integer"
    plain = isinstance(value, (int, float, complex, type(None)))
    has_text = plain or any("__str__" in vars(kind) for kind in type(value).__mro__[:-1])
    return shorten(str(value)) if has_text else f"a {type(value).__name__}"


def _show_items(value: Any, most: int, depth: int) -> str:
    left, right = "()" if isinstance(value, tuple) else "[]" if isinstance(value, list) else "{}"
    items: list[str] = []
    for item in islice(value, most if depth else 0):
        shown = show(item, depth=depth - 1)
        items.append(f"{shown}: {show(value[item], depth=depth - 1)}" if isinstance(value, dict) else shown)
    if len(value) > len(items):
        items.append("…")
    return f"{left}{', '.join(items)}{right}"


def shorten(text: str) -> str:
    """Return the text, cut to 80 characters."""
    return text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…"
