"""README has the figures of the campaign's last record."""

import json

import pytest

from tools import readme
from tools.faults import figures
from tools.faults.__main__ import COMMANDS


def test_readme_has_the_figures_of_the_results():
    results = json.loads(figures.RESULTS.read_text())
    text = readme.README.read_text(encoding="utf-8")
    assert readme.quoted("faults", text) == figures.figures(results), "run `python -m tools.faults.figures RECORD`"
    assert all(sums["lost"] == 0 for sums in results["kinds"].values())


def test_every_command_is_quoted():
    assert {command for command, _ in figures.KINDS} >= set(COMMANDS) - {"count"}


def row(command, fault, points, **sums):
    return {"command": command, "fault": fault, "points": points, "survived": points, "known": 0, "lost": 0, **sums}


def test_the_rows_of_a_kind_are_summed():
    rows = [row("calls", "EIO", 5), row("calls", "ENOSPC", 7, survived=6, lost=1), row("count", "uncounted", 9)]
    summary = figures.summary(rows, date="2026-01-01")
    assert summary == {
        "date": "2026-01-01",
        "kinds": {"error of a call": {"points": 12, "survived": 11, "known": 0, "lost": 1}},
    }
    assert "|error of a call|12|11|0|1|" in figures.figures(summary)


def test_a_readme_without_figures_is_an_error():
    with pytest.raises(ValueError, match="faults:begin"):
        readme.quoted("faults", "# varstore\n")
