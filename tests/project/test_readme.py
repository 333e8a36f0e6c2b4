"""README.md says what is so: its examples run in their order and print what it shows; its tables are complete."""

import contextlib
import fnmatch
import io
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import varstore as vs
from varstore.cli import main

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks():
    """Return (line, language, text) of every fenced block."""
    found = re.finditer(r"^```([\w ]*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    return [(README.count("\n", 0, match.start()) + 2, match[1], match[2]) for match in found]


def is_as_shown(printed, shown):
    """Compare what was printed with what README shows; "…" there stands for anything."""
    pattern = "".join("*" if sign == "…" else f"[{sign}]" if sign in "*?[" else sign for sign in shown)
    return fnmatch.fnmatchcase(printed, pattern)


def run_python(text, line, namespace):
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile("\n" * (line - 1) + text, "README.md", "exec"), namespace)
    return printed.getvalue()


def run_command(command):
    varstore = f'varstore() {{ {shlex.quote(sys.executable)} -m varstore "$@"; }}\n'
    shell = ["bash", "-c", varstore + command]
    result = subprocess.run(shell, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, timeout=60)
    return result.stdout, result.returncode


def test_the_examples_can_be_typed_twice_and_print_what_is_shown(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        run_examples()


def run_examples():
    namespace, printed, status = {}, "", 0
    with vs.Session():
        for line, language, text in blocks():
            if language == "python":
                assert not printed, f"README.md before line {line} does not show what is printed:\n{printed}"
                printed = run_python(text, line, namespace)
            elif language == "text":
                assert is_as_shown(printed, text), f"README.md line {line}:\n{printed}"
                printed = ""
            elif language == "console":
                for command, shown in re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", text, re.MULTILINE):
                    output, status = run_command(f"(exit {status}); {command}")
                    assert is_as_shown(output, shown), f"README.md line {line}: {command}\n{output}"
    assert not printed


def test_every_block_is_of_a_known_kind():
    own = {"sh", "python", "text", "console"}
    names = ("torch", "torchrun", "jax", "transformers", "lightning", "mindspore", "paddle")
    frameworks = {f"python {name}" for name in names}
    assert {language for _, language, _ in blocks()} == own | frameworks


@pytest.mark.parametrize(
    ("printed", "shown", "same"),
    [
        ("a [1] b\n", "a [1] b\n", True),
        ("a [1] b\n", "a […\n", True),
        ("a\nb\n", "a\n…\n", True),
        ("a\n", "b\n", False),
    ],
)
def test_the_comparison_itself(printed, shown, same):
    assert is_as_shown(printed, shown) == same


def test_the_table_of_commands_is_complete():
    _, _, section = README.partition("## Command line")
    rows = re.findall(r"^\| [\w ]+ \| (`.*) \|$", section.partition("\n## ")[0], re.MULTILINE)
    commands = [command for row in rows for command in re.findall(r"`([\w-]+)`", row)]
    assert sorted(commands) == sorted(main.list_commands(None))


def test_every_file_that_is_named_exists():
    for path in re.findall(r"(?:tools|proto|varstore)/[\w/]+\.\w+", README):
        assert os.path.exists(ROOT / path), path


def test_it_is_short():
    assert len(README.split()) <= 1800
