"""Ctrl-C at each moment of a call: it is raised, nothing hangs, and no file or descriptor is left over."""

import pytest
from support.confined import confined

EACH_MOMENT = """
import logging, os, shutil, sys, threading
from interrupts import Swallowed, each_moment
os.chdir(argv[0])
logging.disable()
values = {"big": np.zeros(5 << 18, "u1"), "small": np.arange(3.0)}
vs.save("b", values, durable=False)

def run(background):
    manager = vs.CheckpointManager("run", keep=vs.Latest(1), background=background, durable=False)
    manager.save(5, values)
    manager.wait()

ACTS = {
    "save": lambda: vs.save("a", values, threads=3, durable=False),
    "save durably": lambda: vs.save("a", values, threads=3),
    "load": lambda: vs.load("b", threads=3),
    "verify": lambda: vs.verify("b", threads=3),
    "seal": lambda: vs.seal("b"),
    "save_async": lambda: vs.save_async("a", values, durable=False).wait(),
    "manager": lambda: run(False),
    "background": lambda: run(True),
}

def reset():
    while len(others := threading.enumerate()) > 1:  # one may start another
        for thread in others:
            if thread is not threading.main_thread():
                thread.join(10)
                assert not thread.is_alive()
    shutil.rmtree("a", ignore_errors=True)
    if argv[1] in ("manager", "background"):
        shutil.rmtree("run", ignore_errors=True)
        vs.save("run/step-4", values, durable=False)

reset()
ACTS[argv[1]]()
reset()
moments, descriptors = 0, len(os.listdir("/proc/self/fd"))
for moment in each_moment(ACTS[argv[1]], step=int(argv[2])):
    moments += 1
    if argv[1].startswith("save "):
        assert threading.active_count() == 1
    reset()
    assert len(os.listdir("/proc/self/fd")) == descriptors, moment
    assert {"manifest", "snapshot_done"} | values.keys() == set(os.listdir("b")), moment
    assert set(os.listdir(".")) <= {"b", "run"}, (moment, os.listdir("."))
assert vs.verify("b").ok
tell(moments)
"""


@pytest.mark.parametrize(
    ("act", "step"),
    [
        *(("save", 1), ("save durably", 7), ("load", 2), ("verify", 3), ("seal", 11)),
        *(("save_async", 3), ("manager", 17), ("background", 11)),
    ],
)
def test_ctrl_c_at_each_moment(tmp_path, act, step):
    assert confined(EACH_MOMENT, tmp_path, act, step, seconds=100) > 20
