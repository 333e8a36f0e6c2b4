"""Folders that people bring: what is in them opens by the path of the folder, and what is not a checkpoint is named."""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
from support import FIXTURES, run_python

import varstore as vs
from varstore.errors import DigestMismatch, FormatError, UnsafeContent
from varstore.formats.binary.zipped import ZippedFolder
from varstore.formats.registry import FORMATS

DATA = FIXTURES / "formats"
MODEL = {"w": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.zeros(3, np.float16)}


def same(opened, expected):
    assert {*opened} == {*expected}
    for name, values in expected.items():
        found = opened[name].numpy()
        assert (found.dtype, found.shape, found.tobytes()) == (values.dtype, values.shape, values.tobytes())


def truth_of(path: Path) -> dict[str, np.ndarray]:
    with np.load(f"{path}.expect.npz") as values:
        return dict(values)


# of Hugging Face


def repository(root: Path, files: Path, *revisions: str) -> Path:
    """Return a repository as the Hub's cache keeps it: blobs, and links to them in a snapshot for each revision."""
    repo = root / "models--someone--something"
    (repo / "refs").mkdir(parents=True)
    (repo / "blobs").mkdir()
    for revision in revisions:
        for file in sorted(path for path in files.rglob("*") if path.is_file()):
            digest = os.urandom(20).hex()
            shutil.copyfile(file, repo / "blobs" / digest)
            link = repo / "snapshots" / revision / file.relative_to(files)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(f"{'../' * (len(file.relative_to(files).parts) + 1)}blobs/{digest}")
    return repo


@pytest.mark.parametrize("kind", ["single", "sharded", "bin", "adapter", "pipeline"])
def test_a_snapshot_of_the_hub_opens_like_the_folder(tmp_path, kind):
    files, revision = DATA / "huggingface" / kind, "0123456789" * 4
    repo = repository(tmp_path, files, revision)
    for path in (repo, repo / "snapshots" / revision):
        opened = vs.read(path)
        assert opened.format == "huggingface"
        same(opened, truth_of(files))


def test_the_snapshot_of_main_is_meant(tmp_path):
    repo = repository(tmp_path, DATA / "huggingface/single", "a" * 40, "b" * 40)
    with pytest.raises(FormatError, match="which snapshot") as caught:
        vs.read(repo)
    assert "'snapshots'" in str(caught.value)
    (repo / "refs/main").write_text("b" * 40)
    shutil.rmtree(repo / "snapshots" / ("a" * 40))
    assert len(vs.read(repo)) > 0
    (repo / "refs/main").write_text("../../elsewhere")
    with pytest.raises(FormatError, match="which snapshot"):
        vs.read(repo)


@pytest.mark.parametrize("kind", ["single", "sharded", "bin", "pipeline"])
def test_weights_are_not_followed_out_of_the_folder(tmp_path, kind):
    folder = tmp_path / "model"
    shutil.copytree(DATA / "huggingface" / kind, folder)
    file = max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    file.rename(tmp_path / "elsewhere")
    file.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UnsafeContent, match="leads out"):
        vs.read(folder)


def test_weights_of_safetensors_come_first(tmp_path):
    vs.write(tmp_path / "pytorch_model.bin", {"old": np.zeros(1)})
    vs.write(tmp_path / "model.safetensors", MODEL)
    (tmp_path / "config.json").write_text("{}")
    same(vs.read(tmp_path), MODEL)


def test_an_index_of_files_of_torch(tmp_path):
    vs.write(tmp_path / "pytorch_model-1.bin", {"w": MODEL["w"]})
    vs.write(tmp_path / "pytorch_model-2.bin", {"b": MODEL["b"]})
    index = {"metadata": {"total_size": 30}, "weight_map": {"w": "pytorch_model-1.bin", "b": "pytorch_model-2.bin"}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    opened = vs.read(tmp_path)
    same(opened, MODEL)
    assert opened.attributes == {"total_size": 30}
    index["weight_map"]["w"] = "pytorch_model-2.bin"
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(FormatError, match="not in their files"):
        vs.read(tmp_path)


def test_several_files_without_an_index_are_named(tmp_path):
    for name in ("a", "b"):
        vs.write(tmp_path / f"{name}.safetensors", MODEL)
    with pytest.raises(FormatError, match="no index says") as caught:
        vs.read(tmp_path)
    assert f"open one of them, such as {str(tmp_path / 'a.safetensors')!r}" in caught.value.hint
    (tmp_path / "b.safetensors").unlink()
    same(vs.read(tmp_path), MODEL)


def test_a_folder_is_converted_and_loaded(tmp_path):
    folder = DATA / "huggingface/sharded"
    done = vs.convert(folder, tmp_path / "checkpoint")
    assert (done.source_format, {*done.names}) == ("huggingface", {*truth_of(folder)})
    targets = {name: np.zeros_like(values) for name, values in truth_of(folder).items()}
    vs.load_into(targets, folder)
    for name, values in truth_of(folder).items():
        np.testing.assert_array_equal(targets[name], values)


@pytest.mark.parametrize("format", [row.name for row in FORMATS if row.name != "varstore"])
def test_a_folder_without_anything_of_a_format_is_refused(tmp_path, format):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(vs.VarstoreError):
        vs.read(tmp_path, format)


# of Orbax and Zarr


def test_a_step_and_the_directory_of_its_manager_open(tmp_path):
    for path in ("manager", "manager/10", "manager/10/default"):
        same(vs.read(DATA / "orbax" / path), truth_of(DATA / "orbax/manager"))
    copy = tmp_path / "manager"
    shutil.copytree(DATA / "orbax/manager", copy)
    (copy / "10/_CHECKPOINT_METADATA").unlink()  # a step that was not finished
    assert vs.read(copy)["w"][0] == 2


def test_items_of_a_step_are_beside_each_other():
    state = vs.read(DATA / "orbax/items").state()
    assert state["meta"] == {"epoch": 3, "lr": 0.5}
    np.testing.assert_array_equal(state["params"]["w"], np.arange(3))


@pytest.mark.parametrize("version", [2, 3])
def test_a_zip_archive_of_zarr_is_read_by_itself(tmp_path, version):
    path = DATA / f"zarr/tree_v{version}.zarr.zip"
    with path.open("rb") as file:
        same(vs.read(file), truth_of(path))
    damaged = bytearray(path.read_bytes())
    damaged[damaged.index(np.float32(1).tobytes()) + 3 if version == 2 else -40] ^= 1
    (tmp_path / "a.zarr.zip").write_bytes(damaged)
    if version == 2:
        with pytest.raises(DigestMismatch):
            vs.read(tmp_path / "a.zarr.zip")["net/w"].numpy()


@pytest.mark.parametrize("name", ["a//zarr.json", "./zarr.json", "a/../zarr.json", "a/zarr.json/b"])
def test_members_of_an_archive_are_plain_paths(tmp_path, name):
    with zipfile.ZipFile(tmp_path / "a.zarr.zip", "w") as archive:
        archive.writestr("a/zarr.json", json.dumps({"zarr_format": 3, "node_type": "group"}))
        archive.writestr(name, "{}")
    with pytest.raises(UnsafeContent):
        vs.read(tmp_path / "a.zarr.zip")


def test_absent_chunks_are_counted(tmp_path):
    path = DATA / "zarr/batchnorm.zarr"
    opened = vs.read(path)
    same(opened, truth_of(path))
    assert opened.absent_chunks == {"bias": 1, "running_mean": 1, "num_batches_tracked": 1}
    with pytest.raises(FormatError, match="chunks of the array are absent"):
        vs.read(path, absent="error")
    assert vs.read(DATA / "zarr/tree_v3.zarr", absent="error").absent_chunks == {}
    assert vs.read(DATA / "numpy/weights.npz").absent_chunks == {}
    done = vs.convert(path, tmp_path / "a.npz")
    assert done.absent_chunks == opened.absent_chunks


# of varstore and Paddle


def test_the_latest_step_of_a_run_opens(tmp_path):
    run = tmp_path / "run"
    manager = vs.CheckpointManager(run)
    for step in (9, 10):
        manager.save(step, {"w": np.full(2, step), "epoch": step})
    assert vs.read(run).state()["epoch"] == 10
    next((run / "step-10").glob("*/out")).unlink()
    assert vs.read(run).state()["epoch"] == 9
    assert vs.convert(run, tmp_path / "a.pt").names == ("w",)
    vs.save(run / "other-3", {"w": np.zeros(1)})
    with pytest.raises(FormatError, match="several runs"):
        vs.read(run)


def test_a_folder_of_variables_of_paddle(tmp_path):
    folder = tmp_path / "vars"
    shutil.copytree(DATA / "paddle/vars", folder)
    (folder / "__model__").write_bytes(b"program")
    same(vs.read(folder), truth_of(DATA / "paddle/vars"))
    (folder / "zzz").write_bytes(b"something")
    with pytest.raises(FormatError, match="does not hold one variable"):
        vs.read(folder, "paddle")


# what is not a checkpoint


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 123456\n"
STRANGERS = {
    "a.safetensors": (LFS, "pointer of Git LFS.* expected 123,456 bytes.*git lfs pull"),
    "a.pt": (b"<!DOCTYPE html><html>not found</html>", "HTML page.*[Dd]ownload"),
    "b.pt": (b'{"error": "Repository not found"}', "JSON text.*Repository not found"),
    "a.npz": (b"\x1f\x8b\x08" + bytes(40), "compressed with gzip.*gunzip"),
    "a.onnx": (b"", "the file is empty"),
    "a.bin": ((DATA / "strangers/model.gguf").read_bytes(), "GGUF"),
    "a.h5": ((DATA / "strangers/model.h5").read_bytes(), "HDF5"),
    "a.keras": ((DATA / "strangers/model.keras").read_bytes(), "Keras"),
    "a.index": (b"sstable" + bytes.fromhex("57fb808b247547db"), "TensorFlow"),
    "a.data-00000-of-00001": (bytes(range(100)), "TensorFlow"),
    "a.tflite": (b"\x1c\0\0\0TFL3" + bytes(40), "TensorFlow Lite"),
}


@pytest.mark.parametrize("name", STRANGERS)
@pytest.mark.parametrize("format", [None, "torch", "safetensors"])
def test_what_a_file_is_is_named(tmp_path, name, format):
    content, words = STRANGERS[name]
    (tmp_path / name).write_bytes(content)
    if format and "JSON" in words:
        return  # text is only named where nothing says what it should be
    with pytest.raises(FormatError, match=f"(?s){words}"):
        vs.read(tmp_path / name, format)


def test_what_a_folder_is_is_named(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(FormatError, match="the folder is empty"):
        vs.read(tmp_path / "empty")
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved/saved_model.pb").write_bytes(b"\x08\x01")
    with pytest.raises(FormatError, match="SavedModel of TensorFlow"):
        vs.read(tmp_path / "saved")


def test_the_parts_of_what_accelerate_saved_open(tmp_path):
    folder = DATA / "strangers/accelerate"
    with pytest.raises(FormatError, match="accelerate saved, in several files: found model"):
        vs.read(folder)
    assert {*vs.read(folder / "model.safetensors")} == {"weight", "bias"}
    assert vs.read(folder / "optimizer.bin").state()["param_groups"][0]["momentum"] == 0.9
    assert vs.read(folder / "scheduler.bin").state()["step_size"] == 1


def test_the_parts_of_what_deepspeed_saved_are_named(tmp_path):
    (tmp_path / "run/global_step10").mkdir(parents=True)
    (tmp_path / "run/zero_to_fp32.py").write_text("")
    part = tmp_path / "run/global_step10/mp_rank_00_model_states.pt"
    vs.write(part, {"module": MODEL})
    with pytest.raises(FormatError, match=r"DeepSpeed saved.*global_step10.*zero_to_fp32.py"):
        vs.read(tmp_path / "run")
    with pytest.raises(FormatError, match=r"DeepSpeed saved.*such as '.*mp_rank_00_model_states.pt'"):
        vs.read(tmp_path / "run/global_step10")
    assert {*vs.read(part)} == {"module/w", "module/b"}


def test_a_download_that_was_cut_off_says_how_much_is_there(tmp_path):
    vs.write(tmp_path / "a.safetensors", MODEL)
    whole = (tmp_path / "a.safetensors").read_bytes()
    (tmp_path / "a.safetensors").write_bytes(whole[:-5])
    with pytest.raises(FormatError, match=f"found {len(whole) - 5} bytes, expected {len(whole)}"):
        vs.read(tmp_path / "a.safetensors")


@pytest.mark.parametrize("path", ["zarr/tree_v2.zarr.zip", "zarr/tree_v3.zarr.zip"])
def test_a_part_of_an_array_of_zarr_reads_its_chunks(monkeypatch, path):
    opened, whole = vs.read(DATA / path)["net/w"], np.arange(12, dtype=np.float32).reshape(3, 4)
    read, content = [], ZippedFolder.content
    monkeypatch.setattr(ZippedFolder, "content", lambda self, name: read.append(name) or content(self, name))
    for index, chunks in (
        ((0, 1), 1), ((slice(0, 2), slice(1, 3)), 2), ((2,), 2), ((Ellipsis, -1), 2), ((slice(None, None, -1), 3), 2),
        (([0, 1],), 4), ((slice(5, 9),), 0),
    ):  # fmt: skip
        read.clear()
        np.testing.assert_array_equal(opened[index], whole[index])
        assert len(read) == chunks, index
    with pytest.raises(IndexError):
        opened[7]


def test_an_archive_out_of_proportion_is_refused(tmp_path):
    fields = {
        "zarr_format": 2, "shape": [1], "chunks": [1], "dtype": "|u1", "fill_value": 0, "order": "C",
        "compressor": None, "filters": None,
    }  # fmt: skip
    with zipfile.ZipFile(tmp_path / "a.zarr.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(".zgroup", '{"zarr_format": 2}')
        for number in range(80):
            archive.writestr(f"{number}/.zarray", json.dumps(fields) + " " * (1 << 20))
    with pytest.raises(UnsafeContent, match="out of proportion"):
        vs.read(tmp_path / "a.zarr.zip")
    deep = "/".join("a" * 70)
    with zipfile.ZipFile(tmp_path / "b.zarr.zip", "w") as archive:
        archive.writestr(f"{deep}/zarr.json", "{}")
    with pytest.raises(FormatError, match="nested too deeply"):
        vs.read(tmp_path / "b.zarr.zip")


def test_a_part_of_a_tensor_of_several_ranks_is_that_of_the_whole():
    opened = vs.read(DATA / "torch/distributed_sharded")
    for name, whole in truth_of(DATA / "torch/distributed_sharded").items():
        for index in (0, -1, slice(1, None, 2), (Ellipsis, 0), (slice(None, None, -1),)):
            if whole.ndim:
                np.testing.assert_array_equal(opened[name][index], whole[index])


AUDIT = """
import os, sys
import varstore as vs
path = os.path.realpath(sys.argv[1])
vs.read(path).state()  # imports what the format needs
modules, opened = {*sys.modules}, []
sys.addaudithook(lambda event, args: opened.append(args[0]) if event == "open" else None)
vs.read(path).state()
outside = [file for file in opened if not str(file).startswith(path)]
assert opened and not outside, outside
assert {*sys.modules} == modules, {*sys.modules} - modules
"""


@pytest.mark.parametrize(
    "path",
    [
        *("huggingface/single", "huggingface/sharded", "huggingface/bin", "huggingface/pipeline"),
        *("orbax/manager", "orbax/items", "zarr/tree_v2.zarr.zip", "zarr/tree_v3.zarr.zip", "zarr/batchnorm.zarr"),
        *("paddle/vars", "paddle/one.pdtensor", "mindspore/net.mindir"),
    ],
)
def test_nothing_is_opened_but_what_was_given(path):
    run_python(AUDIT, DATA / path)


def orbax_item(step: Path, name: str) -> Path:
    shutil.copytree(DATA / "orbax/plain_zarr", step / name)
    (step / name / "_CHECKPOINT_METADATA").rename(step / "_CHECKPOINT_METADATA")
    return step / name


def test_chunks_that_one_item_of_orbax_lacks_are_told_by_the_name_of_the_array(tmp_path):
    (orbax_item(tmp_path / "1", "model") / "params.dense.bias/0").unlink()
    opened = vs.read(tmp_path / "1")
    assert "model/params/dense/bias" in opened
    assert opened.absent_chunks == {"model/params/dense/bias": 1}


@pytest.mark.parametrize(("depth", "fits"), [(98, True), (101, False), (900, False)])
def test_json_items_of_orbax_are_nested_as_deep_as_a_state_can_be(tmp_path, depth, fits):
    orbax_item(tmp_path / "1", "model")
    (tmp_path / "1/about").mkdir()
    (tmp_path / "1/about/metadata").write_text('{"a":' + "[" * depth + "]" * depth + "}")
    if fits:
        assert set(vs.read(tmp_path / "1").state()) == {"about", "model"}
    else:
        with pytest.raises(FormatError, match="nested too deeply"):
            vs.read(tmp_path / "1")


def test_a_directory_of_many_numbered_names_is_listed_once(tmp_path, monkeypatch):
    for number in range(50):
        (tmp_path / f"shard{number}of{number}").mkdir()
    vs.save(tmp_path / "step7", {"w": np.ones(2)})
    seen: list[str] = []
    listdir, scandir = os.listdir, os.scandir

    def noted(list_it):
        def listing(path="."):
            seen.append(str(path))
            return list_it(path)

        return listing

    monkeypatch.setattr(os, "listdir", noted(listdir))
    monkeypatch.setattr(os, "scandir", noted(scandir))
    assert vs.read(tmp_path)["w"].numpy().tolist() == [1, 1]
    assert len([path for path in seen if path.rstrip("/") == str(tmp_path)]) <= 4


@pytest.mark.parametrize(("index", "end"), [("pytorch_model.bin", "bin"), ("model.safetensors", "safetensors")])
def test_indexes_follow_one_rule(tmp_path, index, end):
    files = {"1": {"a": 1, "b": 2, "unlisted": 3}, "2": {"b": 4, "c": 5}}
    for name, values in files.items():
        format = "torch" if end == "bin" else "safetensors"
        vs.write(tmp_path / f"{name}.{end}", {key: np.full(1, value) for key, value in values.items()}, format)
    weight_map = {"c": f"2.{end}", "a": f"1.{end}", "b": f"2.{end}"}
    (tmp_path / f"{index}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    found = {name: array.tolist() for name, array in vs.read(tmp_path).items()}
    assert found == {"a": [1], "unlisted": [3], "b": [4], "c": [5]}
    (tmp_path / f"{index}.index.json").write_text(json.dumps({"weight_map": weight_map | {"c": f"1.{end}"}}))
    with pytest.raises(FormatError, match=r"not in their files.*\['c'\]"):
        vs.read(tmp_path)


def test_links_among_the_items_and_steps_of_orbax_are_named(tmp_path):
    orbax_item(tmp_path / "1", "model")
    orbax_item(tmp_path / "away", "2")
    (tmp_path / "1/other").symlink_to(tmp_path / "away/2")
    with pytest.raises(UnsafeContent, match="an item of this step is a link: found 'other' -> "):
        vs.read(tmp_path / "1")
    (tmp_path / "1/other").unlink()
    assert len(vs.read(tmp_path)) == len(vs.read(tmp_path / "1/model"))
    (tmp_path / "2").symlink_to(tmp_path / "1")
    with pytest.raises(UnsafeContent, match="the latest step is a link: found '2' -> "):
        vs.read(tmp_path)
