"""Measure varstore against its alternatives and against the limits of the machine: ``python -m tools.bench``.

Each ratio is from one run, in which the candidates take turns. All installed peers take part:
pip install safetensors torch zarr tensorstore orbax-checkpoint jax matplotlib

With ``--packed``, packed checkpoints are measured instead, on two processors, with weights that pip downloads: some
minutes. More peers take part: pip install zstandard zipnn

With ``--distributed``, checkpoints are measured that two processes of torch.distributed save and load together.

With ``--against PYTHON``, the varstore of another environment takes turns with this one at the same tasks, which are
a quarter of their size unless ``--scale`` says otherwise: on a quiet machine, that takes about a quarter of an hour.
Name a new, empty file system with ``--directory`` for it. On a disk that is in use, where the folders of the two lie
decides more than the version: on an ext4 that had lost many files shortly before, one version took 1.2 to 1.5 times as
long as itself to save `small`.
"""

from __future__ import annotations

import argparse
import datetime
import os
import shutil
import sys
from contextlib import ExitStack
from pathlib import Path

from rich.console import Console

from tools.bench import measure, report, targets
from tools.bench.kinds import KINDS, ORDINARY
from tools.bench.packed import THREADS
from tools.bench.records import Record, Row, machine
from tools.bench.sides import BEFORE, Side, run
from tools.bench.tasks import SLOW


def main() -> int:
    """Run the chosen tasks, and print, write and draw the results."""
    options = _options()
    if options.kind == "packed":  # before anything counts the processors
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:THREADS])
    console = Console(width=None if sys.stdout.isatty() else 120)
    with ExitStack() as stack:
        place = stack.enter_context(measure.temporary_folder(options.directory))
        sides = [stack.enter_context(side) for side in _sides(options, place, console)]
        facts = [side.call("facts") for side in sides]
        for side, fact in zip(sides, facts, strict=True):
            console.print(f"varstore{side.suffix}: {fact['version']}, Python {fact['python']}, {fact['path']}")
        rows: dict[str, Row] = {}
        for task in KINDS[options.kind].tasks:
            if _wanted(task, options):
                row = run(task, sides, options.rounds)
                if row.figures:
                    rows[task] = row
                    report.print_row(console, task, row)
        facts_of_machine = machine(place)
    found = targets.check(
        {task: {name: figure.median for name, figure in r.figures.items()} for task, r in rows.items()}
    )
    if options.against:
        report.print_comparison(console, rows)
    elif not options.quick:
        report.print_targets(console, found)
    if options.json:
        own, *other = ({key: value for key, value in fact.items() if key != "path"} for fact in facts)
        record = Record(
            **own,
            date=datetime.date.today().isoformat(),
            scale=options.scale,
            rounds=options.rounds,
            machine=facts_of_machine,
            rows=rows,
            targets=found,
            against=other[0] if other else None,
        )
        Path(options.json).write_text(record.as_json(), encoding="utf-8")
    if options.chart:
        report.draw(options.chart, rows)
    return 0


def _sides(options: argparse.Namespace, place: str, console: Console) -> list[Side]:
    """Start the environments; the earlier one does not run peers."""
    shared = {"scale": options.scale, "kind": options.kind, "readies_memory": not options.quick}
    chosen = ["varstore", *options.peer] if options.peer or options.against else None
    own_only = options.against is not None and not options.peer
    sides = [Side(None, os.path.join(place, "now"), console.print, own_only=own_only, peers=chosen, **shared)]
    if options.against:
        path = os.path.join(place, "before")
        shared |= {"own_only": True, "peers": ["varstore"], "suffix": BEFORE}
        sides.append(Side(options.against, path, console.print, **shared))
    return sides


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tools.bench", description=__doc__)
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a quick run: an eighth of the size, one round, without preparing memory and without tasks that wait",
    )
    parser.add_argument("--scale", type=float, help="size of the workloads; 1 means that `large` is 1 GiB")
    parser.add_argument("--rounds", type=int, help="how often each candidate runs each task, one of seconds once")
    parser.set_defaults(kind=ORDINARY)
    kind = parser.add_mutually_exclusive_group()
    for name, what in (
        ("packed", "packed checkpoints of trained weights"),
        ("distributed", "checkpoints that two processes save and load together"),
    ):
        kind.add_argument(f"--{name}", dest="kind", action="store_const", const=name, help=f"measure {what}")
    parser.add_argument("--task", action="append", help="only tasks whose name contains this text; may be repeated")
    parser.add_argument("--peer", action="append", default=[], help="only this peer and varstore; may be repeated")
    parser.add_argument(
        "--against",
        metavar="PYTHON",
        help="an interpreter whose varstore takes turns at the same tasks; peers take part only if --peer names them",
    )
    parser.add_argument("--directory", help="where to write (default: the system's temporary folder)")
    parser.add_argument("--json", metavar="FILE", help="write all figures to this file, as in tools/bench/results")
    parser.add_argument("--chart", metavar="FILE", help="draw a chart to this PNG file")
    options = parser.parse_args()
    if options.against:
        python = shutil.which(options.against)
        if python is None:
            parser.error(f"--against: no such program: {options.against}")
        options.against = os.path.abspath(python)
    options.scale = options.scale or (0.125 if options.quick else 0.25 if options.against else 1.0)
    options.rounds = options.rounds or (5 if not options.quick else 3 if options.against else 1)
    return options


def _wanted(task: str, options: argparse.Namespace) -> bool:
    if options.task:
        return any(text in task for text in options.task)
    return not options.quick or task not in SLOW


if __name__ == "__main__":
    raise SystemExit(main())
