"""``ls`` of every format, of runs and of attached files: the same facts as a tree, as plain columns and as JSON."""

from __future__ import annotations

import json
import os
import time

import click
import ml_dtypes
import numpy as np
import pytest
from click.testing import CliRunner

import varstore as vs
from varstore.cli import main
from varstore.cli.columns import Column, columns_text, cut, width_of

ROWS = {f"layers.{i}.{part}": np.full((2, 3), i, np.float32) for i in range(3) for part in ("a", "b")}
MODEL = {**ROWS, "norm": np.ones(4, np.float16)}
WRITTEN = {
    "m.pt": "torch",
    "m.safetensors": "safetensors",
    "m.npz": "numpy",
    "m.pdparams": "paddle",
    "m.ckpt": "mindspore",
    "m.pkl": "megengine",
    "hub": "huggingface",
    "legacy": "oneflow-legacy",
    "own": "varstore",
}


def run(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments], prog_name="varstore")


def rows(output):
    return [line.split() for line in output.splitlines()]


@pytest.mark.parametrize("name", WRITTEN)
def test_every_format_is_listed(tmp_path, name):
    options = {"config": {"model_type": "x"}} if name == "hub" else {}
    vs.write(tmp_path / name, MODEL, WRITTEN[name], **options)
    said = json.loads(run("ls", tmp_path / name, "--json").stdout)
    assert {row["name"]: (tuple(row["shape"]), row["dtype"]) for row in said["variables"]} == {
        name: (value.shape, value.dtype.name) for name, value in MODEL.items()
    }
    assert (said["parameters"], said["nbytes"]) == (40, 152)
    assert said["types"]["float16"] == {"variables": 1, "parameters": 4, "nbytes": 8}
    assert rows(run("ls", tmp_path / name).output)[-1] == ["7", "variables", "152"]
    assert run("ls", tmp_path / name, "--tree").output == TREE


TREE = """\
name            shape            type     params  share   size
layers.{0..2}.  3 × 2 variables               36  90.0%  144 B
├─ a            3 × [2, 3]       float32      18  45.0%   72 B
└─ b            3 × [2, 3]       float32      18  45.0%   72 B
norm            [4]              float16       4  10.0%    8 B
7 variables, 40 parameters, 152 B
  float32  6 variables, 36 parameters, 144 B
  float16  1 variable, 4 parameters, 8 B
"""


@pytest.fixture
def tied(tmp_path):
    embed = np.ones((1000, 2), np.float32)
    values = {"a/bias": np.ones(3, np.float32), "embed": embed, "head": embed}
    vs.write(tmp_path / "tied.pt", values)
    vs.save(tmp_path / "tied", values, files={"tokenizer.json": b"12345"}, attributes={"x": float("inf")})
    return tmp_path


def test_what_is_tied_counts_once_and_files_are_listed(tied):
    rest = ["embed  [1000, 2]", "head   [1000, 2]  float32   2,000         8.0 kB  tied to embed"]
    torch, own = (run("ls", tied / name, "--tree").output.splitlines() for name in ("tied.pt", "tied"))
    assert torch[3].split() == rest[1].split()
    assert torch[-1] == "3 variables, 2,003 parameters, float32, 8.0 kB"
    assert own[4].split() == ["tokenizer.json", "file", "5", "B"]
    assert own[-1] == "3 variables, 1 file, 2,003 parameters, float32, 8.0 kB"
    assert "file" not in run("ls", tied / "tied", "*").output
    assert json.loads(run("ls", tied / "tied.pt", "--json").output)["variables"][2]["tied_to"] == "embed"
    assert rows(run("ls", tied / "tied", "head", "--tree").output)[1][-3:] == ["tied", "to", "embed"]


def test_order_and_depth(tied):
    def names(*options):
        return [row[0] for row in rows(run("ls", tied / "tied.pt", *options).output)[1:-1]]

    assert names() == ["a/bias", "embed", "head"]
    assert names("--sort", "size") == names("--sort", "params") == ["embed", "head", "a/bias"]
    assert names("--sort", "name", "--tree") == ["a/bias", "embed", "head"]
    vs.write(tied / "deep.pt", {"z/a/x": np.ones(9), "z/b/x": np.ones(3), "z/b/y": np.ones(3), "c": np.ones(1)})
    assert [row[0] for row in rows(run("ls", tied / "deep.pt", "--depth", "1", "--sort", "size").output)[1:-1]] == [
        "z/",
        "c",
    ]
    assert "├─ b/" not in run("ls", tied / "deep.pt", "--tree").output  # the last one
    assert "└─ b/" in run("ls", tied / "deep.pt", "--tree").output
    assert "├─ b/" in run("ls", tied / "deep.pt", "--tree", "--sort", "name").output.replace("└─ b/", "├─ b/")
    assert run("ls", tied / "deep.pt", "--tree", "-b").output.splitlines()[-1].endswith("float64, 128 bytes")


def test_values_of_a_pickle_that_are_not_arrays_do_not_matter(tmp_path):
    vs.write(tmp_path / "m.pt", {"model": {"w": np.ones(3, ml_dtypes.bfloat16)}, "epoch": 3, "lr": float("nan")})
    assert rows(run("ls", tmp_path / "m.pt").output)[1] == ["model/w", "[3]", "bfloat16", "6"]


@pytest.fixture
def series(tmp_path):
    weights = {"backbone": np.zeros(1000), "head": np.zeros(10)}
    with vs.CheckpointManager(tmp_path / "run", clock=lambda: 0.0, keep=vs.Pinned([20]) | vs.Latest(9)) as manager:
        for step, loss in ((1, 0.5), (20, 0.25), (30, float("nan")), (40, 0.375)):
            weights["head"] = weights["head"] + 1
            manager.save(step, weights, metrics={"loss": loss, "accuracy": step / 100})
    (tmp_path / "run" / "step-30" / "snapshot_done").unlink()
    (tmp_path / "run" / "step-40" / "head" / "out").unlink()
    return tmp_path / "run"


def test_a_run_is_a_table_of_its_steps(series):
    lines = rows(run("ls", series).output)
    assert lines[0] == ["step", "time", "loss", "accuracy", "size", "new"]
    assert [line[0] for line in lines[1:-1]] == ["1", "20", "30", "40"]
    assert lines[1][3:] == ["0.5", "0.01", "8.1", "kB", "8.1", "kB"]
    assert lines[2][3:] == ["0.25", "0.2", "8.1", "kB", "80", "B", "best", "loss,", "latest,", "pinned"]
    assert lines[3][1] == "incomplete:"
    assert lines[4][1:10] == ["1970-01-01", lines[1][2], "0.375", "0.4", "8.1", "kB", "0", "B", "incomplete:"]
    assert " ".join(lines[-1]) == "4 steps, 24.2 kB, 8.2 kB on disk because of links; 2 not whole"
    said = json.loads(run("ls", series, "--json").output)
    assert said["ok"] is False
    assert [(step["nbytes"], step["new_nbytes"]) for step in said["steps"][:2]] == [(8080, 8080), (8080, 80)]
    assert [step["latest"] for step in said["steps"]] == [False, True, False, False]
    assert [step["pinned"] for step in said["steps"]] == [False, True, False, False]
    assert run("ls", series, "-b").output.splitlines()[2].split()[5:7] == ["8080", "80"]
    assert run("ls", series, "head").exit_code == 2


def test_the_latest_step_of_a_run_is_what_the_manager_takes(series):
    marked = [step for step in vs.steps(series).steps if step.is_latest]
    assert [step.step for step in marked] == [vs.CheckpointManager(series).latest().step]
    assert "<table>" in vs.steps(series)._repr_html_()
    assert not vs.steps(series)
    vs.save(series / "other5", {"w": np.zeros(2)})
    assert [step.name for step in vs.steps(series).steps] == ["other5", "step-1", "step-20", "step-30", "step-40"]
    assert "other5" in run("ls", series).output


def test_a_run_with_nothing_shared_says_nothing_of_links(tmp_path):
    vs.CheckpointManager(tmp_path).save(1, {"w": np.zeros(2)})
    assert run("ls", tmp_path).output.splitlines()[-1] == "1 step, 16 B"


def test_other_folders_are_not_runs(tmp_path):
    os.mkdir(tmp_path / "7")
    assert "no 'snapshot_done'" in run("ls", tmp_path).stderr
    own = vs.save(tmp_path / "own", {"layer1": np.ones(1)}).path
    vs.save(f"{own}/step-1", {"w": np.zeros(2)})
    assert "layer1" in run("ls", own).output


COLUMNS = (Column(heading="name"), Column(heading="x", is_right=True, rank=1), Column(heading="note", least=6))


@pytest.mark.parametrize("width", [1, 2, 5, 10, 20, 40, 60, 80, 200])
def test_no_row_is_longer_than_the_terminal(width):
    cells = [["n" * 90, "12", "y" * 90], ["权重" * 20, "1", ""], ["e\u0301" * 50, "", "z"]]
    lines = click.unstyle(columns_text(COLUMNS, cells, width=width)).splitlines()
    assert len(lines) == 4
    assert all(width_of(line) <= width for line in lines)
    if width >= 60:
        assert " 12 " in lines[1]


def test_a_cut_text_keeps_both_ends():
    assert cut("abcdefghij", 5) == "ab…ij"
    assert cut("权重权重", 5) == "权…重"
    assert cut("abc", 3) == "abc"
    assert cut("abcd", 0) == ""


@pytest.fixture(scope="module")
def vast(tmp_path_factory):
    """A .safetensors of 2 GB, a hole, with 10,000 variables."""
    rows = {
        f"layer{i}.w": {"dtype": "F32", "shape": [50000], "data_offsets": [i * 200_000, (i + 1) * 200_000]}
        for i in range(10_000)
    }
    header = json.dumps(rows).encode()
    path = tmp_path_factory.mktemp("vast") / "m.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    os.truncate(path, 8 + len(header) + 2_000_000_000)
    return path, len(header)


def bytes_read():
    with open("/proc/self/io") as file:
        return int(file.readline().split()[1])


@pytest.mark.parametrize(
    "command",
    [["ls"], ["ls", "--tree"], ["ls", "--json"], ["show"], ["show", "layer77.w[:9]"], ["diff", "same"]],
    ids=" ".join,
)
def test_two_gigabytes_cost_what_is_looked_at(vast, tmp_path, command):
    path, header = vast
    vs.write(tmp_path / "small.safetensors", {"layer77.w": np.zeros(50)})
    verb, *rest = command

    def look(file):
        return run(verb, file, *[str(file) if part == "same" else part for part in rest])

    assert look(tmp_path / "small.safetensors").exit_code == 0  # what has to be imported is
    before, started = bytes_read(), time.process_time()
    assert look(path).exit_code == 0
    assert bytes_read() - before < (1 + (verb == "diff")) * 2 * header + (1 << 20)
    assert time.process_time() - started < 5
