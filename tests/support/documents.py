"""Runs rows of the pages "Coming from …": `tools.documents` says what a row is.

The framework's parts run in the same process as varstore's, or, where the framework has no Python that varstore runs
on, in a process of its environment.
"""

from __future__ import annotations

import json
import linecache
import os
import select
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import varstore as vs
from support import ROOT
from tools.documents import OURS, Page, Part, Row

__all__ = ["InItsEnvironment", "InThisProcess", "has_test", "run_row"]

ENVS = Path(os.environ.get("VARSTORE_ENVS", ROOT / ".envs"))

# What the other process runs: it answers each line, a piece of code, with the traceback, or null.
_LOOP = """
import json, os, sys, traceback, types
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
for line in sys.stdin:
    task = json.loads(line)
    if task["folder"]:
        os.chdir(task["folder"])
        sys.modules["document"] = module = types.ModuleType("document")
    try:
        exec(compile("\\n" * (task["line"] - 1) + task["code"], task["page"], "exec"), module.__dict__)
        answer = None
    except BaseException:
        answer = traceback.format_exc()
    print(json.dumps(answer), file=answers, flush=True)
"""
_SECONDS = 240


class InThisProcess:
    """The framework in the process of the tests, where it can be imported."""

    is_separate = False

    def __init__(self, framework: str) -> None:
        self.framework = framework

    def begin(self, ours: ModuleType) -> None:
        """Share the names of varstore's parts."""
        pytest.importorskip(self.framework, exc_type=ImportError)
        self._names = ours.__dict__

    def run(self, page: Page, part: Part) -> None:
        """Run a part of the framework."""
        _run(page, part, self._names)

    def close(self) -> None:
        """Do nothing: there is no process to end."""


class InItsEnvironment:
    """The framework in an environment of its own: one process for all rows, started by the first that needs it."""

    is_separate = True

    def __init__(self, framework: str) -> None:
        self.framework = framework
        self._process: subprocess.Popen[str] | None = None
        self._is_new = True

    def begin(self, ours: ModuleType) -> None:
        """Forget the names of the row before."""
        self._is_new = True

    def run(self, page: Page, part: Part) -> None:
        """Run a part of the framework in its process; skip the row where the environment is missing."""
        self._process = self._process or self._started()
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        folder = os.getcwd() if self._is_new else ""
        task = {"code": part.code, "line": part.line, "page": str(page.path), "folder": folder}
        self._is_new = False
        self._process.stdin.write(json.dumps(task) + "\n")
        self._process.stdin.flush()
        answered, _, _ = select.select([self._process.stdout], [], [], _SECONDS)
        assert answered, f"{self.framework} did not answer within {_SECONDS} s: line {part.line} of {page.path}"
        line = self._process.stdout.readline()
        assert line, f"{self.framework} died: line {part.line} of {page.path}"
        error = json.loads(line)
        assert error is None, error

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()

    def _started(self) -> subprocess.Popen[str]:
        folder = ENVS / self.framework
        python = folder / "bin" / "python"
        if not python.exists():
            pytest.skip(f"no environment {self.framework} below {ENVS}: run tools/make_envs.sh {self.framework}")
        libraries = (folder / "lib").glob("python*/site-packages/nvidia/*/lib")
        env = {"PATH": os.environ["PATH"], "LD_LIBRARY_PATH": os.pathsep.join(map(str, libraries))}
        return subprocess.Popen(
            [str(python), "-c", _LOOP], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env, text=True
        )


def run_row(page: Page, row: Row, framework: InThisProcess | InItsEnvironment) -> None:
    """Run the parts of the page's head and of the row, in their order, in the current directory.

    Varstore's parts have the names `vs`, `np` and `pytest`. Classes that they define belong to a module that can be
    imported, so that they can be pickled.
    """
    if not row.parts:
        return
    ours = ModuleType("document")
    ours.__dict__.update(vs=vs, np=np, pytest=pytest)
    sys.modules["document"] = ours
    framework.begin(ours)
    is_needed = not framework.is_separate or any(part.kind not in OURS for part in row.parts)
    with vs.Session():
        for part in (*page.parts, *row.parts):
            if part.kind in OURS:
                _run(page, part, ours.__dict__)
            elif is_needed:
                framework.run(page, part)


def _run(page: Page, part: Part, names: dict[str, Any]) -> None:
    code, name = "\n" * (part.line - 1) + part.code, f"<{page.path.name}>"
    text = page.path.read_text(encoding="utf-8")  # what pytest shows of a failure, and frameworks read of a function
    linecache.cache[name] = len(text), None, text.splitlines(keepends=True), name
    exec(compile(code, name, "exec"), names)


def has_test(file: str, name: str) -> bool:
    """Tell whether a test that a row names exists."""
    path = ROOT / file
    return path.exists() and f"\ndef {name}(" in path.read_text(encoding="utf-8")
