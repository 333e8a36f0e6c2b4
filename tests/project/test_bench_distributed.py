"""The bench of distributed checkpoints, in an environment with torch: two processes do all tasks with all peers."""

import subprocess
import sys

import pytest
from support import ROOT

pytest.importorskip("torch", exc_type=ImportError)
sys.path.insert(0, str(ROOT))

from tools.bench.records import Record
from tools.bench.sharded import BARE, SHARDED
from tools.bench.sharding import SHARDING


def test_two_processes_do_all_tasks(tmp_path):
    """A load that gives other values than were saved would be left out."""
    command = [sys.executable, "-m", "tools.bench", "--distributed", "--quick", "--scale", "0.01"]
    command += ["--directory", str(tmp_path), "--json", str(tmp_path / "run.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    record = Record.parse((tmp_path / "run.json").read_text())
    expected = {peer.name for peer in SHARDED if not peer.missing()} | {BARE}
    assert {task: set(row.figures) for task, row in record.rows.items()} == dict.fromkeys(SHARDING, expected), (
        done.stdout
    )
    assert {target["what"] for target in record.targets} >= {"save large, rows / torch DCP", "save shards / torch DCP"}
    assert not list(tmp_path.glob("varstore-bench-*"))
