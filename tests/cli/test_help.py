"""``help``, ``completion`` and the words that shells complete: none that a shell would run."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from click.shell_completion import ShellComplete
from click.testing import CliRunner
from hypothesis import given, strategies as st

import varstore as vs
from varstore.cli import main

NASTY = [
    "$(touch x)",
    "a b",
    "a;b",
    "`id`",
    "a'b",
    'a"b',
    "-rf",
    "a\nb",
    "é",
    "a$b",
    "~",
    "a*",
    "a\\b",
    "a&",
    "!!",
    "a|b",
]


def run(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments], prog_name="varstore")


def completed(*arguments, begun=""):
    shell = ShellComplete(main, {}, "varstore", "_VARSTORE_COMPLETE")
    return [item.value for item in shell.get_completions([str(argument) for argument in arguments], begun)]


def test_help_is_that_of_the_command():
    assert run("help").output == run("--help").output
    assert run("help", "show").output == run("show", "--help").output
    unknown = run("help", "shwo")
    assert unknown.exit_code == 2
    assert "No such command 'shwo'. Did you mean 'show'?" in unknown.stderr
    assert "Did you mean 'stats'?" in run("stat").stderr


@pytest.mark.parametrize("command", ["show", "ls", "stats"])
def test_names_of_variables_are_completed(tmp_path, command):
    values = {"fc/weight": np.ones(2), "fc/bias": np.ones(2), "out+1": np.ones(2)}
    own = vs.save(tmp_path / "own", values, files={"tokenizer.json": b"{}"}).path
    vs.write(tmp_path / "m.safetensors", values)
    vs.CheckpointManager(tmp_path / "run").save(1, values)
    for path in (own, tmp_path / "m.safetensors", tmp_path / "run"):
        assert completed(command, path, begun="fc/w") == ["fc/weight"]
        assert completed(command, path, begun="x") == []
    assert completed(command, own, begun="tok") == ["tokenizer.json"]
    assert completed(command, tmp_path / "nothing") == []
    assert completed(command, f"{own}/fc/bias") == []


def test_only_names_that_a_shell_takes_literally_are_offered(tmp_path):
    path = vs.write(tmp_path / "m.npz", {name: np.ones(1) for name in [*NASTY, "good/w"]}).path
    assert completed("show", path) == ["good/w"]


@given(st.text(min_size=1, max_size=8))
def test_what_is_offered_has_safe_letters(name):
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("varstore.cli.help.open_path", lambda _: {name: None})
        offered = completed("show", "path")
    is_safe = all(letter.isascii() and (letter.isalnum() or letter in "_./+-") for letter in name)
    assert offered == ([name] if is_safe and not name.startswith("-") else [])


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_scripts_of_other_shells(shell):
    output = run("completion", shell).output
    assert f"_VARSTORE_COMPLETE={shell}_complete" in output
    assert run("completion", "tcsh").exit_code == 2


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash here")
def test_bash_completes_a_name(tmp_path):
    vs.save(tmp_path / "c", {"encoder/weight": np.ones(2), "$(touch ran)": np.ones(2)})
    (tmp_path / "varstore").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m varstore "$@"\n')
    (tmp_path / "varstore").chmod(0o755)
    script = """
        eval "$(varstore completion bash)"
        COMP_WORDS=(varstore show c "") COMP_CWORD=3
        _varstore_completion varstore
        printf '%s,' "${COMPREPLY[@]}"
    """
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = ["bash", "--norc", "-c", script]
    result = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert re.fullmatch(r"encoder/weight,", result.stdout), result.stderr
    assert not (tmp_path / "ran").exists()
