"""What a user does on a file system, each as a function that fails with the reason why it does not hold there."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np

import varstore as vs
from tools.faults.races import BY_PATH, FILLINGS, filling_of, losses, overwriting, save
from varstore.disk.save.leftovers import discard
from varstore.errors import CheckpointExists, StorageError
from varstore.values.lazy import LazyArray

__all__ = ["CHECKS", "Ground", "Skipped", "image_values", "save_image"]

_BLOCK = 16 << 20
_TRIES = 4
_SAVER = """
import sys, time
from functools import partial
import numpy as np
import varstore as vs
from varstore.values.lazy import LazyArray
def late(i):
    if i == 5:
        print("half", flush=True)
        time.sleep(float(sys.argv[2]))
    return np.full(9, i)
values = {f"v{i}": LazyArray((9,), np.dtype(int), partial(late, i)) for i in range(10)}
vs.save(sys.argv[1], values, threads=1)
"""


class Skipped(Exception):
    """The check does not apply to this file system."""


@dataclass(frozen=True)
class Ground:
    """A new folder on the file system, and the same one in a second mount if there is one."""

    here: Path
    there: Path | None

    def elsewhere(self) -> Path:
        """Return the folder in the second mount."""
        if self.there is None:
            raise Skipped
        return self.there


def image_values() -> dict[str, np.ndarray]:
    """Return variables of all sizes: empty, small, and one of two blocks."""
    large = np.random.default_rng(7).integers(0, 255, _BLOCK + 4099, np.uint8)
    return {
        "conv/w": np.arange(3000.0).reshape(30, 100),
        "step": np.array(7),
        "empty": np.empty((0, 3)),
        "large": large,
    }


def save_image(path: Path, **options: Any) -> None:
    """Save them."""
    vs.save(path, image_values(), attributes={"epoch": 3}, **options)


def _require_image(loaded: Mapping[str, Any]) -> None:
    expected = image_values()
    assert {*loaded} == {*expected}, f"other variables: {sorted(loaded)}"
    for name, values in expected.items():
        assert np.array_equal(np.asarray(loaded[name]), values), f"{name} has other values"


def _require_whole(path: Path) -> None:
    report = vs.verify(path)
    assert report.ok, str(report)
    _require_image(vs.load(path))


def _require_clean(folder: Path) -> None:
    left = [name for name in os.listdir(folder) if name.startswith(".")]
    assert not left, f"left behind: {left}"


def _save(durable: bool, ground: Ground) -> None:
    with suppress(ArithmeticError):
        vs.save(ground.here / "a/b", {"w": np.ones(9), "late": LazyArray((9,), np.dtype(int), _fail)}, durable=durable)
    assert not os.listdir(ground.here), "a save that failed left files behind"
    save_image(ground.here / "c", durable=durable)
    _require_whole(ground.here / "c")
    _require_clean(ground.here)
    if ground.there is not None:
        _require_whole(ground.there / "c")


def _fail() -> np.ndarray:
    raise ArithmeticError


def _slices(path: Path) -> None:
    values, checkpoint = image_values(), vs.open(path)
    assert np.array_equal(checkpoint["conv/w"][3:9, ::7], values["conv/w"][3:9, ::7])
    assert np.array_equal(checkpoint["large"][_BLOCK - 5 : _BLOCK + 5], values["large"][_BLOCK - 5 : _BLOCK + 5])
    assert checkpoint["step"][()] == 7


def _load(path: Path) -> None:
    _require_image(vs.load(path))
    _require_image(vs.load(path, threads=4))
    targets = {name: np.zeros_like(array) for name, array in image_values().items()}
    vs.load_into(targets, path)
    _require_image(targets)


def _with_image(use: Callable[[Path], None], ground: Ground) -> None:
    """Use the checkpoint that the file system holds, and also by its second mount."""
    image = ground.here.parent / "image"
    if not image.exists():
        save_image(image)
    use(image)
    if ground.there is not None:
        use(ground.there.parent / "image")


def _base(path: Path) -> None:
    following = path.with_name(f"next-{os.urandom(3).hex()}")
    vs.save(following, image_values() | {"step": np.array(8)}, base=path)
    assert vs.load(following)["step"] == 8
    assert vs.verify(following).ok
    _require_whole(path)


def _overwrite(ground: Ground) -> None:
    path = ground.here / "c"
    for filling in (1, 2, 1, 2, 1):
        save(path, filling, manifest=True, overwrite=True)
        assert filling_of(vs.load(path)) == filling
        assert vs.verify(path).ok
    _require_clean(ground.here)


def _write(path: Path, filling: int, start: threading.Barrier, told: dict[int, object]) -> None:
    start.wait()
    try:
        save(path, filling, manifest=True)
        told[filling] = "saved"
    except CheckpointExists as error:
        told[filling] = error
    except BaseException as error:
        told[filling] = f"{type(error).__name__}: {error}"


def _two_writers(other: Callable[[Ground], Path], ground: Ground) -> None:
    second = other(ground)
    for turn in range(_TRIES):
        told: dict[int, object] = {}
        start = threading.Barrier(2)
        paths = ground.here / f"c{turn}", second / f"c{turn}"
        threads = [
            threading.Thread(target=_write, args=(path, filling, start, told))
            for path, filling in zip(paths, FILLINGS, strict=True)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        saved = [filling for filling, what in told.items() if what == "saved"]
        others = [what for what in told.values() if what != "saved" and not isinstance(what, CheckpointExists)]
        assert len(saved) == 1, f"of two writers {len(saved)} were told 'saved'; {others}"
        assert not others, others[0]
        assert filling_of(vs.load(paths[0])) == saved[0], "what was saved does not lie there"
        assert vs.verify(paths[0]).ok
    _require_clean(ground.here)


def _beside_overwrites(other: Callable[[Ground], Path], ground: Ground) -> None:
    second = other(ground)
    save(ground.here / "c", 1, manifest=True)
    told = []
    with overwriting(ground.here / "c", True):
        for name in ("load", "open", "verify"):
            for _ in range(_TRIES):
                told += [f"{kind}: {what}" for kind, what in losses(BY_PATH[name], second / "c")]
    damage = [what for what in told if not what.startswith("ERROR")]
    assert not damage, damage[0]


def _started(path: Path, seconds: float) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", _SAVER, str(path), str(seconds)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    said = process.stdout.readline()
    assert said == "half\n", process.communicate()[1][-300:]
    return process


def _killed(ground: Ground) -> None:
    save(ground.here / "d", 1, manifest=True)
    process = _started(ground.here / "c", 60)
    process.kill()
    process.communicate()
    assert not (ground.here / "c").exists()
    cleaned = vs.clean(ground.here)
    assert len(cleaned) == 1, f"not cleaned: {cleaned.kept}"
    _require_clean(ground.here)
    assert filling_of(vs.load(ground.here / "d")) == 1


def _beside_cleaning(other: Callable[[Ground], Path], ground: Ground) -> None:
    second = other(ground)
    process = _started(ground.here / "c", 1.5)
    while process.poll() is None:
        assert vs.clean(second) == []
        vs.CheckpointManager(second)
        save(second / "d", 1, manifest=True, overwrite=True)
    said = process.communicate()[1]
    assert process.returncode == 0, said.strip().splitlines()[-1:]
    assert vs.verify(second / "c").ok


def _manager(ground: Ground) -> None:
    run = ground.here / "run"
    with vs.CheckpointManager(run, background=True, keep=[vs.Latest(2)]) as manager:
        for step in range(5):
            manager.save(step, {"w": np.full(4000, step), "same": np.ones(300_000)})
    latest = vs.CheckpointManager(run).latest()
    assert latest is not None
    assert latest.step == 4
    assert sorted(os.listdir(run)) == ["step-3", "step-4"], sorted(os.listdir(run))
    assert all(vs.verify(run / name).ok for name in os.listdir(run))


def _delete(ground: Ground) -> None:
    """Replace and delete the checkpoint that the file system held before it was mounted, in a lower layer."""
    path = ground.here.parent / "image"
    save(path, 1, manifest=True, overwrite=True)
    assert filling_of(vs.load(path)) == 1
    discard(os.fspath(path))
    assert not path.exists()
    _require_clean(path.parent)


def _seal(path: Path) -> None:
    plain = path.with_name("plain")
    with suppress(CheckpointExists):
        save(plain, 1, manifest=False)
    vs.seal(plain)
    assert vs.verify(plain).ok
    assert filling_of(vs.load(plain)) == 1


def _convert(path: Path) -> None:
    file, back = path.with_name("m.safetensors"), path.with_name("back")
    vs.convert(path, file, overwrite=True)
    _require_image(vs.read(file))
    vs.convert(file, back, overwrite=True)
    _require_image(vs.load(back))
    _require_clean(path.parent)


def _refused(ground: Ground) -> None:
    for attempt in (
        lambda: save(ground.here.parent / "new", 1, manifest=True),
        lambda: save(ground.here.parent / "image", 1, manifest=True, overwrite=True),
        lambda: vs.seal(ground.here.parent / "image"),
        lambda: vs.convert(ground.here.parent / "image", ground.here.parent / "m.safetensors"),
    ):
        said = "nothing: it was written"
        try:
            attempt()
        except StorageError as error:
            said = str(error)
        assert "read-only" in said.lower(), said


def _second(ground: Ground) -> Path:
    return ground.elsewhere()


def _same(ground: Ground) -> Path:
    return ground.here


READING: Final[Mapping[str, Callable[[Ground], None]]] = {
    "load": partial(_with_image, _load),
    "slices": partial(_with_image, _slices),
    "mmap": partial(_with_image, lambda path: _require_image(vs.load(path, mmap=True))),
    "verify": partial(_with_image, _require_whole),
}
CHECKS: Final[Mapping[str, Callable[[Ground], None]]] = {
    "save, durable": partial(_save, True),
    "save": partial(_save, False),
    **READING,
    "base=": partial(_with_image, _base),
    "overwrite": _overwrite,
    "two writers": partial(_two_writers, _same),
    "two writers, two mounts": partial(_two_writers, _second),
    "load beside overwrites": partial(_beside_overwrites, _same),
    "load beside overwrites, second mount": partial(_beside_overwrites, _second),
    "kill -9, clean": _killed,
    "save beside clean": partial(_beside_cleaning, _same),
    "save beside clean, second mount": partial(_beside_cleaning, _second),
    "manager": _manager,
    "seal": partial(_with_image, _seal),
    "convert": partial(_with_image, _convert),
    "image layer": _delete,
}
"""By the name that the table shows."""
READ_ONLY: Final[Mapping[str, Callable[[Ground], None]]] = {**READING, "save, durable": _refused}
