"""The pages "Coming from …" are whole: each row has a verdict, and something that runs or a reason why nothing does."""

from __future__ import annotations

import re

import pytest
from support.documents import has_test

from tools.documents import KINDS, VERDICTS, page_names, read_page

SYSTEMS = ["megengine", "mindspore", "oneflow", "paddle", "torch"]
ROWS = [pytest.param(row, id=f"{name}: {row.title}") for name in SYSTEMS for row in read_page(name).rows]


def test_each_system_has_a_page():
    assert page_names() == SYSTEMS


@pytest.mark.parametrize("name", SYSTEMS)
def test_everything_on_a_page_is_read(name):
    page = read_page(name)
    text = page.path.read_text(encoding="utf-8")
    fences = re.findall(r"^```(\S.*)$", text, re.MULTILINE)
    assert fences == [
        f"python {part.kind}" for part in (*page.parts, *(part for row in page.rows for part in row.parts))
    ]
    assert {part.kind for part in page.parts} <= {"before", "varstore"}
    assert len({row.title for row in page.rows}) == len(page.rows) == len(re.findall("^### ", text, re.MULTILINE))


@pytest.mark.parametrize("row", ROWS)
def test_a_row_is_shown_or_has_a_reason(row):
    kinds = {part.kind for part in row.parts}
    assert kinds <= set(KINDS)
    assert row.verdict in VERDICTS
    assert all(has_test(*test) for test in row.tests)
    if row.verdict == "Yes":
        assert row.tests or kinds & {"varstore", "both"}
        assert row.tests or kinds & {"check", "seen"} or "assert " in "".join(part.code for part in row.parts)
    else:
        assert len(row.text.split()) > 8, "say why"


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_page_for_readers_has_all_snippets_and_no_checks(name):
    page = read_page(name)
    text = page.as_markdown()
    for row in page.rows:
        assert f"### {row.title}\n" in text
        for part in row.parts:
            assert (f"```python\n{part.code}```" in text) == (part.kind in ("document", "varstore", "both"))
