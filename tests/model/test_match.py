"""Selecting, renaming and comparing names, against dumb references and tables of boundaries."""

from __future__ import annotations

import dataclasses
import fnmatch
import re

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, strategies as st

from varstore.errors import UsageError, VariableMismatch, VariableNotFound
from varstore.model.match import Match, Mismatch, Pair, compare, is_same_type
from varstore.text.hints import nearest
from varstore.values.select import select

pytestmark = pytest.mark.core

F4, F8, I4 = np.dtype("f4"), np.dtype("f8"), np.dtype("i4")

names_of_parts = st.lists(st.sampled_from(["a", "b", "conv1", "layer_2", "w", "é", "x y"]), min_size=1, max_size=4)
separators = st.sampled_from("/.-_")
names = st.builds(lambda parts, separator: separator.join(parts), names_of_parts, separators)
name_lists = st.lists(names, unique=True, max_size=12)


# --- include and exclude -------------------------------------------------------------------------------------

NAMES = ["conv1/weight", "conv1/bias", "head.fc.weight", "Head", "a[0]", "a0", "line\nbreak"]


@pytest.mark.parametrize(
    ("include", "exclude", "expected"),
    [
        (None, None, NAMES),
        ("conv1/weight", None, ["conv1/weight"]),
        ("*weight", None, ["conv1/weight", "head.fc.weight"]),
        ("conv?/*", None, ["conv1/weight", "conv1/bias"]),
        ("*", "*", []),
        ("[hH]ead*", None, ["head.fc.weight", "Head"]),
        ("[!h]ead*", None, ["Head"]),
        ("head*", None, ["head.fc.weight"]),
        ("a[0]", None, ["a[0]", "a0"]),
        ("line*break", None, ["line\nbreak"]),
        (["Head", "conv1*"], None, ["conv1/weight", "conv1/bias", "Head"]),
        (["Head", "conv1*"], ["*bias", "nothing*"], ["conv1/weight", "Head"]),
        (iter(["Head"]), ("Head",), []),
        ([], None, []),
        (None, [], NAMES),
        (None, "*e*", ["conv1/bias", "a[0]", "a0"]),
    ],
)
def test_patterns_choose_whole_names_in_source_order(include, exclude, expected):
    assert list(select(NAMES, include=include, exclude=exclude).items()) == [(name, name) for name in expected]


@given(name_lists, st.lists(st.text("ab1*?[]!-./w", min_size=1, max_size=5), max_size=3))
def test_exclude_is_fnmatch_or_the_name_itself(given_names, patterns):
    expected = [
        name
        for name in given_names
        if not any(name == pattern or fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
    ]
    assert list(select(given_names, exclude=patterns)) == expected


def test_patterns_see_the_names_before_renaming():
    assert select(["a.x", "b.x"], include="a.*", rename={"a": "b"}) == {"b.x": "a.x"}
    assert select(["a.x", "b.x"], exclude="b.*", rename={"a": "b"}) == {"b.x": "a.x"}


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("conv1/wieght", "include: no variable matches the pattern 'conv1/wieght'. The nearest are 'conv1/weight'"),
        ("covn1/*", "include: no variable matches the pattern 'covn1/*'. The nearest are 'conv1/*'"),
        (
            "*.gamma",
            "include: no variable matches the pattern '*.gamma'. "
            "The names are 'conv1/weight', 'conv1/bias', 'head.fc.weight', and 4 more",
        ),
        ("HEAD", "include: no variable matches the pattern 'HEAD'. The names are 'conv1/weight'"),
    ],
)
def test_an_include_pattern_without_a_match_is_an_error(pattern, message):
    with pytest.raises(VariableNotFound) as caught:
        select(NAMES, include=["Head", pattern])
    assert str(caught.value).startswith(message)
    assert isinstance(caught.value, KeyError)
    with pytest.raises(VariableNotFound, match=r"^some/dir: include: "):
        select(NAMES, include=pattern, path="some/dir")


def test_an_include_pattern_finds_nothing_in_nothing():
    with pytest.raises(VariableNotFound, match=r"the pattern '\*'\. There are no variables"):
        select([], include="*")


def test_a_pattern_is_missed_even_when_another_found_its_names():
    with pytest.raises(VariableNotFound, match="no variable matches the pattern 'b'"):
        select(["a"], include=["*", "b"])


@pytest.mark.parametrize("field", ["include", "exclude"])
@pytest.mark.parametrize("value", [3, b"a*", ["a", None], [["a"]], re.compile("a")])
def test_patterns_must_be_strings(field, value):
    with pytest.raises(UsageError, match=rf"^{field}: not a pattern: found .*, expected a glob string or a list"):
        select(["a"], **{field: value})


# --- rename --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prefixes", "name", "expected"),
    [
        # a whole part, whatever separator follows
        ({"conv1": "c"}, "conv1", "c"),
        ({"conv1": "c"}, "conv1/weight", "c/weight"),
        ({"conv1": "c"}, "conv1.weight", "c.weight"),
        ({"conv1": "c"}, "conv1-weight", "c-weight"),
        ({"a.b": "c"}, "a.b.w", "c.w"),
        # not a part of a part
        ({"conv1": "c"}, "conv10.weight", "conv10.weight"),
        ({"layer": "l"}, "layer_norm.weight", "layer_norm.weight"),
        ({"conv1": "c"}, "my.conv1.weight", "my.conv1.weight"),
        ({"Conv1": "c"}, "conv1.weight", "conv1.weight"),
        ({"conv1.weight": "c"}, "conv1", "conv1"),
        # prefixes that end in a sign say themselves where they end, and are replaced literally
        ({"a.": "b."}, "a.w", "b.w"),
        ({"a.": "b"}, "a.w", "bw"),
        ({"a/": ""}, "a/w", "w"),
        ({"layer_": "l"}, "layer_norm.weight", "lnorm.weight"),
        ({"a.": "b."}, "a", "a"),
        # "" as the replacement strips the separator too
        ({"module": ""}, "module.conv.weight", "conv.weight"),
        ({"module.": ""}, "module.conv.weight", "conv.weight"),
        ({"module": ""}, "module-w", "w"),
        ({"module": ""}, "module..w", ".w"),
        ({"module.": ""}, "module..w", ".w"),
        ({"module": ""}, "modules.w", "modules.w"),
        # "" as the prefix stands before every name
        ({"": "net."}, "conv.w", "net.conv.w"),
        ({"": ""}, ".w", ".w"),
        ({"": "net.", "head": "top"}, "head.w", "top.w"),
        # longest wins, unless it does not end on a boundary
        ({"a": "x", "a.b": "y"}, "a.b.w", "y.w"),
        ({"a": "x", "a.b": "y"}, "a.bc.w", "x.bc.w"),
        ({"a.b": "y", "a": "x"}, "a.c", "x.c"),
        ({"a": "x", "a.": "y/"}, "a.c", "y/c"),
        # None drops
        ({"a": None}, "a.w", None),
        ({"a": None, "a.b": "b"}, "a.b.w", "b.w"),
        ({"": None, "a": "a"}, "b", None),
        ({}, "a", "a"),
    ],
)
def test_prefixes_and_their_boundaries(prefixes, name, expected):
    assert select([name], rename=prefixes) == ({} if expected is None else {expected: name})


def brute_force(prefixes, name):
    fitting = [
        prefix
        for prefix in prefixes
        if name.startswith(prefix)
        and (prefix == name or prefix == "" or not prefix[-1].isalnum() or name[len(prefix)] in "/.-")
    ]
    if not fitting:
        return name
    prefix = max(fitting, key=len)
    rest = name.removeprefix(prefix)
    if prefixes[prefix] == "" and prefix and prefix[-1].isalnum():
        rest = rest[1:]
    return prefixes[prefix] + rest


prefix_keys = st.builds(lambda name, cut: name[:cut], names, st.integers(0, 12))


@given(names, st.dictionaries(prefix_keys, st.sampled_from(["", "q", "q.", "r/s"]), max_size=5))
def test_the_longest_prefix_wins(name, prefixes):
    expected = brute_force(prefixes, name)
    if expected:
        assert select([name], rename=prefixes) == {expected: name}
    else:
        with pytest.raises(UsageError, match="non-empty name"):
            select([name], rename=prefixes)


@given(name_lists, st.dictionaries(names, st.none() | names))
def test_a_function_is_asked_for_every_name(given_names, table):
    renamed = lambda name: table.get(name, name)  # noqa: E731
    pairs = [(renamed(name), name) for name in given_names if renamed(name) is not None]
    if len(dict(pairs)) == len(pairs):
        assert list(select(given_names, rename=renamed).items()) == pairs
    else:
        with pytest.raises(VariableMismatch, match="two variables would be loaded as"):
            select(given_names, rename=renamed)


@pytest.mark.parametrize(
    ("substitutions", "name", "expected"),
    [
        ([("a", "b"), ("b", "c")], "a.b", "c.c"),
        ([(r"^layer(\d+)\.", r"blocks/\1/")], "layer12.w", "blocks/12/w"),
        ([(re.compile("W", re.IGNORECASE), "v")], "a.w", "a.v"),
        ([(r"[./]", "-")], "a.b/c", "a-b-c"),
        ([], "a", "a"),
        ((("x", "y"),), "x", "y"),
        ([(r"(?P<n>\d)(z)?", r"<\g<n>\2>")], "a1", "a<1>"),
    ],
)
def test_substitutions_run_in_order_each_on_the_result(substitutions, name, expected):
    assert select([name], rename=substitutions) == {expected: name}


def test_two_sources_for_one_target_name_both():
    with pytest.raises(VariableMismatch) as caught:
        select(["a.w", "b.w"], rename={"a": "c", "b": "c"}, path="dir")
    assert str(caught.value) == (
        "dir: rename: two variables would be loaded as 'c.w': found 'a.w' and 'b.w'. "
        "Leave one of them out with exclude=, or rename it to something else"
    )
    with pytest.raises(VariableMismatch, match=r"found 'a' and 'b'"):
        select(["a", "b"], rename=[("a", "b")])


@pytest.mark.parametrize(
    ("rename", "message"),
    [
        (lambda name: 3, "variable 'a': rename: renaming must return a non-empty name, or None to drop the variable"),
        (lambda name: "", "found '' (str)"),
        ({"a": ""}, "found '' (str)"),
        ([("a", "")], "found '' (str)"),
        ({"a": 1}, "rename: not a prefix and its replacement: found 'a': 1, expected two strings, or None"),
        ({1: "a"}, "rename: not a prefix and its replacement: found 1: 'a'"),
        ("a=b", "rename: not a way to rename: found 'a=b' (str), expected a dict of prefixes, a list of"),
        (3, "rename: not a way to rename: found 3 (int)"),
        ([("(", "x")], "rename: not a regular expression and its replacement (missing ), unterminated subpattern"),
        ([("a", r"\2")], "(invalid group reference 2 at position 1): found ('a', '\\\\2') (tuple)"),
        ([("a", r"\g<no>")], "(unknown group name 'no'"),
        ([("a", None)], "rename: not a regular expression and its replacement"),
        ([("a", lambda match: "b")], "(the replacement is not a string)"),
        ([(b"a", "b")], "rename: not a regular expression and its replacement"),
        ([("a",)], "expected (regex, replacement)"),
        (["ab", "cde"], "found 'cde' (str), expected (regex, replacement)"),
        (("a", "b"), "found 'a' (str), expected (regex, replacement)"),
    ],
)
def test_what_cannot_rename_is_refused(rename, message):
    with pytest.raises(UsageError) as caught:
        select(["a"], rename=rename)
    assert message in str(caught.value)
    assert not isinstance(caught.value, VariableMismatch)


def test_an_error_of_the_callers_function_is_the_callers():
    with pytest.raises(ZeroDivisionError):
        select(["a"], rename=lambda name: 1 / 0)


# --- nearest -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("conv1/wieght", "conv1/weight"),
        ("conv1.weight", "conv1/weight"),
        ("Conv1/Weight", "conv1/weight"),
        ("conv1/bais", "conv1/bias"),
        ("head.fc.wait", "head.fc.weight"),
        ("heads", "Head"),
    ],
)
def test_the_nearest_name_comes_first(name, expected):
    assert nearest(name, NAMES)[0] == expected


def test_nearest_gives_no_far_names_and_no_more_than_asked():
    assert nearest("optimizer", NAMES) == ()
    assert nearest("", NAMES) == ()
    assert nearest("x", []) == ()
    many = ["conv2", "conv3", "conv4", "conv5"]
    assert len(nearest("conv1", many)) == 3
    assert nearest("conv1", many, count=2) == nearest("conv1", many)[:2]


@given(st.lists(names, min_size=1, unique=True, max_size=40), st.data())
def test_a_name_is_nearest_to_itself(given_names, data):
    name = data.draw(st.sampled_from(given_names))
    assert nearest(name, given_names, count=1) == (name,)


# --- compare -------------------------------------------------------------------------------------------------


def pair(target, source, how, source_side, target_side, common):
    return Pair(
        target=target,
        source=source,
        how=how,
        source_shape=source_side[0],
        source_dtype=source_side[1],
        target_shape=target_side[0],
        target_dtype=target_side[1],
        common=common,
    )


def test_compare_sorts_everything_into_its_place():
    targets = {"kept": ((1,), F4), "w": ((2, 3), F4), "b": ((3,), F4)}
    sources = {"old.b": ((3,), F4), "old.w": ((2, 3), F4), "left out": ((1,), F4), "more": ((1,), F4)}
    selected = {"b": "old.b", "w": "old.w", "new": "more"}
    assert compare(targets, sources, selected) == Match(
        pairs=(
            pair("b", "old.b", "exact", ((3,), F4), ((3,), F4), (3,)),
            pair("w", "old.w", "exact", ((2, 3), F4), ((2, 3), F4), (2, 3)),
        ),
        kept=("kept",),
        unused=("more",),
    )


MISFITS = {
    "shape": (((10, 4), F4), ((12, 4), F4)),
    "smaller": (((12, 4), F4), ((10, 3), F4)),
    "ndim": (((4,), F4), ((4, 1), F4)),
    "empty": (((0, 4), F4), ((2, 4), F4)),
    "narrower": (((2,), F8), ((2,), F4)),
    "wider": (((2,), I4), ((2,), F8)),
    "kind": (((2,), F4), ((2,), I4)),
    "both": (((2,), F8), ((3,), F4)),
    "hopeless": (((2,), F4), ((3,), I4)),
}


@pytest.mark.parametrize(
    ("on_mismatch", "cast", "fitting"),
    [
        ("skip", False, {}),
        ("skip", True, {"narrower": "cast", "wider": "cast"}),
        ("overlap", False, {"shape": "overlap", "smaller": "overlap"}),
        (
            "overlap",
            True,
            {"shape": "overlap", "smaller": "overlap", "narrower": "cast", "wider": "cast", "both": "overlap"},
        ),
        ("error", True, {"narrower": "cast", "wider": "cast"}),
    ],
)
def test_what_each_mode_allows(on_mismatch, cast, fitting):
    for name, (source, target) in MISFITS.items():
        match = compare({"t": target}, {"s": source}, {"t": "s"}, on_mismatch=on_mismatch, cast=cast)
        assert [(p.how, p.source) for p in match.pairs] == ([(fitting[name], "s")] if name in fitting else [])
        assert [m.name for m in match.mismatched] == ([] if name in fitting else ["t"])
        assert match.kept == match.unused == ()


def test_a_skipped_mismatch_says_both_sides_and_the_names():
    match = compare({"t": ((3,), I4)}, {"s": ((2,), F4)}, {"t": "s"}, on_mismatch="skip")
    assert match.mismatched == (
        Mismatch(name="t", source_name="s", source_shape=(2,), target_shape=(3,), source_dtype=F4, target_dtype=I4),
    )
    assert str(match.mismatched[0]) == "(2,) float32 -> (3,) int32"
    assert match.pairs == ()


@given(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), max_size=3))
def test_the_common_corner_fits_both_sides(extents):
    source = np.arange(np.prod([s for s, _ in extents], dtype=int)).reshape([s for s, _ in extents])
    target = np.full([t for _, t in extents], -1)
    match = compare(
        {"t": (target.shape, target.dtype)}, {"s": (source.shape, source.dtype)}, {"t": "s"}, on_mismatch="overlap"
    )
    [only] = match.pairs
    corner = tuple(slice(extent) for extent in only.common)
    target[corner] = source[corner]
    assert (target >= 0).sum() == np.prod(only.common, dtype=int)
    assert only.how == ("exact" if source.shape == target.shape else "overlap")


def test_an_unknown_shape_or_type_is_the_targets():
    targets = {"w": ((2,), F4), "v": ((3,), I4)}
    match = compare(targets, {"w": (None, None), "v": (None, I4)}, {"w": "w", "v": "v"})
    assert match.pairs == (
        pair("w", "w", "exact", ((2,), F4), ((2,), F4), (2,)),
        pair("v", "v", "exact", ((3,), I4), ((3,), I4), (3,)),
    )


def test_byte_order_is_no_mismatch_but_no_exact_copy_either():
    match = compare({"w": ((2,), F4.newbyteorder(">"))}, {"w": ((2,), F4)}, {"w": "w"})
    assert [p.how for p in match.pairs] == ["cast"]
    assert is_same_type(F4, F4.newbyteorder(">"))
    assert not is_same_type(F4, I4)


def casts(source, target):
    match = compare({"w": ((), target)}, {"w": ((), source)}, {"w": "w"}, on_mismatch="skip", cast=True)
    return bool(match.pairs)


@pytest.mark.parametrize("source", np.typecodes["All"])
def test_cast_allows_what_numpy_calls_same_kind(source):
    for target in "?" + np.typecodes["AllInteger"] + np.typecodes["AllFloat"]:
        a, b = np.dtype(source), np.dtype(target)
        numeric = a.kind in "?buifc"
        assert casts(a, b) == (numeric and np.can_cast(a, b, "same_kind")), (a, b)


@pytest.mark.parametrize(
    ("source", "target", "allowed"),
    [
        ("bfloat16", "float32", True),
        ("float32", "bfloat16", True),
        ("float8_e4m3fn", "bfloat16", True),
        ("bfloat16", "float8_e8m0fnu", True),
        ("float4_e2m1fn", "float64", True),
        ("bfloat16", "complex64", True),
        ("complex64", "bfloat16", False),
        ("bfloat16", "int32", False),
        ("bfloat16", "int4", False),
        ("int4", "int32", True),
        ("int64", "int4", True),
        ("int4", "uint4", False),
        ("uint4", "int4", True),
        ("uint2", "float8_e5m2", True),
        ("bool", "int2", True),
        ("int2", "bool", False),
    ],
)
def test_cast_knows_the_kinds_of_ml_dtypes(source, target, allowed):
    dtypes = [np.dtype(getattr(ml_dtypes, name, name)) for name in (source, target)]
    assert casts(*dtypes) is allowed


def test_ten_thousand_names():
    source = [f"module.layer{i}.{kind}" for i in range(5000) for kind in ("weight", "bias")]
    selected = select(source, include=source, exclude=["*layer4999*", "*nothing"], rename={"module": "", "x": "y"})
    specs = {name.removeprefix("module."): ((2,), F4) for name in source}
    match = compare(specs, dict.fromkeys(source, ((2,), F4)), selected)
    assert len(match.pairs) == 9998
    assert match.kept == ("layer4999.weight", "layer4999.bias")
    assert nearest("module.layer77.wieght", source)[0] == "module.layer77.weight"


def test_records_are_frozen_and_comparable():
    match = compare({"a": ((), F4)}, {}, {})
    assert match == compare({"a": ((), F4)}, {}, {})
    with pytest.raises(dataclasses.FrozenInstanceError):
        match.kept = ()
