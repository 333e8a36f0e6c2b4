"""README's snippets for distributed training run as torchrun runs a program: in two processes."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import varstore as vs

pytest.importorskip("torch", exc_type=ImportError)

ROOT = Path(__file__).resolve().parents[2]
SNIPPETS = re.findall(
    r"^```python torchrun\n(.*?)^```$", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
)
BEFORE = """
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

torch.manual_seed(0)
model = torch.nn.Linear(3, 4)
fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
optimizer = torch.optim.Adam(model.parameters())
model(torch.ones(1, 3)).sum().backward()
optimizer.step()
saved = [parameter.full_tensor().clone() for parameter in model.parameters()]
"""
AFTER = """
loaded = [parameter.full_tensor() for parameter in model.parameters()]
assert all(map(torch.equal, loaded, saved))
if torch.distributed.get_rank() == 0:
    torch.save(saved, "saved.pt")
torch.distributed.destroy_process_group()
"""
SPOILS = """
with torch.no_grad():
    for parameter in model.parameters():
        parameter.fill_(7)
"""


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_a_snippet_of_readme(snippet, tmp_path):
    """What it loads has been spoilt before, and what it saves is read in this process, which is not of the two."""
    import torch

    save, load = re.split(r"^(?=\w+\.load\()", snippet, flags=re.MULTILINE)
    (tmp_path / "train.py").write_text(BEFORE + save + SPOILS + load + AFTER)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "train.py"]
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    state = vs.load_state(tmp_path / "checkpoint")
    weight, bias = torch.load(tmp_path / "saved.pt")
    assert torch.equal(torch.as_tensor(state["model"]["weight"]), weight)
    assert torch.equal(torch.as_tensor(state["model"]["bias"]), bias)
    assert vs.verify(tmp_path / "checkpoint").ok
