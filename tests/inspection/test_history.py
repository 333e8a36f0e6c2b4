"""A run as a whole: one variable over all steps, trajectories of metrics and norms, and what each step takes."""

import json
import math
import os
import pickle

import numpy as np
import pytest
from click.testing import CliRunner

import varstore as vs
from varstore.cli import main
from varstore.errors import UsageError, VariableMismatch, VariableNotFound
from varstore.storage import syscalls

pytestmark = pytest.mark.core

FROZEN = np.arange(3 << 18, dtype=np.float32)
STEPS = (10, 20, 30, 40)


def run(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments], prog_name="varstore")


def weights(step):
    return np.arange(12, dtype=np.float32).reshape(3, 4) * step


@pytest.fixture
def path(tmp_path):
    manager = vs.CheckpointManager(tmp_path / "run", keep=vs.Latest(9))
    for step in STEPS:
        state = {"w": weights(step), "frozen": FROZEN, "step": np.array(step)}
        if step > 10:
            state["late"] = np.ones(2)
        manager.save(step, state, metrics={"loss": 1 / step, "wild": math.inf if step == 20 else step}).wait()
    return tmp_path / "run"


def test_a_history_is_an_array_over_the_steps(path):
    history = vs.history(path, "w")
    whole = np.stack([weights(step) for step in STEPS])
    assert (history.shape, history.dtype, history.steps) == (whole.shape, whole.dtype, STEPS)
    assert np.array_equal(history.numpy(), whole)
    for index in (0, -1, slice(1, 3), slice(None, None, -2), (slice(None), 1, 2), (..., 0), (2, [0, 2]), [0, 3]):
        assert np.array_equal(history[index], whole[index]), index
    with pytest.raises(IndexError):
        history[4]
    assert history.mean(axis=0).shape == (3, 4)
    assert vs.history(path, "step")[:].tolist() == [*STEPS]
    assert vs.history(path, "late").steps == STEPS[1:]
    assert repr(history) == "<History 'w': float32 [4, 3, 4], 4 steps>"
    copy = pickle.loads(pickle.dumps(history))
    assert (copy.steps, copy[1].tolist()) == (STEPS, whole[1].tolist())
    assert np.allclose(history.norms(), [np.linalg.norm(weights(step)) for step in STEPS])


def test_only_what_an_index_needs_is_read_and_what_steps_share_once(path, monkeypatch):
    read = []
    real = syscalls.preadv
    monkeypatch.setattr(syscalls, "preadv", lambda *given: read.append(real(*given)) or read[-1])
    history = vs.history(path, "frozen")
    assert sum(read) < 1000
    assert history[:, 5].tolist() == [5.0] * 4
    assert sum(read) < 100_000
    assert np.array_equal(history.numpy(), np.stack([FROZEN] * 4))
    assert history.norms() == pytest.approx([np.linalg.norm(FROZEN.astype(np.float64))] * 4, rel=1e-12)
    assert sum(read) < 2.1 * FROZEN.nbytes


def test_what_is_no_history_is_refused(path, tmp_path):
    with pytest.raises(VariableNotFound, match="frozen"):
        vs.history(path, "frozn")
    with pytest.raises(UsageError, match="no steps"):
        vs.history(tmp_path, "w")
    vs.CheckpointManager(path).save(50, {"w": np.ones(2)}).wait()
    with pytest.raises(VariableMismatch, match=r"step-50.*expected \[3, 4\] float32"):
        vs.history(path, "w")
    vs.save(path / "other-7", {"w": np.ones(1)})
    with pytest.raises(UsageError, match="several runs"):
        vs.history(path, "w")
    assert vs.history(path, "w", prefix="other-").steps == (7,)
    with pytest.raises(UsageError, match="prefix"):
        vs.history(path, "w", prefix="third-")


def test_log_draws_metrics_and_norms(path):
    result = run("log", path)
    assert result.exit_code == 0
    head, headings, loss, wild = result.output.splitlines()
    assert head == f"{path}: 4 steps"
    assert headings.split() == ["name", "first", "trajectory", "last", "least", "at", "largest", "at"]
    assert loss.split() == ["loss", "0.1", "█▃▁▁", "0.025", "0.025", "40", "0.1", "10"]
    assert wild.split() == ["wild", "10", "▁×▆█", "40", "10", "10", "40", "40"]
    norm = run("log", path, "w", "loss").output.splitlines()[2:]
    assert norm[0].split()[:3] == ["w", "224.944", "▁▃▆█"]
    assert norm[1].split() == loss.split()
    found = json.loads(run("log", "--json", path, "frozen", "wild").output)["series"]
    assert [(row["name"], row["kind"]) for row in found] == [("frozen", "norm"), ("wild", "metric")]
    assert (found[1]["steps"], found[1]["values"]) == ([*STEPS], [10, None, 30, 40])
    assert run("log", path, "nothing").exit_code == 3
    assert run("log", path / "nothing").exit_code == 3


def test_log_of_many_steps_is_of_one_width_and_ascii_where_it_must(tmp_path):
    manager = vs.CheckpointManager(tmp_path / "run", keep=vs.Latest(200))
    for step in range(100):
        manager.save(step, {"w": np.ones(1)}, metrics={"loss": float(step), "same": 1.0}).wait()
    rows = run("log", tmp_path / "run").output.splitlines()[2:]
    assert len(rows[0].split()[2]) == 48
    assert set(rows[1].split()[2]) == {"▅"}
    result = CliRunner(charset="ascii").invoke(main, ["log", str(tmp_path / "run")])
    assert result.output.isascii()
    manager = vs.CheckpointManager(tmp_path / "plain")
    manager.save(1, {"w": np.ones(1)}).wait()
    assert "name a variable" in run("log", tmp_path / "plain").output


def test_du_tells_what_is_own_and_what_is_shared(path):
    found = {step.step: step for step in vs.steps(path).steps}
    assert [found[step].own_nbytes for step in STEPS] == [56, 56, 56, 56]
    assert found[20].nbytes == FROZEN.nbytes + 48 + 8 + 16
    result = run("du", path, "-b")
    assert result.exit_code == 0
    assert [line.split() for line in result.output.splitlines()[1:3]] == [
        ["step", "size", "own", "shared"],
        ["step-10", str(FROZEN.nbytes + 56), "56", str(FROZEN.nbytes)],
    ]
    os.link(path / "step-10/w/out", path.parent / "kept")
    assert vs.steps(path).steps[0].own_nbytes == 8
    said = json.loads(run("du", "--json", path).output)
    assert said["steps"][1]["own_nbytes"] == 56
    assert run("du", path.parent / "nowhere").exit_code == 3
    (path / "step-10/snapshot_done").unlink()
    row = run("du", path).output.splitlines()[2]
    assert row.split()[:3] == ["step-10", "incomplete:", "no"]  # a step that cannot be opened is not said to be empty
