"""Save a state that many ranks hold together, and tell all of them the same error where one fails.

Ranks that save the state of a whole run talk in a group of their own. If one of them ends, those that speak to it hear
of that at once, and the others wait for these; so whoever hears of it closes that group, and nobody waits any more. The
group of the run stays as it is.
"""

from __future__ import annotations

import contextlib
import copy
import os
import traceback
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner

from varstore.adapters.torch_distributed.states import LocalState, flatten_state
from varstore.adapters.torch_distributed.writer import Writer
from varstore.disk.read.checkpoint import Checkpoint, open_checkpoint
from varstore.disk.save.together import GIVEN_UP
from varstore.errors import StorageError, UsageError, VarstoreError
from varstore.model.options import Path
from varstore.values.arguments import checked

__all__ = ["save"]

_groups: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()
"""The group that ranks save in, by the group that they are of."""


@checked
def save(
    path: Path,
    state: Any,
    *,
    process_group: dist.ProcessGroup | None = None,
    overwrite: bool = False,
    durable: bool = True,
    attributes: Mapping[str, Any] | None = None,
    allow_nfs: bool = False,
) -> Checkpoint:
    """Save a state that many ranks hold together as one checkpoint of whole tensors; every rank makes this call.

    Each rank writes its own parts of DTensors, and of tensors that all have, one rank writes each. What only some ranks
    have under a key is saved too; of values that differ under one key, that of the lowest rank is. Names and the tree
    are those of `varstore.save_state`, so `varstore.load_state`, `varstore.load` and OneFlow read the checkpoint.

    The checkpoint is visible when the call returns, on all ranks; if it fails on one, nothing is, an old checkpoint
    stays, and every rank raises the error of the one that failed.

    Args:
        path: as for `varstore.save`, on a file system that all ranks share. All ranks pass the same one.
        state: nested state, and objects that have a ``state_dict``; for optimizers, torch's ``get_state_dict`` gives a
            state that loads on any mesh.
        process_group: the ranks that save, by default all; the first of them coordinates.
        overwrite: replace the checkpoint at `path`; readers see the old one or the new one.
        durable: return only when everything is on the disk, safe from a power cut.
        attributes: JSON data to keep with the checkpoint; that of the first rank counts.
        allow_nfs: save on NFS, although ranks run on several machines. There, two of them that write to one page may
            lose bytes of each other; `varstore.verify` tells.

    Raises:
        UsageError: a value is not data, or ranks do not have all of a tensor.
        CheckpointExists, InvalidName, OutOfSpace, UnsupportedDtype: see `varstore.save`.
        StorageError: the operating system refused; a rank does not see the files of the others, or has ended.

    Example:
        >>> import torch
        >>> from varstore.adapters.torch_distributed import save
        >>> model = torch.nn.Linear(2, 3)  # or fully_shard(model), in the processes that torchrun starts
        >>> save("step-3", {"model": model, "epoch": 3}).names
        ('model/weight', 'model/bias')
    """
    local: LocalState | BaseException
    try:
        local = flatten_state(state)
    except BaseException as error:  # raised where the others hear of it
        local = error
    writer = Writer(path, overwrite=overwrite, durable=durable, attributes=attributes, allow_nfs=allow_nfs)
    planner = _Planner(local, writer)
    tensors = local.tensors if isinstance(local, LocalState) else {}
    target = os.fspath(path)

    def write(group: dist.ProcessGroup | None, *, alone: bool) -> None:
        dcp.save(tensors, storage_writer=writer, planner=planner, process_group=group, no_dist=alone)

    _together(write, writer, target, process_group)
    return open_checkpoint(target)


def _together(write: Callable[..., None], writer: Writer, path: str, group: dist.ProcessGroup | None) -> None:
    """Make a call of torch's on all ranks; what one of them raises becomes one error of all."""
    if not (dist.is_available() and dist.is_initialized()):
        with _raising(writer, path, 1), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            write(None, alone=True)
        return
    if dist.get_rank(group) < 0:
        raise UsageError(
            "this process is not in the group",
            path=path,
            field="process_group",
            hint="call it only in the processes of the group",
        )
    with _raising(writer, path, dist.get_world_size(group), dist.get_rank(group)):
        world = dist.group.WORLD
        if group in (None, world):
            _in_own_group(write, world)
        else:
            write(group, alone=False)


def _in_own_group(write: Callable[..., None], world: Any) -> None:
    """Make a call of torch's in the group that ranks save in, and close that if one of them does not answer."""
    own = _groups.get(world)
    if own is None:
        own = _groups[world] = dist.new_group(backend="gloo")
    try:
        write(own, alone=False)
    except RuntimeError as error:
        traceback.clear_frames(error.__traceback__)  # connections close with the last reference to the group
        del _groups[world]
        with contextlib.suppress(RuntimeError, ValueError):
            dist.destroy_process_group(own)
        del own
        raise


@contextlib.contextmanager
def _raising(writer: Writer, path: str, size: int, rank: int = 0) -> Iterator[None]:
    """Raise one error for those of all ranks, and leave nothing of a save that failed."""
    try:
        yield
    except CheckpointException as error:
        raise _told(error, path, size, rank) from None
    except VarstoreError:
        raise
    except RuntimeError as error:
        raise _lost(error, path) from error
    finally:
        writer.abort()


def _told(error: CheckpointException, path: str, size: int, own: int) -> BaseException:
    """Return the error of the first rank that failed, and not because another one had."""
    failures = {rank: failure for rank, (failure, _) in sorted(error.failures.items())}
    causes = {rank: failure for rank, failure in failures.items() if GIVEN_UP not in str(failure)} or failures
    rank = next(iter(causes))
    cause: BaseException = causes[rank]
    if len(causes) == size or (rank == own and not isinstance(cause, VarstoreError)):
        return cause
    if isinstance(cause, VarstoreError):
        told = copy.copy(cause)
        told.rows = (*cause.rows, f"on rank {rank} of {size}")
        told.args = (told._message(),)
        return told
    return StorageError(
        f"rank {rank} of {size} failed, and nothing was saved", path=path, found=f"{type(cause).__name__}: {cause}"
    )


def _lost(error: RuntimeError, path: str) -> StorageError:
    return StorageError(
        "the ranks do not reach each other: one of them has ended, or does not take part",
        path=path,
        found=str(error).partition("\n")[0].partition(". ")[0],
        hint="the path holds what it held before, or the new checkpoint, complete; see what the other ranks printed",
    )


class _Planner(DefaultSavePlanner):  # type: ignore[misc]  # torch's
    """Plans a state that is flattened already; an error of that is raised where the other ranks hear of it."""

    def __init__(self, local: LocalState | BaseException, writer: Writer) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._local = local
        self._writer = writer

    def set_up_planner(self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False) -> None:
        if isinstance(self._local, BaseException):
            raise self._local
        self._writer.local = self._local
        super().set_up_planner(state_dict, storage_meta, is_coordinator)
