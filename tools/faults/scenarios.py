"""The scenarios: calls of public functions on three variables, two of them tied.

Three variables are enough to cover every step of a save: one is written like large variables (more than 1 MiB), one is
0-d and written like small ones. One thread does the work at a time, so that the n-th call is always the same one.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np

import varstore as vs
from tools.faults.readback import Contents, contents_of

__all__ = ["SCENARIOS", "TARGET", "Scenario"]

TARGET: Final = "checkpoint"
_ATTRIBUTES: Final = {"epoch": 3}
_RUN: Final = "run"
_MODEL: Final = Path(__file__).resolve().parents[2] / "tests/data/formats/onnx/mlp_inline.onnx"

_Arrays = Mapping[str, np.ndarray]
_Work = Callable[[Path], object]

_WEIGHT = np.arange(270_000, dtype=np.float32).reshape(3, 90_000)
_TIED: Final[_Arrays] = {"encoder/weight": _WEIGHT, "head/weight": _WEIGHT}
NEW: Final[_Arrays] = {**_TIED, "step": np.array(7)}
"""What is saved."""
EARLIER: Final[_Arrays] = {**_TIED, "step": np.array(6)}
"""The base; everything except the step is linked to it."""
OLD: Final[_Arrays] = {"encoder/weight": np.ones((2, 3), np.float32), "gone/bias": np.arange(4), "step": np.array(5)}
"""What is overwritten: one variable differs, one is missing in the new checkpoint."""
FILES: Final = {"graph.onnx": b"graph" * 300_000, "labels.txt": b"cat, dog"}
"""What is attached; of the files of the base, the large one is linked."""
OLD_FILES: Final = {**FILES, "labels.txt": b"cat", "gone.json": b"{}"}
"""What is attached to the base, and to what is overwritten."""
NEXT: Final[_Arrays] = {"step": np.array(8)}
"""What is saved afterwards, to check that saving still works."""


def _nothing_more() -> None:
    """Begin no thread, and end none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Scenario:
    """One call in a home directory, which is the working directory unless `prepare` changes it."""

    name: str
    prepare: _Work
    act: _Work
    again: _Work
    """What is called afterwards, in any case; it must succeed, and remove what the call left behind."""
    new: Mapping[str, Contents] = field(default_factory=dict)
    """The checkpoints that a successful call leaves, by path."""
    stages: Sequence[_Work] = ()
    """Calls that, each on a new home directory, lead to a state that is visible between the old and the new one."""
    is_durable: bool = True
    is_in_place: bool = False
    """Whether the target is filled in place, so that a folder without a marker may remain."""
    old_is_sound: bool = True
    """Whether the old checkpoints verify."""
    leftovers: int = 1
    """How many leftovers a killed call may leave."""
    start: Callable[[], object] = _nothing_more
    """What begins the threads of a package in each child, before anything is counted."""
    stop: Callable[[], object] = _nothing_more
    """What ends them."""
    harmless: str = ""
    """A pattern of paths that may be there at any time, such as shards that no index lists."""


def _save(
    variables: _Arrays,
    home: Path,
    *,
    name: str = TARGET,
    base: str | None = None,
    overwrite: bool = False,
    durable: bool = False,
    manifest: bool = True,
    files: Mapping[str, bytes] | None = None,
    encoding: Literal["raw", "zarr"] | None = None,
) -> None:
    vs.save(
        home / name,
        variables,
        attributes=_ATTRIBUTES if manifest else None,
        base=None if base is None else home / base,
        overwrite=overwrite,
        durable=durable,
        manifest=manifest,
        files=files,
        encoding=encoding,
        threads=1,
    )


def _save_with_source(home: Path, *, durable: bool) -> None:
    """Save with attached files, one of them from a path."""
    vs.save(
        home / TARGET,
        NEW,
        attributes=_ATTRIBUTES,
        files={**FILES, "graph.onnx": home / "source"},
        base=home / "base",
        durable=durable,
        threads=1,
    )


def _prepare_source(home: Path) -> None:
    (home / "source").write_bytes(FILES["graph.onnx"])
    _save(EARLIER, home, name="base", files={"labels.txt": FILES["labels.txt"]})


def _nothing(_: Path) -> None:
    """Prepare a home directory for a new save."""


def _saving(
    name: str,
    prepare: _Work,
    *,
    durable: bool,
    act: Callable[..., object] | None = None,
    files: Mapping[str, bytes] | None = None,
    **options: Any,
) -> Scenario:
    if files and act is None:
        options["files"] = files
    return Scenario(
        name=f"{name}, durable" if durable else name,
        prepare=prepare,
        act=partial(act or partial(_save, NEW), durable=durable, **options),
        new={TARGET: contents_of(NEW, files)},
        again=partial(_save, NEXT, overwrite=True),
        is_durable=durable,
    )


def _saves(*, durable: bool) -> Iterator[Scenario]:
    saving = partial(_saving, durable=durable)
    yield saving("new", _nothing)
    yield saving("overwrite", partial(_save, OLD), overwrite=True)
    yield saving("base", partial(_save, EARLIER, name="base"), base="base")
    yield saving("overwrite base", partial(_save, EARLIER), base=TARGET, overwrite=True)
    yield saving("compose", _save_parts, act=_compose)
    yield saving("no manifest", _nothing, manifest=False)
    yield saving("overwrite, no manifest", partial(_save, OLD, manifest=False), manifest=False, overwrite=True)
    yield saving("files", _nothing, files=FILES)
    yield saving("overwrite files", partial(_save, OLD, files=OLD_FILES), files=FILES, overwrite=True)
    yield saving("base files", partial(_save, EARLIER, name="base", files=OLD_FILES), files=FILES, base="base")
    yield saving("files of paths", _prepare_source, act=_save_with_source, files=FILES)
    yield saving("encoded", _nothing, encoding="zarr")
    yield saving("overwrite encoded", partial(_save, OLD, encoding="zarr"), encoding="zarr", overwrite=True)
    yield saving("base encoded", partial(_save, EARLIER, name="base", encoding="zarr"), base="base")
    yield saving("in background", partial(_save, OLD), act=_save_in_background)


def _save_parts(home: Path) -> None:
    _save(EARLIER, home, name="body")
    _save({"step": NEW["step"]}, home, name="head")


def _compose(home: Path, *, durable: bool) -> None:
    with vs.open(home / "body") as body, vs.open(home / "head") as head:
        parts = {**body.select(exclude="step"), **head}
        vs.save(home / TARGET, parts, attributes=_ATTRIBUTES, durable=durable, threads=1)


def _save_in_background(home: Path, *, durable: bool) -> None:
    pending = vs.save_async(home / TARGET, NEW, attributes=_ATTRIBUTES, overwrite=True, durable=durable, threads=1)
    try:
        pending.wait()
    except KeyboardInterrupt:  # the save goes on
        pending.wait()
        raise


def _make(name: str, home: Path) -> None:
    (home / name).mkdir()


def _in_place() -> Iterator[Scenario]:
    for durable in (False, True):
        yield Scenario(
            name="in place, durable" if durable else "in place",
            prepare=_enter_target,
            act=partial(_save_here, NEW, durable=durable),
            new={TARGET: contents_of(NEW)},
            again=_clean_and_save_here,
            is_durable=durable,
            is_in_place=True,
        )


def _enter_target(home: Path) -> None:
    (home / TARGET).mkdir()
    os.chdir(home / TARGET)


def _save_here(variables: _Arrays, _: Path, *, durable: bool = False) -> None:
    vs.save(".", variables, attributes=_ATTRIBUTES, durable=durable, threads=1)


def _clean_and_save_here(home: Path) -> None:
    vs.clean(home / TARGET)
    if not (home / TARGET / "snapshot_done").exists():
        _save_here(NEXT, home)


def _change_by_hand(home: Path) -> None:
    _save(EARLIER, home)
    changed = home / TARGET / "step" / "changed"
    changed.write_bytes(NEW["step"].tobytes())
    os.replace(changed, changed.with_name("out"))


def _seal(home: Path) -> None:
    vs.seal(home / TARGET)


def _save_steps(
    steps: Mapping[int, _Arrays],
    home: Path,
    *,
    keep: int | None = None,
    keep_parts: bool = False,
    background: bool = False,
) -> None:
    manager = _manager(home, keep=keep, keep_parts=keep_parts, background=background)
    try:
        for step, arrays in steps.items():
            manager.save(step, arrays, metrics={"loss": 1 / step})
    finally:
        manager.wait()


def _manager(
    home: Path, *, keep: int | None = None, keep_parts: bool = False, background: bool = False
) -> vs.CheckpointManager:
    return vs.CheckpointManager(
        home / _RUN,
        keep=None if keep is None else vs.Latest(keep),
        keep_parts={"head/*": vs.Latest(1)} if keep_parts else None,
        background=background,
        clock=lambda: 1_000_000.0,
        threads=1,
    )


def _prune_without(unseen: int, home: Path, **options: Any) -> None:
    """Save step 3, and have one step stay as it is, which is not to be looked at, as the others are pruned."""
    _save_steps({3: NEW}, home)
    step, aside = home / _RUN / f"step-{unseen}", home / _RUN / "aside"
    step.rename(aside)
    _manager(home, **options).prune()
    aside.rename(step)


def _managing(name: str, **options: Any) -> Scenario:
    return Scenario(
        name=name,
        prepare=partial(_save_steps, {1: OLD, 2: EARLIER}),
        act=partial(_save_steps, {3: NEW}, **options),
        stages=[
            partial(_save_steps, {3: NEW}),
            partial(_save_steps, {3: NEW}, keep=2),
            *(partial(_prune_without, step, **options) for step in (1, 2, 3)),
        ],
        new={f"{_RUN}/step-3": contents_of(NEW)},
        again=partial(_save_steps, {4: NEXT}, **options),
        leftovers=2,  # a step that is being made smaller, and one that a thread removes meanwhile
    )


def _train(steps: int, home: Path, *, keep: int = 1, prefix: str = "net") -> None:
    callback = vs.ModelCheckpoint(
        prefix, home / _RUN, vs.CheckpointConfig(1, keep_checkpoint_max=keep), clock=lambda: 1_000_000.0
    )
    for step in range(1, steps + 1):
        callback.step_end(epoch=1, step=step, variables=NEW if step == 2 else OLD)


_FORMATS: Final = {
    "safetensors": ".safetensors",
    "sharded safetensors": ".safetensors.index.json",
    "torch": ".pt",
    "numpy": ".npz",
    "oneflow": ".of",
    "paddle": ".pdparams",
    "megengine": ".mge",
    "mindspore": ".ckpt",
    "onnx": ".onnx",
    "zarr": ".zarr",
}
_FLAT_NEW: Final[_Arrays] = {"w1": np.arange(16, dtype=np.float32), "w2": np.arange(60_000, dtype=np.float32)}
_FLAT_OLD: Final[_Arrays] = {"w1": np.zeros(16, np.float32), "w3": np.ones(3, np.float32)}
_FLAT_NEXT: Final[_Arrays] = {"w1": np.ones(16, np.float32)}


def _formats() -> Iterator[Scenario]:
    for name, suffix in _FORMATS.items():
        target = "model" + suffix
        options: dict[str, Any]
        old: _Arrays
        if name == "onnx":
            options = {"model": os.fspath(_MODEL)}
            old, new, following = map(_initializers, (1, 2, 3))
        else:
            options = {"shard_bytes": 1000} if "sharded" in name else {}
            options |= {"overwrite": True} if name in ("oneflow", "zarr") else {}
            old, new, following = _FLAT_OLD, _FLAT_NEW, _FLAT_NEXT
        write = partial(_write, options)
        threads: dict[str, Any] = {"start": _start_zarr, "stop": _stop_zarr} if name == "zarr" else {}
        yield Scenario(
            name=f"write {name}",
            prepare=partial(write, old, target),
            act=partial(write, new, target),
            again=partial(write, following, target),
            leftovers=5 if "sharded" in name else 1,
            harmless=r"model.*\.safetensors" if "sharded" in name else "",
            **threads,
        )
        yield Scenario(
            name=f"convert to {name}",
            prepare=partial(_save, new, name="source"),
            act=partial(_convert, options, "source", target),
            again=partial(write, following, target),
            leftovers=5 if "sharded" in name else 1,
            harmless=r"model.*\.safetensors" if "sharded" in name else "",
            **threads,
        )
        yield Scenario(
            name=f"convert from {name}",
            prepare=partial(write, new, "source" + suffix),
            act=partial(_convert, {"durable": True, "threads": 1}, "source" + suffix, TARGET),
            new={TARGET: contents_of(new)},
            again=partial(_save, NEXT, overwrite=True),
            **threads,
        )


def _write(options: Mapping[str, Any], arrays: _Arrays, target: str, home: Path) -> None:
    vs.write(home / target, arrays, **options)


def _convert(options: Mapping[str, Any], source: str, target: str, home: Path) -> None:
    vs.convert(home / source, home / target, **options)


def _start_zarr() -> None:
    """Have the package zarr do one thing after another in the threads that begin now."""
    import_module("zarr").config.set({"async.concurrency": 1, "threading.max_workers": 1})
    sync = import_module("zarr.core.sync")
    sync.sync(import_module("asyncio").to_thread(int))


def _stop_zarr() -> None:
    import_module("zarr.core.sync").cleanup_resources()


def _initializers(factor: int) -> _Arrays:
    """Return new values for the variables of the ONNX model."""
    return {name: factor * np.array(array) for name, array in vs.read(_MODEL).items()}


SCENARIOS: Final = (
    *_saves(durable=False),
    *_saves(durable=True),
    *_in_place(),
    *_formats(),
    Scenario(
        name="new folder, durable",
        prepare=_nothing,
        act=partial(_save, NEW, name="made/checkpoint", durable=True),
        stages=[partial(_make, "made")],
        new={"made/checkpoint": contents_of(NEW)},
        again=partial(_save, NEXT, name="made/checkpoint", overwrite=True),
    ),
    Scenario(
        name="seal",
        prepare=_change_by_hand,
        act=_seal,
        new={TARGET: contents_of(NEW)},
        again=_seal,
        old_is_sound=False,
    ),
    _managing("manager", keep=2),
    _managing("manager in background", keep=2, background=True),
    _managing("trim", keep=2, keep_parts=True),
    Scenario(
        name="ModelCheckpoint",
        prepare=_nothing,
        act=partial(_train, 2),
        stages=[partial(_make, _RUN), partial(_train, 1), partial(_train, 2, keep=2)],
        new={f"{_RUN}/net-1_2": contents_of(NEW)},
        again=partial(_train, 1, prefix="again"),
    ),
)
