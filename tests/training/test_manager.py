"""The manager: the right steps stay, only complete ones count, nothing that is read or foreign is touched."""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from functools import reduce
from operator import or_
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from varstore.disk.read.checkpoint import open_checkpoint
from varstore.errors import (
    CheckpointExists,
    CheckpointNotFound,
    MissingDependency,
    StorageError,
    UnsupportedDtype,
    UsageError,
)
from varstore.inspection.verify import verify
from varstore.model.store import load, save
from varstore.training import series
from varstore.training.manager import CheckpointManager
from varstore.training.policies import (
    Best,
    EverySeconds,
    EverySteps,
    Keep,
    KeepEverySteps,
    KeepIf,
    Latest,
    OnePerMinutes,
    Pinned,
    Saved,
)


def state(step: int) -> dict[str, Any]:
    return {
        "model": {"embedding": np.arange(4000, dtype="f4"), "w": np.full(10, step, "f4")},
        "optimizer": {"state": {0: {"m": np.full(10, -step, "f4"), "step": step}}},
        "step": step,
    }


def steps(manager: CheckpointManager) -> list[int]:
    return [saved.step for saved in manager.all()]


class Clock:
    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


KEEPS = st.one_of(
    st.integers(1, 3).map(Latest),
    st.integers(2, 5).map(KeepEverySteps),
    st.sampled_from([1, 2]).map(OnePerMinutes),
    st.sets(st.integers(0, 30), max_size=3).map(Pinned),
    st.builds(
        Best, st.sampled_from(["loss", "acc"]), st.integers(1, 2), st.sampled_from(["min", "max"]), st.booleans()
    ),
)
EVENTS = st.lists(
    st.tuples(
        st.integers(0, 30),
        st.integers(0, 90),
        st.dictionaries(st.sampled_from(["loss", "acc"]), st.floats(), max_size=2),
    ),
    min_size=1,
    max_size=10,
    unique_by=lambda event: event[0],
)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(policies=st.lists(KEEPS, min_size=1, max_size=3), events=EVENTS, background=st.booleans())
def test_what_stays_is_what_the_policies_say(tmp_path: Path, policies: Any, events: Any, background: bool) -> None:
    shutil.rmtree(tmp_path / "run", ignore_errors=True)
    keep: Keep = reduce(or_, policies)
    clock, present = Clock(), {}
    manager = CheckpointManager(tmp_path / "run", keep=keep, background=background, clock=clock, durable=False)
    for step, seconds, metrics in sorted(events, key=lambda event: event[0]):
        clock.now += seconds
        manager.save(step, {"w": np.full(3, step)}, metrics=metrics)
        manager.wait()
        present[step] = Saved(step=step, time=clock.now, metrics=metrics)
        ordered = [present[number] for number in sorted(present)]
        wanted = set().union(*(policy.kept(ordered) for policy in policies), {step})
        present = {number: saved for number, saved in present.items() if number in wanted}
        assert steps(manager) == sorted(present)
        assert set(os.listdir(tmp_path / "run")) == {f"step-{number}" for number in present}
    again = CheckpointManager(tmp_path / "run", keep=keep, clock=clock)
    for saved in again.all():
        assert saved.time == present[saved.step].time
        assert repr(dict(saved.metrics)) == repr(present[saved.step].metrics)
        assert again.restore(saved)["w"].tolist() == [saved.step] * 3
    assert not again.prune(dry_run=True).deleted


def test_a_run_resumes_from_the_latest(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path / "run", keep=Latest(2), save_when=EverySteps(3))
    assert manager.latest() is None
    with pytest.raises(CheckpointNotFound):
        manager.restore()
    for step in range(14):
        if manager.should_save(step):
            assert manager.save(step, state(step)).result().path == str(tmp_path / f"run/step-{step}")
    again = CheckpointManager(tmp_path / "run", save_when=EverySteps(3))
    assert steps(again) == [9, 12]
    restored = again.restore()
    assert (restored["step"], restored["model"]["w"][0], restored["optimizer"]["state"][0]["step"]) == (12, 12, 12)
    assert again.restore(9)["step"] == 9
    assert not again.should_save(12)
    assert again.should_save(15)


def test_steps_sort_as_numbers(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path)
    for step in (10, 9, 100, 0):
        manager.save(step, {"a": step})
    assert steps(manager) == [0, 9, 10, 100]
    latest = manager.latest()
    assert latest is not None
    assert latest.step == 100


def test_unchanged_variables_are_linked_and_the_link_outlives_the_first(tmp_path: Path) -> None:
    for name, options in (("linked", {}), ("apart", {"link_unchanged": False})):
        manager = CheckpointManager(tmp_path / name, **options)
        manager.save(1, state(1))
        manager.save(2, state(2))
    inodes = [(tmp_path / f"linked/step-{n}/model/embedding/out").stat().st_ino for n in (1, 2)]
    assert inodes[0] == inodes[1]
    assert len({(tmp_path / f"apart/step-{n}/model/embedding/out").stat().st_ino for n in (1, 2)}) == 2
    assert len({(tmp_path / f"linked/step-{n}/model/w/out").stat().st_ino for n in (1, 2)}) == 2
    CheckpointManager(tmp_path / "linked", keep=Latest(1)).prune()
    assert verify(tmp_path / "linked/step-2").ok


def test_a_step_is_its_own_path(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path)
    manager.save(3, state(3), metrics={"loss": 0.5}, attributes={"by": "me"})
    latest = manager.latest()
    assert latest is not None
    assert open_checkpoint(latest).attributes["by"] == "me"
    assert load(latest)["model/w"][0] == 3
    assert latest.metrics == {"loss": 0.5}


def test_best(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path, keep=Latest(9) | Best("acc", mode="max"))
    for step, acc in enumerate([0.1, 0.7, float("nan"), 0.7, 0.2]):
        manager.save(step, {"a": 1}, metrics={"acc": acc, "loss": -acc})
    manager.save(5, {"a": 1})
    best = [manager.best(), manager.best("loss", "max"), manager.best("f1", "max"), manager.best("val_loss")]
    assert [saved and saved.step for saved in best] == [3, 0, None, None]
    by_keep = [manager.best("acc"), manager.best("acc", "min"), manager.best("loss")]
    assert [saved and saved.step for saved in by_keep] == [3, 0, 3]
    with pytest.raises(UsageError, match="does not tell which values are better") as refused:
        manager.best("f1")
    assert refused.value.field == "Best.mode"
    with pytest.raises(UsageError, match="no metric to compare by"):
        CheckpointManager(tmp_path, keep=Latest(2)).best()
    with pytest.raises(UsageError, match="no metric to compare by"):
        CheckpointManager(tmp_path).best()


def test_incomplete_and_foreign_folders_are_named_and_left_alone(tmp_path: Path) -> None:
    CheckpointManager(tmp_path).save(5, state(5))
    shutil.copytree(tmp_path / "step-5", tmp_path / "step-7")
    (tmp_path / "step-7/snapshot_done").unlink()
    shutil.copytree(tmp_path / "step-5", tmp_path / "step-8")
    os.chmod(tmp_path / "step-8/manifest", 0o644)
    (tmp_path / "step-8/manifest").write_bytes(b"torn")
    for name in ("step-07", "step--1", "notes", "epoch-3"):
        (tmp_path / name).mkdir()
    (tmp_path / "step-9").write_text("a file")
    (tmp_path / "step-10").symlink_to("step-5")
    manager = CheckpointManager(tmp_path, keep=Latest(1))
    manager.save(6, state(6))
    manager.wait()
    assert steps(manager) == [6]
    others = manager.others()
    assert list(others) == ["epoch-3", "notes", "step--1", "step-07", "step-10", "step-7", "step-8", "step-9"]
    assert "snapshot_done" in others["step-7"]
    assert "torn" in others["step-8"]
    assert others["notes"] == "not a step of this run"
    assert sorted(os.listdir(tmp_path)) == sorted([*others, "step-6"])
    with pytest.raises(CheckpointExists):
        manager.save(7, state(7))
    assert not manager.should_save(7)


def test_checkpoints_that_others_put_there_count(tmp_path: Path) -> None:
    save(tmp_path / "step-3", {"w": np.ones(2)})
    (saved,) = CheckpointManager(tmp_path).all()
    assert (saved.step, dict(saved.metrics)) == (3, {})
    assert abs(saved.time - time.time()) < 60


def test_its_own_stale_staging_is_cleaned(tmp_path: Path) -> None:
    for name in (".step-3.saving-0123abcd", ".step-4.saving-00000000"):
        (tmp_path / name / "w").mkdir(parents=True)
    CheckpointManager(tmp_path)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("background", [False, True])
def test_what_is_being_read_is_not_deleted(tmp_path: Path, background: bool) -> None:
    manager = CheckpointManager(tmp_path, keep=Latest(1), background=background)
    manager.save(1, state(1)).wait()
    reading = open_checkpoint(tmp_path / "step-1")
    manager.save(2, state(2)).wait()
    assert steps(manager) == [1, 2]
    assert list(manager.prune(dry_run=True).held) == [1]
    assert reading["model/w"].numpy()[0] == 1
    reading.close()
    manager.save(3, state(3)).wait()
    assert steps(manager) == [3]
    manager.wait()
    assert os.listdir(tmp_path) == ["step-3"]


def test_a_handle_that_is_forgotten_holds_nothing(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path, keep=Latest(1))
    manager.save(1, state(1)).result()
    open_checkpoint(tmp_path / "step-1")
    manager.save(2, state(2))
    assert steps(manager) == [2]


def test_a_dry_run_says_what_would_go_and_why(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path)
    for step in range(6):
        manager.save(step, state(step), metrics={"loss": abs(step - 1)})
    strict = CheckpointManager(
        tmp_path, keep=Latest(2) | Best("loss") | KeepIf(lambda s: False), keep_parts={"optimizer/*": Latest(1)}
    )
    before = sorted(path for path in tmp_path.rglob("*"))
    report = strict.prune(dry_run=True)
    assert sorted(path for path in tmp_path.rglob("*")) == before
    assert report.kept == {1: "best 1 by min loss", 4: "latest 2", 5: "latest 2"}
    assert report.deleted == dict.fromkeys([0, 2, 3], "not latest 2, best 1 by min loss, <lambda>")
    assert report.trimmed == {1: ("optimizer/*",), 4: ("optimizer/*",)}
    assert str(report).splitlines()[:2] == [
        "         0  deleted  not latest 2, best 1 by min loss, <lambda>",
        "         1  kept     best 1 by min loss",
    ]
    assert strict.prune() == report
    strict.wait()
    assert sorted(os.listdir(tmp_path)) == ["step-1", "step-4", "step-5"]


def test_a_step_that_cannot_be_looked_at_is_kept_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for step in range(1, 5):
        CheckpointManager(tmp_path).save(step, {"w": np.zeros(3)})

    def refuse(path: Any, **options: Any) -> Any:
        if path.endswith("step-1"):
            raise StorageError("no", number=errno.EIO, path=path)
        return open_checkpoint(path, **options)

    with monkeypatch.context() as patched:
        patched.setattr(series, "open_checkpoint", refuse)
        manager = CheckpointManager(tmp_path, keep=Latest(1))
        done = manager.prune()
    assert list(done.kept) == [1, 4]
    assert "cannot be looked at" in done.kept[1]
    assert list(done.deleted) == [2, 3]
    assert any("step 1 is kept" in record.message for record in caplog.records)
    assert list(manager.prune().deleted) == [1]


def test_a_save_looks_four_times_at_each_step_that_is_kept(tmp_path: Path) -> None:
    def calls_beside(steps: int) -> int:
        manager = CheckpointManager(tmp_path / str(steps), keep=Latest(steps), durable=False)
        for step in range(steps):
            manager.save(step, {"w": np.zeros(3)})
        calls = 0

        def count(frame: Any, event: str, called: Any) -> None:
            nonlocal calls
            calls += event == "c_call" and getattr(called, "__module__", "") == "posix"

        sys.setprofile(count)
        try:
            manager.save(steps, {"w": np.zeros(3)})
        finally:
            sys.setprofile(None)
        manager.wait()
        return calls

    assert calls_beside(70) - calls_beside(20) == 4 * 50  # the manifest and the marker, before the save and after it


def test_parts_are_kept_for_as_long_as_their_own_policy_says(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path, keep=Latest(4), keep_parts={"optimizer/*": Latest(2)})
    for step in range(6):
        manager.save(step, state(step), attributes={"by": "me"})
    assert steps(manager) == [2, 3, 4, 5]
    for step in range(2, 6):
        checkpoint = open_checkpoint(tmp_path / f"step-{step}")
        assert ("optimizer/state/0/m" in checkpoint) == (step >= 4)
        assert verify(checkpoint.path).ok
        assert checkpoint.attributes["by"] == "me"
        restored = manager.restore(step)
        assert restored["model"]["w"][0] == step
        assert ("m" in restored["optimizer"]["state"][0]) == (step >= 4)
    times = [saved.time for saved in manager.all()]
    assert times == sorted(times)
    manager.wait()
    assert sorted(os.listdir(tmp_path)) == [f"step-{step}" for step in range(2, 6)]
    assert not CheckpointManager(tmp_path, keep_parts={"optimizer/*": Latest(2)}).prune().trimmed


def test_a_step_is_saved_once_unless_it_is_to_be_replaced(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path)
    manager.save(1, {"a": 1})
    with pytest.raises(CheckpointExists, match="saved already"):
        manager.save(1, {"a": 2})
    assert manager.restore(1) == {"a": 1}
    manager.save(1, {"a": 2}, overwrite=True)
    assert manager.restore(1) == {"a": 2}


def test_an_error_in_the_background_is_raised_once_by_the_next_call(tmp_path: Path) -> None:
    (tmp_path / "step-2/somebody's").mkdir(parents=True)
    manager = CheckpointManager(tmp_path, background=True)
    manager.save(1, {"w": np.ones(2)})
    manager.save(2, {"w": np.ones(2)}, overwrite=True)
    with pytest.raises(CheckpointExists, match="not a checkpoint"):
        manager.save(3, {"w": np.ones(2)})
    manager.wait()
    assert steps(manager) == [1, 3]
    with pytest.raises(UnsupportedDtype):
        manager.save(4, {"w": np.array([None])})
    (tmp_path / "step-4/somebody's").mkdir(parents=True)
    manager.save(4, {"w": np.ones(2)}, overwrite=True)
    with pytest.raises(CheckpointExists):
        manager.wait()
    shutil.rmtree(tmp_path / "step-4")
    assert manager.should_save(4)


def test_a_save_is_refused_while_another_goes_on(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path, background=True, when_busy="refuse")
    manager.save(1, {"w": np.ones(40_000_000, "i1")})
    with pytest.raises(UsageError, match="still being written"):
        manager.save(2, {"w": np.ones(2)})
    manager.wait()
    manager.save(2, {"w": np.ones(2)}).wait()
    assert steps(manager) == [1, 2]


def test_with_waits(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path, background=True, keep=Latest(1)) as manager:
        for step in range(5):
            manager.save(step, state(step))
    assert os.listdir(tmp_path) == ["step-4"]


def test_when_to_save_by_the_clock(tmp_path: Path) -> None:
    clock = Clock()
    manager = CheckpointManager(tmp_path, save_when=EverySeconds(60), clock=clock)
    saved = []
    for step in range(10):
        if manager.should_save(step):
            manager.save(step, {"a": step})
            saved.append(step)
        clock.now += 25
    assert saved == [0, 3, 6, 9]


@pytest.mark.parametrize("call", [{"step": -1}, {"step": 1.5}, {"step": "1"}])
def test_steps_that_are_none(tmp_path: Path, call: Any) -> None:
    with pytest.raises((UsageError, TypeError)):
        CheckpointManager(tmp_path).save(state={"a": 1}, **call)
    with pytest.raises(UsageError):
        CheckpointManager(tmp_path, prefix="a/b")


RUN = """
import sys
import numpy as np
from varstore.training.manager import CheckpointManager
from varstore.training.policies import Best, KeepEverySteps, Latest

manager = CheckpointManager(
    sys.argv[1], keep=Latest(2) | KeepEverySteps(50) | Best("loss"), background=True,
    keep_parts={"optimizer/*": Latest(1)}, durable=False,
)
step, w, history = 0, np.zeros(200_000, "f4"), 0
if manager.latest():
    state = manager.restore()
    step, w, history = state["step"], state["model"]["w"], state["history"]
    assert state["optimizer"]["m"][0] == step
    print("resumed", step, flush=True)
frozen = np.arange(300_000, dtype="f4")
while step < 100_000:
    step += 1
    w += step
    history = (history * 31 + step) % 1_000_003
    state = {
        "model": {"w": w, "frozen": frozen}, "optimizer": {"m": np.full(50_000, step, "f4")},
        "step": step, "history": history,
    }
    manager.save(step, state, metrics={"loss": abs(step % 7 - 3)})
    print(step, flush=True)
"""


def test_killed_at_any_moment_a_run_resumes_from_a_complete_checkpoint(tmp_path: Path) -> None:
    times = int(os.environ.get("VARSTORE_KILLS", "20"))
    chance = random.Random(0)
    reached = 0
    for _ in range(times):
        process = subprocess.Popen([sys.executable, "-c", RUN, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        said = process.stdout.readline()
        time.sleep(chance.uniform(0, 0.4))
        process.send_signal(signal.SIGKILL)
        said += process.communicate()[0]
        assert process.returncode == -signal.SIGKILL
        if reached:
            resumed = int(said.split()[1])
            assert said.startswith("resumed")
            assert resumed >= reached
        latest = CheckpointManager(tmp_path).latest()
        if latest is None:
            continue
        assert latest.step >= reached
        assert verify(latest.path).ok, str(verify(latest.path))
        state = CheckpointManager(tmp_path).restore()
        history = w = 0
        for step in range(1, latest.step + 1):
            history = (history * 31 + step) % 1_000_003
            w = np.float32(w) + np.float32(step)
        assert (state["step"], state["history"], state["model"]["w"][0]) == (latest.step, history, w)
        assert state["optimizer"]["m"][0] == latest.step
        assert all(verify(saved.path).ok for saved in CheckpointManager(tmp_path).all())
        reached = latest.step
    assert reached > 0
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


def test_a_framework_that_is_missing_is_named(tmp_path, monkeypatch):
    for name in ("varstore.adapters.torch_distributed.managing", "varstore.adapters.jax"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingDependency, match="this needs torch"):
        CheckpointManager(tmp_path / "run", process_group=3)
    manager = CheckpointManager(tmp_path / "run")
    manager.save(1, {"w": np.ones(3)})
    with pytest.raises(MissingDependency, match="this needs jax"):
        manager.restore(like={"w": 0})
