"""The processes of torch.distributed that hold a state together: as many as torchrun starts, with what it tells them.

`Ranks` starts them as ``python -m tools.bench.ranks OPTIONS``. Each answers one request per line: a method of `Rank`
and its arguments, as JSON.
"""

from __future__ import annotations

import datetime
import json
import os
import subprocess
import sys
import traceback
import warnings
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import numpy as np

from tools.bench.sharded import SHARDED, Alone, Bare, Part, Parts, Sharded, State
from tools.bench.workloads import WORKLOADS, Arrays

SIZE = 2
_WAITS = datetime.timedelta(minutes=5)


class Ranks:
    """The processes, for one that measures them; they end when it does, and find each other through a new file."""

    def __init__(self, meeting: str) -> None:
        self._meeting = meeting
        self._processes = [self._start(rank) for rank in range(SIZE)]

    def _start(self, rank: int) -> subprocess.Popen[str]:
        told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": SIZE, "LOCAL_WORLD_SIZE": SIZE, "OMP_NUM_THREADS": 1}
        return subprocess.Popen(
            [sys.executable, "-m", "tools.bench.ranks", self._meeting],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **{name: str(value) for name, value in told.items()}},
        )

    def call(self, method: str, *arguments: Any) -> list[Any]:
        """Call a method in all processes, and return what each returned.

        Raises:
            RuntimeError: one of them failed, or has ended.
        """
        for process in self._processes:
            assert process.stdin is not None
            with suppress(BrokenPipeError):
                print(json.dumps([method, *arguments]), file=process.stdin, flush=True)
        replies = [json.loads(process.stdout.readline() or "{}") for process in self._processes if process.stdout]
        for reply in replies:
            if reply.get("error"):
                raise RuntimeError(reply["error"])
        if not all(replies):
            raise RuntimeError(f"a process ended at {method} {arguments}")
        return [reply["found"] for reply in replies]


class Rank:
    """One of the processes. A workload is cut into `rows` or `columns`, or is `whole` in the first process alone."""

    def __init__(self, meeting: str) -> None:
        import torch.distributed as dist

        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=size, timeout=_WAITS)
        first = dist.new_group([0])
        self._all = Alone(rank, size, dist.group.WORLD, dist.barrier)
        self._first = Alone(rank, 1, first, lambda: None)
        self._mesh = dist.init_device_mesh("cpu", (size,))
        self._peers: Mapping[str, Sharded] = {Bare.name: Bare(), **{peer.name: peer() for peer in SHARDED}}
        self._chosen = ""
        self._arrays: Arrays = {}
        self._states: dict[tuple[str, bool], tuple[State, Parts]] = {}

    def choose(self, workload: str, scale: float) -> int:
        """Take a workload from now on; return its bytes."""
        if self._chosen != workload:
            self._states.clear()
            self._arrays.clear()
            self._chosen, self._arrays = workload, WORKLOADS[workload](scale)
        return sum(array.nbytes for array in self._arrays.values())

    def save(self, peer: str, path: str, form: str, durable: bool) -> None:
        """Save the workload."""
        state, parts = self._state(form, is_target=False)
        self._peers[peer].save_sharded(path, state, parts, self._all, durable=durable)

    def load(self, peer: str, path: str, form: str) -> None:
        """Load the workload into memory that has been used before."""
        among = self._first if form == "whole" else self._all
        if among.rank < among.size:
            state, parts = self._state(form, is_target=True)
            self._peers[peer].load_sharded(path, state, parts, among)

    def check(self, peer: str, path: str, form: str) -> bool:
        """Load the workload, and tell whether the values are those that were saved."""
        _, found = self._state(form, is_target=True)
        for part in found.values():
            part.values.fill(1)
        self.load(peer, path, form)
        if form == "whole" and self._all.rank:
            return True
        _, expected = self._state(form, is_target=False)
        return all(np.array_equal(part.values, expected[name].values) for name, part in found.items())

    def _state(self, form: str, *, is_target: bool) -> tuple[State, Parts]:
        """Return tensors of the workload, and this process's parts of them; for a target, in memory of their own."""
        key = (form, is_target)
        if key not in self._states:
            self._states[key] = self._made(form, is_target=is_target)
        return self._states[key]

    def _made(self, form: str, *, is_target: bool) -> tuple[State, Parts]:
        import torch
        from torch.distributed.tensor import DTensor, Shard

        state, parts = {}, {}
        for name, array in self._arrays.items():
            axis = min(1, array.ndim - 1) if form == "columns" else 0
            offsets, values = [0] * array.ndim, array
            if form != "whole":
                share, rest = divmod(array.shape[axis], self._all.size)
                assert not rest, "the processes have equal parts"
                offsets[axis] = share * self._all.rank
                values = np.ascontiguousarray(np.split(array, self._all.size, axis)[self._all.rank])
            if is_target:
                values = np.full_like(values, 1)
            tensor = torch.from_numpy(values)
            is_cut = form != "whole"
            state[name] = DTensor.from_local(tensor, self._mesh, [Shard(axis)]) if is_cut else tensor
            parts[name] = Part(array.shape, tuple(offsets), values)
        return state, parts


def main() -> None:
    """Answer requests until there are no more; output of libraries goes to stderr."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    warnings.simplefilter("ignore")
    rank = Rank(sys.argv[1])
    for line in sys.stdin:
        method, *arguments = json.loads(line)
        reply = {"found": None, "error": ""}
        try:
            reply["found"] = getattr(rank, method)(*arguments)
        except Exception as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            reply["error"] = f"{type(error).__name__}: {error} ({os.path.basename(last.filename)}:{last.lineno})"
        print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
    main()
