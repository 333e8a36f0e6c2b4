"""File systems whose calls wait for a server: many calls wait at the same time, and none is made that is not needed."""

import collections
import os
import threading
import time

import numpy as np
import pytest
from support import check_checkpoint

import varstore as vs
from tools.slow_mount import Unavailable, slow_mount
from varstore.disk import threads as disk_threads
from varstore.storage import syscalls

COUNT = 30
WAIT = 0.01
CALLS = {
    os: ("mkdir", "open", "stat", "link", "unlink", "rmdir", "rename", "listdir", "scandir"),
    syscalls: ("_openat2",),
}


class Slow:
    """Makes the calls that look names up wait, and counts them by thread and by name."""

    def __init__(self, monkeypatch):
        self.made = []
        self.seconds = WAIT
        for module, names in CALLS.items():
            for name in names:
                monkeypatch.setattr(module, name, self._waiting(name, getattr(module, name)))
        monkeypatch.setattr(syscalls, "open_folder", self._waiting("open", syscalls.open_folder))

    def _waiting(self, name, call):
        def wait(path, *arguments, **options):
            self.made.append((threading.get_ident(), name, os.fspath(path) if not isinstance(path, int) else ""))
            time.sleep(self.seconds)
            return call(path, *arguments, **options)

        return wait

    def counted(self, action):
        """Return the number of calls that an action makes, and of those that the busiest thread makes."""
        self.made.clear()
        action()
        by_thread = collections.Counter(thread for thread, _, _ in self.made)
        return len(self.made), max(by_thread.values())

    def check(self, path, values):
        """Check a checkpoint without waiting."""
        self.seconds = 0
        check_checkpoint(path, values)


def values_of(count=COUNT, *, nested=False, first=0):
    names = [f"block{i // 10}/layer{i}/weight" if nested else f"layer{i}" for i in range(count)]
    return {name: np.full(9, i if i else first, np.float32) for i, name in enumerate(names)}


@pytest.fixture
def slow(monkeypatch, tmp_path):
    vs.load(vs.save(tmp_path / "first", values_of(2)).path)  # all is imported
    return Slow(monkeypatch)


@pytest.mark.parametrize("nested", [False, True], ids=["flat", "nested"])
@pytest.mark.parametrize("durable", [False, True], ids=["", "durable"])
def test_a_save_has_many_calls_wait_at_the_same_time(slow, tmp_path, nested, durable):
    values = values_of(nested=nested)
    total, busiest = slow.counted(lambda: vs.save(tmp_path / "c", values, durable=durable))
    assert total > 3 * COUNT
    assert busiest < COUNT + 10
    slow.check(tmp_path / "c", values)


@pytest.mark.parametrize("nested", [False, True], ids=["flat", "nested"])
def test_a_load_opens_each_file_once_and_many_at_the_same_time(slow, tmp_path, nested):
    values = values_of(nested=nested)
    vs.save(tmp_path / "c", values)
    total, busiest = slow.counted(lambda: vs.load(tmp_path / "c"))
    assert not [path for _, _, path in slow.made if path.endswith("meta")]
    assert COUNT < total < COUNT + 12
    assert busiest < COUNT / 2
    total, busiest = slow.counted(lambda: vs.verify(tmp_path / "c"))
    assert busiest < 2 * COUNT < total / 2


@pytest.mark.parametrize("nested", [False, True], ids=["flat", "nested"])
def test_links_are_made_at_the_same_time(slow, tmp_path, nested):
    values, changed = values_of(nested=nested), values_of(nested=nested, first=7)
    vs.save(tmp_path / "c", values)
    total, busiest = slow.counted(lambda: vs.save(tmp_path / "d", changed, base=tmp_path / "c"))
    links = [path for _, name, path in slow.made if name == "link"]
    assert len(links) == 2 * (COUNT - 1)
    assert busiest < COUNT + 20 < total / 3
    name = next(reversed(values))
    assert os.stat(tmp_path / "d" / name / "out").st_nlink == 2
    slow.check(tmp_path / "d", changed)


def test_what_is_overwritten_is_removed_with_a_call_for_each_file_and_many_at_the_same_time(slow, tmp_path):
    vs.save(tmp_path / "c", values_of())
    changed = values_of(first=7)
    total, busiest = slow.counted(lambda: vs.save(tmp_path / "c", changed, overwrite=True))
    removed = [path for _, name, path in slow.made if name == "unlink" and path in ("out", "meta")]
    assert len(removed) == 2 * COUNT
    assert busiest < total / 3
    slow.check(tmp_path / "c", changed)
    assert sorted(os.listdir(tmp_path)) == ["c", "first"]


class Fetched:
    """Values that are read when they are asked for."""

    def __init__(self, values):
        self.values, self.shape, self.dtype = values, values.shape, values.dtype

    def __array__(self, dtype=None, copy=None):
        return np.asarray(self.values, dtype)


def test_ties_large_values_and_those_that_are_fetched(slow, tmp_path):
    shared, large = np.arange(9.0), np.arange(400_000.0)
    values = values_of(40) | {"large": large, "a/large": large + 1, "a": shared, "b/tied": shared, "x": Fetched(large)}
    expected = values | {"x": large}
    vs.save(tmp_path / "c", values)
    vs.save(tmp_path / "d", values, base=tmp_path / "c")
    vs.save(tmp_path / "e", vs.open(tmp_path / "d"), overwrite=True)
    for name in "cde":
        slow.check(tmp_path / name, expected)
    assert os.stat(tmp_path / "d" / "large" / "out").st_nlink == 3


def test_a_number_of_threads_that_was_asked_for_is_kept(slow, tmp_path):
    vs.save(tmp_path / "c", values_of(), threads=2)
    vs.load(tmp_path / "c", threads=2)
    assert len({thread for thread, _, _ in slow.made}) <= 4  # two for each, one of them the caller's
    slow.check(tmp_path / "c", values_of())


def test_an_error_in_one_of_many_threads_undoes_the_save(slow, tmp_path, monkeypatch):
    create = syscalls.create

    def refuse(path, dir_fd):
        if path == "layer20/out":
            raise OSError(5, "this disk is broken")
        return create(path, dir_fd)

    monkeypatch.setattr(syscalls, "create", refuse)
    monkeypatch.setattr(syscalls, "create_each", lambda paths, dir_fd, private: (refuse(p, dir_fd) for p in paths))
    with pytest.raises(vs.errors.StorageError, match="this disk is broken"):
        vs.save(tmp_path / "c", values_of())
    assert os.listdir(tmp_path) == ["first"]


def test_one_slow_call_is_an_accident_and_two_are_not():
    def run(slow):
        used = set()

        def do(item):
            used.add(threading.get_ident())
            time.sleep(0.005 if item in slow else 0)

        disk_threads.for_each(range(40), do)
        return len(used)

    if run(()) == 1:  # not on a machine that is too busy to tell
        assert run(range(40)) > 1


def test_everything_over_sshfs():
    try:
        with slow_mount(0.002) as place:
            values, changed = values_of(), values_of(first=7)
            vs.save(place / "c", values)
            vs.save(place / "d", changed, base=place / "c")
            vs.save(place / "c", changed, overwrite=True)
            for name in "cd":
                loaded = vs.load(place / name)
                assert all(np.array_equal(loaded[name], values) for name, values in changed.items())
                assert vs.verify(place / name).ok
            assert vs.clean(place) == []
            assert sorted(os.listdir(place)) == ["c", "d"]
    except Unavailable as unavailable:
        pytest.skip(str(unavailable))
