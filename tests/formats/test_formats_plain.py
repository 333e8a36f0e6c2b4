"""The formats without pickle: real files equal to their truth, and files that the real libraries read."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import subprocess
import sys
import tracemalloc
import zipfile
from itertools import pairwise
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import zarr as zarr_library
from hypothesis import given, settings, strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.numpy import load_file, save_file

import varstore as vs
from varstore.errors import (
    CheckpointExists,
    DigestMismatch,
    InvalidName,
    MissingDependency,
    UnsupportedDtype,
    UsageError,
    VariableMismatch,
    VariableNotFound,
)
from varstore.formats import numpy, registry, safetensors, verbs
from varstore.formats.binary import packing
from varstore.formats.mindspore import messages as mindspore
from varstore.formats.onnx import model as onnx
from varstore.formats.zarr import tree as zarr
from varstore.training.state import load_state, save_state
from varstore.values.lazy import LazyArray
from varstore.values.nodes import BARE

ROOT = Path(__file__).resolve().parents[2]
DATA = Path(__file__).resolve().parents[1] / "data" / "formats"
SYSTEMS = ("huggingface", "mindspore", "numpy", "onnx", "orbax", "safetensors", "zarr")
FIXTURES = sorted(
    str(path.relative_to(DATA)).removesuffix(".expect.json")
    for system in SYSTEMS
    for path in (DATA / system).glob("*.expect.json")
)
NEEDS_TENSORSTORE = {"orbax/ocdbt"}
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def environment(name: str, *others: str) -> str:
    """Return the python of the environment that tools/make_envs.sh makes, or skip."""
    envs = Path(os.environ.get("VARSTORE_ENVS", ROOT / ".envs"))
    for candidate in (name, *others):
        python = envs / candidate / "bin" / "python"
        if python.exists():
            return str(python)
    pytest.skip(f"no environment {name} below {envs}: run tools/make_envs.sh {name}")


def run_in(python: str, script: str, *arguments: object) -> str:
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "GLOG_v": "3"}
    done = subprocess.run(
        [python, "-c", script, *map(str, arguments)], env=environ, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def same(found: np.ndarray, expected: np.ndarray) -> None:
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    assert found.tobytes() == expected.tobytes()


def write_safetensors(path: Path, header: object, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


# real files


@pytest.mark.parametrize("fixture", FIXTURES)
def test_fixture_equals_its_truth(fixture):
    path = DATA / fixture
    truth = json.loads(Path(f"{path}.expect.json").read_text())
    if fixture in NEEDS_TENSORSTORE:
        with pytest.raises(MissingDependency, match="tensorstore"):
            verbs.read(path)
        return
    opened = verbs.read(path)
    with np.load(f"{path}.expect.npz") as values:
        assert set(opened) == set(truth["tensors"])
        for name, facts in truth["tensors"].items():
            lazy = opened.lazy(name)
            assert (str(lazy.dtype), list(lazy.shape)) == (facts["dtype"], facts["shape"]), name
            found = opened[name]
            assert found.dtype == lazy.dtype
            same(found.view(values[name].dtype) if "stored_as" in facts else found, values[name])
    state = opened.state()
    for name, scalar in truth["scalars"].items():
        assert state[name] == (np.float32(scalar) if isinstance(scalar, float) else scalar), name
    for name, expected in truth.get("attributes", truth.get("metadata", {})).items():
        assert opened.attributes[name] == expected


def test_every_fixture_is_listed():
    assert len(FIXTURES) == 29


def test_ocdbt_reads_through_tensorstore():
    script = """
import json, sys, numpy as np
sys.path.append(sys.argv[2])
from varstore.formats.zarr import orbax
from varstore.values.lazy import LazyArray
path = sys.argv[1]
opened = orbax.read(path)
truth = json.load(open(path + ".expect.json"))["tensors"]
values = np.load(path + ".expect.npz")
assert set(opened) == set(truth), list(opened)
for name, facts in truth.items():
    assert str(opened[name].dtype) == facts["dtype"] and opened[name].tobytes() == values[name].tobytes(), name
print(len(truth), opened.state()["params"]["dense"]["bias"].shape)
"""
    where = "import os, tensorstore; print(os.path.dirname(os.path.dirname(tensorstore.__file__)), end='')"
    packages = run_in(environment("orbax", "zarr"), where)
    assert run_in(sys.executable, script, DATA / "orbax/ocdbt", packages) == "3 (3,)\n"


def test_orbax_bfloat16_and_lists_without_tensorstore(tmp_path):
    script = """
import sys, jax.numpy as jnp, numpy as np
import orbax.checkpoint as ocp
tree = {"a": [jnp.arange(6, dtype=jnp.bfloat16), jnp.float32(2.5)], "n": {"x.y": np.arange(3)}, "epoch": 7}
ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False)).save(sys.argv[1], tree)
"""
    run_in(environment("orbax", "zarr"), script, tmp_path / "ckpt")
    state = verbs.read(tmp_path / "ckpt").state()
    same(state["a"][0], np.arange(6).astype(BFLOAT16))
    assert isinstance(state["a"], list)
    assert state["a"][1] == np.float32(2.5)
    np.testing.assert_array_equal(state["n"]["x.y"], np.arange(3))
    assert state["epoch"] == 7


def _onnx_with_text(path: Path) -> str:
    tensor = b"\x08\x01\x10\x08\x32\x01x\x42\x01t"  # dims 1, type STRING, one string, name t
    graph = b"\x2a" + bytes([len(tensor)]) + tensor
    path.write_bytes(b"\x08\x08\x3a" + bytes([len(graph)]) + graph)
    return "t"


def _hifloat8(path: Path) -> str:
    path.write_bytes(bytes.fromhex("0a190a01711214080208021208486946 6c6f6174381a0408080808".replace(" ", "")))
    return "q"


NOT_REPRESENTABLE = (
    (
        "text in an ONNX initializer: numpy has no array of strings of any length",
        "x.onnx",
        _onnx_with_text,
        "tensors of strings",
    ),
    ("MindSpore's HiFloat8: no numpy type", "x.ckpt", _hifloat8, "HiFloat8"),
)


@pytest.mark.parametrize(("reason", "file", "make", "message"), NOT_REPRESENTABLE, ids=lambda item: str(item)[:12])
def test_what_cannot_be_represented_is_listed_and_says_so_when_read(tmp_path, reason, file, make, message):
    name = make(tmp_path / file)
    opened = verbs.read(tmp_path / file)
    assert list(opened) == [name]
    with pytest.raises(UnsupportedDtype, match=message):
        opened[name].numpy()


def test_types_that_the_file_does_not_hold(tmp_path):
    """numpy forgets bfloat16; MindSpore's numbers are 0-d arrays: what comes back is what lies there."""
    np.savez(tmp_path / "x.npz", a=np.ones(2, BFLOAT16))
    assert verbs.read(tmp_path / "x.npz")["a"].dtype == np.dtype("V2")
    state = verbs.read(DATA / "mindspore/lenet_train-2_1.ckpt").state()
    assert state["epoch_num"].dtype == np.int64
    assert state["tag"] == "run-a"


# safetensors

ALL_SAFETENSORS = {
    "BOOL": np.bool_, "U8": np.uint8, "I8": np.int8, "I16": np.int16, "U16": np.uint16, "F16": np.float16,
    "BF16": ml_dtypes.bfloat16, "I32": np.int32, "U32": np.uint32, "F32": np.float32, "C64": np.complex64,
    "F64": np.float64, "I64": np.int64, "U64": np.uint64, "F8_E5M2": ml_dtypes.float8_e5m2,
    "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E8M0": ml_dtypes.float8_e8m0fnu,
    "F8_E4M3FNUZ": ml_dtypes.float8_e4m3fnuz, "F8_E5M2FNUZ": ml_dtypes.float8_e5m2fnuz,
    "F4": ml_dtypes.float4_e2m1fn, "F6_E2M3": ml_dtypes.float6_e2m3fn, "F6_E3M2": ml_dtypes.float6_e3m2fn,
}  # fmt: skip


@pytest.mark.parametrize("name", ALL_SAFETENSORS)
def test_safetensors_type(tmp_path, name):
    values = np.arange(8).reshape(2, 4).astype(ALL_SAFETENSORS[name])
    path = tmp_path / "x.safetensors"
    safetensors.write(str(path), {"a": values, "b": np.float64(1)})
    same(safetensors.read(str(path))["a"], values)
    header = json.loads(path.read_bytes()[8 : 8 + int.from_bytes(path.read_bytes()[:8], "little")])
    assert header["a"]["dtype"] == name


def test_packed_values_begin_in_the_low_bits(tmp_path):
    header = {"a": {"dtype": "F4", "shape": [4], "data_offsets": [0, 2]}}
    path = write_safetensors(tmp_path / "x.safetensors", header, b"\x21\x43")
    assert safetensors.read(str(path))["a"].astype(np.float32).tolist() == [0.5, 1, 1.5, 2]


@given(st.sampled_from([ml_dtypes.int2, ml_dtypes.uint4, ml_dtypes.int4, ml_dtypes.float6_e2m3fn]), st.data())
def test_packing_round_trip(scalar, data):
    dtype = np.dtype(scalar)
    bits = packing.bits_of(dtype)
    codes = data.draw(hnp.arrays(np.uint8, st.integers(0, 40), elements=st.integers(0, 2**bits - 1)))
    packed = packing.pack(codes.view(dtype))
    assert packed.size == (codes.size * bits + 7) // 8
    number = int.from_bytes(packed.tobytes(), "little")
    assert [number >> bits * i & 2**bits - 1 for i in range(codes.size)] == codes.tolist()
    assert (packing.unpack(packed, codes.size, dtype).view(np.uint8) & 2**bits - 1).tolist() == codes.tolist()


def test_packing_in_more_than_one_step():
    codes = np.random.default_rng(0).integers(0, 64, (1 << 20) * 2 + 3, np.uint8)
    packed = packing.pack(codes.view(ml_dtypes.float6_e3m2fn))
    assert (
        packed.tobytes()
        == np.packbits(
            np.unpackbits(codes[:, None], axis=1, count=6, bitorder="little").reshape(-1), bitorder="little"
        ).tobytes()
    )
    same(packing.unpack(packed, codes.size, np.dtype(ml_dtypes.float6_e3m2fn)).view(np.uint8), codes)


def test_the_library_loads_what_is_written(tmp_path):
    path = str(tmp_path / "x.safetensors")
    fortran = np.asfortranarray(np.arange(12.0).reshape(3, 4))
    values = {
        "f": fortran,
        "r": fortran[::-1, ::2],
        "big": np.arange(3, dtype=">i2"),
        "e": np.zeros((0, 2)),
        "é/n": True,
    }
    safetensors.write(path, values)
    loaded = load_file(path)
    assert set(loaded) == set(values)
    for name, value in values.items():
        np.testing.assert_array_equal(loaded[name], value)


def test_shards_and_index(tmp_path):
    path = tmp_path / "model.safetensors.index.json"
    values = {f"w{i}": np.full(100, i, np.float32) for i in range(5)}
    safetensors.write(str(path), values, shard_bytes=800)
    index = json.loads(path.read_text())
    assert index["metadata"]["total_size"] == 2000
    assert sorted(set(index["weight_map"].values())) == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    for name, file in index["weight_map"].items():
        np.testing.assert_array_equal(load_file(str(tmp_path / file))[name], values[name])
    opened = verbs.read(path)
    assert set(opened) == set(values)
    for name in values:
        same(opened[name], values[name])


def test_tied_names(tmp_path):
    path = str(tmp_path / "x.safetensors")
    save_file({"lm_head": np.ones(3)}, path, metadata={"embed": "lm_head", "format": "lm_head"})
    opened = safetensors.read(path)
    assert set(opened) == {"lm_head", "embed"}
    assert opened.lazy("embed") is opened.lazy("lm_head")


# numpy


def test_npz_of_many_kinds(tmp_path):
    path = tmp_path / "x.npz"
    values = {
        "c": np.asfortranarray(np.arange(6).reshape(2, 3)),
        "big": np.arange(4, dtype=">f4"),
        "s": np.float64(2),
        "text": np.array(["ab", "c"]),
        "rows": np.array([(1, 2.5)], dtype=[("a", "<i4"), ("b", ">f8")]),
    }
    for save in (np.savez, np.savez_compressed):
        save(path, **values)
        opened = numpy.read(str(path))
        assert set(opened) == set(values)
        for name, value in values.items():
            np.testing.assert_array_equal(opened[name], value)
            assert opened[name].dtype == opened.lazy(name).dtype
        assert opened["big"].dtype == np.float32


@pytest.mark.parametrize("method", ["ZIP_STORED", "ZIP_DEFLATED", "ZIP_BZIP2"])
def test_npz_compression_and_other_members(tmp_path, method):
    import io
    import zipfile

    one = io.BytesIO()
    np.save(one, np.arange(5000))
    with zipfile.ZipFile(tmp_path / "x.npz", "w", getattr(zipfile, method)) as archive:
        archive.writestr("readme.txt", "hello")
        archive.writestr("a.npy", one.getvalue())
    opened = numpy.read(str(tmp_path / "x.npz"))
    same(opened["a"], np.arange(5000))
    assert opened.attributes == {"other_members": ["readme.txt"]}


def test_numpy_loads_what_is_written(tmp_path):
    values = {"a/b": np.arange(6).reshape(2, 3).T, "n": 3, "e": np.zeros((0, 2)), "c": np.complex64(1j)}
    numpy.write(str(tmp_path / "x.npz"), values)
    with np.load(tmp_path / "x.npz") as loaded:
        assert loaded.files == list(values)
        for name, value in values.items():
            np.testing.assert_array_equal(loaded[name], value)
    numpy.write(str(tmp_path / "x.npy"), values["a/b"])
    same(np.load(tmp_path / "x.npy"), np.ascontiguousarray(values["a/b"]))
    same(numpy.read(str(tmp_path / "x.npy"))[BARE], np.ascontiguousarray(values["a/b"]))


# mindspore


def test_mindspore_slices_text_and_what_counts_last(tmp_path):
    path = tmp_path / "x.ckpt"
    with path.open("wb") as file:
        mindspore._write_slice(file, "a", (2,), "Int32", np.frombuffer(np.int32([9, 9]).tobytes(), np.uint8))
        for part in (np.int32([1]), np.int32([2])):
            mindspore._write_slice(file, "w", (2,), "Int32", np.frombuffer(part.tobytes(), np.uint8))
        mindspore._write_slice(file, "a", (0,), "Int64", np.frombuffer(np.int64(5).tobytes(), np.uint8))
    opened = mindspore.read(str(path))
    same(opened["w"], np.int32([1, 2]))
    same(opened["a"], np.asarray(np.int64(5)))


def test_mindspore_large_tensors_are_sliced(tmp_path, monkeypatch):
    monkeypatch.setattr(mindspore, "_SLICE", 16)
    path = str(tmp_path / "x.ckpt")
    mindspore.write(path, {"w": np.arange(10.0)})
    assert Path(path).read_bytes().count(b"Float64") == 5
    same(mindspore.read(path)["w"], np.arange(10.0))


def test_mindspore_checks_its_crc_when_asked(tmp_path):
    damaged = bytearray((DATA / "mindspore/lenet_crc.ckpt").read_bytes())
    damaged[500] ^= 1
    (tmp_path / "x.ckpt").write_bytes(damaged)
    mindspore.read(str(DATA / "mindspore/lenet_crc.ckpt"), crc_check=True)
    mindspore.read(str(tmp_path / "x.ckpt"))
    with pytest.raises(DigestMismatch, match="CRC-32"):
        mindspore.read(str(tmp_path / "x.ckpt"), crc_check=True)


def test_mindspore_loads_what_is_written(tmp_path):
    values = {
        str(np.dtype(scalar)): np.arange(6).reshape(2, 3).astype(scalar)
        for scalar in (np.bool_, np.int8, np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.int64, np.uint64,
                       np.float16, np.float32, np.float64)
    }  # fmt: skip
    values |= {"bf": np.arange(4).astype(BFLOAT16), "zero": np.zeros((0, 3), np.float32), "n": np.float32(2), "t": "hé"}
    mindspore.write(str(tmp_path / "x.ckpt"), values)
    safetensors.write(str(tmp_path / "x.safetensors"), {"a": np.arange(3.0)})
    script = """
import sys, numpy as np, mindspore as ms
loaded = ms.load_checkpoint(sys.argv[1])
text = loaded.pop("t")
arrays = {k: (v.float() if "BFloat16" in str(v.dtype) else v).asnumpy() for k, v in loaded.items()}
np.savez(sys.argv[2], **arrays, t=np.array(text))
assert ms.load_checkpoint(sys.argv[3], format="safetensors")["a"].asnumpy().tolist() == [0, 1, 2]
"""
    python = environment("mindspore")
    run_in(python, script, tmp_path / "x.ckpt", tmp_path / "out.npz", tmp_path / "x.safetensors")
    with np.load(tmp_path / "out.npz") as loaded:
        assert set(loaded) == set(values)
        for name, value in values.items():
            expected = np.asarray(value)
            np.testing.assert_array_equal(loaded[name], expected.astype(np.float32) if name == "bf" else expected)


@pytest.mark.parametrize(("mode", "size"), [("AES-GCM", 16), ("AES-GCM", 32), ("AES-CBC", 24), ("SM4-CBC", 16)])
def test_mindspore_encrypted(tmp_path, mode, size):
    script = """
import sys, numpy as np, mindspore as ms
data = [{"name": "w", "data": ms.Tensor(np.arange(6, dtype=np.float32).reshape(2, 3))}]
ms.save_checkpoint(data, sys.argv[1], enc_key=bytes(range(int(sys.argv[3]))), enc_mode=sys.argv[2])
"""
    path = tmp_path / "x.ckpt"
    run_in(environment("mindspore"), script, path, mode, size)
    assert registry.detect(path).name == "mindspore"
    with pytest.raises(UsageError, match="encrypted"):
        verbs.read(path)
    with pytest.raises(UsageError, match="not a key"):
        verbs.read(path, key=b"short")
    pytest.importorskip("cryptography")
    same(verbs.read(path, key=bytes(range(size)))["w"], np.arange(6, dtype=np.float32).reshape(2, 3))
    with pytest.raises(DigestMismatch, match="this key"):
        verbs.read(path, key=bytes(size))


# onnx


@pytest.mark.parametrize("name", ["mlp_inline.onnx", "mlp_external.onnx", "torch_export.onnx"])
def test_onnx_replaces_initializers(tmp_path, name):
    model, path = str(DATA / "onnx" / name), str(tmp_path / "copy.onnx")
    before = onnx.read(model)
    first = next(iter(before))
    onnx.write(path, {first: before[first] + 1}, model=model)
    after = onnx.read(path)
    assert list(after) == list(before)
    for tensor in before:
        same(after[tensor], before[tensor] + 1 if tensor == first else before[tensor])
    assert (tmp_path / "copy.onnx.data").exists() == ("external" in name)


def test_onnx_refuses_what_does_not_fit(tmp_path):
    model, path = str(DATA / "onnx/mlp_inline.onnx"), str(tmp_path / "x.onnx")
    with pytest.raises(UsageError, match=r"model=…"):
        onnx.write(path, {})
    with pytest.raises(VariableNotFound, match=r"The nearest are"):
        onnx.write(path, {"fc1.weigth": np.zeros((12, 8), np.float32)}, model=model)
    with pytest.raises(VariableMismatch, match="another shape or type"):
        onnx.write(path, {"fc1.weight": np.zeros((12, 8))}, model=model)
    assert not list(tmp_path.iterdir())


def test_onnxruntime_runs_what_is_written(tmp_path):
    script = """
import sys, numpy as np, onnx, onnxruntime
onnx.checker.check_model(sys.argv[1])
outputs = []
for path in sys.argv[1:3]:
    session = onnxruntime.InferenceSession(path)
    shapes = {i.name: [d if isinstance(d, int) else 1 for d in i.shape] for i in session.get_inputs()}
    feed = {name: np.ones(shape, np.float32) for name, shape in shapes.items()}
    outputs.append(session.run(None, feed)[0])
assert np.all(outputs[0] == 2.5), outputs[0]
assert not np.all(outputs[1] == 2.5)
"""
    python = environment("onnx")
    for name in ("mlp_inline.onnx", "mlp_external.onnx", "torch_export.onnx"):
        model = DATA / "onnx" / name
        opened = onnx.read(str(model))
        values = {key: np.zeros_like(opened[key]) for key in opened}
        values["fc2.bias"] = values["fc2.bias"] + np.float32(2.5)
        onnx.write(str(tmp_path / name), values, model=str(model))
        run_in(python, script, tmp_path / name, model)


def test_onnx_every_type_in_typed_and_raw_fields(tmp_path):
    script = """
import sys, numpy as np, onnx
from onnx import TensorProto as T, helper, numpy_helper
rng, tensors, truth = np.random.default_rng(0), [], {}
for name, number in T.DataType.items():
    if name in ("UNDEFINED", "STRING"):
        continue
    values = rng.integers(0, 2, (3, 5))
    values = -values if name in ("INT4", "INT2", "INT8", "INT64") else values
    values = values.astype(helper.tensor_dtype_to_np_dtype(number))
    raw = numpy_helper.from_array(values, f"{name}_raw")
    typed = helper.make_tensor(f"{name}_typed", number, (3, 5), values.ravel())
    assert raw.raw_data and not typed.raw_data
    tensors += [raw, typed]
    truth.update({f"{name}_raw": values.astype(complex), f"{name}_typed": values.astype(complex)})
onnx.save(helper.make_model(helper.make_graph([], "g", [], [], initializer=tensors)), sys.argv[1])
np.savez(sys.argv[2], **truth)
"""
    path = tmp_path / "types.onnx"
    run_in(environment("onnx"), script, path, tmp_path / "truth.npz")
    opened = verbs.read(path)
    with np.load(tmp_path / "truth.npz") as truth:
        assert set(opened) == set(truth)
        assert len(truth.files) >= 44
        for name in truth:
            np.testing.assert_array_equal(opened[name].astype(complex), truth[name], err_msg=name)


# zarr


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_zarr_loads_what_is_written(tmp_path, zarr_format):
    path = str(tmp_path / "x.zarr")
    values = {"a": np.arange(6).reshape(2, 3).T, "b/c": np.float32(3.5), "b/e": np.zeros((0, 2)), "m": np.array([True])}
    zarr.write(path, values, attributes={"epoch": 2}, zarr_format=zarr_format)
    group = zarr_library.open_group(path, mode="r")
    assert dict(group.attrs) == {"epoch": 2}
    for name, value in values.items():
        np.testing.assert_array_equal(np.asarray(group[name][...]), value)
    opened = verbs.read(path)
    assert opened.attributes == {"epoch": 2}
    assert set(opened) == set(values)
    for name, value in values.items():
        same(opened[name], np.asarray(value))
    with pytest.raises(CheckpointExists, match="path is taken"):
        zarr.write(path, values)
    assert os.listdir(tmp_path) == ["x.zarr"]


def test_zarr_root_array_absent_chunks_and_shards(tmp_path):
    array = zarr_library.create_array(
        str(tmp_path / "x.zarr"), shape=(10, 4), chunks=(2, 2), shards=(4, 4), dtype="f4", fill_value=7
    )
    array[4:6] = 1
    values = np.full((10, 4), 7, np.float32)
    values[4:6] = 1
    same(verbs.read(tmp_path / "x.zarr")[BARE], values)


# all writers


def leaves(scalars: tuple[object, ...]) -> st.SearchStrategy[np.ndarray]:
    shapes = hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4)

    def of(scalar: object) -> st.SearchStrategy[np.ndarray]:
        dtype = np.dtype(scalar)
        raw = shapes.flatmap(lambda shape: hnp.arrays(np.uint8, (*shape, dtype.itemsize)))
        return raw.map(
            lambda bits: (bits & 1).view(np.bool_)[..., 0] if dtype.kind == "b" else bits.view(dtype)[..., 0]
        )

    return st.sampled_from(scalars).flatmap(of)


PLAIN = (np.bool_, np.int8, np.uint16, np.int32, np.int64, np.uint64, np.float16, np.float32, np.float64)
NAMES = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=12)
SAFE_NAMES = NAMES.filter(lambda name: name != "__metadata__")
ZIP_NAMES = NAMES.filter(lambda name: name[0] not in "/\\" and ".." not in name)


@pytest.mark.parametrize(
    ("module", "suffix", "scalars", "names"),
    [
        (safetensors, ".safetensors", (*PLAIN, np.complex64, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn), SAFE_NAMES),
        (numpy, ".npz", (*PLAIN, np.complex64, np.complex128), ZIP_NAMES),
        (mindspore, ".ckpt", (*PLAIN, ml_dtypes.bfloat16), NAMES),
    ],
    ids=["safetensors", "numpy", "mindspore"],
)
def test_round_trip(tmp_path, module, suffix, scalars, names):
    path = str(tmp_path / f"x{suffix}")

    @settings(deadline=None)
    @given(st.dictionaries(names, leaves(scalars), max_size=5))
    def check(values):
        if module is mindspore:
            values = {name: value for name, value in values.items() if value.shape != (0,)}
        module.write(path, values)
        opened = verbs.read(path, {".npz": "numpy", ".ckpt": "mindspore"}.get(suffix))
        assert set(opened) == set(values)
        for name, value in values.items():
            same(opened[name], value)
        if module is safetensors and all(value.dtype.type.__module__ == "numpy" for value in values.values()):
            loaded = load_file(path)
            assert {name: loaded[name].tobytes() for name in loaded} == {n: v.tobytes() for n, v in values.items()}
        if module is numpy:
            with np.load(path) as archive:
                assert {name: archive[name].tobytes() for name in archive} == {
                    n: v.tobytes() for n, v in values.items()
                }

    check()


def test_every_writer_flattens_refuses_and_leaves_nothing_behind(tmp_path):
    writers = {".safetensors": safetensors, ".npz": numpy, ".ckpt": mindspore, ".zarr": zarr}
    for suffix, module in writers.items():
        path = str(tmp_path / f"x{suffix}")
        module.write(path, {"a": [np.ones(2), {"b": 3}], 7: np.float32(1)})
        opened = module.read(path)
        assert set(opened) == {"a/0", "a/1/b", "7"}
        bad = {
            "text": ({"a": {"b": "text"}}, UsageError, "contain only tensors and numbers"),
            "none": ({"a": None}, UsageError, "contain only tensors and numbers"),
            "twice": ({"a": {"b": np.ones(1)}, "a/b": np.ones(1)}, UsageError, "have the same name"),
            "surrogate": ({"\ud800": np.ones(1)}, InvalidName, "surrogate"),
            "object": ({"a": np.array([None])}, UnsupportedDtype, "object"),
            "int4": ({"a": np.ones(2, ml_dtypes.int4)}, UnsupportedDtype, "int4"),
            "lie": (
                {"a": LazyArray((2,), np.dtype("f4"), lambda: np.ones(3, "f4"))},
                VariableMismatch,
                "shape and type that the array stated",
            ),
        }
        for case, (state, error, message) in bad.items():
            target = tmp_path / f"{case}{suffix}"
            with pytest.raises(error, match=message):
                module.write(str(target), state)
            assert not target.exists()
    assert sorted(os.listdir(tmp_path)) == sorted(f"x{suffix}" for suffix in writers)


@pytest.mark.parametrize("suffix", [".safetensors", ".npy", ".npz"])
def test_opening_a_large_file_and_reading_one_tensor_reads_no_more(tmp_path, suffix):
    path, size = tmp_path / f"x{suffix}", 3 << 30
    if suffix == ".safetensors":
        header = {
            "big": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]},
            "small": {"dtype": "U8", "shape": [2], "data_offsets": [size, size + 2]},
        }
        write_safetensors(path, header)
        end = path.stat().st_size + size
        with path.open("r+b") as file:
            file.seek(end)
            file.write(b"\1\2")
    elif suffix == ".npy":
        np.lib.format.open_memmap(path, "w+", np.uint8, (size,)).flush()
    else:
        numpy.write(str(path), {"small": np.uint8([1, 2])})
    tracemalloc.start()
    try:
        opened = verbs.read(path)
        if "small" in opened:
            assert opened["small"].tolist() == [1, 2]
        else:
            assert opened.lazy(BARE).nbytes == size
        assert tracemalloc.get_traced_memory()[1] < 2 << 20
    finally:
        tracemalloc.stop()


# the table, and convert


def test_unknown_formats_are_named(tmp_path):
    (tmp_path / "x").write_bytes(b"what is this?")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/a.txt").write_text("")
    for path in ("x", "folder"):
        with pytest.raises(UsageError, match=r"safetensors.*mindspore") as raised:
            registry.detect(tmp_path / "x")
        assert "b'what is thi" in str(raised.value), path
    with pytest.raises(UsageError, match="there is no such format"):
        verbs.read(tmp_path / "x", "tensorflow")
    with pytest.raises(UsageError, match="cannot be determined from the suffix"):
        verbs.write(tmp_path / "x.h5", {"a": np.ones(1)})
    with pytest.raises(UsageError, match="can be read, but not written"):
        verbs.write(tmp_path / "x", {"a": np.ones(1)}, "orbax")


@pytest.mark.parametrize("suffix", [".safetensors", ".npz", ".ckpt", ".zarr"])
def test_content_tells_before_the_suffix(tmp_path, suffix):
    right, wrong = tmp_path / f"x{suffix}", tmp_path / "x.pt"
    verbs.write(right, {"a": np.ones(2)})
    expected = registry.detect(right)
    right.rename(wrong)
    assert registry.detect(wrong) == expected
    same(verbs.read(wrong)["a"], np.ones(2))


CHAIN = ("a.npz", "b.safetensors", "c.ckpt", "d.zarr", "native", "e.safetensors.index.json")


def test_convert_around_all_formats(tmp_path):
    values = {"w": np.arange(6, dtype=np.float32).reshape(2, 3), "n/b": np.arange(3), "s": np.asarray(True)}
    verbs.write(tmp_path / CHAIN[0], values)
    for source, target in pairwise(CHAIN):
        done = verbs.convert(tmp_path / source, tmp_path / target)
        assert set(done.names) == set(values)
        assert done.nbytes == sum(value.nbytes for value in values.values())
        opened = verbs.read(tmp_path / target)
        for name, value in values.items():
            same(np.asarray(opened[name]), value)
    assert vs.verify(tmp_path / "native").ok


def test_convert_selects_renames_casts_and_reports(tmp_path):
    mindspore.write(
        str(tmp_path / "x.ckpt"),
        {"net.w": np.ones((2, 2)), "net.step": np.int64(3), "moments.w": np.ones(4), "tag": "run"},
    )
    seen: list[tuple[int, int]] = []
    done = verbs.convert(
        tmp_path / "x.ckpt",
        tmp_path / "x.safetensors",
        exclude="moments.*",
        rename={"net": "model"},
        dtype="bfloat16",
        progress=lambda *counts: seen.append(counts),
    )
    assert done.left_out == ("tag",)
    assert (done.source_format, done.format) == ("mindspore", "safetensors")
    opened = verbs.read(tmp_path / "x.safetensors")
    same(opened["model.w"], np.ones((2, 2), BFLOAT16))
    same(opened["model.step"], np.asarray(np.int64(3)))
    assert seen[0] == (0, 40)
    assert seen[-1] == (40, 40)
    with pytest.raises(UnsupportedDtype, match="floating"):
        verbs.convert(tmp_path / "x.ckpt", tmp_path / "y.safetensors", dtype="int8")
    with pytest.raises(UsageError, match="the same"):
        verbs.convert(tmp_path / "x.ckpt", tmp_path / "x.ckpt")
    with pytest.raises(VariableNotFound):
        verbs.convert(tmp_path / "x.ckpt", tmp_path / "y.npz", include="nothing*")


def test_nested_state_stays_nested_where_the_target_can(tmp_path):
    verbs.write(tmp_path / "x.mge", {"model": {"w": np.ones(2, np.float32)}, "steps": [1, np.zeros(3)], "tag": "run"})
    done = verbs.convert(tmp_path / "x.mge", tmp_path / "x.pt", dtype="float16")
    assert done.left_out == ()
    state = verbs.read(tmp_path / "x.pt").state()
    assert (state["steps"][0], state["tag"]) == (1, "run")
    same(state["model"]["w"], np.ones(2, np.float16))
    same(state["steps"][1], np.zeros(3, np.float16))
    done = verbs.convert(tmp_path / "x.mge", tmp_path / "y.pt", include="model/*")
    assert done.left_out == ("steps/0", "tag")
    assert list(verbs.read(tmp_path / "y.pt")) == ["model/w"]


def test_convert_keeps_the_state_of_a_checkpoint(tmp_path):
    state = {"model": {"w": np.ones(2, np.float32)}, "epoch": 3, "betas": (0.9, 0.999)}
    save_state(tmp_path / "x", state)
    verbs.convert(tmp_path / "x", tmp_path / "y", dtype="float16")
    found = load_state(tmp_path / "y")
    assert (found["epoch"], found["betas"]) == (3, (0.9, 0.999))
    same(found["model"]["w"], np.ones(2, np.float16))
    verbs.convert(tmp_path / "x", tmp_path / "z", include="model/*", rename={"model/": ""})
    assert list(load_state(tmp_path / "z")) == ["w"]


def test_convert_keeps_ties_one_in_the_checkpoint(tmp_path):
    save_file({"head": np.ones(1000)}, str(tmp_path / "x.safetensors"), metadata={"embed": "head"})
    verbs.convert(tmp_path / "x.safetensors", tmp_path / "native")
    assert os.path.samefile(tmp_path / "native/head/out", tmp_path / "native/embed/out")


def test_convert_between_checkpoints_links(tmp_path):
    vs.save(tmp_path / "a", {"w": np.ones(100)})
    verbs.convert(tmp_path / "a", tmp_path / "b", rename={"w": "v"})
    assert os.path.samefile(tmp_path / "a/w/out", tmp_path / "b/v/out")


@pytest.mark.parametrize("target", ["y.safetensors", "y.npz", "y.ckpt", "native"])
def test_converting_takes_the_memory_of_the_largest_tensor(tmp_path, target):
    size, count = 4 << 20, 12
    numpy.write(str(tmp_path / "x.npz"), {f"w{i}": np.full(size, i, np.uint8) for i in range(count)})
    tracemalloc.start()
    try:
        verbs.convert(tmp_path / "x.npz", tmp_path / target)
        assert tracemalloc.get_traced_memory()[1] < 4 * size
    finally:
        tracemalloc.stop()
    assert verbs.read(tmp_path / target)["w11"][0] == 11


def test_nested_state_goes_into_a_checkpoint_and_out_again(tmp_path):
    state = {"epoch": 3, "model": {"w": np.ones((2, 3), np.float32)}, "m": np.ones(2), "sizes": [1, 2.5, "x", None]}
    verbs.write(tmp_path / "x.pt", state)
    there = verbs.convert(tmp_path / "x.pt", tmp_path / "ckpt")
    assert there.left_out == ()
    loaded = load_state(tmp_path / "ckpt")
    assert (loaded["epoch"], loaded["sizes"]) == (3, [1, 2.5, "x", None])
    same(loaded["model"]["w"], state["model"]["w"])
    back = verbs.convert(tmp_path / "ckpt", tmp_path / "y.pt")
    assert back.left_out == ()
    assert verbs.read(tmp_path / "y.pt").state()["sizes"] == [1, 2.5, "x", None]
    flat = verbs.convert(tmp_path / "ckpt", tmp_path / "y.safetensors")
    assert flat.names == ("model/w", "m")
    assert set(flat.left_out) == {"epoch", "sizes/0", "sizes/1", "sizes/2", "sizes/3"}
    some = verbs.convert(tmp_path / "ckpt", tmp_path / "some", include="model/*")
    assert "epoch" in some.left_out


def test_what_read_returns_has_a_selection(tmp_path):
    safetensors.write(str(tmp_path / "x.safetensors"), {"a.w": np.arange(4), "b.w": np.ones(2)})
    chosen = verbs.read(tmp_path / "x.safetensors").select(include="a.*", rename={"a": "c"})
    assert list(chosen) == ["c.w"]
    assert np.array_equal(chosen["c.w"].numpy(), np.arange(4))
    with pytest.raises(VariableNotFound):
        verbs.read(tmp_path / "x.safetensors").select(include="z*")


def test_a_checkpoint_is_opened_like_any_file(tmp_path):
    vs.save_state(tmp_path / "a", {"w": np.arange(3), "epoch": 3})
    opened = vs.read(tmp_path / "a")
    assert (opened.format, opened.state()["epoch"], list(opened.select(rename={"w": "v"}))) == ("varstore", 3, ["v"])
    again = pickle.loads(pickle.dumps(opened))
    assert type(again) is type(opened)
    assert again.lazy("w").numpy().tolist() == [0, 1, 2]
    vs.save(tmp_path / "b", {"w": np.arange(3)})
    assert vs.read(tmp_path / "b").state()["w"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("name", ["../x", "/etc/x", "..\\x", "a/../../x", "c:/x", "x/"])
def test_the_name_of_a_member_of_an_npz_is_a_key(tmp_path, name):
    """Nothing is unpacked, so it can lead nowhere; what it would be as a path is decided where a file is made of it."""
    path = tmp_path / "a" / "b" / "x.npz"
    path.parent.mkdir(parents=True)
    with zipfile.ZipFile(path, "w") as archive:
        info = zipfile.ZipInfo("placeholder")
        info.filename = f"{name}.npy"
        with archive.open(info, "w") as member:
            np.lib.format.write_array(member, np.arange(3.0))
    before = sorted(tmp_path.rglob("*"))
    opened = vs.read(path)
    assert list(opened) == [name]
    assert opened[name].numpy().tolist() == [0, 1, 2]
    assert sorted(tmp_path.rglob("*")) == before
    with contextlib.suppress(InvalidName):
        vs.convert(path, tmp_path / "a" / "c")
    with contextlib.suppress(InvalidName):
        vs.convert(path, tmp_path / "a" / "c.npz")
    assert {entry.name for entry in tmp_path.iterdir()} == {"a"}
