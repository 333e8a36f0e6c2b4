"""The formats in one table, and the three verbs over them: read, write, convert.

Adding a format adds a row to the table. What lies on the disk tells its format before its suffix does; where
something is yet to be written, its suffix tells.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from varstore.disk.progress import Progress, reporting
from varstore.errors import UnsupportedDtype, UsageError
from varstore.formats import recognise
from varstore.formats.foreign import ForeignCheckpoint, LazyArray
from varstore.formats.recognise import Probe
from varstore.spec.arrays import Stored
from varstore.spec.select import Patterns, Rename, select

__all__ = ["FORMATS", "Converted", "Format", "convert", "detect", "read", "write"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Format:
    """One row: the module is imported when it is needed; `is_nested` formats keep scalars and structure."""

    name: str
    suffixes: tuple[str, ...]
    recognises: Callable[[Probe], bool]
    writes: bool = True
    is_nested: bool = False

    @property
    def module(self) -> Any:
        """The module with the two verbs."""
        return importlib.import_module(f"varstore.formats.{_MODULES.get(self.name, self.name)}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Converted:
    """What `convert` did; `left_out` names what the source held beside arrays and the target could not take."""

    source_format: str
    format: str
    names: tuple[str, ...]
    nbytes: int
    left_out: tuple[str, ...]


FORMATS: tuple[Format, ...] = (
    Format(name="varstore", suffixes=("",), recognises=recognise.is_native),
    Format(
        name="safetensors",
        suffixes=(".safetensors", ".safetensors.index.json"),
        recognises=recognise.is_safetensors,
    ),
    Format(
        name="torch",
        suffixes=(".pt", ".pth", ".bin", ".tar"),
        recognises=recognise.is_torch,
        is_nested=True,
    ),
    Format(name="numpy", suffixes=(".npz", ".npy"), recognises=recognise.is_numpy),
    Format(
        name="oneflow",
        suffixes=(".of",),
        recognises=recognise.is_oneflow,
        is_nested=True,
    ),
    Format(
        name="paddle",
        suffixes=(".pdparams", ".pdopt", ".pdckpt", ".pdiparams"),
        recognises=recognise.is_paddle,
        is_nested=True,
    ),
    Format(name="megengine", suffixes=(".mge", ".pkl"), recognises=recognise.is_megengine, is_nested=True),
    Format(name="mindspore", suffixes=(".ckpt",), recognises=recognise.is_mindspore),
    Format(name="onnx", suffixes=(".onnx",), recognises=recognise.is_onnx),
    Format(name="orbax", suffixes=(".orbax",), recognises=recognise.is_orbax, writes=False),
    Format(name="zarr", suffixes=(".zarr",), recognises=recognise.is_zarr),
)
"""In the order in which they are tried on what lies on the disk."""

_MODULES = {"varstore": "native"}
_BY_NAME = {format.name: format for format in FORMATS}


def detect(path: str | os.PathLike[str]) -> Format:
    """Return the format of what lies at a path: by its content, else by its suffix.

    Raises:
        CheckpointNotFound: nothing lies there.
        UsageError: no format that is known.
    """
    probe = Probe.of(os.fspath(path))
    for format in FORMATS:
        if format.recognises(probe):
            return format
    by_suffix = _by_suffix(probe.path)
    if by_suffix is None or (by_suffix.name == "varstore" and not probe.is_folder):
        raise UsageError(
            "the format of this is not known",
            path=probe.path,
            found=f"a folder of {list(probe.entries)[:5]}"
            if probe.is_folder
            else f"a file that begins {probe.head[:12]!r}",
            expected=f"one of {', '.join(_BY_NAME)}",
            hint="give its format",
        )
    return by_suffix


def read(path: str | os.PathLike[str], format: str | None = None, **options: Any) -> Mapping[str, Any]:
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
    row = detect(path) if format is None else _named(format)
    opened: Mapping[str, Any] = row.module.read(os.fspath(path), **options)
    return opened


def write(path: str | os.PathLike[str], state: Any, format: str | None = None, **options: Any) -> None:
    """Write names and arrays, or nested state, in any format that can be written.

    Args:
        path: its suffix tells the format; without one it is a checkpoint directory.
        state: see the format's own `write`.
        format: its name in the table, where the suffix does not tell.
        options: what the format's own `write` takes, such as an ONNX model.

    Raises:
        UsageError: unknown format, one that is only read, or state that it cannot hold.
    """
    _target(os.fspath(path), format).module.write(os.fspath(path), state, **options)


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
    **options: Any,
) -> Converted:
    """Write what one file or folder holds as another, one tensor at a time.

    Nested state keeps its structure where the target can and nothing is selected or renamed.

    Args:
        source: what to read.
        target: what to write.
        format: the target's format, where its suffix does not tell.
        source_format: the source's, where its content does not tell.
        include: see `varstore.spec.select.select`; so are `exclude` and `rename`.
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
    source, target = os.fspath(source), os.fspath(target)
    if os.path.realpath(source) == os.path.realpath(target):
        raise UsageError("source and target are the same", path=source)
    row = _target(target, format)
    source_row = detect(source) if source_format is None else _named(source_format)
    cast = None if dtype is None else _floating(dtype)
    opened = read(source, source_row.name)
    chosen = select(opened, include=include, exclude=exclude, rename=rename, path=source)
    arrays = {name: _lazy(opened, origin) for name, origin in chosen.items()}
    total = sum(array.nbytes for array in arrays.values())
    keeps_tree = row.is_nested and chosen == {name: name for name in opened}
    tree = opened.tree if isinstance(opened, ForeignCheckpoint) else {}
    with reporting(progress, total, f"writing {target}") as advance:
        wrapped = _Wrapped(cast, advance)
        if keeps_tree and tree:
            state = wrapped.tree(tree)
        else:
            state = {name: wrapped.array(array) for name, array in arrays.items()}
        row.module.write(target, state, **options)
    left_out = () if keeps_tree else tuple(_not_arrays(tree, ()))
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
        if isinstance(node, LazyArray):
            return self.array(node)
        if isinstance(node, dict):
            return type(node)((key, self.tree(value)) for key, value in node.items())
        if isinstance(node, (list, tuple)):
            return type(node)([self.tree(value) for value in node])
        return node

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


def _named(name: str) -> Format:
    try:
        return _BY_NAME[name]
    except KeyError:
        raise UsageError("unknown format", found=repr(name), expected=f"one of {', '.join(_BY_NAME)}") from None


def _by_suffix(path: str) -> Format | None:
    name = os.path.basename(path.rstrip("/")).lower()
    fitting = [
        (len(suffix), format) for format in FORMATS for suffix in format.suffixes if suffix and name.endswith(suffix)
    ]
    if fitting:
        return max(fitting, key=lambda item: item[0])[1]
    return None if os.path.splitext(name)[1] and not path.endswith("/") else _BY_NAME["varstore"]


def _target(path: str, format: str | None) -> Format:
    row = _by_suffix(path) if format is None else _named(format)
    if row is None:
        known = [suffix for format in FORMATS if format.writes for suffix in format.suffixes if suffix]
        raise UsageError(
            "the suffix does not tell the format to write",
            path=path,
            expected=f"one of {', '.join(known)}",
            hint="give the format; format='varstore' is a checkpoint directory",
        )
    if not row.writes:
        raise UsageError(f"{row.name} is read and not written", path=path, hint="write another format")
    return row


def _lazy(opened: Mapping[str, Any], name: str) -> Any:
    return opened.lazy(name) if isinstance(opened, ForeignCheckpoint) else opened[name]


def _not_arrays(node: Any, path: tuple[str, ...]) -> list[str]:
    if isinstance(node, LazyArray):
        return []
    if isinstance(node, dict):
        return [name for key, value in node.items() for name in _not_arrays(value, (*path, str(key)))]
    if isinstance(node, (list, tuple)):
        return [name for index, value in enumerate(node) for name in _not_arrays(value, (*path, str(index)))]
    return ["/".join(path)]


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
