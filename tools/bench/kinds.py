"""The kinds of runs, each with its tasks and peers; an option asks for all but the ordinary one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from tools.bench.packed import PACKED
from tools.bench.packing import PACKING
from tools.bench.peers import PEERS, Peer
from tools.bench.sharded import SHARDED
from tools.bench.sharding import SHARDING
from tools.bench.tasks import TASKS, Bench, Race

ORDINARY = "bench"


class Kind(NamedTuple):
    """The tasks and the peers of runs of one kind."""

    tasks: Mapping[str, Callable[[Bench], Race]]
    peers: Sequence[type[Peer]]


KINDS = {
    ORDINARY: Kind(TASKS, PEERS),
    "packed": Kind(PACKING, PACKED),
    "distributed": Kind(SHARDING, SHARDED),
}
"""By their names, which are also those of what README quotes of their records."""
