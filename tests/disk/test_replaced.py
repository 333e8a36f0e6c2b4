"""Reading while another process saves to the same path with overwrite=True: the old values or the new, never a mix."""

import os
import shutil
import subprocess
import sys

import numpy as np
import pytest

import varstore as vs
from varstore.errors import InvalidName, StorageError
from varstore.values.lazy import LazyArray

WRITER = """
import sys
import numpy as np
import varstore as vs
path = sys.argv[1]
print("ready", flush=True)
for round_ in range(1, 10_000):
    values = {f"v{i}": np.full(2000, round_ % 2, np.int64) for i in range(40)}
    vs.save(path, values, overwrite=True, durable=False, manifest=sys.argv[2] == "True")
    if sys.stdin in __import__("select").select([sys.stdin], [], [], 0)[0]:
        break
"""


def saved(round_):
    return {f"v{i}": np.full(2000, round_, np.int64) for i in range(40)}


@pytest.mark.parametrize("manifest", [True, False])
def test_loading_by_path_goes_on(tmp_path, manifest):
    path = tmp_path / "ckpt"
    vs.save(path, saved(0), manifest=manifest)
    targets = saved(7)
    command = [sys.executable, "-c", WRITER, path, str(manifest)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as writer:
        writer.stdout.readline()
        try:
            for _ in range(25):
                loaded = vs.load(path)
                assert len(loaded) == 40
                if manifest:  # without digests an instant's mixture of equally long files cannot be told
                    assert len({int(values[0]) for values in loaded.values()}) == 1
                assert len(vs.load_into(targets, path).loaded) == 40
        finally:
            writer.communicate("stop\n", timeout=60)
    assert writer.returncode == 0


def test_an_old_handle_says_that_it_is_old(tmp_path):
    path = tmp_path / "ckpt"
    handle = vs.save(path, saved(0))
    assert not handle.is_replaced
    vs.save(path, {"other": np.ones(3)}, overwrite=True)
    assert handle.is_replaced
    with pytest.raises(StorageError, match=r"replaced since it was opened\. Open it again"):
        vs.load(handle)
    assert list(vs.load(path)) == ["other"]


@pytest.mark.parametrize("manifest", [True, False])
def test_an_old_handle_gives_no_new_values_and_links_none(tmp_path, manifest):
    path = tmp_path / "ckpt"
    handle = vs.save(path, saved(0), manifest=manifest)
    variable = handle["v3"]
    vs.save(path, saved(1), overwrite=True, manifest=manifest)
    uses = {
        "numpy": variable.numpy,
        "slice": lambda: variable[3:5],
        "map": lambda: variable.numpy(mmap=True),
        "select": lambda: vs.save(tmp_path / "copy", handle.select()),
        "into": lambda: vs.load_into(saved(7), handle),
    }
    for use in uses.values():
        with pytest.raises(StorageError, match="replaced since it was opened"):
            use()
    assert os.listdir(tmp_path) == ["ckpt"]
    assert vs.verify(path).ok


@pytest.mark.parametrize("durable", [True, False])
@pytest.mark.parametrize("fate", ["replaced", "gone", "a file gone", "a file cut"])
def test_what_a_base_no_longer_has_is_written(tmp_path, fate, durable):
    handle = vs.save(tmp_path / "base", saved(0) | {"big": np.zeros(3 << 20, np.uint8)})
    if fate == "replaced":
        vs.save(tmp_path / "base", saved(1), overwrite=True)
    elif fate == "gone":
        shutil.rmtree(tmp_path / "base")
    elif fate == "a file gone":
        (tmp_path / "base" / "v3" / "out").unlink()
        (tmp_path / "base" / "big" / "out").unlink()
    else:
        os.truncate(tmp_path / "base" / "v3" / "out", 3)
    values = saved(0) | {"big": np.zeros(3 << 20, np.uint8)}
    late = LazyArray((3 << 20,), np.dtype(np.uint8), lambda: np.zeros(3 << 20, np.uint8))
    vs.save(tmp_path / "copy", values | {"big": late}, base=handle, durable=durable)
    assert vs.verify(tmp_path / "copy").ok
    for name, value in vs.load(tmp_path / "copy").items():
        np.testing.assert_array_equal(value, values[name])


def test_a_failed_save_takes_back_the_folders_that_it_made(tmp_path):
    handle = vs.save(tmp_path / "ckpt", saved(0))
    vs.save(tmp_path / "ckpt", saved(1), overwrite=True)
    with pytest.raises(StorageError):
        vs.save(tmp_path / "a" / "b" / "copy", handle.select())
    assert os.listdir(tmp_path) == ["ckpt"]


def test_a_name_too_long_to_stage_is_refused_first(tmp_path):
    with pytest.raises(InvalidName, match="too long to stage a save beside it: found 250 bytes, expected at most 236"):
        vs.save(tmp_path / ("n" * 250), saved(0))
    assert os.listdir(tmp_path) == []


def test_one_row_of_an_enormous_row_is_read_alone(tmp_path):
    values = np.arange(4 << 20, dtype=np.float32).reshape(2, 1 << 10, 1 << 11)
    variable = vs.save(tmp_path / "ckpt", {"v": values}, durable=False)["v"]
    before = read_bytes()
    np.testing.assert_array_equal(variable[1, 5:9], values[1, 5:9])
    assert variable[1, 5, 7] == values[1, 5, 7]
    np.testing.assert_array_equal(variable[-1, ..., 3], values[-1, ..., 3])
    assert variable[1, 5:9].base.nbytes == values[1, 5:9].nbytes
    assert read_bytes() - before < 12 << 20


def read_bytes():
    with open("/proc/self/io") as counters:
        return int(counters.readline().split()[1])
