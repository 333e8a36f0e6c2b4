"""Values of fewer than eight bits, packed into bytes from the lowest bit up.

So PyTorch, ONNX and safetensors' users store them: element 0 lies in the lowest bits of byte 0, and an
element may straddle two bytes (the six-bit types). In memory each takes one byte, as `ml_dtypes` has it.
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
    """Return how many bits one value takes when it is packed."""
    return _NARROW.get(dtype, dtype.itemsize * 8)


def packed_size(count: int, dtype: np.dtype[Any]) -> int:
    """Return the bytes that `count` values take, the last byte filled up with zero bits."""
    return (count * bits_of(dtype) + 7) // 8


def unpack(packed: np.ndarray, count: int, dtype: np.dtype[Any]) -> np.ndarray:
    """Return `count` values from packed bytes (uint8, at least `packed_size` of them)."""
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
    """Return the bytes (uint8) of an array's values in C order: the inverse of `unpack`."""
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
