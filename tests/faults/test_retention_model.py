"""Whatever happens to a run, retention deletes what its model says: see tools/faults/retention.py."""

from hypothesis.stateful import run_state_machine_as_test

from tools.faults.retention import RetentionMachine, profile


def test_retention_deletes_what_the_model_says_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.setattr(RetentionMachine, "place", str(tmp_path))
    run_state_machine_as_test(RetentionMachine, settings=profile(25))
