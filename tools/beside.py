"""Run commands side by side, at most as many as there are processors: ``python tools/beside.py NAME=COMMAND ...``.

Each command is one of bash. Its lines are printed as they come, after its name. If a command fails, the others go on,
and what is returned at the end is 1.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor


def main(arguments: Sequence[str]) -> int:
    """Run the commands; return 1 if one of them failed, 0 otherwise."""
    commands = dict(argument.split("=", 1) for argument in arguments)
    if len(commands) < len(arguments):
        raise SystemExit("two commands have one name")
    width = max(map(len, commands), default=0)
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:
        codes = list(threads.map(lambda name: _run(name.ljust(width), commands[name]), commands))
    return int(any(codes))


def _run(name: str, command: str) -> int:
    start = time.monotonic()
    process = subprocess.Popen(["bash", "-c", command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        print(f"{name} | {line}", end="", flush=True)
    code = process.wait()
    print(f"{name} | {'failed' if code else 'done'} after {time.monotonic() - start:.0f} s", flush=True)
    return code


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
