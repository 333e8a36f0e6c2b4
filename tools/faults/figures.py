"""Print the figures of the campaign for README: ``python -m tools.faults.figures``.

``python -m tools.faults.figures RECORD ...`` first replaces ``results.json`` by the sums of these records, which
``python -m tools.faults --record RECORD`` writes, and the figures in README. A test checks that README has them.
"""

from __future__ import annotations

import argparse
import datetime
import fnmatch
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from tools import readme

__all__ = ["KINDS", "RESULTS", "figures", "summary"]

RESULTS: Final = Path(__file__).with_name("results.json")

KINDS: Final = {
    ("calls", "SIGKILL"): "killed before a call",
    ("calls", "torn"): "killed within a write",
    ("calls", "SIGINT"): "Ctrl-C",
    ("calls", "short"): "short write",
    ("calls", "E*"): "error of a call",
    ("power", "*"): "power cut, modelled",
    ("signals", "*"): "save in a signal handler",
    ("rot", "*"): "file changed",
    ("pickles", "*"): "hostile pickle",
    ("mutants", "*"): "damaged file",
    ("races", "*"): "race",
    ("retention", "*"): "run history",
}
"""Names each kind of fault by command and pattern; what is not here, such as `count`, is not quoted."""

Results = Mapping[str, Any]


def main() -> int:
    """Print the figures, after taking new records if there are any."""
    parser = argparse.ArgumentParser(prog="python -m tools.faults.figures", description=__doc__)
    parser.add_argument("record", nargs="*", type=Path)
    records = parser.parse_args().record
    if records:
        rows = [row for record in records for row in json.loads(record.read_text())]
        results = summary(rows, date=datetime.date.today().isoformat())
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
        readme.quote("faults", figures(results))
    print(figures(json.loads(RESULTS.read_text())), end="")
    return 0


def summary(rows: Iterable[Mapping[str, Any]], *, date: str) -> Results:
    """Return the sums for each kind of fault."""
    kinds: dict[str, dict[str, int]] = {}
    for row in rows:
        for (command, fault), kind in KINDS.items():
            if row["command"] == command and fnmatch.fnmatchcase(row["fault"], fault):
                sums = kinds.setdefault(kind, dict.fromkeys(("points", "survived", "known", "lost"), 0))
                for name in sums:
                    sums[name] += row[name]
    return {"date": date, "kinds": {kind: kinds[kind] for kind in KINDS.values() if kind in kinds}}


def figures(results: Results) -> str:
    """Return a sentence and a table, as Markdown."""
    return "\n".join([f"`python -m tools.faults` on {results['date']}:", "", *_table(results), ""])


def _table(results: Results) -> Iterator[str]:
    yield "|fault|points|survived|known|lost|"
    yield "|---|---:|---:|---:|---:|"
    for kind, sums in results["kinds"].items():
        yield "|".join(["", kind, *(f"{number:,}" for number in sums.values()), ""])


if __name__ == "__main__":
    raise SystemExit(main())
