"""jax in several processes: each reads and writes its own shards, and the checkpoint is an ordinary one."""

from __future__ import annotations

import contextlib
import os
import random
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
jax.distributed.initialize(address, 2, process, initialization_timeout=60)
MESHES = {"4x1": (4, 1), "2x2": (2, 2), "1x4": (1, 4)}
place = lambda mesh, *spec: NamedSharding(
    Mesh(np.array(jax.devices()).reshape(MESHES[mesh]), ("r", "c")), PartitionSpec(*spec)
)
spread = lambda values, sharding: jax.make_array_from_callback(
    values.shape, sharding, lambda index: values[index], dtype=values.dtype
)

def same(array, expected):
    assert not array.is_fully_addressable
    for shard in array.addressable_shards:
        assert np.array_equal(np.asarray(shard.data), expected[shard.index]), (array.sharding, shard.index)

"""


def run_two(folder: Path, script: str, *arguments: str) -> list[tuple[int, str]]:
    """Run a script in two processes of one program, of two devices each; return the exit status and output of each."""
    address = f"127.0.0.1:{free_port()}"
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    env["PYTHONPATH"] = os.pathsep.join([str(Path(vs.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    started = [
        subprocess.Popen(
            [sys.executable, "-c", ONE + script, address, str(process), *arguments],
            cwd=folder,
            env=env,
            stdout=subprocess.PIPE,
            text=True,
        )
        for process in range(2)
    ]
    try:
        printed = [process.communicate(timeout=240)[0] for process in started]
    finally:
        for process in started:
            process.kill()
            process.communicate()
    return [(process.returncode, text) for process, text in zip(started, printed, strict=True)]


def free_port() -> int:
    """Return a port that is free, and that the system does not give to connections in the meantime."""
    while True:
        with socket.socket() as free, contextlib.suppress(OSError):
            free.bind(("127.0.0.1", random.randrange(20000, 32000)))
            return int(free.getsockname()[1])


LOADING = """
def read_bytes():
    return int(open("/proc/self/io").read().split()[1])

expected = vs.load("c")
for mesh in MESHES:
    for spec in (("r", "c"), (None, "c"), (("r", "c"),)):
        shardings = {"w": place(mesh, *spec), "small": place(mesh, "r"), "step": place(mesh)}
        for path in ("c", "c.safetensors"):
            arrays = vj.load_sharded(path, shardings)
            for name, array in arrays.items():
                assert array.sharding == shardings[name]
                same(array, expected[name])
same(vj.load_sharded("c", place("2x2"))["w"], expected["w"])
for spec in ((), ("d",)):
    elsewhere = NamedSharding(Mesh(np.array(jax.devices()[2:]), ("d",)), PartitionSpec(*spec))
    array = vj.load_sharded("c", {"w": elsewhere}, include="w")["w"]
    assert len(array.addressable_shards) == 2 * process and array.sharding == elsewhere
    assert all(np.array_equal(shard.data, expected["w"][shard.index]) for shard in array.addressable_shards)

large = np.memmap("large/w/out", np.float32, "r", shape=(1024, 16384))
for sharding in (place("2x2", "r"), place("1x4", None, "c")):
    before = read_bytes()
    array = vj.load_sharded("large", {"w": sharding}, include="w")["w"]
    print("read", read_bytes() - before)
    same(array, large)
try:
    vj.load_sharded("damaged", place("4x1", "r"))
    print("whole")
except vs.errors.DigestMismatch as error:
    print(error)

import time
from varstore.disk.read.content import Content

fingerprint, replaced = Content.fingerprint, []

def then_replaced(content):
    seen = fingerprint(content)
    if not replaced:
        replaced.append(vs.save("new", {"w": expected["w"] + 1}, overwrite=True))
        open("is-new", "w").close()
    return seen

if process == 0:
    Content.fingerprint = then_replaced
while process and not os.path.exists("is-new"):
    time.sleep(0.05)
same(vj.load_sharded("new", place("2x2", "r"))["w"], expected["w"] + 1)
vs.save(f"differs-{process}", {"w": expected["w"] + process})
try:
    vj.load_sharded(f"differs-{process}", place("2x2", "r"))
except vs.errors.VariableMismatch as error:
    print(error)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts what a process reads by /proc")
def test_each_process_reads_its_own_parts(tmp_path: Path) -> None:
    arrays = {"w": np.arange(8 * 12, dtype="f4").reshape(8, 12), "small": np.arange(4, dtype="i2"), "step": np.int32(7)}
    vs.save(tmp_path / "c", arrays)
    vs.save(tmp_path / "new", arrays)
    vs.write(tmp_path / "c.safetensors", arrays)
    large = np.arange(1 << 24, dtype="f4").reshape(1024, 16384)
    vs.save(tmp_path / "large", {"w": large, "unread": large})
    vs.save(tmp_path / "damaged", {"w": large[:512]})
    os.chmod(tmp_path / "damaged/w/out", 0o600)
    with open(tmp_path / "damaged/w/out", "r+b") as out:
        out.seek((1 << 24) + 100)
        out.write(b"rot")
    outcomes = run_two(tmp_path, LOADING)
    assert [status for status, _ in outcomes] == [0, 0]
    for _, printed in outcomes:
        read = [int(line.split()[1]) for line in printed.splitlines() if line.startswith("read")]
        assert all(large.nbytes // 2 <= count < large.nbytes // 2 + (1 << 20) for count in read), read
        assert "variable 'w': bytes 16777216 to 33554432" in printed
        assert "the processes do not see the same checkpoint" in printed
    assert "in process 1 of 2" in outcomes[0][1]


SAVING = """
import time
import jax.numpy as jnp
import ml_dtypes
from varstore.disk.save import together

whole = spread(np.arange(6, dtype=np.float32), place("2x2"))
part = spread(np.arange(4, dtype=np.int16), place("4x1", "r"))
assert not whole.is_fully_addressable
for save in (vs.save, vj.save):
    save(f"own-{process}/{save.__module__}", {"w": whole})
    assert vs.load(f"own-{process}/{save.__module__}")["w"].tolist() == [0, 1, 2, 3, 4, 5]
for save in (vs.save, vs.save_state, vj.save):
    try:
        save(f"own-{process}/part", {"w": part})
    except vs.errors.UnsupportedDtype as error:
        print(error)
try:
    vs.save(f"own-{process}/{vs.save.__module__}", {"w": whole})
except vs.errors.CheckpointExists as error:
    print(error)
together._APPEARS = 0.5

w, half = np.arange(96, dtype=np.float32).reshape(8, 12), np.arange(12).astype(ml_dtypes.bfloat16)
keys = jax.random.split(jax.random.key(3), 4)
for mesh in MESHES:
    both, rows, columns, none = place(mesh, "r", "c"), place(mesh, "r"), place(mesh, None, "c"), place(mesh)
    tied = spread(w, both)
    state = {
        "params": {"both": tied, "tied": tied, "columns": spread(w, columns), "half": spread(half, place(mesh, "c"))},
        "scalar": spread(np.array(2.5, np.float32), none),
        "empty": spread(np.zeros((0, 4), np.int16), none),
        "replicated": spread(w, none),
        "rng": spread(keys, rows),
        "host": np.arange(3) + 10 * process,
        "local": jnp.ones(3) * process,
        "step": 7 + process,
    }
    saved = vj.save_sharded(f"c-{mesh}", state, attributes={"mesh": mesh})
    assert saved.attributes == {"mesh": mesh} and saved["params/tied"].tied_to == "params/both"
for source in MESHES:
    for mesh in MESHES:
        shardings = {
            "params": {name: place(mesh, "r", "c") for name in ("both", "tied", "columns")},
            "scalar": place(mesh),
            "replicated": place(mesh, None, ("r", "c")),
            "rng": place(mesh, "c"),
            "step": 0,
        }
        back = vj.load_sharded(f"c-{source}", shardings, exclude=["params/half", "host", "local", "empty"])
        for array in (*back["params"].values(), back["replicated"]):
            same(array, w)
        same(back["scalar"], np.array(2.5, np.float32))
        assert back["step"] == 7
        for shard in back["rng"].addressable_shards:
            expected = np.asarray(jax.random.key_data(keys))[shard.index]
            assert np.array_equal(jax.random.key_data(shard.data), expected)

def refused(tree, path="c-2x2", **options):
    try:
        vj.save_sharded(path, tree, **options)
        print("saved")
    except vs.VarstoreError as error:
        print(type(error).__name__, str(error).replace(chr(10), " "))

def full(*arguments):
    raise OSError(28, "No space left on device")

tree = {"w": spread(w, place("2x2", "r", "c"))}
refused(tree)
refused(tree if process == 0 else {"v": tree["w"]}, overwrite=True)
refused(tree if process == 0 else {"w": tree["w"], "f": full}, overwrite=True)
from varstore.disk.save.shared_file import SharedFile
SharedFile.write, write = full if process else SharedFile.write, SharedFile.write
refused(tree, overwrite=True)
SharedFile.write = write
refused(tree, path=f"own-{process}/c")
while process and not os.path.exists("own-0/is-late"):
    time.sleep(0.05)
refused(tree, path="after", timeout=1)
open(f"own-{process}/is-late", "w").close()
refused(tree, path="after")
if process:
    os.chmod("after/w/out", 0o600)
    with open("after/w/out", "r+b") as out:
        out.seek(5 * 48)
        out.write(b"rot")
try:
    vj.load_sharded("after", place("4x1", "r"))
except vs.errors.DigestMismatch as error:
    print(type(error).__name__, str(error).replace(chr(10), " "))
"""


def test_a_checkpoint_of_several_processes_loads_on_every_mesh(tmp_path: Path) -> None:
    outcomes = run_two(tmp_path, SAVING)
    assert [status for status, _ in outcomes] == [0, 0], outcomes
    alone = "variable 'w': an array that is spread over processes cannot be saved. Save it with varstore.adapters.jax."
    messages = [
        *[alone] * 3,
        "own-",
        "CheckpointExists c-2x2",
        "VariableMismatch c-2x2: variable 'w': process 1 does not have the same arrays as process 0: "
        "found none that is sharded over processes, expected shape (8, 12), float32",
        "UsageError state['f']: function cannot be saved",
        "OutOfSpace c-2x2: the disk became full",
        "StorageError own-1/c: this process does not see the folder",
        "StorageError a process does not take part in the save: found no sign of life from process 1 of 2",
        "saved",
    ]
    for process, (_, printed) in enumerate(outcomes):
        *lines, last = printed.splitlines()
        assert last.startswith("DigestMismatch after/w/out: variable 'w': region [4:8, 0:6]")
        assert "rank 0 only, or with varstore.adapters.jax.save_sharded in all of them together" in lines[3]
        assert "rank 0 only" not in lines[4]
        assert len(lines) == len(messages), printed
        for number, (line, message) in enumerate(zip(lines, messages, strict=True)):
            assert line.startswith(message), line
            assert ("in process 1 of 2" in line) == (process == 0 and number in (6, 7, 8)), line
            assert ("in process 0 of 2" in line) == (process == 1 and number in (4, 5, 9)), line
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "after", "c-1x4", "c-2x2", "c-4x1", "own-0", "own-1"
    ]  # fmt: skip
    assert [len([*(tmp_path / f"own-{process}").iterdir()]) for process in range(2)] == [3, 3]
    w, keys = np.arange(96, dtype="f4").reshape(8, 12), jax.random.split(jax.random.key(3), 4)
    for mesh in MESHES:
        path = tmp_path / f"c-{mesh}"
        assert vs.verify(path).ok
        plain, state = vs.load(path), vs.load_state(path)
        for name in ("params/both", "params/tied", "params/columns", "replicated"):
            assert np.array_equal(plain[name], w)
        assert (state["step"], state["host"].tolist(), state["empty"].shape) == (7, [0, 1, 2], (0, 4))
        assert np.array_equal(state["params"]["half"].astype("f4"), np.arange(12))
        assert state["params"]["half"].dtype == jnp.bfloat16
        for other in MESHES:
            like = {"params": {"both": place(other, "r", "c")}, "rng": place(other, "c")}
            back = vj.load(path, like, include=["params/both", "rng"])
            assert np.array_equal(back["params"]["both"], w)
            assert np.array_equal(jax.random.key_data(back["rng"]), jax.random.key_data(keys))
    vj.save(tmp_path / "single", vj.load(tmp_path / "c-2x2"))
    differing = vs.diff(tmp_path / "single", tmp_path / "c-2x2")
    assert not differing.changed, differing


DYING = """
import signal
from varstore.adapters.jax import processes
from varstore.disk.save import shared_file, together

processes._SILENCE = 2
victim, moment = int(sys.argv[3]), sys.argv[4]
w = np.arange(96, dtype=np.float32).reshape(8, 12)
tree = {"a": spread(w, place("2x2", "r", "c")), "b": spread(w, place("1x4", None, "c"))}
vj.save_sharded("c", {"a": tree["a"]})

def die(*arguments, **options):
    os.kill(os.getpid(), signal.SIGKILL)

if process == victim:
    owner, name = {
        "writing": (shared_file.SharedFile, "finish"),
        "committing": (together.Coordinator, "_complete"),
    }[moment]
    setattr(owner, name, die)
try:
    vj.save_sharded("c", tree, overwrite=True)
except vs.errors.StorageError as error:
    print(error, flush=True)
    os._exit(3)
"""


@pytest.mark.parametrize(("victim", "moment"), [(1, "writing"), (0, "committing")])
def test_a_process_that_is_killed_leaves_the_old_checkpoint(tmp_path: Path, victim: int, moment: str) -> None:
    outcomes = run_two(tmp_path, DYING, str(victim), moment)
    assert outcomes[victim][0] == -9
    if victim:
        assert outcomes[0][0] == 3
        assert "a process died during the save: found no sign of life from process 1 of 2" in outcomes[0][1]
        assert [path.name for path in tmp_path.iterdir()] == ["c"]
    else:  # jax ends the others when its service, in process 0, is gone
        assert outcomes[1][0] in (3, -6)
        vs.clean(tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == ["c"]
    assert vs.verify(tmp_path / "c").ok
    assert list(vs.open(tmp_path / "c")) == ["a"]
