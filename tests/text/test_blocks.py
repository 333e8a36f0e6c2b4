"""Numbered blocks of one structure are folded; every name stays in the tree, and only alike names are one node."""

from __future__ import annotations

import math

from hypothesis import given, strategies as st

from varstore.text.blocks import Node, folded
from varstore.text.sizes import size_text

PART = st.sampled_from(["h", "0", "1", "2", "3", "10", "007", "w1", "w2", "w3", "b", "ln_12", "é", "٣", "9" * 30, ""])
NAMES = st.sets(st.lists(PART, min_size=1, max_size=4).map("/".join) | st.text("a0./", min_size=1)).map(sorted)


def drawn(nodes, indent=""):
    for node in nodes:
        count = len(list(node.names))
        yield f"{indent}{node.label} {node.blocks} {count}"
        yield from drawn(node.children, indent + " ")


def leaves(nodes, blocks=1, label=""):
    for node in nodes:
        if node.own:
            yield node, blocks * node.blocks, label + node.label
        yield from leaves(node.children, blocks * node.blocks, label + node.label)


def test_blocks_of_one_structure_are_one_node():
    names = ["wte", *(f"h.{i}.{part}" for i in range(12) for part in ("ln.w", "ln.b", "mlp")), "end.w"]
    assert list(drawn(folded(names, lambda name: "b" in name))) == [
        "wte 1 1",
        "h.{0..11}. 12 36",
        " ln. 1 24",
        "  w 1 12",
        "  b 1 12",
        " mlp 1 12",
        "end.w 1 1",
    ]


def test_what_is_not_alike_is_not_folded():
    names = [f"h.{i}/{part}" for i in range(6) for part in ("a", "b")]
    odd = folded(names, lambda name: name.startswith(("h.1/", "h.3/", "h.5/")))
    assert [node.label for node in odd[0].children] == ["{0..4..2}/", "{1..5..2}/"]
    assert [node.label for node in folded(["x1", "x2"], len)] == ["x1", "x2"]
    assert [node.label for node in folded(["x1", "x2", "x4", "x05", "y"], lambda _: 0)] == ["x{1,2,4}", "x05", "y"]
    assert [node.label for node in folded(["x1", "x2", "x4", "x7", "x8", "x9", "y"], lambda _: 0)] == [
        "x{1,2,4,7..9}",
        "y",
    ]
    assert [node.label for node in folded([f"l{i:02}" for i in range(12)], lambda _: 0)] == ["l{00..11}"]


def test_a_deep_name_is_cut_into_few_labels():
    (node,) = folded(["a/" * 100_000 + "b"], len)
    assert list(node.names) == ["a/" * 100_000 + "b"]


@given(NAMES, st.integers(1, 3))
def test_every_name_is_in_the_tree_once(names, kinds):
    def kind(name):
        return len(name) % kinds

    tree = folded(names, kind)
    found = [name for node in tree for name in node.names]
    assert sorted(found) == names
    for node, blocks, label in leaves(tree):
        assert len(node.own) == blocks
        assert len({kind(name) for name in node.own}) == 1
        assert blocks > 1 or (label,) == node.own


def test_a_node_knows_its_names():
    assert list(Node(label="a/", children=(Node(label="b", own=("a/b",)),)).names) == ["a/b"]


@given(st.integers(0, 10**24))
def test_a_size_has_few_digits_and_is_close(nbytes):
    number, _, unit = size_text(nbytes).partition(" ")
    scale = 1000 ** ("B", "kB", "MB", "GB", "TB", "PB", "EB").index(unit)
    assert len(number) <= 5 or unit == "EB"
    assert math.isclose(float(number) * scale, nbytes, rel_tol=0.06)
    assert size_text(nbytes, exact=True) == str(nbytes)
