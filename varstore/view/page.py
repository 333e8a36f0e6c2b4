"""The page as one document: HTML, style, script and data, which need nothing from elsewhere.

Whatever the data say, a browser runs no script of theirs and asks nobody for anything. They stand in one block of JSON,
in which no character can end it. The script puts them on the page as text. And the page's own policy lets the browser
run and apply only what has the hash of the script and the style, and load nothing but images that are data.
"""

from __future__ import annotations

import base64
import hashlib
import json
from functools import cache
from importlib.resources import files
from string import Template
from typing import Any

__all__ = ["document", "policy"]

_SCRIPTS = ("words.js", "pictures.js", "tree.js", "detail.js", "page.js")
"""Each uses only what stands in those before it."""
_ESCAPES = {ord(sign): f"\\u{ord(sign):04x}" for sign in "<>&\u2028\u2029"}


def document(data: dict[str, Any], *, live: bool = False) -> str:
    """Return the page that shows these data; `live` is that of a viewer."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False).translate(_ESCAPES)
    return Template(_file("page.html")).substitute(
        policy=policy(live=live), style=_style(), script=_script(live), data=text
    )


@cache
def policy(*, live: bool) -> str:
    """Return the Content-Security-Policy of the page; that of a viewer may ask its own server."""
    own_server = "connect-src 'self'; " if live else ""
    return (
        f"default-src 'none'; script-src {_hash(_script(live))}; style-src {_hash(_style())}; img-src data:; "
        f"{own_server}base-uri 'none'; form-action 'none'"
    )


@cache
def _script(live: bool) -> str:
    inside = "\n".join(_file(name) for name in (*(("live.js",) if live else ()), *_SCRIPTS))
    return f'"use strict";\n{{\n{inside}}}\n'


def _style() -> str:
    return _file("page.css")


@cache
def _file(name: str) -> str:
    return files("varstore.view").joinpath("page", name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode('ascii')}'"
