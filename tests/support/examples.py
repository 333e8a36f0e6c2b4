"""Running the scripts of tools/examples as a user runs them."""

import os
import subprocess
import sys
from pathlib import Path

__all__ = ["run"]

EXAMPLES = Path(__file__).resolve().parents[2] / "tools" / "examples"


def run(script, directory, before=""):
    """Run a script in a directory, after the code `before`; return what it printed."""
    code = f"{before}\nimport runpy; runpy.run_path({str(EXAMPLES / script)!r}, run_name='__main__')"
    environ = {**os.environ, "PYTHONPATH": str(EXAMPLES.parents[1])}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=directory, env=environ, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout
