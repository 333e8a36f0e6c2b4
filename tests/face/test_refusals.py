"""Every way in which a checkpoint can be wrong: each call refuses it, at once, and says what and where."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import varstore as vs
from varstore import errors as e

pytestmark = pytest.mark.core

VALUE = np.arange(6, dtype=np.float32).reshape(2, 3)
META = "shape {\n  dim: 2\n  dim: 3\n}\ndata_type: kFloat\n"

CALLS = {
    "open": vs.open,
    "load": lambda path: vs.load(path, include="w"),
    "load unverified": lambda path: vs.load(path, include="w", verify=False),
    "map": lambda path: vs.load(path, include="w", mmap=True),
    "numpy": lambda path: vs.open(path)["w"].numpy(),
    "row": lambda path: vs.open(path)["w"][0],
    "picked": lambda path: vs.open(path)["w"][[0, 1]],
    "into": lambda path: vs.load_into({"w": np.zeros((2, 3), np.float32)}, path),
    "into columns": lambda path: vs.load_into({"w": np.zeros((2, 3, 2), np.float32)[..., 0]}, path),
    "save": lambda path: vs.save(path.parent / "copy", vs.open(path)),
    "seal": vs.seal,
    "verify": lambda path: vs.verify(path),
}
READS = frozenset(CALLS) - {"open", "save", "seal", "verify"}
ALONE = READS - {"into", "into columns"}  # load_into compares shapes first
CHECKED = READS - {"load unverified", "map", "row", "picked"}
LOADS = READS | {"save"}
ALL = frozenset(CALLS)
NONE: frozenset[str] = frozenset()  # but `verify`, which reports all of them
UNSEALED = ALL - {"seal"}


def out(path):
    return path / "w" / "out"


def replace(path, data):
    path.unlink()
    path.write_bytes(data if isinstance(data, bytes) else data.encode())


def link(target):
    def breaks(path):
        out(path).unlink()
        out(path).symlink_to(target(path) if callable(target) else target)

    return breaks


def tear_manifest(path):
    replace(path / "manifest", (path / "manifest").read_bytes()[:60])


def flip_manifest(path):
    data = bytearray((path / "manifest").read_bytes())
    data[len(data) // 2] ^= 0x10
    replace(path / "manifest", bytes(data))


def manifest_version(path):
    data = bytearray((path / "manifest").read_bytes())
    data[8] = 9
    replace(path / "manifest", bytes(data))


def fifo(*parts):
    def breaks(path):
        path.joinpath(*parts).unlink()
        os.mkfifo(path.joinpath(*parts))

    return breaks


def directory(*parts):
    def breaks(path):
        path.joinpath(*parts).unlink()
        path.joinpath(*parts).mkdir()

    return breaks


def elsewhere(path):
    """A secret outside, just as large as the variable."""
    secret = path.parent / "secret"
    secret.write_bytes(b"s" * VALUE.nbytes)
    return secret


def folder_leads_out(path):
    shutil.move(path / "w", path.parent / "outside")
    (path / "w").symlink_to(path.parent / "outside")


def meta_leads_out(path):
    (path / "w" / "meta").unlink()
    (path / "w" / "meta").symlink_to("/etc/hostname")


def meta(text):
    return lambda path: replace(path / "w" / "meta", text)


# how it is broken, which calls must refuse it, with which error, and what the message must say
WITH_MANIFEST = [
    ("no marker", lambda p: (p / "snapshot_done").unlink(), ALL, e.IncompleteCheckpoint, ["snapshot_done"]),
    ("marker is a folder", directory("snapshot_done"), ALL, e.IncompleteCheckpoint, ["marker"]),
    ("marker is a pipe", fifo("snapshot_done"), ALL, e.IncompleteCheckpoint, ["marker"]),
    ("not there", shutil.rmtree, ALL, e.CheckpointNotFound, ["no checkpoint"]),
    ("torn manifest", tear_manifest, UNSEALED, e.ManifestError, ["torn", "salvage"]),
    ("empty manifest", lambda p: replace(p / "manifest", b""), UNSEALED, e.ManifestError, ["torn", "0 bytes"]),
    ("flipped manifest", flip_manifest, UNSEALED, e.ManifestError, ["damaged or edited"]),
    ("another file", lambda p: replace(p / "manifest", b"x" * 99), UNSEALED, e.ManifestError, ["not a varstore"]),
    ("later version", manifest_version, ALL, e.ManifestError, ["version", "found 9", "upgrade varstore"]),
    ("manifest is a pipe", fifo("manifest"), UNSEALED, e.UnsafeContent, ["not a regular file"]),
    ("manifest is a folder", directory("manifest"), UNSEALED, e.UnsafeContent, ["not a regular file"]),
    ("variable gone", lambda p: shutil.rmtree(p / "w"), LOADS, e.FormatError, ["'w'", "missing"]),
    ("out gone", lambda p: out(p).unlink(), LOADS, e.FormatError, ["'w'", "w/out", "missing"]),
    ("out short", lambda p: replace(out(p), b"1234"), LOADS, e.SizeMismatch, ["'w'", "4 bytes", "24 bytes"]),
    ("out empty", lambda p: replace(out(p), b""), LOADS, e.SizeMismatch, ["'w'", "0 bytes", "24 bytes"]),
    ("out long", lambda p: replace(out(p), b"x" * 25), LOADS, e.SizeMismatch, ["'w'", "25 bytes", "24 bytes"]),
    ("out edited", lambda p: replace(out(p), b"x" * 24), CHECKED, e.DigestMismatch, ["'w'", "xxh3-128", "Restore"]),
    ("meta edited", meta(META.replace("2", "6").replace("3", "1")), NONE, e.ManifestError, ["'w'", "meta", "seal"]),
    ("meta gone", lambda p: (p / "w" / "meta").unlink(), NONE, e.FormatError, ["'w'", "meta", "missing"]),
    ("meta is a pipe", fifo("w", "meta"), {"seal"}, e.UnsafeContent, ["'w'", "not a regular file"]),
]  # fmt: skip
UNSAFE = [
    ("out is a pipe", fifo("w", "out"), LOADS, e.UnsafeContent, ["'w'", "w/out", "not a regular file"]),
    ("out is a folder", directory("w", "out"), LOADS, e.UnsafeContent, ["'w'", "w/out", "not a regular file"]),
    ("out leads out", link(elsewhere), LOADS, e.UnsafeContent, ["'w'", "leads out"]),
    ("out leads out, relatively", link("../../secret"), LOADS, e.UnsafeContent, ["'w'", "leads out"]),
    ("out is a device", link("/dev/zero"), LOADS, e.UnsafeContent, ["'w'", "leads out"]),
    ("out is a door to the process", link("/proc/self/fd/0"), LOADS, e.UnsafeContent, ["'w'", "leads out"]),
    ("out is a circle", link("out"), LOADS, e.UnsafeContent, ["'w'", "leads out"]),
    ("out leads nowhere", link("gone"), LOADS, e.FormatError, ["'w'", "missing"]),
    ("folder leads out", folder_leads_out, LOADS, e.UnsafeContent, ["'w'", "leads out"]),
]  # fmt: skip
PLAIN = [
    ("a third dimension", meta(META.replace("}", "dim: 2}")), ALONE, e.SizeMismatch, ["24 bytes", "48 bytes"]),
    ("a wider type", meta(META.replace("kFloat", "kDouble")), ALONE, e.SizeMismatch, ["'w'", "24 bytes", "48 bytes"]),
    ("sizes that overflow", meta(META.replace("dim: ", "dim: 400000000")), READS, e.MetaError, ["overflow", "2^63"]),
    ("a dimension of 2^62", meta(META.replace("2", str(2**62))), READS, e.MetaError, ["w/meta", "overflow"]),
    ("a huge size that fits", meta(META.replace("2", str(2**57))), ALONE, e.SizeMismatch, ["'w'", "24 bytes"]),
    ("a dimension beyond int64", meta(META.replace("2", str(2**64))), READS, e.MetaError, ["w/meta"]),
    ("a negative dimension", meta(META.replace("2", "-2")), READS, e.MetaError, ["w/meta", "negative", "-2"]),
    ("65 dimensions", meta("shape {" + " dim: 1" * 65 + "} data_type: 2"), READS, e.MetaError, ["w/meta", "65", "64"]),
    ("an unknown field", meta(META + "colour: 3\n"), READS, e.MetaError, ["w/meta", "colour"]),
    ("an unknown type", meta(META.replace("kFloat", "kFloat7")), READS, e.MetaError, ["w/meta", "kFloat7"]),
    ("no type", meta("shape { dim: 2 dim: 3 }"), READS, e.MetaError, ["w/meta", "data type"]),
    ("an empty meta", meta(""), READS, e.MetaError, ["w/meta", "data type"]),
    ("a type without numpy's", meta(META.replace("kFloat", "kOFRecord")), READS, e.UnsupportedDtype, ["kOFRecord"]),
    ("not text", meta(b"\xff\xfe\x00"), READS, e.MetaError, ["w/meta", "0xff"]),
    ("a meta of megabytes", meta(b" " * (1 << 21)), READS, e.FormatError, ["w/meta", "too large"]),
    ("meta is a pipe", fifo("w", "meta"), READS, e.UnsafeContent, ["'w'", "w/meta", "not a regular file"]),
    ("meta leads out", meta_leads_out, READS, e.UnsafeContent, ["w/meta", "leads out"]),
]  # fmt: skip
TABLE = (
    [("with manifest", *row) for row in WITH_MANIFEST + UNSAFE]
    + [("plain", *row) for row in UNSAFE]
    + [("plain", *row[:2], row[2] | {"save", "seal"}, *row[3:]) for row in PLAIN]
)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "c"


def make(path, kind):
    vs.save(path, {"w": VALUE, "other": np.ones(3)}, manifest=kind == "with manifest", durable=False)


@pytest.mark.parametrize(
    ("kind", "what", "breaks", "calls", "error", "says"), TABLE, ids=[f"{row[0]}, {row[1]}" for row in TABLE]
)
def test_what_is_wrong_is_refused(path, kind, what, breaks, calls, error, says):
    make(path, kind)
    breaks(path)
    for name, call in CALLS.items():
        if name in calls and name != "verify":
            with pytest.raises(error) as caught:
                call(path)
            for part in says:
                assert part in str(caught.value), f"{name}: {caught.value}"
            assert str(path) in str(caught.value), f"{name}: {caught.value}"
            assert isinstance(caught.value, e.VarstoreError)
    assert not (path.parent / "copy").exists()
    assert not [entry for entry in os.listdir(path.parent) if ".saving-" in entry]
    if path.exists():
        report = vs.verify(path)
        assert not report.ok
        assert any(says[-1] in problem or says[0] in problem for problem in report.problems), report


@pytest.mark.parametrize("breaks", [row[1] for row in WITH_MANIFEST if row[0].startswith("meta ")])
def test_the_manifest_vouches_for_shapes_and_types(path, breaks):
    """Reading does not open ``meta``; only `verify` compares it."""
    make(path, "with manifest")
    breaks(path)
    for name in READS:
        CALLS[name](path)
    assert np.array_equal(vs.load(path)["w"], VALUE)
    assert [problem for problem in vs.verify(path).problems if "w/meta" in problem]


@pytest.mark.parametrize("kind", ["with manifest", "plain"])
@pytest.mark.parametrize("to", ["twin", "../other/twin", "folder"])
def test_links_that_stay_inside_are_followed(path, kind, to):
    make(path, kind)
    data = out(path).read_bytes()
    if to == "folder":
        shutil.move(path / "w", path / "other" / "real")
        (path / "w").symlink_to("other/real")
    else:
        out(path).unlink()
        (out(path).parent / to).write_bytes(data)
        out(path).symlink_to(to)
    assert np.array_equal(vs.load(path)["w"], VALUE)
    assert np.array_equal(vs.open(path)["w"][1], VALUE[1])
    vs.save(path.parent / "copy", {"w": vs.open(path)["w"]})
    copied = path.parent / "copy" / "w" / "out"
    assert copied.read_bytes() == data
    assert not copied.is_symlink()


def test_a_link_inside_is_followed_while_others_rename(path):
    """The kernel answers "again" for a path with ``..`` while anything is being renamed."""
    make(path, "with manifest")
    shutil.move(out(path), path / "other" / "twin")
    out(path).symlink_to("../other/twin")
    names = [str(path.parent / "r1"), str(path.parent / "r2")]
    os.mkdir(names[0])
    loop = f"import os\na, b = {names!r}\nwhile True:\n    os.rename(a, b); os.rename(b, a)"
    renaming = subprocess.Popen([sys.executable, "-c", loop])
    try:
        variable = vs.open(path)["w"]
        for _ in range(300):
            assert variable.numpy()[1, 2] == 5
    finally:
        renaming.kill()
        renaming.wait()


@pytest.mark.parametrize("node", ["zero", "null"])
def test_a_device_in_place_of_out(path, node):
    make(path, "with manifest")
    out(path).unlink()
    try:
        os.mknod(out(path), 0o644 | 0o020000, os.stat(f"/dev/{node}").st_rdev)
        open(out(path), "rb").close()
    except OSError as error:
        pytest.skip(f"device nodes cannot be made or opened here: {error}")
    for call in ("load", "load unverified", "map", "numpy", "row", "into", "into columns"):
        with pytest.raises(e.FormatError, match="'w'"):
            CALLS[call](path)
    assert not vs.verify(path).ok


def test_a_manifest_that_names_a_way_out(path):
    """Even one with a good digest: somebody wrote it so."""
    from varstore._gen import manifest_pb2
    from varstore.layout.manifest import frame

    make(path, "with manifest")
    elsewhere(path)
    (path.parent / "loot").mkdir()
    shutil.copy(out(path), path.parent / "loot" / "out")
    for folder in ("../loot", "/etc", "w/../../loot", ".", ".."):
        body = manifest_pb2.Manifest(format_version=1)
        body.variables.append(manifest_pb2.Variable(name="w", folder=folder, shape=[2, 3], data_type=2, size=24))
        replace(path / "manifest", frame(body.SerializeToString()))
        for call in READS:
            with pytest.raises(e.ManifestError, match="leads out"):
                CALLS[call](path)
        assert not vs.verify(path).ok


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"size": 25}, "25 bytes cannot hold"),
        ({"shape": [2, -3]}, "negative"),
        ({"shape": [2**31, 2**31, 4]}, "overflow"),
        ({"data_type": 999}, "data type is unknown"),
        ({"digests": b"short"}, "digests cannot cover"),
        ({"attributes": "{nonsense"}, "not JSON"),
        ({"alias_of": "nobody"}, "nobody"),
        ({"encoding": "brotli"}, "brotli"),
    ],
)
def test_a_manifest_that_contradicts_itself(path, fields, says):
    from varstore._gen import manifest_pb2
    from varstore.layout.manifest import frame

    make(path, "with manifest")
    body = manifest_pb2.Manifest(format_version=1)
    body.variables.append(manifest_pb2.Variable(**{"name": "w", "shape": [2, 3], "data_type": 2, "size": 24} | fields))
    replace(path / "manifest", frame(body.SerializeToString()))
    for call in READS:
        with pytest.raises(e.FormatError, match="'w'") as caught:
            CALLS[call](path)
        assert says in str(caught.value)
    assert not vs.verify(path).ok


def test_pipes_do_not_hang(path):
    """In a child, so that a hang is a failure: nobody ever writes to these pipes."""
    make(path, "plain")
    for name in ("w/out", "w/meta", "snapshot_done", "manifest"):
        shutil.copytree(path, path.parent / name.replace("/", "-"))
        (path.parent / name.replace("/", "-") / name).unlink(missing_ok=True)
        os.mkfifo(path.parent / name.replace("/", "-") / name)
    code = """if True:
        import sys, pathlib, numpy as np, varstore as vs
        for path in sys.argv[1:]:
            assert not vs.verify(path).ok
            target = {"w": np.zeros((2, 3), np.float32)}
            for call in (vs.load, lambda p: vs.load(p, mmap=True), lambda p: vs.open(p)["w"][0], vs.seal,
                         lambda p: vs.open(p, allow_incomplete=True)["w"].numpy(), lambda p: vs.load_into(target, p),
                         lambda p: vs.save(pathlib.Path(p).parent / "copy", vs.open(p))):
                try:
                    call(path)
                except vs.VarstoreError:
                    pass
    """
    paths = [str(path.parent / name) for name in ("w-out", "w-meta", "snapshot_done", "manifest")]
    subprocess.run([sys.executable, "-c", code, *paths], check=True, timeout=30)


def test_an_unknown_name_gets_the_nearest(path):
    make(path, "with manifest")
    opened = vs.open(path)
    with pytest.raises(e.VariableNotFound, match="Did you mean 'other'"):
        opened["othr"]
    with pytest.raises(KeyError):
        opened["nothing like it"]
    assert "othr" not in opened
    with pytest.raises(e.VariableNotFound):
        vs.load(path, include="nothing*")
    with vs.open(path) as closed:
        pass
    with pytest.raises(e.UsageError, match="closed"):
        closed["w"]


def test_only_a_path_that_is_there_is_opened(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(e.CheckpointNotFound, match=r"varstore\.read"):
        vs.open(tmp_path / "file")
    with pytest.raises(FileNotFoundError):
        vs.load(Path(tmp_path / "none"))
    with pytest.raises(e.UsageError, match="empty"):
        vs.save("", {})
