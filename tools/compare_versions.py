"""Compare the files that two versions of varstore write for the same inputs, byte for byte.

    tools/compare_versions.py PYTHON OTHER [--inputs 300] [--seed 0] [--keep FOLDER]

PYTHON and OTHER are interpreters of environments, each with one of the versions. Both run tools/save_generated.py.
Afterwards, these must be equal: the relative names, types and modes of all files and folders, which of them are hard
links of each other, their bytes, and the outcome of each call. In a manifest, the writer and the time may differ, and
therefore the digest in its header, which must be that of its body.

Exit status: 0 everything is equal; 1 something differs; 2 a version could not be run.
"""

from __future__ import annotations

import argparse
import json
import os
import stat
import struct
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

GENERATOR = Path(__file__).resolve().parent / "save_generated.py"
HEADER = struct.Struct("<8sIIQ16s")
MAGIC = b"varstore"
FIELDS = {1: "format_version", 2: "writer", 3: "time_ns", 4: "attributes", 5: "tree", 6: "variables"}
VARIABLE_FIELDS = {1: "name", 2: "folder", 3: "shape", 4: "data_type", 5: "size", 6: "encoding", 7: "attributes"}
VARIABLE_FIELDS |= {8: "digests", 9: "alias_of", 10: "meta_digest"}
MAY_DIFFER = {"writer", "time_ns"}
SHOWN = 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Node:
    """One file or folder: its kind and mode, and the names that are hard links of it; content is read when needed."""

    path: Path
    mode: str
    links: tuple[str, ...]

    @property
    def content(self) -> bytes:
        """The bytes of a file, the target of a symbolic link, nothing of a folder."""
        if self.path.is_symlink():
            return os.fsencode(os.readlink(self.path))
        return self.path.read_bytes() if self.path.is_file() else b""


@dataclass(frozen=True, kw_only=True, slots=True)
class Made:
    """What one version made: for each input, the outcomes of its calls and the nodes by name."""

    version: str
    package: str
    outcomes: dict[str, list[str]]
    trees: dict[str, dict[str, Node]]


def make(python: str, folder: Path, inputs: int, seed: int) -> Made:
    """Run the generator in an environment and read what it made."""
    command = [python, os.fspath(GENERATOR), os.fspath(folder), str(inputs), str(seed)]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONHASHSEED": "0"})
    said = json.loads((folder / "outcomes.json").read_text())
    trees = {name: read_tree(folder / name) for name in said["outcomes"]}
    return Made(version=said["version"], package=said["from"], outcomes=said["outcomes"], trees=trees)


def read_tree(root: Path) -> dict[str, Node]:
    """Return every file and folder below a root by its relative name."""
    found = {os.fspath(path.relative_to(root)): path for path in root.rglob("*")}
    inodes: dict[int, list[str]] = defaultdict(list)
    for name, path in found.items():
        if not path.is_dir():
            inodes[path.lstat().st_ino].append(name)
    nodes = {}
    for name, path in found.items():
        status = path.lstat()
        links = tuple(sorted(inodes[status.st_ino])) if not stat.S_ISDIR(status.st_mode) else ()
        nodes[name] = Node(path=path, mode=stat.filemode(status.st_mode), links=links)
    return nodes


# --- comparing ---------------------------------------------------------------------------------------------------


def compare(first: Made, second: Made) -> Iterator[str]:
    """Yield a line for each difference."""
    for name, outcomes in first.outcomes.items():
        for index, (before, after) in enumerate(_paired(outcomes, second.outcomes[name])):
            if before != after:
                yield f"{name}: outcome {index}: {before} | {after}"
        before_tree, after_tree = first.trees[name], second.trees[name]
        for path in sorted({*before_tree, *after_tree}):
            for line in _compare_nodes(path, before_tree.get(path), after_tree.get(path)):
                yield f"{name}/{line}"


def _paired(first: list[str], second: list[str]) -> Iterator[tuple[str, str]]:
    for index in range(max(len(first), len(second))):
        yield (first[index] if index < len(first) else "absent"), (second[index] if index < len(second) else "absent")


def _compare_nodes(path: str, first: Node | None, second: Node | None) -> Iterator[str]:
    if first is None or second is None:
        yield f"{path}: {'absent' if first is None else 'there'} | {'absent' if second is None else 'there'}"
        return
    if first.mode != second.mode:
        yield f"{path}: mode {first.mode} | {second.mode}"
    if first.links != second.links:
        yield f"{path}: links {first.links} | {second.links}"
    before, after = first.content, second.content
    if before == after:
        return
    if not (before.startswith(MAGIC) and after.startswith(MAGIC)):
        yield f"{path}: {_first_difference(before, after)}"
        return
    for line in _compare_manifests(before, after):
        yield f"{path}: {line}"


def _compare_manifests(first: bytes, second: bytes) -> Iterator[str]:
    if first[:16] != second[:16]:
        yield f"header {first[:16].hex()} | {second[:16].hex()}"
    for data in (first, second):
        *_, length, digest = HEADER.unpack_from(data)
        if length != len(data) - HEADER.size or digest != xxhash.xxh3_128_digest(data[HEADER.size :]):
            yield "the header has another length or digest than its body"
    before, after = (_named_fields(data[HEADER.size :]) for data in (first, second))
    for index, ((name, value), (other_name, other_value)) in enumerate(zip(before, after, strict=False)):
        if name != other_name:
            yield f"field {index}: {name} | {other_name}"
            return
        if value != other_value and name not in MAY_DIFFER:
            yield f"field {index}, {name}: {_shown(name, value)} | {_shown(name, other_value)}"
    if len(before) != len(after):
        yield f"{len(before)} fields | {len(after)}"


def _named_fields(body: bytes) -> list[tuple[str, Any]]:
    return [(FIELDS.get(number, f"field number {number}"), value) for number, value in fields(body)]


def _shown(name: str, value: Any) -> str:
    if name != "variables":
        return f"{value!r:.200}"
    return str({VARIABLE_FIELDS.get(number, number): part for number, part in fields(value)})


def fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yield number and value of each field of a protobuf message, in order, without its schema.

    Raises:
        ValueError: not a message of varints and of what has a length, which is all that a manifest is made of.
    """
    position = 0
    while position < len(message):
        key, position = _varint(message, position)
        value, position = _varint(message, position)
        if key & 7 == 0:
            yield key >> 3, value
        elif key & 7 == 2 and position + value <= len(message):
            yield key >> 3, message[position : position + value]
            position += value
        else:
            raise ValueError(f"a field of wire type {key & 7} at byte {position}")


def _varint(message: bytes, position: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = message[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise ValueError(f"a varint that does not end at byte {position}")


def _first_difference(first: bytes, second: bytes) -> str:
    if len(first) != len(second):
        return f"{len(first)} bytes | {len(second)}"
    at = next(index for index, (before, after) in enumerate(zip(first, second, strict=True)) if before != after)
    return f"from byte {at}: {first[at : at + 16].hex()} | {second[at : at + 16].hex()}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("python", help="the interpreter of one environment")
    parser.add_argument("other", help="the interpreter of the other")
    parser.add_argument("--inputs", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", metavar="FOLDER", type=Path, help="where to make the files, and leave them")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(asked.keep or temporary).resolve()
        made = []
        for name, python in (("first", asked.python), ("second", asked.other)):
            (folder / name).mkdir(parents=True)
            try:
                made.append(make(python, folder / name, asked.inputs, asked.seed))
            except (OSError, subprocess.CalledProcessError) as error:
                print(f"{python}: {error}", file=sys.stderr)
                return 2
        differences = list(compare(*made))
    for line in differences[:SHOWN]:
        print(line.encode("unicode_escape").decode())
    if len(differences) > SHOWN:
        print(f"and {len(differences) - SHOWN} more")
    print(_summary(made, differences))
    return 1 if differences else 0


def _summary(made: list[Made], differences: list[str]) -> str:
    nodes = [node for tree in made[0].trees.values() for node in tree.values()]
    linked = sum(len(node.links) > 1 for node in nodes)
    refused = sum(
        outcome.isidentifier() and outcome != "done" for calls in made[0].outcomes.values() for outcome in calls
    )
    versions = " and ".join(f"{one.version} in {one.package}" for one in made)
    inputs = (
        f"{len(made[0].trees)} inputs, {len(nodes)} files and folders, {linked} of them hard links, {refused} errors"
    )
    return f"{versions}: {inputs}: {f'{len(differences)} differences' if differences else 'all the same'}"


if __name__ == "__main__":
    raise SystemExit(main())
