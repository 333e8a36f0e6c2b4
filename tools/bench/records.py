"""The results of one run, which `tools/bench/results` keeps by version."""

from __future__ import annotations

import json
import os
import platform
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """The results of one candidate at one task over all rounds; some early runs kept only the median."""

    median: float
    min: float | None = None
    max: float | None = None

    @classmethod
    def of(cls, values: Sequence[float]) -> Figure:
        """Return the median of these values, with the lowest and highest."""
        return cls(median=statistics.median(values), min=min(values), max=max(values))


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """The figures of all candidates at one task, in seconds ("s") or bytes ("B")."""

    unit: str
    figures: Mapping[str, Figure]

    @property
    def ratios(self) -> dict[str, float]:
        """The median of varstore divided by that of each other candidate."""
        own = next((figure.median for name, figure in self.figures.items() if name.startswith("varstore")), None)
        others = {name: figure.median for name, figure in self.figures.items() if not name.startswith("varstore")}
        return {name: own / median for name, median in others.items() if own is not None and median}


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """One run; `targets` is the result of `targets.check`, `against` describes the other side of a comparison."""

    version: str
    date: str
    scale: float
    rounds: int
    machine: Mapping[str, str | int]
    python: str | None
    packages: Mapping[str, str]
    rows: Mapping[str, Row]
    targets: Sequence[Mapping[str, Any]]
    against: Mapping[str, Any] | None = None

    def as_json(self) -> str:
        """Return the record as JSON; it contains the ratios for people, and `parse` ignores them."""
        rows = {task: {**asdict(row), "ratios": row.ratios} for task, row in self.rows.items()}
        return json.dumps({**asdict(self), "rows": rows}, indent=1) + "\n"

    @classmethod
    def parse(cls, text: str) -> Record:
        """Return the record in the result of `as_json`.

        Raises:
            TypeError: a field is missing or unknown.
        """
        fields = json.loads(text)
        rows = {
            task: Row(unit=row["unit"], figures={name: Figure(**found) for name, found in row["figures"].items()})
            for task, row in fields.pop("rows").items()
        }
        return cls(rows=rows, **fields)


def newest(folder: Path = RESULTS) -> Record:
    """Return the record of the highest version."""
    path = max(folder.glob("*.json"), key=lambda path: [int(part) for part in re.findall(r"\d+", path.stem)])
    return Record.parse(path.read_text(encoding="utf-8"))


def machine(directory: str) -> dict[str, str | int]:
    """Return relevant facts about this machine and the disk of a folder, but nothing that identifies them."""
    numbers = re.match(r"[\d.]*", platform.release())
    return {
        "system": f"{platform.system()} {numbers[0] if numbers else ''}".strip(),
        "processor": _fact("/proc/cpuinfo", r"model name\s*: (.*)") or platform.machine(),
        "processors": len(os.sched_getaffinity(0)),
        "memory GiB": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / (1 << 30)),
        "file system": _file_system(os.path.realpath(directory)),
    }


def _fact(path: str, pattern: str) -> str | None:
    with open(path, encoding="utf-8") as facts:
        found = re.search(pattern, facts.read())
    return found[1] if found else None


def _file_system(path: str) -> str:
    """Return the type of the file system that contains a path."""
    with open("/proc/self/mounts", encoding="utf-8") as mounts:
        points = [line.split()[1:3] for line in mounts]
    above = [(point, kind) for point, kind in points if os.path.commonpath([point, path]) == point]
    return max(reversed(above), key=lambda mount: len(mount[0]), default=("", "unknown"))[1]
