"""Others that read Zarr open a checkpoint: xarray, dask, TensorStore."""

from __future__ import annotations

import json
import os

import ml_dtypes
import numpy as np
import pytest

import varstore as vs
from varstore.errors import UsageError
from varstore.layout.dtypes import TABLE

zarr = pytest.importorskip("zarr", minversion="3.1")

from varstore.adapters.zarr import CheckpointStore, register_data_types, tensorstore_spec  # noqa: E402

DTYPES = [row.dtype for row in TABLE if row.written]
NOT_IN_TENSORSTORE = ("float8_e4m3", "float6_e2m3fn", "float6_e3m2fn", "uint4", "uint2")


def test_dask_reads_in_threads_and_processes(tmp_path):
    dask = pytest.importorskip("dask")
    dask_array = pytest.importorskip("dask.array")
    values = np.random.default_rng(0).normal(size=(40, 500)).astype(ml_dtypes.bfloat16)
    vs.save(tmp_path / "c", {"w": values, "f": np.arange(6.0)})
    group = zarr.open_group(CheckpointStore(tmp_path / "c"), mode="r")
    for scheduler in ("threads", "processes"):
        whole, total = dask_array.from_zarr(group["w"]), dask_array.from_zarr(group["f"]).sum()
        found, fifteen = dask.compute(whole, total, scheduler=scheduler, num_workers=1)
        assert np.array_equal(found, values)
        assert fifteen == 15


def test_xarray_opens_it(tmp_path):
    xarray = pytest.importorskip("xarray")
    values = {"net/w": np.arange(6.0).reshape(2, 3), "net/w_0": np.ones(4), "net/b": np.ones(5, ml_dtypes.bfloat16)}
    vs.save(tmp_path / "c", {**values, "step": np.array(7)}, attributes={"epoch": 3})
    store = CheckpointStore(tmp_path / "c")
    for chunks in (None, {}):
        root = xarray.open_zarr(store, consolidated=False, chunks=chunks)
        assert (root.attrs, int(root["step"])) == ({"epoch": 3}, 7)
        net = xarray.open_zarr(store, group="net", consolidated=False, chunks=chunks)
        for name, array in values.items():
            assert np.array_equal(net[name.removeprefix("net/")].values.astype(float), array.astype(float))
        assert net["b"].dims == ("b_0",)
        assert net["w"].dims == ("w__0", "w__1")  # w_0 is the name of an array


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensorstore_reads_equal_values(tmp_path, dtype):
    tensorstore = pytest.importorskip("tensorstore")
    shapes = {"scalar": (), "a/w": (3, 4), "empty": (0, 2)}
    values = {name: np.random.default_rng(0).integers(0, 2, shape).astype(dtype) for name, shape in shapes.items()}
    saved = vs.save(tmp_path / "c", values, durable=False)
    for name, variable in saved.items():
        spec = json.loads(json.dumps(tensorstore_spec(variable)))
        if dtype.name in NOT_IN_TENSORSTORE:
            with pytest.raises(ValueError, match="data type"):
                tensorstore.open(spec).result()
            continue
        found = tensorstore.open(spec).result().read().result()
        assert (found.shape, found.dtype) == (shapes[name], dtype)
        assert found.tobytes() == values[name].tobytes()


def test_tensorstore_does_not_read_a_missing_file_as_zeros(tmp_path):
    tensorstore = pytest.importorskip("tensorstore")
    saved = vs.save(tmp_path / "c", {"w": np.ones((2, 3), np.float32)})
    opened = tensorstore.open(tensorstore_spec(saved["w"])).result()
    assert (opened[1].read().result() == 1).all()
    os.remove(tmp_path / "c/w/out")
    again = tensorstore.open(tensorstore_spec(saved["w"])).result()
    with pytest.raises(ValueError, match="missing"):
        again.read().result()


def test_no_spec_for_what_is_not_raw(tmp_path):
    folder = tmp_path / "c" / "w"
    folder.mkdir(parents=True)
    (folder / "meta").write_text("shape {\n  dim: 3\n}\ndata_type: kBFloat16\n")
    (folder / "out").write_bytes(np.ones(3, np.float32).tobytes())  # OneFlow's own bfloat16
    (tmp_path / "c" / "snapshot_done").touch()
    opened = vs.open(tmp_path / "c")
    with pytest.raises(UsageError, match="float32 on disk"):
        tensorstore_spec(opened["w"])
    found = zarr.open_group(CheckpointStore(opened), mode="r")["w"]
    assert found.dtype == ml_dtypes.bfloat16
    assert (found[...] == 1).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_folder_of_an_encoded_variable_is_read_equal_or_refused(tmp_path, dtype):
    """Shapes of any number of axes, with chunks that are padded, and with rows that are cut."""
    tensorstore = pytest.importorskip("tensorstore")
    register_data_types()
    rng = np.random.default_rng(list(dtype.name.encode()))
    values = {}
    for axes in (1, 2, int(rng.integers(3, 7))):
        elements = rng.uniform(66_000, 3 << 20) / dtype.itemsize + 66_000
        extents = rng.uniform(1, 9, axes)
        extents[rng.integers(axes)] *= elements / extents.prod()
        shape = tuple(np.ceil(extents).astype(int).tolist())
        values[f"w{axes}"] = rng.integers(0, 2, shape).astype(dtype)
    saved = vs.save(tmp_path / "c", values, encoding="zarr", durable=False)
    for name, array in values.items():
        assert saved[name].entry.encoding == "zarr"
        found = zarr.open_array(tmp_path / "c" / name, mode="r")
        assert np.asarray(found[...]).tobytes() == array.tobytes()
        assert np.asarray(found[-1]).tobytes() == array[-1].tobytes()
        spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{tmp_path / 'c' / name}/"}}
        if dtype.name in NOT_IN_TENSORSTORE:
            with pytest.raises(ValueError, match="data type"):
                tensorstore.open(spec).result()
            continue
        opened = tensorstore.open(spec).result()
        assert (opened.shape, opened.dtype.numpy_dtype) == (array.shape, dtype)
        assert opened.read().result().tobytes() == array.tobytes()
        assert opened[len(array) - 1].read().result().tobytes() == array[-1].tobytes()
