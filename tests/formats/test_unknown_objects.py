"""Objects of classes that varstore does not know: inert records, beside which the arrays of the file open."""

from __future__ import annotations

import argparse
import copy
import datetime
import enum
import pathlib
import pickle
import zoneinfo
from collections import deque
from typing import Any

import numpy as np
import pytest
from support import run_python
from support.crafted import pickled, torch_file

import varstore as vs
from varstore.errors import FormatError, UnsafeContent, UsageError, VarstoreError
from varstore.formats.binary.budget import Budget
from varstore.formats.pickles import code
from varstore.formats.pickles.machine import Machine
from varstore.formats.pickles.tree import plain_tree
from varstore.values.nodes import leaves
from varstore.values.opaque import Opaque, without_opaque

W = np.arange(6, dtype=np.float32).reshape(2, 3)


class Color(enum.Enum):
    """A member of it is made by a call."""

    RED = 1


class Attributes(dict[str, Any]):
    """A dict with a class of its own."""


class History(list[float]):
    """A list with a class of its own, and a state."""


class Wide:
    """An object that is made with keywords."""

    def __new__(cls, *, width: int) -> Wide:
        return super().__new__(cls)

    def __getnewargs_ex__(self) -> Any:
        return (), {"width": 3}


def written(path: Any, state: Any, protocol: int = 4) -> Any:
    path.write_bytes(pickle.dumps(state, protocol))
    return path


def record(value: Any, tmp_path: Any, protocol: int = 4) -> Opaque:
    """Return the record of an object that lies beside an array."""
    path = written(tmp_path / "a.mge", {"model": {"w": W}, "it": value}, protocol)
    opened = vs.read(path)
    np.testing.assert_array_equal(opened["model/w"], W)
    with pytest.raises(VarstoreError):
        vs.read(path, unknown="error")
    found: Opaque = opened.state()["it"]
    assert type(found) is Opaque
    return found


@pytest.mark.parametrize("protocol", range(6))
def test_what_scripts_put_beside_a_model(tmp_path, protocol):
    found = record(argparse.Namespace(lr=0.1, path=pathlib.PurePosixPath("/a/b"), w=W), tmp_path, protocol)
    assert (found.module, found.name, found.items) == ("argparse", "Namespace", None)
    assert found.state["lr"] == 0.1
    assert found.state["path"].name == "PurePosixPath"
    np.testing.assert_array_equal(found.state["w"], W)


def test_each_way_of_making_an_object(tmp_path):
    when = datetime.datetime(2020, 1, 2)
    assert record(when, tmp_path).arguments == (when.__reduce__()[1][0],)
    assert record(Color.RED, tmp_path).arguments == (1,)
    assert record(deque([1, 2], 5), tmp_path).content == (((), 5), None, None, [1, 2])
    assert record(Attributes(a=1, b=(2,)), tmp_path).items == {"a": 1, "b": (2,)}
    history = History([0.5])
    history.best = 1  # type: ignore[attr-defined]
    assert record(history, tmp_path).content == ((), None, {"best": 1}, [0.5])
    assert record(Wide(width=3), tmp_path).keywords == {"width": 3}
    assert record(Color, tmp_path).content == (None,) * 4
    assert record(np.random.default_rng(1), tmp_path).name == "__generator_ctor"


@pytest.mark.parametrize(
    ("value", "module", "name"),
    [
        ({Color.RED: 1, "a": 2}, "builtins", "dict"),
        ({(Color.RED, 1): W}, "builtins", "dict"),
        ({Color.RED, 5}, "builtins", "set"),
        (frozenset({(1, Color.RED)}), "builtins", "frozenset"),
        (np.array([Color.RED, None], object), "numpy", "ndarray"),
        (np.array(["2020-01-01"], "M8[D]"), "numpy", "ndarray"),
        (np.zeros(2, [("a", "f4"), ("b", "i8")]), "numpy", "ndarray"),
        (np.dtype("f4"), "numpy", "dtype"),
    ],
)
def test_an_object_is_no_key_member_or_element(tmp_path, value, module, name):
    found = record(value, tmp_path)
    assert (found.module, found.name) == (module, name)


def test_a_record_can_do_nothing(tmp_path):
    found = record(argparse.Namespace(a=1), tmp_path)
    for name in ("call", "getattr", "getattribute", "getitem", "iter", "array", "index", "fspath", "len", "contains"):
        assert f"__{name}__" not in vars(Opaque)
    assert Opaque.__eq__ is object.__eq__
    for act in (callable, iter, hash, len, int, float, np.asarray):
        if act is callable:
            assert not callable(found)
        elif act is np.asarray:
            assert act(found).dtype == object
        else:
            with pytest.raises(TypeError):
                act(found)
    assert found != record(argparse.Namespace(a=1), tmp_path)


def test_a_record_is_copied_and_pickled_as_a_record(tmp_path):
    found = record(argparse.Namespace(a=1, w=W), tmp_path)
    for other in (copy.copy(found), copy.deepcopy(found), pickle.loads(pickle.dumps(found))):
        assert type(other) is Opaque
        assert (other.module, other.name, other.state["a"]) == ("argparse", "Namespace", 1)
        np.testing.assert_array_equal(other.state["w"], W)


def test_its_text_is_one_line(tmp_path):
    name = b"B\nad\x1b[31m" + b"x" * 200
    path = pickled(tmp_path / "a.mge", b"X\3\0\0\0foo" + b"X" + len(name).to_bytes(4, "little") + name + b"\x93)R")
    shown = repr(vs.read(path).state())
    assert shown.isprintable()
    assert len(shown) < 220


def test_what_contains_itself_or_is_deep(tmp_path):
    args = argparse.Namespace(lr=1)
    args.me, args.list = args, [args]
    args.list.append(args.list)
    deep = argparse.Namespace(end=W)
    for _ in range(200):
        deep = argparse.Namespace(inner=deep)
    opened = vs.read(written(tmp_path / "a.mge", {"args": args, "deep": deep, "w": W}))
    state = opened.state()["args"].state
    assert (state["me"].name, state["me"].state) == ("Namespace", None)
    assert [item.name for item in state["list"]] == ["Namespace", "list"]
    assert list(opened) == ["w"]
    with pytest.raises(FormatError, match="itself"):
        vs.read(pickled(tmp_path / "b.mge", b"]q\0h\0a"))


def test_labels_that_are_objects_do_not_hide_a_tensor(tmp_path):
    """An object that is in a list a hundred thousand times takes two bytes for each."""
    opened = vs.read(written(tmp_path / "a.mge", {"w": W, "labels": [Color.RED] * 100_000}))
    assert list(opened) == ["w"]
    assert len(opened.state()["labels"]) == 100_000
    assert opened.unknown == ((__name__, "Color", 1),)


def test_arrays_of_a_record_count_against_the_limit(tmp_path):
    view = b"ctorch._utils\n_rebuild_tensor_v2\n((X\7\0\0\0storagectorch\nByteStorage\nX\1\0\0\x000X\3\0\0\0cpuK\1tQK\0"
    view += b"J\0\0\0\x40\x85K\0\x85\x89ccollections\nOrderedDict\n)RtR"
    path = torch_file(tmp_path / "a.pt", b"cfoo\nBar\n)\x81}X\1\0\0\0w" + view + b"sb", storage=b"\0")
    with pytest.raises(UnsafeContent, match="out of proportion"):
        vs.read(path)


def test_records_are_paid_for(tmp_path):
    path = pickled(tmp_path / "a.mge", b"cfoo\nBar\nq\0](" + b"h\0)\x81" * 1_000_000 + b"e")
    with pytest.raises(UnsafeContent, match="out of proportion"):
        vs.read(path)


def test_records_are_left_out_and_named(tmp_path, caplog):
    state = {"w": W, "args": argparse.Namespace(a=1), "list": [1, Color.RED], "epoch": 3}
    opened = vs.read(written(tmp_path / "a.mge", state))
    assert {f"{module}.{name}": count for module, name, count in opened.unknown} == {
        "argparse.Namespace": 1,
        f"{__name__}.Color": 1,
    }
    names = ("args", "list/1")
    for value in (opened, opened.state()):
        done = vs.write(tmp_path / "b.pt", value)
        assert (done.format, done.left_out) == ("torch", names)
        back = vs.read(tmp_path / "b.pt", unknown="error")
        assert list(back.state()) == ["w", "list", "epoch"]
        assert back.state()["list"] == [1, None]
    assert vs.write(tmp_path / "b.safetensors", opened).left_out == names
    saved = vs.save_state(tmp_path / "c", opened.state())
    assert saved.left_out == names
    assert "list/1" in caplog.text
    assert vs.load_state(tmp_path / "c")["list"] == [1, None]
    for target in ("d.pt", "d", "d.mge"):
        done = vs.convert(tmp_path / "a.mge", tmp_path / target)
        assert (done.left_out, done.unknown) == (names, opened.unknown)
        assert b"Namespace" not in b"".join(p.read_bytes() for p in tmp_path.glob(f"{target}*") if p.is_file())
    assert vs.convert(tmp_path / "a.mge", tmp_path / "d.npz").left_out == (*names, "list/0", "epoch")


def test_a_file_of_nothing_else_is_not_written(tmp_path):
    opened = vs.read(written(tmp_path / "a.mge", argparse.Namespace(a=1)))
    with pytest.raises(UsageError, match="nothing to write"):
        vs.write(tmp_path / "b.pt", opened)
    with pytest.raises(UsageError, match="nothing to write"):
        vs.convert(tmp_path / "a.mge", tmp_path / "b.pt")


def test_a_state_without_records_is_the_same_object():
    state = {"a": [1, (2,)], "b": {}}
    state["b"] = state
    assert without_opaque(state) == (state, ()) or without_opaque(state)[0] is state


@pytest.mark.parametrize("format", ["safetensors", "npz", "onnx"])
def test_formats_without_pickles_take_the_option(tmp_path, format):
    path = tmp_path / f"a.{'npz' if format == 'onnx' else format}"
    vs.write(path, {"w": W})
    assert list(vs.read(path, unknown="error")) == ["w"]
    with pytest.raises(UsageError, match="unknown"):
        vs.read(path, unknown="ignore")


def test_a_model_in_a_folder(tmp_path):
    (tmp_path / "model").mkdir()
    torch_file(tmp_path / "model" / "pytorch_model.bin", b"}(X\1\0\0\0acfoo\nBar\n)RX\1\0\0\0bK\1u")
    assert vs.read(tmp_path / "model").unknown == (("foo", "Bar", 1),)
    with pytest.raises(UnsafeContent, match=r"foo\.Bar"):
        vs.read(tmp_path / "model", unknown="error")


def test_handles_that_travel_know_the_names(tmp_path):
    opened = vs.read(written(tmp_path / "a.mge", {"w": W, "args": argparse.Namespace()}))
    again = pickle.loads(pickle.dumps(opened))
    assert again.unknown == opened.unknown == (("argparse", "Namespace", 1),)


@pytest.mark.parametrize(
    ("module", "name"),
    [
        *(("builtins", name) for name in ("eval", "exec", "compile", "__import__", "getattr", "open", "map")),
        *((module, "x") for module in ("os", "posix", "nt", "subprocess", "sys", "runpy", "marshal", "pickle")),
        *(("operator", name) for name in ("attrgetter", "methodcaller", "itemgetter")),
        *(("types", name) for name in ("CodeType", "FunctionType", "LambdaType", "MethodType", "ModuleType")),
        *(("functools", "partial"), ("importlib.util", "find_spec"), ("ctypes", "CDLL"), ("__builtin__", "execfile")),
        *(("foo", "Bar.__init__.__globals__"), ("foo", "os.system"), ("numpy.testing._private.utils", "runstring")),
        *(("torch.hub", "load"), ("torch", "load"), ("torch.serialization", "load"), ("copy_reg", "add_extension")),
    ],
)
@pytest.mark.parametrize("form", ["named", "called", "created", "in arguments", "dropped"])
def test_names_that_run_code_refuse_the_file_in_every_mode(tmp_path, module, name, form):
    text = b"".join(b"X" + len(part).to_bytes(4, "little") + part for part in (module.encode(), name.encode()))
    named = text + b"\x93"
    body = {
        "named": b"]" + named + b"a",
        "called": named + b")R",
        "created": named + b")\x81",
        "in arguments": b"cfoo\nBar\n" + named + b"\x85R",
        "dropped": named + b"0N",
    }[form]
    path = torch_file(tmp_path / "a.pt", body)
    for unknown in ("error", "opaque"):
        with pytest.raises(UnsafeContent, match="would"):
            vs.read(path, unknown=unknown)


@pytest.mark.parametrize(
    "body",
    [
        b"cfoo\nBar\n)R)R",
        b"cfoo\nBar\n}b",
        b"cfoo\nBar\nX\1\0\0\0aNs",
        b"cfoo\nBar\n)RX\1\0\0\0aNsNa",
        b"cfoo\nBar\n)R(N\x90",
        b"]cfoo\nBar\n)R\x81",
    ],
)
def test_an_object_is_not_called_or_changed_in_other_ways(tmp_path, body):
    with pytest.raises(FormatError):
        vs.read(torch_file(tmp_path / "a.pt", body))


@pytest.mark.parametrize(
    "body",
    [
        b"\x8c\3fooq\0\x8c\3Barq\1(" + b"h\0h\1\x93" * 200_000 + b"t",
        b"cfoo\nBar\n)\x81q\0(" + b"h\0" * 200_000 + b"lb",
    ],
    ids=["names", "mentions"],
)
def test_names_and_mentions_of_objects_are_paid_for(body):
    machine = Machine(body + b".", path="a", table={}, budget=Budget("a", 0), unknown="opaque")
    with pytest.raises(UnsafeContent, match="out of proportion"):
        plain_tree(machine.run(), machine, lambda _value: NotImplemented)


def test_long_names_are_not_kept():
    before = code._runs_code.cache_info().misses
    assert code.runs_code("os" + ".path" * 100, "a")
    assert not code.runs_code("foo", "b" * 300)
    assert code._runs_code.cache_info().misses == before


def test_no_module_of_the_file_is_imported(tmp_path):
    """Neither by its name, nor to set a state, although it could be found."""
    code = """
import os, pickle, sys
os.chdir(sys.argv[1])
class Evil:
    def __setstate__(self, state): open("canary", "w")
    def __reduce_ex__(self, protocol): return (Evil, (), {"lr": 1})
module = type(sys)("evil_module"); module.Evil = Evil; Evil.__module__ = "evil_module"; Evil.__qualname__ = "Evil"
sys.modules["evil_module"] = module
open("a.mge", "wb").write(pickle.dumps({"args": Evil()}))
open("evil_module.py", "w").write('''
open("canary", "w")
class Evil:
    def __setstate__(self, state): open("canary", "w")
''')
"""
    run_python(code, tmp_path)
    reading = """
import os, sys
os.chdir(sys.argv[1])
sys.path.insert(0, ".")
import varstore as vs
before = set(sys.modules)
vs.read("a.mge").state()
before, seen = set(sys.modules), []
sys.addaudithook(lambda event, given: seen.append((event, given[0])) if event in ("open", "import", "exec") else None)
opened = vs.read("a.mge")
assert opened.state()["args"].state == {"lr": 1}
assert set(sys.modules) == before
assert seen and {os.path.basename(given) for _, given in seen} == {"a.mge"}, seen
"""
    run_python(reading, tmp_path)
    assert not (tmp_path / "canary").exists()
    believing = "import os, pickle, sys; os.chdir(sys.argv[1]); sys.path[0] = '.'; pickle.load(open('a.mge', 'rb'))"
    run_python(believing, tmp_path)
    assert (tmp_path / "canary").exists()


def test_leaves_do_not_lead_into_a_record(tmp_path):
    opened = vs.read(written(tmp_path / "a.mge", {"args": argparse.Namespace(w=W)}))
    assert [name for name, _ in leaves(opened.tree)] == ["args"]
    assert len(opened) == 0


class Signal(np.ndarray):
    """An array with a class of its own."""


class Outer:
    """A class with another in it."""

    class Inner:
        """That one."""


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.filterwarnings("ignore")
def test_arrays_of_numpys_own_classes_are_arrays_and_others_are_records(tmp_path, protocol):
    state = {
        "matrix": np.matrix([[1.0, 2.0]]),
        "recarray": np.arange(3).view(np.recarray),
        "chararray": np.char.array([b"a", b"bc"]),
        "records": np.rec.array([(1, 2.0)], dtype=[("a", int), ("b", float)]),
        "signal": np.ones(100).view(Signal),
    }
    opened = vs.read(written(tmp_path / "a.mge", state, protocol))
    assert {name: np.asarray(array).tolist() for name, array in opened.items()} == {
        name: state[name].tolist() for name in ("matrix", "recarray", "chararray")
    }
    inert = opened.state()
    assert {repr(inert[name]) for name in ("records", "signal")} == {
        "<Opaque numpy.ndarray>",
        f"<Opaque {__name__}.Signal>",
    }
    assert inert["signal"].state[1] == (100,)
    with pytest.raises(UnsafeContent, match="Signal"):
        vs.read(written(tmp_path / "a.mge", {"signal": state["signal"]}, protocol), unknown="error")


def test_a_slice_of_anything_opens(tmp_path):
    state = {"a": slice(0.5, None), "b": slice("x", np.int64(2), 3), "c": slice((1, 2), [None])}
    opened = vs.read(written(tmp_path / "a.mge", state)).state()
    assert (opened["a"], opened["b"]) == (state["a"], state["b"])
    assert (repr(opened["c"]), opened["c"].arguments) == ("<Opaque builtins.slice>", ((1, 2), [None], None))


def test_a_slice_is_left_out_where_nothing_can_hold_it(tmp_path):
    path = written(tmp_path / "a.mge", {"w": W, "cut": [slice(1, 2), 3]})
    done = vs.convert(path, tmp_path / "a.pt")
    assert (done.left_out, done.reasons["cut/0"]) == (("cut/0",), "no format holds a slice")
    assert vs.read(tmp_path / "a.pt").state()["cut"] == [None, 3]
    assert vs.write(tmp_path / "b.pt", vs.read(path)).left_out == ("cut/0",)
    with pytest.raises(UsageError, match="slice"):
        vs.write(tmp_path / "c.pt", {"w": W, "cut": slice(1, 2)})
    with pytest.raises(UsageError, match="Leave it out: it is an object of a class"):
        vs.save(tmp_path / "c", {"a": Opaque(module="a", name="B")})


def test_a_class_within_a_class_is_refused_with_a_way_out(tmp_path):
    for unknown in ("error", "opaque"):
        with pytest.raises(UnsafeContent, match=r"a class or a method that is within a class.*pickle protocol 4"):
            vs.read(written(tmp_path / "a.mge", {"w": W, "a": Outer.Inner()}, 2), unknown=unknown)
    opened = vs.read(written(tmp_path / "a.mge", {"w": W, "a": Outer.Inner()}, 4))
    assert opened.unknown == ((__name__, "Outer.Inner", 1),)
    zone = datetime.datetime(2026, 1, 1, tzinfo=zoneinfo.ZoneInfo("UTC"))
    with pytest.raises(UnsafeContent, match="to get a method of a class") as caught:
        vs.read(written(tmp_path / "a.mge", {"w": W, "a": zone}))
    assert "protocol" not in str(caught.value)


def test_an_encoding_is_offered_only_where_it_can_be_chosen(tmp_path):
    body = b"\x80\2}U\1aU\1\xe9s."
    for path, offered in (
        (pickled(tmp_path / "a.mge", body), False),
        (torch_file(tmp_path / "a.pt", body[2:-1]), True),
    ):
        with pytest.raises(FormatError, match="is not text in utf-8") as caught:
            vs.read(path)
        assert ("encoding='latin-1'" in str(caught.value)) is offered
