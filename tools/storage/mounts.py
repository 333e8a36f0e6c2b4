"""The file systems that this machine may be able to mount, each in a folder of its own, and twice if that can be.

Each function of `FILE_SYSTEMS` is a context manager: it takes a new folder on a local disk and yields a `Mounted`. What
is missing (a program, a driver of the kernel, the right to mount) raises `Unavailable` with the reason.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

__all__ = ["FILE_SYSTEMS", "Mounted", "Unavailable"]

_SECONDS = 20
_SIZE = 400 << 20
"""Bytes of a disk in a file; what is not written takes no space."""
_SERVER = "/usr/lib/openssh/sftp-server"
_KEEP_OUT = "varstore"
"""The password of encrypted folders, which hold nothing that is worth one."""


class Unavailable(Exception):
    """The file system cannot be mounted on this machine; the text says why."""


@dataclass
class Mounted:
    """A file system that is mounted `here` and, where that can be, a second time, as on another machine."""

    here: Path
    there: Path | None = None
    is_read_only: bool = False
    """Whether it cannot be written to, and holds the checkpoint ``image`` already."""


def _run(*words: str | os.PathLike[str], text: str | None = None) -> None:
    if shutil.which(str(words[0])) is None:
        raise Unavailable(f"{words[0]} is not installed")
    try:
        done = subprocess.run(words, input=text, capture_output=True, text=True, check=False, timeout=_SECONDS)
    except subprocess.TimeoutExpired:
        raise Unavailable(f"{words[0]} does not end") from None
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise Unavailable(f"{words[0]}: {said[-1] if said else f'exit status {done.returncode}'}"[:120])


def _unmount(place: Path) -> None:
    subprocess.run(["umount", "--lazy", place], check=False, capture_output=True)


def _mount(undo: ExitStack, place: Path, *words: str | os.PathLike[str]) -> Path:
    place.mkdir(exist_ok=True)
    _run("mount", *words, place)
    undo.callback(_unmount, place)
    return place


def _start(undo: ExitStack, place: Path, *words: str | os.PathLike[str], ends: int | None = None) -> Path:
    """Start a daemon that mounts a file system and stays in the foreground; wait until it is there."""
    if shutil.which(str(words[0])) is None:
        raise Unavailable(f"{words[0]} is not installed")
    place.mkdir(exist_ok=True)
    nothing = subprocess.DEVNULL if ends is None else ends
    command = [os.fspath(word) for word in words]
    daemon = subprocess.Popen(command, stdin=nothing, stdout=nothing, stderr=subprocess.PIPE, text=True)
    undo.callback(_end, daemon, place)
    deadline = time.monotonic() + _SECONDS
    while not os.path.ismount(place):
        if daemon.poll() is not None or time.monotonic() > deadline:
            daemon.kill()
            said = daemon.communicate()[1].strip().splitlines()
            raise Unavailable(f"{words[0]} does not mount: {said[-1] if said else ''}"[:120])
        time.sleep(0.05)
    return place


def _end(daemon: subprocess.Popen[str], place: Path) -> None:
    _unmount(place)
    try:
        daemon.communicate(timeout=_SECONDS)
    except subprocess.TimeoutExpired:
        daemon.kill()
        daemon.communicate()


@contextmanager
def _local(place: Path) -> Iterator[Mounted]:
    (place / "here").mkdir()
    yield Mounted(place / "here")


@contextmanager
def _kernel(kind: str, place: Path, *options: str) -> Iterator[Mounted]:
    with ExitStack() as undo:
        yield Mounted(_mount(undo, place / "here", "-t", kind, *options, kind))


@contextmanager
def _disk(make: tuple[str, ...], place: Path, driver: tuple[str, ...] = ("mount", "-o", "loop")) -> Iterator[Mounted]:
    """Make a file system in a file, and mount it; `driver` is what mounts the file."""
    image = place / "image"
    with open(image, "wb") as file:
        file.truncate(_SIZE)
    _run(*make, image)
    with ExitStack() as undo:
        (place / "here").mkdir()
        _run(*driver, image, place / "here")
        undo.callback(_unmount, place / "here")
        yield Mounted(place / "here")


def _image(place: Path) -> Path:
    """Save the checkpoint that read-only file systems and lower layers hold; return the folder that holds it."""
    from tools.storage.checks import save_image

    (place / "source").mkdir()
    save_image(place / "source" / "image")
    return place / "source"


@contextmanager
def _packed(kind: str, pack: Callable[[Path, Path], tuple[str | Path, ...]], place: Path) -> Iterator[Mounted]:
    _run(*pack(_image(place), place / "packed"))
    with ExitStack() as undo:
        here = _mount(undo, place / "here", "-t", kind, "-o", "loop,ro", place / "packed")
        yield Mounted(here, is_read_only=True)


@contextmanager
def _overlay(place: Path) -> Iterator[Mounted]:
    with ExitStack() as undo:
        room = _mount(undo, place / "room", "-t", "tmpfs", "tmpfs")
        for name in ("upper", "work", "lower"):
            (room / name).mkdir()
        shutil.copytree(_image(place) / "image", room / "lower" / "image")
        layers = f"lowerdir={room}/lower,upperdir={room}/upper,workdir={room}/work"
        yield Mounted(_mount(undo, place / "here", "-t", "overlay", "-o", layers, "overlay"))


@contextmanager
def _twice(mount: Callable[[ExitStack, Path, Path], object], place: Path) -> Iterator[Mounted]:
    """Mount one store at two places; each mount has caches of its own, as on another machine."""
    (place / "store").mkdir()
    with ExitStack() as undo:
        for name in ("here", "there"):
            mount(undo, place / "store", place / name)
        yield Mounted(place / "here", place / "there")


def _bindfs(undo: ExitStack, store: Path, place: Path) -> None:
    _start(undo, place, "bindfs", "-f", store, place)


def _branches(store: Path) -> str:
    for name in ("one", "two"):
        (store / name).mkdir(exist_ok=True)
    return f"{store}/one:{store}/two"


def _mergerfs(options: str, undo: ExitStack, store: Path, place: Path) -> None:
    _start(undo, place, "mergerfs", "-f", "-o", options, _branches(store), place)


def _unionfs(undo: ExitStack, store: Path, place: Path) -> None:
    _start(undo, place, "unionfs", "-f", "-o", "cow", _branches(store).replace(":", "=RW:") + "=RW", place)


def _sshfs(undo: ExitStack, store: Path, place: Path) -> None:
    if not os.path.exists(_SERVER):
        raise Unavailable("sftp-server is not installed")
    near, far = socket.socketpair()
    with near, far:
        end = far.fileno()
        server = subprocess.Popen([_SERVER], stdin=end, stdout=end, stderr=subprocess.DEVNULL)
        undo.callback(server.wait)
        undo.callback(server.kill)
        _start(undo, place, "sshfs", f":{store}", place, "-f", "-o", "passive", ends=near.fileno())


def _gocryptfs(undo: ExitStack, store: Path, place: Path) -> None:
    (store.parent / "word").write_text(_KEEP_OUT)
    word = ("-q", "-passfile", str(store.parent / "word"))
    if not os.listdir(store):
        _run("gocryptfs", "-init", "-scryptn", "10", *word, store)
    _start(undo, place, "gocryptfs", "-fg", "-sharedstorage", *word, store, place)


def _encfs(undo: ExitStack, store: Path, place: Path) -> None:
    place.mkdir()
    _run("encfs", "--standard", "-S", store, place, text=_KEEP_OUT)
    undo.callback(_unmount, place)
    if not os.path.ismount(place):
        raise Unavailable("encfs does not mount")


def _rclone(mode: str, undo: ExitStack, store: Path, place: Path) -> None:
    config = ("--config", "/dev/null", "--vfs-cache-mode", mode, "--cache-dir", store.parent / f"cache {place.name}")
    _start(undo, place, "rclone", "mount", f":local:{store}", place, *config, "--dir-cache-time", "1s")


def _nfs(version: str, undo: ExitStack, store: Path, place: Path) -> None:
    if "nfs" not in Path("/proc/filesystems").read_text():
        raise Unavailable("the kernel has no NFS")
    _run("exportfs", "-o", "rw,no_root_squash,insecure,fsid=1", f"localhost:{store}")
    undo.callback(_run, "exportfs", "-u", f"localhost:{store}")
    _mount(undo, place, "-t", "nfs", "-o", f"vers={version}", f"localhost:{store}")


FILE_SYSTEMS: Final[Mapping[str, Callable[[Path], AbstractContextManager[Mounted]]]] = {
    "local disk": _local,
    "tmpfs": partial(_kernel, "tmpfs"),
    "ramfs": partial(_kernel, "ramfs"),
    "ext4": partial(_disk, ("mkfs.ext4", "-q")),
    "xfs": partial(_disk, ("mkfs.xfs", "-q")),
    "btrfs": partial(_disk, ("mkfs.btrfs", "-q")),
    "vfat": partial(_disk, ("mkfs.vfat",)),
    "overlayfs": _overlay,
    "squashfs": partial(_packed, "squashfs", lambda source, to: ("mksquashfs", source, to, "-quiet", "-no-progress")),
    "erofs": partial(_packed, "erofs", lambda source, to: ("mkfs.erofs", "--quiet", to, source)),
    "bindfs": partial(_twice, _bindfs),
    "mergerfs": partial(_twice, partial(_mergerfs, "category.create=epmfs")),
    "mergerfs, random branch": partial(_twice, partial(_mergerfs, "category.create=rand")),
    "unionfs-fuse": partial(_twice, _unionfs),
    "ntfs-3g": partial(_disk, ("mkfs.ntfs", "-F", "-q", "-Q"), driver=("ntfs-3g",)),
    "exfat-fuse": partial(_disk, ("mkfs.exfat",), driver=("mount", "-t", "exfat-fuse", "-o", "loop")),
    "gocryptfs": partial(_twice, _gocryptfs),
    "encfs": partial(_twice, _encfs),
    "sshfs": partial(_twice, _sshfs),
    "NFS 3": partial(_twice, partial(_nfs, "3")),
    "NFS 4.2": partial(_twice, partial(_nfs, "4.2")),
    "rclone, no cache": partial(_twice, partial(_rclone, "off")),
    "rclone, cached writes": partial(_twice, partial(_rclone, "writes")),
    "rclone, all cached": partial(_twice, partial(_rclone, "full")),
}
"""By the name that the table shows."""
