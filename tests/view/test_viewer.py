"""The viewer: who gets in, what can be asked for, what an answer may cost, and what a person sees of it."""

from __future__ import annotations

import base64
import contextlib
import http.client
import http.server
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

import numpy as np
import pytest
from support import ROOT
from support.attacks import ATTACKS

import varstore as vs
from tools.browser import CHROMIUM, Navigated, browser as running
from varstore.errors import UsageError
from varstore.view import looks, server
from varstore.view.looks import part
from varstore.view.server import Viewer

AXE = Path(os.environ.get("VARSTORE_ENVS", ROOT / ".envs"), "axe-core/node_modules/axe-core/axe.min.js")
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium")
VALUES = {
    "block/w": np.arange(48, dtype=np.float32).reshape(6, 8),
    "block/b": np.array([1, np.nan, np.inf]),
    "big": np.zeros((300, 300), np.int8),
    "scalar": np.array(7),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("secret_place")


@pytest.fixture(scope="module")
def paths(folder):
    first = vs.save(folder / "first", VALUES | {"gone": np.ones(2)}).path
    later = VALUES | {"block/w": VALUES["block/w"] + 1, "damaged": np.ones(4000)}
    return first, vs.save(folder / "later", later, attributes={"epoch": 3}).path


def serving(viewer):
    threading.Thread(target=viewer.serve_forever, args=(0.05,), daemon=True).start()


@pytest.fixture(scope="module")
def viewer(paths):
    with Viewer(paths[1], paths[0]) as found:
        Path(paths[1], "damaged", "out").write_bytes(b"short")
        serving(found)
        yield found
        found.shutdown()


def ask(viewer, path, method="GET", body=None, *, without=(), **headers):
    """Ask as the page does, except for what is given."""
    own = {"Host": viewer.hosts[0], "Cookie": f"varstore={viewer.token}"}
    wanted = {name: value for name, value in own.items() if name not in without}
    wanted |= {name.replace("_", "-"): value for name, value in headers.items()}
    connection = http.client.HTTPConnection("127.0.0.1", viewer.port, timeout=30)
    try:
        connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
        for name, value in wanted.items():
            for one in value if isinstance(value, tuple) else (value,):
                connection.putheader(name, one)
        if body is not None:
            connection.putheader("Content-Length", str(len(body)))
        connection.endheaders(body)
        answer = connection.getresponse()
        return answer, answer.read().decode()
    finally:
        connection.close()


def check_refusal(viewer, answer, text, *statuses):
    assert answer.status in statuses
    assert json.loads(text) == {"failed": http.HTTPStatus(answer.status).phrase}
    check_headers(viewer, answer, text)
    assert answer.headers["Set-Cookie"] is None


def check_headers(viewer, answer, text):
    """Check what holds for every answer."""
    said = f"{answer.headers}{text}"
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert answer.headers["Referrer-Policy"] == "no-referrer"
    assert answer.headers["Cache-Control"] == "no-store"
    assert answer.headers["Cross-Origin-Resource-Policy"] == "same-origin"
    policy = answer.headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; ")
    assert "frame-ancestors 'none'" in policy
    assert not {"unsafe-inline", "unsafe-eval", "*"} & set(re.split("[ ';]+", policy))
    assert viewer.token not in said.replace(str(answer.headers["Set-Cookie"]), "")
    assert "Traceback" not in said
    assert "Python" not in said
    assert answer.headers["Access-Control-Allow-Origin"] is None


def test_the_owner_gets_in(viewer):
    answer, text = ask(viewer, f"{viewer.prefix}/")
    check_headers(viewer, answer, text)
    assert answer.status == 200
    assert text.startswith("<!doctype html>")
    for headers in ({"Host": viewer.hosts[1]}, {"Origin": f"http://{viewer.hosts[0]}"}, {"Sec_Fetch_Site": "none"}):
        assert ask(viewer, f"{viewer.prefix}/variable/0", **headers)[0].status == 200


@pytest.mark.parametrize("route", ["/", "/variable/0", "/values/0?at=0", "/page.js", "/favicon.ico", "/nothing"])
@pytest.mark.parametrize(
    "cookie", [None, "", "varstore=", "varstore=x", "varstore={}x", "other={}", "{}", "varstore=\xe9"]
)
def test_nothing_is_told_without_the_token(viewer, route, cookie):
    given = {} if cookie is None else {"Cookie": cookie.format(viewer.token)}
    check_refusal(viewer, *ask(viewer, viewer.prefix + route, without=("Cookie",), **given), 403)


@pytest.mark.parametrize(
    "host",
    [
        *(
            "127.0.0.1",
            "localhost",
            "127.0.0.1:1",
            "localhost:80",
            "evil.example",
            "evil.example:{port}",
            "[::1]:{port}",
        ),
        *("127.0.0.1.evil.example:{port}", "127.0.0.1:{port}.", "LOCALHOST:{port}", "user@127.0.0.1:{port}", ""),
        *("127.0.0.2:{port}", "0.0.0.0:{port}", "127.1:{port}", ("127.0.0.1:{port}", "127.0.0.1:{port}"), None),
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_another_host_is_refused(viewer, host, method):
    """A name of an attacker can be made to mean 127.0.0.1 (DNS rebinding); then the browser says that name."""
    body = f"token={viewer.token}".encode() if method == "POST" else None
    hosts = (
        ()
        if host is None
        else tuple(one.format(port=viewer.port) for one in ([host] if isinstance(host, str) else host))
    )
    given = {"Host": hosts} if hosts else {}
    answer, text = ask(viewer, f"{viewer.prefix}/", method, body, without=("Host",), **given)
    check_refusal(viewer, answer, text, 421, 400)


@pytest.mark.parametrize(
    "headers",
    [
        *(
            {"Origin": origin}
            for origin in ("null", "https://evil.example", "http://127.0.0.1:1", "http://localhost", "")
        ),
        *({"Sec_Fetch_Site": site} for site in ("cross-site", "same-site", "x")),
        {"Origin": ("http://{host}", "https://evil.example")},
    ],
)
def test_pages_of_others_are_refused_even_with_the_cookie(viewer, headers):
    given = {
        name: tuple(one.format(host=viewer.hosts[0]) for one in value) if isinstance(value, tuple) else value
        for name, value in headers.items()
    }
    check_refusal(viewer, *ask(viewer, f"{viewer.prefix}/variable/0", **given), 403)


@pytest.mark.parametrize("method", ["HEAD", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE", "CONNECT", "POST"])
def test_only_get_is_answered(viewer, method):
    answer, text = ask(viewer, f"{viewer.prefix}/variable/0", method, b"")
    assert answer.status == 405
    assert (text == "") == (method == "HEAD")


@pytest.mark.parametrize(
    "path",
    [
        *("{p}/../../etc/passwd", "{p}/%2e%2e/%2e%2e/etc/passwd", "{p}/variable/../../../etc/passwd", "/etc/passwd"),
        *("{p}//etc/passwd", "{p}/variable//etc/passwd", "{p}/variable/%2fetc%2fpasswd", "file:///etc/passwd"),
        *("{p}/variable/-1", "{p}/variable/5000", "{p}/variable/00", "{p}/variable/1e1", "{p}/variable/99999999999999"),
        *(
            "{p}/variable/block/w",
            "{p}/variable/0/",
            "{p}/variable/",
            "{p}/variable",
            "{p}",
            "{p}/page.js",
            "{p}/?x",
            "/",
        ),
        *("{p}/variable/0?at=0&path=/etc/passwd", "{p}/variable/0#x", "{p}/variable/0\\..", "{p}x/", "{p}/\u0660"),
        "http://127.0.0.1/{p}/variable/0",
        "{p}/variable/%00",
    ],
)
def test_there_is_nothing_but_the_variables(viewer, path):
    answer, text = ask(viewer, quote(path.format(p=viewer.prefix), safe="%/?&=:#\\@"))
    check_refusal(viewer, answer, text, 404)
    assert "root:" not in text


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/", "token=", 403),
        ("/", "token=x", 403),
        ("/", "{token}", 403),
        ("/", "other={token}", 403),
        ("/", "token=x&token={token}", 403),
        ("/variable/0", "token={token}", 405),
        ("/", "token={token}" + "x" * 300, 413),
    ],
)
def test_a_form_without_the_token_is_refused(viewer, path, body, status):
    sent = body.format(token=viewer.token).encode()
    try:
        answer, text = ask(viewer, viewer.prefix + path, "POST", sent, without=("Cookie",))
    except http.client.RemoteDisconnected:  # the form has too many fields
        assert body.count("=") > 1
    else:
        check_refusal(viewer, answer, text, status)


def test_the_form_brings_a_cookie_that_scripts_and_other_sites_cannot_use(viewer):
    body = f"token={viewer.token}".encode()
    answer, text = ask(
        viewer, f"{viewer.prefix}/", "POST", body, without=("Cookie",), Origin="null", Sec_Fetch_Site="cross-site"
    )
    assert answer.status == 200
    check_headers(viewer, answer, text)
    said = answer.headers["Set-Cookie"].split("; ")
    assert said == [f"varstore={viewer.token}", f"Path={viewer.prefix}", "HttpOnly", "SameSite=Strict"]
    assert len(base64.urlsafe_b64decode(f"{viewer.token}==")) == 16


@pytest.mark.parametrize(
    "junk",
    [
        b"\r\n\r\n",
        b"GET\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"\x16\x03\x01\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 200 + b"\r\n",
        b"G" * 70_000 + b"\r\n\r\n",
    ],
)
def test_what_is_not_a_request_is_refused_without_a_word_of_it(viewer, junk):
    with socket.create_connection(("127.0.0.1", viewer.port), 30) as connection:
        connection.sendall(junk)
        connection.shutdown(socket.SHUT_WR)
        said = b""
        with contextlib.suppress(ConnectionResetError):
            while got := connection.recv(65536):
                said += got
    assert b" 200 " not in said
    assert b"Traceback" not in said
    assert b"GGGG" not in said


def test_it_listens_on_this_machine_alone(viewer):
    assert viewer.server_address[0] == "127.0.0.1"
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", viewer.port), 5).close()


def test_an_answer_says_what_stats_and_diff_say(viewer, paths):
    names = list(viewer.looks.names)
    found = json.loads(ask(viewer, f"{viewer.prefix}/variable/{names.index('block/w')}")[1])
    assert (found["max"], found["zeros"], found["map"]["blocks"]) == (48.0, 0, [6, 8])
    moved = vs.diff(*({"w": vs.open(path)["block/w"]} for path in paths), values=True).moved["w"]
    assert found["moved"] == moved.relative
    assert sum(found["before"][2]) == 48
    found = json.loads(ask(viewer, f"{viewer.prefix}/variable/{names.index('block/b')}")[1])
    assert (found["nan"], found["inf"], found["marks"], found["moved"]) == (1, 1, ["nan", "inf"], 0)
    at = f"{viewer.prefix}/values/{names.index('block/w')}?at={quote('1:3, -1')}"
    found = json.loads(ask(viewer, at)[1])
    assert found == {"shape": [2], "values": [16.0, 24.0], "before": {"shape": [2], "values": [15.0, 23.0]}}
    found = json.loads(ask(viewer, f"{viewer.prefix}/values/{names.index('block/b')}")[1])
    assert found["values"] == [1.0, "nan", "inf"]


def test_an_error_tells_neither_a_path_nor_more_than_its_kind(viewer, folder):
    number = viewer.looks.names.index("damaged")
    for route in (f"variable/{number}", f"values/{number}?at=0:9"):
        answer, text = ask(viewer, f"{viewer.prefix}/{route}")
        check_headers(viewer, answer, text)
        assert json.loads(text) == {"failed": "The values cannot be read: SizeMismatch."}
        assert folder.name not in text


@pytest.mark.parametrize(
    ("at", "shape"),
    [
        ("", (5, 6, 7)),
        ("0", (6, 7)),
        ("0:3, :5", (3, 5, 7)),
        (":, -1", (5, 7)),
        ("-2:, 1, 3", (2,)),
        (" 1 : 9 ", (4, 6, 7)),
        ("4,5,6", ()),
    ],
)
def test_slices_are_those_of_numpy(at, shape):
    values = np.arange(210).reshape(5, 6, 7)
    found = part(values, at)
    assert tuple(found["shape"]) == shape
    assert found["values"] == eval(f"values[{at.strip() or '...'}]", {"values": values}).reshape(-1).tolist()


@pytest.mark.parametrize(
    "at", ["a", "0,0,0,0", "0:1:2", "...", "None", "[0]", "0,", "__import__('os')", "1" * 30, "True"]
)
def test_what_is_no_slice_is_refused(at):
    with pytest.raises(UsageError, match="not a slice"):
        part(np.zeros((5, 6, 7)), at)
    with pytest.raises(IndexError):
        part(np.zeros(3), "3")


def test_an_answer_has_a_bounded_number_of_values(viewer):
    class Huge:
        shape, dtype = (1 << 40, 1 << 20), np.dtype("f4")

        def __getitem__(self, index):
            raise AssertionError("read")

    for at in ("", "0:2", ":, 0", "0:256, 0:257"):
        with pytest.raises(UsageError, match="at most 65,536"):
            part(Huge(), at)
    assert len(part(np.zeros((300, 300)), "0:256, 0:256")["values"]) == 65_536
    found = json.loads(ask(viewer, f"{viewer.prefix}/values/{viewer.looks.names.index('big')}")[1])
    assert "at most 65,536" in found["failed"]


def test_a_hundred_gigabytes_open_at_once(tmp_path, monkeypatch):
    """A sparse file takes no disk; nothing but what is asked for is read."""
    rows, columns = 25_000_000, 1000
    header = json.dumps({"huge": {"dtype": "F32", "shape": [rows, columns], "data_offsets": [0, 4 * rows * columns]}})
    with open(tmp_path / "huge.safetensors", "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header.encode())
        try:
            file.truncate(8 + len(header) + 4 * rows * columns)
        except OSError as error:
            pytest.skip(f"no sparse file of 100 GB: {error}")
        file.seek(-4, os.SEEK_END)
        file.write(np.float32(7).tobytes())
    monkeypatch.setattr(server, "_WAITING", 0.3)
    began = time.monotonic()
    with Viewer(os.fspath(tmp_path / "huge.safetensors")) as viewer:
        serving(viewer)
        found = json.loads(ask(viewer, f"{viewer.prefix}/values/0?at={quote('-2:, -3:')}")[1])
        assert found == {"shape": [2, 3], "values": [0, 0, 0, 0, 0, 7]}
        assert time.monotonic() - began < 20
        shares = [json.loads(ask(viewer, f"{viewer.prefix}/variable/0")[1])["share"] for _ in range(3)]
        assert sorted(shares) == shares
        assert shares[-1] < 1
        viewer.shutdown()


def test_what_takes_long_is_told_and_what_nobody_waits_for_ends(monkeypatch):
    gate, ended = threading.Event(), []

    def stats(source, *, progress, **_):
        try:
            while not gate.wait(0.01):
                progress(1, 4)
        except BaseException as error:
            ended.append(type(error).__name__)
            raise
        return {}

    monkeypatch.setattr(looks.vs, "stats", stats)
    found = looks.Looks({str(number): np.zeros(1) for number in range(5)}, None)
    assert found.ask(0, 0.2) == {"share": 0.25}
    assert found.ask(1, 0.05) == {"share": 0.25}
    found.ask(2, 0.1)  # ends the look at 0
    deadline = time.monotonic() + 20
    while not ended and time.monotonic() < deadline:
        time.sleep(0.01)
    assert ended == ["_Ended"]
    found.end()
    while len(ended) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert ended == ["_Ended"] * 3
    gate.set()


def test_four_at_a_time_and_each_is_cut_off(paths, monkeypatch):
    monkeypatch.setattr(server, "_SECONDS", 1.0)
    with Viewer(paths[0]) as viewer:
        serving(viewer)
        idle = [socket.create_connection(("127.0.0.1", viewer.port), 30) for _ in range(4)]
        began = time.monotonic()
        for connection in idle[:2]:
            connection.sendall(b"GET / HT")
        deadline = began + 0.9
        while time.monotonic() < deadline:  # a drop now and then does not make it longer
            idle[0].sendall(b"T")
            time.sleep(0.2)
        answer, _ = ask(viewer, f"{viewer.prefix}/")
        assert answer.status == 200
        assert time.monotonic() - began > 0.9
        for connection in idle:
            assert connection.recv(65536) == b""
            connection.close()
        viewer.shutdown()


def test_nothing_is_written_and_the_secret_is_in_a_file_of_the_owner(paths, folder, tmp_path):
    def tree():
        return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.rglob("*")}

    before = tree()
    logged = tmp_path / "logged"
    log = tmp_path / "log.sh"
    log.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" >>{logged}\n')
    log.chmod(0o700)
    command = [sys.executable, "-m", "varstore", "view", paths[0]]
    environment = os.environ | {"BROWSER": f"{log} %s", "TMPDIR": str(tmp_path), "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    line = process.stdout.readline()
    door = Path(unquote(urlsplit(re.search(r"file://\S+", line)[0]).path))
    assert door.stat().st_mode & 0o777 == 0o600
    assert door.parent.stat().st_mode & 0o777 == 0o700
    (token,) = re.findall(r'value="([\w-]{22})"', door.read_text())
    deadline = time.monotonic() + 20
    while not (logged.exists() and logged.read_text().endswith("\n")) and time.monotonic() < deadline:
        time.sleep(0.02)
    arguments = Path(f"/proc/{process.pid}/cmdline").read_text() + logged.read_text()
    assert door.as_uri() in arguments
    assert token not in arguments + line
    process.send_signal(signal.SIGINT)
    out, complaints = process.communicate(timeout=30)
    assert (process.returncode, out, complaints) == (0, "", "")
    assert not door.parent.exists()
    assert tree() == before


@pytest.fixture(scope="module")
def browser():
    with running() as found:
        yield found


@needs_browser
def test_a_page_that_gives_way_to_another_is_waited_for(browser, monkeypatch):
    page = browser.page("about:blank")
    with pytest.raises(Navigated):
        page("new Promise(() => location.reload())")
    ask, answers = page.call, [Navigated]

    def asked(method, **parameters):
        if answers:
            raise answers.pop()
        return ask(method, **parameters)

    monkeypatch.setattr(page, "call", asked)
    page.wait("document.body")
    assert not answers


@needs_browser
def test_a_person_looks_at_two_checkpoints(browser, viewer):
    with viewer.door() as door:
        page = browser.page(f"file://{door}")
        page.wait("document.querySelector('#rows .line')")
        address = page("location.href")
        assert address == f"http://{viewer.hosts[0]}{viewer.prefix}/"
        assert page("document.cookie") == ""
        said = page("document.querySelector('#comparison').textContent")
        assert "4 variables in both" in said
        assert "Only in first: 1" in said
        page("document.querySelector('#tree').focus()")
        page.press("Home", "ArrowDown", "Enter")
        page.wait("document.querySelector('#detail .numbers')")
        assert page("document.querySelector('#detail h2').textContent") == "block/w"
        assert page("document.querySelectorAll('#detail .ghost').length") == 1
        page("document.querySelector('#slice').focus(); document.querySelector('#slice').value = '0, :3'")
        page.press("Enter")
        page.wait("document.querySelectorAll('#detail pre').length === 2")
        grids = page(
            "[...document.querySelectorAll('#detail pre')].map((found) => found.textContent.trim().split(/ +/))"
        )
        assert grids == [["1", "2", "3"], ["0", "1", "2"]]
        page("document.querySelector('#slice').value = '9'; document.querySelector('.slice button').click()")
        page.wait("document.querySelector('#detail .failed')")
        assert page("document.querySelector('#detail .failed').textContent") == "The slice is out of range."
        if AXE.exists():
            page(AXE.read_text() + "; 0")
            found = page("axe.run().then((found) => found.violations.map(({id, impact}) => [id, impact]))")
            assert [fault for fault in found if fault[1] in ("serious", "critical")] == []
        page.call("Page.reload")
        page.wait("document.querySelector('#rows .line') && !document.querySelector('#detail h2')")
        assert page.complaints() == []
        assert {urlsplit(url).netloc for url in page.requests() if url.startswith("http")} == {viewer.hosts[0]}
        assert not any(viewer.token in url for url in page.requests())


class _Evil(http.server.BaseHTTPRequestHandler):
    """Serves a page on another port of this machine, which a browser takes for the same site."""

    viewer: Viewer

    def do_GET(self):
        place = f"http://{self.viewer.hosts[0]}{self.viewer.prefix}/variable/0"
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        options = "{mode: 'no-cors', credentials: 'include'}"
        script = f"fetch('{place}', {options}).finally(() => document.title = 'done')"
        self.wfile.write(f'<img src="{place}"><script src="{place}"></script><script>{script}</script>'.encode())

    def log_message(self, *_):
        """Say nothing."""


@needs_browser
def test_a_page_of_another_port_learns_nothing(browser, viewer, monkeypatch):
    seen = []

    def send(self, status, *rest):
        seen.append((self.path, self.headers["Cookie"], int(status)))
        return sent(self, status, *rest)

    sent = server._Handler._send
    with viewer.door() as door:
        browser.page(f"file://{door}").wait("document.querySelector('#rows .line')")  # the browser has the cookie
    monkeypatch.setattr(server._Handler, "_send", send)
    _Evil.viewer = viewer
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Evil) as evil:
        threading.Thread(target=evil.serve_forever, args=(0.05,), daemon=True).start()
        browser.page(f"http://127.0.0.1:{evil.server_port}/").wait("document.title === 'done'")
        evil.shutdown()
    assert {status for _, _, status in seen} == {403}
    assert len(seen) == 3
    assert any(viewer.token in str(cookie) for _, cookie, _ in seen)  # because it is of the same site


@needs_browser
def test_names_of_strangers_stay_text_in_the_viewer(browser, tmp_path):
    vs.write(
        tmp_path / "x.safetensors", dict.fromkeys(ATTACKS, np.ones((2, 2))), metadata={text: text for text in ATTACKS}
    )
    with Viewer(os.fspath(tmp_path / "x.safetensors")) as viewer, viewer.door() as door:
        serving(viewer)
        page = browser.page(f"file://{door}")
        page.wait("document.querySelector('#rows .line')")
        page.click("#as-list")
        page("document.querySelector('#tree').focus()")
        for _ in range(5):
            page.press("ArrowDown", "Enter")
            page.wait("document.querySelector('#detail .numbers')")
        assert page.complaints() == []
        assert {urlsplit(url).netloc for url in page.requests() if url.startswith("http")} == {viewer.hosts[0]}
        viewer.shutdown()
