"""Files, sets of files and folders of other systems appear whole, and what killed writers leave is removed."""

import contextlib
import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest
from support import FIXTURES
from support.confined import confined

import varstore as vs
from varstore.errors import CheckpointExists, StorageError
from varstore.storage import appearing, syscalls
from varstore.storage.appearing import is_temporary
from varstore.values.lazy import LazyArray

INDEX = "m.safetensors.index.json"


def values(filling, count=3):
    return {f"v{i}": np.full(100, filling, np.float32) for i in range(count)}


def late(filling, act, count=3):
    """Values, of which the last calls a function when it is fetched."""

    def fetch():
        act()
        return np.full(100, filling, np.float32)

    return values(filling, count - 1) | {"v~": LazyArray((100,), np.dtype(np.float32), fetch)}


def write_set(path, state):
    vs.write(path, state, shard_bytes=400)


def held(path):
    return {float(array.numpy()[0]) for array in vs.read(path).values()}


def test_a_reader_sees_the_old_set_until_the_new_one_is_complete(tmp_path):
    path, seen = tmp_path / INDEX, []
    write_set(path, values(1))
    for filling in (2, 3):
        write_set(path, late(filling, lambda: seen.append(held(path))))
        assert held(path) == {filling}
        listed = set(json.loads(path.read_text())["weight_map"].values())
        assert set(os.listdir(tmp_path)) == {INDEX, *listed}
    assert seen == [{1}, {2}]


def test_stale_shards_go_and_others_stay(tmp_path):
    others = ["m-00001-of-00003.safetensors.bak", "n-00001-of-00003.safetensors", "m-x-00001-of-00003.safetensors"]
    for name in others:
        (tmp_path / name).touch()
    write_set(tmp_path / INDEX, values(1, 5))
    (tmp_path / "m-00009-of-00009.safetensors").touch()  # of a writer that was killed before it wrote the index
    write_set(tmp_path / INDEX, values(2, 2))
    assert sorted(os.listdir(tmp_path)) == sorted(
        [INDEX, *others, *(f"m-0000{i}-of-00002.safetensors" for i in (1, 2))]
    )


def test_a_set_that_fails_leaves_the_old_one(tmp_path):
    write_set(tmp_path / INDEX, values(1))
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(ZeroDivisionError):
        write_set(tmp_path / INDEX, late(2, lambda: 1 / 0))
    assert sorted(os.listdir(tmp_path)) == before
    assert held(tmp_path / INDEX) == {1}


def test_a_set_stands_when_ctrl_c_comes_just_after_its_index_appeared(tmp_path, monkeypatch):
    def appear(place, name):
        real(place, name)
        if place.name == INDEX:
            raise KeyboardInterrupt

    write_set(tmp_path / INDEX, values(1))
    real = appearing._Place.appear
    monkeypatch.setattr(appearing._Place, "appear", appear)
    with pytest.raises(KeyboardInterrupt):
        write_set(tmp_path / INDEX, values(2))
    assert held(tmp_path / INDEX) == {2}
    assert not [name for name in os.listdir(tmp_path) if name.endswith(".tmp")]


def test_of_two_writers_of_a_set_none_takes_the_files_of_the_other(tmp_path):
    path, seen = tmp_path / INDEX, []
    write_set(path, values(1))

    def between():
        write_set(path, values(2, 4))
        seen.append(held(path))

    write_set(path, late(3, between))
    assert seen == [{2}]
    assert held(path) == {3}
    assert len(os.listdir(tmp_path)) == 1 + 3


FOLDERS = {"of": 2, "zarr": 2}


@pytest.mark.parametrize("suffix", FOLDERS)
def test_a_folder_is_replaced_whole_by_request(tmp_path, suffix):
    path, seen = tmp_path / f"m.{suffix}", []
    vs.write(path, values(1, 5))
    path.chmod(0o750)
    with pytest.raises(CheckpointExists):
        vs.write(path, values(2))
    vs.write(path, late(2, lambda: seen.append(held(path))), overwrite=True)
    assert seen == [{1}]
    assert held(path) == {2}
    assert len(vs.read(path)) == 3
    assert path.stat().st_mode & 0o777 == 0o750
    vs.convert(path, tmp_path / f"n.{suffix}")
    vs.convert(path, tmp_path / f"n.{suffix}", overwrite=True)
    assert sorted(os.listdir(tmp_path)) == [f"m.{suffix}", f"n.{suffix}"]


@pytest.mark.parametrize("suffix", FOLDERS)
def test_another_folder_is_not_replaced(tmp_path, suffix):
    path = tmp_path / f"m.{suffix}"
    path.mkdir()
    (path / "thesis.tex").write_text("mine")
    with pytest.raises(CheckpointExists):
        vs.write(path, values(2), overwrite=True)
    assert os.listdir(tmp_path) == [path.name]
    assert (path / "thesis.tex").read_text() == "mine"


@pytest.mark.parametrize("suffix", ["npz", "pt", "safetensors.index.json", *FOLDERS])
def test_what_is_written_is_synced_and_then_its_name(tmp_path, monkeypatch, suffix):
    synced = []

    def sync(fd):
        os.fsync(fd)
        synced.append((os.fstat(fd).st_ino, sorted(os.listdir(fd)) if syscalls.HAS_FOLDERS and is_folder(fd) else None))

    def is_folder(fd):
        return os.path.isdir(f"/proc/self/fd/{fd}")

    monkeypatch.setattr(syscalls, "sync", sync)
    vs.write(tmp_path / f"m.{suffix}", values(1))
    folder, names = synced[-1]
    assert folder == tmp_path.stat().st_ino
    assert [name for name in names if not is_temporary(name)] == sorted(os.listdir(tmp_path))
    inodes = {inode for inode, _ in synced}
    for folder, _, names in os.walk(tmp_path):
        for path in (folder, *(f"{folder}/{name}" for name in names)):
            assert os.stat(path).st_ino in inodes, path


def test_an_error_after_the_rename_says_that_the_file_stands(tmp_path, monkeypatch):
    def sync(fd):
        if os.path.isdir(f"/proc/self/fd/{fd}"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(syscalls, "sync", sync)
    with pytest.raises(StorageError, match="stands"):
        vs.write(tmp_path / "m.npz", values(1))
    assert held(tmp_path / "m.npz") == {1}


# --- what killed writers leave -----------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
import numpy as np
import varstore as vs
from varstore.values.lazy import LazyArray
def fetch():
    os.kill(os.getpid(), signal.SIGKILL)
late = LazyArray((100,), np.dtype(np.float32), fetch)
state = {"v0": np.ones(100, np.float32), "v1": late}
os.chdir(sys.argv[1])
"""


def killed(tmp_path, code):
    done = subprocess.run([sys.executable, "-c", KILLED + code, tmp_path], check=False, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr


@pytest.mark.parametrize("then", ["clean", "the next"])
@pytest.mark.parametrize("suffix", ["npz", "safetensors.index.json", *FOLDERS])
def test_what_a_killed_write_leaves_is_removed(tmp_path, suffix, then):
    path = tmp_path / f"m.{suffix}"
    options = "shard_bytes=400" if "index" in suffix else ""
    killed(tmp_path, f"vs.write('{path.name}', state, {options})")
    left = [name for name in os.listdir(tmp_path) if name.endswith(".tmp")]
    assert left
    if then == "clean":
        assert {str(tmp_path / name) for name in left} >= set(vs.clean(tmp_path)) > set()
        assert os.listdir(tmp_path) == []
    vs.write(path, values(1, 2))
    assert held(path) == {1}
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]
    if "index" in suffix:
        assert len(os.listdir(tmp_path)) == 2


@pytest.mark.parametrize("suffix", ["npz", "of"])
def test_what_a_living_writer_writes_stays(tmp_path, suffix):
    removed = []

    def act():
        removed.extend(vs.clean(tmp_path))
        vs.write(tmp_path / f"m.{suffix}", values(2), **({} if suffix == "npz" else {"overwrite": True}))

    with contextlib.suppress(CheckpointExists, StorageError):
        vs.write(tmp_path / f"m.{suffix}", late(1, act))
    assert removed == []
    assert held(tmp_path / f"m.{suffix}") == ({1} if suffix == "npz" else {2})
    assert os.listdir(tmp_path) == [f"m.{suffix}"]


@pytest.mark.parametrize("where", ["parent", "checkpoint"])
def test_what_a_killed_seal_leaves_is_removed(tmp_path, where):
    vs.save(tmp_path / "c", values(1))
    left = tmp_path / "c" / ".manifest.0123abcd"
    left.touch()
    directory = tmp_path if where == "parent" else tmp_path / "c"
    with open(left) as living:
        fcntl.flock(living, fcntl.LOCK_EX)
        assert vs.clean(directory) == []
    assert vs.clean(directory) == [str(left)]
    assert vs.verify(tmp_path / "c").ok


@pytest.mark.parametrize("then", ["clean", "the next"])
def test_a_killed_save_in_place_is_cleaned(tmp_path, monkeypatch, then):
    here = tmp_path / "here"
    here.mkdir()
    killed(here, "vs.save('.', {'a/b': np.ones(3), 'c': np.ones(3)} | state)")
    assert {"a", "c"} < set(os.listdir(here))
    (here / "a" / "mine.txt").write_text("mine")
    vs.save(here / "d", values(1))  # beside it
    monkeypatch.chdir(here)
    if then == "clean":
        removed = vs.clean(here)
        assert str(here / "c") in removed
    else:
        with pytest.raises(CheckpointExists):
            vs.save(".", values(2))
    assert sorted(os.listdir(here)) == ["a", "d"]
    assert (here / "a" / "mine.txt").read_text() == "mine"
    assert vs.verify(here / "d").ok
    (here / "a" / "mine.txt").unlink()
    (here / "a").rmdir()
    (here / "d").rename(tmp_path / "d")
    vs.save(".", values(3))
    assert vs.verify(".").ok


def test_a_killed_save_in_place_of_many_long_names_is_cleaned(tmp_path):
    names = [f"{i:05}{'n' * 195}" for i in range(6000)]  # more than a MiB of them
    for name in (names[0], names[-1]):
        (tmp_path / name).mkdir()
        (tmp_path / name / "out").touch()
    (tmp_path / ".saving-0123abcd").write_text("\n".join(names))
    assert {str(tmp_path / name) for name in (names[0], names[-1])} <= set(vs.clean(tmp_path))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("keeps_modes", [True, False])
def test_an_attached_file_of_a_killed_save_in_place_goes_also_where_there_are_no_modes(tmp_path, keeps_modes):
    for name in ("m.onnx", ".saving-0123abcd"):
        (tmp_path / name).write_text("m.onnx\n")
        (tmp_path / name).chmod(0o444 if keeps_modes else 0o755)
    (tmp_path / "out").write_text("mine")
    vs.clean(tmp_path)
    assert os.listdir(tmp_path) == ["out"]


def test_a_save_in_place_that_lives_is_not_cleaned(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    removed = []

    def look(done, total):
        thread = threading.Thread(target=lambda: removed.extend(vs.clean(tmp_path)))
        thread.start()
        thread.join()

    vs.save(".", values(1), progress=look)
    assert removed == []
    assert vs.verify(".").ok


SMALL_FILES = """
import os, resource, shutil, signal
from varstore.values.lazy import LazyArray
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
os.chdir(argv[0])
values = {"w": np.arange(700_000, dtype="u1"), "deep/v": np.arange(3000.0), "s": np.int8(3)}
values["tied"] = values["w"]
changed = values | {"w": values["w"] + 1}
vs.save("base", values)
calls = {
    "save": lambda: vs.save("c", values),
    "late": lambda: vs.save("c", {n: LazyArray(np.shape(v), v.dtype, lambda v=v: v) for n, v in values.items()}),
    "not durable": lambda: vs.save("c", values, durable=False),
    "overwrite": lambda: vs.save("old", changed, overwrite=True),
    "base": lambda: vs.save("c", changed, base="base"),
    "seal": lambda: vs.seal("old"),
    "async": lambda: vs.save_async("c", values).wait(20),
    "manager": lambda: vs.CheckpointManager("run").save(1, values),
    **{suffix: (lambda suffix=suffix: vs.write("f." + suffix, values)) for suffix in argv[1].split()},
}
soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
story = []
for name, call in calls.items():
    for limit in (0, 1, 30, 1000, 5000, 300_000, 699_999, 2_000_000):
        vs.save("old", values, overwrite=True)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            call()
            error = 0
        except vs.errors.StorageError as caught:
            error = caught.errno
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        whole = all(vs.verify(found).ok for found in ("base", "old", "c", "run/step-1") if os.path.exists(found))
        left = set(os.listdir(".")) - {"base", "old"}
        hidden = [n for n in (*left, *(os.listdir("run") if "run" in left else ())) if n.startswith(".")]
        story.append([name, limit, error, whole, sorted(left - {"run"}), hidden])
        for made in left:
            shutil.rmtree(made) if os.path.isdir(made) else os.unlink(made)
tell(story)
"""


def test_files_that_may_not_grow_leave_what_was_there(tmp_path):
    story = confined(SMALL_FILES, tmp_path, "npz pt safetensors of", seconds=100)
    assert len(story) == 12 * 8
    for name, limit, error, whole, left, hidden in story:
        case = (name, limit, error, left)
        assert whole, case
        assert hidden == [], case
        assert error in (0, errno.EFBIG), case
        assert (error == 0) == (limit == 2_000_000 or (name == "seal" and limit >= 1000)), case
        assert not (error and left), case


# --- a child that outlives its parent ----------------------------------------------------------------------------

FORKED = """
import os, signal, sys
import numpy as np
import varstore as vs
from varstore.values.lazy import LazyArray

os.chdir(sys.argv[1])

def fork():
    if not (child := os.fork()):
        os.close(1)  # the test waits for its end
        signal.alarm(60)
        signal.pause()
    print(child, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)

late = LazyArray((3,), np.dtype("f4"), fork)
if sys.argv[2] == "seal":
    vs.save("c", {"w": np.ones(3)})
    os.rename = lambda *_, **__: fork()
    vs.seal("c")
else:
    vs.write("target", {"w": np.ones(3), "late": late}, format=sys.argv[2])
"""


@pytest.mark.parametrize("what", ["torch", "numpy", "safetensors", "oneflow", "zarr", "seal"])
def test_a_child_does_not_hold_what_its_killed_parent_left(tmp_path, what):
    command = [sys.executable, "-c", FORKED, str(tmp_path), what]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=60)
    assert done.returncode == -signal.SIGKILL
    child = int(done.stdout)
    try:
        left = [path for path in tmp_path.rglob("*") if path.name.endswith(".tmp") or ".manifest." in path.name]
        assert len(left) == 1
        assert vs.clean(tmp_path) == [str(left[0])]
    finally:
        os.kill(child, signal.SIGKILL)


# --- a file with a part ------------------------------------------------------------------------------------------

MODEL = FIXTURES / "formats" / "onnx" / "mlp_external.onnx"


def write_model(path):
    vs.write(path, {name: 2 * np.array(array) for name, array in vs.read(MODEL).items()}, model=os.fspath(MODEL))


def die_at(monkeypatch, moment):
    """Have this process die at the n-th call that changes a directory."""
    calls = 0

    def counted(call):
        def count(*arguments, **options):
            nonlocal calls
            calls += 1
            if calls == moment:
                os._exit(9)
            return call(*arguments, **options)

        return count

    for name in ("link", "rename", "replace", "unlink", "remove"):
        monkeypatch.setattr(os, name, counted(getattr(os, name)))
    monkeypatch.setattr(syscalls, "open_fd", counted(syscalls.open_fd))


@pytest.mark.parametrize("next_call", ["clean", "write"])
def test_external_data_goes_with_the_model_that_never_was(tmp_path, monkeypatch, next_call):
    seen = set()
    for moment in range(1, 100):
        home = tmp_path / str(moment)
        home.mkdir()
        pid = os.fork()
        if not pid:
            with contextlib.suppress(BaseException):
                die_at(monkeypatch, moment)
                write_model(home / "m.onnx")
                os._exit(0)
            os._exit(1)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert status in (0, 9)
        stood = (home / "m.onnx").exists()
        seen.add((stood, (home / "m.onnx.data").exists()))
        if next_call == "clean" or stood:
            vs.clean(home)
        else:
            write_model(home / "m.onnx")
        if stood or next_call == "write":
            assert sorted(os.listdir(home)) == ["m.onnx", "m.onnx.data"]
            assert all(np.array(a).any() for a in vs.read(home / "m.onnx").values())
        else:
            assert os.listdir(home) == []
        if not status:
            break
    assert seen == {(False, False), (False, True), (True, True)}


def test_the_external_data_of_a_living_writer_stays(tmp_path, monkeypatch):
    link, sync = os.link, syscalls.sync

    def clean(*arguments, **options):
        link(*arguments, **options)
        monkeypatch.setattr(syscalls, "sync", clean_first)

    def clean_first(fd):
        monkeypatch.setattr(syscalls, "sync", sync)
        assert vs.clean(tmp_path) == []
        sync(fd)

    monkeypatch.setattr(os, "link", clean)
    write_model(tmp_path / "m.onnx")
    assert sorted(os.listdir(tmp_path)) == ["m.onnx", "m.onnx.data"]
    with pytest.raises(CheckpointExists, match=r"m\.onnx\.data"):
        write_model(tmp_path / "m.onnx")
    assert sorted(os.listdir(tmp_path)) == ["m.onnx", "m.onnx.data"]


def test_without_links_external_data_is_written_all_the_same(tmp_path, monkeypatch):
    def refuse(*arguments, **options):
        raise PermissionError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    write_model(tmp_path / "m.onnx")
    assert sorted(os.listdir(tmp_path)) == ["m.onnx", "m.onnx.data"]
