"""Every verb knows regions: it compares them, hands them on with the file, or makes ordinary digests of them."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import xxhash
from click.testing import CliRunner
from support.regions import bands, flip, record_regions

import varstore as vs
from varstore.cli import main
from varstore.errors import DigestMismatch, VariableMismatch
from varstore.layout.graphs import GRAPH
from varstore.model.into import load_into
from varstore.values.attached import GivenFile

pytestmark = pytest.mark.core

SHAPE = (300, 2000)
ROWS, COLUMNS = bands(SHAPE, 0, [100, 200]), bands(SHAPE, 1, [500])
SMALL = (4, 6)


@pytest.fixture
def values():
    return {
        "rows": np.arange(600_000, dtype=np.float32).reshape(SHAPE),
        "columns": np.arange(600_000, dtype=np.int32).reshape(SHAPE),
        "small": np.arange(24.0).reshape(SMALL),
        "plain": np.arange(3),
    }


def with_regions(path: Path, values) -> Path:
    vs.save(path, values, durable=False)
    record_regions(path, {"rows": ROWS, "columns": COLUMNS, "small": bands(SMALL, 1, [2])})
    return path


@pytest.fixture
def saved(tmp_path, values):
    return with_regions(tmp_path / "c", values)


def regions(path: Path):
    return {name: len(variable.entry.regions) for name, variable in vs.open(path).items()}


HAS = {"rows": 3, "columns": 2, "small": 2, "plain": 0}
HAS_NONE = dict.fromkeys(HAS, 0)


def inode(path: Path, name: str) -> int:
    return (path / name / "out").stat().st_ino


# --- verify, seal, salvage ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "element", "region"),
    [
        ("rows", 250 * 2000 + 7, "[200:300, 0:2000]"),
        ("rows", 5, "[0:100, 0:2000]"),
        ("columns", 299 * 2000 + 499, "[0:300, 0:500]"),
        ("columns", 500, "[0:300, 500:2000]"),
        ("small", 8, "[0:4, 2:6]"),
    ],
)
def test_verify_names_the_region_with_the_flipped_byte(saved, name, element, region):
    report = vs.verify(saved)
    assert (report.ok, report.unchecked, report.nbytes) == (True, (), 4_800_216)
    size = vs.open(saved)[name].dtype.itemsize
    flip(saved / name / "out", element * size)
    report = vs.verify(saved)
    assert len(report.problems) == 1
    assert f"variable '{name}': region {region}: out does not hold the bytes" in report.problems[0]


def test_seal_turns_regions_into_digests_and_says_what_changed(saved, values):
    flip(saved / "small/out", 0)
    report = vs.seal(saved)
    assert report.changed == {"small": "values"}
    assert set(report.unchanged) == {"rows", "columns", "plain"}
    assert regions(saved) == HAS_NONE
    vs.save(saved.parent / "ordinary", values, durable=False)
    sealed, ordinary = vs.open(saved), vs.open(saved.parent / "ordinary")
    assert [name for name in values if sealed[name].digests != ordinary[name].digests] == ["small"]
    assert vs.verify(saved).ok


def test_salvage_links_whole_variables_with_their_regions_and_leaves_damaged_ones_out(saved, values):
    flip(saved / "columns/out", 0)
    report = vs.salvage(saved, saved.parent / "rescued")
    assert set(report.lost) == {"columns"}
    assert "region [0:300, 0:500]" in report.lost["columns"]
    assert report.unchecked == ()
    assert regions(saved.parent / "rescued") == {name: n for name, n in HAS.items() if name != "columns"}
    assert inode(saved, "rows") == inode(saved.parent / "rescued", "rows")


def test_salvage_takes_what_is_lost_from_a_variable_with_the_same_regions(tmp_path, values):
    vs.save(tmp_path / "c", {"a": values["columns"], "b": values["columns"].copy()}, durable=False)
    record_regions(tmp_path / "c", {"a": COLUMNS, "b": COLUMNS})
    flip(tmp_path / "c/a/out", 8)
    assert vs.salvage(tmp_path / "c", tmp_path / "rescued").restored == {"a": "b"}
    assert np.array_equal(vs.load(tmp_path / "rescued")["a"], values["columns"])


# --- saving again ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("links", [True, False])
def test_a_variable_that_is_saved_again_keeps_its_regions(saved, values, links):
    vs.save(saved.parent / "again", vs.open(saved).select(), durable=False, links=links)
    assert regions(saved.parent / "again") == HAS
    assert (inode(saved, "rows") == inode(saved.parent / "again", "rows")) == links
    assert vs.verify(saved.parent / "again").ok


def test_tied_variables_share_regions(tmp_path, values):
    array = values["columns"]
    vs.save(tmp_path / "c", {"a": array, "b": array}, durable=False)
    record_regions(tmp_path / "c", {"a": COLUMNS, "b": COLUMNS})
    assert vs.open(tmp_path / "c")["b"].tied_to == "a"
    vs.save(tmp_path / "again", vs.open(tmp_path / "c").select(), durable=False)
    again = vs.open(tmp_path / "again")
    assert [again[name].entry.regions for name in "ab"] == [vs.open(tmp_path / "c")["a"].entry.regions] * 2
    assert vs.verify(tmp_path / "again").ok
    loaded = vs.load(tmp_path / "again")
    assert loaded["a"] is loaded["b"]
    target = np.zeros(SHAPE, np.int32)
    load_into({"a": target, "b": target}, tmp_path / "again")
    assert np.array_equal(target, array)


def test_base_links_what_is_equal_region_by_region(saved, values):
    new = dict(values, columns=values["columns"].copy(), small=values["small"].T.copy().T)
    new["columns"][-1, -1] += 1
    vs.save(saved.parent / "next", new, base=saved, durable=False)
    assert {name for name in values if inode(saved, name) == inode(saved.parent / "next", name)} == {
        "rows",
        "small",
        "plain",
    }
    assert regions(saved.parent / "next") == HAS | {"columns": 0}
    vs.save_state(saved.parent / "state", {**new}, base=saved.parent / "next", durable=False)
    assert regions(saved.parent / "state") == HAS | {"columns": 0}
    assert vs.verify(saved.parent / "next").ok


def test_a_base_that_goes_away_is_not_needed(saved, values):
    os.remove(saved / "small/out")
    vs.save(saved.parent / "next", values, base=saved, durable=False)
    assert regions(saved.parent / "next") == HAS | {"small": 0}
    assert np.array_equal(vs.load(saved.parent / "next")["small"], values["small"])


def test_packed_values_are_compared_on_the_way(saved, values):
    packed = vs.pack(saved, saved.parent / "packed", durable=False)
    assert regions(saved.parent / "packed") == HAS | {"rows": 0, "columns": 0}
    assert {name: np.array_equal(packed[name].numpy(), values[name]) for name in values} == dict.fromkeys(values, True)
    assert vs.diff(saved, packed).equal
    vs.unpack(saved, saved.parent / "raw", durable=False)
    assert regions(saved.parent / "raw") == HAS
    flip(saved / "columns/out", 0)
    with pytest.raises(DigestMismatch, match=r"region \[0:300, 0:500\]"):
        vs.pack(saved, saved.parent / "again", durable=False)


def test_a_converted_file_has_values_that_were_compared(saved, values):
    pytest.importorskip("safetensors")
    vs.convert(saved, saved.parent / "c.safetensors")
    assert np.array_equal(vs.load(saved.parent / "c.safetensors")["columns"], values["columns"])
    flip(saved / "columns/out", 0)
    with pytest.raises(DigestMismatch, match=r"region \[0:300, 0:500\]"):
        vs.convert(saved, saved.parent / "d.safetensors")


def test_merge_compares_what_it_reads_and_links_what_is_equal(saved, values):
    shutil.copytree(saved, saved.parent / "same")
    merged = vs.merge(saved.parent / "mean", [saved, saved.parent / "same"], average=True)
    assert regions(saved.parent / "mean") == HAS
    assert len(merged) == len(values)
    with_regions(saved.parent / "other", dict(values, columns=values["columns"] + 2))
    vs.merge(saved.parent / "half", [saved, saved.parent / "other"], average=True)
    assert np.array_equal(vs.load(saved.parent / "half")["columns"], values["columns"] + 1)
    flip(saved / "columns/out", 0)
    with pytest.raises(DigestMismatch, match=r"region \[0:300, 0:500\]"):
        vs.merge(saved.parent / "damaged", [saved.parent / "other", saved], average=True)
    with pytest.raises(DigestMismatch, match=r"region \[0:300, 0:500\]"):
        vs.merge(saved.parent / "damaged", saved, verify=True)


# --- diff, links, history ----------------------------------------------------------------------------------------


def test_diff_compares_regions_with_regions_and_reads_the_rest(saved, values, monkeypatch):
    other = with_regions(saved.parent / "other", dict(values, small=values["small"] + 1))
    read = []
    monkeypatch.setattr("varstore.inspection.diff.all_digests", lambda _, entry: read.append(entry.name) or b"?")
    assert dict(vs.diff(saved, other).changed) == {"small": "values"}
    assert read == []
    monkeypatch.undo()
    vs.save(saved.parent / "ordinary", values, durable=False)
    assert vs.diff(saved, saved.parent / "ordinary").equal
    assert dict(vs.diff(saved.parent / "ordinary", other).changed) == {"small": "values"}
    record_regions(other, {"columns": ROWS})
    assert dict(vs.diff(saved, other).changed) == {"small": "values"}
    flip(other / "rows/out", 0)
    report = vs.diff(saved, other, values=True)
    assert report.damaged == ("rows",)


def test_equal_files_become_links_again(saved):
    shutil.copytree(saved, saved.parent / "run/step-1")
    shutil.copytree(saved, saved.parent / "run/step-2")
    assert vs.links(saved.parent / "run").linked >= 4
    assert inode(saved.parent / "run/step-1", "columns") == inode(saved.parent / "run/step-2", "columns")


def test_history_reads_equal_steps_once(saved, values):
    for step in (1, 2):
        vs.save(saved.parent / f"run/step-{step}", vs.open(saved).select(), durable=False)
    found = vs.history(saved.parent / "run", "columns")
    assert np.array_equal(found[:, 3, 4], np.full(2, values["columns"][3, 4]))


# --- what is shown -----------------------------------------------------------------------------------------------


def test_show_and_ls_name_the_regions(saved):
    shown = CliRunner().invoke(main, ["show", str(saved), "small"])
    assert shown.exit_code == 0
    digest = vs.open(saved)["small"].entry.regions[0].digests.hex()
    assert f"[0:4, 0:2] {digest}" in shown.output
    expected = [
        {"offsets": list(one.offsets), "sizes": list(one.sizes), "digests": [one.digests.hex()]}
        for one in vs.open(saved)["small"].entry.regions
    ]
    said = json.loads(CliRunner().invoke(main, ["show", str(saved), "small", "--json"]).output)
    assert (said["digests"], said["regions"]) == ([], expected)
    listed = json.loads(CliRunner().invoke(main, ["ls", str(saved), "--json"]).output)
    assert {one["name"]: len(one["regions"]) for one in listed["variables"]} == HAS


def test_what_a_graph_was_computed_from_gets_digests_to_be_compared(saved, values):
    again, small = saved.parent / "again", np.ascontiguousarray(values["small"])

    def save(digest: str) -> None:
        said = {"entry": "g", "format": "onnx", "bindings": {}, "folded": {"small": digest}}
        graph = GivenFile(b"graph", GRAPH, said)
        vs.save(again, vs.open(saved).select(), files={"g.onnx": graph}, durable=False)

    with pytest.raises(VariableMismatch, match="computed from this variable, whose values are now others"):
        save("00" * 16)
    save(xxhash.xxh3_128_hexdigest(small))
    assert regions(again) == HAS_NONE
    shutil.rmtree(again)
    flip(saved / "small/out", 0)
    with pytest.raises(DigestMismatch, match="a file is not what its checkpoint says"):
        save(xxhash.xxh3_128_hexdigest(small))
    vs.save(again, vs.open(saved).select(), files={"a.txt": b"text"}, durable=False)
    assert regions(again) == HAS
