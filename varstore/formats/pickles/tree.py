"""Convert the result of the pickle machine to the tree that readers return: plain containers with arrays as leaves.

The conversion bounds all later walks over the tree: its depth is at most `DEEPEST`, it does not have cycles, and it
does not have more nodes than its pickle has bytes, counting a list once for each place where it occurs. Objects that
occur in several places stay shared. What is neither plain data nor known to the format is refused, or becomes an
`Opaque` leaf if the machine is lenient. Walks over the tree take that for a leaf, so what is in it does not have to be
a tree: where it contains itself, or is nested too deep, there is a record that has only a name.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import numpy as np

from varstore.errors import FormatError
from varstore.formats.pickles.arrays import Array, Dtype
from varstore.formats.pickles.machine import ITEM, NODE, Instance, Machine, Record
from varstore.formats.pickles.names import Global, OldString, Span, show
from varstore.values.lazy import LazyArray
from varstore.values.opaque import Opaque

__all__ = ["DEEPEST", "Leaf", "claim", "module_state", "plain_tree"]

DEEPEST = 100
_NAME = 200
_FEWEST = 65536
_SCALARS = (type(None), bool, int, float, complex, str, bytes, slice, np.generic, LazyArray)

Leaf = Callable[[Any], Any]
"""Converts a `Record` to an array, plain data or other records; returns NotImplemented for an unknown one."""


def plain_tree(root: Any, machine: Machine, leaf: Leaf) -> Any:
    """Return the tree for `root`, the object that `machine` created; `leaf` converts the records of the format.

    Raises:
        UnsafeContent: it contains an object of an unknown class, or the pickle uses an unknown name, and the machine is
            not lenient; or the pickle uses a name that has no use but to run code.
        FormatError: it is nested deeper than 100, contains itself, or repeats parts out of proportion to the file.
    """
    tree = _Walk(machine, leaf).node(root, 0)[0]
    machine.refuse_unclaimed()
    return tree


class _Walk:
    """One conversion; `node` returns the converted value, its number of nodes and its height."""

    def __init__(self, machine: Machine, leaf: Leaf) -> None:
        self._machine = machine
        self._leaf = leaf
        self._most = max(_FEWEST, len(machine.data))
        self._done: tuple[dict[int, tuple[Any, int, int]], ...] = ({}, {})
        """What was converted outside and inside of records, because only there it may be without some of its parts."""
        self._inside = False
        self._kept: list[Any] = []
        self._open: set[int] = set()
        self._claimed: set[int] = set()

    def node(self, value: Any, depth: int) -> tuple[Any, int, int]:
        if isinstance(value, _SCALARS):
            return value, 1, 0
        identity, done = id(value), self._done[self._inside]
        if self._inside and (depth > DEEPEST or identity in self._open):
            return self._mentioned(value)
        known = done.get(identity)
        if known is None:
            if identity in self._open:
                self._fail("the object contains itself")
            self._open.add(identity)
            known = done[identity] = self._convert(value, depth)
            self._open.discard(identity)
            self._kept.append(value)  # so that no other object can get its id
        elif self._inside or type(known[0]) is Opaque:  # walks visit a record, and what is shared in records, once
            known = known[0], 1, known[2]
        if depth + known[2] > DEEPEST:
            if self._inside:
                return self._mentioned(value)
            self._fail(f"the object is nested deeper than {DEEPEST}")
        if known[1] > self._most:
            self._fail("the object repeats parts of itself out of proportion to the file")
        return known

    def _mentioned(self, value: Any) -> tuple[Opaque, int, int]:
        self._machine.charge(NODE)
        return _mention(value), 1, 0

    def _convert(self, value: Any, depth: int) -> tuple[Any, int, int]:
        if depth > DEEPEST:
            self._fail(f"the object is nested deeper than {DEEPEST}")
        if isinstance(value, (Span, OldString)):
            return self._machine.plain(value), 1, 0
        if self._inside:
            self._machine.charge(NODE)  # it may be converted outside as well
        if isinstance(value, dict):
            return self._dict(value, depth)
        if isinstance(value, (list, tuple)):
            items, count, height = self._items(value, depth)
            return (items if isinstance(value, list) else tuple(items)), count, height
        if isinstance(value, (set, frozenset)):
            if self._machine.is_lenient and any(map(_is_object, value)):
                return self._container(value, list(value), depth)
            items, count, height = self._items(sorted(value, key=repr), depth)
            self._machine.check_keys(items, is_set=True)  # in another order than that of the file
            return type(value)(items), count, height
        if isinstance(value, Global) and value.entry is not None:
            return str(value), 1, 0
        return self._record(value, depth)

    def _record(self, value: Any, depth: int) -> tuple[Any, int, int]:
        plain = NotImplemented if isinstance(value, Array) and value.foreign is not None else self._leaf(value)
        if plain is NotImplemented:
            if self._machine.is_lenient:
                return self._opaque(value, depth)
            if isinstance(value, Instance):
                self._machine.refuse(f"would create {show(value)}", offset=value.offset)
            if isinstance(value, Global):
                self._machine.refuse(f"would import {value}", offset=value.offset)
            self._machine.refuse(f"contains {show(value)} where data should be")
        if isinstance(value, Instance):
            claim(value, self._claimed)
        return self.node(plain, depth + 1)

    def _opaque(self, value: Any, depth: int) -> tuple[Any, int, int]:
        """Return the record of what the format does not know."""
        if isinstance(value, Global):
            return Opaque(module=value.module, name=value.name), 1, 0
        if isinstance(value, Dtype):
            return self._filled(_mention(value), ((value.dtype.str,), None, value.foreign, None), depth)
        if isinstance(value, Array):
            return self._filled(_mention(value), (None, None, value.foreign, None), depth)
        if not isinstance(value, Instance) or value.type is None:
            self._machine.refuse(f"contains {show(value)} where data should be")
        return self._filled(_mention(value), (value.arguments, value.keywords, value.state, value.items), depth)

    def _container(self, value: Any, items: list[Any], depth: int) -> tuple[Any, int, int]:
        """Return the record of a dict or set whose keys are objects, which a record cannot be."""
        self._machine.charge(NODE + ITEM * len(items))
        return self._filled(_mention(value), ((items,), None, None, None), depth)

    def _filled(self, named: Opaque, content: tuple[Any, ...], depth: int) -> tuple[Any, int, int]:
        was_inside, self._inside = self._inside, True
        (arguments, keywords, state, items), count, height = self._items(content, depth)
        self._inside = was_inside
        self._machine.charge(NODE)
        record = Opaque(
            module=named.module, name=named.name, arguments=arguments, keywords=keywords, state=state, items=items
        )
        return record, count - sum(part is None for part in content), height

    def _dict(self, value: dict[Any, Any], depth: int) -> tuple[Any, int, int]:
        for key in value:
            if any(isinstance(part, (Record, Global)) for part in (key if isinstance(key, tuple) else (key,))):
                if self._machine.is_lenient:
                    self._machine.charge(NODE * len(value))
                    return self._container(value, list(value.items()), depth)
                self._fail(f"a dict has {show(key)} as a key")
        items, count, height = self._items(value.values(), depth)
        kind = OrderedDict if isinstance(value, OrderedDict) else dict
        return kind(zip(value, items, strict=True)), count, height

    def _items(self, values: Any, depth: int) -> tuple[list[Any], int, int]:
        items, count, height = [], 1, 0
        for value in values:
            item, item_count, item_height = self.node(value, depth + 1)
            items.append(item)
            count += item_count
            height = max(height, item_height + 1)
        return items, count, height

    def _fail(self, problem: str) -> NoReturn:
        raise FormatError(problem, path=self._machine.path, hint="no framework writes such a checkpoint")


def claim(module: Any, seen: set[int]) -> None:
    """Claim every name in a module's state: they are classes and functions of its code, and stay inert."""
    waiting: list[Any] = [module]
    while waiting:
        value = waiting.pop()
        if isinstance(value, _SCALARS) or id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Global):
            value.claim()
        elif isinstance(value, Instance):
            waiting += [value.type, value.arguments, value.keywords, value.state, value.items]
        elif isinstance(value, dict):
            waiting += [*value, *value.values()]
        elif isinstance(value, (list, tuple, set, frozenset)):
            waiting += value


def _mention(value: Any) -> Opaque:
    """Return a record that has only the name of an object or of its class."""
    name = value.type if isinstance(value, Instance) else value
    if isinstance(name, Global):
        return Opaque(module=name.module, name=name.name)
    if isinstance(value, (Array, Dtype)):
        return Opaque(module="numpy", name="ndarray" if isinstance(value, Array) else "dtype")
    return Opaque(module=type(value).__module__, name=type(value).__name__)


def _is_object(value: Any) -> bool:
    """Return whether a member of a set is, or contains, what becomes a record."""
    parts = value if isinstance(value, tuple) else (value,)
    return any(isinstance(part, Record) or (isinstance(part, Global) and part.entry is None) for part in parts)


def module_state(module: Instance, machine: Machine) -> OrderedDict[str, Any] | None:
    """Return the state dict of a pickled module of torch or oneflow, or None if the object is not one.

    The order is that of `Module.state_dict`: parameters, persistent buffers, then submodules.
    """
    if not _is_module(module):
        return None
    return OrderedDict(_variables(module, "", machine, 0))


def _is_module(value: Any) -> bool:
    state = value.state if isinstance(value, Instance) else None
    return isinstance(state, dict) and all(
        isinstance(state.get(part), dict) for part in ("_parameters", "_buffers", "_modules")
    )


def _variables(module: Instance, prefix: str, machine: Machine, depth: int) -> Iterator[tuple[str, Any]]:
    if depth > DEEPEST:
        machine.fail(f"modules are nested deeper than {DEEPEST}")
    state = module.state
    temporary = state.get("_non_persistent_buffers_set")
    if not isinstance(temporary, (set, frozenset)):  # old files do not have it, and in a list each search takes long
        temporary = ()
    for part in ("_parameters", "_buffers"):
        for name, value in state[part].items():
            machine.charge(_NAME + 4 * len(prefix))
            if value is not None and not (part == "_buffers" and name in temporary):
                yield f"{prefix}{name}", value
    for name, child in state["_modules"].items():
        machine.charge(_NAME + 4 * len(prefix))
        if _is_module(child):
            yield from _variables(child, f"{prefix}{name}.", machine, depth + 1)
        elif child is not None and machine.is_lenient:
            yield f"{prefix}{name}", child
        elif child is not None:
            machine.refuse(f"contains {show(child)} as a submodule of {module.type}")
