"""A checkpoint as a Zarr group. zarr's own store in memory is the oracle."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import pickle
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import varstore as vs
from varstore.errors import DigestMismatch, FormatError, StorageError, UsageError, VarstoreError
from varstore.layout.dtypes import TABLE

zarr = pytest.importorskip("zarr")
pytestmark = pytest.mark.core

HAS_DATA_TYPES = importlib.util.find_spec("zarr.dtype") is not None
needs_data_types = pytest.mark.skipif(
    not HAS_DATA_TYPES, reason="zarr before 3.1 takes no data types; see the last test"
)
DTYPES = [row.dtype for row in TABLE if row.written]

if HAS_DATA_TYPES:
    from zarr.abc.store import OffsetByteRequest, RangeByteRequest, SuffixByteRequest
    from zarr.core.buffer import default_buffer_prototype

    from varstore.adapters.zarr import CheckpointStore, data_types, register_data_types, store as implementation


def values_of_all_types():
    rng = np.random.default_rng(3)
    values = {}
    for dtype in DTYPES:
        bits = rng.integers(0, 2, (5, 7)) if dtype.itemsize == 1 else rng.integers(-1, 3, (5, 7))
        values[f"types/{dtype.name}"] = bits.astype(dtype)
    return {
        **values,
        "scalar": np.array(2.5),
        "empty": np.empty((0, 3), np.int16),
        "flat": rng.normal(size=1000),
        "deep/er/w": rng.normal(size=(3, 1, 40)).astype(np.float32),
        "zeros": np.zeros((4, 4), np.float32),
    }


LOOP = asyncio.Runner()


def answer(question):
    """Run one of zarr's questions to its end."""

    async def ask():
        return [item async for item in question] if hasattr(question, "__aiter__") else await question

    return LOOP.run(ask())


def content(store, key, part=None):
    found = answer(store.get(key, default_buffer_prototype(), part))
    return None if found is None else found.to_bytes()


def described(document):
    """Return what a zarr.json says; some writers leave out what is empty."""
    return {name: said for name, said in json.loads(document).items() if said not in ([], None, ())}


@needs_data_types
def test_each_question_gets_the_answer_of_zarrs_own_store(tmp_path, monkeypatch):
    monkeypatch.setattr(implementation, "_AT_MOST", 300)
    values = values_of_all_types()
    saved = vs.save(tmp_path / "c", values, attributes={"epoch": 3, "of": [1, {"two": None}]})
    store, oracle = CheckpointStore(saved), zarr.storage.MemoryStore()
    theirs = zarr.open_group(oracle, mode="w", attributes=dict(saved.attributes))
    for name, array in values.items():
        document = json.loads(content(store, f"{name}/zarr.json"))
        for depth in range(1, name.count("/") + 1):
            theirs.require_group("/".join(name.split("/")[:depth]))
        theirs.create_array(
            name,
            shape=array.shape,
            dtype=array.dtype,
            chunks=tuple(document["chunk_grid"]["configuration"]["chunk_shape"]),
            compressors=None,
            fill_value=np.asarray(0).astype(array.dtype)[()],
            config={"write_empty_chunks": True},
            dimension_names=document["dimension_names"],
        )[...] = array
    keys = sorted(answer(oracle.list()))
    assert sorted(answer(store.list())) == keys
    assert len(keys) > 100
    prefixes = (
        {key[:size] for key in keys for size in range(0, len(key) + 1, 3)}
        | {*keys}
        | {"no", "flat/c/9999", "scalar/c/0"}
    )
    for prefix in prefixes:
        assert sorted(answer(store.list_prefix(prefix))) == sorted(answer(oracle.list_prefix(prefix))), prefix
        assert sorted(answer(store.list_dir(prefix))) == sorted(answer(oracle.list_dir(prefix))), prefix
        assert answer(store.is_empty(prefix)) == answer(oracle.is_empty(prefix)), prefix
        assert answer(store.exists(prefix)) == answer(oracle.exists(prefix)), prefix
        assert (content(store, prefix) is None) == (content(oracle, prefix) is None), prefix
    parts = [None, RangeByteRequest(1, 5), OffsetByteRequest(3), SuffixByteRequest(2), SuffixByteRequest(10**6)]
    for key in keys:
        if key.endswith("zarr.json"):
            ours, other = described(content(store, key)), described(content(oracle, key))
            ours.pop("fill_value", None), other.pop("fill_value", None)
            assert ours == other, key
            continue
        for part in parts:
            assert content(store, key, part) == content(oracle, key, part), (key, part)
        assert answer(store.getsize(key)) == answer(oracle.getsize(key))
    asked = [(key, part) for key in keys if not key.endswith(".json") for part in parts] + [("no", None)]
    found, expected = (answer(each.get_partial_values(default_buffer_prototype(), asked)) for each in (store, oracle))
    assert [part and part.to_bytes() for part in found] == [part and part.to_bytes() for part in expected]


@needs_data_types
@pytest.mark.parametrize("limit", [40, 16 << 20])
def test_values_and_slices(tmp_path, monkeypatch, limit):
    monkeypatch.setattr(implementation, "_AT_MOST", limit)
    values = values_of_all_types()
    vs.save(tmp_path / "c", values, attributes={"epoch": 3})
    group = zarr.open_group(CheckpointStore(tmp_path / "c"), mode="r")
    assert group.attrs["epoch"] == 3
    for name, array in values.items():
        found = group[name]
        assert (found.shape, found.dtype) == (array.shape, array.dtype)
        assert np.asarray(found[...]).tobytes() == array.tobytes(), name
        if array.ndim == 2:
            assert np.asarray(found[1:4, 2::2]).tobytes() == array[1:4, 2::2].tobytes(), name


@needs_data_types
def test_names_that_zarr_would_change(tmp_path):
    names = ["a\\b", "a\\b/below", "a", "a/b", "a/b/c", "x:y", "__init", "x/..", "100%", "ü/é", " s", "c/0", "a/c/0"]
    values = {name: np.full(2, number) for number, name in enumerate(names)}
    vs.save(tmp_path / "c", values)
    if any(name.startswith("__") for name in names):
        with pytest.raises(UsageError, match="reserves"):
            zarr.open_group(CheckpointStore(tmp_path / "c"), mode="r")
        vs.save(tmp_path / "d", vs.open(tmp_path / "c").select(exclude="__init"))  # what the hint says
    group = zarr.open_group(CheckpointStore(tmp_path / "d"), mode="r")
    arrays = {path: node for path, node in group.members(max_depth=None) if isinstance(node, zarr.Array)}
    assert {"a", "x:y", "100%", "ü/é", "c/0", "a%2Fb", "a%2Fb%2Fc", "a%2Fc%2F0"} <= {*arrays}
    found = {node.attrs.get("varstore_name", path): node[0] for path, node in arrays.items()}
    assert found == {name: number for number, name in enumerate(names) if name != "__init"}


@needs_data_types
def test_names_that_meet_are_refused(tmp_path):
    vs.save(tmp_path / "c", {"a": np.ones(1), "a/b": np.ones(1), "a%2Fb": np.ones(1)})
    with pytest.raises(UsageError, match="no free path"):
        zarr.open_group(CheckpointStore(tmp_path / "c"), mode="r")


@needs_data_types
@pytest.mark.parametrize(
    "key",
    ["", "/", "manifest", "snapshot_done", "w/out", "w/meta", "../c/w/out", "w/../w/zarr.json", "w/c", "w/c/01",
     "w/c/1", "w/c/0/0", "w/c/-1", "w/c/0/", "/w/zarr.json", "w//zarr.json", "w/c/\u0660", "w\\zarr.json"],
)  # fmt: skip
def test_other_keys_do_not_exist(tmp_path, key):
    vs.save(tmp_path / "c", {"w": np.ones(3)})
    store = CheckpointStore(tmp_path / "c")
    assert content(store, key) is None
    assert not answer(store.exists(key))


@needs_data_types
def test_it_is_read_only(tmp_path):
    vs.save(tmp_path / "c", {"w": np.ones(3)})
    store = CheckpointStore(tmp_path / "c")
    for mode in ("r+", "a", "w"):
        with pytest.raises(ValueError, match=r"read.only"):
            zarr.open_group(store, mode=mode)["w"][0] = 3
    assert vs.verify(tmp_path / "c").ok


@needs_data_types
def test_damage_comes_through(tmp_path):
    vs.save(tmp_path / "c", {"w": np.ones(1000), "v": np.ones(3)})
    group = zarr.open_group(CheckpointStore(tmp_path / "c"), mode="r")
    for name, damage in {"w": b"x" * 8000, "v": None}.items():
        out = tmp_path / "c" / name / "out"
        out.unlink()
        if damage:
            out.write_bytes(damage)
    with pytest.raises(DigestMismatch):
        group["w"][3]
    with pytest.raises(FormatError):
        group["v"][...]


@needs_data_types
def test_a_replaced_checkpoint_is_not_mixed_in(tmp_path):
    vs.save(tmp_path / "c", {"w": np.ones(3)})
    store = CheckpointStore(tmp_path / "c")
    copy = pickle.loads(pickle.dumps(store))
    assert copy == store
    assert zarr.open_group(copy, mode="r")["w"][0] == 1
    vs.save(tmp_path / "c", {"w": np.zeros(3)}, overwrite=True)
    for old in (store, pickle.loads(pickle.dumps(store))):
        with pytest.raises(StorageError, match="replaced"):
            zarr.open_group(old, mode="r")["w"][0]
    assert CheckpointStore(tmp_path / "c") != store


@needs_data_types
def test_a_slice_reads_the_blocks_that_it_needs(tmp_path):
    vs.save(tmp_path / "c", {"w": np.zeros((50, 1 << 20), np.int16)}, durable=False)
    array = zarr.open_group(CheckpointStore(tmp_path / "c"), mode="r")["w"]
    before = bytes_read()
    assert not array[33, 5:50].any()
    assert bytes_read() - before < 40 << 20


def bytes_read():
    return int(Path("/proc/self/io").read_text().split()[1])


def type_of_another_package(key):
    class Theirs(data_types.ZDType, data_types.HasItemSize):
        dtype_cls, _zarr_v3_name = type(np.dtype(ml_dtypes.bfloat16)), key
        __slots__ = ()
        item_size = 2

        @classmethod
        def from_native_dtype(cls, dtype):
            if not cls._check_native_dtype(dtype):
                raise data_types.DataTypeValidationError("no")
            return cls()

        def to_native_dtype(self):
            return np.dtype(ml_dtypes.bfloat16)

        @classmethod
        def _from_json_v2(cls, data):
            raise data_types.DataTypeValidationError("no")

        @classmethod
        def _from_json_v3(cls, data):
            if data != key:
                raise data_types.DataTypeValidationError("no")
            return cls()

        def to_json(self, zarr_format):
            return key

        def _check_scalar(self, data):
            return True

        def cast_scalar(self, data):
            return np.asarray(data).astype(ml_dtypes.bfloat16)[()]

        def default_scalar(self):
            return self.cast_scalar(0)

        def from_json_scalar(self, data, *, zarr_format):
            return self.cast_scalar(float(data))

        def to_json_scalar(self, data, *, zarr_format):
            return str(float(data))

    return Theirs


@pytest.fixture
def registry():
    """zarr's data types as they are without varstore's."""
    contents = zarr.dtype.data_type_registry.contents
    before = dict(contents)
    for name in data_types._CLASSES:
        contents.pop(name, None)
    yield zarr.dtype.data_type_registry
    contents.clear()
    contents.update(before)


@needs_data_types
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("key", ["bfloat16", "other.bfloat16"])
def test_beside_another_package_that_has_bfloat16(tmp_path, registry, key, when):
    theirs = type_of_another_package(key)
    if when == "after":
        register_data_types()
    registry.register(key, theirs)
    vs.save(tmp_path / "c", {"w": np.ones(3, ml_dtypes.bfloat16)})
    found = zarr.open_group(CheckpointStore(tmp_path / "c"), mode="r")["w"]
    assert found.dtype == ml_dtypes.bfloat16
    assert (found[...] == 1).all()
    made = zarr.create_array({}, shape=(2,), dtype=ml_dtypes.bfloat16)
    assert type(made.metadata.data_type) is theirs


def has(dtype, number):
    """Return whether a type has a number that is not finite."""
    if "int" in dtype.name:
        return False
    with np.errstate(invalid="ignore"):
        every = np.arange(1 << 8 * dtype.itemsize, dtype=f"u{dtype.itemsize}").view(dtype).astype(float)
    return bool(np.isnan(every).any() if np.isnan(number) else (every == number).any())


@needs_data_types
@pytest.mark.parametrize("dtype", [d for d in DTYPES if d.type.__module__ != "numpy"], ids=str)
def test_arrays_of_added_types_are_written_and_read_by_zarr(tmp_path, dtype):
    register_data_types()
    values = np.random.default_rng(0).integers(0, 2, 20).astype(dtype)
    kind = zarr.core.dtype.get_data_type_from_json(dtype.name, zarr_format=3)
    for fill in ("NaN", "Infinity", "-Infinity", 1, "0x01"):
        if isinstance(fill, str) and "0x" not in fill and not has(dtype, float(fill)):
            with pytest.raises(ValueError, match="does not have"):
                kind.from_json_scalar(fill, zarr_format=3)
            continue
        scalar = kind.from_json_scalar(fill, zarr_format=3)
        again = kind.from_json_scalar(kind.to_json_scalar(scalar, zarr_format=3), zarr_format=3)
        assert again.tobytes() == scalar.tobytes() or again != again
    zarr.create_array(tmp_path / "z", data=values, fill_value=0)
    found = zarr.open_array(tmp_path / "z", mode="r")
    assert pickle.loads(pickle.dumps(found))[...].tobytes() == values.tobytes()
    assert pickle.loads(pickle.dumps(kind)) == kind


@pytest.mark.skipif(HAS_DATA_TYPES, reason="for zarr before 3.1")
def test_an_older_zarr_is_named():
    with pytest.raises(VarstoreError, match="newer"):
        importlib.import_module("varstore.adapters.zarr")
