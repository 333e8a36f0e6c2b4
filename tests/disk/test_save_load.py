"""What is saved is what is loaded, whatever its type, layout and name; what cannot be saved leaves no trace."""

import json
import os
import stat
import tempfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from hypothesis.extra import numpy as hnp
from support import check_checkpoint, run_python

import varstore as vs
from varstore.disk.save.leftovers import discard
from varstore.errors import CheckpointExists, InvalidName, UnsupportedDtype, UsageError
from varstore.layout.dtypes import TABLE
from varstore.storage.directory import Directory

pytestmark = pytest.mark.core

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


def test_overwrite_replaces_the_whole_checkpoint(tmp_path):
    vs.save(tmp_path / "c", {"a": np.ones(3), "old": np.ones(3)})
    os.chmod(tmp_path / "c", 0o750)
    vs.save(tmp_path / "c", {"a": np.zeros(3)}, overwrite=True)
    assert vs.load(tmp_path / "c")["a"].tolist() == [0, 0, 0]
    assert sorted(os.listdir(tmp_path / "c")) == ["a", "manifest", "snapshot_done"]
    assert stat.S_IMODE(os.stat(tmp_path / "c").st_mode) == 0o750
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


def test_an_empty_directory_a_missing_parent_and_one_that_is_a_link_are_good_targets(tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    for name in ("empty", "empty2/", "link/c", "empty/../link/e", "a/b/c"):
        vs.save(str(tmp_path / name), {"w": np.ones(3)})
        assert vs.verify(tmp_path / name).ok
    assert sorted(os.listdir(tmp_path / "real")) == ["c", "e"]
    (tmp_path / "here").mkdir()
    (tmp_path / "way").symlink_to("here")
    monkeypatch.chdir(tmp_path / "way")
    vs.save(".", {"w": np.ones(3)})
    assert vs.verify(tmp_path / "here").ok


@pytest.mark.parametrize("to", ["real", "empty", "file", "later", "link"])
def test_a_symbolic_link_is_no_target(tmp_path, to):
    for name in ("real", "source"):
        vs.save(tmp_path / name, {"w": np.ones(3)})
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("mine")
    before = [(path, path.read_bytes() if path.is_file() else b"") for path in sorted(tmp_path.rglob("*"))]
    for name, use in {
        "link": vs.save,
        "link/": vs.save,
        "link//": lambda path, values: vs.save(path, values, overwrite=True),
        "link.npz": vs.write,
        "link.safetensors": vs.write,
        "link.pt": vs.write,
        "link.onnx.data/": vs.write,
        "link.zarr": vs.write,
        "step-3": lambda path, values: vs.CheckpointManager(tmp_path).save(3, values, overwrite=True),
        "link.mge": lambda path, values: vs.convert(tmp_path / "source", path),
    }.items():
        link = tmp_path / name.rstrip("/")
        link.symlink_to(to)
        with pytest.raises(CheckpointExists, match="symbolic link"):
            use(f"{tmp_path}/{name}", {"w": np.zeros(3)})
        assert link.is_symlink()
        link.unlink()
        assert [(path, path.read_bytes() if path.is_file() else b"") for path in sorted(tmp_path.rglob("*"))] == before


def test_what_a_link_leads_to_is_not_removed_with_it(tmp_path):
    vs.save(tmp_path / "elsewhere" / "real", {"w": np.ones(3)})
    (tmp_path / "link").symlink_to("elsewhere/real")
    discard(str(tmp_path / "link"))
    assert os.listdir(tmp_path) == ["elsewhere"]
    assert os.listdir(tmp_path / "elsewhere") == ["real"]
    assert vs.verify(tmp_path / "elsewhere" / "real").ok


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


class Late:
    """Values that are not in memory until they are asked for, as those of a tensor on a device."""

    shape = (40 << 20,)
    dtype = np.dtype(np.uint8)

    def __init__(self, fill: int) -> None:
        self._fill = fill

    def __array__(self, dtype=None, copy=None):
        return np.full(self.shape, self._fill, self.dtype)


@pytest.mark.parametrize("durable", [False, True])
def test_late_values_of_several_blocks(tmp_path, durable):
    saved = vs.save(tmp_path / "c", {f"v{i}": Late(i) for i in range(4)}, threads=3, durable=durable)
    for i, variable in enumerate(saved.values()):
        assert (variable.numpy() == i).all()


def test_a_failing_write_wakes_the_thread_that_waits_for_late_values_and_no_more_are_fetched(tmp_path):
    code = """
import sys, time
import numpy as np
import varstore as vs
from varstore.disk.save.large_file import OutFile

fetched = []

class Late:
    shape, dtype = (40 << 20,), np.dtype(np.uint8)

    def __array__(self, dtype=None, copy=None):
        fetched.append(self)
        return np.zeros(self.shape, self.dtype)

def failing(self, start, stop):
    if stop == 40 << 20:
        time.sleep(0.3)  # until the others wait
        raise OSError(5, "this disk is broken")
    return OutFile.write_before(self, start, stop)

OutFile.write_before, OutFile.write = OutFile.write, failing
try:
    vs.save(sys.argv[1], {f"v{i}": Late() for i in range(4)}, threads=3, durable=False)
except vs.errors.StorageError as error:
    print(len(fetched), error)
"""
    done = run_python(code, tmp_path / "c", timeout=60)
    assert done.stdout.startswith("1 ")
    assert "this disk is broken" in done.stdout
    assert list(tmp_path.iterdir()) == []


@settings(max_examples=25, deadline=None)
@given(
    values=st.dictionaries(names, arrays(), max_size=4),
    tied=names,
    attributes=st.dictionaries(st.text("ab/é", max_size=3), st.lists(st.integers() | st.text()), max_size=2),
    manifest=st.booleans(),
)
def test_save_returns_what_opening_finds(values, tied, attributes, manifest):
    with tempfile.TemporaryDirectory() as folder:
        given = dict(values)
        if values:
            given[tied] = next(iter(values.values()))
        options = (
            {"attributes": attributes, "variable_attributes": dict.fromkeys(given, attributes)} if manifest else {}
        )
        try:
            first = vs.save(f"{folder}/first", given, durable=False, manifest=manifest, **options)
        except InvalidName:
            return
        second = vs.save(f"{folder}/second", first, durable=False, manifest=manifest)
        expected = json.loads(json.dumps(attributes))
        for items in attributes.values():
            items.append("a change to come")  # the caller's, not the checkpoint's
        for saved in (first, second):
            found = vs.open(saved.path)
            assert (saved.names, dict(saved.attributes), saved.tree) == (
                found.names,
                dict(found.attributes),
                found.tree,
            )
            assert [saved.entry(name) for name in saved] == [found.entry(name) for name in found]
            assert all(type(name) is str for name in saved)
            assert not saved.is_replaced
            if manifest:
                assert dict(saved.attributes) == expected
                assert saved.manifest.encode() == found.manifest.encode()
            else:
                assert saved.manifest is found.manifest is None
            check_checkpoint(saved.path, {name: variable.numpy() for name, variable in saved.items()})


def test_what_was_saved_is_not_read_again(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError("nothing is read")

    monkeypatch.setattr(Directory, "read_small", refuse)
    for manifest in (True, False):
        saved = vs.save(tmp_path / str(manifest), {"w": np.arange(3)}, manifest=manifest)
        assert saved["w"].shape == (3,)
        assert saved["w"].numpy().tolist() == [0, 1, 2]
