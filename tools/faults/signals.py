"""Signals at moments of chance: Ctrl-C in a background save, and a save in a handler that interrupts another one.

Ctrl-C in `save_async` must hang nothing, and mix nothing with what is saved next. A handler that saves must end within
ten seconds, whatever it interrupts, and what it saved must verify; what it interrupted is whole then, or not there.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, Final

import numpy as np

import varstore as vs
from tools.faults.jobs import FOREIGN, Job, Lost, Outcome

__all__ = ["SAVES", "jobs", "main"]

_PRESSES, _MOMENTS = (1_000, 20), (50, 3)
"""Rounds of a whole campaign, and of a part."""
_SECONDS = 10
_Values = dict[str, np.ndarray]


def _values(filling: int) -> _Values:
    return {f"v{i}": np.full(1 << 19, filling, np.uint8) for i in range(8)} | {"big": np.full(5 << 20, filling, "u1")}


def _manage(path: str, values: _Values, *, background: bool) -> None:
    directory, _, step = path.rpartition("/step-")
    manager = vs.CheckpointManager(directory, keep=vs.Latest(2), background=background, durable=False)
    manager.save(int(step), values)
    manager.wait()


SAVES: Final[Mapping[str, Callable[[str, _Values], object]]] = {
    "save": partial(vs.save),
    "save_async": lambda path, values: vs.save_async(path, values, durable=False).wait(),
    "manager": partial(_manage, background=False),
    "background manager": partial(_manage, background=True),
}
"""What is interrupted, and what a handler does: each saves values to a path that ends with a step."""


def _found(path: str, filling: int) -> str:
    """Return what is at a path: nothing, what was given, or something else."""
    if not os.path.isdir(path):
        return "nothing"
    values = {int(end) for array in vs.load(path).values() for end in (array.min(), array.max())}
    return "right" if values == {filling} and vs.verify(path).ok else f"{sorted(values)} instead of {filling}"


def _press(number: int, chance: random.Random, spent: float) -> Iterator[tuple[str, str]]:
    """Press Ctrl-C in `save_async`, and save again, as programs do then."""
    values, later = _values(number % 100), _values(number % 100 + 100)
    with suppress(KeyboardInterrupt):
        signal.setitimer(signal.ITIMER_REAL, chance.uniform(0, 1.2) * spent)
        vs.save_async("run/step-1", values, durable=False)
        signal.setitimer(signal.ITIMER_REAL, 0)
    signal.setitimer(signal.ITIMER_REAL, 0)
    for array in values.values():
        array[:] = 255
    vs.save_async("run/step-2", later, durable=False).wait()
    _join()
    if (found := _found("run/step-1", number % 100)) not in ("nothing", "right"):
        yield "MIXED", f"the interrupted one: {found}"
    if (found := _found("run/step-2", number % 100 + 100)) != "right":
        yield "MIXED", f"the later one: {found}"


def _handle(outer: str, inner: str, chance: random.Random, spent: float) -> Iterator[tuple[str, str]]:
    """Save in the handler of a signal that comes while another save is at work."""
    handled = []

    def handler(*_: Any) -> None:
        SAVES[inner]("run/step-999", _values(2))
        handled.append(_found("run/step-999", 2))

    signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, chance.uniform(0.02, 1) * spent)
    SAVES[outer]("run/step-5", _values(1))
    while not handled:
        time.sleep(0.001)
    _join()
    for name, found in (("emergency", handled[0]), ("emergency afterwards", _found("run/step-999", 2))):
        if found != "right":
            yield "UNSOUND", f"{name}: {found}"
    if (found := _found("run/step-5", 1)) != "right":
        yield "UNSOUND", f"the interrupted one: {found}"
    if left := [name for name in os.listdir("run") if name.startswith(".")]:
        yield "STRAY", ", ".join(left)


def _join() -> None:
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and thread.ident:
            thread.join()


def main(outer: str, inner: str, rounds: int) -> None:
    """Try the rounds in the working directory, and print the losses of each as a line of JSON."""
    chance = random.Random(f"{outer} {inner}")
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    time_of_one = time.perf_counter()
    SAVES[outer]("run/step-1", _values(1))
    time_of_one = time.perf_counter() - time_of_one
    for number in range(rounds):
        shutil.rmtree("run")
        vs.save("run/step-3", {"w": np.ones(3)}, durable=False)
        act = _handle(outer, inner, chance, time_of_one) if inner else _press(number, chance, time_of_one)
        try:
            losses = dict(act)
        except vs.VarstoreError as error:
            losses = {"WRONG_ERROR": str(error)}
        except Exception as error:
            losses = {FOREIGN: repr(error)}
        print(json.dumps(losses), flush=True)


def jobs(*, whole: bool) -> Iterator[Job]:
    """Yield the presses of Ctrl-C, and a job for each pair of what is interrupted and what the handler does."""
    yield Job(scenario="save_async", fault="Ctrl-C", run=partial(_run, "save_async", "", _PRESSES[not whole]))
    for outer, inner in product(SAVES, SAVES):
        yield Job(scenario=outer, fault=f"handler: {inner}", run=partial(_run, outer, inner, _MOMENTS[not whole]))


def _run(outer: str, inner: str, rounds: int, place: Path) -> Outcome:
    """Run the rounds in a process of their own; one that says nothing for too long hangs."""
    code = f"import sys; from tools.faults.signals import main; main({outer!r}, {inner!r}, {rounds})"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([os.getcwd(), *sys.path])}
    lost = []
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=place, env=environment
    ) as child:
        assert child.stdout is not None
        for number in range(rounds):
            watchdog = threading.Timer(_SECONDS if number else 60, child.kill)  # the first one includes imports
            watchdog.start()
            line = child.stdout.readline()
            watchdog.cancel()
            losses = json.loads(line) if line else {"HUNG": f"more than {_SECONDS} seconds"}
            if losses:
                lost.append(Lost(point=f"round {number}", losses=losses))
            if not line:
                break
    return Outcome(points=rounds, lost=lost)
