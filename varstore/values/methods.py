"""numpy's operators and methods for values that are read when they are used.

A reader hands out objects that are not arrays, yet people add to them, slice them and take their mean. `NumpyMethods`
makes that work: each of its methods reads the values and calls what `numpy.ndarray` has under the same name, so
results, types and errors are numpy's own. numpy's functions reach the values through ``__array__``.

The second half of the class body is a table of method names, grouped by return type. Methods that change an array in
place (``sort``, ``fill``, ``+=``) are not in it: they would change values that nobody sees again. ``x += 1`` makes `x`
an array.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np

__all__ = ["NumpyMethods"]

_AT_ONCE = 4 << 20
"""Bytes of rows that iteration has in memory."""

Result = TypeVar("Result")


class _Method(Generic[Result]):
    """A row of the table: becomes, under each of its names, a method that reads the values and calls numpy's."""

    def __set_name__(self, owner: type, name: str) -> None:
        def method(self: NumpyMethods, *arguments: Any, **options: Any) -> Any:
            return getattr(self.numpy(), name)(*arguments, **options)

        method.__name__, method.__qualname__ = name, f"{owner.__name__}.{name}"
        method.__doc__ = f"Read the values and call `numpy.ndarray.{name}`."
        setattr(owner, name, method)

    if TYPE_CHECKING:

        def __get__(self, values: Any, kind: Any) -> Callable[..., Result]: ...


class _Property(Generic[Result]):
    """A row of the table: becomes, under each of its names, a property that reads the values and asks numpy's."""

    def __set_name__(self, owner: type, name: str) -> None:
        def get(self: NumpyMethods) -> Any:
            return getattr(self.numpy(), name)

        setattr(owner, name, property(get, doc=f"Read the values and return `numpy.ndarray.{name}`."))

    if TYPE_CHECKING:

        def __get__(self, values: Any, kind: Any) -> Result: ...


_array = _Method[np.ndarray]()
_value = _Method[Any]()


class NumpyMethods:
    """numpy's operators and methods: those that need values read them, and call the array's method of the same name.

    A class that derives from it has a shape, a dtype, `numpy`, and ``[]``, which reads a part. Equality is numpy's,
    element by element; the hash is the object's identity.
    """

    __slots__ = ()
    __hash__ = object.__hash__

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Extents."""

    @property
    @abstractmethod
    def dtype(self) -> np.dtype[Any]:
        """The numpy type of the values."""

    @abstractmethod
    def numpy(self) -> np.ndarray:
        """Read the values into a new array."""

    @abstractmethod
    def __getitem__(self, index: Any, /) -> Any:
        """Read the part for an index."""

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def itemsize(self) -> int:
        """Bytes of an element in memory."""
        return self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of the values in memory."""
        return self.size * self.itemsize

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if copy is False:
            raise ValueError("copy=False is not possible: the values are read from disk; use np.asarray(…) or numpy()")
        values = self.numpy()
        return values if dtype is None else values.astype(dtype, copy=False)

    def __len__(self) -> int:
        if not self.shape:
            raise TypeError("len() of unsized object")
        return self.shape[0]

    def __iter__(self) -> Iterator[Any]:
        if not self.shape:
            raise TypeError("iteration over a 0-d array")
        rows = max(1, _AT_ONCE * len(self) // max(1, self.nbytes))
        return (row for start in range(0, len(self), rows) for row in self[start : start + rows])

    def __format__(self, spec: str) -> str:
        return format(self.numpy(), spec) if spec else str(self)

    T = real = imag = _Property[np.ndarray]()
    flat = _Property[Any]()

    astype = byteswap = choose = clip = compress = conj = conjugate = copy = cumprod = cumsum = diagonal = _array
    argpartition = argsort = flatten = ravel = repeat = reshape = round = squeeze = _array
    swapaxes = transpose = view = _array
    all = any = argmax = argmin = dot = item = max = mean = min = prod = searchsorted = std = sum = take = _value
    tolist = trace = var = _value
    nonzero = _Method[tuple[np.ndarray, ...]]()
    tobytes = _Method[bytes]()
    tofile = _Method[None]()

    __eq__ = __ne__ = _array  # type: ignore[assignment]
    __lt__ = __le__ = __gt__ = __ge__ = _array
    __add__ = __sub__ = __mul__ = __truediv__ = __floordiv__ = __mod__ = __pow__ = _array
    __radd__ = __rsub__ = __rmul__ = __rtruediv__ = __rfloordiv__ = __rmod__ = __rpow__ = _array
    __and__ = __or__ = __xor__ = __lshift__ = __rshift__ = _array
    __rand__ = __ror__ = __rxor__ = __rlshift__ = __rrshift__ = _array
    __matmul__ = __rmatmul__ = _value
    __divmod__ = __rdivmod__ = _Method[tuple[np.ndarray, np.ndarray]]()
    __neg__ = __pos__ = __abs__ = __invert__ = _array
    __bool__ = __contains__ = _Method[bool]()
    __int__ = __index__ = _Method[int]()
    __float__ = _Method[float]()
    __complex__ = _Method[complex]()
