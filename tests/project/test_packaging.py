"""What is distributed: the source distribution holds what the tests need, and the wheel what a user needs."""

from __future__ import annotations

import email
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from support import ROOT

import varstore as vs


def run(*command: str, cwd: Path) -> str:
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, *command], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Return the unpacked source distribution."""
    target = tmp_path_factory.mktemp("sdist")
    run("-m", "hatchling", "build", "-t", "sdist", "-d", str(target), cwd=ROOT)
    (archive,) = target.glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        packed.extractall(target, filter="data")
    return target / f"varstore-{vs.__version__}"


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory):
    """Return the wheel that is built from the source distribution."""
    target = tmp_path_factory.mktemp("wheel")
    run("-m", "hatchling", "build", "-t", "wheel", "-d", str(target), cwd=source)
    (built,) = target.glob("*.whl")
    with zipfile.ZipFile(built) as archive:
        yield archive


def files_below(root: Path) -> set[str]:
    return {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}


def test_the_source_distribution_holds_what_git_holds(source):
    if not (ROOT / ".git").exists():
        pytest.skip("not a clone")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert files_below(source) >= set(filter(None, listed.split("\0")))
    assert "PKG-INFO" in files_below(source)


def test_the_source_distribution_holds_no_rubbish(source):
    top = {path.name for path in source.iterdir()}
    own = {"README.md", "pyproject.toml", "proto", "tests", "tools", "varstore", "PKG-INFO"}
    assert top == own | {".ci", ".github", ".gitignore", ".pre-commit-config.yaml"}
    assert not [path for path in files_below(source) if "__pycache__" in path or path.endswith((".pyc", ".so"))]


def test_the_tests_are_collected_from_the_source_distribution(source):
    where = run("-c", "import varstore; print(varstore.__file__)", cwd=source)
    assert Path(where.strip()).is_relative_to(source)
    run("-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", cwd=source)


def test_the_wheel_holds_the_whole_package_and_nothing_else(source, wheel):
    packaged = {name for name in wheel.namelist() if not name.startswith(f"varstore-{vs.__version__}.dist-info/")}
    assert packaged == {path for path in files_below(source) if path.startswith("varstore/")}
    assert {"varstore/LICENSE", "varstore/CHANGES.md", "varstore/py.typed"} <= packaged


def test_the_wheel_says_what_it_is(wheel):
    home = f"varstore-{vs.__version__}.dist-info"
    facts = email.message_from_bytes(wheel.read(f"{home}/METADATA"))
    assert (facts["Name"], facts["Version"], facts["License-Expression"]) == ("varstore", vs.__version__, "Apache-2.0")
    assert facts["License-File"] == "varstore/LICENSE"
    assert wheel.read(f"{home}/licenses/varstore/LICENSE") == (ROOT / "varstore" / "LICENSE").read_bytes()
    assert "varstore = varstore.cli:main" in wheel.read(f"{home}/entry_points.txt").decode()


def test_the_license_is_the_whole_text():
    text = (ROOT / "varstore" / "LICENSE").read_text()
    assert "Apache License\n                           Version 2.0, January 2004" in text
    assert text.count("\n") == 202
    assert "9. Accepting Warranty" in text
    assert "END OF TERMS AND CONDITIONS" in text


def test_every_version_has_its_changes():
    changes = (ROOT / "varstore" / "CHANGES.md").read_text()
    assert f"\n## {vs.__version__}\n" in changes or "dev" in vs.__version__
