"""`varstore.links`: the links of a run that was copied file by file are made again, and nothing else changes."""

import errno
import itertools
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from support import check_checkpoint

import varstore as vs
from varstore.cli import main
from varstore.disk import relink
from varstore.errors import CheckpointNotFound, StorageError

SHARED = np.arange(3000.0)
STEPS = range(8, 12)


def state_of(step):
    frozen = {f"layer{i}/weight": np.full((40, 40), i, np.float32) for i in range(3)}
    return frozen | {"head/weight": np.full(500, step), "a": SHARED, "b/tied": SHARED, "empty": np.zeros(0)}


@pytest.fixture
def run(tmp_path):
    """A run whose steps share files, as `cp -r` leaves it."""
    with vs.CheckpointManager(tmp_path / "original") as manager:
        for step in STEPS:
            manager.save(step, state_of(step))
    shutil.copytree(tmp_path / "original", tmp_path / "run")
    return tmp_path / "run"


def files(place):
    return sorted(path for path in Path(place).rglob("*") if path.is_file())


def used(place):
    """Return the bytes of all files, those with several names once."""
    return sum({path.stat().st_ino: path.stat().st_size for path in files(place)}.values())


def kept(place):
    """Return what must not change: names, modes and bytes."""
    return {str(path): (path.stat().st_mode, path.read_bytes()) for path in files(place)}


def check_steps(run):
    for step in STEPS:
        state = vs.load_state(run / f"step-{step}")
        assert state.keys() == state_of(step).keys()
        assert all(np.array_equal(state[name], value) for name, value in state_of(step).items())
        assert vs.verify(run / f"step-{step}").ok


def test_the_links_of_a_run_are_made_again(run):
    before, original = used(run), run.with_name("original")
    assert before > 2 * used(original)
    content, handle = kept(run), vs.open(run / "step-9")
    report = vs.links(run)
    assert used(run) <= used(original)
    assert report.nbytes == before - used(run)
    assert (report.checkpoints, report.left) == (len(STEPS), ())
    assert str(report).endswith(f"{report.linked} files became links, {report.nbytes:,} bytes freed")
    assert kept(run) == content
    assert np.array_equal(handle["a"].numpy(), SHARED)
    assert not handle.is_replaced
    assert (run / "step-8/a/out").samefile(run / "step-11/b/tied/out")
    assert not (run / "step-8/head/weight/out").samefile(run / "step-9/head/weight/out")
    check_steps(run)
    again = vs.links(run)
    assert (again.linked, again.nbytes) == (0, 0)


def test_what_is_linked_already_is_left_and_one_checkpoint_gets_its_ties(run):
    original = run.with_name("original")
    inodes = {path: path.stat().st_ino for path in files(original) if path.name == "out"}
    vs.links(original)
    assert {path: path.stat().st_ino for path in inodes} == inodes
    assert not (run / "step-8/a/out").samefile(run / "step-8/b/tied/out")
    vs.links(run / "step-8")
    assert (run / "step-8/a/out").samefile(run / "step-8/b/tied/out")
    assert not (run / "step-8/a/out").samefile(run / "step-9/a/out")


def test_attached_files_become_links_whatever_their_names(tmp_path):
    for name, files in (("a", {"m.onnx": b"graph", "text": b"text"}), ("b", {"n.onnx": b"graph", "text": b"other"})):
        vs.save(tmp_path / name, {"w": np.zeros(3)}, files=files)
    assert vs.links(tmp_path).linked == 3
    assert (tmp_path / "a" / "m.onnx").samefile(tmp_path / "b" / "n.onnx")
    assert not (tmp_path / "a" / "text").samefile(tmp_path / "b" / "text")
    for name in "ab":
        assert vs.verify(tmp_path / name).ok
    assert vs.links(tmp_path).linked == 0
    (tmp_path / "b" / "n.onnx").unlink()
    (tmp_path / "b" / "n.onnx").write_bytes(b"graph")
    (tmp_path / "a" / "m.onnx").unlink()
    (tmp_path / "a" / "m.onnx").write_bytes(b"grape")
    (why,) = vs.links(tmp_path).left
    assert "n.onnx" in why
    assert "m.onnx" in why


def test_a_dry_run_says_the_same_and_changes_nothing(run):
    inodes = {path: path.stat().st_ino for path in files(run)}
    planned = vs.links(run, dry_run=True)
    assert {path: path.stat().st_ino for path in files(run)} == inodes
    done = vs.links(run)
    assert (planned.linked, planned.nbytes) == (done.linked, done.nbytes)
    assert "would become" in str(planned)


def test_progress_comes_to_its_end(run):
    seen = []
    vs.links(run, progress=lambda done, total: seen.append((done, total)))
    assert seen[0][0] == 0
    assert seen[-1][0] == seen[-1][1] > 0


def test_files_that_only_seem_equal_are_left(run):
    path = run / "step-9" / "a" / "out"
    path.chmod(0o644)
    with open(path, "r+b") as file:
        file.seek(800)
        file.write(b"!")
    path.chmod(0o444)
    damaged = path.read_bytes()
    report = vs.links(run)
    assert [why for why in report.left if "one of them is damaged" in why and "step-9" in why]
    assert path.read_bytes() == damaged
    assert (run / "step-8/a/out").samefile(run / "step-10/a/out")
    assert vs.verify(run / "step-8").ok
    assert vs.verify(run / "step-10").ok
    assert not vs.verify(run / "step-9").ok


@pytest.mark.parametrize("change", ["mode", "user", "symlink", "no manifest", "short", "missing", "staging"])
def test_what_is_not_ours_to_change(run, change):
    step, out = run / "step-9", run / "step-9" / "a" / "out"
    if change == "mode":
        out.chmod(0o400)
    elif change == "user":
        if os.geteuid() != 0:
            pytest.skip("only root gives files away")
        os.chown(out, 1234, os.getegid())
    elif change == "symlink":
        step.rename(run.with_name("elsewhere"))
        step.symlink_to(run.with_name("elsewhere"))
    elif change == "no manifest":
        (step / "manifest").unlink()
    elif change == "short":
        out.chmod(0o644)
        os.truncate(out, 100)
    elif change == "missing":
        out.unlink()
    else:
        step = step.rename(run / ".step-9.saving-00000000")
        out = step / "a" / "out"
    before = out.stat() if out.exists() else None
    report = vs.links(run)
    if change in ("no manifest", "short", "missing"):
        assert [why for why in report.left if "step-9" in why]
    if before is not None:
        assert out.stat().st_ino == before.st_ino
        assert out.stat().st_nlink == 1
    assert (run / "step-8/a/out").samefile(run / "step-10/a/out")
    assert report.checkpoints == len(STEPS) - (change in ("symlink", "staging"))


def test_a_file_that_has_all_the_names_that_it_can_have(run, monkeypatch):
    link, made = os.link, []

    def limited(name, temporary, *, src_dir_fd, **options):
        if os.stat(name, dir_fd=src_dir_fd).st_nlink == 2:
            raise OSError(errno.EMLINK, "too many links")
        made.append(temporary)
        link(name, temporary, src_dir_fd=src_dir_fd, **options)

    monkeypatch.setattr(os, "link", limited)
    before = kept(run)
    assert vs.links(run).linked == len(made) > 10
    assert kept(run) == before
    assert (run / "step-8/layer1/weight/out").samefile(run / "step-9/layer1/weight/out")
    assert (run / "step-10/layer1/weight/out").samefile(run / "step-11/layer1/weight/out")


def test_a_file_system_without_links_says_so(run, monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.EPERM, "links are not possible here")

    monkeypatch.setattr(os, "link", refuse)
    before = kept(run)
    with pytest.raises(StorageError, match="links are not possible here"):
        vs.links(run)
    assert kept(run) == before


def test_a_file_that_is_replaced_meanwhile_is_not_touched(run, monkeypatch):
    link, out = os.link, run / "step-9" / "a" / "out"
    put = []

    def replacing(name, temporary, **options):
        if not put:
            put.append(out.unlink())
            out.write_bytes(b"new")
        link(name, temporary, **options)

    monkeypatch.setattr(relink.os, "link", replacing)
    monkeypatch.setattr(relink, "_linkable", lambda c, of=relink._linkable: (e for e in of(c) if e.name == "a"))
    vs.links(run)
    assert out.read_bytes() == b"new"


def test_a_step_that_goes_meanwhile_is_passed_over(run, monkeypatch):
    visit = relink._Work.visit

    def removing(self, checkpoint, entries, advance):
        if checkpoint.path.endswith("step-10"):
            shutil.rmtree(run / "step-8")
        visit(self, checkpoint, entries, advance)

    monkeypatch.setattr(relink._Work, "visit", removing)
    report = vs.links(run)
    assert any("step-8" in why for why in report.left)
    assert (run / "step-10/layer1/weight/out").samefile(run / "step-11/layer1/weight/out")


CALLS = ("link", "stat", "fstat", "rename", "unlink", "close")


class Stop(BaseException):
    """As Ctrl-C, and nothing else."""


def links_in_child(run, at, how):
    """Make links in another process, stop it before one of its calls, and return how it ended."""
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    made = itertools.count(1)

    def stopping(call):
        def stop(*arguments, **options):
            if next(made) == at:
                if how == "killed":
                    os._exit(9)
                raise Stop
            return call(*arguments, **options)

        return stop

    for name in CALLS:
        setattr(os, name, stopping(getattr(os, name)))
    try:
        vs.links(run)
    except Stop:
        os._exit(8)
    except BaseException:
        os._exit(7)
    os._exit(0)


@pytest.mark.parametrize("how", ["killed", "interrupted"])
def test_stopped_at_any_call_it_leaves_every_checkpoint_whole(run, how):
    content = kept(run)
    vs.links(run, dry_run=True)  # all is imported
    for at in itertools.count(1, 5):
        ended = links_in_child(run, at, how)
        assert ended in (0, 9 if how == "killed" else 8)
        vs.clean(run)
        assert kept(run) == content
        if not ended:
            break
    assert at > 50
    check_steps(run)
    assert vs.links(run).linked == 0


def test_the_command(run):
    told = CliRunner().invoke(main, ["links", "--dry-run", str(run)])
    assert told.exit_code == 0
    assert "would become links" in told.output
    said = CliRunner().invoke(main, ["links", "--json", str(run)])
    assert said.exit_code == 0
    facts = json.loads(said.output)
    assert facts["linked"] > 0
    assert not facts["dry_run"]
    assert f"{facts['nbytes']:,} bytes freed" in told.output
    assert CliRunner().invoke(main, ["links", str(run / "nothing")]).exit_code == 3


def test_a_directory_without_checkpoints(tmp_path):
    for path in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(CheckpointNotFound):
            vs.links(path)


def test_a_copy_that_was_killed_gives_the_last_step_that_is_whole(run, tmp_path):
    """As rclone copies: file by file in any order, marker and manifest early, the last file cut off."""
    for count in range(0, len(files(run / "step-11")), 3):
        partial = tmp_path / f"copy{count}"
        shutil.copytree(run, partial, ignore=shutil.ignore_patterns("step-11"))
        order = sorted(files(run / "step-11"), key=lambda path: path.parent.name != "step-11")
        for at, path in enumerate(order[: count + 1]):
            there = partial / path.relative_to(run)
            there.parent.mkdir(parents=True, exist_ok=True)
            there.write_bytes(path.read_bytes()[: path.stat().st_size // 2 if at == count else None])
        with vs.CheckpointManager(partial) as manager:
            assert manager.latest().step == 10
            assert manager.restore()["head/weight"][0] == 10
    check_checkpoint(run / "step-11", state_of(11))
