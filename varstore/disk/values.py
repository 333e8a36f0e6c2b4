"""Read whole variables into memory: many at once, in parallel, every byte checked on the way."""

from __future__ import annotations

import errno
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import xxhash

from varstore.disk.beneath import not_regular, open_file, open_root, opened_file, read_small
from varstore.disk.blocks import read_block, spans
from varstore.disk.workers import run, thread_count
from varstore.errors import DigestMismatch, FormatError, ManifestError, SizeMismatch
from varstore.spec.dtypes import dtype_of
from varstore.spec.manifest import BLOCK, DIGEST_SIZE, RAW, Entry
from varstore.spec.meta import META_LIMIT, encode_meta

__all__ = [
    "check_digest",
    "check_files",
    "check_meta",
    "check_readable",
    "check_size",
    "check_tied",
    "read_many",
    "read_values",
]

SMALL = 1 << 20
"""Bytes; smaller variables are read many to a job, larger ones block by block."""
_BATCH = 256


def check_readable(root: str, entry: Entry) -> None:
    """Check that a variable's encoding, type and size are such that its values can be read.

    Raises:
        FormatError: an encoding of a later version.
        UnsupportedDtype: a type that numpy lacks.
        SizeMismatch: ``out`` does not hold what shape and type say.
    """
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


def check_tied(root: str, entries: Sequence[Entry], *, verify: bool) -> None:
    """Check the files of variables whose values are read under another name.

    Raises:
        FormatError: ``out`` is not there or of another size; with `verify`, ``meta`` differs too.
    """
    check_files((root, entry) for entry in entries)
    if verify:
        with open_root(root) as root_fd:
            for entry in entries:
                check_meta(root_fd, root, entry)


def read_many(
    root: str,
    wanted: Sequence[tuple[Entry, np.ndarray]],
    *,
    verify: bool,
    threads: int | None,
    advance: Callable[[int], None] | None = None,
) -> None:
    """Fill rows of bytes, each of the size of its entry, with what the entries' files hold.

    With `verify`, digests and ``meta`` are checked against the manifest.

    Raises:
        FormatError: a file is missing, of another size, damaged, or no file at all.
    """
    large = any(entry.nbytes >= SMALL for entry, _ in wanted)
    with open_root(root) as root_fd:
        run(_jobs(root_fd, root, wanted, verify, advance), thread_count(threads) if large else 1)


def read_values(root: str, entry: Entry, dtype: np.dtype[Any]) -> np.ndarray:
    """Read one variable into a new array of its type."""
    check_readable(root, entry)
    assert entry.meta is not None
    values = np.empty(entry.meta.shape, entry.stored_dtype)
    read_many(root, [(entry, values.reshape(-1).view(np.uint8))], verify=True, threads=None)
    return values if values.dtype == dtype else values.astype(dtype)


def _jobs(
    root_fd: int,
    root: str,
    wanted: Sequence[tuple[Entry, np.ndarray]],
    verify: bool,
    advance: Callable[[int], None] | None,
) -> Iterator[Callable[[], None]]:
    small = []
    for entry, target in wanted:
        if entry.nbytes < SMALL:
            small.append((entry, target))
            continue
        if verify:
            check_meta(root_fd, root, entry)
        for start, stop in spans(entry.nbytes):
            yield partial(_read_block, root_fd, root, entry, target[start:stop], start, verify, advance)
    for first in range(0, len(small), _BATCH):
        yield partial(_read_batch, root_fd, root, small[first : first + _BATCH], verify, advance)


def _read_block(
    root_fd: int,
    root: str,
    entry: Entry,
    target: np.ndarray,
    start: int,
    verify: bool,
    advance: Callable[[int], None] | None,
) -> None:
    with opened_file(root_fd, f"{entry.folder}/out", root=root, variable=entry.name) as (fd, size):
        check_size(root, entry, size)
        try:
            digest = read_block(fd, target, start, hashed=verify and bool(entry.digests))
        except EOFError:
            check_size(root, entry, os.fstat(fd).st_size)
            raise
    if verify:
        check_digest(root, entry, start // BLOCK, digest)
    if advance:
        advance(target.nbytes)


def _read_batch(
    root_fd: int,
    root: str,
    batch: Sequence[tuple[Entry, np.ndarray]],
    verify: bool,
    advance: Callable[[int], None] | None,
) -> None:
    beyond = bytearray(1)  # a file that is too long shows by filling it
    for entry, target in batch:
        relative = entry.folder + "/out"
        fd = open_file(root_fd, relative, root=root, variable=entry.name)
        try:
            size = os.preadv(fd, (target.data, beyond), 0)
            if size != entry.nbytes:
                check_size(root, entry, os.fstat(fd).st_size)
        except OSError as error:
            if error.errno in (errno.ESPIPE, errno.EISDIR, errno.EAGAIN):
                raise not_regular(root, relative, entry.name) from error
            raise
        finally:
            os.close(fd)
        if verify:
            check_digest(root, entry, 0, xxhash.xxh3_128_digest(target.data))
            check_meta(root_fd, root, entry)
    if advance:
        advance(sum(target.nbytes for _, target in batch))
