"""Show which files one save and one load pass through: python -m tools.walk

All calls of functions of the package are recorded with ``sys.setprofile`` while three small variables are saved and
loaded for the second time, when everything has been imported. Each line shows consecutive calls in one folder, with its
floor and the files that were called, in order. A move is a call in another file than the previous call. A climb is a
call from one floor to a higher one, and makes the exit code 1.
"""

from __future__ import annotations

import itertools
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import numpy as np

import varstore as vs
from tools.house import FLOORS

PACKAGE = os.path.join(os.path.dirname(vs.__file__), "")
VARIABLES = {
    "conv1/weight": np.ones((6, 1, 5, 5), np.float32),
    "conv1/bias": np.zeros(6, np.float32),
    "step": np.array([450]),
}


@dataclass
class Walk:
    """The files of the package that were called, in order, and the calls that went up."""

    files: list[str] = field(default_factory=list)
    climbs: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, action: Callable[[], object]) -> Walk:
        """Record the calls of an action."""
        walk = cls()
        sys.setprofile(walk._note)
        try:
            action()
        finally:
            sys.setprofile(None)
        return walk

    def _note(self, frame: FrameType, event: str, _: Any) -> None:
        file = file_of(frame.f_code)
        if event != "call" or file is None:
            return
        self.files.append(file)
        caller = next(filter(None, map(file_of, _codes_below(frame))), None)
        if caller is not None and floor_of(caller) < floor_of(file):
            self.climbs.append(f"{caller} calls {frame.f_code.co_qualname} of {file}")

    @property
    def moves(self) -> int:
        """How often a call lands in another file than the one before."""
        return sum(a != b for a, b in itertools.pairwise(self.files))

    def __str__(self) -> str:
        stays = [file for file, _ in itertools.groupby(self.files)]
        lines = []
        for folder, files in itertools.groupby(stays, folder_of):
            names = " ".join(os.path.basename(file) for file in files)
            lines.append(f"  {FLOORS[folder.partition('/')[0]]:2} {folder:12} {names}")
        return "\n".join([*lines, *(f"  climb: {climb}" for climb in self.climbs)])


def file_of(code: CodeType) -> str | None:
    """Return the file of a function of the package, as ``disk/writer``; None for any other function.

    What checks the arguments of a public function and passes them on is no part of the way.
    """
    path = code.co_filename
    if not path.startswith(PACKAGE) or path == f"{PACKAGE}values/arguments.py":
        return None
    return path.removeprefix(PACKAGE).removesuffix(".py")


def folder_of(file: str) -> str:
    """Return the folder that a file is in; a file of the top level is its own."""
    return os.path.dirname(file) or file


def floor_of(file: str) -> int:
    return FLOORS[file.partition("/")[0]]


def _codes_below(frame: FrameType) -> Iterator[CodeType]:
    below = frame.f_back
    while below is not None:
        yield below.f_code
        below = below.f_back


def save_and_load(directory: Path) -> tuple[Walk, Walk]:
    """Follow one save and one load."""
    path = directory / "checkpoint"
    return Walk.of(lambda: vs.save(path, VARIABLES, threads=1)), Walk.of(lambda: vs.load(path, threads=1))


def main() -> int:
    with tempfile.TemporaryDirectory() as first, tempfile.TemporaryDirectory() as second:
        save_and_load(Path(first))
        walks = dict(zip(("save", "load"), save_and_load(Path(second)), strict=True))
    for name, walk in walks.items():
        print(f"{name}: {walk.moves} moves between {len(set(walk.files))} files, {len(walk.climbs)} climbs\n{walk}")
    return int(any(walk.climbs for walk in walks.values()))


if __name__ == "__main__":
    raise SystemExit(main())
