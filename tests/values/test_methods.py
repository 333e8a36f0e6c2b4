"""A variable and a lazy array behave as the array that they read: results, types, errors."""

import math
import re

import numpy as np
import pytest

import varstore as vs

pytestmark = pytest.mark.core

TABLE = np.arange(12, dtype=np.float32).reshape(3, 4) - 5
WHOLE = np.array([[7, 0, 3], [1, 2, 250]], np.uint8)
ONE = np.array(2.5)
COLUMN = np.array([[3]], np.int64)
EMPTY = np.zeros((0, 3), np.float32)
VALUES = {"table": TABLE, "whole": WHOLE, "one": ONE, "column": COLUMN, "empty": EMPTY}

EXPRESSIONS = [
    *("x + 1", "1 + x", "x - x", "2 - x", "x * 2", "np.float32(2) * x", "x / 2", "1 / (x + 100)", "x // 2"),
    *("7 // (x + 100)", "x % 3", "250 % (x + 100)", "divmod(x, 3)", "divmod(9, x + 100)", "x ** 2", "2 ** x"),
    *("-x", "+x", "abs(x)", "~x", "x & 3", "3 & x", "x | 1", "x ^ 1", "x << 1", "1 << x", "x >> 1", "1 >> x"),
    *("x @ x.T", "x.T @ x", "[1] @ x", "x == 1", "x != x", "x < 2", "x <= 2", "x > x.mean()", "2 >= x"),
    *("x == 'text'", "x == None", "x in [1]", "np.ones(x.shape) + x", "np.ones(x.shape, 'f4') @ x.T"),
    *("np.ones(x.shape) == x", "x + [1]", "x + 'text'", "bool(x)", "int(x)", "float(x)", "complex(x)"),
    *("hash(x) * 0", "range(3)[x]", "math.floor(x)", "f'{x:.2f}'", "len(x)", "list(x)[-1]", "next(iter(x))"),
    *("1 in x", "99 in x", "[row.sum() for row in x]", "x[0]", "x[..., 1]", "x.shape", "x.ndim", "x.size"),
    *("x.itemsize", "x.nbytes", "x.dtype", "x.T", "x.real", "x.imag", "list(x.flat)", "x.astype('f8')"),
    *("x.astype(int, copy=False)", "x.byteswap()", "x.clip(0, 2)", "x.clip(max=2)", "x.conj()", "x.copy()"),
    *("x.copy('F').flags.f_contiguous", "x.cumsum(axis=0)", "x.cumprod()", "x.diagonal()", "x.flatten()"),
    *("x.ravel('F')", "x.repeat(2, axis=0)", "x.reshape(-1)", "x.reshape(2, -1)", "x.reshape(5, 5)"),
    *("x.round(1)", "x.squeeze()", "x.squeeze(0)", "x.swapaxes(0, 1)", "x.transpose()", "x.transpose(1, 0)"),
    *("x.view(np.uint8)", "x.all()", "x.any(axis=0)", "x.argmax()", "x.argmin(axis=-1)", "x.argsort()"),
    *("x.argpartition(0)", "x.dot(2)", "x.max()", "x.max(axis=9)", "x.mean(axis=0, keepdims=True)"),
    *("x.min(initial=-1)", "x.nonzero()", "x.prod()", "x.std(ddof=1)", "x.sum()", "x.sum(axis=1, dtype='f8')"),
    *("x.take([0, 1], axis=0)", "x.trace()", "x.var()", "x.item()", "x.item(1)", "x.tobytes()", "x.tolist()"),
    *("x.ravel().searchsorted(1)", "x.compress([True], axis=0)", "np.mean(x)", "np.sum(x, axis=0)"),
    *("np.concatenate([x, x])", "np.stack([x, x], axis=-1)", "np.where(x > 1, x, 0)", "np.linalg.norm(x)"),
    *("np.sqrt(abs(x))", "np.add.reduce(x)", "np.maximum(x, 1)", "np.zeros_like(x)", "np.shape(x)"),
    *("np.allclose(x, x)", "np.array_equal(x, x)", "np.isnan(x).any()", "np.percentile(x, 50)", "np.split(x, 1)"),
    *("np.asarray(x)", "np.array(x, 'f8')", "np.asarray(x, np.int32)", "np.ravel(x)", "np.ndim(x)"),
    *("np.expand_dims(x, 0)", "x.sort_of()", "x.sum(nonsense=1)", "x(1)", "x.reshape('a')"),
]  # fmt: skip


@pytest.fixture(scope="module")
def subjects(tmp_path_factory):
    folder = tmp_path_factory.mktemp("methods")
    opened = vs.save(folder / "c", VALUES, durable=False)
    vs.write(folder / "a.npz", VALUES)
    foreign = vs.read(folder / "a.npz")
    return {name: (opened[name], foreign.lazy(name)) for name in VALUES}


def outcome(expression, subject):
    """What an expression gives, made comparable: types, shapes, bytes, or the error."""
    try:
        return seen(eval(expression, {"np": np, "math": math}, {"x": subject}))
    except Exception as error:
        text = str(error).replace(f"'{type(subject).__name__}'", "'numpy.ndarray'")
        return type(error), re.sub(r"'<[fi]\d'", lambda spelt: repr(np.dtype(spelt[0][1:-1]).name), text)


def seen(value):
    if isinstance(value, (list, tuple)):
        return type(value), [seen(item) for item in value]
    if isinstance(value, (np.ndarray, np.generic)):
        return type(value), value.dtype, value.shape, value.tobytes()
    return type(value), value.name if isinstance(value, np.dtype) else repr(value)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", VALUES)
@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_an_expression_gives_what_it_gives_of_the_array(subjects, name, expression):
    expected = outcome(expression, VALUES[name])
    if expression == "hash(x) * 0":  # an array has no hash; what is on disk can be a key
        expected = (int, "0")
    for subject in subjects[name]:
        assert outcome(expression, subject) == expected


@pytest.mark.parametrize("which", [0, 1], ids=["variable", "lazy array"])
def test_nothing_changes_it_in_place(subjects, which):
    subject = subjects["table"][which]
    before = subject
    subject += 1
    assert type(subject) is np.ndarray
    assert np.array_equal(subject, TABLE + 1)
    assert np.array_equal(before, TABLE)
    with pytest.raises(TypeError):
        before[0] = 1
    with pytest.raises(TypeError):
        np.add(TABLE, 1, out=before)
    assert not any(hasattr(before, name) for name in ("sort", "fill", "partition", "put", "resize", "__iadd__"))
    target = TABLE.copy()
    target += before
    assert np.array_equal(target, 2 * TABLE)


@pytest.mark.parametrize("which", [0, 1], ids=["variable", "lazy array"])
def test_it_is_a_key_and_is_found_among_others(subjects, which):
    subject = subjects["table"][which]
    assert {subject: 1}[subject] == 1
    assert subject in {subject}
    assert subject in [subject, None]


def test_iteration_over_rows_reads_a_few_at_a_time(tmp_path, monkeypatch):
    rows = np.arange(3 << 20, dtype=np.float32).reshape(-1, 4)
    variable = vs.save(tmp_path / "c", {"a": rows}, durable=False)["a"]
    read: list[int] = []
    part = type(variable).__getitem__
    monkeypatch.setattr(type(variable), "__getitem__", lambda self, index: read.append(1) or part(self, index))
    assert all(map(np.array_equal, variable, rows))
    assert len(read) == 3


def test_only_what_needs_the_values_reads_them(subjects, monkeypatch):
    def refuse(self, *_):
        raise AssertionError("read")

    for subject in subjects["table"]:
        monkeypatch.setattr(type(subject), "numpy", refuse)
        assert (subject.shape, subject.ndim, subject.size) == ((3, 4), 2, 12)
        assert (subject.dtype, subject.itemsize, subject.nbytes, len(subject)) == (np.float32, 4, 48, 3)
        assert hasattr(subject, "mean")
        assert callable(subject.sum)
        assert repr(subject)
        assert str(subject) == f"{subject}"
