"""What a process may still take is the least that the machine, its control groups and its own limit leave."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from varstore.storage import memory

GIB = 1 << 30
MACHINE = "MemTotal:       16777216 kB\nMemAvailable:    8388608 kB\n"


def tree(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


VERSION_2 = {"proc/self/cgroup": "0::/job/step\n"}
VERSION_1 = {"proc/self/cgroup": "9:cpu,cpuacct:/\n4:memory:/job\n0::/\n"}

CASES = {
    "the machine alone": ({}, 8 * GIB),
    "version 2": ({**VERSION_2, "sys/fs/cgroup/job/step/memory.max": f"{4 * GIB}\n"}, 4 * GIB),
    "version 2, less what is used": (
        {
            **VERSION_2,
            "sys/fs/cgroup/job/step/memory.max": f"{4 * GIB}\n",
            "sys/fs/cgroup/job/step/memory.stat": f"anon {GIB}\nfile {2 * GIB}\n",
        },
        3 * GIB,
    ),
    "version 2, the group above is narrower": (
        {
            **VERSION_2,
            "sys/fs/cgroup/job/step/memory.max": "max\n",
            "sys/fs/cgroup/job/memory.max": f"{2 * GIB}\n",
        },
        2 * GIB,
    ),
    "version 2, in a container": ({**VERSION_2, "sys/fs/cgroup/memory.max": f"{GIB}\n"}, GIB),
    "version 1": (
        {
            **VERSION_1,
            "sys/fs/cgroup/memory/job/memory.limit_in_bytes": f"{2 * GIB}\n",
            "sys/fs/cgroup/memory/job/memory.stat": f"cache {GIB}\nrss 1\ntotal_rss {GIB // 2}\n",
        },
        2 * GIB - GIB // 2,
    ),
    "no limit is a number": ({**VERSION_2, "sys/fs/cgroup/memory.max": "max\n"}, 8 * GIB),
    "more is used than there may be": (
        {
            **VERSION_2,
            "sys/fs/cgroup/memory.max": "1000\n",
            "sys/fs/cgroup/memory.stat": "anon 2000\n",
        },
        0,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_least_counts(case, tmp_path, monkeypatch):
    files, expected = CASES[case]
    tree(tmp_path, {"proc/meminfo": MACHINE, **files})
    monkeypatch.setattr(memory, "ROOT", str(tmp_path))
    assert memory.available_memory() == expected


def test_without_proc_the_machine_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "ROOT", str(tmp_path))
    assert memory.available_memory() == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def test_a_limit_of_addresses_counts():
    code = "import resource; resource.setrlimit(resource.RLIMIT_AS, (3 << 30, 3 << 30))\n"
    code += "from varstore.storage.memory import available_memory; print(available_memory())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 1 << 30 < int(done.stdout) < 3 << 30
    assert resource.getrlimit(resource.RLIMIT_AS)[0] != 3 << 30
