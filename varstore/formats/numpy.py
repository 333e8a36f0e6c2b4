"""NumPy's files: ``.npy`` with one array, and ``.npz``, a zip archive with several.

Arrays of Python objects are pickles. They are listed, but reading one raises an error. Uncompressed members of an
archive are read in place.

Format: https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html
"""

from __future__ import annotations

import ast
import functools
import io
import zipfile
import zlib
from typing import IO, Any, BinaryIO

import numpy as np

from varstore.errors import (
    FormatError,
    InvalidName,
    SizeMismatch,
    UnsafeContent,
    UnsupportedDtype,
    UsageError,
    VarstoreError,
)
from varstore.formats.binary.budget import Budget
from varstore.formats.binary.magic import NPY
from varstore.formats.binary.slices import MemoryContent, array_of_spans, refused_array, stream_of
from varstore.formats.binary.source import Source, count_elements
from varstore.formats.binary.zip import Member, archive_members, is_zip, leads_out, new_archive
from varstore.formats.opened import ForeignCheckpoint
from varstore.formats.state.flat import fetch_plain, flat_arrays
from varstore.storage.appearing import replacing
from varstore.values.lazy import LazyArray, derived
from varstore.values.nodes import BARE

__all__ = ["read", "write"]

_VERSIONS = {(1, 0): (2, "latin1"), (2, 0): (4, "latin1"), (3, 0): (4, "utf-8")}
_MOST_HEADER = 10_000
_KEYS = {"descr", "fortran_order", "shape"}
_STEP = 1 << 20

Header = tuple[np.dtype[Any], tuple[int, ...], bool]


def read(path: str, *, limit: int | None = None) -> ForeignCheckpoint:
    """Open an ``.npy`` or ``.npz`` file.

    The names of members of an archive that are not arrays are in ``attributes["other_members"]``.

    Raises:
        FormatError: it is not such a file, or a header is one that numpy does not write.
        SizeMismatch: the bytes of an array are more or fewer than its header requires.
        UnsafeContent: the name of a member leads out of the archive, or the arrays are out of proportion to the size
            of the file.
        CheckpointNotFound: there is nothing at the path.
    """
    source = Source(path)
    budget = Budget(path, source.size, limit=limit)
    magic = source.bytes(0, min(6, source.size))
    if magic == NPY:
        with stream_of(source) as file:
            header, start = _header(file, path, BARE)
        bare = _array(source, (start, source.size - start), header, BARE)
        return ForeignCheckpoint(path, "npy", bare, budget=budget)
    if not is_zip(source):
        raise FormatError("neither an npy file nor a zip archive", path=path, found=repr(magic))
    tree: dict[str, LazyArray] = {}
    others: list[str] = []
    for member in archive_members(source, are_paths=False).values():
        array = _member_array(source, member)
        if array is None:
            others.append(member.name)
        else:
            name = member.name.removesuffix(".npy")
            if name in tree:
                raise FormatError("two members have the same name", path=path, variable=name)
            tree[name] = array
    return ForeignCheckpoint(path, "npz", tree, {"other_members": others} if others else {}, budget=budget)


def write(path: str, state: Any) -> None:
    """Write one array to an ``.npy`` file, or names and arrays to an uncompressed ``.npz`` file (any other suffix).

    Raises:
        UnsupportedDtype: an array contains Python objects, which would be pickled, or has a type of `ml_dtypes`, which
            numpy's files do not record.
        UsageError: there is more than one array for an ``.npy`` file, or a value is not an array or a number; see
            `flat_arrays`.
        InvalidName: a name cannot be that of a member of a zip archive.
        StorageError: the operating system refused.
    """
    arrays = flat_arrays(state, format="numpy")
    for name, array in arrays.items():
        if array.dtype.hasobject or array.dtype.type.__module__ != "numpy":
            raise UnsupportedDtype(
                "objects would be pickled" if array.dtype.hasobject else "numpy's files do not record this type",
                path=path,
                variable=name,
                found=str(array.dtype),
                hint="convert it with dtype='float32', or write a safetensors file",
            )
    if path.endswith(".npy"):
        if len(arrays) != 1:
            raise UsageError(
                "an npy file contains one array", path=path, found=len(arrays), hint="write to a path that ends in .npz"
            )
        ((name, array),) = arrays.items()
        with replacing(path) as file:
            _write_array(file, name, array)
        return
    for name in arrays:
        _check_member_name(path, name)
    with new_archive(path) as (archive, _):
        for name, array in arrays.items():
            info = zipfile.ZipInfo(f"{name}.npy")
            info.external_attr = 0o600 << 16
            with archive.open(info, "w", force_zip64=True) as member:
                _write_array(member, name, array)


def _member_array(source: Source, member: Member) -> LazyArray | None:
    """Return the array in a member, or None if the member is not an array."""
    with member.open() as stream:
        if stream.peek(len(NPY))[: len(NPY)] != NPY:
            return None
        header, start = _header(stream, source.path, member.name)
    name = member.name.removesuffix(".npy")
    if header[0].hasobject:
        return _objects(source.path, name, header)
    if not member.is_plain:
        return _compressed_array(member, name, header, start)
    place, _ = member.span
    array = _array(source, (place + start, member.size - start), header, name)

    def check(values: np.ndarray) -> None:
        _check_crc(member, member.read(0, start), values.T if header[2] else values, header[0])

    return derived(array, check=check)


def _check_crc(member: Member, head: np.ndarray, values: np.ndarray, stored: np.dtype[Any]) -> None:
    raw = values if values.dtype == stored else values.astype(stored)
    crc = zlib.crc32(np.ascontiguousarray(raw).reshape(-1).view(np.uint8).data, zlib.crc32(head.data))
    member.check(crc)


def _compressed_array(member: Member, name: str, header: Header, start: int) -> LazyArray:
    dtype, shape, fortran = header
    path = member.path
    size = count_elements(shape, dtype.itemsize, path=path, variable=name) * dtype.itemsize
    _check_size(path, name, header, member.size - start, size)

    def fetch() -> np.ndarray:
        content = _unpacked(member, start, size, name)
        memory = MemoryContent(path, content)
        return array_of_spans(memory, [(0, size)], shape, dtype, variable=name, fortran=fortran).numpy()

    native = dtype if dtype.fields else dtype.newbyteorder("=")
    return LazyArray(shape, native, fetch)


def _unpacked(member: Member, start: int, size: int, name: str) -> memoryview:
    """Decompress a member in steps, so that memory use depends on the bytes that exist, not on the stated size."""
    content = io.BytesIO()
    with member.open() as stream:
        stream.read(start)
        while part := stream.read(_STEP):
            content.write(part)
            if content.tell() > size:
                break
    if content.tell() != size:
        raise SizeMismatch(
            "the member does not decompress to its stated size",
            path=member.path,
            variable=name,
            found=f"{content.tell()} bytes or more",
            expected=size,
        )
    return content.getbuffer()


def _array(source: Source, span: tuple[int, int], header: Header, name: str) -> LazyArray:
    dtype, shape, fortran = header
    if dtype.hasobject:
        return _objects(source.path, name, header)
    count = count_elements(shape, dtype.itemsize, path=source.path, variable=name)
    _check_size(source.path, name, header, span[1], count * dtype.itemsize)
    return array_of_spans(source, [span], shape, dtype, variable=name, fortran=fortran)


def _check_size(path: str, name: str, header: Header, found: int, expected: int) -> None:
    if found != expected:
        raise SizeMismatch(
            "the bytes of the array do not match its header",
            path=path,
            variable=name,
            found=f"{found} bytes",
            expected=f"{expected} for {header[0]} {list(header[1])}",
            hint="the file is truncated, or something was appended",
        )


def _objects(path: str, name: str, header: Header) -> LazyArray:
    return refused_array(
        header[1],
        UnsafeContent(
            "an array of Python objects is a pickle, which can run code",
            path=path,
            variable=name,
            found=f"dtype {header[0]}",
            hint="leave it out, or load it with numpy.load(allow_pickle=True) if you trust the file",
        ),
    )


def _header(file: IO[bytes], path: str, name: str) -> tuple[Header, int]:
    """Parse the header of an array; return it and the position of the values."""

    def wrong(what: str, found: Any) -> VarstoreError:
        return FormatError(what, path=path, variable=name, found=found, hint="no version of numpy writes such a header")

    magic = file.read(8)
    version = (magic[6], magic[7]) if len(magic) == 8 else (0, 0)
    if version not in _VERSIONS:
        raise wrong("the version of the npy format is unknown", version)
    width, encoding = _VERSIONS[version]
    size = int.from_bytes(file.read(width), "little")
    if size > _MOST_HEADER:
        raise wrong(f"the header is longer than {_MOST_HEADER} bytes", size)
    text = file.read(size)
    if len(text) != size:
        raise wrong("the file ends within its header", f"{len(text)} of {size} bytes")
    try:
        fields, dtype = _fields(text.decode(encoding).strip())
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError, LookupError, AttributeError) as error:
        raise wrong("the header is not a dictionary of descr, fortran_order and shape", str(error)) from None
    shape, fortran = fields["shape"], fields["fortran_order"]
    if not isinstance(shape, tuple) or not isinstance(fortran, bool) or dtype.subdtype or not dtype.itemsize:
        raise wrong("the shape, order or type is impossible", str(fields)[:120])
    count_elements(shape, dtype.itemsize, path=path, variable=name)
    return (dtype, shape, fortran), 8 + width + size


@functools.lru_cache(maxsize=1024)
def _fields(text: str) -> tuple[dict[str, Any], np.dtype[Any]]:
    """Parse the text of a header; the arrays of one archive often share a few."""
    fields = ast.literal_eval(text)
    if not isinstance(fields, dict) or fields.keys() != _KEYS:
        raise ValueError(f"fields other than {sorted(_KEYS)}")
    return fields, np.lib.format.descr_to_dtype(fields["descr"])


def _check_member_name(path: str, name: str) -> None:
    if leads_out(name) or len(name.encode()) > 65_000:
        raise InvalidName(
            "the name cannot be that of a member of a zip archive", path=path, variable=name, hint="rename it"
        )


def _write_array(file: IO[bytes] | BinaryIO, name: str, array: LazyArray) -> None:
    values = fetch_plain(name, array)
    np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(values))
    file.write(values.reshape(-1).view(np.uint8).data)
