"""The process that does the work of one environment, with the varstore that is installed there.

It is started as ``python -m tools.bench.worker OPTIONS`` by `tools.bench.sides`, and answers one request per line:
a method of `Worker` and its arguments, as JSON. One process does all tasks, so that the two sides of a comparison
are in the same state, and nothing is imported on the clock.
"""

from __future__ import annotations

import gc
import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Mapping
from typing import Any

import varstore
from tools.bench.measure import Place
from tools.bench.peers import PEERS
from tools.bench.tasks import TASKS, Bench, Race

_PACKAGES = ("numpy", "ml_dtypes", "protobuf", "xxhash", "click", "rich")
"""What varstore needs; the peers' packages come beside."""


class Worker:
    """One environment's side of the bench."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        self._log: list[str] = []
        missing = {peer: peer.missing() for peer in PEERS if peer.name in (options["peers"] or [peer.name])}
        self._log += [f"left out: {peer.name}: {lack} is not installed" for peer, lack in missing.items() if lack]
        self._bench = Bench(
            place=Place(options["path"]),
            scale=options["scale"],
            peers=[peer() for peer, lack in missing.items() if not lack],
            readies_memory=options["readies_memory"],
            log=self._log.append,
        )
        self._race = Race({})

    def facts(self) -> dict[str, Any]:
        """Return what a record says of an environment, and where its varstore lies."""
        needed = {package.split(".")[0] for peer in self._bench.peers for package in peer.needs}
        packages = {}
        for package in (*_PACKAGES, *sorted(needed)):
            for distribution in importlib.metadata.packages_distributions().get(package, [package])[:1]:
                packages[distribution] = importlib.metadata.version(distribution)
        return {
            "version": varstore.__version__,
            "python": platform.python_version(),
            "packages": packages,
            "path": os.path.dirname(varstore.__file__),
        }

    def start(self, task: str) -> dict[str, Any]:
        """Prepare a task; return its candidates and their unit, none where this version cannot do it."""
        self._race = Race({})
        gc.collect()
        try:
            self._race = TASKS[task](self._bench)
        except Exception as error:  # an earlier version does not have every verb
            self._log.append(f"left out: {task}: {type(error).__name__}: {error}")
        return {"candidates": list(self._race.candidates), "unit": self._race.unit}

    def measure(self, candidate: str) -> float | None:
        """Measure a candidate of the present task once; None where it cannot do it."""
        try:
            return self._bench.measure(self._race, candidate)
        except NotImplementedError:
            return None
        except Exception as error:  # one peer's failure does not end the run
            self._log.append(f"left out: {candidate}: {type(error).__name__}: {error}")
            return None

    def finish(self) -> None:
        """Do what a task does after its race."""
        self._race.afterwards()

    def log(self) -> list[str]:
        """Return the lines that were logged since, and forget them."""
        lines = self._log[:]
        self._log.clear()
        return lines


def main() -> None:
    """Answer requests until there are no more; what libraries print goes to stderr."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    worker = Worker(json.loads(sys.argv[1]))
    for line in sys.stdin:
        method, *arguments = json.loads(line)
        found = getattr(worker, method)(*arguments)
        print(json.dumps({"found": found, "log": worker.log()}), file=replies, flush=True)


if __name__ == "__main__":
    main()
