"""Hostile pickles and zip files: each is one clear error in bounded time and memory, and no code runs."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
from support import ROOT, run_python

from varstore.errors import CheckpointNotFound, FormatError, SizeMismatch, UnsafeContent
from varstore.formats import oneflow, torch

SUPPORT = ROOT / "tests" / "support"
SECONDS = 5
LONGEST_MESSAGE = 1000
OPENED = {
    *("build_setstate", "import_alone", "import_dropped", "laughing_modules"),
    *("array_of_empty_texts", "array_of_objects", "array_of_records"),
}
"""What contains only names that varstore does not know: it opens unless these are refused."""

DROPS = tuple(f"{reader}-import_dropped" for reader in ("torch", "paddle", "megengine", "oneflow"))
"""These name something, and do not put it into the state."""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with every hostile file; believing one of them would touch ``canary`` beside it."""
    folder = tmp_path_factory.mktemp("hostile")
    subprocess.run([sys.executable, SUPPORT / "hostile_pickles.py", folder, folder / "canary"], check=True)
    return folder


def read_all(corpus: Path, unknown: str) -> list[dict[str, Any]]:
    """Return what became of each file, read in one child process of limited memory."""
    command = [sys.executable, SUPPORT / "read_hostile.py", corpus, unknown]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def outcomes(corpus: Path) -> list[dict[str, Any]]:
    return read_all(corpus, "error")


@pytest.fixture(scope="module")
def by_default(corpus: Path) -> list[dict[str, Any]]:
    return read_all(corpus, "opaque")


def test_every_hostile_file_is_its_error(outcomes: list[dict[str, Any]], corpus: Path) -> None:
    assert len(outcomes) == len(json.loads((corpus / "index.json").read_text())) > 600
    wrong = [
        outcome
        for outcome in outcomes
        if (outcome["error"] or "none") not in (outcome["kinds"] or ["none"])
        or outcome["word"] not in outcome["message"]
    ]
    assert not wrong


def test_every_error_names_the_file_and_is_short(outcomes: list[dict[str, Any]], corpus: Path) -> None:
    for outcome in outcomes:
        if outcome["kinds"]:
            assert outcome["message"].startswith(f"{corpus / outcome['file']}: "), outcome
            assert len(outcome["message"].removeprefix(str(corpus))) < LONGEST_MESSAGE, outcome


def test_every_hostile_file_is_refused_soon(outcomes: list[dict[str, Any]]) -> None:
    assert [outcome for outcome in outcomes if outcome["seconds"] > SECONDS] == []


def test_no_code_ran(outcomes: list[dict[str, Any]], by_default: list[dict[str, Any]], corpus: Path) -> None:
    assert len(outcomes) == len(by_default)
    assert not (corpus / "canary").exists()


def test_nothing_but_the_file_is_touched(outcomes: list[dict[str, Any]], by_default: list[dict[str, Any]]) -> None:
    assert [outcome for outcome in outcomes + by_default if outcome["touched"]] == []


def test_by_default_each_is_refused_or_has_an_opaque_leaf(
    outcomes: list[dict[str, Any]], by_default: list[dict[str, Any]]
) -> None:
    wrong, opened = [], set()
    for strict, outcome in zip(outcomes, by_default, strict=True):
        if outcome["kinds"]:
            if "VarstoreError" not in outcome["kinds"] or outcome["seconds"] > SECONDS:
                wrong.append(outcome)
        elif strict["kinds"]:
            opened.add(outcome["file"].partition("-")[2].partition("-")[0])
            if not outcome["is_opaque"] and not outcome["file"].startswith(DROPS):
                wrong.append(outcome)
    assert not wrong
    assert opened == OPENED


@pytest.fixture(scope="module")
def believed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return another such folder, whose canary may be touched."""
    folder = tmp_path_factory.mktemp("believed")
    subprocess.run([sys.executable, SUPPORT / "hostile_pickles.py", folder, folder / "canary"], check=True)
    return folder


@pytest.mark.parametrize("name", ["reduce_global", "reduce_stack_global", "inst", "obj", "exec", "eval"])
def test_python_itself_would_have_run_it(believed: Path, name: str) -> None:
    (believed / "canary").unlink(missing_ok=True)
    code = "import pickle, sys; pickle.load(open(sys.argv[1], 'rb'))"
    run_python(code, believed / f"megengine-{name}", check=False)
    assert (believed / "canary").exists()


def test_the_error_says_what_the_file_would_have_done(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return exec, ("open('x', 'w')",)

    path = tmp_path / "a.pt"
    path.write_bytes(
        pickle.dumps(0x1950A86A20F9469CFC6C) + pickle.dumps(1001) + pickle.dumps({}) + pickle.dumps(Evil())
    )
    with pytest.raises(UnsafeContent) as caught:
        torch.read(path)
    assert caught.value.path == str(path)
    assert caught.value.problem == "this pickle would call builtins.exec(\"open('x', 'w')\")"
    assert caught.value.where is not None
    assert caught.value.where.startswith("byte ")


def test_metadata_of_distributed_checkpoints_is_a_pickle_like_any_other(tmp_path: Path) -> None:
    (tmp_path / ".metadata").write_bytes(b"cos\nsystem\n(S'touch x'\ntR.")
    with pytest.raises(UnsafeContent, match=r"os\.system"):
        torch.read(tmp_path)


def test_a_link_out_of_a_folder_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "outside").write_bytes(pickle.dumps({"protocol_version": 1, "data": {}}))
    (tmp_path / "folder").mkdir()
    for name, module in (("pickled_data", oneflow), (".metadata", torch)):
        (tmp_path / "folder" / name).symlink_to(tmp_path / "outside")
        with pytest.raises(UnsafeContent, match="leads out"):
            module.read(tmp_path / "folder")
        (tmp_path / "folder" / name).unlink()


def test_oneflow_tensors_whose_meta_lies(tmp_path: Path) -> None:
    for shape, text in (("4", "12 bytes, expected 16"), (str(1 << 62), "2\\^63|overflow|large"), ("-1", "dim")):
        path = tmp_path / shape
        (path / "w").mkdir(parents=True)
        (path / "w" / "meta").write_text(f"shape {{\n  dim: {shape}\n}}\ndata_type: kFloat\n")
        (path / "w" / "out").write_bytes(struct.pack("<3f", 1, 2, 3))
        with pytest.raises(ValueError, match=text):
            oneflow.read(path)


METADATA = ROOT / "tests" / "data" / "formats" / "torch" / "distributed"


@pytest.mark.parametrize(
    ("old", "new", "error", "text"),
    [
        (b"__0_0.distcp", b"../_0.distcp", UnsafeContent, "leads out"),
        (b"__0_0.distcp", b"/etc/hostnam", UnsafeContent, "leads out"),
        (b"__0_0.distcp", b"__0_1.distcp", CheckpointNotFound, "no such file"),
        (b"K\4K\3\x86", b"K\5K\3\x86", SizeMismatch, "do not cover"),
        (b"K\0K\0\x86", b"K\1K\0\x86", FormatError, "chunk is wrong"),
        (b"\x8c\6offsetK\0", b"\x8c\6offsetK\7", FormatError, "archive|place of a variable"),
        (b"float32", b"strided", FormatError, "type or shape"),
        (b"float32", b"unknown", FormatError, "type or shape|would import"),
        (b"PosixPath", b"EvilPathX", UnsafeContent, r"pathlib\.EvilPathX"),
    ],
)
def test_metadata_that_lies(tmp_path: Path, old: bytes, new: bytes, error: type[Exception], text: str) -> None:
    folder = tmp_path / "a"
    shutil.copytree(METADATA, folder)
    raw = (folder / ".metadata").read_bytes()
    if old not in raw:  # offsets stand behind the memo of their key
        old, new = old.replace(b"offset", b"offset\x94"), new.replace(b"offset", b"offset\x94")
    assert old in raw
    assert len(old) == len(new)
    (folder / ".metadata").write_bytes(raw.replace(old, new, 1))
    with pytest.raises(error, match=text):
        torch.read(folder).state()


def test_a_distributed_file_that_is_cut_off(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    shutil.copytree(METADATA, folder)
    os.truncate(folder / "__0_0.distcp", 3000)
    with pytest.raises(FormatError, match="the place of a variable is wrong"):
        torch.read(folder)


def record(kind: str, state: bytes = b"") -> bytes:
    return b"ctorch.distributed.checkpoint." + kind.encode() + b"\n)\x81" + (state and state + b"b")


def word(value: str) -> bytes:
    return b"\x8c" + bytes([len(value)]) + value.encode()


def metadata_of(name: bytes, entries: bytes = b"") -> bytes:
    """Return .metadata whose storage has one place, of this name: the first 100 bytes of a file ``a``."""
    place = word("relative_path") + word("a") + word("offset") + b"K\0" + word("length") + b"Kd"
    index = record("metadata\nMetadataIndex", b"}(" + word("fqn") + name + b"u")
    places = b"}(" + index + record("filesystem\n_StorageInfo", b"}(" + place + b"u") + b"u"
    state = b"}(" + word("state_dict_metadata") + b"}(" + entries + b"u" + word("storage_data") + places + b"u"
    return b"\x80\4" + record("metadata\nMetadata", state) + b"."


def test_a_name_in_metadata_is_text(tmp_path: Path) -> None:
    laughing = b"]" + b"".join(b"q" + bytes([i]) + b"0](" + 2 * (b"h" + bytes([i])) + b"e" for i in range(60))
    (tmp_path / ".metadata").write_bytes(metadata_of(laughing))
    with pytest.raises(FormatError, match="name of a variable is wrong"):
        torch.read(tmp_path)


def test_chunks_are_no_larger_than_their_bytes(tmp_path: Path) -> None:
    huge = b"\x8a\6\0\0\0\0\0\x10\x85"
    chunk = record("metadata\nChunkStorageMetadata", b"}(" + word("offsets") + b"K\0\x85" + word("sizes") + huge + b"u")
    kind = record("metadata\nTensorProperties", b"ctorch\nfloat32\n\x85")
    about = word("properties") + kind + word("size") + huge + word("chunks") + b"]" + chunk + b"a"
    entry = record("metadata\nTensorStorageMetadata", b"}(" + about + b"u")
    (tmp_path / ".metadata").write_bytes(metadata_of(word("w"), word("w") + entry))
    (tmp_path / "a").write_bytes(bytes(100))
    with pytest.raises(FormatError, match=r"a chunk is wrong.*in 100 bytes"):
        torch.read(tmp_path)


def test_names_of_zip_members_are_not_longer_than_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("rQQQQ/data.pkl", b"N.")
    path.write_bytes(path.read_bytes().replace(b"QQQQ", b"\x82\x82\x82\x82"))  # é in the old code page
    assert torch.read(path).state() is None
