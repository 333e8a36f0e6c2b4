"""Folders and companions that strangers made: links lead nowhere but to the Hub's blobs, and pipes are not opened."""

from __future__ import annotations

import json
import os
import shutil

import numpy as np
import pytest
from support import FIXTURES, run_python

import varstore as vs
from varstore.errors import FormatError, UnsafeContent
from varstore.formats.binary.folder import WalkedFolder

DATA = FIXTURES / "formats"
HEX = "0123456789abcdef" * 4
FOLDERS = {
    "zarr": DATA / "zarr/tree_v3.zarr",
    "orbax": DATA / "orbax/plain_zarr",
    "torch": DATA / "torch/distributed_sharded",
    "oneflow": next(path for path in (DATA / "oneflow").iterdir() if (path / "pickled_data").exists()),
}


@pytest.fixture(params=FOLDERS)
def folder(request, tmp_path):
    """A copy of a folder of each format that has one, which can be read."""
    copy = tmp_path / "folder"
    shutil.copytree(FOLDERS[request.param], copy)
    assert len(vs.read(copy, request.param)) > 0
    return copy, request.param


@pytest.mark.parametrize("target", ["/etc/hostname", "/etc", "nowhere", "..", "."])
def test_a_link_anywhere_is_refused(folder, target):
    path, format = folder
    os.symlink(target, path / "stray")
    with pytest.raises(UnsafeContent, match="link"):
        vs.read(path, format)


def test_a_file_that_became_a_link_to_a_copy_is_refused(folder):
    path, format = folder
    file = max((file for file in path.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)
    file.rename(path / "moved")
    file.symlink_to(path / "moved")
    with pytest.raises(UnsafeContent, match="link"):
        vs.read(path, format)


def test_a_pipe_is_refused(folder):
    path, format = folder
    os.mkfifo(path / "pipe")
    with pytest.raises(FormatError, match="not a regular file"):
        vs.read(path, format)


def test_the_path_itself_may_be_a_link(folder):
    path, format = folder
    link = path.with_name("link")
    link.symlink_to(path)
    assert list(vs.read(link, format)) == list(vs.read(path, format))


def test_folders_that_are_nested_too_deeply(tmp_path):
    (tmp_path / "/".join("d" * 70)).mkdir(parents=True)
    with pytest.raises(FormatError, match="nested too deeply"):
        WalkedFolder.walked(str(tmp_path))


# --- the Hub -----------------------------------------------------------------------------------------------------


def snapshot(tmp_path, folder, *, kind="models"):
    """Lay a folder out as the Hub's cache does; return the snapshot."""
    repository = tmp_path / f"{kind}--a--b"
    (repository / "blobs").mkdir(parents=True)
    root = repository / "snapshots" / "0123abcd"
    for number, file in enumerate(file for file in sorted(folder.rglob("*")) if file.is_file()):
        name = file.relative_to(folder)
        blob = f"{number:064x}" if number % 2 else f"{number:040x}"
        shutil.copy(file, repository / "blobs" / blob)
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).symlink_to("../" * (len(name.parts) + 1) + f"blobs/{blob}")
    return root


@pytest.mark.parametrize("kind", ["models", "datasets", "spaces"])
@pytest.mark.parametrize("format", FOLDERS)
def test_a_snapshot_of_the_hub_is_read(tmp_path, format, kind):
    root = snapshot(tmp_path, FOLDERS[format], kind=kind)
    assert list(vs.read(root, format)) == list(vs.read(FOLDERS[format], format))
    for name, array in vs.read(root, format).items():
        np.testing.assert_array_equal(array.numpy(), vs.read(FOLDERS[format], format)[name].numpy())


def shards(folder, parts=2):
    """Write an index of safetensors with its files; return the index."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "m.safetensors.index.json"
    vs.write(path, {f"w{i}": np.full(4, i, "f4") for i in range(parts)}, shard_bytes=16)
    return path


def test_an_index_in_a_snapshot_of_the_hub_is_read(tmp_path):
    shards(tmp_path / "plain")
    root = snapshot(tmp_path, tmp_path / "plain")
    assert vs.read(root / "m.safetensors.index.json")["w1"].tolist() == [1] * 4


@pytest.mark.parametrize(
    "change",
    ["other folder", "absolute", "not hex", "too short", "extra", "blob is a link", "blob is a folder", "no snapshot"],
)
def test_links_that_are_not_the_hubs(tmp_path, change):
    shards(tmp_path / "plain")
    root = snapshot(tmp_path, tmp_path / "plain")
    part = root / "m-00001-of-00002.safetensors"
    blobs = root.parent.parent / "blobs"
    blob = blobs / HEX
    shutil.copy(part, blob)
    text = f"../../blobs/{HEX}"
    if change == "other folder":
        shutil.copytree(blobs, tmp_path / "blobs")
        text = f"../../../blobs/{HEX}"
    elif change == "absolute":
        text = str(blob)
    elif change == "not hex":
        blob.rename(blobs / HEX.replace("0", "G"))
        text = text.replace("0", "G")
    elif change == "too short":
        blob.rename(blobs / HEX[:39])
        text = f"../../blobs/{HEX[:39]}"
    elif change == "extra":
        text = f"../../blobs/../blobs/{HEX}"
    elif change == "blob is a link":
        blob.rename(tmp_path / "elsewhere")
        blob.symlink_to(tmp_path / "elsewhere")
    elif change == "blob is a folder":
        blob.unlink()
        blob.mkdir()
    elif change == "no snapshot":
        root.parent.rename(root.parent.with_name("others"))
        root = root.parent.with_name("others") / root.name
        part = root / part.name
    part.unlink()
    part.symlink_to(text)
    with pytest.raises(UnsafeContent, match="leads out"):
        vs.read(root / "m.safetensors.index.json")


# --- companions --------------------------------------------------------------------------------------------------


def test_a_file_of_an_index_may_not_be_a_link_that_leads_out(tmp_path):
    path = shards(tmp_path / "inside")
    part = path.with_name("m-00001-of-00002.safetensors")
    part.rename(tmp_path / "outside")
    part.symlink_to(tmp_path / "outside")
    with pytest.raises(UnsafeContent, match="leads out"):
        vs.read(path)
    part.unlink()
    (tmp_path / "outside").rename(path.with_name("beside"))
    part.symlink_to("beside")
    assert vs.read(path)["w0"].tolist() == [0] * 4


PROGRAM = {"program": {"regions": [{"blocks": [{"ops": [{"#": "p", "A": [0, 0, 0, "w"]}]}]}]}}
STREAM = b"\0" * 16 + b"\4\0\0\0\x08\x05\x10\x01" + np.float32(3).tobytes()


def test_the_program_beside_raw_variables_may_not_be_a_link_that_leads_out(tmp_path):
    (tmp_path / "d").mkdir()
    path, program = tmp_path / "d/net.pdiparams", tmp_path / "d/net.json"
    path.write_bytes(STREAM)
    (tmp_path / "outside").write_text(json.dumps(PROGRAM))
    program.symlink_to(tmp_path / "outside")
    with pytest.raises(UnsafeContent, match="leads out"):
        vs.read(path)
    program.unlink()
    (tmp_path / "outside").rename(program)
    assert vs.read(path)["w"].tolist() == [3]
    (tmp_path / "d/net.pdiparams.info").symlink_to("/etc/hostname")
    with pytest.raises(UnsafeContent, match="leads out"):
        vs.read(path)


# --- what is opened ----------------------------------------------------------------------------------------------

WATCH = """
import os, sys, json
import varstore as vs
warm, path, format = sys.argv[1:]
def all_of(path):
    opened = vs.read(path, format)
    repr(opened), [array.numpy() for array in opened.values()], opened.state()
all_of(warm)
seen = []
def hook(event, arguments):
    if event == "open" and not str(arguments[0]).startswith(path) or event == "import":
        seen.append([event, str(arguments[0])])
    if event.startswith(("subprocess", "os.system", "os.exec", "socket", "ctypes")):
        seen.append([event])
sys.addaudithook(hook)
all_of(path)
print(json.dumps(seen))
"""


@pytest.mark.parametrize("name", [*FOLDERS, "ocdbt"])
def test_nothing_else_is_opened_or_imported(tmp_path, name):
    """Also for zarr and tensorstore, if they are installed: they are not asked for anything but bytes."""
    if name == "ocdbt":
        pytest.importorskip("tensorstore")
    source = FOLDERS.get(name, DATA / "orbax/ocdbt")
    for copy in ("warm", "watched"):
        shutil.copytree(source, tmp_path / copy)
    format = "orbax" if name == "ocdbt" else name
    done = run_python(WATCH, tmp_path / "warm", tmp_path / "watched", format)
    assert json.loads(done.stdout) == []
