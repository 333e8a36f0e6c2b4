"""Zarr trees of versions 2 and 3; the root may be a group or an array. The zarr library is only used to write them.

A tree is a folder, or a zip archive of one. It is walked before anything in it is opened. Metadata is checked and
chunks are decoded here: see `varstore.formats.zarr.arrays` and `varstore.formats.zarr.codecs`. These are refused:
codecs that are not in the table (numcodecs has one that unpickles), links, names that zarr itself reads as others, and
arrays that are out of proportion to the files.

Format: https://zarr-specs.readthedocs.io
"""

from __future__ import annotations

import contextlib
import math
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from varstore.errors import (
    FormatError,
    InvalidName,
    MissingDependency,
    UnsafeContent,
    UnsupportedDtype,
    UsageError,
)
from varstore.formats.binary.budget import Budget
from varstore.formats.binary.folder import WalkedFolder
from varstore.formats.binary.metadata import parse_json
from varstore.formats.binary.source import Held, Source
from varstore.formats.binary.zipped import ZippedFolder
from varstore.formats.opened import ForeignCheckpoint
from varstore.formats.state.flat import fetch_plain, flat_arrays
from varstore.formats.zarr.arrays import Layout, lazy_array
from varstore.storage.appearing import new_folder
from varstore.storage.looking import kind_of
from varstore.values.lazy import LazyArray
from varstore.values.nodes import BARE

__all__ = ["V2_ARRAY", "V3", "Absent", "array_in", "check_key", "json_in", "read", "write"]

V3, V2_ARRAY, _V2_GROUP, _V2_ATTRIBUTES = "zarr.json", ".zarray", ".zgroup", ".zattrs"
_DEEPEST = 32
Absent = Literal["fill", "error"]
"""What chunks that are absent are: the fill value, or an error."""
_MOST_METADATA = 1 << 24


def read(path: str, *, limit: int | None = None, absent: Absent = "fill") -> ForeignCheckpoint:
    """Open a tree, a folder or a zip archive; chunks that were never written have the fill value of the array.

    With ``absent="error"``, they are refused: a tree is whole if zarr wrote it with ``write_empty_chunks``.

    Raises:
        FormatError: the metadata is not zarr's, or a file is not a regular one.
        UnsafeContent: there is a link, a codec could run code, zarr would change a name, or the arrays are far larger
            than their files.
        UnsupportedDtype: an array contains objects.
    """
    if isinstance(path, Held) or kind_of(path) == stat.S_IFREG:
        source = Source(path)
        budget = Budget(path, source.size, limit=limit, refuses_absent=absent == "error")
        folder: WalkedFolder = ZippedFolder.opened(source, budget)
        budget.allow_absent(len(folder.files))
    else:
        folder = WalkedFolder.walked(path)
        files = len(folder.files)
        budget = Budget(path, folder.size, files=files, limit=limit, refuses_absent=absent == "error")
    attributes: dict[str, Any] = {}
    arrays: dict[str, LazyArray] = {}
    nodes = 0
    for name, record in _nodes(folder, budget, "", 0):
        nodes += 1
        if not name:
            attributes = record.attributes
        if record.is_array:
            arrays[name] = _array(folder, budget, name, name or BARE, record)
    if not nodes:
        raise FormatError(
            "there is no zarr metadata in this folder", path=path, expected=f"{V3}, {_V2_GROUP} or {V2_ARRAY}"
        )
    return ForeignCheckpoint(path, "zarr", arrays.get("", arrays), attributes, budget=budget)


def array_in(folder: WalkedFolder, budget: Budget, place: str, name: str) -> LazyArray:
    """Return the array in one folder of a tree, for formats that store the names of arrays elsewhere.

    Raises:
        FormatError: the folder does not contain an array.
        UnsafeContent, UnsupportedDtype: see `read`.
    """
    record = _record(folder, budget, place)
    if record is None or not record.is_array:
        raise FormatError("the folder does not contain a zarr array", path=folder.path, variable=name, found=place)
    return _array(folder, budget, place, name, record)


def check_key(path: str, key: str, name: str) -> None:
    """Check that a key or the name of a folder is a plain path, which no library reads as another one.

    Raises:
        UnsafeContent: a part is empty, ``.`` or ``..``, or there is a backslash, which zarr changes to a slash.
    """
    if "\\" in key or "\0" in key or {"", ".", ".."} & set(key.split("/")):
        raise UnsafeContent(
            "a key of the tree is not a plain path below it", path=path, variable=name, found=repr(key[:100])
        )


def write(
    path: str,
    state: Any,
    *,
    attributes: Mapping[str, Any] | None = None,
    zarr_format: int = 3,
    overwrite: bool = False,
) -> None:
    """Write a tree; each part of a name before a ``/`` is a group.

    Args:
        path: where to write; it must not exist, unless it is a tree that is to be replaced.
        state: names and arrays, or nested state of arrays and numbers.
        attributes: JSON data to keep with the root group.
        zarr_format: the version of the format, 2 or 3.
        overwrite: replace a tree at `path`, all of it, in one step.

    Raises:
        CheckpointExists: the path exists.
        InvalidName: zarr reserves a name, or a name is below that of an array.
        UnsupportedDtype: zarr does not have a type.
        UsageError: a value is not an array or a number; see `flat_arrays`.
        MissingDependency: zarr is not installed.
        StorageError: the operating system refused.
    """
    zarr = _library(path)
    if zarr_format not in (2, 3):
        raise UsageError("there is no such version of the zarr format", path=path, found=zarr_format, expected="2 or 3")
    arrays = flat_arrays(state, format="zarr")
    for name, array in arrays.items():
        _check_writable(path, name, array, arrays)
    with new_folder(path, may_replace=_is_tree if overwrite else None) as staging, _waiting_for_threads():
        store = zarr.storage.LocalStore(staging)
        is_bare = set(arrays) == {BARE}
        if not is_bare:
            zarr.create_group(store, zarr_format=zarr_format, attributes=dict(attributes or {}))
        for name, array in arrays.items():
            values = fetch_plain(name, array)
            zarr.create_array(store, name=None if is_bare else name, data=values, zarr_format=zarr_format)


@contextlib.contextmanager
def _waiting_for_threads() -> Iterator[None]:
    """After Ctrl-C or an error, wait for what the package's threads still write to the folder that is to be removed."""
    try:
        yield
    except BaseException:
        import asyncio

        import zarr.core.sync

        async def rest() -> None:
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            await asyncio.gather(*tasks, return_exceptions=True)

        zarr.core.sync.sync(rest())
        raise


def _is_tree(path: str) -> bool:
    try:
        return not {V3, V2_ARRAY, _V2_GROUP}.isdisjoint(os.listdir(path))
    except (FileNotFoundError, NotADirectoryError):
        return False


@dataclass(frozen=True, kw_only=True, slots=True)
class _Record:
    """The metadata of one node: the name of its file, the fields in it, and the user's attributes."""

    file: str
    fields: dict[str, Any]
    attributes: dict[str, Any]

    @property
    def is_array(self) -> bool:
        return self.file == V2_ARRAY or (self.file == V3 and self.fields.get("node_type") == "array")


def _nodes(folder: WalkedFolder, budget: Budget, place: str, depth: int) -> Iterator[tuple[str, _Record]]:
    if place:
        check_key(folder.path, place, place)
    record = _record(folder, budget, place)
    if record is not None:
        yield place, record
        if record.is_array:
            return
    if depth > _DEEPEST:
        raise FormatError("groups are nested too deeply", path=folder.path, found=f"more than {_DEEPEST}")
    for name in folder.folders[place]:
        yield from _nodes(folder, budget, _joined(place, name), depth + 1)


def _record(folder: WalkedFolder, budget: Budget, place: str) -> _Record | None:
    for file in (V3, V2_ARRAY, _V2_GROUP):
        if _joined(place, file) in folder.files:
            fields = json_in(folder, budget, _joined(place, file))
            own: Any = fields.get("attributes")
            if file != V3:
                has_own = _joined(place, _V2_ATTRIBUTES) in folder.files
                own = json_in(folder, budget, _joined(place, _V2_ATTRIBUTES)) if has_own else {}
            return _Record(file=file, fields=fields, attributes=own if isinstance(own, dict) else {})
    return None


def json_in(folder: WalkedFolder, budget: Budget, file: str, *, most: int = _MOST_METADATA) -> dict[str, Any]:
    """Return the JSON object in a file of a folder.

    Raises:
        SizeMismatch: the file is larger than `most` bytes.
        FormatError: see `parse_json`.
    """
    return parse_json(folder.content(file, most=most), budget, path=os.path.join(folder.path, file))


def _array(folder: WalkedFolder, budget: Budget, place: str, name: str, record: _Record) -> LazyArray:
    version = 3 if record.file == V3 else 2
    layout = Layout.parsed(record.fields | {"zarr_format": version}, path=folder.path, name=name)
    places = [(at, key) for key in folder.below(place) if (at := layout.position(key)) is not None]
    budget.absent(math.prod(layout.grid) - len(places), variable=name)
    padded = len(places) * layout.chunk_nbytes - layout.nbytes
    if padded > 0:
        budget.announce(padded, variable=name)

    def read(key: str) -> bytes | None:
        return folder.content(_joined(place, key))

    return lazy_array(layout, lambda: places, read, budget)


def _joined(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name


def _library(path: str) -> Any:
    try:
        import zarr
    except ImportError as error:
        raise MissingDependency(
            "writing zarr trees requires the zarr library", path=path, hint="install it: pip install varstore[zarr]"
        ) from error
    if int(zarr.__version__.partition(".")[0]) < 3:
        raise MissingDependency(
            "writing zarr trees requires zarr 3",
            path=path,
            found=zarr.__version__,
            expected="3.0.8 or later",
            hint="install it: pip install varstore[zarr]",
        )
    return zarr


def _check_writable(path: str, name: str, array: LazyArray, arrays: Mapping[str, Any]) -> None:
    if array.dtype.kind not in "biufc" or array.dtype.itemsize > 16 or array.dtype.type.__module__ != "numpy":
        raise UnsupportedDtype(
            "zarr does not have this type", path=path, variable=name, found=str(array.dtype), hint="convert it first"
        )
    parts = name.split("/")
    if any(part in ("", ".", "..", V3) or part.startswith(("__", ".z")) or "\0" in part for part in parts):
        raise InvalidName("zarr reserves such names", path=path, variable=name, hint="rename it")
    above = ["/".join(parts[:depth]) for depth in range(1, len(parts))]
    if taken := [prefix for prefix in above if prefix in arrays]:
        raise InvalidName(
            "the name is below that of an array",
            path=path,
            variable=name,
            found=repr(taken[0]),
            hint="rename one of them",
        )
