"""Keys that are equal once they are joined by ``/``: every array has a name of its own, and the state is whole."""

from __future__ import annotations

import time

import numpy as np
import pytest

import varstore as vs
from varstore.values.nodes import Names


def _state() -> dict[str, object]:
    return {
        "p": [np.zeros(1), np.ones(1)],
        "p/0": np.full(1, 2.0),
        "p/0~2": np.full(1, 3.0),
        "q": {1: np.full(1, 4.0), "1": np.full(1, 5.0)},
        "epoch": 3,
    }


@pytest.mark.parametrize("file", ["a.pt", "a.pdckpt", "a.mge"])
def test_a_file_opens_with_the_names_that_save_state_gives(tmp_path, file):
    vs.write(tmp_path / file, _state())
    opened = vs.read(tmp_path / file)
    saved = vs.save_state(tmp_path / "saved", _state())
    assert {name: float(opened[name][0]) for name in opened} == {name: float(saved[name][0]) for name in saved}
    assert opened["p/0~2"][0] == 2
    assert opened["p/0~2~2"][0] == 3
    assert opened.state()["p"][0] == 0
    assert opened.state()["p/0"] == 2
    assert opened.state()["epoch"] == 3


def test_part_of_the_state_is_chosen_by_these_names(tmp_path):
    vs.write(tmp_path / "a.pt", _state())
    opened = vs.read(tmp_path / "a.pt")
    assert opened.state(include="p/0~2") == {"p/0": np.full(1, 2.0)}
    assert opened.state(include="p/0") == {"p": [np.zeros(1), None]}
    assert opened.state(include="q/1~2", rename={"q": "r"}) == {"r": {"1~2": np.full(1, 5.0)}}


def test_such_a_file_is_converted_both_ways(tmp_path):
    vs.write(tmp_path / "a.pt", _state())
    assert vs.convert(tmp_path / "a.pt", tmp_path / "flat.npz").names == tuple(vs.read(tmp_path / "a.pt"))
    vs.convert(tmp_path / "a.pt", tmp_path / "whole")
    assert vs.load_state(tmp_path / "whole")["p/0"] == 2


def test_many_arrays_of_one_name_take_linear_time():
    def seconds(count: int) -> float:
        names = Names()
        before = time.process_time()
        assert [names.own("w") for _ in range(count)][-1] == f"w~{count}"
        return time.process_time() - before

    assert seconds(40_000) < 16 * max(seconds(10_000), 1e-3)
