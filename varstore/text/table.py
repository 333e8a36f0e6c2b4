"""A report's table: a title, rows of cells and notes, as text for a terminal or as HTML for a notebook."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from varstore.text.escape import LIMIT, one_line

__all__ = ["Shown", "Table"]

_ROWS_IN_A_NOTEBOOK = 100


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """What a report shows. Each row becomes one line, whatever its cells contain; see `one_line`.

    `form` is the format of a row as text; with `headings`, columns are as wide as their longest cells instead. `limit`
    is the number of characters of a cell or note that are shown.
    """

    title: str
    rows: Sequence[Sequence[Any]] = ()
    notes: Sequence[str] = ()
    form: str = "  {}"
    headings: Sequence[str] = ()
    limit: int = LIMIT

    def __str__(self) -> str:
        cells, form = self._cells(), self.form
        if self.headings:
            cells = [list(self.headings), *cells]
            form = "  " + "  ".join(f"{{:<{max(map(len, column))}}}" for column in zip(*cells, strict=True))
        rows = [form.format(*row).rstrip() for row in cells]
        return "\n".join([self._shown_title(), *rows, *self._shown_notes()])

    def html(self) -> str:
        """Return the table as HTML."""
        from html import escape

        head = "".join(f"<th>{escape(heading)}</th>" for heading in self.headings)
        head = f"<tr>{head}</tr>" if head else ""
        body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in self._cells())
        below = "".join(f"<div>{escape(note)}</div>" for note in self._shown_notes())
        return f"<table><caption>{escape(self._shown_title())}</caption>{head}{body}</table>{below}"

    def _cells(self) -> list[list[str]]:
        return [[one_line(cell, self.limit) for cell in row] for row in self.rows]

    def _shown_title(self) -> str:
        return one_line(self.title, 4 * self.limit)

    def _shown_notes(self) -> list[str]:
        return [one_line(note, 4 * self.limit) for note in self.notes]


class Shown:
    """A record that is a table: `print` shows all of it, a REPL only its title, and a notebook the first rows."""

    __slots__ = ()

    def table(self, most: int | None = None) -> Table:
        """Return what the record shows, or its first rows, as many as `most`."""
        raise NotImplementedError

    def __str__(self) -> str:
        return str(self.table())

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {one_line(self.table(0).title)}>"

    def _repr_html_(self) -> str:
        return self.table(_ROWS_IN_A_NOTEBOOK).html()
