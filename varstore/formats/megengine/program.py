"""MegEngine's dumped graphs: the values in a graph, and copies with other values in their places.

A dump of the format FBS_V2 is the size of a FlatBuffer, then the buffer. Its tables, with the numbers of the fields
that are read::

    Model     {oprs: [Operator] = 2; middle_tensors: [MiddleTensor] = 3}
    Operator  {type: string = 0; name: string = 2; inputs: [uint] = 7; outputs: [uint] = 8; tensors: [Tensor] = 11}
    Tensor    {name: string = 0; shape: [uint] = 1; dtype: DType = 3; data: [ubyte] = 6}
    DType     {type: byte = 0; param: union {LinearQuantizationParam {scale: float = 0; zero_point: ubyte = 1}} = 1}
    MiddleTensor {name: string = 0}

Values are tensors of an operator that has no inputs, and have the names of its outputs, which are middle tensors by
their index. MegEngine makes these names unique, and gives new ones to what it computes when it optimises the graph.

It keeps equal values of at most 28 elements once in a graph, such as the zeros of two layers that were not trained. To
change one would change the others, of which the file does not have the names. So such a value can only be replaced
where the graph uses it once. Optimising can leave one use of several: names are sure in the dump of a trained network.

The format before, FBS, does not have names.

Source: https://github.com/MegEngine/MegEngine, files src/serialization/impl/schema_v2.fbs and dtype.fbs,
src/opr/impl/io.cpp
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import ml_dtypes
import numpy as np

from varstore.errors import FormatError, SizeMismatch, UnsupportedDtype, VariableMismatch
from varstore.formats.binary.budget import ARRAY, Budget
from varstore.formats.binary.flatbuffers import FlatBuffer, Table
from varstore.formats.binary.magic import MEGENGINE_DUMP, is_megengine_graph
from varstore.formats.binary.slices import Span, array_of_spans, refused_array
from varstore.formats.binary.source import MOST_DIMENSIONS, Source
from varstore.formats.opened import ForeignCheckpoint
from varstore.formats.state.copies import check_apart, write_copy
from varstore.formats.state.flat import check_fits, fetch_plain, flat_arrays
from varstore.values.lazy import LazyArray, derived

__all__ = ["read_program", "write_program"]

_OPERATORS, _MIDDLE = 2, 3
_TYPE, _OWN, _INPUTS, _OUTPUTS, _TENSORS = 0, 2, 7, 8, 11
_NAME, _SHAPE, _DTYPE, _DATA = 0, 1, 3, 6
_KIND, _QUANTISATION = 0, 2
_SCALE, _ZERO_POINT = 0, 1
_PREFIX, _HEAD = 4, 12
_SCALED = "mgb_dtype"
_SHOWN = 100
_MERGED = 28
"""The number of elements up to which MegEngine keeps equal values once."""
_RENAMED = "dump the graph with `optimize_for_inference=False`, which keeps the names of all values; or leave it out"
_ONLY_SHAPES = "GetVarShape"
"""How the types of operators begin that do not use the values of their inputs."""

_DTYPES: dict[int, tuple[str, np.dtype[Any] | None]] = {
    number: (name, None if scalar is None else np.dtype(scalar))
    for number, (name, scalar) in enumerate(
        (
            ("Float32", np.float32),
            ("Uint8", np.uint8),
            ("Int8", np.int8),
            ("Int16", np.int16),
            ("Int32", np.int32),
            ("IntB1", None),
            ("IntB2", None),
            ("IntB4", None),
            ("Byte", np.uint8),
            ("Float16", np.float16),
            ("UintB4", None),
            ("Quantized8Asymm", np.uint8),
            ("QuantizedS32", np.int32),
            ("QuantizedS8", np.int8),
            ("Quantized4Asymm", None),
            ("QuantizedS4", None),
            ("QuantizedS16", np.int16),
            ("BFloat16", ml_dtypes.bfloat16),
            ("Bool", np.bool_),
            ("Uint16", np.uint16),
            ("QuantizedS1", None),
            ("Complex64", np.complex64),
        )
    )
}
"""The names of types by number, and numpy's; None where values take less than a byte."""


def read_program(source: Source, budget: Budget) -> ForeignCheckpoint:
    """Open the values in a dumped graph, by their names; those of less than a byte are an error when they are read.

    Raises:
        FormatError: the file is truncated, damaged, of the format FBS, or was dumped without names.
        SizeMismatch: values do not have the size that their shape and type require.
    """
    arrays = {value.name: value.array for value in _values(source, budget)}
    return ForeignCheckpoint(source.path, "megengine", arrays, {"exported": True}, budget=budget)


def write_program(path: str, state: Any, model: str) -> None:
    """Write a copy of a dumped graph in which the values named in `state` are other ones.

    Raises:
        UsageError: the copy and the model are the same file.
        VariableNotFound, VariableMismatch: the graph does not have a value, or not of this shape, type or scale; or it
            is used in several places, of which some may have had another name.
        UnsupportedDtype: values take less than a byte.
        FormatError: see `read_program`.
    """
    arrays = flat_arrays(state, format="megengine")
    source = Source(model)
    check_apart(path, model)
    values = {value.name: value for value in _values(source, Budget(model, source.size))}
    known = {name: value.array for name, value in values.items()}
    for name, array in arrays.items():
        if name in known and known[name].dtype.hasobject:
            known[name].numpy()
        check_fits(model, name, array, known, hint=_RENAMED)
        _check_scale(model, name, array, known[name])
        if values[name].uses > 1 and known[name].size <= _MERGED:
            _check_alone(model, name, array, known[name])
    write_copy(path, source, arrays, {name: value.span[0] for name, value in values.items()})


@dataclass(slots=True)
class _Value:
    """A value in a graph, where its bytes are, and how many inputs of operators use it."""

    name: str
    span: Span
    array: LazyArray
    uses: int = 0


def _values(source: Source, budget: Budget) -> list[_Value]:
    """Return the values in the order of the operators.

    Raises:
        FormatError: see `read_program`; or two values have one name, or share bytes.
    """
    model = _model(source)
    middle = model.tables(_MIDDLE)
    found: dict[str, _Value] = {}
    by_output: dict[int, _Value] = {}
    for operator in model.tables(_OPERATORS):
        if not operator.text(_TYPE).startswith(_ONLY_SHAPES):
            for used in operator.numbers(_INPUTS):
                if used in by_output:
                    by_output[used].uses += 1
        outputs: np.ndarray | None = None
        for index, tensor in enumerate(operator.tables(_TENSORS)):
            span = tensor.content(_DATA)
            if span is None:  # an input of the graph
                continue
            outputs = operator.numbers(_OUTPUTS) if outputs is None else outputs
            output = int(outputs[index]) if index < len(outputs) else len(middle)
            name = tensor.text(_NAME) or (middle[output].text(_NAME) if output < len(middle) else operator.text(_OWN))
            if not name or name in found:
                raise FormatError(
                    "two values in the graph have the same name" if name else "the graph was dumped without names",
                    path=source.path,
                    variable=name[:_SHOWN] or None,
                    hint=None if name else "dump it with `keep_var_name=1`, which is the default",
                )
            budget.charge(ARRAY + 4 * len(name))
            found[name] = by_output[output] = _Value(name, span, _array(source, tensor, span, name))
    for (start, size), (following, _) in pairwise(sorted(value.span for value in found.values())):
        if start + size > following:
            raise FormatError("two values share bytes of the file", path=source.path, found=f"at byte {following}")
    return list(found.values())


def _model(source: Source) -> Table:
    head = source.bytes(0, min(_HEAD, source.size))
    if head[_HEAD - len(MEGENGINE_DUMP) :] != MEGENGINE_DUMP:
        is_old = is_megengine_graph(head)
        raise FormatError(
            "this graph was dumped in the format FBS, which does not have names"
            if is_old
            else "this is not a graph that MegEngine dumped",
            path=source.path,
            expected="a dump of the format FBS_V2",
            hint="dump it again with `dump_format='FBS_V2'`, or save the module's state_dict() with megengine.save"
            if is_old
            else None,
        )
    size = int.from_bytes(head[:_PREFIX], "little")
    if _PREFIX + size > source.size:
        raise SizeMismatch(
            "the file ends early", path=source.path, found=f"{source.size} bytes", expected=f"{_PREFIX + size} bytes"
        )
    return FlatBuffer(source.map(), (_PREFIX, size), source.path).root()


def _array(source: Source, tensor: Table, span: Span, name: str) -> LazyArray:
    about = tensor.table(_DTYPE)
    kind = -1 if about is None else int(about.number(_KIND, "b"))
    type_name, dtype = _DTYPES.get(kind, (str(kind), None))
    shape = tuple(tensor.numbers(_SHAPE)[: MOST_DIMENSIONS + 1].tolist())
    if dtype is None:
        error = UnsupportedDtype(
            "the type does not have a numpy equivalent", path=source.path, variable=name[:_SHOWN], found=type_name
        )
        return refused_array(shape[:MOST_DIMENSIONS], error)
    array = array_of_spans(source, [span], shape, dtype, variable=name[:_SHOWN])
    quantisation = about.table(_QUANTISATION) if about is not None else None
    if quantisation is None:
        return array
    zero_point = int(quantisation.number(_ZERO_POINT, "B")) if type_name.endswith("Asymm") else None
    scale = quantisation.number(_SCALE, "f")
    return derived(array, attributes={_SCALED: {"name": type_name, "scale": scale, "zero_point": zero_point}})


def _check_scale(model: str, name: str, array: LazyArray, known: LazyArray) -> None:
    """Check that integers that say their scale have that of those in the graph."""
    given, expected = array.attributes.get(_SCALED), known.attributes.get(_SCALED)
    if given is not None and given != expected:
        raise VariableMismatch(
            "the graph of the model expects another scale",
            path=model,
            variable=name,
            found=str(given)[:_SHOWN],
            expected=str(expected or "values that are not quantised")[:_SHOWN],
        )


def _check_alone(model: str, name: str, array: LazyArray, known: LazyArray) -> None:
    """Check that a value that is used in several places stays what it is."""
    if fetch_plain(name, array).tobytes() != fetch_plain(name, known).tobytes():
        raise VariableMismatch(
            "the graph uses this value in several places, of which some may have had another name",
            path=model,
            variable=name,
            hint=f"MegEngine keeps equal values of up to {_MERGED} elements once, under one of their names: dump the "
            "network again after these values were trained",
        )
