"""Processes of torch.distributed for tests: one interpreter imports torch, and forks a process per rank.

A script defines functions of cases, and calls `main` with them. Every rank does all of them, in order. A test calls
`run_ranks` once for a script, and looks at what each case came to.
"""

from __future__ import annotations

import datetime
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NoReturn

__all__ = ["end_here", "main", "run_ranks"]

SECONDS = 60
"""How long a rank waits for the others."""


def run_ranks(script: Path, size: int, folder: Path) -> dict[str, str]:
    """Run a script on this many ranks in a folder; return the error of each case that was begun, "" for none.

    A case that fails on a rank is the last one of that rank.
    """
    command = [sys.executable, str(script), str(size), str(folder)]
    root = Path(__file__).parents[2]
    path = os.pathsep.join([str(root), str(root / "tests"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=5 * SECONDS, cwd=folder, env=os.environ | {"PYTHONPATH": path}
    )
    results: dict[str, str] = {}
    for rank in range(size):
        file = folder / f"rank-{rank}.json"
        for case, error in json.loads(file.read_text() if file.exists() else "{}").items():
            results[case] = results.get(case, "") + (f"on rank {rank}: {error}" if error else "")
    assert results, done.stdout + done.stderr
    return results


def main(cases: Mapping[str, Callable[[Path], object]]) -> None:
    """Fork a process per rank that does the cases; the default group is gloo's, of all ranks."""
    size, folder = int(sys.argv[1]), Path(sys.argv[2])
    children = []
    for rank in range(size):
        child = os.fork()
        if not child:
            _be_rank(rank, size, folder, cases)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)


def _be_rank(rank: int, size: int, folder: Path, cases: Mapping[str, Callable[[Path], object]]) -> None:
    results: dict[str, str] = {}
    name = "start"

    def tell(error: str = "") -> None:
        results[name] = error
        (folder / f"rank-{rank}.json").write_text(json.dumps(results))

    try:
        import torch

        torch.set_num_threads(1)
        torch.distributed.init_process_group(
            "gloo",
            init_method=f"file://{folder}/rendezvous",
            rank=rank,
            world_size=size,
            timeout=datetime.timedelta(seconds=SECONDS),
        )
        for name, case in cases.items():  # noqa: B007
            tell()  # it may end this process, as it should
            case(folder)
    except BaseException:
        tell(traceback.format_exc())
    finally:
        os._exit(0)


def end_here() -> NoReturn:
    """End this rank at once, as a signal does; for it, the case went well."""
    os._exit(0)
