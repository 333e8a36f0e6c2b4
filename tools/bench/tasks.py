"""What is measured: a function a task, each returning the timings of all candidates and limits."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
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


@dataclass(kw_only=True)
class Bench:
    """One run: where, how large, how often, and who takes part."""

    place: Place
    scale: float
    rounds: int
    peers: list[Peer]
    fills_memory: bool
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
            self._saved[key] = self.place.fresh()
            peer.save(self._saved[key], self.arrays(workload))
            measure.sync()
        return self._saved[key]

    def tidy(self) -> None:
        """Make room on the disk after a task."""
        self.place.give_back(set(self._saved.values()))

    def run(
        self, candidates: Candidates, settle: Callable[[], None] = measure.sync, *, memory_matters: bool = True
    ) -> dict[str, Timing]:
        """Time the candidates in turn."""
        if self.fills_memory and memory_matters:
            measure.fill_memory(self.place)
        return alternate(candidates, self.rounds, settle, self.log)

    def forget(self) -> None:
        """Drop the page cache."""
        measure.forget(self.place.path)

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


def save_durable(bench: Bench, workload: str, *, forget: bool = False) -> dict[str, Timing]:
    """Save and flush; with `forget`, after the page cache was dropped, whose memory a host may have taken back."""
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
    if forget:
        candidates = {name: _after(bench.tidy, _after(bench.forget, c)) for name, c in candidates.items()}
    return bench.run(candidates, memory_matters=not forget)


def _after(step: Callable[[], None], candidate: Callable[[], Prepared]) -> Callable[[], Prepared]:
    """Return the candidate such that a step is done before each of its rounds, outside the clock."""

    def prepare() -> Prepared:
        step()
        return candidate()

    return prepare


def _calls_and_sync(arrays: Arrays, path: str) -> None:
    limits.bare_calls(path, arrays)
    os.sync()


def load(bench: Bench, workload: str) -> dict[str, Timing]:
    arrays = bench.arrays(workload)
    candidates: Candidates = {
        name: partial(lambda p, at: lambda: p.load(at), peer, path)
        for name, (peer, path) in bench.loadable(workload, "load").items()
    }
    if workload == "small":
        layout = bench.saved(Varstore(), workload)
        candidates["limit: open, read, close"] = lambda: lambda: limits.bare_reads(layout, arrays)
    else:
        plain = bench.place.fresh()
        limits.parallel_write(plain, arrays)
        candidates["limit: parallel read"] = lambda: lambda: limits.parallel_read(plain, arrays)
        _read_all(plain)
    _warm(bench, workload, "load")
    return bench.run(candidates, settle=lambda: None)


def load_into(bench: Bench, workload: str) -> dict[str, Timing]:
    arrays = bench.arrays(workload)
    targets = {name: np.zeros_like(array) for name, array in arrays.items()}
    candidates: Candidates = {
        name: partial(lambda p, at: lambda: p.load_into(at, targets), peer, path)
        for name, (peer, path) in bench.loadable(workload, "load_into").items()
    }
    candidates["limit: memory copy"] = lambda: lambda: limits.memory_copy(arrays, targets)
    _warm(bench, workload, "load_into")
    return bench.run(candidates, settle=lambda: None)


def load_cold(bench: Bench, workload: str) -> dict[str, Timing]:
    arrays = bench.arrays(workload)
    plain = bench.place.fresh()
    limits.parallel_write(plain, arrays)
    measure.sync()
    targets = {name: np.zeros_like(array) for name, array in arrays.items()}
    aligned = limits.aligned_like(arrays)

    def cold(timed: Prepared) -> Callable[[], Prepared]:
        return _after(bench.forget, lambda: timed)

    candidates: Candidates = {
        name: cold(partial(peer.load, path))
        for name, (peer, path) in bench.loadable(workload, "load").items()
        if name in ("varstore", "safetensors", "torch.save", "numpy.savez", "plain loop")
    }
    candidates["limit: buffered read"] = cold(lambda: limits.read_into(plain, targets))
    candidates["limit: one thread's read"] = cold(lambda: limits.read_into(plain, targets, workers=1))
    candidates["limit: direct read"] = cold(lambda: limits.read_into(plain, aligned, direct=True))
    return bench.run(candidates, settle=lambda: None, memory_matters=False)


def open_some(bench: Bench, workload: str) -> dict[str, Timing]:
    names = list(bench.arrays(workload))
    chosen = names[:: max(1, len(names) // 10)][:10]
    candidates: Candidates = {
        name: partial(lambda p, at: lambda: p.load_some(at, chosen), peer, path)
        for name, (peer, path) in bench.loadable(workload, "load_some").items()
    }
    return bench.run(candidates, settle=lambda: None)


def row(bench: Bench, workload: str) -> dict[str, Timing]:
    name = next(iter(bench.arrays(workload)))
    candidates: Candidates = {
        peer_name: partial(lambda p, at: lambda: p.row(at, name, 1000), peer, path)
        for peer_name, (peer, path) in bench.loadable(workload, "row").items()
    }
    return bench.run(candidates, settle=lambda: None)


def save_with_base(bench: Bench, workload: str) -> dict[str, Timing]:
    del workload
    before = bench.place.fresh()
    varstore.save(before, bench.arrays("gpt2"))
    arrays = bench.arrays("lora")
    measure.sync()

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


def compose(bench: Bench, workload: str) -> dict[str, Timing]:
    arrays = bench.arrays(workload)
    first, second = bench.place.fresh(), bench.place.fresh()
    a, b = (varstore.save(path, arrays, durable=False) for path in (first, second))
    measure.sync()
    variables = {name: (a if i % 2 else b)[name] for i, name in enumerate(arrays)}
    return bench.run(
        {
            "varstore, links": _at_fresh(bench, lambda path: varstore.save(path, variables, durable=False)),
            "varstore, whole": _at_fresh(bench, lambda path: varstore.save(path, arrays, durable=False)),
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
        measure.sync()

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
        settle=lambda: None,
        memory_matters=False,
    )


def list_names(bench: Bench, workload: str) -> dict[str, Timing]:
    path = bench.saved(Varstore(), workload)
    command = partial(measure.whole_process, "-m", "varstore", "ls", path)
    return bench.run({"varstore ls": lambda: command}, settle=lambda: None, memory_matters=False)


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
    measure.sync()
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
