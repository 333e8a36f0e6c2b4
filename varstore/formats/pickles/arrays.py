"""The names that the pickles of every format may use: numpy's arrays and Python's containers.

`PLAIN` is the allow-list, to which each format adds its own names. The values of arrays stay in the file: `Array.lazy`
returns an array that reads them on demand.

Source: `__reduce__` and `__setstate__` of numpy's ndarray and dtype,
https://numpy.org/doc/stable/reference/generated/numpy.ndarray.__setstate__.html
"""

from __future__ import annotations

import re
from collections import OrderedDict
from typing import Any

import numpy as np

from varstore.errors import FormatError, SizeMismatch, UnsupportedDtype
from varstore.formats.binary.budget import ARRAY
from varstore.formats.binary.source import count_elements
from varstore.formats.pickles.machine import ITEM, NODE, Instance, Machine, Record
from varstore.formats.pickles.names import Constructor, Global, OldString, Span, Table, internal, show
from varstore.layout.dtypes import TABLE
from varstore.values.lazy import LazyArray, placed_array
from varstore.values.parts import Read, in_c_order, in_fortran_order, read_all

__all__ = ["PLAIN", "Array", "Dtype"]

_DTYPE = re.compile(r"[<>|=]?(?:\?|b1|[iu][1248]|f(?:2|4|8|16)|c(?:8|16|32)|[SUV][1-9][0-9]{0,8})\Z")


class Dtype(Record):
    """A numpy type; `metadata` is what a framework attached to it, `foreign` the state of one that has fields."""

    __slots__ = ("dtype", "foreign", "metadata")

    def __init__(self, dtype: np.dtype[Any]) -> None:
        self.dtype = dtype
        self.foreign: Any = None
        self.metadata: Any = None

    def build(self, machine: Machine, state: Any) -> None:
        """Apply numpy's state of a type: (version, byte order, subtype, names, fields, …[, metadata])."""
        if type(state) is not tuple or len(state) < 5 or any(part is not None for part in state[2:5]):
            if machine.is_lenient:
                self.foreign = state
                return
            machine.fail("structured numpy types are not supported", found=show(state, most=9))
        order = internal(state[1])
        if order in ("<", ">") and self.dtype.itemsize > 1:
            self.dtype = self.dtype.newbyteorder(order)
        if len(state) > 8:
            self.metadata = state[8]


class Array(Record):
    """A numpy array in the pickle, whose values have not been read."""

    __slots__ = ("data", "dtype", "foreign", "fortran", "path", "shape")

    def __init__(self) -> None:
        self.shape: tuple[int, ...] = (0,)
        self.dtype = Dtype(np.dtype(np.uint8))
        self.fortran = False
        self.data: Any = b""
        self.path = ""
        self.foreign: Any = None
        """The state, if the type is not one of plain values."""

    def build(self, machine: Machine, state: Any) -> None:
        """Apply numpy's state of an array: ([version,] shape, type, Fortran order, values)."""
        shape, dtype, fortran, data = state[-4:]
        self.path = machine.path
        if _is_foreign(dtype):
            self.foreign, self.path = state, machine.path
        else:
            self.fill(machine, shape, dtype, fortran, data)

    def fill(self, machine: Machine, shape: Any, dtype: Any, fortran: Any, data: Any) -> None:
        """Set all parts of the array, and check that the number of its values matches its shape."""
        if type(dtype) is not Dtype or type(shape) is not tuple:
            machine.fail("a numpy array does not have a shape or a type", found=show((shape, dtype)))
        if type(data) in (str, OldString) or (type(data) is Span and data.old):  # as Python 2 wrote bytes
            data = _encode(machine, data, "latin-1")
        if type(data) is not bytes and (type(data) is not Span or (data.text and not data.recoded)):
            machine.fail("the values of a numpy array are not bytes", found=show(data))
        size = count_elements(shape, dtype.dtype.itemsize, path=machine.path) * dtype.dtype.itemsize
        given = data.size if isinstance(data, Span) else len(data)
        most = 2 * size if type(data) is Span and data.recoded else size
        if not size <= given <= most:
            raise SizeMismatch(
                "the number of values does not match the shape of the array",
                path=machine.path,
                found=f"{given} bytes for {dtype.dtype} of shape {shape}",
                expected=f"{size} bytes",
            )
        self.shape, self.dtype, self.fortran, self.data, self.path = shape, dtype, bool(fortran), data, machine.path

    def lazy(self, read: Read, dtype: np.dtype[Any] | None = None) -> LazyArray:
        """Return the array; `read` reads ranges of the pickle, and `dtype` replaces the type that the pickle states."""
        if self.foreign is not None:
            raise UnsupportedDtype("the values of an array are objects", path=self.path)
        data, kind = self.data, dtype or self.dtype.dtype
        placed = (in_fortran_order if self.fortran else in_c_order)(self.shape, kind)
        if type(data) is not Span:
            return placed_array(_reader_of(data), placed)
        if data.recoded:
            recoded = _recoded_reader(read, data, self.path)
            return LazyArray(self.shape, kind, lambda: read_all(placed, recoded))
        return placed_array(read, placed._replace(start=data.offset))


def _reader_of(data: bytes) -> Read:
    return lambda offset, size: np.frombuffer(data, np.uint8, size, offset).copy()


def _recoded_reader(read: Read, span: Span, path: str) -> Read:
    """Return what reads all bytes of an array; no part of them has a place of its own in the text."""

    def fetch(_offset: int, size: int) -> np.ndarray:
        raw = read(span.offset, span.size).tobytes()
        try:
            values = raw.decode().encode("latin-1")
        except UnicodeError as error:
            raise FormatError(
                "the values of an array are not bytes encoded as text", path=path, found=str(error)
            ) from None
        if len(values) != size:
            raise SizeMismatch(
                "the number of values does not match the shape of the array",
                path=path,
                found=len(values),
                expected=size,
            )
        return np.frombuffer(values, np.uint8).copy()

    return fetch


def _dtype(machine: Machine, spec: Any, *rest: Any) -> Dtype | Instance:
    if type(spec) is Global and isinstance(spec.entry, np.dtype):
        return Dtype(spec.entry)
    spec = internal(spec)
    if type(spec) is not str or not _DTYPE.match(spec):
        if machine.is_lenient:
            return _inert(machine, "dtype", (spec, *rest))
        raise UnsupportedDtype(
            "the pickle contains an array whose type is not one of plain values",
            path=machine.path,
            found=f"numpy type {show(spec)}",
            expected="a boolean, integer, floating, complex or text type",
        )
    return Dtype(np.dtype(spec))


def _reconstruct(machine: Machine, kind: Any, *rest: Any) -> Array | Instance:
    if type(kind) is not Global or kind.entry is not np.ndarray:
        made = machine.instance(kind, rest) if machine.is_lenient else None
        return made or machine.refuse(f"would create an array of class {show(kind)}")
    machine.charge(ARRAY)
    return Array()


def _is_foreign(dtype: Any) -> bool:
    return type(dtype) is Instance or (type(dtype) is Dtype and dtype.foreign is not None)


def _inert(machine: Machine, name: str, arguments: tuple[Any, ...]) -> Instance:
    """Return what stands for an object of numpy whose type is not one of plain values."""
    machine.charge(NODE)
    return Instance(Global("numpy", name, None, machine.at), machine.at, arguments)


def _from_buffer(machine: Machine, data: Any, dtype: Any, shape: Any, order: Any) -> Array:
    machine.charge(ARRAY)
    array = Array()
    if _is_foreign(dtype):
        array.foreign, array.path = (shape, dtype, order == "F", data), machine.path
        return array
    array.fill(machine, shape, dtype, order == "F", data)
    return array


def _scalar(machine: Machine, dtype: Any, data: Any = b"") -> Any:
    if _is_foreign(dtype):
        return _inert(machine, "generic", (dtype, data))
    if type(data) in (str, OldString) or (type(data) is Span and data.text is not None and not data.recoded):
        data = _encode(machine, data, "latin-1")
    data = machine.plain(data)
    if type(dtype) is not Dtype or type(data) is not bytes or len(data) != dtype.dtype.itemsize:
        machine.fail("the bytes of a numpy scalar do not match its type", found=show((dtype, data)))
    return np.frombuffer(data, dtype.dtype)[0]


def _encode(machine: Machine, text: Any, encoding: Any = "utf-8") -> Any:
    if encoding not in ("latin1", "latin-1"):
        machine.refuse(f"would encode text as {show(encoding)}")
    if type(text) is OldString:
        return text.raw
    if type(text) is Span and text.old:
        return Span(text.offset, text.size)
    if type(text) is Span and text.text == "utf-8" and not text.recoded:
        return Span(text.offset, text.size, "utf-8", recoded=True)
    if type(text) is not str:
        machine.fail("the argument to encode is not text", found=show(text))
    machine.charge(2 * len(text))
    return text.encode("latin-1")


def _ordered_dict(machine: Machine, items: Any = ()) -> OrderedDict[Any, Any]:
    return OrderedDict(_pairs(machine, items))


def _dict(machine: Machine, items: Any = ()) -> dict[Any, Any]:
    return dict(_pairs(machine, items))


def _pairs(machine: Machine, items: Any) -> list[tuple[Any, Any]]:
    if type(items) in (dict, OrderedDict):
        items = list(items.items())
    if type(items) not in (list, tuple):
        machine.fail("a dict is not created from a list", found=show(items))
    machine.charge(NODE + 20 * ITEM * len(items))
    pairs = [(machine.key(key), value) for key, value in items]
    machine.check_keys([key for key, _ in pairs])
    return pairs


def _default_dict(machine: Machine, _factory: Any = None, items: Any = ()) -> dict[Any, Any]:
    return _dict(machine, items)


def _set(machine: Machine, items: Any = ()) -> set[Any]:
    machine.charge(NODE + 20 * ITEM * len(items))
    keys = [machine.key(item) for item in items]
    machine.check_keys(keys, is_set=True)
    return set(keys)


def _frozenset(machine: Machine, items: Any = ()) -> frozenset[Any]:
    return frozenset(_set(machine, items))


def _complex(_machine: Machine, real: Any, imaginary: Any = 0.0) -> complex:
    return complex(float(real), float(imaginary))


def _bytes(machine: Machine, data: Any = b"", encoding: Any = None) -> Any:
    if encoding is not None:
        return _encode(machine, data, encoding)
    if type(data) not in (bytes, Span):
        machine.refuse(f"would create bytes from {show(data)}")
    return data


def _slice(machine: Machine, start: Any, stop: Any, step: Any = None) -> slice | Instance:
    parts = (start, stop, step)
    if all(isinstance(part, _SLICED) for part in parts):
        return slice(*parts)
    if not machine.is_lenient:
        machine.fail("a slice does not consist of numbers or short text", found=show(parts, most=3))
    machine.charge(NODE)
    return Instance(Global("builtins", "slice", None, machine.at), machine.at, parts)


def _reconstructor(machine: Machine, kind: Any, base: Any, state: Any) -> Any:
    """Create an object as pickles of protocols 0 and 1 do."""
    is_object = type(base) is Global and base.entry == "builtins.object" and state is None
    if not is_object and not machine.is_lenient:
        machine.refuse(f"would create an object by copyreg._reconstructor{show((kind, base, state), most=3)}")
    return machine.created(kind, () if is_object else (state,))


_SLICED = (int, float, str, type(None), np.generic)

_BUILTINS: dict[str, Any] = {
    "bytearray": Constructor(call=_bytes),
    "bytes": Constructor(call=_bytes),
    "complex": Constructor(call=_complex),
    "frozenset": Constructor(call=_frozenset),
    "set": Constructor(call=_set),
    "slice": Constructor(call=_slice),
    **{name: f"builtins.{name}" for name in ("bool", "dict", "float", "int", "list", "long", "object", "str")},
}

_NUMPY: dict[tuple[str, str], Any] = {
    ("multiarray", "_reconstruct"): Constructor(call=_reconstruct),
    ("multiarray", "scalar"): Constructor(call=_scalar),
    ("numeric", "_frombuffer"): Constructor(call=_from_buffer),
}

_ARRAYS = (
    *(("numpy", name) for name in ("ndarray", "memmap", "matrix", "recarray")),
    *(("numpy.matrixlib.defmatrix", "matrix"), ("numpy.rec", "recarray"), ("numpy.char", "chararray")),
    *((f"numpy.{core}.records", "recarray") for core in ("core", "_core")),
    *((f"numpy.{core}.defchararray", "chararray") for core in ("core", "_core")),
)
"""numpy's classes of arrays; what they add to an array is not data."""

_ML_DTYPES = tuple(row.dtype for row in TABLE if row.dtype is not None and row.dtype.type.__module__ == "ml_dtypes")

PLAIN: Table = {
    **{(module, name): entry for module in ("builtins", "__builtin__") for name, entry in _BUILTINS.items()},
    **{(f"numpy.{core}.{m}", name): entry for core in ("core", "_core") for (m, name), entry in _NUMPY.items()},
    **{("ml_dtypes", dtype.name): dtype for dtype in _ML_DTYPES},
    **dict.fromkeys(_ARRAYS, np.ndarray),
    ("numpy", "dtype"): Constructor(call=_dtype),
    **{(module, "_reconstructor"): Constructor(call=_reconstructor) for module in ("copyreg", "copy_reg")},
    ("_codecs", "encode"): Constructor(call=_encode),
    ("collections", "OrderedDict"): Constructor(call=_ordered_dict),
    ("collections", "defaultdict"): Constructor(call=_default_dict),
    ("collections", "Counter"): Constructor(call=_dict),
}
