"""A checkpoint in a clone of a repository, of which Git LFS has not fetched the files yet."""

import numpy as np
import pytest

import varstore as vs
from varstore.errors import ManifestError, MetaError, SizeMismatch

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:%s\nsize 7200\n" % (b"4d" * 32)
WHAT = "pointer of Git LFS.*git lfs pull"


def put(path):
    path.unlink()
    path.write_bytes(POINTER)


@pytest.fixture(params=[True, False], ids=["manifest", "plain"])
def path(request, tmp_path):
    values = {"w": np.arange(900.0), "v": np.ones(3), "flags": np.zeros(len(POINTER) + 1, np.uint8)}
    vs.save(tmp_path / "c", values, manifest=request.param)
    return tmp_path / "c"


@pytest.mark.parametrize("name", ["w", "v", "flags"])
def test_a_pointer_in_the_place_of_values(path, name):
    put(path / name / "out")
    uses = [
        lambda: vs.load(path),
        lambda: vs.load(path, mmap=True),
        lambda: vs.open(path)[name].numpy(),
        lambda: vs.open(path)[name][0],
        lambda: vs.save(path.with_name("d"), vs.open(path)),
    ]
    for use in uses:
        with pytest.raises(SizeMismatch, match=WHAT) as caught:
            use()
        assert f"{name}/out" in str(caught.value)
        assert f"{len(POINTER)} bytes" in str(caught.value)
        assert "7,200 bytes" in str(caught.value)
    report = vs.verify(path)
    assert not report.ok
    assert "git lfs pull" in report.problems[0]
    assert sorted(vs.open(path, allow_incomplete=True)) == sorted({"w", "v", "flags"} - {name})


def test_a_pointer_in_the_place_of_what_describes_them(path):
    has_manifest = (path / "manifest").exists()
    put(path / ("manifest" if has_manifest else "w/meta"))
    with pytest.raises(ManifestError if has_manifest else MetaError, match=WHAT):
        vs.load(path)


def test_a_file_that_is_short_for_another_reason(path):
    (path / "w" / "out").unlink()
    (path / "w" / "out").write_bytes(POINTER[5:])
    with pytest.raises(SizeMismatch) as caught:
        vs.load(path)
    assert "LFS" not in str(caught.value)


def test_a_step_with_pointers_is_passed_over(tmp_path):
    manager = vs.CheckpointManager(tmp_path)
    for step in (1, 2):
        manager.save(step, {"w": np.full(900, step)})
    put(tmp_path / "step-2" / "w" / "out")
    assert manager.latest().step == 1
    assert manager.restore()["w"][0] == 1
