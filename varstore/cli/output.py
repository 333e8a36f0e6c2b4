"""What commands print with: text that is safe for a terminal, and errors in the words of the command line.

Nothing that comes from a disk can send control codes to a terminal, forge a line, or fill the screen; see
`varstore.text.escape`. The library's messages name its parameters; here they become the flags of the command that was
called.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import click

import varstore as vs
from varstore.text.escape import one_line

__all__ = [
    "FAILED",
    "LABEL",
    "complain",
    "error_text",
    "is_terminal",
    "label",
    "print_facts",
    "print_report",
    "progress",
    "with_flags",
]

_LONGEST = 10_000
"""Characters of a line that the library composed of values that it cut."""

LABEL = " " * 12
"""What stands below a label."""

FAILED = 3
"""Exit status of an operation that failed; a line on stderr says why."""

_PARAMETER = re.compile(r"""(?<![\w/'"-])([a-z_]+)=(True\b|\d+\b|'[^']*'|"[^"]*"|…|(?![\w='"-]))""")
"""A parameter in a message: a name, and True, a number, a quoted value, or nothing; not in a path or a quoted name."""

_CALL = re.compile(r"\b(?:read|write|convert)\(([^()]*)\)")
"""A call of the library in a message, whose parameters are all that the command line needs of it."""

_PYTHON = re.compile(r"(?<![\w/'\"`.-])[a-z][\w.]*\(|\b(?:save|load)_state\b")
"""What only Python can do; not in a path or a quoted name."""

_ARGUMENTS = {"include": "patterns"}
"""Parameters of the library that a command takes as an argument of another name."""

_OF_THE_CALL = {"overwrite"}
"""Parameters of what was called; to give one to another command would not help."""


def complain(message: str) -> None:
    """Print one line on stderr that says what failed."""
    line = " ".join(part.strip() for part in message.splitlines())
    click.echo(f"varstore: {one_line(line, _LONGEST)}", err=True)


def error_text(error: vs.VarstoreError) -> str:
    """Return the message of an error, with flags in place of parameters.

    An alternative in the hint that needs a call in Python, or a parameter that no command has as a flag, is left out.
    If the hint has no other alternative, it says that it is for Python.
    """
    field = error.field and (_flag(error.field) or error.field)
    ways = [] if error.hint is None else with_flags(error.hint).split(", or ")
    open_ways = [way for way in ways if not _PARAMETER.search(way) and not _PYTHON.search(way)]
    hint = ", or ".join(open_ways or ways)
    return str(
        vs.VarstoreError(
            error.problem,
            rows=error.rows,
            path=error.path,
            variable=error.variable,
            field=field,
            found=error.found,
            expected=error.expected,
            hint=hint if open_ways or not hint else f"in Python, {hint}",
        )
    )


def with_flags(text: str) -> str:
    """Return the text with flags in place of the parameters that are flags of a command."""

    def flags_of_call(match: re.Match[str]) -> str:
        found = [flag(parameter) for parameter in _PARAMETER.finditer(match[1])]
        return ", ".join(found) if found and not any(map(_PARAMETER.fullmatch, found)) else match[0]

    def flag(match: re.Match[str]) -> str:
        value = "" if match[2] in ("True", "") else " " + match[2].strip("'\"")
        found = _flag(match[1], value)
        return match[0] if found is None else found

    return _PARAMETER.sub(flag, _CALL.sub(flags_of_call, text))


def is_terminal() -> bool:
    """Tell whether the output goes to a terminal."""
    return sys.stdout.isatty()


def progress() -> bool:
    """Tell whether progress bars, which go to stderr, can be seen."""
    return sys.stderr.isatty()


def label(text: str) -> str:
    """Return a label and the space after it; it is bold on a terminal."""
    return click.style(text, bold=True) + LABEL[len(text) :]


def print_facts(facts: Iterable[tuple[str, str]]) -> None:
    """Print labels and their values, one per line."""
    click.echo("\n".join([f"{label(text)}{one_line(value)}" for text, value in facts]))


def print_report(report: Any, *, ok: bool) -> None:
    """Print a report of the library; its first line is green or red on a terminal."""
    head, *rest = [one_line(line, _LONGEST) for line in with_flags(str(report)).split("\n")]
    click.echo("\n".join([click.style(head, fg="green" if ok else "red"), *rest]))


def _flag(parameter: str, value: str = "") -> str | None:
    """Return how the command that was called takes a parameter, or else which other command does, and how."""
    for is_called, name, command in _commands():
        for param in command.params:
            is_meant = is_called or parameter not in _OF_THE_CALL
            if is_meant and isinstance(param, click.Option) and param.name in (parameter, f"{parameter}_"):
                return f"{param.opts[0]}{value}" if is_called else f"`varstore {name} {param.opts[0]}{value}`"
            if is_called and param.name == _ARGUMENTS.get(parameter):
                return param.human_readable_name.strip("[].")
    return None


def _commands() -> Iterator[tuple[bool, str, click.Command]]:
    """Yield the command that was called, if any, and then the others; each is imported when it is yielded."""
    context = click.get_current_context(silent=True)
    if context is None:
        return
    root = context.find_root()
    called = context.invoked_subcommand if context is root else context.info_name
    assert isinstance(root.command, click.Group)
    for name in sorted(root.command.list_commands(root), key=lambda name: name != called):
        command = root.command.get_command(root, name)
        assert command is not None
        yield name == called, name, command
