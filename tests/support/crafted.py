"""Files that no program writes: manifests, pickles and archives, made byte by byte from the texts of their formats."""

from __future__ import annotations

import json
import pickletools
import struct
import zipfile
from collections.abc import Iterable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import xxhash

__all__ = ["checkpoint", "colliding_pairs", "entry", "long1", "of_python_2", "pickled", "torch_file"]


# --- checkpoints: proto/FORMAT.md, F5 ----------------------------------------------------------------------------


def checkpoint(
    path: Path, *, tree: Any = None, entries: Iterable[bytes] = (), folders: Mapping[str, bytes] = {}
) -> Path:
    """Write a complete checkpoint whose manifest says this, with folders of int8 values; `tree` may be JSON itself."""
    path.mkdir()
    text = "" if tree is None else tree if isinstance(tree, str) else json.dumps(tree, separators=(",", ":"))
    body = b"\x08\x01" + _field(5, text.encode()) + b"".join(_field(6, one) for one in entries)
    header = struct.pack("<8sIIQ", b"varstore", 1, 0, len(body)) + xxhash.xxh3_128_digest(body)
    (path / "manifest").write_bytes(header + body)
    for name, values in folders.items():
        (path / name).mkdir(parents=True)
        (path / name / "out").write_bytes(values)
        (path / name / "meta").write_text(f"shape {{\n  dim: {len(values)}\n}}\ndata_type: kInt8\n")
    (path / "snapshot_done").touch()
    return path


def entry(
    name: str, *, folder: str = "", size: int = 1, digests: bytes = b"", alias_of: str = "", attributes: str = ""
) -> bytes:
    """Return the record of an int8 variable of one dimension."""
    return (
        _field(1, name.encode())
        + (_field(2, folder.encode()) if folder else b"")
        + (b"\x1a" + _with_length(_varint(size)))
        + b"\x20\x04\x28"
        + _varint(size)
        + (_field(7, attributes.encode()) if attributes else b"")
        + (_field(8, digests) if digests else b"")
        + (_field(9, alias_of.encode()) if alias_of else b"")
    )


def _field(number: int, data: bytes) -> bytes:
    return _varint(number << 3 | 2) + _with_length(data)


def _with_length(data: bytes) -> bytes:
    return _varint(len(data)) + data


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


# --- pickles -----------------------------------------------------------------------------------------------------


def pickled(path: Path, code: bytes) -> Path:
    """Write a pickle of protocol 4 that has these opcodes."""
    path.write_bytes(b"\x80\x04" + code + b".")
    return path


def torch_file(path: Path, code: bytes, *, storage: bytes = b"", deflate: str = "") -> Path:
    """Write an archive as ``torch.save`` does, of a pickle and one storage; the member `deflate` is deflated."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in (("data.pkl", b"\x80\x02" + code + b"."), ("data/0", storage)):
            method = zipfile.ZIP_DEFLATED if name == deflate else zipfile.ZIP_STORED
            archive.writestr(f"a/{name}", content, method, 9)
    return path


def of_python_2(data: bytes, encoding: str = "latin-1") -> bytes:
    """Return a pickle of protocol 2, or several in a row and what follows them, with text as a str of Python 2."""
    done, at = b"", 0
    while data[at : at + 2] == b"\x80\2":
        operations = [*pickletools.genops(data[at:])]
        for (operation, text, start), (_, _, stop) in pairwise(operations):
            if operation.name == "BINUNICODE":
                raw = text.encode(encoding)
                done += b"U" + bytes([len(raw)]) + raw if len(raw) < 256 else b"T" + struct.pack("<i", len(raw)) + raw
            else:
                done += data[at + start : at + stop]
        done += b"."
        at += operations[-1][2] + 1
    return done + data[at:]


def long1(number: int) -> bytes:
    """Return the opcode of an integer of 64 bits."""
    return b"\x8a\x08" + number.to_bytes(8, "little", signed=True)


def colliding_pairs(count: int) -> list[tuple[int, int]]:
    """Return pairs of integers whose tuples have one hash: CPython's, of xxHash's rounds, can be run backwards."""
    prime1, prime2, prime5, full = 11400714785074694791, 14029467366897019727, 2870177450012600261, (1 << 64) - 1
    inverse, target = pow(prime2, -1, 1 << 64), 0x123456789ABCDEF
    pairs: list[tuple[int, int]] = []
    first = 0
    while len(pairs) < count:
        first += 1
        lane = prime5 + first * prime2 & full
        lane = (lane << 31 | lane >> 33) & full
        second = (target - lane * prime1) * inverse & full
        if second < 1 << 60:
            pairs.append((first, second))
    assert len({hash(pair) for pair in pairs}) == 1
    return pairs
