"""What strangers wrote stays on its line: in errors, in reports and on the command line."""

from __future__ import annotations

import copy
import json
import pickle
import re
import tempfile
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import example, given, settings, strategies as st
from support.crafted import checkpoint, entry

import varstore as vs
from varstore.cli import main
from varstore.errors import ManifestError, VarstoreError
from varstore.text.escape import LIMIT, one_line
from varstore.text.table import Table

TEXT = st.text(min_size=1, max_size=40) | st.builds("".join, st.tuples(st.text(max_size=9), st.just("x" * 300)))
NAME = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), min_size=1, max_size=60) | st.builds(
    lambda sign, count: (sign * count).encode()[:4096].decode(errors="ignore"),
    st.sampled_from("a\n\u2028é\x1b\u202e"),
    st.integers(1, 4096),
)
FORGED = "w\nrun: ok: 1 variable, 1 byte, every byte as it was saved"


@given(st.text(max_size=999) | st.integers() | st.lists(st.text()))
@example("\u202e" * 401)
@example("\ud800")
def test_a_value_is_one_printable_line_of_bounded_length(value):
    shown = one_line(value)
    assert shown.isprintable()
    assert len(shown) <= LIMIT
    assert shown == str(value) or not str(value).isprintable() or len(str(value)) > LIMIT


def test_what_is_cut_keeps_its_beginning_and_its_end():
    assert one_line("a" * 500 + "z", 11) == "aaaaa…aaaaz"
    assert one_line("a" * 11, 11) == "a" * 11


PARTS = st.fixed_dictionaries(
    {},
    optional={
        **dict.fromkeys(("path", "variable", "field", "hint"), TEXT),
        **dict.fromkeys(("found", "expected"), TEXT | st.lists(TEXT)),
        "rows": st.lists(TEXT, max_size=3),
    },
)


@given(problem=TEXT, parts=PARTS)
def test_an_error_has_one_line_for_its_sentences_and_one_per_row(problem, parts):
    error = VarstoreError(problem, **parts)
    rows = len(parts.get("rows", ()))
    lines = str(error).split("\n")
    assert len(lines) == 1 + rows + bool(rows and "hint" in parts)
    assert all(line.isprintable() for line in lines)
    assert all(len(line) <= 4000 for line in lines)
    assert [getattr(error, name) for name in parts if name != "rows"] == [
        parts[name] for name in parts if name != "rows"
    ]


@pytest.mark.parametrize("name", vs.errors.__all__)
def test_an_error_survives_pickle(name):
    kind = getattr(vs.errors, name)
    number = {"number": 5} if issubclass(kind, vs.errors.StorageError) else {}
    error = kind("problem", path="p", variable="v", found=3, hint="do this", **number)
    error.__cause__ = None
    for other in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(other) is kind
        assert str(other) == str(error) == "p: variable 'v': problem: found 3. Do this"
        assert vars(other) == vars(error)
        assert getattr(other, "errno", None) == getattr(error, "errno", None)


def is_bounded(text, lines=None):
    found = text.rstrip("\n").split("\n")
    assert all(line.isprintable() for line in found), text
    assert all(len(line) <= 10_000 for line in found)
    assert lines is None or len(found) == lines, text


@given(name=NAME, other=NAME)
@example(name=FORGED, other="b" * 4096)
def test_a_report_has_one_line_per_row(name, other):
    target = {name: np.zeros(1), "own": np.zeros(1)}
    source = {name: np.ones(1), **({} if other in target else {other: np.ones(1)})}
    report = vs.load_into(target, source)
    is_bounded(str(report), 2 + len(source) + len(report.hints))
    assert re.sub(r"<[^>]*>", "", report._repr_html_()).isprintable()
    if report.unexpected:
        with pytest.raises(vs.errors.VariableMismatch) as caught:
            report.raise_for("unexpected")
        is_bounded(str(caught.value), 3)
    rows = [(name, other)] * 3
    is_bounded(str(Table(title=name, rows=rows, notes=[other], form="{:<9} {}")), 5)


def cli(*arguments):
    result = CliRunner().invoke(main, [str(argument) for argument in arguments], prog_name="varstore")
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


@settings(max_examples=60, deadline=None)
@given(name=NAME, alias=NAME, text=st.text(st.characters(exclude_categories=("Cs",))), key=TEXT)
@example(name="-", alias="--help", text="", key="0")
@example(name=FORGED, alias="own", text="\x9b31m\u2028", key="\n")
@example(name="a" * 2000, alias="\n" * 400, text="x" * 10**4, key="k" * 300)
def test_every_verb_prints_one_line_per_row(name, alias, text, key):
    with tempfile.TemporaryDirectory() as folder:
        said = json.dumps({key: text}, ensure_ascii="\ud800" <= max(key) <= "\udfff")
        rows = [entry(name, folder="x", attributes=said)]
        if alias != name:
            rows.append(entry(alias, folder="y", alias_of=name))
        path = checkpoint(Path(folder, "c"), entries=rows, folders={"x": b"\1", "y": b"\2"})
        other = checkpoint(Path(folder, "d"), entries=rows[:1], folders={"x": b"\1"})
        lost = checkpoint(Path(folder, "lost"), entries=rows)
        is_bounded(cli("ls", path).output, len(rows) + 2)
        is_bounded(cli("ls", "--", path, name).output)
        assert cli("ls", "--json", path).output.replace("\n", "").isprintable()
        is_bounded(cli("ls", "--allow-incomplete", lost).output, 2 + len(rows))
        is_bounded(cli("show", "--", path, name).output)
        is_bounded(cli("show", "--", path, f"{name}?").output, 1)
        is_bounded(cli("diff", path, other).output, len(rows))
        is_bounded(cli("verify", path).output)
        is_bounded(cli("verify", lost).output, 1 + len(rows))
        is_bounded(cli("convert", path, Path(folder, "e.pt")).output)
        is_bounded(cli("convert", path, Path(folder, "f.npz")).output)
        is_bounded(cli("seal", path).output)
        is_bounded(cli("clean", folder).output)


@pytest.mark.parametrize("sign", ["n", "é", "\n"])
def test_a_manifest_with_a_name_that_cannot_be_saved_is_refused(tmp_path, sign):
    longest = (sign * 4096).encode()[:4096].decode()
    assert vs.open(checkpoint(tmp_path / "c", entries=[entry(longest, folder="x")])).names == (longest,)
    with pytest.raises(ManifestError, match="4,096"):
        vs.open(checkpoint(tmp_path / "d", entries=[entry("a"), entry(longest + "n", folder="x")]))
