"""The workloads: variables like those of typical models."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import ml_dtypes
import numpy as np

from tools.bench.trained import TRAINED

Arrays = dict[str, np.ndarray]


def large(scale: float) -> Arrays:
    """16 arrays of 64 MiB."""
    return {f"layer{i:02d}.weight": _random(i, (4096, 4096)) for i in range(max(2, round(16 * scale)))}


def gpt2(scale: float) -> Arrays:
    """GPT-2 small: its 148 variables, about 0.5 GB; `scale` reduces the number of layers."""
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


def shards(scale: float) -> Arrays:
    """3,000 arrays of 4 KiB."""
    return small(0.3 * scale)


def lora(scale: float) -> Arrays:
    """GPT-2 small with about 5 % of its bytes changed since the last save, in the attention projections."""
    arrays = dict(gpt2(scale))
    budget = 0.05 * sum(array.nbytes for array in arrays.values())
    for name, array in arrays.items():
        if name.endswith("attn.c_proj.weight") and (budget := budget - array.nbytes) > 0:
            arrays[name] = array + np.float32(1)
    return arrays


def resnet(scale: float) -> Arrays:
    """ResNet-101 with 18 channels instead of 64: its 626 variables, 16 MB; `scale` reduces the number of blocks."""
    arrays: Arrays = {}
    for i, (name, shape) in enumerate(_resnet_shapes(18, scale)):
        is_counter = name.endswith("num_batches_tracked")
        arrays[name] = np.array(i, np.int64) if is_counter else _random(i, shape)
    return arrays


def lm(scale: float) -> Arrays:
    """A language model of 32 Llama layers in bfloat16: 291 variables, 1.0 GB; `scale` reduces the layers."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (32000, 1024)}
    for layer in range(max(1, round(32 * scale))):
        shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in _LM_LAYER.items()}
    shapes |= {"model.norm.weight": (1024,), "lm_head.weight": (32000, 1024)}
    return {name: _random(i, shape).astype(ml_dtypes.bfloat16) for i, (name, shape) in enumerate(shapes.items())}


WORKLOADS: dict[str, Callable[[float], Arrays]] = {
    "large": large,
    "gpt2": gpt2,
    "small": small,
    "shards": shards,
    "lora": lora,
    "resnet": resnet,
    "lm": lm,
    **TRAINED,
}
MOSTLY_CALLS = ("small", "resnet")
"""Workloads with variables so small that the time depends on system calls, not on bytes."""

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

_LM_LAYER: dict[str, tuple[int, ...]] = {
    "input_layernorm": (1024,),
    "self_attn.q_proj": (1024, 1024),
    "self_attn.k_proj": (256, 1024),
    "self_attn.v_proj": (256, 1024),
    "self_attn.o_proj": (1024, 1024),
    "post_attention_layernorm": (1024,),
    "mlp.gate_proj": (3584, 1024),
    "mlp.up_proj": (3584, 1024),
    "mlp.down_proj": (1024, 3584),
}


def _resnet_shapes(width: int, scale: float) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the name and shape of each entry of torchvision's state_dict."""
    yield from _convolution("", "conv1", "bn1", (width, 3, 7, 7))
    inputs = width
    for i, blocks in enumerate((3, 4, 23, 3)):
        planes = width << i
        for block in range(max(1, round(blocks * scale))):
            prefix = f"layer{i + 1}.{block}."
            yield from _convolution(prefix, "conv1", "bn1", (planes, inputs, 1, 1))
            yield from _convolution(prefix, "conv2", "bn2", (planes, planes, 3, 3))
            yield from _convolution(prefix, "conv3", "bn3", (4 * planes, planes, 1, 1))
            if block == 0:
                yield from _convolution(prefix, "downsample.0", "downsample.1", (4 * planes, inputs, 1, 1))
            inputs = 4 * planes
    yield "fc.weight", (1000, inputs)
    yield "fc.bias", (1000,)


def _convolution(
    prefix: str, convolution: str, norm: str, shape: tuple[int, ...]
) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{prefix}{convolution}.weight", shape
    for name in ("weight", "bias", "running_mean", "running_var"):
        yield f"{prefix}{norm}.{name}", shape[:1]
    yield f"{prefix}{norm}.num_batches_tracked", ()


def _random(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)
