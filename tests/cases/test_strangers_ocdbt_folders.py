"""Folders of Orbax in OCDBT, whose data files are pipes or links, or whose arrays are larger than any memory."""

import json
import os

import numpy as np
import pytest

pytest.importorskip("tensorstore")
import tensorstore
from support.confined import confined

from varstore.errors import FormatError

MIB = 1 << 20
READ = "tell(np.asarray(vs.read(argv[0])['x']).tolist())"


@pytest.fixture
def folder(tmp_path):
    """Return a function that writes an array of so many bytes, the first chunk filled with 65; it returns the path."""

    def make(size, chunk=1200):
        path = tmp_path / "c"
        metadata = {"shape": [size], "chunks": [chunk], "dtype": "|u1", "compressor": None}
        store = {"driver": "ocdbt", "base": f"file://{path}/", "path": "x/"}
        array = tensorstore.open(
            {"driver": "zarr", "kvstore": store, "metadata": metadata}, create=True, open=True
        ).result()
        array[:chunk].write(np.full(chunk, 65, np.uint8)).result()
        entry = {"key_metadata": [{"key": "x", "key_type": 2}], "value_metadata": {"value_type": "np.ndarray"}}
        (path / "_METADATA").write_text(json.dumps({"use_ocdbt": True, "tree_metadata": {"x": entry}}))
        return path

    return make


def data_file(path):
    return next(file for file in path.rglob("*") if file.is_file() and b"A" * 1200 in file.read_bytes())


def test_an_array_is_read(folder):
    assert confined(READ, folder(1200), seconds=20) == [65] * 1200


def test_a_data_file_that_is_a_link(tmp_path, folder):
    path = folder(1200)
    file = data_file(path)
    (tmp_path / "secret").write_bytes(file.read_bytes().replace(b"A" * 1200, b"S" * 1200))
    file.unlink()
    file.symlink_to(tmp_path / "secret")
    with pytest.raises(FormatError):
        confined(READ, path, seconds=20)


def test_a_data_file_that_is_a_pipe(folder):
    path = folder(1200)
    file = data_file(path)
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(FormatError):
        confined(READ, path, seconds=4)


def test_an_array_larger_than_any_memory(folder):
    path = folder(10**15, 1024)
    with pytest.raises(FormatError):
        confined("tell(np.asarray(vs.read(argv[0])['x']).shape)", path, seconds=20, memory=512 * MIB)
