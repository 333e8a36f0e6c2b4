"""What saving and loading add to a process: next to nothing, whatever the size (measured in real processes)."""

import json
import os
import subprocess
import sys

import pytest

MIB = 1 << 20
SIZE = 256 * MIB
ALLOWED = 64 * MIB

# VmHWM and not ru_maxrss, which a child inherits from whoever started it.
PRELUDE = """
import json, sys
import numpy as np, varstore as vs
from varstore.errors import VarstoreError
MIB = 1 << 20
path, source = sys.argv[1:]
def peak():
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) * 1024
def filled(shape, order="C"):
    array = np.empty(shape, np.float32, order)
    array.fill(1.5)
    return array
vs.save(path + "-warm", {"x": np.ones(3)}); vs.load(path + "-warm"); vs.verify(path + "-warm")
"""
CASES = {
    "save": ("v = {str(i): filled((4096, 4096)) for i in range(4)}", "vs.save(path, v, durable=False)"),
    "save one": ("v = {'v': filled(64 * MIB)}", "vs.save(path, v, durable=False, threads=4)"),
    "save durable": ("v = {str(i): filled((4096, 4096)) for i in range(4)}", "vs.save(path, v)"),
    "save Fortran": ("v = {'v': filled((8192, 8192), 'F')}", "vs.save(path, v, durable=False)"),
    "save big-endian durable": ("v = {'v': filled((8192, 8192)).view('>f4')}", "vs.save(path, v)"),
    "save small": ("v = {str(i): filled(MIB // 8) for i in range(512)}", "vs.save(path, v, durable=False)"),
    "base": ("v = {k: x.copy() for k, x in vs.load(source).items()}", "vs.save(path, v, base=source)"),
    "link": ("", "vs.save(path, vs.open(source))"),
    "load": ("", "v = vs.load(source)"),
    "load into": ("v = {str(i): filled((4096, 4096)) for i in range(4)}", "vs.load_into(v, source)"),
    "load into Fortran": (
        "v = {str(i): filled((4096, 4096), 'F') for i in range(4)}",
        "vs.load_into(v, source)",
    ),
    "load into, cast": (
        "v = {str(i): np.ones((4096, 4096)) for i in range(2)}",
        "vs.load_into(v, source, cast=True)",
    ),
    "overlap": ("v = {'0': filled((5000, 3000))}", "vs.load_into(v, source, include='0', on_mismatch='overlap')"),
    "verify": ("", "vs.verify(source)"),
    "map": ("", "v = vs.load(source, mmap=True)"),
}  # fmt: skip


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    if not os.path.exists("/proc/self/status"):
        pytest.skip("no /proc here to read a process's memory from")
    path = str(tmp_path_factory.mktemp("memory") / "source")
    run(path, "save", "")
    return path


def run(path, case, source):
    before, act = CASES[case]
    measured = f"{before}\nstarted = peak()\n{act}\nprint(json.dumps(peak() - started))"
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + measured, path, source], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("case", CASES)
def test_what_is_added(tmp_path, source, case):
    added = run(str(tmp_path / "c"), case, source)
    result = SIZE if case == "load" else 0
    assert added <= result + ALLOWED, f"{added / MIB:.0f} MiB"
    if case == "load":
        assert added >= 0.9 * SIZE  # the measurement itself works
