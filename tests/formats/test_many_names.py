"""Opening a file of many names costs a few calls per name, and makes arrays only of those that are asked for.

How long it takes beside the safetensors library is a row of `tools/bench`.
"""

import cProfile
import json
import pstats
import struct

import numpy as np
import pytest

import varstore as vs
from varstore.formats import safetensors
from varstore.values.lazy import LazyArray


def write(path, count):
    header, end = {}, 0
    for number in range(count):
        header[f"model.layers.{number // 10}.weight_{number}"] = {
            "dtype": "F32", "shape": [2, 1 + number % 3], "data_offsets": [end, end := end + 8 * (1 + number % 3)],
        }  # fmt: skip
    text = json.dumps({"__metadata__": {"tied": "model.layers.0.weight_3"}, **header}).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + np.arange(end // 4, dtype="<f4").tobytes())


def calls(work):
    profile = cProfile.Profile()
    profile.runcall(work)
    return pstats.Stats(profile).total_calls


def test_each_name_of_safetensors_costs_a_few_calls(tmp_path):
    few, many = 1000, 3000
    for count in (few, many):
        write(tmp_path / f"{count}.safetensors", count)
        safetensors.read(str(tmp_path / f"{count}.safetensors"))
    cost = {count: calls(lambda: list(vs.read(tmp_path / f"{count}.safetensors"))) for count in (few, many)}  # noqa: B023
    assert (cost[many] - cost[few]) / (many - few) < 12


def test_arrays_are_made_when_they_are_asked_for(tmp_path, monkeypatch):
    write(tmp_path / "x.safetensors", 1000)
    made = []
    make = LazyArray.__init__
    monkeypatch.setattr(
        LazyArray, "__init__", lambda self, *given, **named: made.append(1) or make(self, *given, **named)
    )
    opened = vs.read(tmp_path / "x.safetensors")
    assert (len(opened), len(list(opened)), "tied" in opened, "none" in opened, len(made)) == (
        1001,
        1001,
        True,
        False,
        0,
    )
    array = opened["model.layers.0.weight_4"]
    assert array.tolist() == [[14, 15], [16, 17]]
    assert array.name == "model.layers.0.weight_4"
    assert opened["model.layers.0.weight_4"] is array
    assert opened["tied"] is opened["model.layers.0.weight_3"]
    assert len(made) == 2
    state = opened.state()
    assert list(state) == list(opened) == list(opened.tree)
    assert state["tied"] is state["model.layers.0.weight_3"]
    with pytest.raises(vs.errors.VariableNotFound):
        opened["none"]
