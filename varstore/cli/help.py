"""``varstore help`` and ``completion``: the help of a command, and the scripts by which shells complete words.

What is offered becomes part of a command line, and a shell would run some of what a stranger's name can hold. So only
names of letters, digits and ``_./+-`` are offered, and none that begins with a dash, which would be an option.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable

import click
from click.shell_completion import get_completion_class

import varstore as vs
from varstore.cli.sources import open_path

__all__ = ["completion", "help", "variable_names"]

_SAFE = re.compile(r"[A-Za-z0-9_./+][A-Za-z0-9_./+-]*")
_MOST = 1000


def variable_names(ctx: click.Context, _: click.Parameter, begun: str) -> list[str]:
    """Return the names of variables and attached files of PATH that begin so; none if it cannot be opened."""
    names: Iterable[str] = ()
    with contextlib.suppress(Exception):  # whatever it is, a shell that completes a word is not the place to say so
        opened = open_path(os.path.expanduser(ctx.params["path"]))
        if not isinstance(opened, vs.Variable):
            names = [*opened, *getattr(opened, "files", ())]
    return [name for name in names if name.startswith(begun) and _SAFE.fullmatch(name)][:_MOST]


@click.command(short_help="Show the help of a command.")
@click.argument("command", required=False)
@click.pass_context
def help(ctx: click.Context, command: str | None) -> None:
    """Show the help of COMMAND, or the list of all commands.

    \b
    Examples:
      varstore help
      varstore help show
    """
    root = ctx.find_root()
    assert isinstance(root.command, click.Group)
    if command is None:
        click.echo(root.get_help())
        return
    name, found, _ = root.command.resolve_command(root, [command])
    assert found is not None
    with click.Context(found, info_name=name, parent=root) as of_command:
        click.echo(found.get_help(of_command))


@click.command(short_help="Print the script that completes words in a shell.")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print a script for SHELL, after which the tab key completes commands, options, paths and names of variables.

    Add the line of the example to ~/.bashrc or ~/.zshrc; for fish, write the script to
    ~/.config/fish/completions/varstore.fish. Names of variables are completed after PATH in show, ls and stats, if they
    consist of letters, digits and _./+- only: a shell would run what others can hold.

    \b
    Examples:
      eval "$(varstore completion bash)"
      eval "$(varstore completion zsh)"
      varstore completion fish > ~/.config/fish/completions/varstore.fish
    """
    made = get_completion_class(shell)
    assert made is not None
    click.echo(made(ctx.find_root().command, {}, "varstore", "_VARSTORE_COMPLETE").source())
