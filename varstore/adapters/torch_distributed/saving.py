"""Save a state that many ranks hold together, and tell all of them the same error where one fails."""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections.abc import Iterator, Mapping
from typing import Any, TypedDict

import numpy as np
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.checkpoint.staging import BlockingAsyncStager

from varstore.adapters.torch_distributed.ranks import (
    are_ranks,
    in_own_group,
    lost,
    open_group,
    require_member,
    with_row,
)
from varstore.adapters.torch_distributed.states import LocalState, flatten_state
from varstore.adapters.torch_distributed.writer import Writer
from varstore.disk.read.checkpoint import Checkpoint, open_checkpoint
from varstore.disk.save.together import GIVEN_UP
from varstore.disk.threads import Ending, start
from varstore.errors import StorageError, VariableMismatch, VarstoreError
from varstore.model.options import Path
from varstore.storage.directory import locate
from varstore.training.background import PendingSave
from varstore.values.arguments import checked

__all__ = ["save", "save_async"]

_ABOUT = "saves"
_log = logging.getLogger("varstore")
_STANDS = "the path holds what it held before, or the new checkpoint, complete; see what the other ranks printed"
_turns: weakref.WeakKeyDictionary[Any, Ending] = weakref.WeakKeyDictionary()
"""How the last save ends that was begun in each group."""


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
    have under a key is saved too; of values that differ under one key, that of the lowest rank is, and of whole tensors
    that differ, that of any one rank. Names and the tree are those of `varstore.save_state`, so `varstore.load_state`,
    `varstore.load` and OneFlow read the checkpoint.

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
        VariableMismatch: ranks have tensors of different shapes or types under one name.
        CheckpointExists, InvalidName, OutOfSpace, UnsupportedDtype: see `varstore.save`.
        StorageError: the operating system refused; a rank does not see the files of the others, or has ended.

    Example:
        >>> import torch
        >>> from varstore.adapters.torch_distributed import save
        >>> model = torch.nn.Linear(2, 3)  # or fully_shard(model), in the processes that torchrun starts
        >>> save("step-3", {"model": model, "epoch": 3}).names
        ('model/weight', 'model/bias')
    """
    options = SaveTogether(overwrite=overwrite, durable=durable, attributes=attributes, allow_nfs=allow_nfs)
    saving = _Saving(path, state, process_group, options, copies=False)
    saving.work()
    saving.ending.check()
    return open_checkpoint(path)


@checked
def save_async(
    path: Path,
    state: Any,
    *,
    process_group: dist.ProcessGroup | None = None,
    overwrite: bool = False,
    durable: bool = True,
    attributes: Mapping[str, Any] | None = None,
    allow_nfs: bool = False,
) -> PendingSave:
    """Save as `save` does, while training continues: copy the tensors to the host, and return; a thread writes them.

    Every rank makes this call. Saves of all ranks are written in the order of their calls, one at a time; each of them
    holds a copy of what its rank has. An error is logged, and raised where the save is waited for; `save` waits for its
    turn. Wait for the last save before ``destroy_process_group``, which ends those that are not complete.

    Args:
        path, state, overwrite, durable, attributes, allow_nfs: as for `save`.
        process_group: the ranks that save, by default all. In a group of some ranks nothing else may be sent meanwhile:
            make one with ``dist.new_group(ranks, backend="gloo")`` that is only for saving.

    Example:
        >>> import torch
        >>> from varstore.adapters.torch_distributed import save_async
        >>> weight = torch.zeros(3)
        >>> pending = save_async("step-4", {"weight": weight, "epoch": 4})
        >>> weight += 1  # training goes on
        >>> pending.result()["weight"].numpy()
        array([0., 0., 0.], dtype=float32)
    """
    options = SaveTogether(overwrite=overwrite, durable=durable, attributes=attributes, allow_nfs=allow_nfs)
    saving = _Saving(path, state, process_group, options, copies=True)
    if not start(saving.work, name="varstore-save", daemon=False):
        saving.work()
    return PendingSave(saving.location, saving.ending)


class SaveTogether(TypedDict):
    """The options of a save of many ranks."""

    overwrite: bool
    durable: bool
    attributes: Mapping[str, Any] | None
    allow_nfs: bool


class _Saving:
    """One save of this rank: it is begun where it is called, and does its `work` there or in a thread.

    Ranks send in the order of their calls: the work waits for that of the save before it.
    """

    def __init__(
        self, path: Path, state: Any, group: dist.ProcessGroup | None, options: SaveTogether, *, copies: bool
    ) -> None:
        self.location = locate(path)
        self.ending = Ending()
        self._is_later = copies
        self._shown = self.location.absolute if copies else self.location.path
        self._is_alone = not are_ranks()
        if not self._is_alone:
            require_member(group, self._shown)
        self._size = 1 if self._is_alone else dist.get_world_size(group)
        self._rank = 0 if self._is_alone else dist.get_rank(group)
        self._writer = Writer(self._shown, **options)
        try:
            local = flatten_state(state)
            self._planner = _Planner(_copied(local) if copies else local, self._writer)
        except BaseException as error:  # raised where the other ranks hear of it
            self._planner = _Planner(error, self._writer)
        self._group = group
        self._previous: Ending | None = None
        if not self._is_alone:
            open_group(group, about=_ABOUT)
            turn = group or dist.group.WORLD
            self._previous, _turns[turn] = _turns.get(turn), self.ending

    def work(self) -> None:
        """Save, and tell how it ended."""
        error: BaseException | None = None
        try:
            if self._previous is not None:
                self._previous.wait()
            self._save()
        except BaseException as failure:  # raised where the save is waited for
            error = failure
            if self._is_later:
                _log.error("the save to %s failed: %s", self._shown, error)
        finally:
            del self._planner  # releases the tensors
            self.ending.tell(error)

    def _save(self) -> None:
        with _raising(self._writer, self._shown, self._size, self._rank):
            if self._is_alone:
                _save_alone(self._writer, self._planner)
            else:
                in_own_group(self._send, self._group, about=_ABOUT)

    def _send(self, group: Any) -> None:
        # the planner has the tensors; torch would note in a log when it began and ended with each
        dcp.save({}, storage_writer=self._writer, planner=self._planner, process_group=group)


def _save_alone(writer: Writer, planner: _Planner) -> None:
    """Do what torch does where there are ranks."""
    planner.set_up_planner({}, is_coordinator=True)
    writer.set_up_storage_writer(is_coordinator=True)
    plans, metadata = planner.create_global_plan([writer.prepare_local_plan(planner.create_local_plan())])
    (plan,) = writer.prepare_global_plan(plans)
    writer.finish(metadata, [writer.write_data(planner.finish_plan(plan), planner).value()])


def _copied(local: LocalState) -> LocalState:
    """Return a copy in the memory of the host; tied tensors are copied once."""
    once = {name: tensor for name, tensor in local.tensors.items() if name not in local.ties}
    copies = BlockingAsyncStager().stage(once)
    tensors = {name: copies[local.ties.get(name, name)] for name in local.tensors}
    arrays = {name: np.array(array) if isinstance(array, np.ndarray) else array for name, array in local.arrays.items()}
    return LocalState(tree=local.tree, tensors=tensors, arrays=arrays, ties=local.ties)


@contextlib.contextmanager
def _raising(writer: Writer, path: str, size: int, rank: int = 0) -> Iterator[None]:
    """Raise one error for those of all ranks, and leave nothing of a save that failed."""
    try:
        yield
    except CheckpointException as error:
        raise _told(error, path, size, rank) from None
    except RuntimeError as error:
        raise lost(error, _STANDS, path) from error
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
        return with_row(cause, f"on rank {rank} of {size}")
    return StorageError(
        f"rank {rank} of {size} failed, and nothing was saved", path=path, found=f"{type(cause).__name__}: {cause}"
    )


class _Planner(DefaultSavePlanner):  # type: ignore[misc]  # torch's
    """Plans a state that is flattened already; an error of that is raised where the other ranks hear of it."""

    def __init__(self, local: LocalState | BaseException, writer: Writer) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._local = local
        self._writer = writer

    def set_up_planner(self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False) -> None:  # noqa: ARG002
        if isinstance(self._local, BaseException):
            raise self._local
        self._writer.local = self._local
        super().set_up_planner(self._local.tensors, storage_meta, is_coordinator)

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        self._writer.plans = all_plans  # torch deals what several ranks have to one of them each
        try:
            plans, metadata = super().create_global_plan(all_plans)
        except ValueError as error:  # the parts of a tensor do not make it whole
            raise VariableMismatch(
                "the ranks do not have the parts of one state",
                path=self._writer.path,
                found=str(error),
                hint="pass the state of the same model, on the same mesh, on every rank",
            ) from error
        return plans, metadata
