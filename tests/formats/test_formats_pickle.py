"""The formats that are pickles: real files equal to their truth, the machine equal to Python's own, laziness."""

from __future__ import annotations

import io
import pickle
import struct
import sys
import tracemalloc
import zipfile
import zlib
from collections import Counter, OrderedDict, defaultdict
from pathlib import Path
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from support import FIXTURES, ROOT, arrays, assert_same, crafted, load_facts, load_truth, run_python

import varstore as vs
from varstore.errors import (
    DigestMismatch,
    FormatError,
    SizeMismatch,
    UnsafeContent,
    UnsupportedDtype,
    UsageError,
    VariableNotFound,
    VarstoreError,
)
from varstore.formats import megengine, oneflow, torch
from varstore.formats.binary.budget import Budget
from varstore.formats.binary.source import Source
from varstore.formats.binary.zip import archive_members
from varstore.formats.opened import ForeignCheckpoint
from varstore.formats.paddle import states as paddle
from varstore.formats.pickles.arrays import PLAIN
from varstore.formats.pickles.machine import Machine
from varstore.formats.pickles.tree import DEEPEST, plain_tree
from varstore.formats.torch import distributed
from varstore.formats.torch.tensors import Storage, Storages
from varstore.formats.torch.zip import read_zip
from varstore.values.lazy import LazyArray
from varstore.values.nodes import BARE, leaves
from varstore.values.opaque import Opaque

pytestmark = pytest.mark.core

READERS: dict[str, ModuleType] = {"torch": torch, "paddle": paddle, "megengine": megengine, "oneflow": oneflow}

NOT_REPRESENTED = {
    "oneflow/lenet_legacy_nometa": "a variable has no meta: its shape and type are not on disk",
    "formats/paddle/jit_linear.pdiparams": "its structured names are not on disk, only parameter names",
}
"""Fixtures that do not read as their truth says, and why."""


def fixtures() -> list[str]:
    """Return the fixtures of these formats, as paths below tests/data."""
    folders = [*(FIXTURES / "formats" / name for name in READERS), FIXTURES / "oneflow"]
    found = [path for folder in folders for path in folder.glob("*.expect.json")]
    return sorted(str(path.relative_to(FIXTURES)).removesuffix(".expect.json") for path in found)


def read(fixture: str) -> ForeignCheckpoint:
    return READERS[Path(fixture).parent.name].read(FIXTURES / fixture)


def scalars_of(node: Any, path: tuple[Any, ...] = ()) -> dict[str, Any]:
    """Return what is no array or record, under the names of the truth files."""
    if isinstance(node, (np.ndarray, Opaque)):
        return {}
    if isinstance(node, dict):
        return {name: v for key, value in node.items() for name, v in scalars_of(value, (*path, key)).items()}
    if isinstance(node, (list, tuple)):
        return {name: v for key, value in enumerate(node) for name, v in scalars_of(value, (*path, key)).items()}
    return {"/".join(map(str, path)): node}


def described(value: Any) -> Any:
    """Return what a record says, as the truth files do."""
    if isinstance(value, np.ndarray):
        return {"array": value.tolist()}
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, bytes):
        return {"bytes": value.hex()}
    if isinstance(value, dict):
        return {key: described(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [described(item) for item in value]
    if not isinstance(value, Opaque):
        return value
    parts = {"arguments": value.arguments, "state": value.state, "items": value.items}
    said = {part: described(content) for part, content in parts.items() if content is not None}
    return {"name": f"{value.module}.{value.name}".replace("__builtin__", "builtins"), **said}


def agrees(found: Any, expected: Any) -> bool:
    """Tell whether a record is as the truth says, which does not repeat what an object is a part of."""
    if expected == {"again": True}:
        return isinstance(found, dict) and set(found) == {"name"}
    if isinstance(expected, dict) and isinstance(found, dict):
        return set(expected) == set(found) and all(agrees(found[key], expected[key]) for key in expected)
    if isinstance(expected, list) and isinstance(found, list):
        return len(expected) == len(found) and all(map(agrees, found, expected))
    return bool(found == expected)


# --- real files --------------------------------------------------------------------------------------------------


def test_there_are_fixtures_of_every_format() -> None:
    assert {Path(fixture).parent.name for fixture in fixtures()} == set(READERS)
    assert set(NOT_REPRESENTED) <= set(fixtures())


@pytest.mark.parametrize("fixture", [fixture for fixture in fixtures() if fixture not in NOT_REPRESENTED])
def test_real_files_read_as_their_truth(fixture: str) -> None:
    checkpoint, facts = read(fixture), load_facts(FIXTURES / fixture)
    expected = load_truth(FIXTURES / fixture)
    assert set(checkpoint) == set(expected)
    for name, values in expected.items():
        lazy = checkpoint.lazy(name)
        assert (lazy.shape, lazy.dtype) == (values.shape, values.dtype)
        assert_same(lazy.numpy(), values)
    state, scalars = checkpoint.state(), scalars_of(checkpoint.state())
    assert {name: value for name, value in scalars.items() if name in facts["scalars"]} == facts["scalars"]
    assert "rest" in facts or set(scalars) == set(facts["scalars"])
    records = {name: leaf for name, leaf in leaves(state) if isinstance(leaf, Opaque)}
    assert set(records) == set(facts.get("objects", {}))
    for name, record in records.items():
        assert agrees(described(record), facts["objects"][name]), (described(record), facts["objects"][name])
    ordered = dict if checkpoint.format == "paddle" else OrderedDict  # paddle.save makes plain dicts of them
    kinds = {"dict": dict, "list": list, "OrderedDict": ordered, "tuple": tuple}
    for path, kind in facts["containers"].items():
        node = checkpoint.state()
        for key in filter(None, path.split("/")):
            node = node[key if isinstance(node, dict) and key in node else int(key)]
        assert isinstance(node, kinds.get(kind, dict))


def test_a_variable_without_meta_is_named() -> None:
    with pytest.raises(FormatError, match="conv1-bias") as caught:
        read("oneflow/lenet_legacy_nometa")
    assert "does not have a file meta" in caught.value.problem


def test_a_program_of_paddle_has_parameter_names_only() -> None:
    fixture = "formats/paddle/jit_linear.pdiparams"
    checkpoint, truth = read(fixture), load_truth(FIXTURES / fixture)
    names = {facts["paddle_name"]: name for name, facts in load_facts(FIXTURES / fixture)["tensors"].items()}
    assert set(checkpoint) == set(names)
    for own, structured in names.items():
        assert_same(checkpoint[own].numpy(), truth[structured])


def test_no_framework_is_needed_to_read() -> None:
    code = """
import sys
for name in ("torch", "paddle", "megengine", "oneflow", "zarr", "safetensors", "onnx", "tensorstore"):
    sys.modules[name] = None
import importlib
for line in sys.argv[1:]:
    reader, path = line.split("=", 1)
    assert len(importlib.import_module("varstore.formats." + reader).read(path)), path
print("read", len(sys.argv) - 1)
"""
    files = [f"{Path(f).parent.name}={FIXTURES / f}" for f in fixtures() if f != "oneflow/lenet_legacy_nometa"]
    assert run_python(code, *files, PYTHONPATH=str(ROOT)).stdout.split() == ["read", str(len(files))]


def test_equal_views_are_one_array() -> None:
    checkpoint = read("formats/torch/shared_storage.pt")
    assert checkpoint.lazy("w") is checkpoint.lazy("tied")
    assert checkpoint.lazy("w") is not checkpoint.lazy("wT")


# --- the machine against Python's own ----------------------------------------------------------------------------

_keys = st.one_of(st.text(max_size=400), st.integers(-(2**60), 2**60), st.booleans(), st.none(), st.binary(max_size=9))
_numbers = st.one_of(st.integers(), st.floats(allow_nan=False), st.complex_numbers(allow_nan=False))
_plain = st.recursive(
    st.one_of(
        st.none(), st.booleans(), _numbers, st.text(max_size=600), st.binary(max_size=600),
        st.sets(_keys, max_size=3), st.builds(frozenset, st.sets(_keys)),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.lists(inner, max_size=4).map(tuple), st.dictionaries(_keys, inner, max_size=4),
        st.dictionaries(_keys, inner, max_size=4).map(OrderedDict),
    ),
    max_leaves=20,
)  # fmt: skip


def unpickled(data: bytes, **options: Any) -> Any:
    machine = Machine(data, path="memory", table=PLAIN, budget=Budget("memory", len(data)), **options)
    value = machine.run()
    assert machine.stop == len(data)
    return plain_tree(value, machine, lambda record: record.lazy(lambda at, n: np.frombuffer(data, np.uint8, n, at)))


@given(value=_plain, protocol=st.integers(0, 5))
def test_the_machine_reads_what_pickle_wrote(value: Any, protocol: int) -> None:
    found = unpickled(pickle.dumps(value, protocol))
    assert found == value
    assert repr(found) == repr(value) or "{" in repr(value)  # types and order as well; sets have none


@given(values=arrays(), protocol=st.integers(0, 5))
def test_the_machine_reads_arrays(values: np.ndarray, protocol: int) -> None:
    found = unpickled(pickle.dumps({"a": values, "again": values}, protocol))
    assert found["a"] is found["again"]
    assert (found["a"].shape, found["a"].dtype.newbyteorder("<")) == (values.shape, values.dtype.newbyteorder("<"))
    assert_same(found["a"].read().astype(values.dtype.newbyteorder("<")), values)


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (defaultdict(list, {"k": [1]}), {"k": [1]}),
        (Counter("aab"), {"a": 2, "b": 1}),
        (np.float32(2.5), np.float32(2.5)),
        (np.int64(-7), np.int64(-7)),
        (np.str_("é"), np.str_("é")),
        (bytearray(b"abc" * 200), b"abc" * 200),
        (slice(1, None, 2), slice(1, None, 2)),
        ({"a": float("inf"), "b": b"", "c": ""}, {"a": float("inf"), "b": b"", "c": ""}),
    ],
)
def test_the_machine_reads_what_checkpoints_hold(value: Any, expected: Any, protocol: int) -> None:
    found = unpickled(pickle.dumps(value, protocol))
    assert found == expected
    assert type(found) is type(expected)


def of_python_2(value: Any, encoding: str) -> Any:
    return crafted.of_python_2(pickle.dumps(value, 2), encoding)


@given(
    value=st.dictionaries(st.text(max_size=300), st.one_of(st.text(max_size=300), st.integers())),
    encoding=st.sampled_from(["utf-8", "latin-1", "gbk"]),
)
def test_strings_of_python_2_are_text_in_the_given_encoding_or_refused(value: Any, encoding: str) -> None:
    try:
        data = of_python_2(value, encoding)
    except UnicodeError:
        return
    assert unpickled(data, encoding=encoding) == value
    raw = {k.encode(encoding): v.encode(encoding) if isinstance(v, str) else v for k, v in value.items()}
    assert unpickled(data, encoding="bytes") == raw
    for other in ("ascii", "utf-8"):
        try:
            expected = pickle.loads(data, encoding=other)
        except UnicodeError:
            with pytest.raises(FormatError, match="such as encoding='latin-1', or 'bytes'"):
                unpickled(data, encoding=other)
        else:
            assert unpickled(data, encoding=other) == expected


def test_a_file_of_python_2_is_converted_with_its_encoding(tmp_path: Path) -> None:
    path = crafted.torch_file(tmp_path / "old.pt", b"}U\4noteU\1\xe9s")
    with pytest.raises(FormatError, match="to read or convert, such as encoding='latin-1'"):
        vs.convert(path, tmp_path / "d")
    vs.convert(path, tmp_path / "d", encoding="latin-1")
    assert vs.load_state(tmp_path / "d") == vs.load_state(vs.read(path, encoding="latin-1")) == {"note": "é"}


def test_the_encoding_is_that_of_the_files_of_a_folder_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model"
    path.mkdir()
    crafted.torch_file(path / "pytorch_model.bin", b"}U\4noteU\1\xe9s")
    (path / "config.json").write_text("{}")
    assert vs.read(path, encoding="latin-1").state() == {"note": "é"}
    with pytest.raises(FormatError, match="such as encoding='latin-1'"):
        vs.read(path)
    said = []

    def reading(*arguments: Any, **options: Any) -> Any:
        said.append(options["encoding"])
        return read_zip(*arguments, **options)

    monkeypatch.setattr(distributed, "read_zip", reading)
    vs.read(FIXTURES / "formats/torch/distributed", encoding="latin-1")
    assert set(said) == {"latin-1"}


@given(values=st.binary(max_size=600), encoding=st.sampled_from(["ascii", "utf-8", "latin-1", "gbk", "bytes"]))
def test_arrays_of_python_2_need_no_encoding(values: bytes, encoding: str) -> None:
    size = struct.pack("<H", len(values))
    string = b"U" + size[:1] if len(values) < 256 else b"T" + size + b"\0\0"
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\0\x85U\1b\x87R(K\1M" + size
    dtype = b"\x85cnumpy\ndtype\nU\2u1K\0K\1\x87R(K\3U\1|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\0tb\x89"
    data = b"\x80\2" + array + dtype + string + values + b"tb."
    found = unpickled(data, encoding=encoding)
    assert (found.shape, found.dtype, found.read().tobytes()) == ((len(values),), np.uint8, values)


@pytest.mark.parametrize("encoding", ["utf-16", "rot13", "none-such", "punycode", "\0"])
def test_an_encoding_that_does_not_extend_ascii_is_refused(encoding: str) -> None:
    with pytest.raises(UsageError, match="encoding"):
        unpickled(pickle.dumps("a", 2), encoding=encoding)


@pytest.mark.parametrize("wrap", [lambda inner: [inner], lambda inner: (inner,), lambda inner: {"a": inner}])
def test_what_is_nested_as_deep_as_is_allowed(wrap: Any, tmp_path: Path) -> None:
    value: Any = np.float32(1)
    for _ in range(DEEPEST - 1):
        value = wrap(value)
    assert unpickled(pickle.dumps(value)) == value
    (tmp_path / "a.mge").write_bytes(pickle.dumps(value))
    megengine.write(tmp_path / "b.mge", megengine.read(tmp_path / "a.mge"))
    assert megengine.read(tmp_path / "b.mge").state() == value
    with pytest.raises(FormatError, match="deeper"):
        unpickled(pickle.dumps(wrap(wrap(value))))


def test_numbers_of_numpy_are_keys_as_well() -> None:
    assert unpickled(pickle.dumps({np.int64(3): 1, np.str_("a"): 2, (1, "b"): 3})) == {3: 1, "a": 2, (1, "b"): 3}


def test_a_missing_name_is_an_error_with_the_nearest_names(tmp_path: Path) -> None:
    torch.write(tmp_path / "a.pt", {"model": {"weight": np.ones(2)}, "epoch": 3})
    file = torch.read(tmp_path / "a.pt")
    with pytest.raises(VariableNotFound, match=r"'modle/weigth'.*[Dd]id you mean 'model/weight'\?"):
        file["modle/weigth"]
    with pytest.raises(VariableNotFound, match="nearest are 'model/\\*'"):
        file.state(include="modle/*")
    assert (file.get("modle/weigth"), file.get(3, 4)) == (None, 4)


def test_shared_and_repeated_objects_stay_shared() -> None:
    inner = [1, 2]
    found = unpickled(pickle.dumps([inner, inner, (inner,)]))
    assert found[0] is found[1] is found[2][0]


@settings(max_examples=300)
@given(data=st.data())
def test_damaged_files_are_errors_of_varstore(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    fixture = data.draw(st.sampled_from([f for f in fixtures() if (FIXTURES / f).is_file()]))
    raw = bytearray((FIXTURES / fixture).read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, min(len(raw), 4000) - 1))] = data.draw(st.integers(0, 255))
    del raw[data.draw(st.one_of(st.just(len(raw)), st.integers(0, len(raw)))) :]
    path = tmp_path_factory.mktemp("damaged") / Path(fixture).name
    path.write_bytes(raw)
    try:
        READERS[Path(fixture).parent.name].read(path).state()
    except VarstoreError as error:
        assert str(error).startswith(str(path.parent))  # noqa: PT017


# --- views and zip files -----------------------------------------------------------------------------------------


@given(
    shape=st.lists(st.integers(0, 4), max_size=4),
    data=st.data(),
    dtype=st.sampled_from([np.dtype(np.int16), np.dtype(ml_dtypes.bfloat16), np.dtype(np.complex64)]),
)
def test_a_view_is_within_its_storage_or_refused(shape: list[int], data: st.DataObject, dtype: np.dtype[Any]) -> None:
    steps = {1: st.one_of(st.integers(0, 9), st.just(2**70))}  # of one element, a stride means nothing
    stride = [data.draw(steps.get(extent, st.integers(0, 9))) for extent in shape]
    offset, count = data.draw(st.integers(0, 9)), data.draw(st.integers(0, 60))
    raw = np.arange(count * dtype.itemsize, dtype=np.uint8)
    storage = Storage("memory", "0", dtype, count)
    storage.read = lambda start, size: raw[start : start + size].copy()
    places = [offset + sum(i * s for i, s in zip(index, stride, strict=True)) for index in np.ndindex(*shape)]
    storages = Storages(Budget("memory", 1 << 20))
    if max(places, default=-1) >= count:
        with pytest.raises(SizeMismatch, match="beyond its storage"):
            storages.view(storage, offset, tuple(shape), tuple(stride), None)
        return
    found = storages.view(storage, offset, tuple(shape), tuple(stride), None).read()
    assert_same(found, raw.view(dtype)[places].reshape(shape))


def test_a_large_strided_view_is_read_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("varstore.values.parts._AT_ONCE", 64)
    base = np.arange(40 * 6, dtype=np.float32)
    sizes = []

    def fetch(start: int, size: int) -> np.ndarray:
        sizes.append(size)
        return base.view(np.uint8)[start : start + size].copy()

    storage = Storage("memory", "0", base.dtype, base.size)
    storage.read = fetch
    assert_same(Storages(Budget("m", 1)).view(storage, 0, (6, 40), (1, 6), None).read(), base.reshape(40, 6).T)
    assert max(sizes) <= 64


@given(content=st.binary(max_size=3000).map(lambda data: data * 3), method=st.sampled_from([0, 8]), data=st.data())
def test_a_range_of_a_zip_member(content: bytes, method: int, data: st.DataObject, tmp_path_factory: Any) -> None:
    path = tmp_path_factory.mktemp("zip") / "a.zip"
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("a/data.pkl", content)
        archive.writestr("b", b"x", zipfile.ZIP_STORED)
        archive.comment = b"a comment"
    start = data.draw(st.integers(0, len(content)))
    size = data.draw(st.integers(0, len(content) - start))
    assert archive_members(Source(path))["a/data.pkl"].read(start, size).tobytes() == content[start : start + size]
    with pytest.raises(FormatError, match="the range is not within the member"):
        archive_members(Source(path))["a/data.pkl"].read(start, len(content) + 1)


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_storage_that_is_read_whole_is_compared_with_its_checksum(tmp_path: Path, method: int) -> None:
    torch.write(tmp_path / "a.pt", {"w": np.arange(5.0), "v": np.arange(3.0)})
    with zipfile.ZipFile(tmp_path / "a.pt") as old, zipfile.ZipFile(tmp_path / "b.pt", "w", method) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    raw, crc = (tmp_path / "b.pt").read_bytes(), struct.pack("<I", zlib.crc32(np.arange(5.0).tobytes()))
    assert raw.count(crc) == 2
    (tmp_path / "b.pt").write_bytes(raw.replace(crc, b"\1\2\3\4"))
    opened = torch.read(tmp_path / "b.pt")
    assert opened["v"].tolist() == [0, 1, 2]
    with pytest.raises(DigestMismatch, match="CRC-32"):
        opened["w"].numpy()
    with pytest.raises(DigestMismatch):
        opened.state()
    if method == zipfile.ZIP_STORED:
        assert opened["w"][1:3].tolist() == [1, 2]


def test_an_archive_that_ends_early_says_how_long_it_should_be(tmp_path: Path) -> None:
    whole = (FIXTURES / "formats/torch/the_model_state_dict.pt").read_bytes()
    for size in (len(whole) // 10, len(whole) - 5000):
        (tmp_path / "a.pt").write_bytes(whole[:size])
        with pytest.raises(SizeMismatch, match=f"found {size:,} bytes, expected more than 248,024 bytes"):
            torch.read(tmp_path / "a.pt")
    np.savez(tmp_path / "a.npz", a=np.zeros(100), b=np.zeros(100))
    whole = (tmp_path / "a.npz").read_bytes()
    (tmp_path / "a.npz").write_bytes(whole[:1500])
    with pytest.raises(SizeMismatch, match="found 1,500 bytes, expected more than 1,9"):
        vs.read(tmp_path / "a.npz")


def torch_pickle(value: Any, storages: dict[str, tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch) -> bytes:
    """Pickle a state as torch would: `Tensor` views of storages that are named by their persistent ids."""
    fake = ModuleType("torch")
    for name in ("FloatStorage", "LongStorage"):
        setattr(fake, name, type(name, (), {"__module__": "torch"}))
    monkeypatch.setitem(sys.modules, "torch", fake)
    monkeypatch.setitem(sys.modules, "torch._utils", ModuleType("torch._utils"))

    def rebuild(*_arguments: Any) -> None:
        raise AssertionError

    rebuild.__module__, rebuild.__qualname__ = "torch._utils", "_rebuild_tensor_v2"
    sys.modules["torch._utils"]._rebuild_tensor_v2 = rebuild  # type: ignore[attr-defined]

    class Stored:
        def __init__(self, key: str) -> None:
            self.key = key

    class Tensor:
        def __init__(self, key: str, *view: Any) -> None:
            self.view = (Stored(key), *view, False, OrderedDict())

        def __reduce__(self) -> Any:
            return rebuild, self.view

    class Pickler(pickle.Pickler):
        def persistent_id(self, node: Any) -> Any:
            if not isinstance(node, Stored):
                return None
            kind, *rest = storages[node.key]
            return ("storage", getattr(fake, kind), *rest)

    file = io.BytesIO()
    Pickler(file, 2).dump({name: Tensor(*view) for name, view in value.items()})
    monkeypatch.undo()
    return file.getvalue()


@pytest.mark.parametrize("order", ["little", "big"])
def test_both_byte_orders_of_torch(tmp_path: Path, order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.arange(6, dtype=np.int64)
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
        storages = {"0": ("LongStorage", "0", "cpu", 6)}
        archive.writestr("x/data.pkl", torch_pickle({"w": ("0", 1, (5,), (1,))}, storages, monkeypatch))
        archive.writestr("x/byteorder", order)
        archive.writestr("x/data/0", values.astype(values.dtype.newbyteorder("<>"[order == "big"])).tobytes())
    assert torch.read(tmp_path / "a.pt")["w"].tolist() == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("little", [True, False])
def test_views_of_storages_in_the_older_format(tmp_path: Path, little: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    storages = {
        "whole": ("FloatStorage", "7", "cpu", 10, None),
        "part": ("FloatStorage", "7", "cpu", 10, ("8", 4, 3)),
        "other": ("LongStorage", "9", "cuda:0", 2),
    }
    state = {"w": ("whole", 0, (2, 5), (5, 1)), "p": ("part", 1, (2,), (1,)), "o": ("other", 0, (2,), (1,))}
    heads = [0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": little}]
    order = "<" if little else ">"
    raw = b"".join(pickle.dumps(head, 2) for head in heads) + torch_pickle(state, storages, monkeypatch)
    raw += pickle.dumps(["7", "9"], 2)
    for values in (np.arange(10, dtype=f"{order}f4"), np.array([-1, 5], f"{order}i8")):
        raw += struct.pack("<q", values.size) + values.tobytes()
    (tmp_path / "a.pth").write_bytes(raw)
    checkpoint = torch.read(tmp_path / "a.pth")
    assert checkpoint["w"].tolist() == np.arange(10.0).reshape(2, 5).tolist()
    assert checkpoint["p"].tolist() == [5, 6]
    assert checkpoint["o"].tolist() == [-1, 5]


# --- laziness ----------------------------------------------------------------------------------------------------

HOLE = 6 << 30
"""More than 4 GiB, so that wide fields are used; the files are sparse."""


def sparse_pdparams(path: Path) -> None:
    small = pickle.dumps(np.arange(6, dtype=np.float32), 4).removeprefix(b"\x80\4").removesuffix(b".")
    big = pickle.dumps(np.zeros(0, np.uint8), 4).removeprefix(b"\x80\4").removesuffix(b".")
    shape = b"K\0\x85"
    at = big.rindex(shape)
    big = big[:at] + b"\x8a\5" + struct.pack("<q", HOLE)[:5] + b"\x85" + big[at + len(shape) :]
    head, tail = big.split(b"C\0", 1)
    with path.open("wb") as file:
        file.write(b"\x80\4}(X\3\0\0\0big" + unframed(head) + b"\x8e" + struct.pack("<Q", HOLE))
        file.seek(HOLE, 1)
        file.write(unframed(tail) + b"X\5\0\0\0small" + unframed(small) + b"u.")


def unframed(data: bytes) -> bytes:
    """Return a piece of a pickle of protocol 4 without its frame."""
    return data[9:] if data[:1] == b"\x95" else data


def sparse_pt(path: Path) -> None:
    torch.write(path, {"small": np.arange(6, dtype=np.float32), "big": np.zeros(1, np.uint8)})
    state = path.read_bytes()
    names = [b"archive/data.pkl", b"archive/data/0", b"archive/data/1"]
    with zipfile.ZipFile(io.BytesIO(state)) as archive:
        pickled, small = archive.read("archive/data.pkl"), archive.read("archive/data/0")
    wide = b"\x8a\5" + struct.pack("<q", HOLE)[:5]
    big = pickled.index(b"X\1\0\0\x001")
    pickled = pickled[:big] + pickled[big:].replace(b"J\1\0\0\0", wide, 2)
    directory = b""
    with path.open("wb") as file:
        for name, content, size in zip(names, (pickled, small, b""), (len(pickled), len(small), HOLE), strict=True):
            start, extra = file.tell(), struct.pack("<2H2Q", 1, 16, size, size)
            full = 0xFFFFFFFF
            file.write(struct.pack("<4s5H3I2H", b"PK\3\4", 45, 0, 0, 0, 0, 0, full, full, len(name), 20) + name + extra)
            file.write(content)
            file.seek(size - len(content), 1)
            entry = struct.pack("<2H3Q", 1, 24, size, size, start)
            directory += struct.pack(
                "<4s6H3I5H2I", b"PK\1\2", 45, 45, 0, 0, 0, 0, 0, full, full, len(name), 28, 0, 0, 0, 0, full
            )
            directory += name + entry
        at = file.tell()
        file.write(directory)
        file.write(struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 45, 45, 0, 0, 3, 3, len(directory), at))
        file.write(struct.pack("<4sIQI", b"PK\6\7", 0, at + len(directory), 1))
        file.write(struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 3, 3, full, full, 0))


@pytest.mark.parametrize(
    ("module", "name", "make"), [(paddle, "a.pdparams", sparse_pdparams), (torch, "a.pt", sparse_pt)]
)
def test_one_tensor_of_a_large_file_costs_that_tensor(tmp_path: Path, module: Any, name: str, make: Any) -> None:
    make(tmp_path / name)
    tracemalloc.start()
    try:
        checkpoint = module.read(tmp_path / name)
        assert checkpoint.lazy("big").shape == (HOLE,)
        assert checkpoint["small"].tolist() == [0, 1, 2, 3, 4, 5]
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_a_file_that_changed_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    torch.write(path, {"w": np.arange(5.0)})
    checkpoint = torch.read(path)
    torch.write(path, {"w": np.arange(50.0)})
    with pytest.raises(FormatError, match="changed since"):
        checkpoint["w"].numpy()


# --- Paddle's and OneFlow's own ways -----------------------------------------------------------------------------


class DenseTensor:
    def __init__(self, values: np.ndarray) -> None:
        self.values = values

    def __reduce__(self) -> Any:
        return eval, ("data", {"data": self.values})


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_paddles_dense_tensor_and_pairs(tmp_path: Path, protocol: int) -> None:
    values = np.arange(4, dtype=np.uint16)
    state = {"dense": DenseTensor(values), "plain": values, "pair": ("a", values)}
    (tmp_path / "a.pdckpt").write_bytes(pickle.dumps(state, protocol))
    checkpoint = paddle.read(tmp_path / "a.pdckpt")
    assert {name: checkpoint.lazy(name).dtype.name for name in checkpoint} == {
        "dense": "bfloat16", "plain": "uint16", "pair/1": "uint16",
    }  # fmt: skip


def test_paddles_big_parameters_are_joined(tmp_path: Path) -> None:
    values = np.arange(24, dtype=np.float32).reshape(4, 6)
    parts = {f"w@@.{i}": part for i, part in enumerate(np.split(values.reshape(-1), [10, 20]))}
    about = {"w": {"OriginShape": (4, 6), "slices": list(parts)}}
    state = {**parts, "b": np.ones(2), "UnpackBigParamInfor@@": about, "StructuredToParameterName@@": {"w": "l.w_0"}}
    path = tmp_path / "a.pdparams"
    path.write_bytes(pickle.dumps(state, 2))
    checkpoint = paddle.read(path)
    assert list(checkpoint) == ["w", "b"]
    assert_same(checkpoint["w"].numpy(), values)
    assert checkpoint.attributes["parameter_names"] == {"w": "l.w_0"}
    about["w"]["OriginShape"] = (4, 7)
    path.write_bytes(pickle.dumps(state, 2))
    with pytest.raises(SizeMismatch, match="do not cover"):
        paddle.read(path)


def test_unnamed_streams_of_paddle(tmp_path: Path) -> None:
    raw = (FIXTURES / "formats/paddle/jit_linear.pdiparams").read_bytes()
    (tmp_path / "a.bin").write_bytes(raw)
    assert {name: values.shape for name, values in paddle.read(tmp_path / "a.bin").items()} == {"0": (4,), "1": (7, 4)}
    (tmp_path / "a.bin").write_bytes(raw[:40])
    assert list(paddle.read(tmp_path / "a.bin")) == [BARE]


def test_oneflows_folders_are_live_only_where_the_pickle_names_them(tmp_path: Path) -> None:
    path = tmp_path / "of"
    oneflow.write(path, {"w": np.arange(3, dtype=np.float32)})
    (path / "tensor_9").mkdir()
    (path / "tensor_9" / "out").write_bytes(b"junk")
    assert list(oneflow.read(path)) == ["w"]


@pytest.mark.parametrize("way", ["../x", "/etc", "a/b", "..", ".", "", "a\\b", "link"])
def test_oneflow_never_follows_a_path_that_leads_out(tmp_path: Path, way: str) -> None:
    outside = tmp_path / "x"
    outside.mkdir()
    (outside / "meta").write_text("shape {\n  dim: 3\n}\ndata_type: kFloat\n")
    (outside / "out").write_bytes(bytes(12))
    path = tmp_path / "of"
    oneflow.write(path, {"w": np.zeros(3, np.float32)})
    (path / "link").symlink_to(outside)
    raw = (path / "pickled_data").read_bytes()
    named = b"X" + struct.pack("<I", 8) + b"tensor_0"
    assert named in raw
    (path / "pickled_data").write_bytes(raw.replace(named, b"X" + struct.pack("<I", len(way)) + way.encode()))
    with pytest.raises(UnsafeContent, match="leads out"):
        oneflow.read(path)


def test_oneflow_bfloat16_has_four_bytes(tmp_path: Path) -> None:
    values = np.arange(6).astype(ml_dtypes.bfloat16)
    oneflow.write(tmp_path / "of", {"w": values})
    assert (tmp_path / "of" / "tensor_0" / "out").stat().st_size == 24
    assert_same(oneflow.read(tmp_path / "of")["w"].numpy(), values)
    (tmp_path / "of" / "tensor_0" / "out").write_bytes(values.tobytes())
    assert_same(oneflow.read(tmp_path / "of")["w"].numpy(), values)


@pytest.mark.parametrize("module", [("megengine.module.linear", "Linear"), ([], {}), None, "text"])
def test_the_class_that_a_traced_module_of_megengine_names_need_not_be_a_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: Any
) -> None:
    kind = type("_ModuleState", (), {"__module__": "megengine.traced_module.serialization"})
    for name in ("megengine", "megengine.traced_module", "megengine.traced_module.serialization"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules[kind.__module__]._ModuleState = kind  # type: ignore[attr-defined]
    state = kind()
    state.__dict__ = {"module": module, "state": {"_modules": [], "weight": np.ones(2)}, "version": "1.13.0"}
    (tmp_path / "a.mge").write_bytes(pickle.dumps(state, 4))
    assert len(megengine.read(tmp_path / "a.mge")) == 0  # plain arrays are not parameters of a module


def test_megengine_keeps_the_scale_of_quantised_values(tmp_path: Path) -> None:
    about = {"name": "QuantizedS8", "scale": 0.5, "zero_point": None}
    values = np.arange(3, dtype=np.dtype(np.int8, metadata={"mgb_dtype": about}))
    (tmp_path / "a.mge").write_bytes(pickle.dumps({"q": values}, 4))
    checkpoint = megengine.read(tmp_path / "a.mge")
    assert checkpoint["q"].tolist() == [0, 1, 2]
    assert checkpoint.lazy("q").attributes == {"mgb_dtype": about}


# --- writing -----------------------------------------------------------------------------------------------------

WRITTEN = {"torch": "a.pt", "paddle": "a.pdparams", "megengine": "a.mge", "oneflow": "of"}


def nested(reader: str) -> dict[Any, Any]:
    weight = np.arange(12, dtype=np.float32).reshape(3, 4)
    state = {
        "model": OrderedDict(weight=weight, tied=weight, turned=weight.T, big_endian=weight.astype(">f4")),
        "optimizer": {0: {"m": LazyArray((2,), np.dtype(np.int32), lambda: np.arange(2, dtype=np.int32))}, "step": 3},
        "scalars": [0.1, None, True, -(2**100), "é", 1 + 2j, (1, 2), {1}, np.float32(0.5)],
        "bfloat16": np.arange(300).astype(ml_dtypes.bfloat16),
        "zero": np.array(7, np.int64),
        "empty": np.zeros((0, 3), np.float32),
    }
    return state if reader == "paddle" else {**state, "bytes": b"\x00\xff"}


@pytest.mark.parametrize("reader", READERS)
def test_what_is_written_reads_back(tmp_path: Path, reader: str) -> None:
    module, path = READERS[reader], tmp_path / WRITTEN[reader]
    state = nested(reader)
    module.write(path, state)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    checkpoint = module.read(path)
    found = checkpoint.state()
    for name, values in state["model"].items():
        assert_same(found["model"][name], np.asarray(values))
    assert checkpoint.lazy("model/weight") is checkpoint.lazy("model/tied")
    assert found["optimizer"][0]["m"].tolist() == [0, 1]
    assert found["optimizer"]["step"] == 3
    assert found["scalars"] == state["scalars"]
    for name in ("bfloat16", "zero", "empty"):
        assert_same(found[name], state[name])
    assert found.get("bytes") == state.get("bytes")
    again = tmp_path / f"again-{WRITTEN[reader]}"
    module.write(again, checkpoint)
    assert scalars_of(module.read(again).state()) == scalars_of(found)
    assert all(module.read(again)[name].tobytes() == checkpoint[name].tobytes() for name in checkpoint)


@given(values=arrays())
def test_torch_writes_every_type_that_it_has(values: np.ndarray, tmp_path_factory: Any) -> None:
    path = tmp_path_factory.mktemp("torch") / "a.pt"
    try:
        torch.write(path, values)
    except UnsupportedDtype as error:
        assert values.dtype.name in str(error)  # noqa: PT017
        assert not list(path.parent.iterdir())
        return
    assert_same(torch.read(path)[BARE].numpy(), values)


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(
    ("value", "error"),
    [
        (object(), UsageError),
        ({(1, 2): 1}, UsageError),
        ({"a": {"b": np.zeros(2, "O")}}, UnsupportedDtype),
        ({"a": np.zeros(2, ml_dtypes.int4)}, UnsupportedDtype),
        (2**4000, UsageError),
        ("\ud800", UsageError),
    ],
)
def test_what_cannot_be_written_leaves_nothing(tmp_path: Path, reader: str, value: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        READERS[reader].write(tmp_path / WRITTEN[reader], {"x": np.zeros(3, np.float32), "value": value})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("reader", READERS)
def test_a_value_that_fails_while_it_is_fetched_leaves_nothing(tmp_path: Path, reader: str) -> None:
    def broken() -> np.ndarray:
        raise FormatError("torn", path="elsewhere")

    state = {"a": np.zeros(3, np.float32), "b": LazyArray((2,), np.dtype(np.float32), broken)}
    with pytest.raises(FormatError, match="torn"):
        READERS[reader].write(tmp_path / WRITTEN[reader], state)
    assert not list(tmp_path.iterdir())


def test_a_state_that_contains_itself_is_refused(tmp_path: Path) -> None:
    state: dict[str, Any] = {}
    state["again"] = state
    with pytest.raises(UsageError, match="contains itself"):
        torch.write(tmp_path / "a.pt", state)


def test_what_is_one_array_in_the_file_is_one_in_its_state(tmp_path: Path) -> None:
    shared = np.arange(3)
    torch.write(tmp_path / "a.pt", {"a": shared, "b": [shared], "c": shared.copy()})
    state = torch.read(tmp_path / "a.pt").state()
    assert state["a"] is state["b"][0]
    assert state["a"] is not state["c"]
