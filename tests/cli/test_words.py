"""Errors on the command line name flags and commands, and never a parameter of Python."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import click
import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, strategies as st
from support.crafted import torch_file

import varstore as vs
from varstore.cli import main
from varstore.cli.output import error_text, with_flags

pytestmark = pytest.mark.core

PACKAGE = Path(vs.__file__).parent
REACHED = ("disk", "formats", "inspection", "layout", "storage", "values")
COMMANDS = main.list_commands(None)
PARAMETER = re.compile(r"(?<![\w'\"`-])[a-z_]+=(?!=)")


def called(command: str) -> click.Context:
    context = click.Context(main, info_name="varstore")
    context.invoked_subcommand = command
    return context


def strings(node: ast.AST, given: dict[str, list[ast.AST]], seen: set[str]) -> Iterator[str]:
    """Yield the texts that an expression can be: constants, f-strings with … for values, what its names stand for."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    elif isinstance(node, ast.JoinedStr):
        yield "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
    elif isinstance(node, ast.Name) and node.id not in seen:
        seen.add(node.id)
        for value in given.get(node.id, []):
            yield from strings(value, given, seen)
    for child in ast.iter_child_nodes(node):
        yield from strings(child, given, seen)


def hints_of(module: ast.Module) -> Iterator[str]:
    given: dict[str, list[ast.AST]] = {}
    for node in ast.walk(module):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            given.setdefault(node.targets[0].id, []).append(node.value)
        elif isinstance(node, ast.FunctionDef):
            returned = [found for found in ast.walk(node) if isinstance(found, ast.Return)]
            given.setdefault(node.name, []).extend(returned)
    for node in ast.walk(module):
        if isinstance(node, ast.keyword) and node.arg == "hint":
            yield from strings(node.value, given, set())


def hints() -> set[str]:
    files = [path for folder in REACHED for path in (PACKAGE / folder).rglob("*.py")]
    texts = {text for path in files for text in hints_of(ast.parse(path.read_text(encoding="utf-8")))}
    return {text for text in texts if text.strip("… ")}


HINTS = sorted(hints())
WITH_PARAMETER = [hint for hint in HINTS if PARAMETER.search(hint)]


def test_the_hints_are_found():
    assert len(HINTS) > 80
    assert len(WITH_PARAMETER) > 5
    assert any("allow_incomplete=True" in hint for hint in HINTS)


@pytest.mark.parametrize("command", COMMANDS)
def test_no_hint_names_a_parameter(command):
    with called(command):
        said = {hint: error_text(vs.VarstoreError("no", hint=hint)) for hint in HINTS}
    assert not {hint for hint, text in said.items() if PARAMETER.search(text) and ". In Python, " not in text}


@pytest.mark.parametrize(
    ("command", "hint", "said"),
    [
        ("ls", "open it with allow_incomplete=True to salvage it", "Open it with --allow-incomplete to salvage it"),
        ("diff", "use allow_incomplete=True", "Use `varstore ls --allow-incomplete`"),
        ("convert", "leave it out with exclude=", "Leave it out with --exclude"),
        ("convert", "give the format; format='varstore' is one", "Give the format; --format varstore is one"),
        ("convert", "convert it (dtype='float32')", "Convert it (--dtype float32)"),
        ("convert", "pass the program: write('a.pt2', x, model='b.pt2')", "Pass the program: --model b.pt2"),
        ("convert", "use torch.save(x), or leave it out with exclude=", "Leave it out with --exclude"),
        ("ls", "see /runs/a(1) and 'b(2)'", "See /runs/a(1) and 'b(2)'"),
        ("ls", "save it with save_state", "In Python, save it with save_state"),
        ("demo", "choose a new path, or overwrite=True to replace it", "Choose a new path"),
        ("convert", "pass its key: read(path, key=…)", "In Python, pass its key: read(path, key=…)"),
        ("ls", "see `varstore ls lenet/exclude=` or 'rename=x'", "See `varstore ls lenet/exclude=` or 'rename=x'"),
    ],
)
def test_parameters_become_flags(command, hint, said):
    with called(command):
        assert error_text(vs.VarstoreError("no", hint=hint)) == f"no. {said}"


@pytest.mark.parametrize(
    ("command", "field", "said"),
    [("convert", "dtype", "--dtype"), ("ls", "include", "PATTERN"), ("verify", "shape", "shape")],
)
def test_fields_become_flags(command, field, said):
    with called(command):
        assert error_text(vs.VarstoreError("no", field=field)) == f"{said}: no"


@given(text=st.text(st.sampled_from("ab =_'/-()Te"), max_size=40))
def test_other_text_stays(text):
    with called("ls"):
        assert with_flags(text) == text


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["ls", "{there}/torn"], "is whole, and --allow-incomplete opens it"),
        (["show", "{there}/torn"], "is whole, and --allow-incomplete opens it"),
        (["diff", "{there}/torn", "{there}/c"], "is whole, and `varstore ls --allow-incomplete` opens it"),
        (["verify", "{there}/torn"], "is whole, and `varstore ls --allow-incomplete` opens it"),
        (["verify", "{there}/old.pt"], "and `varstore convert` makes checkpoints of them"),
        (["clean", "{there}/old.pt"], "old.pt: this is a file, and a directory is expected"),
        (["links", "{there}/old.pt"], "old.pt: this is a file, and a directory is expected"),
        (["check-storage", "{there}/old.pt"], "old.pt: this is a file, and a directory is expected"),
        (["merge", "{there}/m", "{there}/c", "{there}/c", "--average", "--last-wins"], "Pass --average or --last-wins"),
        (["merge", "{there}/c", "{there}/d", "--overwrite"], "Move them away\n"),
        (["ls", "{there}/c", "x*"], "PATTERN: no variable matches the pattern 'x*'"),
        (["convert", "{there}/c", "{there}/x.npz", "--include", "x*"], "--include: no variable matches"),
        (["convert", "{there}/c", "{there}/x.npz", "--dtype", "int8"], "--dtype: only floating"),
        (["convert", "{there}/c", "{there}/x.h5"], "--format varstore is a checkpoint directory"),
        (["convert", "{there}/c", "{there}/torn"], "Choose a new path"),
        (["convert", "{there}/old.pt", "{there}/new"], "to read or convert, such as --encoding latin-1, or 'bytes'"),
    ],
)
def test_real_errors(tmp_path, arguments, said):
    for name in ("c", "d", "torn"):
        vs.save(tmp_path / name, {"v": np.zeros(2)})
    (tmp_path / "c" / "notes.txt").touch()
    (tmp_path / "torn" / "snapshot_done").unlink()
    torch_file(tmp_path / "old.pt", b"U\1\xe9")
    result = CliRunner().invoke(main, [argument.format(there=tmp_path) for argument in arguments])
    assert result.exit_code in (1, 3)
    printed = result.output.replace(str(tmp_path), "")
    assert said in printed
    assert not PARAMETER.search(printed)


@pytest.mark.parametrize("command", [None, *COMMANDS])
def test_help_names_no_parameter(command):
    text = CliRunner().invoke(main, [command, "--help"] if command else ["--help"]).output
    assert not re.search(r"(?<![\w'\"-])[a-z_]+=(True|False|')", text)
