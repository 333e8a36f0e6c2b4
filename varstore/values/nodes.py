"""Walk over nested state. Its containers are mappings, lists and tuples; everything else is a leaf."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

__all__ = ["BARE", "Names", "Unbuilt", "dict_like", "leaves", "replaced"]

BARE = "(array)"
"""The name of a leaf that is not in a container."""


class Unbuilt:
    """A container of another kind while its leaves are chosen and read: its items by key, and what builds it of them.

    With `is_row`, the keys are indices, and an item that is left out becomes None.
    """

    __slots__ = ("build", "is_row", "items")
    __hash__ = None  # type: ignore[assignment]  # it is not a key

    def __init__(self, items: dict[Any, Any], build: Callable[[dict[Any, Any]], Any], *, is_row: bool = False) -> None:
        self.items = items
        self.build = build
        self.is_row = is_row

    def __bool__(self) -> bool:
        return bool(self.items)


def leaves(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Yield the name and value of each leaf; names are the keys and indices that lead to it, joined by ``/``."""
    if isinstance(node, Mapping):
        for key, value in node.items():
            yield from leaves(value, (*path, key))
    elif isinstance(node, Unbuilt):
        yield from leaves(node.items, path)
    elif isinstance(node, (list, tuple)):
        for index, value in enumerate(node):
            yield from leaves(value, (*path, index))
    else:
        yield "/".join(map(str, path)) or BARE, node


def replaced(node: Any, leaf: Callable[[Any], Any]) -> Any:
    """Return a copy of the state with ``leaf(value)`` in place of each leaf; containers keep their types.

    What is unbuilt is built.
    """
    if isinstance(node, Unbuilt):
        return node.build({key: replaced(value, leaf) for key, value in node.items.items()})
    if isinstance(node, dict):
        return dict_like(node, [(key, replaced(value, leaf)) for key, value in node.items()])
    if isinstance(node, (list, tuple)):
        items = [replaced(value, leaf) for value in node]
        return type(node)(*items) if hasattr(node, "_fields") else type(node)(items)
    return leaf(node)


def dict_like(node: dict[Any, Any], items: Iterable[tuple[Any, Any]]) -> dict[Any, Any]:
    """Return a dict of the same type with other items; what torch keeps with a state dict, `_metadata`, stays."""
    copy = defaultdict(node.default_factory) if type(node) is defaultdict else type(node)()
    for key, value in items:
        copy[key] = value
    if isinstance(node, OrderedDict) and hasattr(node, "_metadata"):
        vars(copy)["_metadata"] = vars(node)["_metadata"]
    return copy


class Names:
    """Give each array a name of its own: where keys that are joined by ``/`` meet, ``~2``, ``~3`` and so on follow."""

    def __init__(self) -> None:
        self._taken: set[str] = set()
        self._counts: dict[str, int] = {}

    def own(self, path: str) -> str:
        """Return the name of the next array whose joined keys are `path`."""
        name = path
        count = self._counts.get(path, 1)
        while name in self._taken:
            count += 1
            name = f"{path}~{count}"
        self._taken.add(name)
        if count > 1:
            self._counts[path] = count  # so that many arrays of one path take linear time
        return name
