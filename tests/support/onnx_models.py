"""ONNX models made byte by byte from the text of their format, so that tests need no framework to have one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from varstore.formats.binary.packing import pack
from varstore.formats.binary.wire import bytes_field, int_field
from varstore.formats.onnx.tensors import DTYPES

__all__ = ["initializer", "integer", "linear", "model", "node", "outside_of", "value"]

_NUMBERS = {dtype: number for number, dtype in DTYPES.items()}


def initializer(name: str, array: np.ndarray, external: Mapping[str, str] | None = None) -> bytes:
    """Return a TensorProto with the values of an array, or with external data instead."""
    head = b"".join(int_field(1, extent) for extent in array.shape)
    head += int_field(2, _NUMBERS[array.dtype]) + bytes_field(8, name.encode())
    if external is None:
        return head + bytes_field(9, pack(array).tobytes())
    return head + outside_of(external)


def outside_of(said: Mapping[str, str]) -> bytes:
    """Return the fields of a TensorProto that say where its values lie."""
    entries = (bytes_field(1, key.encode()) + bytes_field(2, text.encode()) for key, text in said.items())
    return b"".join(bytes_field(13, entry) for entry in entries) + int_field(14, 1)


def node(operator: str, inputs: Sequence[str], outputs: Sequence[str], attributes: Sequence[bytes] = ()) -> bytes:
    """Return a NodeProto."""
    names = [bytes_field(1, name.encode()) for name in inputs] + [bytes_field(2, name.encode()) for name in outputs]
    return b"".join([*names, bytes_field(4, operator.encode()), *(bytes_field(5, one) for one in attributes)])


def integer(name: str, value: int) -> bytes:
    """Return an AttributeProto with an integer."""
    return bytes_field(1, name.encode()) + int_field(3, value) + int_field(20, 2)


def value(name: str, number: int, shape: Sequence[int | str]) -> bytes:
    """Return a ValueInfoProto of a tensor."""
    dims = [int_field(1, dim) if isinstance(dim, int) else bytes_field(2, dim.encode()) for dim in shape]
    tensor = int_field(1, number) + bytes_field(2, b"".join(bytes_field(1, dim) for dim in dims))
    return bytes_field(1, name.encode()) + bytes_field(2, bytes_field(1, tensor))


def model(
    initializers: Sequence[bytes],
    nodes: Sequence[bytes],
    inputs: Sequence[bytes],
    outputs: Sequence[bytes],
    *,
    version: int = 17,
) -> bytes:
    """Return a ModelProto for a version of the operators."""
    graph = b"".join(
        bytes_field(number, one)
        for number, those in ((1, nodes), (5, initializers), (11, inputs), (12, outputs))
        for one in those
    )
    graph += bytes_field(2, b"g")
    return int_field(1, 10) + bytes_field(7, graph) + bytes_field(8, int_field(2, version))


def linear(values: Mapping[str, np.ndarray], name: str = "w", bias: str = "b") -> bytes:
    """Return the model y = x @ w + b, with all of these values as initializers."""
    width, height = values[name].shape
    nodes = [node("MatMul", ["x", name], ["h"]), node("Add", ["h", bias], ["y"])]
    ports = [value("x", 1, ["batch", width])], [value("y", 1, ["batch", height])]
    return model([initializer(key, array) for key, array in values.items()], nodes, *ports)
