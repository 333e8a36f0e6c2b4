"""What a distributed state holds: tensors with the rectangles of them that this rank has, and values of other kinds.

Dicts are looked into, and so are lists in which a tensor or a dict is, as torch.distributed.checkpoint does. Everything
else in them is one value, which is replaced as a whole. Objects with ``state_dict`` and ``load_state_dict`` stand for
their state dicts.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner_helpers import _create_chunk_list
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.checkpoint.utils import find_tensor_shard

from varstore.adapters.torch.survey import spec_of_tensor
from varstore.errors import UnsupportedDtype, UsageError
from varstore.model.match import Spec
from varstore.training.tensors import Leaf, to_torch
from varstore.values.arguments import described
from varstore.values.arrays import as_source
from varstore.values.nodes import Names

__all__ = ["Shard", "Target", "Targets", "hand_over", "host_array", "survey"]


class Shard(NamedTuple):
    """A rectangle of a tensor that this rank has, in elements, and the memory of it."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    memory: torch.Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """A tensor to fill: its whole shape and type, the rectangles that this rank has, and where their memory is."""

    spec: Spec
    shards: tuple[Shard, ...]

    @property
    def place(self) -> Hashable:
        """What tied tensors have in common; None if this rank does not have any of its values."""
        held = [shard for shard in self.shards if shard.memory.numel()]
        return tuple((shard.memory.data_ptr(), shard.offsets, shard.sizes) for shard in held) or None


class _Slot(NamedTuple):
    holder: Any
    key: Any


@dataclass(kw_only=True, slots=True)
class Targets:
    """What can be loaded into a state, by name: the keys and indices that lead to it, joined by ``/``."""

    tensors: dict[str, Target] = field(default_factory=dict)
    values: dict[str, _Slot] = field(default_factory=dict)
    objects: list[tuple[Stateful, Any]] = field(default_factory=list)

    def put(self, values: Mapping[str, Any]) -> None:
        """Replace values that are not tensors, then give the objects their state dicts."""
        for name, value in values.items():
            holder, key = self.values[name]
            holder[key] = value
        for held, state in self.objects:
            held.load_state_dict(state)

    def __contains__(self, name: str) -> bool:
        return name in self.tensors or name in self.values

    def __iter__(self) -> Iterator[str]:
        yield from self.tensors
        yield from self.values


def survey(state: Any) -> Targets:
    """Look at a state; nothing of it changes.

    Raises:
        UsageError: it is not a dict, or a tensor in it cannot be filled.
        UnsupportedDtype: a tensor is of a type or kind that is never in a checkpoint.
    """
    found = Targets()
    root = _opened(state, found)
    if not isinstance(root, MutableMapping):
        raise UsageError(
            "a state is a dict, or an object with state_dict and load_state_dict",
            field="state",
            found=described(state),
            hint='pass {"model": model}, or what get_model_state_dict returns',
        )
    with torch.no_grad():  # for which to_local would record something
        _note(root, (), Names(), found)
    return found


def _opened(value: Any, found: Targets) -> Any:
    if not _is_object(value):
        return value
    state = value.state_dict()
    found.objects.append((value, state))
    return state


def _is_object(value: Any) -> bool:
    """Tell whether this is what torch calls stateful, in much less time than its own test takes."""
    return hasattr(value, "state_dict") and hasattr(value, "load_state_dict") and not isinstance(value, type)


def _note(holder: Any, parts: tuple[str, ...], names: Names, found: Targets) -> None:
    items = holder.items() if isinstance(holder, Mapping) else enumerate(holder)
    for key, given in items:
        value = _opened(given, found)
        path = (*parts, key if type(key) is str else repr(key))
        if isinstance(value, torch.Tensor):
            name = names.own("/".join(path))
            found.tensors[name] = _target_of(value, name)
        elif isinstance(value, Mapping) or (isinstance(value, list) and _is_looked_into(value)):
            _note(value, path, names, found)
        else:
            name = names.own("/".join(path))
            _refuse_within(value, name)
            found.values[name] = _Slot(holder, key)


def _is_looked_into(items: list[Any]) -> bool:
    return any(
        isinstance(item, torch.Tensor | Mapping)
        or _is_object(item)
        or (isinstance(item, list) and _is_looked_into(item))
        for item in items
    )


def _refuse_within(value: Any, name: str) -> None:
    """Refuse a tuple or set in which a part of a tensor is: it would be replaced by the whole of the tensor."""
    if not isinstance(value, tuple | set | frozenset):
        return
    for item in value:
        if isinstance(item, torch.Tensor) and not _is_whole(item):
            raise UsageError(
                f"a {type(value).__name__} that holds parts of tensors cannot be filled",
                variable=name,
                hint="hold them in a list or a dict",
            )
        _refuse_within(item, name)


def _is_whole(tensor: torch.Tensor) -> bool:
    chunks = _create_chunk_list(tensor)
    return len(chunks) == 1 and tuple(chunks[0].sizes) == tuple(tensor.shape)


def _target_of(tensor: torch.Tensor, name: str) -> Target:
    spec = spec_of_tensor(tensor)
    if spec is None:
        raise UnsupportedDtype(
            "a tensor of this kind is not in a checkpoint",
            variable=name,
            found=f"{type(tensor).__name__} of {tensor.dtype}",
            hint="leave it out of the state",
        )
    try:
        shards = tuple(_shards(tensor, name))
    except (RuntimeError, ValueError) as error:  # torch's: of sums that are not made yet, or shards without an end
        raise UsageError(
            "torch does not say which part of this tensor the rank has",
            variable=name,
            found=str(error).partition("\n")[0],
            hint="redistribute it to Shard or Replicate placements",
        ) from error
    for shard in shards:
        if shard.memory.is_meta and shard.memory.numel():
            raise UsageError(
                "a tensor on the meta device has no memory to load into",
                variable=name,
                hint="call module.to_empty(device=...) first",
            )
    return Target(spec=spec, shards=shards)


def _shards(tensor: torch.Tensor, name: str) -> Iterator[Shard]:
    mesh = getattr(tensor, "device_mesh", None)
    if mesh is not None and mesh.get_coordinate() is None:  # it is spread over other ranks
        return
    for index, chunk in enumerate(_create_chunk_list(tensor)):
        memory = find_tensor_shard(tensor, MetadataIndex(name, chunk.offsets, index)).detach()
        sizes = tuple(chunk.sizes)
        if memory.numel() or 0 not in sizes:
            if tuple(memory.shape) != sizes:
                raise ValueError(f"a part of shape {tuple(memory.shape)} for a rectangle of {sizes}")
            yield Shard(tuple(chunk.offsets), sizes, memory)


def host_array(memory: torch.Tensor) -> np.ndarray | None:
    """Return the memory of a tensor as an array; None where the host does not have it, or not as it is."""
    if memory.device.type != "cpu" or memory.is_conj() or memory.is_neg():
        return None
    array = as_source(memory, variable="")
    assert isinstance(array, np.ndarray)
    return array


def hand_over(memory: torch.Tensor, values: np.ndarray) -> None:
    """Copy values to a tensor, which may be on another device."""
    with torch.no_grad():
        memory.copy_(to_torch(values, Leaf(name=""), "cpu"))
