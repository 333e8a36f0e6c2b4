"""Handles are values: they can be copied and pickled, and in another process they read the same checkpoint or say that
it was replaced."""

import copy
import gc
import multiprocessing
import os
import pickle
import shutil
import threading
from concurrent.futures import ProcessPoolExecutor

import ml_dtypes
import numpy as np
import pytest
from support import assert_same, run_python

import varstore as vs
from varstore.disk.read.checkpoint import Checkpoint, has_open_handle
from varstore.errors import CheckpointNotFound, IncompleteCheckpoint, StorageError, UsageError, VariableNotFound
from varstore.layout.dtypes import TABLE
from varstore.layout.encodings import ENCODINGS
from varstore.layout.location import Location

TIED = np.arange(4.0)
VALUES = {
    "w": np.arange(600_000, dtype=np.float32).reshape(2, -1),  # of more than one job
    "half": np.array([1.5, -2], ml_dtypes.bfloat16),
    "a/b": np.int64(7),
    "empty": np.empty((0, 3), np.int8),
    "tied": TIED,
    "tied too": TIED,
}
COPIES = {
    "pickled": lambda handle: pickle.loads(pickle.dumps(handle)),
    "pickled as of old": lambda handle: pickle.loads(pickle.dumps(handle, protocol=2)),
    "copied": copy.copy,
    "copied deeply": copy.deepcopy,
}


@pytest.fixture(params=[True, False], ids=["with manifest", "plain"])
def handle(tmp_path, request):
    about = {"attributes": {"step": 3}, "variable_attributes": {"w": {"unit": "kg"}}} if request.param else {}
    return vs.save(tmp_path / "c", VALUES, manifest=request.param, durable=False, **about)


@pytest.fixture(scope="module", params=["fork", "spawn"])
def pool(request):
    with ProcessPoolExecutor(1, multiprocessing.get_context(request.param)) as pool:
        yield pool


def everything(checkpoint):
    return {name: variable.numpy() for name, variable in checkpoint.items()}


def row(variable):
    return variable[1]


@pytest.mark.parametrize("how", COPIES)
def test_copies_are_the_same(handle, how):
    other = COPIES[how](handle)
    assert other is not handle
    assert (other.names, other.nbytes, other.tree) == (handle.names, handle.nbytes, handle.tree)
    assert other.attributes == handle.attributes
    assert os.path.samefile(other.path, handle.path)
    assert other.location == handle.location
    for name, variable in handle.items():
        for found in (other[name], COPIES[how](variable)):
            assert (found.name, found.shape, found.dtype) == (name, variable.shape, variable.dtype)
            assert (found.entry, found.attributes, found.digests) == (
                variable.entry,
                variable.attributes,
                variable.digests,
            )
            assert_same(found.numpy(), np.asarray(VALUES[name]))
            assert found.location == variable.location
    with pytest.raises(TypeError):
        other["w"].attributes["unit"] = "g"
    assert vs.load(other).keys() == VALUES.keys()


@pytest.mark.parametrize("how", COPIES)
def test_the_copy_of_a_closed_handle_is_closed(handle, how):
    handle.close()
    other = COPIES[how](handle)
    assert other.closed
    with pytest.raises(UsageError, match="closed"):
        other["w"]


def test_a_copy_is_closed_alone(handle):
    copy.copy(handle).close()
    assert not handle.closed


def test_what_is_salvaged_travels(tmp_path):
    vs.save(tmp_path / "c", VALUES, durable=False)
    (tmp_path / "c" / "snapshot_done").unlink()
    (tmp_path / "c" / "w" / "out").unlink()
    other = pickle.loads(pickle.dumps(vs.open(tmp_path / "c", allow_incomplete=True)))
    assert set(other.damaged) == {"w"}
    assert set(other) == VALUES.keys() - {"w"}
    assert_same(other["half"].numpy(), VALUES["half"])
    with pytest.raises(VariableNotFound, match="is incomplete"):
        other["w"]


def test_another_process_reads(handle, pool):
    for name, values in pool.submit(everything, handle).result().items():
        assert_same(values, np.asarray(VALUES[name]))
    assert_same(pool.submit(row, handle["w"]).result(), VALUES["w"][1])


def test_another_process_says_that_the_checkpoint_was_replaced(handle, pool):
    variable = handle["w"]
    vs.save(handle.path, {"w": np.ones((3, 3))}, overwrite=True, manifest=handle.manifest is not None)
    for use, given in ((everything, handle), (row, variable)):
        with pytest.raises(StorageError, match=r"replaced since it was opened\. Open it again"):
            pool.submit(use, given).result()
    shutil.rmtree(handle.path)
    with pytest.raises(CheckpointNotFound, match="no checkpoint here"):
        pool.submit(everything, handle).result()
    vs.save(handle.path, VALUES, durable=False, manifest=handle.manifest is not None)
    assert pool.submit(len, vs.open(handle.path)).result() == len(VALUES)


def test_unpickling_reads_nothing(handle):
    """What fails while a pool's worker unpickles its task ends the worker, and nobody is told."""
    pickled = pickle.dumps([handle, handle["w"]])
    shutil.rmtree(handle.path)
    checkpoint, variable = pickle.loads(pickled)
    for use in (lambda: list(checkpoint), lambda: checkpoint.attributes, variable.numpy):
        with pytest.raises(CheckpointNotFound):
            use()


def test_a_checkpoint_without_marker_is_not_opened_elsewhere(handle):
    other = pickle.loads(pickle.dumps(handle))
    os.unlink(os.path.join(handle.path, "snapshot_done"))
    with pytest.raises((IncompleteCheckpoint, StorageError)):
        list(other)


def test_a_pickle_of_a_checkpoint_is_small(tmp_path):
    many = vs.save(tmp_path / "c", {f"v{i}": np.ones(3) for i in range(300)}, durable=False)
    assert len(pickle.dumps(many)) < 500
    assert len(pickle.dumps(many["v7"])) < 1000


def test_a_signal_handler_may_open_what_is_looked_for(tmp_path, monkeypatch):
    """At each step of `has_open_handle`, as a signal handler could: nothing waits for what the other code holds."""
    handle = vs.save(tmp_path / "c", VALUES, durable=False)
    real = os.path.realpath
    opened = []

    def interrupted(path):
        opened.append(Checkpoint(handle.location, None))
        return real(path)

    monkeypatch.setattr(os.path, "realpath", interrupted)
    found = []
    thread = threading.Thread(target=lambda: found.append(has_open_handle(tmp_path / "c")), daemon=True)
    thread.start()
    thread.join(20)
    assert found == [True]
    assert opened


def test_handles_that_are_gone_are_not_read(tmp_path):
    handle = vs.save(tmp_path / "c", VALUES, durable=False)
    other = vs.open(tmp_path / "c")
    handle.close()
    assert has_open_handle(tmp_path / "c")
    del other
    gc.collect()
    assert not has_open_handle(tmp_path / "c")


def test_a_relative_path_is_found_from_elsewhere(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    handle = vs.save("c", VALUES, durable=False)
    assert (handle.path, handle["a/b"].path) == ("c", "c/a/b")
    (tmp_path / "pickled").write_bytes(pickle.dumps([handle, handle["a/b"]]))
    code = """if True:
        import os, pickle, sys
        os.chdir(sys.argv[1])
        handle, variable = pickle.load(open("../pickled", "rb"))
        print(int(handle["a/b"].numpy()), int(variable[()]), handle.path, os.path.exists(variable.path))
    """
    assert run_python(code, tmp_path / "elsewhere").stdout.split() == ["7", "7", str(tmp_path / "c"), "True"]


def test_the_same_bytes_are_the_same_checkpoint(tmp_path):
    """A checkpoint that was moved away and copied back has another inode, and is what it was."""
    handle = vs.save(tmp_path / "c", VALUES, durable=False)
    os.rename(tmp_path / "c", tmp_path / "d")
    shutil.copytree(tmp_path / "d", tmp_path / "c")
    assert not handle.is_replaced
    assert_same(handle["w"].numpy(), VALUES["w"])


def test_a_seal_is_noticed(tmp_path):
    """The digests that the handle knows are no longer those of the checkpoint."""
    handle = vs.save(tmp_path / "c", VALUES, durable=False)
    plain = vs.save(tmp_path / "d", VALUES, durable=False, manifest=False)
    for opened in (handle, plain):
        vs.seal(opened.path)
    with pytest.raises(StorageError, match="replaced"):
        handle["w"].numpy()
    assert_same(plain["w"].numpy(), VALUES["w"])  # it knew none


@pytest.mark.parametrize("damage", ["gone", "torn", "a folder"])
def test_a_manifest_that_goes_is_a_replacement(tmp_path, damage):
    handle = vs.save(tmp_path / "c", VALUES, durable=False)
    manifest = tmp_path / "c" / "manifest"
    data = manifest.read_bytes()
    manifest.unlink()
    if damage == "torn":
        manifest.write_bytes(data[:30])
    elif damage == "a folder":
        manifest.mkdir()
    with pytest.raises(StorageError, match="replaced"):
        handle["w"].numpy()
    assert handle.is_replaced


def test_rows_of_tables_stay_themselves():
    for row_ in (*TABLE, *ENCODINGS.values()):
        assert pickle.loads(pickle.dumps(row_)) is row_
        assert copy.deepcopy(row_) is row_
    location = Location("c", "/x/c", b"d" * 16)
    assert pickle.loads(pickle.dumps(location)) == location
    assert hash(pickle.loads(pickle.dumps(location))) == hash(location)
    assert location != Location("c", "/x/c", b"e" * 16)


def test_state_that_was_read_travels(tmp_path):
    state = {"model": {"w": VALUES["w"]}, "epoch": 3, "pair": (VALUES["half"], None)}
    vs.save_state(tmp_path / "c", state)
    opened = pickle.loads(pickle.dumps(vs.read(tmp_path / "c")))
    assert vs.load_state(opened)["epoch"] == 3
    assert_same(vs.load_state(opened)["model"]["w"], VALUES["w"])


@pytest.mark.parametrize("scheduler", ["processes", "threads"])
def test_dask_reads_parts_of_a_variable(handle, scheduler):
    dask_array = pytest.importorskip("dask.array")
    lazy = dask_array.from_array(handle["w"], chunks=(1, 50_000))
    assert lazy.shape == VALUES["w"].shape
    found = (lazy[:, 10:20] * 2).compute(scheduler=scheduler)
    assert_same(found, VALUES["w"][:, 10:20] * 2)
