"""Read what lies on disk without varstore, so that a fault in its readers cannot hide one in its writers.

Everything here follows from ``proto/FORMAT.md``; of the data types, only those of the scenarios are known.
"""

from __future__ import annotations

import json
import os
import re
import struct
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import xxhash

__all__ = ["Checkpoint", "Contents", "Seen", "contents_of", "is_visible", "observe", "read_checkpoint"]

_NUMBERS: Final = {"kFloat": 2, "kInt64": 6}
_TYPES: Final = {"float32": "kFloat", "int64": "kInt64"}
_HEADER: Final = struct.Struct("<8sIIQ16s")  # magic, version, zero, length of the body, its digest
_BLOCK: Final = 16_777_216
_MANIFEST: Final = {4: "attributes", 5: "tree", 6: "variables", 1000: "files"}
_FILE: Final = {1: "name", 2: "size", 3: "digests"}
_VARIABLE: Final = {1: "name", 2: "folder", 3: "shape", 4: "data_type", 5: "size", 8: "digests", 9: "alias_of"}
_SHARDS_INDEX: Final = ".safetensors.index.json"
_SHARD: Final = re.compile(r".*-\d{5}-of-\d{5}.*\.safetensors")
_INDEX: Final = {"snapshot_done", "manifest"}
_STAGING: Final = re.compile(
    r"(\..+)?\.(saving|replaced)-[0-9a-f]{8}|\.(replacing|filling)-[0-9a-f]{8}|\..+\.[0-9a-f]{8}\.tmp", re.DOTALL
)
_ENCODED: Final = re.compile(r"zarr\.json|c(\.0)*")
_TEMPORARY: Final = re.compile(r"\.manifest\.[0-9a-f]{8}")

Variable = tuple[tuple[int, ...], str, bytes]
"""Shape, data type and the digest of the values."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Contents:
    """The variables of a checkpoint by folder, the sets of folders that share one ``out``, and the attached files."""

    variables: Mapping[str, Variable]
    ties: frozenset[frozenset[str]]
    files: Mapping[str, bytes] = field(default_factory=dict)
    """The digest of each attached file, by name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """The content of the directory of a checkpoint; two are equal if they were saved from the same values."""

    variables: Mapping[str, Variable]
    ties: frozenset[frozenset[str]] = field(compare=False)
    """Not compared, because a file system without links gets copies."""
    files: Mapping[str, bytes]
    """The digest of each attached file that the manifest lists, as it is now."""
    is_complete: bool
    """Whether there is a marker."""
    attributes: Any
    """The attributes and the tree that the manifest lists; None if there is none, or if it is torn."""
    contradictions: frozenset[str]
    """What the manifest says otherwise than the files."""
    unknown: frozenset[str]
    """Files that do not belong to the checkpoint."""
    temporary: frozenset[str] = field(compare=False)
    """What a save in place or a seal has not removed yet."""

    @property
    def contents(self) -> Contents:
        return Contents(variables=self.variables, ties=self.ties, files=self.files)

    @property
    def is_whole(self) -> bool:
        """Whether it is complete, its manifest agrees with the files, and there is nothing else."""
        return self.is_complete and not self.contradictions and not self.unknown

    def __str__(self) -> str:
        marker = "complete" if self.is_complete else "no marker"
        variables = [f"{folder} {shape}" for folder, (shape, *_) in self.variables.items()]
        return "; ".join([marker, *variables, *sorted(self.contradictions), *sorted(self.unknown)])


@dataclass(frozen=True, kw_only=True, slots=True)
class Seen:
    """What lies in a directory: visible checkpoints and files by path, and the paths of leftovers."""

    units: Mapping[str, Checkpoint | str]
    """A file is a text with its size and digest; so is what a folder is that is empty, or not a checkpoint."""
    leftovers: frozenset[str] = field(compare=False)

    def __str__(self) -> str:
        return "; ".join(f"{path}: {unit}" for path, unit in self.units.items()) or "nothing"


def contents_of(arrays: Mapping[str, np.ndarray], files: Mapping[str, bytes] | None = None) -> Contents:
    """Return the content of a checkpoint of these arrays and files; an array with two names is tied."""
    folders = defaultdict(set)
    for name, array in arrays.items():
        folders[id(array)].add(name)
    return Contents(
        variables={
            name: (array.shape, _TYPES[array.dtype.name], _digest(array.tobytes())) for name, array in arrays.items()
        },
        ties=frozenset(frozenset(names) for names in folders.values() if len(names) > 1),
        files={name: _digest(content) for name, content in (files or {}).items()},
    )


def observe(directory: Path) -> Seen:
    """Return what lies in a directory and in the folders below it that are not checkpoints."""
    units: dict[str, Checkpoint | bytes | str] = {}
    leftovers = set()
    for path, kind in _walk(directory):
        name = path.relative_to(directory).as_posix()
        if kind == "leftover":
            leftovers.add(name)
        elif kind == "file":
            units[name] = path.read_bytes()
        elif kind == "empty":
            units[name] = "an empty folder"
        else:
            try:
                found = units[name] = read_checkpoint(path)
                leftovers |= {f"{name}/{file}" for file in found.temporary}
            except (OSError, ValueError) as error:
                units[name] = f"not what any save leaves: {error}"
    for name in [name for name in units if name.endswith(_SHARDS_INDEX)]:
        units[name], others = _joined(name, units)
        for other in others:
            units.pop(other)
    leftovers |= {name for name in units if _SHARD.fullmatch(name)}  # which no index lists
    units = {name: unit for name, unit in units.items() if name not in leftovers}
    described = {
        name: f"{len(unit)} bytes {_digest(unit).hex()}" if isinstance(unit, bytes) else unit
        for name, unit in units.items()
    }
    return Seen(units=described, leftovers=frozenset(leftovers))


def _joined(index: str, units: Mapping[str, Checkpoint | bytes | str]) -> tuple[bytes | str, Collection[str]]:
    """Return a set of shards as one text, which does not depend on the names of its files, and these names."""
    text = units[index]
    assert isinstance(text, bytes)
    try:
        names = [os.path.join(os.path.dirname(index), name) for name in json.loads(text)["weight_map"].values()]
    except ValueError as error:
        return f"not an index: {error}", ()
    names = list(dict.fromkeys(names))
    for number, name in enumerate(names):
        shard = units.get(name)
        if not isinstance(shard, bytes):
            return f"a set without {name}", set(names) & units.keys()
        text = text.replace(os.path.basename(name).encode(), b"shard %d" % number) + shard
    return text, names


def _walk(directory: Path) -> Iterator[tuple[Path, str]]:
    for entry in sorted(os.scandir(directory), key=lambda entry: entry.name):
        path = Path(entry.path)
        if not is_visible(entry.name):
            yield path, "leftover"
        elif not entry.is_dir(follow_symlinks=False):
            yield path, "file"
        elif not (names := set(filter(is_visible, os.listdir(path)))):
            yield path, "empty"
            yield from _walk(path)
        elif names & _INDEX or _is_bare(path):
            yield path, "checkpoint"
        else:
            yield from _walk(path)


def _is_bare(path: Path) -> bool:
    """Return whether a folder holds variables and, like all folders below it, neither a marker nor a manifest."""
    found = set()
    for _, folders, names in os.walk(path):
        folders[:] = filter(is_visible, folders)
        found.update(names)
    return "out" in found and not found & _INDEX


def is_visible(name: str) -> bool:
    """Return whether a name is not one that is only given to what is being written or removed."""
    return _STAGING.fullmatch(name) is None and _TEMPORARY.fullmatch(name) is None


def read_checkpoint(path: Path) -> Checkpoint:
    """Return the content of a checkpoint.

    Raises:
        OSError, ValueError: there is something that no save leaves: a folder without ``meta``, a truncated ``meta``.
    """
    variables: dict[str, Variable] = {}
    folders = defaultdict(set)
    values: dict[int, bytes] = {}
    contents: dict[str, bytes] = {}
    companions: set[str] = set()
    files = {os.path.join(folder, name)[len(f"{path}/") :] for folder, _, names in os.walk(path) for name in names}
    for out in sorted(file for file in files if file.endswith("/out")):
        folder = out.removesuffix("/out")
        inode = os.stat(path / out).st_ino
        if inode not in values:
            values[inode] = (path / out).read_bytes()
        is_encoded = f"{folder}/zarr.json" in files
        seen = _decoded(path / folder) if is_encoded else values[inode]
        variables[folder] = (*_parse_meta((path / folder / "meta").read_text()), _digest(seen))
        companions |= {
            f"{folder}/{name}" for name in os.listdir(path / folder) if is_encoded and _ENCODED.fullmatch(name)
        }
        contents[folder] = values[inode]
        folders[inode].add(folder)
    known = {"snapshot_done", "manifest"} | {f"{folder}/{name}" for folder in variables for name in ("meta", "out")}
    temporary = frozenset(name for name in files if not is_visible(name))
    attributes, contradictions = None, frozenset[str]()
    attached: dict[str, bytes] = {}
    if "manifest" in files:
        listed = _listed_files((path / "manifest").read_bytes())
        attached = {name: (path / name).read_bytes() for name in listed if name in files}
        attributes, contradictions = _compare((path / "manifest").read_bytes(), variables, contents)
        wrong = {f"{name} differs from the manifest" for name in listed if listed[name] != _said_of(attached.get(name))}
        wrong |= {f"{name} may be written to" for name in attached if (path / name).lstat().st_mode != 0o100444}
        contradictions |= wrong
    return Checkpoint(
        variables=variables,
        ties=frozenset(frozenset(names) for names in folders.values() if len(names) > 1),
        is_complete="snapshot_done" in files and not (path / "snapshot_done").stat().st_size,
        attributes=attributes,
        contradictions=contradictions,
        files={name: _digest(content) for name, content in attached.items()},
        unknown=frozenset(files - known - companions - temporary - attached.keys()),
        temporary=temporary,
    )


def _decoded(folder: Path) -> bytes:
    """Return the values of an encoded variable as ``zarr.json`` describes them; they are float32."""
    from numcodecs import blosc  # type: ignore[import-untyped, unused-ignore]

    said = json.loads((folder / "zarr.json").read_text())
    sharding = said["codecs"][0]["configuration"]
    link = ".".join(["c", *("0" for _ in said["shape"])])
    if said["data_type"] != "float32" or os.readlink(folder / link) != "out":
        raise ValueError(f"zarr would not find the values of {folder.name}")
    shard = (folder / "out").read_bytes()
    grid = [outer // inner for outer, inner in zip(_shard_shape(said), sharding["chunk_shape"], strict=True)]
    places = np.frombuffer(shard[-16 * int(np.prod(grid)) - 4 : -4], "<u8").reshape(*grid, 2)
    values = np.empty(_shard_shape(said), "<f4")
    for at in np.ndindex(*grid):
        start, size = map(int, places[at])
        where = tuple(slice(i * n, (i + 1) * n) for i, n in zip(at, sharding["chunk_shape"], strict=True))
        chunk = np.frombuffer(blosc.decompress(shard[start : start + size]), "<f4")
        values[where] = chunk.reshape(sharding["chunk_shape"])
    return values[tuple(map(slice, said["shape"]))].tobytes()


def _shard_shape(said: Mapping[str, Any]) -> list[int]:
    shape: list[int] = said["chunk_grid"]["configuration"]["chunk_shape"]
    return shape


def _parse_meta(meta: str) -> tuple[tuple[int, ...], str]:
    whole = re.fullmatch(r"shape \{\n((?:  dim: \d+\n)*)\}\ndata_type: (\w+)\n", meta)
    if whole is None:
        raise ValueError(f"not a meta: {meta!r}")
    return tuple(map(int, re.findall(r"\d+", whole[1]))), whole[2]


def _compare(
    manifest: bytes, variables: Mapping[str, Variable], contents: Mapping[str, bytes]
) -> tuple[Any, frozenset[str]]:
    """Return the attributes and the tree, and in which entries the manifest and the folders contradict each other."""
    magic, version, zero, length, digest = _HEADER.unpack_from(manifest.ljust(_HEADER.size, b"\0"))
    body = manifest[_HEADER.size :]
    if (magic, version, zero, length, digest) != (b"varstore", 1, 0, len(body), _digest(body)):
        return None, frozenset({"the manifest is torn"})
    found = _message(body, _MANIFEST)
    listed = {}
    for data in found.get("variables", []):
        entry = _message(data, _VARIABLE)
        (name,) = entry["name"]
        listed[entry.get("folder", [name])[0].decode()] = entry
    listed_as = {entry["name"][0].decode(): folder for folder, entry in listed.items()}
    wrong = {f"{folder} is listed only" for folder in listed.keys() - variables.keys()}
    wrong |= {f"{folder} is not listed" for folder in variables.keys() - listed.keys()}
    for folder in listed.keys() & variables.keys():
        shape, data_type, _ = variables[folder]
        values = contents[folder]
        entry = listed[folder]
        blocks = [_digest(values[at : at + _BLOCK]) for at in range(0, len(values), _BLOCK)]
        said = (_extents(entry.get("shape", [])), *(entry.get(key, [0])[0] for key in ("data_type", "size")))
        if said != (shape, _NUMBERS[data_type], len(values)) or entry.get("digests", []) != blocks:
            wrong.add(f"{folder} differs from the manifest")
        if "alias_of" in entry:
            first = listed_as[entry["alias_of"][0].decode()]
            if variables.get(first) != variables[folder]:
                wrong.add(f"{folder} does not equal {first}")
    texts = {key: json.loads(found[key][0]) for key in ("attributes", "tree") if key in found}
    return texts, frozenset(wrong)


def _listed_files(manifest: bytes) -> dict[str, tuple[int, bytes] | None]:
    """Return size and digests of each attached file that a manifest lists; nothing if it is torn."""
    body = manifest[_HEADER.size :]
    if len(manifest) < _HEADER.size or _HEADER.unpack_from(manifest)[-1] != _digest(body):
        return {}
    entries = [_message(data, _FILE) for data in _message(body, _MANIFEST).get("files", [])]
    return {entry["name"][0].decode(): (entry.get("size", [0])[0], entry.get("digests", [b""])[0]) for entry in entries}


def _said_of(content: bytes | None) -> tuple[int, bytes] | None:
    """Return what a manifest says of a file with this content."""
    if content is None:
        return None
    return len(content), b"".join(_digest(content[at : at + _BLOCK]) for at in range(0, len(content), _BLOCK))


def _digest(data: bytes) -> bytes:
    return xxhash.xxh3_128_digest(data)


def _message(data: bytes, fields: Mapping[int, str]) -> dict[str, list[Any]]:
    """Return the values of each field of a protobuf message: integers, or the bytes of everything else."""
    found: dict[str, list[Any]] = {}
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        value: int | bytes
        if key & 7 == 0:
            value, at = _varint(data, at)
        elif key & 7 == 2:
            length, at = _varint(data, at)
            value, at = data[at : at + length], at + length
        else:
            raise ValueError(f"a field of wire type {key & 7}")
        if key >> 3 in fields:
            found.setdefault(fields[key >> 3], []).append(value)
    return found


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        value |= (data[at] & 127) << shift
        shift, at = shift + 7, at + 1
        if data[at - 1] < 128:
            return value, at


def _extents(shape: list[int | bytes]) -> tuple[int, ...]:
    """Return the integers of a repeated field, which may be packed."""
    extents = []
    for value in shape:
        packed, at = value, 0
        while isinstance(packed, bytes) and at < len(packed):
            value, at = _varint(packed, at)
            extents.append(value)
        if isinstance(packed, int):
            extents.append(packed)
    return tuple(extents)
