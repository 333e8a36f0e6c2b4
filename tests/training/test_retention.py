"""Retention: what it never deletes, what it says, what a step back changes, and what a step is."""

from __future__ import annotations

import logging
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import varstore as vs
from varstore.errors import CheckpointNotFound, StorageError, UsageError
from varstore.layout.names import MANIFEST, MARKER
from varstore.training.manager import CheckpointManager
from varstore.training.policies import Best, EverySteps, KeepEverySteps, KeepIf, Latest, Pinned


def steps(manager: CheckpointManager) -> list[int]:
    return [saved.step for saved in manager.all()]


def fill(manager: CheckpointManager, *numbers: int, **metrics: float) -> None:
    for step in numbers:
        manager.save(step, {"w": np.full(3, float(step)), "at": [step, np.full(2, step)]}, metrics=metrics)


def told(caplog: Any, level: int = logging.WARNING) -> list[str]:
    messages = [
        record.getMessage() for record in caplog.records if record.name == "varstore" and record.levelno >= level
    ]
    caplog.clear()
    return messages


def rewrite(path: Path, **attributes: Any) -> None:
    vs.save(path, vs.load(path), attributes=attributes, overwrite=True)


# --- what is never deleted


@pytest.mark.parametrize(
    "keep", [Best("loss"), Pinned([1]), KeepIf(lambda saved: False), KeepEverySteps(100)], ids=lambda keep: str(keep)
)
@pytest.mark.parametrize("background", [False, True])
def test_the_step_just_saved_stays_although_no_policy_wants_it(tmp_path: Path, keep: Any, background: bool) -> None:
    manager = CheckpointManager(tmp_path, keep=keep, background=background)
    for step in range(1, 5):
        pending = manager.save(step, {"w": np.full(2, step)}, metrics={"loss": step})
        assert pending.result()["w"].numpy()[0] == step
        assert steps(manager)[-1] == step
    assert CheckpointManager(tmp_path, keep=keep).prune().deleted == {}
    assert manager.restore()["w"][0] == 4


RECORDS: dict[str, Any] = {
    "a number": {"training": 5},
    "a list": {"training": [1, 2]},
    "no metrics": {"training": {"time": 5.0}},
    "metrics that are text": {"training": {"time": 5.0, "metrics": "loss: 3"}},
    "a metric that is text": {"training": {"time": 5.0, "metrics": {"loss": "3"}}},
    "a metric that is null": {"training": {"time": 5.0, "metrics": {"loss": None}}},
    "a huge metric": {"training": {"time": 5.0, "metrics": {"loss": 10**400}}},
    "a time that is text": {"training": {"time": "yesterday", "metrics": {}}},
    "a pattern that is a number": {"training": {"time": 5.0, "metrics": {}, "trimmed": [3]}},
    "patterns that are text": {"training": {"time": 5.0, "metrics": {}, "trimmed": "opt/*"}},
    "a run that is text": {"training": {"time": 5.0, "metrics": {}, "run": "second"}},
    "another program's": {"training": {"epochs": 3, "optimizer": "adam"}},
}


@pytest.mark.parametrize("attributes", RECORDS.values(), ids=RECORDS.keys())
def test_a_step_with_a_record_that_cannot_be_read_counts_and_stays(tmp_path: Path, attributes: Any) -> None:
    fill(CheckpointManager(tmp_path), 1, 2, loss=0.5)
    rewrite(tmp_path / "step-2", **attributes)
    manager = CheckpointManager(tmp_path, keep=Latest(1) | Best("loss"), keep_parts={"w": Latest(1)})
    fill(manager, 3, 4, 5, loss=0.25)
    manager.wait()
    assert steps(manager) == [2, 5]
    assert manager.all()[0].metrics == {}
    assert manager.others() == {}
    assert manager.prune(dry_run=True).kept[2] == "its record cannot be read"
    assert manager.restore(2)["w"].tolist() == [2, 2, 2]


@pytest.mark.parametrize(("keep", "left"), [(Latest(1), [3]), (Latest(1) | Best("loss"), [1, 2, 3])], ids=str)
def test_a_step_that_no_manager_saved_stays_where_metrics_decide(tmp_path: Path, keep: Any, left: list[int]) -> None:
    vs.save(tmp_path / "step-1", {"w": np.ones(3)})
    fill(CheckpointManager(tmp_path), 2, loss=0.1)
    lose(tmp_path / "step-2", MANIFEST)
    vs.seal(tmp_path / "step-2")  # the metrics are gone
    manager = CheckpointManager(tmp_path, keep=keep, keep_parts={"w": Latest(1)})
    fill(manager, 3, loss=0.5)
    assert steps(manager) == left
    assert all("w" in vs.open(saved) for saved in manager.all())


# --- no deletion is silent


def test_a_deletion_is_logged_and_returned(tmp_path: Path, caplog: Any) -> None:
    manager = CheckpointManager(tmp_path, keep=Latest(1), keep_parts={"at/*": Latest(1)})
    with caplog.at_level(logging.INFO, logger="varstore"):
        fill(manager, 1, 2)
        assert told(caplog, logging.INFO) == [f"deleted {tmp_path}/step-1: not latest"]
        manager.wait()
        CheckpointManager(tmp_path, keep=Latest(1)).prune()
        assert told(caplog, logging.INFO) == []
        wide = CheckpointManager(tmp_path, keep=Latest(2), keep_parts={"at/*": Latest(1)})
        fill(wide, 3)
        assert told(caplog, logging.INFO) == [f"removing at/* from {tmp_path}/step-2"]
        (tmp_path / ".step-9.saving-01234567").mkdir()
        CheckpointManager(tmp_path)
        assert ".step-9.saving-01234567" in told(caplog, logging.INFO)[0]


def test_a_keep_that_would_delete_steps_says_so_when_the_manager_is_made(tmp_path: Path, caplog: Any) -> None:
    fill(CheckpointManager(tmp_path), 1, 2, 3, 4)
    assert told(caplog) == []
    CheckpointManager(tmp_path, keep=Latest(4))
    assert told(caplog) == []
    manager = CheckpointManager(tmp_path, keep=Latest(2), keep_parts={"at/*": Latest(1)})
    deletes, removes = told(caplog)
    assert "will delete" in deletes
    assert deletes.split(": ")[2].startswith("1, 2.")
    assert "will remove variables from" in removes
    assert removes.split(": ")[2].startswith("3.")
    assert steps(manager) == [1, 2, 3, 4]


def test_a_metric_that_no_step_has_is_told_once_and_keeps_every_step(tmp_path: Path, caplog: Any) -> None:
    manager = CheckpointManager(tmp_path, keep=Latest(1) | Best("val_loss"), keep_parts={"w": Best("wer")})
    fill(manager, 1, 2, 3, loss=1.0)
    warnings = told(caplog)
    assert ["'val_loss'" in text for text in warnings] == [True, False]
    assert ["'wer'" in text for text in warnings] == [False, True]
    assert steps(manager) == [1, 2, 3]
    assert all("w" in vs.open(saved) for saved in manager.all())
    fill(manager, 4, val_loss=1.0)
    assert steps(manager) == [4]
    assert told(caplog) == []


# --- a step back


def make_back(directory: Path, **options: Any) -> CheckpointManager:
    """Return a manager in a directory of 500, 600, 700, where a new run has saved 100 to 400."""
    fill(CheckpointManager(directory, keep=Latest(3)), 500, 600, 700)
    manager = CheckpointManager(directory, keep=Latest(3), **options)
    fill(manager, 100, 200, 300, 400)
    return manager


BACK = [100, 200, 300, 400, 500, 600, 700]


def test_a_step_back_survives_the_process_and_running_past_the_old_steps(tmp_path: Path, caplog: Any) -> None:
    make_back(tmp_path)
    told(caplog)
    again = CheckpointManager(tmp_path, keep=Latest(3))
    assert told(caplog) == []
    fill(again, 800, 900, 1000, 1100)
    (warning,) = told(caplog)
    assert "has steps up to 700" in warning
    assert "rewind" in warning
    assert steps(again) == [*BACK, 800, 900, 1000, 1100]
    assert CheckpointManager(tmp_path, keep=Latest(1)).prune().deleted == dict.fromkeys([500, 600], "not latest")
    assert steps(again) == [100, 200, 300, 400, 700, 800, 900, 1000, 1100]


@pytest.mark.parametrize("step", [400, 900, 1000])
def test_rewind_ends_a_step_back_for_this_manager_and_the_next(tmp_path: Path, step: int) -> None:
    manager = make_back(tmp_path)
    fill(manager, 800, 900)
    report = manager.rewind(step)
    assert list(report.deleted) == [number for number in (*BACK, 800, 900) if number > step]
    assert steps(manager) == list(report.kept)
    for saver in (manager, CheckpointManager(tmp_path, keep=Latest(3))):
        before = steps(saver)
        saver.prune()
        assert steps(saver) == before[-3:]
    fill(manager, 1001, 1002)
    assert steps(CheckpointManager(tmp_path)) == [*before[-1:], 1001, 1002]
    assert manager.restore(1002)["at"][0] == 1002
    assert manager.restore(before[-1])["at"][0] == before[-1]
    manager.wait()
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


def test_a_second_step_back_is_told_and_kept_as_the_first(tmp_path: Path, caplog: Any) -> None:
    manager = make_back(tmp_path)
    manager.rewind(400)
    manager.prune()
    told(caplog)
    fill(manager, 250)
    assert len(told(caplog)) == 1
    fill(manager, 260, 270, 280)
    assert steps(manager) == [200, 250, 260, 270, 280, 300, 400]
    assert manager.rewind(300).deleted == {400: "later than step 300"}
    fill(manager, 310, 320)
    assert steps(manager) == [300, 310, 320]


def test_a_step_is_a_step_back_for_any_whole_step_above_it(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path, keep=Latest(1))
    fill(manager, 5)
    vs.save(tmp_path / "step-9", {"w": np.ones(1)})
    fill(manager, 6, 7, 8)
    assert steps(manager) == [6, 7, 8, 9]
    assert manager.rewind(8).deleted == {9: "later than step 8"}
    assert manager.prune().deleted == dict.fromkeys([6, 7], "not latest")


def test_rewind_leaves_a_whole_step_and_what_is_not_a_step(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path)
    assert manager.rewind(0).deleted == {}
    fill(manager, 3, 4, 5, 6)
    (tmp_path / "step-6" / MARKER).unlink()
    (tmp_path / "step-7").mkdir()
    (tmp_path / "step-7/notes").write_text("mine")
    (tmp_path / "step-8").write_text("mine")
    with pytest.raises(UsageError, match="no whole step would be left") as refused:
        manager.rewind(2)
    assert refused.value.field == "step"
    with vs.open(tmp_path / "step-5"), pytest.raises(UsageError, match="being read"):
        manager.rewind(4)
    assert steps(manager) == [3, 4, 5]
    assert list(manager.rewind(manager.all()[1]).deleted) == [5, 6]
    assert sorted(manager.others()) == ["step-7", "step-8"]
    fill(manager, 5)
    assert steps(manager) == [3, 4, 5]


def test_rewind_waits_for_the_save_in_the_background(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path, background=True)
    fill(manager, 1, 2, 3)
    assert list(manager.rewind(2).deleted) == [3]
    assert manager.latest() == manager.all()[1]
    assert manager.should_save(3)


# --- errors


def test_a_deletion_that_fails_is_an_error_and_the_new_step_stands(tmp_path: Path, monkeypatch: Any) -> None:
    manager = CheckpointManager(tmp_path, keep=Latest(1))
    fill(manager, 1)

    def refuse(path: str) -> None:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr("varstore.training.manager.set_aside", refuse)
    with pytest.raises(StorageError, match="step-1: the step cannot be deleted: Permission denied"):
        fill(manager, 2)
    assert steps(manager) == [1, 2]
    monkeypatch.undo()
    fill(manager, 3)
    assert steps(manager) == [3]


def test_an_error_of_the_thread_that_deletes_is_raised_by_wait(tmp_path: Path, monkeypatch: Any) -> None:
    manager = CheckpointManager(tmp_path, keep=Latest(1))

    def refuse(directory: str, *, name: str) -> None:
        raise StorageError("the directory cannot be read", number=5, path=directory)

    monkeypatch.setattr("varstore.training.manager.clean_staging", refuse)
    fill(manager, 1, 2)
    with pytest.raises(StorageError, match="cannot be read"):
        manager.wait()
    manager.wait()


ARGUMENTS: dict[str, list[dict[str, Any]]] = {
    "save_when": [{"save_when": 10}, {"save_when": Latest(1)}, {"save_when": []}, {"save_when": EverySteps}],
    "keep": [{"keep": 3}, {"keep": EverySteps(3)}, {"keep": [Latest(1), 3]}, {"keep": []}, {"keep": "latest"}],
    "keep_parts": [{"keep_parts": Latest(1)}, {"keep_parts": {3: Latest(1)}}, {"keep_parts": ["opt/*"]}],
    "keep_parts['opt/*']": [{"keep_parts": {"opt/*": 3}}],
    "prefix": [{"prefix": 3}, {"prefix": "a/b"}, {"prefix": ".a"}, {"prefix": "a\0"}, {"prefix": None}],
    "when_busy": [{"when_busy": "never"}],
    "clock": [{"clock": 3.0}],
    "background": [{"background": "yes"}],
    "directory": [{"directory": None}, {"directory": 5}, {"directory": b"run"}, {"directory": "a\0b"}],
}


@pytest.mark.parametrize(
    ("field", "options"),
    [pytest.param(field, options, id=str(options)) for field in ARGUMENTS for options in ARGUMENTS[field]],
)
def test_a_wrong_argument_is_refused_by_name_in_the_constructor(tmp_path: Path, field: str, options: Any) -> None:
    with pytest.raises(UsageError) as refused:
        CheckpointManager(**{"directory": tmp_path / "run", **options})
    assert refused.value.field == field
    assert not (tmp_path / "run").exists()


def test_a_directory_that_is_a_file_is_refused_in_the_constructor(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("mine")
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("run", "link"):
        with pytest.raises(UsageError, match="not a directory") as refused:
            CheckpointManager(tmp_path / name)
        assert refused.value.field == "directory"


class Tensor:
    """As torch's: `item` gives the number, and a conversion of several elements is a RuntimeError."""

    def __init__(self, *values: float) -> None:
        self.values = values

    def item(self) -> float:
        if len(self.values) != 1:
            raise RuntimeError("a Tensor with 2 elements cannot be converted to Scalar")
        return self.values[0]


NUMBERS = [0.5, 1, True, np.float32(0.5), np.int64(3), np.array(0.5), np.array([0.5]), np.bool_(True), Tensor(0.5)]


@pytest.mark.parametrize("number", NUMBERS, ids=repr)
def test_a_metric_is_any_number(tmp_path: Path, number: Any) -> None:
    manager = CheckpointManager(tmp_path)
    manager.save(1, {"w": np.ones(1)}, metrics={"loss": number})
    saved = manager.latest()
    assert saved is not None
    assert saved.metrics == {"loss": float(number.item() if hasattr(number, "item") else number)}
    assert type(saved.metrics["loss"]) is float


METRICS: dict[str, list[Any]] = {
    "metrics": [3, ["loss"], {3: 0.5}, {None: 0.5}],
    "metrics['loss']": [
        {"loss": value} for value in ("0.5", None, [0.5], 1j, np.ones(2), Tensor(1, 2), {"a": 1}, 10**400)
    ],
}


@pytest.mark.parametrize(
    ("field", "metrics"),
    [pytest.param(field, metrics, id=f"{metrics!r:.60}") for field in METRICS for metrics in METRICS[field]],
)
def test_a_metric_that_is_not_a_number_is_named(tmp_path: Path, field: str, metrics: Any) -> None:
    manager = CheckpointManager(tmp_path)
    with pytest.raises(UsageError) as refused:
        manager.save(1, {"w": np.ones(1)}, metrics=metrics)
    assert refused.value.field == field
    assert os.listdir(tmp_path) == []
    manager.save(1, {"w": np.ones(1)})


@pytest.mark.parametrize("step", [-1, 1.5, "1", None, [1]], ids=repr)
def test_a_step_that_is_not_a_number_is_named(tmp_path: Path, step: Any) -> None:
    manager = CheckpointManager(tmp_path)
    calls = [lambda: manager.save(step, {}), lambda: manager.should_save(step), lambda: manager.rewind(step)]
    for call in (*calls, *([] if step is None else [lambda: manager.restore(step)])):
        with pytest.raises(UsageError) as refused:
            call()
        assert refused.value.field == "step"


def test_attributes_of_the_manager_are_refused(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path)
    for field, attributes in (("attributes['training']", {"training": {"lr": 1}}), ("attributes", 5)):
        with pytest.raises(UsageError) as refused:
            manager.save(1, {"w": np.ones(1)}, attributes=attributes)  # type: ignore[arg-type]
        assert refused.value.field == field
    assert steps(manager) == []


def test_a_list_of_policies_means_any_of_them(tmp_path: Path) -> None:
    manager = CheckpointManager(
        tmp_path,
        save_when=[EverySteps(2), vs.AtSteps([3])],
        keep=[Latest(1), Pinned([2]) | Pinned([3])],
        keep_parts={"at/*": (Latest(1), Pinned([3]))},
    )
    for step in range(8):
        if manager.should_save(step):
            fill(manager, step)
    assert steps(manager) == [2, 3, 6]
    assert [saved.step for saved in manager.all() if "at/1" in vs.open(saved)] == [3, 6]


# --- what a step is


def test_a_step_that_was_moved_and_linked_counts(tmp_path: Path) -> None:
    run = tmp_path / "run"
    fill(CheckpointManager(run), 1, 2, 3)
    for step in (1, 3):
        shutil.move(run / f"step-{step}", tmp_path / f"moved-{step}")
        (run / f"step-{step}").symlink_to(tmp_path / f"moved-{step}")
    (run / "step-9").symlink_to("nowhere")
    (run / "step-8").symlink_to("step-8")
    manager = CheckpointManager(run, keep=Latest(3), keep_parts={"at/*": Latest(1)})
    assert steps(manager) == [1, 2, 3]
    assert list(manager.others()) == ["step-8", "step-9"]
    assert manager.restore()["at"][0] == 3
    assert not manager.should_save(3)
    fill(manager, 4)
    assert steps(manager) == [2, 3, 4]
    assert [saved.step for saved in manager.all() if "at/1" in vs.open(saved)] == [3, 4]
    assert manager.restore(3)["at"][1][0] == 3
    assert vs.verify(tmp_path / "moved-1").ok


def lose(path: Path, *names: str) -> None:
    for name in names:
        (path / name).unlink()


@pytest.mark.parametrize("names", [[MARKER], [MANIFEST], [MARKER, MANIFEST]], ids="+".join)
def test_a_step_that_is_not_whole_is_one_for_no_call(tmp_path: Path, names: list[str]) -> None:
    manager = CheckpointManager(tmp_path, keep=Latest(1) | Best("loss"))
    fill(manager, 1, loss=0.1)
    fill(manager, 2, loss=0.5)
    lose(tmp_path / "step-1", *names)
    for each in (manager, CheckpointManager(tmp_path, keep=Latest(1) | Best("loss"))):
        assert steps(each) == [2]
        assert list(each.others()) == ["step-1"]
        best = each.best()
        assert best is not None
        assert best.step == 2
        assert not each.should_save(1)
        with pytest.raises(vs.errors.CheckpointExists, match="its name is taken"):
            fill(each, 1)
        assert each.prune().deleted == {}
    if MANIFEST in names and MARKER in names:
        with pytest.raises(vs.errors.CheckpointExists, match="not a checkpoint"):
            manager.save(1, {"w": np.ones(1)}, overwrite=True)
    else:
        manager.save(1, {"w": np.ones(1)}, overwrite=True)
        assert steps(manager) == [1, 2]
        assert manager.others() == {}


def test_a_lost_manifest_is_told_with_the_way_to_the_arrays(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path)
    fill(manager, 1, 2, loss=0.5)
    lose(tmp_path / "step-2", MANIFEST)
    with pytest.raises(vs.errors.ManifestError, match="manifest of this step is lost") as refused:
        manager.restore(2)
    assert refused.value.hint is not None
    code = refused.value.hint.split(" with ")[1]
    assert eval(code, {"vs": vs})["at/1"].tolist() == [2, 2]


def damage(path: Path, how: str) -> None:
    if how == "a byte of a variable":
        file = path / "w/out"
        data = bytearray(file.read_bytes())
        data[3] ^= 1
        os.chmod(file, 0o644)
        file.write_bytes(data)
    elif how == "a variable":
        shutil.rmtree(path / "w")
    elif how == "half of the manifest":
        os.chmod(path / MANIFEST, 0o644)
        os.truncate(path / MANIFEST, 40)
    else:
        lose(path, how)


DAMAGES = [MARKER, MANIFEST, "half of the manifest", "a variable", "a byte of a variable"]


@pytest.mark.parametrize("how", DAMAGES)
def test_restore_tries_the_step_before_one_that_is_not_whole(tmp_path: Path, how: str, caplog: Any) -> None:
    manager = CheckpointManager(tmp_path, link_unchanged=False)
    fill(manager, 1, 2, 3)
    assert manager.restore()["at"][0] == 3
    assert told(caplog) == []
    damage(tmp_path / "step-3", how)
    for each in (manager, CheckpointManager(tmp_path)):
        assert each.restore()["at"][0] == 2
        (warning,) = told(caplog)
        assert warning.startswith("step 3 cannot be restored; trying the one before it: ")
        with pytest.raises((vs.errors.FormatError, vs.errors.IncompleteCheckpoint, CheckpointNotFound)):
            each.restore(3)
    damage(tmp_path / "step-2", MARKER)
    damage(tmp_path / "step-1", "half of the manifest")
    with pytest.raises(CheckpointNotFound) as refused:
        manager.restore()
    assert [row.split(":")[0] for row in refused.value.rows] == ["step 3", "step 2", "step 1"]


def test_an_error_of_the_call_is_not_taken_for_a_step_that_is_not_whole(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path)
    fill(manager, 1, 2)
    with pytest.raises(TypeError):
        manager.restore(thread=3)  # type: ignore[call-arg]
    with pytest.raises(UsageError):
        manager.restore(threads=-1)


def test_a_step_that_comes_back_whole_counts_again(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path)
    fill(manager, 1, 2)
    lose(tmp_path / "step-2", MARKER)
    assert steps(manager) == [1]
    (tmp_path / "step-2" / MARKER).touch()
    assert steps(manager) == [1, 2]
    rewrite(tmp_path / "step-2", training={"time": 3.0, "metrics": {"loss": 7.0}})
    assert [dict(saved.metrics) for saved in manager.all()] == [{}, {"loss": 7.0}]


def test_no_thread_is_left(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path, keep=Latest(1), background=True) as manager:
        fill(manager, 1, 2, 3)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("varstore")]


def test_a_step_without_a_manifest_is_not_held_by_what_was_said_of_it(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path)
    fill(manager, 1, 2)
    lose(tmp_path / "step-2", MANIFEST)
    assert list(manager.others()) == ["step-2"]
    with pytest.raises(vs.errors.ManifestError) as kept:
        manager.restore(2)
    assert list(manager.rewind(1).deleted) == [2]
    assert kept.value.path == f"{tmp_path}/step-2"


def test_all_steps_saved_after_a_step_back_stay_although_the_later_ones_are_lost(tmp_path: Path) -> None:
    manager = make_back(tmp_path)
    for step in (500, 600, 700):
        shutil.rmtree(tmp_path / f"step-{step}")
    for each in (manager, CheckpointManager(tmp_path, keep=Latest(1))):
        fill(each, 450 if each is manager else 460)
    assert steps(manager) == [100, 200, 300, 400, 450, 460]
    manager.rewind(460)
    assert steps(manager) == [100, 200, 300, 400, 450, 460]
    assert list(manager.prune().deleted) == [100, 200, 300]


def test_a_step_back_is_ended_by_way_of_a_step_that_was_moved(tmp_path: Path) -> None:
    manager = make_back(tmp_path / "run")
    for step in (100, 200, 300, 400):
        shutil.move(tmp_path / f"run/step-{step}", tmp_path / f"moved-{step}")
        (tmp_path / f"run/step-{step}").symlink_to(tmp_path / f"moved-{step}")
    manager.rewind(400)
    assert list(CheckpointManager(tmp_path / "run", keep=Latest(1)).prune().deleted) == [100, 200, 300]
    assert manager.restore()["at"][0] == 400


@pytest.mark.parametrize("how", ["a variable", "half of a variable", "a git-lfs pointer"])
def test_the_latest_is_one_of_which_all_files_are_there(tmp_path: Path, how: str, caplog: Any) -> None:
    manager = CheckpointManager(tmp_path, link_unchanged=False)
    fill(manager, 1, 2, 3)
    out = tmp_path / "step-3/at/1/out"
    if how == "a variable":
        shutil.rmtree(out.parent)
    else:
        out.unlink()
        out.write_bytes(b"12345678" if how == "half of a variable" else b"version https://git-lfs.github.com/spec/v1\n")
    for each in (manager, CheckpointManager(tmp_path)):
        latest = each.latest()
        assert latest is not None
        assert latest.step == 2
        each.latest()
        (warning,) = told(caplog)
        assert "step 3 is passed over" in warning
        assert "at/1" in warning
    strict = CheckpointManager(tmp_path, keep=Latest(1))
    told(caplog)
    assert list(strict.prune().deleted) == [1]
    assert strict.restore()["at"][0] == 2
    assert strict.prune(dry_run=True).kept == {2: "the latest of which all files are there", 3: "latest"}


@pytest.mark.parametrize("background", [False, True])
def test_an_error_that_is_kept_does_not_hold_a_step(tmp_path: Path, background: bool) -> None:
    manager = CheckpointManager(tmp_path, keep=Latest(1), background=background, link_unchanged=True)
    fill(manager, 1)
    manager.wait()
    (tmp_path / "step-3/somebody's").mkdir(parents=True)
    damage(tmp_path / "step-1", "a byte of a variable")
    with pytest.raises(vs.errors.DigestMismatch) as restored:
        manager.restore(1)
    with pytest.raises(vs.errors.CheckpointExists) as saved:
        manager.save(3, {"w": np.full(3, 1.0)}, overwrite=True).wait()
    fill(manager, 2)
    manager.wait()
    assert steps(manager) == [2]
    assert restored.value
    assert saved.value
