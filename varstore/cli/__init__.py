"""The command line: a table of commands, and the one place where errors become messages and exit codes.

Each command is a click command in a module of this folder, which is imported when the command is called, and uses only
the public interface of the library. Commands raise errors, and `main` turns them into messages and exit codes. Only
`verify` prints an error itself, because it continues with the next path.
"""

from __future__ import annotations

import gc
import os
import sys
from importlib import import_module
from typing import Any

import click

import varstore as vs
from varstore.cli.output import FAILED, complain, error_text
from varstore.text.hints import nearest

__all__ = ["main"]

_MODULES = {
    "ls": "listing",
    "show": "show",
    "stats": "stats",
    "verify": "check",
    "diff": "diff",
    "seal": "repair",
    "salvage": "repair",
    "clean": "repair",
    "links": "repair",
    "pack": "packing",
    "unpack": "packing",
    "check-storage": "check",
    "convert": "convert",
    "merge": "merge",
    "export": "serving",
    "check": "serving",
    "log": "run",
    "du": "run",
    "report": "report",
    "view": "view",
    "demo": "demo",
    "completion": "help",
    "help": "help",
}
_INTERRUPTED = 130
_PIPE_CLOSED = 141
_OBJECTS = 100_000
"""How many objects are made between two searches for garbage, which a listing of 10,000 variables has none of."""


class _Commands(click.Group):
    def list_commands(self, _: click.Context) -> list[str]:
        return list(_MODULES)

    def get_command(self, _: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _MODULES:
            return None
        module = import_module(f"varstore.cli.{_MODULES[cmd_name]}")
        command: click.Command = getattr(module, cmd_name.replace("-", "_"))
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            if near := nearest(args[0], _MODULES, 1):
                raise click.UsageError(f"{error.message} Did you mean {near[0]!r}?", ctx) from None
            raise

    def invoke(self, ctx: click.Context) -> Any:
        _never_fail_to_encode()
        gc.set_threshold(_OBJECTS)
        if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
            ctx.color = False
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
        except vs.VarstoreError as error:
            complain(error_text(error))
            ctx.exit(FAILED)
        except KeyboardInterrupt:
            ctx.exit(_INTERRUPTED)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python's last flush would fail
            ctx.exit(_PIPE_CLOSED)
        except OSError as error:
            complain(f"{error.filename}: {error.strerror}" if error.filename else str(error))
            ctx.exit(FAILED)
        return result


@click.group(
    cls=_Commands,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit status: 0 if all is well; 1 if a command that checks, compares or salvages found something; 2 for "
    "wrong usage; 3 if the operation failed, with the reason on stderr; 130 if interrupted.",
)
@click.version_option(vs.__version__, "-V", "--version", prog_name="varstore")
def main() -> None:
    """Inspect, check, compare and convert checkpoints: directories with one folder per variable.

    A variable's folder holds its values as raw bytes in the file "out", and its shape and type in the file "meta". You
    can use ls, cat, cp and rm on them too. After a change by hand, run `varstore seal` to record it.

    \b
    Examples:
      varstore ls lenet              list the variables
      varstore show lenet conv1      one variable: where it lies, statistics, values
      varstore verify lenet          compare every byte with what was saved
      varstore diff lenet lenet_2    list the variables that differ
      varstore convert m.pt lenet    convert another system's file to a checkpoint

    `varstore completion bash` prints a script with which the tab key completes commands and names of variables.
    """


def _never_fail_to_encode() -> None:
    """Print an escape in place of a character that the terminal's encoding does not have."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="backslashreplace")
