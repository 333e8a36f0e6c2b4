"""Detect the format of a file or folder by its content: bytes at both ends of a file, the names in a folder.

These functions only decide which format a file has. Whether it is valid is checked by the reader of the format. What
they need of readers they import when they are asked, because the readers of all formats take longer to import than a
large file takes to open.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
from dataclasses import dataclass

from varstore.errors import CheckpointNotFound, FormatError
from varstore.formats.binary import magic
from varstore.formats.binary.slices import stream_of
from varstore.formats.binary.source import Held, Source
from varstore.formats.binary.wire import BYTES, VARINT, Wire
from varstore.formats.binary.zip import archive_members, is_zip
from varstore.layout.mlir import PROGRAM
from varstore.layout.names import MANIFEST, MARKER
from varstore.storage.failures import translated
from varstore.storage.looking import kind_of

__all__ = [
    "Probe",
    "is_huggingface",
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
_ONE_TENSOR = re.compile(
    rb"\x80.(?:\x95.{8})?(?:c(?:builtins|__builtin__)\ntuple\n|\x8c.(?:builtins|__builtin__)\x94\x8c\x05tuple\x94\x93)",
    re.DOTALL,
)
"""A pickle whose value is what the call of `tuple` returns: how Paddle pickles a tensor that is not in a container."""
_LOOKED_AT = 8
"""Files of a folder that are looked at, to tell whether all of them are raw variables."""
_TORCH_MEMBERS = {"data.pkl", "archive_format", "serialized_exported_program.json"}
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
    damage: FormatError | None = None
    """Why the members of a zip archive cannot be listed."""
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
        members, damage = _members(source) if is_zip(source) else ((), None)
        return cls(
            path=path,
            head=head,
            tail=source.bytes(source.size - shown, shown),
            members=members,
            damage=damage,
            source=source,
        )

    @property
    def is_empty(self) -> bool:
        """Whether it is a file without a byte, or a folder with nothing in it."""
        return not (self.head or self.entries)

    @property
    def is_pickle(self) -> bool:
        """Whether the file starts like a pickle of protocol 2 or later."""
        return self.head[:1] == b"\x80" and self.head[1:2] in (b"\2", b"\3", b"\4", b"\5")

    def says(self, *marks: bytes) -> bool:
        """Whether one of these is near the start or the end of the file."""
        return any(mark in self.head or mark in self.tail for mark in marks)

    def refuse_stranger(self, *, unknown: bool = True) -> None:
        """Raise FormatError if this is known not to be a checkpoint; see `varstore.formats.strangers`."""
        from varstore.formats.strangers import refuse_strange_file, refuse_strange_folder

        if self.is_folder:
            refuse_strange_folder(self.path, self.entries)
        elif self.source is not None:
            refuse_strange_file(self.path, self.head, self.tail, self.source.size, self.members, unknown=unknown)

    def ends(self, *suffixes: str) -> bool:
        """Whether the path has one of these suffixes."""
        return self.path.lower().endswith(suffixes)


def is_native(probe: Probe) -> bool:
    """Detect a folder with a marker or a manifest, a variable's ``meta``, or steps; not what `flow.save` wrote."""
    if _is_oneflows(probe):
        return False
    return MARKER in probe.entries or MANIFEST in probe.entries or _has_variable(probe) or _has_step(probe)


def _is_oneflows(probe: Probe) -> bool:
    """Detect a folder that `flow.save` wrote; a graph that lies beside a manifest is an attached file."""
    return "pickled_data" in probe.entries or (PROGRAM in probe.entries and MANIFEST not in probe.entries)


def is_huggingface(probe: Probe) -> bool:
    """Detect a folder with weights in files, which is not one of several files of a run."""
    from varstore.formats.huggingface import holds_weights
    from varstore.formats.strangers import is_training_state

    return probe.is_folder and holds_weights(probe.entries) and not is_training_state(probe.entries)


def is_safetensors(probe: Probe) -> bool:
    """Detect a length followed by ``{``, or an index file."""
    if probe.source is None or probe.ends(".safetensors.index.json"):
        return probe.source is not None and probe.head.lstrip()[:1] == b"{"
    return probe.head[8:9] == b"{" and int.from_bytes(probe.head[:8], "little") <= probe.source.size - 8


def is_torch(probe: Probe) -> bool:
    """Detect a zip archive of torch, the number of the older format, tensors in a pickle, a tar or ``.metadata``."""
    if probe.is_folder:
        return ".metadata" in probe.entries
    if any(name.rpartition("/")[2] in _TORCH_MEMBERS for name in probe.members):
        return True
    is_pickle = probe.is_pickle and magic.LOAD_FROM_BYTES in probe.head
    return is_pickle or magic.TORCH_LEGACY_PICKLED in probe.head[:16] or magic.is_tar(probe.head)


def is_numpy(probe: Probe) -> bool:
    """Detect the magic number of npy, or a zip archive with npy files."""
    return probe.head.startswith(magic.NPY) or any(name.endswith(".npy") for name in probe.members)


def is_oneflow(probe: Probe) -> bool:
    """Detect a folder with ``pickled_data`` or a compiled graph, or a pickle that starts with a protocol version."""
    if probe.is_folder:
        return _is_oneflows(probe)
    return probe.is_pickle and b"protocol_version" in probe.head[:64]


def is_paddle(probe: Probe) -> bool:
    """Detect a pickle of Paddle or of one tensor, a program, raw variables, or a folder of these."""
    if probe.is_folder:
        return _is_of_variables(probe)
    if probe.is_pickle:
        is_named = probe.ends(".pdparams", ".pdopt", ".pdckpt")
        return is_named or probe.says(*_PADDLE_MARKS) or _ONE_TENSOR.match(probe.head) is not None
    if probe.ends(".pdmodel") or (probe.ends(".json") and b'"magic":"pir"' in probe.head.replace(b" ", b"")):
        return True
    return _is_of_raw_variables(probe.head)


def is_megengine(probe: Probe) -> bool:
    """Detect a pickle with MegEngine's classes or suffix, or a dumped graph."""
    if magic.is_megengine_graph(probe.head):
        return True
    return probe.is_pickle and (probe.says(b"megengine.") or probe.ends(".mge"))


def is_mindspore(probe: Probe) -> bool:
    """Detect an encrypted block, or a Checkpoint message that starts with a Value of a tag and a tensor."""
    from varstore.formats.mindspore.cipher import is_encrypted
    from varstore.formats.mindspore.program import is_program

    if probe.source is None:
        return False
    if is_encrypted(probe.source) or is_program(probe.head):
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
    """Detect a folder with Orbax's metadata of a checkpoint or step, or with a folder of a step."""
    from varstore.formats.zarr.orbax import METADATA, STEP_METADATA

    if not probe.entries.isdisjoint({METADATA, STEP_METADATA}):
        return True
    names = sorted(name for name in probe.entries if name[-1:].isdigit())[:_MOST_FIELDS]
    return any(kind_of(os.path.join(probe.path, name, STEP_METADATA)) == stat.S_IFREG for name in names)


def is_zarr(probe: Probe) -> bool:
    """Detect a folder with zarr's metadata, or a zip archive of one."""
    roots = probe.entries or {name.rpartition("/")[2] for name in probe.members}
    return not roots.isdisjoint({"zarr.json", ".zgroup", ".zarray"})


def _names_in(path: str) -> frozenset[str]:
    """Return the names in a folder; they are listed again if another folder took its place meanwhile."""
    for _ in range(_ATTEMPTS):
        with contextlib.suppress(FileNotFoundError):
            before = os.stat(path)
            names = frozenset(os.listdir(path))
            if os.path.samestat(before, os.stat(path)):
                return names
    return frozenset(os.listdir(path))


def _is_of_raw_variables(head: bytes) -> bool:
    """Tell whether a file begins like Paddle's raw variables: zeros, then the size of a description."""
    return len(head) > 20 and not any(head[:16]) and any(head[16:20])


def _is_of_variables(probe: Probe) -> bool:
    from varstore.formats.paddle.program import is_beside_variables

    names = [name for name in sorted(probe.entries) if not is_beside_variables(name)][:_LOOKED_AT]
    places = [os.path.join(probe.path, name) for name in names]
    return bool(names) and all(
        kind_of(place) == stat.S_IFREG and _is_of_raw_variables(_head_of(place)) for place in places
    )


def _head_of(path: str) -> bytes:
    source = Source(path)
    return source.bytes(0, min(64, source.size))


def _has_variable(probe: Probe) -> bool:
    folders = (os.path.join(probe.path, name) for name in sorted(probe.entries)[:_MOST_FIELDS])
    return any(kind_of(os.path.join(folder, "meta")) == stat.S_IFREG for folder in folders)


def _has_step(probe: Probe) -> bool:
    names = sorted(name for name in probe.entries if name[-1:].isdigit())[:_MOST_FIELDS]
    return any(kind_of(os.path.join(probe.path, name, MARKER)) == stat.S_IFREG for name in names)


def _members(source: Source) -> tuple[tuple[str, ...], FormatError | None]:
    try:
        return tuple(archive_members(source, are_paths=False)), None
    except FormatError as error:  # the reader of the format says it, if the suffix tells the format
        return (), error
