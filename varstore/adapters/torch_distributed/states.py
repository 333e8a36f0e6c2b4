"""What a rank has of a state that is saved together: the tensors and arrays by name, and the tree that holds the rest.

A name is the one that `varstore.save_state` gives: the path of keys, joined by ``/``. Tensors stay where they are until
they are written; in the tree, something of their shape and type stands for each.
"""

from __future__ import annotations

import json
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.tensor import DTensor

from varstore import live
from varstore.disk.save.together import placeholder
from varstore.errors import UsageError
from varstore.training.tensors import BUILT, PARAMETER, TENSOR, as_array
from varstore.training.tree import flatten, joined
from varstore.values.arrays import as_source
from varstore.values.lazy import LazyArray

__all__ = ["Kind", "LocalState", "Nested", "flatten_state", "merged", "names_in", "numpy_type"]

_PLAIN = (torch.Tensor, torch.nn.Parameter)


class Kind(NamedTuple):
    """The shape and type of a variable."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]


@dataclass(kw_only=True, slots=True)
class LocalState:
    """What one rank has: `tensors`, whole or in part, `arrays`, which are always whole, and what the tree says.

    `ties` has, for each tensor whose memory another one before it has, the name of that.
    """

    tree: str
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    arrays: dict[str, np.ndarray | LazyArray] = field(default_factory=dict)
    ties: dict[str, str] = field(default_factory=dict)


def flatten_state(state: Any) -> LocalState:
    """Flatten the state of a rank; objects with a method ``state_dict`` are replaced by what it returns.

    Raises:
        UsageError, UnsupportedDtype: see `varstore.save_state`.
    """
    held: dict[int, tuple[LazyArray, torch.Tensor]] = {}

    def stored_as(value: Any) -> tuple[Any, dict[str, Any]] | None:
        if not _can_wait(value):
            return as_array(value)
        standing = placeholder(tuple(value.shape), numpy_type(value.dtype))
        held[id(standing)] = standing, value
        said = {"$": "array", "type": PARAMETER if isinstance(value, torch.nn.Parameter) else TENSOR}
        return standing, {**said, "requires_grad": True} if value.requires_grad else said

    with torch.no_grad():
        flat = flatten(live.state_of(state), stored_as)
        local = LocalState(tree=flat.tree)
        first_of: dict[Hashable, str] = {}
        for name, value in flat.variables.items():
            if id(value) not in held:
                source = as_source(value, name)
                assert isinstance(source, np.ndarray | LazyArray)
                local.arrays[name] = source
                continue
            tensor = local.tensors[name] = held[id(value)][1]
            if isinstance(tensor, DTensor) and any(placement.is_partial() for placement in tensor.placements):
                raise UsageError(
                    "a tensor of sums that are not made yet has no values to save",
                    variable=name,
                    found=str(tensor.placements),
                    hint="redistribute it to Shard or Replicate placements",
                )
            memory = _memory(tensor)
            if memory is not None and (first := first_of.setdefault(memory, name)) != name:
                local.ties[name] = first
    return local


def _can_wait(value: Any) -> bool:
    """Tell whether this is a tensor that is looked at when it is written; the others are refused by `flatten`."""
    if isinstance(value, DTensor | ShardedTensor):
        return True
    return type(value) in _PLAIN and value.layout is torch.strided and not (value.is_quantized or value.is_meta)


def _memory(tensor: torch.Tensor) -> Hashable:
    """Return what two tensors have in common if they are one in memory; None where this rank has no values of it."""
    if isinstance(tensor, ShardedTensor):
        return None
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    if not local.numel():
        return None
    spread = (tensor.device_mesh, tensor.placements) if isinstance(tensor, DTensor) else None
    place = (local.data_ptr(), local.stride(), local.shape, local.dtype, local.device)
    seen_as = (local.is_conj(), local.is_neg())  # the values of such a view are not those in memory
    return place, seen_as, spread, tensor.shape


@cache
def numpy_type(dtype: torch.dtype) -> np.dtype[Any]:
    """Return numpy's type for one of torch's.

    Raises:
        UnsupportedDtype: there is none.
    """
    source: Any = as_source(torch.empty(0, dtype=dtype), "")
    found: np.dtype[Any] = source.dtype
    return found


def merged(trees: Sequence[str]) -> str:
    """Return the tree of all ranks: the first one's, and what only others have, such as a value for each rank."""
    different = list(dict.fromkeys(trees))
    if len(different) == 1:
        return different[0]
    whole = joined([json.loads(tree) for tree in different], lambda *found: found[1])
    return different[0] if whole is None else json.dumps(whole, ensure_ascii=False, separators=(",", ":"))


def names_in(tree: str) -> Iterator[str]:
    """Yield the names of the variables of a tree, in order."""
    waiting = [json.loads(tree)]
    while waiting:
        node = waiting.pop()
        if isinstance(node, dict) and node.get("$") in ("array", *BUILT):
            yield node["name"]
        elif isinstance(node, dict | list):
            waiting += reversed([*node.values()] if isinstance(node, dict) else node)


class Nested:
    """The state of a plan of torch.distributed.checkpoint, which has the keys and indices that lead to each value.

    Of the tensors among them, only the `kinds` are known here; the other values come later.
    """

    def __init__(self, paths: Mapping[str, Sequence[str | int]], kinds: Mapping[str, Kind]) -> None:
        self._paths = paths
        self._standing = {key: placeholder(*kind) for key, kind in kinds.items()}

    def flattened(self, values: Mapping[str, Any]) -> tuple[str, dict[str, str], dict[str, Any]]:
        """Return the tree, the name of each tensor by its key, and the arrays among the other values by name.

        Raises:
            UsageError, UnsupportedDtype: a value is not data; see `varstore.save_state`.
        """
        key_of = {id(standing): key for key, standing in self._standing.items()}

        def stored_as(value: Any) -> tuple[Any, dict[str, Any]] | None:
            return (value, {"$": "array", "type": TENSOR}) if id(value) in key_of else as_array(value)

        state = _nested((path, self._standing.get(key, values.get(key))) for key, path in self._paths.items())
        flat = flatten(state, stored_as)
        names = {key_of[id(value)]: name for name, value in flat.variables.items() if id(value) in key_of}
        return flat.tree, names, {name: value for name, value in flat.variables.items() if id(value) not in key_of}


class _Level(dict[str | int, Any]):
    """A dict or list that is being built."""


def _nested(values: Iterable[tuple[Sequence[str | int], Any]]) -> Any:
    """Return the dicts and lists that hold values at their paths; in a list, a key is an index."""
    root = _Level()
    for path, value in values:
        level = root
        for key in path[:-1]:
            level = level.setdefault(key, _Level())
        level[path[-1]] = value
    return _built(root)


def _built(node: Any) -> Any:
    if type(node) is not _Level:
        return node
    if node and all(type(key) is int for key in node):
        return [_built(node.get(index)) for index in range(max(node) + 1)]  # type: ignore[operator]
    return {key: _built(item) for key, item in node.items()}
