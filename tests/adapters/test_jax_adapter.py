"""jax: pytrees come back into their structure, on their devices, bit for bit."""

from __future__ import annotations

import os
from collections import namedtuple
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=4")

import ml_dtypes
import numpy as np
import pytest

jax = pytest.importorskip("jax")

import jax.numpy as jnp  # noqa: E402
from jax.sharding import NamedSharding, PartitionSpec  # noqa: E402

import varstore  # noqa: E402
from varstore.adapters import jax as vj  # noqa: E402
from varstore.adapters.jax.trees import is_key  # noqa: E402
from varstore.disk.read.checkpoint import open_checkpoint  # noqa: E402
from varstore.errors import ManifestError, UnsupportedDtype, UsageError, VariableMismatch  # noqa: E402
from varstore.inspection.verify import verify  # noqa: E402
from varstore.model.into import load_into  # noqa: E402
from varstore.model.store import save  # noqa: E402
from varstore.training.background import save_async  # noqa: E402

Moments = namedtuple("Moments", ["mu", "nu"])
DTYPES = ["bool", "int8", "uint8", "int16", "int32", "uint32", "float16", "bfloat16", "float32", "complex64",
          "float8_e4m3fn", "float8_e5m2", "float8_e4m3b11fnuz", "int4", "uint4"]  # fmt: skip


@jax.tree_util.register_dataclass
@dataclass
class Layer:
    kernel: Any
    bias: Any


def same(a: Any, b: Any) -> bool:
    if jax.tree_util.tree_structure(a) != jax.tree_util.tree_structure(b):
        return False
    pairs = zip(jax.tree_util.tree_leaves(a), jax.tree_util.tree_leaves(b), strict=True)
    pairs = [(jax.random.key_data(x), jax.random.key_data(y)) if is_key(x) else (x, y) for x, y in pairs]
    return all(
        type(x) is type(y)
        and (
            x == y
            if not hasattr(x, "dtype")
            else x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes()
        )
        for x, y in pairs
    )


def tree() -> Any:
    key = jax.random.key(0)
    return {
        "params": {"layer": Layer(jax.random.normal(key, (8, 4)), jnp.zeros(4, jnp.bfloat16)), "scale": jnp.float32(2)},
        "opt": (Moments(jnp.ones(3), [jnp.arange(3), None]), {}),
        "host": np.arange(5.0),
        "step": 7,
    }


@pytest.mark.parametrize("name", DTYPES)
def test_every_type(tmp_path: Path, name: str) -> None:
    dtype = getattr(jnp, name, None) or getattr(ml_dtypes, name)
    array = jnp.array(np.arange(6).reshape(2, 3) % 2, dtype)
    vj.save(tmp_path / "c", {"a": array})
    assert same(vj.load(tmp_path / "c"), {"a": array})
    assert same(vj.load(tmp_path / "c", {"a": jnp.zeros_like(array)}), {"a": array})


def test_names_are_paths(tmp_path: Path) -> None:
    vj.save(tmp_path / "c", tree())
    assert open_checkpoint(tmp_path / "c").names == (
        "params/layer/kernel", "params/layer/bias", "params/scale", "opt/0/mu", "opt/0/nu/0", "host",
    )  # fmt: skip
    assert verify(tmp_path / "c").ok


def test_restoring_into_a_structure(tmp_path: Path) -> None:
    saved = tree()
    vj.save(tmp_path / "c", saved)
    like = jax.tree_util.tree_map(lambda leaf: leaf * 0, tree())
    assert same(vj.load(tmp_path / "c", like), saved)
    assert not same(like, saved)


def test_restoring_into_an_abstract_structure(tmp_path: Path) -> None:
    saved = tree()
    vj.save(tmp_path / "c", saved)
    abstract = jax.eval_shape(lambda: {name: saved[name] for name in ("params", "opt")})
    assert isinstance(abstract["params"]["scale"], jax.ShapeDtypeStruct)
    with pytest.raises(VariableMismatch, match=r"2 unexpected\n.*host, step"):
        vj.load(tmp_path / "c", abstract)
    back = vj.load(tmp_path / "c", abstract, strict=False)
    assert same(back, {name: saved[name] for name in ("params", "opt")})


def test_without_a_structure_plain_containers_keep_their_types(tmp_path: Path) -> None:
    vj.save(tmp_path / "c", tree())
    back = vj.load(tmp_path / "c")
    assert back["step"] == 7
    assert isinstance(back["params"]["layer"]["kernel"], jax.Array)
    assert isinstance(back["host"], np.ndarray)
    assert isinstance(back["opt"], tuple)
    assert back["opt"][0]._fields == ("mu", "nu")


def test_sharded_arrays(tmp_path: Path) -> None:
    if len(jax.devices()) < 4:
        pytest.skip("fewer than four devices")
    mesh = jax.make_mesh((4,), ("x",))
    rows, columns = (NamedSharding(mesh, spec) for spec in (PartitionSpec("x"), PartitionSpec(None, "x")))
    values = np.arange(64, dtype="f4").reshape(8, 8)
    vj.save(tmp_path / "c", {"w": jax.device_put(values, rows)})
    for like in (
        {"w": jax.device_put(np.zeros((8, 8), "f4"), columns)},
        {"w": jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=columns)},
    ):
        back = vj.load(tmp_path / "c", like)["w"]
        assert back.sharding == columns
        assert [shard.data.shape for shard in back.addressable_shards] == [(8, 2)] * 4
        assert np.array_equal(back, values)


def test_misfits_are_all_told_before_anything_is_read(tmp_path: Path) -> None:
    vj.save(tmp_path / "c", {"a": jnp.ones((2, 3)), "b": jnp.ones(2)})
    with pytest.raises(VariableMismatch, match=r"\(2, 3\) -> \(3, 2\)"):
        vj.load(tmp_path / "c", {"a": jnp.ones((3, 2)), "b": jnp.ones(2)})
    with pytest.raises(VariableMismatch, match="cast=True"):
        vj.load(tmp_path / "c", {"a": jnp.ones((2, 3)), "b": jnp.ones(2, jnp.bfloat16)})
    with pytest.raises(VariableMismatch, match=r"1 missing, 1 unexpected\n.*c/d.*\n.*  b "):
        vj.load(tmp_path / "c", {"a": jnp.ones((2, 3)), "c": {"d": jnp.ones(2)}})
    back = vj.load(tmp_path / "c", {"a": jnp.ones((2, 3)), "b": jnp.ones(2, jnp.bfloat16)}, cast=True)
    assert back["b"].dtype == jnp.bfloat16


def test_numbers_and_arrays_stand_for_each_other(tmp_path: Path) -> None:
    vj.save(tmp_path / "c", {"step": 3, "count": jnp.int32(4)})
    back = vj.load(tmp_path / "c", {"step": jnp.int32(0), "count": 0})
    assert back["step"].dtype == jnp.int32
    assert (int(back["step"]), back["count"], type(back["count"])) == (3, 4, int)


@pytest.mark.parametrize(
    ("saved", "wanted", "cast"),
    [
        (3.5, jnp.zeros(1000), True),
        (3, jnp.zeros(1000, jnp.int32), False),
        (3.5, jnp.int32(0), False),
        (3.5, jnp.int32(0), True),
        (3, jnp.float32(0), False),
        (1 << 40, jnp.int32(0), False),
        (1 << 70, jnp.int32(0), False),
        ("text", jnp.zeros(2), True),
        (True, jnp.int32(0), False),
    ],
)
def test_a_plain_value_replaces_only_an_array_of_its_shape_and_kind(
    tmp_path: Path, saved: Any, wanted: Any, cast: bool
) -> None:
    vj.save(tmp_path / "c", {"a": saved, "b": jnp.ones(2)})
    with pytest.raises(VariableMismatch):
        vj.load(tmp_path / "c", {"a": wanted, "b": jnp.ones(2)}, cast=cast)


@pytest.mark.parametrize(
    ("saved", "wanted", "cast"),
    [(3.5, jnp.bfloat16(0), False), (True, jnp.bool_(False), False), (3, jnp.float32(0), True)],
)
def test_a_plain_value_takes_the_width_of_the_array(tmp_path: Path, saved: Any, wanted: Any, cast: bool) -> None:
    vj.save(tmp_path / "c", {"a": saved, "b": jnp.ones(2)})
    back = vj.load(tmp_path / "c", {"a": wanted, "b": jnp.ones(2)}, cast=cast)
    assert (back["a"].dtype, back["a"].item()) == (wanted.dtype, saved)


def test_what_cannot_be_saved(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"state\['f'\]: function"):
        vj.save(tmp_path / "c", {"f": lambda: 1})
    assert list(tmp_path.iterdir()) == []


def donated() -> Any:
    array = jnp.ones(3)
    jax.jit(lambda values: values + 1, donate_argnums=0)(array)
    return array


def traced() -> Any:
    escaped = []
    jax.jit(lambda values: escaped.append(values) or values)(jnp.ones(3))
    return escaped[0]


WITHOUT_VALUES = {
    "donated": (donated, "an array that was donated or deleted cannot be saved. Save it before the call"),
    "tracer": (traced, "a tracer, which has no values, cannot be saved. Save outside of jit"),
    "struct": (lambda: jax.ShapeDtypeStruct((3,), jnp.float32), "a ShapeDtypeStruct, which is not an array, cannot"),
    "key": (lambda: jax.random.key(0), "a typed random key cannot be saved. Save jax.random.key_data"),
}


@pytest.mark.parametrize("case", WITHOUT_VALUES)
def test_an_array_without_values_is_refused_by_name(tmp_path: Path, case: str) -> None:
    make, message = WITHOUT_VALUES[case]
    value = make()
    for call in (
        lambda: save(tmp_path / "c", {"v": value}),
        lambda: save_async(tmp_path / "c", {"v": value}).wait(),
        *([lambda: vj.save(tmp_path / "c", {"v": value})] if case != "key" else []),
        lambda: load_into({"v": np.zeros(3, "f4")}, {"v": value}),
    ):
        with pytest.raises(UnsupportedDtype, match="key_data" if case == "key" else f"variable 'v': {message}"):
            call()
    assert list(tmp_path.iterdir()) == []


def test_an_array_that_other_processes_have_parts_of_is_refused(tmp_path: Path) -> None:
    class Spread:
        """What jax's array says in a program of several processes."""

        is_fully_addressable = is_fully_replicated = False
        shape, dtype = (3,), np.dtype(np.float32)
        is_deleted = bool
        __array__ = None

    Spread.__module__ = "jaxlib._jax"
    with pytest.raises(UnsupportedDtype, match=r"spread over processes .*varstore.adapters.jax.save_sharded"):
        save(tmp_path / "c", {"v": Spread()})


def test_wide_types_are_not_narrowed_in_silence(tmp_path: Path) -> None:
    with jax.enable_x64(True):
        vj.save(tmp_path / "c", {"w": jnp.arange(3, dtype=jnp.float64)})
        assert vj.load(tmp_path / "c")["w"].dtype == jnp.float64
    with pytest.raises(UsageError, match="jax_enable_x64"):
        vj.load(tmp_path / "c")


def test_plain_variables(tmp_path: Path) -> None:
    save(tmp_path / "c", {"w": np.ones((2, 2), "f4")})
    assert isinstance(vj.load(tmp_path / "c", {"w": jnp.zeros((2, 2))})["w"], jax.Array)
    save(tmp_path / "d", {"params/0/w": np.ones(2, "f4"), "params/0/b": np.zeros(2, "f4")})
    like = {"params": [{"w": jnp.zeros(2), "b": jnp.ones(2)}]}
    assert same(vj.load(tmp_path / "d", like), {"params": [{"w": jnp.ones(2), "b": jnp.zeros(2)}]})


def test_a_background_save_of_an_array_that_is_given_away(tmp_path: Path) -> None:
    array = jnp.arange(1000.0)
    pending = save_async(tmp_path / "c", {"w": array})
    array.delete()
    assert pending.result(10)["w"].numpy()[999] == 999


def test_flax_and_optax_train_on_as_if_never_stopped(tmp_path: Path) -> None:
    pytest.importorskip("flax")
    optax = pytest.importorskip("optax")
    from flax import linen
    from flax.training.train_state import TrainState

    model = linen.Dense(3)
    x, y = jnp.ones((5, 4)) * jnp.arange(5.0)[:, None], jnp.arange(5) % 3

    def fresh(seed: int) -> Any:
        params = model.init(jax.random.key(seed), x)["params"]
        return TrainState.create(apply_fn=model.apply, params=params, tx=optax.adamw(0.1))

    @jax.jit
    def step(state: Any) -> Any:
        def loss(params: Any) -> Any:
            logits = state.apply_fn({"params": params}, x)
            return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

        value, gradients = jax.value_and_grad(loss)(state.params)
        return state.apply_gradients(grads=gradients), value

    def run(state: Any, steps: int) -> tuple[Any, list[float]]:
        losses = []
        for _ in range(steps):
            state, value = step(state)
            losses.append(float(value))
        return state, losses

    _, expected = run(fresh(0), 8)
    state, _ = run(fresh(0), 4)
    vj.save(tmp_path / "c", state)
    assert "params/kernel" in open_checkpoint(tmp_path / "c")
    restored = vj.load(tmp_path / "c", fresh(1))
    assert int(restored.step) == 4
    assert run(restored, 4)[1] == expected[4:]


# --- parts, keys, and the classes of Flax and Optax ------------------------------------------------------------------


def zeros(tree: Any) -> Any:
    return jax.tree_util.tree_map(jnp.zeros_like, tree)


def test_a_part_is_loaded_with_a_report(tmp_path: Path) -> None:
    vj.save(
        tmp_path / "c", {"params": {"body": {"w": jnp.ones((2, 3)), "b": jnp.ones(3)}, "old": jnp.ones(1)}, "step": 3}
    )
    like = {"body": {"w": jnp.zeros((2, 3)), "b": jnp.zeros(3)}, "head": {"w": jnp.full(2, 7.0)}}
    chosen: Any = {"include": "params/body/*", "rename": {"params/": ""}}
    with pytest.raises(VariableMismatch, match="1 missing") as caught:
        vj.load(tmp_path / "c", like, **chosen)
    assert "missing='head/w'" in str(caught.value.hint)
    with pytest.raises(VariableMismatch, match="1 missing"):
        vj.load_into(like, tmp_path / "c", **chosen, missing="neck/*")
    for options in ({"missing": "head/*"}, {"strict": False}):
        back, report = vj.load_into(like, tmp_path / "c", **chosen, **options)
        assert (report.loaded, report.missing) == (("body/w", "body/b"), ("head/w",))
        assert same(back, {"body": {"w": jnp.ones((2, 3)), "b": jnp.ones(3)}, "head": {"w": jnp.full(2, 7.0)}})
    assert same(vj.load(tmp_path / "c", like, **chosen, missing="head/*"), back)
    assert not like["body"]["b"].any()
    assert vj.load(tmp_path / "c", include="step") == {"step": 3}


def test_all_that_is_wrong_is_told_at_once_and_overlap_is_not_offered(tmp_path: Path) -> None:
    vj.save(tmp_path / "c", {"params": {"w": jnp.ones((2, 3)), "b": jnp.ones(3), "v": jnp.ones(3)}})
    like = {"w": jnp.zeros((3, 2)), "b": jnp.zeros(4), "v": jnp.zeros(3), "head": jnp.zeros(2)}
    with pytest.raises(VariableMismatch) as caught:
        vj.load(tmp_path / "c", like)
    for part in ("rename={'params/': ''}", "(2, 3) -> (3, 2), transposed", "(3,) -> (4,)", "head"):
        assert part in str(caught.value)
    assert "overlap" not in str(caught.value)
    skipped, report = vj.load_into(like, tmp_path / "c", rename={"params/": ""}, missing="head", on_mismatch="skip")
    assert report.loaded == ("v",)
    assert same(skipped, {**like, "v": jnp.ones(3)})
    with pytest.raises(UsageError, match="on_mismatch"):
        vj.load(tmp_path / "c", like, on_mismatch="overlap")
    with pytest.raises(VariableMismatch, match="nothing is loaded"):
        vj.load_into({"q": jnp.zeros(2)}, tmp_path / "c", strict=False)


def test_a_struct_cannot_keep_its_value(tmp_path: Path) -> None:
    vj.save(tmp_path / "c", {"a": jnp.ones(2)})
    like = {"a": jnp.zeros(2), "b": jax.ShapeDtypeStruct((2,), jnp.float32)}
    with pytest.raises(UsageError, match="variable 'b': a ShapeDtypeStruct has no value to keep"):
        vj.load(tmp_path / "c", like, missing="b")


def test_names_that_meet_are_told_apart(tmp_path: Path) -> None:
    state = {"a/b": jnp.ones(2), "a": {"b": jnp.zeros(2)}}
    vj.save(tmp_path / "c", state)
    assert same(vj.load(tmp_path / "c", zeros(state)), state)
    assert same(vj.load(tmp_path / "c", dict(reversed(zeros(state).items()))), state)


KEYS = ["threefry2x32", "rbg"]


@pytest.mark.parametrize("impl", KEYS)
@pytest.mark.parametrize("shape", [(), (3,)])
def test_typed_keys(tmp_path: Path, impl: str, shape: tuple[int, ...]) -> None:
    key = jax.random.key(7, impl=impl)
    keys = jax.random.split(key, shape) if shape else key
    vj.save(tmp_path / "c", {"rng": keys})
    like = {"rng": jax.random.split(jax.random.key(0, impl=impl), shape) if shape else jax.random.key(0, impl=impl)}
    struct = jax.eval_shape(lambda: like)
    for back in (vj.load(tmp_path / "c"), vj.load(tmp_path / "c", like), vj.load(tmp_path / "c", struct)):
        assert back["rng"].dtype == keys.dtype
        assert np.array_equal(jax.random.key_data(back["rng"]), jax.random.key_data(keys))
    assert varstore.load(tmp_path / "c")["rng"].dtype == np.uint32
    other = jax.random.key(0, impl="unsafe_rbg" if impl == "rbg" else "rbg")
    with pytest.raises(VariableMismatch):
        vj.load(tmp_path / "c", {"rng": jax.random.split(other, shape) if shape else other})


def test_a_key_of_a_generator_that_jax_does_not_have(tmp_path: Path) -> None:
    tree = '{"rng":{"$":"jax.key","name":"rng","impl":"dice"}}'
    varstore.save(tmp_path / "c", {"rng": np.zeros(2, np.uint32)}, tree=tree)
    with pytest.raises(ManifestError, match="does not describe a jax"):
        vj.load(tmp_path / "c")


def test_records_and_long_lists_in_a_pytree(tmp_path: Path) -> None:
    state = {"config": Settings(lr=0.5, w=np.ones(2)), "losses": [0.5] * 2000, "w": jnp.ones(2)}
    vj.save(tmp_path / "c", state)
    like = {"config": Settings(lr=0.0, w=None), "losses": [0.0] * 2000, "w": jnp.zeros(2)}
    back = vj.load(tmp_path / "c", like)
    assert type(back["config"]) is Settings
    assert (back["config"].lr, back["config"].w.tolist()) == (0.5, [1, 1])
    assert back["losses"] == state["losses"]
    assert vj.load(tmp_path / "c")["config"].lr == 0.5


@dataclass
class Settings:
    """Not a node of pytrees, but a leaf."""

    lr: float
    w: Any


def test_a_module_of_nnx_with_dropout_and_an_optimizer(tmp_path: Path) -> None:
    nnx = pytest.importorskip("flax.nnx")
    optax = pytest.importorskip("optax")

    class Net(nnx.Module):  # type: ignore[misc, unused-ignore]
        def __init__(self, rngs: Any) -> None:
            self.linear = nnx.Linear(4, 3, rngs=rngs)
            self.dropout = nnx.Dropout(0.5, rngs=rngs)
            self.norm = nnx.BatchNorm(3, rngs=rngs)

        def __call__(self, x: Any) -> Any:
            return self.norm(self.dropout(self.linear(x)))

    x = jnp.arange(20.0).reshape(5, 4)

    def fresh(seed: int) -> tuple[Any, Any]:
        net = Net(nnx.Rngs(seed))
        return net, nnx.Optimizer(net, optax.adam(0.1), wrt=nnx.Param)

    def run(net: Any, optimizer: Any, steps: int) -> list[float]:
        losses = []
        for _ in range(steps):
            loss, gradients = nnx.value_and_grad(lambda net: (net(x) ** 3).mean())(net)
            optimizer.update(net, gradients)
            losses.append(float(loss))
        return losses

    expected = run(*fresh(0), 6)
    net, optimizer = fresh(0)
    run(net, optimizer, 3)
    state = {"net": nnx.state(net), "optimizer": nnx.state(optimizer)}
    with varstore.CheckpointManager(tmp_path / "run") as manager:
        manager.save(3, vj.state_of(state))
        other, resumed = fresh(1)
        like = {"net": nnx.state(other), "optimizer": nnx.state(resumed)}
        for back in (manager.restore(like=like), manager.restore(3, like=like)):
            assert same(back, state)
            assert type(back["net"]) is type(state["net"])
        with pytest.raises(UsageError, match="like"):
            manager.restore(like=like, verify=False)
    nnx.update(other, back["net"])
    nnx.update(resumed, back["optimizer"])
    assert run(other, resumed, 3) == expected[3:]


def test_states_of_optax_come_back_as_their_classes(tmp_path: Path) -> None:
    optax = pytest.importorskip("optax")
    params = {"w": jnp.ones((2, 3)), "b": jnp.ones(3)}
    chain = optax.chain(optax.clip_by_global_norm(1.0), optax.masked(optax.adamw(0.1), {"w": True, "b": False}))
    state = chain.update(params, chain.init(params), params)[1]
    with varstore.CheckpointManager(tmp_path / "run") as manager:
        manager.save(1, vj.state_of({"optimizer": state}))
        back = manager.restore(like={"optimizer": chain.init(params)})["optimizer"]
    assert same(back, state)


def test_files_of_other_systems_are_loaded_as_checkpoints_are(tmp_path: Path) -> None:
    tree = {"layers": [{"w": jnp.ones((2, 3), jnp.bfloat16)}, {"w": jnp.arange(3.0)}], "step": 3}
    like = {"layers": [{"w": jnp.zeros((2, 3), jnp.bfloat16)}, {"w": np.zeros(3, np.float32)}], "step": 0}
    varstore.write(tmp_path / "c.pt", jax.tree_util.tree_map(np.asarray, tree) | {"step": 3})
    for source in (tmp_path / "c.pt", varstore.read(tmp_path / "c.pt")):
        back, report = vj.load_into(like, source)
        assert same(back, {**tree, "layers": [tree["layers"][0], {"w": np.arange(3, dtype=np.float32)}]})
        assert report.loaded == ("layers/0/w", "layers/1/w", "step")
        assert same(vj.load(source, include="layers/1/*"), {"layers": [None, {"w": np.arange(3, dtype=np.float32)}]})
    varstore.write(tmp_path / "c.safetensors", {"layers/1/w": np.arange(3, dtype=np.float32)})
    half = vj.load(tmp_path / "c.safetensors", like={"layers": {"1": {"w": jnp.zeros(3, jnp.bfloat16)}}}, cast=True)
    assert half["layers"]["1"]["w"].dtype == jnp.bfloat16
    with pytest.raises(VariableMismatch, match="pass a dict of names and arrays as the source"):
        vj.load_into({"layers": [{"w": jnp.zeros((3, 2))}]}, tmp_path / "c.pt", strict=False)
    turned, _ = vj.load_into({"layers": [{"w": jnp.zeros((3, 2))}]}, {"layers/0/w": np.ones((3, 2), np.float32)})
    assert turned["layers"][0]["w"].all()


def test_arrays_that_are_loaded_have_memory_of_their_own(tmp_path: Path) -> None:
    memory = np.zeros(4096 + 64, np.uint8)
    start = -memory.ctypes.data % 64  # jax takes such memory as it is
    given = memory[start : start + 4096].view(np.float32)
    like = {"device": jnp.zeros(1024), "host": np.zeros(1024, np.float32)}
    loaded, _ = vj.load_into(like, {"device": given, "host": given})
    given += 1
    assert not loaded["device"].any()
    assert not loaded["host"].any()
