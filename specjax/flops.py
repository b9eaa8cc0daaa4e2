"""Floating-point operations of a training step, counted from the sizes: what must be done, not what is done twice.

A matrix product of [m,k] and [k,n] counts 2mkn. Recomputation (`remat`) counts nothing, as in MFU (Chowdhery et al.
2022, PaLM, arXiv:2204.02311, appendix B). Norms, rotations and softmax are left out.
"""

import math
import re
from collections.abc import Container
from typing import Any

from flax import nnx

from specjax.models import Decoder, ModelConfig

# Dense bfloat16 operations per second of one device, by how its kind begins. Sources: cloud.google.com/tpu/docs (TPU7x
# has two devices a chip), NVIDIA's data sheets, without sparsity.
PEAKS = {
    "TPU v4": 2.75e14,
    "TPU v5 lite": 1.97e14,
    "TPU v5": 4.59e14,
    "TPU v6 lite": 9.18e14,
    "TPU7x": 1.1535e15,
    "NVIDIA A100": 3.12e14,
    "NVIDIA H100 PCIe": 7.56e14,
    "NVIDIA H100": 9.89e14,
    "NVIDIA H200": 9.89e14,
    "NVIDIA B200": 2.25e15,
    "NVIDIA L4": 1.21e14,
    "NVIDIA L40S": 3.62e14,
}


def peak(kind: str) -> float | None:
    """Operations a second of a device of this `device_kind` at most, or None where it is not known.

    >>> peak("TPU v5 lite"), peak("NVIDIA H100 80GB HBM3"), peak("cpu")
    (197000000000000.0, 989000000000000.0, None)
    """
    return next((PEAKS[name] for name in PEAKS if re.match(rf"{name}\b", kind)), None)


def of_step(model: Decoder, trainable: Container[Any], *, rows: int, length: int) -> float:
    """FLOPs of one step on rows of one document each.

    Forward and the gradient of activations are counted everywhere, the gradient of weights where they train: a frozen
    base costs 4 operations per weight and token, one that trains 6.

    Args:
      model: the model, which may be abstract.
      trainable: the paths of what trains.
      rows: of the whole batch.
      length: tokens per row.
    """
    config, tokens = model.config, rows * length
    trains = [leaf for path, leaf in nnx.to_flat_state(nnx.state(model)) if path in trainable]
    base = not all(isinstance(leaf, nnx.LoRAParam) for leaf in trains)
    share = config.experts_per_token / config.num_experts if config.num_experts else 1.0
    factors = 0.0
    for leaf in trains:
        axes = leaf.get_metadata("axes")
        if "lora_rank" in axes:
            adapters = leaf.shape[axes.index("adapter")] if "adapter" in axes else 1  # a row is one adapter's
            factors += math.prod(leaf.shape) / adapters * (share if "expert" in axes else 1.0)
    once = 2.0 * tokens * _weights_per_token(config)
    maps = once * (3 if base else 2) + 6.0 * tokens * factors
    return maps + 3 * rows * _attention(config, length)


def _weights_per_token(c: ModelConfig) -> float:
    """Weights that one token is multiplied by: those of its experts alone, and the output layer's."""
    found = float(c.embed_dim * c.vocab_size)
    for segment in c.segments:
        here = c.of(segment)
        blocks = {
            "dense": (3 if here.gate else 2) * here.mlp_dim,
            "experts": 3 * here.expert_dim * here.experts_per_token + here.num_experts,
        }
        added = 3 * here.per_layer[1] if here.per_layer else 0  # the layer's two maps, and its part of the model's
        found += segment.layers * here.embed_dim * (here.mixer_dim + blocks[segment.block] + added)
    return found


def _attention(c: ModelConfig, length: int) -> float:
    """FLOPs of all layers' scores and sums of one row, forward: causal, so that each query counts the keys it sees.

    Of a delta network those of its rule a token at a time, of which chunks make more.
    """
    found = 0.0
    for segment, span in zip(c.segments, c.spans, strict=True):
        here = c.of(segment)
        if here.delta:  # a token reads its state by its key and its query, and adds to it; and the convolution
            state = 6.0 * math.prod(here.delta.state) + 2.0 * here.delta.channels * here.delta.taps
            found += segment.layers * length * state
            continue
        kinds = [here.layer_kinds[layer] for layer in span] if here.layer_kinds else [0] * segment.layers
        found += sum(4.0 * here.num_heads * here.head_dim * _pairs(length, here.windows[kind]) for kind in kinds)
    return found


def _pairs(length: int, window: int | None) -> int:
    """How many keys all queries of a document see.

    >>> _pairs(4, None), _pairs(4, 2)
    (10, 7)
    """
    wide = min(length, window or length)
    return wide * (wide + 1) // 2 + (length - wide) * wide
