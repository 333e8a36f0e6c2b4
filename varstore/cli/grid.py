"""Values as text: a grid of numbers with nan and inf in red, a small histogram, and the slices that people write."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

import click
import numpy as np

from varstore.cli.columns import signs

__all__ = ["corner", "grid", "histogram_text", "index_of", "split_index"]

_INDEX = re.compile(r"(.+?)?(\[[^\[\]]*\])", re.DOTALL)
_ITEM = re.compile(r"\s*(?:(?P<number>-?\d{1,18})|(?P<slice>(?:-?\d{1,18})?(?:\s*:\s*(?:-?\d{1,18})?){1,2})|\.\.\.)\s*")
_CORNER_ROWS, _CORNER_COLUMNS = 6, 8
_MOST_ROWS = 200
_MOST_COLUMNS = 64
"""Columns of a grid that does not go to a terminal."""
_LONG = 12
"""Characters of a number that is not rounded."""
_BINS = 32


def split_index(name: str) -> tuple[str, str | None]:
    """Return a name and the slice at its end, such as ``[0:3, :5]``, None if there is none."""
    found = _INDEX.fullmatch(name)
    return (name, None) if found is None else (found[1] or "", found[2])


def index_of(text: str) -> tuple[Any, ...]:
    """Return the index that a text such as ``[0:3, :5]`` stands for.

    Raises:
        UsageError: it is not numbers, slices and at most one ``...``.
    """
    items: list[Any] = []
    for item in text[1:-1].split(","):
        found = _ITEM.fullmatch(item)
        if found is None:
            raise click.UsageError(f"{text} is not a slice such as [0:3, :5]: numbers, START:STOP:STEP, or ...")
        if found["slice"] is not None:
            items.append(slice(*(int(part) if part.strip() else None for part in found["slice"].split(":"))))
        else:
            items.append(Ellipsis if found["number"] is None else int(found["number"]))
    return tuple(items)


def corner(shape: Sequence[int]) -> tuple[int | slice, ...]:
    """Return the index of the first few values along the last two axes, and of the first along the others."""
    last = [slice(_CORNER_ROWS), slice(_CORNER_COLUMNS)][-len(shape) :] if shape else []
    return (*[0] * (len(shape) - 2), *last)


def grid(values: np.ndarray, *, width: int | None, is_whole: bool) -> list[str]:
    """Return rows of numbers; an ellipsis says that there are more, in the array or, with `is_whole` false, beside it.

    The planes of an array of more than two axes are shown one after the other, each below its index.
    """
    if not values.size:
        return ["none"]
    rows: list[str] = []
    for at in np.ndindex(values.shape[:-2]):
        if at:
            rows.append(f"[{', '.join(map(str, at))}]")
        rows += _plane(values[at], width, is_whole=is_whole)
        if len(rows) > _MOST_ROWS:
            return [*rows[:_MOST_ROWS], signs().cut]
    return rows


def _plane(values: np.ndarray, width: int | None, *, is_whole: bool) -> Iterator[str]:
    texts = [[_text(value) for value in row] for row in np.atleast_2d(values)[: _MOST_ROWS + 1]]
    size = max(len(text) for row in texts for text in row)
    fit = max((_MOST_COLUMNS * (size + 1) if width is None else width) // (size + 1), 1)
    if values.ndim < 2 and is_whole:
        yield from (_row(texts[0][start : start + fit], size, "") for start in range(0, len(texts[0]), fit))
        return
    fit = max(fit - 1, 1) if len(texts[0]) > fit else fit
    more = f" {signs().cut}" if len(texts[0]) > fit or not is_whole else ""
    yield from (_row(row[:fit], size if values.ndim > 1 else 0, more) for row in texts)


def _row(texts: Sequence[str], size: int, more: str) -> str:
    cells = [" " * (size - len(text)) + _coloured(text) for text in texts]
    return " ".join(cells) + more


def _coloured(text: str) -> str:
    return click.style(text, fg="red") if "nan" in text or "inf" in text else text


def _text(value: Any) -> str:
    text = str(value)
    return f"{float(value):.6g}" if len(text) > _LONG and isinstance(value, np.floating) else text


def histogram_text(counts: Sequence[int]) -> str:
    """Return a bar for each bin, in at most 32 columns; a bin with a value has a bar that can be seen."""
    each = -(-len(counts) // _BINS)
    summed = [sum(counts[start : start + each]) for start in range(0, len(counts), each)]
    bars, most = signs().bars, max(summed)
    return "".join(bars[-(-count * (len(bars) - 1) // most)] for count in summed)
