"""ONNX models whose initializers lie in files of their own: what a model says, and copies that refer to files.

Tensors can lie in more places than the main graph: in the bodies of If and Loop, in attributes, in functions, in
training information. `outside` finds every reference to a file in a model, so that none is left unchecked before a
runtime follows it.

Format: https://github.com/onnx/onnx/blob/main/onnx/onnx.proto
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from varstore.errors import FormatError, UsageError
from varstore.formats.binary.budget import Budget
from varstore.formats.binary.packing import bits_of, pack
from varstore.formats.binary.slices import Span, stream_of
from varstore.formats.binary.source import Source
from varstore.formats.binary.wire import BYTES, Field, Wire, bytes_field, bytes_head
from varstore.formats.onnx.model import GRAPH, INITIALIZER, MOST_MESSAGE, SMALL, Model, parse_model
from varstore.formats.onnx.tensors import (
    DTYPES,
    RAW,
    TensorRecord,
    array_of,
    external_fields,
    parse,
    without_values,
)
from varstore.formats.state.flat import fetch_plain, flat_arrays
from varstore.values.lazy import LazyArray

__all__ = ["OnnxGraph", "Outside", "can_be_external", "initializers", "open_graph", "outside", "rewritten"]

_INPUT, _OUTPUT = 11, 12
_OPERATOR = 4
_STRING = 8
_MOST_DEPTH = 100
_MESSAGES: dict[str, dict[int, str]] = {
    "ModelProto": {GRAPH: "GraphProto", 20: "TrainingInfoProto", 25: "FunctionProto"},
    "GraphProto": {1: "NodeProto", INITIALIZER: "TensorProto", 15: "SparseTensorProto"},
    "NodeProto": {5: "AttributeProto"},
    "AttributeProto": {
        5: "TensorProto",
        6: "GraphProto",
        10: "TensorProto",
        11: "GraphProto",
        22: "SparseTensorProto",
        23: "SparseTensorProto",
    },
    "SparseTensorProto": {1: "TensorProto", 2: "TensorProto"},
    "TrainingInfoProto": {1: "GraphProto", 2: "GraphProto"},
    "FunctionProto": {7: "NodeProto", 11: "AttributeProto"},
}
"""The fields by which each message leads to others that can contain a tensor."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OnnxGraph:
    """A model: its dense initializers by name, and the values that it takes and gives.

    An input or output is a dict with `name`, `type` and `shape`. An extent is a number, the name of one that is known
    only when the model runs, or None; the shape is None if nothing is known of it.
    """

    source: Source
    model: Model
    arrays: dict[str, LazyArray]
    inputs: list[dict[str, Any]]
    outputs: list[dict[str, Any]]


class Outside(NamedTuple):
    """The tensors of a model whose values lie in files, and the types of all its operators."""

    tensors: list[TensorRecord]
    operators: set[str]


def open_graph(source: Source) -> OnnxGraph:
    """Read what a model says of itself; values are not read.

    Raises:
        FormatError: it is not an ONNX model, or two initializers have the same name.
        SizeMismatch, UnsafeContent, CheckpointNotFound: see `varstore.read`.
    """
    budget = Budget(source.path, source.size)
    arrays: dict[str, LazyArray] = {}
    with stream_of(source) as stream:
        wire = Wire(stream, source.path)
        model = parse_model(wire, source, budget)
        for _, record in model.tensors:
            if record.name in arrays:
                raise FormatError("two initializers have the same name", path=source.path, variable=record.name)
            arrays[record.name] = array_of(source, record, budget)
        ports: dict[int, list[dict[str, Any]]] = {_INPUT: [], _OUTPUT: []}
        for part in wire.fields(model.graph, "GraphProto"):
            if part.number in ports and part.kind == BYTES:
                ports[part.number].append(_port(wire, part))
    inputs = [port for port in ports[_INPUT] if port["name"] not in arrays]
    return OnnxGraph(source=source, model=model, arrays=arrays, inputs=inputs, outputs=ports[_OUTPUT])


def can_be_external(array: LazyArray) -> bool:
    """Tell whether an initializer can lie in a file that holds one element per type's own number of bytes.

    Runtimes read types of less than a byte as packed, and take the shapes of results from operands that must be in the
    model: integers in at most one dimension.
    """
    is_whole = bits_of(array.dtype) == 8 * array.dtype.itemsize
    may_be_shape = array.dtype in (np.int64, np.int32) and len(array.shape) <= 1
    return is_whole and not may_be_shape and array.nbytes >= SMALL


def rewritten(graph: OnnxGraph, places: Mapping[str, str], values: Mapping[str, Any] | None = None) -> bytes:
    """Return a copy of a model in which some initializers lie in files, and all others in the model.

    Args:
        graph: the model.
        places: the path of a file, relative to the model, for each initializer that is all that the file holds.
        values: new values for initializers that stay in the model.

    Raises:
        UsageError: what stays in the model is larger than a message can be.
    """
    source, (start, size) = graph.source, graph.model.graph
    arrays = {**graph.arrays, **flat_arrays(values or {}, format="onnx")}
    parts: list[bytes | memoryview] = []
    position = start
    with stream_of(source) as stream:
        wire = Wire(stream, source.path)
        for (at, length), record in graph.model.tensors:
            is_kept = record.name not in places and not record.is_external and record.name not in (values or ())
            if is_kept:
                continue
            parts += [source.read(position, at - position).data, *_initializer(source, wire, record, places, arrays)]
            position = at + length
    parts.append(source.read(position, start + size - position).data)
    total = sum(map(len, parts))
    before, end = graph.model.graph_whole[0], start + size
    if total + source.size - size > MOST_MESSAGE:
        raise UsageError(
            "what stays in the model is larger than 2 GiB, the limit of an ONNX file",
            path=source.path,
            hint="give the checkpoint these initializers as variables",
        )
    head, rest = source.read(0, before).data, source.read(end, source.size - end).data
    return b"".join([head, bytes_head(GRAPH, total), *parts, rest])


def _initializer(
    source: Source, wire: Wire, record: TensorRecord, places: Mapping[str, str], arrays: Mapping[str, LazyArray]
) -> Iterator[bytes | memoryview]:
    array, kept = arrays[record.name], without_values(source, wire, record)
    if record.name in places:
        yield bytes_field(INITIALIZER, kept + external_fields(places[record.name], 0, array.nbytes))
        return
    raw = pack(fetch_plain(record.name, array)).data
    kept += bytes_head(RAW, len(raw))
    yield bytes_head(INITIALIZER, len(kept) + len(raw)) + kept
    yield raw


def initializers(source: Source) -> list[TensorRecord]:
    """Return the dense initializers of the main graph; files that they refer to are not looked at."""
    with stream_of(source) as stream:
        model = parse_model(Wire(stream, source.path), source, Budget(source.path, source.size))
    return [record for _, record in model.tensors]


def outside(source: Source) -> Outside:
    """Find all that refers to files in a model, wherever it is, and the types of its operators.

    Raises:
        FormatError: it is not an ONNX model, or graphs in it are nested too deeply.
    """
    found = Outside([], set())
    waiting: list[tuple[Span, str, int]] = [((0, source.size), "ModelProto", 0)]
    with stream_of(source) as stream:
        wire = Wire(stream, source.path)
        while waiting:
            span, message, depth = waiting.pop()
            if message == "TensorProto":
                record = parse(wire, span)
                if record.is_external or record.external:
                    found.tensors.append(record)
                continue
            if depth > _MOST_DEPTH:
                raise FormatError("graphs are nested too deeply in this model", path=source.path)
            for part in wire.fields(span, message):
                inner = _MESSAGES[message].get(part.number)
                if inner is not None and part.kind == BYTES:
                    waiting.append((part.span, inner, depth + 1))
                elif message == "NodeProto" and part.number == _OPERATOR:
                    found.operators.add(wire.text(part, message))
    return found


def _port(wire: Wire, value: Field) -> dict[str, Any]:
    """Return a ValueInfoProto: 1 name, 2 type (TypeProto: 1 tensor (1 element type, 2 shape), other kinds)."""
    port: dict[str, Any] = {"name": "", "type": "", "shape": None}
    for part in wire.fields(value.span, "ValueInfoProto"):
        if part.number == 1:
            port["name"] = wire.text(part, "ValueInfoProto")
        elif part.number == 2 and part.kind == BYTES:
            for kind in wire.fields(part.span, "TypeProto"):
                if kind.number == 1 and kind.kind == BYTES:
                    _add_tensor(port, wire, kind)
    return port


def _add_tensor(port: dict[str, Any], wire: Wire, tensor: Field) -> None:
    for part in wire.fields(tensor.span, "TypeProto"):
        if part.number == 1:
            dtype = DTYPES.get(part.value)
            port["type"] = "string" if part.value == _STRING else dtype.name if dtype else f"type {part.value}"
        elif part.number == 2 and part.kind == BYTES:
            dims = [dim for dim in wire.fields(part.span, "TensorShapeProto") if dim.number == 1]
            port["shape"] = [_extent(wire, dim) for dim in dims]


def _extent(wire: Wire, dim: Field) -> int | str | None:
    """Return a Dimension: 1 a number, 2 the name of a number."""
    extent: int | str | None = None
    for part in wire.fields(dim.span, "Dimension"):
        if part.number == 1:
            extent = part.signed
        elif part.number == 2:
            extent = wire.text(part, "Dimension") or None
    return extent
