"""Files of torch.save that are brought over: what was a tensor is one again, and training resumes bit for bit."""

import io

import numpy as np
import pytest
from support.crafted import of_python_2

torch = pytest.importorskip("torch")

import varstore as vs  # noqa: E402
from varstore.adapters.torch import (  # noqa: E402
    load,
    load_into,
    save as save_nested,
)

KINDS = ("zip", "legacy")


def save(state, path, kind):
    torch.save(state, path, _use_new_zipfile_serialization=kind == "zip")


@pytest.mark.parametrize("encoding", [None, "ASCII", "utf-8", "latin-1", "bytes"])
@pytest.mark.parametrize("note", ["plain", "caf\xe9", "\xe9" * 300])
@pytest.mark.parametrize("written_in", ["latin-1", "utf-8"])
def test_a_file_of_python_2_is_read_as_torch_reads_it(tmp_path, encoding, note, written_in):
    state = {"weight": torch.arange(6.0).reshape(2, 3)[:, 1:], "note": note, note: [1], "device": torch.device("cpu")}
    file = io.BytesIO()
    torch.save(state, file, _use_new_zipfile_serialization=False)
    path = tmp_path / "old.pth"
    path.write_bytes(of_python_2(file.getvalue(), written_in))
    options = {} if encoding is None else {"encoding": encoding}
    try:
        expected = torch.load(path, weights_only=False, **options)
    except UnicodeError:
        for read in (lambda: vs.read(path, **options), lambda: load(path, **options)):
            with pytest.raises(vs.errors.FormatError, match=r"[Pp]ass its encoding to read or convert"):
                read()
        return
    for found in (load(path, **options), vs.read(path, **options).state(framework="torch")):
        weights = [found.pop(name) for name in (b"weight", "weight") if name in found]
        assert [*found] == [name for name in expected if name not in (b"weight", "weight")]
        assert found == {k: str(v) if "device" in str(k) else v for k, v in expected.items() if k in found}
        assert torch.equal(*weights, state["weight"])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", ["load_state", "adapter", "read", "opened", "and back", "written"])
def test_tensors_that_lie_within_another_do_so_again(tmp_path, way, kind):
    whole = torch.arange(24.0).reshape(4, 6)
    state = {
        "column": whole[:, 1],
        "whole": whole,
        "transposed": whole.T,
        "corner": whole[1:3, 2:5],
        "again": whole,
        "parameter": torch.nn.Parameter(whole[0]),
        "apart": whole.clone(),
        "scattered": torch.arange(24.0)[::3],
        "empty": whole[:0],
    }
    save(state, tmp_path / "a.pth", kind)
    if way == "written":
        vs.write(tmp_path / "b.pth", state)
        back = torch.load(tmp_path / "b.pth", mmap=True)
    else:
        back = loaded_in(way, tmp_path / "a.pth", tmp_path)
    assert all(torch.equal(back[name], tensor) for name, tensor in state.items())
    with torch.no_grad():
        back["whole"] += 100
    for name in ("column", "transposed", "corner", "again", "parameter"):
        assert torch.equal(back[name], state[name] + 100), name
    for name in ("apart", "scattered"):
        assert torch.equal(back[name], state[name]), name
    assert back["again"] is back["whole"]
    assert type(back["parameter"]) is (torch.Tensor if way == "written" else torch.nn.Parameter)


def test_a_view_of_a_file_takes_no_room_in_another(tmp_path):
    whole = torch.zeros(100_000)
    vs.write(tmp_path / "a.pt", {"whole": whole, "views": [whole[i:] for i in range(9)]})
    assert (tmp_path / "a.pt").stat().st_size < 410_000


def test_an_encoding_is_for_files_of_torch(tmp_path):
    vs.save(tmp_path / "d", {"w": np.ones(2)})
    vs.write(tmp_path / "x.npz", {"w": np.ones(2)})
    for source in (tmp_path / "d", tmp_path / "x.npz", vs.open(tmp_path / "d"), vs.read(tmp_path / "x.npz")):
        with pytest.raises(vs.errors.UsageError, match="encoding"):
            load(source, encoding="latin-1")


class Training:
    """A model, its AdamW and its scheduler, and the losses of its steps."""

    def __init__(self):
        torch.manual_seed(0)
        self.net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 1))
        self.optimizer = torch.optim.AdamW(self.net.parameters(), lr=0.01, amsgrad=True)
        self.scheduler = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, 0.1, total_steps=20)

    def steps(self, start, stop):
        losses = []
        for step in range(start, stop):
            x = torch.randn(16, 4, generator=torch.Generator().manual_seed(step))
            loss = (self.net(x) - x.sum(1, keepdim=True)).square().mean()
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.scheduler.step()
            losses.append(loss.item())
        return losses

    def state(self):
        parts = {"model": self.net, "optimizer": self.optimizer, "scheduler": self.scheduler}
        return {name: part.state_dict() for name, part in parts.items()} | {"epoch": 5}

    def load(self, state):
        self.net.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])


@pytest.fixture
def stopped(tmp_path):
    training = Training()
    training.steps(0, 5)
    torch.save(training.state(), tmp_path / "ck.pth")
    return tmp_path / "ck.pth", training.steps(5, 10)


def loaded_in(way, path, directory):
    if way == "read":
        return vs.read(path).state(framework="torch")
    vs.convert(path, directory / "d")
    if way == "load_state":
        return vs.load_state(directory / "d")
    if way == "adapter":
        return load(directory / "d")
    if way == "opened":
        return vs.read(directory / "d").state()
    vs.convert(directory / "d", directory / "again.pth")
    return torch.load(directory / "again.pth")


@pytest.mark.parametrize("way", ["load_state", "adapter", "read", "opened", "and back"])
def test_training_resumes_from_a_converted_file(stopped, tmp_path, way):
    path, expected = stopped
    training = Training()
    training.load(loaded_in(way, path, tmp_path))
    assert training.steps(5, 10) == expected


def test_modules_and_optimizers_load_from_a_converted_file(stopped, tmp_path):
    path, expected = stopped
    vs.convert(path, tmp_path / "d")
    training = Training()
    load_into(training.net, tmp_path / "d", include="model/*", rename={"model/": ""})
    load_into(training.optimizer, tmp_path / "d")
    training.scheduler.load_state_dict(vs.load_state(tmp_path / "d")["scheduler"])
    assert training.steps(5, 10) == expected


def varied():
    weight = torch.nn.Parameter(torch.arange(6.0).reshape(2, 3))
    return {
        "parameter": weight,
        "tied": weight,
        "frozen": torch.nn.Parameter(torch.ones(2), requires_grad=False),
        "data": weight.detach(),
        "leaf": torch.ones(2, requires_grad=True),
        "plain": torch.ones(2, dtype=torch.bfloat16),
        "list": [torch.zeros(3, dtype=torch.int8), (torch.tensor(5), None)],
        "numpy": np.arange(3, dtype=np.int32),
        "epoch": 3,
    }


def described(node):
    if isinstance(node, dict):
        return {key: described(value) for key, value in node.items()}
    if isinstance(node, (list, tuple)):
        return type(node)(described(value) for value in node)
    if isinstance(node, torch.Tensor):
        values = node.detach()
        return type(node).__name__, str(node.dtype), node.requires_grad, values.float().tolist()
    return (type(node).__name__, node.dtype.name, node.tolist()) if isinstance(node, np.ndarray) else node


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", ["load_state", "adapter", "read", "opened"])
def test_every_leaf_has_the_type_that_it_had(tmp_path, kind, way):
    state = varied()
    save(state, tmp_path / "a.pt", kind)
    found = loaded_in(way, tmp_path / "a.pt", tmp_path)
    assert described(found) == described(state)
    assert found["tied"] is found["parameter"]
    assert found["data"].data_ptr() == found["parameter"].data_ptr()


@pytest.mark.parametrize("kind", KINDS)
def test_back_to_a_file_of_torch_nothing_changes_type(tmp_path, kind):
    state = varied()
    save(state, tmp_path / "a.pt", kind)
    vs.convert(tmp_path / "a.pt", tmp_path / "d")
    vs.convert(tmp_path / "d", tmp_path / "b.pt")
    vs.convert(tmp_path / "a.pt", tmp_path / "c.pt")
    for name in ("b.pt", "c.pt"):
        found = torch.load(tmp_path / name, weights_only=False)
        assert described(found) == described(state), name
        assert found["tied"] is found["parameter"]
        assert found["data"].data_ptr() == found["parameter"].data_ptr()
    assert vs.verify(tmp_path / "d").ok


def test_a_flat_state_dict_loads_into_its_module(tmp_path):
    net = torch.nn.Linear(3, 2)
    torch.save(net.state_dict(), tmp_path / "a.pth")
    vs.convert(tmp_path / "a.pth", tmp_path / "d")
    other = torch.nn.Linear(3, 2)
    other.load_state_dict(vs.load_state(tmp_path / "d"))
    assert (other.weight == net.weight).all()
    assert type(vs.load(tmp_path / "d")["weight"]) is np.ndarray


def test_arrays_are_those_of_the_framework_that_is_asked_for(tmp_path):
    state = {"a": torch.ones(2), "b": np.zeros(2), "view": torch.ones(4)}
    state["view"] = state["a"][1:]
    vs.save_state(tmp_path / "d", state)
    found = vs.load_state(tmp_path / "d", framework="numpy")
    assert {name: (type(value), value.tolist()) for name, value in found.items()} == {
        "a": (np.ndarray, [1, 1]),
        "b": (np.ndarray, [0, 0]),
        "view": (np.ndarray, [1]),
    }
    found = vs.load_state(tmp_path / "d", framework="torch")
    assert all(type(value) is torch.Tensor for value in found.values())
    assert found["view"].data_ptr() == found["a"].data_ptr() + 4
    vs.save(tmp_path / "plain", {"a": np.ones(2)})
    assert type(vs.load_state(tmp_path / "plain", framework="torch")["a"]) is torch.Tensor
    with pytest.raises(vs.errors.UsageError, match="tensorflow"):
        vs.load_state(tmp_path / "d", framework="tensorflow")


def test_a_map_location_moves_what_a_file_holds(tmp_path):
    torch.save({"a": torch.ones(2), "n": 1}, tmp_path / "a.pt")
    seen = []

    def place(tensor, device):
        seen.append((type(tensor), device))
        return tensor + 1

    found = vs.read(tmp_path / "a.pt").state(framework="torch", map_location=place)
    assert found["a"].tolist() == [2, 2]
    assert seen == [(torch.Tensor, "cpu")]


def test_what_torch_keeps_with_a_state_dict_survives(tmp_path):
    net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    save_nested(tmp_path / "d", {"model": net, "epoch": 3})
    for found in (
        load(tmp_path / "d")["model"],
        vs.load_state(tmp_path / "d")["model"],
        load(tmp_path / "d", include="model/*")["model"],
    ):
        assert type(found) is type(net.state_dict())
        assert found._metadata == net.state_dict()._metadata
    save_nested(tmp_path / "alone", net)
    assert load(tmp_path / "alone")._metadata == net.state_dict()._metadata


@pytest.mark.parametrize("place", [lambda storage, _: storage.untyped_storage(), lambda t, _: torch.TypedStorage(
    wrap_storage=t.untyped_storage(), dtype=t.dtype, _internal=True)])  # fmt: skip
def test_a_map_location_may_return_a_storage(tmp_path, place):
    save_nested(tmp_path / "d", {"a": torch.arange(6.0).reshape(2, 3), "s": torch.tensor(5), "e": torch.ones(0, 2)})
    found = load(tmp_path / "d", map_location=place)
    assert found["a"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert found["s"].item() == 5
    assert found["e"].shape == (0, 2)


def test_a_file_is_loaded_with_tensors_by_every_function(tmp_path):
    net = torch.nn.Linear(3, 2)
    torch.save({"model": net.state_dict(), "epoch": 3}, tmp_path / "a.pth")
    other = torch.nn.Linear(3, 2)
    other.load_state_dict(load(tmp_path / "a.pth", include="model/*", rename={"model/": ""}))
    assert (other.weight == net.weight).all()
    third = torch.nn.Linear(3, 2)
    report = vs.load_into(third, tmp_path / "a.pth", include="model/*", rename={"model/": ""})
    assert (third.weight == net.weight).all()
    assert report.renamed == {"weight": "model/weight", "bias": "model/bias"}
    vs.write(tmp_path / "a.safetensors", {"weight": np.ones((2, 3), np.float32), "bias": np.ones(2, np.float32)})
    other.load_state_dict(load(tmp_path / "a.safetensors"))
    assert (other.weight == 1).all()


def test_an_optimizer_is_loaded_from_a_file(stopped):
    path, expected = stopped
    training = Training()
    training.load({**vs.read(path).state(framework="torch"), "optimizer": training.optimizer.state_dict()})
    vs.load_into(training.optimizer, path)
    assert training.steps(5, 10) == expected
