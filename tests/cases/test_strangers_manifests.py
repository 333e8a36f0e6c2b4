"""Manifests that ask for more time or memory than they are worth, or for what no state holds."""

import contextlib

import numpy as np
import pytest
from support.confined import confined
from support.crafted import checkpoint, entry

import varstore as vs
from varstore.errors import FormatError, ManifestError, VariableMismatch

MIB = 1 << 20
PRIME = (1 << 61) - 1
"""Integers that are multiples of it all have the hash 0."""


COLLIDING = {
    "set": lambda count: {"$": "set", "items": [PRIME * i for i in range(1, count)]},
    "frozenset": lambda count: {"$": "frozenset", "items": [PRIME * i for i in range(1, count)]},
    "dict": lambda count: {"$": "dict", "items": [[PRIME * i, None] for i in range(1, count)]},
    "Counter": lambda count: {"$": "Counter", "items": [[PRIME * i, 1] for i in range(1, count)]},
}


@pytest.mark.parametrize("kind", COLLIDING)
def test_integers_that_collide(tmp_path, kind):
    assert len(vs.load_state(checkpoint(tmp_path / "small", tree=COLLIDING[kind](3)))) == 2
    with contextlib.suppress(FormatError):
        many = checkpoint(tmp_path / "many", tree=COLLIDING[kind](24_000))
        confined("tell(len(vs.load_state(argv[0])))", many, seconds=20, cpu=1)


def named(type="A", fields=("x",), items=(1,)):
    return {"$": "namedtuple", "type": type, "fields": list(fields), "items": list(items)}


ODD = {
    "fields equal after NFKC": named(fields=("a", "\u00aa"), items=(1, 2)),
    "too many types": [named(f"A{i}", (), ()) for i in range(65)],
    "too many fields": named(fields=[f"f{i}" for i in range(257)], items=[0] * 257),
    "a field of code": named(fields=("x=__import__('os')",)),
    "a type of code": named(type="A');open('canary','w')#"),
    "a field with underscores": named(fields=("__debug__",)),
    "no fields": {"$": "namedtuple", "type": "A"},
    "a scalar without bytes": {"$": "scalar", "type": "float32", "hex": ""},
    "a scalar of two": {"$": "scalar", "type": "float32", "hex": "00000000000000ff"},
    "a scalar of half": {"$": "scalar", "type": "float32", "hex": "0000"},
    "an unknown kind": {"$": "eval", "items": []},
    "a kind that is a list": {"$": ["dict"], "items": []},
    "a Counter of text": {"$": "Counter", "items": "ab"},
    "a pair of nothing": ({"$": "dict", "items": [[]]}, ()),
    "a pair of three": {"$": "OrderedDict", "items": [[1, 2, 3]]},
    "no items": {"$": "tuple"},
    "items that are a number": {"$": "tuple", "items": 3},
    "a key that is a list": {"$": "dict", "items": [[[1], 2]]},
    "a key that is Infinity": '{"$":"dict","items":[[Infinity,1]]}',
    "a deep list": "[" * 100_000 + "]" * 100_000,
    "deep keys": '{"$":"dict","items":[[' + '{"$":"tuple","items":[' * 5000 + "]}" * 5000 + ",1]]}",
    "no JSON": "{",
}  # fmt: skip


TENSOR = {"$": "array", "name": "x", "type": "torch.Tensor"}
ODD_TENSORS = {
    **{
        f"a tensor on {place!r}": {**TENSOR, "device": place}
        for place in ("meta", "hpu:0", "privateuseone", "cpu:x", "", 3)
    },
    "integers with a gradient": {**TENSOR, "requires_grad": True},
    "a tensor in itself": {**TENSOR, "view": {"of": "x", "offset": 0, "strides": [1]}},
    "a tensor in nothing": {**TENSOR, "view": {"of": "y", "offset": 0, "strides": [1]}},
    "a tensor at Infinity": '{"$":"array","name":"x","type":"torch.Tensor","view":'
    '{"of":"x","offset":Infinity,"strides":[1]}}',
}


@pytest.mark.parametrize("name", ODD_TENSORS)
def test_a_tensor_that_no_state_has(tmp_path, name):
    path = checkpoint(tmp_path / "c", tree=ODD_TENSORS[name], entries=[entry("x")], folders={"x": b"\1"})
    with pytest.raises(ManifestError):
        vs.load_state(path)


def test_states_with_named_tuples_that_are_loaded_one_after_the_other_have_one_type(tmp_path):
    first, second = (vs.load_state(checkpoint(tmp_path / name, tree=named())) for name in "ab")
    assert type(first) is type(second)


@pytest.mark.parametrize("name", ODD)
def test_a_tree_that_no_state_has(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ManifestError):
        vs.load_state(checkpoint(tmp_path / "c", tree=ODD[name]))
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize(
    ("tree", "state"),
    [
        ({"$": "dict", "items": [[{"$": "float", "hex": "7ff8000000000000"}, 1]]}, "{nan: 1}"),
        (named(type="__import__"), "__import__(x=1)"),
        (named(fields=("print",)), "A(print=1)"),
        ({"$": "int", "hex": "-0x1f"}, "-31"),
    ],
)
def test_a_tree_that_is_odd_and_right(tmp_path, tree, state):
    assert repr(vs.load_state(checkpoint(tmp_path / "c", tree=tree))) == state


@pytest.mark.parametrize("part", ["n", "n/", "é"])
def test_a_name_over_4096_bytes(tmp_path, part):
    path = checkpoint(tmp_path / "c", entries=[entry(part * 4096 + "n", folder="x")], folders={"x": b"\1"})
    with pytest.raises(ManifestError, match="name"):
        vs.open(path)


def test_a_name_of_4096_bytes_at_most(tmp_path):
    path = checkpoint(tmp_path / "c", entries=[entry("n" * 4096, folder="x")], folders={"x": b"\1"})
    assert vs.load(path)["n" * 4096].tolist() == [1]


LISTING = """
from click.testing import CliRunner
from varstore.cli import main
tell([len(line) for line in CliRunner().invoke(main, ["ls", argv[0]]).output.splitlines()])
"""


def test_a_listing_is_not_as_wide_as_a_file_says(tmp_path):
    rows = [entry("L" * 100_000, folder="x"), *(entry(str(i)) for i in range(50))]
    lines = confined(LISTING, checkpoint(tmp_path / "c", entries=rows, folders={"x": b"\1"}), seconds=20)
    assert max(lines, default=0) <= 5000


@pytest.mark.parametrize(("count", "memory"), [(100_000, 64 + 64 * 1), (700_000, 64 + 64 * 6)])
def test_entries_that_say_nothing_but_a_name(tmp_path, count, memory):
    path = checkpoint(tmp_path / "c", entries=[b"\n\x05%05x" % i for i in range(count)])
    with contextlib.suppress(FormatError):
        confined("tell(len(vs.open(argv[0])))", path, seconds=20, memory=memory * MIB)


def test_aliases_of_a_variable_with_many_digests(tmp_path):
    size = 1 << 44
    rows = [entry("a", size=size, digests=bytes(size >> 20))]
    path = checkpoint(tmp_path / "c", entries=[*rows, *(entry(f"b{i}", size=size, alias_of="a") for i in range(200))])
    with contextlib.suppress(FormatError):
        confined("tell(len(vs.verify(argv[0]).problems))", path, seconds=20, cpu=1, memory=256 * MIB)


def test_load_into_a_model_whose_names_are_unlike_a_long_one(tmp_path):
    name = "/".join(["a"] * 2000)
    path = checkpoint(tmp_path / "c", entries=[entry(name, folder="x")], folders={"x": b"\1"})
    code = "vs.load_into({'w': np.zeros(1, 'i1'), 'z': np.zeros(2, 'i1')}, argv[0], on_mismatch='skip')"
    with pytest.raises(VariableMismatch, match="2 missing, 1 unexpected"):
        confined(code, path, seconds=20, cpu=1)
    assert np.asarray(vs.open(path)[name]).tolist() == [1]
