"""Read every file of a hostile corpus with its reader, within limits: ``read_hostile.py FOLDER``.

Prints a line of JSON for each file: the error's classes, its message and the seconds of processor time that it took.
"""

from __future__ import annotations

import importlib
import json
import resource
import sys
import time
import warnings
from pathlib import Path

from varstore.errors import VarstoreError

MEMORY = 1 << 30
"""Bytes of address space beyond what the imports took."""


def attempt(reader: str, path: Path) -> tuple[list[str], str]:
    """Read a file whole; return the names of the error's classes and its message."""
    module = importlib.import_module(f"varstore.formats.{reader}")
    try:
        module.read(path).state()
    except VarstoreError as error:
        return [kind.__name__ for kind in type(error).__mro__], str(error)
    except BaseException as error:
        return [f"FOREIGN {type(error).__name__}"], str(error)
    return [], ""


def main(folder: Path) -> None:
    """Read all files."""
    warnings.simplefilter("error")
    index = json.loads((folder / "index.json").read_text())
    for entry in index:
        importlib.import_module(f"varstore.formats.{entry['reader']}")
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY,) * 2)
    for entry in index:
        start = time.process_time()
        kinds, message = attempt(entry["reader"], folder / entry["file"])
        seconds = time.process_time() - start
        sys.stdout.write(json.dumps({**entry, "kinds": kinds, "message": message, "seconds": seconds}) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
