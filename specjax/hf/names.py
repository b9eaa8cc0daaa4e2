"""The one table between our parameters and Hugging Face's tensors, read in both directions.

Conversion is rename, reshape, stack: nothing is transposed, permuted or folded. A row says

    our path  |  HF name, one {} for each stacked axis of ours, outermost first: the layer, then the expert  |  kind

Our path is without the segment's number; which of the file's layers are a segment's, `ModelConfig.spans` says. The kind
says how one tensor of the stack lies in the file:

    kernel/1, kernel/2   ours [*out, *in] with 1 or 2 input axes  <->  HF [prod(out), prod(in)]
    flat                 ours [*shape]                            <->  HF [prod(shape)]
    table                the same shape on both sides
    pairs                ours [*shape, n, 2]  <->  HF [*shape, 2 n]

So a tensor of the file, in another shape, is ours (`view`): any slice of ours is a slice of that view.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from specjax.models import ModelConfig

Rows = tuple[tuple[str, str, str], ...]
Path = tuple[str | int, ...]  # of NNX: ("layers", segment, "mlp", "up_proj", "kernel")


def _maps(block: str, names: str, kind: str = "kernel/1", hf: str = "") -> Rows:
    """The rows of linear maps of each layer, with a bias where the config has them; `hf`: the file's names."""
    theirs, *called = hf.split() or (block, *names.split())
    at = [
        (f"layers.{block}.{name}", f"model.layers.{{}}.{theirs}.{other}")
        for name, other in zip(names.split(), called, strict=True)
    ]
    kernels = tuple((f"{ours}.kernel", f"{there}.weight", kind) for ours, there in at)
    return kernels + tuple((f"{ours}.bias", f"{there}.bias", "flat") for ours, there in at)


def _norms(names: str, hf: str = "") -> Rows:
    """The rows of norms of each layer; `hf`: their names in the file where they are others."""
    pairs = zip(names.split(), (hf or names).split(), strict=True)
    return tuple((f"layers.{name}.scale", f"model.layers.{{}}.{there}.weight", "flat") for name, there in pairs)


_ENDS: Rows = (
    ("embed_tokens.embedding", "model.embed_tokens.weight", "table"),
    ("norm.scale", "model.norm.weight", "flat"),
    ("lm_head.kernel", "lm_head.weight", "kernel/1"),
)
_ATTENTION = _maps("self_attn", "q_proj k_proj v_proj") + _maps("self_attn", "o_proj", "kernel/2")
_MLP = _maps("mlp", "gate_proj up_proj down_proj")
_QK_NORMS = _norms("self_attn.q_norm self_attn.k_norm")
_PRE = _norms("input_layernorm post_attention_layernorm")
_POST = _norms("post_attention_layernorm post_feedforward_layernorm")
_FOUR = "input_layernorm post_attention_layernorm pre_feedforward_layernorm post_feedforward_layernorm"
_SANDWICH = _norms(_FOUR)
_XIELU = (("alpha_p", "flat"), ("alpha_n", "flat"), ("beta", "table"), ("eps", "table"))


def _experts(router: str, expert: str) -> Rows:
    """The rows of a mixture of experts; `expert` is the name of an expert's gate, up and down map in the file."""
    ours, hf = "layers.mlp.experts", "model.layers.{}"
    maps = zip(("gate_proj", "up_proj", "down_proj"), expert.split(), strict=True)
    kernels = tuple(
        (f"{ours}.{name}.kernel", f"{hf}.{router}.experts.{{}}.{at}.weight", "kernel/1") for name, at in maps
    )
    return (("layers.mlp.gate.kernel", f"{hf}.{router}.gate.weight", "kernel/1"), *kernels)


_CLAMPED_EXPERTS: Rows = (
    ("layers.mlp.gate.kernel", "model.layers.{}.mlp.router.weight", "kernel/1"),
    ("layers.mlp.gate.bias", "model.layers.{}.mlp.router.bias", "flat"),
    ("layers.mlp.experts.gate_up_proj.kernel", "model.layers.{}.mlp.experts.gate_up_proj", "pairs"),
    ("layers.mlp.experts.gate_up_proj.bias", "model.layers.{}.mlp.experts.gate_up_proj_bias", "pairs"),
    ("layers.mlp.experts.down_proj.kernel", "model.layers.{}.mlp.experts.down_proj", "table"),
    ("layers.mlp.experts.down_proj.bias", "model.layers.{}.mlp.experts.down_proj_bias", "table"),
)
_LLAMA = _ENDS + _PRE + _ATTENTION + _MLP
_PER_LAYER: Rows = (
    ("per_layer.table", "model.embed_tokens_per_layer.weight", "table"),
    ("per_layer.projection.kernel", "model.per_layer_model_projection.weight", "kernel/1"),
    ("per_layer.norm.scale", "model.per_layer_projection_norm.weight", "flat"),
    ("layers.per_layer.gate.kernel", "model.layers.{}.per_layer_input_gate.weight", "kernel/1"),
    ("layers.per_layer.projection.kernel", "model.layers.{}.per_layer_projection.weight", "kernel/1"),
    ("layers.per_layer.norm.scale", "model.layers.{}.post_per_layer_input_norm.weight", "flat"),
)
_DELTA: Rows = (
    *_maps("linear_attn", "in_proj_qkv in_proj_z in_proj_b in_proj_a"),
    *_maps("linear_attn", "out_proj", "kernel/2"),
    *_norms("linear_attn.norm"),
    ("layers.linear_attn.conv1d", "model.layers.{}.linear_attn.conv1d.weight", "table"),
    ("layers.linear_attn.A_log", "model.layers.{}.linear_attn.A_log", "flat"),
    ("layers.linear_attn.dt_bias", "model.layers.{}.linear_attn.dt_bias", "flat"),
)
_GEMMA2 = _ENDS + _SANDWICH + _ATTENTION + _MLP

TABLES = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "ministral3": _LLAMA,
    "smollm3": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA + _QK_NORMS,
    "qwen3_5": _LLAMA + _QK_NORMS + _DELTA,
    "gemma": _LLAMA,
    "gemma2": _GEMMA2,
    "gemma3": _GEMMA2 + _QK_NORMS,
    "gemma4": _GEMMA2 + _QK_NORMS + _PER_LAYER + (("layers.layer_scalar", "model.layers.{}.layer_scalar", "flat"),),
    "phi3": _ENDS
    + _PRE
    + _maps("self_attn", "qkv_proj")
    + _maps("self_attn", "o_proj", "kernel/2")
    + _maps("mlp", "gate_up_proj down_proj"),
    "olmo2": _ENDS + _POST + _ATTENTION + _QK_NORMS + _MLP,
    "olmo3": _ENDS + _POST + _ATTENTION + _QK_NORMS + _MLP,
    "granite": _LLAMA,
    "granite4": _ENDS
    + _PRE
    + _ATTENTION
    + _maps("mlp", "gate_up_proj down_proj", hf="shared_mlp input_linear output_linear"),
    "glm4": _ENDS
    + _norms(_FOUR, hf="input_layernorm post_self_attn_layernorm post_attention_layernorm post_mlp_layernorm")
    + _ATTENTION
    + _maps("mlp", "gate_up_proj down_proj"),
    "apertus": _ENDS
    + _norms("input_layernorm post_attention_layernorm", hf="attention_layernorm feedforward_layernorm")
    + _ATTENTION
    + _QK_NORMS
    + _maps("mlp", "up_proj down_proj")
    + tuple((f"layers.mlp.act_fn.{name}", f"model.layers.{{}}.mlp.act_fn.{name}", kind) for name, kind in _XIELU),
    "mixtral": _ENDS + _PRE + _ATTENTION + _experts("block_sparse_moe", "w1 w3 w2"),
    "gpt_oss": _ENDS
    + _PRE
    + _ATTENTION
    + (("layers.self_attn.sinks", "model.layers.{}.self_attn.sinks", "flat"),)
    + _CLAMPED_EXPERTS,
    "qwen3_moe": _ENDS + _PRE + _ATTENTION + _QK_NORMS + _MLP + _experts("mlp", "gate_proj up_proj down_proj"),
}

# Tensors that old checkpoints carry and no model needs: rotary frequencies are computed.
IGNORED_SUFFIXES = (".rotary_emb.inv_freq",)


@dataclasses.dataclass(frozen=True)
class Entry:
    """One of our parameters and the HF tensors that it is: one, one a layer, or one a layer and expert.

    Attributes:
      path: ours.
      hf: the tensors' name, with a {} for each axis that counts them.
      kind: how one of them lies in the file.
      first: the number of the first layer, where the first of those axes counts layers.
      step: how far it is to the next one.
    """

    path: Path
    hf: str
    kind: str
    first: int = 0
    step: int = 1

    @property
    def stacked(self) -> int:
        """How many leading axes of the parameter count HF tensors."""
        return self.hf.count("{}")

    def tensors(self, shape: Sequence[int]) -> Iterator[tuple[tuple[int, ...], str]]:
        """The place in the stack and the name of every HF tensor, from the parameter's whole shape.

        >>> list(Entry(("norm", "scale"), "model.norm.weight", "flat").tensors((64,)))
        [((), 'model.norm.weight')]
        >>> [name for _, name in Entry(("w",), "layers.{}.experts.{}.w1", "kernel/1", first=3).tensors((2, 2, 8, 4))]
        ['layers.3.experts.0.w1', 'layers.3.experts.1.w1', 'layers.4.experts.0.w1', 'layers.4.experts.1.w1']
        """
        for place in itertools.product(*map(range, shape[: self.stacked])):
            yield place, self.hf.format(*(place[:1] and (self.first + self.step * place[0], *place[1:])))

    def hf_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of each HF tensor, from the parameter's whole shape."""
        return hf_shape(shape[self.stacked :], self.kind)


def entries(config: ModelConfig, paths: Sequence[Path]) -> list[Entry]:
    """The rows for the parameters that a model has.

    Raises:
      KeyError: a parameter without a row (a bug: the table is complete for its family).
    """
    rows = {tuple(path.split(".")): (hf, kind) for path, hf, kind in TABLES[config.family]}

    def entry(path: Path) -> Entry:
        segments = [part for part in path if isinstance(part, int)]  # one, of a layer's parameter
        hf, kind = rows[tuple(part for part in path if isinstance(part, str))]
        span = config.spans[segments[0]] if segments else range(1)
        return Entry(path, hf, kind, span.start, span.step)

    return [entry(path) for path in paths]


def unused(config: ModelConfig) -> set[str]:
    """Tensors that files may have and no model reads: those of layers that take their keys and values from others."""
    pairs = zip(config.segments, config.spans, strict=True)
    shared = [layer for segment, span in pairs if config.of(segment).shares for layer in span]
    maps = ("k_proj", "v_proj", "k_norm", "v_norm")
    return {f"model.layers.{layer}.self_attn.{name}.weight" for layer in shared for name in maps}


def further(config: ModelConfig) -> str:
    """How the names begin of tensors that predict tokens beyond the next: they are kept as they are. "": none are."""
    return "mtp." if config.family == "qwen3_5" else ""


def hf_shape(shape: Sequence[int], kind: str) -> tuple[int, ...]:
    """The HF tensor's shape, from that of ours without its stacked axes.

    >>> hf_shape((8, 16, 64), "kernel/1"), hf_shape((64, 8, 16), "kernel/2"), hf_shape((8, 16), "flat")
    ((128, 64), (64, 128), (128,))
    """
    if kind == "table":
        return tuple(shape)
    if kind == "pairs":
        return (*shape[:-2], 2 * shape[-2])
    if kind == "flat":
        return (math.prod(shape),)
    split = len(shape) - int(kind.removeprefix("kernel/"))
    return (math.prod(shape[:split]), math.prod(shape[split:]))


def to_hf(array: Any, kind: str) -> Any:
    """One tensor of ours, of NumPy or JAX and without stacked axes, as the file holds it; the inverse of `view`."""
    return array.reshape(hf_shape(array.shape, kind))


def view(array: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """A tensor of the file seen as ours, without its stacked axes: the same memory.

    A slice of the view of a memory-mapped file touches the pages of that slice alone. Written to, it is the inverse.

    Args:
      array: C-contiguous, of the HF tensor's shape.
      shape: that of ours, `hf_shape(shape, kind) == array.shape` with the row's kind.
    """
    return array.reshape(shape, copy=False)
