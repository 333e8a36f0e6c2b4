"""What `test_torch_distributed_saving.py` does on four ranks."""

from __future__ import annotations

import gc
import json
import logging
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch._dynamo  # once, and not in every rank
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.planner import SavePlanner
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import varstore as vs
from support.meshes import MESHES, VALUES, Run, tensors_of, whole
from support.ranks import main
from varstore.adapters.torch_distributed import Writer, load, save, save_async
from varstore.disk.save.together import Participant
from varstore.values.nodes import replaced


def on_first(check: Callable[[], object]) -> None:
    """Check something on rank 0, while the others wait; all fail if it does."""
    failure: list[Any] = [None]
    try:
        if dist.get_rank() == 0:
            check()
    except BaseException as error:
        failure = [repr(error)]
    dist.broadcast_object_list(failure)
    assert failure == [None]


def _same(found: Any, expected: Any) -> None:
    assert type(found) is type(expected), (type(found), type(expected))
    if isinstance(expected, dict):
        assert [*found] == [*expected]
        for key, item in expected.items():
            _same(found[key], item)
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected)
        for one, item in zip(found, expected, strict=True):
            _same(one, item)
    elif isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected)
        assert found.dtype == expected.dtype
    elif isinstance(expected, np.ndarray):
        np.testing.assert_array_equal(found, expected)
    else:
        assert found == expected


def save_mesh(folder: Path, mesh: str) -> None:
    run = Run(mesh, 3)
    if run.is_here:
        run.train(0, 2)
        state = {**run.state(), **VALUES}
        checkpoint = save(folder / mesh, state, process_group=run.group, durable=False, attributes={"mesh": mesh})
        plain = replaced(state, lambda value: whole(value) if isinstance(value, torch.Tensor) else value)
        assert checkpoint.attributes == {"mesh": mesh}
        truth = tensors_of(state)
        for step in (1, 2, 3):  # into other values of the same mesh
            other = run.state()
            run.train(step, step + 1)
        load(folder / mesh, other, process_group=run.group, strict=True)
        found = tensors_of(other)
        assert all(torch.equal(found[name], tensor) for name, tensor in truth.items())
        if dist.get_rank() == 0:
            _same(vs.load_state(folder / mesh), plain)
            alone = vs.save_state(folder / "alone", plain, overwrite=True, durable=False)
            assert checkpoint.manifest is not None
            assert alone.manifest is not None
            assert checkpoint.names == alone.names
            assert json.loads(checkpoint.manifest.tree) == json.loads(alone.manifest.tree)
            assert vs.verify(folder / mesh).ok
            report = vs.diff(folder / mesh, folder / "alone", values=True)
            assert [*report.changed, *report.added, *report.removed] == []
    dist.barrier()


def save_values(folder: Path) -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    mesh = DeviceMesh("cpu", range(size))
    matrix = torch.arange(7 * 64, dtype=torch.float32).reshape(7, 64)
    rows, columns = (distribute_tensor(matrix, mesh, [Shard(axis)]) for axis in (0, 1))
    few = distribute_tensor(torch.ones(2, 3, dtype=torch.bfloat16), mesh, [Shard(0)])  # less than there are ranks
    none = distribute_tensor(torch.ones(0, 3), mesh, [Shard(0)])
    alike = distribute_tensor(torch.ones(3, dtype=torch.int8), mesh, [Replicate()])
    number = torch.tensor([1 + 2j])
    own = torch.tensor([rank])  # under one name that all ranks have, and under one of this rank
    state = {
        "rows": rows,
        "tied": rows.detach(),
        "columns": columns,
        "own": own,
        "owned": {f"by {rank}": own},
        "few": [few, none, alike],
        "optimizer": {"state": {0: {"step": torch.tensor(3.0)}, 1: {}}, "param_groups": [{"betas": (0.9, 0.99)}]},
        "array": np.arange(6).reshape(2, 3),
        "losses": [0.5] * 2000,
        "generator": torch.Generator().manual_seed(3),
        "plain": torch.arange(10)[::2],
        "seeds": {f"rank {rank}": rank, f"tensor {rank}": torch.tensor([rank])},
        "lowest": rank,
        "path/with": {"slash": torch.ones(1)},
        "path": {"with": {"slash": torch.zeros(1)}},
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "conjugate": {"of": number, "is": number.conj(), "imaginary": number.imag, "negative": number.conj().imag},
        "nothing": {},
    }
    save(folder / "values", state)

    def check() -> None:
        found = vs.load_state(folder / "values")
        seeds = {}
        for other in range(size):
            seeds |= {f"rank {other}": other, f"tensor {other}": torch.tensor([other])}
        assert int(found["own"]) in range(size)
        owned = {f"by {other}": torch.tensor([other]) for other in range(size)}
        expected = {
            **state,
            "own": found["own"],
            "owned": owned,
            "rows": matrix,
            "tied": matrix,
            "columns": matrix,
            "seeds": seeds,
        }
        expected["few"] = [torch.ones(2, 3, dtype=torch.bfloat16), torch.ones(0, 3), torch.ones(3, dtype=torch.int8)]
        generator, given = found.pop("generator"), expected.pop("generator")
        assert torch.equal(generator.get_state(), given.get_state())
        _same(found, expected)
        assert found["rows"] is found["tied"]
        opened = vs.open(folder / "values")
        assert opened["tied"].entry.alias_of == "rows"
        assert os.path.samefile(opened["rows"].path + "/out", opened["tied"].path + "/out")
        assert vs.verify(folder / "values").ok
        assert {os.stat(variable.path + "/out").st_mode & 0o777 for variable in opened.values()} == {0o444}

    on_first(check)


def write(folder: Path, how: str) -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    mesh = DeviceMesh("cpu", range(size))
    matrix = torch.arange(7 * 64, dtype=torch.float32).reshape(7, 64)
    state = {
        "model": {"w": distribute_tensor(matrix, mesh, [Shard(1)]), "b": torch.arange(3)},
        "history": [{"loss": 0.5}, torch.ones(2)],
        "pair": (1, None, np.arange(3)),
        "epoch": 3,
        f"rank {rank}": rank,
    }
    writer = Writer(folder / how)
    if how == "async":
        group = dist.new_group(backend="gloo")
        future: Any = dcp.async_save(state, storage_writer=writer, process_group=group)
        future.result()
        dist.barrier()
    elif how == "id":
        dcp.save(state, storage_writer=Writer(durable=False), checkpoint_id=folder / how)
    elif how == "flat":
        dcp.save(state["model"], storage_writer=writer, planner=DefaultSavePlanner(flatten_state_dict=False))
    else:
        dcp.save(state, storage_writer=writer)

    def check() -> None:
        found = vs.load_state(folder / how)
        model = {"w": matrix, "b": torch.arange(3)}
        if how == "flat":
            _same(found, model)
            return
        ranks = {f"rank {other}": other for other in range(size)}
        expected = {"model": model, "history": [{"loss": 0.5}, torch.ones(2)], "pair": (1, None, np.arange(3))}
        _same({key: found[key] for key in expected}, expected)
        assert {key: found[key] for key in found.keys() - expected.keys()} == {"epoch": 3, **ranks}
        assert vs.verify(folder / how).ok

    on_first(check)


def _fails(call: Callable[[], object], kind: type[BaseException], *texts: str) -> None:
    with pytest.raises(kind) as caught:
        call()
    assert all(text in str(caught.value) for text in texts), str(caught.value)


class _Pickling(SavePlanner):
    """A planner that has the methods that torch asks for, and no others."""

    def __init__(self) -> None:
        self._planner = DefaultSavePlanner()
        for name in ("set_up_planner", "create_local_plan", "create_global_plan", "finish_plan", "resolve_data"):
            setattr(self, name, getattr(self._planner, name))

    def set_up_planner(self, *_: Any, **__: Any) -> None: ...
    def create_local_plan(self) -> Any: ...
    def create_global_plan(self, all_plans: Any) -> Any: ...
    def finish_plan(self, new_plan: Any) -> Any: ...
    def resolve_data(self, write_item: Any) -> Any: ...


def _refuse_in_writer(writer: Writer, state: Any, bad: Any) -> None:
    _fails(lambda: dcp.save(bad, storage_writer=writer), CheckpointException, "cannot be saved as data")
    caching = DefaultSavePlanner(enable_plan_caching=True)
    _fails(lambda: dcp.save(state, storage_writer=writer, planner=caching), CheckpointException, "enable_plan_caching")
    _fails(lambda: dcp.save(state, storage_writer=writer, planner=_Pickling()), CheckpointException, "lookup_object")
    with pytest.raises(vs.errors.UsageError, match="use_collectives"):
        dcp.save(state, storage_writer=writer, use_collectives=False)
    _fails(lambda: dcp.save(state, storage_writer=Writer()), CheckpointException, "there is no path")


def give_up(folder: Path) -> None:
    """Have one rank fail, of which torch does not tell the writer of rank 0; then save with the same writer."""
    mesh = DeviceMesh("cpu", range(dist.get_world_size()))
    state = {"w": distribute_tensor(torch.ones(8, 5), mesh, [Shard(0)])}
    (folder / "given").mkdir(exist_ok=True)
    writer = Writer(folder / "given" / "up")
    for rank in (0, 2):
        with pytest.MonkeyPatch.context() as patch:
            if dist.get_rank() == rank:
                patch.setattr(Participant, "finish", lambda _: os.stat("/nowhere"))
            _fails(lambda: dcp.save(state, storage_writer=writer), CheckpointException, "/nowhere")
        gc.collect()
        dist.barrier()
        assert os.listdir(folder / "given") == []
        dist.barrier()
    dcp.save(state, storage_writer=writer)
    assert os.listdir(folder / "given") == ["up"]
    dist.barrier()


def refuse(folder: Path) -> None:
    rank = dist.get_rank()
    state = {"w": torch.ones(3), "epoch": 3}
    here = folder / "refused"
    spread = distribute_tensor(torch.ones(8), DeviceMesh("cpu", range(dist.get_world_size())), [Shard(0)])
    uneven = {"w": spread} if rank else {"epoch": 3}
    _fails(lambda: save(here / "c", uneven), vs.errors.VariableMismatch, "do not have the parts of one state")
    bad = {**state, "x": {"y": (lambda: 0) if rank == 2 else 0}}
    _fails(lambda: save(here / "c", bad), vs.errors.UsageError, "state['x']['y']", "function", "on rank 2 of 4")
    _fails(lambda: save(here / "c", state, attributes={"a": {1}}), vs.errors.UsageError, "JSON")  # type: ignore[arg-type]
    _fails(lambda: save(folder / "values", state), vs.errors.CheckpointExists, "not empty", "on rank 0 of 4")
    uneven = {"a": [torch.ones(1)] * (1 + rank % 2)}
    _fails(lambda: save(here / "c", uneven), vs.errors.UsageError, "'a/1'", "a key of its own")
    for own in (torch.ones(3 + (rank == 2)), torch.ones(3, dtype=torch.int8 if rank == 2 else torch.int16)):
        _fails(lambda: save(here / "c", {"w": own}), vs.errors.VariableMismatch, "'w'", "rank 2", "own")  # noqa: B023
    sums = DTensor.from_local(torch.ones(3), DeviceMesh("cpu", range(4)), [Partial()])
    _fails(lambda: save(here / "c", {"w": sums}), vs.errors.UsageError, "'w'", "sums", "Replicate")
    sparse = {"s": torch.eye(3).to_sparse()}
    _fails(lambda: save(here / "c", sparse), vs.errors.UnsupportedDtype, "a sparse tensor")
    _refuse_in_writer(Writer(here / "c"), state, bad)
    gc.collect()
    dist.barrier()
    assert not here.exists() or not os.listdir(here)


def _said() -> list[str]:
    """Return what varstore will have logged."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("varstore").addHandler(handler)
    return said


def in_background(folder: Path) -> None:
    """Change what is being saved, save again before that is over, and have one of three fail."""
    rank, mesh = dist.get_rank(), DeviceMesh("cpu", range(dist.get_world_size()))
    tensor = distribute_tensor(torch.zeros(7, 5), mesh, [Shard(0)])
    array, count, losses = np.zeros(3), torch.tensor(0), [0.0] * 2000
    pending = []
    said = _said()
    for step in range(3):
        tensor.to_local().fill_(step)
        array[:], losses[:] = step, [float(step)] * 2000
        count.fill_(step)
        bad = (lambda: 0) if (step, rank) == (1, 3) else None
        state = {"w": tensor, "again": tensor, "array": array, "count": count, "losses": losses, "x": bad}
        pending.append(save_async(folder / f"later-{step}", state, durable=False))
    tensor.to_local().fill_(-1)
    array[:], losses[:] = -1, [-1.0] * 2000
    last = save(folder / "later-3", {"w": tensor}, durable=False)  # after the others
    assert all(one.done() for one in pending)
    assert last.names == ("w",)
    with pytest.raises(vs.errors.UsageError, match="cannot be saved as data"):
        pending[1].wait()
    assert [text.partition(": ")[0] for text in said] == [f"the save to {folder / 'later-1'} failed"]
    for step in (0, 2):
        assert len(pending[step].result()) == 5
        found = vs.load_state(folder / f"later-{step}")
        whole = torch.full((7, 5), float(step))
        expected = {"w": whole, "again": whole, "array": np.full(3, float(step)), "count": torch.tensor(step)}
        _same(found, {**expected, "losses": [float(step)] * 2000, "x": None})
    dist.barrier()
    assert not (folder / "later-1").exists()


def overwrite(folder: Path) -> None:
    mesh = DeviceMesh("cpu", range(dist.get_world_size()))
    path = folder / "again"
    for step in range(3):
        state = {"w": distribute_tensor(torch.full((5, 4), float(step)), mesh, [Shard(0)]), "step": step}
        save(path, state, overwrite=True, durable=step == 1)
        on_first(lambda: _same(vs.load_state(path), {"w": torch.full((5, 4), float(step)), "step": step}))  # noqa: B023
    dist.barrier()


def flat(folder: Path) -> None:
    """Save rows and columns under names without ``/``, as OneFlow has them."""
    mesh, values = DeviceMesh("cpu", range(dist.get_world_size())), torch.arange(84.0).reshape(12, 7)
    state = {
        "rows": distribute_tensor(values, mesh, [Shard(0)]),
        "columns": distribute_tensor(values, mesh, [Shard(1)]),
    }
    save(folder / "for-oneflow", state, durable=False)


CASES = {
    **{f"save {mesh}": partial(save_mesh, mesh=mesh) for mesh in MESHES},
    "values": save_values,
    **{f"write {how}": partial(write, how=how) for how in ("plain", "id", "flat", "async")},
    "refuse": refuse,
    "give up": give_up,
    "in background": in_background,
    "overwrite": overwrite,
    "flat": flat,
}

if __name__ == "__main__":
    main(CASES)
