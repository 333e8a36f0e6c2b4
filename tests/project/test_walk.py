"""The way of a save and of a load through the package becomes shorter, and never climbs more than it did."""

from __future__ import annotations

import re
import subprocess
import sys

from support import ROOT

from tools import walk

MOST = {"save": (56, 0), "load": (80, 0)}
"""Moves and climbs; lower them when they fall, and do not raise them."""


def function(name: str, file: str, body: str):
    namespace: dict = {}
    exec(compile(f"def {name}(*arguments): {body}", f"{walk.PACKAGE}{file}", "exec"), namespace)
    return namespace[name]


def test_no_move_and_no_climb_is_added():
    done = subprocess.run([sys.executable, "-m", "tools.walk"], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stderr == ""
    found = {
        name: (int(moves), int(climbs))
        for name, moves, climbs in re.findall(
            r"^(\w+): (\d+) moves between \d+ files, (\d+) climbs$", done.stdout, re.MULTILINE
        )
    }
    assert found.keys() == MOST.keys()
    for name, (moves, climbs) in found.items():
        assert moves <= MOST[name][0], done.stdout
        assert climbs <= MOST[name][1], done.stdout
    assert done.returncode == int(any(climbs for _, climbs in found.values()))


def test_a_call_that_goes_up_is_a_climb():
    high = function("high", "cli/high.py", "return 1")
    low = function("low", "errors.py", "return arguments[0]()")
    followed = walk.Walk.of(lambda: low(high))
    assert (followed.files, followed.moves) == (["errors", "cli/high"], 1)
    assert followed.climbs == ["errors calls high of cli/high"]


def test_a_call_that_goes_down_is_none():
    high = function("high", "cli/high.py", "return [arguments[0](), arguments[0]()]")
    low = function("low", "errors.py", "return 1")
    followed = walk.Walk.of(lambda: high(low))
    assert (followed.files, followed.moves, followed.climbs) == (["cli/high", "errors", "errors"], 1, [])
    assert str(followed).split() == [
        *(str(walk.FLOORS["cli"]), "cli", "high"),
        *(str(walk.FLOORS["errors"]), "errors", "errors"),
    ]
