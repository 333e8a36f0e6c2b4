"""Graphs that MegEngine dumped: their values, copies with other values that MegEngine runs, and hostile files."""

from __future__ import annotations

import io
import itertools
import json
import os
import struct
import subprocess
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from support import FIXTURES, ROOT, assert_same

import varstore as vs
from varstore.errors import (
    FormatError,
    SizeMismatch,
    UnsupportedDtype,
    UsageError,
    VariableMismatch,
    VariableNotFound,
    VarstoreError,
)

MODEL = FIXTURES / "formats/megengine/convnet_dump.mge"
STATES = FIXTURES / "formats/megengine/convnet_state_dict.mge"

NETWORK = """
import json, sys, numpy as np, megengine, megengine.functional as F, megengine.module as M
from megengine.jit import trace
from megengine.traced_module import trace_module
from megengine.utils.comp_graph_tools import GraphInference

class Net(M.Module):
    def __init__(self):
        super().__init__()
        self.conv = M.Conv2d(3, 8, 3, padding=1)
        self.norm = M.BatchNorm2d(8)
        self.classifier = M.Linear(8 * 9, 5)
    def forward(self, x):
        x = F.avg_pool2d(F.relu(self.norm(self.conv(x))), 2)
        return self.classifier(F.flatten(x, 1))

def network(state=None):
    net = Net()
    if state is not None:
        net.load_state_dict(state)
    net.eval()
    return net

random = np.random.RandomState(0)
image = random.rand(2, 3, 6, 6).astype("float32")
state = {name: random.uniform(0.5, 1.5, values.shape).astype("float32") for name, values in Net().state_dict().items()}

def dump(net, path, **options):
    @trace(symbolic=True, capture_as_const=True)
    def run(image):
        return net(image)
    run(megengine.tensor(image))
    run.dump(path, arg_names=["image"], output_names=["logits"], **options)
"""
DUMP = """
import megengine.quantization as Q
from megengine.core.tensor.dtype import get_scale
dump(network(state), "plain.mge", optimize_for_inference=False)
dump(trace_module(network(state), megengine.tensor(image)), "traced.mge", dump_format="FBS_V2")
dump(network(), "fresh.mge", optimize_for_inference=False)
dump(network(state), "old.mge", dump_format="FBS")
dump(network(state), "nameless.mge", keep_var_name=0)

class Small(M.Module):
    def __init__(self):
        super().__init__()
        self.start, self.conv, self.end = M.QuantStub(), M.ConvBn2d(3, 8, 3), M.DequantStub()
    def forward(self, x):
        return self.end(self.conv(self.start(x)))

training = Q.quantize_qat(Small(), Q.ema_fakequant_qconfig)
training(megengine.tensor(image))
training.eval()
small = Q.quantize(training)
small.eval()
dump(small, "integers.mge")
weight = small.conv.weight
np.savez("truth.npz", **state)
print(json.dumps([float(get_scale(weight.dtype)), weight.numpy().tolist()]))
"""
RUN = """
changed = dict(state, **np.load(sys.argv[1]))
expected = network(changed)(megengine.tensor(image)).numpy()
found = [GraphInference(path).run(image)["logits"].tolist() for path in sys.argv[2:]]
print(json.dumps([expected.tolist(), network(state)(megengine.tensor(image)).numpy().tolist(), found]))
"""


def in_megengine(script: str, folder: Path, *arguments: object) -> Any:
    """Run a script in the environment of MegEngine, and return what it printed last."""
    python = Path(os.environ.get("VARSTORE_ENVS", ROOT / ".envs")) / "megengine/bin/python"
    if not python.exists():
        pytest.skip("no environment megengine: run tools/make_envs.sh megengine")
    command = [python, "-W", "ignore", "-c", NETWORK + script, *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_megengine_runs_copies_with_another_classifier(tmp_path):
    scale, weight = in_megengine(DUMP, tmp_path)
    with np.load(tmp_path / "truth.npz") as values:
        truth = dict(values)
    plain, traced = (vs.read(tmp_path / f"{name}.mge") for name in ("plain", "traced"))
    for name, values in truth.items():
        assert_same(plain[name].numpy().reshape(values.shape), values)
    assert "conv.weight" not in traced  # which is another value, of another name, with the normalisation in it

    vs.save(tmp_path / "c", plain, files={"net.mge": tmp_path / "plain.mge"})
    names = ("classifier.weight", "classifier.bias")
    changed = {name: np.random.default_rng(3).normal(size=truth[name].shape).astype("f4") for name in names}
    vs.save(tmp_path / "tuned", {**vs.load(tmp_path / "c"), **changed}, files=vs.open(tmp_path / "c").files)
    with vs.open(tmp_path / "tuned") as tuned:
        vs.write(tmp_path / "new.mge", tuned, model=tuned.files["net.mge"].path)
    done = vs.convert(tmp_path / "tuned", tmp_path / "new2.mge", model=tmp_path / "traced.mge", include="classifier*")
    assert sorted(done.names) == sorted(names)
    np.savez(tmp_path / "changed.npz", **changed)
    expected, before, found = in_megengine(RUN, tmp_path, "changed.npz", "new.mge", "new2.mge", "plain.mge")
    for logits, truly in zip(found, (expected, expected, before), strict=True):
        np.testing.assert_allclose(logits, truly, rtol=1e-4, atol=1e-4)
    assert np.abs(np.subtract(expected, before)).max() > 0.1

    fresh = vs.read(tmp_path / "fresh.mge")  # where zeros are the bias of the convolution and much else
    assert "norm.bias" not in fresh
    with pytest.raises(VariableMismatch, match=r"(?s)conv.bias.*several places.*equal values"):
        vs.write(tmp_path / "no.mge", {"conv.bias": np.ones((1, 8, 1, 1), "f4")}, model=tmp_path / "fresh.mge")
    with pytest.raises(FormatError, match=r"(?s)format FBS, which does not have names.*dump_format='FBS_V2'"):
        vs.read(tmp_path / "old.mge")
    with pytest.raises(FormatError, match=r"(?s)without names.*keep_var_name=1"):
        vs.read(tmp_path / "nameless.mge")

    integers = vs.read(tmp_path / "integers.mge").lazy("conv.weight")
    assert (integers.dtype, integers.numpy().tolist()) == (np.int8, weight)
    assert integers.attributes == {"mgb_dtype": {"name": "QuantizedS8", "scale": scale, "zero_point": None}}


def test_a_copy_without_changes_is_the_same_bytes(tmp_path):
    for values in ({}, vs.read(MODEL), vs.read(io.BytesIO(MODEL.read_bytes()))):
        vs.write(tmp_path / "copy.mge", values, model=MODEL)
        assert (tmp_path / "copy.mge").read_bytes() == MODEL.read_bytes()


def test_what_does_not_fit_is_refused(tmp_path):
    for values, error, match in (
        ({"conv2.weight": np.zeros(2, "f4")}, VariableNotFound, "optimize_for_inference=False"),
        ({"conv.bais": np.zeros(2, "f4")}, VariableNotFound, r"nearest are 'conv\.bias'.*optimize_for_inference=False"),
        ({"conv.bias": np.zeros(8, "f4")}, VariableMismatch, r"\[1, 8, 1, 1\]"),
        ({"half": np.zeros((2, 5), "f4")}, VariableMismatch, "float16"),
    ):
        with pytest.raises(error, match=match):
            vs.write(tmp_path / "copy.mge", values, model=MODEL)
    with pytest.raises(FormatError, match="not a graph"):
        vs.write(tmp_path / "copy.mge", {}, model=STATES)
    (tmp_path / "own.mge").write_bytes(MODEL.read_bytes())
    with pytest.raises(UsageError, match="the same"):
        vs.write(tmp_path / "own.mge", {}, model=tmp_path / "own.mge")
    assert sorted(os.listdir(tmp_path)) == ["own.mge"]


# --- dumps that are made here ------------------------------------------------------------------------------------


def flatbuffer(root: Any) -> bytes:
    """Return a FlatBuffer with the size before it.

    A dict is a table by numbers of fields, a tuple a number of a form of `struct`, a list a vector, and bytes are as
    they are; the same dict, wherever a vector has it, is one table.
    """
    out = bytearray(b"\0\0\0\0\0\0\0\0mgv2")
    waiting: dict[int, tuple[Any, list[int]]] = {id(root): (root, [4])}
    while waiting:
        value, places = waiting.pop(next(iter(waiting)))
        children: list[tuple[int, Any]] = []
        at = len(out)
        if isinstance(value, dict):
            entries = [0] * (max(value, default=-1) + 1)
            for index, field in enumerate(value):
                entries[field] = 4 + 4 * index
            out += struct.pack(f"<2H{len(entries)}H", 4 + 2 * len(entries), 4 + 4 * len(value), *entries)
            at = len(out)
            out += struct.pack("<i", at - places_of_vtable(at, entries))
            for inner in value.values():
                children += [] if isinstance(inner, tuple) else [(len(out), inner)]
                out += struct.pack(f"<{inner[0]}", inner[1]).ljust(4, b"\0") if isinstance(inner, tuple) else bytes(4)
        else:
            raw = value.encode() if isinstance(value, str) else value
            out += struct.pack("<I", len(raw))
            for inner in [raw] if isinstance(raw, bytes) else raw:
                children += [(len(out), inner)] if isinstance(inner, dict) else []
                out += inner if isinstance(inner, bytes) else struct.pack("<I", inner if isinstance(inner, int) else 0)
        for place in places:
            out[place : place + 4] = struct.pack("<I", at - place)
        for place, inner in children:
            waiting.setdefault(id(inner), (inner, []))[1].append(place)
    out[:4] = struct.pack("<I", len(out) - 4)
    return bytes(out)


def places_of_vtable(at: int, entries: list[int]) -> int:
    """Return where the vtable is that was written before a table."""
    return at - 4 - 2 * len(entries)


NUMBERS = {np.dtype(name): number for number, name in enumerate(("f4", "u1", "i1", "i2", "i4"))}


def tensor(values: np.ndarray, *, kind: int | None = None, data: bytes | None = None, **more: Any) -> dict[int, Any]:
    raw = values.tobytes() if data is None else data
    about = {0: ("b", NUMBERS[values.dtype] if kind is None else kind), **more.get("about", {})}
    return {1: list(values.shape), 3: about, 6: raw}


def holder(*tensors: dict[int, Any], outputs: list[int], kind: str = "ImmutableTensor") -> dict[int, Any]:
    return {0: kind, 8: outputs, 11: list(tensors)}


def graph(names: list[str], *operators: dict[int, Any]) -> dict[int, Any]:
    return {0: ("I", 101300), 2: list(operators), 3: [{0: name} for name in names]}


W = np.arange(6, dtype=np.float32).reshape(2, 3)


def one(value: dict[int, Any] | None = None, name: str = "w") -> dict[int, Any]:
    return graph([name], holder(tensor(W) if value is None else value, outputs=[0]))


def test_an_operator_can_hold_many_values(tmp_path):
    tensors = [tensor(W), tensor(W.astype("i2")), {**tensor(np.zeros((0, 2), "u1")), 0: "named"}]
    (tmp_path / "a.mge").write_bytes(flatbuffer(graph(["a", "b", "c"], holder(*tensors, outputs=[0, 1, 2]))))
    opened = vs.read(tmp_path / "a.mge")
    assert (list(opened), opened.format, opened.attributes) == (["a", "b", "named"], "megengine", {"exported": True})
    assert_same(opened["b"].numpy(), W.astype("i2"))
    vs.write(tmp_path / "b.mge", {"b": W.astype("i2") + 7}, model=tmp_path / "a.mge")
    assert vs.read(tmp_path / "b.mge")["b"].tolist() == [[7, 8, 9], [10, 11, 12]]
    assert_same(vs.read(tmp_path / "b.mge")["a"].numpy(), W)


def test_values_of_less_than_a_byte_are_listed_and_refused(tmp_path):
    quantised = tensor(W, kind=15, data=bytes(3), about={1: ("B", 1), 2: {0: ("f", 0.5)}})
    (tmp_path / "a.mge").write_bytes(flatbuffer(graph(["q", "w"], holder(quantised, tensor(W), outputs=[0, 1]))))
    opened = vs.read(tmp_path / "a.mge")
    assert opened["q"].shape == (2, 3)
    with pytest.raises(UnsupportedDtype, match="QuantizedS4"):
        opened["q"].numpy()
    with pytest.raises(UnsupportedDtype, match="QuantizedS4"):
        vs.write(tmp_path / "b.mge", {"q": W}, model=tmp_path / "a.mge")
    vs.write(tmp_path / "b.mge", {"w": W}, model=tmp_path / "a.mge")
    assert (tmp_path / "b.mge").read_bytes() == (tmp_path / "a.mge").read_bytes()


def test_the_scale_of_integers_must_be_that_of_the_graph(tmp_path):
    for name, scale in (("a", 0.5), ("b", 0.25)):
        about = {1: ("B", 1), 2: {0: ("f", scale), 1: ("B", 128)}}
        (tmp_path / f"{name}.mge").write_bytes(flatbuffer(one(tensor(W.astype("u1"), kind=11, about=about))))
    opened = vs.read(tmp_path / "a.mge")
    assert opened.lazy("w").attributes == {"mgb_dtype": {"name": "Quantized8Asymm", "scale": 0.5, "zero_point": 128}}
    with pytest.raises(VariableMismatch, match=r"0\.5.*0\.25"):
        vs.write(tmp_path / "c.mge", opened, model=tmp_path / "b.mge")
    vs.write(tmp_path / "c.mge", {"w": opened["w"].numpy()}, model=tmp_path / "b.mge")


def test_long_vectors_take_no_memory(tmp_path):
    mark, count = b"MARK", 10_000_000
    for value, more in (({1: mark, 3: {0: ("b", 0)}, 6: W.tobytes()}, {}), (tensor(W), {8: mark})):
        content = bytearray(flatbuffer(graph(["w"], {**holder(value, outputs=[0]), **more})))
        at = content.index(mark)
        size = at + 4 * count + 1000
        struct.pack_into("<I", content, at - 4, count)
        struct.pack_into("<I", content, 0, size - 4)
        (tmp_path / "a.mge").write_bytes(content)
        os.truncate(tmp_path / "a.mge", size)
        tracemalloc.start()
        try:
            with pytest.raises(FormatError):
                vs.read(tmp_path / "a.mge")
            assert tracemalloc.get_traced_memory()[1] < 4 << 20
        finally:
            tracemalloc.stop()


@pytest.mark.parametrize("kind", ["Elemwise", "GetVarShapeV1"])
@pytest.mark.parametrize("shape", [(4, 7), (29,)])
def test_a_value_that_may_stand_for_several_is_not_replaced(tmp_path, kind, shape):
    old = np.ones(shape, "f4")
    user = {0: kind, 7: [0, 0], 8: [1]}
    (tmp_path / "a.mge").write_bytes(flatbuffer(graph(["w", "x"], holder(tensor(old), outputs=[0]), user)))
    vs.write(tmp_path / "b.mge", {"w": old}, model=tmp_path / "a.mge")
    assert (tmp_path / "b.mge").read_bytes() == (tmp_path / "a.mge").read_bytes()
    if kind == "Elemwise" and old.size <= 28:
        with pytest.raises(VariableMismatch, match="several places"):
            vs.write(tmp_path / "c.mge", {"w": old + 1}, model=tmp_path / "a.mge")
    else:
        vs.write(tmp_path / "c.mge", {"w": old + 1}, model=tmp_path / "a.mge")


HOSTILE: dict[str, tuple[bytes, type[VarstoreError], str]] = {
    "empty": (bytes(8) + b"mgv2", FormatError, "outside the buffer"),
    "cut off": (flatbuffer(one())[:-1], SizeMismatch, "ends early"),
    "longer than the file": (b"\xff\xff\xff\xff" + flatbuffer(one())[4:], SizeMismatch, "ends early"),
    "the table outside": (flatbuffer(one())[:4] + b"\xff\xff\xff\x7f" + flatbuffer(one())[8:], FormatError, "outside"),
    "an offset of zero": (flatbuffer(one())[:4] + bytes(4) + flatbuffer(one())[8:], FormatError, "to itself"),
    "one operator a hundred thousand times": (
        flatbuffer({2: [{7: [0] * 50}] * 100_000}),
        FormatError,
        "more objects than the file has bytes",
    ),
    "one tensor a hundred thousand times": (
        flatbuffer({2: [{11: [{}] * 100_000}]}),
        FormatError,
        "more objects than the file has bytes",
    ),
    "no names": (flatbuffer({2: [holder(tensor(W), outputs=[0])]}), FormatError, "without names"),
    "an output that is not there": (flatbuffer(graph(["w"], holder(tensor(W), outputs=[7]))), FormatError, "names"),
    "one name twice": (
        flatbuffer(graph(["w", "w"], holder(tensor(W), tensor(W), outputs=[0, 1]))),
        FormatError,
        "same name",
    ),
    "a name that is not UTF-8": (flatbuffer(graph([b"\xff"], holder(tensor(W), outputs=[0]))), FormatError, "UTF-8"),  # type: ignore[list-item]
    "too few bytes": (flatbuffer(one(tensor(W, data=bytes(23)))), SizeMismatch, "does not match its shape"),
    "a shape beyond all memory": (
        flatbuffer(one({**tensor(W), 1: [0xFFFFFFFF] * 3})),
        FormatError,
        "no array can have this shape",
    ),
    "33 dimensions": (flatbuffer(one({**tensor(W), 1: [1] * 33})), FormatError, "no array can have this shape"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_dumps_are_refused(tmp_path, name):
    content, error, message = HOSTILE[name]
    path = tmp_path / "a.mge"
    path.write_bytes(content)
    started = time.process_time()
    with pytest.raises(error, match=message) as raised:
        vs.read(path)
    assert str(raised.value).startswith(str(path))
    assert time.process_time() - started < 5


def test_values_that_share_bytes_are_refused(tmp_path):
    raw = bytearray(flatbuffer(graph(["a", "b"], holder(tensor(W), tensor(W + 1), outputs=[0, 1]))))
    first, second = (raw.index((24).to_bytes(4, "little") + values.tobytes()) for values in (W, W + 1))
    (place,) = (at for at in range(12, first) if at + int.from_bytes(raw[at : at + 4], "little") == second)
    raw[place : place + 4] = (first - place).to_bytes(4, "little")
    (tmp_path / "a.mge").write_bytes(raw)
    with pytest.raises(FormatError, match="share bytes"):
        vs.read(tmp_path / "a.mge")


_some = st.dictionaries(
    st.text(min_size=1, max_size=8),
    st.tuples(st.sampled_from(sorted(NUMBERS, key=str)), st.lists(st.integers(0, 3), min_size=0, max_size=3)),
    min_size=1,
    max_size=5,
)


@settings(max_examples=15)
@given(made=_some, seed=st.integers(0, 99), apart=st.booleans())
def test_values_are_found_and_replaced_by_name(made, seed, apart, tmp_path_factory):
    folder, random = tmp_path_factory.mktemp("dump"), np.random.default_rng(seed)
    old, new = (
        {name: random.integers(0, 99, shape).astype(dtype) for name, (dtype, shape) in made.items()} for _ in range(2)
    )
    tensors, numbers = [tensor(values) for values in old.values()], range(len(old))
    together = [holder(*tensors, outputs=[*numbers])]
    operators = [holder(one, outputs=[at]) for at, one in enumerate(tensors)] if apart else together
    (folder / "a.mge").write_bytes(flatbuffer(graph([*old], *operators)) + b"behind")
    for name, values in vs.read(folder / "a.mge").items():
        assert_same(values.numpy(), old[name])
    chosen = dict(itertools.islice(new.items(), seed % 3))
    vs.write(folder / "b.mge", chosen, model=folder / "a.mge")
    for name, values in vs.read(folder / "b.mge").items():
        assert_same(values.numpy(), {**old, **chosen}[name])
    vs.write(folder / "c.mge", {name: old[name] for name in chosen}, model=folder / "b.mge")
    assert (folder / "c.mge").read_bytes() == (folder / "a.mge").read_bytes()


@settings(max_examples=200)
@given(data=st.data())
def test_a_damaged_dump_is_one_error_or_reads_what_it_has(data, tmp_path_factory):
    raw = bytearray(data.draw(st.sampled_from([MODEL.read_bytes(), flatbuffer(one())])))
    width = data.draw(st.sampled_from([1, 2, 4]))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(raw) - width))
        raw[at : at + width] = data.draw(st.binary(min_size=width, max_size=width))
    del raw[data.draw(st.one_of(st.just(len(raw)), st.integers(12, len(raw)))) :]
    path = tmp_path_factory.mktemp("damaged") / "a.mge"
    path.write_bytes(raw)
    try:
        opened = vs.read(path, "megengine")
        arrays = {name: opened.lazy(name) for name in opened}
        assert sum(array.nbytes for array in arrays.values() if not array.dtype.hasobject) <= len(raw)
        opened.state()
    except VarstoreError as error:
        assert str(error).startswith(str(path))  # noqa: PT017
