"""Programs of `torch.export.save` (``.pt2``): the weights in the archive, by the names of the state dict.

The graph is never read. There are three layouts: since PyTorch 2.9, each weight is a member with plain bytes, and an
index in JSON says where it lies and what it is; 2.8 has a file of `torch.save` in the archive instead, and so have
earlier versions, under another name.

Source: https://github.com/pytorch/pytorch/blob/v2.13.0/torch/export/pt2_archive/_package.py
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from varstore.errors import FormatError, UnsafeContent, UnsupportedDtype
from varstore.formats.binary.budget import Budget
from varstore.formats.binary.metadata import parse_json
from varstore.formats.binary.source import Source
from varstore.formats.binary.zip import MAGIC, Member, archive_members
from varstore.formats.opened import ForeignCheckpoint
from varstore.formats.pickles.machine import Unknown
from varstore.formats.pickles.names import Global, show
from varstore.formats.torch.tensors import DTYPES, StorageClass, Storages
from varstore.formats.torch.zip import least_size, locate, read_members, read_zip
from varstore.training.tensors import PARAMETER
from varstore.values.lazy import LazyArray

__all__ = [
    "TYPES",
    "index_of",
    "is_big_endian",
    "layout_of",
    "listed_weights",
    "read_archive",
    "read_json",
    "stored_weight",
]

_OLD, _NEW = "serialized_exported_program.json", "/archive_format"
_OLD_WEIGHTS = "serialized_state_dict.pt"
_INDEX, _NESTED = "_weights_config.json", ".pt"
_MOST_INDEX = 1 << 28
_FREE, _MOST_EXPANSION = 1 << 20, 64
_STRIDED = 7
_BYTES = Global("torch.storage", "UntypedStorage", StorageClass(None), 0)
TYPES = {
    **dict(enumerate(("uint8", "int8", "int16", "int32", "int64", "float16", "float32", "float64"), 1)),
    **dict(enumerate(("complex32", "complex64", "complex128", "bool", "bfloat16"), 9)),
    **dict(enumerate(("uint16", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"), 28)),
    **dict(enumerate(("float8_e8m0fnu", "uint32", "uint64"), 33)),
}
"""The types of torch by their numbers in `ScalarType` of torch/_export/serde/schema.py."""


def read_archive(source: Source, budget: Budget, *, encoding: str, unknown: Unknown) -> ForeignCheckpoint:
    """Open a zip file of PyTorch: of `torch.save`, `torch.jit.save` or `torch.export.save`; see `read` for the options.

    Raises:
        UnsafeContent, FormatError: see `read_zip`; or the index of an exported program contradicts the archive.
        SizeMismatch: a weight extends beyond its bytes.
    """
    members = archive_members(source, least=lambda: least_size(source, 0, budget))
    if _OLD in members:
        weights = {"model": members[_OLD_WEIGHTS]} if _OLD_WEIGHTS in members else {}
    elif roots := [name.removesuffix(_NEW[1:]) for name in members if name.count("/") == 1 and name.endswith(_NEW)]:
        folder = f"{roots[0]}data/weights/"
        weights = _models(members, folder, _INDEX) or _models(members, folder, _NESTED)
    else:
        return read_members(source, members, budget, encoding=encoding, unknown=unknown)
    if not weights:
        raise FormatError("there are no weights in this exported program", path=source.path)
    trees: dict[str, Any] = {}
    names: list[tuple[str, str, int]] = []
    opened: set[str] = set()

    def nested(member: Member) -> Any:
        if member.name in opened:
            raise UnsafeContent(
                "several weights of this exported program are one pickle",
                path=source.path,
                field=member.name[:100],
                expected="a member for each of them, as torch writes them",
            )
        opened.add(member.name)
        found = _nested(source, member, budget, encoding, unknown)
        names.extend(found.unknown)
        return found.tree

    is_checked = any(member.crc for member in members.values())
    for model, member in weights.items():
        if member.name.endswith(_INDEX):
            trees[model] = _indexed(source, members, member, budget, nested, is_checked=is_checked)
        else:
            trees[model] = nested(member)
    tree = next(iter(trees.values())) if len(trees) == 1 else trees
    return ForeignCheckpoint(source.path, "torch", tree, {"exported": True}, budget=budget, unknown=tuple(names))


def _models(members: Mapping[str, Member], folder: str, end: str) -> dict[str, Member]:
    """Return the members that hold the weights of a model or list them, by the name of the model."""
    return {
        name[len(folder) : -len(end)]: member
        for name, member in members.items()
        if name.startswith(folder) and name.endswith(end) and "/" not in name[len(folder) :]
    }


def _nested(source: Source, member: Member, budget: Budget, encoding: str, unknown: Unknown) -> ForeignCheckpoint:
    """Open a file of `torch.save` that is a member of the archive."""
    if not member.is_plain:
        raise FormatError(
            "the weights of this exported program are compressed",
            path=source.path,
            field=member.name[:100],
            hint="unpack the archive, and pack it again without compression",
        )
    start, size = member.span
    if source.bytes(start, min(len(MAGIC), size)) != MAGIC:
        raise FormatError(
            "a member of this exported program is not a file of torch.save", path=source.path, field=member.name[:100]
        )
    return read_zip(source, budget, start, size, encoding=encoding, unknown=unknown)


def _indexed(
    source: Source,
    members: Mapping[str, Member],
    index: Member,
    budget: Budget,
    nested: Callable[[Member], Any],
    *,
    is_checked: bool,
) -> OrderedDict[str, Any]:
    """Return the weights that an index lists; `nested` opens a member that is a file of `torch.save`."""
    swapped = is_big_endian(members, index)
    storages = Storages(budget)
    tree: OrderedDict[str, Any] = OrderedDict()
    for name, place, about in listed_weights(source, index, budget):
        member = members.get(place)
        if member is None:
            raise FormatError(
                "a weight is not in the archive",
                path=source.path,
                variable=name,
                found=show(place),
                hint="if it lies in a checkpoint, write it with its weights: varstore export CHECKPOINT new.pt2",
            )
        is_nested = about.get("use_pickle")
        tree[name] = nested(member) if is_nested else stored_weight(storages, place, member.size, about, name)
    for storage in storages.found:
        locate(storage, members.get(storage.key), swapped, budget, is_checked=is_checked)
    return tree


def index_of(members: Mapping[str, Member]) -> tuple[str, Member] | None:
    """Return the name of the model and the index of its weights; None if there are several, or other layouts."""
    roots = [name.removesuffix(_NEW[1:]) for name in members if name.count("/") == 1 and name.endswith(_NEW)]
    found = _models(members, f"{roots[0]}data/weights/", _INDEX) if roots else {}
    return next(iter(found.items())) if len(found) == 1 else None


def is_big_endian(members: Mapping[str, Member], index: Member) -> bool:
    """Tell whether the weights beside an index have their most significant byte first."""
    order = members.get(f"{index.name.partition('/')[0]}/byteorder")
    return order is not None and order.read(0, min(3, order.size)).tobytes() == b"big"


def read_json(source: Source, member: Member, budget: Budget) -> dict[str, Any]:
    """Return the JSON object that a member holds.

    Raises:
        UnsafeContent, FormatError: it is a decompression bomb, or not JSON.
    """
    if member.size > min(_FREE + _MOST_EXPANSION * member.packed, _MOST_INDEX):
        raise UnsafeContent(
            "the index of this exported program is a decompression bomb",
            path=source.path,
            found=f"{member.size} bytes",
        )
    return parse_json(member.read(0, member.size).tobytes(), budget, path=source.path)


def listed_weights(source: Source, index: Member, budget: Budget) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yield the name of each weight that an index lists, that of the member that holds it, and what is said of it.

    Raises:
        UnsafeContent, FormatError: see `read_json`; or it is not an index.
    """
    config = read_json(source, index, budget).get("config")
    if not isinstance(config, dict):
        raise FormatError("not the index of an exported program", path=source.path, field=index.name[:100])
    folder = index.name[: index.name.rindex("/") + 1]
    for name, about in config.items():
        place = about.get("path_name") if isinstance(about, dict) else None
        if not isinstance(place, str):
            raise FormatError("a weight is not said to be anywhere", path=source.path, variable=name, found=show(place))
        yield name, f"{folder}{place}", about


def layout_of(about: dict[str, Any], path: str, name: str) -> tuple[np.dtype[Any], Any, Any, Any]:
    """Return the type, shape, strides and offset of a weight; the last three are checked where a view is made.

    Raises:
        UnsupportedDtype: numpy does not have the type or layout.
    """
    meta = about.get("tensor_meta")
    fields = meta if isinstance(meta, dict) else {}
    kind: Any = fields.get("dtype")
    known = TYPES.get(kind) if type(kind) is int else None
    dtype: np.dtype[Any] | None = None if known is None else DTYPES[known]
    if dtype is None or fields.get("layout") != _STRIDED:
        raise UnsupportedDtype(
            "numpy does not have this type or layout",
            path=path,
            variable=name,
            found=f"type {show(kind)}, layout {show(fields.get('layout'))}",
        )
    shape, strides = (tuple(map(_number, _list(fields.get(part)))) for part in ("sizes", "strides"))
    return dtype, shape, strides, _number(fields.get("storage_offset"))


def stored_weight(storages: Storages, place: str, size: int, about: dict[str, Any], name: str) -> LazyArray:
    """Return a weight as a view of a storage: a member of the archive, of so many bytes.

    Raises:
        UnsupportedDtype, SizeMismatch, FormatError, UnsafeContent: see `layout_of` and `Storages.view`.
    """
    dtype, shape, strides, offset = layout_of(about, storages.path, name)
    found = storages.view(storages.find(_BYTES, place, size), offset, shape, strides, dtype)
    if about.get("is_param") is True:
        requires_grad = about["tensor_meta"].get("requires_grad") is True
        return storages.typed(found, PARAMETER, requires_grad)
    return found


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [None]


def _number(value: Any) -> Any:
    """Return an integer of the index; anything else is refused where the view is made."""
    return value.get("as_int") if isinstance(value, dict) else value
