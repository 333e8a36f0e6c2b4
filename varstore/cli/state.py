"""Nested state and attributes as a tree: scalars as they are, and what holds only arrays as one row with its totals."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from varstore.cli.columns import signs
from varstore.text.escape import one_line
from varstore.text.hints import plural
from varstore.text.sizes import size_text

__all__ = ["Words", "as_plain", "part_lines"]

_DEEPEST = 24
_MOST_ITEMS = 64
"""Items of one container that have rows of their own."""
_FEW = 8
"""Arrays that have rows of their own; more, with nothing else among them, are one row."""
_SHORT = 60
"""Characters of a list of scalars that is one row."""


class Words(str):
    """Text about an item, which is shown without quotes."""

    __slots__ = ()


def part_lines(title: str, part: Any) -> Iterator[str]:
    """Yield the lines of a part of a checkpoint below its title, or one line if it is only arrays."""
    said = _said(part)
    yield f"{title}  {said}" if said else title
    if not said:
        yield from _tree_lines(part)


def _tree_lines(node: Any, indent: str = "", depth: int = 0) -> Iterator[str]:
    """Yield a line for each item of a container, and below it those of its own items."""
    drawn = signs()
    items = list(_items(node))
    shown, more = items[:_MOST_ITEMS], len(items) - _MOST_ITEMS
    labels = [one_line(label) for label, _ in shown] + ([f"{drawn.cut} and {more:,} more"] if more > 0 else [])
    width = max(map(len, (label for label, (_, value) in zip(labels, shown, strict=False) if _said(value))), default=0)
    for at, label in enumerate(labels):
        is_last = at == len(labels) - 1
        line = f"{indent}{drawn.last if is_last else drawn.branch}{label}"
        if at == len(shown):
            yield line
            continue
        value = shown[at][1]
        said = _said(value)
        yield f"{line}{' ' * (width - len(label))}  {said}" if said else line
        if not said and depth < _DEEPEST:
            yield from _tree_lines(value, indent + (drawn.space if is_last else drawn.line), depth + 1)


def _items(node: Any) -> Iterable[tuple[Any, Any]]:
    return node.items() if isinstance(node, Mapping) else enumerate(node)


def _said(value: Any) -> str:
    """Return what stands behind a label; nothing for a container whose items have rows."""
    if _is_array(value):
        return f"{value.dtype.name} {one_line(list(value.shape))}"
    if not isinstance(value, Mapping | list | tuple):
        return one_line(value if isinstance(value, Words) else repr(value))
    if not value:
        return "empty"
    if isinstance(value, list | tuple) and all(_is_scalar(item) for item in value[:_MOST_ITEMS]):
        text = repr(value)
        is_short = len(text) <= _SHORT and text.isprintable()
        return text if is_short else f"{plural(len(value), 'value')}: {one_line(text, _SHORT)}"
    arrays = list(_arrays(value))
    return _totals(arrays) if len(arrays) > _FEW and all(array is not None for array in arrays) else ""


def _totals(arrays: list[Any]) -> str:
    first = {_memory(array): array for array in arrays}.values()
    count, nbytes = sum(math.prod(array.shape) for array in first), sum(array.nbytes for array in first)
    return f"{plural(len(arrays), 'variable')}, {plural(count, 'parameter')}, {size_text(nbytes)}"


def _memory(array: Any) -> Any:
    """Return what is equal for arrays that are tied."""
    entry = getattr(array, "entry", None)
    return getattr(array, "identity", id(array)) if entry is None else entry.alias_of or entry.name


def _arrays(node: Any, depth: int = 0) -> Iterator[Any]:
    """Yield the arrays below a container, and None for what is not an array and for what lies too deep."""
    for _, value in _items(node):
        if isinstance(value, Mapping | list | tuple):
            if depth < _DEEPEST:
                yield from _arrays(value, depth + 1)
            else:
                yield None
        else:
            yield value if _is_array(value) else None


def _is_array(value: Any) -> bool:
    return hasattr(value, "dtype") and hasattr(value, "shape") and hasattr(value, "nbytes")


def _is_scalar(value: Any) -> bool:
    return value is None or isinstance(value, str | bool | int | float | complex)


def as_plain(value: Any) -> Any:
    """Return what JSON can hold of a state: numbers, text and what is made of them; of all else, its text."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if _is_array(value):
        return {"shape": list(value.shape), "dtype": value.dtype.name, "nbytes": value.nbytes}
    if isinstance(value, Mapping):
        return {str(key): as_plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [as_plain(inner) for inner in value]
    return one_line(value)
