"""proto/FORMAT.md is enough to write a reader: this one is written from that text, and takes its tables from it."""

from __future__ import annotations

import datetime
import json
import math
import os
import re
import stat
import struct
import tempfile
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import xxhash
from hypothesis import given, settings, strategies as st
from support import FIXTURES, ROOT, arrays, assert_same, load_truth, names
from support.regions import flip, record_regions, tilings

import varstore as vs

pytestmark = pytest.mark.core

TEXT = (ROOT / "proto" / "FORMAT.md").read_text(encoding="utf-8")


def table(*header: str) -> list[list[str]]:
    """Return the rows of the one table of the text with this header."""
    (found,) = re.findall(rf"^\| {re.escape(' | '.join(header))} \|\n\|[-|]+\|\n((?:\|.*\|\n)+)", TEXT, re.MULTILINE)
    return [[cell.strip() for cell in row.strip("|").split(" | ")] for row in found.splitlines()]


def message_table(message: str) -> dict[int, tuple[str, str]]:
    """Return number -> (field, type) of a protobuf message."""
    section = TEXT.split(f"`{message}`:\n")[1]
    rows = re.findall(r"^\| (\w+) \| (\d+) \| ([\w, ]+) \|", section.split("\n\n")[0], re.MULTILINE)
    return {int(number): (field, kind) for field, number, kind in rows}


# --- F1, F3: values and types ------------------------------------------------------------------------------------

TYPES = {
    name: (int(number), numpy) for name, number, numpy, _ in table("name", "number", "numpy type", "bytes per element")
}
NAMES = {number: name for name, (number, _) in TYPES.items()}
SIZES = {name: size for name, _, _, size in table("name", "number", "numpy type", "bytes per element")}


class Refused(Exception):
    """The text says that this is an error."""


def values_of(out: bytes, shape: tuple[int, ...], type_name: str) -> np.ndarray:
    _, numpy_name = TYPES[type_name]
    if numpy_name == "–":
        raise Refused(f"{type_name} has no numpy type")
    dtype = np.dtype(getattr(ml_dtypes, numpy_name, numpy_name)).newbyteorder("<")
    widths = [int(width) for width in SIZES[type_name].split(" or ")]
    assert dtype.itemsize == widths[0]
    count = math.prod(shape)
    if len(out) == count * dtype.itemsize:
        return np.frombuffer(out, dtype).reshape(shape)
    if len(widths) == 2 and len(out) == count * widths[1]:
        return np.frombuffer(out, "<f4").reshape(shape).astype(dtype)
    raise Refused(f"{len(out)} bytes")


# --- F2: meta ----------------------------------------------------------------------------------------------------

TOKEN = re.compile(r"\s+|#[^\n]*|(?P<word>-?\w+)|(?P<sign>[][{}:,;])")


def canonical_meta(shape: tuple[int, ...], type_name: str) -> bytes:
    lines = ["shape {", *(f"  dim: {extent}" for extent in shape), "}", f"data_type: {type_name}"]
    return "".join(f"{line}\n" for line in lines).encode()


def read_meta(data: bytes) -> tuple[tuple[int, ...], str]:
    if len(data) > 1 << 20:
        raise Refused("a long meta")
    text, at, tokens = data.decode("utf-8"), 0, []
    while at < len(text):
        match = TOKEN.match(text, at)
        if match is None:
            raise Refused(text[at:])
        at = match.end()
        tokens += [match["word"] or match["sign"]] if match.lastgroup else []
    fields = _text_message(tokens)
    if tokens or fields.keys() - {"shape", "data_type"} or "data_type" not in fields:
        raise Refused(f"{tokens} {fields}")
    (data_type,), (shape,) = fields["data_type"], fields.get("shape", [{}])
    if shape.keys() - {"dim"}:
        raise Refused(f"{shape}")
    extents = tuple(int(extent) for extent in shape.get("dim", []))
    name = NAMES.get(int(data_type)) if re.fullmatch(r"-?\d+", data_type) else data_type
    if name not in TYPES:
        raise Refused(data_type)
    return check_shape(extents, name), name


def _text_message(tokens: list[str]) -> dict[str, list[Any]]:
    fields: dict[str, list[Any]] = {}
    while tokens and tokens[0] != "}":
        field = tokens.pop(0)
        if tokens[0] == ":":
            tokens.pop(0)
        found = fields.setdefault(field, [])
        if tokens[0] == "{":
            tokens.pop(0)
            found.append(_text_message(tokens))
            tokens.pop(0)
        elif tokens[0] == "[":
            end = tokens.index("]")
            found += [token for token in tokens[1:end] if token != ","]
            del tokens[: end + 1]
        else:
            found.append(tokens.pop(0))
        if tokens[:1] in (["."], [","], [";"]):
            tokens.pop(0)
    return fields


def check_shape(shape: tuple[int, ...], type_name: str) -> tuple[int, ...]:
    size = SIZES[type_name].split(" or ")[0].replace("–", "1")
    largest = math.prod(extent for extent in shape if extent) * int(size)
    if len(shape) > 64 or any(extent < 0 for extent in shape) or largest >= 1 << 63:
        raise Refused(f"{shape}")
    return shape


# --- F5: the manifest --------------------------------------------------------------------------------------------

HEADER = [(int(offset), int(size)) for offset, size, _ in table("offset", "bytes", "content")]
MESSAGES = {message: message_table(message) for message in ("Manifest", "Variable", "Region", "File")}
NESTED = ("Variable", "Region", "File")
BLOCK = 16_777_216


def digest(data: bytes) -> bytes:
    return xxhash.xxh3_128_digest(data)


def read_message(data: bytes, message: str) -> dict[str, Any]:
    found: dict[str, Any] = {
        field: [] if "repeated" in kind else {"string": "", "bytes": b""}.get(kind, 0)
        for field, kind in MESSAGES[message].values()
    }
    at, later = 0, set()
    while at < len(data):
        key, at = _varint(data, at)
        if key & 7 == 2:
            size, at = _varint(data, at)
            value: Any = data[at : at + size]
            at += size
        else:
            assert key & 7 == 0
            value, at = _varint(data, at)
        field, kind = MESSAGES[message].get(key >> 3, ("", ""))
        kind, _, repeated = kind.partition(", ")
        is_known = isinstance(value, bytes) if kind in ("string", "bytes", *NESTED) else repeated or key & 7 == 0
        if not field or not is_known:
            later.add(key >> 3)
            continue
        if kind == "string":
            value = value.decode()
        elif kind in NESTED:
            value = read_message(value, kind)
        elif kind in ("int64", "int32"):
            value = [_signed(number) for number in (_varints(value) if isinstance(value, bytes) else [value])]
            value = value if repeated else value[0]
        if repeated:
            found[field] += value if isinstance(value, list) else [value]
        else:
            found[field] = value
    return found | {"later": {number for number in later if number < 1000}}


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        value |= (data[at] & 0x7F) << shift
        shift += 7
        at += 1
        if not data[at - 1] & 0x80:
            return value, at


def _varints(data: bytes) -> list[int]:
    found, at = [], 0
    while at < len(data):
        value, at = _varint(data, at)
        found.append(value)
    return found


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def read_manifest(data: bytes) -> dict[str, Any]:
    magic, version, zero, length, body_digest = (data[offset : offset + size] for offset, size in HEADER)
    body = data[sum(HEADER[-1]) :]
    if (magic, version, zero) != (b"varstore", b"\1\0\0\0", bytes(4)):
        raise Refused("not a manifest of version 1")
    if len(body) != struct.unpack("<Q", length)[0] or digest(body) != body_digest:
        raise Refused("a damaged manifest")
    manifest = read_message(body, "Manifest")
    if manifest["format_version"] != 1 or manifest.pop("later"):
        raise Refused("another version")
    variables = {variable["name"]: variable for variable in manifest["variables"]}
    folders = {variable["folder"] or variable["name"] for variable in variables.values()}
    if not len(variables) == len(folders) == len(manifest["variables"]) or "" in variables:
        raise Refused("a name or a folder twice")
    manifest["attributes"] = json.loads(manifest["attributes"] or "{}")
    for variable in variables.values():
        _check_variable(variable, variables)
        variable["attributes"] = json.loads(variable["attributes"] or "{}")
        variable["folder"] = variable["folder"] or variable["name"]
    return manifest | {"variables": variables}


def _check_variable(variable: dict[str, Any], variables: dict[str, dict[str, Any]]) -> None:
    if set((variable["folder"] or variable["name"]).split("/")) & {"", ".", ".."}:
        raise Refused("a folder that leads out")
    check_shape(tuple(variable["shape"]), NAMES[variable["data_type"]])
    blocks = -(-variable["size"] // BLOCK)
    if len(variable["digests"]) not in (0, 16 * blocks):
        raise Refused("digests that do not cover the file")
    if variable["regions"]:
        _check_regions(variable)
    if variable["alias_of"]:
        first = variables[variable["alias_of"]]
        same = ("shape", "data_type", "size", "encoding", "digests", "regions")
        if first["alias_of"] or [first[key] for key in same] != [variable[key] for key in same]:
            raise Refused("an alias of something else")


def _check_regions(variable: dict[str, Any]) -> None:
    shape = tuple(variable["shape"])
    count = np.zeros(shape, int)
    for region in variable["regions"]:
        rows = [range(at, at + size) for at, size in zip(region["offsets"], region["sizes"], strict=True)]
        if any(row.start < 0 or row.stop > extent for row, extent in zip(rows, shape, strict=True)):
            raise Refused("a region that is not within the shape")
        count[_index(region)] += 1
        nbytes = math.prod(map(len, rows)) * variable["size"] // max(math.prod(shape), 1)
        if len(region["digests"]) != 16 * -(-nbytes // BLOCK):
            raise Refused("digests that do not cover the region")
    cut = sum(any(size != extent for size in sizes) for extent, *sizes in zip(shape, *_sizes(variable), strict=True))
    if variable["digests"] or variable["encoding"] not in ("", "raw") or (count != 1).any():
        raise Refused("regions that do not tile a raw variable")
    if cut > 8 or len(variable["regions"]) > (1 << 18) >> cut:
        raise Refused("too many regions")


def _sizes(variable: dict[str, Any]) -> list[list[int]]:
    return [region["sizes"] for region in variable["regions"]]


def _index(region: dict[str, Any]) -> tuple[slice, ...]:
    return tuple(slice(at, at + size) for at, size in zip(region["offsets"], region["sizes"], strict=True))


# --- F6: names ---------------------------------------------------------------------------------------------------


def folder_of(name: str) -> str:
    return "/".join(_folder_part(part, is_first=index == 0) for index, part in enumerate(name.split("/")))


def _folder_part(part: str, *, is_first: bool) -> str:
    if not part:
        return "%00"
    if part in ("out", "meta", "zarr.json") or (is_first and part in ("manifest", "snapshot_done", "pickled_data")):
        return _escape(part[0]) + part[1:]
    control = [chr(code) for code in (*range(0x20), *range(0x7F, 0xA0))]
    escaped = [_escape(sign) if sign in {*'%\\:*?"<>|', *control} else sign for sign in part]
    if part[-1] in ". ":
        escaped[-1] = _escape(part[-1])
    return "".join(escaped)


def _escape(sign: str) -> str:
    return "".join(f"%{byte:02X}" for byte in sign.encode())


def name_of(folder: str) -> str:
    parts = ["" if part == "%00" else re.sub("(?:%[0-9A-F]{2})+", _unescape, part) for part in folder.split("/")]
    return "/".join(parts)


def _unescape(match: re.Match[str]) -> str:
    return bytes.fromhex(match[0].replace("%", "")).decode()


# --- the reader --------------------------------------------------------------------------------------------------


def read_checkpoint(root: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what the manifest says, and the variables: values, or the error where they cannot be read."""
    if not (root / "snapshot_done").is_file():
        raise Refused("not a checkpoint")
    if (root / "manifest").exists():
        manifest = read_manifest((root / "manifest").read_bytes())
        listed = manifest["variables"]
    else:
        folders = sorted(Path(folder).relative_to(root) for folder, _, files in os.walk(root) if "out" in files)
        manifest, listed = {}, {folder.as_posix(): {"folder": folder.as_posix()} for folder in folders}
    found: dict[str, Any] = {}
    for name, variable in listed.items():
        try:
            found[name] = _read_variable(root / variable["folder"], variable)
        except Refused as refusal:
            found[name] = refusal
    return manifest, found


def _read_variable(folder: Path, variable: dict[str, Any]) -> np.ndarray | bytes:
    out = (folder / "out").read_bytes()
    if "size" not in variable:
        return values_of(out, *read_meta((folder / "meta").read_bytes())) if (folder / "meta").exists() else out
    if variable["later"] or variable["encoding"] not in ("", "raw"):
        raise Refused(f"{variable['later']} {variable['encoding']}")
    digests = b"".join(digest(out[start : start + BLOCK]) for start in range(0, len(out), BLOCK))
    if len(out) != variable["size"] or variable["digests"] not in (b"", digests):
        raise Refused("damaged")
    shape, type_name = tuple(variable["shape"]), NAMES[variable["data_type"]]
    meta = (folder / "meta").read_bytes()
    assert read_meta(meta) == (shape, type_name)
    assert variable["meta_digest"] == (b"" if meta == canonical_meta(shape, type_name) else digest(meta))
    values = values_of(out, shape, type_name)
    stored = np.frombuffer(out, f"V{len(out) // values.size}").reshape(shape) if values.size else values
    for region in variable["regions"]:
        own = stored[_index(region)].tobytes()
        if region["digests"] != b"".join(digest(own[start : start + BLOCK]) for start in range(0, len(own), BLOCK)):
            raise Refused("a damaged region")
    return values


def read_tree(node: Any, variables: dict[str, Any]) -> Any:
    """Return the nested state that a tree describes."""
    if isinstance(node, list):
        return [read_tree(item, variables) for item in node]
    if not isinstance(node, dict):
        return node
    kind = node.get("$")
    if kind is None:
        return {key: read_tree(item, variables) for key, item in node.items()}
    assert kind in TREE
    if kind in ("array", "list"):
        return variables[node["name"]] if kind == "array" else variables[node["name"]].tolist()
    if "hex" in node:
        return TREE_HEX[kind](node["hex"], node.get("type"))
    items = read_tree(node["items"], variables)
    if kind == "namedtuple":
        return namedtuple(node["type"], node["fields"])(*items)
    if kind == "deque":
        return deque(items, node["maxlen"])
    if kind == "defaultdict":
        return defaultdict({"list": list, None: None}[node["factory"]], items)
    return TREE_ITEMS[kind](items)


TREE = {kind for kinds, _, _ in table("`$`", "other members", "stands for") for kind in kinds.split(", ")}
TREE_ITEMS: dict[str, Any] = {
    "dict": dict,
    "OrderedDict": OrderedDict,
    "Counter": lambda pairs: Counter(dict(pairs)),
    "tuple": tuple,
    "set": set,
    "frozenset": frozenset,
    "complex": lambda pair: complex(*pair),
    "mapping": dict,
    "record": lambda pairs: SimpleNamespace(**dict(pairs)),
    "enum": lambda items: SimpleNamespace(name=items[0], value=items[1]),
    "Path": lambda items: Path(*items),
    "numpy.str_": lambda items: np.str_(items[0]),
    "date": lambda items: datetime.date.fromisoformat(*items),
    "timedelta": lambda items: datetime.timedelta(*items),
    "datetime": lambda items: _zoned(datetime.datetime.fromisoformat(items[0]), *items[1:]),
    "time": lambda items: _zoned(datetime.time.fromisoformat(items[0]), *items[1:]),
}


def _zoned(value: Any, fold: int, zone: int | None) -> Any:
    offset = None if zone is None else datetime.timezone(datetime.timedelta(microseconds=zone))
    return value.replace(fold=fold, tzinfo=offset)


TREE_HEX: dict[str, Any] = {
    "int": lambda text, _: int(text, 16),
    "float": lambda text, _: struct.unpack(">d", bytes.fromhex(text))[0],
    "bytes": lambda text, _: bytes.fromhex(text),
    "bytearray": lambda text, _: bytearray.fromhex(text),
    "str": lambda text, _: bytes.fromhex(text).decode("utf-8", "surrogatepass"),
    "scalar": lambda text, name: np.frombuffer(bytes.fromhex(text), getattr(ml_dtypes, name, name))[0],
}


# --- the text itself ---------------------------------------------------------------------------------------------


def test_the_rules_are_numbered_from_1_to_11():
    assert re.findall(r"^## F(\d+) ", TEXT, re.MULTILINE) == [str(number) for number in range(1, 12)]


def test_the_tables_are_those_of_the_protobuf_files():
    enum = (ROOT / "proto/varstore/_gen/variable_meta.proto").read_text()
    declared = {name: int(number) for name, number in re.findall(r"^  (k\w+) = (\d+);", enum, re.MULTILINE)}
    assert {"kInvalidDataType": 0} | {name: number for name, (number, _) in TYPES.items()} == declared
    messages = (ROOT / "proto/varstore/_gen/manifest.proto").read_text()
    for message, fields in MESSAGES.items():
        body = re.search(rf"^message {message} \{{\n(.*?)^\}}", messages, re.MULTILINE | re.DOTALL)
        assert body is not None
        lines = re.findall(r"^  (repeated )?(\w+) (\w+) = (\d+);", body[1], re.MULTILINE)
        listed = {int(number): (field, kind + (", repeated" if many else "")) for many, kind, field, number in lines}
        assert fields == listed


# --- it reads what there is --------------------------------------------------------------------------------------


@pytest.mark.parametrize("marker", sorted(FIXTURES.rglob("snapshot_done")), ids=lambda path: path.parent.name)
def test_it_reads_the_checkpoints_of_the_tests(marker):
    root = marker.parent
    _, found = read_checkpoint(root)
    with vs.open(root) as checkpoint:
        assert list(found) == list(checkpoint)
        for name, variable in checkpoint.items():
            if isinstance(found[name], Refused):
                with pytest.raises(vs.VarstoreError):
                    variable.numpy()
            elif isinstance(found[name], np.ndarray):
                assert_same(found[name], variable.numpy())
            else:
                assert not variable.has_meta


@pytest.mark.parametrize("name", ["lenet_legacy", "dtypes_legacy"])
def test_it_reads_what_oneflow_wrote(name):
    truth = load_truth(FIXTURES / "oneflow" / name)
    _, found = read_checkpoint(FIXTURES / "oneflow" / name)
    assert found.keys() == truth.keys()
    for variable, values in truth.items():
        assert_same(found[variable], values)


def test_it_reads_the_golden_manifest():
    manifest = read_manifest((FIXTURES / "golden" / "manifest_v1").read_bytes())
    truth = json.loads((FIXTURES / "golden" / "manifest_v1.json").read_text())
    listed = truth.pop("variables")
    assert {key: manifest[key] for key in truth} == truth
    assert list(manifest["variables"]) == [facts["name"] for facts in listed]
    for facts in listed:
        found = dict(manifest["variables"][facts["name"]])
        expected = {"folder": facts["name"], "encoding": "", "alias_of": ""}
        expected |= {"digests": "", "meta_digest": "", "content_digests": "", "regions": []}
        expected |= {"attributes": {}} | facts
        expected["size"] = expected.pop("nbytes")
        found |= {"type": NAMES[found.pop("data_type")]}
        found |= {key: found[key].hex() for key in ("digests", "meta_digest", "content_digests")}
        assert not found.pop("later")
        assert found == expected


# --- it reads what varstore writes -------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(st.dictionaries(names, arrays(), min_size=1, max_size=6), st.booleans())
def test_it_reads_what_varstore_writes(variables, has_manifest):
    attributes = {"step": 3, "été": [None, 0.5]} if has_manifest else None
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch) / "saved"
        vs.save(root, variables, attributes=attributes, manifest=has_manifest, durable=False)
        manifest, found = read_checkpoint(root)
        by_name = found if has_manifest else {name_of(folder): values for folder, values in found.items()}
        assert by_name.keys() == variables.keys()
        for name, values in variables.items():
            assert_same(by_name[name], values)
        if has_manifest:
            assert list(found) == list(variables)
            assert manifest["attributes"] == attributes
            for name, variable in manifest["variables"].items():
                assert variable["folder"] == folder_of(name)
                assert name_of(variable["folder"]) == name
        files = [Path(folder, file) for folder, _, names_ in os.walk(root) for file in names_]
        own = {f"{folder_of(name)}/{file}" for name in variables for file in ("out", "meta")} | {"snapshot_done"}
        assert {file.relative_to(root).as_posix() for file in files} == own | ({"manifest"} if has_manifest else set())
        assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o444}


@settings(deadline=None, max_examples=30)
@given(st.data(), arrays())
def test_it_reads_regions_and_finds_a_damaged_one(data, values):
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch) / "saved"
        vs.save(root, {"w": values, "plain": np.arange(3)}, durable=False)
        record_regions(root, {"w": [region[:2] for region in data.draw(tilings(values.shape))]})
        manifest, found = read_checkpoint(root)
        assert manifest["variables"]["w"]["regions"]
        assert_same(found["w"], values)
        if values.nbytes:
            flip(root / "w/out", data.draw(st.integers(0, values.nbytes - 1)))
            assert isinstance(read_checkpoint(root)[1]["w"], Refused)


def test_tied_and_linked_variables_share_files(tmp_path):
    w = np.arange(6, dtype=np.float32).reshape(2, 3)
    vs.save(tmp_path / "a", {"w": w, "tied": w, "other": np.ones(2)})
    vs.save(tmp_path / "b", {"w": w, "other": np.zeros(2)}, base=tmp_path / "a")
    manifest, found = read_checkpoint(tmp_path / "a")
    assert manifest["variables"]["tied"]["alias_of"] == "w"
    assert_same(found["tied"], w)
    assert (tmp_path / "a/w/out").samefile(tmp_path / "a/tied/out")
    for file in ("out", "meta"):
        assert (tmp_path / "a/w" / file).samefile(tmp_path / "b/w" / file)
        assert not (tmp_path / "a/other/out").samefile(tmp_path / "b/other/out")


def test_a_large_variable_has_a_digest_for_each_block(tmp_path):
    values = np.arange(BLOCK // 4 + 5, dtype=np.float32)
    vs.save(tmp_path / "a", {"large": values})
    manifest, found = read_checkpoint(tmp_path / "a")
    assert len(manifest["variables"]["large"]["digests"]) == 32
    assert_same(found["large"], values)


def test_it_reads_the_tree_of_nested_state(tmp_path):
    point = namedtuple("point", "x y")
    state = {
        "plain": [None, True, -3, 0.5, "text", {"a": {}}],
        "kinds": [(1, 2), {1, 2}, frozenset({3}), point(1, np.ones(2))],
        "mappings": [OrderedDict(a=1), Counter("aab"), {1: {None: 3}}],
        "numbers": [1 << 70, -(1 << 70), float("inf"), 1j, b"bytes", "\ud800", np.float16(0.5), ml_dtypes.bfloat16(2)],
        "$": {"weights": [np.arange(3), {"bias": np.zeros((2, 0), np.int8)}]},
    }
    vs.save_state(tmp_path / "a", state)
    manifest, variables = read_checkpoint(tmp_path / "a")
    found = read_tree(json.loads(manifest["tree"]), variables)
    assert repr(found) == repr(state) == repr(vs.load_state(tmp_path / "a"))


def test_it_reads_what_training_scripts_hold(tmp_path):
    zone = datetime.timezone(datetime.timedelta(hours=-3))
    state = {
        "bytes": [bytearray(b"\0x"), np.str_("a")],
        "times": [datetime.date(2026, 1, 2), datetime.time(3, 4, fold=1), datetime.timedelta(-1, 2, 3)],
        "moments": [datetime.datetime(2026, 1, 2, 3, tzinfo=zone), datetime.datetime(2026, 1, 2, fold=1)],
        "containers": [deque([1, np.ones(2)], 3), defaultdict(list, {1: [2]}), Path("a/b")],
        "record": SimpleNamespace(lr=0.5, w=np.ones(2)),
        "losses": [0.5] * 5000,
    }
    vs.save_state(tmp_path / "a", state)
    manifest, variables = read_checkpoint(tmp_path / "a")
    assert variables["losses"].shape == (5000,)
    assert (
        repr(read_tree(json.loads(manifest["tree"]), variables)) == repr(state) == repr(vs.load_state(tmp_path / "a"))
    )


# --- it refuses what the text says is an error -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spelling", "meaning"),
    [
        ("shape {\r\n  dim: 2\r\n}\r\ndata_type: kFloat\r\n", ((2,), "kFloat")),
        ("data_type: 2 shape: { dim: [2, 3] } # comment", ((2, 3), "kFloat")),
        ("shape{dim:2,dim:3};data_type:kInt64", ((2, 3), "kInt64")),
        ("data_type: kBool", ((), "kBool")),
        ("data_type: kFloat colour: 3", None),
        ("data_type: kFloat data_type: kFloat", None),
        ("shape { dim: 1 } shape { dim: 1 } data_type: kFloat", None),
        ("shape { dim: -1 } data_type: kFloat", None),
        ("shape { dim: 4611686018427387904 } data_type: kFloat", None),
        ("shape { dim: 4611686018427387904 dim: 0 } data_type: kFloat", None),
        ("shape { " + "dim: 1 " * 65 + "} data_type: kFloat", None),
        ("shape { dim: 1 }", None),
        ("data_type: kNever", None),
        ("data_type: kFloat" + " " * (1 << 20), None),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_a_meta_means_the_same_to_it_and_to_varstore(tmp_path, spelling, meaning):
    shape, name = meaning or ((1,), "kFloat")
    (tmp_path / "w").mkdir()
    (tmp_path / "snapshot_done").touch()
    (tmp_path / "w/meta").write_bytes(spelling.encode())
    (tmp_path / "w/out").write_bytes(bytes(math.prod(shape) * int(SIZES[name])))
    if meaning is None:
        with pytest.raises((Refused, ValueError)):
            read_meta(spelling.encode())
        with pytest.raises(vs.VarstoreError):
            vs.load(tmp_path)
    else:
        assert read_meta(spelling.encode()) == meaning
        assert_same(vs.load(tmp_path)["w"], read_checkpoint(tmp_path)[1]["w"])


@pytest.mark.parametrize("position", [0, 8, 12, 16, 24, 40, -1])
def test_a_flipped_byte_of_the_manifest_is_refused(tmp_path, position):
    vs.save(tmp_path / "a", {"w": np.ones(3)})
    data = bytearray((tmp_path / "a/manifest").read_bytes())
    data[position] ^= 1
    with pytest.raises(Refused):
        read_manifest(bytes(data))


def test_a_directory_without_marker_is_refused(tmp_path):
    vs.save(tmp_path / "a", {"w": np.ones(3)})
    (tmp_path / "a/snapshot_done").unlink()
    with pytest.raises(Refused):
        read_checkpoint(tmp_path / "a")
    with pytest.raises(vs.errors.IncompleteCheckpoint):
        vs.open(tmp_path / "a")


def test_a_changed_out_is_refused(tmp_path):
    vs.save(tmp_path / "a", {"w": np.ones(3)})
    (tmp_path / "a/w/out").chmod(0o644)
    (tmp_path / "a/w/out").write_bytes(bytes(24))
    assert isinstance(read_checkpoint(tmp_path / "a")[1]["w"], Refused)
    with pytest.raises(vs.errors.DigestMismatch):
        vs.load(tmp_path / "a")


def numbered(message: str, **values: int | bytes) -> bytes:
    """Return a message of these fields; a name ``field_N`` stands for a number that no table has."""
    numbers = {field: number for number, (field, _) in MESSAGES[message].items()}
    found = b""
    for name, value in values.items():
        number = numbers.get(name) or int(name.removeprefix("field_"))
        data = value if isinstance(value, bytes) else b""
        found += _as_varint(number << 3 | (2 if isinstance(value, bytes) else 0))
        found += _as_varint(len(data)) + data if isinstance(value, bytes) else _as_varint(value)
    return found


def _as_varint(value: int) -> bytes:
    low, rest = value & 0x7F, value >> 7
    return bytes([low | 0x80]) + _as_varint(rest) if rest else bytes([low])


def write_manifest(root: Path, *variables: bytes, **fields: int | bytes) -> None:
    body = numbered("Manifest", format_version=1, **fields)
    body += b"".join(numbered("Manifest", variables=variable) for variable in variables)
    header = b"varstore" + struct.pack("<IIQ", 1, 0, len(body)) + digest(body)
    (root / "manifest").unlink()
    (root / "manifest").write_bytes(header + body)


KNOWN = {"data_type": TYPES["kDouble"][0], "size": 24, "shape": 3}


def test_unknown_fields_from_1000_are_skipped_and_others_and_unknown_encodings_refused(tmp_path):
    vs.save(tmp_path / "a", {"v": np.ones(3), "w": np.ones(3), "x": np.ones(3)})
    v = numbered("Variable", name=b"v", field_1000=b"later", **KNOWN)
    w = numbered("Variable", name=b"w", encoding=b"later", **KNOWN)
    x = numbered("Variable", name=b"x", field_999=b"later", **KNOWN)
    write_manifest(tmp_path / "a", v, w, x, writer=b"varstore 9", field_1001=7)
    _, found = read_checkpoint(tmp_path / "a")
    assert_same(found["v"], np.ones(3))
    assert isinstance(found["w"], Refused)
    assert isinstance(found["x"], Refused)
    with vs.open(tmp_path / "a") as checkpoint:
        assert_same(checkpoint["v"].numpy(), np.ones(3))
        with pytest.raises(vs.errors.FormatError, match="an encoding that this varstore cannot read: found 'later'"):
            checkpoint["w"].numpy()
        with pytest.raises(
            vs.errors.ManifestError, match=r"'x': .* does not know: found field 999, written by varstore 9\. A later"
        ):
            checkpoint["x"]
    for use in (vs.load, vs.load_state, lambda path: vs.load_into({"x": np.zeros(3)}, path)):
        with pytest.raises(vs.errors.ManifestError, match="field 999"):
            use(tmp_path / "a")
    assert "field 999" in str(vs.verify(tmp_path / "a"))


@pytest.mark.parametrize("field", ["field_11", "field_999", "tree"])
def test_an_unknown_field_below_1000_makes_the_checkpoint_one_of_a_later_version(tmp_path, field):
    """Of what a field with a number of the table is, another wire type makes it one that is not known."""
    vs.save(tmp_path / "a", {"v": np.ones(3)})
    write_manifest(tmp_path / "a", numbered("Variable", name=b"v", **KNOWN), **{field: 7})
    with pytest.raises(Refused):
        read_checkpoint(tmp_path / "a")
    for use in (vs.open, vs.load, vs.seal):
        with pytest.raises(vs.errors.ManifestError, match=r"does not know: found field \d+.* upgrade varstore"):
            use(tmp_path / "a")
    assert not vs.verify(tmp_path / "a").ok


@pytest.mark.parametrize("where", ["manifest", "variable"])
def test_what_a_later_version_said_is_not_sealed_away(tmp_path, where):
    vs.save(tmp_path / "a", {"v": np.ones(3)})
    fields = {"field_1500": b"later"}
    write_manifest(
        tmp_path / "a",
        numbered("Variable", name=b"v", **KNOWN, **(fields if where == "variable" else {})),
        **(fields if where == "manifest" else {}),
    )
    assert_same(vs.load(tmp_path / "a")["v"], np.ones(3))
    before = (tmp_path / "a" / "manifest").read_bytes()
    with pytest.raises(vs.errors.ManifestError, match=r"would lose .*: found field 1500\. .* upgrade varstore"):
        vs.seal(tmp_path / "a")
    assert (tmp_path / "a" / "manifest").read_bytes() == before
