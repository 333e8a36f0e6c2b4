"""What a load says of itself: the folded table, the hints, and the refusals."""

from __future__ import annotations

import dataclasses
import tracemalloc
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import assume, given, strategies as st

from varstore.errors import UsageError, VariableMismatch
from varstore.model.match import Match, Mismatch, compare
from varstore.model.report import Cast, LoadReport, Overlap, fold, make_report, suggest_prefixes
from varstore.values.select import select

pytestmark = pytest.mark.core

F4, F8 = np.dtype("f4"), np.dtype("f8")


def report_of(source_names, target_names, *, rename=None, source="ckpt", target="model"):
    match = compare(
        dict.fromkeys(target_names, ((1,), F4)),
        dict.fromkeys(source_names, ((1,), F4)),
        select(source_names, rename=rename),
    )
    return make_report(match, source=source, target=target)


def backbone(prefix=""):
    return [f"{prefix}backbone.layer{i}.{kind}" for i in range(74) for kind in ("weight", "bias")]


FULL = LoadReport(
    source="old",
    target="session",
    loaded=(*backbone(), "head.weight", "head.bias"),
    kept=("dense3/weight",),
    unused=tuple(f"fc.{i}" for i in range(5)),
    mismatched=(
        Mismatch(
            name="out.weight",
            source_name="out.weight",
            source_shape=(10, 64),
            target_shape=(100, 64),
            source_dtype=F4,
            target_dtype=F4,
        ),
    ),
    overlapped=(Overlap(name="head.weight", source_shape=(9, 4), target_shape=(12, 4), copied=(9, 4)),),
    cast=(Cast(name="head.bias", source_dtype=F8, target_dtype=F4),),
    hints=("try this",),
)


def test_the_table_reads_well():
    assert str(FULL).splitlines() == [
        "old -> session: 150 of 152 loaded",
        "loaded        148  backbone.*",
        "loaded          2  head.weight, head.bias",
        "missing         1  dense3/weight  (not in the source: keeps its values)",
        "unexpected      5  fc.*           (not in the target)",
        "mismatched      1  out.weight     (10, 64) -> (100, 64)",
        "overlapped      1  head.weight    (9, 4) -> (12, 4), copied (9, 4)",
        "cast            1  head.bias      float64 -> float32",
        "hint: try this",
    ]


def test_the_table_of_nothing():
    assert str(report_of([], [])) == "ckpt -> model: 0 of 0 loaded"


@pytest.mark.parametrize(
    ("source_dtype", "source_shape", "text"),
    [
        (F4, (2,), "(2,) -> (3,)"),
        (F8, (3,), "float64 -> float32"),
        (F8, (), "() float64 -> (3,) float32"),
        (F4.newbyteorder(">"), (2,), "(2,) -> (3,)"),
    ],
)
def test_a_mismatch_says_only_what_differs(source_dtype, source_shape, text):
    mismatch = Mismatch(
        name="w",
        source_name="w",
        source_shape=source_shape,
        target_shape=(3,),
        source_dtype=source_dtype,
        target_dtype=F4,
    )
    assert str(mismatch) == text


# --- folding -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "limit", "expected"),
    [
        ([], 4, []),
        (["w"], 4, [(1, "w")]),
        (["w", "b"], 4, [(2, "w, b")]),
        (["w1", "w2", "w3", "w4"], 4, [(4, "w1, … w4")]),
        (["a.b.c.w", "a.b.c.x", "a.b.d", "a.b.cc"], 4, [(4, "a.b.*")]),
        (["a.w1", "a.w2", "a.w3", "a.w4"], 4, [(4, "a.*")]),
        (["a/1", "a/2", "a/3", "a.4"], 4, [(3, "a/1, a/2, a/3"), (1, "a.4")]),
        (["conv1-weight", "conv1-bias", "w"], 4, [(2, "conv1-weight, conv1-bias"), (1, "w")]),
        (["n_" * 25 + ".w", "n_" * 25 + ".b"], 4, [(2, "n_" * 25 + ".*")]),
        (["a.1", "b.1", "c.1"], 2, [(1, "a.1"), (2, "… more")]),
        (["a.1", "b.1", "b.2", "c.1"], 2, [(2, "b.1, b.2"), (2, "… more")]),
        (["line\nbreak", "\x1b[31m.red"], 4, [(1, "line\nbreak"), (1, "\x1b[31m.red")]),
    ],
)
def test_names_fold_by_their_first_part(names, limit, expected):
    assert [row[:2] for row in fold([(name, "") for name in names], limit)] == expected


names = st.text("ab/.-é", min_size=1, max_size=8)


@given(st.lists(st.tuples(names, st.sampled_from(["", "x", "y"]))), st.integers(1, 6))
def test_folding_loses_no_name(notes, limit):
    rows = fold(notes, limit)
    assert sum(count for count, _, _ in rows) == len(notes)
    assert len(rows) <= limit
    assert all(count > 0 for count, _, _ in rows)


@given(st.lists(names, unique=True))
def test_every_name_is_below_the_label_of_its_row(given_names):
    rows = fold([(name, "") for name in given_names], limit=len(given_names) + 1)
    folded = [(count, label.removesuffix("*")) for count, label, _ in rows if label.endswith("*")]
    written = {name for _, label, _ in rows if not label.endswith("*") for name in label.split(", ")}
    for count, prefix in folded:
        assert sum(name.startswith(prefix) for name in given_names) == count
    for name in given_names:
        shortened = "/" not in name and "." not in name and "-" not in name
        assert name in written or any(name.startswith(prefix) for _, prefix in folded) or shortened


def test_a_difference_shared_by_many_is_one_row():
    targets = {f"net.{i}": ((1,), F4) for i in range(50)} | {"net.w": ((3,), F4)}
    sources = {f"net.{i}": ((1,), F8) for i in range(50)} | {"net.w": ((2,), F4)}
    match = compare(targets, sources, {name: name for name in sources}, on_mismatch="skip")
    assert str(make_report(match, source="a", target="b")).splitlines() == [
        "a -> b: 0 of 51 loaded",
        "mismatched     50  net.*  float64 -> float32",
        "mismatched      1  net.w  (2,) -> (3,)",
    ]


# --- making --------------------------------------------------------------------------------------------------


def test_a_report_has_everything_of_its_match():
    targets = {"a": ((2,), F4), "b": ((3,), F4), "c": ((1,), F4), "d": ((1,), F4.newbyteorder(">")), "e": ((), F4)}
    sources = {"a": ((2,), F4), "b": ((2,), F8), "c": ((1,), F8), "d": ((1,), F4), "zz9": ((1,), F4)}
    match = compare(targets, sources, {name: name for name in sources}, on_mismatch="overlap", cast=True)
    assert make_report(match, source="s", target="t") == LoadReport(
        source="s",
        target="t",
        loaded=("a", "b", "c", "d"),
        kept=("e",),
        unused=("zz9",),
        overlapped=(Overlap(name="b", source_shape=(2,), target_shape=(3,), copied=(2,)),),
        cast=(
            Cast(name="b", source_dtype=F8, target_dtype=F4),
            Cast(name="c", source_dtype=F8, target_dtype=F4),
        ),
    )


def test_reports_are_frozen_and_comparable():
    assert report_of(["a"], ["a"]) == report_of(["a"], ["a"])
    assert report_of(["a"], ["a"]) != report_of(["a"], ["b"])
    with pytest.raises(dataclasses.FrozenInstanceError):
        FULL.kept = ()


def test_ten_thousand_names_print_on_one_page():
    def mess(word):
        return tuple(f"{word}{i}.{kind}" for i in range(2500) for kind in ("weight", "bias"))

    fill = {"source_shape": (1,), "target_shape": (2,)}
    types = {"source_dtype": F4, "target_dtype": F8}
    report = LoadReport(
        source="s",
        target="t",
        loaded=mess("l"),
        kept=mess("k"),
        unused=mess("u"),
        mismatched=tuple(Mismatch(name=name, source_name=name, **fill, **types) for name in mess("m")),
        overlapped=tuple(Overlap(name=name, **fill, copied=(1,)) for name in mess("l")),
        cast=tuple(Cast(name=name, **types) for name in mess("l")),
        hints=("again",) * 9,
    )
    lines = str(report).splitlines()
    assert len(lines) == 30
    counted = {}
    for line in lines[1:-5]:
        category, count = line.split()[:2]
        counted[category] = counted.get(category, 0) + int(count)
    assert counted == dict.fromkeys(("loaded", "missing", "unexpected", "mismatched", "overlapped", "cast"), 5000)
    assert "loaded       4994  … more" in lines


class Cells(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.data = [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)

    def handle_data(self, data):
        self.data.append(data)


def test_html_is_escaped():
    evil = "<script>alert('&')</script>"
    report = LoadReport(source=evil, target="t", loaded=(), kept=(evil,), hints=(evil,))
    cells = Cells()
    cells.feed(report._repr_html_())
    assert cells.tags == ["table", "caption", "tr", "td", "td", "td", "td", "div"]
    assert cells.data == [
        f"{evil} -> t: 0 of 1 loaded",
        "missing",
        "1",
        evil,
        "(not in the source: keeps its values)",
        f"hint: {evil}",
    ]


# --- hints ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sources", "targets", "expected"),
    [
        (["module.backbone.conv1.weight"], ["conv1.weight"], ("module.backbone.", "", 1)),
        (["conv1.weight", "conv1.bias"], ["net/conv1.weight", "net/conv1.bias"], ("", "net/", 2)),
        (["a/x", "a/y"], ["b/x", "b/y", "b/z"], ("a/", "b/", 2)),
        (["conv1-weight", "conv1-bias"], ["first-weight", "first-bias"], ("conv1-", "first-", 2)),
        (backbone("module."), [*backbone(), "head.weight"], ("module.", "", 148)),
        (backbone("module."), ["head.weight", "head.bias"], None),
        (["model.a.w", "model.b.w", "ema.a.w", "ema.b.w"], ["a.w", "b.w"], ("model.", "", 2)),
        (["a.x", "a.y", "b"], ["c.x", "c.y", "c.z"], ("a.", "c.", 2)),
        (["a.w", "a.b"], ["a.w", "a.b", "c"], None),
        (["a.w", "x.1", "x.2", "x.3"], ["b.w", "y", "z", "y2", "z2"], None),
        ([], ["a"], None),
        (["a"], [], None),
        (["w"], ["b"], None),
    ],
)
def test_the_prefix_rename_that_helps_most(sources, targets, expected):
    assert suggest_prefixes(sources, targets) == expected


prefixes = st.lists(st.sampled_from(["p", "q", "net", "module"]), max_size=3).map(
    lambda parts: "".join(part + "." for part in parts)
)
bodies = st.lists(
    st.lists(st.sampled_from(["w", "b", "conv", "0", "1"]), min_size=1, max_size=3).map("/".join),
    unique=True,
    min_size=1,
    max_size=12,
)


@given(bodies, prefixes, prefixes)
def test_a_planted_prefix_is_found(names_within, old, new):
    assume(old != new)
    sources, targets = [old + name for name in names_within], [new + name for name in names_within]
    suggestion = suggest_prefixes(sources, targets)
    assert suggestion is not None
    found_old, found_new, count = suggestion
    assert count == len(targets)
    assert set(select(sources, rename={found_old: found_new})) == set(targets)


@given(st.lists(names, unique=True, max_size=10), st.lists(names, unique=True, max_size=10))
def test_a_suggestion_keeps_its_promise(sources, targets):
    suggestion = suggest_prefixes(sources, targets)
    if suggestion is not None:
        old, new, count = suggestion
        matched = set(sources) & set(targets)
        assert count == len(set(select(sources, rename={old: new})) & set(targets)) > len(matched)


def test_names_of_many_parts_take_little_memory():
    sources = ["a/" * 5000 + str(i) for i in range(20)]
    tracemalloc.start()
    assert suggest_prefixes(sources, [f"x/{name}" for name in sources]) == ("", "x/", 20)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100 * sum(map(len, sources))


def test_the_report_suggests_the_prefix_and_it_works():
    sources, targets = backbone("module."), [*backbone(), "head.weight", "head.bias"]
    report = report_of(sources, targets)
    assert report.hints == ("try rename={'module.': ''}: 148 of 150 names would match",)
    assert len(report_of(sources, targets, rename={"module.": ""}).loaded) == 148


def test_nothing_is_suggested_where_most_matches_or_the_rename_was_given():
    assert report_of(backbone(), [*backbone(), "head.weight"]).hints == ()
    assert report_of(backbone("module."), backbone(), rename={"module": ""}).hints == ()


@pytest.mark.parametrize(
    ("kept", "unused", "is_near"),
    [
        ("fc.weight", "fc.wieght", True),
        ("fc.bias", "fc.bais", True),
        ("fc.Weight", "fc.weight", True),
        ("conv1-weight", "conv1.weight", True),
        ("conv_1/weight", "conv1/weight", True),
        ("conv1.weight", "conv2.weight", False),
        ("conv1.weight", "conv1.bias", False),
        ("a.fc.weight", "fc.weight", False),
        ("backbone.layer.conv.weight", "backbone.layer.conv.bias", False),
    ],
)
def test_near_misses_in_spelling(kept, unused, is_near):
    hint = f"{kept!r} is missing and {unused!r} is unexpected; is one of them misspelt?"
    report = report_of(["x", "y", unused], ["x", "y", kept])
    assert report.hints == ((hint,) if is_near else ())


def test_at_most_five_near_misses_each_name_once():
    sources = [f"fc{i}.wieght" for i in range(9)] + ["net.wegiht"]
    targets = [f"fc{i}.weight" for i in range(9)] + ["net.weight", "net.weights"]
    hints = report_of(sources, targets).hints
    assert len(hints) == 5
    assert hints[0] == "'fc0.weight' is missing and 'fc0.wieght' is unexpected; is one of them misspelt?"
    hints = report_of(["net.wegiht"], ["net.weight", "net.weights"]).hints
    assert hints == ("'net.weight' is missing and 'net.wegiht' is unexpected; is one of them misspelt?",)


def test_hints_for_ten_thousand_names():
    sources = [f"module.layer{i}.{kind}" for i in range(5000) for kind in ("weight", "bias")]
    targets = [name.removeprefix("module.") for name in sources]
    assert report_of(sources, targets).hints == ("try rename={'module.': ''}: 10000 of 10000 names would match",)
    mixed = [*targets[:6000], *(name.replace("weight", "wieght") for name in targets[6000:])]
    assert len(report_of(mixed, targets).hints) == 5


# --- raise_for -----------------------------------------------------------------------------------------------


def test_raise_for_returns_the_report_when_all_is_well():
    report = report_of(["a", "b"], ["a"])
    assert report.raise_for("kept", "mismatched", "overlapped", "cast") is report
    assert report.raise_for() is report


def test_raise_for_lists_what_it_was_asked_for():
    with pytest.raises(VariableMismatch) as caught:
        FULL.raise_for("unused", "kept")
    assert str(caught.value) == (
        "old -> session: 1 missing, 5 unexpected\n"
        "  missing         1  dense3/weight  (not in the source: keeps its values)\n"
        "  unexpected      5  fc.*           (not in the target)\nTry this"
    )
    assert caught.value.hint == "try this"


@pytest.mark.parametrize("category", ["kept", "unused", "mismatched", "overlapped", "cast"])
def test_raise_for_each_category(category):
    word = {"kept": "missing", "unused": "unexpected"}.get(category, category)
    alone = LoadReport(source="s", target="t", loaded=(), **{category: getattr(FULL, category)})
    with pytest.raises(VariableMismatch) as caught:
        alone.raise_for(category)
    assert f": {len(getattr(FULL, category))} {word}\n" in str(caught.value)
    with pytest.raises(VariableMismatch):
        alone.raise_for(word)
    assert str(caught.value).endswith("Pair the names with rename=, and leave the rest out with exclude=")
    others = {"kept", "unused", "mismatched", "overlapped", "cast"} - {category}
    assert alone.raise_for(*others) is alone


@pytest.mark.parametrize("category", ["loaded", "extra", None])
def test_raise_for_an_unknown_category(category):
    with pytest.raises(UsageError) as caught:
        FULL.raise_for("kept", category)
    assert str(caught.value) == (
        f"unknown category: found {category!r}, "
        "expected 'missing' or 'unexpected' or 'waiting' or 'mismatched' or 'overlapped' or 'cast'"
    )


def test_a_match_made_by_hand_is_reported():
    assert make_report(Match(pairs=()), source="s", target="t") == LoadReport(source="s", target="t", loaded=())
