"""The variable interface: declared at once, filled when used, loaded all or not at all."""

import asyncio
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import tracemalloc
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, strategies as st

import varstore as flow
from varstore.errors import (
    CheckpointNotFound,
    DigestMismatch,
    IncompleteCheckpoint,
    InvalidName,
    SizeMismatch,
    UnsupportedDtype,
    UsageError,
    VariableMismatch,
    VariableNotFound,
)
from varstore.interfaces.oneflow import initializers as init
from varstore.interfaces.oneflow.session import SessionVariable, current_session

pytestmark = pytest.mark.core

DATA = Path(__file__).resolve().parents[1] / "data" / "oneflow"


@pytest.fixture(autouse=True)
def _own_session():
    flow.clear_default_session()
    yield
    flow.clear_default_session()


def forbidden(shape, dtype, rng):
    raise AssertionError("this initializer must not run")


def declare_mlp(**options):
    return [
        flow.get_variable("dense1-weight", (4, 3), **options),
        flow.get_variable("dense1-bias", (3,), **options),
        flow.get_variable("dense2-weight", (3, 2), **options),
    ]


class Unread:
    """An array that refuses to be read."""

    def __init__(self, shape, dtype="float32"):
        self.shape = shape
        self.dtype = np.dtype(dtype)

    def __array__(self, dtype=None, copy=None):
        raise AssertionError("read before everything was compared")


class TestDeclaration:
    def test_a_variable_and_its_defaults(self):
        variable = flow.get_variable("w", (2, 3))
        assert (variable.name, variable.shape, variable.dtype) == ("w", (2, 3), np.float32)
        assert (variable.trainable, variable.regularizer, variable.model_name) == (True, None, None)
        assert (variable.ndim, variable.size, variable.nbytes, len(variable)) == (2, 6, 24, 2)
        assert repr(variable) == "<variable 'w': float32 (2, 3), not initialized yet>"
        variable.numpy()
        assert repr(variable) == "<variable 'w': float32 (2, 3)>"

    def test_what_is_given_is_kept(self):
        regularizer = object()
        variable = flow.get_variable(
            "w", [2], "int64", init.ones_initializer(), regularizer, False, model_name="m", random_seed=3
        )
        assert (variable.dtype, variable.regularizer, variable.trainable, variable.model_name) == (
            np.int64,
            regularizer,
            False,
            "m",
        )
        assert variable.numpy().tolist() == [1, 1]

    @pytest.mark.parametrize(
        "dtype",
        [np.float32, np.dtype(np.int8), "float16", bool, ">f8", "bfloat16", ml_dtypes.float8_e4m3fn, np.complex64],
    )
    def test_every_spelling_of_a_type(self, dtype):
        variable = flow.get_variable("w", (3,), dtype)
        assert variable.dtype == np.dtype(dtype).newbyteorder("=")
        assert variable.numpy().dtype == variable.dtype
        assert flow.get_variable("w", dtype=dtype) is variable

    def test_a_name_that_exists_gives_the_same_object(self):
        variable = flow.get_variable("w", (2, 3), "int32")
        assert flow.get_variable("w") is variable
        assert flow.get_variable("w", [np.int64(2), 3]) is variable
        assert flow.get_variable("w", dtype="int32", trainable=False) is variable
        assert variable.trainable

    def test_all_variables_in_order_of_declaration(self):
        names = ["b", "a", "d", "c"]
        for name in names:
            flow.get_variable(name, (1,))
        variables = flow.get_all_variables()
        assert list(variables) == names
        assert all(variables[name] is flow.get_variable(name) for name in names)
        variables.clear()
        assert len(flow.get_all_variables()) == 4

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (
                {"shape": (3, 2)},
                "variable 'w': the variable exists with another shape or type: found (2, 3) float32, expected (3, 2) "
                "float32. Leave shape and dtype out, use another name, or call clear_default_session() first",
            ),
            (
                {"dtype": "float64"},
                "variable 'w': the variable exists with another shape or type: found (2, 3) float32, expected (2, 3) "
                "float64. Leave shape and dtype out, use another name, or call clear_default_session() first",
            ),
        ],
    )
    def test_another_shape_or_type_is_a_mismatch(self, arguments, message):
        flow.get_variable("w", (2, 3))
        with pytest.raises(VariableMismatch) as caught:
            flow.get_variable("w", **arguments)
        assert str(caught.value) == message

    @pytest.mark.parametrize(
        ("arguments", "kind", "message"),
        [
            (
                {"name": "dense1-weigth"},
                UsageError,
                "variable 'dense1-weigth': a new variable needs a shape. Similar to 'dense1-weigth': 'dense1-weight'",
            ),
            (
                {"name": "x"},
                UsageError,
                "variable 'x': a new variable needs a shape. Pass shape=, or declare the variable first",
            ),
            (
                {"shape": 3},
                UsageError,
                "shape: not a shape: found 3, expected a sequence of sizes, like (2, 3)",
            ),
            (
                {"shape": (2, -3)},
                UsageError,
                "shape: not a shape: found (2, -3), expected a sequence of sizes, like (2, 3)",
            ),
            (
                {"shape": (2,), "dtype": "float31"},
                UsageError,
                "dtype: not a type: found 'float31', expected a numpy type or name",
            ),
            (
                {"shape": (2,), "dtype": object},
                UnsupportedDtype,
                "Python objects cannot be saved: found dtype object, expected a boolean, integer, floating or "
                "complex type. Leave the variable out, convert it, or store it in attributes if it is JSON",
            ),
            (
                {"name": "", "shape": (2,)},
                InvalidName,
                "a variable's name must not be empty",
            ),
            (
                {"name": 3, "shape": (2,)},
                InvalidName,
                "a variable's name must be a string: found 3 (int). "
                "Save nested state that has other keys with save_state",
            ),
            (
                {"name": ["w"], "shape": (2,)},
                InvalidName,
                "a variable's name must be a string: found ['w'] (list). "
                "Save nested state that has other keys with save_state",
            ),
            (
                {"shape": (2,), "initializer": "zeros"},
                UsageError,
                "initializer: not an initializer: found 'zeros', "
                "expected what a function like glorot_uniform_initializer() returns",
            ),
            (
                {"shape": (2,), "random_seed": -1},
                UsageError,
                "random_seed: not a seed: found -1, expected an integer of zero or more",
            ),
            (
                {"shape": (2,), "random_seed": 1.5},
                UsageError,
                "random_seed: not a seed: found 1.5, expected an integer of zero or more",
            ),
        ],
        ids=str,
    )
    def test_refusals(self, arguments, kind, message):
        flow.get_variable("dense1-weight", (4, 3))
        with pytest.raises(UsageError) as caught:
            flow.get_variable(**{"name": "w"} | arguments)
        assert type(caught.value) is kind
        assert str(caught.value) == message
        assert list(flow.get_all_variables()) == ["dense1-weight"]


class TestInitialization:
    def test_runs_at_the_first_use_and_once(self):
        runs = []

        def counted(shape, dtype, rng):
            runs.append((shape, dtype))
            return np.ones(shape, dtype)

        variable = flow.get_variable("w", (2,), "int8", counted)
        assert runs == []
        array = variable.numpy()
        assert variable.numpy() is array
        assert np.asarray(variable) is array
        assert runs == [((2,), np.int8)]

    def test_the_array_is_live(self):
        variable = flow.get_variable("w", (2,), initializer=init.zeros_initializer())
        variable.numpy()[...] += 3
        assert flow.get_all_variables()["w"].numpy().tolist() == [3, 3]

    def test_a_seed_of_its_own(self):
        values = flow.get_variable("w", (5, 3), "float64", init.random_normal_initializer(), random_seed=7).numpy()
        np.testing.assert_array_equal(values, np.random.default_rng(7).normal(0.0, 1.0, 15).reshape(5, 3))

    def test_defaults(self):
        matrix = flow.get_variable("w", (4, 3, 2), "float64").numpy()
        limit = np.sqrt(3 / ((6 + 8) / 2))
        assert 0 < np.abs(matrix).max() <= limit
        assert np.unique(matrix).size == 24
        assert not flow.get_variable("v", (50,)).numpy().any()
        assert flow.get_variable("s", ()).numpy() == 0

    @pytest.mark.parametrize("order", [[0, 1, 2], [2, 1, 0], [1, 2, 0]])
    def test_values_do_not_depend_on_the_order(self, order):
        names = ["a", "b", "c/d"]
        alone = {}
        for name in names:
            with flow.Session(seed=5):
                alone[name] = flow.get_variable(name, (3, 3)).numpy()
        with flow.Session(seed=5):
            for index in order:
                flow.get_variable(names[index], (3, 3))
            for index in reversed(order):
                values = flow.get_variable(names[index]).numpy()
                np.testing.assert_array_equal(values, alone[names[index]])

    @given(
        names=st.lists(
            st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=20), unique=True
        ),
        seed=st.integers(0, 2**70),
        data=st.data(),
    )
    def test_values_depend_on_name_and_seed_alone(self, names, seed, data):
        def values(order, seed):
            with flow.Session(seed=seed):
                return {name: flow.get_variable(name, (2, 2)).numpy().tobytes() for name in order}

        first = values(names, seed)
        assert values(data.draw(st.permutations(names)), seed) == first
        assert len(set(first.values())) == len(names)
        assert all(first[name] != other for name, other in values(names, seed + 1).items())

    def test_values_are_the_same_in_another_process(self):
        script = (
            "from varstore.interfaces.oneflow.session import get_variable; import hashlib;"
            "print(hashlib.sha256(get_variable('dense1-weight', (30, 20)).numpy().tobytes()).hexdigest())"
        )
        here = hashlib.sha256(flow.get_variable("dense1-weight", (30, 20)).numpy().tobytes()).hexdigest()
        for hash_seed in ("1", "2"):
            environment = os.environ | {"PYTHONHASHSEED": hash_seed}
            result = subprocess.run([sys.executable, "-c", script], capture_output=True, env=environment, check=True)
            assert result.stdout.decode().strip() == here

    def test_a_seed_may_be_numpys(self):
        values = {}
        for seed in (9, np.uint8(9), np.int64(9)):
            with flow.Session(seed=seed):
                values[type(seed)] = flow.get_variable("w", (3, 3)).numpy().tobytes()
        assert len(set(values.values())) == 1

    def test_the_default_of_the_session(self):
        with flow.Session(default_initializer=init.constant_initializer(2)) as session:
            before = flow.get_variable("before", (2, 2))
            assert flow.get_variable("w", (2, 2)).numpy().tolist() == [[2, 2], [2, 2]]
            session.default_initializer = init.ones_initializer()
            assert before.numpy().tolist() == [[1, 1], [1, 1]]
            own = flow.get_variable("own", (1,), initializer=init.constant_initializer(7))
            assert own.numpy().tolist() == [7]

    def test_an_initializer_that_cannot_names_the_variable(self):
        scalar = flow.get_variable("scalar", (), initializer=init.glorot_uniform_initializer())
        with pytest.raises(UsageError) as caught:
            scalar.numpy()
        assert str(caught.value) == (
            "variable 'scalar': shape: its initializer failed: its fan_avg is not positive: found (), "
            "expected positive dimensions"
        )
        count = flow.get_variable("count", (2,), "int64", init.constant_initializer(0.5))
        with pytest.raises(UsageError) as caught:
            count.numpy()
        assert str(caught.value).startswith(
            "variable 'count': value: its initializer failed: int64 cannot hold this constant: found 0.5"
        )

    @pytest.mark.parametrize("wrong", [np.zeros(3, np.float32), np.zeros((2, 2)), [1.0]], ids=str)
    def test_an_initializer_that_gives_something_else(self, wrong):
        variable = flow.get_variable("w", (2, 2), initializer=lambda shape, dtype, rng: wrong)
        with pytest.raises(
            UsageError, match=r"variable 'w': its initializer failed: it returned another shape or type: found"
        ):
            variable.numpy()

    def test_an_initializer_may_give_a_view(self):
        variable = flow.get_variable("w", (3, 2), initializer=lambda s, d, rng: np.broadcast_to(d.type(4), s))
        variable.numpy()[0, 0] = 5
        assert variable.numpy().tolist() == [[5, 4], [4, 4], [4, 4]]
        assert variable.numpy().flags.c_contiguous

    def test_threads_initialize_once(self):
        runs = []
        barrier = threading.Barrier(8)

        def slow(shape, dtype, rng):
            runs.append(1)
            return rng.normal(size=shape).astype(dtype)

        variable = flow.get_variable("w", (300, 300), initializer=slow)
        arrays = []

        def use():
            barrier.wait()
            arrays.append(variable.numpy())

        threads = [threading.Thread(target=use) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(runs) == 1
        assert all(array is arrays[0] for array in arrays)


class TestAssign:
    def test_writes_in_place(self):
        variable = flow.get_variable("w", (2,), initializer=init.zeros_initializer())
        array = variable.numpy()
        variable.assign(np.array([1, 2], np.float64))
        assert variable.numpy() is array
        assert array.tolist() == [1, 2]
        variable.assign(variable.numpy()[::-1])
        assert array.tolist() == [2, 1]

    def test_runs_no_initializer_and_keeps_no_reference(self):
        variable = flow.get_variable("w", (2,), initializer=forbidden)
        given_array = np.array([1, 2], np.float32)
        variable.assign(given_array)
        given_array[:] = 9
        assert variable.numpy().tolist() == [1, 2]

    @pytest.mark.parametrize(
        ("dtype", "value", "found"),
        [
            ("float32", np.zeros((3,)), "(3,) float64"),
            ("float32", 1.0, "() float64"),
            ("int32", np.zeros(2), "(2,) float64"),
            ("float32", np.zeros(2, complex), "(2,) complex128"),
            ("bool", np.zeros(2, np.int8), "(2,) int8"),
            ("bfloat16", np.zeros(2, complex), "(2,) complex128"),
        ],
    )
    def test_what_does_not_fit(self, dtype, value, found):
        variable = flow.get_variable("w", (2,), dtype, forbidden)
        with pytest.raises(VariableMismatch) as caught:
            variable.assign(value)
        assert str(caught.value) == (
            f"variable 'w': the value does not fit: found {found}, expected (2,) {dtype} or a type of its kind"
        )

    def test_narrow_types(self):
        variable = flow.get_variable("w", (2,), "bfloat16")
        variable.assign(np.array([1.0, 3.140625], np.float32))
        assert variable.numpy().astype(np.float64).tolist() == [1.0, 3.140625]

    def test_a_read_only_array_is_not_changed(self):
        variable = flow.get_variable("w", (2,))
        variable.numpy().flags.writeable = False
        for change in (lambda: variable.assign([1.0, 2.0]), lambda: flow.load_variables({"w": np.ones(2, "f4")})):
            with pytest.raises(UsageError) as caught:
                change()
            assert str(caught.value) == (
                "variable 'w': its array was made read-only. Set .numpy().flags.writeable = True"
            )
        assert variable.numpy().tolist() == [0, 0]


class TestArrayInterface:
    def test_copies_and_types(self):
        variable = flow.get_variable("w", (2,), initializer=init.ones_initializer())
        assert np.asarray(variable) is variable.numpy()
        assert not np.shares_memory(np.array(variable), variable.numpy())
        assert np.asarray(variable, np.float64).dtype == np.float64
        assert (np.add(variable, 1) == 2).all()

    def test_len_needs_a_dimension_and_no_values(self):
        assert len(flow.get_variable("w", (7, 2), initializer=forbidden)) == 7
        with pytest.raises(TypeError, match=r"have a len\(\)"):
            len(flow.get_variable("s", ()))


class TestLoadArrays:
    def test_a_loaded_variable_never_runs_its_initializer(self):
        weight, bias, _ = declare_mlp(initializer=forbidden)
        values = {"dense1-weight": np.arange(12, dtype=np.float32).reshape(4, 3), "dense1-bias": np.ones(3, "f4")}
        report = flow.load_variables(values)
        np.testing.assert_array_equal(weight.numpy(), values["dense1-weight"])
        np.testing.assert_array_equal(bias.numpy(), values["dense1-bias"])
        assert (report.source, report.target) == ("dict", "session")
        assert (report.loaded, report.kept, report.unused) == (
            ("dense1-weight", "dense1-bias"),
            ("dense2-weight",),
            (),
        )
        with pytest.raises(AssertionError, match="must not run"):
            flow.get_variable("dense2-weight").numpy()

    def test_arrays_in_use_get_new_contents(self):
        weight, _, _ = declare_mlp()
        array = weight.numpy()
        flow.load_variables({"dense1-weight": np.full((4, 3), 5, np.float32)})
        assert weight.numpy() is array
        assert (array == 5).all()

    def test_given_arrays_stay_the_givers(self):
        weight, bias, _ = declare_mlp()
        bias.numpy()
        given_arrays = {"dense1-weight": np.ones((4, 3), "f4"), "dense1-bias": np.ones(3, "f4")}
        flow.load_variables(given_arrays)
        weight.numpy()[:] = 7
        bias.numpy()[:] = 7
        assert all((array == 1).all() for array in given_arrays.values())

    def test_values_may_be_the_variables_themselves(self):
        first = flow.get_variable("first", (2,), initializer=init.constant_initializer(1))
        second = flow.get_variable("second", (2,), initializer=init.constant_initializer(2))
        flow.load_variables({"first": second, "second": first.numpy()})
        assert (first.numpy().tolist(), second.numpy().tolist()) == ([2, 2], [1, 1])

    def test_values_of_another_session(self):
        with flow.Session(seed=1):
            declare_mlp()
            theirs = flow.get_all_variables()
        declare_mlp()
        assert flow.load_variables(theirs).kept == ()
        for name, variable in flow.get_all_variables().items():
            np.testing.assert_array_equal(variable.numpy(), theirs[name].numpy())
            assert not np.shares_memory(variable.numpy(), theirs[name].numpy())

    @pytest.mark.parametrize(
        "value",
        [
            np.arange(6, dtype=">f4").reshape(2, 3),
            np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3)),
            np.arange(24, dtype=np.float32).reshape(4, 6)[::2, ::2],
            np.broadcast_to(np.float32(3), (2, 3)),
        ],
        ids=["big-endian", "column order", "strided", "broadcast"],
    )
    @pytest.mark.parametrize("used", [False, True])
    def test_arrays_of_any_layout(self, value, used):
        variable = flow.get_variable("w", (2, 3))
        if used:
            variable.numpy()
        flow.load_variables({"w": value})
        np.testing.assert_array_equal(variable.numpy(), value)
        assert variable.numpy().dtype.isnative
        assert variable.numpy().flags.c_contiguous
        assert variable.numpy().flags.writeable

    def test_scalars_and_zero_sizes(self):
        scalar, empty = flow.get_variable("s", (), "float64"), flow.get_variable("e", (0, 3))
        flow.load_variables({"s": 2.5, "e": np.zeros((0, 3), np.float32)})
        assert scalar.numpy() == 2.5
        assert empty.numpy().shape == (0, 3)

    def test_a_mismatch_lists_everything_and_changes_nothing(self):
        variables = declare_mlp()
        before = [variable.numpy().copy() for variable in variables]
        values = {
            "dense1-weight": np.zeros((3, 4), np.float32),
            "dense1-bias": np.zeros(3, np.float64),
            "dense2-weight": Unread((3, 2)),
            "other": np.zeros(3),
        }
        for ignore_mismatch in (True, False):
            if not ignore_mismatch:
                del values["other"]
            with pytest.raises(VariableMismatch) as caught:
                flow.load_variables(values, ignore_mismatch)
            assert str(caught.value) == (
                "nothing was loaded: shapes or types of 2 variables differ, given -> session:\n"
                "  'dense1-weight': (3, 4) -> (4, 3), transposed\n"
                "  'dense1-bias': float64 -> float32\n"
                "Leave them out, or use load_into with on_mismatch= and cast="
            )
        for variable, values_before in zip(variables, before, strict=True):
            np.testing.assert_array_equal(variable.numpy(), values_before)

    def test_every_mismatch_is_listed(self):
        for index in range(30):
            flow.get_variable(f"layer{index}", (index + 1,))
        with pytest.raises(VariableMismatch) as caught:
            flow.load_variables({f"layer{index}": np.zeros(99, np.float32) for index in range(30)})
        assert all(f"'layer{index}': (99,) -> ({index + 1},)" in str(caught.value) for index in range(30))

    def test_a_value_that_cannot_be_read_changes_nothing(self):
        variables = declare_mlp()
        before = [variable.numpy().copy() for variable in variables]
        values = {
            "dense1-weight": np.zeros((4, 3), np.float32),
            "dense1-bias": np.zeros(3, np.float32),
            "dense2-weight": Unread((3, 2)),
        }
        with pytest.raises(AssertionError, match="read before"):
            flow.load_variables(values)
        for variable, values_before in zip(variables, before, strict=True):
            np.testing.assert_array_equal(variable.numpy(), values_before)

    def test_unknown_names(self):
        declare_mlp()
        values = {"dense1-wieght": Unread((4, 3)), "dense1-bias": np.ones(3, np.float32), "q": Unread((9,))}
        report = flow.load_variables(values)
        assert (report.loaded, report.waiting, report.unused) == (("dense1-bias",), ("dense1-wieght", "q"), ())
        assert report.kept == ("dense1-weight", "dense2-weight")
        flow.get_variable("dense1-bias").assign(np.zeros(3))
        with pytest.raises(VariableNotFound) as caught:
            flow.load_variables(values, ignore_mismatch=False)
        assert str(caught.value) == (
            "the session does not have these variables, and ignore_mismatch is False: found 'dense1-wieght', 'q'. "
            "Similar to 'dense1-wieght': 'dense1-weight', 'dense2-weight', 'dense1-bias'"
        )
        assert not flow.get_variable("dense1-bias").numpy().any()

    def test_many_unknown_names_are_counted(self):
        with pytest.raises(VariableNotFound) as caught:
            flow.load_variables({f"v{index}": np.zeros(1) for index in range(8)}, ignore_mismatch=False)
        assert str(caught.value) == (
            "the session does not have these variables, and ignore_mismatch is False: "
            "found 'v0', 'v1', 'v2', and 5 more"
        )

    @pytest.mark.parametrize(
        ("value_dict", "found"),
        [("mlp_models_1", "str"), ([("w", 1)], "list"), ({1: np.zeros(2)}, "dict"), (np.zeros(2), "ndarray")],
    )
    def test_what_is_no_mapping_of_names(self, value_dict, found):
        with pytest.raises(UsageError) as caught:
            flow.load_variables(value_dict)
        assert str(caught.value) == (
            f"value_dict: not a mapping of names to values: found {found}. "
            "Pass checkpoint.get(directory), or {name: value} for one variable"
        )

    def test_what_is_no_array(self):
        flow.get_variable("w", (2,))
        with pytest.raises(UsageError, match="variable 'w': not an array, a scalar or a variable of a checkpoint"):
            flow.load_variables({"w": "text"})


class TestLoadBeforeDeclaring:
    """OneFlow's document loads a checkpoint first and then runs the job that declares the variables."""

    @pytest.fixture(params=["whole", "plain"])
    def mlp(self, tmp_path, request):
        path = tmp_path / "mlp"
        with flow.Session(seed=1):
            declare_mlp()
            flow.checkpoint.save(path, manifest=request.param == "whole")
            self.saved = {name: variable.numpy() for name, variable in flow.get_all_variables().items()}
        return path

    def test_values_wait_and_are_taken(self, mlp):
        report = flow.load_variables(flow.checkpoint.get(mlp))
        assert (report.loaded, report.unused) == ((), ())
        assert set(report.waiting) == set(self.saved)
        assert str(report).startswith(f"{mlp} -> session: 0 of 0 loaded, 3 waiting\n")
        assert "waiting" in str(report).split("\n")[1]
        session = current_session()
        assert flow.get_all_variables() == {}
        assert set(session.waiting) == set(self.saved)
        assert repr(session) == "<Session: 0 variables, 0 bytes, 3 more waiting>"
        for variable in declare_mlp(initializer=forbidden):
            assert "not read yet" in repr(variable)
            np.testing.assert_array_equal(variable.numpy(), self.saved[variable.name])
            assert variable.numpy() is variable.numpy()
            assert variable.numpy().flags.writeable
            assert "yet" not in repr(variable)
        assert session.waiting == {}

    def test_what_nobody_declares_is_not_read(self, mlp):
        flow.load_variables(flow.checkpoint.get(mlp))
        (mlp / "dense2-weight" / "out").unlink()
        weight = flow.get_variable("dense1-weight", (4, 3), initializer=forbidden)
        np.testing.assert_array_equal(weight.numpy(), self.saved["dense1-weight"])
        flow.checkpoint.save(mlp.parent / "next")
        assert list(flow.checkpoint.get(mlp.parent / "next")) == ["dense1-weight"]
        flow.load_variables({"lazy": Unread((2,))})

    @pytest.mark.parametrize(("shape", "dtype"), [((3, 4), None), ((4, 3), "float64")])
    def test_a_mismatch_names_both_places(self, mlp, shape, dtype):
        flow.load_variables(flow.checkpoint.get(mlp))
        with pytest.raises(VariableMismatch) as caught:
            flow.get_variable("dense1-weight", shape, dtype, forbidden)
        assert str(caught.value) == (
            f"{mlp / 'dense1-weight'}: variable 'dense1-weight': the variable is declared with another shape or type "
            f"than the value that load_variables was given: found (4, 3) float32, expected {shape} "
            f"{dtype or 'float32'}. Declare it as it was saved, or remove the value from the session's `waiting` first"
        )
        assert flow.get_all_variables() == {}
        np.testing.assert_array_equal(
            flow.get_variable("dense1-weight", (4, 3), initializer=forbidden).numpy(), self.saved["dense1-weight"]
        )
        del current_session().waiting["dense2-weight"]
        assert flow.get_variable("dense2-weight", (1,), initializer=init.ones_initializer()).numpy() == [1]

    def test_the_size_is_compared_where_shape_and_type_are_unknown(self):
        flow.load_variables(flow.checkpoint.get(DATA / "lenet_legacy_nometa" / "conv1-bias"))
        with pytest.raises(SizeMismatch, match="conv1-bias"):
            flow.get_variable("conv1-bias", (5,))
        with np.load(DATA / "lenet_legacy_nometa.expect.npz") as expected:
            bias = flow.get_variable("conv1-bias", (2, 2), initializer=forbidden)
            np.testing.assert_array_equal(bias.numpy(), expected["conv1-bias"].reshape(2, 2))

    def test_arrays_are_those_of_the_call(self):
        given_array = np.ones(2, np.float32)
        flow.load_variables({"w": given_array, "s": 2.5})
        given_array[:] = 7
        assert flow.get_variable("w", (2,), initializer=forbidden).numpy().tolist() == [1, 1]
        assert flow.get_variable("s", (), "float64", forbidden).numpy() == 2.5
        flow.load_variables({"v": given_array})
        with pytest.raises(VariableMismatch, match=r"^a value given to load_variables: variable 'v'"):
            flow.get_variable("v", (3,))

    def test_what_was_given_last_counts(self, mlp):
        for number in (1, 2):
            flow.load_variables({"w": np.full(2, number, np.float32)})
        variable = flow.get_variable("w", (2,), initializer=forbidden)
        assert variable.numpy().tolist() == [2, 2]
        flow.load_variables(flow.checkpoint.get(mlp))
        for variable in declare_mlp(initializer=forbidden)[:2]:
            variable.assign(np.zeros(variable.shape))
            assert not variable.numpy().any()
        flow.load_variables({"dense2-weight": np.zeros((3, 2), np.float32)})
        assert not flow.get_variable("dense2-weight").numpy().any()

    def test_an_error_leaves_nothing_waiting(self, mlp):
        checkpoint = flow.checkpoint.get(mlp)
        with pytest.raises(VariableNotFound):
            flow.load_variables(checkpoint, ignore_mismatch=False)
        with pytest.raises(UsageError, match="variable 'text': not an array"):
            flow.load_variables({**checkpoint, "text": "no"})
        flow.get_variable("dense2-weight", (9, 9))
        with pytest.raises(VariableMismatch):
            flow.load_variables(checkpoint)
        assert current_session().waiting == {}

    def test_reset_drops_them(self, mlp):
        with flow.Session() as session:
            flow.load_variables(flow.checkpoint.get(mlp))
            session.reset()
            assert session.waiting == {}
            assert flow.get_variable("dense1-bias", (3,), initializer=init.ones_initializer()).numpy().all()

    def test_a_name_that_is_near_is_hinted(self):
        declare_mlp()
        report = flow.load_variables({"dense1-wieght": np.zeros((4, 3), np.float32)})
        assert report.hints == ("'dense1-weight' is missing and 'dense1-wieght' is waiting; is one of them misspelt?",)
        with pytest.raises(VariableMismatch, match="1 waiting"):
            report.raise_for("waiting")


class TestNamesOfOneFlow:
    """What OneFlow's scripts call besides variables."""

    def test_calls_without_effect_are_accepted(self):
        flow.config.enable_legacy_model_io(False)
        flow.config.enable_legacy_model_io()
        variable = flow.get_variable("w", (2,), distribute=object())
        assert flow.get_variable("w", distribute="split") is variable

    @pytest.mark.parametrize("name", ["data", "global_function", "layers", "nn", "optimizer", "scope", "train"])
    def test_what_trains_is_absent_and_says_why(self, name):
        says = f"^module 'varstore' has no attribute '{name}': it keeps variables and does not train$"
        with pytest.raises(AttributeError, match=says):
            getattr(flow, name)
        assert name not in dir(flow)


class TestSessions:
    def test_a_session_is_current_inside_with(self):
        outside = flow.get_variable("w", (1,))
        with flow.Session() as session:
            assert current_session() is session
            inside = flow.get_variable("w", (2,))
            with flow.Session() as inner:
                assert current_session() is inner
                assert flow.get_all_variables() == {}
            assert flow.get_all_variables() == {"w": inside}
            with session, session:
                assert flow.get_all_variables() == {"w": inside}
            assert current_session() is session
        assert flow.get_all_variables() == {"w": outside}
        with session:
            assert flow.get_variable("w") is inside

    def test_an_error_leaves_the_session(self):
        session = current_session()
        with pytest.raises(ZeroDivisionError), flow.Session():
            1 / 0  # noqa: B018
        assert current_session() is session

    def test_threads_have_their_own(self):
        seen = {}

        def work(number):
            with flow.Session(seed=number):
                flow.get_variable(f"w{number}", (1,))
                barrier.wait()
                seen[number] = list(flow.get_all_variables())
                barrier.wait()
            seen[-number] = current_session()

        default = current_session()
        barrier = threading.Barrier(4)
        threads = [threading.Thread(target=work, args=(number,)) for number in range(1, 5)]
        with flow.Session():
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        for number in range(1, 5):
            assert seen[number] == [f"w{number}"]
            assert seen[-number] is default

    def test_tasks_have_their_own(self):
        async def work(name):
            with flow.Session():
                flow.get_variable(name, (1,))
                await asyncio.sleep(0)
                return list(flow.get_all_variables())

        async def both():
            return await asyncio.gather(work("a"), work("b"))

        assert asyncio.run(both()) == [["a"], ["b"]]

    def test_one_name_declared_by_many_threads_is_one_variable(self):
        barrier = threading.Barrier(8)
        variables = []

        def declare():
            barrier.wait()
            variables.extend(flow.get_variable(f"w{index}", (1,)) for index in range(50))

        threads = [threading.Thread(target=declare) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(variables) == 400
        assert len({id(variable) for variable in variables}) == 50

    def test_clearing(self):
        old = flow.get_variable("w", (2, 2))
        values = old.numpy().copy()
        flow.clear_default_session()
        assert flow.get_all_variables() == {}
        assert flow.get_variable("w", (3,)) is not old
        np.testing.assert_array_equal(old.numpy(), values)

    def test_clearing_the_default_leaves_the_entered_one(self):
        flow.get_variable("w", (1,))
        with flow.Session():
            flow.get_variable("v", (1,))
            flow.clear_default_session()
            assert list(flow.get_all_variables()) == ["v"]
        assert flow.get_all_variables() == {}

    def test_reset(self):
        initializer = init.ones_initializer()
        with flow.Session(seed=3, default_initializer=initializer) as session:
            flow.get_variable("w", (2, 2))
            assert repr(session) == "<Session: 1 variable, 16 bytes>"
            session.reset()
            assert flow.get_all_variables() == {}
            assert (session.seed, session.default_initializer) == (3, initializer)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"seed": -1}, "seed: not a seed: found -1, expected an integer of zero or more"),
            ({"seed": None}, "seed: not a seed: found None, expected an integer of zero or more"),
            (
                {"default_initializer": 0},
                "default_initializer: not an initializer: found 0, "
                "expected what a function like glorot_uniform_initializer() returns",
            ),
        ],
    )
    def test_options_are_checked_whenever_they_are_set(self, options, message):
        with pytest.raises(UsageError) as caught:
            flow.Session(**options)
        assert str(caught.value) == message
        session = flow.Session()
        for name, value in options.items():
            with pytest.raises(UsageError):
                setattr(session, name, value)
        assert (session.seed, session.default_initializer) == (0, None)


class TestCheckpoints:
    def save_mlp(self, path, seed=1, **options):
        with flow.Session(seed=seed):
            declare_mlp()
            flow.checkpoint.save(path, **options)
            return {name: variable.numpy() for name, variable in flow.get_all_variables().items()}

    def test_saved_and_loaded(self, tmp_path):
        saved = self.save_mlp(tmp_path / "mlp")
        assert sorted(os.listdir(tmp_path / "mlp")) == sorted([*saved, "manifest", "snapshot_done"])
        declare_mlp(initializer=forbidden)
        flow.get_variable("dense3-weight", (2, 2), initializer=init.ones_initializer())
        report = flow.load_variables(flow.checkpoint.get(tmp_path / "mlp"), ignore_mismatch=False)
        assert (report.loaded, report.kept) == (tuple(saved), ("dense3-weight",))
        assert report.source == str(tmp_path / "mlp")
        for name, values in saved.items():
            loaded = flow.get_variable(name).numpy()
            np.testing.assert_array_equal(loaded, values)
            assert loaded.flags.writeable

    def test_what_save_returns_is_the_checkpoint(self, tmp_path):
        declare_mlp()
        saved = flow.checkpoint.save(tmp_path / "mlp")
        assert list(saved) == ["dense1-weight", "dense1-bias", "dense2-weight"]
        np.testing.assert_array_equal(saved["dense1-weight"].numpy(), flow.get_variable("dense1-weight").numpy())

    def test_arrays_variables_and_lazy_variables_are_saved(self, tmp_path):
        saved = self.save_mlp(tmp_path / "mlp")
        lazy = flow.checkpoint.get(tmp_path / "mlp")
        variable = flow.get_variable("w", (2,), initializer=init.ones_initializer())
        composed = {"renamed": lazy["dense1-weight"], "mine": variable, "array": np.arange(3)}
        flow.checkpoint.save(tmp_path / "composed", composed)
        loaded = flow.checkpoint.get(tmp_path / "composed")
        assert list(loaded) == list(composed)
        np.testing.assert_array_equal(loaded["renamed"].numpy(), saved["dense1-weight"])
        assert loaded["mine"].numpy().tolist() == [1, 1]
        assert loaded["array"].numpy().tolist() == [0, 1, 2]
        linked = [tmp_path / "mlp" / "dense1-weight" / "out", tmp_path / "composed" / "renamed" / "out"]
        assert os.path.samefile(*linked)

    def test_options_are_passed_on(self, tmp_path):
        self.save_mlp(tmp_path / "first", manifest=False)
        assert not (tmp_path / "first" / "manifest").exists()
        declare_mlp()
        flow.load_variables(flow.checkpoint.get(tmp_path / "first"))
        flow.checkpoint.save(tmp_path / "second")
        flow.get_variable("dense1-bias").numpy()[:] += 1
        flow.checkpoint.save(tmp_path / "third", base=tmp_path / "second")
        for name, same in (("dense1-weight", True), ("dense1-bias", False)):
            outs = [tmp_path / directory / name / "out" for directory in ("second", "third")]
            assert os.path.samefile(*outs) is same
        flow.checkpoint.save(tmp_path / "second", overwrite=True)
        assert (flow.checkpoint.get(tmp_path / "second")["dense1-bias"].numpy() == 1).all()

    def test_nothing_is_initialized_or_written_where_an_initializer_refuses(self, tmp_path):
        flow.get_variable("w", (2,))
        flow.get_variable("bad", (), initializer=init.glorot_normal_initializer())
        with pytest.raises(UsageError, match="variable 'bad'"):
            flow.checkpoint.save(tmp_path / "mlp")
        assert os.listdir(tmp_path) == []

    def test_a_checkpoint_is_saved_with_its_attributes(self, tmp_path):
        self.save_mlp(tmp_path / "mlp", attributes={"epoch": 3})
        flow.checkpoint.save(tmp_path / "copy", flow.checkpoint.get(tmp_path / "mlp"))
        assert flow.checkpoint.get(tmp_path / "copy").attributes == {"epoch": 3}

    def test_a_dict_to_take_from_and_add_to(self, tmp_path):
        saved = self.save_mlp(tmp_path / "mlp", attributes={"epoch": 3})
        variables = flow.checkpoint.get(tmp_path / "mlp")
        assert isinstance(variables, dict)
        assert (variables.path, variables.attributes) == (str(tmp_path / "mlp"), {"epoch": 3})
        assert repr(variables) == f"<3 variables of '{tmp_path / 'mlp'}'>"
        weight = variables.pop("dense1-weight")
        del variables["dense1-bias"]
        variables["renamed"] = weight
        variables["mine"] = flow.get_variable("w", (2,), initializer=init.ones_initializer())
        variables |= {"array": np.arange(3)}
        flow.checkpoint.save(tmp_path / "next", variables)
        following = flow.checkpoint.get(tmp_path / "next")
        assert list(following) == ["dense2-weight", "renamed", "mine", "array"]
        assert following.attributes == {"epoch": 3}
        assert os.path.samefile(tmp_path / "mlp/dense1-weight/out", tmp_path / "next/renamed/out")
        assert isinstance(variables["mine"], SessionVariable)
        assert set(flow.open(tmp_path / "mlp")) == set(saved)
        report = flow.load_variables(variables)
        assert report.source == str(tmp_path / "mlp")
        target = {"dense2-weight": np.zeros((3, 2), np.float32)}
        assert flow.load_into(target, variables).source == str(tmp_path / "mlp")
        np.testing.assert_array_equal(target["dense2-weight"], saved["dense2-weight"])
        with pytest.raises(VariableMismatch, match=re.escape(str(tmp_path / "mlp"))):
            flow.load_into({"dense2-weight": np.zeros(1)}, variables)

    def test_nested_state_stays_whole_or_goes(self, tmp_path):
        flow.save_state(tmp_path / "state", {"w": np.ones(2), "epoch": 3})
        variables = flow.checkpoint.get(tmp_path / "state")
        flow.save(tmp_path / "same", variables)
        assert flow.load_state(tmp_path / "same")["epoch"] == 3
        flow.save(tmp_path / "more", {"v": np.ones(1)} | variables)
        variables["v"] = np.ones(1)
        flow.save(tmp_path / "more too", variables)
        for name in ("more", "more too"):
            assert flow.open(tmp_path / name).tree is None

    def test_what_flow_save_wrote_is_for_read(self):
        with pytest.raises(IncompleteCheckpoint, match=r"flow\.save wrote this.*Read it with varstore\.read"):
            flow.checkpoint.get(DATA.parent / "formats/oneflow/lenet_checkpoint")

    def test_what_is_not_a_mapping_is_refused_by_save(self, tmp_path):
        with pytest.raises(UsageError):
            flow.checkpoint.save(tmp_path / "mlp", [np.zeros(2)])

    def test_one_variables_folder(self, tmp_path):
        saved = self.save_mlp(tmp_path / "mlp")
        variable = flow.checkpoint.get(tmp_path / "mlp" / "dense1-weight")
        np.testing.assert_array_equal(variable.numpy(), saved["dense1-weight"])
        weight, _, _ = declare_mlp(initializer=forbidden)
        flow.load_variables({"dense1-weight": flow.checkpoint.get(str(tmp_path / "mlp" / "dense1-weight"))})
        np.testing.assert_array_equal(weight.numpy(), saved["dense1-weight"])
        flow.load_variables({"dense1-weight": np.zeros_like(weight.numpy())})
        assert flow.load_variables(variable).loaded == ("dense1-weight",)
        np.testing.assert_array_equal(weight.numpy(), saved["dense1-weight"])

    def test_a_directory_without_marker_is_refused(self, tmp_path):
        self.save_mlp(tmp_path / "mlp")
        (tmp_path / "mlp" / "snapshot_done").unlink()
        with pytest.raises(IncompleteCheckpoint, match="snapshot_done"):
            flow.checkpoint.get(tmp_path / "mlp")
        with pytest.raises(IncompleteCheckpoint, match="snapshot_done"):
            flow.checkpoint.get(tmp_path / "mlp" / "dense1-weight")
        with pytest.raises(CheckpointNotFound, match="nowhere"):
            flow.checkpoint.get(tmp_path / "nowhere")

    def test_damage_found_while_reading_changes_nothing(self, tmp_path):
        self.save_mlp(tmp_path / "mlp")
        out = tmp_path / "mlp" / "dense2-weight" / "out"
        out.chmod(0o644)
        data = bytearray(out.read_bytes())
        data[5] ^= 1
        out.write_bytes(data)
        variables = declare_mlp()
        before = [variable.numpy().copy() for variable in variables[:2]]
        with pytest.raises(DigestMismatch, match="dense2-weight"):
            flow.load_variables(flow.checkpoint.get(tmp_path / "mlp"))
        for variable, values in zip(variables, before, strict=False):
            np.testing.assert_array_equal(variable.numpy(), values)
        assert "not initialized yet" in repr(variables[2])

    def test_shapes_are_compared_before_data_is_read(self, tmp_path):
        self.save_mlp(tmp_path / "mlp")
        for name in ("dense1-weight", "dense1-bias", "dense2-weight"):
            out = tmp_path / "mlp" / name / "out"
            out.chmod(0o644)
            out.write_bytes(b"\xff" * out.stat().st_size)
        flow.get_variable("dense1-weight", (4, 3))
        flow.get_variable("dense2-weight", (3, 3))
        with pytest.raises(VariableMismatch, match=r"'dense2-weight': \(3, 2\) -> \(3, 3\)"):
            flow.load_variables(flow.checkpoint.get(tmp_path / "mlp"))

    def test_names_that_are_not_wanted_are_not_read(self, tmp_path):
        self.save_mlp(tmp_path / "mlp")
        shutil.rmtree(tmp_path / "mlp" / "dense2-weight")
        flow.get_variable("dense1-bias", (3,), initializer=forbidden)
        assert flow.load_variables(flow.checkpoint.get(tmp_path / "mlp")).loaded == ("dense1-bias",)


SHAPES = {
    "conv1-weight": (4, 1, 5, 5),
    "conv1-bias": (4,),
    "conv2-weight": (8, 4, 5, 5),
    "conv2-bias": (8,),
    "dense1-weight": (16, 392),
    "dense1-bias": (16,),
    "dense2-weight": (10, 16),
    "dense2-bias": (10,),
}
STEP = "System-Train-TrainStep-train_job"


class TestOneFlowsCheckpointWithoutMeta:
    """A checkpoint written by OneFlow, whose conv1-bias has no meta."""

    def load(self, **changed):
        for name, shape in (SHAPES | changed).items():
            flow.get_variable(name, shape, initializer=forbidden)
        flow.get_variable(STEP, (1,), np.int64, initializer=forbidden)
        return flow.load_variables(flow.checkpoint.get(DATA / "lenet_legacy_nometa"), ignore_mismatch=False)

    def test_takes_shape_and_type_from_the_session(self):
        report = self.load()
        assert set(report.loaded) == {*SHAPES, STEP}
        with np.load(DATA / "lenet_legacy_nometa.expect.npz") as expected:
            assert set(expected) == {*SHAPES, STEP}
            for name in expected:
                loaded = flow.get_variable(name).numpy()
                assert loaded.dtype == expected[name].dtype
                np.testing.assert_array_equal(loaded, expected[name])

    def test_any_shape_of_its_size_fits(self):
        self.load(**{"conv1-bias": (2, 2)})
        with np.load(DATA / "lenet_legacy_nometa.expect.npz") as expected:
            np.testing.assert_array_equal(flow.get_variable("conv1-bias").numpy(), expected["conv1-bias"].reshape(2, 2))

    def test_another_size_does_not_fit_and_changes_nothing(self):
        with pytest.raises(SizeMismatch, match="conv1-bias"):
            self.load(**{"conv1-bias": (5,)})
        assert all("not initialized yet" in repr(variable) for variable in flow.get_all_variables().values())

    def test_its_folder_alone(self):
        bias = flow.get_variable("conv1-bias", (4,))
        flow.load_variables({"conv1-bias": flow.checkpoint.get(DATA / "lenet_legacy_nometa" / "conv1-bias")})
        with np.load(DATA / "lenet_legacy_nometa.expect.npz") as expected:
            np.testing.assert_array_equal(bias.numpy(), expected["conv1-bias"])


def test_loading_holds_no_second_copy(tmp_path):
    with flow.Session():
        for index in range(4):
            flow.get_variable(f"w{index}", (1 << 20,), initializer=init.ones_initializer())
        flow.checkpoint.save(tmp_path / "large", durable=False)
    size = 4 * 4 * (1 << 20)
    loaded = flow.checkpoint.get(tmp_path / "large")
    for index in range(4):
        flow.get_variable(f"w{index}", (1 << 20,), initializer=forbidden)
    tracemalloc.start()
    try:
        flow.load_variables(loaded)
        fresh = tracemalloc.get_traced_memory()[1]
        tracemalloc.reset_peak()
        flow.load_variables(loaded)
        again = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert fresh < 1.3 * size
    assert again < 2.3 * size


def test_many_small_variables(tmp_path):
    names = [f"layer{index}-weight" for index in range(2_000)]
    with flow.Session():
        for name in names:
            flow.get_variable(name, (2,), initializer=init.ones_initializer())
        flow.checkpoint.save(tmp_path / "many", durable=False)
    for name in names:
        flow.get_variable(name, (2,), initializer=forbidden)
    report = flow.load_variables(flow.checkpoint.get(tmp_path / "many"))
    assert report.loaded == tuple(names)
    assert all(variable.numpy().tolist() == [1, 1] for variable in flow.get_all_variables().values())


def test_the_step_counter_goes_on(tmp_path):
    step = flow.get_variable(STEP, (1,), np.int64, init.zeros_initializer())
    for _ in range(3):
        step.numpy()[0] += 1
    flow.checkpoint.save(tmp_path / "model")
    assert "kInt64" in (tmp_path / "model" / STEP / "meta").read_text()
    with flow.Session():
        again = flow.get_variable(STEP, (1,), np.int64, init.zeros_initializer())
        report = flow.load_variables(flow.checkpoint.get(tmp_path / "model"))
        assert json.dumps(report.loaded) == json.dumps([STEP])
        assert again.numpy().tolist() == [3]
