"""Detect the format of a file or folder by its content: bytes at both ends of a file, the names in a folder.

These functions only decide which format a file has. Whether it is valid is checked by the reader of the format.
"""

from __future__ import annotations

import contextlib
import os
import stat
from dataclasses import dataclass

from varstore.errors import CheckpointNotFound, FormatError
from varstore.formats.binary import magic
from varstore.formats.binary.slices import stream_of
from varstore.formats.binary.source import Held, Source
from varstore.formats.binary.wire import BYTES, VARINT, Wire
from varstore.formats.binary.zip import archive_members, is_zip
from varstore.formats.mindspore.cipher import is_encrypted
from varstore.layout.names import MANIFEST, MARKER
from varstore.storage.failures import translated
from varstore.storage.looking import kind_of

__all__ = [
    "Probe",
    "is_megengine",
    "is_mindspore",
    "is_native",
    "is_numpy",
    "is_oneflow",
    "is_onnx",
    "is_orbax",
    "is_paddle",
    "is_safetensors",
    "is_torch",
    "is_zarr",
]

_SHOWN = 1 << 16
_PADDLE_MARKS = (b"StructuredToParameterName@@", b"UnpackBigParamInfor@@")
_ONNX_FIELDS = {*range(1, 9), 14, 20, 25, 26}
_MOST_FIELDS = 1000
_ATTEMPTS = 100


@dataclass(frozen=True, kw_only=True, slots=True)
class Probe:
    """What the decision is based on: the names in a folder, or both ends of a file and the members of a zip archive."""

    path: str
    is_folder: bool = False
    entries: frozenset[str] = frozenset()
    head: bytes = b""
    tail: bytes = b""
    members: tuple[str, ...] = ()
    source: Source | None = None

    @classmethod
    def of(cls, path: str) -> Probe:
        """Examine a path.

        Raises:
            CheckpointNotFound: there is nothing at the path.
            StorageError: it cannot be read.
        """
        kind = stat.S_IFREG if isinstance(path, Held) else kind_of(path)
        if kind == stat.S_IFDIR:
            with translated(path, "reading failed"):
                return cls(path=path, is_folder=True, entries=_names_in(path))
        if not kind:
            raise CheckpointNotFound("there is nothing at this path", path=path)
        source = Source(path)
        shown = min(_SHOWN, source.size)
        head = source.bytes(0, shown)
        return cls(
            path=path,
            head=head,
            tail=source.bytes(source.size - shown, shown),
            members=_members(source) if is_zip(source) else (),
            source=source,
        )

    @property
    def is_pickle(self) -> bool:
        """Whether the file starts like a pickle of protocol 2 or later."""
        return self.head[:1] == b"\x80" and self.head[1:2] in (b"\2", b"\3", b"\4", b"\5")

    def says(self, *marks: bytes) -> bool:
        """Whether one of these is near the start or the end of the file."""
        return any(mark in self.head or mark in self.tail for mark in marks)

    def ends(self, *suffixes: str) -> bool:
        """Whether the path has one of these suffixes."""
        return self.path.lower().endswith(suffixes)


def is_native(probe: Probe) -> bool:
    """Detect a folder with a marker or a manifest, or with a variable's ``meta``, unless it is that of an nn.Graph."""
    if "pickled_data" in probe.entries or "model.mlir" in probe.entries:
        return False
    return MARKER in probe.entries or MANIFEST in probe.entries or _has_variable(probe)


def is_safetensors(probe: Probe) -> bool:
    """Detect a length followed by ``{``, an index file, or a folder with one index file."""
    if probe.is_folder:
        return sum(name.endswith(".safetensors.index.json") for name in probe.entries) == 1
    if probe.source is None or probe.ends(".safetensors.index.json"):
        return probe.source is not None and probe.head.lstrip()[:1] == b"{"
    return probe.head[8:9] == b"{" and int.from_bytes(probe.head[:8], "little") <= probe.source.size - 8


def is_torch(probe: Probe) -> bool:
    """Detect a zip archive with ``data.pkl``, the number of the older format, a tar archive, or ``.metadata``."""
    if probe.is_folder:
        return ".metadata" in probe.entries
    zipped = any(name == "data.pkl" or name.endswith("/data.pkl") for name in probe.members)
    return zipped or magic.TORCH_LEGACY_PICKLED in probe.head[:16] or magic.is_tar(probe.head)


def is_numpy(probe: Probe) -> bool:
    """Detect the magic number of npy, or a zip archive with npy files."""
    return probe.head.startswith(magic.NPY) or any(name.endswith(".npy") for name in probe.members)


def is_oneflow(probe: Probe) -> bool:
    """Detect a folder with ``pickled_data`` or a compiled graph, or a pickle that starts with a protocol version."""
    if probe.is_folder:
        return "pickled_data" in probe.entries or "model.mlir" in probe.entries
    return probe.is_pickle and b"protocol_version" in probe.head[:64]


def is_paddle(probe: Probe) -> bool:
    """Detect a pickle with Paddle's keys or suffix, a program, or raw variables: zeros, then a description's size."""
    if probe.is_pickle:
        return probe.says(*_PADDLE_MARKS) or probe.ends(".pdparams", ".pdopt", ".pdckpt")
    if probe.ends(".pdmodel") or (probe.ends(".json") and b'"magic":"pir"' in probe.head.replace(b" ", b"")):
        return True
    return len(probe.head) > 20 and not any(probe.head[:16]) and any(probe.head[16:20])


def is_megengine(probe: Probe) -> bool:
    """Detect a pickle with MegEngine's classes or suffix, or a dumped graph, which the reader refuses."""
    if magic.is_megengine_graph(probe.head):
        return True
    return probe.is_pickle and (probe.says(b"megengine.") or probe.ends(".mge"))


def is_mindspore(probe: Probe) -> bool:
    """Detect an encrypted block, or a Checkpoint message that starts with a Value of a tag and a tensor."""
    if probe.source is None:
        return False
    if is_encrypted(probe.source):
        return True
    if probe.head[:1] != b"\x0a":
        return False
    with stream_of(probe.source) as stream:
        wire = Wire(stream, probe.path)
        try:
            first = next(wire.fields((0, probe.source.size), "Checkpoint"))
            inner = wire.fields(first.span, "Value")
            tag, value = next(inner), next(inner)
        except (FormatError, StopIteration):
            return False
    return (tag.number, tag.kind) == (1, BYTES) and value.number in (2, 3) and value.kind == BYTES


def is_onnx(probe: Probe) -> bool:
    """Detect a message that has only fields of a ModelProto, a version and a graph among them."""
    if probe.source is None or not probe.head:
        return False
    found = set()
    with stream_of(probe.source) as stream:
        try:
            for number, field in enumerate(Wire(stream, probe.path).fields((0, probe.source.size), "ModelProto")):
                if field.number not in _ONNX_FIELDS or number > _MOST_FIELDS:
                    return False
                found.add((field.number, field.kind))
        except FormatError:
            return False
    return {(1, VARINT), (7, BYTES)} <= found


def is_orbax(probe: Probe) -> bool:
    """Detect a folder with ``_METADATA``."""
    return "_METADATA" in probe.entries


def is_zarr(probe: Probe) -> bool:
    """Detect a folder with zarr's metadata."""
    return not probe.entries.isdisjoint({"zarr.json", ".zgroup", ".zarray"})


def _names_in(path: str) -> frozenset[str]:
    """Return the names in a folder; they are listed again if another folder took its place meanwhile."""
    for _ in range(_ATTEMPTS):
        with contextlib.suppress(FileNotFoundError):
            before = os.stat(path)
            names = frozenset(os.listdir(path))
            if os.path.samestat(before, os.stat(path)):
                return names
    return frozenset(os.listdir(path))


def _has_variable(probe: Probe) -> bool:
    folders = (os.path.join(probe.path, name) for name in sorted(probe.entries)[:_MOST_FIELDS])
    return any(kind_of(os.path.join(folder, "meta")) == stat.S_IFREG for folder in folders)


def _members(source: Source) -> tuple[str, ...]:
    try:
        return tuple(archive_members(source))
    except FormatError:  # the reader of the format says what is wrong with it
        return ()
