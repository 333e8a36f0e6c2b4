"""jax in several processes: each reads and writes its own shards, and the checkpoint is an ordinary one."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=4")

import numpy as np
import pytest

jax = pytest.importorskip("jax")

import jax.numpy as jnp  # noqa: E402
from jax.sharding import Mesh, NamedSharding, PartitionSpec  # noqa: E402

import varstore as vs  # noqa: E402
from varstore.adapters import jax as vj  # noqa: E402
from varstore.errors import DigestMismatch, UsageError, VariableMismatch  # noqa: E402

MESHES = {"4x1": (4, 1), "2x2": (2, 2), "1x4": (1, 4)}


@jax.tree_util.register_dataclass
@dataclass
class Layer:
    kernel: Any
    bias: Any


def place(mesh: str, *spec: Any) -> Any:
    return NamedSharding(Mesh(np.array(jax.devices()[:4]).reshape(MESHES[mesh]), ("r", "c")), PartitionSpec(*spec))


def saved(path: Path) -> dict[str, np.ndarray]:
    """Save a state of each kind of leaf, and return its arrays."""
    kernel, bias = np.arange(8 * 12, dtype="f4").reshape(8, 12), np.arange(4, dtype="f4")
    state = {
        "params": {"layers": [Layer(jnp.asarray(kernel), jnp.asarray(bias, jnp.bfloat16))], "scale": jnp.float32(2)},
        "host": np.arange(8, dtype="i4"),
        "rng": jax.random.split(jax.random.key(3), 4),
        "losses": [0.5] * 2000,
        "name": "run",
        "step": 7,
    }
    vj.save(path, state)
    return {"kernel": kernel, "bias": bias, "host": state["host"], "rng": jax.random.key_data(state["rng"])}


@pytest.mark.parametrize("mesh", MESHES)
def test_shardings_by_structure_by_name_and_with_shapes(tmp_path: Path, mesh: str) -> None:
    arrays = saved(tmp_path / "c")
    both, rows, none = place(mesh, "r", "c"), place(mesh, "r"), place(mesh)
    by_structure = {"params": {"layers": [Layer(both, rows)], "scale": none}, "host": rows, "rng": rows, "step": 0}
    by_name = {"params/layers/0/kernel": both, "params/layers/0/bias": rows, "step": none}
    shapes = {"params": {"layers": [Layer(jnp.zeros((8, 12)), jnp.zeros(4, jnp.bfloat16))]}, "step": 0}
    parts = {"params": {"layers": [Layer(both, rows)]}, "step": none}
    some: Any = {"strict": False}
    whole = vj.load_sharded(tmp_path / "c", by_structure, **some)
    named = vj.load_sharded(tmp_path / "c", by_name, **some)
    shaped = vj.load_sharded(tmp_path / "c", parts, like=shapes, **some)
    assert type(whole["params"]["layers"][0]) is Layer
    assert (whole["step"], int(named["step"]), named["step"].sharding, shaped["step"]) == (7, 7, none, 7)
    layers = whole["params"]["layers"][0], shaped["params"]["layers"][0]
    for kernel in (*(layer.kernel for layer in layers), named["params/layers/0/kernel"]):
        assert (kernel.sharding, kernel.dtype) == (both, jnp.float32)
        assert np.array_equal(kernel, arrays["kernel"])
    for bias in (*(layer.bias for layer in layers), named["params/layers/0/bias"]):
        assert (bias.sharding, bias.dtype) == (rows, jnp.bfloat16)
        assert np.array_equal(bias.astype("f4"), arrays["bias"])
    assert whole["rng"].sharding == rows
    assert np.array_equal(jax.random.key_data(whole["rng"]), arrays["rng"])
    assert np.array_equal(whole["host"], arrays["host"])


def test_one_sharding_for_all_arrays(tmp_path: Path) -> None:
    arrays = saved(tmp_path / "c")
    vs.write(tmp_path / "c.safetensors", {"a/b": arrays["kernel"]})
    everywhere = place("2x2")
    state = vj.load_sharded(tmp_path / "c", everywhere, exclude="params/scale", rename={"host": "moved"})
    assert (state["step"], state["name"], len(state["losses"])) == (7, "run", 2000)
    assert "scale" not in state["params"]
    kernel = state["params"]["layers"][0]["kernel"]
    assert np.array_equal(kernel, arrays["kernel"])
    assert np.array_equal(jax.random.key_data(state["rng"]), arrays["rng"])
    opened = vj.load_sharded(tmp_path / "c.safetensors", place("2x2", "r", "c"))["a/b"]
    assert np.array_equal(opened, arrays["kernel"])
    assert all(
        array.sharding.is_equivalent_to(everywhere, array.ndim) for array in (kernel, state["moved"], state["rng"])
    )
    assert vj.load_sharded(tmp_path / "c", everywhere, like={"step": jnp.int32(0)}, include="step") == {"step": 7}


def test_what_a_sharding_cannot_be_for(tmp_path: Path) -> None:
    vj.save(tmp_path / "c", {"w": jnp.ones((7, 64)), "wide": np.ones(4), "name": "run", "step": 7})
    rows, none = place("2x2", "r"), place("2x2")
    refused = [
        (rows, UsageError, r"variable 'w': the variable cannot have this sharding.*\(7, 64\).*'r': 2.*P\('r'"),
        ({"w": rows}, UsageError, r"variable 'w'.*shape \(7, 64\), NamedSharding"),
        ({"step": rows}, UsageError, r"variable 'step'.*shape \(\), NamedSharding"),
        ({"wide": rows}, UsageError, r"variable 'wide': jax would convert.*jax_enable_x64"),
        ({"name": none}, UsageError, "variable 'name': a sharding is for an array.*str"),
        ({"w": PartitionSpec("r")}, UsageError, r"shardings.*NamedSharding\(mesh, spec\)"),
        ({"v": none, "step": none}, VariableMismatch, "1 missing"),
        (None, UsageError, "neither shardings nor a pytree"),
    ]
    for shardings, error, message in refused:
        exact = isinstance(shardings, dict) and "v" in shardings
        with pytest.raises(error, match=message):
            vj.load_sharded(tmp_path / "c", shardings, missing=[] if exact else None, strict=False)
    with pytest.raises(UsageError, match="another structure"):
        vj.load_sharded(tmp_path / "c", {"v": none}, like={"w": jnp.ones((7, 64))})
    with pytest.raises(UsageError, match="variable 'v': a sharding has no value to keep"):
        vj.load_sharded(tmp_path / "c", {"v": none, "step": none}, strict=False, missing="v")


def test_a_part_with_a_report(tmp_path: Path) -> None:
    arrays = saved(tmp_path / "c")
    both = place("2x2", "r", "c")
    like = {"kernel": both, "head": jnp.zeros(3)}
    chosen: Any = {"include": "params/layers/0/kernel", "rename": {"params/layers/0/": ""}, "missing": "head"}
    state, report = vj.load_into(like, tmp_path / "c", **chosen)
    assert (report.loaded, report.missing) == (("kernel",), ("head",))
    assert state["kernel"].sharding == both
    assert np.array_equal(state["kernel"], arrays["kernel"])
    assert np.array_equal(vj.load_sharded(tmp_path / "c", like, **chosen)["kernel"], arrays["kernel"])


def test_a_damaged_array_is_not_loaded(tmp_path: Path) -> None:
    saved(tmp_path / "c")
    with open(tmp_path / "c/params/layers/0/kernel/out", "r+b") as out:
        out.write(b"x")
    with pytest.raises(DigestMismatch, match="params/layers/0/kernel"):
        vj.load_sharded(tmp_path / "c", place("2x2"))


# --- several processes -----------------------------------------------------------------------------------------------

ONE = """
import os, sys
import jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import varstore as vs
from varstore.adapters import jax as vj

address, process = sys.argv[1], int(sys.argv[2])
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(address, 2, process)
MESHES = {"4x1": (4, 1), "2x2": (2, 2), "1x4": (1, 4)}
place = lambda mesh, *spec: NamedSharding(
    Mesh(np.array(jax.devices()).reshape(MESHES[mesh]), ("r", "c")), PartitionSpec(*spec)
)

def same(array, expected):
    assert not array.is_fully_addressable
    for shard in array.addressable_shards:
        assert np.array_equal(np.asarray(shard.data), expected[shard.index]), (array.sharding, shard.index)

"""


def run_two(folder: Path, script: str) -> list[tuple[int, str]]:
    """Run a script in two processes of one program, of two devices each; return the exit status and output of each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    env["PYTHONPATH"] = os.pathsep.join([str(Path(vs.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    started = [
        subprocess.Popen(
            [sys.executable, "-c", ONE + script, address, str(process)],
            cwd=folder,
            env=env,
            stdout=subprocess.PIPE,
            text=True,
        )
        for process in range(2)
    ]
    printed = [process.communicate(timeout=120)[0] for process in started]
    return [(process.returncode, text) for process, text in zip(started, printed, strict=True)]


LOADING = """
def read_bytes():
    return int(open("/proc/self/io").read().split()[1])

expected = vs.load("c")
for mesh in MESHES:
    for spec in (("r", "c"), ("r",), (None, "c"), (("r", "c"),)):
        shardings = {"w": place(mesh, *spec), "small": place(mesh, "r"), "step": place(mesh)}
        for path in ("c", "c.safetensors"):
            arrays = vj.load_sharded(path, shardings)
            for name, array in arrays.items():
                assert array.sharding == shardings[name]
                same(array, expected[name])
same(vj.load_sharded("c", place("2x2"))["w"], expected["w"])

large = np.memmap("large/w/out", np.float32, "r", shape=(1024, 16384))
for sharding in (place("2x2", "r"), place("1x4", None, "c")):
    before = read_bytes()
    array = vj.load_sharded("large", {"w": sharding}, include="w")["w"]
    print("read", read_bytes() - before)
    same(array, large)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts what a process reads by /proc")
def test_each_process_reads_its_own_parts(tmp_path: Path) -> None:
    arrays = {"w": np.arange(8 * 12, dtype="f4").reshape(8, 12), "small": np.arange(4, dtype="i2"), "step": np.int32(7)}
    vs.save(tmp_path / "c", arrays)
    vs.write(tmp_path / "c.safetensors", arrays)
    large = np.arange(1 << 24, dtype="f4").reshape(1024, 16384)
    vs.save(tmp_path / "large", {"w": large, "unread": large})
    outcomes = run_two(tmp_path, LOADING)
    assert [status for status, _ in outcomes] == [0, 0]
    for _, printed in outcomes:
        read = [int(line.split()[1]) for line in printed.splitlines() if line.startswith("read")]
        assert all(large.nbytes // 2 <= count < large.nbytes // 2 + (1 << 20) for count in read), read
