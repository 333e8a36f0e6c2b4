"""Real tensors of torch, given to `save` as they are. Skipped where torch is not installed."""

from __future__ import annotations

import warnings

import ml_dtypes
import numpy as np
import pytest
from support import assert_same, check_checkpoint

import varstore as vs
from varstore.errors import StorageError, UnsupportedDtype, UsageError
from varstore.values.arrays import as_source
from varstore.values.casting import cast_values
from varstore.values.plan import plan_save

torch = pytest.importorskip("torch")

TYPES = [
    *("bool", "uint8", "int8", "int16", "int32", "int64", "uint16", "uint32", "uint64"),
    *("float16", "bfloat16", "float32", "float64", "complex64", "complex128"),
    *("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"),
]
from torch import masked  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from torch.distributed.tensor import Shard, distribute_tensor  # noqa: E402

VALUES = [0.0, 1.0, 0.5, 2.0, 4.0, 8.0]


class Tagged(torch.Tensor):
    """A subclass that somebody else defined, outside of torch."""


def source(value):
    return as_source(value, variable="v")


def bits(tensor):
    """Return the bytes of a tensor's values in C order, by torch alone."""
    return bytes(tensor.detach().resolve_conj().resolve_neg().contiguous().view(-1).view(torch.uint8).tolist())


@pytest.mark.parametrize("name", TYPES)
def test_every_type_keeps_its_bits(tmp_path, name):
    tensor = torch.tensor(VALUES).to(getattr(torch, name)).reshape(2, 3)
    others = {"0-d": tensor[0, 1], "empty": tensor[:0], "transposed": tensor.T, "strided": tensor[:, ::2]}
    variables = {"plain": tensor, **others}
    vs.save(tmp_path / "c", variables)
    dtype = np.dtype(getattr(ml_dtypes, name, None) or name)
    expected = {
        key: np.frombuffer(bits(value) if value.numel() else b"", dtype).reshape(tuple(value.shape))
        for key, value in variables.items()
    }
    check_checkpoint(tmp_path / "c", expected)
    if name != "float8_e8m0fnu":  # which has no zero
        assert expected["plain"].astype(complex).ravel().tolist() == tensor.to(torch.complex128).ravel().tolist()


VIEWS = {
    "contiguous": lambda z: z,
    "transposed": lambda z: z.T,
    "strided": lambda z: z[:, ::2],
    "offset": lambda z: z[1:],
    "expanded": lambda z: z[:, :1].expand(2, 5),
    "conjugated": lambda z: z.conj(),
    "conjugated twice": lambda z: z.conj().conj(),
    "negated": lambda z: z.conj().imag,
    "real part": lambda z: z.real,
    "imaginary part": lambda z: z.imag,
    "conjugated and transposed": lambda z: z.mH,
    "0-d conjugated": lambda z: z[0, 0].conj(),
    "needs gradient": lambda z: z.clone().requires_grad_(),
    "result of a computation": lambda z: z.clone().requires_grad_() * 2,
    "parameter": lambda z: torch.nn.Parameter(z),
    "frozen parameter": lambda z: torch.nn.Parameter(z, requires_grad=False),
    "buffer": lambda z: torch.nn.Buffer(z),
    "subclass": lambda z: z.as_subclass(Tagged),
    "subclass conjugated": lambda z: z.as_subclass(Tagged).conj(),
    "inference": lambda z: _in_inference_mode(z),
}


def _in_inference_mode(z):
    with torch.inference_mode():
        return z * 1


@pytest.mark.parametrize("case", VIEWS)
def test_a_view_is_saved_as_what_it_shows(tmp_path, case):
    tensor = VIEWS[case](torch.arange(6).reshape(2, 3) * (1 - 2j) + 1j)
    vs.save(tmp_path / "c", {"v": tensor})
    expected = np.array(tensor.detach().tolist(), str(tensor.dtype).removeprefix("torch."))
    check_checkpoint(tmp_path / "c", {"v": expected})


def test_nothing_is_changed_in_what_was_given():
    tensor = torch.nn.Parameter(torch.arange(4.0))
    tensor.grad = torch.ones(4)
    values = source(tensor)
    assert tensor.requires_grad
    assert torch.equal(tensor.grad, torch.ones(4))
    assert np.shares_memory(values, tensor.detach().numpy())


def test_ties_of_tensors(tmp_path):
    base = torch.arange(6.0)
    module = torch.nn.Linear(6, 6)
    half = base.to(torch.bfloat16)
    complex_ = torch.ones(2, dtype=torch.complex64)
    variables = {
        "a": base,
        "same": base,
        "viewed": base.view(6),
        "detached": base.detach(),
        "other shape": base.reshape(2, 3),
        "part": base[:3],
        "copy": base.clone(),
        "weight": module.weight,
        "tied": module.weight,
        "data": module.weight.data,
        "half": half,
        "half too": half,
        "z": complex_,
        "z conjugated": complex_.conj(),
    }
    ties = {variable.name: variable.alias_of for variable in plan_save(variables).variables if variable.alias_of}
    assert ties == {
        "same": "a",
        "viewed": "a",
        "detached": "a",
        "tied": "weight",
        "data": "weight",
        "half too": "half",
    }


def test_a_module_and_its_optimizer_go_there_and_back(tmp_path):
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    vs.save(tmp_path / "c", module.state_dict())
    loaded = vs.load(tmp_path / "c")
    check_checkpoint(tmp_path / "c", {name: tensor.numpy() for name, tensor in module.state_dict().items()})
    fresh = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    fresh.load_state_dict({name: torch.from_numpy(values) for name, values in loaded.items()})
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), fresh.parameters(), strict=True))


def test_loading_into_the_memory_of_tensors(tmp_path):
    vs.save(tmp_path / "c", {"w": torch.arange(6.0).reshape(2, 3)})
    target = torch.zeros(3, 2).T
    vs.load_into({"w": target.numpy()}, tmp_path / "c")
    assert torch.equal(target, torch.arange(6.0).reshape(2, 3))


def test_tensors_are_sources_of_load_into():
    target = np.zeros(2, ml_dtypes.bfloat16)
    vs.load_into({"w": target}, {"w": torch.tensor([0.5, 2.0], dtype=torch.bfloat16)})
    assert_same(target, np.array([0.5, 2.0], ml_dtypes.bfloat16))


class Wrapper(torch.Tensor):
    """A tensor that is made of another one, as those of torchao; it answers nothing."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, function, *_):
        raise NotImplementedError(function)


@pytest.fixture(scope="module", autouse=True)
def close_the_group():
    """Leave no process group to the tests after these, which make their own."""
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def distributed():
    """Return a tensor of a mesh of one process."""
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    return distribute_tensor(torch.ones(2), mesh, [Shard(0)])


def freed():
    """Return a tensor without its memory, as that of a sharded module between its steps."""
    tensor = torch.ones(2)
    tensor.untyped_storage().resize_(0)
    return tensor


REFUSED = {
    "sparse": (lambda: torch.eye(2).to_sparse(), "a sparse tensor cannot be saved. Save its indices and values"),
    "sparse rows": (lambda: torch.eye(2).to_sparse_csr(), "a sparse tensor cannot be saved"),
    "nested": (lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), "a nested tensor cannot be saved"),
    "jagged": (
        lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
        "a nested tensor cannot be saved",
    ),
    "quantised": (
        lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
        r"a quantised tensor cannot be saved. Save int_repr\(\)",
    ),
    "meta": (lambda: torch.ones(2, device="meta"), "a tensor on the meta device, which has no values cannot be saved"),
    "lazy": (lambda: torch.nn.LazyLinear(2).weight, "not initialized yet cannot be saved. Run its module once first"),
    "complex32": (lambda: torch.ones(2, dtype=torch.complex32), "no place on disk: found torch.complex32. Convert it"),
    "uint3": (lambda: torch.empty(2, dtype=torch.uint3), "no place on disk: found torch.uint3"),
    "masked": (lambda: masked.masked_tensor(torch.ones(2), torch.tensor([True, False])), r"its mask, .* get_data\(\)"),
    "distributed": (distributed, "spread over processes cannot be saved. Save it with varstore.adapters.torch_dist"),
    "fake": (
        lambda: FakeTensorMode().from_tensor(torch.ones(2)),
        "a fake tensor, which has no values, cannot be saved",
    ),
    "functional": (lambda: torch._to_functional_tensor(torch.ones(2)), "a functional tensor cannot be saved"),
    "a wrapper": (lambda: Wrapper(torch.ones(2)), "a Wrapper, which is made of other tensors, cannot be saved"),
    "a storage": (lambda: torch.ones(2).storage(), "a TypedStorage cannot be saved. Save a tensor that uses it"),
    "freed": (freed, "a tensor whose memory was freed cannot be saved"),
    "packed float4": (lambda: torch.empty(2, dtype=torch.float4_e2m1fn_x2), "found torch.float4_e2m1fn_x2"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_tensor_without_plain_values_is_refused(case):
    make, message = REFUSED[case]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls half of these experimental
        tensor = make()
    with pytest.raises(UnsupportedDtype, match=f"variable 'v': .*{message}"):
        source(tensor)


@pytest.mark.parametrize(
    "value", [torch.nn.Linear(1, 1), torch.Size([2]), torch.float32], ids=lambda v: type(v).__name__
)
def test_what_is_torchs_and_no_tensor_is_refused(value):
    with pytest.raises(UsageError, match="not an array, a scalar or a variable of a checkpoint"):
        source(value)


def test_a_tensor_that_is_used_outside_of_vmap_is_refused_by_name(tmp_path):
    escaped = []
    torch.vmap(lambda row: escaped.append(row) or row)(torch.ones(3, 2))
    for save in (vs.save, vs.save_state):
        with pytest.raises(UsageError, match="'v'"):
            save(tmp_path / "c", {"v": escaped[0]})


@pytest.mark.parametrize("value", [torch.nn.LazyLinear(2).weight, torch.ones((), device="meta")], ids=["lazy", "meta"])
def test_an_attribute_that_does_not_have_a_value_is_refused(tmp_path, value):
    with pytest.raises(UsageError, match=r"^attributes\['a'\]: must be JSON: found"):
        vs.save(tmp_path / "c", {}, attributes={"a": value})


def test_attributes_take_scalars(tmp_path):
    said = {"a": torch.tensor(3), "b": [torch.tensor(0.5, dtype=torch.bfloat16)], "c": torch.tensor(True)}
    assert vs.save(tmp_path / "c", {}, attributes=said).attributes == {"a": 3, "b": [0.5], "c": True}


@pytest.mark.parametrize("place", ["hpu:0", "privateuseone", "npu", "no such place"])
def test_a_device_that_is_not_there_is_refused(tmp_path, place):
    vs.save_state(tmp_path / "c", {"v": torch.ones(2)})
    for where in (place, {"cpu": place}):
        with pytest.raises(UsageError, match="variable 'v': the tensor cannot be moved to its device"):
            vs.load_state(tmp_path / "c", map_location=where)


def test_an_error_of_the_callers_own_function_is_the_callers(tmp_path):
    vs.save_state(tmp_path / "c", {"v": torch.ones(2)})
    with pytest.raises(ZeroDivisionError):
        vs.load_state(tmp_path / "c", map_location=lambda *_: 1 // 0)


@pytest.mark.parametrize("name", [name for name in TYPES if name.startswith("float8") and not name.endswith("e8m0fnu")])
@pytest.mark.parametrize("source_type", ["float16", "float32"])
def test_values_are_cast_to_float8_as_torch_casts_them(name, source_type):
    bits = np.arange(1 << 16, dtype=np.uint16)
    values = bits.view(np.float16) if source_type == "float16" else (bits.astype(np.uint32) << 16).view(np.float32)
    new, beyond = cast_values(values, np.dtype(getattr(ml_dtypes, name)))
    expected = torch.from_numpy(values.copy()).to(getattr(torch, name)).view(torch.uint8).numpy()
    is_nan = np.isnan(new)
    assert (new.view(np.uint8) == expected)[~is_nan].all()
    assert np.isnan(expected.view(new.dtype))[is_nan].all()
    assert beyond > 0


class Rows(torch.utils.data.Dataset):
    """Rows of a variable, read when they are asked for, and the length of its checkpoint."""

    def __init__(self, checkpoint, name):
        self.checkpoint = checkpoint
        self.variable = checkpoint[name]

    def __len__(self):
        return len(self.variable)

    def __getitem__(self, index):
        return torch.from_numpy(np.asarray(self.variable[index])), len(self.checkpoint)


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_of_a_data_loader_read(tmp_path, context):
    values = np.arange(24, dtype=np.float32).reshape(8, 3)
    rows = Rows(vs.save(tmp_path / "c", {"rows": values, "other": values}), "rows")
    loader = torch.utils.data.DataLoader(rows, batch_size=4, num_workers=2, multiprocessing_context=context)
    batches = list(loader)
    assert torch.equal(torch.cat([batch for batch, _ in batches]), torch.from_numpy(values))
    assert {int(length) for _, lengths in batches for length in lengths} == {2}
    vs.save(tmp_path / "c", {"rows": values + 1}, overwrite=True)
    # One worker: with two, the first error would stop the other while it still starts, which is another error.
    loader = torch.utils.data.DataLoader(rows, batch_size=4, num_workers=1, multiprocessing_context=context)
    with pytest.raises(StorageError, match="replaced since it was opened"):
        list(loader)
