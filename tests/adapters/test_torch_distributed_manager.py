"""A manager that several ranks share: one of them decides, and what all have is one step."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("torch.distributed.fsdp", reason="needs torch")

from support import ROOT
from support.manager_on_ranks import CASES
from support.ranks import run_ranks


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Do all cases on two ranks, and return what each came to."""
    script = ROOT / "tests" / "support" / "manager_on_ranks.py"
    return run_ranks(script, 2, Path(tmp_path_factory.mktemp("ranks")))


@pytest.mark.parametrize("case", CASES)
def test_on_two_ranks(results: dict[str, str], case: str) -> None:
    assert results.get(case, "not reached: an earlier case failed") == ""
