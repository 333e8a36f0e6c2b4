"""The compressors of zarr chunks, from numcodecs, and their checksum.

What compressed bytes say about their size is compared with the size of a chunk before a decoder sees them, and it
decodes into memory of exactly that size. So no chunk, however it was made, fills more than the memory of a chunk.

Format: https://github.com/Blosc/c-blosc/blob/main/README_CHUNK_FORMAT.rst, RFC 8878 (zstd), RFC 3720 (CRC-32C)
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import numpy as np

from varstore.errors import MissingDependency

__all__ = ["Undecodable", "blosc_size", "compressor", "crc32c", "decompress", "load_numcodecs", "zstd_size"]

_SHUFFLES = {"shuffle": 1, "bitshuffle": 2}
_HEADER = struct.Struct("<4B3I")
_ZSTD = b"\x28\xb5\x2f\xfd"


class Undecodable(ValueError):
    """Bytes are not those of a chunk; the text says why."""


def compressor(codec: dict[str, Any]) -> Callable[[Any], bytes]:
    """Return the function that compresses a chunk; the codec is as Zarr names it.

    Raises:
        MissingDependency: numcodecs is not installed.
    """
    blosc, _, zstd = load_numcodecs()
    options = codec["configuration"]
    if codec["name"] == "zstd":
        return lambda values: bytes(zstd.compress(values, options["level"], options["checksum"]))
    name, level, shuffle = options["cname"].encode(), options["clevel"], _SHUFFLES[options["shuffle"]]
    return lambda values: bytes(blosc.compress(values, name, level, shuffle, options["blocksize"], options["typesize"]))


def decompress(packed: bytes | memoryview, target: np.ndarray, *, itemsize: int) -> None:
    """Fill a row of bytes with a chunk of elements of this size.

    Raises:
        Undecodable: the bytes are damaged, or do not state this size.
        MissingDependency: numcodecs is not installed.
    """
    is_zstd = itemsize == 1
    stated = zstd_size(packed) if is_zstd else blosc_size(packed)
    if stated != target.nbytes:
        raise Undecodable(f"a chunk states {stated} bytes instead of {target.nbytes}")
    blosc, _, zstd = load_numcodecs()
    try:
        (zstd if is_zstd else blosc).decompress(packed, target)
    except (ValueError, RuntimeError) as error:
        raise Undecodable(f"a chunk cannot be decompressed: {error}") from None


def blosc_size(packed: bytes | memoryview) -> int:
    """Return the size of the content in the header of a chunk.

    Raises:
        Undecodable: it does not have the size that it states, or blocks that are larger than the content.
    """
    if len(packed) < _HEADER.size:
        raise Undecodable("a chunk ends within its header")
    *_, stated, block, size = _HEADER.unpack_from(packed)
    if size != len(packed) or block > max(stated, 1):
        raise Undecodable(f"a chunk states that it has {size} bytes, and has {len(packed)}")
    return int(stated)


def zstd_size(packed: bytes | memoryview) -> int | None:
    """Return the size of the content in the header of a frame (RFC 8878, 3.1.1.1); None if it does not state one.

    Raises:
        Undecodable: it is not a frame.
    """
    if len(packed) < 6 or packed[:4] != _ZSTD:
        raise Undecodable("a chunk is not a zstd frame")
    flag, is_single = packed[4] >> 6, packed[4] >> 5 & 1
    width = (is_single, 2, 4, 8)[flag]
    start = 5 + (not is_single) + (0, 1, 2, 4)[packed[4] & 3]
    if not width:
        return None
    return int.from_bytes(packed[start : start + width], "little") + (256 if width == 2 else 0)


def crc32c(content: bytes | memoryview) -> int:
    """Return the CRC-32C of bytes.

    Raises:
        MissingDependency: neither google-crc32c nor crc32c is installed.
    """
    try:
        from google_crc32c import value
    except ImportError:
        try:
            from crc32c import crc32c as value  # type: ignore[import-not-found, no-redef, unused-ignore]
        except ImportError as error:
            raise _missing("google-crc32c or crc32c") from error
    return int(value(bytes(content)))


def load_numcodecs() -> tuple[Any, Any, Any]:
    """Return the modules ``blosc``, ``lz4`` and ``zstd`` of numcodecs.

    Raises:
        MissingDependency: it is not installed.
    """
    try:
        from numcodecs import blosc, lz4, zstd  # type: ignore[import-untyped, unused-ignore]
    except ImportError as error:
        raise _missing("numcodecs") from error
    blosc.use_threads = False  # as zarr does: our threads share the work, and a pool of its own would hang after a fork
    return blosc, lz4, zstd


def _missing(package: str) -> MissingDependency:
    return MissingDependency(
        f"compressed zarr chunks require {package}", hint="install it: pip install 'varstore[zarr]'"
    )
