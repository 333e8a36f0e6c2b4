"""Columns and trees for people: cut to the terminal, in colours that it has and signs that its encoding has.

What is printed elsewhere than on a terminal is not cut. No row is longer than the terminal is wide, so none looks like
two. Labels come from files, so each cell is one line of printable characters already; see `varstore.text.escape`.
"""

from __future__ import annotations

import shutil
import sys
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import click

from varstore.cli.output import is_terminal

__all__ = ["Column", "Signs", "columns_text", "cut", "signs", "terminal_width", "width_of"]

_GAP = "  "
_LEAST = 32
"""Characters of the first column that stay as long as another column can be left out."""


class Signs(NamedTuple):
    """What trees and tables are drawn with."""

    branch: str
    last: str
    line: str
    space: str
    times: str
    cut: str
    bars: str


_SIGNS = Signs("├─ ", "└─ ", "│  ", "   ", "×", "…", " ▁▂▃▄▅▆▇█")
_ASCII = Signs("|- ", "`- ", "|  ", "   ", "x", "...", " .:-=+*#@")


def signs() -> Signs:
    """Return the signs that the encoding of the output has."""
    try:
        "".join(_SIGNS).encode(sys.stdout.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return _ASCII
    return _SIGNS


def terminal_width() -> int | None:
    """Return the columns of the terminal; None if the output does not go to one."""
    return shutil.get_terminal_size().columns if is_terminal() else None


def width_of(text: str) -> int:
    """Return how many columns of a terminal a text takes."""
    if text.isascii():
        return len(text)
    return sum(_width_of_sign(sign) for sign in text)


def _width_of_sign(sign: str) -> int:
    return 0 if unicodedata.combining(sign) else 2 if unicodedata.east_asian_width(sign) in "WF" else 1


def cut(text: str, width: int) -> str:
    """Return a text of at most this width; of a longer one, its beginning and its end."""
    if width_of(text) <= width:
        return text
    middle = signs().cut
    if width <= len(middle):
        return middle[:width]
    left = width - len(middle)
    end = _taken(text[::-1], left // 2)[::-1]
    return f"{_taken(text, left - width_of(end))}{middle}{end}"


def _taken(text: str, width: int) -> str:
    for at, sign in enumerate(text):
        width -= _width_of_sign(sign)
        if width < 0:
            return text[:at]
    return text


@dataclass(frozen=True, kw_only=True, slots=True)
class Column:
    """A column; where the terminal is too narrow, one with a `least` width is cut, and others are left out.

    Those of the lowest `rank` are left out first, the first column never.
    """

    heading: str
    is_right: bool = False
    style: dict[str, Any] | None = None
    rank: int = 0
    least: int | None = None


def columns_text(columns: Sequence[Column], rows: Sequence[Sequence[str]], *, width: int | None) -> str:
    """Return rows below their headings; a column without any text is left out."""
    shown = [at for at, _ in enumerate(columns) if at == 0 or any(row[at] for row in rows)]
    widths = {at: max(width_of(text) for text in (columns[at].heading, *(row[at] for row in rows))) for at in shown}
    if width is not None:
        _narrow(columns, widths, width)
    lines = [_line(columns, widths, [column.heading for column in columns], is_heading=True)]
    lines += [_line(columns, widths, row) for row in rows]
    return "\n".join(lines)


def _narrow(columns: Sequence[Column], widths: dict[int, int], width: int) -> None:
    """Cut what may be cut and then the first column, leave others out, and at the end cut the first to what is left."""

    def over() -> int:
        return sum(widths.values()) + len(_GAP) * (len(widths) - 1) - width

    def cut_to(at: int, least: int) -> None:
        widths[at] = max(widths[at] - max(over(), 0), min(least, widths[at]))

    for at, column in enumerate(columns):
        if at in widths and column.least is not None:
            cut_to(at, column.least)
    cut_to(0, _LEAST)
    for at in sorted([at for at in widths if at], key=lambda at: columns[at].rank):
        if over() > 0:
            del widths[at]
    cut_to(0, 1)


def _line(columns: Sequence[Column], widths: dict[int, int], row: Sequence[str], *, is_heading: bool = False) -> str:
    cells = []
    for at, width in widths.items():
        text = cut(row[at], width)
        space = " " * (width - width_of(text))
        style = {"dim": True} if is_heading else columns[at].style
        styled = click.style(text, **style) if style and text else text
        cells.append(f"{space}{styled}" if columns[at].is_right else f"{styled}{space}")
    return _GAP.join(cells).rstrip()
