"""``varstore view``: the page of a report, live, in a browser on this machine."""

from __future__ import annotations

import contextlib
import signal
import sys
import webbrowser
from pathlib import Path

import click

from varstore.text.escape import one_line
from varstore.view.server import Viewer

__all__ = ["view"]


@click.command(short_help="Look at a checkpoint in a browser, live.")
@click.argument("path", type=click.Path())
@click.option("--compare", metavar="OTHER", type=click.Path(), help="Show OTHER, an earlier one, beside it.")
@click.option("--no-browser", is_flag=True, help="Only print the file to open.")
def view(path: str, compare: str | None, no_browser: bool) -> None:
    """Show PATH in the browser until Ctrl-C: what `varstore report` shows, and slices of every variable as numbers.

    Values are read when a variable is opened, so that it begins at once however large PATH is. Nothing is written but
    a file in the folder for temporary files, which opens the page and is removed at the end.

    Only the user who opens that file gets in: the server listens on this machine alone, and wants a secret that the
    file has. It shows PATH, and OTHER, and nothing else.

    \b
    Examples:
      varstore view lenet
      varstore view finetuned --compare base
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with contextlib.suppress(KeyboardInterrupt), Viewer(path, compare) as viewer, viewer.door() as door:
        click.echo(f"{one_line(path)}: open {Path(door).as_uri()} in a browser on this machine; Ctrl-C ends the viewer")
        if not no_browser:
            webbrowser.open(Path(door).as_uri())
        viewer.serve_forever()
