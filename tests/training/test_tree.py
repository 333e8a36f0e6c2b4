"""Nested state comes back exactly, types included, and what cannot is refused by its place."""

from __future__ import annotations

import enum
import importlib.util
import json
import struct
import tempfile
from collections import Counter, OrderedDict, defaultdict, namedtuple
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from hypothesis.extra import numpy as hnp

from varstore.disk.read.checkpoint import open_checkpoint
from varstore.errors import ManifestError, MissingDependency, UnsupportedDtype, UsageError
from varstore.inspection.verify import verify
from varstore.model.store import save
from varstore.training.state import load_state, save_state
from varstore.training.tree import flatten, prune, unflatten

Point = namedtuple("Point", ["x", "y"])


def same(a: Any, b: Any) -> bool:
    """Tell whether two states are one in every type, bit and order."""
    if isinstance(a, tuple) and hasattr(a, "_fields"):
        return (type(a).__name__, a._fields) == (type(b).__name__, getattr(b, "_fields", None)) and all(map(same, a, b))
    if type(a) is not type(b):
        return False
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, np.generic):
        return a.dtype == b.dtype and a.tobytes() == b.tobytes()
    if isinstance(a, float):
        return struct.pack("<d", a) == struct.pack("<d", b)
    if isinstance(a, complex):
        return same(a.real, b.real) and same(a.imag, b.imag)
    if isinstance(a, dict):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a.items(), b.items(), strict=True))
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


bits = st.integers(0, 2**64 - 1).map(lambda i: struct.unpack("<d", struct.pack("<Q", i))[0])
floats = st.floats(allow_nan=True) | bits
numbers = st.booleans() | st.integers() | st.integers(-(2**5000), 2**5000) | floats
texts = st.text() | st.sampled_from(
    ["$", "a/b", "a", "b", "0", "", "out", "\ud800", "\ud800\udc00", "\0", "x" * 300, "[*]"]
)
np_scalars = st.one_of(
    hnp.from_dtype(np.dtype("<f4")),
    hnp.from_dtype(np.dtype("<i8")),
    st.booleans().map(np.bool_),
    st.floats(width=16).map(ml_dtypes.bfloat16),
    st.floats(width=16).map(ml_dtypes.float8_e4m3fn),
    st.complex_numbers().map(np.complex128),
    st.integers(-8, 7).map(ml_dtypes.int4),
)
scalars = st.none() | numbers | st.builds(complex, floats, floats) | texts | st.binary() | np_scalars
arrays = hnp.arrays(
    st.sampled_from([np.dtype(c) for c in ("?", "<f4", "<f8", "<i2", "<u8", "<c8", "<f2")]),
    hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3),
)
keys = st.recursive(
    scalars.filter(lambda s: s == s), lambda inner: st.lists(inner, max_size=2).map(tuple), max_leaves=4
)


def containers(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    pairs = st.lists(st.tuples(keys | st.integers(0, 2) | texts, inner), max_size=4)
    return st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=3).map(tuple),
        pairs.map(dict),
        pairs.map(OrderedDict),
        st.tuples(inner, inner).map(lambda pair: Point(*pair)),
    )


states = st.recursive(scalars | arrays, containers, max_leaves=12)


@settings(max_examples=300, deadline=None)
@given(state=states)
def test_flattening_and_back_is_exact(state: Any) -> None:
    flat = flatten(state)
    back = unflatten(json.loads(flat.tree), lambda leaf: flat.variables[leaf.name], path="here")
    assert same(state, back)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(state=states)
def test_saving_and_loading_is_exact(state: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        saved = save_state(Path(folder, "c"), state, durable=False)
        assert same(state, load_state(Path(folder, "c")))
        assert verify(saved.path).ok


@settings(max_examples=100, deadline=None)
@given(state=states)
def test_the_same_state_gives_the_same_names_and_tree(state: Any) -> None:
    first, second = flatten(state), flatten(state)
    assert first.tree == second.tree
    assert list(first.variables) == list(second.variables)


EXACT = {
    "set": {1, "a", None},
    "frozenset": frozenset({b"x", (1, 2)}),
    "counter": Counter({3: 2, "a": -1}),
    "empty": [{}, [], (), set(), OrderedDict(), Counter(), "", b""],
    "true is not one": [True, 1, 1.0, np.int64(1), np.float64(1), np.bool_(True)],
    "keys": {1: "int", "1": "str", 1.5: "float", None: "none", (1, "a"): "tuple", b"1": "bytes", Point(1, 2): "point"},
    "a key of its own": {"$": "array", "name": "nowhere"},
    "payload": struct.unpack("<d", struct.pack("<Q", 0xFFF0DEADBEEF0001))[0],
    "signs": [-0.0, float("-inf"), complex(-0.0, float("nan"))],
    "huge": [10**5000, -(10**5000), 2**63, -(2**63), -(2**63) - 1, 2**63 - 1],
    "surrogates": ["\ud800", {"\udfff": 1}],
    "bfloat16": np.arange(4, dtype=ml_dtypes.bfloat16),
    "an array alone": np.float32([1, 2]),
}


@pytest.mark.parametrize("state", EXACT.values(), ids=EXACT.keys())
def test_exact(tmp_path: Path, state: Any) -> None:
    save_state(tmp_path / "c", state)
    assert same(state, load_state(tmp_path / "c"))


def test_a_key_order_is_kept(tmp_path: Path) -> None:
    state = {"b": 1, "a": np.float32([1]), 3: 2, "c": 3}
    save_state(tmp_path / "c", state)
    assert list(load_state(tmp_path / "c")) == ["b", "a", 3, "c"]


def test_variables_are_named_by_path_and_readable_one_by_one(tmp_path: Path) -> None:
    momentum = np.arange(6, dtype=np.float32).reshape(2, 3)
    state = {"optimizer": {"state": {0: {"momentum_buffer": momentum}}}, "rng": [momentum[0], Point(momentum[1], 2)]}
    save_state(tmp_path / "c", state)
    checkpoint = open_checkpoint(tmp_path / "c")
    assert checkpoint.names == ("optimizer/state/0/momentum_buffer", "rng/0", "rng/1/x")
    assert np.array_equal(checkpoint["optimizer/state/0/momentum_buffer"].numpy(), momentum)
    assert np.array_equal(checkpoint["rng/1/x"][1:], momentum[1][1:])


def test_names_that_collide_get_numbers_in_order() -> None:
    a = np.zeros(1)
    state = {"a/b": a, "a": {"b": a, "b~2": a}, 0: a, "0": a, "\0": a, "": a, "x" * 300: a, "out": a}
    assert list(flatten(state).variables) == [
        "a/b",
        "a/b~2",
        "a/b~2~2",
        "0",
        "0~2",
        "unnamed/5",
        "(array)",
        "unnamed/7",
        "out",
    ]


def test_arrays_that_are_one_are_one_again(tmp_path: Path) -> None:
    tied, other = np.arange(5.0), np.arange(5.0)
    save_state(tmp_path / "c", {"a": tied, "b": [tied], "c": other})
    back = load_state(tmp_path / "c")
    assert back["a"] is back["b"][0]
    assert back["c"] is not back["a"]
    assert (tmp_path / "c/a/out").stat().st_ino == (tmp_path / "c/b/0/out").stat().st_ino


def test_named_tuples_come_back_as_such(tmp_path: Path) -> None:
    save_state(tmp_path / "c", Point(1, np.float32(2)))
    back = load_state(tmp_path / "c")
    assert (back.x, back.y) == (1, 2)
    assert back == Point(1, 2)
    assert repr(back) == repr(Point(1, np.float32(2)))


def test_variables_of_a_checkpoint_are_linked(tmp_path: Path) -> None:
    save(tmp_path / "a", {"w": np.arange(9.0)})
    save_state(tmp_path / "b", {"model": dict(open_checkpoint(tmp_path / "a")), "epoch": 3})
    assert (tmp_path / "a/w/out").stat().st_ino == (tmp_path / "b/model/w/out").stat().st_ino
    assert load_state(tmp_path / "b")["epoch"] == 3


def test_plain_variables_are_a_dict(tmp_path: Path) -> None:
    save(tmp_path / "a", {"w": np.arange(9.0)})
    assert same(load_state(tmp_path / "a"), {"w": np.arange(9.0)})


def test_copying_a_checkpoint_keeps_its_tree(tmp_path: Path) -> None:
    checkpoint = save_state(tmp_path / "a", {"w": np.arange(3.0), "epoch": 3}, attributes={"by": "me"})
    save(tmp_path / "b", checkpoint)
    assert same(load_state(tmp_path / "b"), {"w": np.arange(3.0), "epoch": 3})
    assert open_checkpoint(tmp_path / "b").attributes == {"by": "me"}


def _itself() -> Any:
    state: Any = {"a": []}
    state["a"].append(state)
    return state


def _deep() -> Any:
    state: Any = 0
    for _ in range(200):
        state = [state]
    return state


class Colour(enum.IntEnum):
    RED = 1


Sched = namedtuple("Sched", ["lr_lambda"])

REFUSED = {
    "a function": ({"sched": Sched(lambda epoch: 1)}, r"state\['sched'\]\.lr_lambda: function"),
    "an object": ({"a": [1, object()]}, r"state\['a'\]\[1\]: object"),
    "a class": ([int], r"state\[0\]: type"),
    "an enum": ({"c": Colour.RED}, r"state\['c'\]: Colour"),
    "a factory": ({"d": defaultdict(list)}, r"state\['d'\]: defaultdict"),
    "a subclass": ({1: type("D", (dict,), {})()}, r"state\[1\]: D"),
    "itself": (_itself(), r"state\['a'\]\[0\]: contains itself"),
    "too deep": (_deep(), "nested deeper than 100"),
    "an object as key": ({object: 1}, r"state\.keys\(\)\[<class 'object'>\]: type"),
    "an array in a set's place": ({frozenset([Sched(print)]): 1}, r"lr_lambda: builtin_function_or_method"),
    "text": (np.str_("a"), "state: text"),
    "a date": ([np.datetime64(0, "s")], r"state\[0\]: dates"),
    "a masked array": ([np.ma.masked_array([1.0], [True])], r"state\[0\]: MaskedArray"),
}


@pytest.mark.parametrize(("state", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_refused_by_place_before_the_first_byte(tmp_path: Path, state: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        save_state(tmp_path / "c", state)
    assert list(tmp_path.iterdir()) == []


def test_what_has_a_state_dict_is_told_to_give_it() -> None:
    class Module:
        def state_dict(self) -> dict[str, int]:
            return {}

    with pytest.raises(UsageError, match=r"state\['model'\]: Module cannot be saved as data. Save its state_dict\(\)"):
        flatten({"model": Module()})


def test_an_array_without_a_type_on_disk_is_refused_by_its_path(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedDtype, match=r"'a/0'.*Python objects"):
        save_state(tmp_path / "c", {"a": [np.array([None])]})
    assert list(tmp_path.iterdir()) == []


def test_state_needs_the_manifest(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="manifest=False"):
        save_state(tmp_path / "c", {"a": 1}, manifest=False)
    assert list(tmp_path.iterdir()) == []


def test_a_state_twice_in_one_place_is_not_nested_in_itself() -> None:
    shared = [np.zeros(1)]
    assert list(flatten({"a": shared, "b": shared}).variables) == ["a/0", "b/0"]


BROKEN = {
    "no JSON": "{",
    "a missing variable": '{"$":"array","name":"nowhere"}',
    "a name that is none": '{"$":"array","name":3}',
    "an unknown kind": '{"$":"code","items":[]}',
    "no items": '{"$":"tuple"}',
    "code for a name": '{"$":"namedtuple","type":"a; import os","fields":["x"],"items":[1]}',
    "code for a field": '{"$":"namedtuple","type":"A","fields":["x=print(1)"],"items":[1]}',
    "too few fields": '{"$":"namedtuple","type":"A","fields":["x"],"items":[]}',
    "half a float": '{"$":"float","hex":"00"}',
    "a key that is a list": '{"$":"dict","items":[[[],1]]}',
    "a scalar of no type": '{"$":"scalar","type":"object","hex":"00"}',
    "a long number": '{"a":' + "1" * 5000 + "}",
    "depth": "[" * 100_000 + "]" * 100_000,
    "depth of ours": '{"$":"tuple","items":[' * 900 + "]}" * 900,
}


@pytest.mark.parametrize("text", BROKEN.values(), ids=BROKEN.keys())
def test_a_tree_that_is_wrong_is_an_error_of_the_manifest(tmp_path: Path, text: str) -> None:
    def save_and_load() -> None:
        save(tmp_path / "c", {"w": np.zeros(2)}, tree=text)  # opens it, too: what is no JSON shows here
        load_state(tmp_path / "c")

    with pytest.raises(ManifestError, match=str(tmp_path / "c")):
        save_and_load()


def test_pruning_leaves_the_rest_of_the_state(tmp_path: Path) -> None:
    a = np.zeros(2)
    flat = flatten({"w": a, "opt": {0: {"m": a, "step": 3}, "l": [a, 1]}, "o": OrderedDict(m=a, w=a)})
    tree = prune(json.loads(flat.tree), lambda name: name.startswith("opt") or name == "o/m")
    back = unflatten(tree, lambda leaf: leaf.name, path="here")
    assert back == {"w": "w", "opt": {0: {"step": 3}, "l": [None, 1]}, "o": OrderedDict(w="o/w")}


@pytest.mark.parametrize("kind", ["torch.Tensor", "torch.nn.Parameter", "jax.Array"])
def test_arrays_of_a_framework_that_is_not_installed(tmp_path: Path, kind: str) -> None:
    if importlib.util.find_spec(kind.partition(".")[0]) is not None:
        pytest.skip("it is installed")
    tree = {"w": {"$": "array", "name": "w", "type": kind}, "epoch": 3}
    save(tmp_path / "c", {"w": np.ones(2)}, tree=json.dumps(tree))
    with pytest.raises(MissingDependency, match="pip install"):
        load_state(tmp_path / "c")
