"""The encoding ``zarr``: what is packed is read equal by varstore, zarr and each verb, or refused, never as noise."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings, strategies as st

import varstore as vs
from varstore.cli import main
from varstore.disk.encodings import codecs
from varstore.errors import DigestMismatch, FormatError, ManifestError, MissingDependency, StorageError, UsageError
from varstore.layout import shards
from varstore.layout.dtypes import TABLE
from varstore.layout.encodings import ENCODINGS, ZARR
from varstore.layout.manifest import Manifest

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
    with pytest.raises(FormatError, match=r"c\.0\.0"):
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
    with pytest.raises(FormatError, match="does not describe"):
        vs.save(tmp_path / "next", {"w": packed["net/w"]})
    assert not (tmp_path / "next").exists()
    os.remove(Path(packed.path) / "manifest")
    with pytest.raises(FormatError, match="does not describe"):
        vs.load(packed.path)


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


@pytest.mark.parametrize("place", [0, 5000, -30, -2])
def test_damage_is_found_before_it_is_decoded(packed, place):
    out = Path(packed.path) / "net/w/out"
    data = bytearray(out.read_bytes())
    data[place] ^= 0x40
    out.chmod(0o644)
    out.write_bytes(data)
    assert not vs.verify(packed.path).ok
    for read in (lambda: vs.load(packed.path), packed["net/w"].numpy, lambda: packed["net/w"][:]):
        with pytest.raises(DigestMismatch):
            read()


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
    assert (saved["net/half"].entry.encoding, saved["bytes"].entry.encoding) == ("raw", "raw")
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
