"""Run a function under strace, without what comes before and after it.

strace attaches to a child that has stopped just before the work, and which ends just after it.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from tools.faults.jobs import Unavailable

__all__ = ["trace"]

_PR_SET_PTRACER = 0x59616D61
_ANYBODY = ctypes.c_ulong(-1)


def trace(
    work: Callable[[], object], options: Sequence[str], place: Path, *, start: Callable[[], object] = lambda: None
) -> str:
    """Return what strace writes with these options; `place` is a directory for its output.

    `start` is called in the child before it is traced.

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
            start()
            os.kill(os.getpid(), signal.SIGSTOP)
            work()
        finally:
            os._exit(0)
    os.waitpid(pid, os.WUNTRACED)
    output = place / "strace"
    command = [strace, "-f", *options, "-o", str(output), "-p", str(pid)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as tracer:
        while tracer.poll() is None and not _is_traced(pid):
            time.sleep(0.001)
        os.kill(pid, signal.SIGCONT)
        _, said = tracer.communicate()
    os.waitpid(pid, 0)
    if tracer.returncode != 0:
        raise Unavailable(f"strace cannot attach: {said.strip()}")
    return output.read_text()


def _is_traced(pid: int) -> bool:
    return "TracerPid:\t0\n" not in Path(f"/proc/{pid}/status").read_text()
