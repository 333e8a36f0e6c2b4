"""What `check_storage` finds out, on real file systems and on one that does what some do."""

import errno
import json
import os
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner

import varstore as vs
from tools.storage.mounts import FILE_SYSTEMS, Unavailable
from varstore.cli import main
from varstore.errors import CheckpointNotFound
from varstore.inspection.storage import PROMISED, PROMISES
from varstore.storage import syscalls

CLASSES = {
    "tmpfs": "local",
    "ext4": "local",
    "overlayfs": "image layer",
    "squashfs": "read-only image",
    "bindfs": "FUSE, pass-through or encrypted",
    "gocryptfs": "FUSE, pass-through or encrypted",
    "sshfs": "sshfs",
    "rclone, no cache": "FUSE that renames in parts",
}


def test_a_local_disk_keeps_all_promises_and_nothing_is_left(tmp_path):
    report = vs.check_storage(tmp_path)
    assert report.ok
    assert bool(report)
    assert tuple(report.promises) == PROMISED
    assert report.found["rename onto a full folder"].startswith("refused: E")
    assert report.found["locks"].startswith("kept")
    assert os.listdir(tmp_path) == []
    assert vs.clean(tmp_path) == []


@pytest.mark.parametrize("name", CLASSES)
def test_the_class_of(name, tmp_path):
    if os.geteuid() != 0:
        pytest.skip("only root can mount file systems")
    try:
        with FILE_SYSTEMS[name](tmp_path) as mounted:
            before = sorted(os.listdir(mounted.here))
            report = vs.check_storage(mounted.here)
            assert report.kind == CLASSES[name]
            assert report.ok == (CLASSES[name] not in ("read-only image", "FUSE that renames in parts"))
            assert sorted(os.listdir(mounted.here)) == before
    except Unavailable as unavailable:
        pytest.skip(str(unavailable))


def test_a_mount_that_is_read_only_is_no_image(tmp_path):
    if os.geteuid() != 0:
        pytest.skip("only root can mount file systems")
    with FILE_SYSTEMS["tmpfs"](tmp_path) as mounted:
        subprocess.run(["mount", "-o", "remount,ro", mounted.here], check=True)
        report = vs.check_storage(mounted.here)
        assert (report.kind, report.ok) == ("read-only mount", False)


def test_renames_that_merge_are_found_whatever_the_name(tmp_path, monkeypatch):
    rename = os.rename

    def merging(old, new, *, src_dir_fd, dst_dir_fd):
        if (old, new) != ("new", "old"):
            return rename(old, new, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd)
        for name in os.listdir(syscalls.folder_in(old, src_dir_fd)):
            rename(f"{old}/{name}", f"{new}/{name}", src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd)
        return os.rmdir(old, dir_fd=src_dir_fd)

    monkeypatch.setattr(os, "rename", merging)
    report = vs.check_storage(tmp_path)
    assert report.found["rename onto a full folder"] == "merges the two"
    assert report.kind == "FUSE that renames in parts"
    assert not report.ok
    assert "snapshot_done" in str(report)


def test_what_is_missing_is_named(tmp_path, monkeypatch):
    def refused(*_, **__):
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", refused)
    monkeypatch.setattr(syscalls, "flock", refused)
    monkeypatch.setattr(syscalls, "sync", refused)
    found = vs.check_storage(tmp_path).found
    assert (found["hard links"], found["locks"], found["fsync"]) == ("no: EPERM", "no: EPERM", "not of files: EPERM")
    assert os.listdir(tmp_path) == []


def test_the_command(tmp_path):
    done = CliRunner().invoke(main, ["check-storage", str(tmp_path), "--json"])
    assert done.exit_code == 0, done.output
    told = json.loads(done.output)
    assert told["class"] in PROMISES
    assert told["found"]["fsync"] == "yes"
    plain = CliRunner().invoke(main, ["check-storage", str(tmp_path)])
    assert str(tmp_path) in plain.output
    assert "two writers" in plain.output


def test_no_directory(tmp_path):
    with pytest.raises(CheckpointNotFound):
        vs.check_storage(tmp_path / "nowhere")
    assert CliRunner().invoke(main, ["check-storage", str(Path(tmp_path, "nowhere"))]).exit_code == 3
