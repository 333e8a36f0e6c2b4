"""The command line: a table of commands, and the one place where errors become messages and exit codes.

Every command is a click command in a module of this folder, imported when it is called, and sees of varstore
only what a user of the library sees. Commands raise, and `main` turns an exception into a message; `verify`
alone says it by itself and goes on with the next path.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from typing import Any

import click

import varstore as vs
from varstore.cli.output import FAILED, complain

__all__ = ["main"]

_MODULES = {
    "ls": "listing",
    "show": "show",
    "verify": "check",
    "diff": "check",
    "seal": "repair",
    "clean": "repair",
    "convert": "convert",
    "demo": "demo",
}
_INTERRUPTED = 130
_PIPE_CLOSED = 141


class _Commands(click.Group):
    def list_commands(self, _: click.Context) -> list[str]:
        return list(_MODULES)

    def get_command(self, _: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _MODULES:
            return None
        command: click.Command = getattr(import_module(f"varstore.cli.{_MODULES[cmd_name]}"), cmd_name)
        return command

    def invoke(self, ctx: click.Context) -> Any:
        _never_fail_to_encode()
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
        except vs.VarstoreError as error:
            complain(str(error))
            ctx.exit(FAILED)
        except KeyboardInterrupt:
            ctx.exit(_INTERRUPTED)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python's last flush complains
            ctx.exit(_PIPE_CLOSED)
        except OSError as error:
            complain(f"{error.filename}: {error.strerror}" if error.filename else str(error))
            ctx.exit(FAILED)
        return result


@click.group(
    cls=_Commands,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit status: 0 all is well; 1 verify, diff or ls --allow-incomplete found something; 2 wrong usage; "
    "3 the operation failed, and one line on stderr says why; 130 interrupted.",
)
@click.version_option(vs.__version__, prog_name="varstore")
def main() -> None:
    """Look at, check and compare checkpoints: directories that hold one folder for each variable.

    A variable's values are the raw bytes in its file "out"; "meta" beside it says shape and type. `ls`, `cat`,
    `cp` and `rm` work on them too; after a change by hand, `varstore seal` records it.

    \b
    Examples:
      varstore ls lenet              what is in it
      varstore show lenet/conv1      one variable: shape, digest, statistics, first values
      varstore verify lenet          compare every byte with what was saved
      varstore diff lenet lenet_2    which variables changed
      varstore convert m.pt lenet    another system's file as a checkpoint
    """


def _never_fail_to_encode() -> None:
    """Let a terminal that lacks a character show its escape."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="backslashreplace")
