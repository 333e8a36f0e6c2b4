"""The face: a short list that says the truth, and the parameters that DESIGN promises."""

from __future__ import annotations

import builtins
import inspect
import json
import types

import pytest
from support import face

import varstore as vs
from varstore import errors

pytestmark = pytest.mark.core

SIGNATURES = {
    "save": "path, variables, *, attributes=None, base=None, overwrite=False, durable=True, manifest=True, "
    "threads=None, progress=None",
    "open": "path, *, allow_incomplete=False",
    "load": "path, *, include=None, exclude=None, rename=None, mmap=False, verify=True, threads=None, progress=None",
    "load_into": "targets, source, *, include=None, exclude=None, rename=None, on_mismatch='error', cast=False, "
    "verify=True, threads=None, progress=None",
    "verify": "path, *, progress=None",
    "seal": "path",
    "diff": "a, b, *, values=False",
    "clean": "directory",
    "merge": "target, sources, *, include=None, exclude=None, rename=None, last_wins=False, average=False, "
    "weights=None, verify=False",
    "salvage": "source, target",
    "history": "run, name",
    "stats": "source, *, include=None, exclude=None",
    "get_variable": "name, shape=None, dtype=None, initializer=None, regularizer=None, trainable=None, "
    "model_name=None, random_seed=None",
    "get_all_variables": "",
    "load_variables": "value_dict, ignore_mismatch=True",
    "checkpoint.save": "path, var_dict=None",
    "checkpoint.get": "path",
    "Session": "",
    "save_state": "path, state",
    "load_state": "path, *, map_location=None",
    "save_async": "path, variables",
    "CheckpointManager": "directory",
    "read": "path, format=None",
    "write": "path, variables_or_state, format=None",
    "convert": "source, target",
}

MEMBERS = {
    "Checkpoint": "path attributes nbytes names tree select keys values items get __getitem__ __iter__ __len__ "
    "__enter__ __exit__ _repr_html_",
    "Variable": "name shape dtype nbytes attributes path numpy __getitem__ __array__ __len__",
    "VerifyReport": "ok problems",
    "DiffReport": "ok equal added removed changed unchanged moved as_json __bool__ __str__ _repr_html_",
    "Movement": "count changed largest norm relative cosine share as_json",
    "SalvageReport": "ok saved lost as_json __bool__ __str__ _repr_html_",
    "StatsReport": "ok as_json keys values items __getitem__ __len__ __bool__ __str__ _repr_html_",
    "Statistics": "ok as_json count zeros nan inf min max mean std norm quantiles quantile_error __bool__ _repr_html_",
    "LoadReport": "loaded kept unused mismatched cast raise_for",
}

PUBLIC = {*vs.__all__, *face.BEYOND_STAR}

ONEFLOW_NAMES = {
    *(
        "float32",
        "float",
        "double",
        "float64",
        "float16",
        "bfloat16",
        "bool",
        "char",
        "int8",
        "int32",
        "int64",
        "uint8",
    ),
    *("constant_initializer", "zeros_initializer", "ones_initializer", "random_uniform_initializer"),
    *("random_normal_initializer", "truncated_normal_initializer", "glorot_uniform_initializer"),
    *("glorot_normal_initializer", "xavier_uniform_initializer", "xavier_normal_initializer", "kaiming_initializer"),
    *("variance_scaling_initializer", "get_variable", "get_all_variables", "load_variables", "checkpoint", "Session"),
}


def of_the_face(name):
    found = vs
    for part in name.split("."):
        found = getattr(found, part)
    return found


def positional(parameters):
    return [name for name, parameter in parameters.items() if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]


def is_inner(name):
    value = getattr(vs, name)
    is_folder = isinstance(value, types.ModuleType) and name not in ("errors", "checkpoint")
    return name.startswith("_") or is_folder or name == "annotations"


def test_all_is_sorted_and_without_repeats():
    assert vs.__all__ == sorted(set(vs.__all__))


def test_a_star_import_replaces_nothing_of_pythons():
    assert not {name for name in vs.__all__ if hasattr(builtins, name)}


def test_all_is_exactly_what_is_public():
    assert {name for name in dir(vs) if not is_inner(name)} | {"__version__"} == PUBLIC


def test_a_star_import_gives_the_face():
    names: dict[str, object] = {}
    exec("from varstore import *", names)
    assert set(names) - {"__builtins__"} == set(vs.__all__)


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_every_public_thing_is_explained(name):
    value = getattr(vs, name)
    if inspect.isclass(value) or inspect.isroutine(value):
        assert inspect.getdoc(value)


@pytest.mark.parametrize(
    "name",
    list(SIGNATURES),
)
def test_the_promised_parameters_are_there(name):
    promised = inspect.signature(eval(f"lambda {SIGNATURES[name]}: None")).parameters
    actual = inspect.signature(of_the_face(name)).parameters
    assert positional(actual) == positional(promised)
    for parameter in promised.values():
        assert actual[parameter.name].kind is parameter.kind
        assert actual[parameter.name].default == parameter.default
    for parameter in actual.values():
        optional = parameter.default is not parameter.empty or parameter.kind is parameter.VAR_KEYWORD
        assert optional or parameter.name in promised


@pytest.mark.parametrize("name", MEMBERS)
def test_the_promised_members_are_there(name):
    owner = getattr(vs, name)
    members = set(dir(owner)) | set(getattr(owner, "__dataclass_fields__", ()))
    assert set(MEMBERS[name].split()) <= members


def test_oneflows_names_are_there():
    assert not ONEFLOW_NAMES - PUBLIC


def test_every_error_is_one_of_ours_and_a_built_in():
    tree = [getattr(errors, name) for name in errors.__all__]
    assert all(issubclass(error, vs.VarstoreError) for error in tree)
    bases = (ValueError, FileNotFoundError, FileExistsError, KeyError, OSError, ImportError)
    assert all(issubclass(error, bases) for error in tree if error is not vs.VarstoreError)
    drawn = errors.__doc__ or ""
    assert all(error.__name__ in drawn for error in tree)


# --- the table of facts in tests/data/face.json, which face.py makes


def test_the_face_is_as_it_was_recorded(tmp_path):
    changes = face.differences(json.loads(face.RECORDED.read_text()), face.facts(tmp_path))
    advice = f"What is gone or changed breaks programs. If all of this is meant, record it: {face.WRITE}"
    assert not changes, "\n".join(["the face has changed", *changes, advice])


def agreed(path, values, *, durable=True):
    """Stand for a function of the face."""


class Agreed(ValueError):
    """Stands for a class of the face."""

    def __init__(self, path="."):
        self.path = path

    def read(self, name):
        """Stand for a method."""


def renamed(path, arrays, *, durable=True):
    """`agreed` with a parameter of another name."""


def swapped(values, path, *, durable=True):
    """`agreed` with its parameters in another order."""


def extended(path, values, *, durable=True, links=True):
    """`agreed` with one more parameter."""


def other_default(path, values, *, durable=False):
    """`agreed` with another default."""


class OtherBase(Exception):
    """`Agreed` that is no ValueError any more, and has lost its method."""

    def __init__(self, path="."):
        self.path = path


@pytest.mark.parametrize(
    ("earlier", "later", "expected"),
    [
        (agreed, agreed, []),
        (
            agreed,
            renamed,
            ["gone: f(values), which was 'positional 2: unknown'", "new: f(arrays), which is 'positional 2: unknown'"],
        ),
        (
            agreed,
            swapped,
            [
                "changed: f(path), from 'positional 1: unknown' to 'positional 2: unknown'",
                "changed: f(values), from 'positional 2: unknown' to 'positional 1: unknown'",
            ],
        ),
        (agreed, extended, ["new: f(links), which is 'keyword: unknown = True'"]),
        (
            agreed,
            other_default,
            ["changed: f(durable), from 'keyword: unknown = True' to 'keyword: unknown = False'"],
        ),
        (Agreed, Agreed, []),
        (
            Agreed,
            OtherBase,
            [
                "gone: f.read, which was 'method'",
                "gone: f.read(), which was '-> unknown'",
                "gone: f.read(name), which was 'positional 1: unknown'",
                "changed: f, from 'class < ValueError < Exception < BaseException' to "
                "'class < Exception < BaseException'",
            ],
        ),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_each_change_of_the_face_is_told_in_a_line(earlier, later, expected):
    recorded, present = face.facts_of("f", earlier), face.facts_of("f", later)
    assert face.differences(recorded, present) == expected
