"""Every codec that is decoded, against zarr and numcodecs, and against chunks that state more than they are."""

from __future__ import annotations

import json
import struct

import numcodecs
import numpy as np
import pytest
import zarr

import varstore as vs
from varstore.errors import FormatError, UnsafeContent

pytestmark = pytest.mark.lowest

VALUES = (np.arange(35) % 7).reshape(7, 5)
V2 = {
    "none": (None, []),
    **{name: (getattr(numcodecs, kind)(), []) for name, kind in (("zlib", "Zlib"), ("gzip", "GZip"), ("bz2", "BZ2"))},
    **{name: (getattr(numcodecs, kind)(), []) for name, kind in (("lz4", "LZ4"), ("zstd", "Zstd"), ("lzma", "LZMA"))},
    **{f"blosc {name}": (numcodecs.Blosc(name, 5, 1), []) for name in numcodecs.blosc.list_compressors()},
    "shuffle": (numcodecs.Zlib(), [numcodecs.Shuffle(4)]),
    "delta": (numcodecs.Zlib(), [numcodecs.Delta("<i4")]),
    "crc32": (None, [numcodecs.CRC32()]),
    "adler32": (numcodecs.Zlib(), [numcodecs.Adler32()]),
}


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("codec", V2)
def test_version_2(tmp_path, codec, order):
    compressor, filters = V2[codec]
    array = zarr.create_array(
        tmp_path / "x", shape=(7, 5), chunks=(3, 2), dtype="i4", order=order, compressors=compressor, filters=filters,
        zarr_format=2,
    )  # fmt: skip
    array[...] = VALUES
    assert_same(tmp_path / "x", VALUES)


V3 = {
    "bytes": {},
    "big": {"serializer": zarr.codecs.BytesCodec(endian="big")},
    "gzip": {"compressors": [zarr.codecs.GzipCodec()]},
    "blosc": {"compressors": [zarr.codecs.BloscCodec(cname="zstd")]},
    "zstd": {"compressors": [zarr.codecs.ZstdCodec(checksum=True)]},
    "crc32c": {"compressors": [zarr.codecs.ZstdCodec(), zarr.codecs.Crc32cCodec()]},
    "transpose": {"filters": [zarr.codecs.TransposeCodec(order=(1, 0))]},
    "shards": {"shards": (6, 4), "compressors": [zarr.codecs.GzipCodec()]},
    "shards at the start": {"shards": {"shape": (6, 4), "index_location": "start"}},
}


@pytest.mark.parametrize("dtype", ["i4", "f8", "?", "c8", "u1"])
@pytest.mark.parametrize("codec", V3)
def test_version_3(tmp_path, codec, dtype):
    options = {"compressors": None, **V3[codec]}
    array = zarr.create_array(tmp_path / "x", shape=(7, 5), chunks=(3, 2), dtype=dtype, **options)
    array[:5] = VALUES[:5].astype(dtype)
    expected = VALUES.astype(dtype)
    expected[5:] = 0
    assert_same(tmp_path / "x", expected)


def assert_same(path, values):
    found = vs.read(path)["(array)"].numpy()
    assert found.dtype == values.astype(found.dtype).dtype
    np.testing.assert_array_equal(found, values)
    np.testing.assert_array_equal(zarr.open_array(path, mode="r")[...], values)


FILLS = {"NaN": np.nan, "Infinity": np.inf, "-Infinity": -np.inf, "0x7fc00000": np.nan, 1.5: 1.5, 0: 0, None: 0}


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("fill", FILLS)
def test_fill_values(tmp_path, fill, version):
    array = zarr.create_array(tmp_path / "x", shape=(3,), chunks=(2,), dtype="f4", fill_value=0, zarr_format=version)
    file = tmp_path / "x" / {2: ".zarray", 3: "zarr.json"}[version]
    file.write_text(json.dumps(json.loads(file.read_text()) | {"fill_value": fill}))
    np.testing.assert_array_equal(vs.read(tmp_path / "x")["(array)"], np.full(array.shape, FILLS[fill], "f4"))


@pytest.mark.parametrize("separator", [".", "/"])
@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("shape", [(), (5,), (0, 3), (4, 4, 4)])
def test_names_of_chunks(tmp_path, shape, version, separator):
    keys = {"name": {2: "v2", 3: "default"}[version], "separator": separator}
    array = zarr.create_array(
        tmp_path / "x", shape=shape, chunks=tuple(max(1, n // 2) for n in shape), dtype="i4", zarr_format=version,
        chunk_key_encoding=keys,
    )  # fmt: skip
    values = np.arange(np.prod(shape, dtype=int), dtype="i4").reshape(shape) + 1
    array[...] = values
    np.testing.assert_array_equal(vs.read(tmp_path / "x")["(array)"].numpy(), values)


def chunk(path, compressor, data, *, filters=None):
    """Write an array of four bytes with one chunk."""
    path.mkdir()
    fields = {"zarr_format": 2, "shape": [4], "chunks": [4], "dtype": "|u1", "fill_value": 0, "order": "C"}
    (path / ".zarray").write_text(json.dumps(fields | {"compressor": compressor, "filters": filters}))
    (path / "0").write_bytes(data)
    return path


GOOD = np.frombuffer(b"abcd", "u1")
LYING = {
    "blosc that states more than it has": ("blosc", numcodecs.Blosc().encode(GOOD)[:-1]),
    "blosc of another size": ("blosc", numcodecs.Blosc().encode(np.arange(8, dtype="u1"))),
    "blosc with a block larger than itself": (
        "blosc",
        b"".join([(good := numcodecs.Blosc().encode(GOOD))[:8], struct.pack("<I", 1 << 31), good[12:]]),
    ),
    "blosc without a header": ("blosc", b"\2\1"),
    "lz4 of another size": ("lz4", numcodecs.LZ4().encode(np.arange(8, dtype="u1"))),
    "lz4 of nothing": ("lz4", b""),
    "zstd of another size": ("zstd", numcodecs.Zstd().encode(np.arange(8, dtype="u1"))),
    "zstd that is none": ("zstd", b"\0" * 20),
    "zstd that is cut": ("zstd", bytes(numcodecs.Zstd().encode(GOOD))[:-2]),
    "gzip of less": ("gzip", numcodecs.GZip().encode(GOOD[:3])),
    "gzip and more": ("gzip", bytes(numcodecs.GZip().encode(GOOD)) + b"x"),
    "gzip that is cut": ("gzip", bytes(numcodecs.GZip().encode(GOOD))[:-3]),
    "bz2 of more": ("bz2", numcodecs.BZ2().encode(np.arange(9, dtype="u1"))),
    "lzma that is none": ("lzma", b"abcd"),
    "zlib of nothing": ("zlib", b""),
    "too few bytes": (None, b"abc"),
    "too many bytes": (None, b"abcde"),
}


@pytest.mark.parametrize("name", LYING)
def test_a_chunk_that_is_not_what_it_states(tmp_path, name):
    compressor, data = LYING[name]
    path = chunk(tmp_path / "x", None if compressor is None else {"id": compressor}, data)
    with pytest.raises(FormatError, match=r"0: a chunk of the array cannot be read"):
        vs.read(path)["(array)"].numpy()


@pytest.mark.parametrize("codec", ["pickle", "json2", "msgpack2", "vlen-utf8", "categorize", "zfpy", "", "PICKLE"])
@pytest.mark.parametrize("place", ["compressor", "filters"])
def test_codecs_that_are_not_in_the_list(tmp_path, place, codec):
    options = {"compressor": None} | {place: {"id": codec} if place == "compressor" else [{"id": codec}]}
    path = chunk(tmp_path / "x", options["compressor"], b"abcd", filters=options.get("filters"))
    with pytest.raises(UnsafeContent, match="not one of those that are known to be safe"):
        vs.read(path)


def test_a_compressor_among_filters_is_refused(tmp_path):
    path = chunk(tmp_path / "x", {"id": "zlib"}, b"", filters=[{"id": "zlib"}])
    with pytest.raises(FormatError, match="compressed more than once"):
        vs.read(path)


def test_no_codec_is_looked_up_in_the_registry(tmp_path, monkeypatch):
    monkeypatch.setattr(numcodecs.registry, "get_codec", lambda *_: pytest.fail("looked up"))
    monkeypatch.setitem(numcodecs.registry.codec_registry, "zlib", None)
    path = chunk(tmp_path / "x", {"id": "zlib", "level": 1}, bytes(numcodecs.Zlib().encode(GOOD)))
    assert vs.read(path)["(array)"].numpy().tobytes() == b"abcd"
