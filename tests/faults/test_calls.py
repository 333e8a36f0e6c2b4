"""Killed or refused at any of its system calls, a save or a seal loses nothing but what is known: see tools/faults."""

import json
import os
import subprocess
import sys

import pytest
from support import ROOT, run_python

from tools.faults.__main__ import _in_empty_directory
from tools.faults.calls import PART
from tools.faults.jobs import FOREIGN, Lost, Outcome
from tools.faults.known import Known
from tools.faults.scenarios import SCENARIOS
from tools.faults.verdict import Verdict, outcome_of, stale

UNAVAILABLE = 3


def skip_unless_available(done):
    if done.returncode == UNAVAILABLE:
        pytest.skip(done.stderr.strip())
    return done


def run_tool(*arguments):
    command = [sys.executable, "-m", "tools.faults", *map(str, arguments)]
    return skip_unless_available(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300))


def run_with_injector(code):
    """Run code that has `injector`, `run` and the faults, and return the JSON that it prints."""
    done = skip_unless_available(run_python(PREAMBLE + code, check=False, PYTHONPATH=str(ROOT)))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


PREAMBLE = f"""
import ctypes, itertools, json, os, shutil, sys, tempfile, threading, time
from contextlib import suppress
from pathlib import Path
import numpy as np
import varstore as vs
from tools.faults import children
from tools.faults.calls import visit
from tools.faults.children import Child
from tools.faults.injector import COUNT, Injector, fault_named
from tools.faults.jobs import Unavailable
from tools.faults.readback import contents_of
from tools.faults.scenarios import TARGET, Scenario
from varstore.errors import StorageError

def run(work, at=0, fault=COUNT):
    with Child(injector, work) as child:
        return child.run(at=at, fault=fault)

try:
    injector = Injector()
    run(int)
except Unavailable as unavailable:
    sys.exit(print(unavailable, file=sys.stderr) or {UNAVAILABLE})
place = Path(tempfile.mkdtemp())
"""


def test_nothing_is_lost_at_any_call(tmp_path):
    done = run_tool("calls", "--part", "--record", tmp_path / "rows")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "rows").read_text())
    assert {row["scenario"]: row["points"] for row in rows if row["points"] < 2} == {}
    assert {(row["scenario"], row["fault"]) for row in rows} == {(name, fault) for name in PART for fault in PART[name]}


def test_nothing_is_lost_at_any_power_cut():
    done = run_tool("power", "--part")
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_count_is_that_of_strace():
    done = run_tool("count", "--scenarios")
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(scenario.name in done.stdout for scenario in SCENARIOS)


COUNTED = """
os.chdir(place)
here = os.open(".", os.O_RDONLY)
how = ctypes.create_string_buffer(24)
libc = ctypes.CDLL(None)
def work():
    thread = threading.Thread(target=os.mkdir, args=("folder",), kwargs={"dir_fd": here})
    thread.start()
    thread.join()
    os.close(libc.syscall(437, here, b"folder", how, 24))
    with os.scandir(".") as entries:
        list(entries)
    fd = os.open("file", os.O_WRONLY | os.O_CREAT, dir_fd=here)
    os.write(fd, b"0123456789")
    os.fsync(fd)
    os.close(fd)
print(json.dumps([call for call in run(work).calls if "stat" not in call]))
"""


def test_calls_are_counted_whoever_makes_them():
    """A thread, libc by itself (getdents64) and by number (openat2); scandir asks for a stat, in more than one way."""
    assert run_with_injector(COUNTED) == [
        *("mkdirat", "openat2", "close", "openat", "getdents64", "getdents64", "close"),
        *("openat", "write", "fsync", "close"),
    ]


FAULTS = """
os.chdir(place)
def work():
    fd = os.open("file", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    try:
        assert os.write(fd, b"0123456789") == 10
    finally:
        os.close(fd)
found = {}
for fault in sys.argv[1:] or ["none", "SIGKILL", "EIO", "ENOSPC", "short", "torn", "SIGINT"]:
    met = run(work, at=2, fault=COUNT if fault == "none" else fault_named(fault))
    ended = f"{met.said.error}: {met.said.message}" if met.said else met.killed_by
    found[fault] = [met.hit, os.path.basename(met.where), ended, len(met.calls), Path("file").read_text()]
print(json.dumps(found))
"""


def test_every_fault_does_what_it_is_named_for():
    assert run_with_injector(FAULTS) == {
        "none": [False, "file", ": ", 3, "0123456789"],
        "SIGKILL": [True, "file", 9, 2, ""],
        "EIO": [True, "file", "OSError: [Errno 5] Input/output error", 3, ""],
        "ENOSPC": [True, "file", "OSError: [Errno 28] No space left on device", 3, ""],
        "short": [True, "file", "AssertionError: ", 3, "01234"],
        "torn": [True, "file", 9, 2, "01234"],
        "SIGINT": [True, "file", "KeyboardInterrupt: ", 3, "0123456789"],
    }


CARELESS = """
children._PATIENCE = 1
values = {"step": np.array(7)}
ready, bare, homes = place / "ready", place / "bare", itertools.count()

def prepare(home):
    for path, attributes in ((ready, {"epoch": 3}), (bare, None)):
        shutil.rmtree(path, ignore_errors=True)
        vs.save(path, values, attributes=attributes, durable=False, threads=1)
    next(homes)

def rename_onto_a_folder(home):
    (home / TARGET).mkdir()
    os.rename(ready, home / TARGET)

def leave_scratch(home):
    (home / "scratch").touch()
    os.rename(ready, home / TARGET)
    (home / "scratch").unlink()

def ignore(home):
    with suppress(OSError):
        os.rename(ready, home / TARGET)

def ignore_the_sync(home):
    fd = os.open(home, os.O_RDONLY) if save(home) else -1
    with suppress(OSError):
        os.fsync(fd)
    os.close(fd)

def raise_as_it_comes(home):
    os.rename(ready, home / TARGET)

def forget_attributes(home):
    try:
        os.rename(ready, home / TARGET)
    except OSError:
        os.rename(bare, home / TARGET)

def save(home):
    try:
        os.rename(ready, home / TARGET)
        return True
    except OSError as error:
        raise StorageError("no") from error

def after_saving(home, rescue):
    save(home)
    try:
        os.stat(home)
    except OSError:
        rescue()

def lie(home):
    def rescue():
        raise StorageError("the save was undone")
    after_saving(home, rescue)

def leak(home):
    after_saving(home, lambda: os.open(home, os.O_RDONLY))

def hang(home):
    after_saving(home, lambda: time.sleep(60))

def do_less_and_less(home):
    save(home)
    if next(homes) < 6:
        os.stat(home)

def leave_staging(home):
    staging = home / f".{TARGET}.saving-{os.urandom(4).hex()}"
    staging.mkdir()
    (home / f".{TARGET}.saving-{os.urandom(4).hex()}").mkdir()
    save(home)

def forget_a_thread(home):
    thread = threading.Thread(target=os.stat, args=(home,))
    save(home)
    thread.start()
    thread.join()

def raise_another(home):
    after_saving(home, lambda: vs.open("nothing"))

def break_what_others_need(home):
    save(home)
    try:
        os.stat(home)
    except OSError:
        os.truncate(home / TARGET / "manifest", 50)

found = {}
for act, fault in (
    (rename_onto_a_folder, "SIGKILL"), (leave_scratch, "SIGKILL"), (do_less_and_less, "SIGKILL"), (ignore, "EIO"),
    (ignore_the_sync, "EIO"), (raise_as_it_comes, "EIO"), (forget_attributes, "EIO"), (lie, "EIO"), (leak, "EIO"),
    (hang, "EIO"), (leave_staging, "SIGKILL"), (forget_a_thread, "EIO"), (raise_another, "EIO"),
    (break_what_others_need, "EIO"),
):
    homes = itertools.count()
    scenario = Scenario(
        name=act.__name__, prepare=prepare, act=act, new={TARGET: contents_of(values)},
        again=lambda home: vs.save(home / TARGET, values, overwrite=True, durable=False, threads=1),
    )
    outcome = visit(injector, scenario, fault_named(fault), place)
    found[act.__name__] = sorted({loss for point in outcome.lost for loss in point.losses})
print(json.dumps(found))
"""


def test_who_is_careless_is_found_out():
    assert run_with_injector(CARELESS) == {
        "rename_onto_a_folder": ["HALF_DONE"],
        "leave_scratch": ["HALF_DONE", "STUCK"],
        "do_less_and_less": ["UNREACHED"],
        "ignore": ["SILENT"],
        "ignore_the_sync": ["FOREIGN", "UNSYNCED"],
        "raise_as_it_comes": ["FOREIGN"],
        "forget_attributes": ["HALF_DONE", "SILENT"],
        "lie": ["UNTRUE"],
        "leak": ["LEAK"],
        "hang": ["HUNG"],
        "leave_staging": ["STRAY"],
        "forget_a_thread": ["UNTOLD"],
        "raise_another": ["WRONG_ERROR"],
        "break_what_others_need": ["HALF_DONE", "SILENT"],
    }


def verdict(*losses, known=()):
    lost = [Lost(point=str(i), losses=dict.fromkeys(names, "…")) for i, names in enumerate(losses) if names]
    outcome = Outcome(points=len(losses), lost=lost)
    return Verdict(command="calls", scenario="new", fault="EIO", outcome=outcome, known=known)


def test_what_is_known_is_excused():
    excused = verdict((), ("LEAK",), known={"LEAK"})
    assert (excused.ok, excused.survived, excused.excused, len(excused.lost)) == (True, 1, 1, 0)
    worse = verdict((), ("LEAK", "SILENT"), (FOREIGN,), known={"LEAK"})
    assert (worse.ok, worse.survived, worse.excused, len(worse.lost), worse.foreign) == (False, 1, 0, 2, 1)
    assert [complaint.split(": ")[3] for complaint in worse.complaints()] == [FOREIGN, "SILENT"]
    assert not verdict().ok


def test_what_is_known_must_occur():
    row = Known(command="calls", scenario="new", fault="EIO", losses={"LEAK"})
    pattern = Known(command="calls", scenario="new", fault="E*", losses={"LEAK"})
    elsewhere = Known(command="calls", scenario="seal", fault="EIO", losses={"LEAK"})
    rows = [row, pattern, elsewhere]
    mended, lost = [verdict((), ())], [verdict((), ("LEAK",))]
    assert [told.split(": does")[0] for told in stale(rows, mended, is_all=False)] == [str(row)]
    assert [told.split(": does")[0] for told in stale(rows, mended, is_all=True)] == [str(known) for known in rows]
    assert list(stale([row, pattern], lost, is_all=True)) == []


def test_a_record_gives_the_same_verdict():
    found = verdict((), ("LEAK", "SILENT"), (FOREIGN,), known={"LEAK"})
    assert outcome_of(json.loads(json.dumps(found.as_json()))) == found.outcome


def test_a_job_leaves_the_working_directory_to_the_next_one(tmp_path):
    before = os.getcwd()
    _in_empty_directory(str(tmp_path), os.chdir)
    assert os.getcwd() == before
