"""What commands print with: nothing that comes from a disk can send control codes to a terminal."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from typing import Any

import click

import varstore as vs

__all__ = [
    "FAILED",
    "allow_incomplete_option",
    "complain",
    "is_terminal",
    "open_path",
    "print_facts",
    "print_report",
    "printable",
    "progress",
]

FAILED = 3
"""Exit status of what could not be done; a line on stderr says why."""

allow_incomplete_option = click.option(
    "--allow-incomplete",
    is_flag=True,
    help="Open what a save or copy left unfinished, or whose manifest is torn, and use what is whole.",
)


def printable(text: str) -> str:
    """Return the text with every sign that is neither visible nor a newline written as its escape."""
    if text.isprintable():
        return text
    return "".join([sign if sign.isprintable() or sign == "\n" else _escaped(sign) for sign in text])


def complain(message: str) -> None:
    """Say on stderr, in one line, what failed."""
    line = " ".join(part.strip() for part in message.splitlines())
    click.echo(f"varstore: {printable(line)}", err=True)


def is_terminal() -> bool:
    """Tell whether what is printed goes to a terminal."""
    return sys.stdout.isatty()


def progress() -> bool:
    """Tell whether somebody looks at progress bars, which go to stderr."""
    return sys.stderr.isatty()


def print_facts(facts: Iterable[tuple[str, str]]) -> None:
    """Print labels and what they stand for, one a line; labels are bold on a terminal."""
    lines = [f"{click.style(f'{label:<10}', bold=True)}  {printable(value)}" for label, value in facts]
    click.echo("\n".join(lines))


def print_report(report: Any, *, ok: bool) -> None:
    """Print a report of the library; its first line is green or red on a terminal."""
    head, *rest = printable(str(report)).split("\n")
    click.echo("\n".join([click.style(head, fg="green" if ok else "red"), *rest]))


def open_path(path: str, *, allow_incomplete: bool) -> vs.Checkpoint | vs.Variable:
    """Open a checkpoint, or one variable by its folder."""
    is_variable = os.path.isfile(os.path.join(path, "out"))
    if allow_incomplete and not is_variable:
        return vs.open(path, allow_incomplete=True)
    opened = vs.checkpoint.get(path)
    return opened if isinstance(opened, vs.Variable) else opened.checkpoint


def _escaped(sign: str) -> str:
    return sign.encode("unicode_escape").decode("ascii")
