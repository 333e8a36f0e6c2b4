"""Overwriting: other people's files, overwriters at the same time, Ctrl-C at each call, and what cannot be renamed."""

import contextlib
import errno
import os
import shutil
import stat
import subprocess
import sys
import time

import numpy as np
import pytest
from support import run_python

import varstore as vs
from varstore.disk.save import foreign, staging
from varstore.disk.save.leftovers import discard
from varstore.errors import CheckpointExists, StorageError, UsageError
from varstore.layout.names import MARKER
from varstore.storage import syscalls

OLD = {"w": np.zeros(4), "deep/v": np.ones(2), "deep/er/x": np.ones(2)}
NEW = {"w": np.arange(4.0), "other/y": np.ones(3)}


@pytest.fixture
def path(tmp_path):
    vs.save(tmp_path / "c", OLD)
    return tmp_path / "c"


# --- other people's files ----------------------------------------------------------------------------------------


def put_many(path):
    for name in ("config.json", "w/notes.txt", "deep/er/x/notes.txt", "logs/tb/events", ".hidden"):
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(name)
        (path / name).chmod(0o640)
    (path / "logs" / "latest").symlink_to("tb")
    (path / "dangling").symlink_to("nowhere")
    vs.save(path / "nested", {"precious": np.arange(3)})
    return ["config.json", "w/notes.txt", "deep/er/x/notes.txt", "logs/tb/events", ".hidden"]


@pytest.mark.parametrize("linked", [True, False], ids=["links", "copies"])
@pytest.mark.parametrize("durable", [True, False])
def test_other_peoples_files_are_kept_by_request(path, monkeypatch, durable, linked):
    names = put_many(path)
    inodes = {name: (path / name).stat().st_ino for name in names}

    def refuse(*arguments, **options):
        raise PermissionError(errno.EPERM, "no links here")

    if not linked:
        monkeypatch.setattr(os, "link", refuse)
    vs.save(path, NEW, overwrite=True, foreign="keep", durable=durable)
    monkeypatch.undo()
    assert vs.load(path)["w"].tolist() == [0, 1, 2, 3]
    assert not (path / "deep" / "v").exists()
    for name in names:
        assert (path / name).read_text() == name
        assert stat.S_IMODE((path / name).stat().st_mode) == 0o640
        assert ((path / name).stat().st_ino == inodes[name]) == linked
    assert os.readlink(path / "logs" / "latest") == "tb"
    assert os.readlink(path / "dangling") == "nowhere"
    assert vs.load(path / "nested")["precious"].tolist() == [0, 1, 2]
    assert vs.verify(path / "nested").ok
    assert os.listdir(path.parent) == ["c"]


@pytest.mark.parametrize("is_settled", [True, False])
@pytest.mark.parametrize("name", ["notes.txt", "w/notes.txt", "logs/tb/events"])
def test_a_file_that_appears_during_the_save_is_not_lost(path, monkeypatch, name, is_settled):
    if is_settled:
        monkeypatch.setattr(foreign, "_SETTLED", 0)

    def put(done, total):
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text("mine")

    for choice in ("error", "keep"):
        vs.save(path, NEW, overwrite=True, progress=put, foreign=choice)
        assert (path / name).read_text() == "mine"
        assert vs.load(path)["w"].tolist() == [0, 1, 2, 3]
        assert os.listdir(path.parent) == ["c"]
    vs.save(path, OLD, overwrite=True, progress=put, foreign="delete")
    assert not (path / name).exists()


@pytest.mark.parametrize("how", ["exchange", "two renames"])
@pytest.mark.parametrize("manifest", [True, False])
def test_a_file_that_appears_at_the_last_moment_is_not_lost(path, monkeypatch, how, manifest):
    vs.save(path, OLD, overwrite=True, manifest=manifest)
    rename = os.rename

    def exchange(*arguments):
        (path / "w" / "notes.txt").write_text("mine")
        missing() if how == "two renames" else real(*arguments)

    def renamed(source, target, **options):
        if source == "c":
            (path / "deep" / "v" / "later.txt").write_text("mine")
        rename(source, target, **options)

    real = syscalls.exchange
    monkeypatch.setattr(syscalls, "exchange", exchange)
    monkeypatch.setattr(os, "rename", renamed)
    vs.save(path, NEW, overwrite=True)
    assert (path / "w" / "notes.txt").read_text() == "mine"
    assert (path / "deep" / "v" / "later.txt").exists() == (how == "two renames")
    assert sorted(vs.load(path)) == sorted(NEW)
    assert vs.verify(path).ok
    assert os.listdir(path.parent) == ["c"]


def test_a_file_of_a_checkpoint_that_another_overwriter_replaces_at_once_is_not_lost(path, monkeypatch):
    other, carried = path.with_name("other"), []
    vs.save(other, {"w": np.ones(1)})

    def carry(*arguments):
        if not carried:
            os.rename(path, path.with_name("first"))
            os.rename(other, path)
        carried.append(real(*arguments))
        return carried[-1]

    real = foreign.carry
    monkeypatch.setattr(foreign, "carry", carry)
    vs.save(path, NEW, overwrite=True, progress=lambda done, total: (path / "notes.txt").write_text("mine"))
    assert len(carried) == 2
    assert vs.load(path)["w"].tolist() == [1]
    assert (path / "notes.txt").read_text() == "mine"


def test_a_file_that_appears_where_the_new_one_has_its_own_stays_with_the_old_one(path):
    with pytest.raises(StorageError, match=r"stands; .*'other'"):
        vs.save(path, NEW, overwrite=True, progress=lambda done, total: (path / "other").write_text("mine"))
    assert sorted(vs.load(path)) == sorted(NEW)
    ((left, reason),) = vs.clean(path.parent).kept.items()
    assert "'other'" in reason
    os.rename(os.path.join(left, "other"), path.with_name("mine"))
    assert vs.clean(path.parent) == [left]
    assert path.with_name("mine").read_text() == "mine"


@pytest.mark.parametrize("infix", [".saving-", ".replaced-"])
def test_what_others_put_into_a_checkpoint_outlives_a_crash_after_the_exchange(path, infix):
    left = path.with_name(f".c{infix}01234567")
    os.rename(path, left)
    (left / "w" / "notes.txt").write_text("mine")
    (left / "copied").write_text("mine")
    vs.save(path.with_name("n"), NEW)
    path.with_name("n").rename(path)
    (path / "copied").write_text("mine")
    assert vs.clean(path.parent) == [str(left)]
    assert (path / "w" / "notes.txt").read_text() == "mine"
    assert os.listdir(path.parent) == ["c"]


def test_what_is_deleted_goes_with_all_in_it(path):
    (path / "notes.txt").write_text("mine")
    discard(path)
    assert os.listdir(path.parent) == []


@pytest.mark.parametrize("is_settled", [True, False])
def test_folders_that_did_not_change_since_some_time_are_listed_once(path, monkeypatch, is_settled):
    if is_settled:
        time.sleep(0.02)  # the clock of the file system may be that much behind
        monkeypatch.setattr(foreign, "_SETTLED", 0)
    listed, scandir = [], os.scandir

    def listing(folder):
        if isinstance(folder, int):
            listed.append(os.path.basename(os.readlink(f"/proc/self/fd/{folder}")))
        return scandir(folder)

    monkeypatch.setattr(foreign.os, "scandir", listing)
    vs.save(path, NEW, overwrite=True)
    assert [listed.count(name) for name in ("w", "v", "x")] == [1 if is_settled else 2] * 3


def test_files_are_kept_as_they_are_at_the_end_of_the_save(path, monkeypatch):
    for name in ("replaced", "appended", "removed"):
        (path / name).write_text("old")
    commit = staging.Staging.commit

    def change(*arguments):
        (path / "other").write_text("new")
        os.replace(path / "other", path / "replaced")
        with open(path / "appended", "a") as file:
            file.write(", more")
        (path / "removed").unlink()
        return commit(*arguments)

    monkeypatch.setattr(staging.Staging, "commit", change)
    vs.save(path, {"w": np.arange(4.0)}, overwrite=True, foreign="keep")
    assert (path / "replaced").read_text() == "new"
    assert (path / "appended").read_text() == "old, more"
    assert not (path / "removed").exists()


def test_a_file_where_the_new_checkpoint_has_its_own_is_not_kept(path):
    (path / "other").write_text("mine")
    with pytest.raises(CheckpointExists, match="other"):
        vs.save(path, NEW, overwrite=True, foreign="keep")
    (path / "other").unlink()
    (path / "other" / "y").mkdir(parents=True)
    (path / "other" / "y" / "out").write_text("mine")
    with pytest.raises(CheckpointExists, match="out"):
        vs.save(path, NEW, overwrite=True, foreign="keep")
    assert (path / "other" / "y" / "out").read_text() == "mine"
    assert vs.load(path)["w"].tolist() == [0, 0, 0, 0]
    assert os.listdir(path.parent) == ["c"]


@pytest.mark.parametrize("foreign", ["ignore", None, True])
def test_another_choice_is_refused(path, foreign):
    with pytest.raises(UsageError, match="foreign"):
        vs.save(path, NEW, overwrite=True, foreign=foreign)


def test_without_a_manifest_each_folder_with_out_is_a_variable(path):
    (path / "manifest").unlink()
    vs.save(path, NEW, overwrite=True)
    (path / "manifest").unlink()
    (path / "w" / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointExists, match=r"w/notes\.txt"):
        vs.save(path, NEW, overwrite=True)


def test_a_damaged_checkpoint_can_be_overwritten(path):
    (path / "manifest").chmod(0o644)
    (path / "manifest").write_bytes(b"torn")
    vs.save(path, NEW, overwrite=True)
    (path / "w" / "out").unlink()
    (path / "w" / "meta").unlink()
    (path / "w").rmdir()
    (path / "w").write_text("a file")
    vs.save(path, OLD, overwrite=True)
    assert vs.verify(path).ok


# --- at the same time --------------------------------------------------------------------------------------------

OVERWRITER = """
import errno, os, sys
import numpy as np
import varstore as vs
from varstore.storage import syscalls
def missing(*arguments):
    raise OSError(errno.ENOSYS, "not here")
if sys.argv[2] == "two renames":
    syscalls.exchange = missing
path, who = sys.argv[1], int(sys.argv[3])
for i in range(80):
    vs.save(path, {"a": np.full(4, who), f"b{who}/c{i % 3}": np.full(9, i)}, overwrite=True, durable=False)
"""


@pytest.mark.parametrize("how", ["exchange", "two renames"])
def test_overwriters_take_turns(tmp_path, how):
    vs.save(tmp_path / "c", OLD)
    command = [sys.executable, "-c", OVERWRITER, tmp_path / "c", how]
    writers = [subprocess.Popen([*command, str(who)], stderr=subprocess.PIPE, text=True) for who in range(3)]
    complaints = [writer.communicate(timeout=200)[1] for writer in writers]
    assert complaints == ["", "", ""]
    assert vs.verify(tmp_path / "c").ok
    assert os.listdir(tmp_path) == ["c"]


def missing(*arguments):
    raise OSError(errno.ENOSYS, "not here")


def test_what_is_set_aside_is_not_given_back_while_it_is_removed(path, monkeypatch):
    unlink, aside = os.unlink, path.with_name(".c.replaced-ffffffff")

    def act_between(name, **options):
        if name == MARKER and not aside.exists():
            monkeypatch.setattr(os, "unlink", unlink)
            path.rename(aside)  # another overwriter is between its two renames, as a third one cleans
            vs.clean(path.parent)
        unlink(name, **options)

    monkeypatch.setattr(syscalls, "exchange", missing)
    monkeypatch.setattr(os, "unlink", act_between)
    vs.save(path, NEW, overwrite=True)
    assert os.listdir(path.parent) == [aside.name]
    vs.clean(path.parent)
    assert vs.load(path)["w"].tolist() == [0, 1, 2, 3]
    assert vs.verify(path).ok
    assert os.listdir(path.parent) == ["c"]


def test_of_two_that_were_set_aside_the_last_one_gets_its_name_back(path):
    for name in ("ffffffff", "00000000", "88888888"):
        vs.save(path.parent / name, {"who": np.array([int(name, 16)])})
    shutil.rmtree(path)
    for name in ("ffffffff", "00000000", "88888888"):  # its new one had the name, and went the same way
        (path.parent / name).rename(path.with_name(f".c.replaced-{name}"))
        time.sleep(0.02)
    vs.clean(path.parent)
    assert vs.load(path)["who"] == [0x88888888]
    assert os.listdir(path.parent) == ["c"]


def test_what_takes_the_path_while_it_is_looked_at_is_not_looked_at(path, monkeypatch):
    other, known, files = path.with_name("other"), foreign._known_folders, staging.foreign_files
    vs.save(other, NEW)

    def swap(call, *arguments):
        result = call(*arguments)
        syscalls.exchange("c", "other", parent)
        return result

    parent = os.open(path.parent, os.O_RDONLY)
    try:
        monkeypatch.setattr(foreign, "_known_folders", lambda *arguments: swap(known, *arguments))
        monkeypatch.setattr(staging, "foreign_files", lambda *arguments: swap(files, *arguments))
        vs.save(path, NEW, overwrite=True)
    finally:
        os.close(parent)
    assert sorted(vs.load(path)) == sorted(NEW)


def test_a_target_that_is_away_for_a_moment_still_has_a_disk(path, monkeypatch):
    statvfs, asked = syscalls.statvfs, []

    def go_away_first(place):
        if not asked:
            path.rename(path.with_name(".c.replaced-ffffffff"))
        asked.append(place)
        return statvfs(place)

    monkeypatch.setattr(syscalls, "statvfs", go_away_first)
    vs.save(path, NEW, overwrite=True)
    assert asked == [str(path), str(path.parent)]
    assert sorted(vs.load(path)) == sorted(NEW)


def test_a_manifest_that_cannot_be_read_is_not_one_that_says_nothing(path, monkeypatch):
    beneath = syscalls.openat2_beneath

    def fail(relative, *arguments, **options):
        if relative == "manifest":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return beneath(relative, *arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(syscalls, "openat2_beneath", fail)
        with pytest.raises(StorageError, match="manifest"):
            vs.save(path, NEW, overwrite=True)
    assert vs.load(path)["w"].tolist() == [0, 0, 0, 0]


CTRL_C_AT_EACH_CALL = """
import errno, faulthandler, os, shutil, signal, sys
import numpy as np
import varstore as vs
from varstore.storage import syscalls

os.chdir(sys.argv[1])
watched = ("staging.py", "leftovers.py", "removing.py", "claims.py", "folders.py")
def missing(*arguments):
    raise OSError(errno.ENOSYS, "not here")
if sys.argv[2] == "two renames":
    syscalls.exchange = missing
old, new = {"a": np.zeros(3)}, {"a": np.ones(3), "b/c": np.ones(3)}
def interrupted(moment):
    passed = 0
    def profile(frame, event, argument):
        nonlocal passed
        if event in ("call", "c_call", "c_return", "return") and frame.f_code.co_filename.endswith(watched):
            passed += 1
            if passed == moment:
                sys.setprofile(None)
                os.kill(os.getpid(), signal.SIGINT)
    vs.save("c", old, overwrite=os.path.isdir("c"), durable=False)
    before = set(os.listdir("/proc/self/fd"))
    sys.setprofile(profile)
    outcome = "saved"
    try:
        vs.save("c", new, overwrite=True, durable=False)
    except KeyboardInterrupt:
        outcome = "interrupted"
    finally:
        sys.setprofile(None)
    for left in set(os.listdir("/proc/self/fd")) - before:  # between a call's return and the assignment of its result
        try:
            os.close(int(left))
        except OSError:
            pass
    vs.clean(".")
    assert os.listdir(".") == ["c"], (moment, os.listdir("."))
    assert vs.verify("c").ok, moment
    assert vs.load("c")["a"][0] == 1 or outcome == "interrupted", moment
    return passed >= moment
moment = 1
faulthandler.dump_traceback_later(300, exit=True)
while interrupted(moment):
    moment += 1
print(moment)
"""


@pytest.mark.parametrize("how", ["exchange", "two renames"])
def test_ctrl_c_at_each_call_leaves_the_old_or_the_new(tmp_path, how):
    assert int(run_python(CTRL_C_AT_EACH_CALL, tmp_path, how, timeout=400).stdout) > 50


# --- what cannot be renamed --------------------------------------------------------------------------------------

CALLS = ("rename", "unlink", "rmdir", "mkdir")


def die_at(monkeypatch, moment, *, all_folders):
    """Have folders not be renamed, as in an overlay, and this process die at the n-th call that changes a directory."""
    real = {name: getattr(os, name) for name in CALLS}
    create = syscalls.create
    calls = 0

    def count():
        nonlocal calls
        calls += 1
        if calls == moment:
            os._exit(9)

    def rename(old, new, *, src_dir_fd=None, dst_dir_fd=None):
        count()
        if stat.S_ISDIR(os.stat(old, dir_fd=src_dir_fd, follow_symlinks=False).st_mode) and (all_folders or old == "c"):
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        real["rename"](old, new, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd)

    def counted(name):
        def call(*arguments, **options):
            count()
            return real[name](*arguments, **options)

        return call

    def crosses(*_):
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    def created(name, dir_fd):
        count()
        return create(name, dir_fd)

    for name in CALLS[1:]:
        monkeypatch.setattr(os, name, counted(name))
    monkeypatch.setattr(os, "rename", rename)
    monkeypatch.setattr(syscalls, "exchange", crosses)
    monkeypatch.setattr(syscalls, "create", created)


def in_a_child(act):
    pid = os.fork()
    if not pid:
        with contextlib.suppress(BaseException):
            act()
            os._exit(0)
        os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.parametrize("durable", [True, False])
@pytest.mark.parametrize("all_folders", [False, True], ids=["old folders", "any folder"])
def test_what_cannot_be_renamed_is_replaced_whatever_happens(tmp_path, monkeypatch, all_folders, durable):
    path = tmp_path / "c"
    seen = set()

    def act(moment):
        die_at(monkeypatch, moment, all_folders=all_folders)
        vs.save(path, NEW, overwrite=True, durable=durable)

    def clean():
        die_at(monkeypatch, 0, all_folders=all_folders)
        vs.clean(tmp_path)

    for moment in range(1, 1000):
        with contextlib.suppress(CheckpointExists):
            vs.save(path, OLD)
        status = in_a_child(lambda moment=moment: act(moment))
        assert status in (0, 9)
        with contextlib.suppress(vs.VarstoreError):
            seen.add(float(vs.load(path)["w"][1]))  # whole, or an error
        assert in_a_child(clean) == 0
        assert os.listdir(tmp_path) == ["c"], moment
        assert vs.verify(path).ok, moment
        assert vs.load(path)["w"].tolist() in ([0, 0, 0, 0], [0, 1, 2, 3])
        if not status:
            break
        vs.save(path, OLD, overwrite=True)
    assert seen == {0, 1}
    assert moment > 25


def test_what_somebody_saved_meanwhile_is_not_taken_for_what_is_left(tmp_path, monkeypatch):
    path = tmp_path / "c"
    vs.save(path, OLD)

    def act(moment):
        die_at(monkeypatch, moment, all_folders=False)
        vs.save(path, NEW, overwrite=True)

    for moment in range(1, 1000):
        if not in_a_child(lambda moment=moment: act(moment)):
            break
        if path.exists():
            path.rename(tmp_path / "going")
        path.mkdir()
        (path / "mine").touch()
        vs.clean(tmp_path)
        assert os.listdir(path) == ["mine"]
        for name in os.listdir(tmp_path):
            shutil.rmtree(tmp_path / name)
        vs.save(path, OLD)
    assert moment > 25


def test_of_two_new_saves_where_nothing_can_be_renamed_one_wins(tmp_path, monkeypatch):
    path = tmp_path / "c"

    def save(who):
        die_at(monkeypatch, 0, all_folders=True)
        vs.save(path, {"who": np.full(3, who), f"w{who}": np.ones(3)}, durable=False)

    def look(done, total):
        if not path.exists():
            assert in_a_child(lambda: save(1)) == 0

    with monkeypatch.context() as patched:
        die_at(patched, 0, all_folders=True)
        with pytest.raises(CheckpointExists):
            vs.save(path, {"who": np.full(3, 2), "w2": np.ones(3)}, durable=False, progress=look)
    assert sorted(vs.load(path)) == ["w1", "who"]
    assert vs.verify(path).ok
    assert os.listdir(tmp_path) == ["c"]
    for _ in range(10):
        shutil.rmtree(path)
        pids = []
        for who in range(3):
            pid = os.fork()
            if not pid:
                with contextlib.suppress(BaseException):
                    save(who)
                    os._exit(0)
                os._exit(1)
            pids.append(pid)
        statuses = [os.waitpid(pid, 0)[1] for pid in pids]
        assert statuses.count(0) == 1
        assert len(vs.load(path)) == 2
        assert vs.verify(path).ok
        assert os.listdir(tmp_path) == ["c"]


def test_what_is_replaced_by_a_checkpoint_that_cannot_be_read_back_stays(path, monkeypatch):
    monkeypatch.setattr(syscalls, "file_system_type", lambda _: min(syscalls.SHARED_FILE_SYSTEMS))
    monkeypatch.setattr(staging, "_PAUSES", ())
    monkeypatch.setattr(staging.Staging, "_digest_there", lambda _: None)
    with pytest.raises(StorageError, match="does not give back"):
        vs.save(path, NEW, overwrite=True)
    (left,) = set(os.listdir(path.parent)) - {"c"}
    assert set(vs.open(path)) == set(NEW)
    assert set(vs.open(path.parent / left)) == set(OLD)
