"""The guide to file systems shows what the tool prints."""

import re

import pytest

import varstore.storage
from tools.storage.known import KNOWN
from tools.storage.mounts import FILE_SYSTEMS
from tools.storage.tables import promises_table, results_table
from varstore.inspection.storage import PROMISED, PROMISES

GUIDE = varstore.storage.__doc__ or ""


def test_the_guide_shows_the_promises():
    assert promises_table() in GUIDE
    assert all(len(promised) == len(PROMISED) for promised in PROMISES.values())


def test_the_guide_shows_results_of_known_file_systems():
    head, *rows = GUIDE[GUIDE.index("| seen on") :].splitlines()
    assert head == results_table({}).splitlines()[0]
    seen = {row.split(" | ")[0].removeprefix("| ") for row in rows if row.startswith("| ") and "---" not in row}
    assert seen <= FILE_SYSTEMS.keys()
    assert len(seen) >= 15
    for row in rows:
        name = row.split(" | ")[0].removeprefix("| ")
        assert "no" not in row.split(" | ")[1:] or name in KNOWN, row
        assert "in part" not in row or name in KNOWN, row


def test_results_sum_up_checks():
    found = {"save": "yes", "load": "–", "base=": "OSError: 5", "overwrite": "yes", "image layer": "AssertionError: no"}
    row = results_table({"some": found, "other": "cannot be mounted"}).splitlines()[-1]
    assert row == "| some | yes | no | in part | – | – | – | – |"


@pytest.mark.parametrize("name", KNOWN)
def test_what_is_known_is_of_a_file_system_that_there_is(name):
    assert name in FILE_SYSTEMS
    assert all(re.search(r"\w", reason) for reason in KNOWN[name].values())
