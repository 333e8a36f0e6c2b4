"""Programs of Paddle and OneFlow with their variables: what is written for them again is what they wrote."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import zipfile
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, strategies as st
from support import FIXTURES, ROOT

import varstore as vs
from varstore.cli import main
from varstore.errors import (
    CheckpointExists,
    DigestMismatch,
    FormatError,
    IncompleteCheckpoint,
    InvalidName,
    SizeMismatch,
    UnsafeContent,
    UsageError,
    VariableMismatch,
    VariableNotFound,
)
from varstore.layout.dtypes import TABLE
from varstore.layout.mlir import ports_of, variables_of
from varstore.values.attached import GivenFile

PADDLE = FIXTURES / "formats/paddle"
TORCH = FIXTURES / "formats/torch/program_2_13.pt2"
GRAPH = FIXTURES / "oneflow/graph"
"""What OneFlow 0.9 wrote with flow.save(graph, path), for a linear layer and a BatchNorm."""


# --- Paddle


PORTS = {
    "methods": (
        [{"name": "x", "type": "float32", "shape": [None, 3]}],
        [{"name": "fetch_name_0", "type": "float32", "shape": [None, 2]}],
        "forward (paddle), 5 variables: x float32 [?, 3] -> fetch_name_0 float32 [?, 2]",
    ),
    "jit_linear_old": (
        [{"name": "x", "type": "float32", "shape": [None, 7]}],
        [{"name": "linear_0.tmp_1", "type": "float32", "shape": [None, 4]}],
        "forward (paddle), 2 variables: x float32 [?, 7] -> linear_0.tmp_1 float32 [?, 4]",
    ),
}


@pytest.mark.parametrize(
    ("stem", "suffix", "methods"), [("methods", ".json", ("", ".encode")), ("jit_linear_old", ".pdmodel", ("",))]
)
def test_paddle_gets_the_bytes_that_it_wrote(tmp_path, stem, suffix, methods):
    graphs = {method or "forward": PADDLE / f"{stem}{method}{suffix}" for method in methods}
    first = vs.bundle(tmp_path / "c", vs.read(PADDLE / stem), graphs=graphs)
    about = first.files[f"{stem}{suffix}"].attributes
    inputs, outputs, shown = PORTS[stem]
    assert ([*about["inputs"]], [*about["outputs"]]) == (inputs, outputs)
    assert shown in CliRunner().invoke(main, ["show", str(tmp_path / "c")]).output
    done = CliRunner().invoke(main, ["export", str(tmp_path / "c"), str(tmp_path / "net")])
    assert done.exit_code == 0, done.output
    written = {Path(line) for line in done.output.splitlines()}
    assert written == set(tmp_path.glob("net*"))
    for path in written:
        assert path.read_bytes() == (PADDLE / path.name.replace("net", stem, 1)).read_bytes(), path
    assert vs.export(first, tmp_path / f"net{suffix}")
    values = {name: variable.numpy() + 1 for name, variable in first.items()}
    second = vs.bundle(tmp_path / "d", values, graphs=first)
    assert set(second.files) == set(first.files)
    (tmp_path / f"net{suffix}").write_bytes(b"other")
    with pytest.raises(CheckpointExists):
        vs.export(second, tmp_path / "net")
    vs.export(second, tmp_path / "new")
    found = vs.read(tmp_path / "new")
    assert {name: array.numpy().tobytes() for name, array in found.items()} == {
        name: values[name].tobytes() for name in found
    }


def test_a_program_of_paddle_is_bound_to_what_it_fits(tmp_path):
    program, values = PADDLE / "methods.json", dict(vs.read(PADDLE / "methods"))
    del values["generated_tensor_0"]
    checkpoint = vs.bundle(tmp_path / "c", {**values, "m": np.zeros(3)}, graphs={"forward": program})
    assert set(checkpoint) == {*values, "m", "generated_tensor_0"}  # a constant, which lies beside the program
    only = {name: values[name] for name in ("linear_0.b_0", "linear_0.w_0")}
    assert set(vs.bundle(tmp_path / "d", only, graphs={"forward": PADDLE / "methods.encode.json"})) == {
        *vs.read(PADDLE / "methods.encode.json")
    }
    with pytest.raises(VariableMismatch, match=r"linear_0\.b_0: float32 \[2\] in the graph, float32 \[3\]"):
        vs.bundle(tmp_path / "e", {**values, "linear_0.b_0": np.zeros(3, np.float32)}, graphs={"forward": program})
    shutil.copy(program, tmp_path / "methods.json")
    with pytest.raises(VariableNotFound, match=r"'generated_tensor_0'.*bring methods.pdiparams along"):
        vs.bundle(tmp_path / "e", values, graphs={"forward": tmp_path / "methods.json"})
    (tmp_path / "large.json").touch()
    os.truncate(tmp_path / "large.json", (1 << 28) + 1)
    for name in ("large.json", "m.pdmodel"):
        (tmp_path / "m.pdmodel").write_bytes(b"\x0f no")
        with pytest.raises(FormatError):
            vs.bundle(tmp_path / "e", values, graphs={"forward": tmp_path / name})
    assert not (tmp_path / "e").exists()


# --- PyTorch


def test_a_program_of_torch_is_kept_without_the_bytes_of_its_weights(tmp_path):
    values = {name: array.numpy() for name, array in vs.read(TORCH).items()}
    values["fc.weight"] = values["head.weight"]  # which are one in the program
    first = vs.bundle(tmp_path / "c", {**values, "m": np.zeros(3)}, graphs={"forward": TORCH}, include_only_used=True)
    assert set(first) == set(values)
    file = first.files[TORCH.name]
    (port,) = file.attributes["inputs"]
    assert port == {"name": "x", "type": "float32", "shape": [1, 3]}
    with zipfile.ZipFile(file.path) as kept, zipfile.ZipFile(TORCH) as whole:
        lacking = {*whole.namelist()} - {*kept.namelist()}
        assert lacking == {f"program_2_13/data/weights/weight_{index}" for index in range(5)}
        assert all(kept.read(name) == whole.read(name) for name in kept.namelist())
    with pytest.raises(FormatError, match="varstore export"):
        vs.read(file.path)
    shown = CliRunner().invoke(main, ["show", str(tmp_path / "c")]).output
    assert "forward (torch), 6 variables: x float32 [1, 3] -> add_2 float32 [1, 2]" in shown
    assert vs.export(first, tmp_path / "out.pt2") == (str(tmp_path / "out.pt2"),)
    with zipfile.ZipFile(tmp_path / "out.pt2") as again, zipfile.ZipFile(TORCH) as whole:
        assert {name: again.read(name) for name in again.namelist()} == {n: whole.read(n) for n in whole.namelist()}
    values["scale"] = values["scale"] * 2
    with vs.CheckpointManager(tmp_path / "run") as manager:
        manager.save(1, values, graphs_from=first)
    assert os.path.samefile(tmp_path / "run/step-1" / TORCH.name, file.path)
    vs.export(tmp_path / "run/step-1", tmp_path / "new.pt2")
    found = vs.read(tmp_path / "new.pt2")
    assert {name: array.numpy().tobytes() for name, array in found.items()} == {
        n: v.tobytes() for n, v in values.items()
    }


def test_a_program_of_torch_with_other_weights_is_refused_or_keeps_them(tmp_path):
    values = {name: array.numpy() for name, array in vs.read(TORCH).items()}
    other = {**values, "scale": values["scale"] + 1}
    with pytest.raises(VariableMismatch, match="scale: other values"):
        vs.bundle(tmp_path / "c", other, graphs={"forward": TORCH})
    with pytest.raises(VariableMismatch, match=r"scale: float32 \[2\] in the graph, float32 \[3\]"):
        vs.bundle(tmp_path / "c", {"scale": np.ones(3, np.float32)}, graphs={"forward": TORCH})
    for on_difference in ("inline", "add"):
        path = tmp_path / on_difference
        checkpoint = vs.bundle(path, other, graphs={"forward": TORCH.read_bytes()}, on_difference=on_difference)
        assert ("forward/scale" in checkpoint) == (on_difference == "add")
        with pytest.raises(VariableMismatch, match="values are now others"):
            vs.bundle(tmp_path / "d", values, graphs=checkpoint)
        assert vs.export(checkpoint, tmp_path / "out.pt2")
        np.testing.assert_array_equal(vs.read(tmp_path / "out.pt2")["scale"], values["scale"])
    untied = {**values, "head.weight": values["head.weight"] + 1}
    checkpoint = vs.bundle(tmp_path / "d", values, graphs={"forward": TORCH})
    with pytest.raises(VariableMismatch, match="are one in the program"):
        vs.export(vs.bundle(tmp_path / "e", untied, graphs=checkpoint), tmp_path / "no.pt2")
    only = vs.bundle(tmp_path / "f", {"fc.weight": values["fc.weight"]}, graphs={"forward": TORCH})
    vs.export(vs.bundle(tmp_path / "g", {"fc.weight": values["fc.weight"] * 2}, graphs=only), tmp_path / "tied.pt2")
    np.testing.assert_array_equal(vs.read(tmp_path / "tied.pt2")["head.weight"], values["fc.weight"] * 2)
    for name in ("program_2_6.pt2", "program_2_8.pt2"):
        with pytest.raises(FormatError, match="Load it with a later version"):
            vs.bundle(tmp_path / "no", values, graphs={"forward": TORCH.with_name(name)})
    assert not (tmp_path / "no").exists()


def test_a_weight_that_is_a_part_of_its_bytes_gets_its_values_back(tmp_path):
    with zipfile.ZipFile(TORCH) as given, zipfile.ZipFile(tmp_path / "part.pt2", "w") as copy:
        for member in given.namelist():
            content = given.read(member)
            if member.endswith("weights_config.json"):
                about = json.loads(content)
                meta = about["config"]["fc.weight"]["tensor_meta"]
                meta |= {"sizes": [{"as_int": 2}, {"as_int": 2}], "storage_offset": {"as_int": 1}}
                about["config"]["head.bias"]["tensor_meta"] |= {
                    "sizes": [{"as_int": 0}],
                    "storage_offset": {"as_int": 1 << 20},
                }
                del about["config"]["head.weight"]
                content = json.dumps(about).encode()
            copy.writestr(member, content)
    values = {name: array.numpy() for name, array in vs.read(tmp_path / "part.pt2").items()}
    first = vs.bundle(tmp_path / "c", values, graphs={"forward": tmp_path / "part.pt2"})
    with zipfile.ZipFile(first.files["part.pt2"].path) as kept, zipfile.ZipFile(TORCH) as whole:
        assert {name for name in whole.namelist() if name not in kept.namelist()} == {
            f"program_2_13/data/weights/weight_{index}" for index in (0, 2, 4)
        }
        before = whole.read("program_2_13/data/weights/weight_1")
    changed = {**values, "fc.weight": np.float32([[1, 2], [3, 4]])}
    vs.export(vs.bundle(tmp_path / "d", changed, graphs=first), tmp_path / "out.pt2")
    with zipfile.ZipFile(tmp_path / "out.pt2") as again:
        found = np.frombuffer(again.read("program_2_13/data/weights/weight_1"), np.float32)
    expected = np.frombuffer(before, np.float32).copy()
    expected[[1, 2, 4, 5]] = 1, 2, 3, 4
    np.testing.assert_array_equal(found, expected)


def test_what_a_bundle_does_not_take_is_named(tmp_path):
    formats = FIXTURES / "formats"
    for path, error, match in (
        (formats / "megengine/convnet_dump.mge", UsageError, r"bound to variables\. Keep it with varstore.save"),
        (tmp_path / "state.pt", FormatError, "not an exported program"),
    ):
        vs.write(tmp_path / "state.pt", {"w": np.ones(2)})
        with pytest.raises(error, match=match):
            vs.bundle(tmp_path / "c", {"w": np.ones(2)}, graphs={"forward": path})


def test_a_weight_that_cannot_leave_the_program_is_compared_too(tmp_path):
    with zipfile.ZipFile(TORCH) as given, zipfile.ZipFile(tmp_path / "half.pt2", "w") as copy:
        for member in given.namelist():
            content = given.read(member)
            if member.endswith("weights_config.json"):
                about = json.loads(content)
                about["config"]["scale"]["tensor_meta"]["dtype"] = 9  # complex32, which is read as pairs of float16
                content = json.dumps(about).encode()
            copy.writestr(member, content)
    values = {name: array.numpy() for name, array in vs.read(tmp_path / "half.pt2").items()}
    other = {**values, "scale": values["scale"] + 1}
    graphs = {"forward": tmp_path / "half.pt2"}
    with pytest.raises(VariableMismatch, match="scale: other values"):
        vs.bundle(tmp_path / "c", other, graphs=graphs)
    inline = vs.bundle(tmp_path / "inline", other, graphs=graphs, on_difference="inline")
    equal = vs.bundle(tmp_path / "equal", values, graphs=graphs)
    for checkpoint, changed in ((inline, values), (equal, other)):
        with pytest.raises(VariableMismatch, match="values are now others"):
            vs.bundle(tmp_path / "d", changed, graphs=checkpoint)
        vs.export(checkpoint, tmp_path / "out.pt2")
        np.testing.assert_array_equal(vs.read(tmp_path / "out.pt2")["scale"], values["scale"])


@pytest.mark.parametrize("change", ["shape", "name", "lacking"])
def test_a_program_of_torch_that_is_not_what_its_entry_says_is_not_written(tmp_path, change):
    values = {name: array.numpy() for name, array in vs.read(TORCH).items()}
    checkpoint = vs.bundle(tmp_path / "c", values, graphs={"forward": TORCH})
    with zipfile.ZipFile(checkpoint.files[TORCH.name].path) as given, zipfile.ZipFile(tmp_path / "a.pt2", "w") as copy:
        for member in given.namelist():
            content = given.read(member)
            if member.endswith("weights_config.json"):
                about = json.loads(content)
                if change == "shape":
                    about["config"]["scale"]["tensor_meta"]["sizes"] = [{"as_int": 1}]
                elif change == "name":
                    about["config"]["other"] = about["config"].pop("scale")
                else:
                    about["config"]["other"] = {**about["config"]["scale"], "path_name": "weight_9"}
                content = json.dumps(about).encode()
            copy.writestr(member, content)
    forged = GivenFile(str(tmp_path / "a.pt2"), "graph", checkpoint.files[TORCH.name].attributes)
    vs.save(tmp_path / "d", values, files={"a.pt2": forged})
    with pytest.raises(UnsafeContent, match="not what its entry says"):
        vs.export(tmp_path / "d", tmp_path / "out.pt2")
    assert not (tmp_path / "out.pt2").exists()


# --- OneFlow


def copied(tmp_path):
    shutil.copytree(GRAPH, tmp_path / "graph")
    return tmp_path / "graph"


def test_a_graph_of_oneflow_is_read_and_sealed_where_it_is_whole(tmp_path):
    graph = copied(tmp_path)
    values = {name: array.numpy() for name, array in vs.read(graph).items()}
    assert len(values) == 7
    with pytest.raises(IncompleteCheckpoint):
        vs.seal(graph)
    done = CliRunner().invoke(main, ["seal", "--complete", str(graph)])
    assert done.exit_code == 0, done.output
    assert vs.verify(graph).ok
    checkpoint = vs.read(graph)
    assert isinstance(checkpoint, vs.Checkpoint)
    assert {name: variable.numpy().tobytes() for name, variable in checkpoint.items()} == {
        name: array.tobytes() for name, array in values.items()
    }
    program = checkpoint.files["model.mlir"]
    assert program.read() == (GRAPH / "model.mlir").read_bytes()
    assert set(program.attributes["bindings"]) == values.keys() - {"m.bn.num_batches_tracked"}
    assert [*program.attributes["inputs"]] == [{"name": "_G_0_input.0.0_2", "type": "float32", "shape": [2, 16]}]
    assert [*program.attributes["outputs"]] == [{"name": "_G_0_output.0.0_2", "type": "float32", "shape": [2, 20]}]
    bundled = vs.bundle(tmp_path / "b", values, graphs={"forward": GRAPH / "model.mlir"}).files["model.mlir"]
    assert bundled.attributes == program.attributes
    assert vs.seal(graph, complete=True).equal
    (graph / "snapshot_done").unlink()  # as if sealing had been killed before its last step
    assert vs.seal(graph, complete=True).equal
    checkpoint = vs.open(graph)
    second = vs.bundle(tmp_path / "2", {**checkpoint, "m.fc.bias": values["m.fc.bias"] + 1}, graphs=checkpoint)
    assert second.files["model.mlir"].read() == (GRAPH / "model.mlir").read_bytes()
    assert second["m.fc.bias"].numpy().tobytes() == (values["m.fc.bias"] + 1).tobytes()


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda graph: shutil.rmtree(graph / "m.fc.weight"), IncompleteCheckpoint),
        (lambda graph: (graph / "model.mlir").unlink(), IncompleteCheckpoint),
        (lambda graph: (graph / "m.bn.bias/out").write_bytes(bytes(76)), SizeMismatch),
        (lambda graph: (graph / "m.bn.num_batches_tracked/out").write_bytes(b""), SizeMismatch),
        (lambda graph: (graph / "m.fc.bias/meta").write_text("shape {\n  dim: 20\n}\ndata_type: kInt32\n"),
         IncompleteCheckpoint),
        (lambda graph: (graph / "model.mlir").write_text('"oneflow.variable"() {}'), FormatError),
    ],
)  # fmt: skip
def test_what_is_not_whole_is_not_sealed(tmp_path, change, error):
    graph = copied(tmp_path)
    change(graph)
    before = sorted(path.relative_to(graph) for path in graph.rglob("*"))
    with pytest.raises(error):
        vs.seal(graph, complete=True)
    assert sorted(path.relative_to(graph) for path in graph.rglob("*")) == before


def test_oneflow_gets_the_folder_that_it_wrote(tmp_path):
    values = {name.removeprefix("m."): array.numpy() for name, array in vs.read(GRAPH).items()}
    graphs = {"forward": GRAPH / "model.mlir"}
    with pytest.raises(VariableNotFound, match="rename="):
        vs.bundle(tmp_path / "c", values, graphs=graphs)
    with pytest.raises(VariableMismatch, match=r"float32 \[20\] in the graph, float32 \[21\] in the variables"):
        vs.bundle(tmp_path / "c", {**values, "fc.bias": np.zeros(21, "f4")}, graphs=graphs, rename={"": "m."})
    vs.bundle(tmp_path / "c", values, graphs=graphs, rename=[("^", "m.")], include_only_used=True)
    vs.export(tmp_path / "c", tmp_path / "graph")
    files = {path.relative_to(tmp_path / "graph") for path in (tmp_path / "graph").rglob("*") if path.is_file()}
    original = {path.relative_to(GRAPH) for path in GRAPH.rglob("*") if path.is_file()}
    unused = {Path("m.bn.num_batches_tracked/out"), Path("m.bn.num_batches_tracked/meta")}
    assert files == original - unused | {Path("snapshot_done")}
    assert all((tmp_path / "graph" / path).read_bytes() == (GRAPH / path).read_bytes() for path in original - unused)
    with pytest.raises(CheckpointExists):
        vs.export(tmp_path / "c", tmp_path / "graph")
    (tmp_path / "c/model.mlir").chmod(0o644)
    (tmp_path / "c/model.mlir").write_bytes((GRAPH / "model.mlir").read_bytes().replace(b"tensor<2x16", b"tensor<2x17"))
    assert not vs.verify(tmp_path / "c").ok
    with pytest.raises(DigestMismatch):
        vs.export(tmp_path / "c", tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_oneflow_loads_what_was_sealed_bundled_and_exported(tmp_path):
    python = Path(os.environ.get("VARSTORE_ENVS", ROOT / ".envs")) / "oneflow/bin/python"
    if not python.exists():
        pytest.skip("no environment oneflow: run tools/make_envs.sh oneflow")
    graph = copied(tmp_path)
    vs.seal(graph, complete=True)
    vs.bundle(tmp_path / "bundled", vs.open(graph), graphs={"forward": graph / "model.mlir"})
    vs.export(tmp_path / "bundled", tmp_path / "exported")
    code = "import sys, oneflow as flow\nfor path in sys.argv[1:]:\n    values = flow.load(path)\n"
    code += "    print(len(values), values['m.fc.weight'].numpy().tobytes().hex())"
    paths = [graph, tmp_path / "bundled", tmp_path / "exported"]
    done = subprocess.run([python, "-W", "ignore", "-c", code, *paths], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    weight = (GRAPH / "m.fc.weight/out").read_bytes().hex()
    assert done.stdout.splitlines()[-3:] == [f"{count} {weight}" for count in (7, 7, 6)]


def test_a_name_that_oneflow_would_not_find_is_not_exported(tmp_path):
    program = b'%0 = "oneflow.variable"() {data_type = 2 : i32, op_name = "a/b", shape = [1 : si64]} : () -> f'
    (tmp_path / "model.mlir").write_bytes(program)
    values = {"a/b": np.zeros(1, np.float32)}
    checkpoint = vs.bundle(tmp_path / "c", values, graphs={"forward": tmp_path / "model.mlir"})
    with pytest.raises(InvalidName, match="a/b"):
        vs.export(checkpoint, tmp_path / "graph")
    with pytest.raises(UsageError, match=r"'model\.mlir'"):
        vs.bundle(tmp_path / "d", values, graphs={"f": tmp_path / "model.mlir", "g": tmp_path / "model.mlir"})


def test_ports_of_oneflow_are_in_the_order_of_the_job(tmp_path):
    about = 'data_type = {} : i32, op_name = "{}", shape = [{}]'
    program = f"""module {{
  oneflow.job @G(%arg0: tensor<2xf32>, %arg1: tensor<3xi64>) -> (tensor<1xf32>, tensor<f32>) {{
    %output = "oneflow.input"(%arg1) {{{about.format(6, "b", "3 : si64")}}} : (tensor<3xi64>) -> tensor<3xi64>
    %output_0 = "oneflow.input"(%arg0) {{{about.format(2, "a", "2 : si64")}}} : (tensor<2xf32>) -> tensor<2xf32>
    %output_2 = "oneflow.output"(%0) {{{about.format(2, "second", "")}}} : (tensor<f32>) -> tensor<f32>
    %output_1 = "oneflow.output"(%1) {{{about.format(999, "first", "1 : si64")}}} : (tensor<1xf32>) -> tensor<1xf32>
    oneflow.return %output_1, %output_2 : tensor<1xf32>, tensor<f32>
  }}
}}"""
    assert ports_of(program.encode()) == {
        "inputs": [{"name": "a", "type": "float32", "shape": [2]}, {"name": "b", "type": "int64", "shape": [3]}],
        "outputs": [{"name": "first", "type": "", "shape": [1]}, {"name": "second", "type": "float32", "shape": []}],
    }
    long = program.replace("[1 : si64]", f"[{'9' * 5000} : si64]").replace("%arg1", f"%arg{'1' * 5000}")
    assert [len(ports) for ports in ports_of(long.encode()).values()] == [2, 2]
    with pytest.raises(FormatError, match="a known type"):
        variables_of(f'"oneflow.variable"() {{{about.format("1" * 5000, "a", "")}}}'.encode(), path="model.mlir")


@pytest.mark.parametrize("change", ["no names", "no types"])
def test_a_program_of_paddle_that_does_not_say_its_ports_is_kept_without(tmp_path, change):
    program = json.loads((PADDLE / "methods.json").read_bytes())
    for operation in program["program"]["regions"][0]["blocks"][0]["ops"]:
        if operation["#"] == "1.data" and change == "no names":
            operation["A"] = []
        elif operation["#"] == "1.data":
            operation["O"][0]["TT"] = {"#": "0.t_vec", "D": []}
    (tmp_path / "methods.json").write_text(json.dumps(program))
    shutil.copy(PADDLE / "methods.pdiparams", tmp_path)
    checkpoint = vs.bundle(tmp_path / "c", vs.read(PADDLE / "methods"), graphs={"f": tmp_path / "methods.json"})
    expected = [] if change == "no names" else [{"name": "x", "type": "", "shape": None}]
    assert [*checkpoint.files["methods.json"].attributes["inputs"]] == expected
    assert CliRunner().invoke(main, ["show", str(tmp_path / "c")]).exit_code == 0


ROWS = [row for row in TABLE if row.dtype is not None]
WORDS = st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs")), min_size=1, max_size=9)


@given(st.dictionaries(WORDS, st.tuples(st.lists(st.integers(0, 99), max_size=3), st.sampled_from(ROWS)), max_size=4))
def test_all_variables_of_a_program_are_found(variables):
    lines = ["module {"]
    for name, (shape, row) in variables.items():
        text = "".join(f"\\{byte:02X}" if chr(byte) in '"\\' or byte > 126 else chr(byte) for byte in name.encode())
        extents = ", ".join(f"{extent} : si64" for extent in shape)
        about = f'data_type = {row.number} : i32, device_name = ["@0:0"], op_name = "{text}", shape = [{extents}]'
        lines.append(f'    %out = "oneflow.variable"() {{{about}}} : () -> tensor<f32>')
        lines.append(f'    %1 = "oneflow.matmul"(%out) {{op_name = "{text}-matmul", shape = [7 : si64]}} : () -> f')
    found = variables_of("\n".join([*lines, "}"]).encode(), path="model.mlir")
    assert {name: (list(meta.shape), meta.data_type) for name, meta in found.items()} == {
        name: (shape, row) for name, (shape, row) in variables.items()
    }
