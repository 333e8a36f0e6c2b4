"""Print the figures for README from the newest record: ``python -m tools.bench.figures``.

``python -m tools.bench.figures RECORD`` first keeps this record, which ``python -m tools.bench --json RECORD`` writes,
as that of its version, and replaces the figures in README. A test checks that README has them. Those of runs with
``--packed`` and ``--distributed`` are kept and quoted apart, and are printed too.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from tools import readme
from tools.bench.kinds import KINDS, ORDINARY
from tools.bench.packing import RAW
from tools.bench.records import RESULTS, Record, newest
from tools.bench.targets import LIMIT
from tools.bench.trained import TRAINED

ROWS = {
    "save large": "save `large` (1 GiB), not durable",
    "save large, durable": "save `large`, durable",
    "save large, durable, new memory": "save `large`, durable, after the host reclaimed free memory",
    "load large": "load `large` into new memory",
    "load large into arrays": "load `large` into arrays",
    "load large, cold": "load `large`, page cache dropped",
    "save gpt2": "save `gpt2` (0.5 GB, 148 variables), not durable",
    "load gpt2": "load `gpt2`",
    "save lm, durable": "save `lm` (1.0 GB in bfloat16, 291 variables), durable",
    "load lm": "load `lm`",
    "save resnet, durable": "save `resnet` (16 MB, 626 variables), durable",
    "load resnet": "load `resnet`",
    "save small": "save `small` (10,000 of 4 KiB), not durable",
    "load small": "load `small`",
    "open small, read 10": "open `small`, read 10",
    "open safetensors, 20,000 names": "open a safetensors file of 20,000 names",
    "open safetensors, 200,000 names": "open a safetensors file of 200,000 names",
    "4 KiB of safetensors": "read 4 KiB of 1 GiB in a safetensors file",
}
"""Maps tasks to their names in README."""
COLUMNS = {
    "varstore": "varstore",
    "safetensors": "safetensors",
    "numpy.savez": "numpy.savez",
    "torch.save": "torch.save",
    "TensorStore zarr3": "TensorStore",
    "zarr-python": "zarr-python",
    "Orbax": "Orbax",
    "plain loop": "plain loop",
}
SHARDED_ROWS = {
    "save large, rows": "save 1 GiB, split by rows, not durable",
    "save large, rows, durable": "save 1 GiB, split by rows, durable",
    "save large, columns": "save 1 GiB, split by columns, not durable",
    "load large, rows": "load 1 GiB, as it was split",
    "load large, rows as columns": "load rows of 1 GiB as columns",
    "load large, rows as whole": "load 1 GiB that two processes saved in one",
    "save shards": "save 3,000 variables of 4 KiB, not durable",
    "save shards, durable": "save 3,000 variables of 4 KiB, durable",
    "load shards": "load 3,000 variables of 4 KiB",
}
SHARDED_COLUMNS = {
    "varstore": "varstore",
    "torch DCP": "torch DCP",
    "Hugging Face, sharded": "Hugging Face, sharded",
    "Hugging Face, consolidated": "consolidated",
}
BESIDE = {
    "save_async large, until it returns / memory copy": "`save_async` of `large` returns after {} a plain memory copy",
    "save lora with base= / whole": "`gpt2` with 5 % of its bytes changed, saved with `base=`: {} a whole save",
    "compose gpt2 of links / save": "`gpt2` composed of links to two checkpoints: {} a whole save",
    "import varstore - import numpy": "`import varstore`: {} beyond numpy's",
    "varstore ls of small, whole process": "`varstore ls` of `small`, as a process: {}",
    "4 KiB of safetensors, bytes read": "read for 4 KiB of 1 GiB in a safetensors file: {}",
    "memory beside the arrays, save large": "memory beside the arrays for a save of `large`: {}",
    "memory beside the result, load large": "memory beside the result for a load of `large`: {}",
}
"""Maps targets to the sentences for their results."""


def main(arguments: Sequence[str] | None = None, *, results: Path = RESULTS, quoting: Path = readme.README) -> int:
    """Print the figures, after taking a new record if there is one."""
    parser = argparse.ArgumentParser(prog="python -m tools.bench.figures", description=__doc__)
    parser.add_argument("record", nargs="?", type=Path)
    path = parser.parse_args(arguments).record
    if path is not None:
        record = Record.parse(path.read_text(encoding="utf-8"))
        name = next(name for name, kind in KINDS.items() if record.rows.keys() <= kind.tasks.keys())
        folder, shown = kept(results)[name]
        folder.mkdir(exist_ok=True)
        (folder / f"{record.version}.json").write_text(record.as_json(), encoding="utf-8")
        readme.quote(name, shown(newest(folder)), quoting)
    for folder, shown in kept(results).values():
        if folder.is_dir():
            print(shown(newest(folder)), end="")
    return 0


def kept(results: Path) -> dict[str, tuple[Path, Callable[[Record], str]]]:
    """Return where the records of each kind are kept, and what shows them, by the name of what README quotes."""
    shown = {"packed": packed_figures, "distributed": distributed_figures}
    return {ORDINARY: (results, figures), **{name: (results / name, shows) for name, shows in shown.items()}}


def figures(record: Record) -> str:
    """Return a caption, the table of times, and the other ratios and amounts, as Markdown."""
    return "\n".join([_caption(record), "", *_table(record, ROWS, COLUMNS), "", *_beside(record), ""])


def packed_figures(record: Record) -> str:
    """Return a caption and the table of packed checkpoints: three figures in each cell, one per workload."""
    what = "In each cell: weights in float32, the same in bfloat16, and moments of Adam in float32."
    return "\n".join([_caption(record, " --packed"), what, "", *_packed_table(record), ""])


def distributed_figures(record: Record) -> str:
    """Return a caption and the table of times of checkpoints that several processes save and load together."""
    table = _table(record, SHARDED_ROWS, SHARDED_COLUMNS)
    return "\n".join([_caption(record, " --distributed"), "", *table, ""])


def _packed_table(record: Record) -> Iterator[str]:
    yield "||stored / raw|packing, GB/s|loading, GB/s|4 KiB of a variable, ms|"
    yield "|---" * 5 + "|"
    sizes = {workload: record.rows[f"size of {workload}, packed"].figures for workload in TRAINED}
    raw = {workload: figures[RAW].median for workload, figures in sizes.items()}
    for peer in (name for name in next(iter(sizes.values())) if name != RAW):

        def cell(form: str, task: str, value: Callable[[str, float], float], peer: str = peer) -> str:
            rows = {workload: record.rows[task.format(workload)].figures for workload in TRAINED}
            return ", ".join(
                format(value(workload, row[peer].median), form) if peer in row else "–"
                for workload, row in rows.items()
            )

        cells = (
            cell(".2f", "size of {}, packed", lambda workload, nbytes: nbytes / raw[workload]),
            cell(".2f", "pack {}", lambda workload, seconds: raw[workload] / seconds / 1e9),
            cell(".2f", "load {}, packed", lambda workload, seconds: raw[workload] / seconds / 1e9),
            cell(".1f", "slice of {}, packed", lambda _, seconds: seconds * 1e3),
        )
        yield "|".join(["", peer, *cells, ""])


def _caption(record: Record, options: str = "") -> str:
    machine = record.machine
    disk = f", {machine['file system']}" if "file system" in machine else ""
    python = f", Python {record.python}" if record.python else ""
    return (
        f"varstore {record.version}{python}; {machine['system']}, {machine['processors']} processors{disk};\n"
        f"`python -m tools.bench{options} --rounds {record.rounds}` on {record.date}."
    )


def _table(record: Record, tasks: Mapping[str, str], peers: Mapping[str, str]) -> Iterator[str]:
    """Yield the lines of the table: a column per candidate that took part, a row per task that was run."""
    rows = {title: record.rows[task].figures for task, title in tasks.items() if task in record.rows}
    columns = {name: title for name, title in peers.items() if any(name in row for row in rows.values())}
    yield "|".join(["", "seconds, median", *columns.values(), "limit", ""])
    yield "|---" * (len(columns) + 2) + "|"
    for title, row in rows.items():
        limits = [figure.median for name, figure in row.items() if name.startswith(LIMIT)]
        medians = [row[name].median if name in row else None for name in columns]
        cells = [_seconds(median) for median in (*medians, min(limits, default=None))]
        yield "|".join(["", title, *cells, ""])


def _seconds(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.3f}" if value >= 0.0005 else f"{value:.{-math.floor(math.log10(value))}f}"


def _beside(record: Record) -> Iterator[str]:
    found = {target["what"]: target for target in record.targets}
    for what, words in BESIDE.items():
        if what in found:
            value, unit = found[what]["value"], found[what]["unit"]
            amount = f"{value:.1f} MiB" if unit == " MiB" else f"{value:.2f}{unit}".replace("×", " ×")
            yield f"- {words.format(amount)}"


if __name__ == "__main__":
    raise SystemExit(main())
