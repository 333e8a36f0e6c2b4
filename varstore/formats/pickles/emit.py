"""Write pickles of plain data, with the values of arrays streamed into the file.

Classes and functions are written by name and never imported, so writing a pickle for a framework does not need the
framework. Protocol 2 is the one that `torch.load(weights_only=True)` accepts. Protocol 4 can contain the values of
arrays of any size.

Source: the opcodes are described in the standard library's pickletools,
https://github.com/python/cpython/blob/main/Lib/pickletools.py
"""

from __future__ import annotations

import struct
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, BinaryIO

import numpy as np

from varstore.formats.state.flat import fetch_plain
from varstore.values.lazy import LazyArray

__all__ = ["Emitter", "Named", "Persistent"]

_BLOCK = 1 << 22


class Named:
    """A class, function or type that the pickle refers to by name."""

    __slots__ = ("module", "name")

    def __init__(self, module: str, name: str) -> None:
        self.module = module
        self.name = name


class Persistent:
    """A reference to an object outside the pickle."""

    __slots__ = ("identity",)

    def __init__(self, identity: tuple[Any, ...]) -> None:
        self.identity = identity


class Emitter:
    """Write one pickle to a file; `array` is called once per tensor to write it."""

    def __init__(self, file: BinaryIO, protocol: int, array: Callable[[Emitter, LazyArray], None]) -> None:
        self._file = file
        self._protocol = protocol
        self._array = array
        self._memo: dict[int, int] = {}

    def pickle(self, value: Any) -> None:
        """Write a complete pickle of a value."""
        self._write(b"\x80" + bytes([self._protocol]))
        self.value(value)
        self._write(b".")

    def call(self, function: Named, *arguments: Any) -> None:
        """Write a call of a function."""
        self.value(function)
        self.value(arguments)
        self._write(b"R")

    def pair(self, function: Named, name: str, second: Callable[[], None]) -> None:
        """Write a call of a function with one argument, a pair of a string and the value that `second` writes."""
        self.value(function)
        self._write(b"((")
        self.value(name)
        second()
        self._write(b"ttR")

    def instance(self, kind: Named, state: Any) -> None:
        """Write an object whose class is called without arguments, and its state."""
        self.value(kind)
        self._write(b")\x81")
        self.value(state)
        self._write(b"b")

    def object(self, kind: Named, arguments: Sequence[Callable[[], None]], state: Any) -> None:
        """Write an object whose class is called with arguments, each of which a function writes, and its state."""
        self.value(kind)
        self._write(b"(")
        for write in arguments:
            write()
        self._write(b"t\x81")
        self.value(state)
        self._write(b"b")

    def dtype(self, dtype: np.dtype[Any], own: tuple[Named, int] | None = None) -> None:
        """Write a numpy type; `own` is for one that the framework registers: its class, and the flags of its type."""
        kind: Any = f"{dtype.kind}{dtype.itemsize}"
        numbers = (-1, -1, 0)
        if own is not None:
            kind, numbers = own[0], (dtype.itemsize, dtype.itemsize, own[1])
        self.call(Named("numpy", "dtype"), kind, False, True)
        self.value((3, "<" if dtype.itemsize > 1 else "|", None, None, None, *numbers))
        self._write(b"b")

    def numpy(self, array: LazyArray, dtype: np.dtype[Any], own: tuple[Named, int] | None = None) -> None:
        """Fetch the values of an array and write them as a numpy array of type `dtype`; see `dtype` for `own`."""
        self.call(Named("numpy.core.multiarray", "_reconstruct"), Named("numpy", "ndarray"), (0,), b"b")
        self._write(b"(")
        self.value(1)
        self.value(tuple(array.shape))
        self.dtype(dtype, own)
        self._write(b"\x89")
        values = fetch_plain("", array).view(dtype).reshape(-1).view(np.uint8)
        self._write(
            b"B" + struct.pack("<I", values.size) if values.size < 1 << 32 else b"\x8e" + struct.pack("<Q", values.size)
        )
        for start in range(0, values.size, _BLOCK):
            self._write(values[start : start + _BLOCK].data)
        self._write(b"tb")

    def value(self, value: Any) -> None:
        """Write a value: a scalar, a container, a name or a tensor."""
        if isinstance(value, LazyArray):
            self._once(value)
        elif isinstance(value, Named):
            self._write(f"c{value.module}\n{value.name}\n".encode())
        elif isinstance(value, Persistent):
            self.value(value.identity)
            self._write(b"Q")
        elif isinstance(value, dict):
            self._dict(value)
        elif isinstance(value, list):
            self._write(b"](")
            self._all(value)
            self._write(b"e")
        elif isinstance(value, tuple):
            self._write(b"(")
            self._all(value)
            self._write(b"t")
        elif isinstance(value, set):
            self.call(self._builtin("set"), list(value))
        else:
            self._scalar(value)

    def _scalar(self, value: Any) -> None:
        if value is None:
            self._write(b"N")
        elif isinstance(value, bool):
            self._write(b"\x88" if value else b"\x89")
        elif isinstance(value, int):
            self._integer(value)
        elif isinstance(value, float):
            self._write(b"G" + struct.pack(">d", value))
        elif isinstance(value, complex):
            self.call(self._builtin("complex"), value.real, value.imag)
        elif isinstance(value, str):
            self._text(value)
        elif self._protocol >= 3:
            self._write(b"B" + struct.pack("<I", len(value)) + value)
        else:
            self.call(Named("_codecs", "encode"), value.decode("latin-1"), "latin1")

    def _integer(self, value: int) -> None:
        if -(1 << 31) <= value < 1 << 31:
            self._write(b"J" + struct.pack("<i", value))
        else:
            raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
            self._write(b"\x8a" + bytes([len(raw)]) + raw)

    def _text(self, value: str) -> None:
        raw = value.encode()
        self._write(b"X" + struct.pack("<I", len(raw)) + raw)

    def _dict(self, value: dict[Any, Any]) -> None:
        if isinstance(value, OrderedDict):
            self.call(Named("collections", "OrderedDict"))
        else:
            self._write(b"}")
        self._write(b"(")
        for key, item in value.items():
            self.value(key)
            self.value(item)
        self._write(b"u")

    def _all(self, values: Any) -> None:
        for value in values:
            self.value(value)

    def _once(self, array: LazyArray) -> None:
        """Write a tensor, or a reference to it if it has been written already."""
        index = self._memo.get(id(array))
        if index is not None:
            self._write(b"j" + struct.pack("<I", index))
            return
        self._array(self, array)
        index = self._memo[id(array)] = len(self._memo)
        self._write(b"r" + struct.pack("<I", index))

    def _builtin(self, name: str) -> Named:
        return Named("builtins" if self._protocol >= 3 else "__builtin__", name)

    def _write(self, data: bytes | memoryview) -> None:
        self._file.write(data)
