"""README's snippets of other frameworks run in those frameworks, and varstore's beside them too.

MegEngine and OneFlow have no Python that varstore runs on: theirs run in environments of their own, as child
processes, and varstore's counterparts in test_readme. The others run where their framework can be imported.
"""

import importlib
import os
import re
import subprocess
from pathlib import Path

import pytest

import varstore as vs

ROOT = Path(__file__).resolve().parent.parent
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


def snippets(framework):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
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
    (saved,) = (path for path in tmp_path.iterdir() if path.is_dir())
    assert vs.verify(saved).ok


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
