"""The formats that are pickles against the frameworks themselves, each a child process in its own environment.

``tools/make_envs.sh`` makes the environments; a test whose environment is absent is skipped and says so.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections import OrderedDict
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from support import ROOT, assert_same

import varstore as vs
from varstore.formats import megengine, oneflow, torch
from varstore.formats.paddle import states as paddle

ENVS = Path(os.environ.get("VARSTORE_ENVS", ROOT / ".envs"))
REPORT = """
import json, numpy as np
def describe(node):
    if isinstance(node, dict): return {str(k): describe(v) for k, v in node.items()}
    if isinstance(node, (list, tuple)): return [describe(v) for v in node]
    if hasattr(node, "shape"): return values_of(node)
    return repr(node)
"""
"""Prints a loaded state: arrays as [type, shape, values as float64 text]."""


def run_in(name: str, script: str, *arguments: object) -> str:
    """Run a script in an environment and return what it printed last."""
    python = ENVS / name / "bin" / "python"
    if not (ENVS / name / ".complete").exists():
        pytest.skip(f"no environment {name} below {ENVS}: run tools/make_envs.sh {name}")
    libraries = ":".join(str(path) for path in sorted((ENVS / name).glob("lib/python*/site-packages/nvidia/*/lib")))
    environ = {**os.environ, "LD_LIBRARY_PATH": libraries, "GLOG_v": "3", "PYTHONWARNINGS": "ignore"}
    command = [python, "-c", REPORT + script, *map(str, arguments)]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip().rpartition("\n")[2]


def described(values: Any) -> Any:
    """Return what REPORT prints for a state of numpy arrays."""
    if isinstance(values, dict):
        return {str(key): described(value) for key, value in values.items()}
    if isinstance(values, (list, tuple)):
        return [described(value) for value in values]
    if hasattr(values, "shape"):
        array = np.asarray(values)
        wide = array.astype(np.complex128 if array.dtype.kind == "c" else np.float64)
        return [array.dtype.newbyteorder("=").name, list(array.shape), repr(wide.reshape(-1).tolist())]
    return repr(values)


def checkpoint(*dtypes: Any) -> dict[Any, Any]:
    """Return a nested state with tied, turned, big-endian, scalar and empty arrays, and one of each type."""
    weight = np.arange(12, dtype=np.float32).reshape(3, 4)
    return {
        "model": OrderedDict(weight=weight, tied=weight, turned=weight.T, big_endian=weight.astype(">f4")),
        "types": {np.dtype(dtype).name: np.arange(1, 7).astype(dtype).reshape(2, 3) for dtype in dtypes},
        "optimizer": {"state": {0: {"step": 3}}, "lr": [0.1, None, True, -5, 2**40, 2**100]},
        "zero": np.array(7, np.int64),
        "empty": np.zeros((0, 3), np.float32),
        "name": "é",
    }


PLAIN = (np.bool_, np.uint8, np.int8, np.int32, np.int64, np.float16, np.float32, np.float64)
MORE = (np.int16, np.complex64, np.complex128)

TORCH_VALUES = """
import sys, torch
def values_of(t):
    t = t.detach()
    wide = t.to(torch.complex128 if t.is_complex() else torch.float64).contiguous()
    return [str(t.dtype)[6:], list(t.shape), repr(wide.reshape(-1).tolist())]
"""


# --- torch -------------------------------------------------------------------------------------------------------

TORCH_TYPES = (
    *(*PLAIN, *MORE, np.uint16, np.uint32, np.uint64, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn),
    *(ml_dtypes.float8_e4m3fnuz, ml_dtypes.float8_e5m2, ml_dtypes.float8_e5m2fnuz),
)


@pytest.mark.parametrize("options", ["weights_only=True", "weights_only=True, mmap=True", "weights_only=False"])
def test_torch_loads_what_is_written(tmp_path: Path, options: str) -> None:
    state = {**checkpoint(*TORCH_TYPES), "set": {1}, "bytes": b"\x00\xff", "complex": 1 + 2j}
    torch.write(tmp_path / "a.pt", state)
    script = f"""{TORCH_VALUES}
state = torch.load(sys.argv[1], {options})
model = state["model"]
assert type(model).__name__ == "OrderedDict"
assert model["weight"].data_ptr() == model["tied"].data_ptr()
assert all(t.data_ptr() % 64 == 0 for t in model.values())
print(json.dumps(describe(state)))
"""
    assert json.loads(run_in("torch", script, tmp_path / "a.pt")) == described(state)


def test_torch_loads_a_state_dict_into_a_module(tmp_path: Path) -> None:
    weight = np.arange(6, dtype=np.float32).reshape(3, 2)
    torch.write(tmp_path / "a.pt", OrderedDict(weight=weight, bias=np.ones(3, np.float32)))
    script = f"""{TORCH_VALUES}
linear = torch.nn.Linear(2, 3)
linear.load_state_dict(torch.load(sys.argv[1]))
print(linear(torch.ones(1, 2)).tolist())
"""
    assert json.loads(run_in("torch", script, tmp_path / "a.pt")) == [[2.0, 6.0, 10.0]]


ODD_TORCH = (
    TORCH_VALUES
    + """
import collections
class Subclass(torch.Tensor): pass
base = torch.arange(24.0).reshape(4, 6)
c = torch.tensor([1 + 2j, 3 - 4j])
parameter = torch.nn.Parameter(torch.ones(3)); parameter.note = "kept by torch"
subclass = torch.arange(3.0).as_subclass(Subclass); subclass.extra = 5
tensors = {
    "conj": c.conj(), "neg": torch.tensor([5 + 7j]).conj().imag, "view": base[::2, 1::2], "turned": base.T,
    "expanded": base[:1].expand(5, 6), "parameter": parameter, "subclass": subclass, "row": base[3],
    "u16": torch.arange(5).to(torch.uint16), "f8": torch.arange(4.0).to(torch.float8_e4m3fn),
    "bf16": torch.arange(3).bfloat16(), "half_complex": torch.tensor([1 + 2j, 3 - 4j], dtype=torch.complex32),
    "tied": {"a": base, "b": base, "c": base.detach()}, "zero": torch.tensor(3), "empty": torch.empty(0, 3),
}
if legacy: [tensors.pop(key) for key in ("u16", "f8", "half_complex")]
others = {
    "device": torch.device("cuda", 1), "dtype": torch.float32, "size": torch.Size([2, 3]), "set": {1},
    "default": collections.defaultdict(list, {"k": [1]}), "counter": collections.Counter("aab"),
    "numpy": np.float64(2.5),
}
options = {"pickle_protocol": protocol, "_use_new_zipfile_serialization": not legacy}
torch.save({**tensors, "others": others}, sys.argv[1], **options)
if not legacy:
    halves = tensors.pop("half_complex")
    tensors["half_complex"] = torch.view_as_real(halves.to(torch.complex64)).half()
print(json.dumps(describe(tensors)))
"""
)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("protocol", [1, 2, 3, 4, 5])
def test_odd_tensors_of_torch(tmp_path: Path, protocol: int, legacy: bool) -> None:
    script = f"protocol, legacy = {protocol}, {legacy}\n{ODD_TORCH}"
    truth = json.loads(run_in("torch", script, tmp_path / "a.pt"))
    checkpoint = torch.read(tmp_path / "a.pt")
    state = checkpoint.state()
    others = state.pop("others")
    assert described(state) == truth
    assert checkpoint.lazy("tied/a") is checkpoint.lazy("tied/b") is checkpoint.lazy("tied/c")
    expected = {"device": "cuda:1", "dtype": "torch.float32", "size": (2, 3), "set": {1}, "default": {"k": [1]}}
    assert others == {**expected, "counter": {"a": 2, "b": 1}, "numpy": 2.5}


@pytest.mark.parametrize("protocol", [1, 2, 5])
def test_sparse_quantised_and_modules_of_torch(tmp_path: Path, protocol: int) -> None:
    script = f"""{TORCH_VALUES}
inner = torch.nn.Sequential(torch.nn.Linear(3, 1))
net = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3), inner)
net.register_buffer("temporary", torch.ones(1), persistent=False)
net[0].register_forward_hook(print)
eye = torch.eye(3)
torch.save({{
    "net": net, "coo": eye.to_sparse(), "csr": eye.to_sparse_csr(),
    "q": torch.quantize_per_tensor(torch.tensor([0.0, 1.0]), 0.5, 3, torch.quint8),
    "channels": torch.quantize_per_channel(
        torch.eye(2), torch.tensor([0.5, 0.25]), torch.tensor([0, 1]), 0, torch.qint8),
}}, sys.argv[1], pickle_protocol={protocol})
print(json.dumps(describe(net.state_dict())))
"""
    truth = json.loads(run_in("torch", script, tmp_path / "a.pt"))
    checkpoint = torch.read(tmp_path / "a.pt")
    state = checkpoint.state()
    assert described(state["net"]) == truth
    assert list(state["net"]) == list(truth)
    assert state["coo"]["layout"] == "torch.sparse_coo"
    assert state["coo"]["indices"].tolist() == [[0, 1, 2], [0, 1, 2]]
    assert (state["coo"]["values"].tolist(), state["coo"]["size"]) == ([1, 1, 1], (3, 3))
    assert state["csr"]["crow_indices"].tolist() == [0, 1, 2, 3]
    assert_same(state["q"], np.array([3, 5], np.uint8))
    about = {"qscheme": "torch.per_tensor_affine", "scale": 0.5, "zero_point": 3}
    assert checkpoint.lazy("q").attributes == about
    assert state["channels"].tolist() == [[2, 0], [1, 5]]
    assert checkpoint.lazy("channels").attributes["scales"].read().tolist() == [0.5, 0.25]


DISTRIBUTED = """
import torch.distributed.checkpoint as dcp
model = torch.nn.Linear(3, 4)
optimizer = torch.optim.Adam(model.parameters())
model(torch.ones(1, 3)).sum().backward()
optimizer.step()
state = {
    "model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3, "name": "hi",
    "bf16": torch.arange(4).bfloat16(), "turned": torch.arange(6.0).reshape(2, 3).T, "list": [torch.ones(2), 5],
}
dcp.save(state, checkpoint_id=sys.argv[1], no_dist=True)
print(json.dumps(describe(state)))
"""


def test_distributed_checkpoints_of_torch(tmp_path: Path) -> None:
    truth = json.loads(run_in("torch", TORCH_VALUES + DISTRIBUTED, tmp_path / "dcp"))
    assert described(torch.read(tmp_path / "dcp").state()) == truth


SHARDED = """
import os, torch.distributed as dist, torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_tensor, Shard
def work(rank, path):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29533", GLOO_SOCKET_IFNAME="lo")
    dist.init_process_group("gloo", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    full = torch.arange(35.0).reshape(7, 5)
    dcp.save({"rows": distribute_tensor(full, mesh, [Shard(0)]), "columns": distribute_tensor(full, mesh, [Shard(1)])},
             checkpoint_id=path)
    dist.destroy_process_group()
if __name__ == "__main__":
    import multiprocessing
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=work, args=(rank, sys.argv[1])) for rank in range(2)]
    [rank.start() for rank in ranks]; [rank.join() for rank in ranks]
    assert all(rank.exitcode == 0 for rank in ranks)
"""


def test_sharded_tensors_of_torch_are_put_together(tmp_path: Path) -> None:
    run_in("torch", TORCH_VALUES + SHARDED, tmp_path / "dcp")
    assert len(list((tmp_path / "dcp").glob("*.distcp"))) == 2
    checkpoint = torch.read(tmp_path / "dcp")
    for name in ("rows", "columns"):
        assert_same(checkpoint[name].numpy(), np.arange(35, dtype=np.float32).reshape(7, 5))


# --- paddle ------------------------------------------------------------------------------------------------------

PADDLE_VALUES = """
import sys, paddle
def values_of(t):
    if not isinstance(t, paddle.Tensor): return repr(t)
    wide = t.astype("complex128" if "complex" in str(t.dtype) else "float64").numpy()
    return [str(t.dtype)[7:], list(t.shape), repr(wide.reshape(-1).tolist())]
"""
PADDLE_TYPES = (*PLAIN, *MORE, ml_dtypes.bfloat16)


def test_paddle_loads_what_is_written(tmp_path: Path) -> None:
    state = checkpoint(*PADDLE_TYPES)
    paddle.write(tmp_path / "a.pdckpt", state)
    script = f"{PADDLE_VALUES}print(json.dumps(describe(paddle.load(sys.argv[1]))))"
    assert json.loads(run_in("paddle", script, tmp_path / "a.pdckpt")) == described(state)


def test_paddle_sets_a_state_dict(tmp_path: Path) -> None:
    weight = np.arange(6, dtype=np.float32).reshape(2, 3)
    paddle.write(tmp_path / "a.pdparams", OrderedDict(weight=weight, bias=np.ones(3, np.float32)))
    script = f"""{PADDLE_VALUES}
linear = paddle.nn.Linear(2, 3)
missing, unexpected = linear.set_state_dict(paddle.load(sys.argv[1]))
assert not missing and not unexpected
print(linear(paddle.ones([1, 2])).tolist())
"""
    assert json.loads(run_in("paddle", script, tmp_path / "a.pdparams")) == [[4.0, 6.0, 8.0]]


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_nested_checkpoints_of_paddle(tmp_path: Path, protocol: int) -> None:
    script = f"""{PADDLE_VALUES}
net = paddle.nn.Linear(2, 3)
adam = paddle.optimizer.AdamW(0.1, parameters=net.parameters())
net(paddle.ones([1, 2])).sum().backward()
adam.step()
state = {{"net": net.state_dict(), "adam": adam.state_dict(), "list": [paddle.ones([2]), 1]}}
state["bf16"] = paddle.ones([3], "bfloat16")
paddle.save(state, sys.argv[1], protocol={protocol})
paddle.save(net.state_dict(), sys.argv[2], protocol={protocol})
paddle.save(net.weight, sys.argv[3], use_binary_format=True)
print(json.dumps(describe(state)))
"""
    paths = [tmp_path / name for name in ("a.pdckpt", "b.pdparams", "c.pdtensor")]
    truth = json.loads(run_in("paddle", script, *paths))
    assert described(paddle.read(paths[0]).state()) == truth
    assert described(paddle.read(paths[1]).state()) == truth["net"]
    assert described(paddle.read(paths[2]).state()) == truth["net"]["weight"]


# --- megengine ---------------------------------------------------------------------------------------------------

NUMPY_VALUES = """
import sys
def values_of(t):
    a = np.asarray(t.numpy() if hasattr(t, "numpy") else t)
    wide = a.astype(np.complex128 if a.dtype.kind == "c" else np.float64)
    return [{"pybfloat16": "bfloat16"}.get(a.dtype.name, a.dtype.name), list(a.shape), repr(wide.reshape(-1).tolist())]
"""


def test_megengine_loads_what_is_written(tmp_path: Path) -> None:
    state = {**checkpoint(*PLAIN, *MORE, np.uint16), "bytes": b"\x00\xff"}
    megengine.write(tmp_path / "a.mge", {**state, "bfloat16": np.arange(3).astype(ml_dtypes.bfloat16)})
    script = f"""{NUMPY_VALUES}
import megengine
state = megengine.load(sys.argv[1])
assert state["model"]["weight"] is state["model"]["tied"]
brain = megengine.Tensor(state.pop("bfloat16"))
assert "bfloat16" in str(brain.dtype) and brain.astype("float32").numpy().tolist() == [0, 1, 2]
print(json.dumps(describe(state)))
"""
    assert json.loads(run_in("megengine", script, tmp_path / "a.mge")) == described(state)


def test_megengine_modules_both_ways(tmp_path: Path) -> None:
    script = f"""{NUMPY_VALUES}
import megengine, megengine.module as M
class Net(M.Module):
    def __init__(self):
        super().__init__()
        self.blocks = [M.Linear(2, 3), M.BatchNorm1d(3)]
        self.named = {{"a": M.Linear(3, 1)}}
    def forward(self, x):
        return x
net = Net()
if len(sys.argv) > 2:
    net.load_state_dict(megengine.load(sys.argv[2]))
megengine.save(net, sys.argv[1])
print(json.dumps(describe(net.state_dict())))
"""
    truth = json.loads(run_in("megengine", script, tmp_path / "a.mge"))
    state = megengine.read(tmp_path / "a.mge").state()
    assert described(state) == truth
    changed = {name: values + np.float32(1) for name, values in state.items()}
    megengine.write(tmp_path / "b.mge", changed)
    assert json.loads(run_in("megengine", script, tmp_path / "c.mge", tmp_path / "b.mge")) == described(changed)


def test_quantised_modules_and_tensors_of_megengine(tmp_path: Path) -> None:
    script = f"""{NUMPY_VALUES}
import megengine, megengine.module as M, megengine.quantization as Q
from megengine.core.tensor.dtype import quint8
class Net(M.Module):
    def __init__(self):
        super().__init__()
        self.conv = M.ConvBn2d(1, 2, 3)
    def forward(self, x):
        return self.conv(x)
training = Q.quantize_qat(Net())
megengine.save(training, sys.argv[1])
state = training.state_dict()
training.eval()
final = Q.quantize(training)
megengine.save(final, sys.argv[2])
megengine.save(megengine.Tensor(np.float32([-1, 0, 0.5])).astype(quint8(0.5, 128)), sys.argv[3])
print(json.dumps(describe([state, final.state_dict()])))
"""
    paths = [tmp_path / name for name in ("a.mge", "b.mge", "c.mge")]
    truth = json.loads(run_in("megengine", script, *paths))
    assert described([megengine.read(path).state() for path in paths[:2]]) == truth
    about = megengine.read(paths[1]).lazy("conv.weight").attributes["mgb_dtype"]
    assert about["name"] == "QuantizedS8"
    single = megengine.read(paths[2])
    assert_same(single["(array)"].numpy(), np.array([126, 128, 129], np.uint8))
    expected = {"name": "Quantized8Asymm", "scale": 0.5, "zero_point": 128}
    assert single.lazy("(array)").attributes == {"mgb_dtype": expected}


def test_a_traced_module_of_megengine_is_read_as_its_state_dict(tmp_path: Path) -> None:
    script = f"""{NUMPY_VALUES}
import megengine, megengine.functional as F, megengine.module as M
from megengine.traced_module import trace_module
class Net(M.Module):
    def __init__(self):
        super().__init__()
        self.conv = M.Conv2d(1, 4, 3)
        self.inner = M.Sequential(M.BatchNorm2d(4), M.ReLU())
        self.scale = megengine.Parameter(np.float32([1, 2, 3, 4]))
    def forward(self, x):
        return F.mean(self.inner(self.conv(x)), (2, 3)) * self.scale
traced = trace_module(Net(), megengine.Tensor(np.zeros((2, 1, 5, 5), "float32")))
megengine.save(traced, sys.argv[1])
print(json.dumps(describe(dict(sorted(traced.state_dict().items())))))
"""
    truth = json.loads(run_in("megengine", script, tmp_path / "a.mge"))
    assert described(dict(megengine.read(tmp_path / "a.mge").state())) == truth
    assert "inner.0.running_mean" in megengine.read(tmp_path / "a.mge")


def test_a_tensor_of_megengine_comes_back_as_one(tmp_path: Path) -> None:
    script = """
import json, sys
import numpy as np
import megengine
from megengine import Tensor, Parameter
def said(value):
    if isinstance(value, dict):
        return {key: said(item) for key, item in value.items()}
    kind = f"{type(value).__module__}.{type(value).__name__}"
    return [kind, np.asarray(value.numpy() if hasattr(value, "numpy") else value).astype(float).tolist()]
if len(sys.argv) == 2:
    net = megengine.module.Linear(2, 1)
    state = {"state_dict": net.state_dict(), "loss": Tensor(0.5), "weight": Parameter([[1.0, 2.0]]), "epoch": 3}
    state["half"] = Tensor([1.0]).astype("float16")
    megengine.save(state, sys.argv[1])
print(json.dumps(said(megengine.load(sys.argv[-1]))))
"""
    truth = json.loads(run_in("megengine", script, tmp_path / "a.mge"))
    assert truth["loss"] == ["megengine.tensor.Tensor", 0.5]
    vs.convert(tmp_path / "a.mge", tmp_path / "d")
    vs.convert(tmp_path / "d", tmp_path / "b.mge")
    assert json.loads(run_in("megengine", script, tmp_path / "b.mge", tmp_path / "b.mge")) == truth
    assert vs.load_state(tmp_path / "d")["loss"] == 0.5


# --- oneflow -----------------------------------------------------------------------------------------------------


def test_oneflow_loads_what_is_written(tmp_path: Path) -> None:
    state = {**checkpoint(*PLAIN), "bytes": b"\x00\xff"}
    oneflow.write(tmp_path / "of", state)
    script = f"""{NUMPY_VALUES}
import oneflow
state = oneflow.load(sys.argv[1])
assert state["model"]["weight"] is state["model"]["tied"]
print(json.dumps(describe(state)))
"""
    assert json.loads(run_in("oneflow", script, tmp_path / "of")) == described(state)


def test_oneflow_modules_both_ways(tmp_path: Path) -> None:
    script = f"""{NUMPY_VALUES}
import oneflow as flow
net = flow.nn.Sequential(flow.nn.Linear(2, 3), flow.nn.BatchNorm1d(3), flow.nn.Linear(3, 1))
if len(sys.argv) > 2:
    net.load_state_dict(flow.load(sys.argv[2]))
flow.save({{"net": net.state_dict(), "bf16": flow.ones(3).to(flow.bfloat16), "kind": flow.float32}}, sys.argv[1])
if len(sys.argv) == 2:
    flow.save(net, sys.argv[1] + "/../module")
print(json.dumps(describe(net.state_dict())))
"""
    truth = json.loads(run_in("oneflow", script, tmp_path / "of"))
    assert described(oneflow.read(tmp_path / "module").state()) == truth
    state = oneflow.read(tmp_path / "of").state()
    assert described(state["net"]) == truth
    assert_same(state["bf16"], np.ones(3, ml_dtypes.bfloat16))
    assert state["kind"] == "oneflow.float32"
    changed = {name: np.asarray(values + values.dtype.type(1)) for name, values in state["net"].items()}
    oneflow.write(tmp_path / "b", changed)
    assert json.loads(run_in("oneflow", script, tmp_path / "c", tmp_path / "b")) == described(changed)
