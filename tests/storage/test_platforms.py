"""Saving and reading work where calls that only Linux has are missing; Windows, which cannot save, reads."""

import ast
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from support import FIXTURES, ROOT, run_python

import varstore as vs

MISSING = {
    "sched_getaffinity": "del os.sched_getaffinity",
    "copy_file_range": "del os.copy_file_range",
    "O_DIRECT": "del os.O_DIRECT",
    "posix_fallocate": "del os.posix_fallocate",
    "posix_fadvise": "del os.posix_fadvise",
    "O_PATH": "del os.O_PATH",
    "syncfs": "gone.add('syncfs')",
    "renameat2": "gone.add('renameat2')",
    "fallocate": "gone.add('fallocate')",
    "openat2": "sys.platform = 'darwin'",
}

BEFORE = """
import ctypes, os, sys
gone, real = set(), ctypes.CDLL
class Library(real):
    def __getattr__(self, name):
        if name in gone:
            raise AttributeError(name)
        return super().__getattr__(name)
ctypes.CDLL = Library
"""

JOB = """
os.chdir(sys.argv[1])
import numpy as np
import varstore as vs
shared = np.arange(600_000.0)
values = {"w": shared, "tied": shared, "s": np.int8(3)} | {f"many{i}": np.ones(3) for i in range(9)}
for durable in (True, False):
    vs.save("c", values, durable=durable, overwrite=not durable)
vs.save("d", values | {"new": np.ones(3)}, base="c")
assert os.path.samefile("c/w/out", "d/w/out") and os.path.samefile("c/w/out", "c/tied/out")
assert vs.verify("c").ok and vs.verify("d").ok and not vs.diff("c", "d").equal
assert np.array_equal(vs.load("d")["w"], shared)
assert np.array_equal(vs.load("d", mmap=True)["w"], shared)
target = {name: np.zeros_like(value) for name, value in values.items()}
vs.load_into(target, "c")
assert np.array_equal(target["w"], shared)
vs.save("bare", {"w": shared}, manifest=False)
vs.seal("bare")
assert vs.verify("bare").ok and vs.clean(".") == []
with vs.CheckpointManager("run") as manager:
    manager.save(1, values)
assert vs.verify(manager.latest()).ok
vs.convert("c", "c.npz")
assert np.array_equal(vs.read("c.npz")["w"].numpy(), shared)
assert sorted(os.listdir()) == ["bare", "c", "c.npz", "d", "run"]
"""


@pytest.mark.parametrize("name", [*MISSING, pytest.param("all of them", marks=pytest.mark.core)])
def test_the_main_job_is_done_without(tmp_path, name):
    lines = MISSING.values() if name not in MISSING else [MISSING[name]]
    run_python("\n".join([BEFORE, *lines, JOB]), tmp_path)


WINDOWS = """
import builtins, contextlib, io, multiprocessing, pathlib, shutil, subprocess, tempfile, zipfile
import click, numpy as np, rich.console, rich.progress, rich.table, xxhash, zarr
for name in POSIX_CALLS:
    if hasattr(os, name):
        delattr(os, name)
for name in POSIX_MODULES:
    sys.modules[name] = None
os.supports_dir_fd, os.supports_fd, os.name, sys.platform = set(), {os.stat, os.truncate}, "nt", "win32"
real_open, real_stat, real_scandir = os.open, os.stat, os.scandir
def open_file(path, flags, mode=0o777, *, dir_fd=None):
    assert dir_fd is None, path
    if os.path.isdir(path):
        raise PermissionError(13, "Permission denied", path)
    return real_open(path, flags, mode)
def stat_path(path, *, dir_fd=None, follow_symlinks=True):
    assert dir_fd is None, path
    return real_stat(path, follow_symlinks=follow_symlinks)
def scan_path(path="."):
    assert not isinstance(path, int), path
    return real_scandir(path)
os.open, os.stat, os.scandir = open_file, stat_path, scan_path
import varstore as vs
from varstore.cli import main
"""

IMPORTS = """
import contextlib, io, json, os, sys
import numpy as np, xxhash
import varstore as vs
from varstore.cli import main
"""

READING = """
def facts(values):
    return {name: [str(array.dtype), list(array.shape), xxhash.xxh3_128_hexdigest(array.tobytes())]
            for name, array in ((name, np.asarray(value)) for name, value in values.items())}
def printed(*arguments):
    with contextlib.redirect_stdout(io.StringIO()) as out:
        main(arguments, standalone_mode=False)
    return out.getvalue()
found = {}
os.chdir(sys.argv[1])
for path in ("c", "bare"):
    checkpoint = vs.open(path)
    weight = checkpoint["conv/weight"]
    assert vs.verify(path).ok and weight[3, 1:].nbytes == 8 * 999
    targets = {name: np.zeros(variable.shape, variable.dtype) for name, variable in checkpoint.items()}
    assert sorted(vs.load_into(targets, path).loaded) == sorted(checkpoint)
    found[path] = [facts(vs.load(path)), facts(checkpoint), facts(vs.load(path, mmap=True)), facts(targets),
                   printed("ls", path), printed("show", path, "step"), printed("verify", path)]
found["get"] = facts(vs.checkpoint.get("bare")) | facts({"w": vs.checkpoint.get("bare/conv/weight")})
found["foreign"] = {}
for path in sys.argv[2:]:
    try:
        found["foreign"][path] = facts(vs.read(path))
    except vs.errors.VarstoreError as error:
        found["foreign"][path] = str(error)
print(json.dumps(found))
"""

REFUSED = """
os.chdir(sys.argv[1])
os.mkdir("empty")
for doing, act in {"saving": lambda: vs.save("new", {"w": np.ones(3)}), "sealing": lambda: vs.seal("bare"),
                   "cleaning": lambda: vs.clean(".")}.items():
    try:
        act()
    except vs.errors.StorageError as error:
        assert f"{doing} needs a POSIX system" in str(error), error
    else:
        raise AssertionError(doing)
assert sorted(os.listdir()) == ["bare", "c", "empty"]
"""

POSIX_MODULES = ("fcntl", "resource", "pwd", "grp", "termios")
POSIX_CALLS = sorted(
    name
    for name in dir(os)
    if re.match(r"pread|pwrite|posix|sched_|get.*(uid|gid|pgrp|sid)|set.*id|O_(DIREC|NO|CLOEXEC|PATH|SYNC|DSYNC)", name)
    or name
    in ("chown", "fchown", "lchown", "fchmod", "fchdir", "fdatasync", "fork", "sync", "sysconf", "sysconf_names")
    or name in ("copy_file_range", "sendfile", "statvfs", "fstatvfs", "mkfifo", "mknod", "register_at_fork", "uname")
)
"""What `os` has on POSIX systems alone, or only on some."""


@pytest.fixture
def checkpoints(tmp_path):
    values = {"conv/weight": np.arange(400_000.0).reshape(400, 1000), "step": np.int64(7), "half": np.ones(3, "<f2")}
    values["tied"] = values["conv/weight"]
    vs.save(tmp_path / "c", values, attributes={"epoch": 3})
    vs.save(tmp_path / "bare", values, manifest=False)
    return tmp_path


def on_windows(code, *arguments):
    names = f"POSIX_CALLS, POSIX_MODULES = {POSIX_CALLS!r}, {POSIX_MODULES!r}\n"
    return run_python("import ctypes, json, os, sys\n" + names + WINDOWS + code, *arguments).stdout


def test_on_windows_all_is_read_as_elsewhere(checkpoints):
    """Checkpoints and the files of other systems give the same values, and the same errors."""
    foreign = [os.fspath(facts).removesuffix(".expect.json") for facts in sorted(FIXTURES.rglob("*.expect.json"))]
    assert len(foreign) > 40
    here = run_python(IMPORTS + READING, checkpoints, *foreign).stdout
    assert json.loads(on_windows(READING, checkpoints, *foreign)) == json.loads(here)


def test_on_windows_what_would_change_a_checkpoint_is_refused(checkpoints):
    on_windows(REFUSED, checkpoints)


def test_calls_that_not_every_system_has_are_named_in_one_place():
    for path in sorted((ROOT / "varstore").rglob("*.py")):
        if path.name == "syscalls.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "os":
                assert node.attr not in {*POSIX_CALLS, "fsync"}, f"{path}:{node.lineno}: os.{node.attr}"
            elif isinstance(node, ast.Import | ast.ImportFrom):
                names = {node.module} if isinstance(node, ast.ImportFrom) else {alias.name for alias in node.names}
                assert names.isdisjoint({*POSIX_MODULES, "ctypes", "msvcrt", "winreg"}), f"{path}:{node.lineno}"


@pytest.mark.parametrize("system", ["win32", "darwin"])
def test_types_hold_on_other_systems(tmp_path, system):
    """For mypy, a call that a system does not have is an error."""
    mypy = [sys.executable, "-m", "mypy", "--platform", system, "--cache-dir", tmp_path, "varstore"]
    done = subprocess.run(mypy, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
