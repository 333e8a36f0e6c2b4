"""Nested state to flat variables and a JSON tree, and back.

Each array becomes a variable that is named by its path. The tree holds everything else, and where each array belongs.
What JSON has stands for itself: None, bool, int, finite float, str, list, and dict with string keys. Everything else
is an object whose ``"$"`` says what it is:

    {"$": "array", "name": "optimizer/state/0/exp_avg", "type": "torch.Tensor"}
    {"$": "array", …, "device": "cuda:0", "requires_grad": true, "view": {"of": NAME, "offset": 6, "strides": [1]}}
    {"$": "tuple", "items": [...]}            likewise set, frozenset
    {"$": "dict", "items": [[key, value]]}    with keys other than strings, or a key "$"; likewise OrderedDict, Counter
    {"$": "OrderedDict", …, "metadata": node} what torch keeps with a module's state dict, in `_metadata`
    {"$": "namedtuple", "type": "Point", "fields": ["x", "y"], "items": [...]}
    {"$": "int", "hex": "-0x1…"}              beyond 64 bits
    {"$": "float", "hex": "7ff8000000000000"} nan and the infinities: the IEEE 754 bits, big-endian
    {"$": "complex", "items": [real, imaginary]}
    {"$": "bytes", "hex": "…"}                likewise bytearray; {"$": "str", "hex": "…"}: text with lone surrogates
    {"$": "scalar", "type": "float16", "hex": "…"}   a numpy scalar, little-endian

The file `kinds` has the others: values, such as a path or a date, further containers, and records of classes that are
only named. Long lists of numbers, generators of torch and typed keys of jax are stored as arrays:

    {"$": "list", "name": "losses"}           likewise torch.Generator with a device, and jax.key with an impl

An array says its type if that is not numpy's. With ``"optional": true`` it is the type that a converted file stated,
and the array comes back as numpy's where the framework is not installed. A tensor also says what its values do not: its
device if that is not the CPU, and its place within the memory of another tensor, in elements.

A named tuple comes back as one with the same name and fields, made by `collections.namedtuple`, because its class is
code. No code is stored, and reading a tree runs none.
"""

from __future__ import annotations

import json
import logging
import struct
import unicodedata
from collections import Counter, OrderedDict, namedtuple
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeAlias

import numpy as np

from varstore.errors import InvalidName, ManifestError, UnsupportedDtype, UsageError
from varstore.layout.dtypes import TABLE, data_type_of
from varstore.layout.keys import are_far_apart
from varstore.layout.names import folder_of
from varstore.text.escape import one_line
from varstore.text.hints import listed, plural
from varstore.training.kinds import CONTAINERS, PAIRED, VALUES, Types, container, members, spelt, tag_of, unsaved
from varstore.training.tensors import BUILT, Leaf, as_array, describe, find_views
from varstore.values.arrays import as_source
from varstore.values.nodes import Names, replaced
from varstore.values.opaque import Opaque, without_opaque

__all__ = ["Flat", "StoredAs", "entries", "flatten", "joined", "outline", "prune", "unflatten"]

StoredAs: TypeAlias = Callable[[Any], tuple[Any, dict[str, Any]] | None]
"""Returns the array that is stored for a value, and what the tree says of it; None for a value as it is."""

_log = logging.getLogger("varstore")
_NAMED = 20
_DEEPEST = 100
_MOST_TUPLES = 64
_MOST_FIELDS = 256
_ROOT = "(array)"
_WIDE = 1 << 63
_PLAIN = (type(None), bool)
_PAIRED: dict[type, str] = {dict: "dict", OrderedDict: "OrderedDict", Counter: "Counter"}
_ROWED: dict[type, str] = {tuple: "tuple", set: "set", frozenset: "frozenset"}
_STORED = ("array", *BUILT)
_OF_PAIRS = (*_PAIRED.values(), *PAIRED)
_SCALARS = {row.dtype.name: row.dtype for row in TABLE if row.dtype is not None}


@dataclass(frozen=True, kw_only=True, slots=True)
class Flat:
    """Flattened state: `variables` as `varstore.save` takes them, the text of the tree, and what it does not hold."""

    variables: Mapping[str, Any]
    tree: str
    left_out: tuple[str, ...] = ()


def flatten(state: Any, stored_as: StoredAs = as_array) -> Flat:
    """Flatten a nested state; no array is copied.

    A variable's name is the path to the array, its keys joined by ``/``. If the name is taken, ``~2``, ``~3`` and so on
    are appended; if it cannot be a folder, the name is ``unnamed/N``. Equal states get equal names. What another file
    holds instead of data, an `Opaque`, is left out, and a warning names it: lists and tuples have None in its place.
    So are attributes of a subclass of dict, and of a dataclass, if they are not its fields. `stored_as` returns what
    stands for a value that is not stored as it is.

    Raises:
        UsageError: a value is not data, or a container contains itself or is nested deeper than 100. The message says
            where, as in ``state['sched'].lr_lambda: function``.
        UnsupportedDtype: the type of an array cannot be stored.
    """
    state, left_out = without_opaque(state)
    work = _Flattening(stored_as)
    node = work.node(state, "state", ())
    left_out += tuple(work.left_out)
    if left_out:
        names = listed(list(map(one_line, left_out)), _NAMED)
        _log.warning("left out, objects of unknown classes and attributes that are not a record's fields: %s", names)
    for name, (owner, offset, strides) in find_views(work.variables).items():
        work.arrays[name]["view"] = {"of": owner, "offset": offset, "strides": list(strides)}
    text = json.dumps(node, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return Flat(variables=work.variables, tree=text, left_out=left_out)


class _Flattening:
    def __init__(self, stored_as: StoredAs) -> None:
        self._stored_as = stored_as
        self.variables: dict[str, Any] = {}
        self.left_out: list[str] = []
        self._names = Names()
        self.arrays: dict[str, dict[str, Any]] = {}
        self._above: set[int] = set()

    def node(self, value: Any, place: str, parts: tuple[str, ...] | None) -> Any:
        """Return the node of a value; `parts` is None inside a key, which cannot hold an array."""
        kind = type(value)
        if kind in _PLAIN:
            return value
        encode = _ENCODERS.get(kind)
        if encode is not None:
            return encode(value)
        plain = spelt(value, place)
        if plain is not None:
            return {"$": plain[0], "items": [self.node(item, place, None) for item in plain[1]]}
        if isinstance(value, np.generic):
            return _scalar(value, place)
        if kind is list and parts is not None and (numbers := self._stored_as(value)) is not None:
            return self._built(*numbers, parts)
        if kind in _PAIRED or kind in _ROWED or kind is list or _is_namedtuple(value):
            return self._container(value, place, parts)
        if parts is None:
            raise _not_data(value, place, "a key is a number, a string, bytes, None, or a tuple of these")
        if kind is Opaque:  # in a container that other formats do not have
            self.left_out.append("/".join(parts))
            return None
        tag = tag_of(value, place)
        if tag is not None:
            self.left_out += ("/".join((*parts, name)) for name in unsaved(value))
            return self._container(value, place, parts, tag)
        stored = self._stored_as(value)
        return self._array(value, place, parts) if stored is None else self._built(*stored, parts)

    def _container(
        self, value: Any, place: str, parts: tuple[str, ...] | None, tag: dict[str, Any] | None = None
    ) -> Any:
        if id(value) in self._above:
            raise UsageError("contains itself", field=place, hint="remove the cycle")
        if len(self._above) >= _DEEPEST:
            raise UsageError(f"nested deeper than {_DEEPEST}", field=place, hint="flatten some of the levels")
        self._above.add(id(value))
        try:
            if parts is not None and tag is not None:
                return self._tagged(tag, members(value), place, parts)
            if parts is not None and type(value) in _PAIRED:
                return self._pairs(value, place, parts)
            return self._row(value, place, parts)
        finally:
            self._above.discard(id(value))

    def _tagged(self, tag: dict[str, Any], held: Iterable[Any], place: str, parts: tuple[str, ...]) -> Any:
        if tag["$"] in PAIRED:
            dot = tag["$"] == "record"
            return {**tag, "items": [list(pair) for pair in self._nodes_of(held, place, parts, dot=dot)]}
        items = [self.node(item, f"{place}[{at}]", (*parts, str(at))) for at, item in enumerate(held)]
        return {**tag, "items": items}

    def _nodes_of(
        self, pairs: Iterable[tuple[Any, Any]], place: str, parts: tuple[str, ...], *, dot: bool = False
    ) -> list[tuple[Any, Any]]:
        nodes = []
        for key, item in pairs:
            shown = _shown(key)
            inside = self.node(key, f"{place}.keys()[{shown}]", None)
            where = f"{place}.{key}" if dot else f"{place}[{shown}]"
            nodes.append((inside, self.node(item, where, (*parts, key if type(key) is str else shown))))
        return nodes

    def _pairs(self, value: Mapping[Any, Any], place: str, parts: tuple[str, ...]) -> Any:
        nodes = self._nodes_of(value.items(), place, parts)
        if type(value) is OrderedDict and (metadata := vars(value).get("_metadata")) is not None:
            about = self.node(metadata, f"{place}._metadata", (*parts, "_metadata"))
            return {"$": "OrderedDict", "items": [list(pair) for pair in nodes], "metadata": about}
        is_object = type(value) is dict and all(type(key) is str and key != "$" for key, _ in nodes)
        return dict(nodes) if is_object else {"$": _PAIRED[type(value)], "items": [list(pair) for pair in nodes]}

    def _row(self, value: Any, place: str, parts: tuple[str, ...] | None) -> Any:
        kind = type(value)
        if parts is None and (kind is list or kind is set or kind in _PAIRED):
            raise _not_data(value, place, "a key must be hashable")
        if isinstance(value, (set, frozenset)):
            parts = None
        fields = value._fields if _is_namedtuple(value) else range(len(value))
        nodes = []
        for field, item in zip(fields, value, strict=True):
            inside = f"{place}.{field}" if isinstance(field, str) else f"{place}[{field}]"
            nodes.append(self.node(item, inside, None if parts is None else (*parts, str(field))))
        if kind is list:
            return nodes
        if kind in _ROWED:
            return {"$": _ROWED[kind], "items": nodes}
        return {"$": "namedtuple", "type": kind.__name__, "fields": list(fields), "items": nodes}

    def _array(self, value: Any, place: str, parts: tuple[str, ...]) -> dict[str, Any]:
        if isinstance(value, (int, float, complex, str, bytes)):  # an enum or another subclass would come back plain
            raise _not_data(value, place, "convert it to the plain type")
        name = self._name(parts)
        try:
            as_source(value, variable=name)
        except UnsupportedDtype:
            raise
        except UsageError as error:
            raise _not_data(value, place, error.hint if hasattr(value, "__array__") else _hint(value)) from error
        said = describe(value, place)
        kind = said.pop("type") if said.get("type") in BUILT else "array"
        self.variables[name] = value
        self.arrays[name] = {"$": kind, "name": name, **said}
        return self.arrays[name]

    def _built(self, array: Any, tag: dict[str, Any], parts: tuple[str, ...]) -> dict[str, Any]:
        name = self._name(parts)
        self.variables[name] = array
        return {**tag, "name": name}

    def _name(self, parts: tuple[str, ...]) -> str:
        name = self._names.own("/".join(parts) or _ROOT)
        try:
            folder_of(name)
        except InvalidName:
            count = len(self.variables)
            while (name := f"unnamed/{count}") in self.variables:
                count += 1
            self._names.own(name)
        return name


def _is_namedtuple(value: Any) -> bool:
    fields = getattr(type(value), "_fields", None)
    return isinstance(value, tuple) and isinstance(fields, tuple) and len(fields) == len(value)


def _not_data(value: Any, place: str, hint: str | None) -> UsageError:
    return UsageError(f"{type(value).__name__} cannot be saved as data", field=place, hint=hint)


def _hint(value: Any) -> str:
    if hasattr(value, "state_dict"):
        return "save its state_dict(), or use save of its framework's module in varstore.adapters"
    return "data is numbers, text, containers and arrays; leave this out, or save what it is made from"


def _shown(key: Any) -> str:
    return hex(key) if type(key) is int and not -_WIDE <= key < _WIDE else repr(key)


def _int(value: int) -> Any:
    return value if -_WIDE <= value < _WIDE else {"$": "int", "hex": hex(value)}


def _float(value: float) -> Any:
    return value if value - value == 0 else {"$": "float", "hex": struct.pack(">d", value).hex()}


def _complex(value: complex) -> Any:
    return {"$": "complex", "items": [_float(value.real), _float(value.imag)]}


def _str(value: str) -> Any:
    try:
        value.encode()
    except UnicodeEncodeError:
        return {"$": "str", "hex": value.encode("utf-8", "surrogatepass").hex()}
    return value


def _bytes(value: bytes) -> Any:
    return {"$": "bytes", "hex": value.hex()}


_ENCODERS: dict[type, Callable[[Any], Any]] = {
    int: _int,
    float: _float,
    complex: _complex,
    str: _str,
    bytes: _bytes,
    bytearray: lambda value: {"$": "bytearray", "hex": value.hex()},
}


def _scalar(value: np.generic, place: str) -> Any:
    try:
        row = data_type_of(value.dtype)
    except UnsupportedDtype as error:
        raise UnsupportedDtype(error.problem, field=place, found=error.found, hint=error.hint) from None
    assert row.dtype is not None
    return {"$": "scalar", "type": row.dtype.name, "hex": np.asarray(value).astype(row.dtype).tobytes().hex()}


def prune(tree: Any, gone: Callable[[str], bool]) -> Any:
    """Return a tree without the arrays whose names are `gone`; dicts lose their entries, lists get None instead."""
    if isinstance(tree, list):
        return [None if _is_gone(item, gone) else prune(item, gone) for item in tree]
    if not isinstance(tree, dict):
        return tree
    if tree.get("$") in _STORED:  # a tensor within one that is gone is saved with its own values
        return {key: item for key, item in tree.items() if key != "view" or not gone(item["of"])}
    if tree.get("$") in _OF_PAIRS:
        pairs = [[key, prune(item, gone)] for key, item in tree["items"] if not _is_gone(item, gone)]
        return {**tree, "items": pairs}
    return {key: prune(item, gone) for key, item in tree.items() if not _is_gone(item, gone)}


def _is_gone(node: Any, gone: Callable[[str], bool]) -> bool:
    return isinstance(node, dict) and node.get("$") in _STORED and gone(node["name"])


def joined(trees: Sequence[Any], clash: Callable[[str, Any, Any], Any]) -> Any:
    """Return one tree of several, whose dicts are joined; None if the root of one is not a dict.

    `clash` is called with the path of what two trees have, unless it is equal in both, and with both nodes, and returns
    the node that is taken.
    """
    first, *others = trees
    for other in others:
        if _keyed(first) is None or _keyed(other) is None:
            return None
        first = _joined(first, other, (), clash)
    return first


def _joined(a: Any, b: Any, above: tuple[str, ...], clash: Callable[[str, Any, Any], Any]) -> Any:
    items, more = _keyed(a), _keyed(b)
    if items is None or more is None or len(above) > _DEEPEST:
        return a if a == b else clash("/".join(above), a, b)
    for key, item in more.items():
        items[key] = _joined(items[key], item, (*above, key), clash) if key in items else item
    return {**a, "items": [list(pair) for pair in items.items()]} if "$" in a else items


def _keyed(node: Any) -> dict[str, Any] | None:
    """Return the items of a dict whose keys are all strings, None for any other node."""
    if not isinstance(node, dict):
        return None
    if "$" not in node:
        return dict(node)
    pairs = node["items"] if node["$"] in ("dict", "OrderedDict") else None
    if not isinstance(pairs, list) or not all(isinstance(pair, list) and isinstance(pair[0], str) for pair in pairs):
        return None
    return dict(pairs)


def entries(tree: Any) -> Iterator[tuple[str, Any]]:
    """Yield the path and the node of every entry of a dict in a tree, however deep; an array's path is its name."""
    yield from _entries(tree, "", 0)


def _entries(tree: Any, path: str, depth: int) -> Iterator[tuple[str, Any]]:
    if depth > _DEEPEST:
        return
    for key, item in _items(tree):
        below = f"{path}/{key}" if path else str(key)
        if isinstance(tree, dict) and isinstance(key, str):
            is_array = isinstance(item, dict) and item.get("$") in _STORED
            yield (str(item.get("name")) if is_array else below), item
        yield from _entries(item, below, depth + 1)


def _items(tree: Any) -> Iterable[tuple[Any, Any]]:
    if isinstance(tree, dict) and "$" not in tree:
        return tree.items()
    kind, items = (tree.get("$"), tree.get("items")) if isinstance(tree, dict) else ("list", tree)
    if not isinstance(items, list):
        return ()
    if kind in _OF_PAIRS:
        return ((pair[0], pair[1]) for pair in items if isinstance(pair, list) and len(pair) == 2)
    return enumerate(items) if kind == "list" or kind in _ROWED.values() else ()


def unflatten(tree: Any, restore: Callable[[Leaf], Any], *, path: str) -> Any:
    """Return the state that a tree describes; `restore` is called for each array in it.

    Raises:
        ManifestError: the tree is not one that `flatten` makes.
    """
    with _reading(path):
        state = _Unflattening({}).state(tree, 0)
        return replaced(state, lambda leaf: restore(leaf) if isinstance(leaf, Leaf) else leaf)


def outline(tree: Any, types: Types | None = None, *, path: str) -> Any:
    """Return the state that a tree describes with a `Leaf` for each array, and with containers that are not built yet.

    Args:
        types: the classes of records, by the names that the tree has for them.

    Raises:
        ManifestError: the tree is not one that `flatten` makes.
        UsageError: a class of `types` does not fit its record.
    """
    with _reading(path):
        return _Unflattening(types or {}).state(tree, 0)


@contextmanager
def _reading(path: str) -> Iterator[None]:
    try:
        yield
    except (LookupError, TypeError, ValueError, OverflowError, RecursionError, struct.error) as error:
        if isinstance(error, ManifestError | UsageError):
            raise
        raise ManifestError("the tree does not describe a state", path=path, found=_reason(error)) from error


def _reason(error: Exception) -> str:
    return str(error) if type(error) is ValueError else repr(error)


class _Unflattening:
    """One tree while it becomes a state; what is wrong with it is a KeyError, TypeError or ValueError."""

    def __init__(self, types: Types) -> None:
        self._types = types
        self._tuple_types: set[Any] = set()

    def state(self, node: Any, depth: int) -> Any:
        """Return what a node describes."""
        if depth > _DEEPEST + 1:  # the two parts of a complex number are below it
            raise ValueError(f"nested deeper than {_DEEPEST}")
        if isinstance(node, list):
            return [self.state(item, depth + 1) for item in node]
        if not isinstance(node, dict):
            return node
        kind = node.get("$")
        if kind is None:
            return {key: self.state(item, depth + 1) for key, item in node.items()}
        if kind in _STORED:
            return Leaf.of(node)
        if kind not in _KNOWN:
            raise ValueError(f"a value of the kind {kind!r}, which this release of varstore does not know")
        if "hex" in node:
            return _FROM_HEX[kind](node)
        if kind in _OF_PAIRS:
            items = [[self.state(key, depth + 1), self.state(item, depth + 1)] for key, item in node["items"]]
        else:
            items = [self.state(item, depth + 1) for item in node["items"]]
        if kind in VALUES:
            return VALUES[kind](items)
        if kind in CONTAINERS:
            return container(node, items, self._types)
        if kind == "namedtuple":
            return self._tuple_type(node["type"], node["fields"])(*items)
        if kind in _HASHED:
            keys = (item[0] if _HASHED[kind] else item for item in items)
            if not are_far_apart(keys, is_set=not _HASHED[kind]):
                raise ValueError("keys that were chosen to have the same hashes")
        if kind == "OrderedDict" and "metadata" in node:
            state: OrderedDict[Any, Any] = OrderedDict(items)
            vars(state)["_metadata"] = self.state(node["metadata"], depth + 1)
            return state
        return _FROM_ITEMS[kind](items)

    def _tuple_type(self, name: Any, fields: list[Any]) -> Any:
        if len(fields) > _MOST_FIELDS:
            raise ValueError(f"a named tuple of more than {_MOST_FIELDS} fields")
        if len({unicodedata.normalize("NFKC", field) for field in fields}) < len(fields):
            raise ValueError("two fields of a named tuple have one name")  # to Python's parser
        kind = _tuple_type(name, tuple(fields))
        self._tuple_types.add(kind)
        if len(self._tuple_types) > _MOST_TUPLES:
            raise ValueError(f"more than {_MOST_TUPLES} types of named tuples")
        return kind


@lru_cache(maxsize=_MOST_TUPLES)
def _tuple_type(name: str, fields: tuple[str, ...]) -> Any:
    """Return the type of a named tuple; two states that are loaded one after the other have the same type."""
    return namedtuple(name, fields)  # raises ValueError for a name that is not an identifier


def _counter(items: Iterable[Any]) -> Counter[Any]:
    counter: Counter[Any] = Counter()
    dict.update(counter, items)
    return counter


def _scalar_of(node: Mapping[str, Any]) -> np.generic:
    dtype, data = _SCALARS[node["type"]], bytes.fromhex(node["hex"])
    if len(data) != dtype.itemsize:
        raise ValueError(f"{plural(len(data), 'byte')} for a scalar of {dtype}")
    scalar: np.generic = np.frombuffer(data, dtype)[0]
    return scalar


_HASHED = {"dict": True, "OrderedDict": True, "Counter": True, "set": False, "frozenset": False}
"""The containers of keys: whether their items are pairs of a key and a value."""

_FROM_ITEMS: dict[str, Callable[[list[Any]], Any]] = {
    "dict": dict,
    "OrderedDict": OrderedDict,
    "Counter": _counter,
    "tuple": tuple,
    "set": set,
    "frozenset": frozenset,
    "complex": lambda items: complex(*items),
}
_FROM_HEX: dict[str, Callable[[Mapping[str, Any]], Any]] = {
    "int": lambda node: int(node["hex"], 16),
    "float": lambda node: struct.unpack(">d", bytes.fromhex(node["hex"]))[0],
    "str": lambda node: bytes.fromhex(node["hex"]).decode("utf-8", "surrogatepass"),
    "bytes": lambda node: bytes.fromhex(node["hex"]),
    "bytearray": lambda node: bytearray.fromhex(node["hex"]),
    "scalar": _scalar_of,
}
_KNOWN = frozenset({*_FROM_ITEMS, *_FROM_HEX, *VALUES, *CONTAINERS, "namedtuple"})
