"""The encoding ``zarr``: ``out`` is a shard of compressed chunks with an index at its end (FORMAT F9).

`read` finds the chunks that hold what is asked for by the index, and decodes those. `pack` is its mirror: it compresses
chunks, and `index` makes the index. Both know of a file only what they are given.
"""

from __future__ import annotations

import numpy as np
import xxhash

from varstore.disk.encodings.codecs import Undecodable, compressor, crc32c, decompress
from varstore.disk.encodings.stored import Stored
from varstore.layout.readable import Readable
from varstore.layout.shards import Level, Shard

__all__ = ["index", "pack", "read"]


def read(stored: Stored, variable: Readable, target: np.ndarray, offset: int, hashed: bool) -> bytes:
    """Fill a row of bytes with those of the values from this offset on; see `varstore.disk.encodings.table`."""
    shard = Shard(variable.shape, variable.dtype)
    size = variable.dtype.itemsize
    chunks = shard.chunks
    begin, end = offset, offset + target.nbytes
    numbers = chunks.covering(begin // size, -(-end // size))
    hasher = xxhash.xxh3_128() if hashed else None
    places = _places(stored, variable.entry.nbytes, shard)[numbers.start : numbers.stop].tolist()
    for number, (place, packed_nbytes) in zip(numbers, places, strict=True):
        start, stop = (at * size for at in chunks.numbered(number))
        is_inside = begin <= start and stop <= end and stop - start == shard.chunk_nbytes
        row = target[start - begin : stop - begin] if is_inside else np.empty(shard.chunk_nbytes, np.uint8)
        decompress(stored.read(packed_nbytes, place), row, itemsize=size)
        first, last = max(start, begin), min(stop, end)
        if not is_inside:
            target[first - begin : last - begin] = row[first - start : last - start]
        if hasher is not None:  # while the values are in the processor's cache
            hasher.update(target[first - begin : last - begin].data)
    return b"" if hasher is None else hasher.digest()


def _places(stored: Stored, nbytes: int, shard: Shard) -> np.ndarray:
    """Return the offset and the size of each chunk, from the index; they lie one after the other, as F9 says."""
    found = stored.read(shard.index_nbytes, nbytes - shard.index_nbytes)
    content, stated = found[:-4], int.from_bytes(found[-4:], "little")
    if crc32c(content) != stated:
        raise Undecodable("the index does not match its checksum")
    places = np.frombuffer(content, "<u8").reshape(-1, 2)
    offsets, sizes = places.T
    ends = np.cumsum(sizes)
    wrong = (offsets != ends - sizes) | (sizes > shard.packed_limit)
    wrong[-1] |= ends[-1] != nbytes - shard.index_nbytes
    if wrong.any():
        offset, size = places[wrong.argmax()]
        raise Undecodable(f"the index places a chunk of {size} bytes at {offset} in a file of {nbytes}")
    return places


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
