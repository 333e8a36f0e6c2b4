"""Names and folders, both directions (FORMAT F6)."""

from __future__ import annotations

import enum
import os
import re
import tempfile

import pytest
from hypothesis import example, given, strategies as st
from support import any_names, names

from varstore.errors import InvalidName
from varstore.layout.names import folder_of, is_safe_folder, name_of

pytestmark = pytest.mark.core

ENCODINGS = [
    ("conv1-weight", "conv1-weight"),
    ("System-Train-TrainStep-train_job", "System-Train-TrainStep-train_job"),
    ("optimizer/momentum/conv1-weight", "optimizer/momentum/conv1-weight"),
    ("layers.0.w", "layers.0.w"),
    (".hidden", ".hidden"),
    (" a", " a"),
    ("層/é", "層/é"),
    ("e\u0301", "e\u0301"),
    # what would lead out, or nowhere
    (".", "%2E"),
    ("..", ".%2E"),
    ("...", "..%2E"),
    ("a/../b", "a/.%2E/b"),
    ("/", "%00/%00"),
    ("/etc/passwd", "%00/etc/passwd"),
    ("a//b", "a/%00/b"),
    ("a/", "a/%00"),
    ("a.", "a%2E"),
    ("a ", "a%20"),
    (". .", ". %2E"),
    # characters that some system refuses
    ("100%", "100%25"),
    ("%00", "%2500"),
    ("%2E", "%252E"),
    ("a\\b", "a%5Cb"),
    ("C:", "C%3A"),
    ('*?"<>|', "%2A%3F%22%3C%3E%7C"),
    ("a\nb", "a%0Ab"),
    ("\x7f", "%7F"),
    ("\x85", "%C2%85"),
    ("\x80\x9f", "%C2%80%C2%9F"),
    ("\xa0", "\xa0"),
    # files of the format
    ("out", "%6Fut"),
    ("meta", "%6Deta"),
    ("zarr.json", "%7Aarr.json"),
    ("a/out", "a/%6Fut"),
    ("a/meta/b", "a/%6Deta/b"),
    ("a/zarr.json", "a/%7Aarr.json"),
    ("manifest", "%6Danifest"),
    ("snapshot_done", "%73napshot_done"),
    ("pickled_data", "%70ickled_data"),
    ("manifest/a", "%6Danifest/a"),
    ("a/manifest", "a/manifest"),
    ("a/snapshot_done", "a/snapshot_done"),
    ("a/pickled_data", "a/pickled_data"),
    ("%6Fut", "%256Fut"),
    ("OUT", "OUT"),
    ("output", "output"),
]

ESCAPED = re.compile(r'[%\\:*?"<>|\x00-\x1f\x7f-\x9f]|[. ]\Z')
RESERVED = {"out", "meta", "zarr.json"}
RESERVED_FIRST = {"manifest", "snapshot_done", "pickled_data"}


@pytest.mark.parametrize(("name", "folder"), ENCODINGS)
def test_the_encoding_is_exactly_this(name, folder):
    assert folder_of(name) == folder
    assert name_of(folder) == name


@given(names)
def test_every_name_comes_back(name):
    assert name_of(folder_of(name)) == name


@given(names)
def test_no_folder_leads_out_or_meets_a_file_of_the_format(name):
    folder = folder_of(name)
    assert is_safe_folder(folder)
    assert os.path.normpath(f"/root/{folder}") == f"/root/{folder}"
    parts = folder.split("/")
    assert not RESERVED.intersection(parts)
    assert parts[0] not in RESERVED_FIRST
    for part in parts:
        assert 0 < len(part.encode()) <= 255
        assert not re.search(r'[\\:*?"<>|\x00-\x1f\x7f-\x9f]|[. ]\Z', part)


@given(st.lists(names, unique=True, min_size=2, max_size=8))
@example([".", "%2E", "%252E"])
@example(["", "%00", "/"][1:])
@example(["out", "%6Fut", "%6fut"])
def test_two_names_never_share_a_folder(some):
    assert len({folder_of(name) for name in some}) == len(some)


@given(names)
def test_the_folder_can_really_be_made(name):
    with tempfile.TemporaryDirectory() as root:
        os.makedirs(os.path.join(root, folder_of(name)))
        (found,) = [folder for folder, below, _ in os.walk(root) if not below]
        assert name_of(os.path.relpath(found, root)) == name


@given(any_names)
def test_a_part_fits_255_bytes_or_is_refused(name):
    escaped = [ESCAPED.sub(lambda match: "%XX" * len(match[0].encode()), part) for part in name.split("/")]
    longest = max(len(part.encode()) for part in escaped)
    if longest <= 255:
        assert name_of(folder_of(name)) == name
    else:
        with pytest.raises(InvalidName, match=r"too long for a folder: .* at most 255") as caught:
            folder_of(name)
        assert caught.value.variable == name


@pytest.mark.parametrize(
    "part", ["a" * 255, "é" * 127 + "a", "%" * 85, "😀" * 63 + "abc", "\x85" * 42 + "abc", "a" * 252 + "."]
)
def test_255_bytes_fit_and_one_more_does_not(part):
    assert len(folder_of(part).encode()) == 255
    with pytest.raises(InvalidName, match=r"too long for a folder: found 25[67] bytes"):
        folder_of("a" + part)
    with pytest.raises(InvalidName, match=r"too long for a folder: found 25[67] bytes"):
        folder_of("fine/a" + part + "/fine")


def test_a_path_of_4096_bytes_is_refused_as_a_whole():
    fits = "/".join(["a" * 200] * 20)
    assert folder_of(fits) == fits
    with pytest.raises(
        InvalidName, match=r"the name is too long for a path: found 4,220 bytes, expected at most 4,0\d\d"
    ):
        folder_of("/".join(["a" * 200] * 21))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "a variable's name must not be empty"),
        ("a\0b", r"variable 'a\\x00b': a variable's name must not contain NUL"),
        ("a/\ud800b", r"variable 'a/\\ud800b': .* must be valid Unicode: found a lone surrogate at character 0"),
        (
            "n" * 300,
            r"variable 'n+…n+': a part of the name is too long for a folder: found 300 bytes in 'n{24}'…, "
            "expected at most 255. Split it with '/'",
        ),
        (
            3,
            r"name must be a string: found 3 \(int\). Save nested state that has other keys with save_state",
        ),
        (b"a", r"must be a string: found b'a' \(bytes\)"),
        (None, r"must be a string: found None \(NoneType\)"),
    ],
)
def test_each_refusal_says_what_is_wrong(name, message):
    with pytest.raises(InvalidName, match=message):
        folder_of(name)


def test_256_parts_fit_and_one_more_does_not():
    fits = "/".join(["a"] * 256)
    assert folder_of(fits) == fits
    with pytest.raises(InvalidName, match="the name has too many parts: found 257, expected at most 256"):
        folder_of(fits + "/a")


@given(st.text("./a\n", max_size=8))
def test_a_safe_folder_is_one_that_normalising_leaves_alone(folder):
    is_below = bool(folder) and os.path.normpath(f"/root/{folder}") == f"/root/{folder}"
    assert is_safe_folder(folder) is is_below


@pytest.mark.parametrize("folder", ["", "/", "/etc", "..", "../x", "a/..", "a/../b", "a//b", "a/", "./a", "a\0b"])
def test_a_folder_that_leads_out_is_not_safe(folder):
    assert not is_safe_folder(folder)


@pytest.mark.parametrize("folder", ["a", "a/b", "...", ".hidden", "a..b", "%2E", "out"])
def test_any_folder_below_is_safe_whoever_wrote_it(folder):
    assert is_safe_folder(folder)


def test_the_folder_of_an_enum_is_plain_text():
    class Key(str, enum.Enum):  # noqa: UP042  # not StrEnum: its format is its name
        WEIGHTS = "weights"

    assert f"{folder_of(Key.WEIGHTS)}" == "weights"
