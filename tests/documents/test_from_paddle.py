"""Each row of the page "Coming from PaddlePaddle" holds, where PaddlePaddle can be imported."""

import pytest
from support.documents import InThisProcess, run_row

from tools.documents import read_page

PAGE = read_page("paddle")


@pytest.mark.parametrize("row", PAGE.rows, ids=[row.title for row in PAGE.rows])
@pytest.mark.filterwarnings("ignore")
def test_row(row, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_row(PAGE, row, InThisProcess("paddle"))
