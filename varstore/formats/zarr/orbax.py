"""Orbax checkpoints of JAX: names and structure in ``_METADATA``, and a zarr array for each leaf.

Leaves are in folders named by their keys, joined by ``.``, or all in one OCDBT database, which only the tensorstore
library can read. Orbax stores Python numbers as 0-d arrays, and they are read as arrays.

Source: https://orbax.readthedocs.io/en/latest/guides/checkpoint/checkpoint_format.html
"""

from __future__ import annotations

import json
import os
from typing import Any

import numpy as np

from varstore.errors import FormatError, MissingDependency, SizeMismatch, UnsupportedDtype
from varstore.formats.binary.source import Source, count_elements
from varstore.formats.opened import ForeignCheckpoint
from varstore.formats.zarr.tree import array_in
from varstore.values.lazy import LazyArray

__all__ = ["read"]

METADATA = "_METADATA"
_OCDBT = "manifest.ocdbt"
_SEQUENCE = 1
_MOST_METADATA = 1 << 28
_NO_ARRAY = {"None", "string", "Dict", "List", "NamedTuple", "Tuple"}


def read(path: str) -> ForeignCheckpoint:
    """Open a checkpoint: the folder that contains ``_METADATA``.

    Leaves without an array (None, text, empty containers) are None in `state`.

    Raises:
        FormatError: the metadata is not Orbax's, or a leaf is missing.
        UnsafeContent: a leaf is outside the checkpoint.
        UnsupportedDtype: a leaf is an array of text.
        MissingDependency: zarr is not installed, or tensorstore, which an OCDBT database requires.
    """
    metadata = _metadata(path)
    is_ocdbt = bool(metadata.get("use_ocdbt", os.path.exists(os.path.join(path, _OCDBT))))
    is_v3 = bool(metadata.get("use_zarr3", False))
    leaves = metadata["tree_metadata"]
    tree: dict[Any, Any] = {}
    sequences: set[tuple[Any, ...]] = set()
    for label, leaf in leaves.items():
        keys, kinds, kind = _keys(path, label, leaf)
        for depth, is_sequence in enumerate(kinds):
            if is_sequence:
                sequences.add(keys[:depth])
        _put(path, tree, keys, None if kind in _NO_ARRAY else _leaf(path, keys, is_ocdbt=is_ocdbt, is_v3=is_v3))
    return ForeignCheckpoint(path, "orbax", _lists(tree, (), sequences), {"custom": metadata.get("custom_metadata")})


def _metadata(path: str) -> dict[str, Any]:
    file = os.path.join(path, METADATA)
    if not os.path.exists(file):
        items = [name for name in sorted(os.listdir(path)) if os.path.exists(os.path.join(path, name, METADATA))]
        hint = f"open {os.path.join(path, items[0])!r}" if items else None
        raise FormatError(f"there is no {METADATA} in this folder", path=path, hint=hint)
    source = Source(file)
    if source.size > _MOST_METADATA:
        raise SizeMismatch("the metadata is too long", path=file, found=source.size, expected=_MOST_METADATA)
    try:
        metadata = json.loads(source.bytes(0, source.size))
    except (ValueError, RecursionError) as error:
        raise FormatError("the metadata is not valid JSON", path=file, found=str(error)) from None
    if not isinstance(metadata, dict) or not isinstance(metadata.get("tree_metadata"), dict):
        raise FormatError("not the metadata of Orbax", path=file, expected="tree_metadata, an object")
    return metadata


def _keys(path: str, label: str, leaf: Any) -> tuple[tuple[Any, ...], list[bool], str]:
    """Return the keys of a leaf, which of them are indices of a sequence, and the type of the value."""
    try:
        parts = [(part["key"], int(part["key_type"]) == _SEQUENCE) for part in leaf["key_metadata"]]
        kind = str(leaf["value_metadata"]["value_type"])
        keys = tuple(int(key) if is_sequence else str(key) for key, is_sequence in parts)
    except (KeyError, TypeError, ValueError) as error:
        raise FormatError(
            "not the metadata of a leaf", path=os.path.join(path, METADATA), variable=label, found=repr(error)
        ) from None
    return keys, [is_sequence for _, is_sequence in parts], kind


def _put(path: str, tree: dict[Any, Any], keys: tuple[Any, ...], leaf: LazyArray | None) -> None:
    node = tree
    for key in keys[:-1]:
        node = node.setdefault(key, {})
        if not isinstance(node, dict):
            break
    if not keys or not isinstance(node, dict) or keys[-1] in node:
        raise FormatError("a leaf is inside another one", path=path, variable="/".join(map(str, keys)))
    node[keys[-1]] = leaf


def _lists(node: Any, keys: tuple[Any, ...], sequences: set[tuple[Any, ...]]) -> Any:
    if not isinstance(node, dict):
        return node
    values = {key: _lists(value, (*keys, key), sequences) for key, value in node.items()}
    if keys in sequences and sorted(values) == list(range(len(values))):
        return [values[index] for index in range(len(values))]
    return values


def _leaf(path: str, keys: tuple[Any, ...], *, is_ocdbt: bool, is_v3: bool) -> LazyArray:
    name = "/".join(map(str, keys))
    folder = ".".join(map(str, keys))
    return _from_tensorstore(path, folder, name, is_v3=is_v3) if is_ocdbt else array_in(path, folder, name)


def _from_tensorstore(path: str, folder: str, name: str, *, is_v3: bool) -> LazyArray:
    try:
        import tensorstore  # type: ignore[import-not-found, unused-ignore]
    except ImportError as error:
        raise MissingDependency(
            "reading an Orbax checkpoint in an OCDBT database requires tensorstore",
            path=path,
            hint="install it: pip install tensorstore, or save the checkpoint without OCDBT",
        ) from error
    base = f"file://{os.path.realpath(path)}/"
    spec = {"driver": "zarr3" if is_v3 else "zarr", "kvstore": {"driver": "ocdbt", "base": base, "path": f"{folder}/"}}
    try:
        array = tensorstore.open(spec, read=True, open=True).result()
        shape, dtype = tuple(array.shape), np.dtype(array.dtype.numpy_dtype)
    except (ValueError, OSError) as error:
        raise FormatError("tensorstore cannot open this leaf", path=path, variable=name, found=str(error)) from error
    if dtype.hasobject:
        raise UnsupportedDtype("arrays of text are not supported", path=path, variable=name, found=str(dtype))
    count_elements(shape, dtype.itemsize, path=path, variable=name)

    def fetch() -> np.ndarray:
        try:
            return np.asarray(array.read().result())
        except (ValueError, OSError) as error:
            raise FormatError(
                "tensorstore cannot read this leaf", path=path, variable=name, found=str(error)
            ) from error

    return LazyArray(shape, dtype, fetch)
