"""Nothing is ever seen half-done: two writers, kills at any moment, Ctrl-C, and what clean may take."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from support import run_python

import varstore as vs
from varstore.errors import CheckpointExists

# A process that has imported everything and makes children at once: one for each line that it reads.
NURSERY = """
import contextlib, json, os, signal, sys, threading, time
import numpy as np
import varstore as vs
def say(**facts):
    os.write(1, json.dumps(facts).encode() + b"\\n")
big = {f"v{i}": np.full(1 << 20, i, np.float32) for i in range(12)}
small = {f"layer/s{i}": np.full(100, i) for i in range(12)}
for line in sys.stdin:
    pid = os.fork()
    if pid == 0:
        try:
            exec(json.loads(line))
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
"""


class Nursery:
    def __init__(self):
        self.process = subprocess.Popen(
            [sys.executable, "-c", NURSERY],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def start(self, code):
        self.process.stdin.write(json.dumps(code) + "\n")
        self.process.stdin.flush()

    def heard(self):
        watchdog = threading.Timer(60, os.killpg, [self.process.pid, signal.SIGKILL])
        watchdog.start()
        line = self.process.stdout.readline()
        watchdog.cancel()
        assert line, "the child said nothing"
        return json.loads(line)


@pytest.fixture(scope="module")
def nurseries():
    with contextlib.ExitStack() as stack:
        made = [Nursery(), Nursery()]
        for nursery in made:
            stack.callback(nursery.process.wait)
            stack.callback(nursery.process.stdin.close)
            stack.callback(nursery.process.stdout.close)
        yield made


def hidden(directory):
    return [name for name in os.listdir(directory) if name.startswith(".")]


def gone(pid):
    """Wait until a killed process is no more, not even as a zombie: its locks are free then."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.001)
    raise AssertionError("the process did not end")


TWO_WRITERS = """
import random
os.chdir({cwd!r})
say(ready=True)
values = small | {{"who": np.int64({who})}} | ({{"b": big["v1"]}} if {rounds} % 3 == 0 else {{}})
while time.time() < {at}:
    pass
try:
    vs.save({target!r}, values, durable=False, overwrite={overwrite})
    say(outcome="saved")
except Exception as error:
    say(outcome=type(error).__name__, message=str(error))
"""


@pytest.mark.parametrize("target", ["missing", "empty", "working directory", "replaced"])
def test_of_two_writers_exactly_one_wins(tmp_path, nurseries, target):
    rng = random.Random(target)
    for rounds in range(12):
        home = tmp_path / str(rounds)
        path = home / "c"
        home.mkdir()
        if target == "replaced":
            vs.save(path, {"old": np.ones(3)}, durable=False)
        elif target != "missing":
            path.mkdir()
        in_place = target == "working directory"
        at = time.time() + 0.02
        for who, nursery in enumerate(nurseries):
            nursery.start(
                TWO_WRITERS.format(
                    cwd=str(path if in_place else home),
                    who=who,
                    rounds=rounds,
                    at=at + who * rng.choice([0, 0, 0.001, 0.002]),
                    target="." if in_place else "c",
                    overwrite=target == "replaced",
                )
            )
        said = [[nursery.heard(), nursery.heard()][1] for nursery in nurseries]
        outcomes = sorted(fact["outcome"] for fact in said)
        if target == "replaced":
            assert outcomes == ["saved", "saved"], said
        else:
            assert outcomes == ["CheckpointExists", "saved"], said
            winner = [fact["outcome"] for fact in said].index("saved")
            assert vs.load(path)["who"] == winner
        assert vs.verify(path).ok
        assert os.listdir(home) == ["c"]
        assert "old" not in vs.open(path)


KILLED = """
os.chdir({home!r})
say(pid=os.getpid())
for i in range({first}, {first} + 100):
    vs.save("replaced", small | {{"i": np.int64(i), "v": big["v3"]}}, overwrite=True, durable=i % 4 == 0)
    vs.save(f"new-{{i}}", small | {{"i": np.int64(i), "v": big["v5"]}}, durable=i % 4 == 1, manifest=i % 2 == 0)
"""


def test_a_killed_writer_leaves_the_old_or_the_new(tmp_path, nurseries):
    """At moments of chance, in a saver that never rests; `tools.faults` kills at every single call."""
    rng = random.Random(2)
    vs.save(tmp_path / "replaced", {"i": np.int64(-1)})
    for rounds in range(20):
        nurseries[0].start(KILLED.format(home=str(tmp_path), first=rounds * 100))
        pid = nurseries[0].heard()["pid"]
        time.sleep(rng.uniform(0, 0.06))
        os.kill(pid, signal.SIGKILL)
        gone(pid)
        visible = sorted(set(os.listdir(tmp_path)) - set(hidden(tmp_path)))
        assert "replaced" in visible
        for name in visible:
            report = vs.verify(tmp_path / name)
            assert report.ok, str(report)
        stale = hidden(tmp_path)
        if rounds % 2:
            removed = vs.clean(tmp_path)
            assert sorted(map(os.path.basename, removed)) == sorted(stale)
            assert hidden(tmp_path) == []
        else:  # the next save in that place
            for name in {entry[1:].rpartition(".saving-")[0] for entry in stale}:
                vs.save(tmp_path / name, {"i": np.int64(0)}, overwrite=True, durable=False)
            assert hidden(tmp_path) == []
        for name in visible:
            if name != "replaced":
                vs.save(tmp_path / name, {}, overwrite=True, durable=False)


HELD = """
os.chdir({home!r})
def hold(done, total):
    if done:
        say(held=True)
        hold.__code__ = (lambda done, total: None).__code__
        os.read(os.open("go", os.O_RDONLY), 1)
try:
    vs.save("c", big, progress=hold, threads=1)
    say(outcome="saved")
except vs.VarstoreError as error:
    say(outcome=type(error).__name__)
"""


def test_a_living_writers_staging_is_never_removed(tmp_path, nurseries):
    os.mkfifo(tmp_path / "go")
    nurseries[0].start(HELD.format(home=str(tmp_path)))
    nurseries[0].heard()
    (staging,) = hidden(tmp_path)
    assert vs.clean(tmp_path) == []
    vs.save(tmp_path / "other", {"a": np.ones(3)})
    vs.save(tmp_path / "c", {"a": np.ones(3)})  # a faster one; it may not take the slow one's folder either
    assert hidden(tmp_path) == [staging]
    (tmp_path / "go").write_bytes(b"!")
    assert nurseries[0].heard() == {"outcome": "CheckpointExists"}
    assert hidden(tmp_path) == []
    assert list(vs.load(tmp_path / "c")) == ["a"]


INTERRUPTED = """
os.chdir({home!r})
signal.signal(signal.SIGINT, signal.default_int_handler)
outcome = "saved"
try:
    say(pid=os.getpid())
    vs.save("c", big | small, threads={threads}, durable={durable}, overwrite={overwrite})
    time.sleep(10)
except KeyboardInterrupt:
    outcome = "interrupted"
except BaseException as error:
    outcome = repr(error)
threads = [thread.name for thread in threading.enumerate()]
deadline = time.monotonic() + 5
while len(os.listdir("/proc/self/task")) > 1 and time.monotonic() < deadline:
    time.sleep(0.001)  # a thread that has ended takes the system a moment
threads += os.listdir("/proc/self/task")[1:]
say(outcome=outcome, threads=threads, fds=len(os.listdir("/proc/self/fd")))
"""


@pytest.mark.parametrize("overwrite", [False, True])
def test_ctrl_c_leaves_nothing_and_no_thread(tmp_path, nurseries, overwrite):
    rng = random.Random(4)
    visible = 0
    for rounds in range(12):
        home = tmp_path / str(rounds)
        home.mkdir()
        if overwrite:
            vs.save(home / "c", {"old": np.ones(3)}, durable=False)
        nurseries[0].start(
            INTERRUPTED.format(
                home=str(home), threads=rng.choice([1, 4]), durable=rng.random() < 0.5, overwrite=overwrite
            )
        )
        pid = nurseries[0].heard()["pid"]
        time.sleep(rng.uniform(0, 0.07))
        os.kill(pid, signal.SIGINT)
        said = nurseries[0].heard()
        assert said["outcome"] == "interrupted", said
        assert said["threads"] == ["MainThread"], said
        vs.clean(home)
        assert set(os.listdir(home)) <= {"c"}
        if (home / "c").exists():
            assert vs.verify(home / "c").ok
            visible += 1
        assert not overwrite or (home / "c").exists()
    assert overwrite or visible < 12  # the signals did fall into saves


AT_THE_END = """
os.chdir({home!r})
signal.signal(signal.SIGINT, signal.default_int_handler)
def press():
    while not os.path.exists("c/snapshot_done"):
        pass
    os.kill(os.getpid(), signal.SIGINT)
threading.Thread(target=press, daemon=True).start()
try:
    vs.save("c", small)
    time.sleep(10)
except KeyboardInterrupt:
    say(outcome="interrupted")
except BaseException as error:
    say(outcome=repr(error))
"""


def test_ctrl_c_after_the_rename_takes_nothing_back(tmp_path, nurseries):
    for rounds in range(5):
        (tmp_path / str(rounds)).mkdir()
        nurseries[0].start(AT_THE_END.format(home=str(tmp_path / str(rounds))))
        assert nurseries[0].heard() == {"outcome": "interrupted"}
        assert os.listdir(tmp_path / str(rounds)) == ["c"]
        assert vs.verify(tmp_path / str(rounds) / "c").ok


IMPATIENT = """
os.chdir({home!r})
signal.signal(signal.SIGINT, signal.default_int_handler)
main, state = threading.current_thread(), dict(working=False, pressed=0)
def progress(done, total):
    if threading.current_thread() is not main and not state["pressed"]:
        state.update(working=True, pressed=3)
        for _ in range(3):
            time.sleep(0.05)
            os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.05)
        state["working"] = False
try:
    vs.save("c", big, threads=2, durable=False, progress=progress)
    say(outcome="saved")
except KeyboardInterrupt:
    say(outcome="interrupted", state=state, left=os.listdir())
except BaseException as error:
    say(outcome=repr(error))
"""


def test_ctrl_c_again_and_again_waits_for_the_workers(tmp_path, nurseries):
    """They write to files that would be closed, and whose numbers would be given to others."""
    nurseries[0].start(IMPATIENT.format(home=str(tmp_path)))
    assert nurseries[0].heard() == {"outcome": "interrupted", "state": {"working": False, "pressed": 3}, "left": []}


SLOW_SECOND = """
os.chdir({home!r})
values = {{"big": np.ones((4000, 3000), order="F")}}
say(ready=True)
try:
    vs.save(".", values, base="../base", durable=False)  # looks at the target, then at all these values
    say(outcome="saved")
except vs.VarstoreError as error:
    say(outcome=type(error).__name__)
"""


def test_a_writer_in_place_looks_again_when_it_has_the_lock(tmp_path, nurseries):
    vs.save(tmp_path / "base", {"big": np.ones((4000, 3000))}, durable=False)
    outcomes = set()
    for wait in np.geomspace(0.01, 0.4, 16):
        home = tmp_path / str(wait)
        home.mkdir()
        nurseries[0].start(SLOW_SECOND.format(home=str(home)))
        nurseries[0].heard()
        time.sleep(wait)
        nurseries[1].start(
            f"os.chdir({str(home)!r})\n"
            "try: vs.save('.', small, durable=False); say(outcome='saved')\n"
            "except vs.VarstoreError as error: say(outcome=type(error).__name__)"
        )
        said = [nursery.heard()["outcome"] for nursery in nurseries]
        assert sorted(said) == ["CheckpointExists", "saved"]
        assert vs.verify(home).ok
        assert list(vs.load(home)) == (["big"] if said[0] == "saved" else [f"layer/s{i}" for i in range(12)])
        outcomes.add(said[0])
        if "CheckpointExists" in outcomes:
            return
    raise AssertionError("the second never came between the first one's look and its lock")


def test_an_error_in_one_worker_stops_all_and_surfaces_as_itself(tmp_path):
    class Own(Exception):
        pass

    calls = []

    def progress(done, total):
        calls.append(done)
        if done:
            raise Own("as it is")

    values = {f"v{i}": np.zeros(1 << 19) for i in range(16)}
    before = set(threading.enumerate())
    with pytest.raises(Own, match="as it is"):
        vs.save(tmp_path / "c", values, progress=progress, threads=3)
    assert set(threading.enumerate()) == before
    assert len(calls) < 10
    assert os.listdir(tmp_path) == []
    vs.save(tmp_path / "c", values, durable=False)
    calls.clear()
    with pytest.raises(Own):
        vs.load(tmp_path / "c", progress=progress, threads=3)
    assert set(threading.enumerate()) == before
    assert vs.verify(tmp_path / "c").ok


def test_descriptors_are_given_back(tmp_path):
    values = {f"v{i}": np.zeros(1 << 18) for i in range(8)} | {"s": np.ones(3)}

    def fail(done, total):
        if done:
            raise ZeroDivisionError

    vs.save(tmp_path / "warm", values)
    before = len(os.listdir("/proc/self/fd"))
    vs.save(tmp_path / "c", values)
    vs.load(tmp_path / "c")
    vs.load(tmp_path / "c", mmap=True)
    vs.verify(tmp_path / "c")
    for _ in range(3):
        with pytest.raises(ZeroDivisionError):
            vs.save(tmp_path / "d", values, progress=fail, threads=3)
        with pytest.raises(CheckpointExists):
            vs.save(tmp_path / "c", values)
    assert len(os.listdir("/proc/self/fd")) == before


CTRL_C_AT_EACH_CALL = """
import faulthandler, os, shutil, signal, sys, threading
import numpy as np
import varstore as vs

os.chdir(sys.argv[1])
watched = sys.argv[2:] + [threading.__file__]
class Late:
    shape, dtype = (3 << 20,), np.dtype("u1")
    def __array__(self, dtype=None, copy=None):
        return np.zeros(3 << 20, "u1")
given = {f"v{i}": Late() if i % 2 else np.zeros(3 << 20, "u1") for i in range(6)}
def interrupted(moment):
    passed = 0
    def profile(frame, event, argument):
        nonlocal passed
        if event in ("call", "c_return") and frame.f_code.co_filename.endswith(tuple(watched)):
            passed += 1
            if passed == moment:
                sys.setprofile(None)
                os.kill(os.getpid(), signal.SIGINT)
    sys.setprofile(profile)
    try:
        vs.save("a", given, threads=3, durable=False)
    except KeyboardInterrupt:
        assert os.listdir(".") in ([], ["a"]), os.listdir(".")
    finally:
        sys.setprofile(None)
    vs.save("a", given, threads=3, durable=False, overwrite=os.path.isdir("a"))
    assert vs.verify("a")
    shutil.rmtree("a")
    return passed >= moment
moment = 1
while interrupted(moment):
    moment += 1
    faulthandler.dump_traceback_later(20, exit=True)
print(moment)
"""


@pytest.mark.parametrize("watched", [["large_file.py"], ["disk/threads.py"]], ids=["large files", "threads"])
def test_ctrl_c_at_each_call_of_a_save_hangs_nothing(tmp_path, watched):
    assert int(run_python(CTRL_C_AT_EACH_CALL, tmp_path, *watched, timeout=200).stdout) > 20
