"""A save in a signal handler, or in the child of a fork, ends and is whole whatever it came upon."""

import pytest
from support.confined import confined

SIGNALS = """
import os, signal, threading, time
os.chdir(argv[0])
outer, inner, same = argv[1], argv[2], argv[3] == "same"
handled = threading.Event()
told = []

def fire():
    # a thread in the background goes on only after the handler has ended
    if not told:
        if threading.current_thread() is not threading.main_thread():
            time.sleep(0.1)  # the main thread waits by then
        os.kill(os.getpid(), signal.SIGTERM)  # the main thread gets it
        handled.wait()

class Moment:
    # a variable that is fetched while a save copies or writes, as from a device: the signal comes then
    shape, dtype = (2,), np.dtype("f4")
    def __array__(self, dtype=None, copy=None):
        fire()
        return np.ones(2, "f4")

def keep(saved):
    if outer.endswith("prunes") and saved.step == 2:
        fire()
    return True

values = {f"v{i}": np.full(1000, i, "f4") for i in range(4)}
late = values if outer.endswith("prunes") else {**values, "late": Moment()}
manager = vs.CheckpointManager("run", keep=vs.KeepIf(keep), background=outer.startswith("background"))
mine = manager if inner == "manager" and not outer.startswith("background") or inner == "background" and \
    outer.startswith("background") else vs.CheckpointManager("run", background=inner == "background")

def steps():
    manager.save(1, values)
    manager.save(2, late)
    manager.wait()

OUTER = {
    "save copies": lambda: vs.save("run/step-2", late),
    "save_async copies": lambda: vs.save_async("run/step-2", late).wait(),
    "save_async writes": lambda: vs.save_async("run/step-2", late, copy=False).wait(),
}
step = 2 if same else 999
emergency = {"w": np.arange(3.0)}
INNER = {
    "save": lambda: vs.save(f"run/step-{step}", emergency),
    "save_async": lambda: vs.save_async(f"run/step-{step}", emergency).wait(),
    "manager": lambda: mine.save(step, emergency),
    "background": lambda: (mine.save(step, emergency), mine.wait()),
}

def attempt(action):
    try:
        action()
        told.append("saved")
    except vs.errors.CheckpointExists:
        told.append("exists")

def handler(number, frame):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    told.append("entered")
    attempt(INNER[inner])
    handled.set()

signal.signal(signal.SIGTERM, handler)
attempt(OUTER.get(outer, steps))
whole = {name: vs.verify(f"run/{name}").ok for name in sorted(os.listdir("run"))}
tell([told, whole, "w" in vs.open(f"run/step-{step}"), threading.active_count()])
"""
OUTER = [
    *("save copies", "save_async copies", "save_async writes"),
    *("manager copies", "manager prunes", "background copies", "background prunes"),
]
INNER = ["save", "save_async", "manager", "background"]
RAISES_AT_ONCE = [
    *(("save copies", "save"), ("save_async copies", "save"), ("manager copies", "manager")),
    *(("manager prunes", "manager"), ("background prunes", "background")),
]
WAITED = [("save_async copies", "save_async"), ("save_async writes", "save_async"), ("background copies", "background")]
"""Where the save in the handler would wait for the one that it interrupted."""


@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("outer", OUTER)
def test_an_emergency_save_in_a_signal_handler(tmp_path, outer, inner):
    told, whole, is_emergency, threads = confined(SIGNALS, tmp_path, outer, inner, "other", seconds=2)
    assert told == ["entered", "saved", "saved"]
    steps = ["step-1", "step-2", "step-999"] if "manager" in outer or "background" in outer else ["step-2", "step-999"]
    assert whole == dict.fromkeys(steps, True)
    assert is_emergency
    assert threads == 1


@pytest.mark.parametrize(("outer", "inner"), [*RAISES_AT_ONCE, *WAITED])
def test_an_emergency_save_to_the_place_of_the_one_that_is_interrupted(tmp_path, outer, inner):
    told, whole, is_emergency, threads = confined(SIGNALS, tmp_path, outer, inner, "same", seconds=2)
    entered, emergency, interrupted = told
    assert entered == "entered"
    assert "saved" in (emergency, interrupted)
    assert is_emergency == (emergency == "saved")
    assert set(whole) <= {"step-1", "step-2"}
    assert all(whole.values())
    assert threads == 1


TWO_WRITES = """
import os, shutil
from interrupts import signalled_at
os.chdir(argv[0])
ours, theirs = ({"big": np.full(5 << 20, value, "u1")} for value in (1, 2))
moment = 1
while signalled_at(
    moment,
    lambda: vs.save("ours", ours, threads=1),
    lambda: vs.save("theirs", theirs, threads=1),
    *("disk/blocks.py", "save/large_file.py"),
):
    for name, value in (("ours", 1), ("theirs", 2)):
        assert vs.verify(name).ok, (moment, name)
        assert (vs.load(name)["big"] == value).all(), (moment, name)
        shutil.rmtree(name)
    moment += 5
tell(moment)
"""


def test_a_save_in_a_signal_handler_writes_from_buffers_of_its_own(tmp_path):
    assert confined(TWO_WRITES, tmp_path, seconds=60) > 50


FORKS = """
import os, signal, threading
os.chdir(argv[0])
parent = os.getpid()
begun, forked = threading.Event(), threading.Event()

def slow(done, total):
    # the parent's save is being written until the child has ended
    if os.getpid() == parent:
        begun.set()
        forked.wait()

def in_child(action):
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(2)
        try:
            said = action()
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
        os.write(write, str(said).encode())
        os._exit(0)
    os.close(write)
    said = os.read(read, 10_000).decode()
    status = os.waitpid(child, 0)[1]
    return said if status == 0 else signal.Signals(os.WTERMSIG(status)).name
"""
CHILD_SAVES = (
    FORKS
    + """
small = {"w": np.arange(3.0)}
manager = vs.CheckpointManager("run", background=True, progress=slow)
if argv[1].startswith("manager"):
    pending = manager.save(1, small)
else:
    pending = vs.save_async("parent", small, progress=slow)
begun.wait()
CHILD = {
    "save": lambda: vs.load(vs.save("child", small))["w"].tolist(),
    "save_async": lambda: vs.load(vs.save_async("child", small).result())["w"].tolist(),
    "save_async refuse": lambda: vs.load(vs.save_async("child", small, when_busy="refuse").result())["w"].tolist(),
    "manager": lambda: vs.load(manager.save(2, small).result())["w"].tolist(),
    "manager wait": lambda: (manager.save(2, small), manager.wait(), vs.load(manager.latest())["w"].tolist())[-1],
    "pending wait": lambda: pending.wait(),
    "pending result": lambda: pending.result(),
    "pending done": lambda: pending.done(),
}
said = in_child(CHILD[argv[1]])
forked.set()
pending.wait()
assert vs.verify(pending.path).ok
tell(said)
"""
)


@pytest.mark.parametrize("use", ["save", "save_async", "save_async refuse", "manager", "manager wait"])
def test_the_child_of_a_fork_saves_while_its_parent_does(tmp_path, use):
    assert confined(CHILD_SAVES, tmp_path, use, seconds=5) == "[0.0, 1.0, 2.0]"


@pytest.mark.parametrize("use", ["wait", "result"])
def test_a_pending_save_belongs_to_the_process_that_began_it(tmp_path, use):
    said = confined(CHILD_SAVES, tmp_path, f"pending {use}", seconds=5)
    assert said.startswith("UsageError: ")
    assert "process" in said


LOCKS = (
    FORKS
    + """
import time
read, write = os.pipe()
saver = os.fork()
if saver == 0:
    parent = os.getpid()
    pending = vs.save_async("c", {"w": np.ones(3)}, progress=slow)
    begun.wait()
    child = os.fork()
    if child == 0:
        if argv[1] == "outlives":
            os.write(write, b"!")
            time.sleep(20)
        os._exit(0)
    os.waitpid(child, 0)
    os.write(write, b"!")
    time.sleep(20)
os.read(read, 1)
if argv[1] == "outlives":
    os.kill(saver, signal.SIGKILL)
    os.waitpid(saver, 0)
left = [name for name in os.listdir(".") if ".saving-" in name]
tell([len(left), len(vs.clean("."))])
"""
)


def test_a_child_does_not_hold_the_lock_of_its_parent(tmp_path):
    assert confined(LOCKS, tmp_path, "outlives", seconds=5) == [1, 1]


def test_a_child_that_ends_does_not_unlock_what_its_parent_holds(tmp_path):
    assert confined(LOCKS, tmp_path, "ends", seconds=5) == [1, 0]
