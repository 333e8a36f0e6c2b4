"""Release a model: convert what training wrote, compare it with the last release, merge a head into it, and ship it.

    python tools/examples/release.py [BYTES]       (default: 32 million)

All is done with the command line, one tensor at a time. What is shipped is read back and compared.
"""

import json
import os
import subprocess
import sys

import numpy as np

import varstore as vs


def train(size: int) -> None:
    """Write what training leaves: the file of the last release, and that of a new one, of about `size` bytes."""
    width = 512
    layers = max(1, size // (4 * width * (4 * width + 1)))
    random = np.random.default_rng(0)
    model = {}
    for layer in range(layers):
        model[f"layers.{layer}.weight"] = random.standard_normal((4 * width, width), np.float32)
        model[f"layers.{layer}.bias"] = np.zeros(width, np.float32)
    model["head.weight"] = np.zeros((10, width), np.float32)
    vs.write("v1.pt", {"model": model, "epoch": 8})
    model["layers.0.weight"] *= 1.01
    vs.write("v2.pt", {"model": model, "epoch": 9})
    vs.save("head", {"head.weight": np.ones((20, width), np.float32)})


def varstore(*arguments: str, status: int = 0) -> str:
    """Run a command and print it as a terminal shows it."""
    print("$ varstore", *arguments)
    done = subprocess.run([sys.executable, "-m", "varstore", *arguments], capture_output=True, text=True)
    print(done.stdout, done.stderr, sep="", end="", flush=True)
    assert done.returncode == status, done.returncode
    return done.stdout


if __name__ == "__main__":
    train(int(sys.argv[1]) if len(sys.argv) > 1 else 32_000_000)

    for name in ("v1", "v2"):
        varstore("convert", f"{name}.pt", name, "--include", "model/*", "--rename", "model/=")
    varstore("verify", "v1", "v2")
    assert "layers.0.weight" in varstore("diff", "--values", "v1", "v2", status=1)

    varstore("merge", "release", "v2", "head", "--last-wins")  # the files are linked, not copied
    assert os.path.samefile("v2/layers.0.weight/out", "release/layers.0.weight/out")

    varstore("convert", "release", "shipped", "--format", "huggingface", "--dtype", "bf16", "--shard-bytes", "10000000")
    with open("shipped/model.safetensors.index.json", encoding="utf-8") as file:
        print(f"{len(set(json.load(file)['weight_map'].values()))} files")
    varstore("diff", "--rtol", "0.01", "release", "shipped")
