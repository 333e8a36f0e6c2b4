"""The process that measures in one environment, with the version of varstore that is installed there.

`tools.bench.sides` starts it as ``python -m tools.bench.worker OPTIONS``. It answers one request per line: a method of
`Worker` and its arguments, as JSON. One process runs all tasks, so that both sides of a comparison are in the same
state, and no imports are timed.
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
from tools.bench.kinds import KINDS
from tools.bench.measure import Place
from tools.bench.tasks import Bench, Race

_PACKAGES = ("numpy", "ml_dtypes", "protobuf", "xxhash", "click", "rich")
"""The packages that varstore requires; those of the peers are added."""


class Worker:
    """The measurements in one environment."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        self._log: list[str] = []
        self._tasks, peers = KINDS[options["kind"]]
        chosen = [peer for peer in peers if not options["peers"] or peer.name.partition(",")[0] in options["peers"]]
        missing = {peer: peer.missing() for peer in chosen}
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
        """Return what a record contains about an environment, and the path of its varstore."""
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
        """Prepare a task; return its candidates, none if this version cannot run it, and their unit."""
        self._race = Race({})
        gc.collect()
        try:
            self._race = self._tasks[task](self._bench)
        except Exception as error:  # an earlier version does not have every function
            self._log.append(f"left out: {task}: {type(error).__name__}: {error}")
        return {"candidates": list(self._race.candidates), "unit": self._race.unit}

    def measure(self, candidate: str) -> float | None:
        """Measure a candidate of the current task once; return None if it cannot run it."""
        try:
            return self._bench.measure(self._race, candidate)
        except NotImplementedError:
            return None
        except Exception as error:  # the failure of one peer does not end the run
            self._log.append(f"left out: {candidate}: {type(error).__name__}: {error}")
            return None

    def finish(self) -> None:
        """Run what a task does after its race."""
        self._race.afterwards()

    def log(self) -> list[str]:
        """Return the lines that were logged since the last call."""
        lines = self._log[:]
        self._log.clear()
        return lines


def main() -> None:
    """Answer requests until there are no more; output of libraries goes to stderr."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    worker = Worker(json.loads(sys.argv[1]))
    for line in sys.stdin:
        method, *arguments = json.loads(line)
        found = getattr(worker, method)(*arguments)
        print(json.dumps({"found": found, "log": worker.log()}), file=replies, flush=True)


if __name__ == "__main__":
    main()
