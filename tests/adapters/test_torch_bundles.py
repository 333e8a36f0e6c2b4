"""A model of torch that runs from its checkpoints: exported once, then trained on, one backbone on disk for all."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

import varstore as vs
from varstore.errors import VariableMismatch

torch = pytest.importorskip("torch")
pytest.importorskip("onnxscript")
session = pytest.importorskip("varstore.adapters.onnx").session
pytestmark = pytest.mark.filterwarnings("ignore")


class Net(torch.nn.Module):
    """A convolution with BatchNorm as the backbone, and a head."""

    def __init__(self):
        super().__init__()
        self.backbone = torch.nn.Sequential(
            torch.nn.Conv2d(3, 256, 3, padding=1), torch.nn.BatchNorm2d(256), torch.nn.ReLU()
        )
        self.head = torch.nn.Linear(256, 300)

    def forward(self, x):
        """Return the scores of images."""
        return self.head(self.backbone(x).mean((2, 3)))


@pytest.fixture(scope="module")
def trained():
    """Return the model, an input, and what torch exports with and without optimization."""
    torch.manual_seed(0)
    net = Net().eval()
    with torch.no_grad():
        net.backbone[1].running_mean.normal_()
        net.backbone[1].running_var.uniform_(1, 4)
    x = torch.randn(2, 3, 8, 8)
    shapes = ({0: torch.export.Dim("batch")},)
    exported = [
        torch.onnx.export(net, (x,), dynamo=True, optimize=optimize, dynamic_shapes=shapes, verbose=False)
        for optimize in (False, True)
    ]
    state = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    return net, x, exported[0], exported[1].model_proto.SerializeToString(), state


def scores(path, x):
    opened = session(path)
    return opened.run(None, {opened.get_inputs()[0].name: x.numpy()})[0]


def assert_runs(path, net, x):
    with torch.no_grad():
        np.testing.assert_allclose(scores(path, x), net(x).numpy(), atol=1e-5)


def on_disk(folder: Path) -> int:
    found = {status.st_ino: status.st_size for path in folder.rglob("*") if (status := path.lstat()) and path.is_file()}
    return sum(found.values())


def test_fine_tunes_of_one_backbone_run_and_cost_one_backbone(tmp_path, trained):
    net, x, program, _, _ = trained
    first = vs.bundle(tmp_path / "run/step-0", net.state_dict(), graphs={"forward": program})
    assert_runs(first.path, net, x)
    before = on_disk(tmp_path)
    head = sum(parameter.nbytes for parameter in net.head.parameters())
    with vs.CheckpointManager(tmp_path / "run", background=True) as manager:
        for step in (1, 2, 3):
            with torch.no_grad():
                net.head.weight.normal_(0, 0.05)
                net.head.bias.normal_()
            manager.save(step, net.state_dict(), graphs_from=manager.latest()).wait()
            assert_runs(tmp_path / f"run/step-{step}", net, x)
            assert os.path.samefile(tmp_path / f"run/step-{step}/forward.onnx", tmp_path / "run/step-0/forward.onnx")
    rest = on_disk(tmp_path) - before - 3 * head
    assert 0 < rest < 3 * 8000  # manifests; the backbone alone has 27,648 bytes
    assert all(vs.verify(path).ok for path in (tmp_path / "run").iterdir())


def test_a_program_of_torch_export_runs_with_the_values_of_its_checkpoints(tmp_path, trained):
    net, x, _, _, state = trained
    net.load_state_dict(state)
    shapes = ({0: torch.export.Dim("batch")},)
    exported = torch.export.export(net, (x,), dynamic_shapes=shapes)
    torch.export.save(exported, tmp_path / "net.pt2")
    given = {**net.state_dict(), "moments": torch.zeros(3)}
    graphs = {"forward": tmp_path / "net.pt2"}
    first = vs.bundle(tmp_path / "run/step-0", given, graphs=graphs, include_only_used=True)
    assert set(first) == set(net.state_dict())
    file = first.files["net.pt2"]
    assert file.nbytes < (tmp_path / "net.pt2").stat().st_size - sum(one.nbytes for one in net.parameters())
    (port,) = file.attributes["inputs"]
    assert (port["name"], port["type"], port["shape"][1:]) == ("x", "float32", [3, 8, 8])
    assert file.attributes["outputs"][0]["shape"] == [port["shape"][0], 300]
    assert isinstance(port["shape"][0], str)
    with pytest.raises(
        RuntimeError, match="deserializing"
    ):  # it never runs with other values than those of the checkpoint
        torch.export.load(file.path)
    live = vs.bundle(tmp_path / "live", given, graphs={"forward": exported}).files["forward.pt2"]
    assert live.attributes == file.attributes
    with vs.CheckpointManager(tmp_path / "run") as manager:
        for step in (0, 1):
            if step:
                with torch.no_grad():
                    for parameter in net.parameters():
                        parameter.normal_(0, 0.1)
                manager.save(step, net.state_dict(), graphs_from=manager.latest())
                assert os.path.samefile(tmp_path / "run/step-1/net.pt2", file.path)
            vs.export(tmp_path / f"run/step-{step}", tmp_path / "out.pt2")
            program = torch.export.load(tmp_path / "out.pt2")
            with torch.no_grad():
                for images in (x, torch.cat([x, x + 1])):
                    assert torch.equal(program.module()(images), net(images))


def test_what_the_exporter_folds_is_never_taken_for_the_variable(tmp_path, trained):
    net, x, _, folded, state = trained
    net.load_state_dict(state)
    with pytest.raises(VariableMismatch, match=r"(?s)backbone\.0\.weight.*optimize=False"):
        vs.bundle(tmp_path / "c", net.state_dict(), graphs={"forward": folded})
    for choice in ("inline", "add"):
        vs.bundle(tmp_path / choice, net.state_dict(), graphs={"forward": folded}, on_difference=choice)
        assert_runs(tmp_path / choice, net, x)
