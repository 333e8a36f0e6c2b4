"""Save generated inputs with the varstore of the interpreter that runs this: ``save_generated.py FOLDER COUNT SEED``.

Each input has its own folder below FOLDER, and ``outcomes.json`` contains the outcome of each call. The inputs depend
only on SEED, and only public functions are called. So tools/compare_versions.py can compare the files of two versions
of varstore.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
from collections import Counter, OrderedDict, namedtuple
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

import varstore as vs

FOREIGN = Path(__file__).resolve().parent.parent / "tests" / "data" / "formats"
MIB = 1 << 20
BLOCK = 16 * MIB

Case = Callable[["Input"], None]
Point = namedtuple("Point", ["x", "y"])

NUMPY_TYPES = (
    *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    *("float16", "float32", "float64", "complex64", "complex128"),
)
NARROW = {"bool": 1, "int2": 2, "uint2": 2, "int4": 4, "uint4": 4, "float4_e2m1fn": 4, "float6_e2m3fn": 6}
NARROW |= {"float6_e3m2fn": 6}
"""Types whose elements have less than eight bits."""
ML_TYPES = (
    *("bfloat16", "float8_e3m4", "float8_e4m3", "float8_e4m3b11fnuz", "float8_e4m3fn", "float8_e4m3fnuz"),
    *("float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu", "float6_e2m3fn", "float6_e3m2fn", "float4_e2m1fn"),
    *("int4", "uint4", "int2", "uint2"),
)
TYPES = [np.dtype(name) for name in NUMPY_TYPES] + [np.dtype(getattr(ml_dtypes, name)) for name in ML_TYPES]

PARTS = (
    *("w", "b", "conv1-weight", "System-Train-TrainStep-train_job", "layer.0", "running_mean", "[0]", "a,b;c", "-rf"),
    *(".", "..", "...", " ", "a.", "a ", ".a", "a. .", "%", "%00", "%2E", "%6Fut", "~", "$x", "'", "C:", "CON"),
    *("out", "meta", "zarr.json", "manifest", "snapshot_done", "pickled_data", "OUT", "out.", "outer", ".hidden"),
    *('a\\b:c*d?e"f<g>h|i', "line\nbreak", "\x01", "\x7f", "\x85", "\u2028", "é", "e\u0301", "ｆｕｌｌ", "層", "😀"),
    *("", "a" * 255, "é" * 127),
)
REFUSED_NAMES = ("", "a\0b", "\ud800", "a" * 256, "😀" * 64, "/".join("x" * 257), "a/" + "%" * 86, 3, None)
REFUSED_VALUES: tuple[Any, ...] = (
    None,
    "text",
    b"bytes",
    [1, 2],
    {},
    object(),
    1 << 64,
    np.array(["text"]),
    np.array([None]),
)
TARGETS = ("x.safetensors", "x.safetensors.index.json", "x.pt", "x.npz", "x.of", "x.pdparams", "x.mge", "x.ckpt")


class ArrayLike:
    """An object that is not an array but can become one, like a tensor of any framework."""

    def __init__(self, values: np.ndarray) -> None:
        self.values, self.shape, self.dtype = values, values.shape, values.dtype

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self.values if dtype is None else self.values.astype(dtype, copy=bool(copy))


class Input:
    """One input: its folder, its random numbers, and the outcomes of its calls."""

    def __init__(self, folder: Path, seed: str) -> None:
        self.folder = folder
        self.random = random.Random(seed)
        self.outcomes: list[str] = []
        self._clock = count(1_000_000, 7)

    def clock(self) -> float:
        """Return a time that advances by seven seconds with each call."""
        return float(next(self._clock))

    def attempt(self, call: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """Call a function, and record how it ended."""
        try:
            result = call(*arguments, **options)
        except Exception as error:
            self.outcomes.append(type(error).__name__)
            return None
        self.outcomes.append("done")
        return result

    def save(self, name: str, variables: Any, **options: Any) -> Any:
        """Save in the folder of this input, with random values for options that should not matter."""
        options = {"durable": self.chance(0.1), "threads": self.random.choice([None, 1, 3]), **options}
        return self.attempt(vs.save, self.folder / name, variables, **options)

    def chance(self, likelihood: float) -> bool:
        """Draw yes or no."""
        return self.random.random() < likelihood

    # --- what is drawn

    def name(self) -> str:
        """Draw a name that can be saved, which is rarely an ordinary one."""
        drawn = "/".join(self.random.choice(PARTS) for _ in range(self.random.choice([1, 1, 1, 2, 2, 3, 5])))
        return drawn or "plain"

    def shape(self) -> tuple[int, ...]:
        """Draw a shape, of which some have no elements and some no dimensions."""
        return tuple(self.random.choice([0, 1, 2, 3, 4, 7]) for _ in range(self.random.choice([0, 1, 1, 2, 2, 3, 4])))

    def array(self, dtype: np.dtype[Any] | None = None, shape: tuple[int, ...] | None = None) -> np.ndarray:
        """Draw an array: any type, bit pattern, byte order and layout."""
        dtype = self.random.choice(TYPES) if dtype is None else dtype
        shape = self.shape() if shape is None else shape
        raw = np.frombuffer(self.random.randbytes(dtype.itemsize * int(np.prod(shape, dtype=int))), np.uint8)
        if dtype.name in NARROW:
            raw = raw & np.uint8((1 << NARROW[dtype.name]) - 1)
        values = raw.view(dtype).reshape(shape).copy()
        if dtype.name in NUMPY_TYPES and self.chance(0.3):
            values = values.astype(dtype.newbyteorder(">"))
        laid: np.ndarray = self.random.choice(LAYOUTS)(values)
        return laid

    def value(self) -> Any:
        """Draw something that can be saved: an array, a scalar, or what can become an array."""
        kind = self.random.random()
        if kind < 0.1:
            return self.random.choice([True, 7, -1.5, 2j, np.float32(0.5), np.int8(-3), np.bool_(False)])
        return ArrayLike(self.array()) if kind < 0.2 else self.array()

    def variables(self, most: int = 8) -> dict[str, Any]:
        """Draw names and values."""
        return {self.name(): self.value() for _ in range(self.random.randint(0, most))}

    def json(self, depth: int = 0) -> Any:
        """Draw a JSON value."""
        if depth < 3 and self.chance(0.4):
            items = [self.json(depth + 1) for _ in range(self.random.randint(0, 3))]
            return items if self.chance(0.5) else {self.random.choice(PARTS): item for item in items}
        return self.random.choice([None, True, 0, -7, 1 << 70, 0.25, 1e-300, float("inf"), "", "été", "層\n"])

    def attributes(self) -> dict[str, Any]:
        """Draw attributes of a checkpoint or a variable."""
        return {self.random.choice(PARTS): self.json() for _ in range(self.random.randint(0, 3))}

    def state(self, depth: int = 0) -> Any:
        """Draw nested state: all kinds of containers and scalars, and arrays."""
        if depth < 4 and self.random.random() < 0.9 - 0.2 * depth:
            items = [self.state(depth + 1) for _ in range(self.random.randint(0, 4))]
            return self.random.choice(CONTAINERS)(self, items)
        return self.array() if self.chance(0.5) else self.scalar()

    def scalar(self) -> Any:
        """Draw a value that is kept in the tree."""
        return self.random.choice(SCALARS)

    def key(self) -> Any:
        """Draw a key of a dict in nested state."""
        return self.random.choice(["a", "b/c", "$", "été", 0, -1, 1 << 70, 0.5, None, True, b"\xff", (1, ("x", None))])


def keyed(drawn: Input, items: list[Any]) -> list[tuple[Any, Any]]:
    """Return items with drawn keys, most of which are strings."""
    texts = drawn.chance(0.6)
    return [(f"k{index}" if texts else drawn.key(), item) for index, item in enumerate(items)]


LAYOUTS: list[Callable[[np.ndarray], np.ndarray]] = [
    lambda values: values,
    lambda values: values,
    np.asfortranarray,
    lambda values: values.T,
    lambda values: values[::-1] if values.ndim else values,
    lambda values: np.repeat(values, 2, axis=0)[::2] if values.ndim else values,
    lambda values: np.broadcast_to(values[:1], values.shape) if values.ndim and len(values) else values,
]
CONTAINERS: list[Callable[[Input, list[Any]], Any]] = [
    lambda drawn, items: dict(keyed(drawn, items)),
    lambda drawn, items: dict(keyed(drawn, items)),
    lambda drawn, items: OrderedDict(keyed(drawn, items)),
    lambda _, items: items,
    lambda _, items: tuple(items),
    lambda drawn, items: Point(*items[:2]) if len(items) > 1 else Point(drawn.scalar(), items),
    lambda drawn, _: {drawn.key()},
    lambda drawn, _: frozenset([drawn.key()]),
    lambda drawn, _: Counter({drawn.key(): 3}),
]
SCALARS: list[Any] = [
    *(None, True, False, 0, -1, 1 << 62, 1 << 64, -(1 << 200), 0.1, -0.0, float("nan"), float("inf"), 1 - 2j),
    *("", "été", "\ud800", b"", b"\x00\xff", np.float16(0.5), np.int64(-1), np.bool_(True), np.complex64(1j)),
    *(ml_dtypes.bfloat16(1.5), ml_dtypes.float8_e5m2(2), float("-inf"), complex(float("nan"), 1), "a" * 300),
]


# --- kinds of inputs: each is a function that is given one and calls varstore ------------------------------------


def plain(drawn: Input) -> None:
    """Save names and values, some with attributes."""
    variables = drawn.variables(20)
    said = {name: drawn.attributes() for name in variables if drawn.chance(0.3)}
    options: dict[str, Any] = {"attributes": drawn.attributes(), "variable_attributes": said} if said else {}
    drawn.save("a/b/checkpoint" if drawn.chance(0.2) else "checkpoint", variables, **options)


def of_each_type(drawn: Input) -> None:
    """Save an array of each type."""
    drawn.save("checkpoint", {dtype.name: drawn.array(dtype) for dtype in TYPES})


def many(drawn: Input) -> None:
    """Save more variables than one batch contains."""
    dtype = drawn.random.choice(TYPES)
    names = (f"layer.{index}/{drawn.random.choice('wb')}" for index in range(drawn.random.randint(60, 300)))
    drawn.save("checkpoint", {name: drawn.array(dtype) for name in names})


def large(drawn: Input) -> None:
    """Save arrays that are larger than one write or one digested block, and link one of them."""
    nbytes = drawn.random.choice([MIB - 8, MIB, 2 * MIB + 8, 5 * MIB, BLOCK, BLOCK + 8])
    whole = np.arange(drawn.random.randrange(99), nbytes // 8 + 99)[: nbytes // 8]
    variables = {"c": whole, "reversed": whole[: MIB // 8][::-1], "small": whole[:3]}
    first = drawn.save("first", variables)
    drawn.save("second", {**variables, "small": whole[1:4]}, base=first)


def tied(drawn: Input) -> None:
    """Save arrays that share memory, completely or partly."""
    values = drawn.array(shape=(3, 4))
    candidates = [values, values[:], values.T.T, values[1:], values[::2], values.T, values.copy(), values.reshape(-1)]
    names = list({drawn.name() for _ in range(8)})
    names.sort()
    late = ArrayLike(values)
    drawn.save("first", {name: drawn.random.choice([*candidates, late, late]) for name in names})
    opened = drawn.attempt(vs.open, drawn.folder / "first")
    if opened is not None:
        drawn.save("second", {"again": values, **{f"x/{name}": opened[name] for name in opened}})


def linked(drawn: Input) -> None:
    """Save variables of two checkpoints under old and new names, together with new values."""
    first, second = drawn.save("first", drawn.variables()), drawn.save("second", drawn.variables())
    for index, opened in enumerate((first, second)):
        if opened is not None:
            taken = {drawn.random.choice([name, drawn.name()]): opened[name] for name in opened if drawn.chance(0.7)}
            drawn.save(f"third-{index}", {**drawn.variables(3), **taken, **taken})
            drawn.save(f"copy-{index}", opened)
            drawn.save(f"renamed-{index}", opened.select(rename={"": "model"}), attributes=drawn.attributes())


def changed(drawn: Input, variables: dict[str, Any]) -> dict[str, Any]:
    """Return variables of which some are missing, some unchanged, some changed and some new."""
    kept = {name: value for name, value in variables.items() if drawn.chance(0.8)}
    kept = {name: drawn.value() if drawn.chance(0.3) else value for name, value in kept.items()}
    return {**kept, **drawn.variables(2)}


def based(drawn: Input) -> None:
    """Save a chain of checkpoints, each with the previous one as its base."""
    variables, base = drawn.variables(), None
    for step in range(4):
        base = drawn.save(f"step-{step}", variables, base=base) or base
        variables = changed(drawn, variables)


def overwritten(drawn: Input) -> None:
    """Save to a path that exists: a checkpoint, an empty folder with an unusual mode, another folder, a file."""
    variables = drawn.variables()
    (drawn.folder / "empty").mkdir()
    (drawn.folder / "empty").chmod(drawn.random.choice([0o700, 0o755, 0o2775]))
    (drawn.folder / "theirs").mkdir()
    (drawn.folder / "theirs" / "notes.txt").write_text("keep")
    (drawn.folder / "file").write_text("keep")
    base = drawn.save("checkpoint", variables)
    later = changed(drawn, variables)
    for name in ("empty", "theirs", "file", "checkpoint"):
        drawn.save(name, later)
        drawn.save(name, later, overwrite=True, base=base if drawn.chance(0.5) else None)


def without_manifest(drawn: Input) -> None:
    """Save OneFlow's own layout, and link, seal and overwrite it."""
    variables = drawn.variables()
    drawn.save("attributes", variables, manifest=False, attributes={"step": 1})
    first = drawn.save("first", variables, manifest=False)
    if first is not None:
        drawn.save("linked", first)
        drawn.save("based", changed(drawn, variables), base=first, manifest=drawn.chance(0.5))
        drawn.attempt(vs.seal, drawn.folder / "first")
        drawn.save("first", changed(drawn, variables), manifest=False, overwrite=True)


def sealed(drawn: Input) -> None:
    """Change a checkpoint by hand and seal it."""
    opened = drawn.save(
        "checkpoint", {"a": drawn.array(), "b/c": drawn.array(), "d": drawn.array(), **drawn.variables()}
    )
    if opened is None:
        return
    root = drawn.folder / "checkpoint"
    if drawn.chance(0.5):
        shutil.rmtree(root / "a")
    if drawn.chance(0.5):
        shutil.copytree(root / "b", root / "e")
    if drawn.chance(0.5):
        (root / "d").rename(root / "moved")
    drawn.attempt(vs.seal, root)
    drawn.save("linked", drawn.attempt(vs.open, root) or {})


def nested(drawn: Input) -> None:
    """Save nested state, then a changed one with it as its base, then a copy."""
    state = {"model": drawn.state(), "other": drawn.state(), "epoch": 3}
    options: dict[str, Any] = {"durable": False, "attributes": drawn.attributes()}
    first = drawn.attempt(vs.save_state, drawn.folder / "first", state, **options)
    state["other"] = drawn.state()
    drawn.attempt(vs.save_state, drawn.folder / "second", state, base=first, **options)
    if first is not None:
        drawn.save("copy", first)


def run(drawn: Input) -> None:
    """Save a run with a manager: policies of all kinds, removed parts, steps that are saved twice."""
    keeps = [None, vs.Latest(2), vs.Best("loss", n=2) | vs.Latest(1), vs.KeepEverySteps(3), vs.Pinned([1, 4])]
    keeps += [vs.OnePerMinutes(1), vs.KeepIf(lambda saved: saved.step % 2 == 0)]
    keep, background = drawn.random.choice(keeps), drawn.chance(0.3)
    parts = {"optimizer/*": vs.Latest(1)} if drawn.chance(0.5) else None
    state: dict[str, Any] = {"model": drawn.variables(4), "optimizer": {"m": drawn.array()}, "x": [drawn.array()]}
    with vs.CheckpointManager(
        drawn.folder / "run",
        keep=keep,
        keep_parts=parts,
        background=background,
        link_unchanged=drawn.chance(0.8),
        clock=drawn.clock,
        durable=False,
    ) as manager:
        for step in (0, 1, 2, 3, 3, 4, 7):
            state["model"] = changed(drawn, state["model"])
            options = {"metrics": {"loss": drawn.random.random()}, "overwrite": drawn.chance(0.5)}
            drawn.attempt(manager.save, step, state, **options)
        drawn.attempt(manager.wait)
        drawn.outcomes.append(f"steps: {[saved.step for saved in manager.all()]}")


def model_checkpoint(drawn: Input) -> None:
    """Save a run like MindSpore's callback, and a second one with the same prefix."""
    config = vs.CheckpointConfig(save_checkpoint_steps=2, keep_checkpoint_max=drawn.random.randint(1, 4))
    for _ in range(2):
        callback = vs.ModelCheckpoint("net", drawn.folder, config, clock=drawn.clock)
        for step in range(1, 9):
            drawn.attempt(callback.step_end, 1 + step // 4, step, drawn.variables(3))
        drawn.attempt(callback.end)


def session(drawn: Input) -> None:
    """Save the variables of a session like OneFlow's scripts."""
    with vs.Session(seed=drawn.random.randrange(9)):
        for _ in range(5):
            shape = tuple(extent or 1 for extent in drawn.shape())
            initializer = drawn.random.choice([None, vs.ones_initializer(), vs.random_normal_initializer()])
            drawn.attempt(vs.get_variable, drawn.name(), shape, vs.float32, initializer)
        opened = drawn.attempt(vs.checkpoint.save, drawn.folder / "first", durable=False)
        drawn.attempt(vs.checkpoint.save, drawn.folder / "second", opened, durable=False)
        drawn.attempt(vs.checkpoint.save, drawn.folder / "third", {"x": drawn.value()}, manifest=False)


def asynchronous(drawn: Input) -> None:
    """Save in the background, arrays and state."""
    variables = drawn.variables()
    pending = drawn.attempt(vs.save_async, drawn.folder / "first", variables, durable=False, copy=drawn.chance(0.7))
    first = pending and drawn.attempt(pending.result)
    later = changed(drawn, variables)
    pending = drawn.attempt(vs.save_async, drawn.folder / "second", later, durable=False, base=first)
    drawn.attempt(vs.save_state_async, drawn.folder / "state", {"a": later, "n": drawn.scalar()}, durable=False).wait()


def refused(drawn: Input) -> None:
    """Try to save what cannot be saved; nothing may be left."""
    fine = drawn.variables(3)
    for name in REFUSED_NAMES:
        drawn.save("name", {**fine, name: drawn.value()})
    for value in REFUSED_VALUES:
        drawn.save("value", {**fine, "x": value})
        drawn.attempt(vs.save_state, drawn.folder / "state", {"a": [value]})
        shutil.rmtree(drawn.folder / "state", ignore_errors=True)
    drawn.save("attributes", fine, attributes={"x": object()})
    drawn.save("base", fine, base=drawn.folder / "nothing")
    drawn.save("", fine)
    drawn.attempt(vs.save_state, drawn.folder / "state", {"a": drawn.state(), "x": object()})


def leftover(drawn: Input) -> None:
    """Clean up after crashed saves, explicitly and with the next save."""
    for name in (".a.saving-0123abcd", ".b.saving-89abcdef", ".c.replaced-00000000", ".d.saving-short"):
        (drawn.folder / name / "w").mkdir(parents=True)
        (drawn.folder / name / "w" / "out").write_bytes(b"12345678")
    drawn.save("a", drawn.variables(3))
    removed = drawn.attempt(vs.clean, drawn.folder) or []
    drawn.outcomes.append(f"removed: {[os.path.basename(path) for path in removed]}")


def written(drawn: Input) -> None:
    """Write other systems' files, and convert them in both directions."""
    types = [np.dtype(name) for name in ("float32", "float16", "int64", "int32", "uint8", "bool")]
    arrays = {f"layer{index}/w": drawn.array(types[index]) for index in range(len(types))}
    for target in TARGETS:
        drawn.attempt(vs.write, drawn.folder / target, arrays)
    state = {"model": arrays, "tied": arrays["layer0/w"], "epoch": 3, "name": "x", "rate": [0.1, None]}
    for target in ("state.pt", "state.of", "state.mge", "state.pdparams"):
        drawn.attempt(vs.write, drawn.folder / target, state)
    for target in drawn.random.sample(TARGETS, 3):
        drawn.attempt(vs.convert, drawn.folder / target, drawn.folder / f"from-{target}", format="varstore")
    drawn.attempt(vs.write, drawn.folder / "x.zarr", {f"g/{name}": drawn.array(types[0]) for name in "abc"})
    model = drawn.random.choice(sorted(FOREIGN.glob("onnx/*.onnx")))
    doubled = {name: np.asarray(values) * 2 for name, values in vs.read(model).items() if values.dtype == np.float32}
    drawn.attempt(vs.write, drawn.folder / "x.onnx", doubled, model=os.fspath(model))


def converted(drawn: Input) -> None:
    """Convert files that real frameworks wrote to checkpoints, and these to other formats."""
    known = sorted(str(path).removesuffix(".expect.json") for path in FOREIGN.glob("*/*.expect.json"))
    source = drawn.random.choice(known)
    drawn.attempt(vs.convert, source, drawn.folder / "checkpoint")
    for target in drawn.random.sample(TARGETS, 2):
        drawn.attempt(vs.convert, source, drawn.folder / target)
        drawn.attempt(vs.convert, drawn.folder / "checkpoint", drawn.folder / f"again-{target}", dtype="float16")


KINDS: tuple[Case, ...] = (
    *(plain, of_each_type, many, large, tied, linked, based, overwritten, without_manifest, sealed, nested, run),
    *(model_checkpoint, session, asynchronous, refused, leftover, written, converted, plain, nested, based, linked),
)


def verified(folder: Path) -> Iterator[str]:
    """Verify all checkpoints below a folder, and return the result for each."""
    for marker in sorted(folder.rglob("snapshot_done")):
        if marker.is_file():
            yield f"{marker.parent.relative_to(folder)}: {'ok' if vs.verify(marker.parent).ok else 'not ok'}"


def main(folder: str, inputs: str, seed: str) -> None:
    os.umask(0o022)
    outcomes = {}
    for index in range(int(inputs)):
        kind = KINDS[index % len(KINDS)]
        drawn = Input(Path(folder, f"{index:04}-{kind.__name__}"), f"{seed}/{index}")
        drawn.folder.mkdir(parents=True)
        kind(drawn)
        outcomes[drawn.folder.name] = [*drawn.outcomes, *verified(drawn.folder)]
    said = {"version": vs.__version__, "from": os.path.dirname(vs.__file__), "outcomes": outcomes}
    Path(folder, "outcomes.json").write_text(json.dumps(said, indent=1))


if __name__ == "__main__":
    main(*sys.argv[1:])
