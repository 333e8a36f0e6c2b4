"""Damage real files of every format, manifests, ``meta`` and the trees of states, and open what comes of it.

The seeds are the files in ``tests/data``, and checkpoints that are written here. Structured parts are damaged in their
structure too: the members of archives, JSON, and the body of a manifest, whose digest is made to match.
"""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import struct
import zipfile
from collections.abc import Callable, Iterator
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import numpy as np

import varstore as vs
from tools.faults.jobs import Job, Outcome
from tools.faults.strangers import Case, open_all, try_cases
from varstore.layout.manifest import HEADER_SIZE, frame

__all__ = ["jobs"]

DATA = Path(__file__).resolve().parents[2] / "tests" / "data" / "formats"
_WHOLE, _PART = 200_000, 1500
_LARGEST = 1 << 20
_INTERESTING: Final = (0, 1, 2, 7, 127, 128, 255, 256, 32767, 65535, 1 << 20, (1 << 31) - 1, 1 << 31, (1 << 32) - 1)
_FORMATS: Final = (
    "megengine",
    "mindspore",
    "numpy",
    "oneflow",
    "onnx",
    "orbax",
    "paddle",
    "safetensors",
    "torch",
    "zarr",
)


def jobs(*, whole: bool) -> Iterator[Job]:
    """Yield a job for each format and kind of damage."""
    kinds = {**{format: partial(_damaged_file, format) for format in _FORMATS}, **_OWN}
    count = (_WHOLE if whole else _PART) // (len(kinds) * len(_DAMAGES))
    for scenario, make in kinds.items():
        for fault, damage in _DAMAGES.items():
            yield Job(scenario=scenario, fault=fault, run=partial(_try, make, damage, count))


Damage = Callable[[bytes, random.Random], bytes]


def _try(make: Callable[[Damage, random.Random, Path], Case], damage: Damage, count: int, place: Path) -> Outcome:
    return try_cases(partial(_case, make, damage), count, place)


def _case(make: Callable[[Damage, random.Random, Path], Case], damage: Damage, number: int, place: Path) -> Case:
    name, act = make(damage, random.Random(f"{damage.__name__} {number}"), place)
    return f"{number}: {name}", act


# --- files of other systems ------------------------------------------------------------------------------------------


@cache
def _seeds(format: str) -> list[Path]:
    found = [path for path in sorted((DATA / format).iterdir()) if ".expect." not in path.name]
    has_tensorstore = find_spec("tensorstore") is not None
    readable = [path for path in found if has_tensorstore or path.name != "ocdbt"]
    return [path for path in readable if path.is_dir() or path.stat().st_size < _LARGEST]


def _damaged_file(format: str, damage: Damage, choice: random.Random, place: Path) -> Case:
    seed = choice.choice(_seeds(format))
    path = place / seed.name
    if seed.is_dir():
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(seed, path)
        file = choice.choice([file for file in sorted(path.rglob("*")) if file.is_file()])
    else:
        for beside in seed.parent.glob(f"{seed.name.split('.')[0]}.*"):  # the program beside raw variables
            if beside.is_file() and ".expect." not in beside.name:
                shutil.copy(beside, place / beside.name)
        file = path
    data = file.read_bytes()
    file.write_bytes(_within(data, damage, choice))
    named = format if choice.random() < 0.8 else None
    return f"{seed.name}/{file.name}", partial(open_all, path, named)


def _within(data: bytes, damage: Damage, choice: random.Random) -> bytes:
    """Damage a file, or the content of one member of an archive, whose checksums then match."""
    if data[:2] == b"PK" and choice.random() < 0.7:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            try:
                members = {info.filename: archive.read(info) for info in archive.infolist()}
            except zipfile.BadZipFile:  # an archive of torch without checksums
                return damage(data, choice)
        likely = [name for name in members if name.endswith((".pkl", ".npy"))] or [*members]
        victim = choice.choice(likely if choice.random() < 0.7 else [*members])
        members[victim] = damage(members[victim], choice)
        packed = io.BytesIO()
        with zipfile.ZipFile(packed, "w", choice.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))) as archive:
            for name, content in members.items():
                archive.writestr(name, content)
        return packed.getvalue()
    if data[:1] == b"{" and choice.random() < 0.7:
        return _damaged_json(data, choice)
    if data[8:9] == b"{" and choice.random() < 0.5:  # safetensors
        size = int.from_bytes(data[:8], "little")
        header = _damaged_json(data[8 : 8 + size], choice)
        return struct.pack("<Q", len(header)) + header + data[8 + size :]
    return damage(data, choice)


def _damaged_json(text: bytes, choice: random.Random) -> bytes:
    try:
        value = json.loads(text)
    except ValueError:
        return text
    for _ in range(choice.randrange(1, 4)):
        value = _changed(value, choice)
    return json.dumps(value).encode()


def _changed(value: Any, choice: random.Random) -> Any:
    """Replace, remove or repeat one part of a JSON value."""
    if isinstance(value, dict) and value and choice.random() < 0.9:
        key = choice.choice([*value])
        kind = choice.random()
        if kind < 0.1:
            return {name: item for name, item in value.items() if name != key}
        if kind < 0.2:
            return {choice.choice(_STRINGS) if name == key else name: item for name, item in value.items()}
        return value | {key: _changed(value[key], choice)}
    if isinstance(value, list) and value and choice.random() < 0.8:
        at = choice.randrange(len(value))
        if choice.random() < 0.2:
            return value[:at] + value[at + 1 :] if choice.random() < 0.5 else [*value, value[at]]
        return [*value[:at], _changed(value[at], choice), *value[at + 1 :]]
    return choice.choice(
        (*_STRINGS, *_INTERESTING, -1, 1.5, 1e400, float("nan"), None, True, [], {}, [[]], {"$": "set"})
    )


_STRINGS: Final = (
    "",
    "..",
    "/etc/hostname",
    "a\\b",
    "a/b",
    ".",
    "pickle",
    "0x7fc0",
    "NaN",
    "\0",
    "é" * 50,
    "$",
    "x" * 5000,
)


# --- damages ---------------------------------------------------------------------------------------------------------


def _bits(data: bytes, choice: random.Random) -> bytes:
    raw = bytearray(data)
    for _ in range(choice.choice((1, 1, 2, 8)) if raw else 0):
        raw[_near_an_end(len(raw), choice)] ^= 1 << choice.randrange(8)
    return bytes(raw)


def _bytes(data: bytes, choice: random.Random) -> bytes:
    raw = bytearray(data)
    for _ in range(choice.choice((1, 2, 4)) if raw else 0):
        raw[_near_an_end(len(raw), choice)] = choice.choice((0, 0xFF, 0x7F, 0x80, choice.randrange(256)))
    return bytes(raw)


def _numbers(data: bytes, choice: random.Random) -> bytes:
    width = choice.choice((2, 4, 8))
    at = _near_an_end(max(len(data) - width, 1), choice)
    number = choice.choice((*_INTERESTING, 1 << 63, (1 << 64) - 1, len(data), len(data) - at)) % (1 << 8 * width)
    return data[:at] + number.to_bytes(width, choice.choice(("little", "big"))) + data[at + width :]


def _cuts(data: bytes, choice: random.Random) -> bytes:
    at = choice.randrange(len(data) + 1)
    return choice.choice((data[:at], data[at:], data[:at] + data[at + choice.randrange(64) :]))


def _repeats(data: bytes, choice: random.Random) -> bytes:
    at = choice.randrange(len(data) + 1)
    size = choice.choice((1, 4, 64, 4096))
    return data[:at] + data[at : at + size] * choice.choice((2, 3, 50)) + data[at + size :]


def _splices(data: bytes, choice: random.Random) -> bytes:
    other = choice.choice([seed for format in _FORMATS for seed in _seeds(format) if seed.is_file()]).read_bytes()
    at, start = choice.randrange(len(data) + 1), choice.randrange(len(other) + 1)
    return data[:at] + other[start : start + choice.randrange(200)] + data[at + choice.randrange(200) :]


def _near_an_end(size: int, choice: random.Random) -> int:
    """Return a position; formats have their structure at the start and the end of a file."""
    near = min(size, choice.choice((64, 512, size)))
    return choice.choice((choice.randrange(near), size - 1 - choice.randrange(near)))


_DAMAGES: Final[dict[str, Damage]] = {
    "bits": _bits,
    "bytes": _bytes,
    "numbers": _numbers,
    "cuts": _cuts,
    "repeats": _repeats,
    "splices": _splices,
}


# --- varstore's own --------------------------------------------------------------------------------------------------


@cache
def _own_checkpoint() -> dict[str, bytes]:
    """Return the files of a checkpoint of a state with everything that a tree can hold."""
    import tempfile

    state = {
        "w": np.arange(6, dtype="f4").reshape(2, 3),
        "n": [np.array([1], "i1"), (1, 2.5, None, True, "x", b"y", 1j, float("nan"), 1 << 70)],
        "k": {1: {2.5: frozenset({3}), (1, "a"): {4}}, "$": np.float16(2)},
    }
    with tempfile.TemporaryDirectory() as folder:
        vs.save_state(f"{folder}/c", state)
        files = (Path(place, name) for place, _, names in os.walk(f"{folder}/c") for name in names)
        return {os.path.relpath(file, f"{folder}/c"): file.read_bytes() for file in files}


def _damaged_own(part: str, damage: Damage, choice: random.Random, place: Path) -> Case:
    files = dict(_own_checkpoint())
    if part == "meta":
        name = choice.choice([name for name in files if name.endswith("meta")])
        files[name] = damage(files[name], choice)
        if choice.random() < 0.5:
            del files["manifest"]
    else:
        body = files["manifest"][HEADER_SIZE:]
        changed = _with_tree(body, choice) if part == "tree" and choice.random() < 0.8 else damage(body, choice)
        files["manifest"] = frame(changed) if choice.random() < 0.95 else damage(files["manifest"], choice)
    path = place / "own"
    shutil.rmtree(path, ignore_errors=True)
    for name, data in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return part, partial(_open_own, path)


def _with_tree(body: bytes, choice: random.Random) -> bytes:
    from varstore._gen import manifest_pb2

    manifest = manifest_pb2.Manifest.FromString(body)
    manifest.tree = _damaged_json(manifest.tree.encode(), choice).decode()
    return manifest.SerializeToString()


def _open_own(path: Path) -> None:
    errors = []
    for act in (
        vs.load,
        vs.load_state,
        vs.verify,
        partial(vs.open, allow_incomplete=True),
        open_all,
    ):
        try:
            str(act(path))
        except vs.VarstoreError as error:
            errors.append(error)
    if errors:
        raise max(errors, key=lambda error: len(str(error)))


_OWN: Final = {part: partial(_damaged_own, part) for part in ("manifest", "meta", "tree")}
