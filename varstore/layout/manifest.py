"""Encode and decode the ``manifest``: the index of a checkpoint, with its digests (FORMAT F5).

A fixed header (magic, format version, length and xxh3-128 digest of the body) precedes a protobuf body, so a
truncated or edited manifest is always detected::

    offset  bytes
         0      8  b"varstore"
         8      4  the format version, little-endian
        12      4  zero
        16      8  the length of the body, little-endian
        24     16  the xxh3-128 digest of the body
        40         the body: a varstore.Manifest message

A later version of varstore adds fields. Those with a number below 1000 change what a reader has to do, so a reader that
does not know one refuses what it is a field of: the whole checkpoint, or a single variable. Others can be skipped.
"""

from __future__ import annotations

import json
import operator
import struct
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import xxhash

from varstore.errors import InvalidName, ManifestError, MetaError, UsageError
from varstore.layout.attached import DATA, FileEntry, refused_name
from varstore.layout.digests import BLOCK, DIGEST_SIZE
from varstore.layout.dtypes import BY_NUMBER
from varstore.layout.encodings import ENCODINGS, RAW, is_plain
from varstore.layout.meta import Meta, shape_problem
from varstore.layout.names import NAME_LIMIT, Folder, is_safe_folder
from varstore.layout.pointers import FETCH, is_pointer
from varstore.layout.regions import REGIONS_LIMIT, Checksums, Region, tiling_problem
from varstore.text.hints import plural

if TYPE_CHECKING:
    from google.protobuf.internal.containers import RepeatedCompositeFieldContainer

    from varstore._gen import manifest_pb2

__all__ = [
    "BLOCK",
    "DIGEST_SIZE",
    "FORMAT_VERSION",
    "HEADER_SIZE",
    "MANIFEST_LIMIT",
    "NO_ATTRIBUTES",
    "NO_FILES",
    "UPGRADE",
    "WITHOUT_MANIFEST",
    "Entry",
    "Manifest",
    "attributes_json",
    "block_count",
    "digest_in",
    "frame",
    "kept_attributes",
    "known_meta",
    "region_digests_problem",
    "to_json",
]

FORMAT_VERSION = 1
MANIFEST_LIMIT = 4 << 30
"""The size of the largest manifest that is read, in bytes."""
SKIPPED_FROM = 1000
"""The lowest number of the fields that a reader may skip if it does not know them."""
UPGRADE = "a later version of varstore wrote it: upgrade varstore"
"""The hint of an error about an intact manifest that says more than this version knows."""
WITHOUT_MANIFEST = (
    "open with allow_incomplete=True to salvage what is whole, or restore it from a copy; to go on without the "
    "attributes and digests that it held, remove the file 'manifest' and run `varstore seal`"
)
"""The hint of an error about a manifest that is lost."""
NO_ATTRIBUTES: Mapping[str, Any] = MappingProxyType({})
NO_FILES: Mapping[str, FileEntry] = MappingProxyType({})

_HEADER = struct.Struct("<8sIIQ16s")
HEADER_SIZE = _HEADER.size
_MAGIC = b"varstore"


def block_count(nbytes: int) -> int:
    """Return the number of digests for an ``out`` of this size; an empty one has none."""
    return -(-nbytes // BLOCK)


def to_json(value: Any, *, what: str, variable: str | None = None) -> str:
    """Return a value as JSON text that parses back to an equal value, except that tuples become lists.

    NaN and infinities are written as Python's `json` writes them. Scalars of numpy, and arrays and tensors of any
    framework that have no dimensions, become plain numbers.

    Raises:
        UsageError: the value contains something that JSON cannot represent, a key that is not a string, or a lone
            surrogate; the message says where.
    """
    try:
        return json.dumps(_plain(value, what, variable), ensure_ascii=False, separators=(",", ":"))
    except (ValueError, RecursionError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"{what} must be JSON", variable=variable, found=str(error)) from error


def attributes_json(attributes: Mapping[str, Any] | None, *, variable: str | None = None) -> str:
    """Return attributes as a manifest stores them: a JSON object, or empty text if there are none.

    Raises:
        UsageError: they are not a mapping, or cannot be written as JSON.
    """
    if attributes is not None and not isinstance(attributes, Mapping):
        raise UsageError(
            "attributes must be a mapping of strings to JSON values", variable=variable, found=type(attributes).__name__
        )
    if not attributes:
        return ""
    return to_json(dict(attributes), what="attributes", variable=variable)


def kept_attributes(attributes: Mapping[str, Any] | None, *, variable: str | None = None) -> Mapping[str, Any]:
    """Return attributes as the manifest will contain them, independent of the objects of the caller.

    Raises:
        UsageError: they are not a mapping, or cannot be written as JSON.
    """
    text = attributes_json(attributes, variable=variable)
    return MappingProxyType(json.loads(text)) if text else NO_ATTRIBUTES


def _plain(value: Any, place: str, variable: str | None) -> Any:
    """Return a value with scalars of frameworks as plain numbers; `place` is where it is, for messages."""
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, str):
        return _text(value, place, variable)
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise _not_json(place, variable, f"the key {key!r}, which is not a string")
        return {_text(key, place, variable): _plain(item, f"{place}[{key!r}]", variable) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{place}[{at}]", variable) for at, item in enumerate(value)]
    try:
        number = value.item() if getattr(value, "shape", None) == () and hasattr(value, "item") else None
    except Exception as error:  # of the framework: a tracer, or a tensor without values
        raise _not_json(place, variable, f"{type(value).__name__}: {error}") from error
    if isinstance(number, bool | int | float):
        return number
    hint = "make it a list with tolist(), or save it as a variable"
    raise _not_json(place, variable, type(value).__name__, hint if hasattr(value, "tolist") else None)


def _text(value: str, place: str, variable: str | None) -> str:
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise _not_json(place, variable, f"{value!r}, with a lone surrogate at character {error.start}") from None
    return value


def _not_json(place: str, variable: str | None, found: str, hint: str | None = None) -> UsageError:
    return UsageError("must be JSON", variable=variable, field=place, found=found, hint=hint)


class Entry(NamedTuple):
    """What is known about one variable of a checkpoint; a tuple, because 10,000 of them are created in a few ms.

    `nbytes` is the size of ``out``. `digests` contains 16 bytes for each 16 MiB block of ``out``, or is empty if no
    digests are known; `content_digests` are those of the values, if ``out`` is encoded. `meta_digest` is set if
    ``meta`` is not in canonical form. `meta` is None for a folder without that file, as in OneFlow's oldest snapshots.
    `witnessed` is true for an entry from a manifest, which the folder must match. `regions`, in order of their offsets,
    take the place of `digests` for a variable that several processes wrote.
    """

    name: str
    folder: Folder
    meta: Meta | None
    nbytes: int
    digests: bytes = b""
    encoding: str = RAW.name
    attributes: Mapping[str, Any] = NO_ATTRIBUTES
    alias_of: str = ""
    meta_digest: bytes = b""
    witnessed: bool = False
    content_digests: bytes = b""
    regions: tuple[Region, ...] = ()

    @property
    def checksums(self) -> Checksums:
        """What ``out`` can be compared with; empty if nothing is known."""
        return self.digests or self.regions

    @property
    def value_checksums(self) -> Checksums:
        """What the values can be compared with, in any encoding; empty if nothing is known."""
        return self.value_digests or self.regions

    @property
    def value_digests(self) -> bytes:
        """The digest of each 16 MiB of the values, in any encoding; empty if they are not known."""
        return self.digests if is_plain(self.encoding) else self.content_digests

    @property
    def file(self) -> str:
        """The path of ``out`` relative to the checkpoint."""
        return f"{self.folder}/out"

    @property
    def form(self) -> str:
        """Shape and data type as text, for messages."""
        if self.meta is None:
            return "no meta"
        dtype = self.meta.data_type.dtype
        return f"{list(self.meta.shape)} {self.meta.data_type.name if dtype is None else dtype}"

    def __reduce__(self) -> tuple[Any, ...]:
        return _entry_of, (*self._replace(attributes=dict(self.attributes)),)


def _entry_of(*fields: Any) -> Entry:
    entry = Entry(*fields)
    return entry._replace(attributes=MappingProxyType(entry.attributes))


class Manifest(NamedTuple):
    """Everything that a checkpoint records except the values of its variables."""

    writer: str
    time_ns: int
    attributes: Mapping[str, Any]
    tree: str
    entries: Mapping[str, Entry]
    files: Mapping[str, FileEntry] = NO_FILES
    unshared: bool = False
    """Whether it was saved so that none of its files has a second name."""
    skipped: Callable[[], set[int]] = set
    """Returns the numbers of the fields of a later version that were skipped, and would not be written again."""

    def encode(self) -> bytes:
        """Return the bytes of the manifest file."""
        import varstore._gen.manifest_pb2 as manifest_pb2  # here, since it is a sixth of `import varstore`

        body = manifest_pb2.Manifest(
            format_version=FORMAT_VERSION,
            writer=self.writer,
            time_ns=self.time_ns,
            attributes=attributes_json(self.attributes),
            tree=self.tree,
            unshared=self.unshared,
        )
        for entry in self.entries.values():
            _add_entry(body.variables, entry)
        for file in self.files.values():
            body.files.add(
                name=file.name,
                size=file.nbytes,
                digests=file.digests,
                kind="" if file.kind == DATA else file.kind,
                attributes=attributes_json(file.attributes),
            )
        return frame(body.SerializeToString())

    @classmethod
    def decode(cls, data: bytes, *, path: str) -> Manifest:
        """Return the manifest in these bytes; each entry is checked when it is first accessed.

        Raises:
            ManifestError: the manifest is truncated, edited, of another version, or inconsistent.
        """
        import varstore._gen.manifest_pb2 as manifest_pb2  # in this form, Python does not look into the package

        decode_error, unknown_in = _of_protobuf()
        body = manifest_pb2.Manifest()
        try:
            body.ParseFromString(_unframe(data, path))
        except decode_error as error:
            raise ManifestError("the body is not a manifest", path=path, found=str(error)) from error
        if body.format_version != FORMAT_VERSION:
            raise ManifestError(
                "the format version of the body is not the one in its header",
                path=path,
                found=body.format_version,
                expected=FORMAT_VERSION,
            )
        fields = _LaterFields(unknown_in, body.writer, path)
        fields.check(body)
        entries = _LazyEntries(body.variables, path, fields)
        return cls(
            writer=body.writer,
            time_ns=body.time_ns,
            attributes=_from_json(body.attributes, path) if body.attributes else NO_ATTRIBUTES,
            tree=body.tree,
            entries=entries,
            files=_decode_files(body.files, entries.folders(), path, fields) if body.files else NO_FILES,
            unshared=body.unshared,
            skipped=lambda: fields.skipped(
                [body, *body.variables, *body.files, *(one for message in body.variables for one in message.regions)]
            ),
        )

    def folders(self) -> dict[str, str]:
        """Return the folders of all variables, each with the variable's encoding; nothing is checked."""
        if isinstance(self.entries, _LazyEntries):
            return self.entries.folders()
        return {entry.folder: entry.encoding for entry in self.entries.values()}


@lru_cache(maxsize=1)
def _of_protobuf() -> tuple[type[Exception], Callable[[Any], Any]]:
    """Return the error of what is not a message, and what lists the unknown fields of one."""
    from google.protobuf.message import DecodeError
    from google.protobuf.unknown_fields import UnknownFieldSet

    return DecodeError, UnknownFieldSet


class _LaterFields:
    """Finds the fields of messages that this version does not know."""

    def __init__(self, unknown_in: Callable[[Any], Any], writer: str, path: str) -> None:
        self._unknown_in = unknown_in
        self._writer = writer
        self._path = path

    def check(self, message: Any, variable: str | None = None) -> None:
        """Raise if one of them changes how a reader has to read."""
        unknown = self._unknown_in(message)
        if len(unknown):
            first = min(field.field_number for field in unknown)
            if first < SKIPPED_FROM:
                raise ManifestError(
                    "the manifest says something that this version of varstore does not know",
                    path=self._path,
                    variable=variable,
                    found=f"field {first}, written by {self._writer or 'an unknown writer'}",
                    hint=UPGRADE,
                )

    def skipped(self, messages: Iterable[Any]) -> set[int]:
        """Return the numbers of all of them."""
        return {field.field_number for message in messages for field in self._unknown_in(message)}


class _LazyEntries(Mapping[str, Entry]):
    """Entries by name, decoded when first accessed, so that opening a checkpoint handles only their names."""

    def __init__(self, messages: Sequence[manifest_pb2.Variable], path: str, fields: _LaterFields) -> None:
        self._path = path
        self._fields = fields
        self._messages = {message.name: message for message in messages}
        self._made: dict[str, Entry] = {}
        self._first_in_folder: dict[str, str] = {}
        if len(self._messages) != len(messages):
            (twice, _), *_ = Counter(message.name for message in messages).most_common(1)
            raise ManifestError("a variable is listed twice", path=path, variable=twice)
        if max(map(len, self._messages), default=0) > NAME_LIMIT // 4:  # in characters, of which each has up to 4 bytes
            _check_lengths(self._messages, path)

    def __getitem__(self, name: str) -> Entry:
        entry = self._made.get(name)
        if entry is None:
            message = self._messages[name]
            self._fields.check(message, name)
            entry = _decode_entry(message, self._path)
            if message.regions:
                entry = entry._replace(regions=self._regions(message, entry))
            if message.alias_of:
                self._check_alias(message)
            self._check_folder(entry)
            self._made[name] = entry
        return entry

    def _regions(self, message: manifest_pb2.Variable, entry: Entry) -> tuple[Region, ...]:
        if len(message.regions) > REGIONS_LIMIT:
            raise ManifestError(
                "there are too many regions",
                path=self._path,
                variable=entry.name,
                found=f"{len(message.regions):,}",
                expected=f"at most {REGIONS_LIMIT:,}",
            )
        for one in message.regions:
            self._fields.check(one, entry.name)
        regions = tuple(sorted(Region(tuple(one.offsets), tuple(one.sizes), one.digests) for one in message.regions))
        if (problem := _regions_problem(regions, entry)) is not None:
            raise ManifestError(f"the manifest contradicts itself: {problem}", path=self._path, variable=entry.name)
        return regions

    def folders(self) -> dict[str, str]:
        return {message.folder or name: message.encoding or RAW.name for name, message in self._messages.items()}

    def _check_folder(self, entry: Entry) -> None:
        """Raise if the folder is that of another variable: one accessed earlier, or the one whose name it is."""
        first = self._first_in_folder.setdefault(entry.folder, entry.name)
        own = self._messages.get(entry.folder) if entry.folder != entry.name else None
        if first != entry.name or (own is not None and not own.folder):
            raise ManifestError(
                "the manifest lists one folder for two variables",
                path=self._path,
                variable=entry.name,
                found=entry.folder,
            )

    def _check_alias(self, message: manifest_pb2.Variable) -> None:
        """Raise if a tied variable differs from the variable that it names: readers read only one of the two."""
        first = self._messages.get(message.alias_of)
        if first is None or first.alias_of or not _is_alike(first, message):
            raise ManifestError(
                f"the manifest contradicts itself: alias of {message.alias_of!r}, which does not have the same values",
                path=self._path,
                variable=message.name,
            )

    def __iter__(self) -> Any:
        return iter(self._messages)

    def __len__(self) -> int:
        return len(self._messages)

    def __contains__(self, name: object) -> bool:
        return name in self._messages


def _check_lengths(names: Iterable[str], path: str) -> None:
    for name in names:
        if len(name.encode()) > NAME_LIMIT:
            raise ManifestError(
                "a name is longer than any that can be saved",
                path=path,
                variable=name,
                found=plural(len(name.encode()), "byte"),
                expected=f"at most {NAME_LIMIT:,}",
            )


def known_meta(entry: Entry, *, path: str | None = None) -> Meta:
    """Return the shape and data type of a variable of the checkpoint at `path`.

    Raises:
        MetaError: the folder does not contain ``meta``.
    """
    if entry.meta is None:
        raise MetaError(
            "the variable has no meta, so its shape and type are not known",
            path=entry.folder if path is None else f"{path}/{entry.folder}",
            variable=entry.name,
            hint="load it with load_variables or load_into, which take them from the target",
        )
    return entry.meta


def frame(body: bytes) -> bytes:
    """Return the header followed by the body."""
    digest = xxhash.xxh3_128_digest(body)
    return _HEADER.pack(_MAGIC, FORMAT_VERSION, 0, len(body), digest) + body


def digest_in(header: bytes) -> bytes | None:
    """Return the digest in the header of a manifest, which identifies the checkpoint; None if it is truncated."""
    if len(header) < HEADER_SIZE or not header.startswith(_MAGIC):
        return None
    return header[HEADER_SIZE - DIGEST_SIZE : HEADER_SIZE]


def _unframe(data: bytes, path: str) -> bytes:
    if is_pointer(data):
        raise ManifestError("this is a pointer of Git LFS, not the manifest", path=path, hint=FETCH)
    if len(data) < _HEADER.size:
        raise ManifestError("the manifest is torn", path=path, found=plural(len(data), "byte"), hint=WITHOUT_MANIFEST)
    magic, version, zero, length, digest = _HEADER.unpack_from(data)
    if magic != _MAGIC or zero:
        raise ManifestError("not a varstore manifest", path=path, found=data[:16].hex(), hint=WITHOUT_MANIFEST)
    if version != FORMAT_VERSION:
        raise ManifestError(
            "this version of varstore cannot read the format version",
            path=path,
            field="format_version",
            found=version,
            expected=FORMAT_VERSION,
            hint=UPGRADE,
        )
    body = data[_HEADER.size :]
    if len(body) != length:
        raise ManifestError(
            "the manifest is torn",
            path=path,
            found=plural(len(body), "byte"),
            expected=plural(length, "byte"),
            hint=WITHOUT_MANIFEST,
        )
    if xxhash.xxh3_128_digest(body) != digest:
        raise ManifestError(
            "the manifest was damaged or edited: its digest does not match", path=path, hint=WITHOUT_MANIFEST
        )
    return body


def _add_entry(messages: RepeatedCompositeFieldContainer[manifest_pb2.Variable], entry: Entry) -> None:
    name, folder, _, nbytes, digests, encoding, attributes, alias_of, meta_digest, _, content_digests, regions = entry
    shape, data_type = known_meta(entry)
    try:
        message = messages.add(name=name, data_type=data_type.number, size=nbytes, digests=digests)
        message.shape.extend(shape)
        if folder != name:
            message.folder = folder
        if alias_of:
            message.alias_of = alias_of
    except UnicodeEncodeError as error:
        raise InvalidName(
            "a name that is not valid Unicode cannot be listed in a manifest", variable=name, hint="rename its folder"
        ) from error
    if meta_digest:
        message.meta_digest = meta_digest
    if encoding != RAW.name:
        message.encoding = encoding
        message.content_digests = content_digests
    if attributes:
        message.attributes = attributes_json(attributes, variable=name)
    for region in regions:
        message.regions.add(offsets=region.offsets, sizes=region.sizes, digests=region.digests)


def _is_alike(a: manifest_pb2.Variable, b: manifest_pb2.Variable) -> bool:
    """Tell whether two variables have the same content, in time that grows with the size of the smaller one."""
    return _content(a) == _content(b) and all(map(operator.eq, a.regions, b.regions))


def _content(message: manifest_pb2.Variable) -> tuple[Any, ...]:
    return (
        tuple(message.shape),
        message.data_type,
        message.size,
        message.encoding,
        message.digests,
        message.content_digests,
        len(message.regions),
    )


def _decode_entry(message: manifest_pb2.Variable, path: str) -> Entry:
    name, size, digests, encoding = message.name, message.size, message.digests, message.encoding
    folder = message.folder or name
    if not is_safe_folder(folder):
        raise ManifestError("the folder leads out of the checkpoint", path=path, variable=name, found=folder)
    form = _form_of(tuple(message.shape[:]), message.data_type)
    if form.meta is None:
        raise ManifestError(
            "the data type is unknown", path=path, variable=name, found=message.data_type, hint=f"if {UPGRADE}"
        )
    attributes, meta_digest, content = message.attributes, message.meta_digest, message.content_digests
    problem = None
    if form.problem is not None:
        problem = form.problem
    elif not name:
        problem = "a variable does not have a name"
    elif not _fits(form.meta, size, encoding):
        form_text = f"shape {list(form.meta.shape)} of {form.meta.data_type.name}"
        problem = f"{plural(size, 'byte')} cannot hold {form_text}"
    elif digests and len(digests) != DIGEST_SIZE * block_count(size):
        problem = f"{plural(len(digests), 'byte')} of digests cannot cover {plural(size, 'byte')}"
    elif content and not _covers(content, form.meta, encoding):
        problem = f"{plural(len(content), 'byte')} of digests cannot cover the values"
    elif meta_digest and len(meta_digest) != DIGEST_SIZE:
        problem = f"a digest of meta has {DIGEST_SIZE} bytes, not {len(meta_digest)}"
    if problem is not None:
        raise ManifestError(f"the manifest contradicts itself: {problem}", path=path, variable=name)
    return Entry(
        name,
        folder,
        form.meta,
        size,
        digests,
        encoding or RAW.name,
        _from_json(attributes, path, name) if attributes else NO_ATTRIBUTES,
        message.alias_of,
        meta_digest,
        True,
        content,
    )


def _regions_problem(regions: tuple[Region, ...], entry: Entry) -> str | None:
    """Return why these cannot be the regions of an entry, in time that grows with their number; None if they can."""
    if entry.digests:
        return "there are digests of blocks and of regions"
    if not is_plain(entry.encoding):
        return f"there are regions of the encoding {entry.encoding!r}"
    meta = known_meta(entry)
    itemsize, rest = divmod(entry.nbytes, meta.elements or 1)
    if rest:
        return f"{plural(entry.nbytes, 'byte')} cannot hold {meta.elements} elements"
    return tiling_problem(regions, meta.shape) or region_digests_problem(regions, itemsize)


def region_digests_problem(regions: Iterable[Region], itemsize: int) -> str | None:
    """Return what is wrong with the number of digests of placed regions; None if there is one for each 16 MiB."""
    for region in regions:
        nbytes = region.elements * itemsize
        if len(region.digests) != DIGEST_SIZE * block_count(nbytes):
            found = plural(len(region.digests), "byte")
            return f"{found} of digests cannot cover the {plural(nbytes, 'byte')} of the region {region}"
    return None


def _decode_files(
    messages: Sequence[manifest_pb2.File], folders: Iterable[str], path: str, fields: _LaterFields
) -> Mapping[str, FileEntry]:
    files: dict[str, FileEntry] = {}
    for message in messages:
        fields.check(message)
        name, size, digests = message.name, message.size, message.digests
        problem = None
        if name in files:
            problem = "it is listed twice"
        elif len(digests) != DIGEST_SIZE * block_count(size):
            problem = f"{plural(len(digests), 'byte')} of digests cannot cover {plural(size, 'byte')}"
        if problem is not None:
            raise ManifestError(
                f"the manifest contradicts itself about an attached file: {problem}", path=path, found=name
            )
        said = _from_json(message.attributes, path) if message.attributes else NO_ATTRIBUTES
        files[name] = FileEntry(name, size, digests, message.kind or DATA, said)
    if (refused := refused_name(files, {folder.partition("/")[0] for folder in folders})) is not None:
        raise ManifestError(f"an attached file cannot have its name: {refused[1]}", path=path, found=refused[0])
    return MappingProxyType(files)


def _covers(digests: bytes, meta: Meta, encoding: str) -> bool:
    """Return whether these can be the digests of encoded values; true if this version cannot read the type."""
    dtype = meta.data_type.dtype
    if is_plain(encoding or RAW.name):
        return False
    return dtype is None or len(digests) == DIGEST_SIZE * block_count(meta.elements * dtype.itemsize)


def _fits(meta: Meta, size: int, encoding: str) -> bool:
    """Return whether ``out`` can have this size; true if this version cannot read the encoding or type."""
    row = ENCODINGS.get(encoding or RAW.name)
    return row is None or meta.data_type.dtype is None or row.stored_dtype(meta, size) is not None


class _Form(NamedTuple):
    """What all entries of one shape and data type have in common."""

    meta: Meta | None
    problem: str | None = None


@lru_cache(maxsize=4096)
def _form_of(shape: tuple[int, ...], number: int) -> _Form:
    row = BY_NUMBER.get(number)
    if row is None:
        return _Form(None)
    meta = Meta(shape=shape, data_type=row)
    return _Form(meta, shape_problem(meta))


def _from_json(text: str, path: str, variable: str | None = None) -> Mapping[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ManifestError("the attributes are not JSON", path=path, variable=variable, found=str(error)) from error
    if not isinstance(value, dict):
        raise ManifestError("the attributes are not a JSON object", path=path, variable=variable)
    return MappingProxyType(value)
