"""Read, write and convert files of all formats; the table of formats is imported on first use."""

from __future__ import annotations

import contextlib
import inspect
import os
import shutil
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, BinaryIO, TypedDict, TypeVar, Unpack, overload

import ml_dtypes
import numpy as np

from varstore.disk.progress import Progress, reporting
from varstore.disk.read.checkpoint import Checkpoint, retry_if_replaced
from varstore.errors import (
    CheckpointExists,
    CheckpointNotFound,
    FormatError,
    OutOfSpace,
    StorageError,
    UnsupportedDtype,
    UsageError,
)
from varstore.formats.binary.packing import packed_size
from varstore.formats.binary.source import Held, files_noted, is_unchanged, name_of
from varstore.formats.native import OpenedCheckpoint, nested, step_in
from varstore.formats.opened import ForeignCheckpoint
from varstore.formats.pickles.machine import Unknown
from varstore.layout.names import MARKER
from varstore.model.match import is_same_type
from varstore.model.options import Path, StoreOptions
from varstore.storage.appearing import nothing_written
from varstore.storage.failures import translated
from varstore.text.hints import listed, plural
from varstore.text.table import Shown, Table
from varstore.training.kinds import plain
from varstore.values.arguments import checked
from varstore.values.arrays import Stored
from varstore.values.attached import is_usable
from varstore.values.casting import cast_values, is_floating
from varstore.values.lazy import LazyArray, retyped
from varstore.values.nodes import BARE, leaves, replaced
from varstore.values.opaque import without_opaque
from varstore.values.select import Patterns, Rename, select

if TYPE_CHECKING:
    from varstore.formats.registry import Format
    from varstore.formats.zarr.tree import Absent

__all__ = [
    "ConvertOptions",
    "Converted",
    "ReadOptions",
    "WriteOptions",
    "Written",
    "convert",
    "open_source",
    "read",
    "write",
]

Opened = TypeVar("Opened", bound=Mapping[str, Any])


_SHORT = {
    "fp64": "float64",
    "fp32": "float32",
    "fp16": "float16",
    "bf16": "bfloat16",
    "fp8": "float8_e4m3fn",
    "fp8_e4m3fn": "float8_e4m3fn",
    "fp8_e5m2": "float8_e5m2",
}
"""Names of types that people write."""
_NAMED = 5


class ReadOptions(TypedDict, total=False):
    """Options of `read` that a single format has."""

    encoding: str
    """torch, huggingface: the encoding of strings that Python 2 pickled, or "bytes" to leave them as they are."""
    key: bytes | None
    """MindSpore: the key of an encrypted file, 16, 24 or 32 bytes."""
    crc_check: bool
    """MindSpore: compare the checksum at the end of the file, if there is one."""
    limit: int | None
    """All formats but varstore's own: how many bytes the values may take in memory, if that is more than usual."""
    absent: Absent
    """Zarr and Orbax: "error" refuses chunks that are absent; by default, they are the fill value."""
    unknown: Unknown
    """Pickles: whether names that varstore does not know make an `Opaque` leaf, or are an error."""


_DEFAULTS: ReadOptions = {
    "encoding": "utf-8",
    "key": None,
    "crc_check": False,
    "limit": None,
    "absent": "fill",
    "unknown": "opaque",
}


class ConvertOptions(StoreOptions, total=False):
    """Options of `convert` and `write` that a single format has."""

    model: Path | None
    """ONNX, Paddle, .pt2, .mindir, .mge: the path of the model that is copied with other initializers or variables."""
    metadata: Mapping[str, str] | None
    """safetensors, huggingface: the metadata of the file."""
    shard_bytes: int
    """safetensors, huggingface: the maximum size of each of several files, in bytes."""
    config: Any
    """huggingface: the content of ``config.json``, a mapping or what has ``to_dict()``."""
    zarr_format: int
    """Zarr: the version of the format, 2 or 3."""
    separator: str
    """oneflow-legacy: what replaces each ``/`` in a name; the default is ``.``."""


class WriteOptions(ConvertOptions, total=False):
    """All options of `write`."""

    progress: Progress
    dtype: Any
    """oneflow-legacy: the type, or the type by type, to which tensors that OneFlow cannot load are cast."""


@dataclass(frozen=True, kw_only=True, slots=True, repr=False)
class Converted(Shown):
    """The result of `convert`: the names of the tensors in the target, and the bytes of their values.

    - `nbytes`: as they are in the target, before compression: of tied tensors once, if the format keeps them tied.
    - `left_out`: what is not in the target: the names of values that are not arrays, and what the source says of an
      array besides its values, such as ``"w: scale"`` of a quantised one. Objects of classes that are not known
      are never stored. `reasons` says why, for each of them.
    - `unknown`: the names of those classes, as (module, name, how often).
    - `changed`: what has another type in the target, by name: ``"float32 -> float16"``, ``"Counter -> dict"``.
    - `saturated`: how many values of a tensor were beyond the range of its new type, by name. They became the largest
      value of ``float8_e4m3fn``; in other types an infinity, or NaN if the type has none.
    - `absent_chunks`: how many chunks of a tensor were not in a source of Zarr or Orbax, by name, and are the fill
      value in the target.
    """

    source_format: str
    format: str
    names: tuple[str, ...]
    nbytes: int
    left_out: tuple[str, ...]
    changed: Mapping[str, str]
    saturated: Mapping[str, int]
    absent_chunks: Mapping[str, int]
    reasons: Mapping[str, str]
    unknown: tuple[tuple[str, str, int], ...] = ()

    def table(self, most: int | None = None) -> Table:
        """Return rows for what is not in the target as it was in the source, with a few names for each reason."""
        alike: dict[tuple[str, str], list[str]] = {}
        for name, change in self.changed.items():
            alike.setdefault(("changed", change), []).append(name)
        for name in self.left_out:
            alike.setdefault(("left out", self.reasons.get(name, "")), []).append(name)
        for what, counts in (("saturated", self.saturated), ("absent chunks", self.absent_chunks)):
            if counts:
                alike[what, f"{sum(counts.values()):,}"] = list(counts)
        rows = [(what, why, listed(names, _NAMED)) for (what, why), names in alike.items()]
        count = f"{plural(len(self.names), 'tensor')}, {plural(self.nbytes, 'byte')}"
        title = f"{self.source_format} -> {self.format}: {count}"
        return Table(title=title, rows=rows[:most], form="  {:<13}  {}: {}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Written:
    """The result of `write`; `left_out` names the objects that are not data, and that were not written."""

    path: str
    format: str
    left_out: tuple[str, ...]

    def __repr__(self) -> str:
        rest = f", without {plural(len(self.left_out), 'object')}" if self.left_out else ""
        return f"<Written {self.path!r}: {self.format}{rest}>"


@checked
def read(
    path: str | os.PathLike[str] | BinaryIO, format: str | None = None, **options: Unpack[ReadOptions]
) -> OpenedCheckpoint | ForeignCheckpoint:
    """Open a file or folder of any format as a lazy mapping of names to arrays.

    The arrays read their values when they are used. The table of formats is in `varstore.formats`.

    Args:
        path: the file or folder; or a file object, such as a BytesIO, which is read to its end and kept in memory.
        format: its format, by name; by default, it is detected from the content, and then from the suffix.
        options: `key` and `crc_check`, for MindSpore; `absent`, for Zarr and Orbax: "error" refuses absent chunks,
            which are the fill value by default, see `absent_chunks`; `encoding`, as for ``torch.load``, for files
            of torch from Python 2: that of their strings, by default "utf-8", or "bytes"; and `limit`. The arrays of a
            file may take at most 64 MiB plus four times the size of the file in memory, so that a small file cannot
            exhaust it. For a file that is compressed more than that, such as one of zeros, `limit` is the number of
            bytes to permit. A pickle can name classes and functions that varstore does not know. They are never
            imported or called: an object of such a class is an `Opaque` leaf of the state, which records what the file
            says of it. `unknown="error"` refuses such files. Names that have no use but to run code are refused in any
            case.

    Returns:
        A `Checkpoint` for a checkpoint directory. For other formats, a mapping that also has `state()`, which reads
        the whole nested object, and `attributes`, the metadata of the file.

    Raises:
        UsageError: the format is unknown, or does not have an option.
        FormatError: the file is damaged, or not of the named format.
        UnsafeContent: the file asks to run code, refers to files outside its folder, or is out of proportion to its
            size.
        CheckpointNotFound: there is nothing at the path.
        MissingDependency: a package that the format requires is not installed.
        StorageError: the operating system refused.

    Example:
        >>> vs.write("model.pt", {"model": {"w": np.ones((2, 3))}, "epoch": 3})
        <Written 'model.pt': torch>
        >>> file = vs.read("model.pt")
        >>> file
        <torch file 'model.pt': 1 tensor>
        >>> file["model/w"]
        <LazyArray 'model/w': float64 [2, 3], 48 bytes>
        >>> file["model/w"][0]
        array([1., 1., 1.])
        >>> file.state()["epoch"]
        3
    """
    from varstore.formats.registry import detect, named, refuse_stranger

    path = os.fspath(path) if isinstance(path, str | os.PathLike) else Held.of(path)
    row = detect(path) if format is None else named(format)
    if row.folder == "always" and isinstance(path, Held):
        raise UsageError(f"{row.name} is the format of a folder", path=path, hint="pass the path of the folder")
    chosen = _for_reader(row, path, options)
    try:
        with files_noted() as files:
            opened: OpenedCheckpoint | ForeignCheckpoint = row.module.read(path, **chosen)
    except FormatError:
        refuse_stranger(path)
        raise
    if isinstance(opened, ForeignCheckpoint):
        place = path if isinstance(path, Held) else os.path.abspath(path)
        opened.origin.reopen = partial(_reopen, place, row.name, options, files)
    return opened


@overload
def open_source(source: str | os.PathLike[str]) -> str | os.PathLike[str] | ForeignCheckpoint: ...
@overload
def open_source(source: Opened) -> Opened: ...
def open_source(source: Any) -> Any:
    """Return what the verbs that load take: a checkpoint's path as it is, and what lies at any other path, opened.

    The path of a run becomes that of its latest step, as for `read`. A path at which there is nothing, or nothing that
    is known, is returned as it is, for the verb to refuse.
    """
    if not isinstance(source, str | os.PathLike | Mapping) and hasattr(source, "read"):
        return read(source)
    if not isinstance(source, str | os.PathLike):
        return source
    path = os.fspath(source)
    if not isinstance(path, str) or os.path.lexists(os.path.join(path, MARKER)):
        return source
    from varstore.formats.registry import detect

    try:
        format = detect(path, allow_empty=True).name
    except (UsageError, CheckpointNotFound):
        return source
    if format != "varstore":
        return read(path, format)
    return step_in(path)


def _reopen(path: str, format: str, options: ReadOptions, files: Mapping[str, tuple[int, ...]]) -> ForeignCheckpoint:
    """Open what was pickled, if every file of it is still the one that it was."""
    for file, identity in files.items():
        if not is_unchanged(file, identity):
            raise StorageError("the file was replaced after it was opened", path=file, hint="open it again")
    opened = read(path, format, **options)
    assert isinstance(opened, ForeignCheckpoint)
    return opened


@checked
def write(
    path: str | os.PathLike[str] | BinaryIO,
    variables_or_state: Any,
    format: str | None = None,
    **options: Unpack[WriteOptions],
) -> Written:
    """Write names and arrays, or nested state, to a file or folder.

    A file appears complete or not at all; an existing one is replaced. So is a folder, in one step, if `overwrite` is
    set and it is of that format; otherwise it must not exist.

    Args:
        path: where to write. The suffix determines the format; a path without a suffix is a checkpoint directory. Or
            a file object, for the formats of single files, with `format`; it gets everything or nothing.
        variables_or_state: a mapping of names to arrays, a checkpoint, the result of `read`, or nested state.
        format: the format, by name, if the suffix does not determine it. The table is in `varstore.formats`.
        options: `model` for programs, `metadata` and `shard_bytes` for safetensors and huggingface,
            `config` for huggingface, `zarr_format` for Zarr, `separator` and `dtype` for oneflow-legacy, and for a
            checkpoint directory those of `varstore.save`.

    Returns:
        The format, and in `left_out` the names of the `Opaque` leaves of the state, which are never written: a dict
        does not have them, and a list or tuple has None in their places.

    Raises:
        UsageError: the format is unknown or can only be read, or it cannot store a value.
        UnsupportedDtype: the format does not have a type.
        InvalidName: the format cannot store a name.
        CheckpointExists: a folder is to be written, and the path exists; or what is beside a program of several files
            is not its own.
        MissingDependency: a package that the format requires is not installed.
        StorageError: the operating system refused.

    Example:
        >>> vs.write("model.npz", {"w": np.ones(3), "b": np.zeros(3)})
        <Written 'model.npz': numpy>
        >>> sorted(np.load("model.npz"))
        ['b', 'w']
    """
    from varstore.formats.registry import target_format

    if not isinstance(path, str | os.PathLike):
        return _write_to(path, variables_or_state, format, options)
    row = target_format(os.fspath(path), format, getattr(variables_or_state, "tree", variables_or_state))
    state, left_out = _data_of(variables_or_state, row)
    row.module.write(os.fspath(path), state, **_for_format(row, options))
    return Written(path=os.fspath(path), format=row.name, left_out=left_out)


def _data_of(state: Any, row: Format) -> tuple[Any, tuple[str, ...]]:
    """Return a state without what is not data, and the names of that."""
    opened = state if isinstance(state, ForeignCheckpoint) else None
    rest, left_out = without_opaque(state) if opened is None else without_opaque(opened.tree, slice)
    if rest is None and left_out:
        raise UsageError("there is nothing to write: the state is an object of a class that varstore does not know")
    return (rest if opened is None or (left_out and row.is_nested) else opened), left_out


def _write_to(file: BinaryIO, state: Any, format: str | None, options: Any) -> Written:
    """Write to a file object, by way of a temporary file, because formats are written at places of their choice."""
    from varstore.formats.registry import target_format

    name = name_of(file)
    if format is None and not name:
        raise UsageError("the format of a file object without a name is not known", hint="name the format")
    row = target_format(name, format, getattr(state, "tree", state))
    if row.folder:
        raise UsageError(f"{row.name} is written as a folder", path=name or None, hint="pass the path of a new folder")
    state, left_out = _data_of(state, row)
    with tempfile.TemporaryDirectory() as folder:
        suffix = os.path.splitext(os.fspath(options.get("model") or ""))[1] or row.suffixes[0]
        written = os.path.join(folder, os.path.basename(name) or f"file{suffix}")
        row.module.write(written, state, **_for_format(row, options))
        if os.listdir(folder) != [os.path.basename(written)]:
            raise UsageError("several files were to be written", path=name or None, hint="pass the path of a new file")
        with open(written, "rb") as whole, translated(name or f"<{type(file).__name__}>", "writing failed"):
            shutil.copyfileobj(whole, file)
    return Written(path=name, format=row.name, left_out=left_out)


@checked
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
    limit: int | None = None,
    encoding: str | None = None,
    ignore_extra: bool = False,
    dry_run: bool = False,
    progress: Progress = None,
    **options: Unpack[ConvertOptions],
) -> Converted:
    """Convert a file or folder to another format, one tensor at a time.

    If the target can store nested state, and no names are chosen or renamed, nested state keeps its structure.
    Otherwise, the target contains the tensors only, and the result names the values that were left out. Metadata of
    the source is not converted, but for the names that Paddle has for the parameters besides their structured names.

    Args:
        source: the file or folder to read.
        target: the file or folder to write, as for `varstore.write`.
        format: the format of the target, by name, if its suffix does not determine it.
        source_format: the format of the source, by name, if it cannot be detected.
        include: patterns of names to convert; see `varstore.load`.
        exclude: patterns of names to leave out; each must match a name.
        rename: how to change names; see `varstore.load`. Each prefix or regex must change a name.
        dtype: the type to which all floating-point tensors are converted, such as "bfloat16". Values beyond its range
            are counted; those of ``float8_e4m3fn`` become its largest value, as in torch.
        limit: how many bytes the values may take in memory; see `varstore.read`.
        encoding: that of strings of Python 2 in a file of torch; see `varstore.read`.
        ignore_extra: leave out, with `model`, what the model does not have; otherwise that is an error.
        dry_run: check all that is checked before the first byte is written, write nothing, and return what would be
            done. No values are read, so `saturated` is empty.
        progress: True for a progress bar, or a function of (bytes done, bytes in total).
        options: see `varstore.write`. `overwrite` replaces a folder of the same format; a file is replaced in any case.

    Raises:
        UsageError, UnsupportedDtype, InvalidName: the target cannot store a value, type or name.
        FormatError, UnsafeContent: see `varstore.read`.
        CheckpointNotFound, CheckpointExists, MissingDependency, StorageError: see `varstore.read` and
            `varstore.write`.
        VariableNotFound: a pattern of `include` or `exclude` does not match a name, or nothing is renamed by a prefix
            or regex of `rename`.
        VariableMismatch: two tensors would get the same name.

    Example:
        >>> _ = vs.write("model.pt", {"model": {"w": np.ones(3), "b": np.zeros(3)}, "epoch": 3})
        >>> done = vs.convert("model.pt", "model.safetensors", dtype="float16", rename={"model": ""})
        >>> done.names, done.left_out
        (('w', 'b'), ('epoch',))
        >>> vs.read("model.safetensors")["w"]
        <LazyArray 'w': float16 [3], 6 bytes>
    """
    from varstore.formats.registry import detect, named, target_format

    source, target = os.fspath(source), os.fspath(target)
    if os.path.realpath(source) == os.path.realpath(target):
        raise UsageError("source and target are the same", path=source)
    target_format(target, format)
    source_row = detect(source) if source_format is None else named(source_format)
    cast = None if dtype is None else _floating(dtype)

    def write_from(opened: OpenedCheckpoint | ForeignCheckpoint) -> Converted:
        row = target_format(target, format, opened.tree)
        chosen = select(opened, include=include, exclude=exclude, rename=rename, path=source, all_apply=True)
        model = options.get("model") if ignore_extra else None
        named = _parameter_names(opened, chosen, row.name, options)
        also = named.get("parameter_names", {}) if row.name == "paddle" else {}
        known = chosen if model is None else read(model)
        extra = dict.fromkeys(name for name in chosen if name not in known and also.get(name) not in known)
        chosen = {name: origin for name, origin in chosen.items() if name not in extra}
        arrays = {name: opened[origin] for name, origin in chosen.items()}
        total = sum(array.nbytes for array in arrays.values())
        is_whole = chosen == {name: name for name in opened}
        keeps_tree = row.is_nested and is_whole and options.get("model") is None
        tree = opened.tree if isinstance(opened, ForeignCheckpoint) else {}
        kept: dict[str, Any] = {}
        unusable: list[str] = []
        is_linked = row is source_row and row.name == "varstore"
        if isinstance(opened, Checkpoint):
            found = nested(opened)
            tree = found if _holds_anything(found) else {}
            if is_linked and is_whole and opened.manifest is not None:
                kept = {"tree": opened.manifest.tree}  # the nested state, which refers to the variables by name
            if is_linked and opened.files:
                as_they_are = arrays if cast is None else {}
                unusable = [name for name, file in opened.files.items() if not is_usable(file.entry, as_they_are)]
                files = {name: file for name, file in opened.files.items() if name not in unusable}
                kept["files"] = {**files, **(options.get("files") or {})}
        plainer: dict[str, str] = {}
        if isinstance(opened, Checkpoint) and row.name != "varstore":
            tree = plain(tree, plainer)
        named_leaves = leaves(tree)
        tree, opaque = without_opaque(tree, slice)
        if keeps_tree and opaque and tree is None:
            raise UsageError("there is nothing to write: the file is an object of an unknown class", path=source)
        with reporting(progress, total, f"writing {target}") as advance:
            wrapped = _Wrapped(cast, advance, fails=dry_run)
            if keeps_tree and _holds_anything(tree) and not is_linked:
                state = wrapped.tree(tree)
            else:
                state = {name: wrapped.array(array) for name, array in arrays.items()}
            kept |= named
            settings = {**_for_format(row, options), **kept}
            if dry_run:
                _write_dry(row, target, state, settings)
            else:
                row.module.write(target, state, **settings)
        reasons = dict.fromkeys(opaque, "varstore does not know its class")
        reasons |= {name: "no format holds a slice" for name, leaf in named_leaves if isinstance(leaf, slice)}
        if not keeps_tree:
            why = "only arrays are taken by chosen names" if row.is_nested else f"{row.name} holds only arrays"
            reasons |= {name: why for name, leaf in leaves(tree) if not isinstance(leaf, LazyArray)}
        reasons |= dict.fromkeys(extra, "the model does not have it")
        reasons |= dict.fromkeys(map("file {}".format, unusable), "a variable that it uses is not there as it is")
        changed = {name: wrapped.change_of(array) for name, array in arrays.items()}
        if row.name != "varstore":
            said_of = (f"{name}: {said}" for name, array in arrays.items() for said in _attributes_of(array))
            reasons |= dict.fromkeys(said_of, f"{row.name} holds nothing of an array but its values")
            changed |= _plain_types(tree) | plainer if keeps_tree else {}
        absent = opened.absent_chunks if isinstance(opened, ForeignCheckpoint) else {}
        return Converted(
            source_format=source_row.name,
            format=row.name,
            names=tuple(arrays),
            nbytes=_bytes_in(row, arrays, wrapped),
            left_out=tuple(reasons),
            reasons=reasons,
            unknown=opened.unknown if isinstance(opened, ForeignCheckpoint) else (),
            changed={name: change for name, change in changed.items() if change},
            saturated={name: count for name in arrays if (count := wrapped.saturated.get(chosen[name]))},
            absent_chunks={name: absent[origin] for name, origin in chosen.items() if origin in absent},
        )

    opening: ReadOptions = {"limit": limit} if encoding is None else {"limit": limit, "encoding": encoding}
    if source_row.name == "varstore":
        _for_reader(source_row, source, opening)
        return retry_if_replaced(
            lambda found: write_from(OpenedCheckpoint(found.location, found.content)), step_in(source)
        )
    return write_from(read(source, source_row.name, **opening))


def _holds_anything(tree: Any) -> bool:
    """Tell whether a tree is not empty; one that is a tensor has no truth value."""
    return isinstance(tree, LazyArray) or bool(tree)


def _parameter_names(opened: Any, chosen: Mapping[str, str], format: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the option that keeps what Paddle calls the parameters besides their structured names, if it is known."""
    known = opened.attributes.get("parameter_names")
    names = {name: known[origin] for name, origin in chosen.items() if origin in known} if known else {}
    if names and format == "paddle":
        return {"parameter_names": names}
    if names and format == "varstore" and options.get("manifest", True):
        return {"attributes": {"parameter_names": names, **(options.get("attributes") or {})}}
    return {}


def _for_format(row: Format, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options without `overwrite` for files, which are replaced in any case."""
    return {name: value for name, value in options.items() if name != "overwrite" or row.folder}


def _for_reader(row: Format, path: str, options: ReadOptions) -> dict[str, Any]:
    """Return the options that the reader of a format has; others must have their default, which says nothing.

    Formats that are not pickles have no names that could be unknown, so `unknown` is not refused.
    """
    had = inspect.signature(row.module.read).parameters
    for name, value in options.items():
        if name in _DEFAULTS and name not in {*had, "unknown"} and value != _DEFAULTS.get(name):
            raise UsageError(
                f"the format {row.name} does not have this option", path=path, field=name, hint="leave it out"
            )
    return {name: value for name, value in options.items() if name in had or name not in _DEFAULTS}


def _bytes_in(row: Format, arrays: Mapping[str, Any], wrapped: _Wrapped) -> int:
    """Return the bytes of the values of arrays in a format."""
    sizes: dict[Hashable, int] = {}
    for name, array in arrays.items():
        dtype = wrapped.dtype_of(array)
        memory = (array.identity, array.shape) if isinstance(array, LazyArray) else _memory_of(array)
        size = packed_size(array.size, dtype) if row.packs else array.size * dtype.itemsize
        sizes[memory if row.is_nested else name] = size
    return sum(sizes.values())


def _memory_of(variable: Any) -> Hashable:
    memory: Hashable = variable.entry.alias_of or variable.name
    return memory


class _NotWritten(Exception):
    """Raised where values would be read."""


def _write_dry(row: Format, target: str, state: Any, options: Mapping[str, Any]) -> None:
    """Check what a format checks before it writes the first byte; a folder is begun at a place that is removed."""
    is_taken = row.folder and os.path.lexists(target) and not (os.path.isdir(target) and not os.listdir(target))
    if os.path.islink(target) or (is_taken and not options.get("overwrite")):
        raise CheckpointExists("the target exists", path=target, hint="remove it, or pass overwrite=True")
    given = {name: value for name, value in options.items() if name not in ("overwrite", "foreign")}
    with contextlib.suppress(_NotWritten, OutOfSpace), nothing_written():
        if not row.folder:
            row.module.write(target, state, **given)
            return
        with tempfile.TemporaryDirectory() as folder:
            row.module.write(os.path.join(folder, os.path.basename(target.rstrip("/"))), state, **given)


class _Wrapped:
    """Arrays that are cast, and counted when they are read; an array that has two names stays one object.

    With `fails`, reading one raises.
    """

    def __init__(self, cast: np.dtype[Any] | None, advance: Callable[[int], None] | None, *, fails: bool) -> None:
        self._fails = fails
        self._cast = cast
        self._advance = advance
        self._known: dict[int, tuple[Any, Any]] = {}
        self.saturated: dict[str, int] = {}
        """How many values were beyond the range of their new type, by the names of the source."""

    def dtype_of(self, array: Any) -> np.dtype[Any]:
        """Return the type that an array will have."""
        dtype: np.dtype[Any] = array.dtype
        return dtype if self._cast is None or not is_floating(dtype) else self._cast

    def change_of(self, array: Any) -> str:
        """Return how the type of an array changes; empty text if it does not."""
        new = self.dtype_of(array)
        return "" if is_same_type(array.dtype, new) else f"{array.dtype} -> {new}"

    def array(self, array: Any) -> Any:
        if id(array) not in self._known:
            self._known[id(array)] = (array, self._wrap(array))
        return self._known[id(array)][1]

    def tree(self, node: Any) -> Any:
        return replaced(node, lambda leaf: self.array(leaf) if isinstance(leaf, LazyArray) else leaf)

    def _wrap(self, array: Any) -> Any:
        cast = self._cast if self._cast is not None and is_floating(array.dtype) else None
        if isinstance(array, Stored) and cast is None and not self._fails:
            self._count(array.entry.nbytes)
            return array

        def fetch() -> np.ndarray:
            if self._fails:
                raise _NotWritten
            values = np.asarray(array)
            self._count(values.nbytes)
            if cast is None:
                return values
            values, self.saturated[array.name] = cast_values(values, cast)
            return values

        shape, dtype = tuple(array.shape), array.dtype if cast is None else cast
        if not isinstance(array, LazyArray):
            return LazyArray(shape, dtype, fetch, _attributes_of(array))
        read = LazyArray(shape, dtype, fetch, array.attributes, identity=array.identity)
        read.place = None if cast is not None else array.place
        return retyped(read, array.type, array.requires_grad)

    def _count(self, nbytes: int) -> None:
        if self._advance is not None:
            self._advance(nbytes)


def _attributes_of(array: Any) -> Mapping[str, Any]:
    """Return what the source says of an array besides its values."""
    said: Mapping[str, Any] = array.entry.attributes if isinstance(array, Stored) else array.attributes
    return said


def _plain_types(node: Any, path: tuple[str, ...] = ()) -> dict[str, str]:
    """Return what becomes a plain type in the formats that are pickles, by name: subclasses and numpy's scalars."""
    kind = type(node)
    inside: list[tuple[str, Any]] = []
    if isinstance(node, Mapping):
        plain: type = OrderedDict if isinstance(node, OrderedDict) else dict
        inside = [(str(key), item) for key, item in node.items()]
    elif isinstance(node, (list, tuple)):
        plain = tuple if isinstance(node, tuple) else list
        inside = [(str(at), item) for at, item in enumerate(node)]
    else:
        plain = set if isinstance(node, frozenset) else type(node.item()) if isinstance(node, np.generic) else kind
    found = {} if kind is plain else {"/".join(path) or BARE: f"{kind.__name__} -> {plain.__name__}"}
    for part, item in inside:
        found |= _plain_types(item, (*path, part))
    return found


def _floating(dtype: Any) -> np.dtype[Any]:
    name = _SHORT.get(dtype, dtype) if isinstance(dtype, str) else dtype
    scalar = vars(ml_dtypes).get(name, name) if isinstance(name, str) else name
    try:
        found: np.dtype[Any] | None = np.dtype(scalar)
    except (TypeError, ValueError):
        found = None
    if found is None or not is_floating(found):
        raise UnsupportedDtype(
            "only floating-point tensors can be converted, to a floating-point type",
            field="dtype",
            found=repr(dtype),
            expected="float16, bfloat16, float32, float64, or another such type of numpy or ml_dtypes",
        )
    return found
