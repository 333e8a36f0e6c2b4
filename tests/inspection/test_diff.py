"""`varstore.diff` beside numpy: what moved and how far, of every type and format; what is one file is not read."""

import json
import math
import os
import pickle
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import example, given, settings, strategies as st

import varstore as vs
from varstore.cli import main
from varstore.errors import UsageError, VariableNotFound
from varstore.layout.dtypes import TABLE
from varstore.storage import syscalls

pytestmark = pytest.mark.core

SCALARS = sorted({row.dtype for row in TABLE if row.dtype is not None}, key=lambda dtype: dtype.name)


def run(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments], prog_name="varstore")


def moved(a, b, **options):
    return vs.diff({"v": a}, {"v": b}, values=True, threads=1, **options).moved.get("v")


def flip(path, at=0):
    """Change a byte of a file that keeps its size and times."""
    before = os.stat(path)
    os.chmod(path, 0o644)
    with open(path, "r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 0x40]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (os.stat(path).st_size, os.stat(path).st_mtime_ns) == (before.st_size, before.st_mtime_ns)


NUMBERS = st.sampled_from([0.0, -0.0, 1.0, -1.5, 3.0, 100.0, 0.01, math.nan, math.inf, -math.inf]) | st.floats(
    -9, 9
).filter(
    lambda number: number == 0 or abs(number) > 1e-150  # the square of a smaller one is lost beside that of 1.0
)


@pytest.mark.parametrize("second", SCALARS, ids=lambda dtype: dtype.name)
def test_every_type_moves_as_far_as_numpy_says(second):
    """Each type beside itself and beside another one."""

    @settings(max_examples=15, deadline=None)
    @given(st.sampled_from([second, np.dtype(np.float32), np.dtype(np.int64)]), st.lists(st.tuples(NUMBERS, NUMBERS)))
    @example(second, [(1.0, 1.0), (1.0, 3.0)])
    @example(second, [])
    def compared(first, pairs):
        with np.errstate(all="ignore"):
            a = np.array([x for x, _ in pairs], np.float64).astype(first)
            b = np.array([y for _, y in pairs], np.float64).astype(second)
            kind = np.clongdouble if "c" in (first.kind, second.kind) else np.longdouble
            x, y = a.astype(kind), b.astype(kind)
        same = (x == y) | (np.isnan(x) & np.isnan(y))
        if first == second:
            width = np.dtype((np.void, first.itemsize))
            same = a.view(width) == b.view(width)
        found = moved(a, b)
        if found is None:
            assert same.all()
            assert first == second
            return
        finite = np.isfinite(x) & np.isfinite(y)
        u, v = x[finite], y[finite]
        assert (found.count, found.changed) == (len(pairs), np.count_nonzero(~same))
        assert found.nonfinite == np.count_nonzero(~same & ~finite)
        assert math.isclose(found.largest, np.abs(v - u).max() if u.size else 0, rel_tol=1e-15, abs_tol=1e-323)
        expected = np.linalg.norm(v - u), np.linalg.norm(u), np.linalg.norm(v)
        assert np.allclose((found.norm, found.norm_a, found.norm_b), expected, rtol=1e-12, atol=1e-323)
        if expected[1] and expected[2]:
            assert math.isclose(found.cosine, np.vdot(u, v).real / expected[1] / expected[2], abs_tol=1e-12)
        else:
            assert found.cosine is None
        json.dumps(found.as_json(), allow_nan=False)

    compared()


def test_numbers_near_the_ends_of_their_types_keep_their_digits():
    assert moved(np.array([2**63 - 1]), np.array([2**63 - 2])).largest == 1
    assert moved(np.array([2**63 - 1]), np.array([2**63 - 1], np.uint64)).changed == 0
    found = moved(np.array([1e300, 1.0]), np.array([2e300, 1.0]))
    assert (found.largest, found.relative) == (1e300, 1.0)
    found = moved(np.array([3e-320, 0.0]), np.array([6e-320, 0.0]))
    assert math.isclose(found.relative, 1.0, rel_tol=1e-3)
    assert moved(np.array([1.7e308]), np.array([-1.7e308])).as_json()["largest"] is None
    assert moved(np.zeros(3), np.ones(3)).relative == math.inf


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(NUMBERS, NUMBERS), min_size=1), st.floats(0, 2), st.floats(0, 2))
def test_a_tolerance_is_that_of_allclose(pairs, rtol, atol):
    a, b = np.array(pairs).T.astype(np.float32)
    wide = a.astype(np.float64), b.astype(np.float64)
    for second in (b, b.astype(np.float64)):
        report = vs.diff({"v": a}, {"v": second}, rtol=rtol, atol=atol)
        assert report.ok == np.allclose(*wide, rtol, atol, equal_nan=True)
        if report.ok and "v" in report.moved:
            assert (report.within, report.moved["v"].beyond) == (("v",), 0)


def test_other_bits_are_other_values_unless_there_is_a_tolerance():
    a, b = {"v": np.array([0.0, math.nan])}, {"v": np.array([-0.0, -math.nan])}
    assert moved(a["v"], b["v"]).changed == 2
    assert not vs.diff(a, b)
    assert vs.diff(a, b, atol=0)
    narrow = {"v": np.array([0.0, math.nan], np.float32)}
    assert vs.diff(a, narrow).changed == {"v": "[2] float64 -> [2] float32"}
    assert vs.diff(a, narrow, rtol=0).unchanged == ("v",)


@pytest.mark.parametrize("value", [-1, math.nan, math.inf, "x", [1]])
def test_a_tolerance_is_a_number_from_0_up(value):
    for name in ("rtol", "atol"):
        with pytest.raises(UsageError, match=name):
            vs.diff({}, {}, **{name: value})


@pytest.mark.parametrize("shape", [(3 << 20,), (3, 1 << 20), (1, 3 << 20)], ids=str)
@pytest.mark.parametrize("threads", [1, 3])
def test_pieces_together_moved_as_far_as_the_whole(tmp_path, shape, threads):
    values = np.random.default_rng(1).normal(3.0, 2.0, shape).astype(np.float32)
    other = values.astype(ml_dtypes.bfloat16)
    other.reshape(-1)[-1] = np.inf
    first = vs.save(tmp_path / "a", {"v": values, "tied": values}, durable=False)
    second = vs.save(tmp_path / "b", {"v": other, "tied": other}, durable=False)
    done = []
    report = vs.diff(first, second, values=True, threads=threads, progress=lambda *given: done.append(given))
    found = report.moved["v"]
    kept = other.reshape(-1)[:-1].astype(np.float64)
    before = values.reshape(-1)[:-1].astype(np.float64)
    assert (found.nonfinite, found.largest) == (1, np.abs(kept - before).max())
    assert math.isclose(found.relative, np.linalg.norm(kept - before) / np.linalg.norm(before), rel_tol=1e-9)
    assert report.moved["tied"] == found
    assert max(done) == (6 * values.size, 6 * values.size)  # once, although the values have two names


@pytest.mark.parametrize("suffix", [".npz", ".safetensors", "", ".zarr", ".pt"])
def test_every_path_that_read_opens_can_be_compared_with_every_other(tmp_path, suffix):
    values = {"w": np.arange(6.0).reshape(2, 3), "b": np.ones(2, np.float32)}
    own = vs.save(tmp_path / "own", values, durable=False)
    vs.write(tmp_path / f"same{suffix}", values)
    vs.write(tmp_path / f"other{suffix}", {**values, "w": values["w"] * 2})
    for how in ({}, {"values": True}, {"atol": 0.5}):
        for same in (tmp_path / f"same{suffix}", vs.read(tmp_path / f"same{suffix}"), values):
            assert vs.diff(own, same, **how).unchanged == ("w", "b")
            assert vs.diff(same, own, **how)
        report = vs.diff(tmp_path / f"same{suffix}", tmp_path / f"other{suffix}", **how)
        assert dict(report.changed) == {"w": "values"}
        assert [*report.moved] == (["w"] if how else [])


def test_of_what_is_linked_nothing_is_read(tmp_path):
    """Of 18 MiB in each, the 1 MiB that is not one file is read, from both."""
    values = {f"v{at}": np.full(3 << 18, at, np.float32) for at in range(6)}
    first = vs.save(tmp_path / "a", values, durable=False)
    values["v3"] = values["v3"][: 1 << 18]
    second = vs.save(tmp_path / "b", values, base=first, durable=False)
    third = vs.save(tmp_path / "c", {**values, "v3": values["v3"] + 1}, base=second, durable=False)

    def read():
        with open("/proc/self/io") as file:
            return int(file.readline().split()[1])

    before = read()
    report = vs.diff(second, third, values=True)
    assert [*report.moved] == ["v3"]
    assert len(report.unchanged) == 5
    assert read() - before < (2 << 20) + 50_000


@pytest.mark.parametrize("manifest", [True, False])
@pytest.mark.parametrize("values", [True, False])
def test_links_are_compared_without_being_opened(tmp_path, monkeypatch, manifest, values):
    plain = {"w": np.ones(3), "v": np.zeros(9), "tied": np.zeros(2)}
    first = vs.save(tmp_path / "a", plain, manifest=manifest)
    second = vs.save(tmp_path / "b", first, manifest=manifest)
    opened = []
    real = syscalls.openat2_beneath
    monkeypatch.setattr(
        syscalls, "openat2_beneath", lambda path, *at, **how: opened.append(path) or real(path, *at, **how)
    )
    assert vs.diff(first, second, values=values)
    assert not [path for path in opened if path.endswith("out")]


@pytest.mark.parametrize("manifest", [True, False])
def test_a_flipped_byte_is_found_by_values(tmp_path, manifest):
    for at, path in enumerate(("a", "b")):
        vs.save(tmp_path / path, {"w": np.ones(3), "large": np.ones(3 << 19)}, manifest=manifest)
        assert at == 0 or vs.diff(tmp_path / "a", tmp_path / "b", values=True)
    flip(tmp_path / "b" / "large" / "out", 8 * (2 << 19) + 7)
    report = vs.diff(tmp_path / "a", tmp_path / "b", values=True)
    assert dict(report.changed) == {"large": "values"}
    assert report.moved["large"].changed == 1
    assert report.damaged == (("large",) if manifest else ())
    assert ("damaged  large: " in str(report)) == manifest
    assert vs.diff(tmp_path / "a", tmp_path / "b").ok == manifest


def test_attached_files_are_read_if_values_are(tmp_path):
    for path in ("a", "b"):
        vs.save(tmp_path / path, {"w": np.ones(3)}, files={"labels.txt": b"cat\ndog\n"})
    flip(tmp_path / "b" / "labels.txt")
    assert vs.diff(tmp_path / "a", tmp_path / "b")
    assert dict(vs.diff(tmp_path / "a", tmp_path / "b", values=True).files) == {"labels.txt": "changed"}


def test_four_bytes_of_each_bfloat16_are_the_values_of_two(tmp_path):
    values = np.array([1.0, 2.5, -3.0], ml_dtypes.bfloat16)
    for path in ("narrow", "wide", "other"):
        vs.save(tmp_path / path, {"w": values}, manifest=False)
    (tmp_path / "wide/w/out").write_bytes(values.astype("<f4").tobytes())
    (tmp_path / "other/w/out").write_bytes((values + 1).astype("<f4").tobytes())
    for how in ({}, {"values": True}):
        assert vs.diff(tmp_path / "narrow", tmp_path / "wide", **how)
        assert not vs.diff(tmp_path / "narrow", tmp_path / "other", **how)


def test_folders_without_meta_are_compared_by_their_bytes(tmp_path):
    for path, values in (("a", np.ones(3)), ("same", np.ones(3)), ("other", np.zeros(3)), ("short", np.ones(2))):
        vs.save(tmp_path / path, {"w": values}, manifest=False)
        (tmp_path / path / "w/meta").unlink()
    for how in ({}, {"values": True}):
        assert vs.diff(tmp_path / "a", tmp_path / "same", **how)
        assert dict(vs.diff(tmp_path / "a", tmp_path / "other", **how).changed) == {"w": "values"}
        assert dict(vs.diff(tmp_path / "a", tmp_path / "short", **how).changed) == {"w": "values"}


def test_text_is_compared_and_objects_are_not(tmp_path):
    for path, word in (("a", "b"), ("b", "c")):
        np.savez(tmp_path / f"{path}.npz", words=np.array(["a", word]), w=np.ones(2))
    np.savez(tmp_path / "o.npz", words=np.array(["a", None]), w=np.ones(2))
    np.savez(tmp_path / "p.npz", words=np.array(["a", None]), w=np.ones(2))
    for how in ({}, {"values": True}):
        assert dict(vs.diff(tmp_path / "a.npz", tmp_path / "b.npz", **how).changed) == {"words": "values"}
        report = vs.diff(tmp_path / "o.npz", tmp_path / "p.npz", **how)
        assert ([*report.left_out], report.ok, report.unchanged) == (["words"], False, ("w",))


STATE = {
    "model": {"w": np.ones(2)},
    "epoch": 3,
    "loss": math.nan,
    "betas": (0.9, 0.99),
    "name": "adam",
    "z": complex(1, math.nan),
}


def test_attributes_and_state_are_compared(tmp_path):
    attributes = {"a": 1, "m": {"loss": 1.5, "ok": True}, "l": [1, [2.0]], "gone": None}
    first = vs.save_state(tmp_path / "a", STATE, attributes=attributes)
    assert vs.diff(first, vs.save_state(tmp_path / "same", STATE, attributes=attributes))
    state = {**STATE, "epoch": 4, "betas": (0.9, 0.999), "new": "x" * 1000}
    attributes = {"a": 1.0, "m": {"loss": 2, "ok": 1}, "l": [1, [2]]}
    second = vs.save_state(tmp_path / "b", state, attributes=attributes)
    report = vs.diff(first, second)
    assert not report.changed
    assert dict(report.attributes) == {"m/loss": "1.5 -> 2", "m/ok": "True -> 1", "gone": "None -> absent"}
    assert report.state["epoch"] == "3 -> 4"
    assert [*report.state] == ["epoch", "betas/1", "new"]
    assert len(report.state["new"]) < 100
    vs.write(tmp_path / "m.pt", {key: value for key, value in STATE.items() if key != "z"})
    assert dict(vs.diff(first, tmp_path / "m.pt").state) == {"z": "(1+nanj) -> absent"}
    assert dict(vs.diff(first, second, include=["model/*", "epoch"][:1]).state) == {}
    third = vs.save(tmp_path / "c", {"w": np.ones(2)}, variable_attributes={"w": {"unit": "m"}})
    fourth = vs.save(tmp_path / "d", {"w": np.ones(2)}, base=third, variable_attributes={"w": {"unit": "s"}})
    assert vs.diff(third, fourth).as_json()["variable_attributes"] == {"w": {"unit": "'m' -> 's'"}}
    assert "attribute unit of w: 'm' -> 's'" in str(vs.diff(third, fourth))


def test_only_what_is_asked_for_is_compared(tmp_path):
    first, second = {"a": np.ones(2), "b": np.ones(2)}, {"a": np.ones(2), "b": np.zeros(2), "c": np.ones(1)}
    assert vs.diff(first, second, include="a")
    assert vs.diff(first, second, exclude=["b", "c"])
    assert vs.diff(first, second, include="c").added == ("c",)
    with pytest.raises(VariableNotFound):
        vs.diff(first, second, include="d")


def layers(count, by=0.0):
    values = {f"h.{at}.{name}": np.full(3, 1 + at * by) for at in range(count) for name in ("w", "b", "k")}
    return {**values, "wte": np.ones(2), "head.bias": np.ones(2)}


def test_what_moved_most_comes_first_and_many_are_folded_by_block():
    report = vs.diff(layers(20), layers(20, 0.01), values=True)
    assert [*report.moved][:3] == ["h.19.w", "h.19.b", "h.19.k"]
    assert [*report.blocks] == [f"h.{at}" for at in range(19, 0, -1)]
    assert math.isclose(report.blocks["h.19"].relative, 0.19)
    assert math.isclose(report.blocks["h.19"].norm, 0.19 * 3)
    assert (report.blocks["h.19"].count, report.blocks["h.19"].cosine) == (9, 1)
    lines = str(report).splitlines()
    assert lines[0] == "a -> b: 5 unchanged"
    assert lines[3].split() == ["h.19", "3", "100%", "0.19", "0.19", "1"]
    assert len(lines) == 3 + 19
    assert len(report.text(flat=True).splitlines()) == 3 + 57
    assert repr(report) == "<DiffReport '' -> '': 57 changed, 5 unchanged>"
    assert pickle.loads(pickle.dumps(report)) == report
    names = {f"{at}\n": np.ones(1) for at in range(300)}
    assert vs.diff(names, {})._repr_html_().count("<tr>") == 100
    assert len(str(vs.diff(names, {})).splitlines()) == 301


def test_memory_is_bounded(tmp_path):
    for path, value in (("a", 1), ("b", 2)):
        vs.save(tmp_path / path, {"one_row": np.full((1, 32 << 20), value, np.float32)}, durable=False)
    code = (
        "import resource, sys; import varstore as vs; vs.diff({}, {})\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "print(vs.diff(sys.argv[1], sys.argv[2], values=True, threads=2).moved['one_row'].changed)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "a"), str(tmp_path / "b")]
    count, more = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout.split()
    assert int(count) == 32 << 20
    assert int(more) < 64 << 10, f"{more} KiB more for two times 128 MiB of values"


# the command


def test_the_command_prints_how_far_values_moved(tmp_path):
    first = vs.save(tmp_path / "a", {"w": np.array([3.0, 4.0]), "b": np.ones(2)}).path
    vs.write(tmp_path / "b.npz", {"w": np.array([3.0, 4.5]), "b": np.ones(2, np.float32)})
    second = tmp_path / "b.npz"
    result = run("diff", "--values", first, second)
    assert result.exit_code == 1
    assert [line.split() for line in result.output.splitlines()] == [
        [*f"{first} -> {second}: 0 unchanged".split()],
        ["moved,", "most", "first:"],
        ["name", "changed", "largest", "relative", "cosine"],
        ["w", "50%", "0.5", "0.1", "0.99846"],
        ["b", "0%", "0", "0", "1", "[2]", "float64", "->", "[2]", "float32"],
    ]
    assert run("diff", "--rtol", "0.2", first, second).exit_code == 0
    assert run("diff", "--atol", "0.4", first, second).exit_code == 1
    assert run("diff", "--atol", "0.4", first, second, "b").exit_code == 0
    assert run("diff", "--atol", "-1", first, second).exit_code == 2
    assert run("diff", first, tmp_path / "nothing").exit_code == 3
    found = json.loads(run("diff", "--values", "--json", first, second).output)
    assert (found["ok"], found["moved"]["w"]["largest"], found["a"]) == (False, 0.5, first)
    assert run("diff", f"{first}/w", f"{first}/w").exit_code == 0
