"""The sizes of a decoder and the switches of its mathematics."""

import dataclasses
import functools
import itertools
from collections.abc import Iterable
from typing import Any, NamedTuple

from specjax.models.rope import Rope


class Segment(NamedTuple):
    """Equal layers, a stack of parameters: a run of them, or every `period`-th.

    Attributes:
      block: what stands behind a layer's attention: "dense" (an MLP) or "experts" (a mixture of them).
      layers: how many layers.
      changes: the fields of `ModelConfig` in which these layers differ from the model's, with their values.
      period: how far one layer is from the next. So many segments beside each other, each with a layer of every
        period, are one scan over the periods.
    """

    block: str
    layers: int
    changes: tuple[tuple[str, Any], ...] = ()
    period: int = 1


class Delta(NamedTuple):
    """The sizes of a gated delta network (`specjax.models.delta`)."""

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    taps: int

    @property
    def channels(self) -> int:
        """Of q, k and v together, which the convolution is of."""
        return 2 * self.key_heads * self.key_dim + self.value_heads * self.value_dim

    @property
    def state(self) -> tuple[int, int, int]:
        """The shape of a row's state."""
        return self.value_heads, self.key_dim, self.value_dim


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """What a decoder needs to know.

    Attributes:
      segments: the layers, from the first to the last; most models have one segment.
      windows: the sliding window of each kind of attention layer, None for all keys; most models have one kind.
      ropes: the rotary frequencies, one for every kind of layer or one for all.
      layer_kinds: which kind each layer is; None where there is one kind.
      norms: where a layer's norms stand: "pre" (before each block), "post" (after it, OLMo-2) or "sandwich" (both).
      norm_style: "llama" (w * cast(x)), "olmo2" (cast(w * x)) or "gemma" (cast((1 + w) * x)).
      qk_norm: "" (none), "head" (each head of q and k is normed, Qwen3) or "all" (all heads as one vector, OLMo-2).
      fused_qkv: q, k, v are one linear map (Phi-3).
      gate: of the MLP: "apart" (beside up), "fused" (gate and up are one map) or "" (none: down(act(up(x))), Apertus).
      interleaved: neighbouring dimensions of a head rotate together (GLM-4), instead of its halves.
      multimodal: it is the language model of a checkpoint that has more, which names its modules otherwise.
      query_scale: of the attention scores.
      query_growth: (beta, n): a query at position p is multiplied by 1 + beta ln(1 + floor(p / n)) too (Llama 4,
        Ministral 3); None: it is not.
      delta: a layer has a gated delta network in attention's place; None: it has attention.
      output_gate: q's map gives each head as many numbers more, whose sigmoid its output is multiplied by (Qwen 3.5).
      values: v has a map of its own; else it is what k's map gives, before its norm (Gemma 4).
      v_norm: each head of v is normed, by no scale.
      keeps: the name under which a layer's keys and values are kept for layers behind it, whose `shares` is that name
        and which have none of their own; "": neither.
      layer_scalar: what a layer gives is multiplied by a number of its file.
      per_layer: (V, P): every layer adds something made of P features of each token, an embedding of its own with a
        vocabulary of V and a map of the embedding (Gemma 4, "PLE"); None: none does.
      sinks: each head has a score that stands beside those of the keys, and no value (gpt-oss).
      attention_softcap: c of c * tanh(scores / c); None: none. So is `logits_softcap`.
      embed_scale: multiplies embeddings, in the compute dtype; `residual_scale` what each block adds; the logits are
        divided by `logits_divisor`.
      num_experts: of a layer that has experts, 0 where none has; `expert_dim` is an expert's inner size, and the next
        two and `clamp` are those of `MoE`.
      router_aux_coef: of the balancing loss, 0 unless the config's `output_router_logits` asks for it, as transformers.
    """

    family: str
    vocab_size: int
    embed_dim: int
    mlp_dim: int
    segments: tuple[Segment, ...]
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    norm_eps: float
    ropes: tuple[Rope, ...]
    query_scale: float
    query_growth: tuple[float, int] | None = None
    windows: tuple[int | None, ...] = (None,)
    layer_kinds: tuple[int, ...] | None = None
    activation: str = "silu"
    norms: str = "pre"
    norm_style: str = "llama"
    qk_norm: str = ""
    fused_qkv: bool = False
    gate: str = "apart"
    interleaved: bool = False
    tied: bool = False
    multimodal: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    delta: Delta | None = None
    output_gate: bool = False
    values: bool = True
    v_norm: bool = False
    keeps: str = ""
    shares: str = ""
    layer_scalar: bool = False
    per_layer: tuple[int, int] | None = None
    sinks: bool = False
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
    clamp: tuple[float, float] | None = None
    router_aux_coef: float = 0.0

    @property
    def num_layers(self) -> int:
        """The layers of all segments."""
        return sum(segment.layers for segment in self.segments)

    def of(self, segment: Segment) -> "ModelConfig":
        """What a segment's layers need to know."""
        return dataclasses.replace(self, **dict(segment.changes)) if segment.changes else self

    @property
    def mixer_dim(self) -> int:
        """How many numbers for each of `embed_dim` the maps of a layer's attention have, or of what has its place."""
        if self.delta:
            return self.delta.channels + 2 * self.delta.value_heads * (self.delta.value_dim + 1)
        keys = 0 if self.shares else (1 + self.values) * self.num_kv_heads
        return self.head_dim * ((2 + self.output_gate) * self.num_heads + keys)

    @property
    def cache_shapes(self) -> tuple[tuple[int, ...], ...]:
        """(layers, kv heads, head_dim) of each cache of keys and values: one for all layers that are alike in them.

        Of layers with a delta network it is (layers, *delta).
        """
        return self._caches[0]

    @property
    def homes(self) -> tuple[tuple[int, int], ...]:
        """Of each segment the number of its cache and its first layer's place there, or that of the layer it shares."""
        return self._caches[1]

    @functools.cached_property
    def _caches(self) -> tuple[tuple[tuple[int, ...], ...], tuple[tuple[int, int], ...]]:
        counts: dict[tuple[int, ...], int] = {}
        kept: dict[str, tuple[int, int]] = {}
        homes = []
        for segment in self.segments:
            here = self.of(segment)
            if here.shares:
                homes.append(kept[here.shares])
                continue
            shape = here.delta or (here.num_kv_heads, here.head_dim)
            first = counts.setdefault(shape, 0)
            homes.append((list(counts).index(shape), first))
            counts[shape] += segment.layers
            kept[here.keeps] = homes[-1]
        return tuple((layers, *shape) for shape, layers in counts.items()), tuple(homes)

    @property
    def spans(self) -> tuple[range, ...]:
        """The numbers of each segment's layers, counted over all of them."""
        found: list[range] = []
        for first, *others in self.scans:
            start, layers, period = found[-1][-1] + 1 if found else 0, *self.segments[first][1::2]
            found += [range(start + at, start + layers * period, period) for at in range(1 + len(others))]
        return tuple(found)

    @property
    def scans(self) -> tuple[range, ...]:
        """The numbers of the segments that are scanned together: one, or as many as a period has layers."""
        found, start = [], 0
        while start < len(self.segments):
            found.append(range(start, start + self.segments[start].period))
            start = found[-1].stop
        return tuple(found)


def segments(
    blocks: Iterable[str], changes: Iterable[tuple[tuple[str, Any], ...]] | None = None, *, periodic: bool = False
) -> tuple[Segment, ...]:
    """The segments of layers with these blocks, and with the changes of each, in order.

    Args:
      blocks: of each layer.
      changes: of each layer; default none.
      periodic: a model whose layers are the same few again and again has a segment for each of those few.

    >>> segments(["dense", "experts", "experts"])
    (Segment(block='dense', layers=1, changes=(), period=1), Segment(block='experts', layers=2, changes=(), period=1))
    >>> [each.layers for each in segments(["dense", "experts"] * 3, periodic=True)]
    [3, 3]
    """
    pairs = [*(zip(blocks, itertools.repeat(())) if changes is None else zip(blocks, changes, strict=True))]
    if periodic:
        whole = len(pairs)
        period = next(n for n in range(1, whole + 1) if whole % n == 0 and pairs[:n] * (whole // n) == pairs)
        if 1 < period < whole:
            return tuple(Segment(block, whole // period, change, period) for block, change in pairs[:period])
    return tuple(Segment(block, len(list(run)), change) for (block, change), run in itertools.groupby(pairs))
