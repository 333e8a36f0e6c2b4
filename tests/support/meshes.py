"""A model on meshes of 1 to 4 ranks, for the tests of `varstore.adapters.torch_distributed`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

__all__ = ["MESHES", "VALUES", "Net", "Run", "clear", "tensors_of", "whole"]


class Net(torch.nn.Module):
    """Rows and columns for tensor parallelism, 7 x 64 values that no mesh divides, and a buffer without dimensions."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.up = torch.nn.Linear(16, 64)
        self.down = torch.nn.Linear(64, 16)
        self.odd = torch.nn.Linear(64, 7)
        self.register_buffer("count", torch.tensor(seed))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.odd(torch.cat([self.down(self.up(x).relu())] * 4, -1))


def _tensor_parallel(net: Net, mesh: DeviceMesh) -> None:
    parallelize_module(net, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})


def _mixed(net: Net, mesh: DeviceMesh) -> None:
    _tensor_parallel(net, mesh["b"])
    fully_shard(net, mesh=mesh["a"])


def _fully(net: Net, mesh: DeviceMesh) -> None:
    fully_shard(net, mesh=mesh)


MESHES: dict[str, tuple[tuple[int, ...], Callable[[Net, DeviceMesh], None]]] = {
    "one": ((1,), lambda net, mesh: None),
    "replicated-3": ((3,), lambda net, mesh: None),
    "fsdp-1": ((1,), _fully),
    "fsdp-2": ((2,), _fully),
    "fsdp-3": ((3,), _fully),
    "fsdp-4": ((4,), _fully),
    "tensor-2": ((2,), _tensor_parallel),
    "fsdp-tensor-2x2": ((2, 2), _mixed),
    "hybrid-2x2": ((2, 2), _fully),
}
"""The extents of each mesh, and what spreads a model over it."""


class Run:
    """A model and its optimizer on a mesh; `is_here` is False on ranks that do not take part."""

    _groups: ClassVar[dict[int, Any]] = {}

    def __init__(self, name: str, seed: int) -> None:
        extents, spread = MESHES[name]
        size = torch.Size(extents).numel()
        for count in range(1, dist.get_world_size() + 1):
            if count not in self._groups:
                self._groups[count] = dist.new_group(list(range(count)))  # every rank makes every group
        self.group = self._groups[size]
        mesh = DeviceMesh("cpu", torch.arange(size).reshape(extents), mesh_dim_names=("a", "b")[: len(extents)])
        self.is_here = dist.get_rank() < size
        if not self.is_here:
            return
        self.net = Net(seed)
        spread(self.net, mesh)
        self.optimizer = torch.optim.AdamW(self.net.parameters(), lr=0.01)

    def train(self, first: int, last: int) -> list[float]:
        """Take steps; every rank has the whole of each batch, so that all meshes compute the same."""
        losses = []
        for step in range(first, last):
            x = torch.randn(8, 16, generator=torch.Generator().manual_seed(step))
            loss = self.net(x).square().mean()
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    def state(self) -> dict[str, Any]:
        """Return what is saved and loaded, with values of many kinds."""
        model, optimizer = get_state_dict(self.net, self.optimizer)
        values = {"epoch": 0, "rate": 0.0, "big": 0, "name": "", "nothing": 1, "pair": (0, 0.0), "history": [0]}
        return {"model": model, "optimizer": optimizer, **values}

    def take(self, state: dict[str, Any]) -> None:
        """Set the model and its optimizer to a state."""
        set_state_dict(self.net, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])


VALUES = {
    "epoch": 3,
    "rate": 0.1,
    "big": 1 << 70,
    "name": "run",
    "nothing": None,
    "pair": (2, 0.5),
    "history": [1, 2.5, "three"],
}


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Return all values of a tensor."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def tensors_of(state: Any, path: str = "") -> dict[str, torch.Tensor]:
    """Return the tensors of nested state by name, whole."""
    if isinstance(state, torch.Tensor):
        return {path: whole(state).detach()}
    items = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, list) else ()
    found = {}
    for key, item in items:
        found.update(tensors_of(item, f"{path}/{key}" if path else str(key)))
    return found


def clear(state: Any) -> None:
    """Fill all tensors with other values."""
    if isinstance(state, torch.Tensor):
        (state.to_local() if isinstance(state, DTensor) else state).detach().fill_(-7)
    for item in state.values() if isinstance(state, dict) else state if isinstance(state, list) else ():
        clear(item)
