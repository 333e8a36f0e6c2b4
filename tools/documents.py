"""Read the pages "Coming from …": one per system, a row for each thing that the system's document teaches.

The pages are ``tests/documents/*.md``. They are the table that the tests run and the guide that ``tools/docs.py``
renders, so that each snippet exists once. A row is a heading ``### what the document teaches``, a verdict and its
reason, and fences:

=========  ==================================================  ===================  ========
fence      what it holds                                       runs in              shown
=========  ==================================================  ===================  ========
before     what the snippets start from                        the framework        in the head of a page
document   what the document shows                             the framework        left
varstore   how it is done with varstore                        varstore             right
both       what the document shows, as varstore also runs it   varstore             whole width
check      what must be so afterwards                          varstore             no
seen       what the framework must then see                    the framework        no
=========  ==================================================  ===================  ========

Fences run in their order, after those of the page's head. A framework that runs on a Python of varstore shares
one process and its names with varstore; the others share the directory. A row that another test shows names it instead.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

__all__ = ["FOLDER", "KINDS", "OURS", "VERDICTS", "Page", "Part", "Row", "page_names", "read_page"]

FOLDER = Path(__file__).resolve().parent.parent / "tests" / "documents"
KINDS = ("before", "document", "varstore", "both", "check", "seen")
OURS = ("varstore", "both", "check")
"""The kinds that varstore's process runs; the framework runs the others."""
VERDICTS = ("Yes", "Partly", "No")

_FENCE = re.compile(r"^```python (\w+)\n(.*?)^```\n", re.MULTILINE | re.DOTALL)
_ROW = re.compile(r"^### (.+)\n", re.MULTILINE)
_SECTION = re.compile(r"^## (.+)\n", re.MULTILINE)
_VERDICT = re.compile(r"\*\*(\w+)\.\*\*")
_TEST = re.compile(r"`(tests/\S+\.py)::(\w+)`")


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """A fence: its kind, its code, and the line of the page where the code begins."""

    kind: str
    code: str
    line: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """What a document teaches: title, verdict, text without fences, fences, and tests named as (file, function)."""

    title: str
    verdict: str
    text: str
    parts: tuple[Part, ...]
    tests: tuple[tuple[str, str], ...]
    section: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Page:
    """The page of one system: its title and introduction, the fences that run before each row, and the rows."""

    path: Path
    title: str
    text: str
    parts: tuple[Part, ...]
    rows: tuple[Row, ...]

    @property
    def summary(self) -> str:
        """Say how many rows there are of each verdict."""
        counts = ((verdict.lower(), sum(row.verdict == verdict for row in self.rows)) for verdict in VERDICTS)
        return f"{len(self.rows)} rows: " + ", ".join(f"{count} {verdict}" for verdict, count in counts if count)

    def as_markdown(self) -> str:
        """Return the page for readers, in Markdown: the document's snippets left, varstore's right, no checks."""
        blocks = [f"# {self.title}", self.text, *(_fenced(part) for part in self.parts), f"{self.summary}."]
        section = None
        for row in self.rows:
            if row.section != section:
                section = row.section
                blocks.append(f"## {section}")
            blocks += [f"### {row.title}", row.text, *_shown(row.parts)]
        return "\n\n".join(blocks) + "\n"


def page_names() -> list[str]:
    """Return the names of the systems that have a page."""
    return sorted(path.stem for path in FOLDER.glob("*.md"))


@cache
def read_page(name: str) -> Page:
    """Read the page of a system, such as ``oneflow``."""
    path = FOLDER / f"{name}.md"
    text = path.read_text(encoding="utf-8")
    title, _, _ = text.removeprefix("# ").partition("\n")
    starts = [*_ROW.finditer(text)]
    sections = [*_SECTION.finditer(text)]
    head = min([match.start() for match in (*starts, *sections)], default=len(text))
    ends = [*(match.start() for match in starts[1:]), len(text)]
    rows = []
    for match, end in zip(starts, ends, strict=True):
        own = [other[1] for other in sections if other.start() < match.start()]
        below = [other.start() for other in sections if match.start() < other.start() < end]
        rows.append(_row(match[1], text, match.end(), min([*below, end]), own[-1] if own else None))
    introduction = text[text.index("\n") + 1 : head]
    parts = _parts(text, 0, head)
    return Page(path=path, title=title, text=_FENCE.sub("", introduction).strip(), parts=parts, rows=tuple(rows))


def _row(title: str, text: str, start: int, end: int, section: str | None) -> Row:
    prose = re.sub(r"\n{3,}", "\n\n", _FENCE.sub("", text[start:end])).strip()
    verdict = _VERDICT.match(prose)
    return Row(
        title=title,
        verdict=verdict[1] if verdict else "",
        text=prose,
        parts=_parts(text, start, end),
        tests=tuple((match[1], match[2]) for match in _TEST.finditer(prose)),
        section=section,
    )


def _parts(text: str, start: int, end: int) -> tuple[Part, ...]:
    found = _FENCE.finditer(text, start, end)
    return tuple(Part(kind=match[1], code=match[2], line=text.count("\n", 0, match.start(2)) + 1) for match in found)


def _shown(parts: tuple[Part, ...]) -> list[str]:
    """Return the blocks of a row: snippets that belong together side by side, in the order of the page."""
    blocks: list[str] = []
    columns: dict[str, list[str]] = {"document": [], "varstore": []}
    for part in (*parts, None):
        kind = part.kind if part else "both"
        if (kind == "both" or (kind == "document" and columns["varstore"])) and any(columns.values()):
            blocks.append(_side_by_side(columns))
            columns = {"document": [], "varstore": []}
        if part and kind == "both":
            blocks.append(_fenced(part))
        elif part and kind in columns:
            columns[kind].append(_fenced(part))
    return blocks


def _side_by_side(columns: dict[str, list[str]]) -> str:
    cells = ["\n\n".join(fences) for fences in columns.values()]
    inner = "\n\n".join(f'<div class="side" markdown="1">\n\n{cell}\n\n</div>' for cell in cells)
    return f'<div class="sides" markdown="1">\n\n{inner}\n\n</div>'


def _fenced(part: Part) -> str:
    return f"```python\n{part.code}```"
