"""What is saved is what is loaded: every type, layout and name, links and bases, OneFlow's own directories."""

import os
import shutil
import stat
import tempfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import varstore as vs
from varstore.errors import CheckpointExists, InvalidName, UnsupportedDtype, UsageError
from varstore.spec.dtypes import TABLE

DATA = Path(__file__).parent / "data" / "oneflow"
BLOCK = 16 << 20
DTYPES = [row.dtype for row in TABLE if row.written]

LAYOUTS = {
    "as it is": lambda a: a,
    "Fortran": np.asfortranarray,
    "every second": lambda a: np.repeat(a, 2, axis=-1)[..., ::2] if a.ndim else a,
    "backwards": lambda a: a[::-1] if a.ndim else a,
    "transposed": lambda a: a.T,
    "broadcast": lambda a: np.broadcast_to(a, (2, *a.shape)),
    "big-endian": lambda a: a.astype(a.dtype.newbyteorder(">")) if a.dtype.type.__module__ == "numpy" else a,
    "a column": lambda a: np.stack([a, a], axis=-1)[..., 1],
    "read-only": lambda a: np.frombuffer(a.tobytes(), a.dtype).reshape(a.shape),
}


@st.composite
def arrays(draw):
    """An array of any type that the format has, of any bits, in any layout."""
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5))
    seed = draw(st.integers(0, 2**32 - 1))
    size = int(np.prod(shape)) * dtype.itemsize
    raw = np.frombuffer(np.random.default_rng(seed).bytes(size), np.uint8)
    if dtype == np.bool_:
        raw = raw % 2
    values = raw.view(dtype).reshape(shape)
    layout = draw(st.sampled_from(sorted(LAYOUTS)))
    return LAYOUTS[layout](values)


def little(array):
    """The bytes that `out` must hold."""
    array = np.asarray(array)
    return array.astype(array.dtype.newbyteorder("<")).tobytes()


def assert_same(found, expected):
    expected = np.asarray(expected)
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype.newbyteorder("<")
    assert little(found) == little(expected)


def inode(path):
    return os.stat(path).st_ino


def tree(directory):
    """Every file below, by its path: what it holds."""
    return {str(p.relative_to(directory)): p.read_bytes() for p in Path(directory).rglob("*") if p.is_file()}


names = st.lists(
    st.sampled_from(["a", "A", "out", "meta", "manifest", "..", ".", "", "%2F", "ü", "名", "x y", "end.", "a" * 200])
    | st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=6),
    min_size=1,
    max_size=3,
).map("/".join)


@settings(max_examples=60, deadline=None)
@given(
    variables=st.dictionaries(names.filter(bool), arrays(), max_size=6),
    manifest=st.booleans(),
    threads=st.sampled_from([1, 3]),
)
def test_what_is_saved_is_loaded(variables, manifest, threads):
    with tempfile.TemporaryDirectory() as folder:
        target = os.path.join(folder, "c")
        saved = vs.save(target, variables, manifest=manifest, threads=threads, durable=False)
        loaded = vs.load(target, threads=threads)
        if manifest:
            assert list(loaded) == list(variables)
            found = loaded
        else:  # names are taken literally there: those of the folders
            folders = [v.path for v in saved.values()]
            assert len(folders) == len(variables)
            planned = vs.save(os.path.join(folder, "with"), variables, durable=False)
            found = {name: loaded[os.path.relpath(planned[name].path, planned.path)] for name in variables}
        for name, value in variables.items():
            assert_same(found[name], value)
        assert vs.verify(target).ok
        assert set(os.listdir(folder)) <= {"c", "with"}


@pytest.mark.parametrize("durable", [False, True])
@pytest.mark.parametrize("threads", [1, 3])
def test_several_blocks_of_every_layout(tmp_path, durable, threads):
    rng = np.random.default_rng(7)
    flat = rng.integers(0, 2**31, BLOCK // 4 + 1001, np.int32)
    square = rng.integers(0, 2**63, (1500, 1501), np.int64)
    variables = {
        "flat": flat,
        "Fortran": np.asfortranarray(square),
        "big": square.astype(">i8"),
        "backwards": flat[::-1],
        "one block": flat[: BLOCK // 4],
        "odd": flat.view(np.uint8)[1 : (5 << 20) + 4],
    }
    vs.save(tmp_path / "c", variables, threads=threads, durable=durable)
    loaded = vs.load(tmp_path / "c", threads=threads)
    for name, value in variables.items():
        assert_same(loaded[name], value)
        assert (tmp_path / "c" / name / "out").stat().st_size == value.nbytes
    assert len(vs.open(tmp_path / "c")["flat"].digests) == 2
    for name, value in vs.load(tmp_path / "c", mmap=True).items():
        assert_same(value, variables[name])
        assert not value.flags.writeable


def test_scalars_memory_maps_and_other_array_likes(tmp_path):
    mapped = np.memmap(tmp_path / "m", np.float32, "w+", shape=(7, 3))
    mapped[:] = np.arange(21).reshape(7, 3)
    values = {
        "int": 7,
        "negative": -(2**63),
        "float": 0.1,
        "bool": True,
        "complex": 1 + 2j,
        "np": np.float16(1.5),
        "bf16": ml_dtypes.bfloat16(3),
        "memmap": mapped,
        "part": mapped[::2, 1:],
    }
    loaded = vs.load(vs.save(tmp_path / "c", values).path)
    for name, value in values.items():
        assert_same(loaded[name], value)
    assert type(loaded["memmap"]) is np.ndarray


@pytest.mark.parametrize(
    ("value", "error", "says"),
    [
        (np.array(["a"]), UnsupportedDtype, "text"),
        (np.array([None]), UnsupportedDtype, "Python objects"),
        (np.array([b"a"]), UnsupportedDtype, "byte strings"),
        (np.array(["2024-01-01"], "M8[D]"), UnsupportedDtype, "dates"),
        (np.zeros(2, "f4,i4"), UnsupportedDtype, "structured"),
        (np.zeros(2, np.longdouble), UnsupportedDtype, "long doubles"),
        (2**64, UnsupportedDtype, "64 bits"),
        (np.ma.masked_array([1, 2], [0, 1]), UsageError, "mask"),
        ([1, 2], UsageError, "list"),
        ("text", UsageError, "str"),
        (None, UsageError, "NoneType"),
    ],
)
def test_what_cannot_be_saved_is_refused_by_name_before_a_byte(tmp_path, value, error, says):
    with pytest.raises(error, match=says) as caught:
        vs.save(tmp_path / "c", {"good": np.ones(3), "layer/bad one": value})
    assert "layer/bad one" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "says"),
    [("", "empty"), ("a\0b", "NUL"), ("x" * 256, "255"), ("é" * 128, "255"), ("a/\ud800", "Unicode"), (7, "string")],
)
def test_bad_names_are_refused_before_a_byte(tmp_path, name, says):
    with pytest.raises(InvalidName, match=says):
        vs.save(tmp_path / "c", {"good": np.ones(3), name: np.ones(3)})
    assert list(tmp_path.iterdir()) == []


def test_hard_names_lie_inside_and_come_back(tmp_path):
    hard = ["/etc/passwd", "../../up", "a//b", "a/", "/", "C:\\x", "out", "a/out", "a", "manifest", "x/manifest"]
    hard += ["con", "tab\there", "nl\n", "%41", "A", "é", "e\u0301", "zarr.json", ". ", "~", "a|b", "snapshot_done"]
    hard += ["meta/meta", "pickled_data/x", " ", "...", "a/./b", "-rf *"]
    vs.save(tmp_path / "c", {name: np.float32(i) for i, name in enumerate(hard)}, durable=False)
    assert os.listdir(tmp_path) == ["c"]
    loaded = vs.load(tmp_path / "c")
    assert list(loaded) == hard
    assert [int(value) for value in loaded.values()] == list(range(len(hard)))
    outs = [p for p in (tmp_path / "c").rglob("out") if p.is_file()]
    assert len(outs) == len(hard)


def test_a_name_of_many_parts(tmp_path):
    """Deeper than Python's stack would be more than `shutil.rmtree` can remove."""
    name = "/".join("d" * 256)
    for manifest in (True, False):
        vs.save(tmp_path / "c", {name: np.arange(3)}, manifest=manifest, overwrite=True, durable=False)
        assert vs.load(tmp_path / "c")[name].tolist() == [0, 1, 2]
        assert vs.verify(tmp_path / "c").ok
    vs.save(tmp_path / "c", {"x": np.arange(3)}, overwrite=True, durable=False)
    assert os.listdir(tmp_path) == ["c"]
    with pytest.raises(InvalidName, match="too many parts"):
        vs.save(tmp_path / "d", {name + "/d": np.arange(3)})


def test_attributes(tmp_path):
    attributes = {"step": 3, "nested": {"list": [1, None, True, "ü"], "float": 0.1}}
    own = {"w": {"unit": "kg", "scale": [1.5]}}
    vs.save(tmp_path / "c", {"w": np.ones(3), "b": np.ones(2)}, attributes=attributes, variable_attributes=own)
    opened = vs.open(tmp_path / "c")
    assert dict(opened.attributes) == attributes
    assert dict(opened["w"].attributes) == own["w"]
    assert dict(opened["b"].attributes) == {}
    # a whole checkpoint hands them on, and so does each variable
    copy = vs.save(tmp_path / "copy", opened)
    assert dict(copy.attributes) == attributes
    assert dict(copy["w"].attributes) == own["w"]
    bare = vs.save(tmp_path / "bare", opened, manifest=False)
    assert dict(bare.attributes) == {}
    with pytest.raises(UsageError, match="manifest=False"):
        vs.save(tmp_path / "no", {"w": np.ones(3)}, attributes=attributes, manifest=False)
    with pytest.raises(UsageError, match="'x'"):
        vs.save(tmp_path / "no", {"w": np.ones(3)}, variable_attributes={"x": {}})
    with pytest.raises(UsageError, match="JSON"):
        vs.save(tmp_path / "no", {"w": np.ones(3)}, attributes={"array": np.ones(3)})
    assert not (tmp_path / "no").exists()


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


def test_overwrite_replaces_the_whole_checkpoint(tmp_path):
    vs.save(tmp_path / "c", {"a": np.ones(3), "old": np.ones(3)})
    os.chmod(tmp_path / "c", 0o750)
    vs.save(tmp_path / "c", {"a": np.zeros(3)}, overwrite=True)
    assert vs.load(tmp_path / "c")["a"].tolist() == [0, 0, 0]
    assert sorted(os.listdir(tmp_path / "c")) == ["a", "manifest", "snapshot_done"]
    assert stat.S_IMODE(os.stat(tmp_path / "c").st_mode) == 0o750
    assert os.listdir(tmp_path) == ["c"]


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


def test_a_taken_target_is_not_touched(tmp_path):
    vs.save(tmp_path / "c", {"a": np.ones(3)})
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thesis.tex").write_text("years of work")
    (tmp_path / "file").write_text("x")
    before = tree(tmp_path)
    for name, overwrite, says in [
        ("c", False, "overwrite=True"),
        ("notes", False, "not empty"),
        ("notes", True, "not a checkpoint"),
        ("file", False, "is a file"),
        ("file", True, "is a file"),
    ]:
        with pytest.raises(CheckpointExists, match=says):
            vs.save(tmp_path / name, {"a": np.zeros(3)}, overwrite=overwrite)
    assert tree(tmp_path) == before
    assert sorted(os.listdir(tmp_path)) == ["c", "file", "notes"]


def test_an_empty_directory_a_link_and_a_missing_parent_are_good_targets(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "dangling").symlink_to("later")
    for name in ("empty", "empty2/", "link", "dangling", "a/b/c"):
        vs.save(str(tmp_path / name), {"w": np.ones(3)})
        assert vs.verify(tmp_path / name).ok
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "w" / "out").exists()
    assert (tmp_path / "later" / "w" / "out").exists()


def test_files_are_written_once(tmp_path):
    vs.save(tmp_path / "c", {"a/w": np.ones(3), "big": np.ones(1 << 18)})
    for path in (tmp_path / "c").rglob("*"):
        if path.is_file():
            assert stat.S_IMODE(path.stat().st_mode) == 0o444, path


def test_an_empty_checkpoint(tmp_path):
    for manifest in (True, False):
        vs.save(tmp_path / str(manifest), {}, manifest=manifest)
        assert vs.load(tmp_path / str(manifest)) == {}
        assert vs.verify(tmp_path / str(manifest)).ok


# ---- OneFlow's own directories


def truth(name):
    with np.load(DATA / f"{name}.expect.npz") as stored:
        return {key: stored[key] for key in stored.files}


@pytest.mark.parametrize("name", ["dtypes_legacy", "lenet_legacy"])
def test_oneflow_directories_load_and_are_rewritten_byte_for_byte(tmp_path, name):
    expected = truth(name)
    loaded = vs.load(DATA / name)
    assert sorted(loaded) == sorted(expected)
    for key, value in expected.items():
        assert_same(loaded[key], value)
    vs.save(tmp_path / "arrays", loaded, manifest=False, durable=False)
    vs.save(tmp_path / "links", vs.open(DATA / name), manifest=False, durable=False)
    assert tree(tmp_path / "arrays") == tree(DATA / name) == tree(tmp_path / "links")
    folders = {str(p.relative_to(DATA / name)) for p in (DATA / name).rglob("*")}
    assert {str(p.relative_to(tmp_path / "arrays")) for p in (tmp_path / "arrays").rglob("*")} == folders


def test_a_oneflow_variable_without_meta_needs_a_target():
    expected = truth("lenet_legacy_nometa")
    opened = vs.open(DATA / "lenet_legacy_nometa")
    with pytest.raises(vs.errors.MetaError, match="conv1-bias"):
        _ = opened["conv1-bias"].shape
    with pytest.raises(vs.errors.MetaError, match="load_into"):
        vs.load(opened)
    targets = {name: np.zeros_like(value) for name, value in expected.items()}
    report = vs.load_into(targets, opened)
    assert set(report.loaded) == set(expected)
    for name, value in expected.items():
        assert_same(targets[name], value)
    rest = vs.load(opened, exclude="conv1-bias")
    assert sorted(rest) == sorted(expected.keys() - {"conv1-bias"})


def test_oneflow_bfloat16_in_four_bytes(tmp_path):
    values = np.array([[1.5, -2.0, 3e38], [0.1, np.inf, 0]], np.float32).astype(ml_dtypes.bfloat16)
    folder = tmp_path / "c" / "w"
    folder.mkdir(parents=True)
    (folder / "out").write_bytes(values.astype("<f4").tobytes())
    (folder / "meta").write_text("shape {\n  dim: 2\n  dim: 3\n}\ndata_type: kBFloat16\n")
    (tmp_path / "c" / "snapshot_done").touch()
    variable = vs.open(tmp_path / "c")["w"]
    assert variable.nbytes == 12
    for found in (vs.load(tmp_path / "c")["w"], variable.numpy(), variable[:], variable.numpy(mmap=True)):
        assert_same(found, values)
    target = {"w": np.zeros((2, 3), ml_dtypes.bfloat16)}
    vs.load_into(target, tmp_path / "c")
    assert_same(target["w"], values)
    again = vs.save(tmp_path / "again", vs.open(tmp_path / "c"))
    assert (tmp_path / "again/w/out").stat().st_size == 12
    assert_same(again["w"].numpy(), values)
    vs.seal(tmp_path / "c")
    assert_same(vs.load(tmp_path / "c")["w"], values)
    assert vs.verify(tmp_path / "c").ok


@pytest.mark.parametrize(
    "text",
    [
        "shape { dim: 2 dim: 3 } data_type: kFloat",
        "data_type: 2 shape: { dim: [2, 3] }",
        "# by hand\nshape <\n dim: 0x2; dim: 03\n>\n\n data_type : kFloat # ok",
    ],
)
def test_meta_in_any_legal_spelling(tmp_path, text):
    folder = tmp_path / "c" / ".hidden" / "deep" / "w"
    folder.mkdir(parents=True)
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    (folder / "out").write_bytes(values.tobytes())
    (folder / "meta").write_text(text)
    (folder / "unknown").write_text("ignored")
    (tmp_path / "c" / "snapshot_done").touch()
    assert_same(vs.load(tmp_path / "c")[".hidden/deep/w"], values)
    vs.seal(tmp_path / "c")
    assert_same(vs.load(tmp_path / "c")[".hidden/deep/w"], values)
    (folder / "meta").write_text(text + " ")
    with pytest.raises(vs.errors.ManifestError, match="meta"):
        vs.load(tmp_path / "c")
