"""Tell the formats apart by what lies on the disk: a few bytes at both ends of a file, the names in a folder.

A recogniser only decides whose file it is; whether it is a good one its reader finds out.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from varstore.errors import CheckpointNotFound, FormatError
from varstore.formats.binary import magic
from varstore.formats.binary.slices import stream_of
from varstore.formats.binary.source import Source
from varstore.formats.binary.wire import BYTES, VARINT, Wire
from varstore.formats.binary.zip import archive_members, is_zip
from varstore.formats.mindspore.cipher import is_encrypted
from varstore.layout.names import MANIFEST, MARKER
from varstore.storage.failures import translated

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


@dataclass(frozen=True, kw_only=True, slots=True)
class Probe:
    """What there is to look at: a folder's names, or both ends of a file and, for a zip archive, its members."""

    path: str
    is_folder: bool = False
    entries: frozenset[str] = frozenset()
    head: bytes = b""
    tail: bytes = b""
    members: tuple[str, ...] = ()
    source: Source | None = None

    @classmethod
    def of(cls, path: str) -> Probe:
        """Look at a path.

        Raises:
            CheckpointNotFound: nothing lies there.
            StorageError: it cannot be read.
        """
        with translated(path, "reading failed"):
            if os.path.isdir(path):
                return cls(path=path, is_folder=True, entries=frozenset(os.listdir(path)))
        if not os.path.lexists(path):
            raise CheckpointNotFound("there is nothing here", path=path)
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
        """Whether it begins as a pickle of protocol 2 or later does, or as torch's oldest files."""
        return self.head[:1] == b"\x80" and self.head[1:2] in (b"\2", b"\3", b"\4", b"\5")

    def says(self, *marks: bytes) -> bool:
        """Whether one of these stands near the beginning or the end."""
        return any(mark in self.head or mark in self.tail for mark in marks)

    def ends(self, *suffixes: str) -> bool:
        """Whether the name has one of these suffixes."""
        return self.path.lower().endswith(suffixes)


def is_native(probe: Probe) -> bool:
    """A marker or a manifest, or at least a folder with ``meta`` and ``out`` that is no nn.Graph's."""
    if "pickled_data" in probe.entries or "model.mlir" in probe.entries:
        return False
    return MARKER in probe.entries or MANIFEST in probe.entries or _has_variable(probe)


def is_safetensors(probe: Probe) -> bool:
    """A length and ``{``, or an index; a folder with one index."""
    if probe.is_folder:
        return sum(name.endswith(".safetensors.index.json") for name in probe.entries) == 1
    if probe.source is None or probe.ends(".safetensors.index.json"):
        return probe.source is not None and probe.head.lstrip()[:1] == b"{"
    return probe.head[8:9] == b"{" and int.from_bytes(probe.head[:8], "little") <= probe.source.size - 8


def is_torch(probe: Probe) -> bool:
    """A zip archive around ``data.pkl``, the old format's number, a tar archive; a folder with ``.metadata``."""
    if probe.is_folder:
        return ".metadata" in probe.entries
    zipped = any(name == "data.pkl" or name.endswith("/data.pkl") for name in probe.members)
    return zipped or magic.TORCH_LEGACY_PICKLED in probe.head[:16] or magic.is_tar(probe.head)


def is_numpy(probe: Probe) -> bool:
    """The npy magic, or a zip archive with such files in it."""
    return probe.head.startswith(magic.NPY) or any(name.endswith(".npy") for name in probe.members)


def is_oneflow(probe: Probe) -> bool:
    """``pickled_data`` or a compiled graph in a folder; a pickle that gives its protocol version first."""
    if probe.is_folder:
        return "pickled_data" in probe.entries or "model.mlir" in probe.entries
    return probe.is_pickle and b"protocol_version" in probe.head[:64]


def is_paddle(probe: Probe) -> bool:
    """A pickle with Paddle's own keys or suffix, or a raw stream: zeros, then a number of dimensions."""
    if probe.is_pickle:
        return probe.says(*_PADDLE_MARKS) or probe.ends(".pdparams", ".pdopt", ".pdckpt")
    return len(probe.head) > 20 and not any(probe.head[:16]) and any(probe.head[16:20])


def is_megengine(probe: Probe) -> bool:
    """A pickle with MegEngine's classes or suffix, or a dumped graph (which its reader refuses by name)."""
    if magic.is_megengine_graph(probe.head):
        return True
    return probe.is_pickle and (probe.says(b"megengine.") or probe.ends(".mge"))


def is_mindspore(probe: Probe) -> bool:
    """A Checkpoint message that begins with a Value of tag and tensor, or an encrypted block."""
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
    """A message with the fields of a model, a version and a graph among them."""
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
    """A folder with ``_METADATA``."""
    return "_METADATA" in probe.entries


def is_zarr(probe: Probe) -> bool:
    """A folder with zarr's metadata in it."""
    return not probe.entries.isdisjoint({"zarr.json", ".zgroup", ".zarray"})


def _has_variable(probe: Probe) -> bool:
    folders = (os.path.join(probe.path, name) for name in sorted(probe.entries)[:_MOST_FIELDS])
    return any(os.path.isfile(os.path.join(folder, "meta")) for folder in folders)


def _members(source: Source) -> tuple[str, ...]:
    try:
        return tuple(archive_members(source))
    except FormatError:  # whose it is, and what is wrong with it, its reader says
        return ()
