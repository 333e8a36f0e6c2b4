"""tools/compare_versions.py finds nothing between a version and itself, and every kind of difference there is."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import xxhash
from support import ROOT

import varstore as vs
from tools import compare_versions

TOOL = ROOT / "tools" / "compare_versions.py"


def test_a_version_is_the_same_as_itself():
    """One input of each kind."""
    done = subprocess.run(
        [sys.executable, TOOL, sys.executable, os.path.relpath(sys.executable), "--inputs", "19"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith(f"{vs.__version__} in ")
    assert "19 inputs" in done.stdout
    assert done.stdout.endswith("all the same\n")


def test_a_version_that_cannot_be_run_is_said():
    done = subprocess.run([sys.executable, TOOL, "/bin/false", sys.executable], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert "/bin/false" in done.stderr


def rewritten(path, change):
    path.chmod(0o644)
    path.write_bytes(change(path.read_bytes()))
    path.chmod(0o444)


def with_body(change):
    def rewrite(data):
        body = change(data[40:])
        return data[:16] + len(body).to_bytes(8, "little") + xxhash.xxh3_128_digest(body) + body

    return rewrite


def unlinked(path):
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(data)
    path.chmod(0o444)


DIFFERENCES = {
    "a byte of out": (lambda root: rewritten(root / "a/out", lambda data: b"\1" + data[1:]), "a/out: from byte 0: 00"),
    "a longer meta": (lambda root: rewritten(root / "a/meta", lambda data: data + b"\n"), "a/meta: 37 bytes | 38"),
    "a mode": (lambda root: (root / "a/out").chmod(0o644), "a/out: mode -r--r--r-- | -rw-r--r--"),
    "the mode of a folder": (lambda root: (root / "a").chmod(0o700), "a: mode drwxr-xr-x | drwx------"),
    "a file more": (lambda root: (root / "extra").write_bytes(b""), "extra: absent | there"),
    "a file less": (lambda root: (root / "snapshot_done").unlink(), "snapshot_done: there | absent"),
    "a folder more": (lambda root: (root / "b").mkdir(), "b: absent | there"),
    "a link that is a copy": (
        lambda root: unlinked(root / "tied/out"),
        "a/out: links ('a/out', 'tied/out') | ('a/out',)",
    ),
    "a link in place of a file": (
        lambda root: ((root / "a/meta").unlink(), (root / "a/meta").symlink_to("../tied/meta")),
        "a/meta: mode -r--r--r-- | lrwxrwxrwx",
    ),
    "an attribute": (
        lambda root: rewritten(root / "manifest", with_body(lambda body: body.replace(b'"step":1', b'"step":2'))),
        """manifest: field 3, attributes: b'{"step":1}' | b'{"step":2}'""",
    ),
    "a variable's name": (
        lambda root: rewritten(root / "manifest", with_body(lambda body: body.replace(b"tied", b"tide", 1))),
        "manifest: field 5, variables: {'name': b'tied'",
    ),
    "a field more": (
        lambda root: rewritten(root / "manifest", with_body(lambda body: body + b"\x38\x01")),
        "manifest: 6 fields | 7",
    ),
    "another format version": (
        lambda root: rewritten(root / "manifest", lambda data: data[:8] + b"\2" + data[9:]),
        "manifest: header",
    ),
    "a wrong digest": (
        lambda root: rewritten(root / "manifest", lambda data: data[:24] + bytes(16) + data[40:]),
        "manifest: the header has another length or digest than its body",
    ),
}


@pytest.mark.parametrize("kind", DIFFERENCES)
def test_every_kind_of_difference_is_found(tmp_path, kind):
    change, expected = DIFFERENCES[kind]
    values = np.zeros(4, np.float32)
    for side in ("first", "second"):
        vs.save(tmp_path / side / "in", {"a": values, "tied": values}, attributes={"step": 1})
    change(tmp_path / "second" / "in")
    first, second = (
        compare_versions.Made(
            version="",
            package="",
            outcomes={"in": []},
            trees={"in": compare_versions.read_tree(tmp_path / side / "in")},
        )
        for side in ("first", "second")
    )
    lines = list(compare_versions.compare(first, second))
    assert any(line.startswith(f"in/{expected}") for line in lines), lines
    assert list(compare_versions.compare(first, first)) == []


def test_writer_and_time_may_differ_and_nothing_else_of_a_manifest(tmp_path):
    values = {"a": np.zeros(4, np.float32)}
    roots = [tmp_path / "first", tmp_path / "second"]
    for root in roots:
        vs.save(root, values)
    rewritten(roots[1] / "manifest", with_body(lambda body: body.replace(b"varstore 0", b"varstore 9", 1)))
    assert len({(root / "manifest").read_bytes() for root in roots}) == 2
    first, second = (
        compare_versions.Made(
            version="", package="", outcomes={"in": []}, trees={"in": compare_versions.read_tree(root)}
        )
        for root in roots
    )
    assert list(compare_versions.compare(first, second)) == []


def test_an_outcome_that_differs_is_found():
    first, second = (
        compare_versions.Made(version="", package="", outcomes={"in": outcomes}, trees={"in": {}})
        for outcomes in (["done", "InvalidName"], ["done", "UsageError", "done"])
    )
    assert list(compare_versions.compare(first, second)) == [
        "in: outcome 1: InvalidName | UsageError",
        "in: outcome 2: absent | done",
    ]
