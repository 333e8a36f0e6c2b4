"""OneFlow's own directories: loaded as they were meant, and written again byte for byte."""

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import varstore as vs

pytestmark = pytest.mark.core

DATA = Path(__file__).resolve().parents[1] / "data" / "oneflow"


def assert_same(found, expected):
    expected = np.asarray(expected)
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype.newbyteorder("<")
    assert found.tobytes() == expected.astype(expected.dtype.newbyteorder("<")).tobytes()


def tree(directory):
    """Every file below, by its path: what it holds."""
    return {str(p.relative_to(directory)): p.read_bytes() for p in Path(directory).rglob("*") if p.is_file()}


def truth(name):
    with np.load(DATA / f"{name}.expect.npz") as stored:
        return {key: stored[key] for key in stored.files}


@pytest.mark.parametrize("name", ["dtypes_legacy", "lenet_legacy"])
def test_oneflow_directories_load_and_are_rewritten_byte_for_byte(tmp_path, name):
    expected = truth(name)
    loaded = vs.load(DATA / name)
    assert sorted(loaded) == sorted(expected)
    for key, value in expected.items():
        assert_same(loaded[key], value)
    vs.save(tmp_path / "arrays", loaded, manifest=False, durable=False)
    vs.save(tmp_path / "links", vs.open(DATA / name), manifest=False, durable=False)
    assert tree(tmp_path / "arrays") == tree(DATA / name) == tree(tmp_path / "links")
    folders = {str(p.relative_to(DATA / name)) for p in (DATA / name).rglob("*")}
    assert {str(p.relative_to(tmp_path / "arrays")) for p in (tmp_path / "arrays").rglob("*")} == folders


def test_a_oneflow_variable_without_meta_needs_a_target():
    expected = truth("lenet_legacy_nometa")
    opened = vs.open(DATA / "lenet_legacy_nometa")
    with pytest.raises(vs.errors.MetaError, match="conv1-bias"):
        _ = opened["conv1-bias"].shape
    with pytest.raises(vs.errors.MetaError, match="load_into"):
        vs.load(opened)
    targets = {name: np.zeros_like(value) for name, value in expected.items()}
    report = vs.load_into(targets, opened)
    assert set(report.loaded) == set(expected)
    for name, value in expected.items():
        assert_same(targets[name], value)
    rest = vs.load(opened, exclude="conv1-bias")
    assert sorted(rest) == sorted(expected.keys() - {"conv1-bias"})


def test_oneflow_bfloat16_in_four_bytes(tmp_path):
    values = np.array([[1.5, -2.0, 3e38], [0.1, np.inf, 0]], np.float32).astype(ml_dtypes.bfloat16)
    folder = tmp_path / "c" / "w"
    folder.mkdir(parents=True)
    (folder / "out").write_bytes(values.astype("<f4").tobytes())
    (folder / "meta").write_text("shape {\n  dim: 2\n  dim: 3\n}\ndata_type: kBFloat16\n")
    (tmp_path / "c" / "snapshot_done").touch()
    variable = vs.open(tmp_path / "c")["w"]
    assert variable.nbytes == 12
    for found in (vs.load(tmp_path / "c")["w"], variable.numpy(), variable[:], variable.numpy(mmap=True)):
        assert_same(found, values)
    target = {"w": np.zeros((2, 3), ml_dtypes.bfloat16)}
    vs.load_into(target, tmp_path / "c")
    assert_same(target["w"], values)
    again = vs.save(tmp_path / "again", vs.open(tmp_path / "c"))
    assert (tmp_path / "again/w/out").stat().st_size == 12
    assert_same(again["w"].numpy(), values)
    vs.seal(tmp_path / "c")
    assert_same(vs.load(tmp_path / "c")["w"], values)
    assert vs.verify(tmp_path / "c").ok


@pytest.mark.parametrize(
    "text",
    [
        "shape { dim: 2 dim: 3 } data_type: kFloat",
        "data_type: 2 shape: { dim: [2, 3] }",
        "# by hand\nshape <\n dim: 0x2; dim: 03\n>\n\n data_type : kFloat # ok",
    ],
)
def test_meta_in_any_legal_spelling(tmp_path, text):
    folder = tmp_path / "c" / ".hidden" / "deep" / "w"
    folder.mkdir(parents=True)
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    (folder / "out").write_bytes(values.tobytes())
    (folder / "meta").write_text(text)
    (folder / "unknown").write_text("ignored")
    (tmp_path / "c" / "snapshot_done").touch()
    assert_same(vs.load(tmp_path / "c")[".hidden/deep/w"], values)
    vs.seal(tmp_path / "c")
    assert_same(vs.load(tmp_path / "c")[".hidden/deep/w"], values)
    (folder / "meta").write_text(text + " ")
    assert_same(vs.load(tmp_path / "c")[".hidden/deep/w"], values)  # the manifest vouches for shape and type
    (problem,) = vs.verify(tmp_path / "c").problems
    assert "meta is not what the manifest says" in problem
