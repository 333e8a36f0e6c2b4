"""Change single files of a checkpoint in every way that disks and people do, and check that it is noticed.

`varstore.verify` must find each change. What `varstore.load` returns, each variable by itself and the attributes must
be what was saved, or an error of varstore's tree. Slices, and ``verify=False``, may return wrong values, but any error
is still one of these.

One change is not tried: without its manifest, a checkpoint is one that was saved without.
"""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np

import varstore as vs
from tools.faults.jobs import FOREIGN, Job, Lost, Outcome

__all__ = ["CHANGES", "Change", "examine", "jobs"]

_WHOLE, _PART = 3_000, 40
"""How often a job changes something; what it does twice counts once."""

_VALUES: Final[Mapping[str, np.ndarray]] = {
    "encoder/weight": np.arange(600, dtype=np.float32).reshape(3, 200),
    "encoder/bias": np.linspace(0, 1, 5),
    "empty": np.zeros((0, 4), np.int8),
    "step": np.array(7),
}
_ATTRIBUTES: Final = {"epoch": 3, "note": "as it was saved"}

Change = Callable[[random.Random, Path, Path], bytes | None]
"""Is given a file and the same file of another checkpoint; returns what is there afterwards, None for nothing."""


def _flip(rng: random.Random, file: Path, _: Path) -> bytes:
    data = bytearray(file.read_bytes())
    if data:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(data)


def _truncate(rng: random.Random, file: Path, _: Path) -> bytes:
    data = file.read_bytes()
    return data[: rng.randrange(len(data))] if data else data


def _extend(rng: random.Random, file: Path, _: Path) -> bytes:
    return file.read_bytes() + rng.choice([b"\0", b"\n", b"x", rng.randbytes(rng.randrange(1, 5000))])


def _clear(rng: random.Random, file: Path, _: Path) -> bytes:
    """Zero a range, as a lost sector does."""
    data = bytearray(file.read_bytes())
    start, end = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    data[start:end] = bytes(end - start)
    return bytes(data)


def _move(rng: random.Random, file: Path, _: Path) -> bytes:
    """Exchange two ranges of one length."""
    data = file.read_bytes()
    length = rng.randrange(len(data) // 2 + 1)
    start = rng.randrange(len(data) - 2 * length + 1)
    middle = rng.randrange(start + length, len(data) - length + 1)
    pieces = data[:start], data[start:][:length], data[start + length : middle], data[middle:][:length]
    return pieces[0] + pieces[3] + pieces[2] + pieces[1] + data[middle + length :]


def _swap(rng: random.Random, file: Path, _: Path) -> bytes:
    """Take another file of the same checkpoint."""
    root = next(folder for folder in file.parents if (folder / "manifest").exists())
    return rng.choice(_files(root)).read_bytes()


def _age(_: random.Random, __: Path, other: Path) -> bytes | None:
    """Take the same file of another checkpoint, as an incomplete copy does."""
    return other.read_bytes() if other.exists() else None


def _delete(_: random.Random, __: Path, ___: Path) -> None:
    return None


CHANGES: Final[Mapping[str, Change]] = {
    "flip": _flip,
    "truncate": _truncate,
    "extend": _extend,
    "clear": _clear,
    "move": _move,
    "swap": _swap,
    "age": _age,
    "delete": _delete,
}


def _save_plain(path: Path, factor: int) -> None:
    values = {name: factor * array for name, array in _VALUES.items()}
    vs.save(path, values, attributes={**_ATTRIBUTES, "factor": factor}, durable=False, threads=1)


def _save_linked(path: Path, factor: int) -> None:
    """Save tied variables, linked to a base."""
    tied = {"tied": _VALUES["encoder/weight"]}
    base = path.with_name(path.name + "-base")
    vs.save(base, {**_VALUES, "encoder/bias": np.full(5, float(factor))}, durable=False, threads=1)
    values = {**_VALUES, **tied, "step": np.array(factor)}
    vs.save(path, values, base=base, attributes=_ATTRIBUTES, durable=False, threads=1)


def _save_nested(path: Path, factor: int) -> None:
    state = {"model": _VALUES, "optimizer": {"lr": 0.1 * factor, "moments": [np.full(3, float(factor))]}, "epoch": 3}
    vs.save_state(path, state, durable=False, threads=1)


_SUBJECTS: Final = {"plain": _save_plain, "linked": _save_linked, "nested": _save_nested}


def jobs(*, whole: bool) -> Iterator[Job]:
    """Yield a job for each kind of checkpoint and each kind of change."""
    for subject in _SUBJECTS:
        for change in CHANGES:
            run = partial(_rot, subject, change, _WHOLE if whole else _PART)
            yield Job(scenario=f"{subject} checkpoint", fault=change, run=run)


def _rot(subject: str, change: str, times: int, place: Path) -> Outcome:
    rng = random.Random(f"{subject}: {change}")
    path, other = place / "checkpoint", place / "other"
    _SUBJECTS[subject](path, 1)
    _SUBJECTS[subject](other, 2)
    files = _files(path)
    saved = _load(path)
    tried: set[tuple[Path, bytes | None]] = set()
    lost = []
    for number in range(times):
        file = files[number % len(files)]
        before = file.read_bytes()
        after = CHANGES[change](rng, file, other / file.relative_to(path))
        if after == before or (file, after) in tried or (after is None and file.name == "manifest"):
            continue
        tried.add((file, after))
        with _replaced(file, after, place / "aside"):
            losses = dict(examine(path, saved))
        if losses:
            size = "nothing" if after is None else f"{len(after)} bytes"
            point = f"change {number}: {file.relative_to(path)}, {len(before)} bytes, now {size}"
            lost.append(Lost(point=point, losses=losses))
    return Outcome(points=len(tried), lost=lost)


def _files(path: Path) -> list[Path]:
    return sorted(file for file in path.rglob("*") if file.is_file())


@contextlib.contextmanager
def _replaced(file: Path, data: bytes | None, aside: Path) -> Iterator[None]:
    """Keep other bytes in a new file at the path; the original, which may have more names, waits elsewhere."""
    os.rename(file, aside)
    try:
        if data is not None:
            file.write_bytes(data)
        yield
    finally:
        os.replace(aside, file)


def examine(path: Path, saved: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield what is lost at a checkpoint that was changed, with what was found."""
    try:
        report = vs.verify(path, threads=1)
        if report.ok:
            yield "UNNOTICED", f"verify says that it is as it was saved: {report}"
    except vs.VarstoreError:
        pass
    except Exception as error:
        yield FOREIGN, f"verify: {type(error).__name__}: {error}"
    try:
        found = _load(path)
        wrong = [name for name in saved if not _same(found.get(name), saved[name])] + sorted(
            found.keys() - saved.keys()
        )
        if wrong:
            yield "WRONG", f"loaded without an error: {', '.join(wrong)}"
    except vs.VarstoreError:
        pass
    except Exception as error:
        yield FOREIGN, f"load: {type(error).__name__}: {error}"
    try:
        vs.load(path, verify=False, threads=1)
        with vs.open(path) as checkpoint:
            for variable in checkpoint.values():
                variable[..., :1] if variable.shape else variable[()]
    except vs.VarstoreError:
        pass
    except Exception as error:
        yield FOREIGN, f"without verify: {type(error).__name__}: {error}"


def _load(path: Path) -> dict[str, Any]:
    """Return all that a checkpoint holds, by name, and everything again that has another way to be read."""
    found: dict[str, Any] = dict(vs.load(path, threads=1))
    with vs.open(path) as checkpoint:
        found |= {f"{name} by itself": variable.numpy() for name, variable in checkpoint.items()}
        found["the attributes"] = dict(checkpoint.attributes)
        found["the tree"] = repr(checkpoint.tree)
    return found


def _same(found: Any, saved: Any) -> bool:
    if not isinstance(saved, np.ndarray) or not isinstance(found, np.ndarray):
        return type(found) is type(saved) and bool(found == saved)
    return (found.dtype, found.shape, found.tobytes()) == (saved.dtype, saved.shape, saved.tobytes())
