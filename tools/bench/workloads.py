"""The variables that are saved and loaded: four models that stand for what people have."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Arrays = dict[str, np.ndarray]


def large(scale: float) -> Arrays:
    """16 arrays of 64 MiB."""
    return {f"layer{i:02d}.weight": _random(i, (4096, 4096)) for i in range(max(2, round(16 * scale)))}


def gpt2(scale: float) -> Arrays:
    """GPT-2 small: its 148 shapes, about 0.5 GB; `scale` takes fewer layers."""
    shapes: dict[str, tuple[int, ...]] = {"wte.weight": (50257, 768), "wpe.weight": (1024, 768)}
    for layer in range(max(1, round(12 * scale))):
        shapes |= {f"h.{layer}.{name}": shape for name, shape in _GPT2_LAYER.items()}
    shapes |= {"ln_f.weight": (768,), "ln_f.bias": (768,)}
    return {name: _random(i, shape) for i, (name, shape) in enumerate(shapes.items())}


def small(scale: float) -> Arrays:
    """10,000 arrays of 4 KiB."""
    count = max(100, round(10_000 * scale))
    values = _random(0, (count, 1024))
    return {f"layer{i:05d}.weight": values[i].copy() for i in range(count)}


def lora(scale: float) -> Arrays:
    """GPT-2 small of which about 5 % of the bytes changed since the last save: the attention projections."""
    arrays = dict(gpt2(scale))
    budget = 0.05 * sum(array.nbytes for array in arrays.values())
    for name, array in arrays.items():
        if name.endswith("attn.c_proj.weight") and (budget := budget - array.nbytes) > 0:
            arrays[name] = array + np.float32(1)
    return arrays


WORKLOADS: dict[str, Callable[[float], Arrays]] = {"large": large, "gpt2": gpt2, "small": small, "lora": lora}

_GPT2_LAYER: dict[str, tuple[int, ...]] = {
    "ln_1.weight": (768,),
    "ln_1.bias": (768,),
    "attn.c_attn.weight": (768, 2304),
    "attn.c_attn.bias": (2304,),
    "attn.c_proj.weight": (768, 768),
    "attn.c_proj.bias": (768,),
    "ln_2.weight": (768,),
    "ln_2.bias": (768,),
    "mlp.c_fc.weight": (768, 3072),
    "mlp.c_fc.bias": (3072,),
    "mlp.c_proj.weight": (3072, 768),
    "mlp.c_proj.bias": (768,),
}


def _random(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)
