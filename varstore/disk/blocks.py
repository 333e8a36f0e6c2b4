"""Move bytes between memory and files, and hash those of variables on the way.

The unit is the block that one digest covers: 16 MiB of ``out``, moved by one thread. Within it, bytes go
in chunks that are still in the processor's cache when they are hashed and written, or read and hashed.
"""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import xxhash

from varstore.layout.manifest import BLOCK
from varstore.layout.regions import Region
from varstore.storage import syscalls

__all__ = [
    "CHUNK",
    "SMALL",
    "DIRECT_ALIGNMENT",
    "AlignedBuffer",
    "BlockHasher",
    "copy_file",
    "digest_block",
    "digest_of",
    "lies_as_out",
    "part_of",
    "read_block",
    "spans",
    "write_block",
    "write_out",
]

SMALL = 1 << 20
"""Bytes; smaller variables are moved many to a job, larger ones block by block."""
CHUNK = 1 << 20
"""Bytes hashed, and written if asked, at a time: what was hashed is still in the processor's cache."""
READ_CHUNK = 256 << 10
"""Bytes read and then hashed at a time; less, since what was read into memory shares the cache with its source."""
DIRECT_CHUNK = 2 << 20
"""Bytes written at a time with direct I/O, where each piece is waited for."""
DIRECT_ALIGNMENT = 4096


def spans(nbytes: int) -> Iterator[tuple[int, int]]:
    """Yield the (start, stop) byte offsets of the blocks of an ``out``."""
    for start in range(0, nbytes, BLOCK):
        yield start, min(start + BLOCK, nbytes)


def lies_as_out(array: np.ndarray) -> bool:
    """Tell whether the array's own memory is, byte for byte, what ``out`` holds."""
    return array.flags.c_contiguous and array.dtype.byteorder != ">"


def _flat_bytes(array: np.ndarray) -> np.ndarray | None:
    """Return the array's own memory as one row of bytes, None where it is not what ``out`` holds."""
    return array.reshape(-1).view(np.uint8) if lies_as_out(array) else None


def _pieces(array: np.ndarray, start: int, stop: int, limit: int) -> Iterator[np.ndarray]:
    """Yield bytes start to stop of an array's ``out`` form, at most `limit` at a time."""
    flat = _flat_bytes(array)
    if flat is not None:
        for offset in range(start, stop, limit):
            yield flat[offset : min(offset + limit, stop)]
        return
    itemsize = array.dtype.itemsize
    rows = np.nditer(
        [array],
        flags=["external_loop", "buffered", "ranged", "zerosize_ok"],
        op_flags=[["readonly"]],
        op_dtypes=[array.dtype.newbyteorder("<")],
        casting="equiv",
        order="C",
        buffersize=limit // itemsize,
    )
    rows.iterrange = (start // itemsize, stop // itemsize)  # type: ignore[misc]  # numpy: settable when ranged
    with rows:
        for row in rows:
            yield np.ascontiguousarray(row).view(np.uint8)


def part_of(array: np.ndarray, region: Region, origin: Sequence[int] | None = None) -> np.ndarray:
    """Return a region of a variable whose values, or those from `origin` on, are in an array; they share memory."""
    index: tuple[Any, ...] = (*region.within(origin), ...)
    part: np.ndarray = array[index]
    return part


class BlockHasher:
    """Hashes the bytes of a file as they come, for the digests of its blocks."""

    def __init__(self) -> None:
        self._ended: list[bytes] = []
        self._hasher = xxhash.xxh3_128()
        self._left = BLOCK

    def update(self, data: memoryview) -> None:
        """Take the next bytes of the file."""
        while data:
            part = data[: self._left]
            self._hasher.update(part)
            self._left -= len(part)
            data = data[len(part) :]
            if not self._left:
                self._ended.append(self._hasher.digest())
                self._hasher.reset()
                self._left = BLOCK

    def digests(self) -> bytes:
        """Return the digests of all blocks of what came, one after the other."""
        return b"".join(self._ended) + (self._hasher.digest() if self._left < BLOCK else b"")


def digest_block(array: np.ndarray, start: int, stop: int) -> bytes:
    """Return the xxh3-128 digest of bytes start to stop of an array's ``out`` form."""
    hasher = xxhash.xxh3_128()
    for piece in _pieces(array, start, stop, CHUNK):
        hasher.update(piece.data)
    return hasher.digest()


def digest_of(array: np.ndarray) -> bytes:
    """Return the xxh3-128 digest of an array's ``out`` form, of any size."""
    flat = _flat_bytes(array)
    return digest_block(array, 0, array.nbytes) if flat is None else xxhash.xxh3_128_digest(flat.data)


def write_block(fd: int, array: np.ndarray, start: int, stop: int, direct: AlignedBuffer | None = None) -> bytes:
    """Write bytes start to stop of an array's ``out`` form at their place; return their digest.

    With `direct`, the descriptor may be open for direct I/O: the last write is padded to the alignment
    and the caller truncates the file.
    """
    hasher = xxhash.xxh3_128()
    if direct is None:
        for piece in _pieces(array, start, stop, CHUNK):
            hasher.update(piece.data)
            syscalls.write_all(fd, piece.data, start)
            start += piece.nbytes
    else:
        for filled in direct.refill(_pieces(array, start, stop, CHUNK), hasher):
            syscalls.write_all(fd, filled.data, start)
            start += filled.nbytes
    return hasher.digest()


def write_out(path: str, array: np.ndarray, dir_fd: int, *, sync: bool) -> bytes:
    """Create an ``out`` of any size and return its digests; it is made durable if asked."""
    fd = syscalls.create(path, dir_fd)
    try:
        digests = b"".join(write_block(fd, array, start, stop) for start, stop in spans(array.nbytes))
        if sync:
            syscalls.sync(fd)
        return digests
    finally:
        os.close(fd)


def copy_file(path: str, source: int, nbytes: int, dir_fd: int, *, sync: bool) -> bytes:
    """Create a file with the bytes of an open one and return their digests; it is made durable if asked.

    Raises:
        OSError: the source ends before.
    """
    fd = syscalls.create(path, dir_fd)
    try:
        digests = b"".join(_copy_block(source, fd, start, stop) for start, stop in spans(nbytes))
        if sync:
            syscalls.sync(fd)
        return digests
    finally:
        os.close(fd)


def _copy_block(source: int, target: int, start: int, stop: int) -> bytes:
    hasher = xxhash.xxh3_128()
    for piece, offset in _read_pieces(source, start, stop):
        hasher.update(piece)
        syscalls.write_all(target, piece, offset)
    return hasher.digest()


class AlignedBuffer:
    """A page-aligned buffer that direct I/O can write from, filled again and again."""

    def __init__(self) -> None:
        self._memory = np.frombuffer(mmap.mmap(-1, DIRECT_CHUNK), np.uint8)

    def refill(self, pieces: Iterator[np.ndarray], hasher: Any) -> Iterator[np.ndarray]:
        """Yield the pieces in aligned runs, hashed; the last run is padded with zeros to the alignment."""
        filled = 0
        for piece in pieces:
            hasher.update(piece.data)
            while piece.nbytes:
                taken = min(piece.nbytes, len(self._memory) - filled)
                np.copyto(self._memory[filled : filled + taken], piece[:taken])
                filled += taken
                piece = piece[taken:]
                if filled == len(self._memory):
                    yield self._memory
                    filled = 0
        if filled:
            padded = -(-filled // DIRECT_ALIGNMENT) * DIRECT_ALIGNMENT
            self._memory[filled:padded] = 0
            yield self._memory[:padded]


def read_block(fd: int, target: np.ndarray, offset: int, *, hashed: bool) -> bytes:
    """Fill a row of bytes from this offset of a file; return the digest of what was read, b"" if not hashed.

    Raises:
        OSError: the file ends before the row is full.
    """
    hasher = xxhash.xxh3_128() if hashed else None
    memory = target.data
    for start in range(0, target.nbytes, READ_CHUNK):
        piece = memory[start : start + READ_CHUNK]
        _read_all(fd, piece, offset + start)
        if hasher is not None:
            hasher.update(piece)
    return b"" if hasher is None else hasher.digest()


def _read_all(fd: int, target: memoryview, offset: int) -> None:
    done = syscalls.preadv(fd, (target,), offset)
    while done < len(target):
        count = syscalls.preadv(fd, (target[done:],), offset + done)
        if count == 0:
            raise OSError(errno.EIO, "the file became shorter while it was read")
        done += count


def digest_file_block(fd: int, start: int, stop: int) -> bytes:
    """Return the digest of bytes start to stop of a file, a chunk in memory at a time.

    Raises:
        OSError: the file ends before.
    """
    hasher = xxhash.xxh3_128()
    for piece, _ in _read_pieces(fd, start, stop):
        hasher.update(piece)
    return hasher.digest()


def _read_pieces(fd: int, start: int, stop: int) -> Iterator[tuple[memoryview, int]]:
    """Yield bytes start to stop of a file in pieces, each with its offset, and each in the same memory."""
    chunk = np.empty(min(READ_CHUNK, stop - start), np.uint8)
    for offset in range(start, stop, READ_CHUNK):
        piece = chunk[: stop - offset].data
        _read_all(fd, piece, offset)
        yield piece, offset
