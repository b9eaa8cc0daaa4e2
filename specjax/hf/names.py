"""The one table between our parameters and Hugging Face's tensors, read in both directions.

Conversion is rename, transpose, reshape, stack: nothing is permuted, nothing folded. A row says

    our path (its leading "layers." is the stacked axis)  |  HF name ({} is the layer)  |  kind

and the kind how one layer's array lies in the file:

    kernel/1, kernel/2   ours [*in, *out] with 1 or 2 input axes  <->  HF [prod(out), prod(in)]
    flat                 ours [*shape]                            <->  HF [prod(shape)]
    table                the same shape on both sides
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from specjax.models import ModelConfig

_LAYER = "layers."

_LLAMA = (
    ("embed_tokens.embedding", "model.embed_tokens.weight", "table"),
    ("layers.input_layernorm.scale", "model.layers.{}.input_layernorm.weight", "flat"),
    ("layers.self_attn.q_proj.kernel", "model.layers.{}.self_attn.q_proj.weight", "kernel/1"),
    ("layers.self_attn.k_proj.kernel", "model.layers.{}.self_attn.k_proj.weight", "kernel/1"),
    ("layers.self_attn.v_proj.kernel", "model.layers.{}.self_attn.v_proj.weight", "kernel/1"),
    ("layers.self_attn.o_proj.kernel", "model.layers.{}.self_attn.o_proj.weight", "kernel/2"),
    ("layers.self_attn.q_proj.bias", "model.layers.{}.self_attn.q_proj.bias", "flat"),
    ("layers.self_attn.k_proj.bias", "model.layers.{}.self_attn.k_proj.bias", "flat"),
    ("layers.self_attn.v_proj.bias", "model.layers.{}.self_attn.v_proj.bias", "flat"),
    ("layers.self_attn.o_proj.bias", "model.layers.{}.self_attn.o_proj.bias", "flat"),
    ("layers.post_attention_layernorm.scale", "model.layers.{}.post_attention_layernorm.weight", "flat"),
    ("layers.mlp.gate_proj.kernel", "model.layers.{}.mlp.gate_proj.weight", "kernel/1"),
    ("layers.mlp.up_proj.kernel", "model.layers.{}.mlp.up_proj.weight", "kernel/1"),
    ("layers.mlp.down_proj.kernel", "model.layers.{}.mlp.down_proj.weight", "kernel/1"),
    ("layers.mlp.gate_proj.bias", "model.layers.{}.mlp.gate_proj.bias", "flat"),
    ("layers.mlp.up_proj.bias", "model.layers.{}.mlp.up_proj.bias", "flat"),
    ("layers.mlp.down_proj.bias", "model.layers.{}.mlp.down_proj.bias", "flat"),
    ("norm.scale", "model.norm.weight", "flat"),
    ("lm_head.kernel", "lm_head.weight", "kernel/1"),
)

TABLES = {"llama": _LLAMA, "mistral": _LLAMA}

# Tensors that old checkpoints carry and no model needs: rotary frequencies are computed.
IGNORED_SUFFIXES = (".rotary_emb.inv_freq",)


@dataclasses.dataclass(frozen=True)
class Entry:
    """One of our parameters and the HF tensors that it is: one, or one a layer."""

    path: str
    hf: str
    kind: str

    @property
    def stacked(self) -> bool:
        """Whether the parameter has a leading layer axis."""
        return self.path.startswith(_LAYER)

    def hf_names(self, num_layers: int) -> list[str]:
        """The tensors' names, by layer."""
        return [self.hf.format(i) for i in range(num_layers)] if self.stacked else [self.hf]

    def hf_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The HF tensor's shape, from one layer's shape of ours."""
        return hf_shape(shape, self.kind)


def entries(config: ModelConfig, paths: Sequence[str]) -> list[Entry]:
    """The rows for the parameters that a model has.

    Raises:
      KeyError: a parameter without a row (a bug: the table is complete for its family).
    """
    rows = {path: Entry(path, hf, kind) for path, hf, kind in TABLES[config.family]}
    return [rows[path] for path in paths]


def hf_shape(shape: Sequence[int], kind: str) -> tuple[int, ...]:
    """The HF tensor's shape, from one layer's shape of ours.

    >>> hf_shape((64, 8, 16), "kernel/1"), hf_shape((8, 16, 64), "kernel/2"), hf_shape((8, 16), "flat")
    ((128, 64), (64, 128), (128,))
    """
    if kind == "table":
        return tuple(shape)
    if kind == "flat":
        return (math.prod(shape),)
    split = int(kind.removeprefix("kernel/"))
    return (math.prod(shape[split:]), math.prod(shape[:split]))


def to_hf(array: np.ndarray, kind: str) -> np.ndarray:
    """One layer's array of ours as the file holds it."""
    if kind.startswith("kernel"):
        return array.reshape(hf_shape(array.shape, kind)[::-1]).T
    return array.reshape(hf_shape(array.shape, kind))


def from_hf(array: np.ndarray, kind: str, shape: Sequence[int]) -> np.ndarray:
    """The inverse of `to_hf`, for one layer's `shape` (or that of a slice of it)."""
    return (array.T if kind.startswith("kernel") else array).reshape(shape)


def hf_slice(index: tuple[slice, ...], shape: Sequence[int], kind: str) -> tuple[slice, ...]:
    """The slice of the HF tensor that holds the slice `index` of one layer's array of ours.

    Axes that HF merges can be split along the first of them alone, so that the slice stays one range.

    >>> hf_slice((slice(0, 32), slice(2, 4), slice(None)), (64, 8, 16), "kernel/1")
    (slice(32, 64, None), slice(0, 32, None))
    """
    if kind == "table":
        return tuple(slice(*i.indices(n)[:2]) for i, n in zip(index, shape, strict=True))
    split = int(kind.removeprefix("kernel/")) if kind.startswith("kernel") else 0
    merged = [_merge(index[:split], shape[:split]), _merge(index[split:], shape[split:])]
    return (merged[1],) if kind == "flat" else (merged[1], merged[0])


def _merge(index: tuple[slice, ...], shape: Sequence[int]) -> slice:
    bounds = [i.indices(n)[:2] for i, n in zip(index, shape, strict=True)]
    if any(bound != (0, n) for bound, n in zip(bounds[1:], shape[1:], strict=True)):
        raise ValueError(f"slice {index} of {tuple(shape)} is not one range of its merged axes")
    inner = math.prod(shape[1:])
    return slice(bounds[0][0] * inner, bounds[0][1] * inner) if bounds else slice(0, 1)
