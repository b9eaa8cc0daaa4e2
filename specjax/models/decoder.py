"""One decoder-only transformer for every supported family; equal layers in a row are stacked and scanned.

B batch, T length, S cache length, D embed, V vocab, L layers (of a segment; of all in a cache), K kv heads, H head_dim.
"""

import functools
import math
from collections.abc import Callable, Sequence
from types import EllipsisType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jaxtyping import Float, Float32, Int32

from specjax import sharding
from specjax.models import rope
from specjax.models.adapter import check_slots, in_use, select
from specjax.models.attention import NAME, Cache, Caches, OneOf
from specjax.models.config import Delta, ModelConfig
from specjax.models.delta import GatedDeltaNet, States, no_states
from specjax.models.layers import MLP, Attention, Embed, Kept, Keys, Kind, Linear, RMSNorm, parameter
from specjax.models.moe import MoE, Stats
from specjax.models.origin import Origin
from specjax.models.per_layer import PerLayer, PerLayerInputs
from specjax.models.products import contract, exact_float32
from specjax.models.stack import Constant, fold_key, split_key

# What a layer keeps for the backward pass, by `remat`'s name; the rest it computes again.
POLICIES: dict[str, Callable[[], Any]] = {
    "full": lambda: None,
    "attention": lambda: jax.checkpoint_policies.save_only_these_names(NAME),
    "dots": lambda: jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "offload": lambda: jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[NAME],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}


class DecoderLayer(nnx.Module):
    """Attention and MLP, or a mixture of experts, with residuals; the norms stand where `config.norms` says."""

    def __init__(self, config: ModelConfig, block: str, *, layers: int | None, rngs: nnx.Rngs | None):
        before, after = config.norms in ("pre", "sandwich"), config.norms in ("post", "sandwich")

        def norm(there: bool) -> RMSNorm | None:
            given: dict[str, Any] = {"style": config.norm_style, "layers": layers, "rngs": rngs}
            return RMSNorm((config.embed_dim,), ("embed",), config.norm_eps, **given) if there else None

        self.residual_scale, self.after = config.residual_scale, after
        self.self_attn = None if config.delta else Attention(config, layers=layers, rngs=rngs)
        self.linear_attn = GatedDeltaNet(config, layers=layers, rngs=rngs) if config.delta else None
        experts = block == "experts"
        self.mlp = _experts(config, layers, rngs) if experts else MLP(config, layers=layers, rngs=rngs)
        # Hugging Face's names: post_attention_layernorm is the norm before the MLP where blocks are normed before only.
        self.input_layernorm, self.post_attention_layernorm = norm(before), norm(True)
        self.pre_feedforward_layernorm, self.post_feedforward_layernorm = norm(before and after), norm(after)
        self.per_layer = PerLayer(config, layers=layers, rngs=rngs) if config.per_layer else None
        scalar = parameter(nnx.initializers.ones, (1,), (None,), layers, rngs, kind=Constant)
        self.layer_scalar = scalar if config.layer_scalar else None

    def __call__(
        self,
        x: Float[Array, "B T D"],
        kind: Kind,
        where: dict[str, Any],
        cache: Cache | States | None = None,
        dropout_key: Array | None = None,
    ) -> tuple[Float[Array, "B T D"], Cache | States | None, Stats | None, Kept | None]:
        """The layer's output, the cache, the router's sums or None, and keys and values to keep; see `Attention`."""
        own = 5 if self.linear_attn else 4
        count = own + (5 if self.per_layer else 3)
        keys: Keys = (None,) * count if dropout_key is None else tuple(split_key(dropout_key, count))
        before_mlp = self.pre_feedforward_layernorm if self.after else self.post_attention_layernorm
        y, kept = _normed(self.input_layernorm, x), None
        if self.self_attn is not None:
            y, cache, kept = self.self_attn(y, kind, where, cache, keys[:own])
        elif self.linear_attn is not None:
            y, cache = self.linear_attn(y, where, cache, keys[:own])
        x = self._add(x, _normed(self.post_attention_layernorm, y) if self.after else y)
        stats = None
        if isinstance(self.mlp, MoE):
            y, stats = self.mlp(_normed(before_mlp, x), where["q_segments"] > 0)
        else:
            y = self.mlp(_normed(before_mlp, x), keys[own : own + 3])
        x = self._add(x, _normed(self.post_feedforward_layernorm, y))
        if self.per_layer is not None:
            x = self._add(x, self.per_layer(x, where["per_layer"], keys[own + 3 :]))
        if self.layer_scalar is not None:
            x = x * self.layer_scalar[0].astype(x.dtype)
        return x, cache, stats, kept

    def _add(self, x: jax.Array, y: jax.Array) -> jax.Array:
        y = y if self.residual_scale == 1 else y * self.residual_scale
        return sharding.constrain(x + y, "batch", "residual", None)


def _experts(config: ModelConfig, layers: int | None, rngs: nnx.Rngs | None) -> MoE:
    return MoE(
        embed_dim=config.embed_dim,
        mlp_dim=config.expert_dim,
        num_experts=config.num_experts,
        experts_per_token=config.experts_per_token,
        normalise=config.normalise_experts,
        round_weights=config.round_expert_weights,
        activation=config.activation,
        clamp=config.clamp,
        layers=layers,
        rngs=rngs,
        out_stddev=0.02 / math.sqrt(2 * config.num_layers),
    )


def _normed(norm: RMSNorm | None, x: jax.Array) -> jax.Array:
    return x if norm is None else norm(x)


class Decoder(nnx.Module):
    """A causal language model with Hugging Face's names and layout.

    Attributes:
      config: the sizes.
      dtype: the compute dtype; parameters are cast to it where they are used.
      remat: "none" keeps every activation; of `POLICIES`, "full" recomputes each layer in the backward pass,
        "attention" all but the attention's output, "dots" all but the linear maps' outputs, "offload" as "attention",
        whose output waits in the host's memory.
      adapters: the names of the loaded adapters; an adapter's place here is its slot (None: a slot that is free).
      origin: where its weights came from.
      documents: what a training or evaluation step knows of its batches: at most so many documents in a row, numbered
        from 1 with the padding behind, which `attend` may use; None: not known.
      groups: G, into how many equal groups of consecutive rows a batch falls, each with a loss of its own.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs | None, dtype: Any = jnp.float32, remat: str = "none"):
        self.config, self.dtype, self.remat = config, jnp.dtype(dtype), remat
        self.adapters: tuple[str | None, ...] = ()
        self.origin = Origin()
        self.documents: int | None = None
        self.groups = 1
        self.embed_tokens = Embed(config.vocab_size, config.embed_dim, rngs=rngs)
        self.layers = nnx.List(
            [
                DecoderLayer(config.of(segment), segment.block, layers=segment.layers, rngs=rngs)
                for segment in config.segments
            ]
        )
        self.per_layer = PerLayerInputs(config, rngs=rngs) if config.per_layer else None
        self.norm = RMSNorm((config.embed_dim,), ("embed",), config.norm_eps, style=config.norm_style, rngs=rngs)
        head = Linear((config.embed_dim,), (config.vocab_size,), ("embed",), ("vocab",), rngs=rngs)
        self.lm_head = None if config.tied else head

    def __call__(
        self,
        tokens: Int32[Array | np.ndarray, "B T"],
        positions: Int32[Array | np.ndarray, "B T"] | None = None,
        segment_ids: Int32[Array | np.ndarray, "B T"] | None = None,
        adapters: int | Sequence[int] | Int32[Array | np.ndarray, " G"] | EllipsisType | None = ...,
    ) -> Float32[Array, "B T V"]:
        """Logits of the next token.

        Args:
          tokens: the rows.
          positions: of the tokens, default 0..T-1.
          segment_ids: the document of each token in a packed row, 0 for padding; default all one document.
          adapters: which adapters answer, see `adapter.select`; default the one in use.

        Raises:
          UserError: no such adapters, or rows that do not divide into their groups.
        """
        grouped = adapters is not None and not isinstance(adapters, int | EllipsisType)
        slots = None
        if grouped:
            check_slots(self, adapters)
            slots = jnp.asarray(adapters, jnp.int32)
        model = self if grouped or adapters is ... else select(self, adapters)
        # Compiled once a shape: run eagerly, the scan over the layers would be compiled anew at every call.
        graph, state = nnx.split(model)
        return _logits(graph, state, tokens, positions, segment_ids, slots)

    def hidden(
        self,
        tokens: Int32[Array, "B T"],
        positions: Int32[Array, "B T"] | None = None,
        segment_ids: Int32[Array, "B T"] | None = None,
        dropout_key: Array | None = None,
    ) -> Float[Array, "B T D"]:
        """The last layer's normed output in the compute dtype; LoRA's dropout only where a key is given."""
        return self.hidden_and_stats(tokens, positions, segment_ids, dropout_key)[0]

    def hidden_and_stats(
        self,
        tokens: Int32[Array, "B T"],
        positions: Int32[Array, "B T"] | None = None,
        segment_ids: Int32[Array, "B T"] | None = None,
        dropout_key: Array | None = None,
    ) -> tuple[Float[Array, "B T D"], Stats | None]:
        """`hidden`, and the sums of all layers' routers for `moe.load_balancing_loss` (None for a dense model)."""
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
        if segment_ids is None:
            segment_ids = jnp.ones_like(tokens)
        where = {
            "q_positions": positions,
            "k_positions": positions,
            "q_segments": segment_ids,
            "k_segments": segment_ids,
            "documents": self.documents,
        }
        lengths = _document_lengths(positions, segment_ids) if self._needs_lengths else None
        with exact_float32(self.dtype):
            hidden, _, stats = self._run(tokens, where, lengths, None, dropout_key)
        return hidden, stats

    @property
    def _needs_lengths(self) -> bool:
        return any(r.kind == "longrope" for r in self.config.ropes)

    def empty_cache(self, batch: int, length: int) -> Caches:
        """Keys and values, or states, of no token yet: of each of `ModelConfig.cache_shapes`."""

        def one(layers: int, *sizes: int) -> Cache | States:
            if len(sizes) > 2:
                return no_states(layers, batch, Delta(*sizes), self.dtype)
            heads, dim = sizes
            shapes = (layers, batch, heads, dim, length), (layers, batch, heads, length, dim)
            keys, values = (jnp.zeros(shape, self.dtype) for shape in shapes)
            return keys, values

        return tuple(one(*shape) for shape in self.config.cache_shapes)

    def extend(
        self,
        tokens: Int32[Array, "B T"],
        positions: Int32[Array, "B T"],
        cache: Caches,
        cache_positions: Int32[Array, "B S"],
        cache_segments: Int32[Array, "B S"],
        slot: Int32[Array, ""] | int,
        lengths: Int32[Array, " B"] | None = None,
        layers: Sequence[Sequence[Any]] | None = None,
    ) -> tuple[Float[Array, "B T D"], Caches]:
        """Runs further tokens against a cache.

        Args:
          tokens: written to the cache slots slot..slot+T-1.
          positions: of the tokens.
          cache: of `empty_cache`.
          cache_positions: the position of the token in each slot, the new ones included.
          cache_segments: 1 for slots that hold a token (the new ones included), 0 otherwise.
          slot: the same for all rows: prompts of unequal length are padded on the left. A Python 0 says that the cache
            is empty, which spares the new tokens from looking there.
          lengths: the tokens of each text so far, which choose longrope's factors (Phi-3); default up to and with these
            tokens. What the cache holds was rotated by the choice of its own call.
          layers: the parameters of each layer of each segment, arrays of their own (`generate.unstacked`), which are
            then not scanned; default the slices of the stacked ones.

        Returns:
          (hidden, the extended cache).
        """
        where = {
            "q_positions": positions,
            "k_positions": cache_positions,
            "q_segments": jax.lax.dynamic_slice_in_dim(cache_segments, slot, tokens.shape[1], axis=1),
            "k_segments": cache_segments,
            "slot": slot,
        }
        if lengths is None:
            lengths = jnp.max(positions, axis=1) + 1
        with exact_float32(self.dtype):
            hidden, cache, _ = self._run(tokens, where, lengths[:, None], list(cache), None, layers)
        return hidden, cache

    def _run(
        self,
        tokens: jax.Array,
        where: dict[str, Any],
        lengths: jax.Array | None,
        caches: list[Any] | None,
        dropout_key: jax.Array | None,
        layers: Sequence[Sequence[Any]] | None = None,
    ) -> tuple[jax.Array, Any, Stats | None]:
        c = self.config
        x = self.embed_tokens(tokens, self.dtype)
        if c.embed_scale != 1:
            x = x * jnp.asarray(c.embed_scale, self.dtype)
        x = sharding.constrain(x, "batch", "residual", None)
        layer_keys = None if dropout_key is None else split_key(dropout_key, c.num_layers)
        of_layers = None
        if self.per_layer is not None:
            last = None if dropout_key is None else fold_key(dropout_key, c.num_layers)
            of_layers = self.per_layer(tokens, x, last)
        kinds = None if c.layer_kinds is None else np.array(c.layer_kinds, np.int32)
        kinds_of = functools.cache(lambda here: self._kinds(here, where["q_positions"], lengths))
        routed: list[Stats] = []
        kept: dict[str, Kept] = {}
        for scan in c.scans:
            runs: list[tuple[Callable[..., Any], int]] = []
            inputs: list[Any] = []
            for number in scan:
                # The module is split once; the scan's body sees one layer's slice of every stacked parameter. Without
                # remat, what is kept of a layer for the backward pass has no axis of adapters, as what is scanned.
                stack, span, here = self.layers[number], c.spans[number], c.of(c.segments[number])
                graph, stacked = nnx.split(in_use(stack) if layers is None and self.remat == "none" else stack)
                seen = where | {"shared": kept.get(here.shares)} if here.shares else where
                home, first = c.homes[number]
                runs.append((self._layer(graph, kinds_of(here), seen), home))
                numbers = [first + (0 if here.shares else place) for place in range(len(span))]
                at = slice(span.start, span.stop, span.step)
                mine: list[Any] = [None if each is None else each[at] for each in (layer_keys, kinds, of_layers)]
                if layers is None:
                    inputs.append((stacked, *mine, None if caches is None else np.array(numbers, np.int32)))
                else:
                    mine.append(None if caches is None else numbers)
                    states = enumerate(layers[number])
                    inputs.append(
                        [(one, *(each if each is None else each[place] for each in mine)) for place, one in states]
                    )
            # The cache is carried, not sliced and stacked like the parameters: a layer then writes its new slots in
            # place, each segment those of its own layers.
            held = {} if caches is None else {home: caches[home] for _, home in runs}
            period = functools.partial(_period, runs)
            if layers is None:
                (x, held), found = jax.lax.scan(period, (x, held), inputs)
                # A layer that keeps keys and values is a segment of its own.
                found = [(stats, jax.tree.map(lambda array: array[0], own)) for stats, own in found]
            else:
                for row in zip(*inputs, strict=True):
                    (x, held), found = period((x, held), row)
                found = [(None, own) for _, own in found]
            if caches is not None:
                for home, cache in held.items():
                    caches[home] = cache
            for number, (stats, own) in zip(scan, found, strict=True):
                if own is not None:
                    kept[c.of(c.segments[number]).keeps] = own
                if stats is not None:
                    routed.append(stats)
        joined = jax.tree.map(lambda *each: jnp.concatenate(each), *routed) if len(routed) > 1 else None
        made = None if caches is None else tuple(caches)
        return self.norm(x), made, joined or next(iter(routed), None)

    def _layer(self, graph: Any, kind_of: Callable[[Any], Kind], where: dict[str, Any]) -> Callable[..., Any]:
        """One layer of a segment: ((x, cache), inputs) -> ((x, cache), (router's sums, keys and values to keep))."""

        def layer(carry: Any, inputs: Any) -> tuple[Any, Any]:
            x, cache = carry
            state, key, kind, per_layer, number = inputs
            seen = where | {"layer": number, "per_layer": per_layer}
            x, cache, stats, kept = nnx.merge(graph, state)(x, kind_of(kind), seen, cache, key)
            return (x, cache), (stats, kept)

        if self.remat == "none":
            return layer
        return jax.checkpoint(layer, prevent_cse=False, policy=POLICIES[self.remat]())

    def _kinds(self, c: ModelConfig, positions: jax.Array, lengths: jax.Array | None) -> Callable[[Any], Kind]:
        """A layer's window and rotary tables, by the number of its kind; `c`: of its segment.

        Layers of several kinds (windows or not, one rope or another) stay one scan: what differs is picked inside it.
        """
        tables = [rope.tables(positions, r, lengths) for r in c.ropes]
        if c.layer_kinds is None:
            return lambda kind: (c.windows[0], tables[0])
        stacked = jax.tree.map(lambda *each: jnp.stack(each), *tables) if len(tables) > 1 else None
        return lambda kind: (
            OneOf(c.windows, kind) if len(set(c.windows)) > 1 else c.windows[0],
            tables[0] if stacked is None else jax.tree.map(lambda t: t[kind], stacked),
        )

    def output_table(self) -> Float[Array, "V D"] | None:
        """The output layer's weights in use; None where an adapter's factors lie over them."""
        head = self.lm_head
        if head is None:
            return self.embed_tokens.output()
        return None if head.active_updates() else head.used("kernel")

    def unembed(
        self, hidden: Float[Array, "*lead D"], head: Float[Array, "D V"] | None = None
    ) -> Float32[Array, "*lead V"]:
        """Logits of hidden states in the compute dtype; the product accumulates in float32.

        `head` stands for `output_table`, where the caller has it at hand transposed.
        """
        c = self.config
        with exact_float32(self.dtype):
            if head is not None:
                logits = jnp.einsum("...D,DV->...V", hidden, head, preferred_element_type=jnp.float32)
            elif self.lm_head is None:
                logits = contract(hidden, self.embed_tokens.output(), 1, jnp.float32)
            else:
                logits = self.lm_head(hidden, accumulate=jnp.float32)
        if c.logits_divisor != 1:
            logits = logits / c.logits_divisor
        return logits if c.logits_softcap is None else jnp.tanh(logits / c.logits_softcap) * c.logits_softcap


def _period(runs: Sequence[tuple[Callable[..., Any], int]], carry: Any, inputs: Sequence[Any]) -> tuple[Any, list[Any]]:
    """One layer of each segment that is scanned together: `Decoder._layer`, and which cache is its own.

    The carry is x, and the caches by their number (none without a cache).
    """
    (x, held), found = carry, []
    for (layer, home), given in zip(runs, inputs, strict=True):
        (x, cache), out = layer((x, held.get(home)), given)
        held = held | {home: cache} if held else held
        found.append(out)
    return (x, held), found


def _document_lengths(positions: jax.Array, segment_ids: jax.Array) -> jax.Array:
    """int32 [B,T]: the tokens of the document that each token of a packed row is in."""

    def row(positions: jax.Array, segments: jax.Array) -> jax.Array:
        longest = jax.ops.segment_max(positions, segments, num_segments=segments.shape[0] + 1)
        return longest[segments] + 1

    return jax.vmap(row)(positions, segment_ids)


@functools.partial(jax.jit, static_argnums=0)
def _logits(graph: Any, state: Any, tokens: jax.Array, positions: Any, segment_ids: Any, slots: Any) -> jax.Array:
    model = nnx.merge(graph, state)
    model = model if slots is None else select(model, slots)
    return model.unembed(model.hidden(tokens, positions, segment_ids))
