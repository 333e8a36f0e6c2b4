"""Some of the campaign's signals: nothing hangs, and what a handler saved verifies."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest

from tools.faults import signals


def test_ctrl_c_in_background_saves(tmp_path: Path) -> None:
    job = next(signals.jobs(whole=False))
    assert (job.scenario, job.fault) == ("save_async", "Ctrl-C")
    outcome = job.run(tmp_path)
    assert outcome.points == 20
    assert not outcome.lost


def test_the_matrix_is_whole() -> None:
    found = {(job.scenario, job.fault) for job in signals.jobs(whole=True)}
    assert found == {("save_async", "Ctrl-C")} | {(a, f"handler: {b}") for a, b in product(signals.SAVES, repeat=2)}


@pytest.mark.parametrize("outer", signals.SAVES)
def test_a_handler_that_saves(tmp_path: Path, outer: str) -> None:
    jobs = [job for job in signals.jobs(whole=False) if job.scenario == outer and "handler" in job.fault]
    for number, job in enumerate(jobs):
        (place := tmp_path / str(number)).mkdir()
        assert not job.run(place).lost, job.fault


def test_what_hangs_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "_SECONDS", 0.001)
    outcome = next(signals.jobs(whole=False)).run(tmp_path)
    assert {kind for lost in outcome.lost for kind in lost.losses} == {"HUNG"}
