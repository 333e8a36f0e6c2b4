"""Graphs and variables together: what is bound, what stays, and every way in which a graph would be wrong."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, strategies as st
from support import ROOT, onnx_models as made

import varstore as vs
from varstore.bundles.onnx import checked_model
from varstore.cli import main
from varstore.errors import (
    DigestMismatch,
    FormatError,
    InvalidName,
    UnsafeContent,
    UsageError,
    VariableMismatch,
    VariableNotFound,
)
from varstore.formats.binary.source import Held, Source
from varstore.formats.onnx.bound import open_graph, outside, rewritten
from varstore.values.attached import GivenFile

RANDOM = np.random.default_rng(5)


def values(**others):
    return {
        "net/w": RANDOM.standard_normal((16, 20)).astype(np.float32),
        "net/b": RANDOM.standard_normal(20).astype(np.float32),
        **others,
    }


def linear(variables):
    return made.linear(variables, "net/w", "net/b")


def places(path):
    return {record.name: record.external for record in outside(Source(str(path))).tensors}


def assert_exports(checkpoint, tmp_path, expected):
    vs.export(checkpoint, tmp_path / "exported.onnx")
    assert not places(tmp_path / "exported.onnx")
    found = vs.read(tmp_path / "exported.onnx")
    assert {name: array.numpy().tobytes() for name, array in found.items()} == {
        name: array.tobytes() for name, array in expected.items()
    }


def test_a_value_is_on_disk_once_and_the_graph_refers_to_it(tmp_path):
    variables = values(unused=np.zeros(3))
    model = linear({name: variables[name] for name in ("net/w", "net/b")})
    checkpoint = vs.bundle(tmp_path / "c", variables, graphs={"forward": model}, attributes={"epoch": 3})
    file = checkpoint.files["forward.onnx"]
    assert places(file.path) == {"net/w": {"location": "net/w/out", "offset": "0", "length": "1280"}}
    assert file.nbytes < len(model) - 1000
    assert checkpoint.attributes == {"epoch": 3}
    assert vs.read(file.path)["net/w"].numpy().tobytes() == variables["net/w"].tobytes()
    assert_exports(checkpoint, tmp_path, {name: variables[name] for name in ("net/w", "net/b")})
    said = vs.open(tmp_path / "c").files["forward.onnx"]
    assert said.kind == "graph"
    assert said.attributes["inputs"] == [{"name": "x", "type": "float32", "shape": ["batch", 16]}]
    assert said.attributes["outputs"] == [{"name": "y", "type": "float32", "shape": ["batch", 20]}]
    assert set(said.attributes["bindings"]) == {"net/w", "net/b"}


def test_only_what_runtimes_read_right_from_a_file_lies_in_one(tmp_path):
    stay = {
        "int4": RANDOM.integers(-8, 8, (64, 64)).astype(ml_dtypes.int4),
        "shape": np.arange(1, 301, dtype=np.int64),
        "small": np.ones(255, np.float32),
    }
    bound = {"large": np.ones(256, np.float32), "positions": np.arange(512).reshape(1, 512), "half": np.ones(512, "f2")}
    variables = values(**stay, **bound)
    checkpoint = vs.bundle(tmp_path / "c", variables, graphs={"forward": linear(variables)})
    stay["net/b"], bound["net/w"] = variables["net/b"], variables["net/w"]
    assert set(places(tmp_path / "c/forward.onnx")) == set(bound)
    bindings = checkpoint.files["forward.onnx"].attributes["bindings"]
    assert {name for name, binding in bindings.items() if "digest" in binding} == set(stay)


def test_names_of_the_graph_are_those_after_renaming(tmp_path):
    variables = values()
    model = made.linear({"w": variables["net/w"], "b": variables["net/b"]})
    with pytest.raises(UsageError, match="no graph uses any of the variables"):
        vs.bundle(tmp_path / "c", variables, graphs={"forward": model})
    checkpoint = vs.bundle(tmp_path / "c", variables, graphs={"forward": model}, rename={"net": ""})
    assert places(tmp_path / "c/forward.onnx")["w"]["location"] == "net/w/out"
    assert_exports(checkpoint, tmp_path, {"w": variables["net/w"], "b": variables["net/b"]})


def test_other_values_of_the_same_name_are_an_error_or_have_a_place(tmp_path):
    variables = values()
    folded = {**variables, "net/w": variables["net/w"] * 2}
    with pytest.raises(VariableMismatch, match=r"(?s)'net/w'.*optimize=False"):
        vs.bundle(tmp_path / "c", variables, graphs={"forward": linear(folded)})
    assert not (tmp_path / "c").exists()
    inline = vs.bundle(tmp_path / "inline", variables, graphs={"forward": linear(folded)}, on_difference="inline")
    assert not places(inline.files["forward.onnx"].path)
    added = vs.bundle(tmp_path / "added", variables, graphs={"forward": linear(folded)}, on_difference="add")
    assert added["forward/net/w"].numpy().tobytes() == folded["net/w"].tobytes()
    for checkpoint in (inline, added):
        assert checkpoint["net/w"].numpy().tobytes() == variables["net/w"].tobytes()
        assert_exports(checkpoint, tmp_path, folded)
        again = vs.bundle(f"{checkpoint.path}-2", variables, graphs=checkpoint)
        assert_exports(again, tmp_path, folded)
        assert os.path.samefile(f"{again.path}/forward.onnx", f"{checkpoint.path}/forward.onnx")
        for save in (
            lambda of, new: vs.bundle(tmp_path / "new", new, graphs=of),
            lambda of, new: vs.save(tmp_path / "new", {**of, **new}, files=of.files),
        ):
            with pytest.raises(VariableMismatch, match=r"'net/w'.*computed from this variable"):
                save(checkpoint, {**variables, "net/w": folded["net/w"] + 1})
            assert not (tmp_path / "new").exists()


def test_a_graph_without_copies_of_what_changed_is_linked_and_others_are_renewed(tmp_path):
    variables = values()
    first = vs.bundle(tmp_path / "1", variables, graphs={"forward": linear(variables)})
    variables["net/w"] = variables["net/w"] + 1
    second = vs.bundle(tmp_path / "2", variables, graphs=first, base=first)
    assert os.path.samefile(tmp_path / "1/forward.onnx", tmp_path / "2/forward.onnx")
    assert_exports(second, tmp_path, variables)
    variables["net/b"] = variables["net/b"] + 1
    with pytest.raises(VariableMismatch, match="the graph has other values of this variable in itself"):
        vs.save(tmp_path / "3", variables, files=second.files)
    assert not (tmp_path / "3").exists()
    third = vs.bundle(tmp_path / "3", variables, graphs=second, base=second)
    assert_exports(third, tmp_path, variables)
    assert places(tmp_path / "3/forward.onnx") == places(tmp_path / "1/forward.onnx")
    assert os.path.samefile(tmp_path / "2/net/w/out", tmp_path / "3/net/w/out")
    assert all(vs.verify(tmp_path / name).ok for name in "123")


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"net/w": np.ones((16, 21), np.float32)}, VariableMismatch),
        ({"net/w": np.ones((16, 20), np.float64)}, VariableMismatch),
        ({"net/b": np.ones(21, np.float32)}, VariableMismatch),
        ({"net/w": None}, VariableNotFound),
    ],
)
def test_a_graph_is_never_saved_with_variables_that_it_cannot_use(tmp_path, change, error):
    variables = values()
    bundled = vs.bundle(tmp_path / "c", variables, graphs={"forward": linear(variables)})
    changed = {name: array for name, array in {**variables, **change}.items() if array is not None}
    with vs.CheckpointManager(tmp_path / "run") as manager:
        for save in (
            lambda: vs.save(tmp_path / "new", changed, files=bundled.files),
            lambda: vs.bundle(tmp_path / "new", changed, graphs=bundled),
            lambda: manager.save(1, changed, graphs_from=tmp_path / "c"),
        ):
            with pytest.raises(error, match=next(iter(change))):
                save()
    assert sorted(os.listdir(tmp_path)) == ["c"]


@pytest.mark.parametrize("background", [False, True])
def test_each_step_of_a_deployed_model_runs(tmp_path, background):
    variables = values(**{"optimizer/m": np.zeros(9)})
    model = {name: variables[name] for name in ("net/w", "net/b")}
    vs.bundle(tmp_path / "c", variables, graphs={"forward": linear(model)})
    with vs.CheckpointManager(
        tmp_path / "run", background=background, files={"labels.txt": b"a"}, keep_parts={"net/w": vs.Latest(1)}
    ) as manager:
        for step in range(3):
            variables["net/b" if step == 1 else "net/w"] += 1
            source = manager.latest() if step else tmp_path / "c"
            manager.save(step, variables, graphs_from=source).wait()
            checkpoint = vs.open(manager.latest())
            assert set(checkpoint.files) == {"labels.txt", "forward.onnx"}
            assert_exports(checkpoint, tmp_path, {name: variables[name] for name in model})
    assert set(vs.open(tmp_path / "run/step-0").files) == {"labels.txt"}  # without net/w, no graph
    assert all(vs.verify(tmp_path / f"run/step-{step}").ok for step in range(3))


def test_names_that_two_would_have_are_refused(tmp_path):
    variables = values()
    model = linear(variables)
    (tmp_path / "a").mkdir()
    for place in ("net", "a/net", "x.onnx", "a/x.onnx"):
        (tmp_path / place).write_bytes(model)
    for graphs, files, error in (
        ({"f": tmp_path / "x.onnx", "g": tmp_path / "a/x.onnx"}, {}, UsageError),
        ({"f": model}, {"f.onnx": b""}, UsageError),
        ({"f": tmp_path / "net"}, {}, InvalidName),
        ({"a/b": model}, {}, InvalidName),
        ({}, {}, UsageError),
        ({"f": 3}, {}, UsageError),
        ({"f": b"no model"}, {}, FormatError),
    ):
        with pytest.raises(error):
            vs.bundle(tmp_path / "c", variables, graphs=graphs, files=files)
    assert not (tmp_path / "c").exists()
    with pytest.raises(UsageError, match="a variable of the name"):
        vs.bundle(
            tmp_path / "c",
            {**variables, "f/net/w": np.ones(1)},
            on_difference="add",
            graphs={"f": linear({**variables, "net/w": variables["net/w"] + 1})},
        )


def test_several_entries_share_variables_and_others_are_left_out_if_asked(tmp_path):
    variables = values(**{"net/head": np.ones((16, 20), np.float32), "unused": np.ones(1000)})
    graphs = {
        "forward": linear({name: variables[name] for name in ("net/w", "net/b")}),
        "another_forward": made.linear({name: variables[name] for name in ("net/head", "net/b")}, "net/head", "net/b"),
    }
    source = vs.save(tmp_path / "s", variables, attributes={"epoch": 1})
    checkpoint = vs.bundle(tmp_path / "c", source, graphs=graphs, include_only_used=True)
    assert set(checkpoint) == {"net/w", "net/b", "net/head"}
    assert checkpoint.attributes == {"epoch": 1}
    assert os.path.samefile(tmp_path / "s/net/w/out", tmp_path / "c/net/w/out")
    with pytest.raises(UsageError, match="'backward'"):
        vs.export(checkpoint, tmp_path / "m.onnx", entry="backward")
    vs.export(checkpoint, tmp_path / "m.onnx", entry="another_forward")
    assert set(vs.read(tmp_path / "m.onnx")) == {"net/head", "net/b"}
    shown = CliRunner().invoke(main, ["show", str(tmp_path / "c")])
    assert shown.exit_code == 0
    assert "another_forward" in shown.output
    assert "x float32 [batch, 16] -> y float32 [batch, 20]" in shown.output
    done = CliRunner().invoke(main, ["export", str(tmp_path / "c"), str(tmp_path / "n.onnx")])
    assert done.exit_code == 0, done.output
    assert set(vs.read(tmp_path / "n.onnx")) == {"net/w", "net/b"}


def test_a_model_with_files_of_its_own_is_taken_whole_from_its_path_only(tmp_path):
    variables = values()
    array = RANDOM.standard_normal((16, 16)).astype(np.float32)
    (tmp_path / "m.data").write_bytes(array.tobytes())
    outer = made.initializer("other", array, {"location": "m.data"})
    model = made.model(
        [*(made.initializer(name, values) for name, values in variables.items()), outer],
        [made.node("MatMul", ["x", "other"], ["y"])],
        [made.value("x", 1, [2, 16])],
        [made.value("y", 1, [2, 16])],
    )
    with pytest.raises(UsageError, match="Pass the path"):
        vs.bundle(tmp_path / "c", variables, graphs={"forward": model})
    (tmp_path / "m.onnx").write_bytes(model)
    checkpoint = vs.bundle(tmp_path / "c", variables, graphs={"forward": tmp_path / "m.onnx"})
    assert set(places(tmp_path / "c/m.onnx")) == {"net/w"}
    assert_exports(checkpoint, tmp_path, {**variables, "other": array})


RIGHT = {"location": "net/w/out", "offset": "0", "length": "1280"}
TENSOR = np.zeros((16, 20), np.float32)
IN_AN_ATTRIBUTE = made.node("Constant", [], ["y"], [made.bytes_field(5, made.initializer("t", TENSOR, RIGHT))])
SPARSE = made.bytes_field(15, made.bytes_field(1, made.initializer("s", TENSOR, RIGHT)))


@pytest.mark.parametrize(
    ("said", "nodes"),
    [
        *(({**RIGHT, "location": place}, []) for place in (
            "/etc/passwd", "../net/w/out", "net/w/../w/out", "./net/w/out", "net/w/meta", "net/b", "", "manifest",
            "*/_ORT_MEM_ADDR_/*",
        )),
        ({**RIGHT, "offset": "4", "length": "1276"}, []),
        ({**RIGHT, "length": "1276"}, []),
        ({"location": "net/w/out", "offset": "0"}, []),
        ({"location": "net/w/out", "length": "1280"}, []),
        ({**RIGHT, "checksum": "0"}, []),
        (RIGHT, [IN_AN_ATTRIBUTE]),
        (RIGHT, [made.node("EPContext", [], ["y"])]),
    ],
)  # fmt: skip
def test_a_runtime_never_sees_a_graph_that_refers_to_anything_but_whole_variables(tmp_path, said, nodes):
    graph = made.model([made.initializer("net/w", TENSOR, said)], nodes, [], [])
    about = {"entry": "forward", "format": "onnx", "inputs": [], "outputs": [], "bindings": {}}
    checkpoint = vs.save(tmp_path / "c", values(), files={"forward.onnx": GivenFile(graph, "graph", about)})
    with pytest.raises(UnsafeContent):
        vs.export(checkpoint, tmp_path / "m.onnx")
    with pytest.raises(UnsafeContent):
        checked_model(checkpoint, checkpoint.files["forward.onnx"])
    assert not (tmp_path / "m.onnx").exists()


def test_a_flipped_byte_in_a_graph_or_in_a_value_is_found(tmp_path):
    variables = values()
    vs.bundle(tmp_path / "c", variables, graphs={"forward": linear(variables)})
    for name in ("forward.onnx", "net/w/out"):
        place = tmp_path / "c" / name
        before = place.read_bytes()
        place.chmod(0o644)
        place.write_bytes(before[:99] + bytes([before[99] ^ 1]) + before[100:])
        assert not vs.verify(tmp_path / "c").ok
        with pytest.raises(DigestMismatch):
            vs.export(tmp_path / "c", tmp_path / "m.onnx")
        place.write_bytes(before)
    assert vs.verify(tmp_path / "c").ok


KILLED = """
import sys
import numpy as np
import varstore as vs
from support import onnx_models as made
for at in range(10**6):
    values = {"w": np.full((16, 20), at, np.float32), "b": np.full(20, at, np.float32)}
    vs.bundle(sys.argv[1], values, graphs={"forward": made.linear(values)}, overwrite=True, durable=at % 2 == 0)
    if not at:
        print("ready", flush=True)
"""


def test_a_killed_save_never_shows_a_graph_without_its_variables(tmp_path):
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    for rounds in range(3):
        command = [sys.executable, "-c", KILLED, str(tmp_path / "c")]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environ) as child:
            assert child.stdout.readline() == "ready\n"
            time.sleep(0.02 + 0.02 * rounds)
            child.kill()
        checkpoint = vs.open(tmp_path / "c")
        assert vs.verify(tmp_path / "c").ok
        assert_exports(checkpoint, tmp_path, {name: checkpoint[name].numpy() for name in ("w", "b")})


def test_without_links_every_file_has_one_name_and_keeps_it(tmp_path):
    variables = values()
    variables["net/tied"] = variables["net/w"]
    first = vs.save(tmp_path / "0", variables, files={"labels": b"a"})
    alone = vs.bundle(
        tmp_path / "run/step-1",
        first,
        graphs={"forward": linear({n: first[n].numpy() for n in ("net/w", "net/b")})},
        files=first.files,
        links=False,
        base=first,
    )
    assert vs.open(tmp_path / "run/step-1").manifest.unshared
    assert alone["net/tied"].entry.alias_of == "net/w"
    vs.save(tmp_path / "run/step-2", vs.open(tmp_path / "run/step-1"), files=alone.files)
    vs.save(tmp_path / "run/step-3", variables, base=tmp_path / "run/step-1")
    vs.save(tmp_path / "run/step-4", alone.select(include="net/b"), links=False)
    vs.links(tmp_path / "run")
    vs.seal(tmp_path / "run/step-1")
    vs.convert(tmp_path / "run/step-1", tmp_path / "run/step-5")
    for step in (1, 4):
        checkpoint = vs.open(tmp_path / f"run/step-{step}")
        assert checkpoint.manifest.unshared
        names = {path: path.stat().st_nlink for path in Path(checkpoint.path).rglob("*") if path.is_file()}
        assert set(names.values()) == {1}, names
    assert os.path.samefile(tmp_path / "run/step-2/net/w/out", tmp_path / "run/step-2/net/tied/out")
    assert all(vs.verify(path).ok for path in (tmp_path / "run").iterdir())
    with vs.CheckpointManager(tmp_path / "run", keep_parts={"net/b": vs.Latest(1)}, links=False) as manager:
        manager.save(6, variables)
    assert vs.open(tmp_path / "run/step-1").manifest.unshared
    assert (tmp_path / "run/step-1/net/w/out").stat().st_nlink == 1
    with pytest.raises(UsageError, match="manifest=False"):
        vs.save(tmp_path / "no", variables, links=False, manifest=False)


def test_what_is_made_of_a_bundle_has_its_graphs_only_where_they_can_run(tmp_path):
    variables = values(head=np.zeros(3, np.float32))
    model = linear({name: variables[name] for name in ("net/w", "net/b")})
    checkpoint = vs.bundle(tmp_path / "c", variables, graphs={"forward": model}, files={"labels": b"a"})
    for options, stays in (
        ({}, True),
        ({"include": "net/*"}, True),
        ({"include": "head"}, False),
        ({"exclude": "net/b"}, True),  # of which the graph has a copy
        ({"rename": {"net": "other"}}, False),
        ({"dtype": "float16"}, False),
    ):
        done = vs.convert(tmp_path / "c", tmp_path / "new", overwrite=True, **options)
        assert set(vs.open(tmp_path / "new").files) == {"labels", *(["forward.onnx"] if stays else [])}
        assert ("file forward.onnx" in done.left_out) == (not stays)
    other = vs.save(tmp_path / "other", {"net/b": variables["net/b"] + 1, "net/w": variables["net/w"] + 1})
    for parts, stays in (([other.select(include="net/w")], True), ([other], False)):
        merged = vs.merge(tmp_path / "m", [checkpoint, *parts], last_wins=True, overwrite=True)
        assert ("forward.onnx" in merged.files) == stays
        assert ("file forward.onnx" in merged.left_out) == (not stays)
    (tmp_path / "c/net/w/out").unlink()
    report = vs.salvage(tmp_path / "c", tmp_path / "saved")
    assert set(vs.open(tmp_path / "saved").files) == {"labels"}
    assert "a variable that it uses" in report.lost["file forward.onnx"]


@given(st.data())
def test_any_choice_of_places_keeps_all_values(data):
    dtypes = [np.dtype(kind) for kind in ("f4", "f2", "i8", "?", "c8", ml_dtypes.bfloat16, ml_dtypes.int4)]
    arrays = {}
    for index in range(data.draw(st.integers(0, 4))):
        shape = data.draw(st.lists(st.integers(0, 5), max_size=3))
        numbers = np.arange(np.prod(shape, dtype=int)).reshape(shape) % 8  # as int4, all bits of which are the value's
        arrays[f"a{index}"] = numbers.astype(data.draw(st.sampled_from(dtypes)))
    model = made.model([made.initializer(*item) for item in arrays.items()], [made.node("Add", ["a"], ["b"])], [], [])
    graph = open_graph(Source(Held.named("m", model)))
    assert {name: array.numpy().tobytes() for name, array in graph.arrays.items()} == {
        name: array.tobytes() for name, array in arrays.items()
    }
    chosen = {name: f"{name}/out" for name in arrays if data.draw(st.booleans())}
    new = {
        name: np.zeros_like(array) for name, array in arrays.items() if name not in chosen and data.draw(st.booleans())
    }
    held = Held.named("m", rewritten(graph, chosen, new))
    found = outside(Source(held))
    assert {record.name: record.external["location"] for record in found.tensors} == chosen
    assert all(int(record.external["length"]) == arrays[record.name].nbytes for record in found.tensors)
    assert found.operators == {"Add"}
    kept = {name: array for name, array in {**arrays, **new}.items() if name not in chosen}
    inner = Held.named("m", rewritten(graph, {}, new))
    again = open_graph(Source(inner)).arrays
    assert {name: again[name].numpy().tobytes() for name in kept} == {n: a.tobytes() for n, a in kept.items()}


def test_what_a_graph_reads_stays_raw_in_a_packed_checkpoint(tmp_path):
    pytest.importorskip("numcodecs")
    variables = {"net/w": np.zeros((16, 2000), np.float32), "net/b": np.zeros(2000, np.float32)}
    others = {"moments": np.zeros(70_000, np.float32)}
    model = linear(variables)
    bundled = vs.bundle(tmp_path / "raw", {**variables, **others}, graphs={"forward": model})
    packed = vs.pack(bundled, tmp_path / "packed")
    assert [packed[name].entry.encoding for name in ("net/w", "net/b", "moments")] == ["raw", "raw", "zarr"]
    assert_exports(packed, tmp_path, variables)
    encoded = vs.save(tmp_path / "encoded", {**variables, **others}, encoding="zarr")
    assert encoded["net/w"].entry.encoding == "zarr"
    again = vs.bundle(tmp_path / "again", encoded, graphs={"forward": model})
    assert [again[name].entry.encoding for name in ("net/w", "moments")] == ["raw", "zarr"]
    assert_exports(again, tmp_path, variables)
    assert vs.verify(again.path).ok
