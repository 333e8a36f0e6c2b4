"""Take the pictures of the report, and of a terminal, that the documents show, in a headless Chromium.

    python -m tools.screenshots [FOLDER]      (default: tools/screenshots)

The checkpoints are made for it, with a fixed seed: a small transformer with a few faults, a later one, and a run.
"""

from __future__ import annotations

import contextlib
import io
import os
import pty
import subprocess
import sys
import tempfile
import termios
import threading
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.terminal_theme import SVG_EXPORT_THEME
from rich.text import Text

import varstore as vs
from tools.browser import Browser, Page, browser
from varstore.view.report import write_report
from varstore.view.server import Viewer

__all__ = ["main"]

_LAYERS, _WIDTH = 12, 192
_COLUMNS = 100
Model = dict[str, Any]


def _model() -> Model:
    rng = np.random.default_rng(0)
    model: Model = {}

    def put(name: str, values: Any) -> None:
        model[name] = values.astype(np.float32)

    put("embed/tokens", rng.normal(size=(4000, _WIDTH)) * 0.02 * np.linspace(1, 3, 4000)[:, None])
    put("embed/positions", np.sin(np.arange(256)[:, None] / 10000 ** (np.arange(_WIDTH) / _WIDTH)) * 0.1)
    for layer in range(_LAYERS):
        name = f"blocks/{layer}"
        put(f"{name}/attention/norm", 1 + 0.1 * rng.normal(size=_WIDTH))
        put(f"{name}/attention/qkv", rng.normal(size=(_WIDTH, 3 * _WIDTH)) * 0.02 * np.repeat([1, 1.6, 0.6], _WIDTH))
        put(f"{name}/attention/out", rng.standard_t(4, size=(_WIDTH, _WIDTH)) * 0.02)
        put(f"{name}/mlp/norm", np.ones(_WIDTH))
        put(f"{name}/mlp/up", rng.normal(size=(_WIDTH, 4 * _WIDTH)) * 0.02 * (1 + layer / 6))
        put(f"{name}/mlp/down", rng.laplace(size=(4 * _WIDTH, _WIDTH)) * 0.01)
        put(f"{name}/mlp/bias", np.zeros(_WIDTH))
    model["blocks/5/mlp/up"][:, 300:340] *= 6
    model["blocks/5/mlp/up"][60:72] = 0
    model["blocks/9/attention/out"][3, 7] = np.nan
    put("head/weight", rng.normal(size=(_WIDTH, 1000)) * 0.05)
    model["head/weight"] = model["head/weight"].astype(vs.bfloat16)
    model["head/tied"] = model["embed/tokens"]
    return model


def _later(model: Model) -> Model:
    rng = np.random.default_rng(1)
    later: Model = {}
    for name, values in model.items():
        layer = int(name.split("/")[1]) if name.startswith("blocks") else -1
        by = 0.3 * 0.6 ** (_LAYERS - 1 - layer) if layer > 2 and values.ndim > 1 else 0.0
        later[name] = values if not by else (values * (1 + by * rng.normal(size=values.shape))).astype(np.float32)
    del later["head/tied"]
    return later


def _run(folder: Path) -> None:
    rng = np.random.default_rng(2)
    backbone, head = rng.normal(size=(400, 400)).astype(np.float32), np.zeros((200, 200), np.float32)
    with vs.CheckpointManager(folder, durable=False) as manager:
        for step in range(0, 2000, 100):
            head = head + rng.normal(size=head.shape).astype(np.float32) * np.float32(0.05 * 0.999**step)
            loss = 3 * np.exp(-step / 500) + 0.4 + 0.06 * rng.random()
            metrics = {
                "loss": loss,
                "accuracy": 0.9 - 0.25 * loss + 0.02 * rng.random(),
                "rate": 1e-3 * (1 - step / 2000),
            }
            manager.save(step, {"backbone/w": backbone, "head/w": head, "head/moment": head / 2}, metrics=metrics)


def _chosen(page: Page, name: str) -> None:
    page.click("#search")
    page.press(*name, "Enter", "End", "Enter", "/", "Escape")
    page.settle()


def _terminal(made: Path) -> None:
    """Write what a terminal shows of two commands as a page."""
    shown = Console(record=True, width=_COLUMNS, file=io.StringIO(), force_terminal=True)
    for command in ("varstore ls --depth 1 model", "varstore diff --values model later"):
        shown.print(f"[bold]$[/] {command}", highlight=False)
        shown.print(Text.from_ansi(_printed(command, made)), end="\n\n", soft_wrap=True)
    page = shown.export_html(theme=SVG_EXPORT_THEME, inline_styles=True)
    style = (
        "<style>body { margin: 0; padding: 20px 24px } pre { font-size: 14px; line-height: 1.35; margin: 0 }</style>"
    )
    (made / "terminal.html").write_text(page.replace("</head>", f"{style}</head>"))


def _printed(command: str, folder: Path) -> str:
    """Return what a command prints on a terminal."""
    owner, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (60, _COLUMNS))
    arguments = [sys.executable, "-m", *command.split()]
    environment = {**os.environ, "TERM": "xterm-256color", "PYTHONPATH": os.getcwd()}
    with subprocess.Popen(arguments, cwd=folder, env=environment, stdout=terminal, stderr=terminal, stdin=terminal):
        os.close(terminal)
        printed = b""
        with contextlib.suppress(OSError):  # the other end was closed
            while part := os.read(owner, 1 << 16):
                printed += part
    os.close(owner)
    return printed.decode().replace("\r\n", "\n").rstrip()


def _take(chromium: Browser, made: Path, target: Path) -> None:
    model, later, run = (f"file://{made / name}.html" for name in ("model", "later", "run"))
    page = chromium.page(model, width=1280, height=1240)
    _chosen(page, "5/mlp/up")
    page.click("#heat-magnitudes")
    page("scrollTo(0, 0)")
    page.settle()
    page.screenshot(target / "report.png")
    page.prefer("dark")
    page.settle()
    page.screenshot(target / "report_dark.png")
    chromium.page(later, width=1280, height=860).screenshot(target / "comparison.png")
    chromium.page(run, width=1280, height=700).screenshot(target / "run.png")
    page = chromium.page(f"file://{made / 'terminal'}.html", width=880, height=560)
    page.screenshot(target / "terminal.png")
    page = chromium.page(model, width=390, height=844, touch=True)
    page.screenshot(target / "phone.png")
    _chosen(page, "5/mlp/up")
    page.screenshot(target / "phone_variable.png")
    with Viewer(os.fspath(made / "later"), os.fspath(made / "model")) as viewer, viewer.door() as door:
        threading.Thread(target=viewer.serve_forever, daemon=True).start()
        page = chromium.page(f"file://{door}", width=1280, height=860)
        page.wait("document.querySelector('#rows .line')")
        _chosen(page, "11/mlp/up")
        page.wait("document.querySelector('#detail .numbers')")
        page.click(".slice button")
        page.wait("document.querySelector('#detail pre')")
        page("document.querySelector('#detail').scrollTop = 800")
        page.settle()
        page.screenshot(target / "viewer.png")
        viewer.shutdown()


def main(target: Path) -> None:
    """Take all pictures into a folder."""
    target.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, browser() as chromium:
        made = Path(folder)
        model = _model()
        about = {"name": "small transformer", "layers": _LAYERS, "width": _WIDTH}
        vs.save(made / "model", model, attributes=about, durable=False)
        vs.save(made / "later", _later(model), attributes=about, base=made / "model", durable=False)
        _run(made / "run")
        _terminal(made)
        os.chdir(made)
        for name, other in (("model", None), ("later", "model"), ("run", None)):
            write_report(name, f"{name}.html", compare_with=other)
        _take(chromium, made, target)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).with_suffix("")).absolute())
