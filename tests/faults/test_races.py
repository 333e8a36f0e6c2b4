"""A part of the races of readers with a writer that overwrites; the whole is ``python -m tools.faults races``."""

import numpy as np
import pytest

import varstore as vs
from tools.faults.jobs import FOREIGN
from tools.faults.races import BY_PATH, FILLINGS, filling_of, jobs, losses, save, values_of


@pytest.mark.parametrize("job", list(jobs(whole=False)), ids=lambda job: f"{job.scenario}: {job.fault}")
def test_each_call_sees_one_checkpoint(tmp_path, job):
    outcome = job.run(tmp_path)
    assert list(outcome.lost) == []
    assert outcome.points >= 20


@pytest.fixture
def path(tmp_path):
    save(tmp_path / "first", FILLINGS[0], manifest=True)
    save(tmp_path / "c", FILLINGS[0], manifest=True)
    return tmp_path / "c"


def test_mixtures_are_found_out(path):
    mixed = values_of(1) | {"same": values_of(2)["same"]}
    vs.save(path, mixed, attributes={"filling": 1}, overwrite=True)
    for name, use in BY_PATH.items():
        assert name == "diff" or dict(losses(use, path)).keys() == {"MIXED"}, name
    with pytest.raises(AssertionError, match="mixture"):
        filling_of({**values_of(1), "v1": np.zeros(41, np.int16)})


def test_old_attributes_beside_new_values_are_found_out(path):
    vs.save(path, values_of(1), attributes={"filling": 2}, overwrite=True)
    for verb in ("open", "verify", "seal"):
        assert dict(losses(BY_PATH[verb], path)).keys() == {"MIXED"}


def test_reports_of_damage_are_found_out(path):
    (path / "same" / "out").unlink()
    for verb in ("load", "load_into", "load_state", "seal", "convert to a checkpoint"):
        assert dict(losses(BY_PATH[verb], path)).keys() <= {"DAMAGE", "MIXED"}
        assert dict(losses(BY_PATH[verb], path))


def test_foreign_errors_are_found_out(path):
    assert dict(losses(lambda path: 1 // 0, path)).keys() == {FOREIGN}
