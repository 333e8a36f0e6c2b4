"""Values of every kind, for a parameter that takes another."""

from __future__ import annotations

from pathlib import Path

import numpy as np

__all__ = ["FUNCTIONS", "WRONG"]

WRONG = {
    "None": None,
    "true": True,
    "zero": 0,
    "number": 3,
    "negative": -1,
    "huge": 10**30,
    "float": 1.5,
    "nan": float("nan"),
    "text": "x",
    "empty": "",
    "NUL": "a\0b",
    "surrogate": "\ud800",
    "long": "x" * 5000,
    "URL": "s3://bucket/x",
    "a file": "file",
    "bytes": b"x",
    "path": Path("x"),
    "list": [1],
    "texts": ["a", "\0"],
    "dict": {1: 2},
    "objects": {"a": object()},
    "nothing": {},
    "set": {1},
    "array": np.zeros(2),
    "scalar": np.float32(2),
    "object": object(),
    "type": int,
}
FUNCTIONS = frozenset({"progress", "rename", "include", "exclude", "initializer", "clock", "choice_func"})
"""Parameters that take functions, of which `int` is one; a pattern may be anything that can be iterated."""
