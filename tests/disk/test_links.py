"""What is on disk already is not written again: tied arrays, variables of other checkpoints, unchanged ones."""

import gc
import os
import resource
import shutil
import stat
import tempfile

import numpy as np
import pytest

import varstore as vs
from varstore.errors import StorageError

pytestmark = pytest.mark.core

BLOCK = 16 << 20


def assert_same(found, expected):
    expected = np.asarray(expected)
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype.newbyteorder("<")
    assert found.tobytes() == expected.astype(expected.dtype.newbyteorder("<")).tobytes()


def inode(path):
    return os.stat(path).st_ino


def test_tied_arrays_are_one_file_and_one_array(tmp_path):
    shared = np.random.default_rng(0).random((300, 400))
    vs.save(tmp_path / "c", {"in": shared, "out/w": shared, "view": shared.T, "equal": shared.copy(), "e": shared[:0]})
    checkpoint = vs.open(tmp_path / "c")
    assert inode(checkpoint["in"].path + "/out") == inode(checkpoint["out/w"].path + "/out")
    assert inode(checkpoint["in"].path + "/out") != inode(checkpoint["equal"].path + "/out")
    assert checkpoint["out/w"].entry.alias_of == "in"
    assert checkpoint["view"].entry.alias_of == checkpoint["equal"].entry.alias_of == ""
    loaded = vs.load(tmp_path / "c")
    assert loaded["in"] is loaded["out/w"]
    assert loaded["in"] is not loaded["equal"]
    assert_same(loaded["view"], shared.T)
    only = vs.load(tmp_path / "c", include="out/*")
    assert_same(only["out/w"], shared)
    # the tie is handed on by a checkpoint of variables, under other names too
    again = vs.save(
        tmp_path / "again", checkpoint.select(exclude="in", rename={"out": "head"}) | {"in": checkpoint["in"]}
    )
    assert again["in"].entry.alias_of == "head/w"
    assert inode(again["in"].path + "/out") == inode(checkpoint["in"].path + "/out")


def test_variables_of_checkpoints_are_linked_not_copied(tmp_path):
    rng = np.random.default_rng(1)
    one = vs.save(
        tmp_path / "one", {"a/w": rng.random(3000), "a/b": rng.random(3)}, variable_attributes={"a/b": {"k": 1}}
    )
    two = vs.save(tmp_path / "two", {"w": rng.random((200, 1000)), "dropped": rng.random(9)})
    mixed = one.select(rename={"a": "encoder"}) | two.select(include="w") | {"new": np.ones(5)}
    written = []
    vs.save(tmp_path / "three", mixed, progress=lambda done, total: written.append((done, total)))
    assert written[-1] == (40, 40)
    three = vs.open(tmp_path / "three")
    for here, there in [("encoder/w", one["a/w"]), ("encoder/b", one["a/b"]), ("w", two["w"])]:
        assert inode(three[here].path + "/out") == inode(there.path + "/out")
        assert three[here].digests == there.digests
        assert_same(three[here].numpy(), there.numpy())
    assert dict(three["encoder/b"].attributes) == {"k": 1}
    shutil.rmtree(tmp_path / "one")
    assert vs.verify(tmp_path / "three").ok


def test_what_is_linked_without_a_digest_gets_one(tmp_path):
    values = {"w": np.random.default_rng(4).random(BLOCK // 8 + 5), "b": np.ones(3), "empty": np.empty((0, 3))}
    hashed = vs.save(tmp_path / "hashed", values)
    bare = vs.save(tmp_path / "bare", values, manifest=False)
    linked = vs.save(tmp_path / "linked", bare)
    assert len(linked["w"].digests) == 2
    for name in values:
        assert inode(linked[name].path + "/out") == inode(bare[name].path + "/out")
        assert linked[name].digests == hashed[name].digests
    assert vs.verify(tmp_path / "linked").ok


def test_across_file_systems_variables_are_copied(tmp_path):
    if not os.path.isdir("/dev/shm") or os.stat("/dev/shm").st_dev == os.stat(tmp_path).st_dev:
        pytest.skip("/dev/shm is no file system of its own here")
    values = {"w": np.random.default_rng(2).random(300_000), "empty": np.empty((0, 3)), "s": np.int8(3)}
    with tempfile.TemporaryDirectory(dir="/dev/shm") as other:
        far = vs.save(os.path.join(other, "far"), values)
        near = vs.save(tmp_path / "near", far)
        for name, value in values.items():
            assert inode(near[name].path + "/out") != inode(far[name].path + "/out")
            assert stat.S_IMODE(os.stat(near[name].path + "/out").st_mode) == 0o444
            assert_same(near[name].numpy(), value)
        based = vs.save(tmp_path / "based", values, base=far)
        assert vs.diff(based, far).equal
        bare = vs.save(os.path.join(other, "bare"), values, manifest=False)
        copied = vs.save(tmp_path / "copied", bare)
        assert [copied[name].digests for name in values] == [far[name].digests for name in values]
    assert vs.verify(tmp_path / "near").ok
    assert vs.verify(tmp_path / "based").ok


def test_base_links_what_is_unchanged_and_only_that(tmp_path):
    rng = np.random.default_rng(3)
    before = {
        "same": rng.random(50_000),
        "changed": rng.random(50_000),
        "reshaped": rng.random((10, 10)),
        "retyped": rng.integers(0, 9, 100, np.int32),
        "large": rng.integers(0, 2**31, BLOCK // 4 + 5, np.int32),
        "late change": rng.integers(0, 2**31, BLOCK // 4 + 5, np.int32),
    }
    vs.save(tmp_path / "base", before)
    after = {name: value.copy() for name, value in before.items()}
    after["changed"][7] += 1
    after["reshaped"] = after["reshaped"].reshape(20, 5)
    after["retyped"] = after["retyped"].view(np.uint32)
    after["late change"][-1] ^= 1
    after["same"] = np.repeat(after["same"], 2)[::2]  # another layout of the same values
    after["new"] = np.ones(3)
    seen = []
    new = vs.save(
        tmp_path / "new", after, base=tmp_path / "base", progress=lambda done, total: seen.append((done, total))
    )
    base = vs.open(tmp_path / "base")
    linked = {name for name in before if inode(new[name].path + "/out") == inode(base[name].path + "/out")}
    assert linked == {"same", "large"}
    changed = sum(value.nbytes for name, value in after.items() if name not in linked)
    assert seen[-1] == (changed, changed)
    known = {inode(path) for path in (tmp_path / "base").rglob("out")}
    fresh = [os.stat(path) for path in (tmp_path / "new").rglob("out") if inode(path) not in known]
    assert sum(status.st_blocks * 512 for status in fresh) <= changed + 4096 * len(fresh)
    for name, value in after.items():
        assert_same(new[name].numpy(), value)
    shutil.rmtree(tmp_path / "base")
    assert vs.verify(tmp_path / "new").ok


def test_overwrite_from_the_checkpoint_that_is_replaced(tmp_path):
    values = {"a": np.arange(1000.0), "b": np.arange(5)}
    opened = vs.save(tmp_path / "c", values)
    kept = inode(tmp_path / "c/a/out")
    vs.save(tmp_path / "c", {"z": opened["a"], "b": opened["b"][:] + 1}, overwrite=True)
    assert inode(tmp_path / "c/z/out") == kept
    assert_same(vs.load(tmp_path / "c")["z"], values["a"])
    assert vs.load(tmp_path / "c")["b"].tolist() == [1, 2, 3, 4, 5]
    vs.save(tmp_path / "c", {"z": values["a"]}, overwrite=True, base=tmp_path / "c")
    assert inode(tmp_path / "c/z/out") == kept
    assert vs.verify(tmp_path / "c").ok
    assert os.listdir(tmp_path) == ["c"]


def test_meta_is_linked_with_out_where_it_is_what_would_be_written(tmp_path):
    def spoil(meta, text):
        assert meta.read_text() != text
        meta.unlink()
        meta.write_text(text)

    values = {f"v{i}": np.full((i + 1, 2), i, np.float32) for i in range(9)}
    one = vs.save(tmp_path / "one", values)
    torn, gone, linked, same_length = (tmp_path / "one" / f"v{i}" / "meta" for i in range(4))
    spoil(torn, "shape {\n")
    gone.unlink()
    linked.unlink()
    linked.symlink_to("out")
    spoil(same_length, "shape {\n  dim: 2\n  dim: 4\n}\ndata_type: kInt32\n")
    vs.save(tmp_path / "sealed", values)
    spoil(tmp_path / "sealed/v4/meta", "shape {\n  dim: 5\n  dim:2 \n}\ndata_type: kFloat\n")
    vs.seal(tmp_path / "sealed")
    mixed = {**one, "v4": vs.open(tmp_path / "sealed")["v4"], "v8": values["v8"]}
    for path, options in (("two", {}), ("bare", {"manifest": False})):
        two = vs.save(tmp_path / path, mixed, **options)
        written = {name for name in two if os.stat(two[name].path + "/meta").st_nlink == 1}
        assert written == {"v0", "v1", "v2", "v3", "v4", "v8"}
    based = vs.save(tmp_path / "based", values, base=one, manifest=False)
    few = vs.save(tmp_path / "few", {"v3": one["v3"], "v7": one["v7"]})
    for checkpoint in (two, based, few):
        for name in checkpoint:
            assert_same(checkpoint[name].numpy(), values[name])
    assert inode(few["v7"].path + "/meta") == inode(one["v7"].path + "/meta")
    shutil.rmtree(tmp_path / "one")
    assert all(vs.verify(tmp_path / path).ok for path in ("two", "bare", "based", "few"))


def test_variables_of_a_checkpoint_and_of_the_one_that_replaced_it_are_not_tied(tmp_path):
    vs.save(tmp_path / "c", {"w": np.zeros(3)})
    old = vs.open(tmp_path / "c")["w"]
    new = vs.save(tmp_path / "c", {"w": np.ones(3)}, overwrite=True)["w"]
    for mixed in ({"new": new, "old": old}, {"old": old, "new": new}):
        with pytest.raises(StorageError, match="replaced"):
            vs.save(tmp_path / "d", mixed)
        assert os.listdir(tmp_path) == ["c"]


def test_one_file_under_two_shapes_is_no_tie(tmp_path):
    vs.save(tmp_path / "c", {"w": np.arange(6.0)}, manifest=False)
    (tmp_path / "c/w/meta").unlink()
    stored = vs.open(tmp_path / "c")["w"]
    both = vs.save(tmp_path / "d", {"a": stored.known_as((6,), float), "b": stored.known_as((2, 3), float)})
    assert_same(both["a"].numpy(), np.arange(6.0))
    assert_same(both["b"].numpy(), np.arange(6.0).reshape(2, 3))
    assert vs.verify(tmp_path / "d").ok


def test_a_failing_copy_leaves_no_descriptor(tmp_path):
    if not os.path.isdir("/dev/shm") or os.stat("/dev/shm").st_dev == os.stat(tmp_path).st_dev:
        pytest.skip("/dev/shm is no file system of its own here")
    with tempfile.TemporaryDirectory(dir="/dev/shm") as other:
        far = vs.save(os.path.join(other, "far"), {"small": np.ones(9), "large": np.ones(9000)})
        gc.collect()
        gc.disable()
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (9000, limits[1]))
        try:
            open_before = len(os.listdir("/proc/self/fd"))
            for _ in range(5):
                with pytest.raises(StorageError, match="File too large"):
                    vs.save(tmp_path / "near", far)
            assert len(os.listdir("/proc/self/fd")) == open_before
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            gc.enable()
    assert os.listdir(tmp_path) == []


def test_a_base_without_the_names_costs_no_search_for_near_ones(tmp_path, monkeypatch):
    base = vs.save(tmp_path / "base", {f"layer/{i}/w": np.ones(2) for i in range(30)})
    monkeypatch.setattr("varstore.disk.read.checkpoint.nearest", lambda *_: pytest.fail("names are compared"))
    assert base.get("layer/31/w") is None
    vs.save(tmp_path / "new", {f"layer/{i}/v": np.ones(2) for i in range(30)}, base=base)
