"""The environments that are measured, each in its own process: this one and, if requested, an earlier one."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from tools.bench import measure
from tools.bench.records import Figure, Row

ROOT = Path(__file__).resolve().parents[2]
BEFORE = ", before"
"""The suffix of the names of candidates of the earlier version."""


class Side(AbstractContextManager["Side"]):
    """One environment; `suffix` is added to the names of its candidates, which `own_only` limits to varstore's own.

    The worker runs this version of the bench, whichever version of varstore it measures. So it is started in a folder
    from which only a link to `tools` and the packages of its environment can be imported.
    """

    def __init__(
        self,
        python: str | None,
        path: str,
        log: Callable[[str], None],
        *,
        suffix: str = "",
        own_only: bool,
        **options: Any,
    ) -> None:
        self.suffix = suffix
        self.own_only = own_only
        self._log = log
        os.mkdir(path)
        os.symlink(ROOT / "tools", os.path.join(path, "tools"))
        os.mkdir(work := os.path.join(path, "work"))
        sources = [path] if python else [path, _source_of_varstore(), *filter(None, [os.environ.get("PYTHONPATH")])]
        command = [python or sys.executable, "-m", "tools.bench.worker", json.dumps({"path": work, **options})]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=work,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sources), "JAX_PLATFORMS": "cpu"},
        )

    def call(self, method: str, *arguments: Any) -> Any:
        """Call a method of the worker, print what it logs, and return the result."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            print(json.dumps([method, *arguments]), file=self._process.stdin, flush=True)
            reply = json.loads(self._process.stdout.readline())
        except (BrokenPipeError, json.JSONDecodeError):
            raise SystemExit(f"the worker{self.suffix} ended at {method} {arguments}") from None
        for line in reply["log"]:
            self._log(f"{self.suffix.strip(', ')}: {line}" if self.suffix else line)
        return reply["found"]

    def __exit__(self, *_: object) -> None:
        with self._process:  # closes the pipes, so that the worker ends, and waits for it
            pass


def _source_of_varstore() -> str:
    """Return the folder from which this process would import varstore."""
    spec = importlib.util.find_spec("varstore")
    if spec is None or spec.origin is None:
        raise SystemExit("varstore is not installed, and not in the working directory")
    return str(Path(spec.origin).resolve().parents[1])


def run(task: str, sides: list[Side], rounds: int) -> Row:
    """Run one task, with the candidates of all sides in turn."""
    candidates: dict[str, Callable[[], float | None]] = {}
    unit = "s"
    for side in sides:
        started = side.call("start", task)
        unit = started["unit"]
        for name in started["candidates"]:
            if not side.own_only or name.startswith("varstore"):
                candidates[name + side.suffix] = _measure(side, name)
    values = measure.alternate(candidates, 1 if unit == "B" else rounds)
    for side in sides:
        side.call("finish")
    return Row(unit=unit, figures={name: Figure.of(found) for name, found in values.items() if found})


def _measure(side: Side, name: str) -> Callable[[], float | None]:
    def measured() -> float | None:
        value: float | None = side.call("measure", name)
        return value

    return measured
