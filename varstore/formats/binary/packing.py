"""Pack values of less than eight bits into bytes, from the lowest bit up, and unpack them.

PyTorch, ONNX and users of safetensors store such types this way: element 0 is in the lowest bits of byte 0, and an
element of a six-bit type may extend over two bytes. In memory, each element takes one byte, as in `ml_dtypes`.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

__all__ = ["bits_of", "pack", "packed_size", "unpack"]

_NARROW = {
    np.dtype(scalar): bits
    for scalar, bits in (
        (ml_dtypes.int2, 2),
        (ml_dtypes.uint2, 2),
        (ml_dtypes.int4, 4),
        (ml_dtypes.uint4, 4),
        (ml_dtypes.float4_e2m1fn, 4),
        (ml_dtypes.float6_e2m3fn, 6),
        (ml_dtypes.float6_e3m2fn, 6),
    )
}
_SIGNED = {np.dtype(ml_dtypes.int2), np.dtype(ml_dtypes.int4)}
_STEP = 1 << 20


def bits_of(dtype: np.dtype[Any]) -> int:
    """Return the number of bits that one packed value takes."""
    return _NARROW.get(dtype, dtype.itemsize * 8)


def packed_size(count: int, dtype: np.dtype[Any]) -> int:
    """Return the number of bytes that `count` packed values take; unused bits of the last byte are zero."""
    return (count * bits_of(dtype) + 7) // 8


def unpack(packed: np.ndarray, count: int, dtype: np.dtype[Any]) -> np.ndarray:
    """Return the first `count` values in packed bytes: an array of uint8, at least `packed_size` long."""
    bits = bits_of(dtype)
    if bits == dtype.itemsize * 8:
        return packed[: count * dtype.itemsize].view(dtype)
    values = np.empty(count, np.uint8)
    for start in range(0, count, _STEP):
        stop = min(start + _STEP, count)
        part = np.unpackbits(packed[start * bits // 8 : packed_size(stop, dtype)], bitorder="little")
        codes = part[: (stop - start) * bits].reshape(-1, bits)
        values[start:stop] = np.packbits(codes, axis=1, bitorder="little")[:, 0]
    if dtype in _SIGNED:
        sign = np.uint8(1 << (bits - 1))
        values = (values ^ sign) - sign
    return values.view(dtype)


def pack(values: np.ndarray) -> np.ndarray:
    """Return an array's values in C order as packed bytes (uint8); the inverse of `unpack`."""
    flat = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
    bits = bits_of(values.dtype)
    if bits == values.dtype.itemsize * 8:
        return flat
    packed = np.empty(packed_size(flat.size, values.dtype), np.uint8)
    for start in range(0, flat.size, _STEP):
        part = flat[start : start + _STEP]
        codes = np.unpackbits(part.reshape(-1, 1), axis=1, count=bits, bitorder="little")
        first = start * bits // 8
        packed[first : first + packed_size(part.size, values.dtype)] = np.packbits(codes, bitorder="little")
    return packed
