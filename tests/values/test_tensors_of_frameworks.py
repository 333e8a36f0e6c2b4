"""Tensors of frameworks by what they show of themselves, without the frameworks."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from support import assert_same

import varstore as vs


class Type:
    def __init__(self, name, text):
        self.name, self._text = name, text

    def __str__(self):
        return self._text


class Dynamic:
    def __init__(self, values, dtype):
        self.shape, self.dtype, self._values = list(values.shape), dtype, values

    def numpy(self):
        return self._values


class Static:
    """A tensor of a static program: shape and type are methods, and there is no `numpy`."""

    def __init__(self, values, dtype):
        self._values, self._type = values, dtype

    def shape(self):
        return list(self._values.shape)

    def _dtype(self):
        return self._type

    def _is_initialized(self):
        return True

    def __array__(self, dtype=None, copy=None):
        return self._values


@pytest.mark.parametrize("kind", [Dynamic, Static])
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("FP32", np.float32),
        ("FP16", np.float16),
        ("FP64", np.float64),
        ("BF16", ml_dtypes.bfloat16),
        ("INT64", np.int64),
        ("BOOL", np.bool_),
        ("FLOAT32", np.float32),
        ("FLOAT8_E4M3FN", ml_dtypes.float8_e4m3fn),
    ],
)
def test_names_of_types_of_paddle(tmp_path, monkeypatch, kind, name, dtype):
    monkeypatch.setattr(kind, "__module__", "paddle.base.libpaddle")
    values = np.asarray([[1, 0, 1]], dtype)
    shown = values.view(f"u{values.itemsize}") if values.dtype.type.__module__ != "numpy" else values
    vs.save(tmp_path / "c", {"w": kind(shown, Type(name, f"paddle.{values.dtype.name}"))})
    assert_same(vs.load(tmp_path / "c")["w"], values)
