"""What the tests share: data and its truth, one check for every reader, strategies, child processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from hypothesis import settings, strategies as st

import varstore as vs
from varstore.layout.dtypes import TABLE

__all__ = [
    "FIXTURES",
    "ROOT",
    "all_dtypes",
    "any_names",
    "arrays",
    "assert_same",
    "bits_of",
    "check_checkpoint",
    "load_facts",
    "load_truth",
    "names",
    "run_python",
]

settings.register_profile("unhurried", settings(), deadline=None)  # a busy machine is no fault
settings.load_profile("unhurried")

ROOT = Path(__file__).resolve().parents[2]
FIXTURES = ROOT / "tests" / "data"
"""Files that real frameworks wrote; ``X.expect.npz`` and ``X.expect.json`` beside ``X`` hold the truth."""

all_dtypes: list[np.dtype[Any]] = [row.dtype for row in TABLE if row.dtype is not None and row.written]
"""Every type that can be saved, in the order of the table, little-endian."""


# --- truth -------------------------------------------------------------------------------------------------------


def load_facts(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return ``X.expect.json`` of the file or directory X."""
    return json.loads(Path(f"{os.fspath(path)}.expect.json").read_text())


def load_truth(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Return the tensors that the framework had in memory when it wrote X, by name, under their true types."""
    tensors = load_facts(path)["tensors"]
    with np.load(f"{os.fspath(path)}.expect.npz", allow_pickle=False) as values:
        return {name: _as_written(values[name], facts) for name, facts in tensors.items()}


def _as_written(values: np.ndarray, facts: Mapping[str, Any]) -> np.ndarray:
    values = values.view(np.dtype(facts["dtype"])) if "stored_as" in facts else values
    assert (list(values.shape), values.dtype.name) == (facts["shape"], facts["dtype"])
    return values


# --- one check for every reader ----------------------------------------------------------------------------------


def check_checkpoint(path: str | os.PathLike[str], expected: Mapping[str, np.ndarray]) -> None:
    """Assert that every way of reading a checkpoint gives these names, shapes, types and bytes, and no others."""
    with vs.open(path) as checkpoint:
        assert len(checkpoint) == len(expected)
        assert set(checkpoint) == set(checkpoint.names) == set(expected)
        for name, values in expected.items():
            variable = checkpoint[name]
            assert (variable.name, variable.shape, variable.nbytes) == (name, values.shape, values.nbytes)
            assert variable.dtype == values.dtype.newbyteorder("<")
            assert_same(variable.numpy(), values)
            assert_same(variable.numpy(mmap=True), values)
            assert_same(variable[...], values)
            assert_same(np.asarray(variable), values)
            if values.ndim and len(values):
                assert_same(np.asarray(variable[-1]), np.asarray(values[-1]))
    for options in ({"threads": 1}, {"threads": 3}, {"verify": False}, {"mmap": True}):
        _assert_all_same(vs.load(path, **options), expected)
    for threads in (1, 3):
        targets = {name: _scribbled(values) for name, values in expected.items()}
        report = vs.load_into(targets, path, threads=threads)
        assert sorted(report.loaded) == sorted(expected)
        _assert_all_same(targets, expected)
    report = vs.verify(path)
    assert report.ok, str(report)


def assert_same(found: np.ndarray, expected: np.ndarray) -> None:
    """Assert equality of shape, type (whatever the byte order of `expected`) and bytes, so that NaNs count too."""
    dtype = expected.dtype.newbyteorder("<")
    assert isinstance(found, np.ndarray)
    assert (found.shape, found.dtype) == (expected.shape, dtype)
    assert found.tobytes() == expected.astype(dtype).tobytes()


def _assert_all_same(found: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> None:
    assert set(found) == set(expected)
    for name, values in expected.items():
        assert_same(found[name], values)


def _scribbled(values: np.ndarray) -> np.ndarray:
    """Return an array of this form whose bytes are almost surely not those of `values`."""
    return np.frombuffer(bytearray(b"\xa5" * values.nbytes), values.dtype.newbyteorder("<")).reshape(values.shape)


# --- strategies --------------------------------------------------------------------------------------------------

_NASTY = [
    *("", ".", "..", "...", " ", "a.", "a ", ".a", " a", "a. .", "%", "%00", "%2E", "%6Fut", "%e9", "a%", "CON", "~"),
    *("out", "meta", "zarr.json", "manifest", "snapshot_done", "pickled_data", "OUT", "out.", "outer", ".hidden"),
    *('a\\b:c*d?e"f<g>h|i', "line\nbreak", "\x01", "\x7f", "\x85", "\u2028", "é", "e\u0301", "ｆｕｌｌ", "層", "😀"),
    *("conv1-weight", "System-Train-TrainStep-train_job", "C:", "[0]", "a,b;c", "'", "$x", "-rf", "\ufeff", "\u202e"),
]
_characters = st.one_of(st.sampled_from('. /%\\:*?"<>|aO\x7f\x80é'), st.characters(exclude_categories=["Cs"]))
_parts = st.one_of(st.sampled_from(_NASTY), st.text(_characters, max_size=16))
_long_parts = st.builds(
    lambda part, times: part * times,
    st.sampled_from(["a", "%", "é", "😀", "\x85", "."]),
    st.integers(60, 300),
)


def _joined(parts: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    whole = st.lists(parts, min_size=1, max_size=5).map("/".join)
    return whole.map(lambda name: name.replace("\0", "0")).filter(bool)


names: st.SearchStrategy[str] = _joined(_parts)
"""Names that can be saved, nasty ones first of all."""

any_names: st.SearchStrategy[str] = _joined(st.one_of(_parts, _long_parts))
"""Names of any Unicode without NUL; some have parts that are too long for a folder."""


def bits_of(dtype: np.dtype[Any]) -> int:
    """Return how many bits of an element count: fewer than its bytes hold for bool, int4, float6 and their like."""
    if dtype.kind == "b":
        return 1
    if dtype.kind == "c" or dtype.type.__module__ == "numpy":
        return 8 * dtype.itemsize
    info = ml_dtypes.iinfo if "int" in dtype.name else ml_dtypes.finfo
    return info(dtype).bits


@st.composite
def arrays(draw: st.DrawFn, dtypes: st.SearchStrategy[np.dtype[Any]] | None = None) -> np.ndarray:
    """Draw an array of any type that can be saved: every bit pattern, 0-d, empty, any layout and byte order."""
    dtype = draw(dtypes or st.sampled_from(all_dtypes))
    shape = tuple(draw(st.lists(st.integers(0, 4), max_size=4)))
    size = dtype.itemsize * int(np.prod(shape, dtype=int))
    raw = np.frombuffer(draw(st.binary(min_size=size, max_size=size)), np.uint8)
    if bits_of(dtype) < 8:
        raw = raw & np.uint8((1 << bits_of(dtype)) - 1)
    values = raw.view(dtype).reshape(shape).copy()
    if dtype.type.__module__ == "numpy" and draw(st.booleans()):
        values = values.astype(dtype.newbyteorder(">"))
    return draw(st.sampled_from(_LAYOUTS))(values)


def _every_other(values: np.ndarray) -> np.ndarray:
    return np.repeat(values, 2, axis=0)[::2] if values.ndim else values


def _broadcast(values: np.ndarray) -> np.ndarray:
    return np.broadcast_to(values[:1], values.shape) if values.ndim and len(values) else values


_LAYOUTS = [
    lambda values: values,
    np.asfortranarray,
    lambda values: values.T,
    lambda values: values[::-1] if values.ndim else values,
    _every_other,
    _broadcast,
]


# --- child processes ---------------------------------------------------------------------------------------------


def run_python(
    code: str, *arguments: str | os.PathLike[str], check: bool = True, timeout: float = 120, **env: str
) -> Any:
    """Run code in a fresh interpreter and return its `subprocess.CompletedProcess`, with its output as text.

    `arguments` are its ``sys.argv[1:]`` and `env` joins the environment; with `check` it must exit with 0.
    """
    command = [sys.executable, "-c", code, *map(os.fspath, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=os.environ | env)
    assert not check or done.returncode == 0, done.stderr
    return done
