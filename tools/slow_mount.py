"""A file system each of whose calls waits for a server: sshfs, whose server answers late: python -m tools.slow_mount

A directory is shown at another place by sshfs, which talks to an ``sftp-server`` of this machine over a pair of pipes.
Each answer is held back by the same time, 20 ms unless told otherwise, so a name that is looked up, a file that is
opened and a folder that is made cost that time each, whatever the machine. As a program it prints how long a save, a
load, a save with ``base=``, an overwrite and a deletion of 30 variables take there.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

import varstore as vs

__all__ = ["ROUND_TRIP", "Unavailable", "slow_mount"]

ROUND_TRIP = 0.02
"""Seconds from a request to its answer."""
VARIABLES = 30
_SERVERS = ("/usr/lib/openssh/sftp-server", "/usr/libexec/openssh/sftp-server", "/usr/lib/ssh/sftp-server")
_MOUNTED_WITHIN = 20


class Unavailable(Exception):
    """Nothing can be mounted here; says why."""


@contextlib.contextmanager
def slow_mount(round_trip: float = ROUND_TRIP) -> Iterator[Path]:
    """Hold a new directory mounted by sshfs, whose server answers after `round_trip` seconds.

    Raises:
        Unavailable: a program is missing, or mounting is not permitted.
    """
    server = next(filter(os.path.exists, _SERVERS), None)
    if shutil.which("sshfs") is None or server is None:
        raise Unavailable("sshfs or openssh-sftp-server is not installed")
    with tempfile.TemporaryDirectory() as folder:
        store, shown = Path(folder, "store"), Path(folder, "shown")
        store.mkdir()
        shown.mkdir()
        with _served(server, store, shown, round_trip) as client:
            deadline = time.monotonic() + _MOUNTED_WITHIN
            while not os.path.ismount(shown):
                if client.poll() is not None or time.monotonic() > deadline:
                    client.kill()
                    raise Unavailable(f"sshfs does not mount here: {client.stderr and client.stderr.read().strip()!r}")
                time.sleep(0.01)
            try:
                yield shown
            finally:
                subprocess.run(["umount", "--lazy", shown], check=True)
                client.wait(_MOUNTED_WITHIN)


@contextlib.contextmanager
def _served(server: str, store: Path, shown: Path, round_trip: float) -> Iterator[subprocess.Popen[bytes]]:
    """Run server and client; what the server says reaches the client late, what the client says arrives at once.

    The relay between them is a process of its own: this one may wait, with the interpreter, for a page that it maps.
    """
    from_client, to_server = os.pipe()
    relay = [sys.executable, __file__, "--relay", "--round-trip", str(round_trip)]
    client = ["sshfs", "-f", "-o", "passive", f"here:{store}", str(shown)]
    with contextlib.ExitStack() as running:
        serving = running.enter_context(subprocess.Popen([server], stdin=from_client, stdout=subprocess.PIPE))
        relaying = running.enter_context(subprocess.Popen(relay, stdin=serving.stdout, stdout=subprocess.PIPE))
        mounting = running.enter_context(
            subprocess.Popen(client, stdin=relaying.stdout, stdout=to_server, stderr=subprocess.PIPE)
        )
        for end in (from_client, to_server):
            os.close(end)
        for process in (serving, relaying):
            assert process.stdout is not None
            process.stdout.close()
        yield mounting


def relay(source: int, target: int, seconds: float) -> None:
    """Copy what comes from one descriptor to the other, each piece so many seconds after it came."""
    pieces: queue.SimpleQueue[tuple[float, bytes]] = queue.SimpleQueue()

    def take() -> None:
        piece = b"?"
        while piece:
            piece = os.read(source, 1 << 18)
            pieces.put((time.monotonic() + seconds, piece))

    threading.Thread(target=take, daemon=True).start()
    while True:
        due, piece = pieces.get()
        time.sleep(max(0.0, due - time.monotonic()))
        if not piece:
            return
        while piece:
            piece = piece[os.write(target, piece) :]


def measured(place: Path, count: int = VARIABLES, *, nested: bool = False) -> dict[str, float]:
    """Return the seconds of what is done with this many small variables, by what it is."""
    names = [f"block{i // 10}/layer{i}/weight" if nested else f"layer{i}" for i in range(count)]
    values = {name: np.full(64, i, np.float32) for i, name in enumerate(names)}
    changed = values | {names[0]: values[names[0]] + 1}
    actions: dict[str, Callable[[], object]] = {
        "save": lambda: vs.save(place / "c", values),
        "save durable=False": lambda: vs.save(place / "quick", values, durable=False),
        "load": lambda: vs.load(place / "c"),
        "verify": lambda: vs.verify(place / "c"),
        "base=": lambda: vs.save(place / "d", changed, base=place / "c"),
        "overwrite": lambda: vs.save(place / "c", changed, overwrite=True),
        "overwrite base=": lambda: vs.save(place / "c", values, base=place / "c", overwrite=True),
        "latest": lambda: vs.CheckpointManager(place, prefix="c").latest(),
        "restore": lambda: vs.CheckpointManager(place, prefix="c").restore(),
    }
    vs.save(place / "c0", values)
    seconds = {}
    for name, action in actions.items():
        start = time.perf_counter()
        action()
        seconds[name] = time.perf_counter() - start
    return seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--round-trip", type=float, default=ROUND_TRIP, help="seconds, by default %(default)s")
    parser.add_argument("--variables", type=int, default=VARIABLES, help="by default %(default)s")
    parser.add_argument("--nested", action="store_true", help="names with slashes, each in a folder of its own")
    parser.add_argument("--relay", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.relay:
        with contextlib.suppress(BrokenPipeError):
            relay(sys.stdin.fileno(), sys.stdout.fileno(), options.round_trip)
        return 0
    with slow_mount(options.round_trip) as place:
        for name, seconds in measured(place, options.variables, nested=options.nested).items():
            print(f"{name:20} {seconds:6.2f} s")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
