"""Several processes write one checkpoint: each its variables, and its regions of others."""

from __future__ import annotations

import errno
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

import varstore as vs
from varstore.disk.save import together
from varstore.disk.save.shared_file import SharedFile
from varstore.disk.save.together import Coordinator, Participant, host, placeholder
from varstore.errors import CheckpointExists, OutOfSpace, StorageError, UsageError
from varstore.layout.regions import Region
from varstore.storage import syscalls
from varstore.values.plan import plan_save

Parts = Mapping[str, Sequence[tuple[Sequence[int], Any]]]
"""What one process has: of each variable, where its values begin, and the values."""


def stage(path: Path, arrays: Mapping[str, Any], parts: Sequence[Parts], **options: Any) -> Coordinator:
    plan = plan_save({name: placeholder(array.shape, array.dtype) for name, array in arrays.items()})
    regions = [
        {name: [Region(tuple(offsets), values.shape) for offsets, values in its] for name, its in part.items()}
        for part in parts
    ]
    options = {"overwrite": False, "durable": False, "hosts": [host()] * len(parts), "writer": "a test", **options}
    return Coordinator(str(path), plan, regions, **options)


def participate(path: str, ticket: str, part: Parts) -> str:
    participant = Participant(path, ticket)
    try:
        participant.write((name, offsets, values) for name, its in part.items() for offsets, values in its)
        return participant.finish()
    finally:
        participant.close()


def save(path: Path, arrays: Mapping[str, Any], parts: Sequence[Parts], **options: Any) -> None:
    coordinator = stage(path, arrays, parts, **options)
    coordinator.commit(map(partial(participate, str(path)), coordinator.tickets, parts))


def cut(array: np.ndarray, axis: int, count: int) -> list[tuple[list[int], np.ndarray]]:
    """Return an array as so many parts, the last ones perhaps smaller or empty, as torch cuts it."""
    step = -(-array.shape[axis] // count)
    found = []
    for number in range(count):
        start = min(number * step, array.shape[axis])
        offsets = [start if at == axis else 0 for at in range(array.ndim)]
        found.append((offsets, array[(slice(None),) * axis + (slice(start, start + step),)]))
    return found


def left_in(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


# --- what is written -------------------------------------------------------------------------------------------------


@st.composite
def tilings(draw: Any) -> tuple[np.ndarray, list[tuple[list[int], np.ndarray]]]:
    shape = draw(st.lists(st.integers(0, 6), min_size=0, max_size=3))
    dtype = draw(st.sampled_from([np.uint8, np.float32, ml_dtypes.bfloat16, np.complex128, np.bool_, ">i4"]))
    array = np.arange(int(np.prod(shape))).reshape(shape).astype(dtype)
    found: list[tuple[list[int], np.ndarray]] = [([0] * array.ndim, array)]
    for _ in range(draw(st.integers(0, 5)) if shape else 0):
        offsets, values = found.pop(draw(st.integers(0, len(found) - 1)))
        axis = draw(st.integers(0, array.ndim - 1))
        at = draw(st.integers(0, values.shape[axis]))
        first, second = np.split(values, [at], axis)
        found += [(offsets, first), ([o + at * (a == axis) for a, o in enumerate(offsets)], second)]
    return array, draw(st.permutations(found))


@given(tilings(), st.integers(1, 3), st.booleans(), st.booleans())
@settings(max_examples=40, deadline=None)
def test_any_tiling_is_the_array(tiling: Any, processes: int, mapped: bool, durable: bool) -> None:
    array, found = tiling
    parts: list[dict[str, list[Any]]] = [{} for _ in range(processes)]
    for number, part in enumerate(found):
        parts[number % processes].setdefault("a/b", []).append(part)
    path = Path(os.environ["PYTEST_TOGETHER"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("varstore.disk.save.shared_file._FEW", 0)
        hosts = [host()] * processes if mapped else [str(number) for number in range(processes)]
        save(path / "c", {"a/b": array}, parts, hosts=hosts, durable=durable)
    try:
        loaded = vs.load(path / "c")["a/b"]
        assert loaded.dtype == array.dtype.newbyteorder("=")
        np.testing.assert_array_equal(loaded, array)
        assert vs.verify(path / "c").ok
        assert {stat.st_mode & 0o777 for stat in map(os.stat, (path / "c/a/b").iterdir())} == {0o444}
    finally:
        shutil.rmtree(path / "c")


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTEST_TOGETHER", str(tmp_path))


@pytest.mark.core
@pytest.mark.parametrize("durable", [False, True])
def test_large_parts(tmp_path: Path, durable: bool) -> None:
    rng = np.random.default_rng(0)
    whole = rng.integers(0, 255, (17 << 20) + 5, np.uint8)
    rows, aligned = rng.random((1000, 1 << 10)), rng.integers(0, 255, 32 << 20, np.uint8)
    columns, narrow = rng.random((1 << 8, 3 << 10), np.float32), rng.random((1 << 16, 12), np.float32)
    arrays = {"whole": whole, "rows": rows, "columns": columns, "narrow": narrow, "aligned": aligned}
    cuts = {"rows": cut(rows, 0, 2), "columns": cut(columns, 1, 2), "narrow": cut(narrow, 1, 2)}
    cuts["aligned"] = [([0], aligned[: 16 << 20]), ([16 << 20], aligned[16 << 20 :])]
    parts: list[Any] = [{name: [found[number]] for name, found in cuts.items()} for number in range(2)]
    parts[1]["whole"] = [([0], placeholder(whole.shape, whole.dtype))]
    parts[1]["whole"][0][1]._fetch = lambda: whole
    save(tmp_path / "c", arrays, parts, durable=durable)
    for name, loaded in vs.load(tmp_path / "c").items():
        np.testing.assert_array_equal(loaded, arrays[name])
    assert vs.verify(tmp_path / "c").ok
    entries = {name: variable.entry for name, variable in vs.open(tmp_path / "c").items()}
    assert {name for name, entry in entries.items() if entry.regions} == {"rows", "columns", "narrow"}
    vs.save(tmp_path / "alone", {"aligned": aligned, "whole": whole})
    alone = vs.open(tmp_path / "alone")
    assert all(entries[name].digests == alone[name].entry.digests for name in alone)


def test_many_small_ones_are_one_checkpoint(tmp_path: Path) -> None:
    arrays = {f"state/{number}/{name}": np.full((4, 3), number) for number in range(150) for name in ("a", "b")}
    arrays["state"] = np.array(5.0)
    tied = {**arrays, "tied/one": arrays["state/0/a"]}
    parts: list[dict[str, Any]] = [{}, {}, {}]
    for number, (name, array) in enumerate(arrays.items()):
        if number % 2:
            parts[number % 3][name] = [([0] * array.ndim, array)]
        else:
            found = cut(array, 0, 3) if array.ndim else [([], array)]
            for part, one in zip(parts, found, strict=False):
                part[name] = [one]
    plan = plan_save(tied, attributes={"epoch": 3})
    regions = [{n: [Region(tuple(o), v.shape) for o, v in its] for n, its in part.items()} for part in parts]
    coordinator = Coordinator(
        str(tmp_path / "c"), plan, regions, hosts=[host()] * 3, writer="a test", overwrite=False, durable=True
    )
    reports = [*map(partial(participate, str(tmp_path / "c")), coordinator.tickets, parts)]
    coordinator.add(plan_save({"late/x": np.arange(3), "late/y": np.ones(2 << 20, np.uint8)}))
    coordinator.commit(reports)
    found = vs.open(tmp_path / "c")
    assert (found["tied/one"].entry.alias_of, found.attributes) == ("state/0/a", {"epoch": 3})
    assert {*found} == {*tied, "late/x", "late/y"}
    assert vs.verify(tmp_path / "c").ok
    for name, array in tied.items():
        np.testing.assert_array_equal(found[name].numpy(), array)
    assert left_in(tmp_path) == ["c"]


# --- several processes -----------------------------------------------------------------------------------------------


def _serve(connection: Connection) -> None:
    while True:
        work, *arguments = connection.recv()
        try:
            connection.send(work(*arguments))
        except BaseException as error:
            connection.send(error)


class Group:
    """Processes that do what they are asked for, at the same time."""

    def __init__(self, count: int) -> None:
        context = multiprocessing.get_context("spawn")
        ends = [context.Pipe() for _ in range(count)]
        self.ends = [ours for ours, _ in ends]
        self.processes = [context.Process(target=_serve, args=(theirs,), daemon=True) for _, theirs in ends]
        for process in self.processes:
            process.start()

    def each(self, work: Any, *arguments: Sequence[Any]) -> list[Any]:
        for end, *one in zip(self.ends, *arguments, strict=True):
            end.send((work, *one))
        return [end.recv() for end in self.ends]


@pytest.fixture(scope="module")
def group() -> Iterator[Group]:
    group = Group(3)
    yield group
    for process in group.processes:
        process.kill()
        process.join()


def rows_of(seed: int) -> tuple[dict[str, Any], list[Parts]]:
    rng = np.random.default_rng(seed)
    arrays = {f"layer/{number}/w": rng.random((9 << number, 300), np.float32) for number in range(8)}
    arrays |= {f"{name}/t": np.ascontiguousarray(array.T) for name, array in arrays.items()}
    cuts = {name: cut(array, int(name.endswith("t")), 3) for name, array in arrays.items()}
    return arrays, [{name: [found[number]] for name, found in cuts.items()} for number in range(3)]


def check(path: Path, arrays: Mapping[str, Any]) -> None:
    loaded = vs.load(path)
    assert loaded.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(loaded[name], array)
    assert vs.verify(path).ok


def test_processes_at_the_same_time(tmp_path: Path, group: Group) -> None:
    for durable, seed in ((False, 1), (True, 2), (False, 3)):
        arrays, parts = rows_of(seed)
        coordinator = stage(tmp_path / "c", arrays, parts, durable=durable, overwrite=True)
        coordinator.commit(group.each(participate, [str(tmp_path / "c")] * 3, coordinator.tickets, parts))
        check(tmp_path / "c", arrays)
        assert left_in(tmp_path) == ["c"]


@pytest.mark.parametrize("maps", [True, False])
def test_many_short_runs_take_no_memory_for_each(tmp_path: Path, maps: bool) -> None:
    values = np.ones((100_000, 1))
    place = Region((0, 1), values.shape)
    folder = os.open(tmp_path, os.O_RDONLY)
    tracemalloc.start()
    file = SharedFile("out", place, values, (100_000, 2), dir_fd=folder, private=True, maps=maps)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    file.close()
    os.close(folder)
    assert most < 2 * values.nbytes


def _see_nothing(path: str, ticket: str, part: Parts) -> str:
    """Participate where the path leads to a folder that the others do not see."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(together, "_APPEARS", 0.1)
        return participate(path, ticket, part)


def test_a_path_that_is_not_shared(tmp_path: Path, group: Group) -> None:
    arrays, parts = rows_of(1)
    (tmp_path / "other").mkdir()
    coordinator = stage(tmp_path / "c", arrays, parts)
    name = os.path.basename(coordinator.staging.path)  # type: ignore[union-attr]
    paths = [str(tmp_path / "c"), str(tmp_path / "other/c"), str(tmp_path / "missing/c")]
    assert [type(said) for said in group.each(_see_nothing, paths, coordinator.tickets, parts)] == [
        str,
        StorageError,
        StorageError,
    ]
    (tmp_path / "other" / name).mkdir(0o700)  # of the same name, but nobody signed it
    said = group.each(_see_nothing, [paths[1]] * 3, coordinator.tickets, parts)
    assert all("same path, on a file system that they share" in str(error) for error in said)
    coordinator.abort()
    assert left_in(tmp_path) == ["other"]


@pytest.mark.parametrize("how", ["mode", "link", "owner"])
def test_a_folder_that_others_may_have_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    if how == "owner" and os.getuid():
        pytest.skip("only root can give a folder away")
    arrays, parts = rows_of(1)
    coordinator = stage(tmp_path / "c", arrays, parts)
    staged = Path(coordinator.staging.path)  # type: ignore[union-attr]
    if how == "mode":
        staged.chmod(0o770)
    elif how == "owner":
        os.chown(staged, 1234, -1)
    else:
        os.rename(staged, tmp_path / "elsewhere")
        staged.symlink_to(tmp_path / "elsewhere")
    monkeypatch.setattr(together, "_APPEARS", 0.1)
    with pytest.raises(StorageError):
        Participant(str(tmp_path / "c"), coordinator.tickets[0])
    assert {*os.listdir(tmp_path / "elsewhere" if how == "link" else staged)} == {json_note(coordinator)}


def test_a_process_saves_to_another_path(tmp_path: Path) -> None:
    arrays, parts = rows_of(1)
    vs.save(tmp_path / "older", {"w": np.ones(3)})
    coordinator = stage(tmp_path / "c", arrays, parts)
    with pytest.raises(StorageError, match="another path") as caught:
        Participant(str(tmp_path / "older"), coordinator.tickets[1])
    assert (caught.value.found, caught.value.expected) == ("'older'", "'c'")
    coordinator.abort()


def json_note(coordinator: Coordinator) -> str:
    import json

    note: str = json.loads(coordinator.tickets[0])["note"]
    return note


# --- what goes wrong -------------------------------------------------------------------------------------------------


def test_parts_that_are_not_the_whole_are_refused_before_the_first_byte(tmp_path: Path) -> None:
    arrays, parts = rows_of(1)
    for wrong in ([parts[0], parts[0], parts[2]], parts[:2]):
        with pytest.raises(UsageError, match="do not make it whole"):
            stage(tmp_path / "c", arrays, wrong)
    assert left_in(tmp_path) == []


def test_a_report_that_lacks_a_part(tmp_path: Path) -> None:
    arrays, parts = rows_of(1)
    coordinator = stage(tmp_path / "c", arrays, parts)
    reports = [*map(partial(participate, str(tmp_path / "c")), coordinator.tickets, parts)]
    with pytest.raises(UsageError, match="have not written what they were asked for"):
        coordinator.commit(reports[:2])
    assert left_in(tmp_path) == []


def test_the_target_is_taken(tmp_path: Path) -> None:
    arrays, parts = rows_of(1)
    vs.save(tmp_path / "c", {"old": np.ones(3)})
    with pytest.raises(CheckpointExists):
        save(tmp_path / "c", arrays, parts)
    check(tmp_path / "c", {"old": np.ones(3)})
    save(tmp_path / "c", arrays, parts, overwrite=True)
    check(tmp_path / "c", arrays)


def test_nfs_is_refused_for_several_machines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arrays, parts = rows_of(1)
    monkeypatch.setattr(syscalls, "file_system_type", lambda place: 0x6969)
    with pytest.raises(UsageError, match="NFS") as caught:
        stage(tmp_path / "c", arrays, parts, hosts=["a", "b", "a"])
    assert "allow_nfs=True" in str(caught.value)
    assert left_in(tmp_path) == []
    stage(tmp_path / "c", arrays, parts, hosts=["a", "b", "a"], allow_nfs=True).abort()
    save(tmp_path / "c", arrays, parts)


def test_one_process_gives_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arrays, parts = rows_of(1)
    vs.save(tmp_path / "c", {"old": np.ones(3)})
    coordinator = stage(tmp_path / "c", arrays, parts, overwrite=True)
    first = Participant(str(tmp_path / "c"), coordinator.tickets[0])
    with monkeypatch.context() as patch:
        patch.setattr(syscalls, "pwrite", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
        with pytest.raises(OutOfSpace):
            participate(str(tmp_path / "c"), coordinator.tickets[1], parts[1])
    coordinator.abort()
    with pytest.raises(StorageError, match="another process has given it up"):
        first.write((name, offsets, values) for name, its in parts[0].items() for offsets, values in its)
    assert left_in(tmp_path) == ["c"]
    check(tmp_path / "c", {"old": np.ones(3)})


KILLED = """
import sys, test_together as tests
arrays, parts = tests.rows_of(1)
coordinator = tests.stage(tests.Path(sys.argv[1]), arrays, parts, overwrite=True)
print(tests.participate(sys.argv[1], coordinator.tickets[0], parts[0])[:1], coordinator.tickets[1], flush=True)
sys.stdin.read()
"""


def test_the_coordinator_is_killed(tmp_path: Path) -> None:
    _, parts = rows_of(1)
    vs.save(tmp_path / "c", {"old": np.ones(3)})
    command = [sys.executable, "-c", KILLED, str(tmp_path / "c")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment) as process:
        assert process.stdout is not None
        ticket = process.stdout.readline().decode().partition(" ")[2]
        process.send_signal(signal.SIGKILL)
        process.wait()
    participant = Participant(str(tmp_path / "c"), ticket)
    assert len(left_in(tmp_path)) == 2
    assert len(vs.clean(tmp_path)) == 1
    with pytest.raises(StorageError, match="another process has given it up"):
        participant.write((name, offsets, values) for name, its in parts[1].items() for offsets, values in its)
    participant.close()
    assert left_in(tmp_path) == ["c"]
    check(tmp_path / "c", {"old": np.ones(3)})
