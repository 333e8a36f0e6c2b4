"""Ranks that are killed, or fail, while they save; `test_torch_distributed_saving.py` looks at what came of it.

One interpreter imports torch. For each way to fail it forks four ranks that replace a checkpoint, and notes in a file
what each of the survivors raised, what lies at the path, and what is left before and after `varstore.clean`.
"""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

SIZE = 4
SECONDS = 15
"""Within which each survivor has to have an error."""
_NEW_NAMESPACE = 0x00020000
_PRIVATE = 1 << 18 | 1 << 14


def _die(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _patched(owner: Any, name: str, before: Callable[..., None]) -> None:
    original = getattr(owner, name)

    def call(*arguments: Any, **options: Any) -> Any:
        before(*arguments, **options)
        return original(*arguments, **options)

    setattr(owner, name, call)


def _prepare(folder: Path) -> None:
    import torch.distributed as dist

    from varstore.adapters.torch_distributed import Writer
    from varstore.disk.save.together import Coordinator

    if dist.get_rank():
        _patched(Writer, "prepare_local_plan", _die)
    else:
        _patched(Coordinator, "_tickets", _die)


def _write(folder: Path, count: int) -> None:
    from varstore.disk.save.shared_file import SharedFile

    writes = iter(range(count))
    _patched(SharedFile, "_write_runs", lambda *_: _die() if next(writes, None) is None else None)


def _finish(folder: Path) -> None:
    from varstore.disk.save.together import Participant

    _patched(Participant, "finish", _die)


def _manifest(folder: Path) -> None:
    from varstore.layout.names import MARKER
    from varstore.storage import syscalls

    _patched(syscalls, "write_file", lambda path, *_, **__: _die() if path == MARKER else None)


def _renamed(folder: Path) -> None:
    from varstore.disk.save.staging import Staging

    _patched(Staging, "_settle", _die)


def _full(folder: Path) -> None:
    """Fill the disk after it was looked at."""
    from varstore.disk.save.together import Participant

    def fill(*_: Any) -> None:
        with open(folder / "filler", "wb") as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(1 << 16))
                file.flush()

    _patched(Participant, "write", fill)


def _mount(folder: Path, kind: str = "tmpfs") -> bool:
    libc = ctypes.CDLL(None)
    return bool(libc.mount(b"none", os.fsencode(folder), kind.encode(), 0, b"size=6m") == 0)


def _unshared(folder: Path) -> None:
    """Put another file system over the folder, which only this rank sees."""
    libc = ctypes.CDLL(None)
    assert libc.unshare(_NEW_NAMESPACE) == 0
    assert libc.mount(b"none", b"/", None, _PRIVATE, None) == 0
    assert _mount(folder)


CASES: dict[str, tuple[Callable[[Path], None], tuple[int, ...]]] = {
    **{f"prepare {rank}": (_prepare, (rank,)) for rank in (0, 2)},
    **{f"first write {rank}": (partial(_write, count=0), (rank,)) for rank in (0, 2)},
    **{f"half written {rank}": (partial(_write, count=1), (rank,)) for rank in (0, 1, 3)},
    **{f"before finish {rank}": (_finish, (rank,)) for rank in (0, 2)},
    "manifest 0": (_manifest, (0,)),
    "renamed 0": (_renamed, (0,)),
    "half written by all": (partial(_write, count=1), (0, 1, 2, 3)),
    "full 2": (_full, (2,)),
    "unshared 3": (_unshared, (3,)),
}
"""What fails, and on which ranks."""
SURVIVED = ("full 2", "unshared 3")
"""Those in which no rank is killed."""


def _state(value: float, mesh: Any) -> dict[str, Any]:
    import torch
    from torch.distributed.tensor import Shard, distribute_tensor

    whole = torch.full((64, 1024), value)
    spread = {f"{name}{axis}": whole if mesh is None else distribute_tensor(whole, mesh, [Shard(axis)])
              for name in "abc" for axis in (0, 1)}  # fmt: skip
    return {**spread, "alone": torch.full((9,), value), "value": value}


def _be_rank(rank: int, folder: Path, notes: Path, fail: Callable[[Path], None] | None, survivors: int) -> None:
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import DeviceMesh

    from varstore.adapters.torch_distributed import save

    torch.set_num_threads(1)
    seconds = datetime.timedelta(seconds=60)
    dist.init_process_group(
        "gloo", init_method=f"file://{notes}/rendezvous", rank=rank, world_size=SIZE, timeout=seconds
    )
    state = _state(1.0, DeviceMesh("cpu", range(SIZE)))
    save(folder / "warm", state, durable=False, overwrite=True)
    dist.barrier()
    if fail is not None:
        fail(folder)
    start = time.monotonic()
    try:
        save(folder / "c", state, overwrite=True, durable=False)
        said = ("none", "", time.monotonic() - start)
    except BaseException as error:
        said = (type(error).__name__, str(error), time.monotonic() - start)
    (notes / f"{rank}.json").write_text(json.dumps(said))
    while len(list(notes.glob("*.json"))) < survivors and time.monotonic() - start < SECONDS:
        time.sleep(0.02)  # nobody hears from this rank's end that the save failed


def _whole(folder: Path) -> str:
    import varstore as vs

    found = vs.load_state(folder / "c")
    values = {float(item) for key, tensor in found.items() if key != "value" for item in tensor.unique()}
    if not vs.verify(folder / "c").ok or values != {found["value"]}:
        return f"damaged: {values}"
    return {0.0: "old", 1.0: "new"}[found["value"]]


def _forked(rank: int, folder: Path, notes: Path, fail: Callable[[Path], None] | None, survivors: int) -> int:
    child = os.fork()
    if child:
        return child
    try:
        _be_rank(rank, folder, notes, fail, survivors)
    except BaseException as error:
        (notes / f"{rank}.json").write_text(json.dumps(("outside", repr(error), 0)))
    finally:
        os._exit(0)


@contextlib.contextmanager
def _small_disk(folder: Path, wanted: bool) -> Iterator[bool]:
    is_mounted = wanted and _mount(folder)
    try:
        yield is_mounted or not wanted
    finally:
        if is_mounted:
            ctypes.CDLL(None).umount2(os.fsencode(folder), 2)


def _case(name: str, place: Path) -> dict[str, Any]:
    import varstore as vs

    fail, ranks = CASES[name]
    folder, notes = place / "folder", place / "notes"
    folder.mkdir(parents=True)
    notes.mkdir()
    with _small_disk(folder, name.startswith("full")) as is_there:
        if not is_there or (name.startswith("unshared") and os.geteuid()):
            return {"skipped": "only root can mount"}
        vs.save_state(folder / "c", _state(0.0, None), durable=False)
        survivors = SIZE if name in SURVIVED else SIZE - len(ranks)
        every = [fail if rank in ranks else None for rank in range(SIZE)]
        children = [_forked(rank, folder, notes, its, survivors) for rank, its in enumerate(every)]
        for child in children:
            os.waitpid(child, 0)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(folder / "filler")
        said = {rank: json.loads((notes / f"{rank}.json").read_text()) for rank in range(SIZE)
                if (notes / f"{rank}.json").exists()}  # fmt: skip
        before = _whole(folder)
        left = sorted(os.listdir(folder))
        vs.clean(folder)
        after = sorted(os.listdir(folder))
        return {"said": said, "path": [before, _whole(folder)], "left": left, "after": after}


def main() -> None:
    for module in ("torch._dynamo", "varstore._gen.manifest_pb2", "varstore.adapters.torch_distributed"):
        import_module(module)  # once, and not in every rank
    place = Path(sys.argv[1])
    results = {name: _case(name, place / str(number)) for number, name in enumerate(CASES)}
    (place / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
