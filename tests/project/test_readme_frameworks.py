"""The snippets of README and of the guide for those who come from another framework run in these frameworks.

MegEngine and OneFlow have no Python that varstore runs on: theirs run in environments of their own, as child
processes, and varstore's counterparts in test_readme. The others run where their framework can be imported.
"""

import importlib
import inspect
import os
import re
import subprocess
from pathlib import Path

import pytest

import varstore as vs
from varstore import interfaces

ROOT = Path(__file__).resolve().parents[2]
ENVS = Path(os.environ.get("VARSTORE_ENVS", ROOT / ".envs"))

BEFORE = {
    "torch": """
net = torch.nn.Linear(3, 2)
optimizer = torch.optim.Adam(net.parameters())
net(torch.ones(1, 3)).sum().backward()
optimizer.step()
""",
    "mindspore": "net = mindspore.nn.Dense(3, 2)\n",
    "paddle": "net = paddle.nn.Linear(3, 2)\n",
    "megengine": """
import megengine, megengine.module, megengine.optimizer
net = megengine.module.Linear(3, 2)
optimizer = megengine.optimizer.SGD(net.parameters(), lr=0.1)
""",
    "oneflow": """
import oneflow as flow
net = flow.nn.Linear(3, 2)
""",
}


BEFORE_OURS = {
    **{name: BEFORE[name] for name in ("torch", "mindspore", "paddle")},
    "jax": "params = {'w': jax.numpy.ones((2, 3))}\n",
    "lightning": "import lightning.pytorch.demos\n",
    "transformers": """
import torch
model = transformers.BertForMaskedLM(transformers.BertConfig(
    vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8))
data = [{"input_ids": torch.arange(4), "labels": torch.arange(4)}] * 8
arguments = transformers.TrainingArguments(
    output_dir="out", max_steps=4, save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True)
trainer = transformers.Trainer(model=model, args=arguments, train_dataset=data)
""",
}
AFTER_OURS = {
    "jax": "assert (restored['params']['w'] == 1).all() and restored['step'] == 3\n",
    "lightning": """
net = lightning.pytorch.demos.boring_classes.BoringModel()
trainer.fit(net)
trainer.save_checkpoint("last.ckpt")
assert vs.verify("last.ckpt").ok
""",
    "transformers": "assert callback.manager.latest().step == 4\n",
}

GUIDE = inspect.getdoc(interfaces) or ""


def snippets(framework, text=GUIDE):
    return re.findall(rf"^```python {framework}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("framework", ["torch", "mindspore", "paddle"])
@pytest.mark.filterwarnings("ignore")
def test_theirs_and_ours(framework, tmp_path, monkeypatch):
    pytest.importorskip(framework, exc_type=ImportError)
    monkeypatch.chdir(tmp_path)
    theirs, ours = snippets(framework)
    namespace = {framework: importlib.import_module(framework), "vs": vs}
    if framework == "mindspore":
        importlib.import_module("mindspore.nn")
    exec(BEFORE[framework] + theirs, namespace)
    exec(ours, namespace)
    (saved,) = (path for path in tmp_path.iterdir() if path.is_dir() and any(path.iterdir()))
    assert vs.verify(saved).ok


@pytest.mark.parametrize("framework", sorted(BEFORE_OURS))
@pytest.mark.filterwarnings("ignore")
def test_readmes_own(framework, tmp_path, monkeypatch):
    pytest.importorskip(framework, exc_type=ImportError)
    monkeypatch.chdir(tmp_path)
    (ours,) = snippets(framework, (ROOT / "README.md").read_text(encoding="utf-8"))
    namespace = {framework: importlib.import_module(framework), "vs": vs}
    exec(BEFORE_OURS[framework] + ours, namespace)
    exec(AFTER_OURS.get(framework, ""), namespace)
    assert any(tmp_path.iterdir())


@pytest.mark.parametrize("framework", ["megengine", "oneflow"])
def test_theirs(framework, tmp_path):
    python = ENVS / framework / "bin" / "python"
    if not python.exists():
        pytest.skip(f"no environment {framework} below {ENVS}: run tools/make_envs.sh {framework}")
    (theirs,) = snippets(framework)
    found = (ENVS / framework / "lib").glob("python*/site-packages/nvidia/*/lib")
    env = {"PATH": os.environ["PATH"], "LD_LIBRARY_PATH": os.pathsep.join(map(str, found))}
    command = [str(python), "-c", BEFORE[framework] + theirs]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert os.listdir(tmp_path)
