"""File systems in user space: what the kernel answers for them at once, their daemon never hears."""

import os
import shutil
import subprocess
import time

import numpy as np
import pytest

import varstore as vs


@pytest.fixture
def bound(tmp_path):
    """A directory, shown at another place by bindfs, and the trace of its daemon's calls."""
    for program in ("bindfs", "strace"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")
    (tmp_path / "store").mkdir()
    (tmp_path / "shown").mkdir()
    trace = tmp_path / "trace"
    command = ["strace", "-f", "-y", "-o", trace, "-e", "trace=fsync,fdatasync,syncfs,renameat2,rename,unlink"]
    daemon = subprocess.Popen(
        [*command, "bindfs", "-f", tmp_path / "store", tmp_path / "shown"], stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 20
    while not os.path.ismount(tmp_path / "shown"):
        if daemon.poll() is not None or time.monotonic() > deadline:
            daemon.kill()
            pytest.skip(f"bindfs does not mount here: {daemon.communicate()[1].strip()}")
        time.sleep(0.05)
    yield tmp_path / "shown", trace
    subprocess.run(["umount", "--lazy", tmp_path / "shown"], check=True)
    daemon.communicate(timeout=20)


def test_a_durable_save_syncs_each_file_before_the_marker(bound):
    shown, trace = bound
    vs.save(shown / "c", {f"v{i}/w": np.full(9, i) for i in range(12)})
    subprocess.run(["sync", "-f", trace], check=False)
    synced = [line.rpartition(".saving-")[2].partition("/")[2] for line in trace.read_text().splitlines()]
    synced = [line.partition(">")[0] for line in synced if line.endswith("= 0")]
    files = {f"v{i}/w/{name}" for i in range(12) for name in ("out", "meta")}
    marker = synced.index("snapshot_done")
    assert files <= set(synced[:marker])
    assert "manifest" in synced[:marker]
    assert vs.verify(shown / "c").ok


def test_overwriting_and_linking_work(bound):
    shown, _ = bound
    values = {"w": np.arange(9.0), "v/x": np.ones(3)}
    vs.save(shown / "c", values)
    (shown / "c" / "mine.txt").write_text("mine")
    for i in range(3):
        vs.save(shown / "c", values | {"i": np.array(i)}, overwrite=True, foreign="keep")
    assert vs.load(shown / "c")["i"] == 2
    assert (shown / "c" / "mine.txt").read_text() == "mine"
    vs.save(shown / "d", values, base=shown / "c")
    assert (shown.parent / "store" / "d" / "w" / "out").stat().st_nlink == 2
    assert vs.verify(shown / "d").ok
    assert sorted(os.listdir(shown)) == ["c", "d"]
    assert vs.clean(shown) == []
