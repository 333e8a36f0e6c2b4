"""Each row of the pages "Coming from …" holds.

PyTorch, MindSpore and PaddlePaddle are imported here, where they can be. The others have no Python that varstore runs
on: their parts run in their own environments, and once, where none of the first is installed.
"""

from __future__ import annotations

from importlib.util import find_spec

import pytest
from support.documents import InItsEnvironment, InThisProcess, run_row

from tools.documents import page_names, read_page

APART = ("megengine", "oneflow")
PAGES = {name: read_page(name) for name in page_names()}
HAS_FRAMEWORK = any(find_spec(name) for name in PAGES if name not in APART)


@pytest.fixture(scope="module")
def frameworks():
    started = {name: (InItsEnvironment if name in APART else InThisProcess)(name) for name in PAGES}
    yield started
    for framework in started.values():
        framework.close()


@pytest.mark.parametrize(
    ("name", "row"), [pytest.param(name, row, id=f"{name}: {row.title}") for name in PAGES for row in PAGES[name].rows]
)
@pytest.mark.filterwarnings("ignore")
def test_row(name, row, frameworks, tmp_path, monkeypatch):
    if name in APART and HAS_FRAMEWORK:
        pytest.skip("it runs where no framework is installed")
    monkeypatch.chdir(tmp_path)
    run_row(PAGES[name], row, frameworks[name])
