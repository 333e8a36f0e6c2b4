"""Ten thousand variables: everything works, and opening costs milliseconds."""

import gc
import os
import threading
import time

import numpy as np
import pytest

import varstore as vs
from varstore.disk import threads as disk_threads
from varstore.disk.read import whole
from varstore.disk.save import small_files
from varstore.inspection import verify

COUNT = 10_000
NAMES = [f"block{i // 100}/layer{i % 100}/weight" for i in range(COUNT)]


def values():
    table = np.arange(COUNT * 8, dtype=np.float32).reshape(COUNT, 8)
    return dict(zip(NAMES, table, strict=True))


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("many") / "c"
    vs.save(path, values())
    return path


def test_names_and_values(path):
    opened = vs.open(path)
    assert opened.names == tuple(NAMES)
    assert len(opened) == COUNT
    assert opened.nbytes == COUNT * 32
    assert opened[NAMES[7777]].shape == (8,)
    assert NAMES[-1] in opened
    assert len(repr(opened)) < 500
    assert len(opened._repr_html_()) < 50_000
    loaded = vs.load(path)
    assert list(loaded) == NAMES
    for name, value in values().items():
        assert np.array_equal(loaded[name], value)
    assert sorted(vs.load(path, include="block7/*")) == sorted(NAMES[700:800])


@pytest.mark.parametrize("quick", [0, 1e9])
def test_threads_help_with_slow_calls_and_change_nothing(path, tmp_path, monkeypatch, quick):
    monkeypatch.setattr(small_files, "_QUICK", quick)
    batches = []
    write = small_files.SmallFiles._write
    monkeypatch.setattr(
        small_files.SmallFiles,
        "_write",
        lambda self, batch: batches.append(threading.get_ident()) or write(self, batch),
    )
    vs.save(tmp_path / "c", values(), durable=False, threads=3)
    assert (len(set(batches)) > 1) is (quick == 0)
    assert vs.diff(path, tmp_path / "c").equal


@pytest.mark.parametrize("quick", [0, 1e9])
def test_threads_help_with_slow_reading_and_change_nothing(path, monkeypatch, quick):
    monkeypatch.setattr(disk_threads, "_QUICK", quick)
    threads = set()
    for module, name in ((whole, "read_batch"), (verify, "check_meta")):
        do = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda *given, do=do, **how: threads.add(threading.get_ident()) or do(*given, **how)
        )
    loaded = vs.load(path, threads=3)
    assert (len(threads) > 1) is (quick == 0)
    threads.clear()
    assert vs.verify(path, threads=3).ok
    assert (len(threads) > 1) is (quick == 0)
    assert list(loaded) == NAMES
    assert all(np.array_equal(loaded[name], value) for name, value in values().items())


def test_garbage_is_collected_while_callbacks_run(tmp_path):
    running = []

    def progress(done, total):
        running.append(gc.isenabled())

    vs.save(tmp_path / "c", {"v": np.ones(3)}, progress=progress)
    vs.load(tmp_path / "c", progress=progress, rename=lambda name: running.append(gc.isenabled()) or name)
    vs.load_into({"v": np.zeros(3)}, tmp_path / "c", progress=progress)
    assert len(running) >= 6
    assert all(running)


def test_opening_takes_milliseconds(path):
    def opening():
        started = time.perf_counter()
        vs.open(path)[NAMES[-1]][:]
        return time.perf_counter() - started

    assert min(opening() for _ in range(5)) < 0.1


def test_verify_and_load_into(path):
    assert vs.verify(path).ok
    targets = {name: np.zeros(8, np.float32) for name in NAMES}
    vs.load_into(targets, path)
    assert all(np.array_equal(targets[name], value) for name, value in values().items())
    (path / NAMES[1234] / "out").chmod(0o644)
    with open(path / NAMES[1234] / "out", "r+b") as file:
        good = file.read(1)
        file.seek(0)
        file.write(bytes([good[0] ^ 1]))
    report = vs.verify(path)
    assert len(report.problems) == 1
    assert NAMES[1234] in report.problems[0]
    with pytest.raises(vs.errors.DigestMismatch, match=NAMES[1234]):
        vs.load(path)
    with open(path / NAMES[1234] / "out", "r+b") as file:
        file.write(good)
    assert vs.verify(path).ok


def test_links_of_all_and_a_seal(path, tmp_path):
    vs.save(tmp_path / "linked", vs.open(path), durable=False, manifest=False)
    plain = vs.open(tmp_path / "linked")
    assert plain.manifest is None
    assert sorted(plain) == sorted(NAMES)
    assert os.stat(tmp_path / "linked" / NAMES[5] / "out").st_nlink >= 2
    report = vs.seal(tmp_path / "linked")
    assert len(report.added) == COUNT
    assert vs.diff(path, tmp_path / "linked").equal
