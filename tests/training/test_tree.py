"""Nested state comes back exactly, types included, and what cannot is refused by its place."""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import enum
import importlib.util
import json
import pathlib
import struct
import tempfile
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from hypothesis.extra import numpy as hnp

import varstore
from varstore.disk.read.checkpoint import open_checkpoint
from varstore.errors import ManifestError, MissingDependency, UnsupportedDtype, UsageError
from varstore.inspection.verify import verify
from varstore.model.store import save
from varstore.training.state import load_state, save_state
from varstore.training.tree import flatten, prune, unflatten
from varstore.values.opaque import Opaque

Point = namedtuple("Point", ["x", "y"])


def same(a: Any, b: Any) -> bool:
    """Tell whether two states are one in every type, bit and order."""
    if isinstance(a, tuple) and hasattr(a, "_fields"):
        return (type(a).__name__, a._fields) == (type(b).__name__, getattr(b, "_fields", None)) and all(map(same, a, b))
    if type(a) is not type(b):
        return False
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, np.str_):
        return str(a) == str(b)  # of an empty one, numpy makes the length 0 or 1
    if isinstance(a, np.generic):
        return a.dtype == b.dtype and a.tobytes() == b.tobytes()
    if isinstance(a, float):
        return struct.pack("<d", a) == struct.pack("<d", b)
    if isinstance(a, complex):
        return same(a.real, b.real) and same(a.imag, b.imag)
    if isinstance(a, SimpleNamespace):
        return same(vars(a), vars(b))
    if isinstance(a, deque):
        return a.maxlen == b.maxlen and same(list(a), list(b))
    if isinstance(a, defaultdict) and a.default_factory is not b.default_factory:
        return False
    if isinstance(a, datetime.datetime | datetime.time):
        return (a.isoformat(), a.fold) == (b.isoformat(), b.fold)
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
offsets = st.timedeltas(datetime.timedelta(hours=-23), datetime.timedelta(hours=23)).map(datetime.timezone)
paths = st.lists(st.sampled_from(["a", "..", "b.c", "\udcff", "x y", "/"]), max_size=3)
training = st.one_of(
    paths.map(lambda parts: Path(*parts)),
    paths.map(lambda parts: pathlib.PureWindowsPath(*parts)),
    st.datetimes(timezones=st.none() | offsets).map(lambda moment: moment.replace(fold=moment.second % 2)),
    st.dates(),
    st.times(),
    st.timedeltas(),
    st.text().map(np.str_),
)
scalars = (
    st.none()
    | training
    | st.binary().map(bytearray)
    | numbers
    | st.builds(complex, floats, floats)
    | texts
    | st.binary()
    | np_scalars
)
arrays = hnp.arrays(
    st.sampled_from([np.dtype(c) for c in ("?", "<f4", "<f8", "<i2", "<u8", "<c8", "<f2")]),
    hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3),
)
keys = st.recursive(
    scalars.filter(lambda s: s == s and type(s) is not bytearray),
    lambda inner: st.lists(inner, max_size=2).map(tuple),
    max_leaves=4,
)


def namespace_of(items: dict[str, Any]) -> SimpleNamespace:
    namespace = SimpleNamespace()
    vars(namespace).update(items)
    return namespace


def containers(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    pairs = st.lists(st.tuples(keys | st.integers(0, 2) | texts, inner), max_size=4)
    return st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=3).map(tuple),
        pairs.map(dict),
        pairs.map(OrderedDict),
        st.tuples(inner, inner).map(lambda pair: Point(*pair)),
        st.tuples(st.lists(inner, max_size=3), st.none() | st.integers(3, 5)).map(lambda given: deque(*given)),
        st.tuples(st.sampled_from([None, list, int]), pairs).map(lambda given: defaultdict(*given)),
        st.dictionaries(texts, inner, max_size=3).map(namespace_of),
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


class Kind(enum.Enum):
    A = "a"
    B = ("b", 2)


class Zone(datetime.tzinfo):
    """Code that says what time it is."""

    def utcoffset(self, _: Any) -> datetime.timedelta:
        return datetime.timedelta(0)


def never(*_: Any) -> Any:
    raise AssertionError("code of a class was run")


@dataclasses.dataclass
class Config:
    lr: Any
    layers: Any = ()

    __post_init__ = __setstate__ = __setattr__ = never

    @property
    def twice(self) -> Any:
        return never()

    twice = twice.setter(never)


@dataclasses.dataclass(frozen=True, slots=True)
class Frozen:
    lr: Any
    w: Any = None


class Settings(OrderedDict):  # type: ignore[type-arg]
    __init__ = __setitem__ = never


def made(cls: Any, **attributes: Any) -> Any:
    """Return an object of a class that refuses to run."""
    thing = object.__new__(cls)
    thing.__dict__.update(attributes)
    return thing


def settings_of(**items: Any) -> Settings:
    held: Settings = OrderedDict.__new__(Settings)
    for key, item in items.items():
        OrderedDict.__setitem__(held, key, item)
    return held


Sched = namedtuple("Sched", ["lr_lambda"])

REFUSED = {
    "a function": ({"sched": Sched(lambda epoch: 1)}, r"state\['sched'\]\.lr_lambda: function"),
    "an object": ({"a": [1, object()]}, r"state\['a'\]\[1\]: object"),
    "a class": ([int], r"state\[0\]: type"),
    "an enum as key": ({Colour.RED: 1}, r"state\.keys\(\)\[.*\]: Colour"),
    "a factory": ({"d": defaultdict(lambda: 1)}, r"state\['d'\]: a defaultdict whose factory is code"),
    "a subclass": ({1: type("D", (list,), {})()}, r"state\[1\]: D"),
    "a record that holds code": ({"c": made(Config, lr=print)}, r"state\['c'\]\.lr: builtin_function"),
    "a record in a set": ({Frozen(1)}, r"Frozen cannot be saved"),
    "a zone of the system": (datetime.datetime(2026, 1, 2, tzinfo=Zone()), r"state: datetime .*timezone\.utc"),
    "itself": (_itself(), r"state\['a'\]\[0\]: contains itself"),
    "too deep": (_deep(), "nested deeper than 100"),
    "an object as key": ({object: 1}, r"state\.keys\(\)\[<class 'object'>\]: type"),
    "an array in a set's place": ({frozenset([Sched(print)]): 1}, r"lr_lambda: builtin_function_or_method"),
    "a date": ([np.datetime64(0, "s")], r"state\[0\]: dates"),
    "a masked array": ([np.ma.masked_array([1.0], [True])], r"state\[0\]: MaskedArray"),
}


@pytest.mark.parametrize(("state", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_refused_by_place_before_the_first_byte(tmp_path: Path, state: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        save_state(tmp_path / "c", state)
    assert list(tmp_path.iterdir()) == []


RECORDS = {
    "dataclass": (made(Config, lr=0.1, layers=[np.ones(2), Kind.A]), "Config", Config),
    "slots": (Frozen(0.1, np.ones(2)), "Frozen", Frozen),
    "namespace": (argparse.Namespace(lr=0.1, w=np.ones(2)), "Namespace", argparse.Namespace),
    "a dict": (settings_of(a=1, w=np.ones(2)), "Settings", Settings),
    "enum": (Kind.B, "Kind", Kind),
    "numbers": (Colour.RED, "Colour", Colour),
}


def contents(value: Any) -> Any:
    """Return what an object holds."""
    if isinstance(value, enum.Enum):
        return {"name": value.name, "value": value.value}
    if isinstance(value, dict):
        return dict(value)
    slots = getattr(type(value), "__slots__", ())
    return {name: getattr(value, name) for name in slots} if slots else dict(vars(value))


@pytest.mark.parametrize(("value", "name", "cls"), RECORDS.values(), ids=RECORDS)
def test_records_come_back_as_data_or_as_their_class_without_a_call(
    tmp_path: Path, value: Any, name: str, cls: type
) -> None:
    save_state(tmp_path / "c", {"it": [value]})
    [plain] = load_state(tmp_path / "c")["it"]
    assert type(plain) is (dict if isinstance(value, dict) else SimpleNamespace)
    tag = f"{cls.__module__}.{cls.__qualname__}"
    [back] = load_state(tmp_path / "c", types={tag: cls, f"{__name__}.Kind": Kind})["it"]
    assert type(back) is cls
    assert cls.__name__ == name
    assert repr(contents(back)) == repr(contents(value))
    if not isinstance(value, Config):
        assert repr(contents(plain)) == repr(contents(value))
    [again] = load_state(tmp_path / "c", types={"other.Config": cls})["it"]
    assert type(again) is type(plain)


@pytest.mark.parametrize(
    ("value", "cls", "why"),
    [
        (Kind.A, Colour, "does not have a member 'A'"),
        (Kind.A, Config, "does not have a member"),
        (argparse.Namespace(more=1), Frozen, "a place for 'more'"),
        (argparse.Namespace(more=1), int, "not safe"),
        (settings_of(a=1), Config, "not a dict"),
    ],
)
def test_a_class_that_does_not_fit_its_record_is_an_error(tmp_path: Path, value: Any, cls: type, why: str) -> None:
    save_state(tmp_path / "c", value)
    tag = f"{type(value).__module__}.{type(value).__qualname__}"
    with pytest.raises(UsageError, match=f"types: {tag}.*{why}"):
        load_state(tmp_path / "c", types={tag: cls})


class Access(enum.Flag):
    """What may be combined, and refuses what it does not know."""

    READ = 1
    WRITE = 2
    RUN = 4

    @classmethod
    def _missing_(cls, value: object) -> Any:
        raise AssertionError("nothing of the class is called")


class Mode(enum.IntFlag):
    """What may be combined with any number."""

    A = 1
    B = 2


class Counts(defaultdict[str, int]):
    """A defaultdict with a class of its own."""


def test_members_of_a_flag_come_back_together(tmp_path: Path) -> None:
    both = enum.Flag._missing_.__func__(Access, 3)  # type: ignore[attr-defined]
    state = [both, Access.READ, Mode.A | Mode.B, Mode.A | 8, Mode(0)]
    save_state(tmp_path / "c", state)
    types = {f"{__name__}.{cls.__qualname__}": cls for cls in (Access, Mode)}
    back = load_state(tmp_path / "c", types=types)
    assert [(type(one), one._value_) for one in back] == [(type(one), one._value_) for one in state]
    assert back[0] is both

    class Access2(enum.Flag):
        """Another numbering, in which one of them is missing."""

        READ = 4
        RUN = 1

    for one, name in ((both, r"READ\|WRITE"), (Access.WRITE, "WRITE")):
        save_state(tmp_path / name, one)
        with pytest.raises(UsageError, match=f"does not have a member '{name}'"):
            load_state(tmp_path / name, types={f"{__name__}.Access": Access2})


def test_a_defaultdict_with_a_class_keeps_its_factory(tmp_path: Path) -> None:
    state = [Counts(int, a=1), Counts(None, b=2), Counts(lambda: 3, c=3)]
    checkpoint = save_state(tmp_path / "c", state)
    assert checkpoint.left_out == ("2/default_factory",)
    plain = load_state(tmp_path / "c")
    assert (plain, {type(one) for one in plain}) == ([{"a": 1}, {"b": 2}, {"c": 3}], {dict})
    back = load_state(tmp_path / "c", types={f"{__name__}.Counts": Counts})
    assert [(type(one), one.default_factory) for one in back] == [(Counts, int), (Counts, None), (Counts, None)]
    assert back == state
    assert back[0]["new"] == 0
    save(tmp_path / "d", {}, tree='{"$":"mapping","type":"a.B","factory":"eval","items":[]}')
    with pytest.raises(ManifestError):
        load_state(tmp_path / "d")


@pytest.mark.parametrize("types", [3, [Config], {"a": 3}, {"a": "Config"}])
def test_types_are_classes_by_name(tmp_path: Path, types: Any) -> None:
    save_state(tmp_path / "c", 3)
    with pytest.raises(UsageError, match="types: not classes by name"):
        load_state(tmp_path / "c", types=types)


@pytest.mark.parametrize("count", [1023, 1024, 3000])
@pytest.mark.parametrize("value", [0.1, float("nan"), 3, -(2**63), True, 2**70])
def test_a_long_list_of_numbers_is_an_array_on_disk_and_a_list_again(tmp_path: Path, value: Any, count: int) -> None:
    checkpoint = save_state(tmp_path / "c", {"losses": [value] * count, "mixed": [1, 1.0] * 2000})
    assert list(checkpoint) == (["losses"] if count >= 1024 and value != 2**70 else [])
    back = load_state(tmp_path / "c")
    assert same(back, {"losses": [value] * count, "mixed": [1, 1.0] * 2000})
    assert same(load_state(tmp_path / "c", framework="numpy"), back)


def test_a_long_list_costs_little(tmp_path: Path) -> None:
    losses = [float(number) for number in range(1_000_000)]
    flat = flatten({"losses": losses})
    assert len(flat.tree) < 100
    assert flat.variables["losses"].nbytes == 8_000_000


def test_parts_of_containers_and_records_are_chosen_by_name(tmp_path: Path) -> None:
    state = {"args": argparse.Namespace(lr=0.1, w=np.ones(2), b=np.zeros(2)), "last": deque([1, np.ones(2), 3], 4)}
    save_state(tmp_path / "c", state)
    part = load_state(tmp_path / "c", include=["args/lr", "args/w", "last/1"])
    assert repr(part) == repr(
        {"args": SimpleNamespace(lr=0.1, w=np.ones(2)), "last": deque([None, np.ones(2), None], 4)}
    )


def test_objects_of_unknown_classes_are_left_out_of_any_container(tmp_path: Path, caplog: Any) -> None:
    unknown = Opaque(module="gone", name="Thing")
    state = {"a": deque([1, unknown]), "b": SimpleNamespace(x=unknown, y=2), "c": [unknown]}
    checkpoint = save_state(tmp_path / "c", state)
    assert sorted(checkpoint.left_out) == ["a/1", "b/x", "c/0"]
    assert "a/1" in caplog.text
    assert same(load_state(tmp_path / "c"), {"a": deque([1, None]), "b": SimpleNamespace(x=None, y=2), "c": [None]})


def test_attributes_that_are_not_fields_are_named(tmp_path: Path, caplog: Any) -> None:
    @dataclasses.dataclass
    class Meter:
        total: float = 1.0

        @cached_property
        def half(self) -> float:
            return self.total / 2

    class Config(dict):  # type: ignore[type-arg]
        pass

    meter, config = Meter(), Config(lr=0.1)
    meter.window = np.ones(3)  # type: ignore[attr-defined]
    assert meter.half == 0.5
    config.source = "a.yaml"  # type: ignore[attr-defined]
    checkpoint = save_state(tmp_path / "c", {"meter": meter, "config": config})
    assert sorted(checkpoint.left_out) == ["config/source", "meter/window"]
    assert "meter/window" in caplog.text


def test_a_state_of_a_later_release_is_refused_by_its_kind(tmp_path: Path) -> None:
    save(tmp_path / "c", {"w": np.zeros(2)}, tree='{"a":{"$":"quaternion","items":[1]}}')
    with pytest.raises(ManifestError, match="'quaternion', which this release of varstore does not know"):
        load_state(tmp_path / "c")


@pytest.mark.parametrize("kind", [dict, OrderedDict, defaultdict])
def test_deep_states_with_other_keys_can_be_loaded(tmp_path: Path, kind: Any) -> None:
    state: Any = kind()
    for _ in range(99):
        state = kind(None, {1: state}) if kind is defaultdict else kind({1: state})
    save_state(tmp_path / "c", state)
    assert load_state(tmp_path / "c") == state


def test_hints_lead_from_a_module_to_a_checkpoint(tmp_path: Path) -> None:
    class Module:
        def state_dict(self) -> dict[str, Any]:
            return {"w": np.ones(2)}

    net = Module()
    for function, value in ((varstore.save, net), (save_state, net), (save, {"net": net}), (save_state, {"net": net})):
        with pytest.raises(UsageError) as caught:
            function(tmp_path / "c", value)  # type: ignore[operator]
        assert "state_dict()" in str(caught.value)
    save(tmp_path / "a", net.state_dict())
    save_state(tmp_path / "b", {"net": net.state_dict()})
    with pytest.raises(UsageError, match="Use save_state, which saves nested state"):
        save(tmp_path / "c", {"net": net.state_dict()})


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
    "a path of two texts": '{"$":"Path","items":["a","b"]}',
    "a path of numbers": '{"$":"Path","items":[1]}',
    "a moment that is none": '{"$":"datetime","items":["yesterday",0,null]}',
    "a zone that is none": '{"$":"time","items":["03:04",0,"UTC"]}',
    "too long a deque": '{"$":"deque","maxlen":1,"items":[1,2]}',
    "a factory that is code": '{"$":"defaultdict","factory":"eval","items":[]}',
    "a record with keys": '{"$":"record","type":"A","items":[[1,2]]}',
    "a record of no name": '{"$":"record","type":["A"],"items":[]}',
    "a list that is not an array": '{"$":"list","name":"gone"}',
    "a mapping of nothing": '{"$":"mapping","type":"A","items":[1]}',
    "half an enum": '{"$":"enum","type":"A","items":["x"]}',
    "a record as key": '{"$":"dict","items":[[{"$":"record","type":"A","items":[]},1]]}',
    "a list as key": '{"$":"set","items":[{"$":"list","name":"w"}]}',
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
