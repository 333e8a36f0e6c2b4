"""tools/disk_use.py measures what it says: files with several names once, and checkpoints that can be restored."""

from __future__ import annotations

import os
import re
import shutil
import sys

import varstore as vs
from tools import disk_use


def test_a_file_with_two_names_counts_once(tmp_path):
    (tmp_path / "a").mkdir()
    folder = disk_use.disk_use([tmp_path / "a"])
    (tmp_path / "a/file").write_bytes(os.urandom(1 << 20))
    alone = disk_use.disk_use([tmp_path / "a"])
    assert 1 << 20 <= alone - folder < 1.1 * (1 << 20)
    os.link(tmp_path / "a/file", tmp_path / "a/again")
    assert disk_use.disk_use([tmp_path / "a"]) == alone
    assert disk_use.disk_use([tmp_path / "a", tmp_path / "a/file"]) == alone


def test_five_checkpoints_take_little_more_than_one(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["disk_use", "--size", "small", "--directory", str(tmp_path)])
    assert disk_use.main() == 0
    rows = re.findall(r"^\| (.*) \| ([\d.,]+) MB \| ([\d.,]+) MB \|$", capsys.readouterr().out, re.MULTILINE)
    (peer, ours) = [(float(first), float(every)) for _, first, every in rows]
    assert abs(peer[1] - 5 * peer[0]) < 1
    assert ours[0] < 1.2 * peer[0]
    assert ours[1] < 1.5 * ours[0]
    assert not list(tmp_path.iterdir())


def test_each_checkpoint_stands_alone(tmp_path):
    *before, last = disk_use.save_all(disk_use.save_with_varstore, tmp_path, "small")
    changed = vs.diff(before[-1], last).changed
    assert {name.partition("/")[0] for name in changed} == {"adapters", "exp_avg", "exp_avg_sq"}
    for path in before:
        assert vs.verify(path).ok
        shutil.rmtree(path)
    disk_use.check(last, "small")
