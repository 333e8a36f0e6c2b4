"""Orbax checkpoints of JAX: names and structure in ``_METADATA``, and a zarr array for each leaf.

A `CheckpointManager` keeps a folder for each step, and in it a folder for each item; a single item is ``default``.

Leaves are in folders named by their keys, joined by ``.``, or all in one OCDBT database, which only the tensorstore
library can read. It is asked for the bytes of one key at a time; the metadata in them is checked and the chunks are
decoded here, as in any zarr tree. Orbax stores Python numbers as 0-d arrays, and they are read as arrays.

Source: https://orbax.readthedocs.io/en/latest/guides/checkpoint/checkpoint_format.html
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Callable, Iterator
from typing import Any

from varstore.errors import FormatError, MissingDependency, UnsafeContent
from varstore.formats.binary.budget import Budget
from varstore.formats.binary.folder import WalkedFolder
from varstore.formats.binary.metadata import parse_json
from varstore.formats.opened import ForeignCheckpoint
from varstore.formats.pickles.tree import DEEPEST
from varstore.formats.zarr.arrays import Layout, Place, lazy_array
from varstore.formats.zarr.tree import V2_ARRAY, V3, Absent, array_in, check_key, json_in
from varstore.storage.failures import translated
from varstore.storage.looking import kind_of
from varstore.values.lazy import LazyArray

__all__ = ["METADATA", "STEP_METADATA", "read"]

METADATA = "_METADATA"
STEP_METADATA = "_CHECKPOINT_METADATA"
_JSON_ITEM, _DEFAULT_ITEM = "metadata", "default"
_STEP = re.compile(r"(?:.+_)?([0-9]{1,18})", re.DOTALL)
_OCDBT = "manifest.ocdbt"
_SEQUENCE = 1
_MOST_METADATA = 1 << 28
_NO_ARRAY = {"None", "string", "Dict", "List", "NamedTuple", "Tuple"}


def read(path: str, *, limit: int | None = None, absent: Absent = "fill") -> ForeignCheckpoint:
    """Open a checkpoint, a step with several items, or the latest step in the directory of a `CheckpointManager`.

    A checkpoint is a folder with ``_METADATA``. Leaves without an array (None, text, empty containers) are None in
    `state`. The names of several items begin with that of the item; one that is JSON data is in `state`. With
    ``absent="error"``, chunks that were not written are refused; in a database, when the array is read.

    Raises:
        FormatError: the metadata is not Orbax's, a leaf is missing, or a file is not a regular one.
        UnsafeContent: a leaf is outside the checkpoint, there is a link, or the arrays are far larger than the files.
        UnsupportedDtype: a leaf is an array of text.
        MissingDependency: tensorstore is not installed, which an OCDBT database requires.
    """
    step = _step(path)
    names = _items(step)
    for name in names:
        _refuse_link(step, name, "an item of this step")
    items = {name: WalkedFolder.walked(os.path.join(step, name)) for name in names}
    size, files = sum(folder.size for folder in items.values()), sum(len(folder.files) for folder in items.values())
    budget = Budget(path, size, files=files, limit=limit, refuses_absent=absent == "error")
    trees: dict[str, Any] = {}
    attributes: dict[str, Any] = {}
    items = {name: folder for name, folder in items.items() if {METADATA, _JSON_ITEM} & folder.files.keys()}
    is_one = len(items) == 1 and not items.keys() - {"", _DEFAULT_ITEM}
    for name, folder in items.items():
        if METADATA in folder.files:
            trees[name], attributes = _tree(folder, budget, "" if is_one else f"{name}/")
        else:
            trees[name] = _json_item(folder, budget)
    tree = next(iter(trees.values())) if is_one else trees
    return ForeignCheckpoint(path, "orbax", tree, attributes if is_one else {}, budget=budget)


def _json_item(folder: WalkedFolder, budget: Budget) -> dict[str, Any]:
    item = json_in(folder, budget, _JSON_ITEM)
    level: list[Any] = [item]
    for _ in range(DEEPEST):
        level = [inner for outer in level for inner in (outer.values() if isinstance(outer, dict) else outer)]
        level = [inner for inner in level if isinstance(inner, dict | list)]
    if level:
        raise FormatError(
            "the data is nested too deeply",
            path=os.path.join(folder.path, _JSON_ITEM),
            expected=f"at most {DEEPEST} levels",
        )
    return item


def _step(path: str) -> str:
    """Return the path of a checkpoint or step: the path itself, or the latest step in it that was committed."""
    with translated(path, "reading failed"):
        names = os.listdir(path)
    if METADATA in names or STEP_METADATA in names:
        return path
    numbers = {name: int(match[1]) for name in names if (match := _STEP.fullmatch(name))}
    for name in sorted(numbers, key=numbers.__getitem__, reverse=True):
        step = os.path.join(path, name)
        if kind_of(os.path.join(step, STEP_METADATA)) and _items(step):
            _refuse_link(path, name, "the latest step")
            return step
    return path


def _items(step: str) -> list[str]:
    """Return the folders of the items of a step, ``""`` for a checkpoint that is not in several items."""
    if kind_of(os.path.join(step, METADATA)):
        return [""]
    with translated(step, "reading failed"):
        names = sorted(os.listdir(step))
    kept = [name for name in names if any(kind_of(os.path.join(step, name, file)) for file in (METADATA, _JSON_ITEM))]
    if not any(kind_of(os.path.join(step, name, METADATA)) for name in kept):
        raise FormatError(f"there is no {METADATA} in this folder, nor in one below it", path=step)
    return kept


def _refuse_link(folder: str, name: str, what: str) -> None:
    place = os.path.join(folder, name)
    if name and os.path.islink(place):
        raise UnsafeContent(
            f"{what} is a link",
            path=folder,
            found=f"{name!r} -> {os.readlink(place)!r}",
            hint="replace it by a copy, or open the place that it leads to",
        )


def _tree(folder: WalkedFolder, budget: Budget, prefix: str) -> tuple[Any, dict[str, Any]]:
    """Return the tree of one item, and its metadata; `prefix` begins the names of its arrays."""
    metadata = _metadata(folder, budget)
    is_v3 = bool(metadata.get("use_zarr3", False))
    find = _finder(folder, budget, is_v3=is_v3, is_ocdbt=bool(metadata.get("use_ocdbt", _OCDBT in folder.files)))
    tree = _Node()
    for label, leaf in metadata["tree_metadata"].items():
        keys, kind = _keys(folder.path, label, leaf)
        name, place = "/".join(key for key, _ in keys), ".".join(key for key, _ in keys)
        if kind not in _NO_ARRAY:
            check_key(folder.path, place, name)
        tree.put(folder.path, keys, None if kind in _NO_ARRAY else find(place, prefix + name))
    return tree.plain(), {"custom": metadata.get("custom_metadata")}


def _metadata(folder: WalkedFolder, budget: Budget) -> dict[str, Any]:
    metadata = json_in(folder, budget, METADATA, most=_MOST_METADATA)
    if not isinstance(metadata.get("tree_metadata"), dict):
        path = os.path.join(folder.root, METADATA)
        raise FormatError("not the metadata of Orbax", path=path, expected="tree_metadata, an object")
    return metadata


def _keys(path: str, label: str, leaf: Any) -> tuple[list[tuple[str, bool]], str]:
    """Return the keys of a leaf, each with whether it is the index of a sequence, and the type of the value."""
    try:
        keys = [(str(part["key"]), int(part["key_type"]) == _SEQUENCE) for part in leaf["key_metadata"]]
        kind = str(leaf["value_metadata"]["value_type"])
        if len(keys) > DEEPEST or any(is_index and str(int(key)) != key for key, is_index in keys):
            raise ValueError("a key that is not an index, or too many keys")
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise FormatError(
            "not the metadata of a leaf", path=os.path.join(path, METADATA), variable=label, found=repr(error)[:200]
        ) from None
    return keys, kind


class _Node:
    """A container: its items by their keys as text, because the hash of text is keyed."""

    __slots__ = ("is_sequence", "items")

    def __init__(self) -> None:
        self.items: dict[str, _Node | LazyArray | None] = {}
        self.is_sequence = False

    def put(self, path: str, keys: list[tuple[str, bool]], leaf: LazyArray | None) -> None:
        node: _Node | LazyArray | None = self
        for depth, (key, is_index) in enumerate(keys, 1):
            if not isinstance(node, _Node) or (depth == len(keys) and key in node.items):
                break
            node.is_sequence |= is_index
            node = node.items.setdefault(key, _Node() if depth < len(keys) else leaf)
        else:
            if keys:
                return
        raise FormatError("a leaf is inside another one", path=path, variable="/".join(key for key, _ in keys))

    def plain(self) -> Any:
        values = {key: item.plain() if isinstance(item, _Node) else item for key, item in self.items.items()}
        if self.is_sequence and all(str(index) in values for index in range(len(values))):
            return [values[str(index)] for index in range(len(values))]
        return values


def _finder(folder: WalkedFolder, budget: Budget, *, is_v3: bool, is_ocdbt: bool) -> Callable[[str, str], LazyArray]:
    """Return the function that opens the array at a place, whose name is the second argument."""
    if not is_ocdbt:
        return lambda place, name: array_in(folder, budget, place, name)
    database = _Database(folder)
    return lambda place, name: database.array(place, name, budget, is_v3=is_v3)


class _Database:
    """The keys of an OCDBT database and their bytes."""

    def __init__(self, folder: WalkedFolder) -> None:
        try:
            import tensorstore  # type: ignore[import-not-found, unused-ignore]
        except ImportError as error:
            raise MissingDependency(
                "reading an Orbax checkpoint in an OCDBT database requires tensorstore",
                path=folder.path,
                hint="install it: pip install tensorstore, or save the checkpoint without OCDBT",
            ) from error
        self._path = folder.path
        base = {"driver": "file", "path": f"{folder.root}{os.sep}"}
        try:
            self._store = tensorstore.KvStore.open({"driver": "ocdbt", "base": base}).result()
        except (ValueError, OSError) as error:
            raise FormatError("tensorstore cannot open the database", path=self._path, found=str(error)) from error

    def read(self, key: str, name: str) -> bytes | None:
        """Return the bytes of a key, or None if the database does not contain it."""
        try:
            found = self._store.read(key).result()
        except (ValueError, OSError) as error:
            raise FormatError(
                "tensorstore cannot read this leaf", path=self._path, variable=name, field=key, found=str(error)
            ) from error
        return found.value if found.state == "value" else None

    def array(self, place: str, name: str, budget: Budget, *, is_v3: bool) -> LazyArray:
        """Return the array whose keys begin with a place."""
        text = self.read(f"{place}/{V3 if is_v3 else V2_ARRAY}", name)
        if text is None:
            raise FormatError("the database does not contain a zarr array", path=self._path, variable=name, found=place)
        fields = parse_json(text, budget, path=self._path) | {"zarr_format": 3 if is_v3 else 2}
        layout = Layout.parsed(fields, path=self._path, name=name)

        def chunks() -> Iterator[Place]:
            return ((at, layout.key(at)) for at in itertools.product(*map(range, layout.grid)))

        absent: set[str] = set()

        def read(key: str) -> bytes | None:
            raw = self.read(f"{place}/{key}", name)
            if raw is None and key not in absent:  # paid once, however often the array is read
                absent.add(key)
                budget.absent(1, variable=name)
            return raw

        return lazy_array(layout, chunks, read, budget)
