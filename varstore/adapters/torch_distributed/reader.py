"""`Reader`: checkpoints as the storage that ``torch.distributed.checkpoint.load`` reads from."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from varstore.adapters.torch_distributed.parts import read_parts
from varstore.adapters.torch_distributed.ranks import are_ranks, threads_beside
from varstore.adapters.torch_distributed.reading import disagreement
from varstore.adapters.torch_distributed.targets import Shard
from varstore.disk.read.checkpoint import Checkpoint, open_checkpoint
from varstore.disk.read.checks import check_files
from varstore.disk.read.variable import Variable
from varstore.errors import ManifestError, UsageError
from varstore.model.options import Path
from varstore.training.state import filled, outlined, plain_tree
from varstore.training.tensors import BUILT, PARAMETER, TENSOR, Leaf, to_torch
from varstore.values.arguments import checked, checked_path
from varstore.values.nodes import Unbuilt, leaves, replaced

__all__ = ["Reader"]


class Reader(StorageReader):  # type: ignore[misc]  # torch's
    """Read a checkpoint with ``torch.distributed.checkpoint.load``, for programs that call it themselves.

    Any checkpoint can be read, whoever saved it: the metadata that torch wants is made from the manifest. Names are
    those of ``dcp.save``: the keys and indices that lead to a value, joined by dots; without nested state, the names
    of the variables. Each rank reads its own parts, straight into the memory that tensors have on the host. As torch
    does, values are converted to the types of the tensors, and names that are not asked for are left alone.

    An error is raised on all ranks, in a ``CheckpointException``, which has varstore's in its `failures`; for a
    checkpoint that cannot be opened, torch's, which quotes it.

    Args:
        path: a checkpoint's directory. The ``checkpoint_id`` of ``dcp.load`` takes its place.
        verify: as for `load`.

    Example:
        >>> import torch
        >>> import torch.distributed as dist
        >>> import torch.distributed.checkpoint as dcp
        >>> from varstore.adapters.torch_distributed import Reader
        >>> checkpoint = vs.save_state("before", {"model": torch.nn.Linear(2, 3).state_dict(), "epoch": 3})
        >>> state = {"model": torch.nn.Linear(2, 3).state_dict(), "epoch": 0}
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> dcp.load(state, storage_reader=Reader("before"))
        >>> dist.destroy_process_group()
        >>> state["epoch"]
        3
    """

    @checked
    def __init__(self, path: Path | None = None, *, verify: bool = True) -> None:
        super().__init__()
        self._verify = verify
        self.reset(path)

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Read from another path from now on, or from the same again."""
        if checkpoint_id is not None:
            self.checkpoint_id: str | os.PathLike[str] = checkpoint_id
        self._checkpoint: Checkpoint | None = None
        self._variables: dict[str, Variable] = {}
        self._values: dict[str, Any] = {}

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Tell whether this may be a path."""
        try:
            checked_path(checkpoint_id, "checkpoint_id")
        except UsageError:
            return False
        return True

    def read_metadata(self) -> Metadata:
        """Open the checkpoint, and return the names, shapes and types of what is in it.

        Raises:
            CheckpointNotFound, IncompleteCheckpoint, ManifestError: it cannot be opened.
            UsageError: there is no path.
        """
        if not hasattr(self, "checkpoint_id"):
            raise UsageError("there is no path to read from", hint="pass it to Reader, or checkpoint_id= to dcp.load")
        checkpoint = self._checkpoint = open_checkpoint(self.checkpoint_id)
        nested = outlined(checkpoint, checkpoint.tree or plain_tree(checkpoint))
        if not isinstance(nested, Mapping):
            raise UsageError(
                "the saved state is not a dict, which dcp.load wants",
                path=checkpoint.path,
                found=type(nested).__name__,
                hint="varstore.load_state loads it",
            )
        is_of_torch = any(isinstance(leaf, Leaf) and leaf.type in (TENSOR, PARAMETER) for _, leaf in leaves(nested))
        shown = replaced(nested, partial(self._shown, is_of_torch=is_of_torch))
        flat, places = flatten_state_dict(shown)
        metadata: dict[str, Any] = {}
        for name, value in flat.items():
            if isinstance(value, _Array):
                metadata[name] = value.metadata
                self._variables[name] = value.variable
            else:
                metadata[name] = BytesStorageMetadata()
                self._values[name] = _node_at(nested, places[name])
        return Metadata(metadata, planner_data=places)

    def _shown(self, leaf: Any, *, is_of_torch: bool) -> Any:
        """Return what stands for a leaf while names are made: for an array that becomes a tensor, a tensor."""
        if not isinstance(leaf, Leaf):
            return leaf
        variable = None if self._checkpoint is None else self._checkpoint.get(leaf.name)
        if not isinstance(variable, Variable):
            raise ManifestError(
                "the tree names a variable that does not exist",
                path=getattr(self._checkpoint, "path", None),
                variable=leaf.name,
            )
        if leaf.type in BUILT or (is_of_torch and leaf.type not in (TENSOR, PARAMETER)):
            return None
        return _Array.of(variable)

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool) -> None:
        """Do nothing: all that is needed is known."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Look at the files that this rank reads, before any rank reads, and say which checkpoint they are of.

        Raises:
            SizeMismatch, FormatError: one is missing, or has the wrong size.
        """
        wanted = {item.storage_index.fqn: None for item in plan.items if item.type is not LoadItemType.BYTE_IO}
        variables = [self._variables[name] for name in wanted]
        check_files((variable.location, variable.entry) for variable in variables)
        assert self._checkpoint is not None
        return replace(plan, storage_data=self._checkpoint.content.fingerprint())

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Return the plans: each rank reads by itself, but all of them one checkpoint.

        Raises:
            StorageError: they opened different ones, as when one was replaced meanwhile.
        """
        identities = [plan.storage_data for plan in plans]
        if len(set(identities)) > 1:
            raise disagreement(os.fspath(self.checkpoint_id), identities)
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read what the plan says.

        Raises:
            DigestMismatch: the bytes are not those that were saved.
        """
        assert self._checkpoint is not None
        tensors: list[tuple[ReadItem, torch.Tensor]] = []
        wanted: dict[str, ReadItem] = {}
        for item in plan.items:
            if item.type is LoadItemType.BYTE_IO:
                wanted[item.storage_index.fqn] = item
            else:
                tensors.append((item, planner.resolve_tensor(item).detach()))
        threads = threads_beside(dist.get_world_size() if are_ranks() else 1)
        read_parts(
            self._checkpoint.location,
            [(self._variables[item.storage_index.fqn], _shard(item, tensor)) for item, tensor in tensors],
            verify=self._verify,
            threads=threads,
        )
        for item, tensor in tensors:
            planner.commit_tensor(item, tensor)
        nodes = {name: self._values[name] for name in wanted}
        values = filled(self._checkpoint, nodes, map_location="cpu", verify=self._verify, threads=threads)
        for name, item in wanted.items():
            planner.load_bytes(item, _pickled(values[name]))
        done: Future[None] = Future()
        done.set_result(None)
        return done


def _pickled(value: Any) -> io.BytesIO:
    """Return a value as planners want it; it is pickled in memory, by the process that unpickles it."""
    stream = io.BytesIO()
    torch.save(value, stream)
    stream.seek(0)
    return stream


def _shard(item: ReadItem, tensor: torch.Tensor) -> Shard:
    return Shard(tuple(item.storage_offsets), tuple(item.lengths), tensor)


class _Array(torch.Tensor):  # type: ignore[misc]  # torch's
    """Stands for an array of a checkpoint in a state that torch flattens, and looks into lists of tensors for that."""

    variable: Variable
    metadata: TensorStorageMetadata

    @classmethod
    def of(cls, variable: Variable) -> _Array:
        """Return what stands for a variable."""
        array: _Array = torch.empty(0, device="meta").as_subclass(cls)
        array.variable = variable
        size = torch.Size(variable.shape)
        whole = ChunkStorageMetadata(offsets=torch.Size([0] * len(size)), sizes=size)
        dtype = to_torch(np.empty(0, variable.dtype), Leaf(name=variable.name), "cpu").dtype
        array.metadata = TensorStorageMetadata(TensorProperties(dtype=dtype), size, [whole])
        return array


def _node_at(node: Any, path: tuple[str | int, ...]) -> Any:
    """Return what is at a place in nested state, of which torch has the keys as text."""
    for part in path:
        items = node.items if isinstance(node, Unbuilt) else node
        if isinstance(items, Mapping):
            node = next(item for key, item in items.items() if str(key) == part)
        else:
            node = items[part]
    return node
