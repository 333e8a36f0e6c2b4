"""Looking at whole checkpoints: verify lists, seal records what people did by hand, diff compares, clean tidies."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest

import varstore as vs
from varstore.errors import CheckpointNotFound, IncompleteCheckpoint, ManifestError, MetaError, SizeMismatch
from varstore.storage import syscalls

pytestmark = pytest.mark.core

DATA = Path(__file__).resolve().parents[1] / "data" / "oneflow"
SHARED = np.arange(4.0)
VALUES = {"z": np.ones((2, 2)), "a/b": np.arange(3), "odd:name": np.float32(2), "tied": SHARED, "twin": SHARED}


@pytest.fixture
def path(tmp_path):
    attributes = {"step": 9}
    vs.save(tmp_path / "c", VALUES, attributes=attributes, variable_attributes={"z": {"k": 1}, "odd:name": {"k": 2}})
    return tmp_path / "c"


def test_verify_of_a_good_one(path):
    report = vs.verify(path)
    assert report.ok
    assert report.variables == len(VALUES)
    assert report.unchecked == ()
    assert "every byte" in str(report)
    seen = []
    vs.verify(path, progress=lambda done, total: seen.append((done, total)))
    assert seen[0][0] == 0
    assert seen[-1][0] == seen[-1][1] == report.nbytes


def test_verify_opens_each_file_once_and_leaves_none_open(tmp_path, monkeypatch):
    many = {f"v{i}": np.full(5, i) for i in range(150)} | {"large": np.arange(5 << 20), "tied": SHARED, "twin": SHARED}
    vs.save(tmp_path / "c", many, durable=False)
    opened = []
    real = syscalls.openat2_beneath
    monkeypatch.setattr(
        syscalls, "openat2_beneath", lambda path, *at, **how: opened.append(path) or real(path, *at, **how)
    )
    before = len(os.listdir("/proc/self/fd"))
    for threads in (1, 3):
        opened.clear()
        assert vs.verify(tmp_path / "c", threads=threads).ok
        files = sorted(f"{name}/{file}" for name in many for file in ("meta", "out"))
        assert sorted(path for path in opened if path != "manifest") == files
    (tmp_path / "c" / "large" / "out").chmod(0o644)
    with open(tmp_path / "c" / "large" / "out", "r+b") as file:
        file.write(b"\x01")
        file.seek(17 << 20)
        file.write(b"\x01")
    assert [problem for problem in vs.verify(tmp_path / "c").problems if "large" in problem and "xxh3" in problem]
    os.truncate(tmp_path / "c" / "large" / "out", 9 << 20)
    assert [problem for problem in vs.verify(tmp_path / "c").problems if "large" in problem and "long" in problem]
    with pytest.raises(KeyboardInterrupt):
        vs.verify(tmp_path / "c", progress=interrupt)
    assert len(os.listdir("/proc/self/fd")) == before


def interrupt(done, total):
    if done:
        raise KeyboardInterrupt


def test_verify_lists_every_problem_at_once(path):
    shutil.rmtree(path / "a")
    (path / "z" / "out").unlink()
    (path / "z" / "out").write_bytes(b"short")
    shutil.copytree(path / "tied", path / "copied")
    (path / "copied" / "deep").mkdir()
    (path / "snapshot_done").chmod(0o644)
    (path / "snapshot_done").write_text("yes")
    (path / "loop").symlink_to("loop")
    (path / "dangling").symlink_to("nowhere")
    report = vs.verify(path)
    text = str(report)
    assert len(report.problems) == 4
    for part in ("a/b", "z/out", "copied", "snapshot_done", "4 problems"):
        assert part in text


def test_verify_never_raises_for_what_lies_there(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    assert "snapshot_done" in vs.verify(tmp_path / "empty").problems[0]
    for missing in ("nowhere", "file"):
        with pytest.raises(CheckpointNotFound):
            vs.verify(tmp_path / missing)


def test_verify_says_what_it_could_not_check(tmp_path):
    vs.save(tmp_path / "c", VALUES, manifest=False)
    report = vs.verify(tmp_path / "c")
    assert report.ok
    assert len(report.unchecked) == len(VALUES)
    assert "varstore seal" in str(report)


def test_seal_of_a_oneflow_directory(tmp_path):
    shutil.copytree(DATA / "lenet_legacy", tmp_path / "c")
    before = vs.load(tmp_path / "c")
    report = vs.seal(tmp_path / "c")
    assert set(report.added) == set(before)
    opened = vs.open(tmp_path / "c")
    assert opened.manifest is not None
    assert all(variable.digests for variable in opened.values())
    for name, value in vs.load(tmp_path / "c").items():
        assert np.array_equal(value, before[name])
    assert vs.verify(tmp_path / "c").unchecked == ()
    assert vs.seal(tmp_path / "c").equal
    assert sorted(p.name for p in (tmp_path / "c").iterdir() if p.is_file()) == ["manifest", "snapshot_done"]


def test_seal_after_a_change_by_hand_keeps_what_is_known(path):
    shutil.rmtree(path / "a")
    shutil.copytree(path / "z", path / "new")
    shutil.copytree(path / "tied", path / "d" / "copy")
    with pytest.raises(vs.errors.FormatError, match="a/b"):
        vs.load(path)
    assert not vs.verify(path).ok
    report = vs.seal(path)
    assert report.removed == ("a/b",)
    assert set(report.added) == {"new", "d/copy"}
    assert vs.verify(path).ok
    sealed = vs.open(path)
    assert sealed.names[:4] == ("z", "odd:name", "tied", "twin")
    assert dict(sealed.attributes) == {"step": 9}
    assert dict(sealed["z"].attributes) == {"k": 1}
    assert dict(sealed["odd:name"].attributes) == {"k": 2}
    assert dict(sealed["new"].attributes) == {}
    loaded = vs.load(path)
    assert np.array_equal(loaded["d/copy"], SHARED)
    assert loaded["tied"] is loaded["twin"]
    assert loaded["tied"] is not loaded["d/copy"]


def test_seal_when_a_tie_was_cut(path):
    shutil.rmtree(path / "tied")
    vs.seal(path)
    assert np.array_equal(vs.load(path)["twin"], SHARED)
    assert vs.verify(path).ok


def test_seal_records_an_edited_value_and_meta(path):
    (path / "z" / "out").unlink()
    (path / "z" / "out").write_bytes(np.arange(6, dtype="<f4").tobytes())
    (path / "z" / "meta").unlink()
    (path / "z" / "meta").write_text("shape { dim: 6 } data_type: kFloat")
    report = vs.seal(path)
    assert report.changed == {"z": "[2, 2] float64 -> [6] float32"}
    assert vs.load(path)["z"].tolist() == [0, 1, 2, 3, 4, 5]
    assert vs.verify(path).ok


def test_seal_refuses_and_then_changes_nothing(path, tmp_path):
    before = (path / "manifest").read_bytes()
    (path / "z" / "meta").unlink()
    with pytest.raises(MetaError, match="has no meta"):
        vs.seal(path)
    (path / "z" / "meta").write_text("shape { dim: 5 } data_type: kFloat")
    with pytest.raises(SizeMismatch, match="z"):
        vs.seal(path)
    (path / "z" / "meta").write_text("nonsense")
    with pytest.raises(MetaError, match="z/meta"):
        vs.seal(path)
    shutil.rmtree(path / "z")
    (path / "snapshot_done").unlink()
    with pytest.raises(IncompleteCheckpoint):
        vs.seal(path)
    assert (path / "manifest").read_bytes() == before
    assert sorted(p.name for p in path.iterdir() if p.is_file()) == ["manifest"]
    with pytest.raises(CheckpointNotFound):
        vs.seal(tmp_path / "nowhere")


def test_seal_does_not_drop_what_a_torn_manifest_said(path):
    """Attributes, nested state and names are lost with it, so going on without them is a step that is taken by hand."""
    (path / "manifest").chmod(0o644)
    (path / "manifest").write_bytes(b"torn")
    for refused in (vs.open, vs.load, vs.seal):
        with pytest.raises(ManifestError, match=r"torn.* remove the file 'manifest' and run `varstore seal`"):
            refused(path)
    assert (path / "manifest").read_bytes() == b"torn"
    (path / "manifest").unlink()
    vs.seal(path)
    assert vs.verify(path).ok
    assert np.array_equal(vs.load(path)["a/b"], VALUES["a/b"])
    assert dict(vs.open(path).attributes) == {}


def test_diff(path, tmp_path):
    other = {
        **VALUES,
        "z": np.ones((4,)),
        "a/b": np.arange(3) + 1,
        "odd:name": np.float64(2),
        "new": np.ones(1),
    }
    del other["twin"]
    vs.save(tmp_path / "d", other)
    report = vs.diff(path, tmp_path / "d")
    assert not report.equal
    assert report.added == ("new",)
    assert report.removed == ("twin",)
    assert dict(report.changed) == {
        "z": "[2, 2] float64 -> [4] float64",
        "a/b": "values",
        "odd:name": "[] float32 -> [] float64",
    }
    assert report.unchanged == ("tied",)
    for part in ("added    new", "removed  twin", "changed  a/b: values", "1 unchanged"):
        assert part in str(report)
    assert vs.diff(path, vs.open(path)).equal


def test_diff_reads_what_has_no_digest(tmp_path):
    plain = {"w": np.ones(3), "v": np.zeros(20)}
    vs.save(tmp_path / "a", plain, manifest=False)
    vs.save(tmp_path / "b", plain)
    assert vs.diff(tmp_path / "a", tmp_path / "b").equal
    vs.save(tmp_path / "c", plain | {"w": np.zeros(3)}, manifest=False)
    assert dict(vs.diff(tmp_path / "a", tmp_path / "c").changed) == {"w": "values"}


def test_clean_removes_only_what_a_dead_save_left(tmp_path):
    for name in (".c.saving-0123abcd", ".gone.replaced-0123abcd", ".c.replaced-89abcdef"):
        (tmp_path / name / "w").mkdir(parents=True)
    for kept in (".user.saving-notes", "c.saving-0123abcd", ".x.saving-0123ABCD", ".saving-0123abcd", "c"):
        (tmp_path / kept / "mine").mkdir(parents=True)
    (tmp_path / ".file.saving-0123abcd").touch()
    (tmp_path / ".link.saving-0123abcd").symlink_to("c")
    kept = set(os.listdir(tmp_path)) - {".c.saving-0123abcd", ".gone.replaced-0123abcd", ".c.replaced-89abcdef"}
    removed = vs.clean(tmp_path)
    assert sorted(map(os.path.basename, removed)) == [".c.replaced-89abcdef", ".c.saving-0123abcd"]
    assert set(os.listdir(tmp_path)) == kept | {"gone"}  # set aside and never replaced: it has its name again
    assert vs.clean(tmp_path) == []
    with pytest.raises(CheckpointNotFound):
        vs.clean(tmp_path / "nowhere")
