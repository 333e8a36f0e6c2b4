"""Inject a fault at each file system call of saves and seals, and check what remains: ``python -m tools.faults``.

Exit status: 1 if something is lost that is not known, 3 if this machine cannot inject faults.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tools.faults.campaign import count_calls, fresh_home, visit
from tools.faults.injector import FAULTS, Injector, Unavailable, fault_named
from tools.faults.known import known_losses
from tools.faults.scenarios import SCENARIOS, Scenario
from tools.faults.strace import count_with_strace
from tools.faults.verdict import Verdict

_LOST = 1
_UNAVAILABLE = 3
_TOLERANCE = 0.02
_MEMORY = "/dev/shm"
"""A file system in memory, which is fast and sufficient: what matters is the order of the calls."""


def main() -> int:
    """Run the command, and return the exit code."""
    options = _options()
    scenarios = [s for s in SCENARIOS if not options.scenario or s.name in options.scenario]
    console = Console(width=None if sys.stdout.isatty() else 120)
    try:
        injector = Injector()
        with tempfile.TemporaryDirectory(prefix="varstore-faults-", dir=options.directory) as place:
            if options.check_count:
                return _check_count(console, injector, scenarios, Path(place))
            return _break(console, injector, scenarios, options, Path(place))
    except Unavailable as unavailable:
        print(f"cannot inject faults here: {unavailable}", file=sys.stderr)
        return _UNAVAILABLE


def _options() -> argparse.Namespace:
    faults = "; ".join(f"{fault.name}: {fault.meaning}" for fault in FAULTS)
    parser = argparse.ArgumentParser(prog="python -m tools.faults", description=__doc__)
    parser.add_argument(
        "--scenario", action="append", choices=[s.name for s in SCENARIOS], help="only this one; may be repeated"
    )
    parser.add_argument(
        "--fault",
        action="append",
        help=f"instead of SIGKILL and EIO; may be repeated. {faults}; any other errno, such as ENOSPC: as EIO",
    )
    parser.add_argument("--directory", default=_memory(), help="where to work (default: %(default)s)")
    parser.add_argument("--json", help="write all figures and losses to this file")
    parser.add_argument("--check-count", action="store_true", help="break nothing; compare the count with strace's")
    options = parser.parse_args()
    try:
        options.fault = [fault_named(name) for name in options.fault or ["SIGKILL", "EIO"]]
    except KeyError as error:
        parser.error(f"there is no fault {error}")
    return options


def _memory() -> str:
    return _MEMORY if os.access(_MEMORY, os.W_OK) else tempfile.gettempdir()


def _break(
    console: Console, injector: Injector, scenarios: Sequence[Scenario], options: argparse.Namespace, place: Path
) -> int:
    verdicts = []
    with console.status("") as status:
        for scenario in scenarios:
            for fault in options.fault:
                status.update(f"{scenario.name}: {fault.name}")
                points = tuple(visit(injector, scenario, fault, place))
                known = known_losses(scenario.name, fault.name)
                verdicts.append(Verdict(scenario=scenario.name, fault=fault.name, points=points, known=known))
    table = _table("scenario", "fault", "points", "survived", "known", "lost")
    for v in verdicts:
        table.add_row(v.scenario, v.fault, *map(str, (len(v.points), v.survived, v.excused, len(v.lost))))
    console.print(table)
    for verdict in verdicts:
        for complaint in verdict.complaints():
            print(complaint)
    if options.json:
        Path(options.json).write_text(json.dumps([verdict.as_json() for verdict in verdicts], indent=1))
    return 0 if all(verdict.ok for verdict in verdicts) else _LOST


def _check_count(console: Console, injector: Injector, scenarios: Sequence[Scenario], place: Path) -> int:
    table = _table("scenario", "injector", "strace", "differ in")
    worst = 0.0
    for scenario in scenarios:
        own = Counter(count_calls(injector, scenario, place))
        with fresh_home(scenario, place) as home:
            other = count_with_strace(partial(scenario.act, home), injector.names, place)
        worst = max(worst, abs(own.total() - other.total()) / max(own.total(), other.total()))
        differing = sorted(name for name in own | other if own[name] != other[name])
        table.add_row(scenario.name, str(own.total()), str(other.total()), ", ".join(differing))
    console.print(table)
    return 0 if worst <= _TOLERANCE else _LOST


def _table(*columns: str) -> Table:
    table = Table()
    for column in columns:
        table.add_column(column, justify="left" if column in ("scenario", "fault", "differ in") else "right")
    return table


if __name__ == "__main__":
    raise SystemExit(main())
