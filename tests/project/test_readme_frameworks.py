"""The snippets of README for frameworks run, each where its framework can be imported; test_readme runs the others."""

import importlib
import re
from pathlib import Path

import pytest

import varstore as vs

ROOT = Path(__file__).resolve().parents[2]

BEFORE = {
    "torch": """
net = torch.nn.Linear(3, 2)
optimizer = torch.optim.Adam(net.parameters())
net(torch.ones(1, 3)).sum().backward()
optimizer.step()
""",
    "mindspore": "import mindspore.nn\nnet = mindspore.nn.Dense(3, 2)\n",
    "paddle": "net = paddle.nn.Linear(3, 2)\n",
    "jax": "params = {'w': jax.numpy.ones((2, 3))}\n",
    "lightning": "import lightning.pytorch.demos\n",
    "transformers": """
import torch
model = transformers.BertForMaskedLM(transformers.BertConfig(
    vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8))
data = [{"input_ids": torch.arange(4), "labels": torch.arange(4)}] * 8
arguments = transformers.TrainingArguments(
    output_dir="out", max_steps=4, save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True)
""",
}
AFTER = {
    "jax": "assert (restored['params']['w'] == 1).all() and restored['step'] == 3\n",
    "lightning": """
net = lightning.pytorch.demos.boring_classes.BoringModel()
trainer.fit(net)
trainer.save_checkpoint("last.ckpt")
assert vs.verify("last.ckpt").ok
""",
    "transformers": "assert callback.manager.latest().step == 4\n",
}


@pytest.mark.parametrize("framework", sorted(BEFORE))
@pytest.mark.filterwarnings("ignore")
def test_a_snippet_of_readme(framework, tmp_path, monkeypatch):
    pytest.importorskip(framework, exc_type=ImportError)
    monkeypatch.chdir(tmp_path)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (ours,) = re.findall(rf"^```python {framework}\n(.*?)^```$", readme, re.MULTILINE | re.DOTALL)
    namespace = {framework: importlib.import_module(framework), "vs": vs}
    exec(BEFORE[framework] + ours, namespace)
    exec(AFTER.get(framework, ""), namespace)
    assert any(tmp_path.iterdir())
