"""The encoding ``zarr``: ``out`` is a shard of compressed chunks with an index at its end (FORMAT F9).

`read` finds the chunks that hold what is asked for by the index, and decodes those. `pack` is its mirror: it compresses
chunks, and `index` makes the index. Both know of a file only what they are given.
"""

from __future__ import annotations

import numpy as np
import xxhash

from varstore.disk.encodings.codecs import Undecodable, compressor, crc32c, decompress
from varstore.layout.readable import Readable
from varstore.layout.shards import Level, Shard
from varstore.storage import syscalls

__all__ = ["index", "pack", "read"]


def read(fd: int, variable: Readable, target: np.ndarray, offset: int, hashed: bool) -> bytes:
    """Fill a row of bytes with those of the values from this offset on; see `varstore.disk.encodings.table`."""
    shard = Shard(variable.shape, variable.dtype)
    size = variable.dtype.itemsize
    chunks = shard.chunks
    begin, end = offset, offset + target.nbytes
    numbers = chunks.covering(begin // size, -(-end // size))
    places = _places(fd, variable.entry.nbytes, shard)[numbers.start : numbers.stop].tolist()
    for number, (place, packed_nbytes) in zip(numbers, places, strict=True):
        start, stop = (at * size for at in chunks.numbered(number))
        packed = _packed(fd, place, packed_nbytes, variable.entry.nbytes, shard)
        is_inside = begin <= start and stop <= end and stop - start == shard.chunk_nbytes
        row = target[start - begin : stop - begin] if is_inside else np.empty(shard.chunk_nbytes, np.uint8)
        decompress(packed, row, itemsize=size)
        if not is_inside:
            first, last = max(start, begin), min(stop, end)
            target[first - begin : last - begin] = row[first - start : last - start]
    return xxhash.xxh3_128_digest(target.data) if hashed else b""


def _places(fd: int, nbytes: int, shard: Shard) -> np.ndarray:
    """Return the offset and the size of each chunk, from the index."""
    found = syscalls.pread(fd, shard.index_nbytes, nbytes - shard.index_nbytes)
    if len(found) != shard.index_nbytes:
        raise OSError("the file became shorter while it was read")
    content, stated = found[:-4], int.from_bytes(found[-4:], "little")
    if crc32c(content) != stated:
        raise Undecodable("the index does not match its checksum")
    return np.frombuffer(content, "<u8").reshape(-1, 2)


def _packed(fd: int, place: int, packed_nbytes: int, nbytes: int, shard: Shard) -> bytes:
    if packed_nbytes > shard.packed_limit or place + packed_nbytes > nbytes - shard.index_nbytes:
        raise Undecodable(f"the index places a chunk of {packed_nbytes} bytes at {place} in a file of {nbytes}")
    packed = syscalls.pread(fd, packed_nbytes, place)
    if len(packed) != packed_nbytes:
        raise OSError("the file became shorter while it was read")
    return packed


def pack(values: np.ndarray, shard: Shard, numbers: range, level: Level) -> list[bytes]:
    """Return chunks of the values, compressed; `values` are all of them, as a row."""
    compress = compressor(shard.codec(level))
    packed = []
    for number in numbers:
        start, stop = shard.chunks.numbered(number)
        chunk = values[start:stop]
        if stop - start < shard.chunks.elements:
            padded = np.zeros(shard.chunks.elements, values.dtype)
            padded[: stop - start] = chunk
            chunk = padded
        packed.append(compress(chunk.view(np.uint8).data))
    return packed


def index(sizes: list[int]) -> bytes:
    """Return the index of chunks of these sizes, which lie one after the other."""
    places = np.zeros((len(sizes), 2), "<u8")
    places[:, 1] = sizes
    places[1:, 0] = np.cumsum(sizes[:-1])
    content = places.tobytes()
    return content + crc32c(content).to_bytes(4, "little")
