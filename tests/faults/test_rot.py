"""Rot in a checkpoint is found, and what would hide it is found out."""

import numpy as np
import pytest

import varstore as vs
from tools.faults.jobs import FOREIGN
from tools.faults.rot import examine, jobs


@pytest.mark.parametrize("job", list(jobs(whole=False)), ids=lambda job: f"{job.scenario}: {job.fault}")
def test_each_change_is_noticed(tmp_path, job):
    outcome = job.run(tmp_path)
    assert list(outcome.lost) == []
    assert outcome.points >= 2


@pytest.fixture
def checkpoint(tmp_path):
    vs.save(tmp_path / "c", {"w": np.arange(3)}, durable=False)
    return tmp_path / "c"


def test_wrong_values_are_found_out(checkpoint):
    assert dict(examine(checkpoint, {"w": np.arange(3)})).keys() == {"UNNOTICED", "WRONG"}
    assert dict(examine(checkpoint, {"w": np.arange(4)})).keys() == {"UNNOTICED", "WRONG"}


def test_foreign_errors_are_found_out(checkpoint, monkeypatch):
    def fail(*arguments, **options):
        raise ZeroDivisionError

    monkeypatch.setattr(vs, "verify", fail)
    assert dict(examine(checkpoint, {})).keys() == {FOREIGN, "WRONG"}
    monkeypatch.setattr(vs, "load", fail)
    assert dict(examine(checkpoint, {})).keys() == {FOREIGN}
