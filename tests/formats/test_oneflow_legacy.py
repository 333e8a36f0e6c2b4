"""Folders for OneFlow 0.9: what it loads, under which names, and what is refused before anything is written."""

import json

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

import varstore as vs
from tests.formats.test_formats_pickle_peers import run_in

pytestmark = pytest.mark.core

SCRIPT = """
import warnings
import oneflow
with warnings.catch_warnings():
    warnings.simplefilter("error")
    loaded = oneflow.load(sys.argv[1])
numbers = {name: tensor.numpy().astype(float).ravel().tolist() for name, tensor in loaded.items()}
found = {name: [str(t.dtype)[8:], list(t.shape), numbers[name]] for name, t in loaded.items()}
print(json.dumps(found))
"""
LOADED = ("bool", "uint8", "int8", "int32", "int64", "float16", "float32", "float64")
OTHERS = {"bfloat16": "float32", "int16": "int32", "uint16": "int64", "uint32": "int64", "float8_e4m3fn": "float32"}


def test_oneflow_loads_the_whole_folder(tmp_path):
    state = {f"net/{name}": np.array([[0, 1, 1]]).astype(name) for name in LOADED}
    state |= {f"other/{name}": np.arange(3).astype(getattr(ml_dtypes, name, name)) for name in OTHERS}
    state |= {"scalar": np.float32(3), "empty": np.zeros((0, 2), np.int32), "tied": state["net/float32"]}
    state |= {"ü b.c": np.ones(1, np.float32), "nested": {"step": 7}}
    vs.write(tmp_path / "c", state, format="oneflow-legacy", dtype=OTHERS)
    found = json.loads(run_in("oneflow", "import json, sys\n" + SCRIPT, tmp_path / "c"))
    expected = {}
    for name, value in state.items():
        value = np.asarray(value["step"] if isinstance(value, dict) else value)
        name = "nested.step" if name == "nested" else name.replace("/", ".")
        dtype = OTHERS.get(value.dtype.name, value.dtype.name)
        expected[name] = [dtype, list(value.shape), value.astype(float).ravel().tolist()]
    assert found == expected


def test_what_oneflow_does_with_a_checkpoint_is_what_the_guide_says(tmp_path):
    """Names with a slash are lost with a warning, and one variable of another type fails all."""
    script = """
import warnings
import oneflow
with warnings.catch_warnings(record=True) as warned:
    warnings.simplefilter("always")
    names = sorted(oneflow.load(sys.argv[1]))
try:
    oneflow.load(sys.argv[2])
except NotImplementedError:
    names.append("failed")
print(json.dumps([names, len(warned)]))
"""
    vs.save(tmp_path / "a", {"net/w": np.ones(2, np.float32), "b": np.ones(2, np.float32)})
    vs.save(tmp_path / "b", {"w": np.ones(2, np.float32), "v": np.ones(2, np.int16)})
    found = json.loads(run_in("oneflow", "import json, sys\n" + script, tmp_path / "a", tmp_path / "b"))
    assert found == [["b", "failed"], 2]  # a warning each of net and the manifest


def test_oneflow_does_not_read_an_encoded_variable_as_noise(tmp_path):
    """Its `out` has fewer bytes than OneFlow expects."""
    pytest.importorskip("numcodecs")
    script = """
import oneflow
found = []
for path in sys.argv[1:]:
    try:
        found.append(sorted(oneflow.load(path)))
    except Exception as error:
        found.append(type(error).__name__)
print(json.dumps(found))
"""
    noise = np.random.default_rng(0).permutation(4096).astype(np.float32)
    values = {"w": np.concatenate([noise, np.zeros(30_000, np.float32)])}
    raw = vs.save(tmp_path / "raw", values)
    packed = [vs.pack(raw, tmp_path / level, level=level) for level in ("fast", "small")]
    unpacked = vs.unpack(packed[0], tmp_path / "unpacked")
    paths = [checkpoint.path for checkpoint in (raw, *packed, unpacked)]
    found = json.loads(run_in("oneflow", "import json, sys\n" + script, *paths))
    assert found == [["w"], "AssertionError", "AssertionError", ["w"]]


@pytest.mark.parametrize(
    ("state", "options", "error", "words"),
    [
        ({"a/b": 1.0, "a.b": 2.0}, {}, vs.errors.InvalidName, "'a/b' and 'a.b' are both 'a.b'"),
        ({"a:b": 1.0}, {}, vs.errors.InvalidName, "a%3Ab"),
        ({"a/b": 1.0}, {"separator": ":"}, vs.errors.InvalidName, "a%3Ab"),
        ({"a/b": 1.0}, {"separator": "/"}, vs.errors.InvalidName, "a/b"),
        ({"manifest": 1.0}, {}, vs.errors.InvalidName, "%"),
        ({"w": np.ones(2, ml_dtypes.bfloat16)}, {}, vs.errors.UnsupportedDtype, "bfloat16"),
        ({"w": np.ones(2, np.complex64)}, {"dtype": "float32"}, vs.errors.UnsupportedDtype, "complex64, to be cast"),
        ({"w": np.ones(2, np.uint64)}, {"dtype": "float64"}, vs.errors.UnsupportedDtype, "uint64, to be cast"),
        ({"w": np.ones(2, np.uint16)}, {"dtype": {"int16": "int32"}}, vs.errors.UnsupportedDtype, "uint16"),
        ({"w": np.ones(2, np.uint16)}, {"dtype": "float99"}, vs.errors.UnsupportedDtype, "float99"),
        ({"w": np.ones(2), "text": "x"}, {}, vs.errors.UsageError, "text"),
    ],
)
def test_what_is_refused(tmp_path, state, options, error, words):
    with pytest.raises(error) as caught:
        vs.write(tmp_path / "c", state, format="oneflow-legacy", **options)
    assert words in str(caught.value)
    assert not (tmp_path / "c").exists()


@settings(max_examples=60, deadline=None)
@given(
    names=st.lists(st.text("ab/.:~ ", min_size=1, max_size=6), unique=True, min_size=1, max_size=4),
    separator=st.sampled_from([".", "-", "__", ""]),
)
def test_each_folder_is_the_name_with_the_separator(tmp_path_factory, names, separator):
    path = tmp_path_factory.mktemp("h") / "c"
    try:
        vs.write(
            path,
            {name: np.full(2, i) for i, name in enumerate(names)},
            format="oneflow-legacy",
            separator=separator,
            durable=False,
        )
    except vs.errors.InvalidName:
        assert not path.exists()
        return
    found = {p.name: np.fromfile(p / "out", int)[0] for p in path.iterdir() if p.is_dir()}
    assert found == {name.replace("/", separator): i for i, name in enumerate(names)}
    assert not (path / "manifest").exists()


def test_it_reads_and_converts_as_a_checkpoint(tmp_path):
    vs.save(tmp_path / "a", {"net/w": np.ones(2, ml_dtypes.bfloat16)})
    done = vs.convert(tmp_path / "a", tmp_path / "b", format="oneflow-legacy", dtype="float32", separator="-")
    assert done.format == "oneflow-legacy"
    assert dict(vs.load(tmp_path / "b")) == {"net-w": pytest.approx([1, 1])}
    assert list(vs.read(tmp_path / "b", format="oneflow-legacy", limit=1 << 20)) == ["net-w"]
    back = vs.convert(tmp_path / "b", tmp_path / "c", source_format="oneflow-legacy")
    assert back.names == ("net-w",)
