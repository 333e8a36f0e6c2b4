"""The figures that README quotes from the records of the bench and of the campaign, each between two comments."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

__all__ = ["README", "quote", "quoted"]

README: Final = Path(__file__).resolve().parents[1] / "README.md"


def quoted(name: str, text: str) -> str:
    """Return what a text quotes under a name.

    Raises:
        ValueError: the comments are missing.
    """
    begin, end = _comments(name)
    found = re.search(f"{begin}(.*?){end}", text, re.DOTALL)
    if found is None:
        raise ValueError(f"{README} does not have {begin.strip()} and {end.strip()}")
    return found[1]


def quote(name: str, figures: str, path: Path = README) -> None:
    """Replace what README quotes under a name; raises what `quoted` does."""
    begin, end = _comments(name)
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace(f"{begin}{quoted(name, text)}{end}", f"{begin}{figures}{end}"), encoding="utf-8")


def _comments(name: str) -> tuple[str, str]:
    return f"<!-- {name}:begin -->\n", f"<!-- {name}:end -->\n"
