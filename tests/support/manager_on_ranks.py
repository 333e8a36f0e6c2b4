"""Cases of a manager that two ranks share; see `support.ranks`."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Shard, distribute_tensor, init_device_mesh

import varstore as vs
from support.ranks import main
from varstore.errors import CheckpointExists, UsageError


def _manager(folder: Path, **options: Any) -> vs.CheckpointManager:
    return vs.CheckpointManager(folder / "run", process_group=dist.group.WORLD, **options)


def _state(step: int) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    weight = distribute_tensor(torch.arange(21.0).reshape(7, 3) + step, mesh, [Shard(0)])
    return {"model": {"weight": weight, "bias": torch.full((3,), float(step))}, "step": step}


def steps_are_kept_as_the_first_rank_decides(folder: Path) -> None:
    manager = _manager(folder, keep=vs.Latest(2) | vs.Best("loss"))
    for step in range(1, 6):
        # only what the first rank says counts
        manager.save(step, _state(step), metrics={"loss": abs(step - 2) + dist.get_rank()}, attributes={"a": step})
    assert [saved.step for saved in manager.all()] == [2, 4, 5]
    assert manager.best().step == 2
    assert manager.best().metrics == {"loss": 0.0}
    assert vs.open(manager.latest()).attributes["a"] == 5
    dist.barrier()


def every_rank_restores_its_part(folder: Path) -> None:
    manager = _manager(folder)
    state = _state(0)
    assert manager.restore(like=state) is state
    assert state["step"] == 5
    assert isinstance(state["model"]["weight"], DTensor)
    assert torch.equal(state["model"]["weight"].full_tensor(), torch.arange(21.0).reshape(7, 3) + 5)
    whole = manager.restore(2)
    assert torch.equal(whole["model"]["weight"], torch.arange(21.0).reshape(7, 3) + 2)


def in_the_background(folder: Path) -> None:
    with _manager(folder, keep=vs.Latest(1), background=True) as manager:
        pending = [manager.save(step, _state(step)) for step in (6, 7)]
    assert all(one.done() for one in pending)
    assert [saved.step for saved in manager.all()] == [7]
    assert np.array_equal(vs.load_state(manager.latest())["model"]["bias"], np.full(3, 7.0))
    dist.barrier()


def a_step_that_is_damaged_is_passed_over(folder: Path) -> None:
    manager = _manager(folder)
    manager.save(8, _state(8))
    if dist.get_rank() == 0:
        shutil.rmtree(Path(manager.directory) / "step-8" / "model" / "bias")
    dist.barrier()
    assert manager.latest().step == 7
    state = _state(0)
    manager.restore(like=state)
    assert state["step"] == 7


def an_error_of_the_first_rank_is_one_of_all(folder: Path) -> None:
    manager = _manager(folder)
    for _ in range(2):
        with pytest.raises(CheckpointExists, match="this step is saved already"):
            manager.save(7, _state(7))
    with pytest.raises(UsageError, match=r"metrics\['loss'\]"):
        manager.save(9, _state(9), metrics={"loss": "low" if dist.get_rank() == 0 else 1})
    assert not manager.should_save(7)
    assert manager.should_save(9)
    assert sorted(manager.rewind(7).deleted) == [8]
    assert sorted(manager.prune(dry_run=True).kept) == [7]
    for wrong in ({"threads": 1}, {"files": {}}, {"process_group": 3}):
        with pytest.raises(UsageError, match=next(iter(wrong))):
            vs.CheckpointManager(folder / "run", **{"process_group": dist.group.WORLD, **wrong})


CASES = {
    case.__name__: case
    for case in (
        steps_are_kept_as_the_first_rank_decides,
        every_rank_restores_its_part,
        in_the_background,
        a_step_that_is_damaged_is_passed_over,
        an_error_of_the_first_rank_is_one_of_all,
    )
}

if __name__ == "__main__":
    main(CASES)
