"""Ctrl-C at any moment of ``save_async``: it hangs nothing, and mixes nothing with what is saved later."""

import pytest
from support.confined import confined

ROUNDS = """
import logging, os, shutil, signal, sys, threading
logging.disable(logging.CRITICAL)
os.chdir(argv[0])

def values(number, size=1000):
    return {f"v{i}": np.full(size, number, "u1") for i in range(3)}

def ended():
    # threads that the signal kept from starting are listed for ever, and have no number
    others = [t for t in threading.enumerate() if t is not threading.main_thread() and t.ident is not None]
    for thread in others:
        thread.join(5)
    return not any(thread.is_alive() for thread in others)

def holds(path, number):
    # what lies there: nothing, what was given, or something else
    if not os.path.isdir(path):
        return "nothing"
    found = {int(x) for array in vs.load(path).values() for x in array}
    return "right" if found == {number} and vs.verify(path).ok else f"{sorted(found)} instead of {number}"

def judge(number, story):
    # save again, as programs do upon Ctrl-C, and compare both with what was given
    pending = vs.save_async("b", values(number + 100), durable=False)
    pending.wait(5)
    if not ended():
        story.add("a thread goes on")
    if (a := holds("a", number)) not in ("nothing", "right"):
        story.add(f"interrupted: {a}")
    if (b := holds("b", number + 100)) != "right":
        story.add(f"later: {b}")
    for name in os.listdir("."):
        shutil.rmtree(name)

vs.save_async("warm", values(9), durable=False).wait()
story = set()
"""


@pytest.mark.parametrize("when", ["before", "after"])
def test_ctrl_c_around_the_start_of_the_thread(tmp_path, when):
    code = """
start = threading.Thread.start
def interrupted(thread):
    threading.Thread.start = start
    if argv[1] == "after":
        thread.start()
    raise KeyboardInterrupt
threading.Thread.start = interrupted
try:
    vs.save_async("a", values(1, 1 << 20), durable=False)
except KeyboardInterrupt:
    pass
assert threading.Thread.start is start
judge(1, story)
tell(sorted(story))
"""
    assert confined(ROUNDS + code, tmp_path, when, seconds=8) == []


@pytest.mark.parametrize("where", ["varstore", "threading"])
def test_ctrl_c_at_each_call_of_a_background_save(tmp_path, where):
    """The signal comes where the interpreter looks for one, as a call begins and as one into C ends: at each."""
    code = """
in_threading = argv[1] == "threading"
def interrupt_at(moment):
    passed = 0
    def profile(frame, event, argument):
        nonlocal passed
        if event in ("call", "c_return") and (frame.f_code.co_filename == threading.__file__) == in_threading:
            passed += 1
            if passed == moment:
                sys.setprofile(None)
                os.kill(os.getpid(), signal.SIGINT)
    sys.setprofile(profile)
    try:
        vs.save_async("a", given, durable=False)
    except KeyboardInterrupt:
        story.add("KeyboardInterrupt")
    finally:
        sys.setprofile(None)
    return passed

moment = 0
while True:
    moment += 1
    given = values(moment % 100)
    if interrupt_at(moment) < moment:
        break
    judge(moment % 100, story)
tell([moment, sorted(story)])
"""
    moments, story = confined(ROUNDS + code, tmp_path, where, seconds=20)
    assert where == "threading" or moments > 100
    assert story == ["KeyboardInterrupt"]
