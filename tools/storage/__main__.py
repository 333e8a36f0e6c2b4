"""Use varstore on every file system that this machine can mount, and print what holds: ``python -m tools.storage``.

Exit status: 1 if something does not hold that is not known, 3 if nothing can be mounted.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tools.storage.checks import CHECKS, READ_ONLY, Ground, Skipped
from tools.storage.known import KNOWN
from tools.storage.mounts import FILE_SYSTEMS, Mounted, Unavailable
from tools.storage.tables import promises_table, results_table

_HOLDS, _SKIPPED = "yes", "–"


def main() -> int:
    """Run the checks, and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tools.storage", description=__doc__.splitlines()[0])
    parser.add_argument("patterns", nargs="*", default=["*"], help="names of file systems, with * for any characters")
    parser.add_argument("--checks", default="*", help="names of checks, with * for any characters")
    parser.add_argument("--markdown", action="store_true", help="print the tables of the guide")
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    options = parser.parse_args()
    results: dict[str, dict[str, str] | str] = {}
    for name in FILE_SYSTEMS:
        if any(fnmatch.fnmatch(name, pattern) for pattern in options.patterns):
            begun = time.monotonic()
            results[name] = results_on(name, options.checks)
            print(f"{name}: {time.monotonic() - begun:.0f} s", file=sys.stderr)
    if options.json:
        print(json.dumps(results, indent=2))
    elif options.markdown:
        print(promises_table(), results_table(results), sep="\n\n")
    else:
        Console(width=160).print(*_tables(results), sep="\n")
    told = [found for found in results.values() if not isinstance(found, str)]
    return 3 if not told else int(any(unexpected(name, found) for name, found in results.items()))


def results_on(name: str, pattern: str = "*") -> dict[str, str] | str:
    """Return what each check says on a file system, or why it cannot be mounted."""
    with tempfile.TemporaryDirectory(prefix="varstore-", ignore_cleanup_errors=True) as folder:
        try:
            with FILE_SYSTEMS[name](Path(folder)) as mounted:
                return dict(_results(mounted, pattern))
        except Unavailable as unavailable:
            return str(unavailable)


def unexpected(name: str, found: dict[str, str] | str) -> dict[str, str]:
    """Return the checks that fail and are not known to do so there."""
    if isinstance(found, str):
        return {}
    failed = {check: said for check, said in found.items() if said not in (_HOLDS, _SKIPPED)}
    return {check: said for check, said in failed.items() if check not in KNOWN.get(name, {})}


def _results(mounted: Mounted, pattern: str) -> Iterator[tuple[str, str]]:
    checks = READ_ONLY if mounted.is_read_only else CHECKS
    for number, (name, check) in enumerate(checks.items()):
        if not fnmatch.fnmatch(name, pattern):
            continue
        try:
            ground = mounted.here / f"{number}"
            if not mounted.is_read_only:
                ground.mkdir()
            check(Ground(ground, mounted.there and mounted.there / ground.name))
        except Skipped:
            yield name, _SKIPPED
        except Exception as error:  # what does not hold, whatever it is
            text = str(error).splitlines() or [""]
            yield name, f"{type(error).__name__}: {text[0]}"
        else:
            yield name, _HOLDS


def _tables(results: dict[str, dict[str, str] | str]) -> Iterator[Table]:
    told = {name: found for name, found in results.items() if not isinstance(found, str)}
    table = Table("", *told, title="What holds on which file system")
    for check in CHECKS:
        row = [found.get(check, _SKIPPED) for found in told.values()]
        table.add_row(check, *("no" if said not in (_HOLDS, _SKIPPED) else said for said in row))
    yield table
    reasons = Table("file system", "", "", title="What does not hold", show_lines=True)
    for name, found in results.items():
        if isinstance(found, str):
            reasons.add_row(name, "not mounted", found)
            continue
        for check, said in found.items():
            if said not in (_HOLDS, _SKIPPED):
                reasons.add_row(name, check, f"{said}\n{KNOWN.get(name, {}).get(check, 'not known')}")
    yield reasons


if __name__ == "__main__":
    raise SystemExit(main())
