"""However a process ends, what it saved is the old one or the new one, and what it left is removed by the next."""

import os
import signal
import subprocess
import sys

import numpy as np
import pytest

import varstore as vs

BEGIN = """
import os, signal, sys, threading, time
import numpy as np, varstore as vs
os.chdir(sys.argv[1])
values = {f"v{i}": np.full(300_000, i, "f4") for i in range(4)}
small = {"w": np.arange(3.0)}

def at_half(action):
    # a progress function that acts once, in the middle of the write
    done = []
    def progress(written, total):
        if 2 * written >= total and not done:
            done.append(1)
            action()
    return progress

def kill(number):
    return at_half(lambda: os.kill(os.getpid(), number))
"""


def end(directory, code):
    """Run a program to its end; return its status and what it complained of."""
    done = subprocess.run(
        [sys.executable, "-c", BEGIN + code, str(directory)], capture_output=True, text=True, check=False, timeout=60
    )
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    ("code", "status", "complaint"),
    [
        ("vs.save_async('c', values); sys.exit(3)", 3, ""),
        ("vs.save_async('c', values); raise ValueError('boom')", 1, "ValueError: boom"),
        ("import atexit; atexit.register(vs.save, 'c', values)", 0, ""),
        ("import atexit; atexit.register(lambda: vs.save_async('c', values).wait())", 0, ""),
        ("os.kill(os.getpid(), signal.SIGCONT); vs.save('c', values, progress=kill(signal.SIGCONT))", 0, ""),
    ],
    ids=["sys.exit", "exception", "atexit", "atexit in the background", "continue"],
)
def test_a_save_that_the_end_of_a_program_waits_for(tmp_path, code, status, complaint):
    found, complaints = end(tmp_path, code)
    assert found == status
    assert complaint in complaints
    assert bool(complaints) == bool(complaint)
    assert os.listdir(tmp_path) == ["c"]
    assert vs.verify(tmp_path / "c").ok


@pytest.mark.parametrize("old", [False, True], ids=["new", "overwrite"])
@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("vs.save('c', values, overwrite=True, progress=kill(signal.SIGINT))", -signal.SIGINT),
        (
            "signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))\n"
            "vs.save('c', values, overwrite=True, progress=kill(signal.SIGTERM))",
            143,
        ),
        ("vs.save('c', values, overwrite=True, progress=at_half(lambda: 1 / 0))", 1),
        ("vs.save_async('c', values, overwrite=True, progress=at_half(lambda: 1 / 0)).wait()", 1),
    ],
    ids=["Ctrl-C", "SystemExit", "an error", "an error in the background"],
)
def test_a_save_that_is_interrupted_is_undone(tmp_path, code, status, old):
    if old:
        vs.save(tmp_path / "c", {"old": np.arange(2)})
    assert end(tmp_path, code)[0] == status
    assert os.listdir(tmp_path) == (["c"] if old else [])
    assert not old or vs.load(tmp_path / "c")["old"].tolist() == [0, 1]


@pytest.mark.parametrize("old", [False, True], ids=["new", "overwrite"])
@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("vs.save('c', values, overwrite=True, progress=kill(signal.SIGTERM))", -signal.SIGTERM),
        ("vs.save('c', values, overwrite=True, progress=kill(signal.SIGKILL))", -signal.SIGKILL),
        ("vs.save_async('c', values, overwrite=True, progress=kill(signal.SIGKILL)).wait()", -signal.SIGKILL),
        ("vs.save_async('c', values, overwrite=True, progress=at_half(lambda: os._exit(5))).wait()", 5),
        (
            "half = threading.Event()\n"
            "progress = at_half(lambda: (half.set(), time.sleep(9)))\n"
            "save = lambda: vs.save('c', values, overwrite=True, progress=progress)\n"
            "threading.Thread(target=save, daemon=True).start(); half.wait()",
            0,
        ),
    ],
    ids=["SIGTERM", "SIGKILL", "SIGKILL in the background", "os._exit", "daemon thread"],
)
def test_a_save_that_is_killed_leaves_what_the_next_removes(tmp_path, code, status, old):
    if old:
        vs.save(tmp_path / "c", {"old": np.arange(2)})
    assert end(tmp_path, code)[0] == status
    assert sum(".saving-" in name for name in os.listdir(tmp_path)) == 1
    assert (tmp_path / "c").exists() == old
    assert not old or vs.load(tmp_path / "c")["old"].tolist() == [0, 1]
    vs.save(tmp_path / "c", {"new": np.ones(3)}, overwrite=True)
    assert os.listdir(tmp_path) == ["c"]


def test_a_manager_that_is_killed_resumes(tmp_path):
    code = """
manager = vs.CheckpointManager("run", keep=vs.Latest(2))
for step in range(1, 5):
    manager.save(step, values)
vs.CheckpointManager("run", keep=vs.Latest(2), progress=kill(signal.SIGKILL)).save(5, {"w": np.ones(300_000)})
"""
    assert end(tmp_path, code)[0] == -signal.SIGKILL
    manager = vs.CheckpointManager(tmp_path / "run")
    assert [saved.step for saved in manager.all()] == [3, 4]
    assert sorted(os.listdir(tmp_path / "run")) == ["step-3", "step-4"]
    assert vs.verify(manager.latest().path).ok


def test_a_save_while_the_interpreter_ends_is_made_or_refused(tmp_path):
    status, complaints = end(tmp_path, "class Last:\n    def __del__(self): vs.save('c', small)\nlast = Last()")
    assert status == 0
    assert "ImportError" not in complaints
    assert os.listdir(tmp_path) in ([], ["c"])
