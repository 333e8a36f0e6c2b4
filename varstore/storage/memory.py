"""How much memory this process may still take: what the machine, its control group and its own limit leave."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

from varstore.storage import syscalls

__all__ = ["available_memory"]

ROOT = "/"
"""Where the kernel's files lie; tests have their own."""


def available_memory() -> int:
    """Return the bytes that this process may still take: the least of what each limit leaves.

    The limits are the machine's memory, the memory limits of the control groups that the process is in (version 1
    and 2; containers and batch systems set them), and ``RLIMIT_AS``. The page cache is not counted as used, since the
    kernel takes it back. A limit that cannot be asked for does not count.
    """
    return max(min(_left()), 0)


def _left() -> Iterator[int]:
    machine = _fields("proc/meminfo")
    if "MemAvailable" in machine:
        yield machine["MemAvailable"] * 1024
    else:
        yield syscalls.physical_memory()
    for folder, limit, used in _control_groups():
        most = re.fullmatch(r"\d+", _text(f"{folder}/{limit}").strip())
        if most:
            yield int(most[0]) - _fields(f"{folder}/memory.stat").get(used, 0)
    addresses = syscalls.address_space()
    if addresses is not None:
        yield addresses - _fields("proc/self/status").get("VmSize", 0) * 1024


def _control_groups() -> Iterator[tuple[str, str, str]]:
    """Yield each control group above the process: its folder, its limit's file, and its use's field in memory.stat.

    In a container the group's own path is often not mounted; then the root of the mount is the container's group.
    """
    for line in _text("proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            mount, limit, used = "sys/fs/cgroup", "memory.max", "anon"
        elif "memory" in controllers.split(","):
            mount, limit, used = "sys/fs/cgroup/memory", "memory.limit_in_bytes", "total_rss"
        else:
            continue
        parts = [part for part in path.split("/") if part not in ("", "..")]
        for depth in range(len(parts) + 1):
            yield "/".join([mount, *parts[:depth]]), limit, used


def _fields(path: str) -> dict[str, int]:
    """Return the numbers of a file of lines such as ``MemAvailable:  123 kB`` or ``anon 456``."""
    return {name: int(number) for name, number in re.findall(r"^(\w+):?\s+(\d+)", _text(path), re.MULTILINE)}


def _text(path: str) -> str:
    try:
        with open(os.path.join(ROOT, path), encoding="utf-8") as file:
            return file.read()
    except OSError:
        return ""
