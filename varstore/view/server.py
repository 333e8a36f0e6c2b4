"""The viewer: the report's page, live, for one person on this machine.

Whoever can reach the port is not trusted: other users of the machine, and every page that the browser has open. So the
server answers

- at 127.0.0.1 only, on a port that the kernel chooses, and only to requests for exactly this host and port, which a
  name that an attacker's server resolves to 127.0.0.1 is not;
- only with the token of 128 bits, which is compared in constant time. It comes once in the body of a form that a file
  of mode 0600 posts, so that it is in no address and no argument; from then on it is a cookie that scripts cannot read
  and other sites cannot use. Cookies do not know ports: the cookie's path, which has a random part, keeps it from other
  servers on this machine;
- to GET only, besides that form; to four requests at a time, each of which is cut off after ten seconds;
- from what was opened when it started: variables have numbers, and no part of a request becomes a path.

Of `http.server`, only the parsing of requests is used. The rest is these limits, which a web library leaves to the
server in front of it.
"""

from __future__ import annotations

import contextlib
import hmac
import html
import json
import os
import re
import secrets
import shutil
import socket
import tempfile
import threading
from collections.abc import Iterator, Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs

import varstore as vs
from varstore.view.comparison import unlike
from varstore.view.looks import Looks
from varstore.view.page import document, policy
from varstore.view.survey import described

__all__ = ["Viewer"]

_AT_A_TIME = 4
_SECONDS = 10.0
"""How long a request may take from its first byte to the last of the answer."""
_WAITING = 5.0
"""Seconds after which an answer says how much is done; the page asks again."""
_FORM = 200
"""Bytes of the form that brings the token."""
_ROUTE = re.compile(r"/(?:(?P<what>variable|values)/(?P<number>0|[1-9][0-9]{0,8})(?:\?at=(?P<at>[^&#]{0,500}))?)?")
_NOTHING = "default-src 'none'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "X-Frame-Options": "DENY",
    "Connection": "close",
}


class Viewer(ThreadingHTTPServer):
    """A server of the page of what `varstore.read` opens, which ends with the ``with`` block."""

    daemon_threads = True
    block_on_close = False
    allow_reuse_address = False
    request_queue_size = 16

    def __init__(self, path: str, compare_with: str | None = None) -> None:
        opened = vs.read(path)
        before = None if compare_with is None else vs.read(compare_with)
        data = described(path, opened) | {"live": True}
        if before is not None:
            data["comparison"] = unlike(opened, before, data["title"], str(compare_with))
        self.page = document(data, live=True).encode()
        self.looks = Looks(opened, before)
        self.token = secrets.token_urlsafe(16)
        self.prefix = f"/{secrets.token_hex(8)}"
        self._slots = threading.BoundedSemaphore(_AT_A_TIME)
        super().__init__(("127.0.0.1", 0), _Handler)
        self.port = self.server_address[1]
        self.hosts = (f"127.0.0.1:{self.port}", f"localhost:{self.port}")

    def server_bind(self) -> None:
        """Bind without asking a name server for this machine's name."""
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = self.server_address[:2]  # type: ignore[assignment]

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answer in a thread of its own when one of the four is free."""
        if self._slots.acquire(timeout=_SECONDS):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Answer, and let the next one in."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._slots.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: the connection ended."""

    def server_close(self) -> None:
        """Stop what is computed, and listen no more."""
        self.looks.end()
        super().server_close()

    @contextlib.contextmanager
    def door(self) -> Iterator[str]:
        """Write the file that lets its owner in, and remove it in the end."""
        folder = tempfile.mkdtemp(prefix="varstore-view-")
        try:
            path = os.path.join(folder, "open.html")
            with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
                file.write(_DOOR.format(address=f"http://{self.hosts[0]}{self.prefix}/", token=html.escape(self.token)))
            yield path
        finally:
            shutil.rmtree(folder, ignore_errors=True)


_DOOR = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>varstore</title>
<form method="post" action="{address}"><input type="hidden" name="token" value="{token}">
<button>Open the viewer</button></form>
<script>document.forms[0].submit()</script>
"""
_IN = b'<!doctype html><meta charset="utf-8"><title>varstore</title><meta http-equiv="refresh" content="0;url=./">\n'


class _Handler(BaseHTTPRequestHandler):
    server: Viewer
    timeout = _SECONDS
    server_version = "varstore"
    sys_version = ""

    def setup(self) -> None:
        super().setup()
        self._alarm = threading.Timer(_SECONDS, self._cut_off)
        self._alarm.daemon = True
        self._alarm.start()

    def finish(self) -> None:
        self._alarm.cancel()
        super().finish()

    def _cut_off(self) -> None:
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def do_GET(self) -> None:
        """Answer with the page, what is known of a variable, or values of it."""
        if not self._is_for_us():
            self._refuse(HTTPStatus.MISDIRECTED_REQUEST)
        elif self._is_from_elsewhere() or not self._has_token():
            self._refuse(HTTPStatus.FORBIDDEN)
        else:
            self._answer_route()

    def do_POST(self) -> None:
        """Take the form that brings the token, and nothing else."""
        length = self.headers.get("Content-Length", "")
        if not self._is_for_us():
            self._refuse(HTTPStatus.MISDIRECTED_REQUEST)
        elif self.path != f"{self.server.prefix}/":
            self._refuse(HTTPStatus.METHOD_NOT_ALLOWED)
        elif not re.fullmatch("[0-9]{1,3}", length) or int(length) > _FORM:
            self._refuse(HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
        else:
            form = parse_qs(self.rfile.read(int(length)).decode("latin-1"), max_num_fields=1)
            if self._is_token("".join(form.get("token", []))):
                cookie = f"varstore={self.server.token}; Path={self.server.prefix}; HttpOnly; SameSite=Strict"
                self._send(HTTPStatus.OK, "text/html", _IN, {"Set-Cookie": cookie})
            else:
                self._refuse(HTTPStatus.FORBIDDEN)

    def _not_allowed(self) -> None:
        self._refuse(HTTPStatus.METHOD_NOT_ALLOWED)

    do_HEAD = do_PUT = do_DELETE = do_OPTIONS = do_PATCH = do_TRACE = do_CONNECT = _not_allowed  # noqa: N815

    def _is_for_us(self) -> bool:
        hosts = self.headers.get_all("Host", [])
        return len(hosts) == 1 and hosts[0] in self.server.hosts

    def _is_from_elsewhere(self) -> bool:
        """Tell whether a page of another origin asks."""
        own = f"http://{self.headers['Host']}"
        if any(origin != own for origin in self.headers.get_all("Origin", [])):
            return True
        return any(site not in ("same-origin", "none") for site in self.headers.get_all("Sec-Fetch-Site", []))

    def _has_token(self) -> bool:
        cookies = [part.strip() for line in self.headers.get_all("Cookie", []) for part in line.split(";")]
        return any(self._is_token(part.removeprefix("varstore=")) for part in cookies if part.startswith("varstore="))

    def _is_token(self, given: str) -> bool:
        return hmac.compare_digest(given.encode("utf-8", "replace"), self.server.token.encode())

    def _answer_route(self) -> None:
        route = _ROUTE.fullmatch(self.path.removeprefix(self.server.prefix))
        if route is None or not self.path.startswith(self.server.prefix):
            self._refuse(HTTPStatus.NOT_FOUND)
        elif route["what"] is None:
            allowed = {"Content-Security-Policy": f"{policy(live=True)}; frame-ancestors 'none'"}
            self._send(HTTPStatus.OK, "text/html", self.server.page, allowed)
        elif int(route["number"]) >= len(self.server.looks.names):
            self._refuse(HTTPStatus.NOT_FOUND)
        elif route["what"] == "variable":
            self._send_json(self.server.looks.ask(int(route["number"]), _WAITING))
        else:
            at = parse_qs(f"at={route['at'] or ''}").get("at", [""])[0]
            self._send_json(self.server.looks.values(int(route["number"]), at))

    def _send_json(self, answer: Mapping[str, Any], status: HTTPStatus = HTTPStatus.OK) -> None:
        self._send(status, "application/json", json.dumps(answer, allow_nan=False).encode())

    def _refuse(self, status: HTTPStatus) -> None:
        self._send_json({"failed": status.phrase}, status)

    def _send(self, status: HTTPStatus, kind: str, body: bytes, more: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        for name, value in ({"Content-Security-Policy": _NOTHING} | _HEADERS | dict(more or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:  # noqa: ARG002
        """Refuse what cannot be parsed, in the words of all refusals."""
        self._refuse(HTTPStatus(code))

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""
