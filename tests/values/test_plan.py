"""What may be saved, what is one in memory, and what is refused before a byte is written."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, strategies as st
from support import all_dtypes, arrays, assert_same, names

import varstore as vs
from varstore.errors import InvalidName, UnsupportedDtype, UsageError
from varstore.layout.names import folder_of
from varstore.values.arrays import as_source
from varstore.values.lazy import LazyArray
from varstore.values.plan import plan_save

pytestmark = pytest.mark.core


class ArrayLike:
    """Values of some other library, which numpy can have by ``__array__``."""

    def __init__(self, values, dtype=None):
        self._values = np.asarray(values)
        self.shape = self._values.shape
        self.dtype = self._values.dtype if dtype is None else dtype
        self.fetched = 0

    def __array__(self, dtype=None, copy=None):
        self.fetched += 1
        return self._values


class Labelled(np.ndarray):
    """An array with something beside its values."""


class NamedType:
    """A framework's own data type: known by its name only."""

    def __init__(self, name):
        self.name = name


def source(value):
    return as_source(value, variable="v")


def planned(value):
    (variable,) = plan_save({"v": value}).variables
    return variable


# --- the plan ----------------------------------------------------------------------------------------------------


@given(st.dictionaries(names, arrays(), max_size=5))
def test_the_plan_says_what_numpy_says(variables):
    plan = plan_save(variables)
    assert [variable.name for variable in plan.variables] == list(variables)
    for variable, values in zip(plan.variables, variables.values(), strict=True):
        assert variable.folder == folder_of(variable.name)
        assert variable.meta.shape == values.shape
        assert variable.meta.data_type.dtype == values.dtype.newbyteorder("<")
        assert variable.nbytes == values.nbytes
    folders = [variable.folder.split("/") for variable in plan.variables]
    parents = {"/".join(parts[:depth]) for parts in folders for depth in range(1, len(parts))}
    assert set(plan.parents) == parents
    assert len(plan.parents) == len(parents)
    for position, parent in enumerate(plan.parents):  # outermost first: each one's own parent stands before it
        above = parent.rpartition("/")[0]
        assert not above or above in plan.parents[:position]


def test_attributes_reach_the_entries_and_the_plan():
    plan = plan_save({"a": 1, "b": 2}, attributes={"step": 3}, variable_attributes={"b": {"unit": "m"}})
    assert plan.attributes == {"step": 3}
    assert [variable.entry(b"").attributes for variable in plan.variables] == [{}, {"unit": "m"}]


def test_an_empty_mapping_is_a_plan():
    assert plan_save({}).variables == ()
    assert plan_save({}).nbytes == 0


# --- ties --------------------------------------------------------------------------------------------------------

BASE = np.arange(12.0)
BYTES = bytes(32)
OWNER = np.ones((2, 3))
SQUARE = np.arange(9.0).reshape(3, 3)
LATE = ArrayLike([1.0, 2.0])
SCALAR = np.float32(1)
TIES = {
    "the same array": (BASE, BASE, True),
    "the same view": (BASE[2:6], BASE[2:6], True),
    "the whole as a view": (BASE, BASE[:], True),
    "a view and then the whole": (BASE[:], BASE, True),
    "two views of the whole": (BASE[:], BASE[:], True),
    "two arrays on one buffer": (np.frombuffer(BYTES), np.frombuffer(BYTES), True),
    "two places in one buffer": (np.frombuffer(BYTES, count=2), np.frombuffer(BYTES, count=2, offset=16), False),
    "a memoryview of the whole": (SQUARE, np.asarray(memoryview(SQUARE)), True),
    "an owner and a memoryview of it": (OWNER, np.asarray(memoryview(OWNER)), True),
    "a subclass's view": (BASE, BASE.view(np.recarray), True),
    "the same strided view": (BASE[::2], BASE[::2], True),
    "the same array-like": (LATE, LATE, True),
    "a copy": (BASE, BASE.copy(), False),
    "a transposed view": (SQUARE, SQUARE.T, False),
    "a transposed view of one row": (SQUARE[:1], SQUARE[:1].T, False),
    "another shape of the same memory": (BASE, BASE.reshape(3, 4), False),
    "another type of the same memory": (BASE, BASE.view(np.int64), False),
    "another byte order of the same memory": (BASE, BASE.view(">f8"), False),
    "overlapping views": (BASE[:6], BASE[3:9], False),
    "a shorter view": (BASE, BASE[:11], False),
    "a reversed view": (BASE, BASE[::-1], False),
    "two array-likes of the same values": (LATE, ArrayLike(np.asarray(LATE)), False),
    "two scalars": (1.0, 1.0, False),
    "one numpy scalar twice": (SCALAR, SCALAR, False),
    "an empty array": (BASE[:0], BASE[:0], False),
}


@pytest.mark.parametrize("case", TIES)
def test_only_the_same_memory_is_a_tie(case):
    first, second, tied = TIES[case]
    plan = plan_save({"a": first, "between": np.zeros(2), "b": second})
    a, between, b = plan.variables
    assert (a.alias_of, between.alias_of, b.alias_of) == ("", "", "a" if tied else "")
    assert b.is_linked is tied
    assert plan.nbytes == a.nbytes + between.nbytes + (0 if tied else b.nbytes)
    assert b.entry(b"").alias_of == b.alias_of


def test_all_ties_lead_to_the_first():
    plan = plan_save(dict.fromkeys("abc", BASE))
    assert [variable.alias_of for variable in plan.variables] == ["", "a", "a"]


def test_a_variable_of_a_checkpoint_is_linked_and_ties_stay(tmp_path):
    saved = vs.save(tmp_path / "a", {"x": BASE, "y": BASE, "z": BASE.copy()})
    plan = plan_save({"one": saved["y"], "two": saved["x"], "three": saved["z"]})
    assert [variable.alias_of for variable in plan.variables] == ["", "one", ""]
    assert all(variable.is_linked for variable in plan.variables)
    assert plan.nbytes == 0


def test_a_variable_of_a_checkpoint_keeps_its_attributes_unless_others_are_given(tmp_path):
    saved = vs.save(tmp_path / "a", {"x": BASE, "y": SQUARE}, variable_attributes={"x": {"unit": "m"}, "y": {"k": 1}})
    plan = plan_save({"moved": saved["x"], "y": saved["y"]}, variable_attributes={"y": {}})
    assert [dict(variable.attributes) for variable in plan.variables] == [{"unit": "m"}, {}]


# --- values ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "dtype"),
    [
        (True, "bool"),
        (3, "int64"),
        (-(1 << 63), "int64"),
        ((1 << 63) - 1, "int64"),
        ((1 << 64) - 1, "uint64"),
        (0.5, "float64"),
        (1 + 2j, "complex128"),
        (np.float16(0.5), "float16"),
        (np.bool_(True), "bool"),
        (ml_dtypes.bfloat16(0.5), "bfloat16"),
        (ml_dtypes.int4(-8), "int4"),
    ],
)
def test_a_scalar_is_a_0_d_variable(value, dtype):
    variable = planned(value)
    assert variable.meta.shape == ()
    assert variable.meta.data_type.dtype == np.dtype(dtype)
    assert variable.source[()] == value


@given(arrays())
def test_an_array_of_any_layout_is_taken_as_it_is(values):
    assert source(values) is values


def test_a_subclass_is_taken_as_the_plain_array_of_the_same_memory(tmp_path):
    np.arange(4.0).tofile(tmp_path / "raw")
    for values in (np.memmap(tmp_path / "raw", float, "r"), np.zeros((2, 2)).T.view(Labelled)):
        found = source(values)
        assert type(found) is np.ndarray
        assert np.shares_memory(found, values)
        assert_same(found, np.array(values))


def test_an_array_like_is_fetched_late_and_once():
    value = ArrayLike([[1.0, 2.0]])
    found = source(value)
    assert isinstance(found, LazyArray)
    assert (found.shape, found.dtype, found.nbytes, value.fetched) == ((1, 2), np.dtype(float), 16, 0)
    assert_same(found.numpy(), np.array([[1.0, 2.0]]))
    assert value.fetched == 1


@pytest.mark.parametrize("dtype", all_dtypes, ids=str)
@pytest.mark.parametrize("spelling", ["{}", "lib.{}", "{}_"])
def test_a_framework_names_its_type_as_numpy_does(dtype, spelling):
    value = ArrayLike(np.zeros(2, dtype), NamedType(spelling.format(dtype.name)))
    assert source(value).dtype == dtype


REFUSED_VALUES = {
    "huge integer": (1 << 64, UnsupportedDtype, "does not fit 64 bits: found 18446744073709551616. Keep it in attr"),
    "huge negative integer": (-(1 << 63) - 1, UnsupportedDtype, "the integer does not fit 64 bits"),
    "masked array": (np.ma.array([1, 2]), UsageError, r"a masked array would lose its mask. Save \.filled\(\)"),
    "masked constant": (np.ma.masked, UsageError, "a masked array would lose its mask"),
    "list": ([1.0, 2.0], UsageError, "not an array, .*: found list. Make it an array with numpy.asarray"),
    "tuple": ((1.0,), UsageError, "not an array, a scalar or a variable of a checkpoint: found tuple"),
    "dict": ({"w": BASE}, UsageError, "found dict. Use save_state"),
    "text": ("text", UsageError, "not an array, a scalar or a variable of a checkpoint: found str"),
    "bytes": (b"text", UsageError, "found bytes"),
    "None": (None, UsageError, "found NoneType"),
    "object": (object(), UsageError, "found object"),
    "class": (ArrayLike, UsageError, "found type"),
    "objects": (np.array([None]), UnsupportedDtype, "Python objects cannot be saved: found dtype object"),
    "strings": (np.array(["a"]), UnsupportedDtype, "text cannot be saved: found dtype <U1"),
    "numpy string": (np.str_("a"), UnsupportedDtype, "text cannot be saved"),
    "dates": (np.array(["2020-01-01"], "M8[D]"), UnsupportedDtype, "dates cannot be saved"),
    "records": (np.zeros(2, [("x", "f4")]), UnsupportedDtype, "structured or void values cannot be saved"),
    "recarray": (np.zeros(2, [("x", "f4")]).view(np.recarray), UnsupportedDtype, "structured or void values"),
    "long doubles": (np.zeros(2, np.longdouble), UnsupportedDtype, "long doubles cannot be saved"),
    "array-like objects": (ArrayLike([None]), UnsupportedDtype, "Python objects cannot be saved"),
    "unknown type": (ArrayLike([1], NamedType("float9")), UnsupportedDtype, "type has no place on disk: found .*"),
    "type named like a function": (ArrayLike([1], NamedType("array")), UnsupportedDtype, "has no place on disk"),
    "type named object": (ArrayLike([1], NamedType("object")), UnsupportedDtype, "has no place on disk"),
}


@pytest.mark.parametrize("case", REFUSED_VALUES)
def test_a_value_that_cannot_be_saved_is_refused_by_name(case):
    value, kind, message = REFUSED_VALUES[case]
    with pytest.raises(kind, match=f"variable 'bad/one': .*{message}") as caught:
        plan_save({"good": BASE, "bad/one": value})
    assert caught.value.variable == "bad/one"


@pytest.mark.parametrize(
    "variables", [[BASE], (("a", BASE),), BASE, None, "text", {"a"}], ids=lambda v: type(v).__name__
)
def test_variables_must_be_a_mapping(variables):
    with pytest.raises(
        UsageError,
        match=r"must be a mapping of names to arrays: found \w+\. Pass a dict, or save nested state with save_state",
    ):
        plan_save(variables)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attributes": {"a": BASE}}, "attributes\\['a'\\]: must be JSON: found ndarray"),
        ({"attributes": {1: 2}}, "attributes: must be JSON: found the key 1, which is not a string"),
        ({"attributes": {"a": "\ud800"}}, "attributes.*: must be JSON: found .*surrogate"),
        ({"attributes": [1]}, "attributes must be a mapping of strings to JSON values: found list"),
        ({"variable_attributes": {"a": {"x": {1, 2}}}}, "variable 'a': attributes.*: must be JSON: found set"),
        ({"variable_attributes": {"a": "text"}}, "variable 'a': attributes must be a mapping .*: found str"),
        ({"variable_attributes": {"b": {}}}, r"variable_attributes has names that are not in variables: found \['b'\]"),
    ],
)
def test_attributes_that_are_not_json_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        plan_save({"a": BASE}, **options)


@pytest.mark.parametrize("name", ["", "a\0b", 3, None, "x" * 300, "\ud800"])
def test_a_bad_name_is_refused(name):
    with pytest.raises(InvalidName):
        plan_save({name: BASE})
