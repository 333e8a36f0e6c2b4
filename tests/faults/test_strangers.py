"""A part of the campaign of files that no program wrote; the whole is ``python -m tools.faults pickles mutants``."""

import os
import signal
import subprocess
import sys

import pytest
from support import ROOT

from tools.faults.strangers import try_cases


@pytest.mark.parametrize("command", ["pickles", "mutants"])
def test_a_part_of_the_campaign(command, tmp_path):
    options = [command, "--part", "--directory", tmp_path, "--record", tmp_path / "record.json"]
    done = subprocess.run(
        [sys.executable, "-m", "tools.faults", *map(str, options)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]


BAD = {
    "CANARY": "open('canary', 'w').close()",
    "TOUCHED": "open('/etc/hostname').close()",
    "FOREIGN": "raise KeyError('k')",
    "SLOW": "exec('while True: pass')",
}


@pytest.mark.parametrize("loss", BAD)
def test_what_must_not_happen_is_noticed(loss, tmp_path, monkeypatch):
    monkeypatch.setattr("tools.faults.strangers.SECONDS", 0.2)
    code = compile(BAD[loss], "case", "exec")
    outcome = try_cases(lambda number, _: (f"case {number}", (lambda: exec(code)) if number == 1 else int), 3, tmp_path)
    assert [lost.point for lost in outcome.lost] == ["case 1"]
    assert loss in outcome.lost[0].losses


def test_a_child_that_dies_costs_one_case(tmp_path):
    def die():
        os.kill(os.getpid(), signal.SIGKILL)

    outcome = try_cases(lambda number, _: (f"case {number}", die if number in (1, 3) else int), 5, tmp_path)
    assert [(lost.point, *lost.losses) for lost in outcome.lost] == [("case 1", "FOREIGN"), ("case 3", "FOREIGN")]


def test_memory_is_bounded(tmp_path):
    outcome = try_cases(lambda *_: ("case", lambda: bytearray(1 << 32)), 1, tmp_path)
    assert "MemoryError" in outcome.lost[0].losses["FOREIGN"]
