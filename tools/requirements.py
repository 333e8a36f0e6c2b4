"""Print what varstore needs to run, one requirement per line, for an environment that does not hold varstore itself.

python tools/requirements.py [--lowest] [EXTRA ...]

With --lowest, each package is pinned to the lowest version that pyproject.toml allows.
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1] / "pyproject.toml"


def requirements(extras: list[str]) -> list[str]:
    """Return the dependencies of the project and of some of its extras."""
    project = tomllib.loads(PROJECT.read_text())["project"]
    return [*project["dependencies"], *(line for extra in extras for line in project["optional-dependencies"][extra])]


def lowest(requirement: str) -> str:
    """Return the requirement with its lower bound as the only version."""
    return re.sub(r">=([^,]+).*", r"==\1", requirement)


if __name__ == "__main__":
    arguments = sys.argv[1:]
    wanted = requirements([argument for argument in arguments if argument != "--lowest"])
    print("\n".join(map(lowest, wanted) if "--lowest" in arguments else wanted))
