"""Background saves: what was there when the call was made is what is saved, and nobody loses an error."""

from __future__ import annotations

import ast
import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import run_python

from varstore.disk.read.checkpoint import open_checkpoint
from varstore.errors import CheckpointExists, InvalidName, UsageError
from varstore.inspection.verify import verify
from varstore.model.store import load, save
from varstore.training import background
from varstore.training.background import BackgroundSaver, save_async, save_state_async
from varstore.training.manager import CheckpointManager
from varstore.training.state import load_state


class Gate:
    """An array that is not given out before the gate opens: a disk as slow as a test wants it."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.shape, self.dtype = (2,), np.dtype("f4")

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        assert self.open.wait(30)
        return np.ones(2, "f4")


@pytest.fixture
def gate() -> Iterator[Gate]:
    gate = Gate()
    yield gate
    gate.open.set()


def variables(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    tied = rng.standard_normal((300, 300))
    return {
        "big": rng.standard_normal((1 << 20) + 3).astype("f4"),
        "transposed": rng.standard_normal((40, 30)).T,
        "strided": np.arange(5_000_000)[::3],
        "swapped": rng.standard_normal(9).astype(">f8"),
        "tied": tied,
        "tied again": tied,
        "empty": np.zeros((3, 0)),
        "scalar": np.float32(3),
        "odd": np.arange(7, dtype="i1"),
    }


def test_what_was_there_at_the_call_is_saved_though_all_changes_after_it(tmp_path: Path) -> None:
    saver = BackgroundSaver()
    sizes = set()
    for step in range(4):
        given = variables(step)
        pending = saver.save(tmp_path / str(step), given)
        for array in given.values():
            if isinstance(array, np.ndarray):
                array[...] = -1
        sizes.add(saver.buffered)
        if step == 3:
            assert pending.result().path == str(tmp_path / "3")
    for step in range(4):
        loaded = load(tmp_path / str(step))
        for name, array in variables(step).items():
            assert loaded[name].tobytes() == array.astype(array.dtype.newbyteorder("<")).tobytes(), name
        assert loaded["tied"] is loaded["tied again"]
        assert verify(tmp_path / str(step)).ok
    assert len(sizes) == 1


def test_it_returns_before_the_write_ends(tmp_path: Path, gate: Gate) -> None:
    pending = save_async(tmp_path / "c", {"a": np.ones(3), "late": gate}, copy=False)
    assert not pending.done()
    assert "running" in repr(pending)
    with pytest.raises(TimeoutError):
        pending.wait(0.01)
    assert not (tmp_path / "c").exists()
    gate.open.set()
    assert pending.result(30).names == ("a", "late")
    assert pending.done()


def test_a_second_save_waits(tmp_path: Path, gate: Gate) -> None:
    saver = BackgroundSaver()
    first = saver.save(tmp_path / "a", {"late": gate}, copy=False)
    threading.Timer(0.2, gate.open.set).start()
    begin = time.monotonic()
    second = saver.save(tmp_path / "b", {"x": np.ones(2)})
    assert time.monotonic() - begin > 0.1
    assert first.done() or first.result(5)
    assert second.result(5).names == ("x",)


class Handler:
    def __init__(self, act: Any) -> None:
        self.act = act

    def __call__(self, number: int, frame: Any) -> None:
        self.act()

    def method(self, number: int, frame: Any) -> None:
        self.act()

    def bound(self, other: str, number: int, frame: Any) -> None:
        self.act()

    def unset(self, number: int, frame: Any) -> None:
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        self.act()

    def late(self, *given: Any) -> None:
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        self.act()


@pytest.mark.parametrize("how", ["call", "method", "partial", "unset", "set late", "set late, any"])
@pytest.mark.parametrize("who", ["saver", "manager"])
def test_a_save_in_a_signal_handler_waits_for_no_thread(tmp_path: Path, gate: Gate, who: str, how: str) -> None:
    saver, manager = BackgroundSaver(), CheckpointManager(tmp_path, background=True)
    begun = {"a": gate, "b": np.ones(3)}
    emergency = {"x": np.arange(3.0)}

    def act() -> None:
        if who == "saver":
            saver.save(tmp_path / "step-2", emergency).wait()
        else:
            manager.save(2, emergency)
        assert load(tmp_path / "step-2")["x"].tolist() == [0, 1, 2]
        ended.append(gate.open.is_set())
        gate.open.set()

    ended: list[bool] = []
    handler = Handler(act)
    handlers = {
        "call": handler,
        "method": handler.method,
        "partial": partial(handler.bound, "more"),
        "unset": handler.unset,
        "set late": handler.unset,
        "set late, any": handler.late,
    }
    before = signal.signal(signal.SIGUSR1, signal.SIG_IGN if "late" in how else handlers[how])
    try:
        saver.save(tmp_path / "step-1", begun, copy=False)
        if who == "manager":
            assert saver._turn is not None
            manager._saver, manager._pending = saver, saver._turn._ending
        timer = threading.Timer(10, gate.open.set)
        timer.start()
        signal.signal(signal.SIGUSR1, handlers[how])
        os.kill(os.getpid(), signal.SIGUSR1)
    finally:
        signal.signal(signal.SIGUSR1, before)
        timer.cancel()
    assert ended == [False]
    manager.wait()
    saver.release()
    assert verify(tmp_path / "step-1").ok


def test_a_second_save_is_refused(tmp_path: Path, gate: Gate) -> None:
    saver = BackgroundSaver()
    first = saver.save(tmp_path / "a", {"late": gate}, copy=False)
    with pytest.raises(UsageError, match="another save is still being written"):
        saver.save(tmp_path / "b", {"x": np.ones(2)}, when_busy="refuse")
    gate.open.set()
    first.wait(5)
    saver.save(tmp_path / "b", {"x": np.ones(2)}, when_busy="refuse").wait(5)


def test_the_original_error_is_raised_each_time_and_logged(tmp_path: Path, caplog: Any) -> None:
    save(tmp_path / "a", {"x": np.ones(2)})
    pending = save_async(tmp_path / "a", {"x": np.zeros(2)})
    for ask in (pending.wait, pending.result, pending.result):
        with pytest.raises(CheckpointExists, match="not empty"):
            ask(5)
    assert "failed" in repr(pending)
    assert [record.levelno for record in caplog.records] == [logging.ERROR]
    assert load(tmp_path / "a")["x"][0] == 1
    assert save_async(tmp_path / "b", {"x": np.zeros(2)}).result(5).names == ("x",)


def test_what_can_be_refused_is_refused_at_the_call(tmp_path: Path) -> None:
    with pytest.raises(InvalidName):
        save_async(tmp_path / "a", {"": np.zeros(2)})
    with pytest.raises(UsageError, match="state\\[0\\]: function"):
        save_state_async(tmp_path / "a", [lambda: 1])
    with pytest.raises(UsageError, match="when_busy"):
        save_async(tmp_path / "a", {"a": np.zeros(2)}, when_busy="later")  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_a_value_that_cannot_be_fetched_leaves_the_saver_usable(tmp_path: Path) -> None:
    class Broken(Gate):
        def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
            raise RuntimeError("the device is gone")

    saver = BackgroundSaver()
    with pytest.raises(RuntimeError, match="the device is gone"):
        saver.save(tmp_path / "a", {"x": Broken()})
    assert saver.save(tmp_path / "b", {"x": np.ones(1)}, when_busy="refuse").result(5).names == ("x",)


def test_a_save_over_the_budget_is_written_before_the_call_returns(tmp_path: Path) -> None:
    saver = BackgroundSaver()
    pending = saver.save(tmp_path / "a", {"x": np.ones(1000)}, budget=7999)
    assert pending.done()
    assert saver.buffered == 0
    saver.save(tmp_path / "b", {"x": np.ones(1000)}, budget=9000).wait(5)
    assert 8000 <= saver.buffered <= 9000
    saver.release()
    assert saver.buffered == 0
    with pytest.raises(CheckpointExists):
        saver.save(tmp_path / "a", {"x": np.ones(1000)}, budget=7999)


def test_links_need_no_copy(tmp_path: Path) -> None:
    checkpoint = save(tmp_path / "a", {"x": np.ones(1000)})
    saver = BackgroundSaver()
    saver.save(tmp_path / "b", dict(checkpoint), budget=100).wait(5)
    assert saver.buffered < 1000
    assert (tmp_path / "a/x/out").stat().st_ino == (tmp_path / "b/x/out").stat().st_ino


def test_nested_state(tmp_path: Path) -> None:
    state = {"w": np.ones(3), "epoch": (1, 2.5)}
    pending = save_state_async(tmp_path / "a", state, attributes={"by": "me"})
    state["w"][:] = 0
    assert pending.result(5).attributes == {"by": "me"}
    loaded = load_state(tmp_path / "a")
    assert loaded["epoch"] == (1, 2.5)
    assert loaded["w"].tolist() == [1, 1, 1]


@pytest.mark.parametrize("when", ["before the thread starts", "after it started", "and it starts late"])
def test_an_interrupt_while_the_thread_starts(tmp_path: Path, monkeypatch: Any, when: str) -> None:
    real = background.start
    held: list[threading.Thread] = []

    def start(target: Any, **options: Any) -> bool:
        monkeypatch.setattr(background, "start", real)
        held.append(threading.Thread(target=target, **options))
        if when == "after it started":
            held[0].start()
        raise KeyboardInterrupt

    saver = BackgroundSaver()
    given = [{f"v{i}": np.full(1 << 20, seed, np.uint8) for i in range(8)} for seed in (1, 2)]
    monkeypatch.setattr(background, "start", start)
    with pytest.raises(KeyboardInterrupt):
        saver.save(tmp_path / "a", given[0])
    if when == "and it starts late":
        threading.Timer(0.01, held[0].start).start()
    pending = saver.save(tmp_path / "b", given[1])
    pending.wait(20)
    assert is_right(tmp_path / "b", 2)
    if when != "before the thread starts":
        time.sleep(0.02)
        held[0].join(20)
    if (tmp_path / "a").exists():
        assert is_right(tmp_path / "a", 1)
    saver.save(tmp_path / "c", given[0], when_busy="refuse").wait(20)
    assert is_right(tmp_path / "c", 1)


def is_right(path: Path, value: int) -> bool:
    assert verify(path).ok
    return {int(number) for array in load(path).values() for number in (array.min(), array.max())} == {value}


INTERRUPTED = """
import collections, logging, os, random, shutil, signal, sys, threading, time
import numpy as np
import varstore as vs
logging.disable()
os.chdir(sys.argv[1])
threading.excepthook = lambda died: seen.update([f"thread died: {died.exc_value!r}"])
seen = collections.Counter()
first, second = ({f"v{i}": np.zeros(1 << 19, np.uint8) for i in range(12)} for _ in range(2))
def judge(name, value):
    if not os.path.isdir(name):
        return "absent"
    is_right = {int(x) for a in vs.load(name).values() for x in (a.min(), a.max())} == {value} and vs.verify(name)
    return "right" if is_right else "MIXED"
signal.signal(signal.SIGALRM, signal.default_int_handler)
vs.save_async("warm", first, durable=False).wait()
spent = 0.005
for number in range(200):
    values = random.sample(range(250), 2)
    for given, value in zip((first, second), values):
        for array in given.values():
            array[:] = value
    begin = time.perf_counter()
    try:
        signal.setitimer(signal.ITIMER_REAL, random.uniform(spent * 0.3, spent * 1.2))
        vs.save_async("a", first, durable=False)
        spent = 0.7 * spent + 0.3 * (time.perf_counter() - begin)
        signal.setitimer(signal.ITIMER_REAL, 0)
    except KeyboardInterrupt:
        seen["interrupted"] += 1
    except BaseException as error:
        seen[f"not Ctrl-C: {error!r}"] += 1
    signal.setitimer(signal.ITIMER_REAL, 0)
    vs.save_async("b", second, durable=False).wait(20)
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and thread.ident:  # Python lists some that never began
            thread.join(20)
            seen["hanging"] += thread.is_alive()
    seen["a " + judge("a", values[0])] += 1
    seen["b " + judge("b", values[1])] += 1
    for name in os.listdir("."):
        shutil.rmtree(name, ignore_errors=True)
print(sorted(name for name, count in seen.items() if count))
"""


def test_ctrl_c_at_any_moment_neither_mixes_saves_nor_hangs(tmp_path: Path) -> None:
    said = ast.literal_eval(run_python(INTERRUPTED, tmp_path, timeout=300).stdout)
    assert "interrupted" in said
    assert set(said) <= {"a absent", "a right", "b right", "interrupted"}


AT_EXIT = """
import sys, time
import numpy as np
from varstore.training.background import save_async
class Slow:
    shape, dtype = (2,), np.dtype("f4")
    def __array__(self, dtype=None, copy=None):
        time.sleep(0.5)
        return np.ones(2, "f4")
save_async(sys.argv[1], {"big": np.ones(3_000_000), "slow": Slow()}, copy=False)
"""


@pytest.mark.core
def test_the_end_of_the_process_waits(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", AT_EXIT, str(tmp_path / "a")], check=False, capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")
    assert open_checkpoint(tmp_path / "a").names == ("big", "slow")
    assert verify(tmp_path / "a").ok


NO_THREADS_AT_EXIT = """
import sys, threading
import numpy as np
import varstore as vs
def start(thread):
    raise RuntimeError("can't create new thread at interpreter shutdown")
def progress(done, total):
    if threading.current_thread().name == "varstore-save":
        threading.main_thread().join()
        threading.Thread.start = start  # as Python 3.12 does from here on
given = {f"v{i}": np.full(1 << 20, i, "f4") for i in range(8)}
vs.save(sys.argv[1] + "/run/step-1", {"w": np.ones(2)})
manager = vs.CheckpointManager(sys.argv[1] + "/run", keep=vs.Latest(1), background=True, progress=progress)
manager.save(2, {"w": np.ones(3)})
vs.save_async(sys.argv[1] + "/a", given, threads=3, progress=progress)
"""


@pytest.mark.core
def test_an_interpreter_that_ends_and_refuses_new_threads(tmp_path: Path) -> None:
    assert not run_python(NO_THREADS_AT_EXIT, tmp_path).stderr
    assert verify(tmp_path / "a").ok
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["step-2"]


NO_THREADS = """
import os, resource, sys, threading
import numpy as np
import varstore as vs
os.chdir(sys.argv[1])
manager = vs.CheckpointManager("warm", keep=vs.Latest(1), background=True)
for step in range(3):
    manager.save(step, {"w": np.ones(step)}).wait()
manager.wait()
vs.load, vs.verify  # all modules are loaded
os.chmod(".", 0o777)
if os.geteuid() == 0:
    os.setuid(65534)  # root has no limit
resource.setrlimit(resource.RLIMIT_NPROC, (1, 1))
try:
    threading.Thread(target=print).start()
except RuntimeError:
    print("no thread")
given = {f"v{i}": np.full(1 << 20, i, "f4") for i in range(8)}
vs.save("a", given, threads=4)
assert vs.load("a", threads=4)["v7"].min() == 7 and vs.verify("a")
with vs.CheckpointManager("run", keep=vs.Latest(1), background=True, threads=4) as manager:
    for step in range(1, 4):
        manager.save(step, given)
assert vs.verify("run/step-3") and os.listdir("run") == ["step-3"]
"""


@pytest.mark.core
def test_a_system_that_gives_no_more_threads() -> None:
    with tempfile.TemporaryDirectory() as folder:  # where an unprivileged user can reach it
        os.chmod(folder, 0o755)
        assert run_python(NO_THREADS, folder).stdout == "no thread\n"


def test_an_error_that_nobody_asks_for_is_seen_at_the_end(tmp_path: Path) -> None:
    save(tmp_path / "a", {"x": np.ones(2)})
    done = subprocess.run(
        [sys.executable, "-c", AT_EXIT, str(tmp_path / "a")], check=False, capture_output=True, text=True
    )
    assert f"the save to {tmp_path / 'a'} failed" in done.stderr
