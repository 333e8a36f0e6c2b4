"""What is measured: a function a task, each returning the timings of all candidates and limits."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

import varstore
from tools.bench import limits, measure
from tools.bench.measure import Place, Prepared, Timing, alternate
from tools.bench.peers import Peer, PlainLoop, Varstore
from tools.bench.workloads import WORKLOADS, Arrays

Candidates = dict[str, Callable[[], Prepared]]
_MEMORY_MATTERS_FROM = 64 << 20
"""Bytes of a workload."""
_MEMORY_USED = 3
"""By a candidate, in sizes of the workload: the arrays, the page cache and a copy."""


@dataclass(kw_only=True)
class Bench:
    """One run: where, how large, how often, and who takes part."""

    place: Place
    scale: float
    rounds: int
    peers: list[Peer]
    readies_memory: bool
    log: Callable[[str], None]

    def __post_init__(self) -> None:
        self._arrays: dict[str, Arrays] = {}
        self._saved: dict[tuple[str, str], str] = {}

    def arrays(self, workload: str) -> Arrays:
        """Return a workload, of which one is kept in memory at a time."""
        if workload not in self._arrays:
            self._arrays.clear()
            self._arrays[workload] = WORKLOADS[workload](self.scale)
        return self._arrays[workload]

    def saved(self, peer: Peer, workload: str) -> str:
        """Return where a peer has saved a workload, once."""
        key = (peer.name, workload)
        if key not in self._saved:
            self._saved[key] = self.place.fresh(keep=True)
            peer.save(self._saved[key], self.arrays(workload))
            self.place.settle()
        return self._saved[key]

    def run(
        self, candidates: Candidates, settle: Callable[[], None] | None = None, *, ready: bool = True
    ) -> dict[str, Timing]:
        """Time the candidates in turn, each with memory made ready, unless quick or told otherwise."""
        nbytes = sum(array.nbytes for arrays in self._arrays.values() for array in arrays.values())
        if ready and self.readies_memory and nbytes >= _MEMORY_MATTERS_FROM:
            step = partial(measure.ready_memory, _MEMORY_USED * nbytes)
            candidates = {name: _then(candidate, step) for name, candidate in candidates.items()}
        return alternate(candidates, self.rounds, settle or self.place.settle, self.log)

    def forget(self) -> None:
        """Drop the page cache."""
        measure.forget(self.place.path)

    def unready_memory(self) -> None:
        """Drop the page cache, and leave a host the time to take its memory."""
        self.forget()
        time.sleep(measure.TOLD_AFTER)

    def loadable(self, workload: str, verb: str) -> dict[str, tuple[Peer, str]]:
        """Return the peers that have a verb, with what they saved."""
        able = {}
        for peer in self.peers:
            if getattr(type(peer), verb) is getattr(Peer, verb):
                continue
            try:
                able[peer.name] = (peer, self.saved(peer, workload))
            except Exception as error:
                self.log(f"left out: {peer.name}: {type(error).__name__}: {error}")
        return able


def _at_fresh(bench: Bench, write: Callable[[str], Any]) -> Callable[[], Prepared]:
    return lambda: partial(write, bench.place.fresh())


def save(bench: Bench, workload: str) -> dict[str, Timing]:
    arrays = bench.arrays(workload)
    candidates: Candidates = {
        peer.name: _at_fresh(bench, partial(lambda p, path: p.save(path, arrays), peer)) for peer in bench.peers
    }
    if workload == "small":
        candidates["limit: system calls"] = _at_fresh(bench, lambda path: limits.bare_calls(path, arrays))
    else:
        candidates["limit: parallel write"] = _at_fresh(bench, lambda path: limits.parallel_write(path, arrays))
    return bench.run(candidates)


def save_durable(bench: Bench, workload: str, *, memory_is_new: bool = False) -> dict[str, Timing]:
    """Save and flush; if asked, while the host has taken back all free memory, as after long idling."""
    arrays = bench.arrays(workload)
    candidates: Candidates = {
        peer.name: _at_fresh(bench, partial(lambda p, path: p.save_durable(path, arrays), peer))
        for peer in bench.peers
        if workload != "small" or isinstance(peer, Varstore)
    }
    if workload == "small":
        candidates["limit: system calls + one sync"] = _at_fresh(bench, partial(_calls_and_sync, arrays))
    else:
        candidates["limit: direct write"] = _at_fresh(bench, lambda path: limits.direct_write(path, arrays))
    if memory_is_new:
        candidates = {name: _then(candidate, bench.unready_memory) for name, candidate in candidates.items()}
    return bench.run(candidates, ready=not memory_is_new)


def _then(candidate: Callable[[], Prepared], step: Callable[[], None]) -> Callable[[], Prepared]:
    """Return the candidate such that a step follows its preparation, outside the clock."""

    def prepare() -> Prepared:
        timed = candidate()
        step()
        return timed

    return prepare


def _nothing() -> None:
    """Leave things as they are after what only read."""


def _calls_and_sync(arrays: Arrays, path: str) -> None:
    limits.bare_calls(path, arrays)
    limits.flush(path)


def load(bench: Bench, workload: str) -> dict[str, Timing]:
    arrays = bench.arrays(workload)
    candidates: Candidates = {
        name: partial(lambda p, at: lambda: p.load(at), peer, path)
        for name, (peer, path) in bench.loadable(workload, "load").items()
    }
    if workload == "small":
        layout = bench.saved(Varstore(), workload)
        candidates["limit: system calls"] = lambda: lambda: limits.bare_reads(layout, arrays)
    else:
        plain = bench.place.fresh(keep=True)
        limits.parallel_write(plain, arrays)
        candidates["limit: parallel read"] = lambda: lambda: limits.parallel_read(plain, arrays)
        _read_all(plain)
    _warm(bench, workload, "load")
    return bench.run(candidates, settle=_nothing)


def load_into(bench: Bench, workload: str) -> dict[str, Timing]:
    arrays = bench.arrays(workload)
    targets = {name: np.zeros_like(array) for name, array in arrays.items()}
    candidates: Candidates = {
        name: partial(lambda p, at: lambda: p.load_into(at, targets), peer, path)
        for name, (peer, path) in bench.loadable(workload, "load_into").items()
    }
    candidates["limit: memory copy"] = lambda: lambda: limits.memory_copy(arrays, targets)
    plain = bench.place.fresh(keep=True)
    limits.parallel_write(plain, arrays)
    candidates["limit: parallel read"] = lambda: lambda: limits.read_into(plain, targets)
    _read_all(plain)
    _warm(bench, workload, "load_into")
    return bench.run(candidates, settle=_nothing)


def load_cold(bench: Bench, workload: str) -> dict[str, Timing]:
    arrays = bench.arrays(workload)
    plain = bench.place.fresh(keep=True)
    limits.parallel_write(plain, arrays)
    bench.place.settle()
    targets = {name: np.zeros_like(array) for name, array in arrays.items()}
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
    return bench.run(candidates, settle=_nothing)


def open_some(bench: Bench, workload: str) -> dict[str, Timing]:
    names = list(bench.arrays(workload))
    chosen = names[:: max(1, len(names) // 10)][:10]
    candidates: Candidates = {
        name: partial(lambda p, at: lambda: p.load_some(at, chosen), peer, path)
        for name, (peer, path) in bench.loadable(workload, "load_some").items()
    }
    return bench.run(candidates, settle=_nothing)


def row(bench: Bench, workload: str) -> dict[str, Timing]:
    name = next(iter(bench.arrays(workload)))
    candidates: Candidates = {
        peer_name: partial(lambda p, at: lambda: p.row(at, name, 1000), peer, path)
        for peer_name, (peer, path) in bench.loadable(workload, "row").items()
    }
    return bench.run(candidates, settle=_nothing)


def save_with_base(bench: Bench, workload: str) -> dict[str, Timing]:
    del workload
    before = bench.place.fresh(keep=True)
    varstore.save(before, bench.arrays("gpt2"))
    arrays = bench.arrays("lora")
    bench.place.settle()

    def with_base(path: str) -> None:
        varstore.save(path, arrays, base=before)

    def whole(path: str) -> None:
        varstore.save(path, arrays)

    timings = bench.run({"varstore, base=": _at_fresh(bench, with_base), "varstore, whole": _at_fresh(bench, whole)})
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
    return timings


def compose(bench: Bench, workload: str, *, durable: bool = True) -> dict[str, Timing]:
    """Make a checkpoint of links to two others, and, to compare, one of the same values."""
    arrays = bench.arrays(workload)
    first, second = bench.place.fresh(keep=True), bench.place.fresh(keep=True)
    a, b = (varstore.save(path, arrays, durable=False) for path in (first, second))
    bench.place.settle()
    variables = {name: (a if i % 2 else b)[name] for i, name in enumerate(arrays)}
    roots = {name: variable.root for name, variable in variables.items()}

    def bare(path: str) -> None:
        limits.bare_links(path, roots)
        if durable:
            limits.flush(path)

    return bench.run(
        {
            "varstore, links": _at_fresh(bench, lambda path: varstore.save(path, variables, durable=durable)),
            "varstore, whole": _at_fresh(bench, lambda path: varstore.save(path, arrays, durable=durable)),
            "limit: system calls": _at_fresh(bench, bare),
        }
    )


def save_async(bench: Bench, workload: str) -> dict[str, Timing]:
    arrays = bench.arrays(workload)
    targets = {name: np.zeros_like(array) for name, array in arrays.items()}
    pending: list[Any] = []

    def start(path: str) -> None:
        pending.append(varstore.save_async(path, arrays, durable=False))

    def settle() -> None:
        while pending:
            pending.pop().wait()
        bench.place.settle()

    return bench.run(
        {
            "varstore": _at_fresh(bench, start),
            "limit: memory copy": lambda: lambda: limits.memory_copy(arrays, targets),
        },
        settle,
    )


def import_time(bench: Bench, workload: str) -> dict[str, Timing]:
    del workload
    commands = {"varstore": "import varstore", "limit: numpy": "import numpy"}
    return bench.run(
        {name: partial(lambda c: lambda: measure.whole_process("-c", c), code) for name, code in commands.items()},
        settle=_nothing,
    )


def list_names(bench: Bench, workload: str) -> dict[str, Timing]:
    path = bench.saved(Varstore(), workload)
    command = partial(measure.whole_process, "-m", "varstore", "ls", path)
    return bench.run({"varstore ls": lambda: command}, settle=_nothing)


def memory(bench: Bench, workload: str, verb: str) -> dict[str, float]:
    """Return the peak of extra bytes of each peer, each in a process of its own; a load's result not counted."""
    peaks: dict[str, float] = {}
    for peer in bench.peers:
        if isinstance(peer, PlainLoop) or getattr(type(peer), verb) is getattr(Peer, verb):
            continue
        path = bench.place.fresh() if verb == "save" else bench.saved(peer, workload)
        command = [sys.executable, "-m", "tools.bench.peak", peer.name, verb, workload, str(bench.scale), path]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            peaks[peer.name] = float(done.stdout.split()[-1])
        else:
            bench.log(f"left out: {peer.name}: {done.stderr.strip().splitlines()[-1:]}")
    return peaks


def _warm(bench: Bench, workload: str, verb: str) -> None:
    bench.place.settle()
    for _, path in bench.loadable(workload, verb).values():
        _read_all(path)


def _read_all(path: str) -> None:
    """Have the page cache hold everything that will be read, as far as it fits."""

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
