"""MindSpore's interface leaves what MindSpore leaves: a table that the real one wrote, and the real one itself."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from varstore import load_checkpoint
from varstore.disk.read.checkpoint import open_checkpoint
from varstore.errors import UsageError, VariableMismatch
from varstore.inspection.verify import verify
from varstore.interfaces.mindspore import CheckpointConfig, ModelCheckpoint, load_param_into_net
from varstore.model.store import save

ROOT = Path(__file__).resolve().parents[2]
TABLE = ROOT / "tests/data/mindspore/model_checkpoint_names.json"
ROWS = json.loads(TABLE.read_text())["rows"]
REAL = Path(os.environ.get("VARSTORE_ENVS", ROOT / ".envs"), "mindspore/bin/python")


class Clock:
    now = 1_700_000_000.0

    def __call__(self) -> float:
        return self.now


def _name(row: Any) -> str:
    return ",".join(f"{key}={value}" for key, value in row["config"].items()) + f"{row['prefixes']}{row['runs']}"


@pytest.mark.parametrize("row", ROWS, ids=_name)
def test_the_names_that_mindspore_leaves(tmp_path: Path, row: Any) -> None:
    if "refused" in row:
        with pytest.raises({"ValueError": ValueError, "TypeError": TypeError}[row["refused"]]) as error:
            CheckpointConfig(**row["config"])
        assert isinstance(error.value, UsageError)
        return
    assert CheckpointConfig(**row["config"]).get_checkpoint_policy() == row["policy"]
    clock = Clock()
    for (epochs, steps), prefix, left in zip(row["runs"], row["prefixes"], row["left"], strict=True):
        callback = ModelCheckpoint(prefix, tmp_path, CheckpointConfig(**row["config"]), clock=clock)
        callback.begin()
        for epoch in range(1, epochs + 1):
            for step in range(1, steps + 1):
                clock.now += row["seconds"]
                callback.step_end(epoch, step, {"w": np.full(2, 100 * epoch + step)})
        callback.end()
        assert sorted(os.listdir(tmp_path)) == left
        if left:
            assert callback.latest_ckpt_file_name.endswith(f"-{epochs}_{steps}")
    for name in os.listdir(tmp_path):
        epoch, step = map(int, name.rpartition("-")[2].split("_"))
        assert verify(tmp_path / name).ok
        assert load_checkpoint(tmp_path / name)["w"][0] == 100 * epoch + step


@pytest.mark.skipif(not REAL.exists(), reason="no environment with MindSpore: tools/make_envs.sh mindspore")
def test_the_real_mindspore_still_leaves_what_the_table_says(tmp_path: Path) -> None:
    tool = ROOT / "tools/make_mindspore_names.py"
    done = subprocess.run([REAL, tool], check=False, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout) == json.loads(TABLE.read_text())


def test_steps_that_count_through_all_epochs_count_alike(tmp_path: Path) -> None:
    callback = ModelCheckpoint("net", tmp_path, CheckpointConfig(save_checkpoint_steps=3, keep_checkpoint_max=9))
    for step in range(1, 9):
        callback.step_end((step + 3) // 4, step, {"w": np.ones(1)})
    callback.end()
    assert sorted(os.listdir(tmp_path)) == ["net-1_3", "net-2_6", "net-2_8"]


def test_the_same_step_twice_is_saved_once(tmp_path: Path) -> None:
    callback = ModelCheckpoint("net", tmp_path)
    callback.step_end(1, 1, {"w": np.zeros(1)})
    callback.step_end(1, 1, {"w": np.ones(1)})
    callback.end()
    assert load_checkpoint(tmp_path / "net-1_1")["w"][0] == 0


def test_the_default_directory_is_the_working_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    callback = ModelCheckpoint()
    callback.step_end(1, 1, {"w": np.zeros(1)})
    assert callback.latest_ckpt_file_name == str(tmp_path / "CKP-1_1")
    assert os.listdir(tmp_path) == ["CKP-1_1"]


def test_what_is_not_complete_is_neither_counted_nor_deleted(tmp_path: Path) -> None:
    callback = ModelCheckpoint("net", tmp_path, CheckpointConfig(keep_checkpoint_max=2))
    (tmp_path / "net-0_1").mkdir()
    (tmp_path / "net-0_2").write_text("a file")
    for step in range(1, 5):
        callback.step_end(1, step, {"w": np.ones(1)})
    assert sorted(os.listdir(tmp_path)) == ["net-0_1", "net-0_2", "net-1_3", "net-1_4"]


@pytest.mark.parametrize(("prefix", "config"), [("a/b", None), (3, None), ("a", {"save_checkpoint_steps": 1})])
def test_arguments_that_are_wrong(tmp_path: Path, prefix: Any, config: Any) -> None:
    with pytest.raises(UsageError):
        ModelCheckpoint(prefix, tmp_path, config)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    names = ["conv1.weight", "conv1.bias", "fc.weight", "global_step"]
    save(tmp_path / "c", {name: np.full((2, 3), i, "f4") for i, name in enumerate(names)})
    return tmp_path / "c"


CHOICES = {
    "all": ({}, ["conv1.weight", "conv1.bias", "fc.weight", "global_step"]),
    "filter": ({"filter_prefix": "conv1"}, ["fc.weight", "global_step"]),
    "filters": ({"filter_prefix": ["conv1", "global"]}, ["fc.weight"]),
    "specify": ({"specify_prefix": ("conv1",)}, ["conv1.weight", "conv1.bias"]),
    "both": ({"specify_prefix": "conv1", "filter_prefix": "conv1.b"}, ["conv1.weight"]),
    "choice": ({"choice_func": lambda name: "weight" in name}, ["conv1.weight", "fc.weight"]),
    "a prefix wins": ({"specify_prefix": "fc", "choice_func": lambda name: False}, ["fc.weight"]),
}


@pytest.mark.parametrize(("options", "names"), CHOICES.values(), ids=CHOICES.keys())
def test_what_load_checkpoint_takes(checkpoint: Path, options: Any, names: list[str]) -> None:
    assert list(load_checkpoint(checkpoint, **options)) == names


@pytest.mark.parametrize(
    "options", [{"specify_prefix": "x"}, {"choice_func": lambda name: False}, {"filter_prefix": ""}]
)
def test_loading_nothing_is_an_error(checkpoint: Path, options: Any) -> None:
    with pytest.raises(ValueError, match=r"nothing is left|non-empty"):
        load_checkpoint(checkpoint, **options)


def test_loading_into_a_net_says_what_was_not_loaded_both_ways(checkpoint: Path) -> None:
    net = {name: np.full((2, 3), -1, "f4") for name in ("conv1.weight", "fc.weight", "fc.bias")}
    loaded = load_checkpoint(checkpoint)
    assert load_param_into_net(net, loaded) == (["fc.bias"], ["conv1.bias", "global_step"])
    assert [array[0, 0] for array in net.values()] == [0, 2, -1]


def test_loading_takes_prefixes_off_unless_strict(checkpoint: Path) -> None:
    def net() -> dict[str, np.ndarray]:
        return {name: np.full((2, 3), -1, "f4") for name in ("weight", "other")}

    parameters = load_checkpoint(checkpoint, specify_prefix="conv1")
    loose, strict = net(), net()
    assert load_param_into_net(loose, parameters) == (["other"], ["conv1.weight", "conv1.bias"])
    assert loose["weight"][0, 0] == 0
    assert load_param_into_net(strict, parameters, strict_load=True) == (["weight", "other"], list(parameters))
    assert strict["weight"][0, 0] == -1


TYPES = [
    ("f4", "f2", True),
    ("f8", "f4", True),
    ("f4", ml_dtypes.bfloat16, True),
    ("i8", "i4", True),
    ("f4", "i4", False),
    ("u1", "i8", False),
    ("?", "i8", False),
]


@pytest.mark.parametrize(("source", "target", "converts"), TYPES)
def test_types_are_converted_within_their_kind_unless_strict(source: Any, target: Any, converts: bool) -> None:
    values, net = {"w": np.array([1, 0], source)}, {"w": np.array([5, 5], target)}
    if converts:
        assert load_param_into_net(net, values) == ([], [])
        assert net["w"].tolist() == [1, 0]
    else:
        with pytest.raises(VariableMismatch, match="types differ"):
            load_param_into_net(net, values)
    net = {"w": np.array([5, 5], target)}
    with pytest.raises(VariableMismatch, match="types differ"):
        load_param_into_net(net, values, strict_load=True)
    assert net["w"].tolist() == [5, 5]


def test_shapes_may_differ_by_ones_at_the_end_and_a_misfit_changes_nothing() -> None:
    net = {"a": np.zeros((2, 3), "f4"), "b": np.zeros(2, "f4")}
    load_param_into_net(net, {"a": np.ones((2, 3, 1, 1), "f4")})
    assert net["a"].tolist() == np.ones((2, 3)).tolist()
    with pytest.raises(VariableMismatch, match="shapes differ"):
        load_param_into_net(net, {"a": np.zeros((2, 3), "f4"), "b": np.zeros(3, "f4")})
    assert net["a"].tolist() == np.ones((2, 3)).tolist()


def test_load_checkpoint_into_a_net(checkpoint: Path) -> None:
    net = {"fc.weight": np.zeros((2, 3), "f4")}
    load_checkpoint(checkpoint, net)
    assert net["fc.weight"][0, 0] == 2
    with pytest.raises(TypeError, match="not a network"):
        load_checkpoint(checkpoint, 3)
    assert open_checkpoint(checkpoint).names


def test_a_cell_of_the_real_mindspore(checkpoint: Path) -> None:
    nn = pytest.importorskip("mindspore.nn")
    net = nn.Dense(3, 2)
    assert load_checkpoint(checkpoint, net, specify_prefix="fc")["fc.weight"].shape == (2, 3)
    assert net.weight.asnumpy().tolist() == np.full((2, 3), 2).tolist()
    assert load_param_into_net(net, load_checkpoint(checkpoint, specify_prefix="fc")) == (["bias"], ["fc.weight"])


class SetClock:
    """A clock that is set back a day, or ahead and right again, in the middle of a run."""

    def __init__(self, leaps: dict[int, float]) -> None:
        self.now, self.leaps = 1_000_000.0, leaps

    def __call__(self) -> float:
        return self.now

    def tick(self, step: int) -> None:
        self.now += 60 + self.leaps.get(step, 0)


LEAPS = {"back": {4: -86_400.0}, "ahead and right again": {3: 86_400.0, 5: -86_400.0}, "right": {}}


@pytest.mark.parametrize("leaps", LEAPS.values(), ids=LEAPS.keys())
@pytest.mark.parametrize(
    "step_of", [lambda step: (1, step), lambda step: (1 + step // 6, 1 + step % 6)], ids=["on", "epochs"]
)
def test_the_newest_stay_when_the_clock_is_set(tmp_path: Path, leaps: Any, step_of: Any) -> None:
    clock = SetClock(leaps)
    callback = ModelCheckpoint("m", tmp_path, CheckpointConfig(1, keep_checkpoint_max=3), clock=clock)
    names: list[str] = []
    for step in range(1, 12):
        clock.tick(step)
        epoch, number = step_of(step)
        callback.step_end(epoch, number, {"w": np.full(2, step)})
        names.append(f"m-{epoch}_{number}")
        assert sorted(os.listdir(tmp_path)) == sorted(names[-3:])


def test_a_run_that_begins_again_with_one_callback_keeps_its_newest(tmp_path: Path) -> None:
    callback = ModelCheckpoint("m", tmp_path, CheckpointConfig(1, keep_checkpoint_max=2), clock=lambda: 5.0)
    for step in (7, 8, 9):
        callback.step_end(1, step, {"w": np.full(2, step)})
    callback.begin()
    for step in range(1, 12):  # MindSpore saves none before the count of the last save is reached
        callback.step_end(1, step, {"w": np.full(2, step)})
    assert sorted(os.listdir(tmp_path)) == ["m-1_10", "m-1_11"]


@pytest.mark.parametrize("leaps", LEAPS.values(), ids=LEAPS.keys())
def test_saving_by_seconds_goes_on_when_the_clock_is_set(tmp_path: Path, leaps: Any) -> None:
    clock = SetClock(leaps)
    callback = ModelCheckpoint("m", tmp_path, CheckpointConfig(0, 100, keep_checkpoint_max=99), clock=clock)
    for step in range(1, 21):
        clock.tick(step)
        callback.step_end(1, step, {"w": np.full(2, step)})
    assert 9 <= len(os.listdir(tmp_path)) <= 12


def test_a_window_of_minutes_deletes_nothing_of_another_time(tmp_path: Path) -> None:
    clock = SetClock({4: -86_400.0})
    callback = ModelCheckpoint("m", tmp_path, CheckpointConfig(1, 0, 0, 10), clock=clock)
    for step in range(1, 8):
        clock.tick(step)
        callback.step_end(1, step, {"w": np.full(2, step)})
        assert f"m-1_{step}" in os.listdir(tmp_path)
    assert {"m-1_1", "m-1_3"} <= set(os.listdir(tmp_path))


def test_what_is_deleted_is_logged_and_a_lost_manifest_is_not_deleted(tmp_path: Path, caplog: Any) -> None:
    callback = ModelCheckpoint("m", tmp_path, CheckpointConfig(1, keep_checkpoint_max=2))
    with caplog.at_level("INFO", logger="varstore"):
        callback.step_end(1, 1, {"w": np.zeros(2)})
        (tmp_path / "m-1_1/manifest").unlink()
        for step in (2, 3, 4):
            callback.step_end(1, step, {"w": np.full(2, step)})
    assert sorted(os.listdir(tmp_path)) == ["m-1_1", "m-1_3", "m-1_4"]
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.startswith(f"deleted {tmp_path}/m-1_2: ")
