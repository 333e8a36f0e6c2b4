"""The tasks: one function per task, which returns the race of all candidates and limits.

Only public functions of varstore are called, so that the same tasks run with an earlier version.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

import varstore
from tools.bench import limits, measure
from tools.bench.measure import Place, Prepared
from tools.bench.peers import Peer, PlainLoop, Varstore
from tools.bench.workloads import MOSTLY_CALLS, WORKLOADS, Arrays

Candidates = dict[str, Callable[[], Prepared]]
_MEMORY_MATTERS_FROM = 64 << 20
"""The size in bytes from which memory is prepared for a workload."""
_MEMORY_USED = 3
"""The memory that a candidate uses, in sizes of the workload: the arrays, the page cache and a copy."""


def nothing() -> None:
    """Do nothing."""


@dataclass(frozen=True, slots=True)
class Race:
    """The candidates of one task: functions that prepare it and return the function that is timed.

    If `unit` is "B", that function returns the number of bytes instead, and runs once. `settle` runs after each
    candidate; by default, it frees the space of what was written. `nbytes` is the size of arrays in other processes.
    """

    candidates: Candidates
    settle: Callable[[], None] | None = None
    unit: str = "s"
    readies_memory: bool = True
    repeats: bool = True
    nbytes: int = 0
    afterwards: Callable[[], None] = nothing


@dataclass(kw_only=True)
class Bench:
    """What the tasks of one run share: the place, the scale, and the peers."""

    place: Place
    scale: float
    peers: list[Peer]
    readies_memory: bool
    log: Callable[[str], None]
    _arrays: dict[str, Arrays] = field(default_factory=dict)
    saved_at: dict[tuple[str, str], str] = field(default_factory=dict)

    def arrays(self, workload: str) -> Arrays:
        """Return a workload; only one is kept in memory at a time."""
        if workload not in self._arrays:
            self._arrays.clear()
            self._arrays[workload] = WORKLOADS[workload](self.scale)
        return self._arrays[workload]

    def saved(self, peer: Peer, workload: str) -> str:
        """Return the path at which a peer has saved a workload; it saves each once."""
        key = (peer.name, workload)
        if key not in self.saved_at:
            self.saved_at[key] = self.place.fresh(keep=True)
            peer.save(self.saved_at[key], self.arrays(workload))
            self.place.settle()
        return self.saved_at[key]

    def measure(self, race: Race, name: str) -> float:
        """Measure one candidate once; for large workloads, memory is prepared first."""
        prepare = race.candidates[name]
        if race.unit == "B":
            value = float(prepare()())
        else:
            if race.readies_memory and self.readies_memory:
                nbytes = race.nbytes or sum(a.nbytes for arrays in self._arrays.values() for a in arrays.values())
                if nbytes >= _MEMORY_MATTERS_FROM:
                    prepare = _then_once(prepare, partial(measure.ready_memory, _MEMORY_USED * nbytes))
            value = measure.seconds(prepare, repeats=race.repeats)
        (race.settle or self.place.settle)()
        return value

    def forget(self) -> None:
        """Drop the page cache."""
        measure.forget(self.place.path)

    def unready_memory(self) -> None:
        """Drop the page cache, and wait until a host has taken back free memory."""
        self.forget()
        time.sleep(measure.TOLD_AFTER)

    def able(self, verb: str) -> list[Peer]:
        """Return the peers that have a method."""
        return [peer for peer in self.peers if getattr(type(peer), verb) is not getattr(Peer, verb)]

    def loadable(self, workload: str, verb: str) -> dict[str, tuple[Peer, str]]:
        """Return the peers that have a method, with the path at which each saved the workload."""
        able = {}
        for peer in self.able(verb):
            try:
                able[peer.name] = (peer, self.saved(peer, workload))
            except Exception as error:  # a peer that cannot store the workload
                self.log(f"left out: {peer.name}: {type(error).__name__}: {error}")
        return able


def at_fresh(bench: Bench, write: Callable[[str], Any]) -> Callable[[], Prepared]:
    return lambda: partial(write, bench.place.fresh())


def save(bench: Bench, workload: str) -> Race:
    arrays = bench.arrays(workload)
    candidates: Candidates = {
        peer.name: at_fresh(bench, partial(lambda p, path: p.save(path, arrays), peer)) for peer in bench.peers
    }
    if workload in MOSTLY_CALLS:
        candidates["limit: system calls"] = at_fresh(bench, lambda path: limits.bare_calls(path, arrays))
    else:
        candidates["limit: parallel write"] = at_fresh(bench, lambda path: limits.parallel_write(path, arrays))
    return Race(candidates)


def save_durable(bench: Bench, workload: str, *, memory_is_new: bool = False) -> Race:
    """Save durably; with `memory_is_new`, after the host has taken back all free memory, as after a long pause."""
    arrays = bench.arrays(workload)
    candidates: Candidates = {
        peer.name: at_fresh(bench, partial(lambda p, path: p.save_durable(path, arrays), peer))
        for peer in bench.peers
        if workload != "small" or isinstance(peer, Varstore)
    }
    if workload in MOSTLY_CALLS:
        candidates["limit: system calls + one sync"] = at_fresh(bench, partial(_calls_and_sync, arrays))
    else:
        candidates["limit: direct write"] = at_fresh(bench, lambda path: limits.direct_write(path, arrays))
    if memory_is_new:
        candidates = {name: _then(candidate, bench.unready_memory) for name, candidate in candidates.items()}
    return Race(candidates, readies_memory=not memory_is_new, repeats=not memory_is_new)


def _then(candidate: Callable[[], Prepared], step: Callable[[], None]) -> Callable[[], Prepared]:
    """Return the candidate with a step after its preparation, which is not timed."""

    def prepare() -> Prepared:
        timed = candidate()
        step()
        return timed

    return prepare


def _then_once(candidate: Callable[[], Prepared], step: Callable[[], None]) -> Callable[[], Prepared]:
    """Return the candidate with a step after its first preparation only."""
    steps = [step]
    return _then(candidate, lambda: steps.pop()() if steps else None)


def _calls_and_sync(arrays: Arrays, path: str) -> None:
    limits.bare_calls(path, arrays)
    limits.flush(path)


def load(bench: Bench, workload: str) -> Race:
    arrays = bench.arrays(workload)
    candidates: Candidates = {
        name: partial(lambda p, at: lambda: p.load(at), peer, path)
        for name, (peer, path) in bench.loadable(workload, "load").items()
    }
    if workload in MOSTLY_CALLS:
        layout = bench.saved(Varstore(), workload)
        candidates["limit: system calls"] = lambda: lambda: limits.bare_reads(layout, arrays)
    else:
        plain = bench.place.fresh(keep=True)
        limits.parallel_write(plain, arrays)
        candidates["limit: parallel read"] = lambda: lambda: limits.parallel_read(plain, arrays)
        read_all(plain)
    _warm(bench, workload, "load")
    return Race(candidates, settle=nothing)


def load_into(bench: Bench, workload: str) -> Race:
    arrays = bench.arrays(workload)
    targets = _used_like(arrays)
    candidates: Candidates = {
        name: partial(lambda p, at: lambda: p.load_into(at, targets), peer, path)
        for name, (peer, path) in bench.loadable(workload, "load_into").items()
    }
    candidates["limit: memory copy"] = lambda: lambda: limits.memory_copy(arrays, targets)
    plain = bench.place.fresh(keep=True)
    limits.parallel_write(plain, arrays)
    candidates["limit: parallel read"] = lambda: lambda: limits.read_into(plain, targets)
    read_all(plain)
    _warm(bench, workload, "load_into")
    return Race(candidates, settle=nothing)


def load_cold(bench: Bench, workload: str) -> Race:
    arrays = bench.arrays(workload)
    plain = bench.place.fresh(keep=True)
    limits.parallel_write(plain, arrays)
    bench.place.settle()
    targets = _used_like(arrays)
    aligned = limits.aligned_like(arrays)

    def cold(timed: Prepared) -> Callable[[], Prepared]:
        return _then(lambda: timed, bench.forget)

    candidates: Candidates = {
        name: cold(partial(peer.load, path))
        for name, (peer, path) in bench.loadable(workload, "load").items()
        if name in ("varstore", "safetensors", "torch.save", "numpy.savez", "plain loop")
    }
    candidates["limit: buffered read"] = cold(lambda: limits.read_into(plain, targets))
    candidates["limit: one thread's read"] = cold(lambda: limits.read_into(plain, targets, workers=1))
    candidates["limit: direct read"] = cold(lambda: limits.read_into(plain, aligned, direct=True))
    return Race(candidates, settle=nothing, repeats=False)


def open_some(bench: Bench, workload: str) -> Race:
    names = list(bench.arrays(workload))
    chosen = names[:: max(1, len(names) // 10)][:10]
    candidates: Candidates = {
        name: partial(lambda p, at: lambda: p.load_some(at, chosen), peer, path)
        for name, (peer, path) in bench.loadable(workload, "load_some").items()
    }
    return Race(candidates, settle=nothing)


def row(bench: Bench, workload: str) -> Race:
    name = next(iter(bench.arrays(workload)))
    candidates: Candidates = {
        peer_name: partial(lambda p, at: lambda: p.row(at, name, 1000), peer, path)
        for peer_name, (peer, path) in bench.loadable(workload, "row").items()
    }
    return Race(candidates, settle=nothing)


def save_with_base(bench: Bench) -> Race:
    before = bench.place.fresh(keep=True)
    varstore.save(before, bench.arrays("gpt2"))
    arrays = bench.arrays("lora")
    bench.place.settle()

    def with_base(path: str) -> None:
        varstore.save(path, arrays, base=before)

    def whole(path: str) -> None:
        varstore.save(path, arrays)

    def count() -> None:
        path = bench.place.fresh()
        with_base(path)
        written = sum(
            os.stat(os.path.join(path, name, "out")).st_size
            for name in arrays
            if os.stat(os.path.join(path, name, "out")).st_nlink == 1
        )
        unchanged = varstore.diff(before, path).unchanged
        changed = sum(array.nbytes for name, array in arrays.items() if name not in unchanged)
        bench.log(f"base=: {written:,} bytes written of {changed:,} changed")

    candidates = {"varstore, base=": at_fresh(bench, with_base), "varstore, whole": at_fresh(bench, whole)}
    return Race(candidates, afterwards=count)


def compose(bench: Bench, workload: str, *, durable: bool = True) -> Race:
    """Save a checkpoint of links to two others and, for comparison, one of the same values."""
    arrays = bench.arrays(workload)
    first, second = bench.place.fresh(keep=True), bench.place.fresh(keep=True)
    a, b = (varstore.save(path, arrays, durable=False) for path in (first, second))
    bench.place.settle()
    variables = {name: (a if i % 2 else b)[name] for i, name in enumerate(arrays)}
    roots = {name: first if i % 2 else second for i, name in enumerate(arrays)}

    def bare(path: str) -> None:
        limits.bare_links(path, roots)
        if durable:
            limits.flush(path)

    return Race(
        {
            "varstore, links": at_fresh(bench, lambda path: varstore.save(path, variables, durable=durable)),
            "varstore, whole": at_fresh(bench, lambda path: varstore.save(path, arrays, durable=durable)),
            "limit: system calls": at_fresh(bench, bare),
        }
    )


def save_async(bench: Bench, workload: str) -> Race:
    """Time until `save_async` returns, with a buffer that exists already, as in every save but the first."""
    arrays = bench.arrays(workload)
    targets = _used_like(arrays)
    pending: list[Any] = []

    def start(path: str) -> None:
        pending.append(varstore.save_async(path, arrays, durable=False))

    def settle() -> None:
        while pending:
            pending.pop().wait()
        bench.place.settle()

    start(bench.place.fresh())
    settle()
    candidates: Candidates = {
        "varstore": at_fresh(bench, start),
        "limit: memory copy": lambda: lambda: limits.memory_copy(arrays, targets),
    }
    return Race(candidates, settle=settle, repeats=False)


def import_time(bench: Bench) -> Race:
    commands = {"varstore": ("-c", "import varstore"), "limit: numpy": ("-c", "import numpy")}
    return _processes(bench, commands)


def list_names(bench: Bench, workload: str) -> Race:
    path = bench.saved(Varstore(), workload)
    return _processes(bench, {"varstore ls": ("-m", "varstore", "ls", path)})


def _processes(bench: Bench, commands: Mapping[str, tuple[str, ...]]) -> Race:
    """Time whole processes, whose modules are compiled already."""
    cache = os.path.join(bench.place.path, "bytecode")
    runs = {name: partial(measure.whole_process, cache, *command) for name, command in commands.items()}
    for run in runs.values():
        run()
    return Race({name: partial(partial, run) for name, run in runs.items()}, settle=nothing)


def open_foreign(bench: Bench, names: int) -> Race:
    """Open a safetensors file of many names and list them."""
    path = _foreign(bench, {f"layer{i:06d}.weight": (8,) for i in range(max(10, round(names * bench.scale)))})
    peers = bench.able("foreign_names")
    for peer in peers:  # so that imports are not timed
        peer.foreign_names(_foreign(bench, _TINY))
    return Race({peer.name: partial(partial, peer.foreign_names, path) for peer in peers}, settle=nothing)


def foreign_row(bench: Bench, *, reads: bool = False) -> Race:
    """Read 4 KiB of a tensor of 1 GiB in a safetensors file; with `reads`, count the bytes that are read."""
    path = _foreign(bench, {"weight": (max(1001, round(262_144 * bench.scale)), 1024)})
    peers = bench.able("foreign_row")
    for peer in peers:
        peer.foreign_row(_foreign(bench, _TINY), "weight", 0)
    rows = {peer.name: partial(peer.foreign_row, path, "weight", 1000) for peer in peers}
    if reads:
        counted: Candidates = {name: partial(partial, measure.bytes_read, row) for name, row in rows.items()}
        return Race(counted, settle=nothing, unit="B")
    return Race({name: partial(partial, row) for name, row in rows.items()}, settle=nothing)


_TINY = {"weight": (1, 8)}


def _foreign(bench: Bench, shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Return a safetensors file of repeating float32 values, written without the library, which may be missing."""
    path = bench.place.fresh(keep=True)
    block = np.random.default_rng(0).standard_normal(1 << 20, np.float32)
    header, offset = {}, 0
    for name, shape in shapes.items():
        end = offset + 4 * int(np.prod(shape))
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for start in range(0, offset, block.nbytes):
            file.write(block.data.cast("B")[: offset - start])
    return path


def memory(bench: Bench, workload: str, verb: str) -> Race:
    """Measure the peak of extra bytes of each peer in its own process; the result of a load is not counted."""

    def peak(peer: Peer) -> float:
        path = bench.place.fresh() if verb == "save" else bench.saved(peer, workload)
        command = [sys.executable, "-m", "tools.bench.peak", peer.name, verb, workload, str(bench.scale), path]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(done.stderr.strip().splitlines()[-1:])
        return float(done.stdout.split()[-1])

    peers = [peer for peer in bench.able(verb) if not isinstance(peer, PlainLoop)]
    return Race({peer.name: partial(partial, peak, peer) for peer in peers}, unit="B")


def _warm(bench: Bench, workload: str, verb: str) -> None:
    bench.place.settle()
    for _, path in bench.loadable(workload, verb).values():
        read_all(path)


def read_all(path: str) -> None:
    """Read everything into the page cache, as far as it fits."""

    def read(part: list[str]) -> None:
        for file in part:
            with open(file, "rb", buffering=0) as opened:
                while opened.read(1 << 24):
                    pass

    files = measure.files_of(path)
    workers = [threading.Thread(target=read, args=(files[i::2],)) for i in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


def _used_like(arrays: Arrays) -> Arrays:
    """Return arrays of the same shapes and types, whose pages have all been written."""
    return {name: np.full_like(array, 1) for name, array in arrays.items()}


TASKS: dict[str, Callable[[Bench], Race]] = {
    "import": import_time,
    "save large": partial(save, workload="large"),
    "save large, durable": partial(save_durable, workload="large"),
    "save_async large": partial(save_async, workload="large"),
    "load large": partial(load, workload="large"),
    "load large into arrays": partial(load_into, workload="large"),
    "row of large": partial(row, workload="large"),
    "save gpt2": partial(save, workload="gpt2"),
    "load gpt2": partial(load, workload="gpt2"),
    "save lora": save_with_base,
    "compose gpt2": partial(compose, workload="gpt2"),
    "compose gpt2, not durable": partial(compose, workload="gpt2", durable=False),
    "save lm": partial(save, workload="lm"),
    "save lm, durable": partial(save_durable, workload="lm"),
    "load lm": partial(load, workload="lm"),
    "load resnet": partial(load, workload="resnet"),
    "save resnet": partial(save, workload="resnet"),
    "save resnet, durable": partial(save_durable, workload="resnet"),
    "load small": partial(load, workload="small"),
    "open small, read 10": partial(open_some, workload="small"),
    "ls small": partial(list_names, workload="small"),
    "save small": partial(save, workload="small"),
    "save small, durable": partial(save_durable, workload="small"),
    "open safetensors, 20,000 names": partial(open_foreign, names=20_000),
    "open safetensors, 200,000 names": partial(open_foreign, names=200_000),
    "4 KiB of safetensors": foreign_row,
    "4 KiB of safetensors, bytes read": partial(foreign_row, reads=True),
    "save large, durable, new memory": partial(save_durable, workload="large", memory_is_new=True),
    "load large, cold": partial(load_cold, workload="large"),
    "memory, save large": partial(memory, workload="large", verb="save"),
    "memory, load large": partial(memory, workload="large", verb="load"),
}
SLOW = ("save large, durable, new memory",)
"""Tasks that wait for seconds before each candidate."""
