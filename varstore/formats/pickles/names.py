"""What a pickle mentions: names, what a table has for them, and long strings that stay where they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

from varstore.formats.binary.source import Mapped

__all__ = ["SPAN_FROM", "Constructor", "Global", "Span", "Table", "shorten", "show"]

SPAN_FROM = 256
"""Strings of this many bytes or more stay where they are."""

_SHOWN = 80
_LONGEST_SHOWN = 256


@dataclass(frozen=True, slots=True)
class Constructor:
    """What a name in the table does: `call` for REDUCE, OBJ and INST, `new` for NEWOBJ; None refuses.

    Both take the machine first, then the arguments that the file gives.
    """

    call: Callable[..., Any] | None = None
    new: Callable[..., Any] | None = None


Table = Mapping[tuple[str, str], Any]
"""(module, name) -> a `Constructor`, or an inert value that stands for what is named."""


class Global:
    """A name that the file mentions; `entry` is what the table has for it, None for nothing."""

    __slots__ = ("claimed", "entry", "module", "name", "offset")

    def __init__(self, module: str, name: str, entry: Any, offset: int) -> None:
        self.module = module
        self.name = name
        self.entry = entry
        self.offset = offset
        self.claimed = entry is not None

    def __str__(self) -> str:
        return shorten(repr(f"{self.module}.{self.name}")[1:-1])


@dataclass(frozen=True, slots=True, eq=False)
class Span:
    """A long string left in place: `size` bytes of the pickle at `offset`.

    `text` is the encoding where it is a str ("utf-8", "latin-1"), None where it is bytes; `recoded` says that
    the bytes meant are the text's characters as latin-1 (protocol 2 writes bytes so).
    """

    offset: int
    size: int
    text: str | None = None
    recoded: bool = False

    def __str__(self) -> str:
        return f"<{self.size} bytes>"

    def value(self, data: Mapped) -> str | bytes:
        """Copy it out of the pickle."""
        raw = data[self.offset : self.offset + self.size]
        if self.text is None:
            return raw
        text = raw.decode(self.text, "surrogatepass" if self.text == "utf-8" else "strict")
        return text.encode("latin-1") if self.recoded else text


def show(value: Any, *, most: int = 2, depth: int = 2) -> str:
    """Return a short text for a value of the machine, for messages: `most` items at each of `depth` levels."""
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
    """Return a text of at most 80 characters."""
    return text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…"
