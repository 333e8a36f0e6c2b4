"""Names as a tree in which numbered blocks of one structure are folded: ``h.{0..23}.`` stands for 24 blocks.

A name is divided after each ``/`` and ``.``. Siblings whose labels differ only in their last number are one node if all
below them is alike: the same labels, and the same of what the caller says of each name, such as shape and type. The
numbers are written as a shell's braces: ``{0..23}``, ``{0..22..2}``, ``{0..3,7,9}``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass

__all__ = ["Node", "folded"]

_DEEPEST = 64
"""Levels of the tree; what is left of a deeper name is one label."""
_PART = re.compile(r"(?<=[/.])(?=.)", re.DOTALL)
_NUMBER = re.compile(r"([0-9]{1,18})(?=[^0-9]*$)")
"""The last number of a label."""
_ALIKE_NAMES, _ALIKE_BLOCKS = 3, 2
"""How many single names, and how many blocks of several names, are folded."""
_RUN = 2
"""Numbers that are listed one by one; more of equal distance are a range."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Node:
    """A label and what is below it. A leaf stands for one name, or for several that were folded, which are alike.

    `blocks` is how many siblings were folded into the node, 1 if it is as it was.
    """

    label: str
    own: tuple[str, ...] = ()
    children: tuple[Node, ...] = ()
    blocks: int = 1

    @property
    def names(self) -> Iterator[str]:
        """All names that it stands for."""
        yield from self.own
        for child in self.children:
            yield from child.names


def folded(names: Iterable[str], alike: Callable[[str], Hashable]) -> tuple[Node, ...]:
    """Return the tree of names, in their order; `alike` gives what has to be equal for names to be folded."""
    parts = [(name, _PART.split(name, _DEEPEST - 1)) for name in names]
    return tuple(_joined(node) for _, node in _Folding(alike).level(parts, 0))


class _Folding:
    """Gives equal numbers to nodes that are alike, so that each comparison is one of numbers."""

    def __init__(self, alike: Callable[[str], Hashable]) -> None:
        self._alike = alike
        self._kinds: dict[Hashable, int] = {}

    def _kind(self, of: Hashable) -> int:
        return self._kinds.setdefault(of, len(self._kinds))

    def level(self, names: list[tuple[str, list[str]]], depth: int) -> list[tuple[int, Node]]:
        """Return the nodes of one level, each with the number of its kind."""
        below: dict[str, list[tuple[str, list[str]]]] = {}
        for name, parts in names:
            below.setdefault(parts[depth], []).append((name, parts))
        found = []
        for label, inner in below.items():
            leaves = [name for name, parts in inner if len(parts) == depth + 1]
            deeper = [(name, parts) for name, parts in inner if len(parts) > depth + 1]
            if leaves:
                node = Node(label=label, own=tuple(leaves))
                found.append((self._kind(("name", self._alike(leaves[0]))), node))
            if deeper:
                children = self.level(deeper, depth + 1)
                kind = self._kind(tuple((child.label, kind) for kind, child in children))
                found.append((kind, Node(label=label, children=tuple(child for _, child in children))))
        return self._fold(found)

    def _fold(self, nodes: list[tuple[int, Node]]) -> list[tuple[int, Node]]:
        numbers = [_NUMBER.search(node.label) for _, node in nodes]
        around = [found and (found.string[: found.start()], found.string[found.end() :]) for found in numbers]
        padded = {place for place, found in zip(around, numbers, strict=True) if found and _is_padded(found[1])}
        groups: dict[Hashable, list[tuple[str, int, Node]]] = {}
        for at, ((kind, node), place, found) in enumerate(zip(nodes, around, numbers, strict=True)):
            number = found[1] if found else ""
            key = (kind, place, len(number) if place in padded else 0) if found else at
            groups.setdefault(key, []).append((number, kind, node))
        return [node for group in groups.values() for node in _folded_group(group)]


def _is_padded(number: str) -> bool:
    return len(number) > 1 and number.startswith("0")


def _folded_group(group: list[tuple[str, int, Node]]) -> list[tuple[int, Node]]:
    _, kind, first = group[0]
    if len(group) < (_ALIKE_NAMES if first.own else _ALIKE_BLOCKS):
        return [(kind, node) for _, kind, node in group]
    group.sort(key=lambda member: int(member[0]))
    label = _NUMBER.sub(_braces([number for number, _, _ in group]), first.label)
    return [(kind, _merged(label, [node for _, _, node in group], len(group)))]


def _merged(label: str, nodes: list[Node], blocks: int) -> Node:
    """Return a node for several that are alike."""
    own = tuple(name for node in nodes for name in node.own)
    below = zip(*(node.children for node in nodes), strict=True)
    children = tuple(_merged(alike[0].label, list(alike), alike[0].blocks) for alike in below)
    return Node(label=label, own=own, children=children, blocks=blocks)


def _braces(numbers: list[str]) -> str:
    """Return rising numbers as a shell's braces; runs of equal distance, from three numbers on, are ranges."""
    values = [int(number) for number in numbers]
    pieces, at = [], 0
    while at < len(values):
        stop, step = at + 1, values[at + 1] - values[at] if at + 1 < len(values) else 0
        while stop < len(values) and values[stop] - values[stop - 1] == step:
            stop += 1
        if stop - at > _RUN:
            pieces.append(f"{numbers[at]}..{numbers[stop - 1]}" + (f"..{step}" if step > 1 else ""))
            at = stop
        else:
            pieces.append(numbers[at])
            at += 1
    return f"{{{','.join(pieces)}}}"


def _joined(node: Node) -> Node:
    """Return a node in which one that has a single child is one with it."""
    while len(node.children) == 1 and not (node.blocks > 1 and node.children[0].blocks > 1):
        (child,) = node.children
        blocks = node.blocks * child.blocks
        node = Node(label=node.label + child.label, own=child.own, children=child.children, blocks=blocks)
    return Node(label=node.label, own=node.own, children=tuple(map(_joined, node.children)), blocks=node.blocks)
