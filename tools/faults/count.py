"""Compare the number of calls of each scenario, as the injector counts them, with strace's.

strace attaches to a child that has stopped just before the work, and prints its summary when the child ends just after
it. So `strace -f -c` counts only the work.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from tools.faults.calls import count_calls, fresh_home, shared_injector
from tools.faults.jobs import Job, Lost, Outcome, Unavailable
from tools.faults.scenarios import SCENARIOS, Scenario

__all__ = ["jobs"]

_TOLERANCE = 0.02

_PR_SET_PTRACER = 0x59616D61
_ANYBODY = ctypes.c_ulong(-1)


def jobs(*, whole: bool) -> Iterator[Job]:
    """Yield a job for each scenario."""
    del whole
    for scenario in SCENARIOS:
        yield Job(scenario=scenario.name, fault="uncounted", run=partial(_compare, scenario))


def _compare(scenario: Scenario, place: Path) -> Outcome:
    injector = shared_injector()
    own = Counter(count_calls(injector, scenario, place))
    with fresh_home(scenario, place) as home:
        other = _count_with_strace(partial(scenario.act, home), injector.names, place)
    if abs(own.total() - other.total()) <= _TOLERANCE * max(own.total(), other.total()):
        return Outcome(points=own.total())
    counts = {name: f"{own[name]} counted, {other[name]} by strace" for name in own | other if own[name] != other[name]}
    return Outcome(points=own.total(), lost=[Lost(point="all calls", losses=counts)])


def _count_with_strace(work: Callable[[], object], names: Sequence[str], place: Path) -> Counter[str]:
    """Return how often the work makes each of these calls; `place` is a directory for the output of strace.

    Raises:
        Unavailable: strace is not installed, or may not attach to a process.
    """
    strace = shutil.which("strace")
    if strace is None:
        raise Unavailable("strace is not installed")
    pid = os.fork()
    if pid == 0:
        try:
            ctypes.CDLL(None).prctl(_PR_SET_PTRACER, _ANYBODY, 0, 0, 0)  # else only a parent may attach
            os.kill(os.getpid(), signal.SIGSTOP)
            work()
        finally:
            os._exit(0)
    os.waitpid(pid, os.WUNTRACED)
    summary = place / "strace"
    chosen = "trace=" + ",".join(f"?{name}" for name in names)
    command = [strace, "-f", "-c", "-U", "name,calls", "-e", chosen, "-o", str(summary), "-p", str(pid)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as tracer:
        while tracer.poll() is None and not _is_traced(pid):
            time.sleep(0.001)
        os.kill(pid, signal.SIGCONT)
        _, said = tracer.communicate()
    os.waitpid(pid, 0)
    if tracer.returncode != 0:
        raise Unavailable(f"strace cannot attach: {said.strip()}")
    rows = re.findall(r"^(\w+) +(\d+)$", summary.read_text(), re.MULTILINE)
    return Counter({name: int(calls) for name, calls in rows if name != "total"})


def _is_traced(pid: int) -> bool:
    return "TracerPid:\t0\n" not in Path(f"/proc/{pid}/status").read_text()
