"""Options: a misspelt one is a TypeError at the call, and an error of a type checker before that."""

from __future__ import annotations

import re
import subprocess
import sys

import numpy as np
import pytest
from support import FIXTURES, ROOT

import varstore as vs

USES = FIXTURES / "typing" / "uses.py"
VALUES = {"w": np.zeros(2, np.float32)}

MISSPELT = {
    "save": lambda path: vs.save(path, VALUES, overwite=True),
    "save_state": lambda path: vs.save_state(path, VALUES, overwite=True),
    "save_async": lambda path: vs.save_async(path, VALUES, overwite=True),
    "save_state_async": lambda path: vs.save_state_async(path, VALUES, overwite=True),
    "write": lambda path: vs.write(path, VALUES, overwite=True),
    "write to a file": lambda path: vs.write(path.with_suffix(".safetensors"), VALUES, metdata={}),
    "convert": lambda path: vs.convert(FIXTURES / "formats" / "numpy/fortran.npy.expect.npz", path, overwite=True),
    "checkpoint.save": lambda path: vs.checkpoint.save(path, VALUES, overwite=True),
    "CheckpointManager": lambda path: vs.CheckpointManager(path, max_to_keep=3),
    "an option that the manager sets itself": lambda path: vs.CheckpointManager(path, base="a"),
}


@pytest.mark.parametrize("call", MISSPELT)
def test_a_misspelt_option_is_a_type_error_at_the_call(call, tmp_path):
    with pytest.raises(TypeError, match="unexpected keyword argument"):
        MISSPELT[call](tmp_path / "target")
    assert not any(tmp_path.iterdir())


def test_the_option_that_was_meant_is_named(tmp_path):
    with pytest.raises(TypeError, match=r"save_async\(\) got an .* 'overwite'. Did you mean 'overwrite'\?"):
        vs.save_async(tmp_path / "a", VALUES, overwite=True)


def test_a_type_checker_finds_what_is_wrong_and_nothing_else(tmp_path):
    command = [sys.executable, "-m", "mypy", "--strict", "--no-error-summary", "--config-file", "", str(USES)]
    done = subprocess.run(
        [*command, "--cache-dir", str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    found = {int(line) for line in re.findall(r"uses\.py:(\d+): error", done.stdout)}
    expected = {number for number, line in enumerate(USES.read_text().splitlines(), 1) if line.endswith("# wrong")}
    assert found == expected, done.stdout + done.stderr
