"""The manifest's bytes: they come back as they were, and nothing torn, edited or contradictory gets through."""

from __future__ import annotations

import json
import re
import struct
import subprocess
import sys
import time
from collections.abc import Sequence

import ml_dtypes
import numpy as np
import pytest
import xxhash
from hypothesis import given, strategies as st
from support import FIXTURES, ROOT, names

from varstore._gen import manifest_pb2
from varstore.errors import InvalidName, ManifestError, MetaError, UsageError
from varstore.layout.dtypes import TABLE
from varstore.layout.manifest import (
    BLOCK,
    DIGEST_SIZE,
    FORMAT_VERSION,
    Entry,
    Manifest,
    attributes_json,
    block_count,
    frame,
    to_json,
)
from varstore.layout.meta import Meta
from varstore.layout.names import Folder, folder_of
from varstore.layout.regions import Region
from varstore.layout.shards import Shard

pytestmark = pytest.mark.core

GOLDEN = FIXTURES / "golden" / "manifest_v1"
FLOAT, BFLOAT16 = (next(row for row in TABLE if row.name == name) for name in ("kFloat", "kBFloat16"))

json_values = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(allow_nan=False),
        st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), inner, max_size=3),
    ),
    max_leaves=6,
)
attributes = st.dictionaries(st.text(st.characters(exclude_categories=["Cs"]), max_size=8), json_values, max_size=3)


@st.composite
def entries(draw: st.DrawFn, name: str) -> Entry:
    row = draw(st.sampled_from(TABLE))
    shape = tuple(draw(st.lists(st.integers(0, 3000), max_size=3)))
    meta = Meta(shape=shape, data_type=row)
    encoding = draw(st.sampled_from(["raw", "raw", "zarr", "later"]))
    raw_size = meta.elements * (row.dtype.itemsize if row.dtype is not None else draw(st.integers(1, 16)))
    nbytes = raw_size * draw(st.sampled_from([1, 2] if row is BFLOAT16 else [1]))
    content = b""
    if encoding == "zarr" and row.dtype is not None:
        index = Shard(shape, row.dtype).index_nbytes
        if index + 1 < raw_size:
            nbytes = draw(st.integers(index + 1, raw_size - 1))
            content = draw(st.sampled_from([b"", b"d" * DIGEST_SIZE * block_count(raw_size)]))
        else:
            encoding = "raw"
    elif encoding != "raw":
        nbytes = draw(st.integers(0, 1 << 40))
    count = block_count(nbytes)
    regions: tuple[Region, ...] = ()
    if encoding == "raw" and meta.elements and draw(st.booleans()):
        count = 0
        row_size = nbytes // shape[0] if shape else nbytes
        at = draw(st.integers(1, shape[0])) if shape else 0
        parts = [(0, at), (at, shape[0])] if shape and at < shape[0] else [(0, shape[0] if shape else 1)]
        regions = tuple(
            Region(
                (first, *(0 for _ in shape[1:])) if shape else (),
                (last - first, *shape[1:]) if shape else (),
                bytes(DIGEST_SIZE * block_count((last - first) * row_size)),
            )
            for first, last in parts
        )
    digest = draw(st.binary(min_size=DIGEST_SIZE, max_size=DIGEST_SIZE))
    return Entry(
        name=name,
        folder=draw(st.sampled_from([folder_of(name), Folder(f"literal {name}".replace("/", " "))])),
        meta=meta,
        nbytes=nbytes,
        digests=digest * count if count < 1000 and draw(st.booleans()) else b"",
        encoding=encoding,
        attributes=draw(attributes),
        meta_digest=draw(st.sampled_from([b"", digest])),
        witnessed=True,
        content_digests=content,
        regions=regions,
    )


@st.composite
def manifests(draw: st.DrawFn) -> Manifest:
    made: dict[str, Entry] = {name: draw(entries(name)) for name in draw(st.lists(names, unique=True, max_size=4))}
    if made and draw(st.booleans()):
        first = next(iter(made.values()))
        fields = {
            field: getattr(first, field)
            for field in ("meta", "nbytes", "digests", "encoding", "content_digests", "regions")
        }
        made["tied to it"] = Entry(
            name="tied to it", folder=Folder("tied"), alias_of=first.name, witnessed=True, **fields
        )
    return Manifest(
        writer=draw(st.text(st.characters(exclude_categories=["Cs"]), max_size=8)),
        time_ns=draw(st.integers(-(1 << 63), (1 << 63) - 1)),
        attributes=draw(attributes),
        tree=draw(st.one_of(st.just(""), json_values.map(json.dumps))),
        entries=made,
    )


def decode(data: bytes) -> Manifest:
    """Decode every entry, not only the list of names."""
    manifest = Manifest.decode(data, path="ckpt/manifest")
    for name in manifest.entries:
        assert manifest.entries[name].name == name
    return manifest


# --- round trip --------------------------------------------------------------------------------------------------


@given(manifests())
def test_a_manifest_comes_back_as_it_was(manifest):
    found = decode(manifest.encode())
    assert (found.writer, found.time_ns, found.tree) == (manifest.writer, manifest.time_ns, manifest.tree)
    assert dict(found.attributes) == dict(manifest.attributes)
    assert list(found.entries) == list(manifest.entries)
    assert dict(found.entries) == dict(manifest.entries)
    assert found.encode() == manifest.encode()


def test_the_header_is_what_the_docstring_says():
    body = manifest_pb2.Manifest(format_version=1, writer="w").SerializeToString()
    data = Manifest(writer="w", time_ns=0, attributes={}, tree="", entries={}).encode()
    assert data == b"varstore" + struct.pack("<IIQ", 1, 0, len(body)) + xxhash.xxh3_128_digest(body) + body


def test_the_golden_manifest_reads_as_its_json_says_and_is_written_the_same_today():
    manifest = decode(GOLDEN.read_bytes())
    truth = json.loads(GOLDEN.with_suffix(".json").read_text())
    variables = truth.pop("variables")
    assert {key: getattr(manifest, key) for key in truth} == truth
    assert list(manifest.entries) == [facts["name"] for facts in variables]
    for facts in variables:
        entry = manifest.entries[facts["name"]]
        assert entry.folder == facts.get("folder", facts["name"])
        assert entry.meta is not None
        assert (list(entry.meta.shape), entry.meta.data_type.name) == (facts["shape"], facts["type"])
        assert (entry.nbytes, entry.alias_of) == (facts["nbytes"], facts.get("alias_of", ""))
        assert (entry.digests.hex(), entry.meta_digest.hex()) == (
            facts.get("digests", ""),
            facts.get("meta_digest", ""),
        )
        assert (entry.encoding, dict(entry.attributes)) == (facts.get("encoding", "raw"), facts.get("attributes", {}))
        assert entry.witnessed
    assert manifest.encode() == GOLDEN.read_bytes()


def test_the_golden_is_what_its_tool_makes():
    done = subprocess.run([sys.executable, ROOT / "tools" / "make_golden.py"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("nbytes", "count"), [(0, 0), (1, 1), (BLOCK, 1), (BLOCK + 1, 2), (1 << 40, 1 << 16)])
def test_a_digest_covers_16_mib(nbytes, count):
    assert BLOCK == 16 * 1024 * 1024
    assert block_count(nbytes) == count


# --- torn and edited ---------------------------------------------------------------------------------------------


def test_every_flipped_byte_is_noticed():
    data = GOLDEN.read_bytes()
    for position in range(len(data)):
        for mask in (0x01, 0x80, 0xFF):
            damaged = bytearray(data)
            damaged[position] ^= mask
            with pytest.raises(ManifestError, match=r"^ckpt/manifest: "):
                Manifest.decode(bytes(damaged), path="ckpt/manifest")


def test_every_truncation_and_every_longer_file_is_noticed():
    data = GOLDEN.read_bytes()
    for length in range(len(data)):
        with pytest.raises(
            ManifestError, match=r"^ckpt/manifest: the manifest is torn: found [\d,]+ bytes?\b.*salvage"
        ):
            Manifest.decode(data[:length], path="ckpt/manifest")
    with pytest.raises(ManifestError, match="the manifest is torn"):
        Manifest.decode(data + b"\0", path="ckpt/manifest")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "the manifest is torn: found 0 bytes. Open with allow_incomplete=True"),
        (b"\x93NUMPY" + bytes(100), "not a varstore manifest: found 934e554d5059"),
        (b"varstore" + struct.pack("<IIQ", 1, 7, 0) + bytes(16), "not a varstore manifest"),
        (
            b"varstore" + struct.pack("<IIQ", 2, 0, 0) + bytes(16),
            "this version of varstore cannot read the format version: found 2, expected 1. A later version of",
        ),
        (b"varstore" + struct.pack("<IIQ", 1, 0, 0) + bytes(16), "was damaged or edited: its digest does not match"),
        (frame(b"\xff\xff\xff"), "the body is not a manifest"),
        (frame(b"\x12\x01\xff"), "the body is not a manifest"),  # a writer that is not UTF-8
        (frame(b""), "the format version of the body is not the one in its header: found 0, expected 1"),
        (frame(b"\x08\x02"), "the format version of the body is not the one in its header: found 2, expected 1"),
    ],
)
def test_each_kind_of_damage_is_told(data, message):
    with pytest.raises(ManifestError, match=message) as caught:
        Manifest.decode(data, path="ckpt/manifest")
    assert caught.value.path == "ckpt/manifest"


# --- hostile, behind a valid header ------------------------------------------------------------------------------

D = bytes(DIGEST_SIZE)
WEIGHT = {"name": "w", "shape": [2, 3], "data_type": FLOAT.number, "size": 24, "digests": D}


def halves(*, first: Sequence[int] = (1, 3), second: Sequence[int] = (1, 3), found: bytes = D, digests: bytes = b""):
    """Return the weight's rows as two regions, or what is said of them instead."""
    regions = [
        {"offsets": [0, 0], "sizes": first, "digests": D},
        {"offsets": [1, 0], "sizes": second, "digests": found},
    ]
    return {"digests": digests, "regions": regions}


HOSTILE_VARIABLES = {
    "folder up": ({"folder": "../x"}, r"variable 'w': the folder leads out of the checkpoint: found \.\./x"),
    "folder absolute": ({"folder": "/etc"}, "leads out of the checkpoint: found /etc"),
    "folder up later": ({"folder": "a/../../b"}, "leads out of the checkpoint"),
    "folder here": ({"folder": "."}, "leads out of the checkpoint"),
    "folder with an empty part": ({"folder": "a//b"}, "leads out of the checkpoint"),
    "folder with NUL": ({"folder": "a\0b"}, "leads out of the checkpoint"),
    "name up without a folder": ({"name": "../x"}, r"variable '\.\./x': the folder leads out"),
    "no name and no folder": ({"name": ""}, "variable '': the folder leads out"),
    "no name": ({"name": "", "folder": "w"}, "contradicts itself: a variable does not have a name"),
    "size too small": ({"size": 23}, r"contradicts itself: 23 bytes cannot hold shape \[2, 3\] of kFloat"),
    "size too large": ({"size": 25}, r"25 bytes cannot hold shape \[2, 3\] of kFloat"),
    "size huge": ({"size": (1 << 64) - 1}, "18,446,744,073,709,551,615 bytes cannot hold shape"),
    "shape larger": ({"shape": [2, 4]}, r"24 bytes cannot hold shape \[2, 4\]"),
    "type wider": ({"data_type": 3}, "24 bytes cannot hold .* of kDouble"),
    "bfloat16 of three bytes": ({"data_type": BFLOAT16.number, "size": 18}, "18 bytes cannot hold .* of kBFloat16"),
    "type zero": ({"data_type": 0}, "variable 'w': the data type is unknown: found 0"),
    "type unknown": ({"data_type": 999}, "the data type is unknown: found 999"),
    "type negative": ({"data_type": -1}, "the data type is unknown: found -1"),
    "dimension negative": ({"shape": [-2, -3]}, r"contradicts itself: a dimension is negative: found \[-2, -3\]"),
    "dimension of minus one": ({"shape": [-1]}, r"a dimension is negative: found \[-1\]"),
    "dimensions overflow": ({"shape": [1 << 62, 4], "size": 0}, "contradicts itself: the dimensions overflow"),
    "overflow beside a zero": ({"shape": [0, 1 << 62], "size": 0, "digests": b""}, "the dimensions overflow"),
    "too many dimensions": ({"shape": [1] * 65, "size": 4}, "too many dimensions: found 65, expected at most 64"),
    "digest short": ({"digests": D[:-1]}, "contradicts itself: 15 bytes of digests cannot cover 24 bytes"),
    "digest long": ({"digests": D + D}, "32 bytes of digests cannot cover 24 bytes"),
    "digest of nothing": ({"shape": [0], "size": 0}, "16 bytes of digests cannot cover 0 bytes"),
    "meta digest short": ({"meta_digest": b"abc"}, "contradicts itself: a digest of meta has 16 bytes, not 3"),
    "attributes torn": ({"attributes": '{"a":'}, "variable 'w': the attributes are not JSON"),
    "attributes a list": ({"attributes": "[1]"}, "variable 'w': the attributes are not a JSON object"),
    "attributes null": ({"attributes": "null"}, "the attributes are not a JSON object"),
    "attributes deep": ({"attributes": '{"a":' * 100_000}, "the attributes are not JSON"),
    "attributes with a huge integer": ({"attributes": '{"a":' + "9" * 5000 + "}"}, "the attributes are not JSON"),
    "digests and regions": (
        {"regions": [{"offsets": [0, 0], "sizes": [2, 3], "digests": D}]},
        "contradicts itself: there are digests of blocks and of regions",
    ),
    "regions that leave a gap": (halves(digests=b"", second=[1, 2]), r"of 5 elements in all, do not tile \[2, 3\]"),
    "regions that overlap": (halves(first=[2, 3]), r"of 9 elements in all, do not tile \[2, 3\]"),
    "a region outside": (halves(second=[2, 3]), r"the region \[1:3, 0:3\] does not lie within \[2, 3\]"),
    "a region that is negative": (halves(second=[-1, 3]), r"the region \[1:0, 0:3\] does not lie within"),
    "a region that overflows": (halves(second=[(1 << 63) - 1, 3]), "does not lie within"),
    "a region of other dimensions": (halves(second=[3]), "has 2 offsets and 1 size in 2 dimensions"),
    "a digest of a region short": (
        halves(found=D[:-1]),
        r"15 bytes of digests cannot cover the 12 bytes of the region",
    ),
    "a region without digest": (halves(found=b""), r"0 bytes of digests cannot cover .* region \[1:2, 0:3\]"),
    "digests of no region": (halves(found=D + D), "32 bytes of digests cannot cover the 12 bytes"),
    "regions of an encoded variable": (
        halves() | {"encoding": "zarr", "size": 21},
        "there are regions of the encoding 'zarr'",
    ),
    "regions of a type of no size": (
        halves() | {"data_type": 10, "size": 25},
        "25 bytes cannot hold 6 elements",
    ),
    "alias of nothing": ({"alias_of": "v"}, "alias of 'v', which does not have the same values"),
    "alias of itself": ({"alias_of": "w"}, "alias of 'w', which does not have the same values"),
}


def hostile(*variables: dict, **fields) -> bytes:
    listed = [manifest_pb2.Variable(**variable) for variable in variables]
    return frame(manifest_pb2.Manifest(format_version=FORMAT_VERSION, variables=listed, **fields).SerializeToString())


def test_the_variable_that_the_hostile_ones_are_made_from_is_good():
    (entry,) = decode(hostile(WEIGHT)).entries.values()
    assert (entry.name, entry.folder, entry.nbytes) == ("w", "w", 24)


@pytest.mark.parametrize("case", HOSTILE_VARIABLES)
def test_a_hostile_variable_is_refused_when_it_is_asked_for(case):
    change, message = HOSTILE_VARIABLES[case]
    variable = WEIGHT | change
    manifest = Manifest.decode(hostile(WEIGHT | {"name": "good"}, variable), path="ckpt/manifest")
    assert manifest.entries["good"].nbytes == 24
    for _ in range(2):  # asking again does not help
        with pytest.raises(ManifestError, match=message) as caught:
            manifest.entries[variable["name"]]
    assert (caught.value.path, caught.value.variable) == ("ckpt/manifest", variable["name"])


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({}, {"shape": [3, 2]}),
        ({}, {"data_type": 5}),
        ({}, {"digests": b"\1" * 16}),
        ({}, {"shape": [6, 2], "size": 48}),
        ({"alias_of": "b"}, {}),
        ({"digests": b""}, halves()),
        (halves(), halves() | {"regions": [{"offsets": [0, 0], "sizes": [2, 3], "digests": D}]}),
        (halves(), halves(found=b"\1" * 16)),
    ],
    ids=["shape", "type", "digest", "size", "each other", "regions", "other regions", "digest of a region"],
)
def test_an_alias_must_be_what_it_names(first, second):
    a = WEIGHT | {"name": "a"} | first
    b = WEIGHT | {"name": "b", "alias_of": "a"} | second
    with pytest.raises(ManifestError, match=r"variable 'b': .* alias of 'a', which does not have the same values"):
        _ = Manifest.decode(hostile(a, b), path="ckpt/manifest").entries["b"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (hostile(WEIGHT, WEIGHT), "variable 'w': a variable is listed twice"),
        (hostile({"name": "a"}, WEIGHT, {"name": "b"}, WEIGHT), "variable 'w': a variable is listed twice"),
        (hostile(attributes="{"), "the attributes are not JSON"),
        (hostile(attributes='"text"'), "the attributes are not a JSON object"),
    ],
)
def test_a_hostile_whole_is_refused_at_once(data, message):
    with pytest.raises(ManifestError, match=f"^ckpt/manifest: {message}"):
        Manifest.decode(data, path="ckpt/manifest")


def test_millions_of_regions_are_refused_before_they_are_looked_at():
    count = 300_000
    body = manifest_pb2.Manifest(format_version=FORMAT_VERSION)
    body.variables.add(name="w", shape=[count], data_type=7, size=count)
    region = manifest_pb2.Region(offsets=[0], sizes=[1], digests=D)
    body.variables[0].regions.extend([region] * count)
    manifest = Manifest.decode(frame(body.SerializeToString()), path="ckpt/manifest")
    start = time.process_time()
    with pytest.raises(ManifestError, match="too many regions: found 300,000, expected at most 131,072"):
        _ = manifest.entries["w"]
    assert time.process_time() - start < 1


def test_a_field_of_a_region_that_is_not_known_makes_the_variable_unreadable():
    body = manifest_pb2.Manifest(format_version=FORMAT_VERSION, variables=[WEIGHT | halves(), WEIGHT | {"name": "v"}])
    known = body.variables[0].SerializeToString()
    (region,) = {one.SerializeToString() for one in body.variables[0].regions[:1]}
    for number, is_refused in ((4, True), (1000, False)):
        more = region + encoded_key(number) + b"\1"
        edited = known.replace(bytes([0x62, len(region)]) + region, bytes([0x62, len(more)]) + more)
        body.variables[0].ParseFromString(edited)
        manifest = Manifest.decode(frame(body.SerializeToString()), path="ckpt/manifest")
        assert manifest.entries["v"].nbytes == 24
        assert manifest.skipped() == {number}
        if is_refused:
            with pytest.raises(ManifestError, match="field 4, written by"):
                _ = manifest.entries["w"]
        else:
            assert len(manifest.entries["w"].regions) == 2


def encoded_key(number: int) -> bytes:
    """Return the key of a field that holds a varint."""
    key = number << 3
    return bytes([key & 0x7F | 0x80, key >> 7]) if key > 0x7F else bytes([key])


# --- what cannot be written --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({1: 2}, "the key 1, which is not a string"),
        ({"a": [{None: 2}]}, "['a'][0]: must be JSON: found the key None, which is not a string"),
        ({"a": b"x"}, "['a']: must be JSON: found bytes"),
        ({"a": {"b": [0, {1, 2}]}}, "['a']['b'][1]: must be JSON: found set"),
        ({"a": 1j}, "['a']: must be JSON: found complex"),
        ({"a": np.complex64(1)}, "['a']: must be JSON: found complex64"),
        ({"a": np.longdouble(1)}, "['a']: must be JSON: found longdouble"),
        ({"a": np.zeros(2)}, "['a']: must be JSON: found ndarray. Make it a list with tolist()"),
        ({"a": "\ud800"}, "with a lone surrogate at character 0"),
        ({"\udfff": 1}, "with a lone surrogate at character 0"),
        ({"a": 10**5000}, "must be JSON: found Exceeds the limit"),
    ],
)
def test_what_is_not_json_is_refused(value, message):
    with pytest.raises(UsageError, match=f"^variable 'v': attributes.*{re.escape(message)}"):
        attributes_json(value, variable="v")


@pytest.mark.parametrize(
    "number",
    [np.float32(0.5), np.int64(3), np.bool_(1), np.array(2), ml_dtypes.bfloat16(0.5), np.str_("a"), np.float64(0.1)],
)
def test_scalars_of_numpy_become_plain(number):
    kept = json.loads(attributes_json({"a": {"b": [number, (number,)]}}))
    assert kept == {"a": {"b": [number, [number]]}}
    assert type(kept["a"]["b"][0]) in (bool, int, float, str)


def test_a_loop_is_refused():
    loop: dict = {}
    loop["a"] = loop
    with pytest.raises(UsageError, match="must be JSON"):
        to_json(loop, what="tree")


@pytest.mark.parametrize("value", [[1], "text", 3])
def test_attributes_are_a_mapping(value):
    with pytest.raises(
        UsageError, match=r"attributes must be a mapping of strings to JSON values: found (list|str|int)"
    ):
        attributes_json(value)


@given(attributes)
def test_attributes_read_back_as_they_were_given(value):
    assert json.loads(attributes_json(value) or "{}") == value


def test_nan_and_infinity_read_back():
    given_values = {"a": float("inf"), "b": [float("-inf")], "c": float("nan")}
    found = json.loads(attributes_json(given_values))
    assert (found["a"], found["b"]) == (float("inf"), [float("-inf")])
    assert found["c"] != found["c"]


@pytest.mark.parametrize("second", [{"name": "w2", "folder": "w"}, {"name": "w2", "folder": "x"}])
def test_two_variables_in_one_folder_are_refused(second):
    first = {"name": "w", "folder": second["folder"] if second["folder"] != "w" else ""}
    body = manifest_pb2.Manifest(format_version=FORMAT_VERSION)
    for fields in (first, second):
        body.variables.add(shape=[2, 3], data_type=2, size=24, **fields)
    manifest = Manifest.decode(frame(body.SerializeToString()), path="manifest")
    with pytest.raises(
        ManifestError, match=f"the manifest lists one folder for two variables: found {second['folder']}"
    ):
        list(manifest.entries.values())


def test_a_folder_whose_name_is_not_unicode_is_refused():
    entry = Entry(name="a\udcff", folder=Folder("a\udcff"), meta=Meta(shape=(), data_type=FLOAT), nbytes=4)
    manifest = Manifest(writer="w", time_ns=0, attributes={}, tree="", entries={entry.name: entry})
    with pytest.raises(InvalidName, match=r"variable 'a\\udcff': .* not valid Unicode .* Rename its folder"):
        manifest.encode()


def test_a_variable_without_meta_is_refused():
    entry = Entry(name="a", folder=Folder("a"), meta=None, nbytes=4)
    manifest = Manifest(writer="w", time_ns=0, attributes={}, tree="", entries={"a": entry})
    with pytest.raises(MetaError, match="variable 'a': the variable has no meta, so its shape and type are not known"):
        manifest.encode()
