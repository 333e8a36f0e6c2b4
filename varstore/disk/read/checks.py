"""What must agree: the manifest's entry of a variable, its ``meta``, and the bytes of its ``out`` (FORMAT F5)."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import xxhash

from varstore.errors import DigestMismatch, ManifestError
from varstore.layout.attached import FileEntry
from varstore.layout.location import Location
from varstore.layout.manifest import BLOCK, DIGEST_SIZE, Entry
from varstore.layout.meta import META_LIMIT, encode_meta
from varstore.layout.regions import Region
from varstore.storage.directory import Directory

__all__ = ["check_digest", "check_files", "check_meta", "check_region"]

_RESTORE = "restore it from a copy; `varstore verify` lists all that is damaged"


def check_digest(directory: Directory, entry: Entry | FileEntry, digests: bytes, block: int, found: bytes) -> None:
    """Check the digest of one block of ``out`` or of an attached file, if there is one to compare with.

    Raises:
        DigestMismatch: the bytes are not those that were saved.
    """
    expected = digests[block * DIGEST_SIZE : (block + 1) * DIGEST_SIZE]
    if expected and found != expected:
        nbytes, of = entry.nbytes, ""
        if isinstance(entry, Entry) and digests != entry.digests and entry.meta and entry.meta.data_type.dtype:
            nbytes, of = entry.meta.elements * entry.meta.data_type.dtype.itemsize, " of the values"
        raise DigestMismatch(
            f"{entry.file.rpartition('/')[2]} does not hold the bytes that were saved",
            path=directory.place(entry.file),
            variable=entry.name if entry.folder else None,
            field=f"bytes {block * BLOCK} to {min((block + 1) * BLOCK, nbytes)}{of}",
            found=f"xxh3-128 {found.hex()}",
            expected=expected.hex(),
            hint=_RESTORE,
        )


def check_region(directory: Directory, entry: Entry, region: Region, block: int, found: bytes) -> None:
    """Check the digest of 16 MiB of a region's own values.

    Raises:
        DigestMismatch: they are not those that were saved.
    """
    expected = region.digests[block * DIGEST_SIZE : (block + 1) * DIGEST_SIZE]
    if found != expected:
        assert entry.meta is not None
        nbytes = region.elements * (entry.nbytes // entry.meta.elements)
        part = f"bytes {block * BLOCK} to {min((block + 1) * BLOCK, nbytes)} of " if nbytes > BLOCK else ""
        raise DigestMismatch(
            "out does not hold the bytes that were saved",
            path=directory.place(entry.file),
            variable=entry.name,
            field=f"{part}region {region}",
            found=f"xxh3-128 {found.hex()}",
            expected=expected.hex(),
            hint=_RESTORE,
        )


def check_meta(directory: Directory, entry: Entry) -> None:
    """Check that ``meta`` still says what the manifest says.

    Raises:
        ManifestError: it differs.
        FormatError: it is gone.
    """
    if not entry.witnessed or entry.meta is None:
        return
    relative = f"{entry.folder}/meta"
    text = directory.read_small(relative, limit=META_LIMIT, variable=entry.name)
    if entry.meta_digest:
        same = xxhash.xxh3_128_digest(text) == entry.meta_digest
    else:
        same = text == encode_meta(entry.meta)
    if not same:
        raise ManifestError(
            "meta is not what the manifest says",
            path=directory.place(relative),
            variable=entry.name,
            found=repr(text[:80].decode("utf-8", "replace")),
            expected=repr(encode_meta(entry.meta).decode()),
            hint="restore it; after a change on purpose, run `varstore seal`",
        )


def check_files(wanted: Iterable[tuple[Location, Entry]]) -> None:
    """Check that the ``out`` of each entry is there and as long as it should be; values are not read.

    Raises:
        FormatError: one is not.
    """
    for location, pairs in itertools.groupby(wanted, key=lambda pair: pair[0]):
        with Directory(location) as directory:
            for _, entry in pairs:
                with directory.out(entry):
                    pass
