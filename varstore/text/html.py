"""A small table for notebooks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

__all__ = ["html_table"]


def html_table(caption: str, rows: Iterable[Iterable[Any]], notes: Iterable[str] = ()) -> str:
    """Return rows of cells as an HTML table, every text escaped, with notes below."""
    from html import escape

    body = "".join("<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    below = "".join(f"<div>{escape(note)}</div>" for note in notes)
    return f"<table><caption>{escape(caption)}</caption>{body}</table>{below}"
