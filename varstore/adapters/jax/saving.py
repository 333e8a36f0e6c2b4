"""Save pytrees: from one process, or from all processes of a program, of which each writes its own shards."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import Any, TypedDict, Unpack

import jax
import numpy as np

from varstore.adapters.jax.processes import Processes
from varstore.adapters.jax.shards import box_of
from varstore.adapters.jax.trees import array_spec, is_key, state_of
from varstore.disk.read.checkpoint import Checkpoint, open_checkpoint
from varstore.disk.save.foreign import Foreign
from varstore.disk.save.together import Coordinator, host, placeholder, take_part
from varstore.errors import VariableMismatch
from varstore.layout.regions import Region
from varstore.model.options import Path, StateOptions
from varstore.training.state import save_state
from varstore.training.tensors import JAX, KEY, as_array
from varstore.training.tree import flatten
from varstore.values.arguments import checked, checked_path
from varstore.values.arrays import Stored
from varstore.values.lazy import LazyArray
from varstore.values.plan import PlannedVariable, SavePlan, plan_save
from varstore.version import __version__

__all__ = ["save", "save_sharded"]


@checked
def save(path: Path, tree: Any, **save_options: Unpack[StateOptions]) -> Checkpoint:
    """Save a pytree; variables are named by their path, such as ``params/Dense_0/kernel``.

    Arrays that are sharded over the devices of this process are saved whole, and so are those that every process of a
    program has whole. Those that are sharded over several processes are for `save_sharded`.

    Args:
        path: a path that does not exist, or an empty directory; see `varstore.save`.
        tree: the pytree.
        save_options: the options of `varstore.save`.

    Raises:
        UsageError: a leaf is not data.
        UnsupportedDtype: an array is sharded over processes, or has a type that the format cannot store.
        CheckpointExists, OutOfSpace, StorageError: see `varstore.save`.

    Example:
        >>> import jax.numpy as jnp
        >>> from varstore.adapters.jax import save
        >>> save("params", {"dense": {"kernel": jnp.ones((2, 3)), "bias": jnp.zeros(3)}}).names
        ('dense/kernel', 'dense/bias')
    """
    return save_state(path, state_of(tree), **save_options)


@checked
def save_sharded(
    path: Path,
    tree: Any,
    *,
    attributes: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    foreign: Foreign = "error",
    durable: bool = True,
    allow_nfs: bool = False,
    timeout: float = 300.0,
) -> Checkpoint:
    """Save a pytree from all processes of a program, each of which writes the shards that its own devices hold.

    Every process makes this call, with a pytree of the same structure and the same path, on a file system that all of
    them share. The result is an ordinary checkpoint, either complete or absent: `load` and `varstore.load` read it in
    one process, and `load_sharded` on any mesh. Of replicas of a shard, one is written. What is not sharded over
    processes, such as numpy arrays and numbers, is saved as process 0 has it.

    The processes reach each other through the service of `jax.distributed`. Where one fails, all raise its error; where
    one dies, the others raise an error after 15 seconds. Nothing is visible then, and what lay at the path stays.

    Args:
        path: see `save`; a path that only leads to the same directory on all machines.
        tree: the pytree.
        attributes, overwrite, foreign, durable: see `varstore.save`.
        allow_nfs: let several machines write to NFS, where they may lose bytes of each other: verify the checkpoint.
        timeout: seconds to wait for a process that has not made this call yet.

    Raises:
        VariableMismatch: the processes do not have the same arrays.
        UsageError: a leaf is not data, or `jax.distributed` is not initialized.
        StorageError: a process died, does not take part, or does not see the same directory.
        UnsupportedDtype, CheckpointExists, OutOfSpace: see `varstore.save`.

    Example:
        >>> import jax.numpy as jnp
        >>> from varstore.adapters.jax import save_sharded
        >>> save_sharded("params", {"kernel": jnp.ones((2, 3))}).names  # in a program of one process, `save`
        ('kernel',)
    """
    if jax.process_count() == 1:
        return save(path, tree, attributes=attributes, overwrite=overwrite, foreign=foreign, durable=durable)
    target = checked_path(path, "path")
    options: _Options = {"overwrite": overwrite, "foreign": foreign, "durable": durable, "allow_nfs": allow_nfs}
    with _Saving(target) as saving, Processes("save", timeout) as processes:
        left_out = saving.run(processes, tree, attributes, options)
    checkpoint = open_checkpoint(target)
    checkpoint.left_out = left_out
    return checkpoint


class _Options(TypedDict):
    """How `Coordinator` stages a save."""

    overwrite: bool
    foreign: Foreign
    durable: bool
    allow_nfs: bool


class _Saving:
    """One save, in one of the processes; process 0 coordinates it, and undoes it if an error ends the block."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._coordinator: Coordinator | None = None

    def __enter__(self) -> _Saving:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._coordinator is not None and error is not None:
            self._coordinator.abort(error)

    def run(
        self, processes: Processes, tree: Any, attributes: Mapping[str, Any] | None, options: _Options
    ) -> tuple[str, ...]:
        """Save, and return what was left out."""
        own = _Own(tree)
        plans = processes.gather("plan", own.described())
        coordinator = plans and self._coordinated(own, plans, attributes, options)
        ticket = processes.scatter("ticket", coordinator.tickets if coordinator else None)
        reports = processes.gather("report", take_part(self._path, ticket, processes.watched(own.values())))
        if coordinator and reports:
            coordinator.commit(reports)
        processes.scatter("saved", reports and [""] * processes.count)
        return own.left_out

    def _coordinated(
        self, own: _Own, plans: list[str], attributes: Mapping[str, Any] | None, options: _Options
    ) -> Coordinator:
        said = [json.loads(plan) for plan in plans]
        for process, other in enumerate(said):
            _require_same(said[0]["variables"], other["variables"], process, self._path)
        plan = own.planned(attributes)
        parts = [_parts_of(one) for one in said]
        parts[0] |= {variable.name: [Region.whole(variable.meta.shape)] for variable in own.whole}
        hosts = [one["host"] for one in said]
        writer = f"varstore {__version__}"
        self._coordinator = Coordinator(self._path, plan, parts, hosts=hosts, writer=writer, **options)
        return self._coordinator


class _Own:
    """What one process has: the pytree as flat variables, and its shards of those that are spread over processes.

    `whole` are the variables that this process writes whole, once they are `planned`.
    """

    def __init__(self, tree: Any) -> None:
        self._spread: dict[int, tuple[LazyArray, Any]] = {}
        flat = flatten(state_of(tree), self._stored_as)
        arrays = {id(stored): array for stored, array in self._spread.values()}
        self._flat = flat
        self._shards = {
            name: (stored, list(_shards(arrays[id(stored)], stored)))
            for name, stored in flat.variables.items()
            if id(stored) in arrays
        }
        self.left_out = flat.left_out
        self.whole: list[PlannedVariable] = []

    def _stored_as(self, value: Any) -> tuple[Any, dict[str, Any]] | None:
        """Return what stands for an array that is spread over processes, and what the tree says of it."""
        if not isinstance(value, jax.Array) or isinstance(value, jax.core.Tracer) or value.is_deleted():
            return as_array(value)
        if value.is_fully_addressable:
            return as_array(value)
        if id(value) not in self._spread:
            stored = placeholder(*array_spec(value), identity=("jax", id(value)))
            self._spread[id(value)] = stored, value
        said = {"$": KEY, "impl": str(jax.random.key_impl(value))} if is_key(value) else {"$": "array", "type": JAX}
        return self._spread[id(value)][0], said

    def described(self) -> str:
        """Return what process 0 has to know."""
        shards = [(name, [region[:2] for region, _ in shards]) for name, (_, shards) in self._shards.items()]
        kinds = {name: [list(stored.shape), str(stored.dtype)] for name, (stored, _) in self._shards.items()}
        return json.dumps({"host": host(), "variables": kinds, "shards": shards})

    def planned(self, attributes: Mapping[str, Any] | None) -> SavePlan:
        """Return the plan of all variables, of which this process writes those that are not spread."""
        read = {
            name: LazyArray(value.shape, value.dtype, value.numpy) if isinstance(value, Stored) else value
            for name, value in self._flat.variables.items()
        }
        plan = plan_save(read, attributes=attributes, tree=self._flat.tree)
        self.whole = [v for v in plan.variables if v.name not in self._shards and not v.alias_of]
        return plan

    def values(self) -> Iterator[tuple[str, Sequence[int], Any]]:
        """Yield what this process writes: the variable, where the values begin in it, and the values."""
        for name, (_, shards) in self._shards.items():
            for region, values in shards:
                yield name, region.offsets, values
        for variable in self.whole:
            yield variable.name, Region.whole(variable.meta.shape).offsets, variable.source


def _shards(array: Any, stored: LazyArray) -> Iterator[tuple[Region, LazyArray]]:
    """Yield the regions of an array that this process writes, with their values: the first of its replicas."""
    for shard in array.addressable_shards:
        if shard.replica_id == 0:
            rest = [slice(None)] * (len(stored.shape) - len(shard.index))  # of keys, the axis of their data
            box = box_of((*shard.index, *rest), stored.shape)
            region = Region(tuple(start for start, _ in box), tuple(stop - start for start, stop in box))
            yield region, LazyArray(region.sizes, stored.dtype, partial(_values, shard))


def _values(shard: Any) -> np.ndarray:
    return np.asarray(jax.random.key_data(shard.data) if is_key(shard.data) else shard.data)


def _parts_of(said: Mapping[str, Any]) -> dict[str, list[Region]]:
    """Return the regions that a process has, by variable."""
    return {
        name: [Region(tuple(offsets), tuple(sizes)) for offsets, sizes in regions] for name, regions in said["shards"]
    }


def _require_same(first: Mapping[str, Any], other: Mapping[str, Any], process: int, path: str) -> None:
    """Check that a process has the arrays that process 0 has.

    Raises:
        VariableMismatch: they differ.
    """
    for name in (*first, *other):
        if (expected := first.get(name)) != (found := other.get(name)):
            raise VariableMismatch(
                f"process {process} does not have the same arrays as process 0",
                path=path,
                variable=name,
                found=_form(found),
                expected=_form(expected),
                hint="pass a pytree of the same structure, shapes and types in every process",
            )


def _form(said: Any) -> str:
    return "none that is sharded over processes" if said is None else f"shape {tuple(said[0])}, {said[1]}"
