"""What a file holds instead of data: an object of a class that the reader does not know, as an inert record.

Its class is never imported and nothing of it is called, so a record cannot do what the object could: it cannot be
called, indexed, iterated, compared, hashed or taken for an array, a number or a path.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from varstore.text.escape import one_line
from varstore.values.nodes import BARE, dict_like

__all__ = ["Opaque", "inner_leaves", "replaced_inside", "without_opaque"]

_CONTAINERS = (dict, list, tuple)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False, repr=False)
class Opaque:
    """An object of an unknown class, or an unknown name, in a file that `varstore.read` opened.

    - `module`, `name`: the class or function that the file names.
    - `arguments`, `keywords`: with what it would have been called; None if it is only named.
    - `state`: what the object would have been given as its state, often a dict of its attributes.
    - `items`: the items that a list or dict of this class has; None if there are none.

    All of them are data: containers, scalars, lazy arrays and other records. Where an object is a part of itself, only
    its name is repeated.
    """

    module: str
    name: str
    arguments: tuple[Any, ...] | None = None
    keywords: Mapping[str, Any] | None = None
    state: Any = None
    items: list[Any] | dict[Any, Any] | None = None

    __hash__ = None  # type: ignore[assignment]  # a record is never a key

    def __repr__(self) -> str:
        return f"<Opaque {one_line(f'{self.module}.{self.name}')}>"

    def __reduce__(self) -> tuple[Callable[..., Opaque], tuple[Any, ...]]:
        return _made, (self.module, self.name, *self.content)

    @property
    def content(self) -> tuple[Any, ...]:
        """The parts: arguments, keywords, state and items."""
        return self.arguments, self.keywords, self.state, self.items


def _made(module: str, name: str, arguments: Any, keywords: Any, state: Any, items: Any) -> Opaque:
    return Opaque(module=module, name=name, arguments=arguments, keywords=keywords, state=state, items=items)


def inner_leaves(opaque: Opaque, seen: set[int]) -> Iterator[Any]:
    """Yield the leaves within a record; what is shared is visited once, also in calls with the same `seen`."""
    waiting: list[Any] = [opaque]
    while waiting:
        node = waiting.pop()
        if not isinstance(node, (Opaque, Mapping, list, tuple)):
            yield node
        elif id(node) not in seen:
            seen.add(id(node))
            waiting += (
                node.content if isinstance(node, Opaque) else node.values() if isinstance(node, Mapping) else node
            )


def replaced_inside(opaque: Opaque, leaf: Callable[[Any], Any], done: dict[int, Any]) -> Opaque:
    """Return a copy of a record with ``leaf(value)`` for each leaf; what is shared stays shared, by way of `done`."""

    def node(value: Any) -> Any:
        if not isinstance(value, (Opaque, dict, list, tuple)):
            return leaf(value)
        if id(value) not in done:
            done[id(value)] = copied(value)
        return done[id(value)]

    def copied(value: Any) -> Any:
        if isinstance(value, Opaque):
            return _made(value.module, value.name, *map(node, value.content))
        if isinstance(value, dict):
            return type(value)((key, node(item)) for key, item in value.items())
        return type(value)(map(node, value))

    copy: Opaque = node(opaque)
    return copy


def without_opaque(state: Any, *others: type) -> tuple[Any, tuple[str, ...]]:
    """Return a state without the records in it, and their names; it is the same object if there are none.

    Dicts lose them, and lists and tuples have None in their places. So do leaves of other types, if these are given.
    """
    kinds = (Opaque, *others)
    if not _holds(state, kinds):
        return state, ()
    names: list[str] = []
    rest = _pruned(state, (), names, set(), kinds)
    return rest, tuple(names)


def _holds(state: Any, wanted: tuple[type, ...]) -> bool:
    """Look at the types of the items first: nearly all states are without records, and some have a million items."""
    waiting: list[Any] = [[state]]
    seen: set[int] = set()
    while waiting:
        items = waiting.pop()
        kinds = set(map(type, items))
        if not kinds.isdisjoint(wanted):
            return True
        if any(issubclass(kind, _CONTAINERS) for kind in kinds):
            for item in items:
                if isinstance(item, _CONTAINERS) and id(item) not in seen:
                    seen.add(id(item))
                    waiting.append(list(item.values()) if isinstance(item, dict) else item)
    return False


def _pruned(node: Any, path: tuple[str, ...], names: list[str], above: set[int], kinds: tuple[type, ...]) -> Any:
    if isinstance(node, kinds):
        names.append("/".join(path) or BARE)
        return None
    if not isinstance(node, _CONTAINERS) or id(node) in above:  # who writes the state refuses one that contains itself
        return node
    known = len(names)
    above.add(id(node))
    pairs = node.items() if isinstance(node, dict) else enumerate(node)
    items = [(key, _pruned(item, (*path, str(key)), names, above, kinds), type(item) in kinds) for key, item in pairs]
    above.discard(id(node))
    if len(names) == known:
        return node
    if isinstance(node, dict):
        return dict_like(node, [(key, item) for key, item, is_one in items if not is_one])
    rows = [item for _, item, _ in items]
    return type(node)(*rows) if hasattr(node, "_fields") else type(node)(rows)
