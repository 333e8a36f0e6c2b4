"""A run that begins again in the directory of a longer one, and clocks that are set: saving goes on, none is lost."""

import logging
import warnings

import numpy as np
import pytest

import varstore as vs


def steps(manager):
    return [saved.step for saved in manager.all()]


def save(manager, *numbers):
    for step in numbers:
        manager.save(step, {"w": np.full(3, step, float)})


@pytest.fixture
def stepped_back(tmp_path):
    """A new manager in a directory whose run came to step 700, and what it has warned of."""
    save(vs.CheckpointManager(tmp_path / "run", keep=vs.Latest(3)), 500, 600, 700)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield vs.CheckpointManager(tmp_path / "run", keep=vs.Latest(3))


def test_the_step_just_saved_is_kept_in_a_directory_of_later_steps(stepped_back):
    pending = stepped_back.save(100, {"w": np.full(3, 100.0)})
    assert 100 in steps(stepped_back)
    assert pending.result()["w"].numpy().tolist() == [100] * 3


def test_after_a_step_back_all_new_steps_are_kept(stepped_back):
    save(stepped_back, 100, 200, 300, 400)
    assert {100, 200, 300, 400} <= set(steps(stepped_back))
    assert stepped_back.prune(dry_run=True).deleted == {}


def test_rewind_removes_the_later_steps(stepped_back):
    save(stepped_back, 100)
    stepped_back.rewind(100)
    assert steps(stepped_back) == [100]
    save(stepped_back, 200, 300, 400)
    assert steps(stepped_back) == [200, 300, 400]


def test_a_step_back_is_told_once(tmp_path, caplog):
    save(vs.CheckpointManager(tmp_path / "run", keep=vs.Latest(3)), 500, 600, 700)
    with caplog.at_level(logging.WARNING), warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        save(vs.CheckpointManager(tmp_path / "run", keep=vs.Latest(3)), 100, 200, 300)
    told = [record.getMessage() for record in caplog.records] + [str(warning.message) for warning in warned]
    assert len(told) == 1
    assert "rewind" in told[0]


class Clock:
    def __init__(self):
        self.now = 1_800_000_000.0

    def __call__(self):
        return self.now


DAY = 86_400


@pytest.mark.parametrize("new_run", [False, True], ids=["same run", "new run"])
@pytest.mark.parametrize("leap", [pytest.param(-7 * DAY, id="back"), pytest.param(7 * DAY, id="ahead")])
def test_saving_by_seconds_goes_on_when_the_clock_is_set(tmp_path, leap, new_run):
    clock = Clock()
    manager = vs.CheckpointManager(tmp_path, save_when=vs.EverySeconds(60), clock=clock)
    save(manager, 1)
    clock.now += leap
    if new_run:
        manager = vs.CheckpointManager(tmp_path, save_when=vs.EverySeconds(60), clock=clock)
    saved = []
    for step in range(2, 20):
        clock.now += 20
        if manager.should_save(step):
            save(manager, step)
            saved.append(step)
    assert len(saved) in (5, 6, 7)


def test_one_per_minutes_keeps_every_window_when_the_clock_is_set_back(tmp_path):
    clock = Clock()
    manager = vs.CheckpointManager(tmp_path, keep=vs.OnePerMinutes(10) | vs.Latest(1), clock=clock)
    for step in range(8):
        save(manager, step)
        clock.now += 600 - (DAY if step == 3 else 0)
    assert steps(manager) == [*range(8)]
