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

import pytest

import varstore as vs
from tools.faults.races import BY_PATH, FILLINGS, HANDLES, save
from varstore.errors import CheckpointNotFound, StorageError
from varstore.storage import syscalls

CALLS = {
    os: ("open", "close", "stat", "fstat", "scandir", "listdir", "rename", "unlink"),
    syscalls: ("openat2_beneath", "open_folder", "pread", "preadv", "map_file", "sync", "sync_file_system"),
}
OLD, NEW = FILLINGS


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


def remove_slowly(path, left):
    """Remove a checkpoint as varstore does, the marker first and then its files in any order; `left` files stay."""
    files = [os.path.join(folder, name) for folder, _, names in os.walk(path) for name in names]
    files.remove(os.path.join(path, "snapshot_done"))
    random.shuffle(files)
    for file in [os.path.join(path, "snapshot_done"), *files[left:]]:
        os.unlink(file)


def replaced(path, manifest):
    save(path, NEW, manifest=manifest, overwrite=True)


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
    save(home / "first", OLD, manifest=manifest)
    for at in itertools.count():
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(home / "first", path)
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


@pytest.mark.parametrize("manifest", [True, False], ids=["manifest", "plain"])
@pytest.mark.parametrize("act", ["half replaced", "removed whole"])
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
