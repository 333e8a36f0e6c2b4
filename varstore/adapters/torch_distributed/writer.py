"""`Writer`: checkpoints as the storage that ``torch.distributed.checkpoint.save`` writes to.

torch plans and carries messages: what each rank has goes to the coordinator, which stages the save and answers with a
ticket for each rank; the reports of all ranks go there at the end. See `varstore.disk.save.together`.

torch does not tell a writer that another rank failed, or that a rank has ended: the call that would finish the save
never comes. So the coordinator gives the save up as soon as nobody can finish it any more: when the next one begins,
when the writer or what it returned last goes away, and at the end of the program.
"""

from __future__ import annotations

import contextlib
import os
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

from varstore.adapters.torch_distributed.states import Kind, LocalState, Nested, merged, names_in, numpy_type
from varstore.disk.save.together import Coordinator, host, placeholder, take_part
from varstore.errors import UsageError, VariableMismatch, VarstoreError
from varstore.layout.dtypes import BY_NUMBER, data_type_of
from varstore.layout.regions import Region
from varstore.model.options import Path
from varstore.training.tree import flatten
from varstore.values.arguments import checked
from varstore.values.arrays import as_source
from varstore.values.lazy import LazyArray
from varstore.values.plan import plan_save
from varstore.version import __version__

__all__ = ["Writer"]


class _Offer(NamedTuple):
    """What a rank tells the coordinator: where it runs and, of a state that was flattened, all but the tensors."""

    host: str
    tree: str | None = None
    arrays: Mapping[str, tuple[tuple[int, ...], int]] = {}
    ties: Mapping[str, str] = {}


class _Order(NamedTuple):
    """What the coordinator tells a rank: its ticket, the name of each tensor in its plan, and the arrays to write."""

    ticket: str
    names: Mapping[str, str]
    arrays: tuple[str, ...]


class _Done(NamedTuple):
    """What a rank tells the coordinator at the end: its report, and the values that are not tensors."""

    report: str
    values: Mapping[str, Any]


class _Results(list[WriteResult]):
    """What a writer returned last; when it goes away, nobody finishes the save any more."""


class Writer(StorageWriter):  # type: ignore[misc]  # torch's
    """Save a checkpoint with ``torch.distributed.checkpoint.save``, for programs that call it themselves.

    The checkpoint is an ordinary one, of whole tensors, each written by all ranks that have a part of it. Values that
    are not tensors go into its tree, as those of `varstore.save_state` do. It is visible, complete, when the call
    returns; if it fails on any rank, nothing is. Keys of dicts become text, as torch's planner makes them; `save` keeps
    them.

    An error is raised on all ranks, in a ``CheckpointException``, which has varstore's in its `failures`. If a rank
    ends meanwhile, torch raises its own error, and what was written is removed with the writer, or by `abort`.

    Args:
        path: as for `varstore.save`, on a file system that all ranks share. The ``checkpoint_id`` of ``dcp.save`` takes
            its place.
        overwrite: replace the checkpoint at `path`.
        durable: return only when everything is on the disk.
        attributes: JSON data to keep with the checkpoint; that of rank 0 counts.
        allow_nfs: save on NFS, although ranks run on several machines.

    Example:
        >>> import torch
        >>> import torch.distributed as dist
        >>> import torch.distributed.checkpoint as dcp
        >>> from varstore.adapters.torch_distributed import Writer
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> state = {"model": torch.nn.Linear(2, 3).state_dict(), "epoch": 3}
        >>> metadata = dcp.save(state, storage_writer=Writer("step-3"))
        >>> dist.destroy_process_group()
        >>> vs.load_state("step-3")["epoch"], vs.open("step-3").names
        (3, ('model/weight', 'model/bias'))
    """

    @checked
    def __init__(
        self,
        path: Path | None = None,
        *,
        overwrite: bool = False,
        durable: bool = True,
        attributes: Mapping[str, Any] | None = None,
        allow_nfs: bool = False,
    ) -> None:
        self.path = None if path is None else os.fspath(path)
        self._overwrite = overwrite
        self._durable = durable
        self._attributes = attributes
        self._allow_nfs = allow_nfs
        self.local: LocalState | None = None
        """What this rank has, where it was flattened already; else, the plan says it."""
        self.plans: list[SavePlan] = []
        """With `local`, on the coordinator: the plans of all ranks, before any of them leaves out what others write."""
        self._nested: Nested | None = None
        self._held: list[Coordinator] = []
        weakref.finalize(self, _give_up, self._held, os.getpid())

    def __reduce__(self) -> tuple[Any, ...]:
        options = (self.path, self._overwrite, self._durable, self._attributes, self._allow_nfs)
        return _writer_of, options

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Path) -> bool:
        """Tell whether this can be a path."""
        return isinstance(checkpoint_id, str | os.PathLike)

    def reset(self, checkpoint_id: Path | None = None) -> None:
        """Begin with a new save, and give up one that was not finished."""
        self.abort()
        if checkpoint_id is not None:
            self.path = os.fspath(checkpoint_id)

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Refuse what this cannot do.

        Raises:
            UsageError: there is no path, or ranks are to save without telling each other.
        """
        if self.path is None:
            raise UsageError("there is no path", hint="pass one to Writer, or checkpoint_id= to dcp.save")
        if not kwargs.get("use_collectives", True):
            raise UsageError(
                "ranks that do not tell each other what they have cannot write one checkpoint",
                field="use_collectives",
                path=self.path,
                hint="leave out use_collectives=False",
            )

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Add to a rank's plan what the coordinator has to know."""
        if not plan.usable:
            raise self._cached()
        offer = _Offer(host())
        if self.local is not None:
            arrays = {
                name: (tuple(array.shape), data_type_of(array.dtype, variable=name).number)
                for name, array in self.local.arrays.items()
            }
            offer = offer._replace(tree=self.local.tree, arrays=arrays, ties=self.local.ties)
        return replace(plan, storage_data=offer)

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Stage the save, and add a ticket to the plan of each rank.

        Raises:
            CheckpointExists, InvalidName, OutOfSpace, StorageError, UsageError: see `varstore.save`.
            VariableMismatch: ranks have tensors of different shapes or types under one name.
        """
        assert self.path is not None
        self.abort()
        offers: list[_Offer] = [plan.storage_data for plan in plans]
        kinds = self._kinds(self.plans or plans)
        trees = [offer.tree for offer in offers if offer.tree is not None]
        if trees:
            self._nested, tree, names = None, merged(trees), {key: key for key in kinds}
        else:
            self._nested = Nested(_paths(plans), kinds)
            tree, names, _ = self._nested.flattened({})
        ties = _ties(self.plans, offers)
        plans = [
            replace(plan, items=[item for item in plan.items if item.index.fqn not in ties]) if ties else plan
            for plan in plans
        ]
        arrays = _dealt(offers)
        variables = {names[key]: placeholder(*kind) for key, kind in kinds.items()}
        variables |= {name: variables[first] for name, first in ties.items()}
        parts: list[dict[str, list[Region]]] = []
        for offer, plan, own in zip(offers, plans, arrays, strict=True):
            part: dict[str, list[Region]] = {}
            for item in plan.items:
                if item.tensor_data is not None:
                    chunk = item.tensor_data.chunk
                    part.setdefault(names[item.index.fqn], []).append(Region(tuple(chunk.offsets), tuple(chunk.sizes)))
            for name in own:
                shape, number = offer.arrays[name]
                dtype = BY_NUMBER[number].dtype
                assert dtype is not None
                part[name] = [Region.whole(shape)]
                variables[name] = placeholder(shape, dtype)
            parts.append(part)
        ordered = {name: variables[name] for name in names_in(tree) if name in variables}
        if lost := [name for name in variables if name not in ordered]:
            raise UsageError(
                "some ranks have an array where the first of them has something else",
                path=self.path,
                variable=lost[0],
                hint="what only some ranks have needs a key of its own, in dicts only",
            )
        coordinator = Coordinator(
            self.path,
            plan_save(ordered, attributes=self._attributes, tree=tree),
            parts,
            hosts=[offer.host for offer in offers],
            writer=f"varstore {__version__}",
            overwrite=self._overwrite,
            durable=self._durable,
            allow_nfs=self._allow_nfs,
        )
        self._held.append(coordinator)
        return [
            replace(
                plan,
                storage_data=_Order(
                    ticket, {item.index.fqn: names[item.index.fqn] for item in plan.items if item.tensor_data}, own
                ),
            )
            for plan, ticket, own in zip(plans, coordinator.tickets, arrays, strict=True)
        ]

    def _kinds(self, plans: list[SavePlan]) -> dict[str, Kind]:
        """Return the shape and type of each tensor, which are the same on all ranks that have it."""
        kinds: dict[str, Kind] = {}
        for rank, plan in enumerate(plans):
            for item in plan.items:
                if (data := item.tensor_data) is not None:
                    found = Kind(tuple(data.size), numpy_type(data.properties.dtype))
                    if (expected := kinds.setdefault(item.index.fqn, found)) != found:
                        raise VariableMismatch(
                            f"rank {rank} has another tensor under this name than a rank before it",
                            path=self.path,
                            variable=item.index.fqn,
                            found=f"shape {found.shape}, {found.dtype}",
                            expected=f"shape {expected.shape}, {expected.dtype}",
                            hint="give what each rank has of its own a key of its own, in dicts only",
                        )
        return kinds

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write what the plan gives to this rank.

        Raises:
            UsageError: a value is not data, or the planner is not one whose values can be looked at.
            OutOfSpace, StorageError: see `varstore.save`.
        """
        if getattr(planner, "_enable_plan_caching", False):
            raise self._cached()
        assert self.path is not None
        order: _Order = plan.storage_data
        try:
            values = self._values(plan, planner)
            report = take_part(self.path, order.ticket, self._parts(plan, planner, order))
        except BaseException:
            self.abort()  # torch does not tell even the coordinator of its own failure
            raise
        results = _Results([WriteResult(MetadataIndex(""), len(report), _Done(report, values))])
        if self._held:
            weakref.finalize(results, _give_up, self._held, os.getpid(), list(self._held))
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def _values(self, plan: SavePlan, planner: SavePlanner) -> dict[str, Any]:
        """Return the values that are not tensors, looked at: they have to be data."""
        items = [item for item in plan.items if item.type is WriteItemType.BYTE_IO]
        if items and not hasattr(planner, "lookup_object"):
            raise UsageError(
                "the planner gives values that are not tensors only as a pickle",
                path=self.path,
                field=items[0].index.fqn,
                found=type(planner).__name__,
                expected="a planner with the method lookup_object, as torch's DefaultSavePlanner has",
            )
        values = {item.index.fqn: planner.lookup_object(item.index) for item in items}
        flatten(values)
        return values

    def _parts(
        self, plan: SavePlan, planner: SavePlanner, order: _Order
    ) -> Iterator[tuple[str, tuple[int, ...], np.ndarray | LazyArray]]:
        for item in plan.items:
            if item.tensor_data is not None:
                name = order.names[item.index.fqn]
                yield name, tuple(item.tensor_data.chunk.offsets), _source(planner, item, name)
        for name in order.arrays:
            assert self.local is not None
            array = self.local.arrays[name]
            yield name, (0,) * len(array.shape), array

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:  # noqa: ARG002
        """Make the checkpoint visible."""
        (coordinator,) = self._held
        done: list[_Done] = [result.storage_data for its in results for result in its]
        tree = None
        try:
            if self._nested is not None:
                values = {key: value for one in done for key, value in one.values.items()}
                tree, _, arrays = self._nested.flattened(values)
                if arrays:
                    coordinator.add(plan_save(arrays))
            coordinator.commit([one.report for one in done], tree=tree)
        finally:
            self.abort()

    def abort(self) -> None:
        """Give up a save that was not finished: what was written is removed. On ranks but rank 0, it does nothing."""
        _give_up(self._held, os.getpid())

    def _cached(self) -> UsageError:
        return UsageError(
            "a plan that was made for an earlier save says where that one wrote",
            path=self.path,
            field="enable_plan_caching",
            hint="pass a planner that does not cache plans",
        )


def _writer_of(path: str | None, overwrite: bool, durable: bool, attributes: Any, allow_nfs: bool) -> Writer:
    return Writer(path, overwrite=overwrite, durable=durable, attributes=attributes, allow_nfs=allow_nfs)


def _give_up(held: list[Coordinator], process: int, only: list[Coordinator] | None = None) -> None:
    """Abort saves that are still held, unless another process holds them."""
    if os.getpid() == process:
        for coordinator in list(held):
            if only is None or coordinator in only:
                held.remove(coordinator)
                with contextlib.suppress(OSError, VarstoreError):
                    coordinator.abort()


def _source(planner: SavePlanner, item: WriteItem, name: str) -> np.ndarray | LazyArray:
    tensor: Any = planner.resolve_data(item)
    source = as_source(tensor.detach(), name)
    assert isinstance(source, np.ndarray | LazyArray)
    return source


def _paths(plans: list[SavePlan]) -> dict[str, tuple[str | int, ...]]:
    """Return the path of each value by its key; without nested state, the key is the whole path."""
    paths: dict[str, tuple[str | int, ...]] = {}
    for plan in plans:
        paths |= {key: tuple(path) for key, path in (plan.planner_data or {}).items() if key not in paths}
    return paths or {item.index.fqn: (item.index.fqn,) for plan in plans for item in plan.items}


def _ties(plans: list[SavePlan], offers: list[_Offer]) -> dict[str, str]:
    """Return the tensors that are one in memory with another, on every rank that has values of either of them.

    A rank that has only the other one may be the one that writes it, with values of its own.
    """
    ties = {name: first for offer in offers for name, first in offer.ties.items()}
    for plan, offer in zip(plans, offers, strict=True) if ties else ():
        held = {item.index.fqn for item in plan.items if item.tensor_data and 0 not in item.tensor_data.chunk.sizes}
        for name, first in list(ties.items()):
            if not held.isdisjoint((name, first)) and offer.ties.get(name) != first:
                del ties[name]
    return ties


def _dealt(offers: list[_Offer]) -> list[tuple[str, ...]]:
    """Return which arrays each rank writes: those that no rank before it has."""
    seen: set[str] = set()
    dealt = []
    for offer in offers:
        own = tuple(name for name in offer.arrays if name not in seen)
        seen.update(own)
        dealt.append(own)
    return dealt
