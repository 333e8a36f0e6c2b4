"""Read a checkpoint without varstore, so that a fault in its readers cannot hide one in its writers.

This knows the layout (a folder per variable with ``meta`` and ``out``, the marker, the header of the manifest), but
only the data types of the scenarios.
"""

from __future__ import annotations

import os
import re
import struct
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import xxhash

__all__ = ["Contents", "Found", "Variable", "contents_of", "read"]

_TYPES = {"float32": "kFloat", "int64": "kInt64"}
_HEADER = struct.Struct("<8sIIQ16s")  # magic, version, zero, length of the body, its xxh3-128
_TEMPORARY = re.compile(r"\.manifest\.[0-9a-f]{8}")

Variable = tuple[tuple[int, ...], str, bytes]
"""Shape, data type and values."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Contents:
    """The variables of a checkpoint by folder, and the sets of folders that share one ``out``."""

    variables: Mapping[str, Variable]
    ties: frozenset[frozenset[str]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """The content of the directory of a checkpoint."""

    contents: Contents
    is_complete: bool
    manifest: bytes
    unknown: frozenset[str]
    """Files that do not belong to the checkpoint."""
    temporary: frozenset[str] = field(compare=False)
    """Manifests that were being written."""

    @property
    def is_whole(self) -> bool:
        """Whether there is a marker and an intact manifest, and nothing else."""
        return self.is_complete and _is_manifest(self.manifest) and not self.unknown

    def __str__(self) -> str:
        manifest = "manifest" if _is_manifest(self.manifest) else "torn manifest" if self.manifest else "no manifest"
        variables = [f"{folder} {shape}" for folder, (shape, *_) in self.contents.variables.items()]
        return "; ".join(["complete" if self.is_complete else "no marker", manifest, *variables, *sorted(self.unknown)])


def contents_of(arrays: Mapping[str, np.ndarray]) -> Contents:
    """Return the content of a checkpoint of these arrays; an array with two names is tied."""
    folders = defaultdict(set)
    for name, array in arrays.items():
        folders[id(array)].add(name)
    return Contents(
        variables={name: (array.shape, _TYPES[array.dtype.name], array.tobytes()) for name, array in arrays.items()},
        ties=frozenset(frozenset(names) for names in folders.values() if len(names) > 1),
    )


def read(path: Path) -> Found | None:
    """Return the content of a checkpoint, or None if there is nothing at the path.

    Raises:
        OSError, ValueError: there is something that no save leaves: a folder without ``meta``, a truncated ``meta``.
    """
    if not path.exists():
        return None
    variables: dict[str, Variable] = {}
    folders = defaultdict(set)
    values: dict[int, bytes] = {}
    files = {file.relative_to(path).as_posix() for file in path.rglob("*") if not file.is_dir()}
    for out in sorted(file for file in files if file.endswith("/out")):
        folder = out.removesuffix("/out")
        inode = os.stat(path / out).st_ino
        if inode not in values:
            values[inode] = (path / out).read_bytes()
        variables[folder] = (*_parse((path / folder / "meta").read_text()), values[inode])
        folders[inode].add(folder)
    known = {"snapshot_done", "manifest"} | {f"{folder}/{name}" for folder in variables for name in ("meta", "out")}
    temporary = frozenset(filter(_TEMPORARY.fullmatch, files))
    return Found(
        contents=Contents(
            variables=variables, ties=frozenset(frozenset(names) for names in folders.values() if len(names) > 1)
        ),
        is_complete="snapshot_done" in files and not (path / "snapshot_done").stat().st_size,
        manifest=(path / "manifest").read_bytes() if "manifest" in files else b"",
        unknown=frozenset(files - known - temporary),
        temporary=temporary,
    )


def _parse(meta: str) -> tuple[tuple[int, ...], str]:
    whole = re.fullmatch(r"shape \{\n((?:  dim: \d+\n)*)\}\ndata_type: (\w+)\n", meta)
    if whole is None:
        raise ValueError(f"not a meta: {meta!r}")
    return tuple(map(int, re.findall(r"\d+", whole[1]))), whole[2]


def _is_manifest(data: bytes) -> bool:
    if len(data) < _HEADER.size:
        return False
    magic, _, zero, length, digest = _HEADER.unpack_from(data)
    body = data[_HEADER.size :]
    return (magic, zero, length, digest) == (b"varstore", 0, len(body), xxhash.xxh3_128_digest(body))
