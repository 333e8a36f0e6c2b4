"""Code in a process of its own, within limits: a hang, hunger, a crash and a foreign error are each a kind of failure.

`confined` gives what the code told, or raises: the error of varstore's tree that the code raised, rebuilt here, or a
`Broken` that says which promise did not hold. So a test that is expected to fail can name the promise.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from varstore import errors

__all__ = ["Broken", "Crashed", "Foreign", "Hung", "TooMuchMemory", "TooSlow", "confined"]

_MARK = "\x1e"
_STARTUP = 60
"""Seconds that a busy machine may take to start an interpreter."""


class Broken(AssertionError):
    """A promise that holds for every call does not."""


class Hung(Broken):
    """It never ended; the message shows where each thread stood."""


class TooSlow(Broken):
    """It used more time of the processor than its input is worth."""


class TooMuchMemory(Broken):
    """It asked for more memory than its input is worth."""


class Crashed(Broken):
    """The process died of a signal or of an exit of its own."""


class Foreign(Broken):
    """An exception that is not of varstore's tree left a call."""


def confined(
    code: str,
    *arguments: str | os.PathLike[str] | int,
    seconds: float = 3,
    cpu: int | None = None,
    memory: int | None = None,
    env: dict[str, str] | None = None,
) -> Any:
    """Run code that finds `np`, `vs`, `argv` and `tell`, and return what it gave to `tell`, or None.

    Args:
        arguments: its ``argv``, as text.
        seconds: how long it may take after its imports, on the clock; children that it leaves are killed too.
        cpu: seconds of processor time that it may use after its imports, whatever else the machine does.
        memory: bytes of memory that it may fill at any time, beyond what the imports took.
        env: joins the environment.
    """
    limits = json.dumps({"seconds": seconds, "cpu": cpu, "memory": memory})
    command = [sys.executable, str(Path(__file__)), limits, code, *map(str, arguments)]
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as complaints:
        process = subprocess.Popen(
            command, stdout=output, stderr=complaints, start_new_session=True, env=os.environ | (env or {})
        )
        try:
            status = process.wait(seconds + _STARTUP)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            with contextlib.suppress(ProcessLookupError):  # the children that it left, too
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        output.seek(0)
        complaints.seek(0)
        return _outcome(status, output.read().decode(), complaints.read().decode(), memory)


def _outcome(status: int | None, output: str, complaints: str, memory: int | None) -> Any:
    if status is None or "\nTimeout (" in f"\n{complaints}":
        raise Hung(complaints)
    if -status == signal.SIGXCPU:
        raise TooSlow(complaints)
    said: dict[str, Any] = {}
    for line in output.split("\n"):
        said |= json.loads(line[1:]) if line.startswith(_MARK) else {}
    if said.get("foreign") == "MemoryError":
        raise TooMuchMemory(said["message"])
    if memory is not None and said.get("filled", 0) > memory:
        raise TooMuchMemory(f"{said['filled']:,} bytes")
    if "error" in said:
        raise getattr(errors, said["error"])(said["message"])
    if "foreign" in said:
        raise Foreign(said["message"])
    if status or "ended" not in said:
        raise Crashed(f"status {status}\n{output}{complaints}")
    return said.get("told")


def _main() -> None:
    import faulthandler
    import resource
    import traceback

    import numpy as np

    import varstore as vs

    limits = json.loads(sys.argv[1])
    for name in vs.__all__:
        getattr(vs, name)

    def tell(value: Any) -> None:
        """Give a value to the test."""
        _say(told=value)

    names = {"__name__": "__main__", "np": np, "vs": vs, "tell": tell, "argv": sys.argv[3:]}
    code = compile(sys.argv[2], "<confined>", "exec")
    faulthandler.dump_traceback_later(limits["seconds"], exit=True)  # threads that never end count too
    if limits["cpu"] is not None:
        used = resource.getrusage(resource.RUSAGE_SELF)
        soft = int(used.ru_utime + used.ru_stime) + 1 + limits["cpu"]
        resource.setrlimit(resource.RLIMIT_CPU, (soft, soft + 1))
    before = _memory("VmRSS")
    if limits["memory"] is not None:  # address space is more than what is filled: threads reserve much of it
        space = _memory("VmSize") + 2 * limits["memory"] + (1 << 30)
        resource.setrlimit(resource.RLIMIT_AS, (space, space))
    try:
        exec(code, names)
    except errors.VarstoreError as error:
        _say(error=type(error).__name__, message=str(error))
    except SystemExit:
        raise
    except BaseException as error:
        _say(foreign=type(error).__name__, message=traceback.format_exc(limit=-6))
    else:
        _say(ended=True)
    _say(filled=_memory("VmHWM") - before)


def _memory(field: str) -> int:
    """Return bytes that the kernel counts for this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{field}:"))


def _say(**what: Any) -> None:
    """Write one line that `confined` reads, at once, so that a later death loses nothing."""
    os.write(1, f"\n{_MARK}{json.dumps(what)}\n".encode())


if __name__ == "__main__":
    _main()
