"""The sizes of a decoder and the switches of its mathematics."""

import dataclasses

from specjax.models.rope import Rope


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """What a decoder needs to know.

    Attributes:
      windows: the sliding window of each kind of attention layer, None for all keys; most models have one kind.
      ropes: the rotary frequencies, one for every kind of layer or one for all.
      layer_kinds: which kind each layer is; None where there is one kind.
      norms: where a layer's norms stand: "pre" (before each block), "post" (after it, OLMo-2) or "sandwich" (both).
      norm_style: "llama" (w * cast(x)), "olmo2" (cast(w * x)) or "gemma" (cast((1 + w) * x)).
      qk_norm: "" (none), "head" (each head of q and k is normed, Qwen3) or "all" (all heads as one vector, OLMo-2).
      fused: q, k, v are one linear map, and gate, up are another (Phi-3).
      query_scale: of the attention scores.
      attention_softcap: c of c * tanh(scores / c); None: none. So is `logits_softcap`.
      embed_scale: multiplies embeddings, in the compute dtype; `residual_scale` what each block adds; the logits are
        divided by `logits_divisor`.
      num_experts: 0 for a dense MLP; `expert_dim` is an expert's inner size, and the next two are those of `MoE`.
      router_aux_coef: of the balancing loss, 0 unless the config's `output_router_logits` asks for it, as transformers.
    """

    family: str
    vocab_size: int
    embed_dim: int
    mlp_dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    norm_eps: float
    ropes: tuple[Rope, ...]
    query_scale: float
    windows: tuple[int | None, ...] = (None,)
    layer_kinds: tuple[int, ...] | None = None
    activation: str = "silu"
    norms: str = "pre"
    norm_style: str = "llama"
    qk_norm: str = ""
    fused: bool = False
    tied: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    attention_softcap: float | None = None
    logits_softcap: float | None = None
    embed_scale: float = 1.0
    residual_scale: float = 1.0
    logits_divisor: float = 1.0
    num_experts: int = 0
    experts_per_token: int = 0
    expert_dim: int = 0
    normalise_experts: bool = True
    round_expert_weights: bool = False
    router_aux_coef: float = 0.0
