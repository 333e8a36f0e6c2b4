"""Processes of a distributed run that all save to one path are told which of them is to do it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import varstore as vs
from varstore.errors import CheckpointExists

pytestmark = pytest.mark.core

RANK = """
import numpy as np, varstore as vs
try:
    vs.save("step", {"w": np.ones(1 << 20)}, durable=False)
except vs.errors.CheckpointExists as error:
    print(error)
"""


def test_ranks_that_save_to_one_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    ranks = [subprocess.Popen([sys.executable, "-c", RANK], cwd=tmp_path, stdout=subprocess.PIPE) for _ in range(3)]
    said = sorted(rank.communicate(timeout=60)[0].decode() for rank in ranks)
    assert said[0] == ""
    ways = "save in the one of rank 0 only, or with varstore.adapters.torch_distributed.save in all of them together"
    assert all(ways in text for text in said[1:])


@pytest.mark.parametrize("size", [None, "1"])
def test_one_process_is_told_nothing_of_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: str | None
) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if size is not None:
        monkeypatch.setenv("WORLD_SIZE", size)
    vs.save(tmp_path / "c", {"w": np.ones(2)}, durable=False)
    with pytest.raises(CheckpointExists) as caught:
        vs.save(tmp_path / "c", {"w": np.ones(2)})
    assert "rank" not in str(caught.value)
    assert "Choose a new path" in str(caught.value)
