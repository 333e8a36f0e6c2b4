"""Inject faults, and check that nothing is lost: ``python -m tools.faults`` runs the whole campaign.

Exit status: 1 if something is lost that is not known, 3 if this machine cannot inject the faults.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, Final, cast

from rich.console import Console
from rich.table import Table

from tools.faults.jobs import Command, Job, Outcome, Unavailable
from tools.faults.known import KNOWN, known_losses
from tools.faults.verdict import Verdict, outcome_of, stale

COMMANDS: Final = {
    "calls": "a fault at each file system call of saves, seals and their like",
    "count": "the number of these calls, compared with strace's",
    "power": "a power cut at each moment of what is durable, in a model",
    "rot": "changes of single files of a checkpoint",
    "pickles": "pickles that ask for code, in every wrapping",
    "mutants": "damaged files of every format",
    "races": "reading, verifying, sealing and converting beside a writer that overwrites",
    "signals": "Ctrl-C in background saves, and saves in signal handlers that interrupt others",
    "retention": "whatever can happen to a run of a manager, in any order",
}
"""Each command is the module of `tools.faults` with its name, see `jobs`."""

_LOST = 1
_UNAVAILABLE = 3
_MEMORY = "/dev/shm"
"""A file system in memory, which is fast and sufficient: what matters is the order of the calls."""

_Rows = dict[str, dict[str, Any]]


def main() -> int:
    """Run the commands, and return the exit code."""
    options = _options()
    record = None if options.record is None else Path(options.record)
    rows: _Rows = {}
    if options.resume and record and record.exists():
        rows = {_name(row["command"], row["scenario"], row["fault"]): row for row in json.loads(record.read_text())}
    try:
        verdicts = list(_run(options, rows, record))
    except Unavailable as unavailable:
        print(f"cannot inject faults here: {unavailable}", file=sys.stderr)
        return _UNAVAILABLE
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(_table(verdicts, by_scenario=options.scenarios))
    complaints = [complaint for verdict in verdicts for complaint in verdict.complaints()]
    complaints += stale(KNOWN, verdicts, is_all=_is_all(options))
    print(*complaints, sep="\n", end="\n" if complaints else "")
    return _LOST if complaints else 0


def _options() -> argparse.Namespace:
    epilog = "commands: " + "; ".join(f"{name}: {meaning}" for name, meaning in COMMANDS.items())
    parser = argparse.ArgumentParser(prog="python -m tools.faults", description=__doc__, epilog=epilog)
    parser.add_argument("command", nargs="*", metavar="COMMAND", choices=[[], *COMMANDS], help="default: all")
    parser.add_argument("--part", action="store_true", help="only what takes a few seconds per command")
    parser.add_argument("--scenario", metavar="PATTERN", default="*", help="only these, such as 'new*'")
    parser.add_argument("--fault", metavar="PATTERN", default="*", help="only these, such as 'E*'")
    parser.add_argument("--scenarios", action="store_true", help="show a row per scenario")
    parser.add_argument("--directory", default=_memory(), help="where to work (default: %(default)s)")
    parser.add_argument("--record", metavar="FILE", help="write all figures and losses to this file, as JSON")
    parser.add_argument("--resume", action="store_true", help="skip what the record already has")
    options = parser.parse_args()
    options.command = options.command or list(COMMANDS)
    return options


def _is_all(options: argparse.Namespace) -> bool:
    return options.command == list(COMMANDS) and not options.part and options.scenario == options.fault == "*"


def _memory() -> str:
    return _MEMORY if os.access(_MEMORY, os.W_OK) else tempfile.gettempdir()


def _name(command: str, scenario: str, fault: str) -> str:
    return f"{command}: {scenario}: {fault}"


def _run(options: argparse.Namespace, rows: _Rows, record: Path | None) -> Iterator[Verdict]:
    """Yield the verdict of each job; `rows` are those that are recorded already, and gets the new ones."""
    chosen = list(_chosen(options))
    for number, (command, job) in enumerate(chosen, 1):
        name = _name(command, job.scenario, job.fault)
        outcome = outcome_of(rows[name]) if name in rows else _in_empty_directory(options.directory, job.run)
        known = known_losses(command, job.scenario, job.fault)
        verdict = Verdict(command=command, scenario=job.scenario, fault=job.fault, outcome=outcome, known=known)
        print(f"[{number}/{len(chosen)}] {name}: {verdict.points}, lost {len(verdict.lost)}", file=sys.stderr)
        rows[name] = verdict.as_json()
        if record:
            new = record.with_name(record.name + ".new")
            new.write_text(json.dumps(list(rows.values()), indent=1) + "\n")
            new.replace(record)
        yield verdict


def _chosen(options: argparse.Namespace) -> Iterator[tuple[str, Job]]:
    for command in options.command:
        module = cast(Command, import_module(f"tools.faults.{command}"))
        for job in module.jobs(whole=not options.part):
            if fnmatch.fnmatch(job.scenario, options.scenario) and fnmatch.fnmatch(job.fault, options.fault):
                yield command, job


def _in_empty_directory(parent: str, run: Callable[[Path], Outcome]) -> Outcome:
    with (
        tempfile.TemporaryDirectory(prefix="varstore-faults-", dir=parent) as place,
        contextlib.chdir(os.curdir),  # back to where the next job is, whatever this one entered
    ):
        return run(Path(place))


def _table(verdicts: list[Verdict], *, by_scenario: bool) -> Table:
    """Return a table with a row per kind of fault, or per kind and scenario."""
    groups: dict[tuple[str, ...], list[Verdict]] = {}
    for v in verdicts:
        groups.setdefault((v.command, v.fault, v.scenario) if by_scenario else (v.command, v.fault), []).append(v)
    table = Table()
    for column in ("command", "fault", *["scenario"] * by_scenario):
        table.add_column(column)
    for column in ("points", "survived", "known", "lost", "foreign"):
        table.add_column(column, justify="right")
    for names, group in groups.items():
        figures = ((v.points, v.survived, v.excused, len(v.lost), v.foreign) for v in group)
        table.add_row(*names, *(str(sum(column)) for column in zip(*figures, strict=True)))
    return table


if __name__ == "__main__":
    raise SystemExit(main())
