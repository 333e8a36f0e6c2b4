"""What a REPL shows of a result is one short line, however many variables there are."""

from __future__ import annotations

import numpy as np
import pytest

import varstore as vs

NAMES = [f"encoder/layer{i}/weight" for i in range(300)]
VALUES = {name: np.zeros(2, np.float32) for name in NAMES}


def results(folder):
    """Return what the verbs return for 300 variables, most of them with something to say about each."""
    saved = vs.save(folder / "run" / "step-1", VALUES)
    vs.save(folder / "other", {f"{name}~": value for name, value in VALUES.items()})
    vs.save(folder / "damaged", VALUES)
    for name in NAMES:
        file = folder / "damaged" / name / "out"
        file.chmod(0o644)
        file.write_bytes(b"\1" * 8)
    state = {**VALUES, **{f"{name}~": {"epoch": 1} for name in NAMES}}
    vs.write(folder / "m.pt", state)
    targets = {name: np.ones(2 + at % 2, np.float32) for at, name in enumerate(NAMES)}
    manager = vs.CheckpointManager(folder / "run", keep=vs.Latest(1))
    return {
        "save": saved,
        "read": vs.read(folder / "m.pt"),
        "verify": vs.verify(folder / "damaged"),
        "diff": vs.diff(folder / "other", saved),
        "stats": vs.stats(saved),
        "load_into": vs.load_into(targets, saved, on_mismatch="skip"),
        "convert": vs.convert(folder / "m.pt", folder / "m.npz"),
        "write": vs.write(folder / "x.pt", state),
        "steps": vs.steps(folder / "run"),
        "manager": manager,
        "prune": manager.prune(dry_run=True),
        "check_storage": vs.check_storage(folder),
        "links": vs.links(folder / "run", dry_run=True),
        "open": vs.open(folder / "other"),
    }


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    return results(tmp_path_factory.mktemp("shown"))


def test_a_repl_shows_one_short_line(shown):
    for verb, result in shown.items():
        text = repr(result)
        assert text.startswith("<"), verb
        assert len(text) < 300, verb
        assert "\n" not in text, verb
        assert "layer299" not in text, verb


def test_a_notebook_shows_a_table_of_bounded_length(shown):
    tables = "verify stats load_into convert steps manager prune check_storage links open read diff"
    for verb in tables.split():
        html = shown[verb]._repr_html_()
        assert "<table>" in html, verb
        assert html.count("<tr>") <= 102, verb


def test_printing_shows_all(shown):
    assert "layer299" in str(shown["verify"])
    assert "layer299" in str(shown["stats"])
    assert "300" in str(shown["load_into"])
    assert "and 295 more" in str(shown["convert"])


def test_a_manager_tells_what_it_keeps(tmp_path):
    manager = vs.CheckpointManager(tmp_path / "run", keep=vs.Latest(2) | vs.Best("loss"), clock=lambda: 0.0)
    assert repr(manager) == f"<CheckpointManager '{tmp_path}/run': 0 steps>"
    for step in range(3):
        manager.save(step, {"w": np.zeros(2)}, metrics={"loss": step / 8})
    assert repr(manager) == f"<CheckpointManager '{tmp_path}/run': 3 steps, the last is 2>"
    html = manager._repr_html_()
    assert html.count("<tr>") == 4
    assert "<td>0.125</td><td>latest 2</td>" in html
    assert "<td>0</td><td>best 1 by min loss</td>" in html
    (tmp_path / "run").chmod(0)
    assert repr(manager).startswith(f"<CheckpointManager '{tmp_path}/run': ")
    (tmp_path / "run").chmod(0o700)


def test_a_manager_shows_what_it_will_delete(tmp_path):
    for step in range(150):
        vs.save(tmp_path / f"step-{step}", {"w": np.zeros(1)}, durable=False)
    html = vs.CheckpointManager(tmp_path, keep=vs.Latest(1))._repr_html_()
    assert html.count("<tr>") == 101
    assert "to be deleted: not latest" in html
    assert "and 50 earlier steps" in html
