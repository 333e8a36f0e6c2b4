"""A checkpoint is replaced, or removed, just before each call to the system that a reader makes: at every one of them.

What is read is the old checkpoint or the new one, and the only error is that the checkpoint was replaced (or, after a
removal, that there is none). No order of the calls gets damage reported, or old attributes beside new values.
"""

import contextlib
import errno
import itertools
import os
import random
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest

import varstore as vs
from varstore.errors import CheckpointNotFound, StorageError
from varstore.storage import syscalls

CALLS = {
    os: ("open", "close", "stat", "fstat", "scandir", "listdir", "rename", "unlink"),
    syscalls: ("openat2_beneath", "open_folder", "pread", "preadv", "map_file", "sync", "sync_file_system"),
}
OLD, NEW = 1, 2


def values_of(filling):
    """Return variables of different sizes in the two checkpoints, so that files are longer, shorter and missing."""
    values = {f"v{i}": np.full(40 + filling * i, filling, np.int16) for i in range(3)}
    return values | {f"only {filling}": np.full(5, filling, np.int16), "same": np.full(9, filling, np.int16)}


def save(path, filling, *, manifest):
    about = {"attributes": {"filling": filling}, "tree": ""} if manifest else {}
    return vs.save(path, values_of(filling), manifest=manifest, durable=False, **about)


class Steps:
    """Counts the calls that a reader makes, and does something before the one with a given number."""

    def __init__(self, monkeypatch):
        self.count = 0
        self._at = -1
        self._act = None
        self._acting = True
        for module, names in CALLS.items():
            for name in names:
                monkeypatch.setattr(module, name, self._counted(getattr(module, name)))

    def _counted(self, call):
        def counted(*args, **kwargs):
            if not self._acting:
                if self.count == self._at:
                    with self.resting():
                        self._act()
                self.count += 1
            return call(*args, **kwargs)

        return counted

    @contextlib.contextmanager
    def resting(self):
        self._acting = True
        yield
        self._acting = False

    @contextlib.contextmanager
    def doing(self, act, at):
        self.count, self._at, self._act, self._acting = 0, at, act, False
        try:
            yield
        finally:
            self._acting = True


@pytest.fixture
def steps(monkeypatch):
    return Steps(monkeypatch)


@pytest.fixture
def home():
    """A folder in memory: each step is a save of its own, and some of them are durable."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as folder:
        yield Path(folder)


def filling_of(values):
    """Return what the arrays of one checkpoint are filled with; they must be all of it, and of no other."""
    (filling,) = {int(array.flat[0]) for array in values.values()}
    assert all((array == filling).all() for array in values.values())
    assert {name: array.shape for name, array in values.items()} == {n: v.shape for n, v in values_of(filling).items()}
    return filling


def sealed(path):
    vs.seal(path)
    return verified(path)


def verified(path):
    report = vs.verify(path)
    assert report.ok, report
    return opened(path)


def opened(path):
    with vs.open(path) as checkpoint:
        filling = 0
        with contextlib.suppress(StorageError):  # a handle may be told that it is old
            filling = filling_of({name: variable.numpy() for name, variable in checkpoint.items()})
        if filling and checkpoint.attributes:
            assert checkpoint.attributes["filling"] == filling
        return filling or NEW


def loaded_into(path):
    targets = {name: np.zeros_like(values) for name, values in {**values_of(OLD), **values_of(NEW)}.items()}
    report = vs.load_into(targets, path, on_mismatch="skip")
    filling = int(targets["same"][0])
    for name in report.loaded:
        assert (targets[name] == filling).all()
    assert set(report.loaded) >= {"same", f"only {filling}"}
    return filling


def different(path):
    report = vs.diff(path, path.parent / "old")
    return NEW if report.changed else OLD


def converted(suffix):
    def convert(path):
        target = path.parent / f"converted{suffix}"
        with contextlib.suppress(FileNotFoundError):
            target.unlink() if suffix else shutil.rmtree(target)
        vs.convert(path, target)
        found = vs.read(target)
        return filling_of({name: np.asarray(found[name]) for name in found})

    return convert


BY_PATH = {
    "open": opened,
    "load": lambda path: filling_of(vs.load(path, threads=1)),
    "load unchecked": lambda path: filling_of(vs.load(path, threads=1, verify=False)),
    "load mapped": lambda path: filling_of(vs.load(path, mmap=True)),
    "load_into": loaded_into,
    "load_state": lambda path: filling_of(vs.load_state(path, threads=1)),
    "verify": verified,
    "seal": sealed,
    "diff": different,
    "convert to safetensors": converted(".safetensors"),
    "convert to a checkpoint": converted(""),
    "checkpoint.get": lambda path: (vs.checkpoint.get(path), NEW)[1],
}


def remove_slowly(path, left):
    """Remove a checkpoint as varstore does, the marker first and then its files in any order; `left` files stay."""
    files = [os.path.join(folder, name) for folder, _, names in os.walk(path) for name in names]
    files.remove(os.path.join(path, "snapshot_done"))
    random.shuffle(files)
    for file in [os.path.join(path, "snapshot_done"), *files[left:]]:
        os.unlink(file)


def replaced(path, manifest):
    new = vs.save(path, values_of(NEW), overwrite=True, manifest=manifest, durable=False, **attributes(manifest))
    assert new.names


def attributes(manifest):
    return {"attributes": {"filling": NEW}} if manifest else {}


def half_replaced(path, manifest):
    """Leave a writer between the exchange and the end of the removal."""
    save(path.parent / "next", NEW, manifest=manifest)
    shutil.rmtree(path.parent / "aside", ignore_errors=True)
    os.rename(path, path.parent / "aside")
    os.rename(path.parent / "next", path)
    remove_slowly(path.parent / "aside", left=random.randrange(9))


def removed(path, manifest):
    remove_slowly(path, left=random.randrange(9))


def removed_whole(path, manifest):
    remove_slowly(path, left=0)
    shutil.rmtree(path)


REPLACEMENTS = {"replaced": replaced, "half replaced": half_replaced}
REMOVALS = {"removed": removed, "removed whole": removed_whole}


def at_each_step(home, steps, manifest, act, use):
    """Yield what `use` returned, or the error that it raised, with `act` done before each of its steps."""
    path = home / "c"
    save(home / "old", OLD, manifest=manifest)
    for at in itertools.count():
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(home / "old", path)
        random.seed(at)
        outcome: object
        with steps.doing(lambda: act(path, manifest), at):
            try:
                outcome = use(path)
            except vs.VarstoreError as error:
                outcome = error
        if steps.count <= at:
            return
        yield outcome


@pytest.mark.parametrize("manifest", [True, False], ids=["manifest", "plain"])
@pytest.mark.parametrize("act", REPLACEMENTS)
@pytest.mark.parametrize("verb", BY_PATH)
def test_a_verb_gives_the_old_checkpoint_or_the_new_one(home, steps, verb, act, manifest):
    outcomes = list(at_each_step(home, steps, manifest, REPLACEMENTS[act], BY_PATH[verb]))
    assert len(outcomes) > 5
    assert set(outcomes) <= {OLD, NEW}, [outcome for outcome in outcomes if isinstance(outcome, Exception)]
    assert NEW in outcomes


@pytest.mark.parametrize("manifest", [True, False], ids=["manifest", "plain"])
@pytest.mark.parametrize("act", REMOVALS)
@pytest.mark.parametrize("verb", ["load", "load mapped", "load_into", "load_state", "diff"])
def test_a_removal_leaves_all_variables_or_an_error(home, steps, verb, act, manifest):
    outcomes = list(at_each_step(home, steps, manifest, REMOVALS[act], BY_PATH[verb]))
    assert len(outcomes) > 5
    for outcome in outcomes:
        assert outcome == OLD or isinstance(outcome, (FileNotFoundError, StorageError)), outcome
    assert any(
        isinstance(outcome, CheckpointNotFound if act == "removed whole" else FileNotFoundError) for outcome in outcomes
    )


HANDLES = {
    "load": lambda handle: filling_of(vs.load(handle, threads=1)),
    "numpy": lambda handle: filling_of({name: variable.numpy() for name, variable in handle.items()}),
    "map": lambda handle: filling_of({name: variable.numpy(mmap=True) for name, variable in handle.items()}),
    "slice": lambda handle: int(handle["v2"][3:7].max()),
    "load_state": lambda handle: filling_of(vs.load_state(handle, threads=1)),
    "link": lambda handle: filling_of(vs.load(copy_of(handle), threads=1)),
    "unpickled": lambda handle: filling_of(
        vs.load(__import__("pickle").loads(__import__("pickle").dumps(handle)), threads=1)
    ),
}


def copy_of(handle):
    target = os.path.join(os.path.dirname(handle.path), "copy")
    shutil.rmtree(target, ignore_errors=True)
    return vs.save(target, handle.select(), durable=False)


@pytest.mark.parametrize("manifest", [True, False], ids=["manifest", "plain"])
@pytest.mark.parametrize("act", [*REPLACEMENTS, *REMOVALS])
@pytest.mark.parametrize("use", HANDLES)
def test_a_handle_gives_the_old_checkpoint_or_says_that_it_was_replaced(home, steps, use, act, manifest):
    handles = []

    def with_handle(path):
        with steps.resting():
            handles[:] = [vs.open(path)]
        return HANDLES[use](handles[0])

    for outcome in at_each_step(home, steps, manifest, (REPLACEMENTS | REMOVALS)[act], with_handle):
        if isinstance(outcome, StorageError):
            assert outcome.errno == errno.ESTALE, outcome
            assert "replaced since it was opened. Open it again" in str(outcome)
        else:
            assert outcome == OLD or isinstance(outcome, CheckpointNotFound), repr(outcome)
