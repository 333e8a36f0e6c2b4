"""What vs.read returns, and its arrays, go to another process; it reads the same file or says that it was replaced."""

import copy
import os
import pickle
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
import pytest

import varstore as vs
from varstore.formats import safetensors
from varstore.values.lazy import LazyArray

pytestmark = pytest.mark.core

VALUES = {"a/w": np.arange(12, dtype=np.float32).reshape(3, 4), "a/b": np.arange(3)}
SUFFIXES = ["safetensors", "npz", "pt", "of", "pdparams", "mge", "ckpt"]


@pytest.fixture(scope="module")
def pool():
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as executor:
        yield executor


def rows(array, index):
    return type(array).__name__, array.name, np.asarray(array[index]).tolist()


def tensors(opened):
    return {name: opened[name].numpy() for name in opened}


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_another_process_reads_the_same(tmp_path, pool, monkeypatch, suffix):
    monkeypatch.chdir(tmp_path)
    vs.write(f"x.{suffix}", VALUES)
    opened = vs.read(f"x.{suffix}")
    monkeypatch.chdir("/")
    assert pool.submit(rows, opened["a/w"], 1).result() == ("LazyArray", "a/w", [4, 5, 6, 7])
    found = pool.submit(tensors, opened).result()
    assert list(found) == list(opened)
    assert all(np.array_equal(found[name], values) for name, values in VALUES.items())


def test_what_is_pickled_together_is_opened_once(tmp_path, monkeypatch):
    vs.write(tmp_path / "x.safetensors", VALUES)
    opened = vs.read(tmp_path / "x.safetensors")
    raw = pickle.dumps((opened, [opened[name] for name in opened]))
    times = []
    read = safetensors.read
    monkeypatch.setattr(safetensors, "read", lambda path: times.append(1) or read(path))
    other, arrays = pickle.loads(raw)
    assert [(array.name, array.shape, array.dtype) for array in arrays] == [
        (n, a.shape, a.dtype) for n, a in opened.items()
    ]
    assert (other.path, other.format, other.attributes) == (opened.path, "safetensors", {"format": "pt"})
    assert not times
    assert all(np.array_equal(array, VALUES[array.name]) for array in arrays)
    assert [np.array_equal(other.state()[name], values) for name, values in VALUES.items()] == [True, True]
    assert len(times) == 1
    assert len(pickle.dumps(opened["a/w"])) < 600
    assert pickle.loads(pickle.dumps(pickle.loads(pickle.dumps(other["a/b"])))).tolist() == [0, 1, 2]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_that_was_replaced_is_told(tmp_path, pool, suffix):
    path = tmp_path / f"x.{suffix}"
    vs.write(path, VALUES)
    opened = vs.read(path)
    raw = pickle.dumps(opened["a/w"])
    if path.is_dir():
        path = path / "pickled_data"
    held = path.read_bytes()
    os.rename(path, tmp_path / "old")
    with pytest.raises(vs.errors.StorageError, match=r"was replaced after it was opened\. Open it again"):
        pickle.loads(raw).numpy()
    path.write_bytes(held)
    with pytest.raises(vs.errors.StorageError, match="was replaced"):
        pool.submit(rows, opened["a/w"], 1).result()
    with pytest.raises(vs.errors.StorageError, match="was replaced"):
        pool.submit(tensors, opened).result()


def test_every_shard_of_a_model_is_compared(tmp_path):
    path = tmp_path / "m.safetensors.index.json"
    vs.write(path, VALUES, shard_bytes=20)
    raw = pickle.dumps(vs.read(path))
    shard = tmp_path / "m-00002-of-00002.safetensors"
    os.utime(shard, ns=(1, 1))
    with pytest.raises(vs.errors.StorageError, match="00002-of-00002"):
        list(pickle.loads(raw))


def test_options_are_kept(tmp_path):
    pytest.importorskip("cryptography")
    vs.write(tmp_path / "x.ckpt", VALUES)
    opened = vs.read(tmp_path / "x.ckpt", crc_check=True)
    assert pickle.loads(pickle.dumps(opened))["a/b"].tolist() == [0, 1, 2]
    assert opened.origin.reopen.args[2] == {"crc_check": True}


def test_copies_are_the_handle_itself(tmp_path):
    vs.write(tmp_path / "x.npz", VALUES)
    opened = vs.read(tmp_path / "x.npz")
    for handle in (opened, opened["a/w"]):
        assert copy.copy(handle) is handle
        assert copy.deepcopy(handle) is handle
        assert {handle: 1}[handle] == 1
    assert opened != vs.read(tmp_path / "x.npz")
    nested = copy.deepcopy({"weights": [opened["a/w"]]})
    assert nested["weights"][0] is opened["a/w"]


def test_an_array_of_no_file_takes_its_values_along():
    made = LazyArray((3,), np.dtype(int), lambda: np.arange(3), {"scale": 2.0}, name="x")
    other = pickle.loads(pickle.dumps(made))
    assert (other.name, other.attributes, other.tolist()) == ("x", {"scale": 2.0}, [0, 1, 2])
    other.numpy()[:] = 9
    assert other.tolist() == [0, 1, 2]


def test_a_file_that_its_module_opened_cannot_be_pickled(tmp_path):
    vs.write(tmp_path / "x.safetensors", VALUES)
    opened = safetensors.read(str(tmp_path / "x.safetensors"))
    with pytest.raises(TypeError, match=r"only what varstore\.read returned"):
        pickle.dumps(opened)
