"""The table of targets, which are ratios within one run; to add one, add a row."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

from tools.bench.trained import TRAINED

Results = Mapping[str, Mapping[str, float]]
"""Maps tasks to candidates to medians, in seconds, or in bytes for tasks that measure memory."""

LIMIT = "limit: "
"""The prefix of the names of candidates that are limits of the machine, not libraries."""
MIB = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Target:
    """One target: `value` of the results is at most `most`.

    `bound` names the candidate that does the same work without a library; its ratio to `to` is printed too.
    """

    what: str
    task: str
    value: Callable[[Results], float]
    most: float
    unit: str = "×"
    bound: str | None = None
    to: str = ""


def _ratio(task: str, of: str, to: str) -> Callable[[Results], float]:
    return lambda results: results[task][of] / results[task][to]


def _to(
    task: str, to: str, most: float, what: str | None = None, of: str = "varstore", bound: str | None = None
) -> Target:
    return Target(what=what or f"{task} / {to}", task=task, value=_ratio(task, of, to), most=most, bound=bound, to=to)


def _of_fastest(task: str, names: tuple[str, ...]) -> Callable[[Results], float]:
    return lambda results: results[task]["varstore"] / min(results[task][name] for name in names)


def _extra_seconds(results: Results) -> float:
    return results["import"]["varstore"] - results["import"]["limit: numpy"]


def _durable_small(results: Results) -> float:
    bare, synced = results["save small"], results["save small, durable"]
    sync = max(0.0, synced["limit: system calls + one sync"] - bare["limit: system calls"])
    return synced["varstore"] / (2 * bare["varstore"] + sync)


_COLD_READS = ("limit: buffered read", "limit: one thread's read", "limit: direct read")


def _of_packed(workload: str) -> Iterator[Target]:
    """Yield what packing is to reach: `small` takes no more space than others, `fast` is loaded faster."""
    task = f"size of {workload}, packed"
    for peer in ("Orbax", "zarr-python, default"):
        yield _to(task, peer, 1.0, of="varstore, small")
    task = f"load {workload}, packed"
    for peer in ("safetensors + zstd -3", "Orbax", "zarr-python, default", "ZipNN"):
        yield _to(task, peer, 1.0, of="varstore, fast")


TARGETS: tuple[Target, ...] = (
    _to("save large", "safetensors", 0.75, bound="limit: parallel write"),
    _to("save large", "limit: parallel write", 1.25),
    _to("save gpt2", "safetensors", 0.75, bound="limit: parallel write"),
    _to("save gpt2", "limit: parallel write", 1.25),
    _to(
        "save large, durable",
        "safetensors",
        0.25,
        "save large, durable / safetensors + fsync",
        bound="limit: direct write",
    ),
    _to("save large, durable", "limit: direct write", 1 / 0.85),
    _to("load large", "safetensors", 0.30, bound="limit: parallel read"),
    _to("load large", "limit: parallel read", 1.3),
    _to("load large into arrays", "safetensors", 0.20, bound="limit: parallel read"),
    _to("load large into arrays", "limit: memory copy", 1.5, bound="limit: parallel read"),
    _to("load large, cold", "safetensors", 0.75, bound="limit: buffered read"),
    Target(
        what="load large, cold / fastest plain read",
        task="load large, cold",
        value=_of_fastest("load large, cold", _COLD_READS),
        most=1 / 0.8,
    ),
    _to("open small, read 10", "safetensors", 0.7),
    _to("save small", "limit: system calls", 1.25),
    _to("save small", "Orbax", 0.15, bound="limit: system calls"),
    _to("save small", "TensorStore zarr3", 0.25, bound="limit: system calls"),
    _to("save small", "zarr-python", 0.05, bound="limit: system calls"),
    Target(
        what="save small, durable / (2 × not durable + one sync)",
        task="save small, durable",
        value=_durable_small,
        most=1.0,
    ),
    _to("load small", "safetensors", 1.3, bound="limit: system calls"),
    _to("save lora", "varstore, whole", 0.3, "save lora with base= / whole", of="varstore, base="),
    _to(
        "compose gpt2",
        "varstore, whole",
        0.05,
        "compose gpt2 of links / save",
        of="varstore, links",
        bound="limit: system calls",
    ),
    _to(
        "compose gpt2, not durable",
        "varstore, whole",
        0.05,
        "compose gpt2 of links / save, not durable",
        of="varstore, links",
        bound="limit: system calls",
    ),
    _to("save_async large", "limit: memory copy", 1.3, "save_async large, until it returns / memory copy"),
    Target(
        what="memory beside the arrays, save large",
        task="memory, save large",
        value=lambda results: results["memory, save large"]["varstore"] / MIB,
        most=64,
        unit=" MiB",
    ),
    Target(
        what="memory beside the result, load large",
        task="memory, load large",
        value=lambda results: results["memory, load large"]["varstore"] / MIB,
        most=64,
        unit=" MiB",
    ),
    _to("save resnet", "limit: system calls", 1.25),
    _to("save lm", "limit: parallel write", 1.25),
    _to("open safetensors, 20,000 names", "safetensors", 3.0),
    _to("open safetensors, 200,000 names", "safetensors", 3.0),
    Target(
        what="4 KiB of safetensors, bytes read",
        task="4 KiB of safetensors, bytes read",
        value=lambda results: results["4 KiB of safetensors, bytes read"]["varstore"] / MIB,
        most=1,
        unit=" MiB",
    ),
    Target(what="import varstore - import numpy", task="import", value=_extra_seconds, most=0.060, unit=" s"),
    Target(
        what="varstore ls of small, whole process",
        task="ls small",
        value=lambda results: results["ls small"]["varstore ls"],
        most=0.5,
        unit=" s",
    ),
    *chain.from_iterable(map(_of_packed, TRAINED)),
    _to("save large, rows", "limit: bare calls", 1.3),
    _to("save large, rows", "torch DCP", 1.0, bound="limit: bare calls"),
    _to("save large, rows", "Hugging Face, consolidated", 0.25, bound="limit: bare calls"),
    _to("save large, rows, durable", "Hugging Face, consolidated", 0.25, bound="limit: bare calls"),
    _to("load large, rows as columns", "torch DCP", 1 / 3, bound="limit: bare calls"),
    _to("load large, rows as whole", "torch DCP", 1 / 3, bound="limit: bare calls"),
    _to("save shards", "torch DCP", 1.5, bound="limit: bare calls"),
    _to("save shards, durable", "torch DCP", 2.5, bound="limit: bare calls"),
)


def check(results: Results) -> list[dict[str, Any]]:
    """Return each target for which there are results, with its value and whether it is met."""
    rows = []
    for target in TARGETS:
        try:
            value = target.value(results)
        except KeyError:
            continue
        met = value <= target.most
        medians = results[target.task]
        bound = medians[target.bound] / medians[target.to] if target.bound and target.bound in medians else None
        rows.append(
            {
                "what": target.what,
                "value": value,
                "most": target.most,
                "unit": target.unit,
                "met": met,
                "bound": bound,
                "bound is": target.bound,
            }
        )
    return rows
