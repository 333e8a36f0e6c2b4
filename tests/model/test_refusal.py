"""One error for all that is wrong with a load, and hints that let it pass when they are followed."""

from __future__ import annotations

import re

import numpy as np
import pytest

import varstore as vs
from varstore.errors import UsageError, VariableMismatch
from varstore.model.match import compare
from varstore.model.refusal import Demands, refuse

pytestmark = pytest.mark.core

F4, F8 = np.dtype("f4"), np.dtype("f8")
SAME = ((1,), F4)


def refused(targets, sources, *, path=None, **modes):
    demands = Demands(**modes)
    chosen = {name: name for name in sources}
    match = compare(targets, sources, chosen, on_mismatch=demands.on_mismatch, cast=demands.cast)
    refuse(match, demands, is_vain=not match.pairs, source="s", target="t", path=path)


# --- shapes and types ------------------------------------------------------------------------------------------------


def test_the_refusal_lists_all_folded_by_difference():
    sources = {"same": SAME} | {f"b{i}": ((1,), F8) for i in range(148)} | {f"s{i}": ((i, 2), F4) for i in range(12)}
    targets = (
        {"same": SAME} | {f"b{i}": ((1,), F4) for i in range(148)} | {f"s{i}": ((i + 1, 2), F4) for i in range(12)}
    )
    with pytest.raises(VariableMismatch) as caught:
        refused(targets, sources, path="dir")
    assert str(caught.value).splitlines() == [
        "dir: shapes or types of 160 variables differ, source -> target:",
        "  'b0', 'b1', 'b2', and 145 more: float64 -> float32",
        *[f"  's{i}': ({i}, 2) -> ({i + 1}, 2)" for i in range(9)],
        "  and 3 more",
        "Pass cast=True to convert between types of the same kind, "
        'on_mismatch="overlap" to copy the corner that two shapes share, '
        'or on_mismatch="skip" to leave these targets as they are',
    ]


@pytest.mark.parametrize(
    ("source", "target", "modes", "ways_out"),
    [
        (((3,), F8), ((3,), F4), {}, "cast=True to convert between types of the same kind, or "),
        (((3,), F4), ((2,), F4), {}, 'on_mismatch="overlap" to copy the corner that two shapes share, or '),
        (((3,), F4), ((2, 2), F4), {}, ""),
        (((3,), F4), ((3,), np.dtype("i4")), {}, ""),
        (((3,), F4), ((2, 2), F8), {"cast": True}, ""),
        (((3,), F8), ((2, 2), F4), {}, ""),
        (((3,), F8), ((2,), F4), {"cast": True}, 'on_mismatch="overlap" to copy the corner that two shapes share, or '),
        (
            ((3,), F8),
            ((2,), F4),
            {},
            'cast=True and on_mismatch="overlap" together to convert the corner that two shapes share, or ',
        ),
        (((3,), F4), ((2,), np.dtype("i4")), {}, ""),
        (((3,), F4), ((2, 2), F4), {"on_mismatch": "overlap"}, ""),
    ],
)
def test_the_refusal_names_only_what_would_help(source, target, modes, ways_out):
    with pytest.raises(VariableMismatch) as caught:
        refused({"w": target, "v": SAME}, {"w": source, "v": SAME}, **modes)
    expected = f'Pass {ways_out}on_mismatch="skip" to leave these targets as they are'
    assert str(caught.value).splitlines()[-1] == expected


@pytest.mark.parametrize(
    ("source", "target", "is_transposed"),
    [
        ((6, 8), (8, 6), True),
        ((3, 3, 16, 32), (32, 16, 3, 3), True),
        ((6, 8), (8, 7), False),
        ((4,), (4, 1), False),
    ],
)
def test_a_transposed_shape_is_called_that_and_not_offered_as_overlap(source, target, is_transposed):
    with pytest.raises(VariableMismatch) as caught:
        refused({"w": (target, F4), "v": SAME}, {"w": (source, F4), "v": SAME})
    assert ("transposed" in str(caught.value)) == is_transposed
    assert ("overlap" in str(caught.value)) == (len(source) == len(target) and not is_transposed)


def test_an_overlap_of_a_transposed_shape_is_called_that():
    report = vs.load_into({"w": np.zeros((2, 3))}, {"w": np.ones((3, 2))}, on_mismatch="overlap")
    assert "(3, 2) -> (2, 3), transposed, copied (2, 2)" in str(report)


# --- names -----------------------------------------------------------------------------------------------------------


def zeros(*names, shape=(2,)):
    return {name: np.zeros(shape) for name in names}


def ones(*names, shape=(2,)):
    return {name: np.ones(shape) for name in names}


@pytest.mark.parametrize(
    ("missing", "wrong"),
    [
        (None, ()),
        ("head.*", ("neck.w",)),
        (["head.*", "neck.w"], ()),
        (iter(["neck.*"]), ("head.b", "head.w")),
        ([], ("head.b", "head.w", "neck.w")),
        ("error", ("head.b", "head.w", "neck.w")),
        ("keep", ("head.b", "head.w", "neck.w")),
        ("*", ()),
    ],
)
def test_missing_says_which_targets_may_stay_as_they_are(missing, wrong):
    targets, source = zeros("body.w", "head.w", "head.b", "neck.w"), ones("body.w", "more")
    if wrong:
        with pytest.raises(VariableMismatch, match=f"{len(wrong)} missing") as caught:
            vs.load_into(targets, source, missing=missing)
        assert all(name in str(caught.value) for name in wrong)
        assert not targets["body.w"].any()
    else:
        report = vs.load_into(targets, source, missing=missing)
        assert report.missing == ("head.w", "head.b", "neck.w")


def test_missing_is_a_pattern_or_several():
    for wrong in (3, [b"head.*"], [None]):
        with pytest.raises(UsageError, match="missing: not a pattern"):
            vs.load_into(zeros("w"), ones("w"), missing=wrong)


def test_strict_refuses_what_one_side_only_has():
    with pytest.raises(VariableMismatch, match="1 missing, 1 unexpected"):
        vs.load_into(zeros("a", "b"), ones("a", "c"), strict=True)
    with pytest.raises(VariableMismatch, match=r"targets: 1 unexpected"):
        vs.load_into(zeros("a", "b"), ones("a", "c"), strict=True, missing="b")
    assert vs.load_into(zeros("a", "b"), ones("a", "c"), strict=False).loaded == ("a",)


@pytest.mark.parametrize(
    ("targets", "source", "options"),
    [
        (zeros("a"), ones("b"), {}),
        (zeros("a"), ones("a", "b"), {"exclude": "a"}),
        (zeros("a"), ones("a"), {"exclude": "*"}),
        (zeros("a"), ones("a", shape=3), {"on_mismatch": "skip"}),
        (zeros("a"), ones("b"), {"missing": "*"}),
        (zeros("a"), ones("b"), {"rename": {"b": None}}),
    ],
)
def test_a_load_of_nothing_is_an_error(targets, source, options):
    with pytest.raises(VariableMismatch, match="nothing is loaded"):
        vs.load_into(targets, source, **options)


def test_a_load_of_nothing_into_nothing_or_from_nothing_is_none():
    assert vs.load_into({}, ones("a")).unexpected == ("a",)
    assert vs.load_into(zeros("a"), {}).missing == ("a",)
    assert vs.load_into({}, {}, strict=True).loaded == ()


# --- all at once, and what the hint says ---------------------------------------------------------------------------


def followed(hint):
    """Return the options that a hint names, in Python, without those after an "or"."""
    found = re.findall(r"(strict|missing|cast|on_mismatch|rename)=(\{.*?\}|\[.*?\]|'.*?'|\".*?\"|True|False)", hint)
    options = {}
    for name, text in found:
        options.setdefault(name, eval(text))
    return options


PREFIXED = {**ones("module.body.w", "module.body.b"), "module.out.w": np.ones((3, 2)), "module.old": np.ones(1)}


def wanted():
    return {**zeros("body.w", "body.b", "head.w", "head.b"), "out.w": np.zeros((3, 5))}


def test_a_prefix_shapes_and_missing_names_are_one_error():
    with pytest.raises(VariableMismatch) as caught:
        vs.load_into(wanted(), PREFIXED, strict=True)
    assert str(caught.value).splitlines() == [
        "dict -> targets: nothing is loaded: 5 missing, 4 unexpected",
        "  missing         2  body.w, body.b  (not in the source: keeps its values)",
        "  missing         2  head.w, head.b  (not in the source: keeps its values)",
        "  missing         1  out.w           (not in the source: keeps its values)",
        "  unexpected      4  module.*        (not in the target)",
        "  with rename={'module.': ''}:",
        "  missing         2  head.w, head.b  (not in the source: keeps its values)",
        "  unexpected      1  module.old      (not in the target)",
        "  mismatched      1  out.w           (3, 2) -> (3, 5)",
        "Try rename={'module.': ''}: 3 of 5 names would match; pair the names with rename=, or pass strict=False to "
        'load only the names that both sides have; pass on_mismatch="overlap" to copy the corner that two shapes '
        'share, or on_mismatch="skip" to leave these targets as they are',
    ]


@pytest.mark.parametrize(
    ("targets", "source", "options"),
    [
        (wanted(), PREFIXED, {"strict": True}),
        (wanted(), PREFIXED, {}),
        (wanted(), PREFIXED, {"strict": True, "missing": "head.w"}),
        (zeros("a", "head.w", "head.b"), ones("a"), {"strict": True}),
        (zeros("a", "head.w", "head.b"), ones("a"), {"missing": "head.b"}),
        (zeros("a", "h[0].w", "h[0].b"), ones("a"), {"missing": []}),
        (zeros("a", "b"), ones("a", "c"), {"strict": True}),
        (zeros("a", "b"), ones("a", "c"), {"strict": True, "missing": "error"}),
        (zeros("a"), ones("a", "c"), {"strict": True}),
        ({**zeros("a"), "w": np.zeros((2, 3))}, {**ones("a"), "w": np.ones((3, 2))}, {}),
        ({**zeros("a"), "w": np.zeros(3, "f4")}, {**ones("a"), "w": np.ones(3)}, {"strict": True}),
        ({"w": np.zeros(3, "f4")}, {"w": np.ones(2)}, {}),
        ({"w": np.zeros(3), "v": np.zeros(1)}, {"w": np.ones(2)}, {"strict": True}),
    ],
)
def test_a_hint_that_is_followed_lets_it_load(targets, source, options):
    with pytest.raises(VariableMismatch) as caught:
        vs.load_into(targets, source, **options)
    assert vs.load_into(targets, source, **options | followed(caught.value.hint)).loaded


def test_a_rename_that_would_make_two_names_one_is_not_tried():
    """The caller's rename drops a name that the suggested one would bring back."""
    source = ones("m.a", "m.b", "a", "x.q")
    with pytest.raises(VariableMismatch, match="missing"):
        vs.load_into(zeros("a", "b", "c"), source, rename={"a": None}, strict=True)
