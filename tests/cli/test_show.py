"""``show``: a variable of any format with its ties, links and values, a slice of it, and the state as a tree."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import click
import ml_dtypes
import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings, strategies as st
from support.crafted import torch_file

import varstore as vs
from varstore.cli import main
from varstore.cli.grid import corner, grid, histogram_text, index_of, split_index

WEIGHT = np.arange(24, dtype=np.float32).reshape(4, 6)
WRITTEN = ("m.pt", "m.safetensors", "m.npz", "m.pdparams", "m.ckpt", "own")


def run(*arguments, **options):
    return CliRunner().invoke(main, [str(argument) for argument in arguments], prog_name="varstore", **options)


def facts(output):
    return dict(line.split(maxsplit=1) for line in output.splitlines() if re.match(r"[a-z]\S* {2}", line))


@pytest.mark.parametrize("name", WRITTEN)
def test_a_variable_of_every_format_and_a_slice_of_it(tmp_path, name):
    vs.write(tmp_path / name, {"fc.weight": WEIGHT, "b": np.zeros(2)})
    whole = facts(run("show", tmp_path / name, "fc.weight").output)
    assert (whole["shape"], whole["count"], whole["max"]) == ("[4, 6]", "24", "23")
    assert whole.get("file", whole.get("folder")).startswith(str(tmp_path / name))
    result = run("show", tmp_path / name, "fc.weight[1:3, :2]")
    part = facts(result.output)
    assert (part["shape"], part["slice"], part["count"]) == ("[4, 6]", "[1:3, :2] [2, 2]", "4")
    assert (part["min"], part["max"]) == ("6", "13")
    assert result.output.splitlines()[-2:] == ["values       6.0  7.0", "            12.0 13.0"]
    said = json.loads(run("show", tmp_path / name, "fc.weight[-1]", "--json").output)
    assert (said["values"], said["statistics"]["min"]) == ([18, 19, 20, 21, 22, 23], 18)


def test_an_exact_name_comes_before_a_slice(tmp_path):
    vs.save(tmp_path / "c", {"w[0]": np.ones(3), "w": np.zeros(3)})
    assert facts(run("show", tmp_path / "c", "w[0]").output)["max"] == "1"
    assert facts(run("show", tmp_path / "c", "w[1]").output)["max"] == "0"
    assert facts(run("show", tmp_path / "c", "w[0][1]").output)["max"] == "1"
    assert facts(run("show", tmp_path / "c" / "w", "[1:]").output)["count"] == "2"


@pytest.mark.parametrize(
    ("name", "status", "said"),
    [
        ("w[9]", 2, "out of bounds"),
        ("w[0,0,0]", 2, "too many indices"),
        ("w[x]", 2, "[x] is not a slice"),
        ("w[]", 2, "is not a slice"),
        ("w[::0]", 2, "zero"),
        ("ww[0]", 3, "Did you mean 'w'"),
    ],
)
def test_what_is_no_slice(tmp_path, name, status, said):
    for path in (vs.save(tmp_path / "c", {"w": WEIGHT}).path, tmp_path / "c.pt"):
        vs.write(tmp_path / "c.pt", {"w": WEIGHT})
        result = run("show", path, name)
        assert result.exit_code == status, result.output
        assert said in result.stderr


@given(st.lists(st.integers(-9, 9) | st.slices(9) | st.just(...), min_size=1, max_size=4))
def test_a_slice_is_read_as_python_reads_it(items):
    def text(item):
        if isinstance(item, slice):
            return ":".join("" if part is None else str(part) for part in (item.start, item.stop, item.step))
        return "..." if item is ... else str(item)

    name, index = split_index(f"a[b/c[{' , '.join(map(text, items))}]")
    assert name == "a[b/c"
    assert index_of(index) == tuple(items)


def test_ties_and_links_are_named(tmp_path):
    embed = np.ones((3, 2))
    values = {"embed": embed, "head": embed, "out": embed, "b": np.zeros(2)}
    first = vs.save(tmp_path / "a", values)
    vs.save(tmp_path / "b", {"b": first["b"]})
    vs.save(tmp_path / "far" / "c", {"b": first["b"]})
    vs.write(tmp_path / "m.pt", values)
    assert "\nlinked to   b, 1 file elsewhere\n" in run("show", tmp_path / "a", "b").output
    for path in (tmp_path / "a", tmp_path / "m.pt"):
        shown = run("show", path, "head").output
        assert "tied to     embed, out\n" in shown
        assert "linked" not in shown
    said = json.loads(run("show", tmp_path / "a", "b", "--json").output)
    assert (said["linked"], said["tied_to"]) == (["b"], [])


def test_an_attached_file_is_shown(tmp_path):
    vs.save(tmp_path / "c", {"w": np.ones(2)}, files={"tokenizer.json": b"{}"})
    assert facts(run("show", tmp_path / "c", "tokenizer.json").output)["bytes"] == "2"
    assert json.loads(run("show", tmp_path / "c", "tokenizer.json", "--json").output)["nbytes"] == 2


STATE = {
    "model": {f"layer{i}": {"w": np.ones((2, 3), np.float32)} for i in range(12)},
    "optimizer": {"param_groups": [{"lr": 0.5, "betas": (0.9, 0.95), "params": list(range(99))}], "empty": {}},
    "step": 3,
    "note": "a\nb\x1b",
}
TREE = """\
state
├─ model  12 variables, 72 parameters, 288 B
├─ optimizer
│  ├─ param_groups
│  │  └─ 0
│  │     ├─ lr      0.5
│  │     ├─ betas   (0.9, 0.95)
│  │     └─ params  99 values: [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, …, 93, 94, 95, 96, 97, 98]
│  └─ empty  empty
├─ step   3
└─ note   'a\\nb\\x1b'
"""


def test_the_state_is_a_tree(tmp_path):
    vs.save_state(tmp_path / "own", STATE, attributes={"by": {"me": 1}}, files={"t.json": b"{}"})
    vs.write(tmp_path / "m.pt", STATE)
    tree = run("show", tmp_path / "m.pt").output
    assert re.sub(r"99 values: .*", "", tree.partition("\n")[2]) == re.sub(r"99 values: .*", "", TREE)
    own = run("show", tmp_path / "own").output
    assert own.endswith("attributes\n└─ by\n   └─ me  1\nfiles\n└─ t.json  data, 2 B\n")
    assert own.partition("\n")[2].startswith(tree.partition("\n")[2])
    for name in ("own", "m.pt"):
        said = json.loads(run("show", tmp_path / name, "--json").output)
        assert said["state"]["optimizer"]["param_groups"][0]["betas"] == [0.9, 0.95]
        assert said["state"]["model"]["layer3"]["w"] == {"shape": [2, 3], "dtype": "float32", "nbytes": 24}


def test_plain_variables_and_runs(tmp_path):
    with vs.CheckpointManager(tmp_path / "run") as manager:
        manager.save(7, {f"w{i}": np.ones(2) for i in range(9)}, metrics={"loss": 0.5})
    shown = run("show", tmp_path / "run").output
    assert "\nstate  9 variables, 18 parameters, 144 B\n" in shown
    assert "loss  0.5\n" in shown
    assert facts(run("show", tmp_path / "run", "w3").output)["folder"] == str(tmp_path / "run" / "step-7" / "w3")
    assert run("stats", tmp_path / "run").output.count("float64") == 9


def test_unknown_classes_are_named(tmp_path):
    torch_file(tmp_path / "m.pt", b"}(X\1\0\0\0acfoo\nBar\n)Ru")
    shown = run("show", tmp_path / "m.pt").output
    assert "└─ a  <Opaque foo.Bar>\n" in shown
    assert shown.endswith("unknown to varstore, and not imported: foo.Bar (1)\n")


def test_a_state_without_end_has_few_lines(tmp_path):
    deep = {"x": 1}
    for _ in range(90):
        deep = {"d": deep}
    vs.write(tmp_path / "m.pt", {"deep": deep, "wide": {f"k{i}": str(i) for i in range(5000)}, "w": np.ones(1)})
    lines = run("show", tmp_path / "m.pt").output.splitlines()
    assert len(lines) < 120
    assert any("and 4,936 more" in line for line in lines)


@pytest.mark.parametrize("scalar", [np.float32, np.complex64, ml_dtypes.bfloat16, ml_dtypes.int4, np.bool_, np.uint64])
def test_values_are_a_grid(scalar):
    values = np.array([[1, 0], [0, 1]]).astype(scalar)
    rows = grid(values, width=None, is_whole=True)
    assert [[str(value) for value in row] for row in values] == [row.split() for row in rows]


def test_a_grid_of_many_axes_and_of_a_corner():
    values = np.arange(2 * 2 * 2).reshape(2, 2, 2)
    assert grid(values, width=None, is_whole=True) == ["[0]", "0 1", "2 3", "[1]", "4 5", "6 7"]
    large = np.zeros((5, 40, 50), np.int8)
    assert large[corner(large.shape)].shape == (6, 8)
    assert grid(large[0], width=20, is_whole=True)[0] == "0 0 0 0 0 0 0 0 0 …"
    assert len(grid(large, width=20, is_whole=True)) == 201
    assert grid(np.arange(30), width=20, is_whole=True)[-1].split() == ["24", "25", "26", "27", "28", "29"]
    assert grid(np.zeros((0, 3)), width=20, is_whole=True) == ["none"]
    assert grid(np.array(7.0), width=20, is_whole=True) == ["7.0"]


def test_nan_and_inf_are_red():
    rows = grid(np.array([1.0, np.nan, -np.inf]), width=None, is_whole=True)
    assert rows == [f" 1.0 {' '}{click.style('nan', fg='red')} {click.style('-inf', fg='red')}"]


@settings(max_examples=50)
@given(st.lists(st.integers(0, 10**12), min_size=1, max_size=64).filter(any))
def test_a_bin_with_a_value_can_be_seen(counts):
    text = histogram_text(counts)
    each = -(-len(counts) // 32)
    assert len(text) == -(-len(counts) // each) <= 32
    for at, sign in enumerate(text):
        assert (sign == " ") == (not any(counts[at * each : (at + 1) * each]))
    assert "█" in text or len(set(text)) == 1


def test_a_slice_of_a_large_variable_reads_only_that(tmp_path):
    vs.save(tmp_path / "c", {"w": np.zeros(2, np.int8)}, manifest=False)
    out = tmp_path / "c" / "w" / "out"
    size = 1 << 42  # a hole, which could not be read
    for name, text in (("out", ""), ("meta", f"shape {{ dim: {size} }} data_type: kInt8")):
        (out.parent / name).unlink()
        (out.parent / name).write_text(text)
    os.truncate(out, size)
    assert facts(run("show", tmp_path / "c", "w[:9]").output)["count"] == "9"
    assert run("ls", tmp_path / "c", "--tree").output.splitlines()[-1].endswith("int8, 4.4 TB")


DATA = Path(__file__).parent.parent / "data"


@pytest.mark.parametrize("folder", sorted(path.name for path in (DATA / "formats").iterdir()))
def test_every_command_that_looks_takes_what_other_systems_wrote(folder):
    """The shapes that states have: a bare array, a scalar, names that are slices, no variables at all."""
    looked_at = 0
    for path in sorted((DATA / "formats" / folder).iterdir()):
        try:
            opened = vs.read(path)
        except vs.VarstoreError:
            continue
        first = [["show", path, name] for name in list(opened)[:1]]
        for command in (["ls", path], ["show", path], ["stats", path], *first):
            for options in ([], ["--json"]):
                result = run(*command, *options)
                assert isinstance(result.exception, SystemExit | None), (command, result.exception)
                assert result.exit_code in ((0, 1) if command[0] == "stats" else (0,)), (command, result.output)
                if options:
                    json.loads(result.stdout, parse_constant=pytest.fail)
        looked_at += 1
        if looked_at == 3:
            return


def test_a_variable_without_meta_is_named_in_the_tree():
    shown = run("show", DATA / "oneflow" / "lenet_legacy_nometa")
    assert shown.exit_code == 0
    assert "conv1-bias" in shown.output
    assert "no meta" in shown.output


def test_a_state_can_be_one_array(tmp_path):
    np.save(tmp_path / "x.npy", np.ones((2, 3)))
    vs.save_state(tmp_path / "one", np.ones((2, 3)))
    for name in ("x.npy", "one"):
        assert run("show", tmp_path / name).output.endswith("state  float64 [2, 3]\n")
