"""One flipped bit anywhere in a checkpoint is noticed: by verify always, by load where it lies in what it reads."""

import os
import random
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import varstore as vs
from varstore.errors import FormatError, IncompleteCheckpoint, VarstoreError

TIED = np.arange(7, dtype=np.float64)
VALUES = {
    "w": np.arange(6, dtype=np.float32).reshape(2, 3),
    "layer/b": np.array([True, False, True]),
    "layer/half": np.array([1.5, 2], ml_dtypes.bfloat16),
    "a%b": np.int64(7),
    "empty": np.empty((0, 4), np.float32),
    "tied": TIED,
    "tied too": TIED,
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("flips") / "c"
    vs.save(path, VALUES, attributes={"step": 3}, variable_attributes={"w": {"unit": "kg"}})
    return path


def files_of(path):
    return sorted(p.relative_to(path) for p in path.rglob("*") if p.is_file())


def rewrite(path, data):
    """Replace a read-only file, and every other name that it has."""
    mode = path.stat().st_mode
    path.chmod(0o644)
    with open(path, "r+b") as file:  # in place: the hard links of tied variables change too
        file.truncate(0)
        file.write(data)
    path.chmod(mode)


def mutations(data, rng):
    """Every byte with one of its bits flipped, then a byte more, a byte less, nothing."""
    for at in range(len(data)):
        flipped = bytearray(data)
        flipped[at] ^= 1 << rng.randrange(8)
        yield f"byte {at}", bytes(flipped)
    yield "a byte more", data + b"\0"
    if data:
        yield "a byte less", data[:-1]
        yield "nothing", b""


def concerned(path, relative):
    """The variables that a file belongs to; all for the manifest."""
    inode = (path / relative).stat().st_ino
    return [
        name
        for name, variable in vs.open(path).items()
        if relative.name == "manifest" or inode in {os.stat(f"{variable.path}/{f}").st_ino for f in ("out", "meta")}
    ]


def test_every_byte_of_every_file(tmp_path):
    rng = random.Random(11)
    path = tmp_path / "c"
    vs.save(path, VALUES, attributes={"step": 3}, variable_attributes={"w": {"unit": "kg"}}, durable=False)
    assert vs.verify(path).ok
    files = files_of(path)
    assert {f.name for f in files} == {"out", "meta", "manifest", "snapshot_done"}
    assert sum(f.name == "out" for f in files) == len(VALUES)
    whose = {relative: concerned(path, relative) for relative in files}
    count = 0
    for relative in files:
        good = (path / relative).read_bytes()
        for what, bad in mutations(good, rng):
            rewrite(path / relative, bad)
            report = vs.verify(path)
            assert not report.ok, f"{relative}: {what}"
            assert str(report.problems[0]), f"{relative}: {what}"
            if relative.name == "meta":
                assert set(vs.load(path)) == set(VALUES)  # the manifest vouches for shapes and types
            elif relative.name != "snapshot_done":
                assert whose[relative]
                with pytest.raises(FormatError):
                    vs.load(path)
                for name in whose[relative]:
                    with pytest.raises(FormatError):
                        vs.load(path, include=name)
            count += 1
        rewrite(path / relative, good)
        assert vs.verify(path).ok
    assert count > 500


def test_a_flip_elsewhere_does_not_stop_what_is_not_loaded(whole, tmp_path):
    path = tmp_path / "c"
    shutil.copytree(whole, path)
    rewrite(path / "w" / "out", b"\1" * 24)
    loaded = vs.load(path, exclude="w")
    assert sorted(loaded) == sorted(VALUES.keys() - {"w"})
    assert len(vs.verify(path).problems) == 1


def test_every_block_has_its_own_digest(tmp_path):
    value = np.random.default_rng(0).integers(0, 255, (33 << 20) + 5, np.uint8)
    vs.save(tmp_path / "c", {"v": value}, durable=False)
    for at in (0, (16 << 20) - 1, 16 << 20, (32 << 20) + 7, value.size - 1):
        flipped = value.copy()
        flipped[at] ^= 1
        rewrite(tmp_path / "c/v/out", flipped.tobytes())
        assert f"bytes {at >> 24 << 24} to" in vs.verify(tmp_path / "c").problems[0]
        with pytest.raises(vs.errors.DigestMismatch):
            vs.load(tmp_path / "c")
        with pytest.raises(vs.errors.DigestMismatch):
            vs.load_into({"v": np.zeros(value.shape, np.uint8)}, tmp_path / "c")
        with pytest.raises(vs.errors.DigestMismatch):
            vs.load_into({"v": np.zeros((value.size, 2), np.uint8)[:, 0]}, tmp_path / "c")


def _truncate_manifest(path):
    data = (path / "manifest").read_bytes()
    rewrite(path / "manifest", data[: len(data) // 2])


def _manifest_pipe(path):
    (path / "manifest").unlink()
    os.mkfifo(path / "manifest")


@pytest.mark.parametrize(
    ("breaks", "lost", "error"),
    [
        (lambda path: (path / "snapshot_done").unlink(), set(), IncompleteCheckpoint),
        (_truncate_manifest, set(), FormatError),
        (_manifest_pipe, set(), FormatError),
        (lambda path: (path / "manifest").unlink(), set(), None),
        (lambda path: shutil.rmtree(path / "w"), {"w"}, None),
        (lambda path: rewrite(path / "w/out", b"\0"), {"w"}, None),
        (lambda path: rewrite(path / "w/out", b"\0" * 25), {"w"}, None),
        (lambda path: (path / "layer/b/out").unlink(), {"layer/b"}, None),
    ],
)
def test_salvage_gives_what_is_whole(whole, tmp_path, breaks, lost, error):
    path = tmp_path / "c"
    shutil.copytree(whole, path)
    breaks(path)
    if error is not None:
        with pytest.raises(error, match="allow_incomplete=True" if error is IncompleteCheckpoint else None):
            vs.open(path)
    salvaged = vs.open(path, allow_incomplete=True)
    named = {variable.name.replace("%25", "%"): variable for variable in salvaged.values()}
    assert set(named) == VALUES.keys() - lost
    for name, variable in named.items():
        assert np.array_equal(variable.numpy(), VALUES[name])
    if salvaged.manifest is not None:
        assert set(salvaged.damaged) == lost
        for name in lost:
            with pytest.raises(VarstoreError, match="is incomplete"):
                salvaged[name]
    rescued = vs.save(tmp_path / "rescued", salvaged)
    assert vs.verify(rescued.path).ok
    assert Path(rescued.path, "snapshot_done").exists()
