"""Measure the peak of extra memory of one peer in its own process: PEER VERB WORKLOAD SCALE PATH."""

from __future__ import annotations

import sys

import numpy as np

from tools.bench.measure import peak_memory
from tools.bench.peers import PEERS
from tools.bench.workloads import WORKLOADS


def main() -> None:
    """Print the bytes beyond those used before and, for a load, beyond its result."""
    name, verb, workload, scale, path = sys.argv[1:]
    peer = next(peer() for peer in PEERS if peer.name == name)
    warm = {"warm": np.ones(768, np.float32)}
    peer.save(path + ".warm", warm)
    if verb == "load":
        peer.load(path + ".warm")
        with peak_memory() as grown:
            loaded = peer.load(path)
        print(grown[0] - sum(getattr(value, "nbytes", 0) for value in loaded.values()))
    else:
        arrays = WORKLOADS[workload](float(scale))
        with peak_memory() as grown:
            peer.save(path, arrays)
        print(grown[0])


if __name__ == "__main__":
    main()
