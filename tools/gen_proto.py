"""Generate varstore/_gen from proto/ with the pinned protoc, or check that it is unchanged (--check)."""

from __future__ import annotations

import argparse
import filecmp
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if the code would differ")
    check = parser.parse_args().check
    sources = sorted((ROOT / "proto").rglob("*.proto"))
    with tempfile.TemporaryDirectory() as scratch:
        target = Path(scratch) if check else ROOT
        command = [sys.executable, "-m", "grpc_tools.protoc", "-I", str(ROOT / "proto")]
        command += [f"--python_out={target}", f"--pyi_out={target}", *map(str, sources)]
        subprocess.run(command, check=True)
        made = sorted(path.relative_to(target) for path in target.glob("varstore/_gen/*_pb2.py*"))
        stale = [str(path) for path in made if check and not _same(target / path, ROOT / path)]
    if stale:
        print(f"generated code differs, run tools/gen_proto.py: {', '.join(stale)}", file=sys.stderr)
    return bool(stale)


def _same(made: Path, kept: Path) -> bool:
    return kept.exists() and filecmp.cmp(made, kept, shallow=False)


if __name__ == "__main__":
    raise SystemExit(main())
