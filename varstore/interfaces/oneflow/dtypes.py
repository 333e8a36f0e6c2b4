"""OneFlow's names of data types, as numpy types: ``varstore.float32`` in place of ``flow.float32``."""

from __future__ import annotations

import ml_dtypes
import numpy as np

__all__ = [
    "bfloat16",
    "bool",
    "char",
    "complex64",
    "complex128",
    "double",
    "float",
    "float16",
    "float32",
    "float64",
    "int8",
    "int16",
    "int32",
    "int64",
    "uint8",
    "uint16",
    "uint32",
    "uint64",
]

bfloat16 = np.dtype(ml_dtypes.bfloat16)
bool = np.dtype(np.bool_)
char = np.dtype(np.int8)
complex64 = np.dtype(np.complex64)
complex128 = np.dtype(np.complex128)
double = float64 = np.dtype(np.float64)
float = float32 = np.dtype(np.float32)
float16 = np.dtype(np.float16)
int8 = np.dtype(np.int8)
int16 = np.dtype(np.int16)
int32 = np.dtype(np.int32)
int64 = np.dtype(np.int64)
uint8 = np.dtype(np.uint8)
uint16 = np.dtype(np.uint16)
uint32 = np.dtype(np.uint32)
uint64 = np.dtype(np.uint64)
