"""A state of which variables are lost: the rest comes back, and what is lost is named."""

from __future__ import annotations

import logging
import shutil
from collections import OrderedDict, namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

import varstore as vs
from varstore.layout.names import MANIFEST, MARKER

Pair = namedtuple("Pair", "first second")


def state() -> dict[str, Any]:
    shared = np.arange(3.0)
    return {
        "model": OrderedDict(w=np.ones(2), b=np.zeros(2)),
        "layers": [np.full(2, 7.0), {"m": np.full(2, 8.0), "lr": 0.1}],
        "pair": Pair(np.full(2, 9.0), 5),
        "moments": {0: np.full(2, 1.5), 1: np.full(2, 2.5)},
        "tied": [shared, shared],
        "step": 3,
    }


def lose(folder: Path, name: str, how: str) -> None:
    if how == "gone":
        shutil.rmtree(folder / name)
    else:
        (folder / name / "out").unlink()
        (folder / name / "out").write_bytes(b"short")


def without(state: dict[str, Any], lost: set[str]) -> dict[str, Any]:
    """The model: what is left of the state above."""
    for path, container, key in (
        ("model/w", state["model"], "w"),
        ("model/b", state["model"], "b"),
        ("layers/1/m", state["layers"][1], "m"),
        ("moments/0", state["moments"], 0),
        ("moments/1", state["moments"], 1),
    ):
        if path in lost:
            del container[key]
    if "layers/0" in lost:
        state["layers"][0] = None
    if "pair/first" in lost:
        state["pair"] = state["pair"]._replace(first=None)
    if "tied/0" in lost:
        state["tied"] = [None, state["tied"][1]]
    return state


LOSABLE = ["model/w", "model/b", "layers/0", "layers/1/m", "pair/first", "moments/0", "moments/1", "tied/0"]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lost=st.sets(st.sampled_from(LOSABLE), min_size=1), how=st.sampled_from(["gone", "short"]), marker=st.booleans())
def test_the_rest_comes_back_and_the_warning_names_the_lost(
    tmp_path: Path, caplog: Any, lost: set[str], how: str, marker: bool
) -> None:
    shutil.rmtree(tmp_path / "c", ignore_errors=True)
    vs.save_state(tmp_path / "c", state(), durable=False)
    for name in lost:
        lose(tmp_path / "c", name, how)
    if not marker:
        (tmp_path / "c" / MARKER).unlink()
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="varstore"):
        left = vs.load_state(vs.open(tmp_path / "c", allow_incomplete=True))
    assert repr(left) == repr(without(state(), lost))
    assert type(left["model"]) is OrderedDict
    (warning,) = [record.getMessage() for record in caplog.records]
    assert all(name in warning for name in lost)
    assert not any(name in warning for name in set(LOSABLE) - lost)


def test_without_a_manifest_the_rest_comes_back_by_name(tmp_path: Path, caplog: Any) -> None:
    vs.save_state(tmp_path / "c", state())
    (tmp_path / "c" / MANIFEST).unlink()
    lose(tmp_path / "c", "model/b", "short")
    left = vs.load_state(vs.open(tmp_path / "c", allow_incomplete=True))
    assert "model/w" in left
    assert "model/b" not in left
    assert "model/b" in caplog.text


def test_a_whole_state_is_told_nothing_of(tmp_path: Path, caplog: Any) -> None:
    vs.save_state(tmp_path / "c", state())
    assert repr(vs.load_state(vs.open(tmp_path / "c", allow_incomplete=True))) == repr(state())
    assert not caplog.records


def test_a_tree_that_names_a_stranger_stays_an_error(tmp_path: Path) -> None:
    tree = '{"a":{"$":"array","name":"nowhere"},"w":{"$":"array","name":"w"}}'
    vs.save(tmp_path / "c", {"w": np.ones(2)}, tree=tree)  # type: ignore[call-arg]
    with pytest.raises(vs.errors.ManifestError, match="does not exist"):
        vs.load_state(vs.open(tmp_path / "c", allow_incomplete=True))
