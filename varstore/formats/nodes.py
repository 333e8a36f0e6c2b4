"""Walk over nested state: its containers are mappings, lists and tuples, and everything else is a leaf."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

__all__ = ["BARE", "leaves", "replaced"]

BARE = "(array)"
"""The name of the only leaf where there is no container around it."""


def leaves(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Yield each leaf with its name: the keys and indices on the way to it, joined by ``/``."""
    if isinstance(node, Mapping):
        for key, value in node.items():
            yield from leaves(value, (*path, key))
    elif isinstance(node, (list, tuple)):
        for index, value in enumerate(node):
            yield from leaves(value, (*path, index))
    else:
        yield "/".join(map(str, path)) or BARE, node


def replaced(node: Any, leaf: Callable[[Any], Any]) -> Any:
    """Return the same state with ``leaf(value)`` in place of each leaf; containers keep their types."""
    if isinstance(node, dict):
        copy = type(node)()
        for key, value in node.items():
            copy[key] = replaced(value, leaf)
        return copy
    if isinstance(node, (list, tuple)):
        items = [replaced(value, leaf) for value in node]
        return type(node)(*items) if hasattr(node, "_fields") else type(node)(items)
    return leaf(node)
