"""Read every file of a hostile corpus with its reader, within limits: ``read_hostile.py FOLDER error|opaque``.

Prints a line of JSON for each file: the error's classes, its message and the seconds of processor time that it took;
the unknown names in it, and whether an `Opaque` is a leaf of it; and what was imported or opened besides the file.
"""

from __future__ import annotations

import codecs
import importlib
import json
import resource
import sys
import time
import warnings
from pathlib import Path
from typing import Any

from varstore.errors import VarstoreError
from varstore.values.nodes import leaves
from varstore.values.opaque import Opaque

MEMORY = 1 << 30
"""Bytes of address space beyond what the imports took."""


def attempt(reader: str, path: Path, mode: Any) -> dict[str, Any]:
    """Read a file whole; return the names of the error's classes and its message, and what was not known."""
    module = importlib.import_module(f"varstore.formats.{reader}")
    try:
        opened = module.read(path, unknown=mode)
        opened.state()
        is_opaque = any(isinstance(leaf, Opaque) for _, leaf in leaves(opened.tree))
        return {"kinds": [], "message": "", "unknown": opened.unknown, "is_opaque": is_opaque}
    except VarstoreError as error:
        return {"kinds": [kind.__name__ for kind in type(error).__mro__], "message": str(error)}
    except BaseException as error:
        return {"kinds": [f"FOREIGN {type(error).__name__}"], "message": str(error)}


def main(folder: Path, mode: str) -> None:
    """Read all files."""
    warnings.simplefilter("error")
    index = json.loads((folder / "index.json").read_text())
    for entry in index:
        importlib.import_module(f"varstore.formats.{entry['reader']}")
    for encoding in ("unicode-escape", "cp437"):  # which Python imports at their first use
        codecs.lookup(encoding)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY,) * 2)
    seen: list[str] = []

    def note(event: str, arguments: tuple[Any, ...]) -> None:
        if event in ("open", "import", "exec", "compile", "os.system", "subprocess.Popen"):
            seen.append(f"{event} {arguments[0]}")

    sys.addaudithook(note)
    for entry in index:
        path, modules = folder / entry["file"], set(sys.modules)
        seen.clear()
        start = time.process_time()
        outcome = attempt(entry["reader"], path, mode)
        seconds = time.process_time() - start
        touched = [event for event in seen if event != f"open {path}"] + sorted(set(sys.modules) - modules)
        sys.stdout.write(json.dumps({**entry, **outcome, "seconds": seconds, "touched": touched}) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
