"""Attached files: what is saved beside the variables, and every way in which it must not be lost, mixed or misread."""

import errno
import json
import os
import pickle
import stat
import threading

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, strategies as st

import varstore as vs
from varstore._gen import manifest_pb2
from varstore.cli import main
from varstore.disk.save import staging
from varstore.errors import (
    CheckpointExists,
    DigestMismatch,
    InvalidName,
    ManifestError,
    OutOfSpace,
    SizeMismatch,
    StorageError,
    UnsafeContent,
    UsageError,
)
from varstore.layout.attached import FileEntry, refused_name
from varstore.layout.manifest import HEADER_SIZE, Manifest, frame
from varstore.model import store

VALUES = {"fc/weight": np.ones((2, 3), np.float32), "fc/bias": np.zeros(2)}
LARGE = np.random.default_rng(3).bytes((16 << 20) + 5)


def digests_of(root):
    body = manifest_pb2.Manifest.FromString((root / "manifest").read_bytes()[HEADER_SIZE:])
    return {file.name: file.digests for file in body.files}


@pytest.mark.parametrize("durable", [True, False])
def test_bytes_and_files_come_back_and_can_only_be_read(tmp_path, durable):
    source = tmp_path / "source"
    source.write_bytes(LARGE)
    source.chmod(0o755)
    (tmp_path / "link").symlink_to("source")
    files = {"a.bin": b"abc", "b.bin": bytearray(b"x"), "empty": b"", "large": source, "linked": str(tmp_path / "link")}
    checkpoint = vs.save(tmp_path / "c", VALUES, files=files, durable=durable)
    for opened in (checkpoint, vs.open(tmp_path / "c")):
        assert {name: file.read() for name, file in opened.files.items()} == {
            "a.bin": b"abc",
            "b.bin": b"x",
            "empty": b"",
            "large": LARGE,
            "linked": LARGE,
        }
        assert opened.files["large"].nbytes == len(LARGE)
        assert len(opened.files["large"].digests) == 2
    for name in files:
        status = (tmp_path / "c" / name).lstat()
        assert (stat.S_IFMT(status.st_mode), stat.S_IMODE(status.st_mode)) == (stat.S_IFREG, 0o444)
        assert checkpoint.files[name].path == os.fspath(tmp_path / "c" / name)
    assert vs.verify(tmp_path / "c").files == 5
    assert pickle.loads(pickle.dumps(checkpoint.files["a.bin"])).read() == b"abc"


def test_small_files_start_no_threads(tmp_path, monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("a thread was started")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    vs.save(tmp_path / "a", VALUES, files={"x": b"abc"})
    vs.save(tmp_path / "b", VALUES, files={"x": b"abc"}, base=tmp_path / "a")


@pytest.mark.parametrize("name", ["small", "large"])
@pytest.mark.parametrize("position", [0, -1])
def test_one_flipped_byte_is_found(tmp_path, name, position):
    checkpoint = vs.save(tmp_path / "c", VALUES, files={"small": b"abc", "large": LARGE})
    path = tmp_path / "c" / name
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.chmod(0o644)
    path.write_bytes(content)
    report = vs.verify(tmp_path / "c")
    assert len(report.problems) == 1
    assert os.fspath(path) in report.problems[0]
    with pytest.raises(DigestMismatch):
        checkpoint.files[name].read()


def test_a_file_that_is_gone_cut_or_a_link_is_refused(tmp_path):
    checkpoint = vs.save(tmp_path / "c", VALUES, files={"gone": b"1", "cut": b"22", "link": b"abc", "kept": b"abc"})
    (tmp_path / "c" / "gone").unlink()
    (tmp_path / "c" / "cut").chmod(0o644)
    (tmp_path / "c" / "cut").write_bytes(b"2")
    (tmp_path / "c" / "link").unlink()
    (tmp_path / "c" / "link").symlink_to("kept")
    for name, error in (("gone", vs.errors.FormatError), ("cut", SizeMismatch), ("link", UnsafeContent)):
        with pytest.raises(error):
            checkpoint.files[name].read()
        with pytest.raises(error):
            _ = checkpoint.files[name].path
        with pytest.raises(error):
            vs.save(tmp_path / "copy", {}, files={name: checkpoint.files[name]})
    assert len(vs.verify(tmp_path / "c").problems) == 3
    assert checkpoint.files["kept"].read() == b"abc"
    assert checkpoint.files is checkpoint.files, "a loop over many asks for them again and again"


REFUSED = {
    "the folder of a variable": "fc",
    "in another case": "FC",
    "a slash": "a/b",
    "reserved": "out",
    "the manifest": "manifest",
    "the marker": "snapshot_done",
    "parent": "..",
    "empty": "",
    "NUL": "a\0",
    "escaped": "a:b",
    "temporary": ".manifest.01234567",
    "a note": ".saving-01234567",
    "no text": 3,
    "surrogate": "\ud800",
    "too long": "x" * 256,
}


@pytest.mark.parametrize("name", REFUSED.values(), ids=REFUSED)
def test_a_name_is_refused_before_the_first_byte(tmp_path, name):
    with pytest.raises(InvalidName):
        vs.save(tmp_path / "c", VALUES, files={name: b""})
    assert os.listdir(tmp_path) == []


def test_names_that_differ_in_case_are_refused(tmp_path):
    with pytest.raises(InvalidName, match="only in case"):
        vs.save(tmp_path / "c", VALUES, files={"A.txt": b"", "a.TXT": b""})


def test_sources_that_are_no_regular_files_are_refused_before_the_first_byte(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "dangling").symlink_to("nowhere")
    before = sorted(os.listdir(tmp_path))
    for source in ("pipe", "folder", "dangling", "nothing", "a\0b"):
        with pytest.raises(UsageError):
            vs.save(tmp_path / "c", VALUES, files={"x": tmp_path / source})
    for content in (3, None, np.zeros(2), ["x"]):
        with pytest.raises(UsageError):
            vs.save(tmp_path / "c", VALUES, files={"x": content})
    for files in (["x"], [], np.zeros(2), "", 0):
        with pytest.raises(UsageError):
            vs.save(tmp_path / "c", VALUES, files=files)
    with pytest.raises(UsageError, match="manifest=False"):
        vs.save(tmp_path / "c", VALUES, files={"x": b""}, manifest=False)
    assert sorted(os.listdir(tmp_path)) == before


def test_a_source_that_changes_meanwhile_undoes_the_save(tmp_path, monkeypatch):
    source = tmp_path / "source"
    source.write_bytes(b"before")
    enter = staging.Staging.__enter__

    def change(self):
        source.write_bytes(b"after.")
        os.utime(source, ns=(1, 1))
        return enter(self)

    monkeypatch.setattr(staging.Staging, "__enter__", change)
    with pytest.raises(StorageError, match="changed"):
        vs.save(tmp_path / "c", VALUES, files={"x": source})
    assert os.listdir(tmp_path) == ["source"]


@pytest.mark.parametrize("from_path", [True, False])
def test_equal_files_of_the_base_are_linked_and_others_are_written(tmp_path, from_path):
    source = tmp_path / "source"
    source.write_bytes(LARGE)
    vs.save(tmp_path / "a", VALUES, files={"large": LARGE, "changed": b"old", "moved": b"m"})
    files = {"large": source if from_path else LARGE, "changed": b"new", "other": b"m"}
    vs.save(tmp_path / "b", VALUES, files=files, base=tmp_path / "a")
    assert os.path.samefile(tmp_path / "a" / "large", tmp_path / "b" / "large")
    assert {name: file.read() for name, file in vs.open(tmp_path / "b").files.items()} == {
        "large": LARGE,
        "changed": b"new",
        "other": b"m",
    }
    assert vs.verify(tmp_path / "b").ok
    report = vs.diff(tmp_path / "a", tmp_path / "b")
    assert dict(report.files) == {"other": "added", "moved": "removed", "changed": "changed"}
    assert not report.equal
    assert "file changed" in str(report)


def test_a_file_of_a_base_that_may_be_changed_is_copied(tmp_path):
    vs.save(tmp_path / "a", VALUES, files={"x": b"abc"})
    (tmp_path / "a" / "x").chmod(0o755)
    vs.save(tmp_path / "b", VALUES, files={"x": b"abc"}, base=tmp_path / "a")
    assert not os.path.samefile(tmp_path / "a" / "x", tmp_path / "b" / "x")
    assert stat.S_IMODE((tmp_path / "b" / "x").stat().st_mode) == 0o444


@pytest.mark.parametrize("has_links", [True, False])
def test_files_of_another_checkpoint_are_linked_or_copied(tmp_path, monkeypatch, has_links):
    files = vs.save(tmp_path / "a", VALUES, files={"x": b"abc", "large": LARGE}).files

    def refuse(*arguments, **options):
        raise PermissionError(errno.EPERM, "no links here")

    if not has_links:
        monkeypatch.setattr(os, "link", refuse)
    taken = vs.save(tmp_path / "b", VALUES, files={"y": files["x"], "large": files["large"]}).files
    monkeypatch.undo()
    assert (taken["y"].read(), taken["large"].read()) == (b"abc", LARGE)
    assert os.path.samefile(tmp_path / "a" / "x", tmp_path / "b" / "y") == has_links
    assert stat.S_IMODE((tmp_path / "b" / "y").stat().st_mode) == 0o444


def test_a_base_that_lost_its_file_is_done_without(tmp_path):
    vs.save(tmp_path / "a", VALUES, files={"x": b"abc"})
    (tmp_path / "a" / "x").unlink()
    checkpoint = vs.save(tmp_path / "b", VALUES, files={"x": b"abc"}, base=tmp_path / "a")
    assert checkpoint.files["x"].read() == b"abc"


def test_overwriting_writes_exactly_the_new_files(tmp_path):
    vs.save(tmp_path / "c", VALUES, files={"old": b"1", "both": b"2"})
    checkpoint = vs.save(tmp_path / "c", VALUES, files={"both": b"3", "new": b"4"}, overwrite=True)
    assert sorted(checkpoint.files) == ["both", "new"]
    assert not (tmp_path / "c" / "old").exists()
    (tmp_path / "c" / "mine.txt").write_text("mine")
    with pytest.raises(CheckpointExists, match=r"'mine\.txt'"):
        vs.save(tmp_path / "c", VALUES, overwrite=True)
    vs.save(tmp_path / "c", VALUES, overwrite=True, foreign="keep")
    assert sorted(os.listdir(tmp_path / "c")) == ["fc", "manifest", "mine.txt", "snapshot_done"]


def test_a_failed_save_in_place_leaves_nothing(tmp_path, monkeypatch):
    (tmp_path / "c").mkdir()
    monkeypatch.chdir(tmp_path / "c")

    def refuse(self, manifest):
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(staging.Staging, "commit", refuse)
    with pytest.raises(StorageError):
        vs.save(".", VALUES, files={"x": b"abc"})
    assert os.listdir() == []
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path / "c")
    assert vs.save(".", VALUES, files={"x": b"abc"}).files["x"].read() == b"abc"


def test_files_count_where_space_is_checked(tmp_path, monkeypatch):
    free = os.statvfs(tmp_path)
    (tmp_path / "sparse").touch()
    os.truncate(tmp_path / "sparse", free.f_bavail * free.f_frsize + (1 << 30))
    with pytest.raises(OutOfSpace):
        vs.save(tmp_path / "c", VALUES, files={"x": tmp_path / "sparse"})
    assert os.listdir(tmp_path) == ["sparse"]


def test_seal_keeps_what_is_there_and_adds_nothing(tmp_path):
    vs.save(tmp_path / "c", VALUES, files={"gone": b"1", "changed": b"2", "same": b"3"})
    (tmp_path / "c" / "gone").unlink()
    (tmp_path / "c" / "changed").unlink()
    (tmp_path / "c" / "changed").write_bytes(b"longer")
    (tmp_path / "c" / "foreign").write_bytes(b"x")
    report = vs.seal(tmp_path / "c")
    assert dict(report.files) == {"gone": "removed", "changed": "changed"}
    assert vs.verify(tmp_path / "c").ok
    assert sorted(vs.open(tmp_path / "c").files) == ["changed", "same"]
    assert vs.open(tmp_path / "c").files["changed"].read() == b"longer"


def test_convert_between_checkpoints_keeps_them_and_other_formats_do_not_have_them(tmp_path):
    vs.save(tmp_path / "a", VALUES, files={"x": b"abc"})
    vs.convert(tmp_path / "a", tmp_path / "b", include="fc/bias")
    assert vs.open(tmp_path / "b").files["x"].read() == b"abc"
    vs.convert(tmp_path / "a", tmp_path / "c", format="varstore", dtype="float16", files={"y": b"y"})
    assert sorted(vs.open(tmp_path / "c").files) == ["x", "y"]


@pytest.mark.parametrize("background", [True, False])
def test_a_manager_writes_them_in_each_step_and_links_them(tmp_path, background):
    manager = vs.CheckpointManager(
        tmp_path / "run",
        keep=vs.Latest(3),
        keep_parts={"fc/weight": vs.Latest(1)},
        background=background,
        files={"graph": b"graph"},
    )
    for step in range(4):
        manager.save(step, {**VALUES, "step": np.array(step)}, files={"own": b"%d" % step} if step == 2 else None)
    manager.wait()
    steps = [tmp_path / "run" / f"step-{step}" for step in (1, 2, 3)]
    assert [sorted(vs.open(step).files) for step in steps] == [["graph"], ["graph", "own"], ["graph"]]
    assert "fc/weight" not in vs.open(steps[0])
    assert len({(step / "graph").stat().st_ino for step in steps}) == 1
    assert all(vs.verify(step).ok for step in steps)
    (steps[2] / "graph").unlink()
    assert manager.latest().step == 2


def test_a_background_save_holds_what_the_files_were(tmp_path, monkeypatch):
    source, content = tmp_path / "source", bytearray(b"before")
    source.write_bytes(b"before")
    begun = threading.Event()
    monkeypatch.chdir(tmp_path)
    original = store.plan_save

    def later(*arguments, **options):
        assert begun.wait(60)
        return original(*arguments, **options)

    monkeypatch.setattr(store, "plan_save", later)
    pending = vs.save_async("c", VALUES, files={"source": "source", "content": content})
    source.write_bytes(b"after!")
    content[:] = b"after!"
    begun.set()
    assert {name: file.read() for name, file in pending.result().files.items()} == {
        "source": b"before",
        "content": b"before",
    }


def test_the_command_line_shows_them(tmp_path):
    vs.save(tmp_path / "c", VALUES, files={"labels.txt": b"cat"})
    path = os.fspath(tmp_path / "c")
    listed = CliRunner().invoke(main, ["ls", path]).output
    assert "labels.txt" in listed
    assert "2 variables, 1 file" in listed
    (file,) = json.loads(CliRunner().invoke(main, ["ls", "--json", path]).output)["files"]
    assert (file["name"], file["nbytes"]) == ("labels.txt", 3)
    assert "labels.txt" not in CliRunner().invoke(main, ["ls", path, "fc/*"]).output
    shown = CliRunner().invoke(main, ["show", path, "labels.txt"])
    assert (shown.exit_code, "data" in shown.output) == (0, True)


def test_a_checkpoint_without_files_has_none(tmp_path):
    checkpoint = vs.save(tmp_path / "c", VALUES)
    assert (dict(checkpoint.files), digests_of(tmp_path / "c")) == ({}, {})
    assert dict(vs.save(tmp_path / "b", VALUES, manifest=False).files) == {}


HOSTILE = {
    "leads out": {"name": "../x"},
    "a folder of a variable": {"name": "w"},
    "reserved": {"name": "manifest"},
    "without digests": {"name": "x", "size": 3},
    "too many digests": {"name": "x", "digests": b"x" * 16},
    "attributes": {"name": "x", "attributes": "["},
}


@pytest.mark.parametrize("fields", HOSTILE.values(), ids=HOSTILE)
def test_a_manifest_that_cannot_be_true_is_refused(fields):
    body = manifest_pb2.Manifest(format_version=1)
    body.variables.append(manifest_pb2.Variable(name="w", shape=[2, 3], data_type=2, size=24))
    body.files.append(manifest_pb2.File(**fields))
    with pytest.raises(ManifestError):
        Manifest.decode(frame(body.SerializeToString()), path="c")


def test_a_manifest_that_lists_a_file_twice_is_refused():
    body = manifest_pb2.Manifest(format_version=1, files=[manifest_pb2.File(name="x")] * 2)
    with pytest.raises(ManifestError, match="twice"):
        Manifest.decode(frame(body.SerializeToString()), path="c")


@given(
    names=st.sets(st.text(min_size=1, max_size=12), max_size=5),
    nbytes=st.integers(0, 1 << 40),
    kind=st.sampled_from(["data", "graph", "text"]),
    attributes=st.dictionaries(st.text(max_size=5), st.integers(), max_size=3),
)
def test_the_manifest_gives_back_what_it_was_given(names, nbytes, kind, attributes):
    digests = b"d" * 16 * -(-nbytes // (16 << 20)) if nbytes < 1 << 30 else b""
    nbytes = nbytes if digests else 0
    files = {name: FileEntry(name, nbytes, digests, kind, attributes) for name in names if not refused_name([name], ())}
    if refused_name(files, ()):  # two that differ in case
        return
    manifest = Manifest(writer="w", time_ns=1, attributes={}, tree="", entries={}, files=files)
    assert dict(Manifest.decode(manifest.encode(), path="c").files) == files
