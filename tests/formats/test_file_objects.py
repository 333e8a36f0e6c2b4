"""File objects in the place of paths: what they hold is read, and what is written to them is what a file would be."""

import io
import pickle
import zipfile

import numpy as np
import pytest

import varstore as vs

FLAT = {"w": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(2, np.float32)}
SUFFIXES = {
    "safetensors": "safetensors",
    "torch": "pt",
    "numpy": "npz",
    "paddle": "pdparams",
    "megengine": "mge",
    "mindspore": "ckpt",
}


def members(data):
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.mark.parametrize("format", SUFFIXES)
def test_what_is_written_is_read(tmp_path, format):
    file = io.BytesIO(b"before")
    file.seek(6)
    vs.write(file, FLAT, format=format)
    path = tmp_path / f"a.{SUFFIXES[format]}"
    vs.write(path, FLAT)
    written = file.getvalue()[6:]
    if format == "numpy":  # the members of an npz have times
        assert members(written) == members(path.read_bytes())
    else:
        assert written == path.read_bytes()
    file.seek(6)
    opened = vs.read(file, format)
    assert opened.path == "<BytesIO>"
    assert sorted(opened) == ["b", "w"]
    assert (opened["w"][1] == [3, 4, 5]).all()
    with path.open("rb") as stream:
        held = vs.read(io.BytesIO(path.read_bytes()), format)  # without a suffix, MegEngine's is a pickle like others
        loaded = [vs.load(held), vs.load(stream), vs.load(opened)]
    for found in loaded:
        assert found["w"].tolist() == FLAT["w"].tolist()
    again = pickle.loads(pickle.dumps(opened))
    assert again["w"].numpy().tolist() == FLAT["w"].tolist()


def test_a_named_file_says_its_name_and_its_format(tmp_path):
    with (tmp_path / "a.npy").open("w+b") as file:
        vs.write(file, {"(array)": np.ones(3)})
        file.seek(0)
        assert vs.read(file).path == str(tmp_path / "a.npy")
    assert np.load(tmp_path / "a.npy").tolist() == [1, 1, 1]


@pytest.mark.parametrize("format", ["varstore", "oneflow", "oneflow-legacy", "zarr"])
def test_a_folder_does_not_fit_into_a_file(format):
    file = io.BytesIO()
    with pytest.raises(vs.errors.UsageError, match="folder"):
        vs.write(file, FLAT, format=format)
    assert file.getvalue() == b""


def test_a_folder_is_not_in_a_file():
    with pytest.raises(vs.errors.UsageError, match="folder"):
        vs.read(io.BytesIO(b"x"), format="varstore")


def test_what_is_refused(tmp_path):
    with pytest.raises(vs.errors.UsageError, match="Name the format"):
        vs.write(io.BytesIO(), FLAT)
    index = (tmp_path / "a.safetensors.index.json").open("wb")
    with index, pytest.raises(vs.errors.UsageError, match="several files"):
        vs.write(index, FLAT)
    with pytest.raises(vs.errors.UsageError, match="mode"):
        vs.read(io.StringIO("{}"))
    with pytest.raises(vs.errors.UsageError, match="unknown"):
        vs.read(io.BytesIO(b"hello"))


def test_a_value_that_is_refused_writes_nothing():
    file = io.BytesIO()
    with pytest.raises(vs.errors.VarstoreError):
        vs.write(file, {"w": np.ones(2, np.complex64), "x": object()}, format="torch")
    assert file.getvalue() == b""


class Full(io.BytesIO):
    def write(self, data):
        raise OSError(28, "No space left on device")


def test_an_error_of_the_file_object_is_ours():
    with pytest.raises(vs.errors.OutOfSpace, match="Full"):
        vs.write(Full(), FLAT, format="torch")


def test_an_option_of_folders_is_taken_as_it_is_for_a_path():
    file = io.BytesIO()
    vs.write(file, FLAT, "safetensors", overwrite=True)
    assert vs.load(io.BytesIO(file.getvalue()))["b"].tolist() == [1, 1]
