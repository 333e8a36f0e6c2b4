"""Bundles in onnx and onnxruntime: which versions open which files, and what runs has the checkpoint's values."""

from __future__ import annotations

import os

import ml_dtypes
import numpy as np
import pytest
from click.testing import CliRunner
from support import onnx_models as made

import varstore as vs
from varstore.cli import main
from varstore.errors import SizeMismatch, UnsafeContent, UsageError
from varstore.values.attached import GivenFile

onnx = pytest.importorskip("onnx")
adapter = pytest.importorskip("varstore.adapters.onnx")
check, load_model, session = adapter.check, adapter.load_model, adapter.session
REFUSES_LINKS = tuple(map(int, onnx.__version__.split(".")[:2])) >= (1, 21)
RANDOM = np.random.default_rng(3)


def values():
    weights = {"w": RANDOM.standard_normal((16, 20)), "b": RANDOM.standard_normal(20)}
    return {name: array.astype(np.float32) for name, array in weights.items()}


def loads(path) -> bool:
    try:
        model = onnx.load(path)
    except onnx.checker.ValidationError as error:
        if "hard link" not in str(error):
            raise
        return False
    onnx.checker.check_model(model, full_check=True)
    return True


def test_a_parent_loads_before_and_after_a_child_was_saved(tmp_path):
    variables = values()
    for name, links in (("linked", True), ("alone", False)):
        parent = vs.bundle(tmp_path / name, variables, graphs={"forward": made.linear(variables)}, links=links)
        assert loads(tmp_path / name / "forward.onnx")
        vs.bundle(tmp_path / f"{name}-2", variables, graphs=parent, base=parent)
        assert loads(tmp_path / name / "forward.onnx") == (not links or not REFUSES_LINKS)
        for place in (name, f"{name}-2"):
            model = load_model(tmp_path / place)
            onnx.checker.check_model(model, full_check=True)
            found = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
            assert {key: array.tobytes() for key, array in found.items()} == {
                key: array.tobytes() for key, array in variables.items()
            }
        vs.export(tmp_path / f"{name}-2", tmp_path / "m.onnx")
        assert loads(tmp_path / "m.onnx")


def test_onnxruntime_runs_what_is_saved_and_what_is_saved_from_it(tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    variables = values()
    x = RANDOM.standard_normal((3, 16)).astype(np.float32)
    parent = vs.bundle(tmp_path / "1", variables, graphs={"forward": onnx.load_from_string(made.linear(variables))})
    for step in (2, 3):
        variables["b" if step == 2 else "w"] += 1
        vs.bundle(tmp_path / str(step), variables, graphs=parent, base=parent)
        vs.export(tmp_path / str(step), tmp_path / "m.onnx")
        for opened in (session(tmp_path / str(step)), runtime.InferenceSession(tmp_path / "m.onnx")):
            (found,) = opened.run(None, {"x": x})
            np.testing.assert_allclose(found, x @ variables["w"] + variables["b"], atol=1e-5)
    report = check(tmp_path / "3", against=tmp_path / "2")
    assert report
    assert report.graphs[0].difference > 1
    assert check(tmp_path / "3", against=tmp_path / "3").graphs[0].difference == 0
    done = CliRunner().invoke(main, ["check", str(tmp_path / "3"), "--against", str(tmp_path / "1")])
    assert done.exit_code == 0
    assert "every graph ran" in done.output
    assert "y float32 [1, 20]; largest difference" in done.output
    with pytest.raises(UsageError, match="no such entry"):
        check(tmp_path / "3", entry="backward")


def test_values_that_runtimes_would_misread_in_files_run_right(tmp_path):
    pytest.importorskip("onnxruntime")
    narrow = RANDOM.integers(-8, 8, (64, 64)).astype(ml_dtypes.int4)
    splits = np.full(128, 1, np.int64)
    model = made.model(
        [made.initializer("narrow", narrow), made.initializer("splits", splits)],
        [
            made.node("Cast", ["narrow"], ["wide"], [made.integer("to", 1)]),
            made.node("MatMul", ["x", "wide"], ["y"]),
            made.node("Split", ["z", "splits"], [f"z{index}" for index in range(128)]),
        ],
        [made.value("x", 1, ["batch", 64]), made.value("z", 1, [128])],
        [made.value("y", 1, ["batch", 64]), made.value("z127", 1, [1])],
        version=21,
    )
    vs.bundle(tmp_path / "c", {"narrow": narrow, "splits": splits}, graphs={"forward": model})
    x, z = RANDOM.standard_normal((2, 64)).astype(np.float32), np.arange(128, dtype=np.float32)
    y, last = session(tmp_path / "c").run(None, {"x": x, "z": z})
    np.testing.assert_allclose(y, x @ narrow.astype(np.float32), atol=1e-4)
    assert last == 127


def test_a_graph_that_does_not_run_fails_the_check(tmp_path):
    pytest.importorskip("onnxruntime")
    variables = values()
    wide = made.linear({**variables, "b": variables["b"]}).replace(b"MatMul", b"MatMux")
    checkpoint = vs.bundle(tmp_path / "c", variables, graphs={"forward": wide})
    report = check(checkpoint)
    assert not report
    assert "MatMux" in str(report)
    assert CliRunner().invoke(main, ["check", str(tmp_path / "c")]).exit_code == 1


def test_only_what_is_whole_and_ones_own_is_run(tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime")
    variables = values()
    vs.bundle(tmp_path / "c", variables, graphs={"forward": made.linear(variables)})
    monkeypatch.setattr("varstore.storage.syscalls.user", lambda: os.stat(tmp_path).st_uid + 1)
    with pytest.raises(UnsafeContent, match="trust=True"):
        session(tmp_path / "c")
    session(tmp_path / "c", trust=True)
    about = {"entry": "forward", "format": "onnx", "inputs": [], "outputs": [], "bindings": {}}
    said = {"location": "w/out", "offset": "4", "length": "1276"}
    graph = made.model([made.initializer("w", variables["w"].reshape(-1)[:319], said)], [], [], [])
    vs.save(tmp_path / "d", variables, files={"forward.onnx": GivenFile(graph, "graph", about)})
    for use in (load_model, lambda path: session(path, trust=True), lambda path: check(path, trust=True)):
        with pytest.raises(UnsafeContent, match="offset 0"):
            use(tmp_path / "d")
    (tmp_path / "c/w/out").unlink()
    (tmp_path / "c/w/out").write_bytes(b"short")
    with pytest.raises(SizeMismatch):
        session(tmp_path / "c", trust=True)
