"""PyTorch's storages, and tensors as lazy views of them.

A tensor is a storage with an offset, a shape and strides, all in elements. Reading a tensor reads the bytes between its
first and its last element, in blocks if they are not contiguous, and returns the values in C order. Equal views of a
storage are represented by one object, so that tied tensors stay tied.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from varstore.errors import FormatError, SizeMismatch, UnsafeContent
from varstore.formats.binary.budget import ARRAY, Budget
from varstore.formats.binary.source import MOST_DIMENSIONS, count_elements
from varstore.formats.binary.zip import Member
from varstore.formats.pickles.machine import Record
from varstore.formats.pickles.names import Global, show
from varstore.training.tensors import TENSOR
from varstore.values.lazy import LazyArray, Place, placed_array, retyped
from varstore.values.parts import Placed, Read, taken

__all__ = ["DTYPES", "STORAGES", "Complex32", "Storage", "StorageClass", "Storages", "storage_of", "whole_storage"]

_LONGEST = 1 << 58

Complex32 = np.dtype((np.float16, (2,)))
"""torch's complex32; numpy does not have it, so it is read as float16 with a last axis (real, imaginary)."""

DTYPES: dict[str, np.dtype[Any]] = {
    **{
        dtype.name: dtype
        for dtype in (
            *map(np.dtype, (np.uint8, np.uint16, np.uint32, np.uint64, np.int8, np.int16, np.int32, np.int64)),
            *map(np.dtype, (np.float16, np.float32, np.float64, np.complex64, np.complex128, np.bool_)),
            *map(np.dtype, (ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e4m3fnuz)),
            *map(np.dtype, (ml_dtypes.float8_e5m2, ml_dtypes.float8_e5m2fnuz, ml_dtypes.float8_e8m0fnu)),
        )
    },
    "complex32": Complex32,
}
"""Maps names of types in torch to numpy types."""

STORAGES: dict[str, str | None] = {
    "FloatStorage": "float32",
    "DoubleStorage": "float64",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
    "QInt8Storage": "int8",
    "QUInt8Storage": "uint8",
    "QInt32Storage": "int32",
    "UntypedStorage": None,
}
"""Maps classes of storages to names of types in torch; None for the untyped storage, which counts bytes."""


class Storage(Record):
    """The memory of one or more tensors: `size` bytes in a file; `read` is set once their position is known.

    `member` is what holds them, where the file is an archive.
    """

    __slots__ = ("dtype", "is_plain", "key", "member", "path", "read", "size", "swapped", "views")

    def __init__(self, path: str, key: str, dtype: np.dtype[Any] | None, count: int) -> None:
        self.path = path
        self.key = key
        self.dtype = dtype
        self.size = count * (1 if dtype is None else dtype.itemsize)
        self.swapped = False
        self.views = 0
        self.is_plain = True
        self.member: Member | None = None
        self.read: Read = self._missing

    def _missing(self, _offset: int, _size: int) -> np.ndarray:
        raise FormatError("the file does not contain this storage", path=self.path, field=f"storage {self.key}")


class Storages:
    """The storages in one pickle; `find` creates each of them once."""

    def __init__(self, budget: Budget) -> None:
        self.path = budget.path
        self._budget = budget
        self._found: dict[str, Storage] = {}
        self._views: dict[str, LazyArray] = {}  # by their places as text, because its hash is keyed
        self._typed: dict[tuple[int, str, bool], LazyArray] = {}

    @property
    def found(self) -> list[Storage]:
        """The storages that were created."""
        return [*self._found.values()]

    def find(self, kind: Any, key: Any, count: Any) -> Storage:
        """Return the storage of this class, key and number of elements.

        Raises:
            UnsafeContent: they are not a class of storage, text and an integer of 0 or more.
        """
        name = kind.entry if type(kind) is Global else None
        if (
            type(name) is not StorageClass
            or type(key) is not str
            or type(count) is not int
            or not 0 <= count < _LONGEST
        ):
            raise UnsafeContent(
                "a persistent id is not that of a storage", path=self.path, found=show((kind, key, count), most=3)
            )
        identity = f"{key} {0 if name.dtype is None else name.dtype.num} {count}"
        if identity not in self._found:
            self._budget.charge(ARRAY)
            self._found[identity] = Storage(self.path, key, name.dtype, count)
        return self._found[identity]

    def view(
        self, storage: Any, offset: Any, shape: Any, stride: Any, dtype: np.dtype[Any] | None, marks: Any = None
    ) -> LazyArray:
        """Return a tensor; a `dtype` of None is that of the storage, `marks` are torch's lazy {"conj", "neg"}.

        Raises:
            SizeMismatch: an element lies outside the storage.
            FormatError: the shape, strides or offset are not integers of 0 or more.
            UnsafeContent: the tensors are out of proportion to the size of the file.
        """
        kind = storage.dtype if type(storage) is Storage and dtype is None else dtype
        if type(storage) is not Storage or kind is None or type(shape) is not tuple or type(stride) is not tuple:
            raise FormatError("a tensor does not have a storage, type or shape", path=self.path, found=show(storage))
        numbers = (offset, *shape, *stride)
        if len(shape) != len(stride) or any(type(part) is not int or part < 0 for part in numbers):
            raise FormatError(
                "shape and strides of a tensor must be integers of 0 or more, one per dimension",
                path=self.path,
                found=show((offset, shape, stride), most=3),
            )
        todo = tuple(mark for mark in _MARKS if marks.get(mark)) if isinstance(marks, dict) else ()
        identity = f"{id(storage)} {offset} {shape} {stride} {kind.num} {kind.itemsize} {todo}"
        view = self._views.get(identity)
        if view is None:
            self._check(storage, offset, shape, stride, kind)
            self._budget.charge(ARRAY)
            storage.views += 1
            view = self._views[identity] = _lazy_view(storage, offset, shape, stride, kind, todo)
        return view

    def typed(self, tensor: LazyArray, type: str, requires_grad: Any) -> LazyArray:
        """Return the tensor as one of a type, which is one object for each tensor and type."""
        key = (id(tensor), type, requires_grad is True)
        if key not in self._typed:
            self._budget.charge(ARRAY)
            self._typed[key] = retyped(tensor, type, requires_grad is True)
        return self._typed[key]

    def _check(
        self, storage: Storage, offset: int, shape: tuple[int, ...], stride: tuple[int, ...], kind: np.dtype[Any]
    ) -> None:
        count = count_elements(shape, kind.itemsize, path=self.path)
        reach = offset + sum((extent - 1) * step for extent, step in zip(shape, stride, strict=True)) + 1
        if count and reach * kind.itemsize > storage.size:
            raise SizeMismatch(
                "a tensor extends beyond its storage",
                path=self.path,
                field=f"storage {storage.key[:40]!r}",
                found=f"{show((offset, shape, stride), most=MOST_DIMENSIONS)} (offset, shape, strides) of {kind}",
                expected=f"at most {storage.size} bytes",
            )


_MARKS: dict[str, Callable[..., np.ndarray]] = {"conj": np.conjugate, "neg": np.negative}


def _lazy_view(
    storage: Storage,
    offset: int,
    shape: tuple[int, ...],
    stride: tuple[int, ...],
    kind: np.dtype[Any],
    todo: tuple[str, ...],
) -> LazyArray:
    plain = kind.base
    stride = tuple(step if extent > 1 else 0 for extent, step in zip(shape, stride, strict=True))
    if kind.shape:
        shape, stride, offset = (*shape, *kind.shape), (*(2 * step for step in stride), 1), 2 * offset
    reach = sum((extent - 1) * step for extent, step in zip(shape, stride, strict=True)) + 1

    def convert(values: np.ndarray) -> np.ndarray:
        values = values.astype(plain, copy=False)
        for mark in todo:
            values = _MARKS[mark](values)
        return values

    def placed() -> LazyArray:  # where the storage lies is known when the pickle has been read
        stored = plain.newbyteorder(">") if storage.swapped else plain
        place = Placed(shape, stored, stride, offset * plain.itemsize)
        if storage.is_plain or storage.views > 1 or 0 in shape:
            return placed_array(storage.read, place, convert, plain)
        raw = storage.read(place.start, reach * plain.itemsize)  # unpacked once
        return placed_array(lambda start, size: raw[start : start + size], place._replace(start=0), convert, plain)

    def part(index: Any, whole: Callable[[], np.ndarray]) -> Any:
        return placed()[index] if storage.is_plain or storage.views > 1 else taken(whole(), index)

    array = LazyArray(shape, plain, lambda: placed().numpy(), part=part, type="" if kind.shape else TENSOR)
    if not todo and not kind.shape:
        array.place = Place((storage, plain.str), offset, stride)
    return array


class StorageClass:
    """The type that a class of storages stands for; None for the untyped storage."""

    __slots__ = ("dtype",)

    def __init__(self, dtype: np.dtype[Any] | None) -> None:
        self.dtype = dtype


def storage_of(array: LazyArray) -> Storage | None:
    """Return the memory in which a tensor of a file lies, if that is known."""
    memory = None if array.place is None else array.place.memory
    return memory[0] if isinstance(memory, tuple) and isinstance(memory[0], Storage) else None


def whole_storage(storage: Storage) -> LazyArray:
    """Return a storage without a tensor as a one-dimensional array of its type, or of bytes if it is untyped."""
    kind = storage.dtype or np.dtype(np.uint8)
    storage.views += 1
    return _lazy_view(storage, 0, (storage.size // kind.itemsize,), (1,), kind, ())
