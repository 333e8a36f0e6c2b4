"""Targets that share memory: equal values load, different ones are an error or a choice, and chance decides nothing."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

import varstore as vs
from varstore.errors import DigestMismatch, UsageError, VariableMismatch
from varstore.model.match import compare
from varstore.model.moves import LateTarget, Place, fill, move_of, place_of
from varstore.model.ties import settle

ONE, TWO = np.full((4, 5), 1, np.float32), np.full((4, 5), 2, np.float32)


def saved(tmp_path, manifest=True, **values):
    return vs.save(tmp_path / "c", values, durable=False, manifest=manifest)


SOURCES = {
    "checkpoint": saved,
    "without digests": lambda tmp_path, **values: saved(tmp_path, manifest=False, **values),
    "arrays": lambda _, **values: values,
    "one array, one checkpoint": lambda tmp_path, **values: {
        **values,
        **vs.save(tmp_path / "c", {"emb": values["emb"]}, durable=False),
    },
}


@pytest.mark.parametrize("kind", SOURCES)
def test_equal_values_for_one_array_under_two_names_load(tmp_path, kind):
    array = np.zeros((4, 5), np.float32)
    source = SOURCES[kind](tmp_path, emb=ONE, head=ONE.copy())
    report = vs.load_into({"emb": array, "head": array}, source)
    assert sorted(report.loaded) == ["emb", "head"]
    assert np.array_equal(array, ONE)


@pytest.mark.parametrize("kind", SOURCES)
@pytest.mark.parametrize("order", [("emb", "head"), ("head", "emb")])
def test_different_values_for_one_array_are_refused_or_chosen(tmp_path, kind, order):
    array = np.zeros((4, 5), np.float32)
    source = SOURCES[kind](tmp_path, emb=ONE, head=TWO)
    targets = dict.fromkeys(order, array)
    with pytest.raises(VariableMismatch, match=f"'{order[0]}' and '{order[1]}'") as caught:
        vs.load_into(targets, source)
    assert 'on_tied="first"' in caught.value.hint
    assert not array.any()
    values = {"emb": 1, "head": 2}
    for on_tied, name in (("first", order[0]), ("last", order[1])):
        report = vs.load_into(targets, source, on_tied=on_tied)
        assert (array == values[name]).all()
        assert sorted(report.loaded) == ["emb", "head"]
    with pytest.raises(UsageError, match="on_tied: unknown mode: found 'none', expected 'error' or 'first' or 'last'"):
        vs.load_into(targets, source, on_tied="none")


def test_large_tied_variables_never_look_damaged(tmp_path):
    """Each is larger than a digest block, and read by several threads."""
    one = np.arange(5 << 20, dtype=np.float32)
    checkpoint = saved(tmp_path, emb=one, head=one[::-1])
    array = np.zeros_like(one)
    with pytest.raises(VariableMismatch, match="'emb' and 'head'"):
        vs.load_into({"emb": array, "head": array}, checkpoint)
    assert not array.any()
    vs.load_into({"emb": array, "head": array}, checkpoint, on_tied="last", threads=4)
    assert np.array_equal(array, one[::-1])


def test_damage_in_a_tied_variable_is_told_as_damage(tmp_path):
    """The digests of the two are equal, so that no value is read before the one that is loaded."""
    checkpoint = saved(tmp_path, emb=ONE, head=ONE.copy())
    out = tmp_path / "c" / "emb" / "out"
    out.chmod(0o644)
    out.write_bytes(bytes(ONE.nbytes))
    array = np.zeros_like(ONE)
    with pytest.raises(DigestMismatch, match="'emb'"):
        vs.load_into({"emb": array, "head": array}, checkpoint)


def test_values_that_are_equal_once_converted(tmp_path):
    low, high = ONE.astype(np.float64), ONE.astype(np.float64) + 1e-12
    checkpoint = saved(tmp_path, emb=low, head=high)
    array, exact = np.zeros((4, 5), np.float32), np.zeros((4, 5))
    vs.load_into({"emb": array, "head": array}, checkpoint, cast=True)
    assert np.array_equal(array, ONE)
    with pytest.raises(VariableMismatch, match="share memory"):
        vs.load_into({"emb": exact, "head": exact}, checkpoint)


def test_bits_are_compared():
    array = np.zeros(2)
    vs.load_into({"a": array, "b": array}, {"a": np.array([np.nan, 1]), "b": np.array([np.nan, 1])})
    with pytest.raises(VariableMismatch):
        vs.load_into({"a": array, "b": array}, {"a": np.array([0.0, 1]), "b": np.array([-0.0, 1])})


def test_one_memory_as_two_types_and_byte_orders():
    array = np.zeros(3, "<f4")
    one = np.array([1, 2, 3], np.float32)
    vs.load_into({"f": array, "i": array.view("<i4")}, {"f": one, "i": one.view(np.int32)})
    assert np.array_equal(array, one)
    with pytest.raises(VariableMismatch, match="'f' and 'i'"):
        vs.load_into({"f": array, "i": array.view("<i4")}, {"f": one, "i": np.array([1, 2, 3], np.int32)})


def test_tied_targets_of_which_corners_are_loaded(tmp_path):
    array = np.zeros((3, 3))
    wide, high = np.full((2, 4), 5.0), np.full((4, 1), 5.0)
    vs.load_into({"wide": array, "high": array}, saved(tmp_path, wide=wide, high=high), on_mismatch="overlap")
    assert array.tolist() == [[5, 5, 5], [5, 5, 5], [5, 0, 0]]
    array[...] = 0
    with pytest.raises(VariableMismatch, match="'wide' and 'high'"):
        vs.load_into({"wide": array, "high": array}, {"wide": wide, "high": high + 1}, on_mismatch="overlap")
    assert not array.any()
    vs.load_into(
        {"wide": array, "high": array}, {"wide": wide, "high": high + 1}, on_mismatch="overlap", on_tied="first"
    )
    assert array.tolist() == [[5, 5, 5], [5, 5, 5], [6, 0, 0]]


def test_views_that_only_lie_between_each_other_are_loaded_as_always(tmp_path):
    whole = np.zeros((4, 3))
    values = {str(i): np.arange(4.0) + i for i in range(3)}
    vs.load_into({str(i): whole[:, i] for i in range(3)}, saved(tmp_path, **values))
    assert np.array_equal(whole, np.stack(list(values.values()), axis=1))


def test_a_target_that_shows_one_row_many_times(tmp_path):
    row = np.zeros(5, np.float32)
    target = np.lib.stride_tricks.as_strided(row, (4, 5), (0, 4))
    vs.load_into({"w": target}, {"w": ONE})
    assert row.tolist() == [1] * 5
    different = saved(tmp_path, w=np.arange(20, dtype=np.float32).reshape(4, 5))
    for on_tied in ("error", "first", "last"):
        with pytest.raises(VariableMismatch, match="'w', whose own elements") as caught:
            vs.load_into({"w": target}, different, on_tied=on_tied)
        assert "on_tied" not in caught.value.hint
        assert row.tolist() == [1] * 5


def test_a_target_of_which_parts_are_one_memory_in_large_chunks(tmp_path):
    """The rows that meet come in different chunks of the reading."""
    row = np.zeros(3 << 20, np.uint8)
    target = np.lib.stride_tricks.as_strided(row, (3, 3 << 20), (0, 1))
    values = np.ones((3, 3 << 20), np.uint8)
    vs.load_into({"w": target}, saved(tmp_path, w=values))
    assert row.all()
    values[2, 7] = 9
    with pytest.raises(VariableMismatch, match="'w', whose own elements"):
        vs.load_into({"w": target}, vs.save(tmp_path / "d", {"w": values}, durable=False))


def test_all_conflicts_are_listed():
    pairs = {f"{i}": np.zeros(2) for i in range(12)}
    targets = {name + side: array for name, array in pairs.items() for side in "ab"}
    source = {name: np.full(2, float(name[-1] == "a")) for name in targets}
    with pytest.raises(VariableMismatch) as caught:
        vs.load_into(targets, source)
    for number in range(10):
        assert f"'{number}a' and '{number}b'" in str(caught.value)
    assert "and 2 more" in str(caught.value)


def test_progress_counts_what_is_read(tmp_path):
    array, seen = np.zeros_like(ONE), []
    checkpoint = saved(tmp_path, emb=ONE, head=TWO)
    vs.load_into({"emb": array, "head": array}, checkpoint, on_tied="last", progress=lambda *now: seen.append(now))
    assert (seen[0], seen[-1]) == ((0, ONE.nbytes), (ONE.nbytes, ONE.nbytes))


def test_missing_targets_are_an_error_by_request(tmp_path):
    checkpoint = saved(tmp_path, w=ONE, other=TWO)
    targets = {"w": np.zeros_like(ONE), "b": np.full(3, 7.0)}
    with pytest.raises(VariableMismatch, match="1 missing"):
        vs.load_into(targets, checkpoint, missing="error")
    assert not targets["w"].any()
    report = vs.load_into(targets, checkpoint)
    assert report.missing == report.kept == ("b",)
    assert report.unexpected == report.unused == ("other",)
    for category in ("missing", "unexpected"):
        with pytest.raises(VariableMismatch):
            report.raise_for(category)
    assert vs.load_into({"w": targets["w"]}, checkpoint, missing="error").loaded == ("w",)


# --- every layout, against a byte-by-byte truth --------------------------------------------------------------------

BUFFER = 24


@st.composite
def views(draw):
    """Draw a view of a buffer: offset, shape and strides in elements of one byte."""
    shape = tuple(draw(st.lists(st.integers(1, 3), min_size=1, max_size=3)))
    strides = tuple(draw(st.integers(-4, 4)) for _ in shape)
    below = sum((extent - 1) * stride for extent, stride in zip(shape, strides, strict=True) if stride < 0)
    above = sum((extent - 1) * stride for extent, stride in zip(shape, strides, strict=True) if stride > 0)
    return draw(st.integers(-below, BUFFER - 1 - above)), shape, strides


def addresses(view):
    offset, shape, strides = view
    return [offset + sum(i * stride for i, stride in zip(index, strides, strict=True)) for index in np.ndindex(*shape)]


@settings(max_examples=400, deadline=None)
@given(
    chosen=st.lists(views(), min_size=1, max_size=4),
    seed=st.integers(0, 2**32 - 1),
    many=st.booleans(),
    on_tied=st.sampled_from(["error", "first", "last"]),
)
def test_any_views_of_one_buffer(chosen, seed, many, on_tied):
    """With `many` values conflicts are likely, without it views mostly agree."""
    rng = np.random.default_rng(seed)
    buffer = np.zeros(BUFFER, np.uint8)
    targets, source = {}, {}
    for number, (offset, shape, strides) in enumerate(chosen):
        targets[str(number)] = np.lib.stride_tricks.as_strided(buffer[offset:], shape, strides)
        source[str(number)] = rng.integers(1, 4 if many else 2, shape).astype(np.uint8)
    written: list[dict[int, set[int]]] = []
    for view, values in zip(chosen, source.values(), strict=True):
        bytes_at: dict[int, set[int]] = {}
        for address, value in zip(addresses(view), values.reshape(-1).tolist(), strict=True):
            bytes_at.setdefault(address, set()).add(value)
        written.append(bytes_at)
    folded = any(len(found) > 1 for bytes_at in written for found in bytes_at.values())
    clash = any(
        one[address] != other[address]
        for one, other in itertools.combinations(written, 2)
        for address in one.keys() & other.keys()
    )
    if folded or (clash and on_tied == "error"):
        with pytest.raises(VariableMismatch, match="share memory"):
            vs.load_into(targets, source, on_tied=on_tied)
        assert not buffer.any()
        return
    vs.load_into(targets, source, on_tied=on_tied)
    expected = np.zeros(BUFFER, np.uint8)
    for bytes_at in written[::-1] if on_tied == "first" else written:
        for address, found in bytes_at.items():
            (expected[address],) = found
    assert buffer.tolist() == expected.tolist()


# --- memory that is not the host's ---------------------------------------------------------------------------------


def moves_to(places, values, held=()):
    match = compare(
        {name: (place.shape, place.dtype) for name, place in places.items()},
        {name: (value.shape, value.dtype) for name, value in values.items()},
        {name: name for name in values},
    )
    got = {}
    moves = [
        move_of(
            pair,
            place
            if pair.target in held
            else LateTarget(
                place=place, present=lambda: np.zeros(0), hand_over=lambda new, at=pair.target: got.update({at: new})
            ),
            values[pair.source],
        )
        for pair in match.pairs
        for place in [places[pair.target]]
    ]
    return moves, got


def test_addresses_of_other_memory_are_compared_and_never_looked_at():
    place = Place("device", 4096, (4, 5), (20, 4), np.dtype(np.float32))
    elsewhere = place._replace(memory="another device")
    row = Place("device", 4096 + 20, (5,), (4,), np.dtype(np.float32))
    values = {"a": ONE, "b": TWO, "row": ONE[0]}
    moves, got = moves_to({"a": place, "b": elsewhere, "row": row}, values)
    settled = settle(moves, names=values, on_tied="error", verify=True)
    for move in (*settled.free, *settled.ordered):
        fill(move, verify=True)
    assert {name: value.flat[0] for name, value in got.items()} == {"a": 1, "b": 2, "row": 1}
    moves, _ = moves_to({"a": place, "row": row}, {"a": ONE, "row": TWO[0]})
    with pytest.raises(VariableMismatch, match="'a' and 'row'"):
        settle(moves, names=values, on_tied="error", verify=True)
    assert [move.pair.target for move in settle(moves, names=values, on_tied="first", verify=True).ordered] == [
        "row",
        "a",
    ]


def test_who_wins_where_somebody_else_writes():
    place = place_of(np.zeros((4, 5), np.float32))
    moves, _ = moves_to({"a": place, "b": place}, {"a": ONE, "b": TWO}, held=["a", "b"])
    assert settle(moves, names="ab", on_tied="last", verify=True).winners == {"a": "b"}
    moves, _ = moves_to(
        {"a": place, "row": place._replace(shape=(5,), strides=(4,))}, {"a": ONE, "row": TWO[0]}, held=["a"]
    )
    with pytest.raises(VariableMismatch, match="'a' and 'row'"):
        settle(moves, names=["a", "row"], on_tied="first", verify=True)
