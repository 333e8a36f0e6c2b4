"""The encoding ``zarr``: what is packed is read equal by varstore, zarr and each verb, or refused, never as noise."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import xxhash
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings, strategies as st

import varstore as vs
from varstore.cli import main
from varstore.disk.encodings import codecs
from varstore.disk.encodings.zarr import pack
from varstore.disk.read import stored
from varstore.disk.save import encoded
from varstore.errors import DigestMismatch, FormatError, ManifestError, MissingDependency, StorageError, UsageError
from varstore.layout import shards
from varstore.layout.dtypes import TABLE
from varstore.layout.encodings import ENCODINGS, ZARR
from varstore.layout.manifest import BLOCK, Manifest
from varstore.storage.directory import Directory, locate

pytest.importorskip("numcodecs")
pytestmark = pytest.mark.core

DTYPES = [row.dtype for row in TABLE if row.written]
RNG = np.random.default_rng(11)


def smooth(*shape, dtype=np.float32):
    """Values that compress."""
    return np.cumsum(RNG.integers(-1, 2, shape), axis=-1).astype(dtype)


def model():
    weight = smooth(300, 400)
    return {
        "net/w": weight,
        "net/tied": weight,
        "net/half": smooth(64, 1000, dtype=ml_dtypes.bfloat16),
        "bytes": smooth(100_000, dtype=np.int8),
        "noise": RNG.integers(0, 255, 100_000).astype(np.uint8),
        "small": np.arange(10.0),
        "above": smooth(200, 200),
        "above/below": smooth(200, 200),
        "empty": np.empty((0, 3)),
        "step": np.array(7),
    }


ENCODED = {"net/w", "net/tied", "net/half", "bytes", "above/below"}


@pytest.fixture(scope="module")
def values():
    return model()


@pytest.fixture
def packed(tmp_path, values):
    vs.save(tmp_path / "raw", values, attributes={"epoch": 3}, files={"labels.txt": b"cat"}, durable=False)
    return vs.pack(tmp_path / "raw", tmp_path / "packed", durable=False)


def require_equal(loaded, values):
    assert {*loaded} == {*values}
    for name, array in values.items():
        found = np.asarray(loaded[name])
        assert (found.shape, found.dtype) == (array.shape, array.dtype), name
        assert found.tobytes() == array.tobytes(), name


@pytest.mark.parametrize("level", ["fast", "small"])
def test_a_packed_checkpoint_is_the_same(tmp_path, values, level):
    vs.save(tmp_path / "raw", values, attributes={"epoch": 3}, files={"labels.txt": b"cat"})
    packed = vs.pack(tmp_path / "raw", tmp_path / "packed", level=level)
    assert {name for name in packed if packed[name].entry.encoding == "zarr"} == ENCODED
    assert all(packed[name].stored_nbytes < 0.97 * packed[name].nbytes for name in ENCODED)
    assert (tmp_path / "packed/small/out").samefile(tmp_path / "raw/small/out")
    assert (tmp_path / "packed/net/tied/out").samefile(tmp_path / "packed/net/w/out")
    assert packed["net/tied"].tied_to == "net/w"
    assert packed.attributes == {"epoch": 3}
    assert packed.files["labels.txt"].read() == b"cat"
    assert vs.verify(packed.path).ok
    assert vs.diff(tmp_path / "raw", packed).equal
    require_equal(vs.load(packed.path), values)
    require_equal(vs.load(packed.path, threads=1), values)
    require_equal({name: packed[name].numpy() for name in packed}, values)
    targets = {name: np.zeros_like(array) for name, array in values.items() if name != "net/tied"}
    assert vs.load_into(targets, packed.path, missing=None).loaded
    require_equal(targets, {name: values[name] for name in targets})
    unpacked = vs.unpack(packed.path, tmp_path / "unpacked")
    assert {unpacked[name].entry.encoding for name in unpacked} == {"raw"}
    assert vs.diff(tmp_path / "raw", unpacked).equal
    for name in values:
        assert (tmp_path / "unpacked" / name / "out").read_bytes() == values[name].tobytes()
        assert not (tmp_path / "unpacked" / name / "zarr.json").exists()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_array_is_read_back_and_so_is_any_slice(tmp_path, data):
    shape = tuple(data.draw(st.lists(st.integers(0, 9), max_size=4)))
    dtype = data.draw(st.sampled_from(DTYPES))
    level = data.draw(st.sampled_from(shards.LEVELS))
    array = RNG.integers(0, 2, shape).astype(dtype)
    if shape and data.draw(st.booleans()):
        array = array[..., ::-1]
    with pytest.MonkeyPatch.context() as patch:  # so that small arrays are encoded, and have many chunks
        patch.setattr(shards, "CHUNK_LIMIT", data.draw(st.integers(1, 300)))
        for place in ("varstore.disk.save.encoded", "varstore.values.plan"):
            patch.setattr(f"{place}.SMALLEST", 1)
        patch.setattr("varstore.disk.save.encoded._AT_MOST", 1e9)
        patch.setitem(ENCODINGS, "zarr", replace(ZARR, stored_dtype=lambda meta, _: meta.data_type.dtype))
        shutil.rmtree(tmp_path / "c", ignore_errors=True)
        shutil.rmtree(tmp_path / "raw", ignore_errors=True)
        vs.save(tmp_path / "raw", {"w": array}, durable=False)
        saved = vs.pack(tmp_path / "raw", tmp_path / "c", level=level, durable=False)
        assert (saved["w"].entry.encoding == "zarr") == bool(array.size)
        assert vs.load(tmp_path / "c")["w"].tobytes() == array.tobytes()
        assert vs.verify(tmp_path / "c").ok
        index = tuple(
            slice(
                *sorted(data.draw(st.tuples(st.integers(0, extent), st.integers(0, extent)))),
                data.draw(st.sampled_from([None, 2])),
            )
            for extent in shape
        )
        assert np.asarray(saved["w"][index]).tobytes() == array[index].tobytes()


@pytest.mark.parametrize("level", ["fast", "small"])
@pytest.mark.parametrize("dtype", [np.int8, np.float16, np.float32, np.float64, np.complex64, np.bool_], ids=str)
@pytest.mark.parametrize("shape", [(70_000,), (3, 577, 41), (2, 1 << 20), (1, 1, 66_000), (9, 8, 7, 6, 5, 5)], ids=str)
def test_zarr_opens_the_folder_or_raises(tmp_path, shape, dtype, level):
    zarr = pytest.importorskip("zarr", minversion="3.1")
    array = smooth(*shape).astype(dtype)
    saved = vs.pack(vs.save(tmp_path / "raw", {"w": array}, durable=False), tmp_path / "c", level=level, durable=False)
    found = zarr.open_array(tmp_path / "c" / "w", mode="r")
    assert found[...].tobytes() == array.tobytes()
    assert found[..., 3:5].tobytes() == array[..., 3:5].tobytes()
    assert saved["w"][..., 3:5].tobytes() == array[..., 3:5].tobytes()


def test_types_that_zarr_does_not_have(tmp_path):
    zarr = pytest.importorskip("zarr", minversion="3.1")
    from varstore.adapters.zarr import CheckpointStore, register_data_types

    register_data_types()
    values = {d.name: RNG.integers(0, 2, 70_000).astype(d) for d in DTYPES}
    packed = vs.save(tmp_path / "c", values, encoding="zarr", durable=False)
    group = zarr.open_group(CheckpointStore(packed), mode="r")
    for name, array in values.items():
        assert packed[name].entry.encoding == "zarr"
        assert np.asarray(zarr.open_array(tmp_path / "c" / name, mode="r")[...]).tobytes() == array.tobytes()
        assert np.asarray(group[name][...]).tobytes() == array.tobytes()


def test_a_missing_or_wrong_link_is_reported_and_sealed(tmp_path, packed):
    link = Path(packed.path) / "net/w/c.0.0"
    assert os.readlink(link) == "out"
    for target in (None, "../../small/out"):
        link.unlink(missing_ok=True)
        if target:
            link.symlink_to(target)
        report = vs.verify(packed.path)
        assert not report.ok
        assert "zarr would read zeros" in report.problems[0]
        assert CliRunner().invoke(main, ["verify", packed.path]).exit_code == 1
        vs.load(packed.path)  # does not need it
    with pytest.raises(FormatError, match=r"c\.0\.0.*[Rr]emove what has its name"):
        vs.seal(packed.path)
    link.unlink()
    vs.seal(packed.path)
    assert vs.verify(packed.path).ok
    assert vs.diff(tmp_path / "raw", packed.path).equal


def test_a_changed_document_is_not_trusted(tmp_path, packed):
    document = Path(packed.path) / "net/w/zarr.json"
    said = json.loads(document.read_text())
    said["codecs"][0]["configuration"]["codecs"][1]["configuration"]["cname"] = "zlib"
    document.chmod(0o644)
    document.write_text(json.dumps(said))
    assert "zarr.json does not describe" in vs.verify(packed.path).problems[0]
    require_equal(vs.load(packed.path), model_of(packed))
    saved = vs.save(tmp_path / "next", {"w": packed["net/w"]})
    assert saved["w"].entry.encoding == "zarr"
    assert vs.verify(saved.path).ok  # with one of its own
    os.remove(Path(packed.path) / "manifest")
    with pytest.raises(FormatError, match="does not describe"):
        vs.load(packed.path)


@pytest.mark.parametrize(
    ("was", "becomes"),
    [
        ('"zarr_format": 3', '"zarr_format": 2, "zarr_format": 3'),
        ('"clevel": 5', '"clevel": 5.0'),
        ('"blocksize": 0', '"blocksize": false'),
        ('"attributes": {}', '"attributes": ' + "[" * 100_000),
        ('"zarr_format": 3', '"zarr_format": ' + "3" * 5_000),
        ('"fill_value": "NaN"', '"fill_value": NaN'),
    ],
    ids=range(6),
)
def test_a_document_that_readers_may_take_in_two_ways_is_none_of_ours(was, becomes):
    shard = shards.Shard((300, 400), np.dtype(np.float32))
    document = shard.document("fast").decode()
    assert shard.level(document.encode()) == "fast"
    assert shard.level(json.dumps(json.loads(document)).encode()) == "fast"
    assert was in document
    assert shard.level(document.replace(was, becomes).encode()) is None


@pytest.mark.parametrize("instead", ["nothing", "a link that leads out", "a pipe", "noise"])
def test_what_is_saved_again_gets_a_document_of_its_own(tmp_path, packed, values, instead):
    packed = vs.pack(tmp_path / "raw", tmp_path / "packed", level="small", overwrite=True, durable=False)
    document = Path(packed.path) / "net/w/zarr.json"
    document.unlink()
    if instead == "a link that leads out":
        document.symlink_to("/etc/passwd")
    elif instead == "a pipe":
        os.mkfifo(document)
    elif instead == "noise":
        document.write_bytes(b"\xff" * 50)
    (problem,) = vs.verify(packed.path).problems
    assert "net/w/zarr.json" in problem
    assert vs.salvage(packed.path, tmp_path / "salvaged").ok
    vs.pack(packed, tmp_path / "again")
    vs.save(tmp_path / "based", values, base=packed)
    for name in ("salvaged", "again", "based"):
        saved = vs.open(tmp_path / name)
        assert saved["net/w"].entry.encoding == "zarr"
        assert vs.verify(saved.path).ok
        require_equal(vs.load(saved.path), values)
    zarr = pytest.importorskip("zarr", minversion="3.1")
    found = zarr.open_array(tmp_path / "again/net/w", mode="r")  # the level that it says is another
    assert found[...].tobytes() == values["net/w"].tobytes()


def rewrite(checkpoint, names, **changes):
    """Write a manifest that says something else of these variables."""
    entries = dict(checkpoint.manifest.entries)
    entries |= {name: entries[name]._replace(**changes) for name in names}
    manifest = Manifest(writer="", time_ns=0, attributes={}, tree="", entries=entries)
    path = Path(checkpoint.path) / "manifest"
    path.unlink()
    path.write_bytes(manifest.encode())
    return vs.open(checkpoint.path)


def test_sealing_adds_the_digests_of_values_that_a_manifest_lacks(packed, values):
    known = packed["net/half"].entry.content_digests
    lacking = rewrite(packed, ["net/half"], content_digests=b"")
    require_equal(vs.load(lacking), values)
    assert vs.verify(lacking.path).ok
    vs.seal(lacking.path)
    assert vs.open(lacking.path)["net/half"].entry.content_digests == known


def test_sealing_decodes_values_of_another_form(packed):
    """The digests of the values that the manifest has are those of the form that it has."""
    folder = Path(packed.path) / "bytes"
    shape = (50, 1000)
    for name, content in {
        "meta": b"shape {\n  dim: 50\n  dim: 1000\n}\ndata_type: kInt8\n",
        "zarr.json": shards.Shard(shape, np.dtype(np.int8)).document("fast"),
    }.items():
        (folder / name).unlink()
        (folder / name).write_bytes(content)
    (folder / "c.0").rename(folder / "c.0.0")
    with pytest.raises(DigestMismatch, match="states 100000 bytes instead of 50000"):
        vs.seal(packed.path)


NOWHERE = [
    (0, 1 << 63),
    (1 << 63, 100),
    ((1 << 64) - 1, (1 << 64) - 1),
    (80_000, 400_000),
    (7, 100),
    (0, 0),
    (0, 15),
    (1, 100),
]


@pytest.mark.parametrize("place", NOWHERE, ids=str)
def test_an_index_that_leads_anywhere(tmp_path, packed, values, place):
    out = Path(packed.path) / "net/half/out"
    content = np.array(place, "<u8").tobytes()
    data = out.read_bytes()[:-20] + content + codecs.crc32c(content).to_bytes(4, "little")
    out.unlink()
    out.write_bytes(data)
    digest = xxhash.xxh3_128_digest(data)
    lying = rewrite(packed, ["net/half"], digests=digest)
    for read in (
        lambda: vs.load(lying),
        lambda: vs.load(lying, verify=False),
        lambda: vs.load_into({"net/half": np.zeros_like(values["net/half"])}, lying, missing=None),
        lambda: lying["net/half"][3, 4:9],
        lambda: vs.stats(lying),
        lambda: vs.unpack(lying, tmp_path / "unpacked"),
    ):
        with pytest.raises(DigestMismatch, match="hold values that can be decoded") as caught:
            read()
        assert caught.value.path == str(out)
    assert not (tmp_path / "unpacked").exists()
    report = vs.salvage(lying, tmp_path / "salvaged")
    assert {*report.lost} == {"net/half"}
    require_equal(vs.load(tmp_path / "salvaged"), {k: v for k, v in values.items() if k != "net/half"})


def test_values_that_are_not_those_of_their_digests_are_not_salvaged(tmp_path, packed):
    lying = rewrite(packed, ["net/half"], content_digests=bytes(16))
    with pytest.raises(DigestMismatch, match="bytes 0 to 128000 of the values"):
        vs.load(lying)
    assert {*vs.salvage(lying, tmp_path / "salvaged").lost} == {"net/half"}


@settings(max_examples=120, deadline=None)
@given(data=st.data())
def test_a_damaged_chunk_fills_its_own_memory_or_none(data):
    dtype = np.dtype(data.draw(st.sampled_from(["i1", "f2", "f4", "f8"])))
    array = np.cumsum(np.random.default_rng(0).integers(-1, 2, data.draw(st.integers(1, 20_000)))).astype(dtype)
    shard = shards.Shard(array.shape, dtype)
    (packed,) = pack(array, shard, range(1), data.draw(st.sampled_from(shards.LEVELS)))
    damaged = bytearray(packed)
    for _ in range(data.draw(st.integers(1, 3))):
        limit = data.draw(st.sampled_from([24, 100, len(damaged)]))
        damaged[data.draw(st.integers(0, min(limit, len(damaged)) - 1))] = data.draw(st.integers(0, 255))
    del damaged[data.draw(st.integers(0, len(damaged)) | st.just(len(damaged))) :]
    memory = np.full(array.nbytes + 64, 0xAB, np.uint8)
    with contextlib.suppress(codecs.Undecodable):
        codecs.decompress(bytes(damaged), memory[: array.nbytes], itemsize=dtype.itemsize)
    assert (memory[array.nbytes :] == 0xAB).all()


def model_of(packed):
    return {name: packed[name].numpy() for name in packed}


def test_without_its_manifest_it_is_read_and_sealed(tmp_path, packed, values):
    before = packed.manifest.entries
    os.remove(Path(packed.path) / "manifest")
    require_equal(vs.load(packed.path), values)
    vs.seal(packed.path)
    after = vs.open(packed.path)
    for name in ENCODED:
        assert after[name].entry.content_digests == before[name].content_digests
        assert after[name].entry.encoding == "zarr"
    assert vs.verify(packed.path).ok


def flipped(out, place):
    """Flip a bit in a file."""
    with open(out, "r+b") as file:
        file.seek(place)
        (byte,) = file.read(1)
        file.seek(place)
        file.write(bytes([byte ^ 0x40]))


def chunks_of(out, count):
    """Return the stored bytes of each chunk and where they end, as F9 places them."""
    data = out.read_bytes()
    places = np.frombuffer(data[-16 * count - 4 : -4], "<u8").reshape(-1, 2).tolist()
    return [data[start : start + size] for start, size in places], [start + size for start, size in places]


@pytest.fixture
def shown(monkeypatch):
    """The compressed bytes that a decoder is given."""
    found = []

    def watched(packed, target, *, itemsize):
        found.append(bytes(packed))
        codecs.decompress(packed, target, itemsize=itemsize)

    monkeypatch.setattr("varstore.disk.encodings.zarr.decompress", watched)
    return found


def through_zarr(path):
    zarr = pytest.importorskip("zarr", minversion="3.1")
    from varstore.adapters.zarr import CheckpointStore

    return zarr.open_group(CheckpointStore(path), mode="r")["w"][2, :5]


WAYS = {
    "load": vs.load,
    "load with one thread": lambda path: vs.load(path, threads=1),
    "load_into": lambda path: vs.load_into({"w": np.empty((4, 1 << 18), np.float32)}, path),
    "load_into columns": lambda path: vs.load_into({"w": np.empty((4, 1 << 18, 2), np.float32)[..., 0]}, path),
    "load_into another type": lambda path: vs.load_into({"w": np.empty((4, 1 << 18))}, path, cast=True),
    "numpy": lambda path: vs.open(path)["w"].numpy(),
    "a slice": lambda path: vs.open(path)["w"][2, 7:9],
    "a slice of all": lambda path: vs.open(path)["w"][:],
    "mean": lambda path: vs.open(path)["w"].mean(),
    "unpack": lambda path: vs.unpack(path, path / "../unpacked", overwrite=True),
    "zarr": through_zarr,
}


@pytest.mark.parametrize("way", WAYS)
def test_damage_is_found_before_it_is_decoded(tmp_path, shown, way):
    array = smooth(4, 1 << 18)
    out = Path(vs.save(tmp_path / "c", {"w": array}, encoding="zarr", durable=False).path) / "w/out"
    out.chmod(0o644)
    chunks, ends = chunks_of(out, 4)
    for place in (*[end - len(chunk) // 2 for chunk, end in zip(chunks, ends, strict=True)], ends[-1] + 5):
        flipped(out, place)
        with pytest.raises(DigestMismatch, match="does not hold the bytes that were saved") as caught:
            WAYS[way](tmp_path / "c")
        assert caught.value.field == f"bytes 0 to {out.stat().st_size}"
        assert not vs.verify(tmp_path / "c").ok
        assert shown == []
        flipped(out, place)
    WAYS[way](tmp_path / "c")
    assert {*shown} <= {*chunks}
    assert shown


def test_blocks_are_read_once_and_no_decoder_sees_damage_in_any(tmp_path, shown, monkeypatch):
    array = RNG.standard_normal((36, 1 << 18), np.float32)
    out = Path(vs.save(tmp_path / "c", {"w": array}, encoding="zarr", durable=False).path) / "w/out"
    out.chmod(0o644)
    chunks, ends = chunks_of(out, 36)
    read, read_block = [], stored.read_block

    def counted(fd, target, offset, *, hashed):
        read.append(offset)
        return read_block(fd, target, offset, hashed=hashed)

    monkeypatch.setattr(stored, "read_block", counted)
    for threads in (1, 3):
        require_equal(vs.load(tmp_path / "c", threads=threads), {"w": array})
        assert sorted(read) == [0, BLOCK, 2 * BLOCK]
        assert sorted(shown) == sorted(chunks)
        read.clear()
        shown.clear()
    for block in range(3):
        place = min((block + 1) * BLOCK, ends[-1]) - 1  # in a chunk that goes on in the next block
        flipped(out, place)
        with pytest.raises(DigestMismatch, match=f"bytes {block * BLOCK} to"):
            vs.load(tmp_path / "c", threads=2)
        assert {*shown} <= {*chunks}
        flipped(out, place)


def test_who_reads_here_and_there_holds_few_blocks(tmp_path, monkeypatch):
    """As a rectangle does that is narrow and long: a block of each of its many chunks would fill the memory."""
    data = RNG.integers(0, 255, 10_500).astype(np.uint8)
    vs.save(tmp_path / "c", {"w": data}, durable=False)
    monkeypatch.setattr(stored, "BLOCK", 1000)
    entry = vs.open(tmp_path / "c")["w"].entry
    digests = b"".join(xxhash.xxh3_128_digest(data[start : start + 1000]) for start in range(0, 10_500, 1000))
    with Directory(locate(str(tmp_path / "c"))) as directory, directory.out(entry) as fd:
        blocks = stored._Blocks(directory, entry._replace(digests=digests))
        read, read_block = [], stored.read_block
        monkeypatch.setattr(stored, "read_block", lambda *a, **k: read.append(a[2]) or read_block(*a, **k))
        source = stored._Compared(blocks, fd)
        for start in (0, 900, 1950, 3000, 4300, 7000, 9000):
            assert bytes(source.read(10, 10_490)) == data[10_490:].tobytes()
            assert bytes(source.read(900, start)) == data[start : start + 900].tobytes()
            assert len(blocks._blocks) <= 4
        assert sorted(read) == [0, 1000, 2000, 3000, 4000, 5000, 7000, 9000, 10_000]


def test_no_chunk_is_decoded_into_more_than_its_size(packed, monkeypatch):
    """A decoder is only shown bytes that state the size of a chunk, and memory of that size."""
    shown = []
    blosc, lz4, zstd = codecs.load_numcodecs()

    class Watched:
        @staticmethod
        def decompress(source, target):
            shown.append(target.nbytes)
            return blosc.decompress(source, target)

    monkeypatch.setattr(codecs, "load_numcodecs", lambda: (Watched, lz4, zstd))
    packed["net/w"].numpy()
    assert shown == [480_000]
    bomb = blosc.compress(bytes(1 << 20), b"zstd", 9, 1, 0)
    with pytest.raises(codecs.Undecodable, match="states 1048576 bytes instead of 480000"):
        codecs.decompress(bomb, np.empty(480_000, np.uint8), itemsize=4)
    assert shown == [480_000]


def test_base_links_equal_values_in_the_encoding_that_is_wanted(tmp_path, packed, values):
    fresh = {name: array.copy() for name, array in values.items()}
    fresh["bytes"][0] += 1
    kept = vs.save(tmp_path / "kept", fresh, base=packed)
    assert (tmp_path / "kept/net/w/out").samefile(tmp_path / "packed/net/w/out")
    assert kept["bytes"].entry.encoding == "raw"
    assert os.readlink(tmp_path / "kept/net/w/c.0.0") == "out"
    raw = vs.save(tmp_path / "raw2", fresh, base=packed, encoding="raw")
    assert {raw[name].entry.encoding for name in raw} == {"raw"}
    encoded = vs.save(tmp_path / "encoded", fresh, base=tmp_path / "raw", encoding="zarr")
    assert {name for name in encoded if encoded[name].entry.encoding == "zarr"} == ENCODED
    assert (tmp_path / "encoded/small/out").samefile(tmp_path / "raw/small/out")
    for saved in (kept, raw, encoded):
        assert vs.verify(saved.path).ok
        require_equal(vs.load(saved.path), fresh)
    assert vs.diff(packed, kept).changed == {"bytes": "values"}


def test_a_base_that_goes_is_done_without(tmp_path, packed, values, monkeypatch):
    opened = vs.open(packed.path)
    os.remove(tmp_path / "packed/net/half/out")
    os.remove(tmp_path / "packed/bytes/zarr.json")
    saved = vs.save(tmp_path / "next", values, base=opened)
    assert (saved["net/half"].entry.encoding, saved["bytes"].entry.encoding) == ("raw", "zarr")
    assert saved["net/w"].entry.encoding == "zarr"
    assert vs.verify(saved.path).ok
    require_equal(vs.load(saved.path), values)


def test_overwriting_and_linking_keep_it(tmp_path, packed, values):
    vs.save(tmp_path / "packed", {**packed, "step": np.array(8)}, overwrite=True)
    again = vs.open(tmp_path / "packed")
    assert {name for name in again if again[name].entry.encoding == "zarr"} == ENCODED
    assert vs.verify(again.path).ok
    vs.pack(tmp_path / "raw", tmp_path / "packed", level="small", overwrite=True)
    assert vs.verify(again.path).ok
    vs.save(tmp_path / "packed", {"other": np.ones(3)}, overwrite=True)
    assert sorted(os.listdir(tmp_path / "packed")) == ["manifest", "other", "snapshot_done"]


def test_copies_are_linked_again(tmp_path, packed, values):
    for step in ("1", "2"):
        shutil.copytree(packed.path, tmp_path / "run" / step, symlinks=True)
    assert vs.links(tmp_path / "run").linked
    for name in values:
        assert (tmp_path / "run/1" / name / "out").samefile(tmp_path / "run/2" / name / "out") == (
            values[name].size > 0
        )
    for step in ("1", "2"):
        assert vs.verify(tmp_path / "run" / step).ok
        require_equal(vs.load(tmp_path / "run" / step), values)


def test_what_reads_raw_files_is_told(tmp_path, packed):
    with pytest.raises(UsageError, match=r"unpack\(source, target\)"):
        vs.load(packed.path, mmap=True)
    with pytest.raises(UsageError, match="manifest=False"):
        vs.save(tmp_path / "x", {"w": np.ones(3)}, encoding="zarr", manifest=False)
    plain = vs.save(tmp_path / "plain", packed, manifest=False)
    assert {plain[name].entry.encoding for name in plain} == {"raw"}
    vs.checkpoint.save(tmp_path / "flow", {"w": packed["net/w"]})
    assert vs.open(tmp_path / "flow")["w"].entry.encoding == "raw"
    with pytest.raises(ValueError, match="cannot reshape"):
        np.fromfile(tmp_path / "packed/net/w/out", "<f4").reshape(300, 400)


def test_where_there_are_no_links_nothing_is_written(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "symlink", refuse)
    with pytest.raises(StorageError, match="symbolic links"):
        vs.save(tmp_path / "c", {"w": smooth(300, 400)}, encoding="zarr")
    assert os.listdir(tmp_path) == []


def test_without_numcodecs_it_says_what_to_install(packed, monkeypatch):
    def missing():
        raise codecs._missing("numcodecs")

    monkeypatch.setattr(codecs, "load_numcodecs", missing)
    with pytest.raises(MissingDependency, match=r"varstore\[zarr\]"):
        vs.load(packed.path)
    assert vs.verify(packed.path).ok


@pytest.mark.parametrize(
    "change",
    [
        {"nbytes": 20},
        {"nbytes": 480_000},
        {"nbytes": 480_001},
        {"content_digests": b"x"},
        {"content_digests": b"x" * 32},
    ],
    ids=str,
)
def test_a_manifest_that_contradicts_itself(packed, change):
    entries = dict(packed.manifest.entries)
    entries["net/w"] = entries["net/w"]._replace(**change)
    manifest = Manifest(writer="", time_ns=0, attributes={}, tree="", entries=entries)
    with pytest.raises(ManifestError):
        dict(Manifest.decode(manifest.encode(), path="m").entries)


def test_the_command_line(tmp_path, values):
    vs.save(tmp_path / "raw", values)
    run = lambda *words: CliRunner().invoke(main, list(map(str, words)), prog_name="varstore")  # noqa: E731
    done = run("pack", "--level", "small", tmp_path / "raw", tmp_path / "packed")
    assert done.exit_code == 0, done.output
    assert "10 variables" in done.output
    assert "%" in done.output
    assert run("unpack", tmp_path / "packed", tmp_path / "again").exit_code == 0
    assert run("diff", tmp_path / "raw", tmp_path / "again").exit_code == 0
    assert run("diff", tmp_path / "raw", tmp_path / "packed").exit_code == 0
    assert run("pack", tmp_path / "raw", tmp_path / "packed").exit_code == 3
    assert run("pack", "--overwrite", tmp_path / "raw", tmp_path / "packed").exit_code == 0
    done = run("convert", tmp_path / "packed", tmp_path / "out.safetensors")
    assert done.exit_code == 0, done.output
    require_equal(vs.read(tmp_path / "out.safetensors"), values)


def test_verify_refuses_what_would_be_linked_damaged(tmp_path, packed, values):
    """Tied to what is linked, attached files: all that the new checkpoint would share with the old one."""
    run = lambda *words: CliRunner().invoke(main, list(map(str, words)), prog_name="varstore")  # noqa: E731
    for damaged in ("raw/small/out", "raw/labels.txt", "packed/net/w/out", "packed/labels.txt"):
        source, verb = (tmp_path / "raw", vs.unpack) if "raw" in damaged else (packed, vs.pack)
        os.chmod(tmp_path / damaged, 0o644)
        flipped(tmp_path / damaged, 2)
        verb(source, tmp_path / "unnoticed", durable=False)
        with pytest.raises(DigestMismatch, match=damaged.removesuffix("/out")):
            verb(source, tmp_path / "target", verify=True)
        done = run(verb.__name__, "--verify", tmp_path / damaged.partition("/")[0], tmp_path / "target")
        assert (done.exit_code, "DigestMismatch" in done.output or "bytes that were saved" in done.output) == (3, True)
        assert not (tmp_path / "target").exists()
        flipped(tmp_path / damaged, 2)
        shutil.rmtree(tmp_path / "unnoticed")
    require_equal(vs.load(vs.pack(tmp_path / "raw", tmp_path / "target", verify=True).path), values)


def test_a_thread_whose_group_another_one_writes_as_the_last_has_all_it_needs(tmp_path):
    array = smooth(20, 1 << 20, dtype=np.int16)
    directory = os.open(tmp_path, os.O_RDONLY)
    out = encoded._ShardFile("out", array, "fast", dir_fd=directory)
    lock, middle, ended = out._lock, out.shard.count // 2, []

    class Overtaken:
        """The other thread comes just after the lock is free again."""

        def __enter__(self):
            lock.acquire()

        def __exit__(self, *_):
            lock.release()
            out._lock = lock
            out.write(0, middle)
            assert out.is_written
            ended.append(out.finish(fsync=False))

    out._lock = Overtaken()
    assert out.write(middle, out.shard.count) == array.nbytes // 2
    os.close(directory)
    ((_, outcome),) = ended
    assert outcome.encoding == "zarr"
