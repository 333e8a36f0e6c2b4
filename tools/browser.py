"""A headless Chromium, driven through a pipe by its own protocol (https://chromedevtools.github.io/devtools-protocol).

Debian's package is enough: no port is opened, and no driver is needed. Everything that a page says is noted: messages
of the console, errors, dialogs, and every request that it makes.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = ["CHROMIUM", "Browser", "Navigated", "Page", "browser"]

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
_FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-pipe"),
    *("--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-extensions"),
    *("--hide-scrollbars", "--force-device-scale-factor=1", "--mute-audio", "--disable-sync"),
)
_KEYS = {
    "Enter": (13, "\r"),
    "Escape": (27, ""),
    "Tab": (9, ""),
    "ArrowDown": (40, ""),
    "ArrowUp": (38, ""),
    "ArrowLeft": (37, ""),
    "ArrowRight": (39, ""),
    "Home": (36, ""),
    "End": (35, ""),
    "PageDown": (34, ""),
    "PageUp": (33, ""),
    " ": (32, " "),
}
PATIENCE = 60.0
"""Seconds that a busy machine may take for anything."""
_GONE = re.compile("navigated or closed|context was destroyed|Cannot find context")
"""What the browser says of a page that gave way to another one before it answered."""


class Navigated(AssertionError):
    """The page that was asked gave way to another one before it answered."""


@contextlib.contextmanager
def browser() -> Iterator[Browser]:
    """Run a browser of its own, with an empty profile."""
    assert CHROMIUM is not None
    to_read, to_write = os.pipe(), os.pipe()
    with tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True) as home:
        command = [CHROMIUM, *_FLAGS, f"--user-data-dir={home}", "about:blank"]
        wired = f'exec "$@" 3<&{to_read[0]} 4>&{to_write[1]}'
        process = subprocess.Popen(
            ["bash", "-c", wired, "bash", *command],
            pass_fds=(to_read[0], to_write[1]),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "HOME": home},
        )
        os.close(to_read[0])
        os.close(to_write[1])
        try:
            yield Browser(to_write[0], to_read[1])
        finally:
            os.close(to_read[1])  # it ends when nobody can tell it anything any more
            os.close(to_write[0])
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(5)
            process.kill()
            process.wait()


class Browser:
    """The pipe to a browser."""

    def __init__(self, source: int, target: int) -> None:
        self._source, self._target = source, target
        self._left = b""
        self._number = 0
        self.events: list[dict[str, Any]] = []

    def call(self, method: str, session: str | None = None, /, **parameters: Any) -> Any:
        """Call a method of the protocol and return its result."""
        self._number += 1
        number = self._number
        message = {"id": number, "method": method, "params": parameters} | ({"sessionId": session} if session else {})
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._target, data) :]
        while True:
            found = self._next(PATIENCE)
            if found.get("id") == number:
                if _GONE.search(found.get("error", {}).get("message", "")):
                    raise Navigated(method)
                assert "error" not in found, (method, found["error"])
                return found["result"]

    def _next(self, seconds: float) -> dict[str, Any]:
        """Return the next message; events are noted too."""
        end = time.monotonic() + seconds
        while b"\0" not in self._left:
            ready, _, _ = select.select([self._source], [], [], max(0.0, end - time.monotonic()))
            assert ready, "the browser does not answer"
            data = os.read(self._source, 1 << 20)
            assert data, "the browser ended"
            self._left += data
        text, _, self._left = self._left.partition(b"\0")
        message: dict[str, Any] = json.loads(text)
        if "method" in message:
            self.events.append(message)
            if message["method"] == "Page.javascriptDialogOpening":
                self._dismiss(message["sessionId"])
        return message

    def _dismiss(self, session: str) -> None:
        self._number += 1
        message = {"id": self._number, "method": "Page.handleJavaScriptDialog", "params": {"accept": False}}
        os.write(self._target, json.dumps(message | {"sessionId": session}).encode() + b"\0")

    def page(self, url: str, *, width: int = 1280, height: int = 900, dark: bool = False, touch: bool = False) -> Page:
        """Open a page in a tab of its own, and wait until it is loaded."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = Page(self, target, session)
        for domain in ("Page", "Runtime", "Log", "Network"):
            page.call(f"{domain}.enable")
        page.resize(width, height, touch=touch)
        page.prefer("dark" if dark else "light")
        page.go(url)
        return page


class Page:
    """A tab."""

    def __init__(self, owner: Browser, target: str, session: str) -> None:
        self._owner, self._target, self._session = owner, target, session

    def call(self, method: str, **parameters: Any) -> Any:
        """Call a method of the protocol for this tab."""
        return self._owner.call(method, self._session, **parameters)

    def events(self, *methods: str) -> list[dict[str, Any]]:
        """Return the parameters of the events of some kinds that came until now."""
        self("0")
        mine = [event for event in self._owner.events if event.get("sessionId") == self._session]
        return [event["params"] for event in mine if event["method"] in methods]

    def go(self, url: str) -> None:
        """Open an address and wait until it is loaded."""
        seen = len(self._owner.events)
        self.call("Page.navigate", url=url)
        while not any(event["method"] == "Page.loadEventFired" for event in self._owner.events[seen:]):
            self._owner._next(PATIENCE)

    def resize(self, width: int, height: int, *, touch: bool = False) -> None:
        """Change the size of the window."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=touch)

    def prefer(self, scheme: str) -> None:
        """Let the system prefer light or dark, and no motion."""
        features = [
            {"name": "prefers-color-scheme", "value": scheme},
            {"name": "prefers-reduced-motion", "value": "reduce"},
        ]
        self.call("Emulation.setEmulatedMedia", features=features)

    def __call__(self, expression: str) -> Any:
        """Return the value of an expression; a promise is waited for."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def wait(self, expression: str) -> None:
        """Wait until an expression is true; the page may be another one by then."""
        end = time.monotonic() + PATIENCE
        while not self._is_true(expression):
            assert time.monotonic() < end, f"it never became true: {expression}"
            time.sleep(0.02)

    def _is_true(self, expression: str) -> bool:
        try:
            return bool(self(f"Boolean({expression})"))
        except Navigated:
            return False

    def settle(self) -> None:
        """Wait until what was changed is drawn."""
        self("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")

    def press(self, *keys: str) -> None:
        """Press and release keys, as a person does."""
        for key in keys:
            code, text = _KEYS.get(key, (ord(key[0].upper()), key))
            about = {"key": key, "windowsVirtualKeyCode": code, "code": key}
            self.call("Input.dispatchKeyEvent", type="keyDown" if text else "rawKeyDown", text=text, **about)
            self.call("Input.dispatchKeyEvent", type="keyUp", **about)
        self.settle()

    def click(self, selector: str) -> None:
        """Click into the middle of the first element that a selector finds."""
        place = self(
            f"(() => {{ const found = document.querySelector({json.dumps(selector)}); found.scrollIntoView({{block: "
            "'nearest'}); const box = found.getBoundingClientRect(); return [box.x + box.width / 2, box.y + "
            "box.height / 2]; })()"
        )
        for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
            clicks = 0 if kind == "mouseMoved" else 1
            button = "none" if kind == "mouseMoved" else "left"
            self.call("Input.dispatchMouseEvent", type=kind, x=place[0], y=place[1], button=button, clickCount=clicks)
        self.settle()

    def screenshot(self, path: str | os.PathLike[str]) -> None:
        """Save what is seen as a PNG."""
        data = self.call("Page.captureScreenshot", format="png")["data"]
        Path(path).write_bytes(base64.b64decode(data))

    def complaints(self) -> list[str]:
        """Return what a page must not do: messages of the console, errors, dialogs."""
        said = [str(event["args"]) for event in self.events("Runtime.consoleAPICalled")]
        said += [str(event["exceptionDetails"]) for event in self.events("Runtime.exceptionThrown")]
        said += [event["entry"]["text"] for event in self.events("Log.entryAdded")]
        return said + [f"dialog: {event['message']}" for event in self.events("Page.javascriptDialogOpening")]

    def requests(self) -> list[str]:
        """Return the addresses that the page asked for, its own among them."""
        return [event["request"]["url"] for event in self.events("Network.requestWillBeSent")]

    def close(self) -> None:
        """Close the tab."""
        self._owner.call("Target.closeTarget", targetId=self._target)
