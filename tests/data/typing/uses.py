"""The face as programs use it. mypy must accept every line but those that end in ``# wrong``."""

from collections.abc import Mapping
from typing import Any

import numpy as np

import varstore as vs

values: dict[str, Any] = {"w": np.zeros((2, 3), np.float32)}

saved: vs.Checkpoint = vs.save("a", values, attributes={"epoch": 3}, overwrite=True, progress=True)
vs.save("a", values, overwite=True)  # wrong
vs.save("a", values, durable="yes")  # wrong
variable: vs.Variable = vs.open("a")["w"]
row: Any = variable[0]
loaded: dict[str, np.ndarray] = vs.load("a", include="w*", exclude=["*/m"], rename={"module.": ""}, mmap=True)
report: vs.LoadReport = vs.load_into(loaded, "a", on_mismatch="skip", cast=True)
vs.load_into(loaded, "a", on_mismatch="ignore")  # wrong
vs.load_into(loaded, "a", missing="error", on_tied="last").raise_for("missing", "unexpected")
vs.load_into(loaded, "a", missing=["head.*"], strict=True)
vs.load_into(loaded, "a", missing=3)  # wrong
vs.load_into(loaded, "a", on_tied="any")  # wrong
absent: tuple[str, ...] = report.missing + report.unexpected
vs.load("a", verfy=False)  # wrong

with vs.open("a", allow_incomplete=False) as checkpoint:
    chosen: Mapping[str, vs.Variable] = checkpoint.select(include="w")
    names: tuple[str, ...] = checkpoint.names

pending: vs.PendingSave = vs.save_async("b", values, when_busy="refuse", budget=1 << 30, base="a", durable=False)
vs.save_async("b", values, overwite=True)  # wrong
vs.save_async("b", values, when_busy="never")  # wrong
vs.save_state("c", {"model": values, "epoch": 3}, overwrite=True)
vs.save_state("c", {}, tree="")  # wrong
vs.save_state_async("c", {}, when_busy="wait", attributes={"epoch": 3})
state: Any = vs.load_state("c", map_location="cpu", verify=False)

manager = vs.CheckpointManager("runs", keep=vs.Latest(3) | vs.Best("loss", mode="min"), durable=False)
manager.save(1, values, metrics={"loss": 0.5}).wait()
vs.CheckpointManager("runs", max_to_keep=3)  # wrong
vs.Best("loss", mode="lowest")  # wrong
restored: Any = manager.restore(threads=2)
manager.restore(thread=2)  # wrong

opened = vs.read("model.safetensors")
shape: tuple[int, ...] = opened["w"].shape
nested: Any = opened.state()
kind: str = opened.format
part = opened.select(include="w")["w"][0]
opened.stat()  # wrong
scaled: np.ndarray = 2 * opened["w"] + vs.open("a")["w"].T
turned: np.ndarray = opened["w"].reshape(-1)[::-1]
flags: np.ndarray = opened["w"] == 1
raw: bytes = opened["w"].tobytes()
opened["w"] += 1  # wrong
opened["w"].sort()  # wrong
vs.read("model.ckpt", key=b"0123456789abcdef")
vs.read("model.ckpt", password="secret")  # wrong
bundled: vs.Checkpoint = vs.bundle("d", values, graphs={"forward": b""}, on_difference="add", links=False)
vs.bundle("d", values, graphs={}, on_difference="drop")  # wrong
manager.save(2, values, graphs_from="d")
vs.write("model.onnx", values, model="template.onnx")
vs.write("model.safetensors", values, metdata={})  # wrong
done = vs.convert("a", "a.pt", dtype="bfloat16", include="w")
left: tuple[str, ...] = done.left_out

wanted: np.dtype[Any] = vs.float32
flag: np.dtype[Any] = vs.bool
with vs.Session():
    weight = vs.get_variable("w", (2, 3), vs.float32, initializer=vs.glorot_uniform_initializer())
    vs.checkpoint.save("d", threads=1)
    vs.checkpoint.save("d", thread=1)  # wrong

try:
    vs.verify("a")
except vs.errors.DigestMismatch as error:
    where: str | None = error.path

nothing = vs.nothing  # wrong
