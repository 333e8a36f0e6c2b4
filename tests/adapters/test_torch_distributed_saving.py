"""Many ranks save one checkpoint: from any mesh, all of it or nothing, whoever is killed."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("torch.distributed.fsdp", reason="needs torch")

from support import save_on_ranks
from support.ranks import run_ranks


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return run_ranks(Path(save_on_ranks.__file__), 4, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("case", save_on_ranks.CASES)
def test_on_four_ranks(results: dict[str, str], case: str) -> None:
    assert results.get(case, "not begun") == ""
