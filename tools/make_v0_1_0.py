"""Create tests/data/v0_1_0: checkpoints and files as version 0.1.0 wrote them, and their content in truth.json.

They were created once, by version 0.1.0, and every later version must read them:

    git worktree add ../v0.1.0 c36b961
    (cd ../v0.1.0 && bash tools/test.sh --version)      # makes its .venv
    ../v0.1.0/.venv/bin/python tools/make_v0_1_0.py tests/data/v0_1_0

The groups "torch" and "jax" contain arrays of these frameworks. They are created in an environment with the framework,
by name: ``make_v0_1_0.py FOLDER torch``. A group that exists already is an error, and nothing is written.

The content in truth.json is what was passed to `save`, not what was read; before it is written, the two are compared.
Git does not keep hard links, so truth.json lists the files that were linked ("links"), and `test_v0_1_0.py` links them
again in a copy. The clock is constant, so that version 0.1.0 writes the same bytes each time.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import shutil
import struct
import sys
from collections import Counter, OrderedDict, namedtuple
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any
from unittest import mock

import ml_dtypes
import numpy as np

import varstore as vs

DATA = Path(__file__).resolve().parent.parent / "tests" / "data"
TIME_NS = 1_700_000_000_123_456_789
APART = ("torch", "jax")
"""Groups that are created only if they are named."""

Point = namedtuple("Point", ["x", "y"])
NUMPY_TYPES = (
    *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    *("float16", "float32", "float64", "complex64", "complex128"),
)
WIDE_TYPES = (
    *("bfloat16", "float8_e3m4", "float8_e4m3", "float8_e4m3b11fnuz", "float8_e4m3fn", "float8_e4m3fnuz"),
    *("float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"),
)
NARROW_TYPES = {"int2": 2, "uint2": 2, "int4": 4, "uint4": 4, "float4_e2m1fn": 4}
NARROW_TYPES |= {"float6_e2m3fn": 6, "float6_e3m2fn": 6}
"""Types whose elements have less than eight bits, and the number of bits."""


# --- what a value is, as JSON ------------------------------------------------------------------------------------


class Described:
    """Describes, as JSON, everything that saving and loading must keep; arrays that share memory have one number."""

    def __init__(self) -> None:
        self._kept: list[Any] = []
        self._memory: dict[Any, int] = {}

    def value(self, value: Any) -> Any:
        """Describe nested state: ``[type, content]``, or an array."""
        kind = "bool" if isinstance(value, np.bool_) else type(value).__name__  # numpy 1 calls it bool_
        if hasattr(value, "shape") and not isinstance(value, np.generic):
            return self.array(value)
        if isinstance(value, Mapping):
            return [kind, [[self.value(key), self.value(item)] for key, item in value.items()]]
        if isinstance(value, set | frozenset):
            return [kind, sorted((self.value(item) for item in value), key=str)]
        if isinstance(value, list | tuple):
            fields = getattr(value, "_fields", ())
            return [" ".join([kind, *fields]), [self.value(item) for item in value]]
        return [kind, _bits(value)]

    def array(self, value: Any) -> dict[str, Any]:
        """Describe a numpy array, or a tensor with the properties that torch keeps besides its values."""
        package = type(value).__module__.partition(".")[0]
        if package == "torch":
            return self._tensor(value)
        values = np.asarray(value)
        key = (values.__array_interface__["data"][0], values.shape, values.strides, values.dtype)
        said = {"jax": True} if package.startswith("jax") else {"memory": self._number(key, values)}
        return {**_form(values), **said}

    def variables(self, variables: Mapping[str, Any]) -> dict[str, Any]:
        """Describe arrays by name, in any order."""
        return {name: self.array(variables[name]) for name in sorted(variables)}

    def _tensor(self, tensor: Any) -> dict[str, Any]:
        torch = importlib.import_module("torch")
        plain = tensor.detach().contiguous()
        dtype = str(plain.dtype).partition(".")[2]
        nbytes = plain.reshape(-1).view(torch.uint8).numpy() if plain.numel() else np.empty(0, np.uint8)
        return {
            "torch": type(tensor).__name__,
            **_hashed(dtype, tuple(tensor.shape), nbytes.tobytes()),
            "requires_grad": tensor.requires_grad,
            "memory": self._number(tensor.untyped_storage().data_ptr(), tensor),
            "strides": list(tensor.stride()),
        }

    def _number(self, key: Any, owner: Any) -> int:
        self._kept.append(owner)  # or its address might be another one's next
        return self._memory.setdefault(key if owner.nbytes else len(self._kept) + 0.5, len(self._memory))


def _form(values: np.ndarray) -> dict[str, Any]:
    plain = values.astype(values.dtype.newbyteorder("<"))
    return _hashed(values.dtype.name, values.shape, plain.tobytes())


def _hashed(dtype: str, shape: tuple[int, ...], data: bytes) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "blake2b": hashlib.blake2b(data, digest_size=16).hexdigest()}


def _bits(value: Any) -> str:
    if isinstance(value, np.generic):
        return value.tobytes().hex()
    if isinstance(value, float):
        return struct.pack(">d", value).hex()
    if isinstance(value, complex):
        return _bits(value.real) + _bits(value.imag)
    return hex(value) if type(value) is int else ascii(value)


# --- what a reader sees ------------------------------------------------------------------------------------------


def seen(path: Path, kind: str, *, with_state: bool = True) -> dict[str, Any]:
    """Return what this version reads at a path, in the form of truth.json; state may require a framework."""
    if kind == "checkpoint":
        return _seen_checkpoint(path, with_state)
    return _seen_file(path) if kind == "file" else _seen_run(path)


def _seen_checkpoint(path: Path, with_state: bool) -> dict[str, Any]:
    with vs.open(path) as checkpoint:
        is_ordered = (path / "manifest").exists()
        truth = {
            "names": list(checkpoint) if is_ordered else sorted(checkpoint),
            "attributes": dict(checkpoint.attributes),
            "said": {name: dict(checkpoint[name].attributes) for name in checkpoint if checkpoint[name].attributes},
            "variables": Described().variables(vs.load(checkpoint)),
        }
        if checkpoint.tree is not None and with_state:
            truth["state"] = Described().value(vs.load_state(checkpoint))
    return truth


def _seen_file(path: Path) -> dict[str, Any]:
    opened: Any = vs.read(path)
    return {
        "format": opened.format,
        "names": list(opened),
        "variables": Described().variables({name: opened[name] for name in opened}),
        "state": Described().value(opened.state()),
    }


def _seen_run(path: Path) -> dict[str, Any]:
    saves = vs.CheckpointManager(path).all()
    return {"steps": [[saved.step, saved.time, dict(saved.metrics), os.path.basename(saved.path)] for saved in saves]}


# --- what is made ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Item:
    """One checkpoint, file or run, and the values from which it was created; None if only reading shows them."""

    path: str
    kind: str = "checkpoint"
    needs: str = ""
    variables: Mapping[str, Any] | None = None
    attributes: Mapping[str, Any] | None = None
    said: Mapping[str, Mapping[str, Any]] | None = None
    state: Any = None

    def truth(self, folder: Path) -> dict[str, Any]:
        """Return what truth.json holds of it.

        Raises:
            AssertionError: what is read is not what was given.
        """
        read = seen(folder / self.path, self.kind)
        given: dict[str, Any] = {}
        if self.variables is not None:
            given["variables"] = Described().variables(self.variables)
        if self.state is not None:
            given["state"] = Described().value(self.state)
        given |= {key: dict(value) for key in ("attributes", "said") if (value := getattr(self, key)) is not None}
        for key, value in given.items():
            assert read[key] == value, f"{self.path}: {key}:\n{read[key]}\n{value}"
        return {"kind": self.kind, **({"needs": self.needs} if self.needs else {}), **read}


def saved(
    folder: Path,
    name: str,
    variables: Mapping[str, Any],
    *,
    expected: Mapping[str, Any] | None = None,
    attributes: Mapping[str, Any] | None = None,
    said: Mapping[str, Mapping[str, Any]] | None = None,
    **options: Any,
) -> Item:
    """Save a checkpoint; `expected` are the arrays that it contains, if they are not the ones given."""
    vs.save(folder / name, variables, attributes=attributes, variable_attributes=said, **options)
    variables = variables if expected is None else expected
    return Item(path=name, variables=variables, attributes=attributes or {}, said=said or {})


def saved_state(folder: Path, name: str, state: Any, *, attributes: Mapping[str, Any] | None = None) -> Item:
    """Save nested state."""
    vs.save_state(folder / name, state, attributes=attributes)
    return Item(path=name, state=state, attributes=attributes or {}, said={})


def ramp(*shape: int, dtype: str = "float32", first: int = 0) -> np.ndarray:
    """Return numbers that count up."""
    return np.arange(first, first + int(np.prod(shape, dtype=int))).reshape(shape).astype(dtype)


def bits(dtype: str, *shape: int) -> np.ndarray:
    """Return bit patterns, including those of nan and infinity, that depend only on the type."""
    kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
    raw = np.frombuffer(np.random.RandomState(1).bytes(kind.itemsize * int(np.prod(shape, dtype=int))), np.uint8)
    narrow = {"bool": 1, **NARROW_TYPES}.get(dtype, 8)
    return (raw & np.uint8((1 << narrow) - 1)).view(kind).reshape(shape)


def names(folder: Path) -> Iterator[Item]:
    """Names of all kinds, but only those that every file system can store, with at most 120 bytes per part."""
    sorts = {
        "plain": ["w", "conv1-weight", "layer.0.bias", "running_mean", "[0]", "a,b;c", "~", "$x", "-rf", "'", "a b"],
        "escaped": ["%", "%2E", "a%", 'q"q', "a\\b", "c:d", "*", "?", "<g>", "h|i"],
        "control_characters": ["line\nbreak", "\x01", "\x7f", "\x85", "tab\t"],
        "unicode": ["é", "層", "😀", "ｆｕｌｌ", "\u2028", "\ufeff", "\u202e", "Ω/ß"],
        "nested": ["a", "a/b", "a/b/c", "b/c/d/e/f/g", "model/encoder/0/weight", "model/encoder/1/weight"],
        "dots": [".", "..", "...", "a.", "a/..", "../b", ".hidden", " ", "c ", " c", "d. ."],
        "reserved": ["out", "meta", "manifest", "snapshot_done", "pickled_data", "zarr.json", "outer", "x/out"],
        "empty_parts": ["/", "/a", "b/", "c//d", "//"],
        "long": ["a" * 120, "é" * 60, "%" * 40, "/".join("abcdefghij")],
    }  # fmt: skip
    for sort, given in sorts.items():
        yield saved(folder, sort, {name: ramp(2, first=index) for index, name in enumerate(given)})


def types(folder: Path) -> Iterator[Item]:
    """Every type, with bit patterns of all kinds, and every kind of shape, layout and scalar."""
    yield saved(folder, "numpy", {name: bits(name, 3, 5) for name in NUMPY_TYPES})
    yield saved(folder, "wide", {name: bits(name, 4, 4) for name in WIDE_TYPES})
    yield saved(folder, "narrow", {name: bits(name, 64) for name in NARROW_TYPES})
    every = np.arange(256, dtype=np.uint8)
    yield saved(folder, "every_byte", {name: every.view(getattr(ml_dtypes, name)) for name in WIDE_TYPES[1:]})
    limits = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, -np.nan, 5e-324, 1.7976931348623157e308])
    yield saved(folder, "limits", {"float64": limits, "complex128": np.repeat(limits, 2).view("complex128")})
    forms: list[tuple[int, ...]] = [(), (0,), (1,), (3, 0, 2), (0, 0), (1, 1, 1), (2, 3, 1, 2, 1, 2), (7, 1)]
    yield saved(folder, "shapes", {str(form): ramp(*form) for form in forms})
    yield saved(folder, "zero_dimensions", {name: bits(name) for name in (*NUMPY_TYPES, *WIDE_TYPES, *NARROW_TYPES)})
    yield saved(folder, "empty", {name: bits(name, 0, 3) for name in (*NUMPY_TYPES, *WIDE_TYPES, *NARROW_TYPES)})
    square = ramp(4, 4)
    layouts = {
        "fortran": np.asfortranarray(square), "transposed": ramp(2, 6).T, "reversed": ramp(5)[::-1],
        "strided": ramp(9)[::2], "broadcast": np.broadcast_to(ramp(3), (4, 3)), "diagonal": ramp(4, 4).diagonal(),
    }  # fmt: skip
    yield saved(folder, "layouts", layouts)
    endian = {name: ramp(4, dtype=name).astype(np.dtype(name).newbyteorder(">")) for name in NUMPY_TYPES}
    yield saved(folder, "big_endian", endian)
    scalars = {"bool": True, "int": -7, "float": 0.1, "complex": 1 - 2j, "float16": np.float16(0.5), "int8": np.int8(3)}
    scalars["bfloat16"] = ml_dtypes.bfloat16(1.5)
    yield saved(folder, "scalars", scalars, expected={name: np.asarray(value) for name, value in scalars.items()})


def attributes(folder: Path) -> Iterator[Item]:
    """Attributes of checkpoints and of variables: everything that JSON can represent."""
    said: dict[str, Any] = {
        "none": None,
        "bool": True,
        "int": 1 << 70,
        "float": 0.1,
        "text": "été 層 \n",
        "list": [1, [2, {}]],
        "": {},
    }
    yield saved(folder, "of_all", {"w": ramp(2)}, attributes={**said, "inf": float("inf"), "dict": {"a": {"b": []}}})
    yield saved(folder, "of_one", {"w": ramp(2), "b": ramp(1)}, said={"w": said, "b": {"unit": "m"}})
    yield saved(folder, "of_both", {"w": ramp(2)}, attributes={"step": 3}, said={"w": {"step": 4}})
    yield saved(folder, "of_nothing", {})


def sharing(folder: Path) -> Iterator[Item]:
    """Ties, links, ``base=`` and overwriting: which variables share a file."""
    whole = ramp(4, 3)
    tied = {"embed": whole, "head": whole, "view": whole[:], "part": whole[1:], "turned": whole.T, "own": whole.copy()}
    yield saved(folder, "tied", tied)
    opened = vs.open(folder / "tied")
    yield saved(folder, "tied_linked", opened, expected=tied)
    yield saved(folder, "tied_half", {"a": opened["head"], "b": ramp(2)}, expected={"a": whole, "b": ramp(2)})
    first = {"w": ramp(3, 4), "b": ramp(4), "step": np.int64(1), "e": ramp(0)}
    first = {name: np.asarray(value) for name, value in first.items()}
    yield saved(folder, "first", first, attributes={"step": 1}, said={"w": {"unit": "m"}})
    second = {**first, "step": np.asarray(np.int64(2))}
    yield saved(folder, "second", second, base=folder / "first")
    third = {**second, "w": ramp(3, 4, first=1), "b": ramp(4, dtype="float64"), "new": ramp(2)}
    yield saved(folder, "third", third, base=folder / "second")
    renamed = vs.open(folder / "third").select(exclude="e", rename={"": "model/"})
    expected = {f"model/{name}": value for name, value in third.items() if name != "e"}
    yield saved(folder, "renamed", renamed, expected=expected)
    merged = {"a/b": vs.open(folder / "first")["b"], "w": vs.open(folder / "third")["w"], "c": ramp(1)}
    yield saved(folder, "merged", merged, expected={"a/b": first["b"], "w": third["w"], "c": ramp(1)})
    vs.save(folder / "overwritten", first)
    yield saved(folder, "overwritten", third, overwrite=True, base=folder / "overwritten", attributes={"step": 3})


def by_hand(folder: Path) -> Iterator[Item]:
    """Checkpoints without a manifest, whose folders are their names, and those that were changed by hand and sealed."""
    variables = {"a": ramp(3), "b/c": ramp(2, 2, dtype="bfloat16"), "d%": bits("int4", 5), "e": ramp(dtype="int64")}
    folders = {"a": variables["a"], "b/c": variables["b/c"], "d%25": variables["d%"], "e": variables["e"]}
    yield saved(folder, "no_manifest", variables, expected=folders, manifest=False)
    tied = {"a": ramp(3), "b": variables["a"], "c": variables["a"]}
    apart = {name: value.copy() for name, value in tied.items()}
    yield saved(folder, "no_manifest_tied", tied, expected=apart, manifest=False)
    yield saved(folder, "linked_to_no_manifest", vs.open(folder / "no_manifest"), expected=folders)
    yield saved(
        folder,
        "no_manifest_linked",
        vs.open(folder / "linked_to_no_manifest").select("a"),
        expected={"a": ramp(3)},
        manifest=False,
    )
    saved(folder, "sealed", variables, manifest=False)
    vs.seal(folder / "sealed")
    yield Item(path="sealed", variables=folders, attributes={}, said={})
    saved(folder, "sealed_again", variables, attributes={"step": 1}, said={"a": {"unit": "m"}})
    shutil.rmtree(folder / "sealed_again" / "e")
    shutil.copytree(folder / "sealed_again" / "b", folder / "sealed_again" / "copy")
    (folder / "sealed_again" / "d%25").rename(folder / "sealed_again" / "moved")
    vs.seal(folder / "sealed_again")
    changed = {
        "a": variables["a"],
        "b/c": variables["b/c"],
        "copy/c": variables["b/c"].copy(),
        "moved": variables["d%"],
    }
    yield Item(path="sealed_again", variables=changed)


def oneflow(folder: Path) -> Iterator[Item]:
    """What OneFlow's scripts save, including the variable of the step."""
    steps = {"System-Train-TrainStep-train_job": np.array([1000], np.int64), "conv1-weight": ramp(2, 1, 3, 3)}
    yield saved(folder, "step", {**steps, "conv1-weight-momentum": ramp(2, 1, 3, 3, first=5)}, manifest=False)
    with vs.Session(seed=3):
        vs.get_variable("dense1-weight", (4, 3), vs.float32)
        vs.get_variable("dense1-bias", (4,), vs.float32, vs.ones_initializer())
        vs.get_variable("half", (2, 2), vs.bfloat16, vs.constant_initializer(0.5))
        vs.get_variable("count", (), vs.int64, vs.zeros_initializer())
        vs.checkpoint.save(folder / "session")
        variables = {name: variable.numpy() for name, variable in vs.get_all_variables().items()}
    yield Item(path="session", variables=variables, attributes={}, said={})
    vs.checkpoint.save(folder / "var_dict", {"a": vs.checkpoint.get(folder / "session" / "half"), "b": ramp(2)})
    yield Item(path="var_dict", variables={"a": variables["half"], "b": ramp(2)}, attributes={}, said={})


def background(folder: Path) -> Iterator[Item]:
    """What `save_async` and `save_state_async` write."""
    whole = ramp(3, 3)
    variables = {"a": whole, "b": whole, "c": ramp(2, dtype="float16")}
    vs.save_async(folder / "variables", variables, attributes={"step": 1}).wait()
    yield Item(path="variables", variables=variables, attributes={"step": 1}, said={})
    state = {"model": variables, "epoch": 3}
    vs.save_state_async(folder / "state", state).wait()
    yield Item(path="state", state=state, attributes={}, said={})


def states(folder: Path) -> Iterator[Item]:
    """Nested state: every kind of node that a tree has."""
    whole = ramp(2, 3)
    numbers = [0, -1, (1 << 63) - 1, -(1 << 63), 1 << 63, -(1 << 200), 0.1, -0.0, 5e-324, 1e308]
    floats = [float("inf"), float("-inf"), float("nan"), struct.unpack(">d", bytes.fromhex("fff8000000000001"))[0]]
    texts = ["", "été 層 😀", "line\nbreak", "\ud800", "a\udfffb", "$", "x" * 300]
    yield saved_state(folder, "scalars", {"plain": [None, True, False], "numbers": numbers, "floats": floats})
    yield saved_state(folder, "texts", {"texts": texts, "bytes": [b"", b"\x00\xff", bytes(range(256))]})
    yield saved_state(folder, "complex", [1 - 2j, complex(float("nan"), -0.0), complex(float("inf"), 1e-300)])
    numpy_scalars = [bits(name, 2)[0] for name in (*NUMPY_TYPES, *WIDE_TYPES, *NARROW_TYPES)]
    yield saved_state(folder, "numpy_scalars", numpy_scalars)
    containers = {
        "list": [1, [2, []]], "tuple": (1, (2, ()), [3]), "set": {1, 2.5, (2, 3)}, "empty_set": set(),
        "frozenset": frozenset([b"x"]), "texts": {"a"}, "ordered": OrderedDict([("b", 1), ("a", 2)]), "dict": {},
        "counter": Counter(a=3, b=-1), "point": Point(1, Point(whole, None)), "nested": {"a": {"b": {"c": [{}]}}},
    }  # fmt: skip
    yield saved_state(folder, "containers", containers)
    keys = {0: 1, -1: 2, 1 << 70: 3, 0.5: 4, None: 5, "$": 6, b"\xff": 7, ("a", (1, None)): 8, 2 - 1j: 9, "": 10}
    yield saved_state(
        folder, "keys", {"plain": keys, "ordered": OrderedDict(keys), "arrays": {3: whole, "a/b": ramp(1)}}
    )
    yield saved_state(folder, "one_array", whole)
    yield saved_state(folder, "one_number", 7)
    yield saved_state(folder, "no_arrays", {"epoch": 3, "name": "run"}, attributes={"step": 3})
    clash = {"a/b": ramp(1), "a": {"b": ramp(2)}, "a ": {"": ramp(3), "\0": ramp(4), "x" * 300: ramp(5)}, ".": ramp(6)}
    yield saved_state(folder, "names_that_clash", clash)
    yield saved_state(folder, "tied", {"embed": whole, "head": [whole, whole.T], "again": (whole, whole.copy())})
    arrays = {name: bits(name, 2, 3) for name in ("bool", "bfloat16", "float8_e5m2", "int4", "complex64", "uint64")}
    yield saved_state(folder, "arrays", {**arrays, "scalar": ramp(dtype="float16"), "none": ramp(0, 2)})
    momentum = {0: {"momentum_buffer": ramp(2, 3), "step": 7}, 1: {"momentum_buffer": ramp(3), "step": 7}}
    training = {
        "model": OrderedDict([("fc.weight", whole), ("fc.bias", ramp(3))]),
        "optimizer": {"state": momentum, "param_groups": [{"lr": 0.1, "betas": (0.9, 0.999), "params": [0, 1]}]},
        "epoch": 3, "best": float("inf"), "rng": ("MT19937", ramp(6, dtype="uint32"), 624, 0, 0.0),
    }  # fmt: skip
    yield saved_state(folder, "training", training, attributes={"step": 1000})
    vs.save_state(folder / "training_2", {**training, "epoch": 4}, base=folder / "training")
    yield Item(path="training_2", state={**training, "epoch": 4}, attributes={}, said={})
    vs.save(folder / "copied", vs.open(folder / "training"))
    yield Item(path="copied", state=training, attributes={"step": 1000}, said={})
    yield saved_state(folder, "lightning.ckpt", {"state_dict": {"w": whole}, "global_step": 12, "loops": {}})


def manager(folder: Path) -> Iterator[Item]:
    """A run of a `CheckpointManager`, with deleted steps and removed parts."""
    seconds = count(1_700_000_000, 30)
    state: dict[str, Any] = {
        "model": {"w": ramp(3, 3)},
        "optimizer": {"m": ramp(2)},
        "frozen": ramp(5),
        "rows": [ramp(1)],
    }
    with vs.CheckpointManager(
        folder / "run",
        keep=vs.Latest(2) | vs.Best("loss") | vs.KeepEverySteps(40),
        keep_parts={"optimizer/*": vs.Latest(1)},
        clock=lambda: float(next(seconds)),
    ) as keeper:
        for step, loss in ((10, 0.9), (20, 0.25), (30, 0.5), (40, 0.75), (50, 0.5)):
            state["model"] = {"w": ramp(3, 3, first=step)}
            keeper.save(step, {**state, "step": step}, metrics={"loss": loss}, attributes={"note": f"at {step}"})
    yield Item(path="run", kind="run")
    for step in (20, 40, 50):
        kept = {**state, "model": {"w": ramp(3, 3, first=step)}, "step": step}
        optimizer = state["optimizer"] if step == 50 else {}
        yield Item(path=f"run/step-{step}", state={**kept, "optimizer": optimizer})


def model_checkpoint(folder: Path) -> Iterator[Item]:
    """Two runs of a `ModelCheckpoint` with one prefix."""
    seconds = count(1_700_000_000, 30)
    config = vs.CheckpointConfig(save_checkpoint_steps=2, keep_checkpoint_max=2)
    for prefix in ("net", "net_1"):
        callback = vs.ModelCheckpoint("net", folder, config, clock=lambda: float(next(seconds)))
        for step in range(1, 6):
            callback.step_end(1, step, {"fc.weight": ramp(2, 2, first=step), "fc.bias": ramp(2)})
        callback.end()
        for step in (4, 5):
            variables = {"fc.weight": ramp(2, 2, first=step), "fc.bias": ramp(2)}
            yield Item(path=f"{prefix}-1_{step}", variables=variables, said={})


def files(folder: Path) -> Iterator[Item]:
    """The files of other systems, written from arrays and from nested state."""
    folder.mkdir()
    whole = ramp(3, 4)
    common = {
        "fc.weight": whole,
        "fc.bias": ramp(4, dtype="float16"),
        "count": ramp(2, dtype="int64"),
        "flag": ramp(2) > 0,
    }
    common |= {"bytes": ramp(5, dtype="uint8"), "none": ramp(0, 2), "one": ramp(dtype="float64")}
    half = {**common, "half": ramp(3, dtype="bfloat16")}
    flat = {"x.safetensors": half, "x.pt": half, "x.npz": common, "x.pdparams": half, "x.mge": common, "x.ckpt": half}
    for name, arrays in {**flat, "x.of": common, "x.zarr": common}.items():
        vs.write(folder / name, arrays)
        yield Item(path=name, kind="file", variables=arrays, needs="zarr" if name == "x.zarr" else "")
    vs.write(folder / "zarr2.zarr", {"g/w": whole, "g/b": ramp(3)}, zarr_format=2)
    yield Item(path="zarr2.zarr", kind="file", variables={"g/w": whole, "g/b": ramp(3)}, needs="zarr")
    vs.write(folder / "x.npy", {"x": whole})
    yield Item(path="x.npy", kind="file")
    vs.write(folder / "sharded.safetensors.index.json", half, shard_bytes=40)
    yield Item(path="sharded.safetensors.index.json", kind="file", variables=half)
    state = {
        "model": OrderedDict([("w", whole), ("tied", whole)]), "epoch": 3, "name": "été", "rates": [0.1, None, True],
        "betas": (0.9, 0.999),
    }  # fmt: skip
    for name in ("state.pt", "state.of", "state.pdparams", "state.mge"):
        vs.write(folder / name, state)
        yield Item(path=name, kind="file", state=state)
    for model in ("mlp_inline.onnx", "mlp_external.onnx"):
        source = DATA / "formats" / "onnx" / model
        doubled = {name: np.asarray(values) * 2 for name, values in vs.read(source).items()}
        vs.write(folder / model, doubled, model=os.fspath(source))
        yield Item(path=model, kind="file", variables=doubled)


def converted(folder: Path) -> Iterator[Item]:
    """Conversions by `convert`, from a checkpoint to other systems' files and back."""
    folder.mkdir()
    whole = ramp(3, 4)
    arrays = {"fc/weight": whole, "fc/bias": ramp(4, dtype="float64"), "count": ramp(2, dtype="int64")}
    yield saved(folder, "source", arrays, attributes={"step": 1})
    for name in ("x.safetensors", "x.pt", "x.npz", "x.of", "x.pdparams", "x.mge", "x.ckpt", "x.zarr"):
        vs.convert(folder / "source", folder / name)
        yield Item(path=name, kind="file", variables=arrays, needs="zarr" if name == "x.zarr" else "")
    half = {
        name: value.astype(ml_dtypes.bfloat16) if value.dtype.kind == "f" else value for name, value in arrays.items()
    }
    vs.convert(folder / "source", folder / "half.safetensors", dtype="bfloat16")
    yield Item(path="half.safetensors", kind="file", variables=half)
    vs.convert(folder / "x.pt", folder / "from_torch", include="fc/*", rename={"fc": "dense"})
    yield Item(path="from_torch", variables={f"dense/{name}": arrays[f"fc/{name}"] for name in ("weight", "bias")})
    state = {"model": {"w": whole}, "epoch": 3, "name": "run", "rates": [0.1, None]}
    vs.write(folder / "state.pt", state)
    yield Item(path="state.pt", kind="file", state=state)
    vs.convert(folder / "state.pt", folder / "state")
    yield Item(path="state", state=state)
    vs.convert(folder / "state", folder / "copied")
    yield Item(path="copied", state=state)


def torch(folder: Path) -> Iterator[Item]:
    """Nested state with torch's tensors and parameters: tied, views of each other, with gradients."""
    t = importlib.import_module("torch")
    whole = t.arange(12.0).reshape(3, 4)
    dtypes = ("float32", "bfloat16", "float16", "int64", "bool", "complex64", "float8_e4m3fn", "uint16")
    arrays = {name: t.arange(4).to(getattr(t, name)) for name in dtypes}
    parameter = t.nn.Parameter(t.arange(6.0).reshape(2, 3))
    frozen = t.nn.Parameter(t.ones(2), requires_grad=False)
    items = {
        "tensors": {**arrays, "scalar": t.tensor(2.5), "none": t.empty(0, 3), "grad": t.ones(2, requires_grad=True)},
        "parameters": {"w": parameter, "tied": parameter, "frozen": frozen, "epoch": 3},
        "views": {"flat": whole, "row": whole[1], "column": whole[:, 2], "again": whole, "turned": whole.T},
        "mixed": {"tensor": whole.clone(), "array": ramp(2, 2), "list": [t.zeros(1), {"deep": t.ones(1)}]},
    }
    for name, state in items.items():
        vs.save_state(folder / name, state)
        yield Item(path=name, state=state, needs="torch")


def jax(folder: Path) -> Iterator[Item]:
    """Nested state with jax's arrays."""
    jnp = importlib.import_module("jax.numpy")
    arrays = {name: jnp.arange(4).astype(name) for name in ("float32", "bfloat16", "int32", "bool", "float8_e5m2")}
    vs.save_state(folder / "arrays", {"params": {**arrays, "scalar": jnp.float32(2.5)}, "numpy": ramp(2), "step": 3})
    state = {"params": {**arrays, "scalar": jnp.float32(2.5)}, "numpy": ramp(2), "step": 3}
    yield Item(path="arrays", state=state, needs="jax")


Group = Callable[[Path], Iterator[Item]]
GROUPS: dict[str, Group] = {
    group.__name__: group
    for group in (
        *(names, types, attributes, sharing, by_hand, oneflow, background, states, manager, model_checkpoint),
        *(files, converted, torch, jax),
    )
}


def make(folder: Path, groups: list[str]) -> dict[str, Any]:
    """Create these groups in a folder and return their content."""
    items: dict[str, Any] = {}
    with mock.patch("time.time_ns", return_value=TIME_NS):
        for group in groups:
            made = list(GROUPS[group](folder / group))
            items |= {f"{group}/{item.path}": item.truth(folder / group) for item in made}
    return {"items": items, "links": [list(names) for group in groups for names in _links(folder, group)]}


def _links(folder: Path, group: str) -> Iterator[list[str]]:
    """Yield the names of each file that has several."""
    found: dict[int, list[str]] = {}
    for path in sorted((folder / group).rglob("*")):
        if path.is_file():
            found.setdefault(path.stat().st_ino, []).append(path.relative_to(folder).as_posix())
    yield from (names for names in found.values() if len(names) > 1)


def main(folder: Path, groups: list[str]) -> int:
    groups = groups or [group for group in GROUPS if group not in APART]
    taken = [group for group in groups if (folder / group).exists()]
    if vs.__version__ != "0.1.0" or taken:
        print(
            f"this varstore is {vs.__version__}" if not taken else f"there already: {', '.join(taken)}", file=sys.stderr
        )
        return 1
    path = folder / "truth.json"
    truth = json.loads(path.read_text()) if path.exists() else {"items": {}, "links": []}
    made = make(folder, groups)
    path.write_text(_text({"items": {**truth["items"], **made["items"]}, "links": [*truth["links"], *made["links"]]}))
    return 0


def _text(truth: Mapping[str, Any]) -> str:
    """Return JSON with one line per item."""
    items = ",\n".join(f"  {json.dumps(name)}: {json.dumps(item)}" for name, item in truth["items"].items())
    links = ",\n".join(f"  {json.dumps(names)}" for names in truth["links"])
    return f'{{\n "items": {{\n{items}\n }},\n "links": [\n{links}\n ]\n}}\n'


if __name__ == "__main__":
    raise SystemExit(main(Path(sys.argv[1]), sys.argv[2:]))
