"""`varstore.merge`: one checkpoint of several by links, which move no data, or by means."""

import math
import os

import ml_dtypes
import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings, strategies as st
from hypothesis.extra import numpy as hnp

import varstore as vs
from varstore.cli import main
from varstore.errors import DigestMismatch, UsageError, VariableMismatch, VariableNotFound
from varstore.storage import syscalls

pytestmark = pytest.mark.core


def run(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments], prog_name="varstore")


def is_one_file(first, second):
    return os.path.samefile(os.path.join(first.path, "out"), os.path.join(second.path, "out"))


@pytest.fixture
def sources(tmp_path):
    backbone = vs.save(tmp_path / "a", {"conv/w": np.ones((3, 3)), "fc/w": np.zeros(3)}, attributes={"n": 1, "a": 1})
    head = vs.save(
        tmp_path / "b",
        {"head/w": np.ones(2)},
        attributes={"n": 2, "b": [1]},
        variable_attributes={"head/w": {"unit": "m"}},
    )
    return backbone, head


def test_several_become_one_by_links(tmp_path, sources):
    a, b = sources
    made = vs.merge(tmp_path / "out", [a.path, b])
    assert made.names == ("conv/w", "fc/w", "head/w")
    assert all(is_one_file(made[name], (a if name in a else b)[name]) for name in made)
    assert (dict(made.attributes), made.left_out) == ({"a": 1, "b": [1]}, ("attribute n",))
    assert made["head/w"].attributes == {"unit": "m"}
    assert vs.verify(made.path)


def test_one_is_chosen_from_and_renamed(tmp_path, sources):
    a, _ = sources
    made = vs.merge(tmp_path / "out", a, include="conv/*", rename={"conv": "stem"})
    assert made.names == ("stem/w",)
    assert is_one_file(made["stem/w"], a["conv/w"])
    assert dict(made.attributes) == {"n": 1, "a": 1}
    for wrong in ({"include": "head/*"}, {"exclude": "x"}, {"rename": {"x": "y"}}):
        with pytest.raises(VariableNotFound):
            vs.merge(tmp_path / "no", a, **wrong)
    with pytest.raises(UsageError, match="nothing to write"):
        vs.merge(tmp_path / "no", a, rename={"": None})
    assert not (tmp_path / "no").exists()


def test_a_name_that_two_have_is_an_error_unless_the_last_wins(tmp_path, sources):
    a, b = sources
    other = vs.save(tmp_path / "c", {"fc/w": np.full(3, 5.0)}, attributes={"n": 3})
    with pytest.raises(VariableMismatch, match=r"'fc/w'.* and .*last_wins=True"):
        vs.merge(tmp_path / "out", [a, b, other])
    made = vs.merge(tmp_path / "out", [a, b, other], last_wins=True)
    assert is_one_file(made["fc/w"], other["fc/w"])
    assert (made.attributes["n"], made.left_out) == (3, ())
    with pytest.raises(UsageError, match="there is no source"):
        vs.merge(tmp_path / "no", [])


def test_files_of_other_formats_and_arrays_are_copied(tmp_path, sources):
    vs.write(tmp_path / "m.safetensors", {"s": np.arange(3.0)})
    vs.write(tmp_path / "m.pt", {"net": {"p": np.arange(2.0)}, "epoch": 3})
    given = [sources[1], tmp_path / "m.safetensors", tmp_path / "m.pt", {"x": np.ones(2, ml_dtypes.bfloat16)}]
    made = vs.merge(tmp_path / "out", given)
    assert made.names == ("head/w", "s", "net/p", "x")
    state = vs.load_state(made)
    assert (state["epoch"], state["net"]["p"].tolist(), state["x"].dtype.name) == (3, [0, 1], "bfloat16")
    chosen = vs.merge(tmp_path / "chosen", tmp_path / "m.pt", include="net/*")
    assert (chosen.names, chosen.left_out) == (("net/p",), (f"epoch of {tmp_path}/m.pt",))


def test_nested_state_is_joined(tmp_path):
    first = {"model": {"w": np.ones(3), "k": 1}, "epoch": 3, "lr": 0.5}
    second = {"model": {"b": np.zeros(2)}, "epoch": 3, "opt": [np.ones(1), 2]}
    a, b = vs.save_state(tmp_path / "a", first), vs.save_state(tmp_path / "b", second)
    plain = vs.save(tmp_path / "c", {"v": np.ones(1)})
    state = vs.load_state(vs.merge(tmp_path / "out", [a, b, plain]))
    assert [*state] == ["model", "epoch", "lr", "opt", "v"]
    assert ([*state["model"]], state["lr"], state["opt"][1]) == (["w", "k", "b"], 0.5, 2)
    last = vs.save_state(tmp_path / "d", {"model": {"w": np.zeros(5)}, "epoch": 4})
    with pytest.raises(VariableMismatch, match="model/w"):
        vs.merge(tmp_path / "no", [a, last])
    with pytest.raises(VariableMismatch, match=r"'epoch'.*3 and 4"):
        vs.merge(tmp_path / "no", [b, last])
    state = vs.load_state(vs.merge(tmp_path / "won", [a, b, last], last_wins=True))
    assert (state["epoch"], state["model"]["w"].shape, state["model"]["k"]) == (4, (5,), 1)
    row = vs.save_state(tmp_path / "row", [np.ones(1), 7])
    assert vs.merge(tmp_path / "rows", [a, row]).left_out == (
        f"nested state of {a.path}",
        f"nested state of {row.path}",
    )


def test_attached_files_are_kept_unless_their_names_collide(tmp_path):
    a = vs.save(tmp_path / "a", {"w": np.ones(1)}, files={"same": b"1", "other": b"1", "only": b"1"})
    b = vs.save(tmp_path / "b", {"only/v": np.ones(1)}, files={"same": b"1", "other": b"2"})
    made = vs.merge(tmp_path / "out", [a, b])
    assert [*made.files] == ["same"]
    assert sorted(made.left_out) == ["file only", "file other"]
    assert os.path.samefile(made.files["same"].path, b.files["same"].path)
    assert vs.merge(tmp_path / "last", [a, b], last_wins=True).files["other"].read() == b"2"


@pytest.mark.parametrize("average", [False, True])
def test_what_is_shared_costs_no_bytes(tmp_path, monkeypatch, average):
    """Of 24 MiB in each of two, nothing is read and little is written."""
    values = {f"v{at}": np.full(3 << 20, at, np.float32) for at in range(2)}
    a = vs.save(tmp_path / "a", values, durable=False)
    b = vs.save(tmp_path / "b", a, durable=False) if average else vs.save(tmp_path / "b", {"x": np.ones(2)})
    read = []
    real = syscalls.preadv
    monkeypatch.setattr(syscalls, "preadv", lambda *given: read.append(real(*given)) or read[-1])
    made = vs.merge(tmp_path / "out", [a, b], average=average)
    assert sum(read) < 10_000
    written = sum(file.stat().st_size for file in (tmp_path / "out").rglob("*") if file.stat().st_nlink == 1)
    assert written < 10_000
    assert is_one_file(made["v1"], a["v1"])


def test_verify_refuses_damage_before_anything_is_written(tmp_path, sources):
    a, b = sources
    path = os.path.join(a["conv/w"].path, "out")
    os.chmod(path, 0o644)
    with open(path, "r+b") as file:
        file.write(b"\x01")
    with pytest.raises(DigestMismatch, match="conv/w"):
        vs.merge(tmp_path / "out", [a, b], verify=True)
    assert not (tmp_path / "out").exists()
    assert vs.merge(tmp_path / "part", [a, b], exclude="conv/*", verify=True).names == ("fc/w", "head/w")
    with pytest.raises(DigestMismatch, match="conv/w"):
        vs.merge(tmp_path / "out", [a, {**a, "conv/w": np.zeros((3, 3))}], average=True)


FLOATS = st.floats(-1000, 1000, width=16)


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from([np.float32, ml_dtypes.bfloat16, np.float64, np.float16, np.complex64]),
    st.integers(1, 3).flatmap(lambda n: st.lists(hnp.arrays(np.float32, 4, elements=FLOATS), min_size=n, max_size=n)),
    st.data(),
)
def test_means_are_those_of_numpy(tmp_path_factory, dtype, values, data):
    weights = data.draw(st.none() | st.lists(st.floats(0.5, 9), min_size=len(values), max_size=len(values)))
    arrays = [array.astype(dtype) for array in values]
    expected = np.average([array.astype(np.complex128) for array in arrays], axis=0, weights=weights)
    folder = tmp_path_factory.mktemp("soup")
    found = vs.merge(folder / "out", [{"v": array} for array in arrays], average=True, weights=weights)["v"]
    assert found.dtype == np.dtype(dtype)
    tolerance = 2.0**-7 if np.dtype(dtype).itemsize == 2 else 1e-5
    assert np.allclose(found.numpy().astype(np.complex128), expected, rtol=tolerance, atol=1000 * tolerance * 2.0**-8)


def test_means_of_all_kinds(tmp_path):
    big = np.random.default_rng(0).normal(size=(3 << 19,)).astype(np.float32)
    more = big * 3
    first = {"i": np.array([1, 2, 2**40]), "b": np.array([True, False]), "f": big, "tied": big}
    second = {"i": np.array([2, 4, 2**40]), "b": np.array([True, False]), "f": more, "tied": more}
    a = vs.save_state(tmp_path / "a", {"m": first, "epoch": 1}, durable=False)
    b = vs.save_state(tmp_path / "b", {"m": second, "epoch": 2}, durable=False)
    made = vs.merge(tmp_path / "out", [a, b], average=True)
    assert made["m/i"].numpy().tolist() == [2, 3, 2**40]
    assert made["m/b"].numpy().tolist() == [True, False]
    assert np.array_equal(made["m/f"].numpy(), big * np.float32(0.5) + more * np.float32(0.5))
    assert made["m/tied"].entry.alias_of == "m/f"
    assert vs.load_state(made)["epoch"] == 1
    vs.save(tmp_path / "c", {**vs.load(b), "m/b": np.array([False, False])})
    with pytest.raises(VariableMismatch, match="booleans"):
        vs.merge(tmp_path / "no", [a, tmp_path / "c"], average=True)
    with pytest.raises(VariableMismatch, match="not in all sources"):
        vs.merge(tmp_path / "no", [a, {"m/i": np.ones(3)}], average=True)
    with pytest.raises(VariableMismatch, match="different shapes"):
        vs.merge(tmp_path / "no", [{"x": np.ones(3)}, {"x": np.ones(2)}], average=True)
    assert vs.merge(tmp_path / "some", [a, {"m/i": np.ones(3)}], average=True, include="m/i").names == ("m/i",)
    for weights in ([1], [1, -1], [1, math.nan], "ab", 3):
        with pytest.raises(UsageError, match="weights"):
            vs.merge(tmp_path / "no", [a, b], average=True, weights=weights)
    with pytest.raises(UsageError, match="average=True"):
        vs.merge(tmp_path / "no", [a, b], weights=[1, 1])
    assert not (tmp_path / "no").exists()


def test_the_latest_step_stands_for_a_run(tmp_path):
    manager = vs.CheckpointManager(tmp_path / "run")
    for step in (1, 2):
        manager.save(step, {"w": np.full(2, step)}).wait()
    made = vs.merge(tmp_path / "out", tmp_path / "run")
    assert made["w"].numpy().tolist() == [2, 2]
    assert vs.stats(tmp_path / "run")["w"].max == 2
    assert vs.diff(tmp_path / "run", tmp_path / "run" / "step-2")
    assert vs.merge(tmp_path / "out", [tmp_path / "out", {"v": np.ones(1)}], overwrite=True).names == ("w", "v")


def test_the_command(tmp_path, sources):
    a, b = sources
    result = run("merge", tmp_path / "out", a.path, b.path)
    assert result.exit_code == 0
    assert result.output == f"{tmp_path}/out: 3 variables of 2 sources, 112 B\nleft out: attribute n\n"
    assert run("merge", tmp_path / "out", a.path).exit_code == 3
    result = run("merge", tmp_path / "again", a.path, a.path)
    assert result.exit_code == 3
    assert "--last-wins" in result.output
    arguments = ("merge", tmp_path / "soup", a.path, a.path, "--average", "--weights", "1,3", "--include", "conv/*")
    assert run(*arguments, "--rename", "conv=stem", "--verify").exit_code == 0
    assert vs.open(tmp_path / "soup").names == ("stem/w",)
    assert run("merge", tmp_path / "x", a.path, "--average", "--weights", "one").exit_code == 2
    assert run("merge", tmp_path / "x").exit_code == 2
