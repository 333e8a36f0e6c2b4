"""Measure varstore against what people would use instead, and against the machine: ``python -m tools.bench``.

Every ratio comes from one run, its candidates in turn. The peers that are installed take part:
pip install safetensors torch zarr tensorstore orbax-checkpoint jax matplotlib
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
from collections.abc import Callable
from functools import partial

from rich.console import Console

from tools.bench import measure, report, targets, tasks
from tools.bench.peers import PEERS
from tools.bench.tasks import Bench

TASKS: dict[str, Callable[[Bench], dict[str, measure.Timing]]] = {
    "import": partial(tasks.import_time, workload=""),
    "save large": partial(tasks.save, workload="large"),
    "save large, durable": partial(tasks.save_durable, workload="large"),
    "save_async large": partial(tasks.save_async, workload="large"),
    "load large": partial(tasks.load, workload="large"),
    "load large into arrays": partial(tasks.load_into, workload="large"),
    "row of large": partial(tasks.row, workload="large"),
    "save gpt2": partial(tasks.save, workload="gpt2"),
    "load gpt2": partial(tasks.load, workload="gpt2"),
    "save lora": partial(tasks.save_with_base, workload="lora"),
    "compose gpt2": partial(tasks.compose, workload="gpt2"),
    "compose gpt2, not durable": partial(tasks.compose, workload="gpt2", durable=False),
    "load small": partial(tasks.load, workload="small"),
    "open small, read 10": partial(tasks.open_some, workload="small"),
    "ls small": partial(tasks.list_names, workload="small"),
    "save small": partial(tasks.save, workload="small"),
    "save small, durable": partial(tasks.save_durable, workload="small"),
    "save large, durable, new memory": partial(tasks.save_durable, workload="large", memory_is_new=True),
    "load large, cold": partial(tasks.load_cold, workload="large"),
}
MEMORY = {
    "memory, save large": partial(tasks.memory, workload="large", verb="save"),
    "memory, load large": partial(tasks.memory, workload="large", verb="load"),
}


def main() -> int:
    """Run the tasks asked for and print, write and draw what was found."""
    options = _options()
    console = Console(width=None if sys.stdout.isatty() else 120)
    peers = []
    for peer in PEERS:
        missing = peer.missing()
        if missing:
            console.print(f"left out: {peer.name}: {missing} is not installed")
        elif not options.peer or peer.name in ["varstore", *options.peer]:
            peers.append(peer())
    place = measure.Place(options.directory)
    bench = Bench(
        place=place,
        scale=options.scale,
        rounds=options.rounds,
        peers=peers,
        readies_memory=not options.quick,
        log=console.print,
    )
    results: dict[str, dict[str, float]] = {}
    spread: dict[str, dict[str, list[float]]] = {}
    try:
        for name, task in TASKS.items():
            if _wanted(name, options.task):
                timings = task(bench)
                report.print_timings(console, name, timings)
                results[name] = {candidate: timing.median for candidate, timing in timings.items()}
                spread[name] = {candidate: timing.seconds for candidate, timing in timings.items()}
                gc.collect()
        for name, peaks in MEMORY.items():
            if _wanted(name, options.task):
                results[name] = peaks(bench)
                report.print_memory(console, name, results[name])
    finally:
        place.remove()
    rows = targets.check(results)
    if not options.quick:
        report.print_targets(console, rows)
    if options.json:
        record = {"median": results, "rounds": spread}
        report.write_json(options.json, record, rows, options.scale)
    if options.chart:
        report.draw(options.chart, results)
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tools.bench", description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="a first look: an eighth of the size, one round, memory as it is"
    )
    parser.add_argument("--scale", type=float, help="size of the workloads (1: large is 1 GiB)")
    parser.add_argument("--rounds", type=int, help="how often each candidate runs at each task")
    parser.add_argument("--task", action="append", help="only tasks whose name holds this text; may be repeated")
    parser.add_argument("--peer", action="append", help="only this peer beside varstore; may be repeated")
    parser.add_argument("--directory", help="where to write (default: the system's temporary folder)")
    parser.add_argument("--json", help="write all figures to this file")
    parser.add_argument("--chart", help="draw them to this PNG file")
    options = parser.parse_args()
    options.scale = options.scale or (0.125 if options.quick else 1.0)
    options.rounds = options.rounds or (1 if options.quick else 5)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    return options


def _wanted(name: str, chosen: list[str] | None) -> bool:
    return not chosen or any(text in name for text in chosen)


if __name__ == "__main__":
    raise SystemExit(main())
