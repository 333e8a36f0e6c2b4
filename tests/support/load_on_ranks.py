"""What `test_torch_distributed_loading.py` does on four ranks."""

from __future__ import annotations

import copy
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor

import varstore as vs
from support.meshes import MESHES, VALUES, Run, clear, tensors_of
from support.ranks import end_here, main
from support.regions import bands, record_regions
from varstore.adapters.torch_distributed import Reader, load, reading, save

STEPS = 3
_runs: dict[str, Run] = {}
_truth: dict[str, torch.Tensor] = {}


def prepare(folder: Path) -> None:
    """Train on one rank, and save what came of it in several ways."""
    run = Run("one", 1)
    if run.is_here:
        run.train(0, STEPS)
        state = {**run.state(), **VALUES}
        checkpoint = vs.save_state(folder / "nested", state)
        vs.save(folder / "without-manifest", {name: checkpoint[name] for name in checkpoint}, manifest=False)
        vs.pack(folder / "nested", folder / "packed")
        _as_four_ranks_save(folder / "nested", folder / "regions")
        torch.save(tensors_of(state), folder / "truth.pt")
    dist.barrier()
    _truth.update(torch.load(folder / "truth.pt"))


def _as_four_ranks_save(source: Path, target: Path) -> None:
    """Copy a checkpoint, and list regions in it: rows of each variable, and columns of some."""
    shutil.copytree(source, target)
    cuts: dict[str, Any] = {}
    for name, variable in vs.open(source).items():
        if variable.shape:
            axis = int("down.weight" in name)
            each = -(-variable.shape[axis] // 4)
            cuts[name] = bands(variable.shape, axis, range(each, variable.shape[axis], each))
    record_regions(target, cuts)


def _run(name: str) -> Run:
    if name not in _runs:
        _runs[name] = Run(name, 2)
        if _runs[name].is_here:
            _runs[name].train(0, 1)
    return _runs[name]


def _check(state: dict[str, Any], values: dict[str, Any] = VALUES) -> None:
    found = tensors_of(state)
    assert found.keys() == _truth.keys()
    wrong = [name for name, tensor in found.items() if not torch.equal(tensor, _truth[name])]
    assert not wrong, wrong
    assert {name: state[name] for name in values} == values


def load_all(folder: Path, source: str, mesh: str) -> None:
    run = _run(mesh)
    if run.is_here:
        state = run.state()
        clear(state)
        is_flat = source == "without-manifest"
        report = load(folder / source, state, process_group=run.group, strict=not is_flat)
        _check(state, {} if is_flat else VALUES)
        assert set(_truth) <= set(report.loaded)


def save_on(folder: Path, mesh: str) -> None:
    """Save what one rank trained as the ranks of a mesh hold it, and compare what any program sees."""
    run = _run(mesh)
    if not run.is_here:
        return
    state = run.state()
    load(folder / "nested", state, process_group=run.group)
    save(folder / f"saved-{mesh}", state, process_group=run.group)
    if dist.get_rank() == 0:
        path = folder / f"saved-{mesh}"
        assert vs.verify(path).ok
        assert vs.diff(folder / "nested", path).equal
        _check(vs.load_state(path))
        arrays = vs.load(path)
        assert all(np.array_equal(arrays[name], tensor.numpy()) for name, tensor in _truth.items())


def load_what_all_saved(folder: Path, mesh: str) -> None:
    run = _run(mesh)
    if run.is_here:
        state = run.state()
        for source in MESHES:
            clear(state)
            load(folder / f"saved-{source}", state, process_group=run.group)
            _check(state)


def stop(folder: Path, mesh: str) -> None:
    """Train on a mesh, save, and go on."""
    run = Run(mesh, 3)
    if run.is_here:
        run.train(0, STEPS)
        save(folder / f"stopped-{mesh}", run.state(), process_group=run.group)
        losses = run.train(STEPS, 2 * STEPS)
        if dist.get_rank() == 0:
            torch.save(losses, folder / f"losses-{mesh}.pt")
    dist.barrier()


def resume(folder: Path, mesh: str) -> None:
    """Go on where some meshes stopped: with the losses of not having stopped, to the bit on the same mesh."""
    for source in ("one", "fsdp-4", "fsdp-tensor-2x2", mesh):
        run = Run(mesh, 2)
        if run.is_here:
            state = run.state()
            load(folder / f"stopped-{source}", state, process_group=run.group)
            run.take(state)
            losses, expected = run.train(STEPS, 2 * STEPS), torch.load(folder / f"losses-{source}.pt")
            torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-6)
            assert source != mesh or losses == expected


def replaced(folder: Path) -> None:
    """A save replaces the checkpoint when all ranks have looked at it: all of them load the new one."""
    rank, path, read_parts = dist.get_rank(), folder / "changing", reading.read_parts
    calls: list[str] = []

    def write(number: int) -> None:
        if rank == 0:
            vs.save_state(path, {"w": torch.full((8, 2), float(number)), "number": number}, overwrite=True)
        dist.barrier()

    def read(*arguments: Any, **options: Any) -> None:
        if not calls:
            dist.barrier()
            write(2)
        calls.append("read")
        read_parts(*arguments, **options)

    write(1)
    state = {"w": distribute_tensor(torch.zeros(8, 2), DeviceMesh("cpu", list(range(4))), [Shard(0)]), "number": 0}
    reading.read_parts = read
    try:
        load(path, state)
    finally:
        reading.read_parts = read_parts
    assert calls == ["read", "read"]
    assert torch.equal(state["w"].full_tensor(), torch.full((8, 2), 2.0))
    assert state["number"] == 2


def gone(folder: Path) -> None:
    """A rank ends while the others wait for it; they all hear of it, although none of them ends."""

    class Ending:
        def state_dict(self) -> dict[str, Any]:
            end_here()

        def load_state_dict(self, state: dict[str, Any]) -> None: ...

    start = time.monotonic()
    with pytest.raises(vs.errors.StorageError, match="one of them has ended"):
        load(folder / "nested", Ending() if dist.get_rank() == 2 else {"epoch": 0}, include="epoch")
    (folder / f"heard-{dist.get_rank()}").touch()
    while len(list(folder.glob("heard-*"))) < 3:
        assert time.monotonic() - start < 15
        time.sleep(0.05)


def read_with_dcp(folder: Path, mesh: str) -> None:
    run = _run(mesh)
    if run.is_here:
        state = run.state()
        clear(state)
        dcp.load(state, storage_reader=Reader(folder / "nested"), process_group=run.group)
        _check(state)


def _is_same_everywhere(value: Any) -> bool:
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return all(other == found[0] for other in found)


def _refused(kind: type[vs.VarstoreError], *arguments: Any, **options: Any) -> str:
    """Load on all ranks, which have to fail with one error, and return its message; no tensor of the state changes."""
    state = arguments[1]
    before = tensors_of(copy.deepcopy(state))
    with pytest.raises(kind) as caught:
        load(*arguments, **options)
    after = tensors_of(state)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert _is_same_everywhere(str(caught.value))
    return str(caught.value)


def names(folder: Path) -> None:
    state = {"other": _run("fsdp-4").state()["model"], "epoch": 0}
    clear(state)
    report = load(folder / "nested", state, include=["model/*", "epoch"], rename={"model/": "other/"})
    assert report.renamed["other/up.weight"] == "model/up.weight"
    assert not report.missing
    assert not report.unexpected
    assert all(torch.equal(tensor, _truth["model" + name[5:]]) for name, tensor in tensors_of(state).items())
    assert state["epoch"] == 3
    message = _refused(vs.errors.VariableMismatch, folder / "nested", state, include="model/*")
    assert "rename={'model/': 'other/'}: 7 of 8 names would match" in message


def hints(folder: Path) -> None:
    state: dict[str, Any] = {"model": _run("fsdp-4").state()["model"]}
    clear(state)
    state["model"]["count"] = torch.tensor(1.0)
    message = _refused(vs.errors.VariableMismatch, folder / "nested", state, include="model/*")
    assert "'model/count': int64 -> float32" in message
    hint = "exclude='model/count' and missing='model/count'"
    assert hint in message
    report = load(folder / "nested", state, include="model/*", exclude="model/count", missing="model/count")
    assert report.missing == ("model/count",)
    assert state["model"]["count"] == 1
    state["model"]["count"] = {"not": "a tensor"}
    message = _refused(vs.errors.VariableMismatch, folder / "nested", state, include="model/*")
    assert "1 missing, 1 unexpected" in message
    message = _refused(vs.errors.VariableMismatch, folder / "nested", {"epoch": torch.zeros(())}, include="epoch")
    assert "found 'epoch'" in message


def names_of_ranks(folder: Path) -> None:
    rank = dist.get_rank()
    if rank == 0:
        vs.save_state(folder / "many", {"rng": {str(at): torch.tensor([at]) for at in range(5)}, "step": 3})
    dist.barrier()
    own = {"rng": {str(rank): torch.zeros(1, dtype=torch.int64)}, "step": 0}
    message = _refused(vs.errors.VariableMismatch, folder / "many", own)
    assert "1 unexpected" in message
    assert "rng/4" in message
    report = load(folder / "many", own, exclude="rng/4")
    assert own == {"rng": {str(rank): torch.tensor([rank])}, "step": 3}
    assert report.loaded == (f"rng/{rank}", "step")
    assert not report.unexpected
    if rank == 2:
        (folder / "many/rng/2/out").unlink()
    own["rng"][str(rank)].zero_()
    message = _refused(vs.errors.FormatError, folder / "many", own, exclude="rng/4")
    assert "rng/2" in message
    assert "on rank 2 of 4" in message


def one_rank_alone(folder: Path) -> None:
    """A path that one rank does not see, or sees another checkpoint at, and an error that is not varstore's."""
    rank = dist.get_rank()
    state = {"epoch": 0}
    options = {"include": "epoch"}
    path = folder / ("nested" if rank != 1 else "absent")
    message = _refused(vs.errors.CheckpointNotFound, path, state, **options)
    assert "on rank 1 of 4" in message
    path = folder / ("nested" if rank != 3 else "without-manifest")
    with pytest.raises(vs.errors.StorageError, match="see different checkpoints"):
        load(path, state, **options)
    vs.save_state(folder / f"apart-{rank}", {"w": torch.full((3,), float(rank == 3))}, durable=False)
    with pytest.raises(CheckpointException, match="see different checkpoints"):
        dcp.load({"w": torch.zeros(3)}, storage_reader=Reader(folder / f"apart-{rank}"))

    class Broken:
        def state_dict(self) -> dict[str, Any]:
            raise RuntimeError("no state") if rank == 2 else ValueError("no")

        def load_state_dict(self, state: dict[str, Any]) -> None: ...

    with pytest.raises(RuntimeError if rank == 2 else vs.errors.UsageError, match="no state"):
        load(folder / "nested", Broken() if rank == 2 else state, **options)


def tied(folder: Path) -> None:
    mesh = DeviceMesh("cpu", list(range(4)))
    shared = distribute_tensor(torch.zeros(2, 3), mesh, [Shard(0)])  # two ranks have none of its values
    state = {"head": shared, "embedding": shared}
    ones, twos = torch.ones(2, 3), torch.full((2, 3), 2.0)
    if dist.get_rank() == 0:
        vs.save_state(folder / "of-one", {"head": ones})
        vs.save_state(folder / "of-two", {"head": twos, "embedding": twos.clone()})
        vs.save_state(folder / "conflict", {"head": ones, "embedding": twos})
    dist.barrier()
    for name, values in (("of-one", ones), ("of-two", twos)):
        report = load(folder / name, state)
        assert torch.equal(shared.full_tensor(), values)
        assert not report.missing
    message = _refused(vs.errors.VariableMismatch, folder / "conflict", state)
    assert "'head'" in message
    assert "'embedding'" in message


def objects(folder: Path) -> None:
    run = Run("fsdp-4", 2)
    state: dict[str, Any] = {"model": run.net, "epoch": 0}
    load(folder / "nested", state, include=["model/*", "epoch"])
    found = tensors_of(run.net.state_dict(), "model")
    assert all(torch.equal(tensor, _truth[name]) for name, tensor in found.items())
    assert state["model"] is run.net
    assert state["epoch"] == 3


def rot(folder: Path) -> None:
    """A byte of one region is another one, so that one rank finds it, where its part has all of the region."""
    state = _run("fsdp-4").state()
    path = folder / "regions/model/up.weight/out"
    if dist.get_rank() == 0:
        path.chmod(0o600)
        with path.open("r+b") as file:
            file.seek(64 * 16 * 4 - 1)
            file.write(b"?")
    dist.barrier()
    for options in ({"verify": "all"}, {"verify": "all", "include": "epoch", "strict": False}):
        message = _refused(vs.errors.DigestMismatch, folder / "regions", state, **options)
        assert "model/up.weight" in message
        assert " of 4" in message  # which rank has it in its share
    with pytest.raises(vs.errors.DigestMismatch, match="on rank 3 of 4"):
        load(folder / "regions", state)
    with pytest.raises(CheckpointException) as caught:
        dcp.load(state, storage_reader=Reader(folder / "regions"))
    assert [type(error) for error, _ in caught.value.failures.values()] == [vs.errors.DigestMismatch]
    load(folder / "regions", state, verify=False)
    assert tensors_of(state).keys() == _truth.keys()


SOURCES = ("nested", "without-manifest", "packed", "regions")
CASES: dict[str, Callable[[Path], object]] = {
    "prepare": prepare,
    **{f"{source} on {mesh}": partial(load_all, source=source, mesh=mesh) for mesh in MESHES for source in SOURCES},
    **{f"dcp.load on {mesh}": partial(read_with_dcp, mesh=mesh) for mesh in MESHES},
    "names": names,
    "hints": hints,
    "names of ranks": names_of_ranks,
    "one rank alone": one_rank_alone,
    "tied": tied,
    "objects": objects,
    "rot": rot,
    "replaced": replaced,
    **{f"save on {mesh}": partial(save_on, mesh=mesh) for mesh in MESHES},
    **{f"what all saved on {mesh}": partial(load_what_all_saved, mesh=mesh) for mesh in MESHES},
    **{f"stop on {mesh}": partial(stop, mesh=mesh) for mesh in MESHES},
    **{f"resume on {mesh}": partial(resume, mesh=mesh) for mesh in MESHES},
    "gone": gone,
}

if __name__ == "__main__":
    main(CASES)
