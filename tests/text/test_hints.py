"""The words of errors and reports: how an error puts its parts together, counts with their nouns, lists cut short."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given, strategies as st

import varstore as vs
from varstore.errors import VarstoreError
from varstore.text.hints import listed, plural

pytestmark = pytest.mark.core

PART = st.text("aZ1 ,'", min_size=1, max_size=9).filter(str.strip)
END = st.sampled_from(["", ".", "?", "!", "'", ")"])


@given(problem=PART, found=st.none() | PART, hint=PART, end=END, hint_end=END)
def test_an_error_ends_each_sentence_once(problem, found, hint, end, hint_end):
    facts = {"problem": problem + end} if found is None else {"problem": problem, "found": found + end}
    text = str(VarstoreError(**facts, hint=hint + hint_end))
    assert not re.search(r"[.?!]\.", text)
    assert text.endswith(hint[0].upper() + hint[1:] + hint_end)
    assert re.search(r"[.?!] $", text.removesuffix(hint[0].upper() + hint[1:] + hint_end))


@pytest.mark.parametrize(
    ("hint", "text"),
    [
        ("varstore.load gives arrays", "varstore.load gives arrays"),
        ("format='npz' has it", "format='npz' has it"),
        ("retry.", "Retry."),
        ("pass the file: --model net.onnx", "Pass the file: --model net.onnx"),
    ],
)
def test_a_hint_begins_with_a_capital_letter_unless_it_begins_with_code(hint, text):
    assert str(VarstoreError("no", hint=hint)) == f"no. {text}"


@pytest.mark.parametrize(("count", "text"), [(0, "0 variables"), (1, "1 variable"), (12_000, "12,000 variables")])
def test_a_count_agrees_with_its_noun(count, text):
    assert plural(count, "variable") == text


@given(count=st.integers(0, 10**12))
def test_only_one_is_singular(count):
    number, noun = plural(count, "byte").split()
    assert (int(number.replace(",", "")), noun == "byte") == (count, count == 1)


@pytest.mark.parametrize(
    ("items", "text"), [([], ""), (["a"], "a"), (["a", "b", "c"], "a, b, c"), (list("abcde"), "a, b, c, and 2 more")]
)
def test_a_long_list_says_how_much_it_leaves_out(items, text):
    assert listed(items) == text


def test_what_counts_one_thing_says_so(tmp_path):
    one = vs.save(tmp_path / "one", {"v": np.zeros(1, np.int8)})
    assert repr(one) == f"<Checkpoint {one.path!r}: 1 variable>"
    assert str(vs.verify(one.path)) == f"{one.path}: ok: 1 variable, 1 byte, every byte as it was saved"
    vs.write(tmp_path / "one.npz", {"v": np.zeros(1, np.int8)})
    assert repr(vs.read(tmp_path / "one.npz")).endswith(": 1 tensor>")
