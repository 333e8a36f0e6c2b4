"""Values that a message shows: on one line, without control characters, and cut where they are long.

Names, attributes and paths can come from a stranger's file. A newline in one of them would forge a row of a report, an
escape sequence would change what the terminal shows, and a name of a megabyte would hide everything else.
"""

from __future__ import annotations

__all__ = ["LIMIT", "PROBLEM_LIMIT", "one_line"]

LIMIT = 200
"""Characters of a value that are shown."""
PROBLEM_LIMIT = 4000
"""Characters of a problem that are shown: it may name several values."""


def one_line(value: object, limit: int = LIMIT) -> str:
    """Return a value's text with escapes for what is not printable; a long text keeps its beginning and its end."""
    text = str(value)
    if len(text) <= limit and text.isprintable():
        return text
    if len(text) > 2 * limit:
        text = text[:limit] + text[-limit:]  # more than is shown, so the middle is cut out below
    if not text.isprintable():
        text = "".join([sign if sign.isprintable() else _escaped(sign) for sign in text])
    if len(text) <= limit:
        return text
    end = (limit - 1) // 2
    return f"{text[: limit - 1 - end]}…{text[-end:]}"


def _escaped(sign: str) -> str:
    return sign.encode("unicode_escape").decode("ascii")
