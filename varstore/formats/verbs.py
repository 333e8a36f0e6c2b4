"""The three verbs over all formats: read, write, convert. The table behind them is imported when one is used."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypedDict, Unpack

import ml_dtypes
import numpy as np

from varstore.disk.progress import Progress, reporting
from varstore.disk.read.checkpoint import Checkpoint
from varstore.errors import UnsupportedDtype, UsageError
from varstore.formats.native import OpenedCheckpoint, nested
from varstore.formats.nodes import leaves, replaced
from varstore.formats.opened import ForeignCheckpoint
from varstore.model.options import StoreOptions
from varstore.values.arrays import Stored
from varstore.values.lazy import LazyArray
from varstore.values.select import Patterns, Rename, select

__all__ = ["ConvertOptions", "Converted", "ReadOptions", "WriteOptions", "convert", "read", "write"]


class ReadOptions(TypedDict, total=False):
    """What one format's `read` takes beside the path."""

    key: bytes | None
    """MindSpore: the key of an encrypted file."""
    crc_check: bool
    """MindSpore: compare the checksum at the end of the file."""


class ConvertOptions(StoreOptions, total=False):
    """What one format's `write` takes beside the path and the values."""

    model: str | None
    """ONNX: the model whose initializers are replaced in a copy."""
    metadata: Mapping[str, str] | None
    """safetensors: the file's own metadata."""
    shard_bytes: int
    """safetensors: the size from which a file is split in several."""
    zarr_format: int
    """Zarr: 3, or 2."""


class WriteOptions(ConvertOptions, total=False):
    """All options of `write`."""

    progress: Progress


@dataclass(frozen=True, kw_only=True, slots=True)
class Converted:
    """What `convert` did; `left_out` names what the source held beside arrays and the target could not take."""

    source_format: str
    format: str
    names: tuple[str, ...]
    nbytes: int
    left_out: tuple[str, ...]


def read(
    path: str | os.PathLike[str], format: str | None = None, **options: Unpack[ReadOptions]
) -> OpenedCheckpoint | ForeignCheckpoint:
    """Open a file or folder of any format as a lazy mapping of names to arrays.

    Args:
        path: what to open.
        format: its name in the table, where it cannot be told from the content.
        options: what the format's own `read` takes, such as a key.

    Raises:
        UsageError: unknown format.
        FormatError: what lies there is not what its format says.
        CheckpointNotFound: nothing lies there.
    """
    from varstore.formats.registry import detect, named

    row = detect(path) if format is None else named(format)
    opened: OpenedCheckpoint | ForeignCheckpoint = row.module.read(os.fspath(path), **options)
    return opened


def write(
    path: str | os.PathLike[str], variables_or_state: Any, format: str | None = None, **options: Unpack[WriteOptions]
) -> None:
    """Write names and arrays, or nested state, in any format that can be written.

    Args:
        path: its suffix tells the format; without one it is a checkpoint directory.
        variables_or_state: a mapping of names to arrays, or what else the format's own `write` takes.
        format: its name in the table, where the suffix does not tell.
        options: what the format's own `write` takes, such as an ONNX model.

    Raises:
        UsageError: unknown format, one that is only read, or state that it cannot hold.
    """
    from varstore.formats.registry import target_format

    target_format(os.fspath(path), format).module.write(os.fspath(path), variables_or_state, **options)


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    format: str | None = None,
    source_format: str | None = None,
    include: Patterns | None = None,
    exclude: Patterns | None = None,
    rename: Rename | None = None,
    dtype: Any = None,
    progress: Progress = None,
    **options: Unpack[ConvertOptions],
) -> Converted:
    """Write what one file or folder holds as another, one tensor at a time.

    Nested state keeps its structure where the target can and nothing is selected or renamed.

    Args:
        source: what to read.
        target: what to write.
        format: the target's format, where its suffix does not tell.
        source_format: the source's, where its content does not tell.
        include: see `varstore.values.select.select`; so are `exclude` and `rename`.
        exclude: patterns of names to leave out.
        rename: how names change.
        dtype: a floating type that all floating tensors are converted to.
        progress: True for a bar, or a function of (bytes done, bytes in all).
        options: what the target's own `write` takes.

    Raises:
        UsageError, UnsupportedDtype: what the target cannot hold.
        FormatError: the source is not what its format says.
        VariableNotFound, VariableMismatch: see `select`.
    """
    from varstore.formats.registry import detect, named, target_format

    source, target = os.fspath(source), os.fspath(target)
    if os.path.realpath(source) == os.path.realpath(target):
        raise UsageError("source and target are the same", path=source)
    row = target_format(target, format)
    source_row = detect(source) if source_format is None else named(source_format)
    cast = None if dtype is None else _floating(dtype)
    opened = read(source, source_row.name)
    chosen = select(opened, include=include, exclude=exclude, rename=rename, path=source)
    arrays = {name: opened[origin] for name, origin in chosen.items()}
    total = sum(array.nbytes for array in arrays.values())
    is_whole = chosen == {name: name for name in opened}
    keeps_tree = row.is_nested and is_whole
    tree = opened.tree if isinstance(opened, ForeignCheckpoint) else {}
    kept: dict[str, str] = {}
    is_linked = row is source_row and row.name == "varstore"
    if isinstance(opened, Checkpoint):
        tree = nested(opened) or {}
        if is_linked and is_whole and opened.manifest is not None:
            kept = {"tree": opened.manifest.tree}  # the state around the variables, as it stands
    with reporting(progress, total, f"writing {target}") as advance:
        wrapped = _Wrapped(cast, advance)
        if keeps_tree and tree and not is_linked:
            state = wrapped.tree(tree)
        else:
            state = {name: wrapped.array(array) for name, array in arrays.items()}
        row.module.write(target, state, **kept, **options)
    left_out = () if keeps_tree else tuple(name for name, leaf in leaves(tree) if not isinstance(leaf, LazyArray))
    return Converted(
        source_format=source_row.name, format=row.name, names=tuple(arrays), nbytes=total, left_out=left_out
    )


class _Wrapped:
    """Arrays that are cast and counted as they are read; one array of two names stays one."""

    def __init__(self, cast: np.dtype[Any] | None, advance: Callable[[int], None] | None) -> None:
        self._cast = cast
        self._advance = advance
        self._known: dict[int, tuple[Any, Any]] = {}

    def array(self, array: Any) -> Any:
        if id(array) not in self._known:
            self._known[id(array)] = (array, self._wrap(array))
        return self._known[id(array)][1]

    def tree(self, node: Any) -> Any:
        return replaced(node, lambda leaf: self.array(leaf) if isinstance(leaf, LazyArray) else leaf)

    def _wrap(self, array: Any) -> Any:
        cast = self._cast if self._cast is not None and _is_floating(array.dtype) else None
        if isinstance(array, Stored) and cast is None:
            self._count(array.entry.nbytes)
            return array

        def fetch() -> np.ndarray:
            values = np.asarray(array)
            self._count(values.nbytes)
            return values if cast is None else values.astype(cast, copy=False)

        attributes = array.attributes if isinstance(array, LazyArray) else None
        return LazyArray(tuple(array.shape), array.dtype if cast is None else cast, fetch, attributes)

    def _count(self, nbytes: int) -> None:
        if self._advance is not None:
            self._advance(nbytes)


def _floating(dtype: Any) -> np.dtype[Any]:
    scalar = getattr(ml_dtypes, dtype, dtype) if isinstance(dtype, str) else dtype
    try:
        found = np.dtype(scalar)
    except TypeError:
        found = None
    if found is None or not _is_floating(found):
        raise UnsupportedDtype(
            "only floating tensors are converted, to a floating type",
            field="dtype",
            found=repr(dtype),
            expected="float16, bfloat16, float32, float64 or another of numpy or ml_dtypes",
        )
    return found


def _is_floating(dtype: np.dtype[Any]) -> bool:
    return dtype.kind == "f" or dtype.name.startswith(("float", "bfloat"))
