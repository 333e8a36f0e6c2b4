"""ONNX models: read the initializers, and write a copy of a model with other values in them.

This covers the initializers of the main graph. Those in the bodies of If, Loop and Scan, and the values of Constant
nodes, are neither read nor replaced. A copy contains everything else byte for byte.

Format: https://github.com/onnx/onnx/blob/main/onnx/onnx.proto (ModelProto, GraphProto)
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np

from varstore.errors import (
    FormatError,
    UsageError,
)
from varstore.formats.binary.budget import ARRAY, Budget
from varstore.formats.binary.packing import pack, packed_size
from varstore.formats.binary.slices import Span, stream_of
from varstore.formats.binary.source import MOST_DIMENSIONS, Source
from varstore.formats.binary.wire import BYTES, Wire, bytes_field, bytes_head
from varstore.formats.onnx.tensors import (
    RAW,
    TensorRecord,
    array_of,
    external_fields,
    parse,
    without_values,
)
from varstore.formats.opened import ForeignCheckpoint
from varstore.formats.state.flat import check_fits, fetch_plain, flat_arrays
from varstore.storage.appearing import replacing_whole
from varstore.values.lazy import LazyArray

__all__ = [
    "GRAPH",
    "INITIALIZER",
    "MOST_MESSAGE",
    "SMALL",
    "Model",
    "parse_model",
    "read",
    "write",
    "write_inline",
]

GRAPH, INITIALIZER, _SPARSE = 7, 5, 15
_SPARSE_VALUES, _SPARSE_INDICES, _SPARSE_DIMS = 1, 2, 3
MOST_MESSAGE = 2**31 - 1
SMALL = 1024
"""Values of fewer bytes stay in the file: runtimes look for the operands of shapes there."""
_STEP = 1 << 22
_ALIGNMENT = 4096


@dataclass(frozen=True, kw_only=True, slots=True)
class Model:
    """The positions of the graph and its dense initializers; the rest of the file is copied unchanged."""

    graph: Span
    graph_whole: Span
    tensors: list[tuple[Span, TensorRecord]]
    sparse: list[Span]


def read(path: str, *, limit: int | None = None) -> ForeignCheckpoint:
    """Open the initializers of a model.

    A sparse initializer is read as ``name/values`` and ``name/indices``; its shape is in `state`.

    Raises:
        FormatError: it is not an ONNX model, or two initializers have the same name.
        SizeMismatch: the values of a tensor do not match its shape and type.
        UnsafeContent: external data is outside the folder of the model, or the tensors are out of proportion to the
            size of the files.
        CheckpointNotFound: there is nothing at the path, or a file with external data is missing.
    """
    source = Source(path)
    budget = Budget(path, source.size, limit=limit)
    tree: dict[str, Any] = {}
    with stream_of(source) as stream:
        wire = Wire(stream, path)
        model = parse_model(wire, source, budget)
        leaves: list[tuple[str, Any]] = [(record.name, array_of(source, record, budget)) for _, record in model.tensors]
        leaves += [_sparse(wire, source, span, budget) for span in model.sparse]
    for name, leaf in leaves:
        if name in tree:
            raise FormatError("two initializers have the same name", path=path, variable=name)
        tree[name] = leaf
    return ForeignCheckpoint(path, "onnx", tree, budget=budget)


def write(path: str, state: Any, *, model: str | None = None) -> None:
    """Write a copy of a model in which the initializers named in `state` have other values.

    Tensors are written where the model has them: in the file, or as external data, which is written to one file,
    ``<path>.data``. If the copy would exceed 2 GiB, the limit of a message, large tensors are written there too.

    Args:
        path: where to write the copy; may be `model` itself if it does not have external data.
        state: names and arrays, with the shapes and types that the graph of the model expects.
        model: the path of the model.

    Raises:
        UsageError: there is no `model`.
        VariableNotFound: the model does not have an initializer of a name.
        VariableMismatch: the shape or type of an array is not that in the model.
        CheckpointExists: ``<path>.data`` is needed and exists.
        StorageError: the operating system refused.
    """
    if model is None:
        raise UsageError(
            "an ONNX file is a program: values can only be written to a copy of an existing one",
            path=path,
            hint="pass the model whose initializers are to be replaced: write(path, state, model=…)",
        )
    _write(path, state, Source(model), inline=False)


def write_inline(path: str, state: Any, source: Source) -> None:
    """Write a copy of a model, as `write` does, with all initializers in the file where a message can hold them."""
    _write(path, state, source, inline=True)


def _write(path: str, state: Any, source: Source, *, inline: bool) -> None:
    arrays = flat_arrays(state, format="onnx")
    with stream_of(source) as stream:
        model = parse_model(Wire(stream, source.path), source, budget := Budget(source.path, source.size))
        known = {record.name: array_of(source, record, budget) for _, record in model.tensors}
        for name, array in arrays.items():
            check_fits(source.path, name, array, known)
        _write_copy(path, stream, source, model, known, {**known, **arrays}, inline=inline)


def parse_model(wire: Wire, source: Source, budget: Budget) -> Model:
    """Find the graph and its initializers.

    Raises:
        FormatError: it is not an ONNX model.
    """
    graph = None
    for part in wire.fields((0, source.size), "ModelProto"):
        if part.number == GRAPH and part.kind == BYTES:
            if graph is not None:
                raise FormatError("the model has two graphs", path=source.path)
            graph = part
    if graph is None:
        raise FormatError("not an ONNX model: it does not have a graph", path=source.path)
    tensors, sparse = [], []
    for part in wire.fields(graph.span, "GraphProto"):
        if part.number in (INITIALIZER, _SPARSE):
            budget.charge(2 * ARRAY)
        if part.number == INITIALIZER and part.kind == BYTES:
            tensors.append((part.whole, parse(wire, part.span)))
        elif part.number == _SPARSE and part.kind == BYTES:
            sparse.append(part.span)
    return Model(graph=graph.span, graph_whole=graph.whole, tensors=tensors, sparse=sparse)


def _sparse(wire: Wire, source: Source, span: Span, budget: Budget) -> tuple[str, dict[str, Any]]:
    name, leaves = "", {}
    dims: list[int] = []
    for part in wire.fields(span, "SparseTensorProto"):
        if part.number == _SPARSE_DIMS:
            wire.add_dimensions(dims, part, "SparseTensorProto", most=MOST_DIMENSIONS)
        elif part.number in (_SPARSE_VALUES, _SPARSE_INDICES) and part.kind == BYTES:
            record = parse(wire, part.span)
            leaves["values" if part.number == _SPARSE_VALUES else "indices"] = array_of(source, record, budget)
            name = record.name if part.number == _SPARSE_VALUES else name
    return name, {**leaves, "shape": dims}


@dataclass(frozen=True, kw_only=True, slots=True)
class _Plan:
    """One initializer to write: the bytes before its values, and the offset in external data, or None."""

    replaced: Span
    name: str
    head: bytes
    size: int
    offset: int | None


def _write_copy(
    path: str,
    stream: BinaryIO,
    source: Source,
    model: Model,
    known: dict[str, LazyArray],
    arrays: dict[str, Any],
    *,
    inline: bool,
) -> None:
    location = os.path.basename(path) + ".data"

    def is_external(record: TensorRecord, size: int) -> bool:  # noqa: ARG001
        return record.is_external and not inline

    plans = _plans(stream, source, model, known, location, is_external)
    if source.size + sum(plan.size for plan in plans if plan.offset is None) > MOST_MESSAGE:
        plans = _plans(stream, source, model, known, location, lambda record, size: record.is_external or size >= SMALL)
    external = [plan for plan in plans if plan.offset is not None]
    data_path = os.path.join(os.path.dirname(path), location)
    with replacing_whole(path) as (file, whole):
        if external:
            with whole.part(data_path) as part:
                for plan in external:
                    part.seek(plan.offset or 0)
                    part.write(_bytes_of(plan.name, arrays[plan.name]).data)
        _copy_model(file, stream, source, model, plans, arrays)


def _plans(
    stream: BinaryIO,
    source: Source,
    model: Model,
    known: dict[str, LazyArray],
    location: str,
    is_external: Callable[[TensorRecord, int], bool],
) -> list[_Plan]:
    wire = Wire(stream, source.path)
    plans: list[_Plan] = []
    end = 0
    for whole, record in model.tensors:
        array = known[record.name]
        if array.dtype.hasobject:
            continue
        size = packed_size(int(np.prod(array.shape, dtype=object)), array.dtype)
        kept = without_values(source, wire, record)
        if is_external(record, size):
            offset = -(-end // _ALIGNMENT) * _ALIGNMENT
            end = offset + size
            kept += external_fields(location, offset, size)
            head = bytes_field(INITIALIZER, kept)
            plans.append(_Plan(replaced=whole, name=record.name, head=head, size=size, offset=offset))
        else:
            kept += bytes_head(RAW, size)
            head = bytes_head(INITIALIZER, len(kept) + size) + kept
            plans.append(_Plan(replaced=whole, name=record.name, head=head, size=size, offset=None))
    return plans


def _copy_model(
    file: BinaryIO, stream: BinaryIO, source: Source, model: Model, plans: list[_Plan], arrays: dict[str, Any]
) -> None:
    start, size = model.graph
    removed = sum(plan.replaced[1] for plan in plans)
    added = sum(len(plan.head) + (plan.size if plan.offset is None else 0) for plan in plans)
    for part in _copied(stream, (0, model.graph_whole[0])):
        file.write(part)
    file.write(bytes_head(GRAPH, size - removed + added))
    position = start
    for plan in plans:
        for part in _copied(stream, (position, plan.replaced[0] - position)):
            file.write(part)
        file.write(plan.head)
        if plan.offset is None:
            file.write(_bytes_of(plan.name, arrays[plan.name]).data)
        position = sum(plan.replaced)
    for part in _copied(stream, (position, source.size - position)):
        file.write(part)


def _copied(stream: BinaryIO, span: Span) -> Iterator[bytes]:
    position, end = span[0], sum(span)
    while position < end:
        stream.seek(position)
        part = stream.read(min(_STEP, end - position))
        yield part
        position += len(part)


def _bytes_of(name: str, array: LazyArray) -> np.ndarray:
    return pack(fetch_plain(name, array))
