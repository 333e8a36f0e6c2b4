"""Files of a few hundred bytes that made a reader raise what is not of varstore's tree, or read for seconds."""

from collections import Counter

import numpy as np
import pytest
from support import FIXTURES
from support.confined import confined

import varstore as vs
from varstore.errors import FormatError, ManifestError

CASES = FIXTURES / "cases"


def test_a_zip_member_without_a_name():
    with pytest.raises(FormatError, match="npz"):
        dict(vs.read(CASES / "empty_member_name.npz"))


def test_a_counter_of_lists_is_read_or_refused_by_name():
    try:
        state = vs.load_state(CASES / "tree_counter")
    except ManifestError:
        return
    assert state == {"c": Counter({"a": []})}


@pytest.mark.parametrize("suffix", ["pt", "mge", "pdparams"])
def test_a_counter_of_lists_is_converted_or_refused(tmp_path, suffix):
    try:
        vs.convert(CASES / "tree_counter", tmp_path / f"c.{suffix}")
    except vs.VarstoreError:
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("suffix", ["pt", "mge", "pdparams"])
def test_a_counter_survives_a_conversion(tmp_path, suffix):
    vs.save_state(tmp_path / "c", {"seen": Counter({"cat": 3, "dog": 2}), "w": np.ones(2, "f4")})
    vs.convert(tmp_path / "c", tmp_path / f"c.{suffix}")
    assert vs.read(tmp_path / f"c.{suffix}").state()["seen"] == {"cat": 3, "dog": 2}


def test_a_scalar_without_bytes():
    with pytest.raises(ManifestError, match="tree_empty_scalar"):
        vs.load_state(CASES / "tree_empty_scalar")


def test_chunks_that_are_absent_are_not_read_one_by_one():
    zeros = "values = vs.read(argv[0])['a']\ntell([values.shape, str(values.dtype), int(np.asarray(values).sum())])"
    assert confined(zeros, CASES / "absent_chunks.zarr", seconds=30, cpu=1) == [[20000], "uint8", 0]
