"""Other disks than a large ext4: full ones, mount points, read-only ones, and those where calls are missing."""

import contextlib
import ctypes
import errno
import os
import platform
import shutil
import struct
import subprocess
import sys

import numpy as np
import pytest

import varstore as vs
from varstore.errors import CheckpointExists, InvalidName, OutOfSpace, StorageError

MIB = 1 << 20


def command(*words):
    """Run a program as root would; skip where it is missing or not permitted."""
    if shutil.which(words[0]) is None:
        pytest.skip(f"{words[0]} is not installed")
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"not permitted here: {' '.join(map(str, words))}: {done.stderr.strip()}")


@contextlib.contextmanager
def mounted(place, *words):
    place.mkdir(exist_ok=True)
    command("mount", *words, str(place))
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def tmpfs(place, size, *options):
    return mounted(place, "-t", "tmpfs", "-o", ",".join([f"size={size}", *options]), "tmpfs")


@contextlib.contextmanager
def ext4(place, size, *features):
    image = place.with_suffix(".image")
    with open(image, "wb") as file:
        file.truncate(size)
    command("mkfs.ext4", "-q", "-m", "0", *features, str(image))
    with mounted(place, "-o", "loop", str(image)):
        yield place


DISKS = {"tmpfs": lambda place: tmpfs(place, 16 * MIB), "ext4": lambda place: ext4(place, 24 * MIB)}


@pytest.fixture(params=sorted(DISKS))
def disk(request, tmp_path):
    with DISKS[request.param](tmp_path / "disk") as place:
        yield place


def content(place):
    return sorted(set(os.listdir(place)) - {"lost+found"})


def free(place):
    status = os.statvfs(place)
    return status.f_bavail * status.f_frsize


def test_a_save_that_cannot_fit_is_refused_before_a_byte(disk):
    values = {"w": np.zeros(40 * MIB, np.uint8)}
    for target in ("c", "a/b/c"):
        with pytest.raises(OutOfSpace, match="nothing was written") as caught:
            vs.save(disk / target, values)
        assert f"{40 * MIB:,} bytes" in str(caught.value)
        assert "free" in str(caught.value)
        assert caught.value.errno == errno.ENOSPC
        assert content(disk) == []
    elsewhere = vs.save(disk.parent / "elsewhere", values)
    with pytest.raises(OutOfSpace, match="nothing was written") as caught:  # linked it cannot be, and copied it needs
        vs.save(disk / "c", elsewhere)
    assert f"{40 * MIB:,} bytes" in str(caught.value)
    vs.save(disk / "small", {"w": np.ones(3)})
    assert vs.verify(disk / "small").ok


@pytest.mark.parametrize("durable", [False, True])
@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("shapes", [[5 * MIB], [MIB] * 6, [1000] * 1800])
def test_a_disk_that_fills_up_meanwhile(disk, durable, overwrite, shapes):
    values = {f"v{i}": np.zeros(size, np.uint8) for i, size in enumerate(shapes)}
    if overwrite:
        vs.save(disk / "c", {"old": np.arange(3)})

    def fill(done, total):
        """Another program takes all the space but a little, once the check has passed."""
        if not (disk / "filler").exists():
            with open(disk / "filler", "wb") as file:
                os.posix_fallocate(file.fileno(), 0, max(1, free(disk) - MIB))

    with pytest.raises(OutOfSpace, match="the save was undone") as caught:
        vs.save(disk / "c", values, durable=durable, overwrite=overwrite, progress=fill)
    assert f"{sum(shapes):,} bytes" in str(caught.value)
    assert isinstance(caught.value.__cause__, OSError)
    assert content(disk) == (["c", "filler"] if overwrite else ["filler"])
    (disk / "filler").unlink()
    if overwrite:
        assert vs.load(disk / "c")["old"].tolist() == [0, 1, 2]
    fits = {name: values[name] for name in list(values)[:300]}
    vs.save(disk / "c", fits, durable=durable, overwrite=overwrite)
    assert vs.verify(disk / "c").ok


@pytest.mark.parametrize("words", [("-t", "ramfs", "ramfs"), ("-t", "tmpfs", "-o", "size=0,nr_inodes=0", "tmpfs")])
def test_zeros_do_not_say_that_a_disk_is_full(tmp_path, words):
    with mounted(tmp_path / "disk", *words) as disk:
        assert free(disk) == 0
        vs.save(disk / "c", {"w": np.ones(5000)})
        assert vs.verify(disk / "c").ok


def test_a_disk_without_inodes(tmp_path):
    with tmpfs(tmp_path / "disk", 16 * MIB, "nr_inodes=60") as disk:
        values = {f"v{i}": np.ones(3) for i in range(30)}
        with pytest.raises(OutOfSpace, match="inodes") as caught:
            vs.save(disk / "c", values)
        assert "90" in str(caught.value)
        assert content(disk) == []

        def fill(done, total):
            for i in range(20):
                (disk / f"f{i}").touch()

        fewer = {name: values[name] for name in list(values)[:15]}
        with pytest.raises(OutOfSpace, match="undone"):
            vs.save(disk / "c", fewer, progress=fill)
        assert not [name for name in content(disk) if "c" in name]
        for name in content(disk):
            (disk / name).unlink()
        vs.save(disk / "c", fewer)
        assert vs.verify(disk / "c").ok


def test_a_limit_that_no_check_can_see(tmp_path):
    """A file-size limit of the process, as batch systems set them: the write itself fails."""
    code = f"""if True:
        import resource, sys, os, numpy as np, varstore as vs
        resource.setrlimit(resource.RLIMIT_FSIZE, ({MIB}, {MIB}))
        for durable in (True, False):
            try:
                vs.save(sys.argv[1] + "/c", {{"w": np.zeros({5 * MIB}, np.uint8)}}, durable=durable)
            except vs.errors.StorageError as error:
                assert "too large" in str(error) and "undone" in str(error), error
            else:
                raise AssertionError("it was saved")
            assert os.listdir(sys.argv[1]) == []
    """
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)


def test_an_empty_mount_point_is_filled_in_place(disk):
    lost = set(os.listdir(disk))
    with pytest.raises(ZeroDivisionError):
        vs.save(disk, {"w": np.ones(3)}, progress=lambda done, total: 1 / (0 if done else 1))
    assert set(os.listdir(disk)) == lost
    with pytest.raises(OutOfSpace):
        vs.save(disk, {"w": np.zeros(40 * MIB, np.uint8)})
    vs.save(disk, {"w": np.ones(3), "lost": np.ones(2)})
    assert set(os.listdir(disk)) == lost | {"w", "lost", "manifest", "snapshot_done"}
    assert vs.verify(disk).ok
    assert vs.load(disk)["w"].tolist() == [1, 1, 1]
    assert content(disk.parent) in (["disk"], ["disk", "disk.image"])
    with pytest.raises(CheckpointExists, match="not empty"):
        vs.save(disk, {"w": np.zeros(3)})
    with pytest.raises(CheckpointExists, match="mount point"):
        vs.save(disk, {"w": np.zeros(3)}, overwrite=True)
    assert vs.load(disk)["w"].tolist() == [1, 1, 1]
    (disk / "manifest").unlink()
    assert sorted(vs.load(disk)) == ["lost", "w"]
    vs.seal(disk)
    assert vs.verify(disk).ok


def test_the_working_directory_as_target(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    vs.save(".", {"w": np.ones(3)})
    assert sorted(os.listdir()) == ["manifest", "snapshot_done", "w"]
    assert vs.load(".")["w"].tolist() == [1, 1, 1]
    with pytest.raises(CheckpointExists, match="working directory"):
        vs.save(tmp_path, {"w": np.zeros(3)}, overwrite=True)
    assert vs.load(".")["w"].tolist() == [1, 1, 1]


def test_a_read_only_disk_is_read_and_not_written(disk):
    vs.save(disk / "c", {"w": np.ones(3)})
    command("mount", "-o", "remount,ro", str(disk))
    assert vs.verify(disk / "c").ok
    assert vs.load(disk / "c")["w"].tolist() == [1, 1, 1]
    for target, overwrite in (("d", False), ("a/b", False), ("c", True)):
        with pytest.raises(StorageError, match="Read-only") as caught:
            vs.save(disk / target, {"w": np.zeros(3)}, overwrite=overwrite)
        assert caught.value.errno == errno.EROFS
        assert isinstance(caught.value, OSError)
    with pytest.raises(OSError, match="Read-only"):
        vs.seal(disk / "c")
    assert content(disk) == ["c"]


@contextlib.contextmanager
def exfat(place, size):
    """A disk that has neither hard links nor modes, and folds case."""
    image = place.with_suffix(".image")
    with open(image, "wb") as file:
        file.truncate(size)
    command("mkfs.exfat", str(image))
    with mounted(place, "-t", "exfat-fuse", "-o", "loop", str(image)):
        yield place


def refuse_names_that_are_one(folder, pairs):
    for names in pairs:
        with pytest.raises(InvalidName, match="differences in case") as caught:
            vs.save(folder / "c", {name: np.ones(3) for name in names})
        assert repr(names[1])[1:-1].split("/")[0].lower() in str(caught.value).lower()
        assert content(folder) == []
    vs.save(folder / "c", {"A": np.ones(3), "b": np.ones(3)})
    assert vs.verify(folder / "c").ok
    with pytest.raises(CheckpointExists):
        vs.save(folder / "C", {"A": np.ones(3)})


def test_names_that_exfat_takes_for_one(tmp_path):
    with exfat(tmp_path / "disk", 24 * MIB) as disk:
        refuse_names_that_are_one(disk, [("A", "a"), ("w/é", "w/É"), ("a/x", "A")])


def test_names_that_a_folding_ext4_takes_for_one(tmp_path):
    with ext4(tmp_path / "disk", 24 * MIB, "-O", "casefold") as disk:
        (disk / "folds").mkdir()
        command("chattr", "+F", str(disk / "folds"))
        refuse_names_that_are_one(disk / "folds", [("A", "a"), ("w/é", "w/e\u0301"), ("a/x", "A")])


def test_a_disk_without_links_or_modes(tmp_path):
    shared = np.arange(5000.0)
    large = np.random.default_rng(0).random(5 * MIB // 2 + 3)  # two blocks
    with exfat(tmp_path / "disk", 256 * MIB) as disk:
        (disk / "file").touch(mode=0o444)
        assert os.access(disk / "file", os.X_OK)
        with pytest.raises(OSError) as caught:  # noqa: PT011  # which one differs between kernels
            (disk / "link").hardlink_to(disk / "file")
        assert caught.value.errno in (errno.EPERM, errno.ENOSYS)
        (disk / "file").unlink()
        first = vs.save(disk / "c", {"w": shared, "tied": shared, "large": large})
        assert first["tied"].entry.alias_of == "w"
        vs.save(disk / "d", first)
        assert vs.verify(disk / "d").ok
        based = vs.save(disk / "d", {"w": shared, "large": large}, overwrite=True, base=first)
        bare = vs.save(disk / "bare", {"w": shared, "large": large}, manifest=False)
        again = vs.save(disk / "again", bare)  # what no digest is known of is copied and hashed
        assert again["large"].digests == based["large"].digests == first["large"].digests
        assert content(disk) == ["again", "bare", "c", "d"]
        for name in content(disk):
            assert vs.verify(disk / name).ok
            loaded = vs.load(disk / name)
            np.testing.assert_array_equal(loaded["large"], large)
            np.testing.assert_array_equal(loaded["w"], shared)


def test_a_disk_without_links_that_fills_up(tmp_path):
    with exfat(tmp_path / "disk", 24 * MIB) as disk:
        first = vs.save(disk / "c", {"w": np.ones(14 * MIB, np.uint8)})
        with pytest.raises(OutOfSpace, match="undone") as caught:
            vs.save(disk / "d", first)
        assert f"at least {14 * MIB:,} bytes" in str(caught.value)
        assert "base=" not in str(caught.value)
        assert content(disk) == ["c"]


def test_links_need_no_inodes_but_their_folders(tmp_path):
    with ext4(tmp_path / "disk", 24 * MIB, "-N", "160") as disk:
        values = {f"v{i}": np.full(3, i) for i in range(30)}
        first = vs.save(disk / "c", values)
        assert os.statvfs(disk).f_favail < 3 * len(values)
        with pytest.raises(OutOfSpace, match="too few files") as caught:
            vs.save(disk / "d", values)
        assert "90" in str(caught.value)
        assert content(disk) == ["c"]
        before = os.statvfs(disk).f_favail
        vs.save(disk / "d", first)
        assert before - os.statvfs(disk).f_favail == len(values) + len(["d", "manifest", "snapshot_done"])
        assert vs.verify(disk / "d").ok


# ---- a kernel, or a sandbox, where calls are missing: a real one, made of a seccomp filter

MISSING = {  # x86_64's numbers, and what the kernel answers there
    "openat2": (437, errno.ENOSYS),
    "renameat2": (316, errno.EINVAL),
    "syncfs": (306, errno.ENOSYS),
    "fallocate": (285, errno.EOPNOTSUPP),
    "linkat": (265, errno.EPERM),
    "copy_file_range": (326, errno.ENOSYS),
    "flock": (73, errno.ENOLCK),
}

FILTER = """
import ctypes, sys
code = bytes.fromhex(sys.argv[1])
class Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))
libc = ctypes.CDLL(None, use_errno=True)
program = Program(len(code) // 8, code)
if libc.prctl(38, 1, 0, 0, 0) or libc.prctl(22, 2, ctypes.byref(program), 0, 0):
    print("no seccomp"); sys.exit(77)
import os, shutil, stat, numpy as np, varstore as vs
from varstore import errors
home = sys.argv[2]; os.chdir(home)
def same(a, b): return os.stat(f"{a}/out").st_ino == os.stat(f"{b}/out").st_ino
def raises(error, call):
    try: call()
    except error as caught: return str(caught)
    raise AssertionError(f"no {error.__name__}")
"""

SCENES = {
    "everything missing": (
        tuple(MISSING),
        """
shared = np.arange(700_000.0)
values = {"w": shared, "tied": shared, "s": np.int8(3)} | {f"many{i}": np.ones(3) for i in range(20)}
vs.save("c", values)
vs.save("d", vs.open("c"))
assert not same("c/w", "d/w") and not same("c/w", "c/tied")
vs.save("d", {"w": vs.open("d")["w"], "new": np.ones(3)}, overwrite=True)
assert sorted(vs.load("d")) == ["new", "w"] and np.array_equal(vs.load("d")["w"], shared)
vs.save("e", values, base="c")
assert vs.diff("c", "e").equal
raises(errors.CheckpointExists, lambda: vs.save("c", values))
assert stat.S_IMODE(os.stat("d/w/out").st_mode) == 0o444
for name in "cde": assert vs.verify(name).ok
assert sorted(os.listdir()) == ["c", "d", "e"]
        """,
    ),
    "no way to open beneath": (
        ("openat2",),
        """
vs.save("c", {"w": np.arange(3), "x": np.ones(3)})
os.unlink("c/w/out")
open("secret", "wb").write(b"s" * 24)
for target in ("../../secret", home + "/secret", "/dev/zero", "out", "/proc/self/fd/0"):
    os.symlink(target, "c/w/out")
    for call in (lambda: vs.load("c"), lambda: vs.open("c")["w"][0], lambda: vs.save("d", vs.open("c"))):
        assert "leads out" in raises(errors.UnsafeContent, call)
    assert not vs.verify("c").ok
    os.unlink("c/w/out")
os.symlink("gone", "c/w/out")
assert "missing" in raises(errors.FormatError, lambda: vs.load("c"))
os.unlink("c/w/out"); os.mkfifo("c/w/out")
assert "not a regular file" in raises(errors.UnsafeContent, lambda: vs.load("c"))
os.unlink("c/w/out"); os.rename("c/x/out", "c/x/real"); os.symlink("real", "c/x/out")
assert vs.load("c", include="x")["x"].tolist() == [1, 1, 1]
shutil.move("c/x", "moved"); os.symlink("../moved", "c/x")
assert "leads out" in raises(errors.UnsafeContent, lambda: vs.load("c", include="x"))
        """,
    ),
    "no exchange": (
        ("renameat2",),
        """
vs.save("c", {"w": np.zeros(3)})
for i in range(3):
    vs.save("c", {"w": np.full(3, i)}, overwrite=True)
    assert vs.load("c")["w"][0] == i and os.listdir() == ["c"]
os.rename("c", ".c.replaced-00000000")   # a crash between the two steps
os.mkdir(".c.saving-00000000")
vs.save("c", {"w": np.full(3, 7)}, overwrite=True)
assert vs.load("c")["w"][0] == 7 and os.listdir() == ["c"]
os.rename("c", ".c.replaced-00000000")
assert vs.clean(".") == [] and vs.load("c")["w"][0] == 7
        """,
    ),
    "no links": (
        ("linkat", "copy_file_range"),
        """
first = vs.save("c", {"w": np.arange(500_000), "e": np.empty(0)})
vs.save("d", first)
assert not same("c/w", "d/w") and vs.verify("d").ok
        """,
    ),
}


def seccomp_filter(calls):
    """A BPF program that answers these calls with their errors and allows all others."""
    load_number, jump_if_equal, answer = 0x20, 0x15, 0x06
    program = [(load_number, 0, 0, 0)]
    for call in calls:
        number, error = MISSING[call]
        program += [(jump_if_equal, 0, 1, number), (answer, 0, 0, 0x00050000 | error)]
    program.append((answer, 0, 0, 0x7FFF0000))
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in program)


@pytest.mark.parametrize("scene", sorted(SCENES))
def test_where_calls_are_missing(tmp_path, scene):
    if platform.machine() != "x86_64" or ctypes.sizeof(ctypes.c_void_p) != 8 or sys.platform != "linux":
        pytest.skip("the filter is written for Linux on x86_64")
    calls, code = SCENES[scene]
    arguments = [sys.executable, "-c", FILTER + code, seccomp_filter(calls).hex(), str(tmp_path)]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    if done.returncode == 77:
        pytest.skip("seccomp filters are not permitted here")
    assert done.returncode == 0, done.stderr
