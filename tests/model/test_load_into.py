"""Loading into arrays that exist: in place, whatever their layout, all checked before the first one changes."""

import os

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from hypothesis.extra import numpy as hnp

import varstore as vs
from varstore.errors import (
    DigestMismatch,
    FormatError,
    SizeMismatch,
    UsageError,
    VariableMismatch,
    VariableNotFound,
)

pytestmark = pytest.mark.core

RNG = np.random.default_rng(5)
SOURCE = {
    "w": RNG.random((6, 8)),
    "b": RNG.random(8).astype(np.float32),
    "step": np.int64(41),
    "empty": np.empty((0, 3), np.float32),
    "half": RNG.random((3, 3)).astype(ml_dtypes.bfloat16),
}


@pytest.fixture
def path(tmp_path):
    vs.save(tmp_path / "c", SOURCE, durable=False)
    return tmp_path / "c"


def blank(**changes):
    return {name: np.zeros_like(value) for name, value in SOURCE.items()} | changes


TARGETS = {
    "C": lambda s, t: np.zeros(s, t),
    "Fortran": lambda s, t: np.zeros(s, t, order="F"),
    "strided": lambda s, t: np.zeros((s[0] * 2, *s[1:]), t)[::2],
    "backwards": lambda s, t: np.zeros(s, t)[::-1],
    "column": lambda s, t: np.zeros((*s, 3), t)[..., 1],
    "big-endian": lambda s, t: np.zeros(s, np.dtype(t).newbyteorder(">")),
    "unaligned": lambda s, t: np.zeros(int(np.prod(s)) * np.dtype(t).itemsize + 1, np.uint8)[1:].view(t).reshape(s),
}


@pytest.mark.parametrize("layout", sorted(TARGETS))
def test_any_layout_is_filled_in_place(path, layout):
    target = TARGETS[layout]((6, 8), np.float64)
    around = target.base.copy() if target.base is not None else None
    held = target
    report = vs.load_into({"w": target}, path, include="w")
    assert held is target
    assert np.array_equal(target, SOURCE["w"])
    assert list(report.loaded) == ["w"]
    if layout in ("strided", "column"):  # what lies between is not touched
        outside = np.count_nonzero(target.base) - np.count_nonzero(target)
        assert outside == 0
        assert around is not None


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("layout", ["C", "Fortran", "big-endian"])
def test_large_variables_come_in_several_chunks(tmp_path, layout, threads):
    """Rows of more than the 4 MiB that are in memory at once, and more than one digest block."""
    value = RNG.integers(0, 255, (3, 2, 5 << 20), np.uint8).view(np.int32)
    vs.save(tmp_path / "c", {"v": value}, durable=False)
    target = TARGETS[layout](value.shape, np.int32)
    vs.load_into({"v": target}, tmp_path / "c", threads=threads)
    assert np.array_equal(target, value)


def test_everything_at_once_and_its_report(path):
    targets = blank(extra=np.full(2, 7.0))
    report = vs.load_into(targets, path)
    for name, value in SOURCE.items():
        assert np.array_equal(targets[name], value), name
    assert targets["extra"].tolist() == [7, 7]
    assert set(report.loaded) == set(SOURCE)
    assert tuple(report.kept) == ("extra",)
    report = vs.load_into({"w": np.zeros((6, 8))}, path)
    assert set(report.unused) == set(SOURCE) - {"w"}


def test_sources_may_be_mappings_checkpoints_and_variables(path):
    opened = vs.open(path)
    for source in (opened, opened.select(), dict(SOURCE), {**SOURCE, "w": opened["w"]}, str(path)):
        targets = blank()
        vs.load_into(targets, source)
        for name, value in SOURCE.items():
            assert np.array_equal(targets[name], value), name


def test_rename_include_exclude(path):
    target = {"net/w": np.zeros((6, 8)), "net/b": np.zeros(8, np.float32)}
    vs.load_into(target, path, include=["w", "b"], rename=lambda name: "net/" + name)
    assert np.array_equal(target["net/w"], SOURCE["w"])
    with pytest.raises(VariableNotFound, match="nothing"):
        vs.load_into(target, path, include="nothing*")
    with pytest.raises(UsageError):
        vs.load_into({"x": np.zeros(8)}, path, rename=lambda name: "x")


def refused(error, targets, source, says, **options):
    before = {name: value.copy() for name, value in targets.items()}
    with pytest.raises(error, match=says) as caught:
        vs.load_into(targets, source, **options)
    for name, value in targets.items():
        assert np.array_equal(value, before[name], equal_nan=value.dtype.kind == "f"), name
    return str(caught.value)


def test_nothing_changes_where_anything_is_refused(path):
    message = refused(VariableMismatch, blank(b=np.zeros(9, np.float32), w=np.zeros((8, 6))), path, "shape")
    assert "'b'" in message and "'w'" in message and "(6, 8)" in message and "(8, 6)" in message  # noqa: PT018
    refused(VariableMismatch, blank(w=np.zeros((6, 8), np.float32)), path, "float64")
    refused(VariableMismatch, blank(w=np.zeros((6, 8), np.int64)), path, "float64", cast=True)
    refused(VariableMismatch, blank(w=np.zeros((2, 3, 8))), path, "w", on_mismatch="overlap")
    refused(UsageError, blank(), path, "on_mismatch", on_mismatch="ignore")
    read_only = np.zeros((6, 8))
    read_only.flags.writeable = False
    refused(UsageError, blank(w=read_only), path, "read-only")
    with pytest.raises(UsageError, match="list"):
        vs.load_into({"w": [1, 2]}, path)


@pytest.mark.parametrize("layout", ["C", "Fortran"])
def test_a_file_of_the_wrong_size_is_refused_before_any_change(path, layout):
    with open(path / "half" / "out", "rb") as file:
        data = file.read()
    (path / "half" / "out").unlink()
    (path / "half" / "out").write_bytes(data[:-1])
    refused(SizeMismatch, blank(w=TARGETS[layout]((6, 8), np.float64)), path, "17 bytes")
    (path / "half" / "out").unlink()
    refused(FormatError, blank(), path, "missing")


@pytest.mark.parametrize("how", ["gone", "a pipe", "a folder", "a link that leads out"])
@pytest.mark.parametrize("layout", ["C", "Fortran"])
def test_files_of_all_checkpoints_are_looked_at_before_any_change(path, tmp_path, layout, how):
    other = vs.save(tmp_path / "other", {"last": np.ones(3), "more": np.ones(3)}, durable=False)
    out = tmp_path / "other" / "more" / "out"
    out.unlink()
    if how == "a pipe":
        os.mkfifo(out)
    elif how == "a folder":
        out.mkdir()
    elif how == "a link that leads out":
        out.symlink_to(path / "b" / "out")
    targets = blank(w=TARGETS[layout]((6, 8), np.float64), last=np.zeros(3), more=np.zeros(3))
    refused(FormatError, targets, {**vs.open(path), **other}, "'more'|more/out")


@pytest.mark.parametrize("layout", ["C", "Fortran"])
def test_damage_is_noticed_unless_asked_not_to(path, layout):
    out = path / "w" / "out"
    data = bytearray(out.read_bytes())
    data[13] ^= 4
    out.unlink()
    out.write_bytes(data)
    target = TARGETS[layout]((6, 8), np.float64)
    with pytest.raises(DigestMismatch, match="'w'"):
        vs.load_into({"w": target}, path)
    vs.load_into({"w": target}, path, verify=False)
    assert np.array_equal(target.reshape(-1), np.frombuffer(bytes(data), "<f8"))


def test_skip_leaves_alone_what_differs(path):
    targets = blank(b=np.full(9, 3, np.float32))
    report = vs.load_into(targets, path, on_mismatch="skip")
    assert targets["b"].tolist() == [3] * 9
    assert "'b'" in repr(report.mismatched)
    assert np.array_equal(targets["w"], SOURCE["w"])


@settings(max_examples=60, deadline=None)
@given(
    source=hnp.array_shapes(min_dims=1, max_dims=3, max_side=5),
    target=hnp.array_shapes(min_dims=1, max_dims=3, max_side=5),
    lazy=st.booleans(),
    layout=st.sampled_from(["C", "Fortran", "big-endian"]),
)
def test_overlap_copies_the_common_corner(tmp_path_factory, source, target, lazy, layout):
    value = np.arange(1, 1 + np.prod(source), dtype=np.int32).reshape(source)
    into = TARGETS[layout](target, np.int32)
    into[...] = -1
    given_source = {"v": value}
    if lazy:
        given_source = vs.save(tmp_path_factory.mktemp("o") / "c", {"v": value}, durable=False)
    if len(source) != len(target):
        refused(VariableMismatch, {"v": into}, given_source, "'v'", on_mismatch="overlap")
        return
    vs.load_into({"v": into}, given_source, on_mismatch="overlap")
    corner = tuple(slice(min(pair)) for pair in zip(source, target, strict=True))
    expected = np.full(target, -1)
    expected[corner] = value[corner]
    assert np.array_equal(into, expected)


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ((3, 5 << 20), (5, (5 << 20) - 7)),
        ((3, 5 << 20), (2, (5 << 20) + 7)),
        ((5 << 20,), (3 << 20,)),
        ((2, 2, 5 << 20), (1, 3, 1 << 20)),
        ((9 << 20, 1), (9 << 20, 2)),
    ],
)
def test_overlap_of_rows_larger_than_a_chunk(tmp_path, source, target):
    value = np.arange(np.prod(source), dtype=np.uint8).reshape(source)
    vs.save(tmp_path / "c", {"v": value}, durable=False)
    into = np.full(target, 200, np.uint8)
    report = vs.load_into({"v": into}, tmp_path / "c", on_mismatch="overlap")
    corner = tuple(slice(min(pair)) for pair in zip(source, target, strict=True))
    expected = np.full(target, 200, np.uint8)
    expected[corner] = value[corner]
    assert np.array_equal(into, expected)
    assert "v" in str(report.overlapped)


@pytest.mark.parametrize(
    ("source", "target"),
    [("f4", "f8"), ("f8", "f4"), ("f4", ml_dtypes.bfloat16), (ml_dtypes.bfloat16, "f4"),
     ("f2", ml_dtypes.float8_e4m3fn), ("i4", "i8"), ("u1", "f4"), (bool, "i4"), ("f4", "c8"), ("i8", "i4"),
     ("f4", ">f8")],
)  # fmt: skip
def test_cast_converts_as_numpy_does(tmp_path, source, target):
    value = np.array([[0, 1, 1], [1, 0, 2]]).astype(source)
    vs.save(tmp_path / "c", {"v": value}, durable=False)
    into = np.zeros((2, 3), target)
    refused(VariableMismatch, {"v": into}, tmp_path / "c", "'v'")
    report = vs.load_into({"v": into}, tmp_path / "c", cast=True)
    assert np.array_equal(into, value.astype(target))
    assert "v" in str(report.cast)


def test_tied_targets_and_tied_sources(tmp_path):
    shared = np.arange(5.0)
    vs.save(tmp_path / "c", {"a": shared, "b": shared}, durable=False)
    into = {"a": np.zeros(5), "b": np.zeros(5)}
    vs.load_into(into, tmp_path / "c")
    assert into["a"].tolist() == into["b"].tolist() == shared.tolist()


def test_progress_counts_all_bytes(path):
    seen = []
    targets = blank(w=np.zeros((6, 8), order="F"))
    vs.load_into(targets, path, progress=lambda done, total: seen.append((done, total)))
    total = sum(np.asarray(value).nbytes for value in SOURCE.values())
    assert seen[0] == (0, total)
    assert seen[-1] == (total, total)
    assert sorted(seen) == seen
