"""What a conversion changes or leaves out is in its report: types, values out of range, and what is not an array."""

from __future__ import annotations

import argparse
import collections
import datetime
import math
import pathlib
from collections import Counter, OrderedDict, namedtuple

import ml_dtypes
import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis.extra import numpy as hnp

import varstore as vs
from varstore.cli import main
from varstore.errors import CheckpointExists, UsageError
from varstore.layout.dtypes import TABLE
from varstore.values.casting import cast_values

FLOATING = [row.dtype for row in TABLE if row.dtype is not None and "float" in row.dtype.name]
LARGE = np.array([500, 448, 464, 465, -1e9, np.inf, -np.inf, np.nan, 0], np.float32)
E4M3FN = [448, 448, 448, 448, -448, 448, -448, math.nan, 0]
Point = namedtuple("Point", ["x"])


def test_float8_saturates_where_torch_does(tmp_path):
    vs.write(tmp_path / "m.npz", {"w": LARGE, "b": np.zeros(2, np.float32), "n": np.arange(3)})
    done = vs.convert(tmp_path / "m.npz", tmp_path / "c", dtype="fp8")
    np.testing.assert_array_equal(vs.load(tmp_path / "c")["w"].astype(np.float32), E4M3FN)
    assert done.saturated == {"w": 5}  # 464 is rounded to 448
    assert done.changed == dict.fromkeys("wb", "float32 -> float8_e4m3fn")
    assert done.nbytes == LARGE.size + 2 + 3 * 8


def test_loading_with_a_cast_saturates_and_counts(tmp_path):
    vs.save(tmp_path / "c", {"w": LARGE, "b": np.zeros(2, np.float32)})
    for source in (tmp_path / "c", {"w": LARGE, "b": np.zeros(2, np.float32)}):
        target = {"w": np.zeros(LARGE.shape, ml_dtypes.float8_e4m3fn), "b": np.zeros(2, ml_dtypes.bfloat16)}
        report = vs.load_into(target, source, cast=True)
        np.testing.assert_array_equal(target["w"].astype(np.float32), E4M3FN)
        assert {cast.name: cast.saturated for cast in report.cast} == {"w": 5, "b": 0}
        assert "float32 -> float8_e4m3fn, 5 values out of range" in str(report)


@pytest.mark.parametrize("target", FLOATING, ids=str)
@pytest.mark.parametrize("source", ["float16", "float32", "float64", "bfloat16", "int32", "bool"])
def test_what_a_type_cannot_hold_is_counted(source, target):
    dtype = np.dtype(getattr(ml_dtypes, source, source))
    with np.errstate(over="ignore", invalid="ignore"):
        values = np.arange(-70_000, 70_000, 997) if dtype.kind == "i" else (LARGE * 100).astype(dtype)
    values = values.astype(dtype)
    new, beyond = cast_values(values, target)
    plain, wide = new.astype(np.float64), values.astype(np.float64)
    limit = float(ml_dtypes.finfo(target).max)
    is_lost = (np.isfinite(wide) & ~np.isfinite(plain)) | (
        np.isfinite(wide) & (np.abs(plain) == limit) & (np.abs(wide) > 1.1 * limit)
    )
    assert beyond >= np.count_nonzero(is_lost)
    assert beyond <= np.count_nonzero(is_lost | ~np.isfinite(wide) | (np.abs(wide) > limit))


@given(hnp.arrays(np.float32, hnp.array_shapes(max_side=4)))
def test_a_wider_type_holds_everything(values):
    new, beyond = cast_values(values, np.dtype(np.float64))
    np.testing.assert_array_equal(new, values)
    assert beyond == 0


def test_scales_survive_or_are_left_out(tmp_path):
    vs.save(tmp_path / "c", {"w": np.ones(3, np.float32)}, variable_attributes={"w": {"scale": 0.5, "zero_point": 3}})
    for options in ({}, {"dtype": "float16"}, {"rename": {"w": "v"}}):
        done = vs.convert(tmp_path / "c", tmp_path / "d", overwrite=True, **options)
        (name,) = done.names
        assert vs.open(tmp_path / "d")[name].attributes == {"scale": 0.5, "zero_point": 3}
        assert done.left_out == ()
    for name in ("d.npz", "d.pt", "d.safetensors"):
        assert vs.convert(tmp_path / "c", tmp_path / name).left_out == ("w: scale", "w: zero_point")


def test_what_becomes_a_plain_type_is_listed(tmp_path):
    state = {
        "c": Counter("aab"),
        "p": Point(1),
        "n": np.float32(2),
        "o": OrderedDict(x=[1]),
        "f": frozenset({1}),
        "w": np.ones(2),
    }
    vs.save_state(tmp_path / "s", state)
    assert vs.convert(tmp_path / "s", tmp_path / "t").changed == {}
    assert vs.load_state(tmp_path / "t")["c"] == Counter("aab")
    assert type(vs.load_state(tmp_path / "t")["c"]) is Counter
    done = vs.convert(tmp_path / "s", tmp_path / "s.pt")
    assert done.changed == {
        "c": "Counter -> dict",
        "p": "Point -> tuple",
        "n": "float32 -> float",
        "f": "frozenset -> set",
    }
    assert vs.read(tmp_path / "s.pt").state()["o"] == OrderedDict(x=[1])


def test_the_command_prints_what_changed(tmp_path):
    vs.save(tmp_path / "c", {"w": LARGE, "b": LARGE}, variable_attributes={"w": {"scale": 1}})
    target = tmp_path / "c.safetensors"
    for replaced in ("", ", replaced"):
        result = CliRunner().invoke(main, ["convert", str(tmp_path / "c"), str(target), "--dtype", "fp8"])
        assert result.output.splitlines() == [
            f"{tmp_path / 'c'} (varstore) -> {target} (safetensors){replaced}: 2 tensors, 18 bytes",
            "changed type, float32 -> float8_e4m3fn: w, b",
            "beyond the range of fp8: w (5 values), b (5 values)",
            "left out, because safetensors holds nothing of an array but its values: w: scale",
        ]


def test_a_checkpoint_is_replaced_if_asked(tmp_path):
    vs.save(tmp_path / "old", {"w": np.zeros(1)})
    vs.write(tmp_path / "m.npz", {"w": np.ones(2)})
    arguments = ["convert", str(tmp_path / "m.npz"), str(tmp_path / "old")]
    with pytest.raises(CheckpointExists):
        vs.convert(tmp_path / "m.npz", tmp_path / "old")
    refused = CliRunner().invoke(main, arguments)
    assert (refused.exit_code, "--overwrite" in refused.output) == (3, True)
    result = CliRunner().invoke(main, [*arguments, "--overwrite"])
    assert (result.exit_code, ", replaced: 1 tensor, 16 bytes" in result.output) == (0, True)
    assert vs.load(tmp_path / "old")["w"].tolist() == [1, 1]
    vs.convert(tmp_path / "m.npz", tmp_path / "m.pt", overwrite=True)


NESTED = {"model": {"w": np.ones((2, 3), np.float32), "b": np.zeros(3)}, "epoch": 3}


@pytest.fixture
def source(tmp_path):
    state = {**NESTED, "tied": NESTED["model"]["w"]}
    vs.write(tmp_path / "m.pt", state)
    return tmp_path / "m.pt"


def run(*arguments):
    return CliRunner().invoke(main, ["convert", *map(str, arguments)])


@pytest.mark.parametrize(
    ("target", "nbytes"), [("c", 48), ("c.pt", 48), ("c.mge", 48), ("c.npz", 72), ("c.safetensors", 72)]
)
def test_the_bytes_are_those_that_are_written(source, tmp_path, target, nbytes):
    done = vs.convert(source, tmp_path / target)
    assert done.nbytes == nbytes
    assert vs.convert(tmp_path / target, tmp_path / "again").nbytes == nbytes


def test_packed_values_take_half_a_byte(tmp_path):
    vs.save(tmp_path / "c", {"w": np.ones(8, ml_dtypes.float4_e2m1fn)})
    assert vs.convert(tmp_path / "c", tmp_path / "c.safetensors").nbytes == 4
    assert vs.convert(tmp_path / "c.safetensors", tmp_path / "d").nbytes == 8


def test_the_reasons_for_what_is_left_out_are_true(source, tmp_path):
    assert vs.convert(source, tmp_path / "a.npz").reasons == {"epoch": "numpy holds only arrays"}
    done = vs.convert(source, tmp_path / "a.mge", include="model/*")
    assert done.reasons == {"epoch": "only arrays are taken by chosen names"}
    assert done.left_out == ("epoch",)
    printed = run(source, tmp_path / "b.mge", "--include", "model/*").stdout
    assert "left out, because only arrays are taken by chosen names: epoch" in printed


@pytest.mark.parametrize(
    ("choice", "field"),
    [
        ({"include": ["model/*", "head*"]}, "include"),
        ({"exclude": "optimizer*"}, "exclude"),
        ({"rename": {"module": ""}}, "rename"),
        ({"rename": {"model": "m", "models": ""}}, "rename"),
        ({"rename": [("^module", "")]}, "rename"),
        ({"include": "tied", "rename": {"model": ""}}, "rename"),
    ],
)
def test_what_matches_nothing_is_an_error(source, tmp_path, choice, field):
    with pytest.raises(vs.errors.VariableNotFound) as caught:
        vs.convert(source, tmp_path / "c", **choice)
    assert caught.value.field == field
    assert not (tmp_path / "c").exists()
    vs.load(source, exclude="optimizer*", rename={"module": ""})  # elsewhere, one rule serves many files


def test_directories_are_replaced_where_that_is_asked_for(source, tmp_path):
    target = tmp_path / "resnet-1.5"
    assert ", replaced" not in run(source, target).stdout
    refused = run(source, target)
    assert refused.exit_code == 3
    assert "--overwrite" in refused.stderr
    done = run(source, target, "--overwrite", "--include", "tied")
    assert "(varstore), replaced: 1 tensor, 24 bytes" in done.stdout
    assert list(vs.open(target)) == ["tied"]
    run(source, tmp_path / "a.npz")
    assert "(numpy), replaced: 3 tensors" in run(source, tmp_path / "a.npz").stdout


@pytest.mark.parametrize("name", ["llama-3.1-8b", "run.v2", "v1.0", "with.dot/", "1e-3.5"])
def test_directories_may_have_dots_in_their_names(source, tmp_path, name):
    assert vs.convert(source, f"{tmp_path}/{name}").format == "varstore"
    assert vs.convert(source, f"{tmp_path}/{name.rstrip('/')}", overwrite=True).format == "varstore"
    assert vs.convert(f"{tmp_path}/{name}", tmp_path / "back.pt").source_format == "varstore"


@pytest.mark.parametrize(
    ("dtype", "name"),
    [("bf16", "bfloat16"), ("fp16", "float16"), ("fp8", "float8_e4m3fn"), ("fp8_e5m2", "float8_e5m2")],
)
def test_short_names_of_types(source, tmp_path, dtype, name):
    assert run(source, tmp_path / "c", "--dtype", dtype).exit_code == 0
    assert {str(variable.dtype) for variable in vs.open(tmp_path / "c").values()} == {name}


@pytest.mark.parametrize("target", ["c", "c.pt", "c.npz", "c.zarr", "c.safetensors.index.json", "c.ckpt", "c.of"])
def test_a_dry_run_says_what_would_be_done(source, tmp_path, target):
    before = sorted(tmp_path.rglob("*"))
    there = vs.convert(source, tmp_path / target, dtype="fp32", dry_run=True)
    assert sorted(tmp_path.rglob("*")) == before
    assert vs.convert(source, tmp_path / target, dtype="fp32") == there
    printed = run(source, tmp_path / target, "--dry-run", "--overwrite").stdout
    assert ", replaced, not written: 3 tensors" in printed


def test_a_dry_run_refuses_what_the_conversion_would(source, tmp_path):
    vs.save(tmp_path / "c", {"w": np.ones(3, ml_dtypes.bfloat16)})
    with pytest.raises(vs.errors.UnsupportedDtype):
        vs.convert(tmp_path / "c", tmp_path / "c.npz", dry_run=True)
    with pytest.raises(CheckpointExists):
        vs.convert(source, tmp_path / "c", dry_run=True)
    assert vs.convert(source, tmp_path / "c", dry_run=True, overwrite=True).names == ("model/w", "model/b", "tied")
    assert list(vs.open(tmp_path / "c")) == ["w"]
    vs.convert(tmp_path / "c", tmp_path / "linked", dry_run=True)
    assert not (tmp_path / "linked").exists()


def test_what_training_scripts_hold_becomes_plain_in_other_formats(tmp_path):
    state = {
        "args": argparse.Namespace(lr=0.5, out=pathlib.Path("a/b"), w=np.ones(2)),
        "last": collections.deque([1, np.zeros(2)], 3),
        "when": datetime.datetime(2026, 1, 2),
        "took": datetime.timedelta(seconds=3),
        "seen": collections.defaultdict(list, {pathlib.Path("a"): [1]}),
        "losses": [0.5] * 2000,
        "bytes": bytearray(b"x"),
    }
    vs.save_state(tmp_path / "c", state)
    done = vs.convert(tmp_path / "c", tmp_path / "c.pt")
    back = vs.read(tmp_path / "c.pt").state()
    assert repr(back.pop("losses")) == repr(np.full(2000, 0.5))
    assert repr(back) == repr(
        {
            "args": {"lr": 0.5, "out": "a/b", "w": np.ones(2)},
            "last": [1, np.zeros(2)],
            "when": "2026-01-02T00:00:00",
            "took": 3.0,
            "seen": {"a": [1]},
            "bytes": b"x",
        }
    )
    assert done.changed == {
        "args": "SimpleNamespace -> dict",
        "args/out": "PosixPath -> str",
        "last": "deque -> list",
        "when": "datetime -> str",
        "took": "timedelta -> float",
        "seen": "defaultdict -> dict",
        "bytes": "bytearray -> bytes",
    }
    arrays = vs.convert(tmp_path / "c", tmp_path / "c.npz")
    assert sorted(arrays.names) == ["args/w", "last/1", "losses"]


def test_a_bare_tensor_converts_between_formats_of_nested_state(tmp_path):
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    vs.write(tmp_path / "bare.pt", values)
    vs.convert(tmp_path / "bare.pt", tmp_path / "bare.mge")
    vs.save_state(tmp_path / "d", values)
    vs.convert(tmp_path / "d", tmp_path / "again.pt")
    for name in ("bare.mge", "again.pt"):
        np.testing.assert_array_equal(vs.read(tmp_path / name).state(), values)


def test_an_option_that_a_format_does_not_have_is_refused_by_its_name(tmp_path):
    state = {"w": np.ones(2)}
    vs.write(tmp_path / "a.npz", state)
    vs.save(tmp_path / "d", state)
    for act in (
        lambda: vs.read(tmp_path / "a.npz", encoding="latin-1"),
        lambda: vs.convert(tmp_path / "a.npz", tmp_path / "a.pt", encoding="latin-1"),
        lambda: vs.read(tmp_path / "d", encoding="latin-1"),
        lambda: vs.convert(tmp_path / "d", tmp_path / "a.pt", encoding="latin-1"),
        lambda: vs.read(tmp_path / "a.npz", absent="error"),
        lambda: vs.read(tmp_path / "a.npz", key=bytes(16)),
        lambda: vs.read(tmp_path / "a.npz", crc_check=True),
    ):
        with pytest.raises(UsageError, match=r"the format (numpy|varstore) does not have this option"):
            act()
    assert not (tmp_path / "a.pt").exists()
    opened = vs.read(tmp_path / "a.npz", encoding="utf-8", absent="fill", key=None, crc_check=False, unknown="error")
    assert opened["w"].numpy().tolist() == [1, 1]
