"""`varstore.stats` beside numpy: exact counts and extremes, float64 sums, quantiles within their bound, every type."""

import json
import math
import os
import pickle
import subprocess
import sys
import time

import ml_dtypes
import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import example, given, settings, strategies as st
from hypothesis.extra import numpy as hnp

import varstore as vs
from varstore.cli import main
from varstore.inspection import moments
from varstore.layout.dtypes import TABLE

SCALARS = sorted({row.dtype for row in TABLE if row.dtype is not None}, key=lambda dtype: dtype.name)
MARKED = {
    "nan": np.array([1, np.nan, 2]),
    "inf": np.array([1, -np.inf, 2], np.float32),
    "zero": np.zeros((3, 2)),
    "constant": np.full(4, 7),
    "dead": np.array([[1, 2], [0, 0], [3, 0], [0, 0]], np.float16),
    "first": np.arange(5.0),
    "second": np.arange(5.0),
    "scalar": np.zeros(()),
    "empty": np.zeros((0, 3)),
}


def run(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments], prog_name="varstore")


def as_numbers(values):
    """Return what numpy itself can compare and add, for any type, without the code under test."""
    if values.dtype.kind == "c":
        return np.abs(values.astype(np.complex128))
    if values.dtype.kind in "iu" or values.dtype.name in ("int64", "uint64"):
        return values
    return values.astype(np.float64)


def check(found, values):
    """Compare a record with what numpy says of the values."""
    numbers = as_numbers(values)
    kept = numbers[np.isfinite(numbers)]
    floats = kept.astype(np.float64)
    assert found.count == values.size
    assert found.zeros == np.count_nonzero(numbers == 0)
    assert found.nan == np.count_nonzero(np.isnan(numbers) | np.isnan(values.astype(np.complex128)))
    assert found.inf == np.count_nonzero(np.isinf(numbers))
    assert found.ok == (not found.nan and not found.inf)
    if not kept.size:
        assert (found.min, found.max, found.mean, found.std, found.norm) == (None,) * 5
        assert not found.quantiles
        return
    assert (found.min, found.max) == (kept.min(), kept.max())
    largest = np.abs(floats).max()
    scale = 2.0 ** min(-np.frexp(largest)[1], 1000) if largest else 1.0  # numpy squares what it is given
    for value, expected in (
        (found.mean, (floats * scale).mean()),
        (found.std, (floats * scale).std()),
        (found.norm, np.linalg.norm(floats * scale)),
    ):
        assert math.isclose(value * scale, expected, rel_tol=1e-12, abs_tol=1e-12 * largest * scale)
    for at, value in found.quantiles.items():
        assert abs(value - np.quantile(floats, at)) <= found.quantile_error


def values_of(dtype):
    """Return a strategy of arrays of a type, from bits or from numbers."""
    shapes = hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=5)
    bits = hnp.arrays(np.dtype(f"u{dtype.itemsize}"), shapes) if dtype.itemsize <= 2 and dtype.kind != "b" else None
    if bits is None:
        return hnp.arrays(dtype, shapes, elements=_elements(dtype))
    kept = {"int4": 15, "uint4": 15, "int2": 3, "uint2": 3, "float4_e2m1fn": 15}
    narrow = 63 if dtype.name.startswith("float6") else kept.get(dtype.name, 0)
    return bits.map(lambda array: (array & narrow if narrow else array).astype(array.dtype).view(dtype))


def _elements(dtype):
    width = 8 * dtype.itemsize // (2 if dtype.kind == "c" else 1)
    if dtype.kind not in "fc":
        return hnp.from_dtype(dtype)
    most = 2.0**100
    part = st.floats(-most, most, width=width) | st.sampled_from([0.0, -0.0, math.nan, math.inf, -math.inf])
    return part if dtype.kind == "f" else st.builds(complex, part, part)


@pytest.mark.parametrize("dtype", SCALARS, ids=lambda dtype: dtype.name)
def test_every_type_has_the_statistics_that_numpy_finds(dtype):
    @settings(max_examples=40, deadline=None)
    @given(values_of(dtype))
    def compared(values):
        with np.errstate(all="ignore"):
            check(vs.stats({"v": values}, threads=1)["v"], values)

    compared()


@settings(deadline=None)
@given(hnp.arrays(np.float64, st.integers(1, 30), elements=st.floats(allow_nan=False, allow_infinity=False)))
@example(np.array([5e-324, 0.0]))
@example(np.array([1.7e308, -1.7e308, 1.7e308]))
@example(np.array([1e200, 1e-200]))
def test_no_magnitude_overflows_or_vanishes(values):
    found = vs.stats({"v": values}, threads=1)["v"]
    exact = values.astype(np.longdouble)
    largest = float(np.abs(values).max())
    for value, expected in (
        (found.mean, exact.mean()),
        (found.std, np.sqrt(np.square(exact - exact.mean()).mean())),
        (found.norm, np.sqrt(np.square(exact).sum())),
    ):
        if abs(expected) < 0.999 * np.finfo(np.float64).max:
            assert abs(value - expected) <= np.longdouble(largest) * 1e-12 + 5e-324
    middle = float(np.median(exact))
    assert abs(np.longdouble(found.quantiles[0.5]) - middle) <= np.longdouble(found.quantile_error) + 5e-324
    json.dumps(found.as_json(), allow_nan=False)


def test_integers_keep_all_their_digits():
    found = vs.stats({"v": np.array([2**63 - 1, -(2**63), 5])})["v"]
    assert (found.min, found.max) == (-(2**63), 2**63 - 1)
    assert vs.stats({"v": np.array([2**64 - 1, 1], np.uint64)})["v"].max == 2**64 - 1


@pytest.mark.parametrize("shape", [(3 << 20,), (1 << 20, 3), (3, 1 << 20), (2, 3, 1 << 19), (1, 3 << 20)], ids=str)
@pytest.mark.parametrize("threads", [1, 3])
def test_pieces_together_have_the_statistics_of_the_whole(tmp_path, shape, threads):
    values = np.random.default_rng(1).normal(3.0, 2.0, shape).astype(np.float32)
    if shape[0] > 1 and len(shape) > 1:
        values[0] = 0
    values.reshape(-1)[-3:] = np.nan, np.inf, -np.inf
    checkpoint = vs.save(tmp_path / "c", {"v": values, "again": values + 0}, durable=False)
    done = []
    report = vs.stats(checkpoint, threads=threads, progress=lambda *given: done.append(given))
    check(report["v"], values)
    assert report["v"].dead_rows == (1 if shape[0] > 1 and len(shape) > 1 else 0)
    assert report["again"].duplicate_of == "v"
    assert max(done) == (4 * values.nbytes, 4 * values.nbytes)
    assert report["v"].mean == vs.stats({"v": values}, quantiles=False)["v"].mean  # the same in each order of pieces


def test_pieces_of_different_magnitudes_are_one():
    parts = [np.array([1e-300, 2e-300]), np.array([1e300, 3e300]), np.zeros(2), np.array([1.0])]
    for whole in (parts, parts[::-1], parts[:1] + parts[2:3]):
        found = moments.merged([moments.piece_of(part) for part in whole]).moments.unscaled()
        exact = np.concatenate(whole).astype(np.longdouble)
        expected = exact.mean(), np.sqrt(np.square(exact - exact.mean()).mean()), np.sqrt(np.square(exact).sum())
        np.testing.assert_allclose(np.array(found), np.array(expected, np.float64), rtol=1e-12)


@pytest.mark.parametrize("suffix", [".npz", ".safetensors", "", ".zarr"])
def test_every_path_that_read_opens_is_a_source(tmp_path, suffix):
    path = tmp_path / f"model{suffix}"
    vs.write(path, {"w": np.arange(6.0).reshape(2, 3), "b": np.ones(2, np.float32)})
    for source in (path, vs.read(path)):
        report = vs.stats(source)
        assert {name: (found.max, found.shape) for name, found in report.items()} == {
            "w": (5.0, (2, 3)),
            "b": (1.0, (2,)),
        }
    assert [*vs.stats(path, include="w")] == [*vs.stats(path, exclude="b")] == ["w"]


def test_a_big_endian_or_transposed_array_is_read_by_its_values():
    values = np.arange(12.0).reshape(3, 4)
    report = vs.stats({"a": values, "b": values.astype(">f8"), "c": np.asfortranarray(values), "d": values.T})
    for name in "abcd":
        check(report[name], values.T if name == "d" else values)
    assert (report["b"].duplicate_of, report["c"].duplicate_of, report["d"].duplicate_of) == ("a", "a", None)


def test_marks_are_what_somebody_should_look_at(tmp_path):
    for source in (MARKED, vs.save(tmp_path / "c", MARKED, durable=False)):
        report = vs.stats(source)
        marks = {name: found.marks for name, found in report.items() if found.marks}
        assert marks == {
            "nan": ("nan",),
            "inf": ("inf",),
            "zero": ("zero", "constant", "dead"),
            "constant": ("constant",),
            "dead": ("dead",),
            "second": ("duplicate",),
        }
        assert (report["dead"].dead_rows, report["second"].duplicate_of) == (2, "first")
        assert not report
        assert not report.ok
        assert not report["nan"]
        assert report["dead"]


def test_what_is_one_array_or_one_file_is_not_a_duplicate(tmp_path):
    values = np.arange(7.0)
    assert vs.stats({"a": values, "b": values})["b"].duplicate_of is None
    checkpoint = vs.save(tmp_path / "tied", {"a": values, "b": values}, durable=False)
    assert vs.stats(checkpoint)["b"].duplicate_of is None
    linked = vs.save(tmp_path / "c", {"a": values, "b": values.copy()}, durable=False).path
    assert vs.stats(linked)["b"].duplicate_of == "a"
    os.unlink(os.path.join(linked, "b", "out"))
    os.link(os.path.join(linked, "a", "out"), os.path.join(linked, "b", "out"))
    assert vs.stats(linked)["b"].duplicate_of is None


def test_what_is_not_numbers_is_left_out_and_named(tmp_path):
    np.savez(tmp_path / "m.npz", w=np.ones(2), words=np.array(["a", "b"]))
    report = vs.stats(tmp_path / "m.npz")
    assert [*report] == ["w"]
    assert [*report.left_out] == ["words"]
    assert "words: " in str(report)


def test_a_source_that_is_none_is_refused(tmp_path):
    with pytest.raises(vs.errors.CheckpointNotFound):
        vs.stats(tmp_path / "nothing")
    with pytest.raises(vs.errors.UsageError):
        vs.stats({"a": "text"})
    with pytest.raises(vs.errors.UsageError):
        vs.stats({1: np.ones(2)})
    with pytest.raises(vs.errors.VariableNotFound):
        vs.stats({"a": np.ones(2)}, include="b")


def test_a_report_is_short_in_a_repl_and_a_row_per_variable_when_printed():
    report = vs.stats({f"layer\n{at}": np.full(2, at) for at in range(300)})
    assert repr(report) == "<StatsReport: 300 variables, no nan or inf>"
    assert len(str(report).splitlines()) == 302
    assert report._repr_html_().count("<tr>") == 101
    assert "200 more variables" in report._repr_html_()
    assert pickle.loads(pickle.dumps(report)) == report
    assert bool(vs.stats({}))


def test_memory_is_bounded(tmp_path):
    vs.save(tmp_path / "c", {"one_row": np.ones((1, 32 << 20), np.float32)}, durable=False)
    code = (
        "import resource, sys; import varstore as vs; vs.stats({})\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "print(vs.stats(sys.argv[1], threads=2)['one_row'].count)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "c")]
    count, more = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout.split()
    assert int(count) == 32 << 20
    assert int(more) < 48 << 10, f"{more} KiB more for 128 MiB of values"


@pytest.mark.parametrize(
    ("count", "size", "least"), [(4, 4 << 20, 0.25), (1000, 1 << 10, 0.12)], ids=["large", "small"]
)
def test_statistics_take_little_more_work_than_a_load(tmp_path, count, size, least):
    """In seconds of the processor, which other work on the machine changes little; about half of what is measured."""
    values = {f"v{at}": np.full(size, 1 + at, np.float32) for at in range(count)}
    checkpoint = vs.save(tmp_path / "c", values, durable=False)

    def work(verb):
        start = time.process_time()
        verb(checkpoint)
        return time.process_time() - start

    ratios = [work(vs.load) / work(lambda source: vs.stats(source, quantiles=False)) for _ in range(5)]
    assert max(ratios) > least


# the command


def test_the_command_has_a_row_per_variable_and_fails_for_nan_and_inf(tmp_path):
    path = vs.save(tmp_path / "c", MARKED, durable=False).path
    result = run("stats", path)
    assert result.exit_code == 1
    lines = result.output.splitlines()
    assert lines[0] == f"{path}: 9 variables, nan or inf in 2"
    assert [line.split()[0] for line in lines[1:]] == ["name", *vs.open(path).names]
    assert any(line.split()[0] == "dead" and line.endswith("2 dead rows") for line in lines)
    assert any(line.split()[0] == "second" and line.endswith("the same as first") for line in lines)
    assert run("stats", path, "zero", "constant").exit_code == 0


@pytest.mark.parametrize("mark", ["zero", "constant", "dead", "duplicate"])
def test_other_marks_fail_if_they_are_asked_for(tmp_path, mark):
    names = ("first", "scalar", mark if mark != "duplicate" else "second")
    path = vs.save(tmp_path / "c", {name: MARKED[name] for name in names}, durable=False).path
    assert run("stats", path).exit_code == 0
    assert run("stats", path, "--fail-on", mark).exit_code == 1
    assert run("stats", path, "scalar", "--fail-on", mark).exit_code == 0
    assert run("stats", path, "--fail-on", f"{mark},nothing").exit_code == 2


def test_the_command_prints_json_without_infinities(tmp_path):
    path = vs.save(tmp_path / "c", MARKED, durable=False).path
    result = run("stats", path, "--json", "--quantiles")
    found = json.loads(result.output, parse_constant=pytest.fail)
    assert result.exit_code == 1
    assert found["ok"] is False
    assert found["variables"]["nan"]["max"] == 2
    assert found["variables"]["first"]["quantiles"]["0.5"] == pytest.approx(2, abs=1e-3)
    assert json.loads(run("stats", path, "--json").output)["variables"]["first"]["quantiles"] == {}


def test_the_command_takes_files_of_others_and_a_variables_own_folder(tmp_path):
    np.savez(tmp_path / "m.npz", w=np.ones((2, 2), ml_dtypes.bfloat16).astype(np.float32))
    assert "w" in run("stats", tmp_path / "m.npz").output
    path = vs.save(tmp_path / "c", {"a/b": np.ones(2)}, durable=False).path
    result = run("stats", os.path.join(path, "a", "b"))
    assert result.exit_code == 0
    assert "a/b" in result.output
    assert run("stats", tmp_path / "nothing").exit_code == 3
