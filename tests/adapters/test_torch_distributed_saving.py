"""Many ranks save one checkpoint: from any mesh, all of it or nothing, whoever is killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch.distributed.fsdp", reason="needs torch")

from support import ROOT, failing_ranks, save_on_ranks
from support.ranks import run_ranks


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[str, str]:
    return run_ranks(Path(save_on_ranks.__file__), 4, folder)


@pytest.mark.parametrize("case", save_on_ranks.CASES)
def test_on_four_ranks(results: dict[str, str], case: str) -> None:
    assert results.get(case, "not begun") == ""


def test_oneflow_loads_what_ranks_saved(results: dict[str, str], folder: Path) -> None:
    python = Path(os.environ.get("VARSTORE_ENVS", ROOT / ".envs")) / "oneflow/bin/python"
    if not python.exists():
        pytest.skip("no environment oneflow: run tools/make_envs.sh oneflow")
    assert results["flat"] == ""
    code = "import sys, oneflow as flow\nfound = flow.load(sys.argv[1])\n"
    code += "print(*sorted(found), [array.numpy().tolist() for array in found.values()])"
    command = [python, "-W", "ignore", "-c", code, folder / "for-oneflow"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    whole = [[float(7 * row + column) for column in range(7)] for row in range(12)]
    assert done.stdout.splitlines()[-1] == f"columns rows {[whole, whole]}"


@pytest.fixture(scope="module")
def failures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("failures")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    command = [sys.executable, failing_ranks.__file__, str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert not done.returncode, done.stdout + done.stderr
    found: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return found


@pytest.mark.parametrize("case", failing_ranks.CASES)
def test_ranks_that_fail(failures: dict[str, Any], case: str) -> None:
    found = failures[case]
    if "skipped" in found:
        pytest.skip(found["skipped"])
    _, ranks = failing_ranks.CASES[case]
    is_visible = case == "renamed 0"
    assert found["path"] == ["new" if is_visible else "old"] * 2
    assert found["after"] == ["c", "warm"]
    is_left = 0 in ranks  # only whoever staged the save removes what it left
    assert (len(found["left"]) == 3) == is_left, found["left"]
    survivors = {str(rank) for rank in range(failing_ranks.SIZE)}
    if case not in failing_ranks.SURVIVED:
        survivors -= set(map(str, ranks))
    assert found["said"].keys() == survivors
    text = {"full 2": "the disk became full", "unshared 3": "a file system that they share"}.get(
        case, "one of them has ended"
    )
    for kind, message, seconds in found["said"].values():
        assert kind == ("OutOfSpace" if case == "full 2" else "StorageError"), message
        assert text.lower() in message.lower()
        assert seconds < failing_ranks.SECONDS
    if case in failing_ranks.SURVIVED:
        assert len({message for _, message, _ in found["said"].values()}) == 1
