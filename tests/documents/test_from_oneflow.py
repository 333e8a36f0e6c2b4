"""Each row of the page "Coming from OneFlow" holds; OneFlow's parts run in its environment."""

import pytest
from support.documents import InItsEnvironment, run_row

from tools.documents import read_page

PAGE = read_page("oneflow")


@pytest.fixture(scope="module")
def framework():
    started = InItsEnvironment("oneflow")
    yield started
    started.close()


@pytest.mark.parametrize("row", PAGE.rows, ids=[row.title for row in PAGE.rows])
@pytest.mark.filterwarnings("ignore")
def test_row(row, framework, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_row(PAGE, row, framework)
