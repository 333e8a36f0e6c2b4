"""One function says what can be read, and everything that keeps a variable's values from being read is its error."""

import math

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, strategies as st

from varstore.disk.encodings.table import READERS
from varstore.errors import FormatError, MetaError, SizeMismatch, UnsupportedDtype, VarstoreError
from varstore.layout.dtypes import BY_NAME, TABLE
from varstore.layout.encodings import ENCODINGS, RAW
from varstore.layout.manifest import Entry
from varstore.layout.meta import Meta
from varstore.layout.names import Folder
from varstore.layout.readable import readable

pytestmark = pytest.mark.core

FLOAT = Meta(shape=(2, 3), data_type=BY_NAME["kFloat"])
WIDE = Meta(shape=(2, 3), data_type=BY_NAME["kBFloat16"])


def entry(meta=FLOAT, nbytes=24, **fields):
    return Entry(name="a/b", folder=Folder("a%/b"), meta=meta, nbytes=nbytes, **fields)


metas = st.builds(
    Meta,
    shape=st.lists(st.integers(0, 5), max_size=4).map(tuple),
    data_type=st.sampled_from(TABLE),
)


@given(metas, st.integers(0, 4), st.sampled_from([-1, 0, 0, 0, 1]), st.sampled_from(["raw", "brotli"]))
def test_what_is_readable_has_the_size_that_it_says(meta, width, more, encoding):
    width = width if meta.data_type.dtype is None or width == 4 else meta.data_type.dtype.itemsize
    nbytes = max(0, meta.elements * width + more)
    given_entry = entry(meta, nbytes, encoding=encoding)
    sizes = set() if meta.data_type.dtype is None else {meta.elements * meta.data_type.dtype.itemsize}
    sizes |= {4 * meta.elements} if meta.data_type.name == "kBFloat16" else set()
    if encoding != "raw" or nbytes not in sizes:
        with pytest.raises(VarstoreError) as caught:
            readable(given_entry, path="c")
        assert (caught.value.variable, caught.value.path[:6]) == ("a/b", "c/a%/b")
        return
    found = readable(given_entry, path="c")
    assert (found.entry, found.shape, found.dtype) == (given_entry, meta.shape, meta.data_type.dtype)
    assert found.nbytes == nbytes == math.prod(found.shape) * found.stored.itemsize
    assert found.stored == found.dtype or (found.stored, found.dtype) == (np.float32, ml_dtypes.bfloat16)


def test_four_bytes_of_bfloat16_are_float32():
    narrow, wide = readable(entry(WIDE, 12), path="c"), readable(entry(WIDE, 24), path="c")
    assert (narrow.dtype, narrow.stored) == (ml_dtypes.bfloat16, ml_dtypes.bfloat16)
    assert (wide.dtype, wide.stored) == (ml_dtypes.bfloat16, np.float32)
    none = readable(entry(WIDE._replace(shape=(0, 3)), 0), path="c")
    assert none.stored == ml_dtypes.bfloat16


@pytest.mark.parametrize(
    ("given_entry", "error", "says"),
    [
        (entry(None), MetaError, ["c/a%/b", "'a/b'"]),
        (entry(encoding="brotli"), FormatError, ["c/a%/b", "'brotli'", "'raw'", "Upgrade"]),
        (entry(None, encoding="brotli"), FormatError, ["'brotli'"]),
        (entry(FLOAT._replace(data_type=BY_NAME["kOFRecord"])), UnsupportedDtype, ["c/a%/b", "kOFRecord"]),
        (entry(nbytes=25), SizeMismatch, ["c/a%/b/out", "25 bytes", "24 bytes", "float32"]),
        (entry(nbytes=0), SizeMismatch, ["c/a%/b/out", "0 bytes", "24 bytes"]),
    ],
)
def test_what_is_not_readable_says_why(given_entry, error, says):
    with pytest.raises(error) as caught:
        readable(given_entry, path="c")
    assert type(caught.value) is error
    for part in says:
        assert part in str(caught.value)


def test_every_encoding_has_a_reader():
    assert READERS.keys() == ENCODINGS.keys()
    assert [name for name, row in ENCODINGS.items() if row.name != name] == []
    assert ENCODINGS["raw"] is RAW
