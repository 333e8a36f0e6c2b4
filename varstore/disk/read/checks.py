"""What must agree: the manifest's entry of a variable, its ``meta``, and the bytes of its ``out`` (FORMAT F5)."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable

import xxhash

from varstore.errors import DigestMismatch, FormatError, ManifestError, MetaError, SizeMismatch
from varstore.layout.dtypes import dtype_of
from varstore.layout.manifest import BLOCK, DIGEST_SIZE, RAW, Entry
from varstore.layout.meta import META_LIMIT, Meta, encode_meta
from varstore.storage.beneath import open_root, opened_file, read_small

__all__ = ["check_digest", "check_files", "check_meta", "check_readable", "check_size", "known_meta"]


def check_readable(root: str, entry: Entry) -> None:
    """Check that a variable's encoding, type and size are such that its values can be read.

    Raises:
        FormatError: an encoding of a later version.
        UnsupportedDtype: a type that numpy lacks.
        SizeMismatch: ``out`` does not hold what shape and type say.
    """
    if entry.witnessed and entry.encoding == RAW and entry.stored_dtype is not None:
        return  # the manifest's own gate has checked all below
    path = os.path.join(root, entry.folder)
    if entry.encoding != RAW:
        raise FormatError(
            "an encoding that this varstore cannot read",
            path=path,
            variable=entry.name,
            found=repr(entry.encoding),
            expected=repr(RAW),
            hint="upgrade varstore",
        )
    if entry.meta is None:
        return
    dtype_of(entry.meta.data_type, path=path, variable=entry.name)
    stored = entry.stored_dtype
    if stored is not None and entry.nbytes != entry.meta.elements * stored.itemsize:
        raise SizeMismatch(
            "out is not of the size that meta says",
            path=os.path.join(path, "out"),
            variable=entry.name,
            found=f"{entry.nbytes} bytes",
            expected=f"{entry.meta.elements * stored.itemsize} bytes for {list(entry.meta.shape)} of {stored}",
        )


def known_meta(root: str, entry: Entry) -> Meta:
    """Return a variable's shape and data type.

    Raises:
        MetaError: its folder has no ``meta``.
    """
    if entry.meta is None:
        raise MetaError(
            "the variable has no meta, so its shape and type are not known",
            path=os.path.join(root, entry.folder),
            variable=entry.name,
            hint="load it with load_variables or load_into, which take them from the target",
        )
    return entry.meta


def check_size(root: str, entry: Entry, size: int) -> None:
    """Check the size of an opened ``out``.

    Raises:
        SizeMismatch: it is not what was saved.
    """
    if size != entry.nbytes:
        raise SizeMismatch(
            "out is not as long as it was saved",
            path=os.path.join(root, entry.folder, "out"),
            variable=entry.name,
            found=f"{size} bytes",
            expected=f"{entry.nbytes} bytes",
            hint="restore it from a copy; after a change on purpose, run `varstore seal`",
        )


def check_digest(root: str, entry: Entry, block: int, found: bytes) -> None:
    """Check the digest of one block of ``out``, if there is one to compare with.

    Raises:
        DigestMismatch: the bytes are not those that were saved.
    """
    expected = entry.digests[block * DIGEST_SIZE : (block + 1) * DIGEST_SIZE]
    if expected and found != expected:
        raise DigestMismatch(
            "out does not hold the bytes that were saved",
            path=os.path.join(root, entry.folder, "out"),
            variable=entry.name,
            field=f"bytes {block * BLOCK} to {min((block + 1) * BLOCK, entry.nbytes)}",
            found=f"xxh3-128 {found.hex()}",
            expected=expected.hex(),
            hint="restore it from a copy; `varstore verify` lists all that is damaged",
        )


def check_meta(root_fd: int, root: str, entry: Entry) -> None:
    """Check that ``meta`` still says what the manifest says.

    Raises:
        ManifestError: it differs.
        FormatError: it is gone.
    """
    if not entry.witnessed or entry.meta is None:
        return
    text = read_small(root_fd, f"{entry.folder}/meta", root=root, limit=META_LIMIT, variable=entry.name)
    if entry.meta_digest:
        same = xxhash.xxh3_128_digest(text) == entry.meta_digest
    else:
        same = text == encode_meta(entry.meta)
    if not same:
        raise ManifestError(
            "meta is not what the manifest says",
            path=os.path.join(root, entry.folder, "meta"),
            variable=entry.name,
            found=repr(text[:80].decode("utf-8", "replace")),
            expected=repr(encode_meta(entry.meta).decode()),
            hint="restore it; after a change on purpose, run `varstore seal`",
        )


def check_files(wanted: Iterable[tuple[str, Entry]]) -> None:
    """Check that the ``out`` of each (root, entry) is there and as long as it should be; values are not read.

    Raises:
        FormatError: one is not.
    """
    for root, entries in itertools.groupby(wanted, key=lambda pair: pair[0]):
        with open_root(root) as root_fd:
            for _, entry in entries:
                with opened_file(root_fd, f"{entry.folder}/out", root=root, variable=entry.name) as (_, size):
                    check_size(root, entry, size)
