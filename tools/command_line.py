"""The page of the reference on the command line: each command's help, and examples that are run for their output."""

from __future__ import annotations

import contextlib
import os
import shlex
import tempfile
from collections.abc import Iterator
from pathlib import Path

import click
import numpy as np
from click.testing import CliRunner

import varstore as vs
from varstore.cli import main

__all__ = ["EXAMPLES", "page"]

_WIDTH = 100
_INTRODUCTION = """
`varstore` is a window on checkpoints: it opens whatever `varstore.read` opens, and reads values only where a command
has to. `varstore help` lists the commands, and `varstore help COMMAND` explains one.

- **Terminals and pipes.** A terminal gets trees, colours, and columns that are cut to its width; NO_COLOR and TERM=dumb
  turn colours off, and an encoding without the signs of trees gets those of ASCII. A pipe gets plain text. A reader
  that closes the pipe early, such as `head`, is not an error.
- **Programs.** `--json` prints one object, for `jq`. Numbers that JSON does not have, nan and infinities, are null or
  text.
- **Names.** Whatever a file holds, a name is one line of printable characters in the output, and is cut where it is
  long.
- **Patterns.** `*` matches any text, separators too; `?` matches one character; `[ab]` matches one of several. A
  pattern is compared with the whole name. Quote it, or the shell takes it for names of files.
- **Completion.** `eval "$(varstore completion bash)"` in ~/.bashrc makes the tab key complete commands, options, paths,
  and the names of variables that consist of letters, digits and `_./+-`; a shell would run what others can hold.
- **Progress.** What takes long shows a bar on stderr, if that is a terminal. Ctrl-C ends it, and leaves nothing half
  done.
"""
_STATUS = """
## Exit status

| status | meaning |
|---|---|
| 0 | all is well |
| 1 | something was found: nan, a difference, damage |
| 2 | wrong usage |
| 3 | the operation failed; a line on stderr says why |
| 130 | interrupted |
| 141 | the reader of the output closed the pipe |
"""
EXAMPLES = {
    "ls": ("ls --tree gpt.pt", "ls --depth 1 --sort size gpt.pt", "ls lenet 'conv*'", "ls run"),
    "show": ("show lenet 'fc/weight[0:2, :3]'", "show run"),
    "stats": ("stats run 'head*'",),
    "verify": ("verify lenet",),
    "diff": ("diff run/step-100 run/step-200",),
    "convert": ("convert lenet lenet.safetensors",),
}
"""Command lines whose output is on the page."""


def page() -> str:
    """Return the page as Markdown."""
    parts = ["The command line.", _INTRODUCTION]
    context = click.Context(main, info_name="varstore", terminal_width=_WIDTH, max_content_width=_WIDTH)
    with _checkpoints():
        for name in main.list_commands(context):
            command = main.get_command(context, name)
            assert command is not None
            inner = click.Context(
                command, info_name=name, parent=context, terminal_width=_WIDTH, max_content_width=_WIDTH
            )
            parts += [f"## {name}", _block(command.get_help(inner))]
            for line in EXAMPLES.get(name, ()):
                parts.append(_block(f"$ varstore {line}\n{_output(line)}"))
    return "\n\n".join([*parts, _STATUS])


def _output(line: str) -> str:
    result = CliRunner().invoke(main, shlex.split(line), prog_name="varstore")
    if result.exit_code > 1:
        raise RuntimeError(f"varstore {line}: {result.output}")
    return result.output


def _block(text: str) -> str:
    return f"```text\n{text.rstrip()}\n```"


@contextlib.contextmanager
def _checkpoints() -> Iterator[None]:
    """Make what the examples look at, in a folder that is the current one meanwhile."""
    random = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return random.normal(size=shape).astype(np.float32)

    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            vs.save(
                "lenet", {"conv1/weight": normal(6, 1, 5, 5), "conv1/bias": normal(6), "fc/weight": normal(10, 864)}
            )
            blocks = {
                f"h.{i}.{part}": normal(*shape)
                for i in range(12)
                for part, shape in (("attn.weight", (8, 24)), ("mlp.weight", (8, 32)), ("mlp.bias", (32,)))
            }
            vs.write("gpt.pt", {"wte.weight": normal(100, 8), **blocks, "ln.weight": np.ones(8, np.float16)})
            weights = {"backbone": normal(100, 100), "head": np.zeros((10, 3), np.float32)}
            with vs.CheckpointManager("run", clock=lambda: 1.7e9) as manager:
                for step, loss in ((100, 0.71), (200, 0.42), (300, 0.55)):
                    weights["head"] = normal(10, 3)
                    manager.save(step, weights, metrics={"loss": loss})
            yield
        finally:
            os.chdir(before)
