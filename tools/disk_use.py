"""Measure the disk use of five checkpoints of a fine-tuning run: GPT-2 with LoRA adapters.

    python -m tools.disk_use [--size small] [--directory DIRECTORY]

The model does not change. Its adapters (rank 8 on each attention projection) and Adam's two moments of them change with
every step. Each checkpoint can be restored on its own: `torch.save` writes all of it each time, and varstore links
unchanged variables to the previous checkpoint. If torch is not installed, varstore writes the files of torch. The disk
use is that of all blocks of files and folders, each file counted once, as `du` does.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

import varstore as vs

CHECKPOINTS = 5
RANK = 8
SIZES = {"gpt2": (12, 768, 50_257), "small": (2, 128, 4_000)}
"""Layers, width, words."""

Arrays = dict[str, np.ndarray]
Save = Callable[[Path, Mapping[str, Any], Path | None], None]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="gpt2", help="of the model (default: gpt2, 2.5 GB of files)")
    parser.add_argument("--directory", help="where to write, and remove again (default: the system's temporary one)")
    options = parser.parse_args()
    print(f"| {CHECKPOINTS} checkpoints of {options.size} with LoRA adapters | the first | all |\n|---|---|---|")
    for name, save in writers().items():
        with tempfile.TemporaryDirectory(dir=options.directory) as directory:
            paths = save_all(save, Path(directory), options.size)
            check(paths[-1], options.size)
            print(f"| {name} | {_megabytes(disk_use(paths[:1]))} | {_megabytes(disk_use(paths))} |", flush=True)
    return 0


def writers() -> dict[str, Save]:
    if importlib.util.find_spec("torch"):
        return {"`torch.save`": save_with_torch, "`varstore.save_state`, `base=`": save_with_varstore}
    return {"torch's format": save_for_torch, "`varstore.save_state`, `base=`": save_with_varstore}


def save_with_varstore(path: Path, state: Mapping[str, Any], before: Path | None) -> None:
    vs.save_state(path, state, base=before)


def save_for_torch(path: Path, state: Mapping[str, Any], _: Path | None) -> None:
    vs.write(path, state, format="torch")


def save_with_torch(path: Path, state: Mapping[str, Any], _: Path | None) -> None:
    import torch

    tensors = {
        part: {name: torch.from_numpy(array) for name, array in arrays.items()} if isinstance(arrays, dict) else arrays
        for part, arrays in state.items()
    }
    torch.save(tensors, path)


def save_all(save: Save, directory: Path, size: str) -> list[Path]:
    """Save every step's state, and return the paths in order."""
    paths: list[Path] = []
    for step, state in enumerate(training(size)):
        path = directory / f"step_{step}"
        save(path, state, paths[-1] if paths else None)
        paths.append(path)
    return paths


def training(size: str) -> Iterator[dict[str, Any]]:
    """Yield the state of each step: a frozen model, and what is trained beside it."""
    layers, width, words = SIZES[size]
    model = _random(np.random.default_rng(0), _model_shapes(layers, width, words))
    adapters = _adapter_shapes(layers, width)
    for step in range(CHECKPOINTS):
        rng = np.random.default_rng(step + 1)
        yield {"model": model, "step": step} | {
            part: _random(rng, adapters) for part in ("adapters", "exp_avg", "exp_avg_sq")
        }


def check(path: Path, size: str) -> None:
    """Restore the last checkpoint and compare it with what was saved."""
    *_, expected = training(size)
    opened: Any = None if path.is_dir() else vs.read(path)
    found = vs.load_state(path) if opened is None else opened.state()
    assert found.keys() == expected.keys()
    for part, arrays in expected.items():
        if isinstance(arrays, dict):
            assert all(np.array_equal(found[part][name], array) for name, array in arrays.items()), f"{path}: {part}"


def disk_use(paths: Iterable[Path]) -> int:
    """Return the bytes of all blocks that these files and folders occupy, a file with several names once."""
    below = (Path(folder, name) for path in paths for folder, _, names in os.walk(path) for name in ("", *names))
    found = {(status.st_dev, status.st_ino): status.st_blocks for status in map(os.lstat, (*paths, *below))}
    return 512 * sum(found.values())


def _model_shapes(layers: int, width: int, words: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"wte.weight": (words, width), "wpe.weight": (1024, width)}
    for layer in range(layers):
        for name, rows, columns in (
            ("attn.c_attn", 1, 3),
            ("attn.c_proj", 1, 1),
            ("mlp.c_fc", 1, 4),
            ("mlp.c_proj", 4, 1),
        ):
            shapes[f"h.{layer}.{name}.weight"] = (rows * width, columns * width)
            shapes[f"h.{layer}.{name}.bias"] = (columns * width,)
        shapes |= {f"h.{layer}.{norm}.{part}": (width,) for norm in ("ln_1", "ln_2") for part in ("weight", "bias")}
    return shapes | {"ln_f.weight": (width,), "ln_f.bias": (width,)}


def _adapter_shapes(layers: int, width: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in range(layers):
        shapes[f"h.{layer}.attn.c_attn.lora_A.weight"] = (RANK, width)
        shapes[f"h.{layer}.attn.c_attn.lora_B.weight"] = (3 * width, RANK)
    return shapes


def _random(rng: np.random.Generator, shapes: Mapping[str, tuple[int, ...]]) -> Arrays:
    return {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.0f} MB" if count >= 1e7 else f"{count / 1e6:,.1f} MB"


if __name__ == "__main__":
    raise SystemExit(main())
