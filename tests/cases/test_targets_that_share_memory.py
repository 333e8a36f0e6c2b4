"""Two values for one memory: tied arrays and overlapping views as targets of ``load_into``."""

import numpy as np
import pytest

import varstore as vs
from varstore.errors import VariableMismatch

UNTOUCHED = -1.0


@pytest.fixture
def path(tmp_path):
    """A checkpoint of two variables that differ, and of one that equals the first."""
    rows = np.arange(12.0).reshape(4, 3)
    vs.save(tmp_path / "c", {"emb": rows, "head": rows + 100, "same": rows.copy()})
    return tmp_path / "c"


def tied():
    array = np.full((4, 3), UNTOUCHED)
    return {"emb": array, "head": array}


def viewed():
    array = np.full((4, 3), UNTOUCHED)
    return {"emb": array, "head": array[:]}


def overlapping():
    memory = np.full(15, UNTOUCHED)
    return {"emb": memory[:12].reshape(4, 3), "head": memory[3:].reshape(4, 3)}


@pytest.mark.parametrize("make", [tied, viewed, overlapping])
@pytest.mark.parametrize("verify", [False, True])
def test_different_values_for_one_memory_are_refused(path, make, verify):
    targets = make()
    with pytest.raises(VariableMismatch, match=r"emb.*head|head.*emb"):
        vs.load_into(targets, path, include=["emb", "head"], verify=verify)
    assert all((array == UNTOUCHED).all() for array in targets.values())


def test_rows_that_are_one_in_memory_take_no_different_values(path):
    row = np.full((1, 3), UNTOUCHED)
    target = np.lib.stride_tricks.as_strided(row, (4, 3), (0, 8), writeable=True)
    with pytest.raises(VariableMismatch, match="emb"):
        vs.load_into({"emb": target}, path, include="emb")
    assert (row == UNTOUCHED).all()


@pytest.mark.parametrize("make", [tied, viewed])
def test_equal_values_for_one_memory_are_loaded(path, make):
    targets = make()
    targets["same"] = targets.pop("head")
    report = vs.load_into(targets, path, include=["emb", "same"])
    assert sorted(report.loaded) == ["emb", "same"]
    assert targets["emb"].tolist() == np.arange(12.0).reshape(4, 3).tolist()


@pytest.mark.parametrize("choice", ["first", "last"])
@pytest.mark.parametrize("order", [["emb", "head"], ["head", "emb"]])
def test_one_of_them_is_loaded_by_request(path, choice, order):
    array = np.full((4, 3), UNTOUCHED)
    targets = dict.fromkeys(order, array)
    vs.load_into(targets, path, include=["emb", "head"], on_tied=choice)
    wanted = order[0] if choice == "first" else order[-1]
    assert array[0, 0] == {"emb": 0, "head": 100}[wanted]
