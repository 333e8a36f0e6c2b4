"""The verbs that load take every path that `varstore.read` opens."""

import numpy as np
import pytest

import varstore as vs

FLAT = {"net.weight": np.arange(6, dtype=np.float32).reshape(2, 3), "net.bias": np.ones(2, np.float32)}
FILES = ("a.safetensors", "a.npz", "a.pt", "a.of", "a.pdparams", "a.mge", "a.ckpt", "a.zarr")


@pytest.fixture(params=FILES)
def file(request, tmp_path):
    if request.param == "a.zarr":
        pytest.importorskip("zarr")
    vs.write(tmp_path / request.param, FLAT)
    return tmp_path / request.param


def assert_same(found, expected):
    assert sorted(map(str, found)) == sorted(expected)
    for name, values in expected.items():
        assert type(found[name]) is np.ndarray
        assert (found[name].dtype, found[name].tolist()) == (values.dtype, values.tolist())


def test_load(file):
    calls = []
    assert_same(vs.load(file, progress=lambda *done: calls.append(done)), FLAT)
    assert calls[-1] == (32, 32)
    assert_same(vs.load(file, include="*bias", rename={"net": "other"}), {"other.bias": FLAT["net.bias"]})
    with pytest.raises(vs.errors.VariableNotFound, match="weigth"):
        vs.load(file, include="net.weigth")
    with pytest.raises(vs.errors.UsageError, match="mmap"):
        vs.load(file, mmap=True)
    assert_same(vs.load(vs.read(file)), FLAT)


def test_load_into(file):
    targets = {"net.weight": np.zeros((2, 3), np.float32), "net.bias": np.zeros(2, np.float32)}
    report = vs.load_into(targets, file)
    assert_same(targets, FLAT)
    assert report.source == str(file)
    with pytest.raises(vs.errors.VariableMismatch, match=r"net\.bias"):
        vs.load_into({"net.bias": np.zeros(3, np.float32)}, file)


def test_load_state(file):
    assert_same(vs.load_state(file), FLAT)
    assert_same(vs.load_state(file, exclude="*weight"), {"net.bias": FLAT["net.bias"]})


def test_load_checkpoint(file):
    assert_same(vs.load_checkpoint(file, specify_prefix="net.b"), {"net.bias": FLAT["net.bias"]})
    net = {"net.weight": np.zeros((2, 3), np.float32)}
    vs.load_checkpoint(file, net)
    assert net["net.weight"].tolist() == FLAT["net.weight"].tolist()
    with pytest.raises(vs.errors.UsageError, match="nothing is left"):
        vs.load_checkpoint(file, filter_prefix="net.")


def test_load_checkpoint_finds_the_directory_without_suffix(tmp_path):
    vs.save(tmp_path / "resnet-2_32", FLAT)
    assert_same(vs.load_checkpoint(tmp_path / "resnet-2_32.ckpt"), FLAT)
    other = {"net.bias": np.zeros(2, np.float32)}
    vs.write(tmp_path / "resnet-2_32.ckpt", other)
    assert_same(vs.load_checkpoint(tmp_path / "resnet-2_32.ckpt"), other)
    with pytest.raises(vs.errors.CheckpointNotFound, match=r"resnet-3_32\.ckpt"):
        vs.load_checkpoint(tmp_path / "resnet-3_32.ckpt")


def test_tied_arrays_of_a_file_are_one_array(tmp_path):
    shared = np.ones(3)
    vs.write(tmp_path / "a.pt", {"a": shared, "b": shared, "c": np.ones(3)})
    found = vs.load(tmp_path / "a.pt")
    assert found["a"] is found["b"]
    assert found["c"] is not found["a"]


@pytest.mark.parametrize("verb", [vs.load, vs.load_state, vs.load_checkpoint, lambda path: vs.load_into({}, path)])
def test_what_is_not_a_checkpoint_is_refused_as_before(tmp_path, verb):
    with pytest.raises(vs.errors.CheckpointNotFound):
        verb(tmp_path / "absent")
    vs.save(tmp_path / "torn", FLAT)
    (tmp_path / "torn" / "snapshot_done").unlink()
    with pytest.raises(vs.errors.IncompleteCheckpoint):
        verb(tmp_path / "torn")
    (tmp_path / "torn" / "manifest").unlink()
    with pytest.raises(vs.errors.IncompleteCheckpoint):
        verb(tmp_path / "torn")
    (tmp_path / "empty").mkdir()
    with pytest.raises(vs.errors.IncompleteCheckpoint):
        verb(tmp_path / "empty")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(vs.errors.VarstoreError):
        verb(tmp_path / "text")


STATE = {
    "model": {"conv.weight": np.ones(2), "fc.bias": np.zeros(1)},
    "optimizer": {"state": {0: {"step": 3, "exp_avg": np.ones(2)}}, "param_groups": [{"lr": 0.1, "params": [0]}, {}]},
    "epoch": 3,
    "empty": {},
}


@pytest.fixture(params=["checkpoint", "file"])
def nested(request, tmp_path):
    if request.param == "checkpoint":
        vs.save_state(tmp_path / "d", STATE)
        return tmp_path / "d"
    vs.write(tmp_path / "a.pt", STATE)
    return tmp_path / "a.pt"


def plain(node):
    if isinstance(node, dict):
        return {key: plain(value) for key, value in node.items()}
    if isinstance(node, list):
        return [plain(value) for value in node]
    return node.tolist() if isinstance(node, np.ndarray) else node


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, plain(STATE)),
        ({"include": "model/*"}, {"model": {"conv.weight": [1, 1], "fc.bias": [0]}}),
        ({"include": "model/*", "rename": {"model/": ""}}, {"conv.weight": [1, 1], "fc.bias": [0]}),
        ({"include": "model/*", "rename": {"model/conv": "net/a/conv"}},
         {"model": {"fc.bias": [0]}, "net": {"a": {"conv.weight": [1, 1]}}}),
        ({"exclude": ["model/*", "optimizer/param*"]},
         {"optimizer": {"state": {0: {"step": 3, "exp_avg": [1, 1]}}}, "epoch": 3, "empty": {}}),
        ({"include": ["optimizer/param_groups/0/lr", "optimizer/state/0/exp_avg"]},
         {"optimizer": {"state": {0: {"exp_avg": [1, 1]}}, "param_groups": [{"lr": 0.1}, None]}}),
        ({"rename": lambda name: None}, {}),
        ({"include": "epoch", "rename": {"epoch": "optimizer"}}, {"optimizer": 3}),
    ],
)  # fmt: skip
def test_parts_of_a_state_by_new_names(nested, options, expected):
    assert plain(vs.load_state(nested, **options)) == expected
    assert plain(vs.read(nested).state(**options)) == expected


def test_a_part_that_is_not_chosen_is_not_read(nested):
    if nested.is_dir():
        (nested / "model" / "fc.bias" / "out").write_bytes(b"")
        vs.load_state(nested, include="optimizer/*")
        with pytest.raises(vs.errors.SizeMismatch):
            vs.load_state(nested)


def test_a_new_name_that_is_taken_is_refused(nested):
    with pytest.raises(vs.errors.UsageError, match="epoch/x"):
        vs.load_state(nested, rename={"model/fc.bias": "epoch/x"})
    with pytest.raises(vs.errors.VariableMismatch, match="epoch"):
        vs.load_state(nested, rename={"model/fc.bias": "epoch"})


def test_the_names_of_arrays_are_those_of_the_checkpoint(tmp_path):
    vs.save_state(tmp_path / "d", {"a": {"b": np.ones(1)}, "a/b": np.zeros(1)})
    assert vs.open(tmp_path / "d").names == ("a/b", "a/b~2")
    assert plain(vs.load_state(tmp_path / "d", include="a/b~2")) == {"a/b": [0]}


def test_the_folder_of_a_run_stands_for_its_latest_step(tmp_path):
    manager = vs.CheckpointManager(tmp_path / "run")
    for step in (1, 2):
        manager.save(step, {"w": np.full(3, float(step))})
    assert vs.load(tmp_path / "run")["w"][0] == 2
    assert vs.load_state(tmp_path / "run")["w"][0] == 2
    target = {"w": np.zeros(3)}
    vs.load_into(target, tmp_path / "run")
    assert target["w"][0] == 2
