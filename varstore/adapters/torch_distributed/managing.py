"""What `varstore.CheckpointManager` asks of the ranks that share it; see `varstore.training.together`."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch.distributed as dist

from varstore.adapters.torch_distributed.ranks import Ranks
from varstore.adapters.torch_distributed.reading import load
from varstore.adapters.torch_distributed.saving import save, save_async
from varstore.errors import UsageError
from varstore.model.options import LoadOptions
from varstore.training.background import PendingSave
from varstore.training.state import load_state
from varstore.training.tensors import MapLocation
from varstore.values.arguments import described

__all__ = ["RunRanks"]

_decisions: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()
"""The group in which the ranks of another group decide."""

Result = TypeVar("Result")


class RunRanks:
    """The ranks of a group, as a manager needs them.

    Raises:
        UsageError: it is not a group of torch.distributed that this process is in.
    """

    def __init__(self, group: Any) -> None:
        if not isinstance(group, dist.ProcessGroup):
            raise UsageError(
                "must be a process group of torch.distributed",
                field="process_group",
                found=described(group),
                hint="pass torch.distributed.group.WORLD after init_process_group for all ranks",
            )
        self._group = group
        self._ranks = Ranks(_apart(group))

    def decided(self, decide: Callable[[], Result]) -> Result:
        """Return on every rank what a function returns on the first one, or raise what it raises there."""
        return self._ranks.decided(decide)

    def save(self, path: str, state: Any, *, attributes: Mapping[str, Any], overwrite: bool, durable: bool) -> None:
        """Save a state that the ranks hold together."""
        save(
            path, state, process_group=self._group, attributes=attributes, overwrite=overwrite, durable=durable
        ).close()

    def save_async(
        self, path: str, state: Any, *, attributes: Mapping[str, Any], overwrite: bool, durable: bool
    ) -> PendingSave:
        """Begin a save that goes on in the background."""
        return save_async(
            path, state, process_group=self._group, attributes=attributes, overwrite=overwrite, durable=durable
        )

    def restored(self, path: str, map_location: MapLocation, like: Any, options: LoadOptions) -> Any:
        """Load a checkpoint into `like`, and return that; without it, load the state whole on every rank."""
        if like is not None:
            load(path, like, process_group=self._group)
            return like
        loaded: list[Any] = []
        self._ranks.together(lambda: loaded.append(load_state(path, map_location=map_location, **options)))
        return loaded[0]


def _apart(group: dist.ProcessGroup) -> dist.ProcessGroup:
    """Return a group of the same ranks in which no save is sent; all ranks of a run have one for what they decide."""
    if group is dist.group.WORLD or dist.get_rank(group) < 0:
        return group
    if group not in _decisions:
        ranks = dist.get_process_group_ranks(group)
        _decisions[group] = dist.new_group(ranks, backend="gloo", use_local_synchronization=True)
    apart: dist.ProcessGroup = _decisions[group]
    return apart
