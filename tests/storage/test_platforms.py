"""Saving and reading work where calls that only Linux has are missing; a system that cannot save says so."""

import pytest
from support import run_python

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


@pytest.mark.parametrize("name", [*MISSING, "all of them"])
def test_the_main_job_is_done_without(tmp_path, name):
    lines = MISSING.values() if name not in MISSING else [MISSING[name]]
    run_python("\n".join([BEFORE, *lines, JOB]), tmp_path)


WINDOWS = """
import os, sys
sys.modules["fcntl"] = None
for name in ("O_DIRECTORY", "O_NONBLOCK", "O_NOFOLLOW", "O_CLOEXEC", "O_PATH", "sched_getaffinity", "copy_file_range"):
    delattr(os, name)
os.supports_dir_fd = set()
import numpy as np
import varstore as vs
os.chdir(sys.argv[1])
try:
    vs.save("c", {"w": np.ones(3)})
except vs.errors.StorageError as error:
    assert "saving needs a POSIX system" in str(error), error
else:
    raise AssertionError("it was saved")
assert os.listdir() == []
"""


def test_saving_says_what_it_needs_where_directories_cannot_be_opened(tmp_path):
    run_python(WINDOWS, tmp_path)
