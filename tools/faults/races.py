"""Read, verify, seal and convert a checkpoint while another process overwrites it without a pause.

Each call must give one of the checkpoints that were saved, whole: values of one filling, with the attributes of that
filling. What has a path must end well, or say that the checkpoint was replaced each time, as may be where a machine is
too busy to read as fast as the other process writes. A handle may say that its checkpoint was replaced, and nothing
else: an error that speaks of damage is a loss, and so is a mixture of two checkpoints.
"""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np

import varstore as vs
from tools.faults.jobs import FOREIGN, Job, Lost, Outcome
from varstore.disk.read.checkpoint import Checkpoint
from varstore.storage.directory import says_replaced

__all__ = ["BY_PATH", "FILLINGS", "HANDLES", "filling_of", "jobs", "losses", "overwriting", "save", "values_of"]

_WHOLE, _PART = 5_000, 25
FILLINGS: Final = (1, 2)
"""What the checkpoints that follow each other are filled with."""
_WRITER: Final = """
import itertools, sys
from pathlib import Path
from tools.faults.races import FILLINGS, save
print("ready", flush=True)
for filling in itertools.cycle(reversed(FILLINGS)):
    save(Path(sys.argv[1]), filling, manifest=sys.argv[2] == "True", overwrite=True)
"""


def values_of(filling: int) -> dict[str, np.ndarray]:
    """Return variables of which some have other sizes and names than those of another filling."""
    values = {f"v{i}": np.full(40 + filling * i, filling, np.int16) for i in range(3)}
    return values | {f"only {filling}": np.full(5, filling, np.int16), "same": np.full(9, filling, np.int16)}


def save(path: Path, filling: int, *, manifest: bool, overwrite: bool = False) -> None:
    """Save a checkpoint; its attributes say what it is filled with."""
    about: dict[str, Any] = {"attributes": {"filling": filling}} if manifest else {}
    vs.save(path, values_of(filling), manifest=manifest, durable=False, threads=1, overwrite=overwrite, **about)


def filling_of(values: Mapping[str, Any]) -> int:
    """Return what arrays are filled with, if they are all that one checkpoint has."""
    arrays = {name: np.asarray(value) for name, value in values.items()}
    found = {int(array.flat[0]) for array in arrays.values()}
    if len(found) == 1:
        (filling,) = found
        expected = values_of(filling) if filling in FILLINGS else {}
        if arrays.keys() == expected.keys() and all(np.array_equal(arrays[n], expected[n]) for n in expected):
            return filling
    raise AssertionError(f"a mixture: { ({name: (a.shape, a.flat[0]) for name, a in arrays.items()}) }")


@contextmanager
def _may_be_old() -> Iterator[None]:
    """Use a handle, which may be told that its checkpoint was replaced."""
    try:
        yield
    except vs.errors.StorageError as error:
        if not says_replaced(error):
            raise


def _open(path: Path) -> int:
    """Read each variable of a handle, which may be told that it is old."""
    with vs.open(path) as checkpoint:
        said = checkpoint.attributes.get("filling")
        filling = said or FILLINGS[-1]
        with _may_be_old():
            filling = filling_of(dict(checkpoint))
        assert said in (None, filling), f"attributes of {said}, values of {filling}"
        return int(filling)


def _verify(path: Path) -> int:
    report = vs.verify(path)
    assert report.ok, str(report)
    return _open(path)


def _seal(path: Path) -> int:
    vs.seal(path)
    return _verify(path)


def _load_into(path: Path) -> int:
    targets = {name: np.zeros_like(values) for filling in FILLINGS for name, values in values_of(filling).items()}
    report = vs.load_into(targets, path, on_mismatch="skip")
    filling = int(targets["same"][0])
    assert all((targets[name] == filling).all() for name in report.loaded), f"a mixture: {targets}"
    assert {"same", f"only {filling}"} <= set(report.loaded), str(report)
    return filling


def _diff(path: Path) -> int:
    """Compare with a checkpoint beside it, which holds the first filling."""
    report = vs.diff(path.with_name("first"), path)
    changes = len(report.changed), len(report.added), len(report.removed)
    assert changes in ((0, 0, 0), (4, 1, 1)), str(report)
    return FILLINGS[bool(report.changed)]


def _convert(suffix: str, path: Path) -> int:
    target = path.with_name(f"converted{suffix}")
    with suppress(FileNotFoundError):
        shutil.rmtree(target) if target.is_dir() else target.unlink()
    vs.convert(path, target)
    return filling_of(vs.read(target))


def _get(path: Path) -> int:
    with _may_be_old():
        found = vs.checkpoint.get(path)
        assert isinstance(found, Mapping)
        return filling_of(found)
    return FILLINGS[-1]


BY_PATH: Final[Mapping[str, Callable[[Path], int]]] = {
    "open": _open,
    "load": lambda path: filling_of(vs.load(path, threads=1)),
    "load unchecked": lambda path: filling_of(vs.load(path, threads=1, verify=False)),
    "load mapped": lambda path: filling_of(vs.load(path, mmap=True)),
    "load_into": _load_into,
    "load_state": lambda path: filling_of(vs.load_state(path, threads=1)),
    "verify": _verify,
    "seal": _seal,
    "diff": _diff,
    "convert to safetensors": partial(_convert, ".safetensors"),
    "convert to a checkpoint": partial(_convert, ""),
    "checkpoint.get": _get,
}
"""What is given the path; each returns the filling of the checkpoint that it saw."""


def _link(handle: Checkpoint) -> int:
    target = Path(handle.path).with_name("copy")
    shutil.rmtree(target, ignore_errors=True)
    return filling_of(vs.save(target, handle.select(), durable=False))


HANDLES: Final[Mapping[str, Callable[[Checkpoint], int]]] = {
    "load": lambda handle: filling_of(vs.load(handle, threads=1)),
    "numpy": lambda handle: filling_of({name: variable.numpy() for name, variable in handle.items()}),
    "map": lambda handle: filling_of({name: variable.numpy(mmap=True) for name, variable in handle.items()}),
    "slice": lambda handle: filling_of({name: variable[...] for name, variable in handle.items()}),
    "element": lambda handle: int(handle["v2"][7]),
    "load_state": lambda handle: filling_of(vs.load_state(handle, threads=1)),
    "link": _link,
    "unpickled": lambda handle: filling_of(vs.load(pickle.loads(pickle.dumps(handle)), threads=1)),
}
"""What is given a handle; each returns the filling, or raises the error of a checkpoint that was replaced."""


def _use_handle(use: Callable[[Checkpoint], int], path: Path) -> int:
    handle = vs.open(path)
    with _may_be_old():
        return use(handle)
    return FILLINGS[0]


def jobs(*, whole: bool) -> Iterator[Job]:
    """Yield a job for each verb and each use of a handle, with a manifest and without."""
    times = _WHOLE if whole else _PART
    uses: dict[str, Callable[[Path], int]] = dict(BY_PATH)
    uses |= {f"{name} of a handle": partial(_use_handle, use) for name, use in HANDLES.items()}
    for name, use in uses.items():
        for manifest in (True, False):
            fault = "overwritten" if manifest else "overwritten, without manifest"
            yield Job(scenario=name, fault=fault, run=partial(_race, use, manifest, times))


def _race(use: Callable[[Path], int], manifest: bool, times: int, place: Path) -> Outcome:
    path = place / "checkpoint"
    for name in ("first", "checkpoint"):
        save(place / name, FILLINGS[0], manifest=manifest)
    lost = []
    with overwriting(path, manifest):
        for number in range(times):
            found = dict(losses(use, path))
            if found:
                lost.append(Lost(point=f"call {number}", losses=found))
    return Outcome(points=times, lost=lost)


@contextmanager
def overwriting(path: Path, manifest: bool) -> Iterator[None]:
    """Let another process overwrite a checkpoint without a pause."""
    command = [sys.executable, "-c", _WRITER, os.fspath(path), str(manifest)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
        try:
            yield
        finally:
            ended = writer.poll()
            writer.kill()
    assert ended is None, "the writer failed"


def losses(use: Callable[[Path], int], path: Path) -> Iterator[tuple[str, str]]:
    """Yield what is lost by a call, with what was found."""
    try:
        use(path)
    except AssertionError as error:
        yield "MIXED", str(error)
    except vs.errors.FormatError as error:
        yield "DAMAGE", str(error)
    except vs.VarstoreError as error:
        if not says_replaced(error):  # it was replaced each time
            yield "ERROR", f"{type(error).__name__}: {error}"
    except Exception as error:
        yield FOREIGN, f"{type(error).__name__}: {error}"
