"""One decoder-only transformer for every supported family; its layers are stacked and scanned.

B batch, T length, S cache length, D embed, V vocab, L layers, K kv heads, H head_dim.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from specjax import sharding
from specjax.models import rope
from specjax.models.config import ModelConfig
from specjax.models.layers import MLP, Attention, Cache, Embed, Keys, Linear, RMSNorm, Tables


class DecoderLayer(nnx.Module):
    """Pre-norm attention and MLP with residuals."""

    def __init__(self, config: ModelConfig, *, layers: int | None, rngs: nnx.Rngs):
        self.input_layernorm = RMSNorm(config.embed_dim, config.norm_eps, layers=layers, rngs=rngs)
        self.self_attn = Attention(config, layers=layers, rngs=rngs)
        self.post_attention_layernorm = RMSNorm(config.embed_dim, config.norm_eps, layers=layers, rngs=rngs)
        self.mlp = MLP(config, layers=layers, rngs=rngs)

    def __call__(
        self,
        x: jax.Array,
        tables: Tables,
        where: dict[str, Any],
        cache: Cache | None = None,
        dropout_key: jax.Array | None = None,
    ) -> tuple[jax.Array, Cache | None]:
        """[B,T,D] -> ([B,T,D], cache); the arguments are those of `Attention`."""
        keys: Keys = (None,) * 7 if dropout_key is None else tuple(jax.random.split(dropout_key, 7))
        attended, cache = self.self_attn(self.input_layernorm(x), tables, where, cache, keys[:4])
        x = sharding.constrain(x + attended, "batch", "length", None)
        x = x + self.mlp(self.post_attention_layernorm(x), keys[4:])
        return sharding.constrain(x, "batch", "length", None), cache


class Decoder(nnx.Module):
    """A causal language model with Hugging Face's names and layout.

    Attributes:
      config: the sizes.
      dtype: the compute dtype; parameters are cast to it where they are used.
      remat: "none" keeps every activation, "full" recomputes each layer in the backward pass.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype: Any = jnp.float32, remat: str = "none"):
        self.config, self.dtype, self.remat = config, jnp.dtype(dtype), remat
        self.embed_tokens = Embed(config.vocab_size, config.embed_dim, rngs=rngs)
        self.layers = DecoderLayer(config, layers=config.num_layers, rngs=rngs)
        self.norm = RMSNorm(config.embed_dim, config.norm_eps, rngs=rngs)
        head = Linear((config.embed_dim,), (config.vocab_size,), ("embed",), ("vocab",), rngs=rngs)
        self.lm_head = None if config.tied else head

    def __call__(
        self, tokens: jax.Array, positions: jax.Array | None = None, segment_ids: jax.Array | None = None
    ) -> jax.Array:
        """Logits of the next token.

        Args:
          tokens: int32 [B,T].
          positions: int32 [B,T], default 0..T-1.
          segment_ids: int32 [B,T], the document of each token in a packed row, 0 for padding; default all one document.

        Returns:
          float32 [B,T,V].
        """
        # Compiled once a shape: run eagerly, the scan over the layers would be compiled anew at every call.
        graph, state = nnx.split(self)
        return _logits(graph, state, tokens, positions, segment_ids)

    def hidden(
        self,
        tokens: jax.Array,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        dropout_key: jax.Array | None = None,
    ) -> jax.Array:
        """The last layer's normed output, [B,T,D] in the compute dtype; LoRA's dropout only where a key is given."""
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
        if segment_ids is None:
            segment_ids = jnp.ones_like(tokens)
        where = {
            "q_positions": positions,
            "k_positions": positions,
            "q_segments": segment_ids,
            "k_segments": segment_ids,
            "slot": 0,
        }
        return self._run(tokens, where, None, dropout_key)[0]

    def empty_cache(self, batch: int, length: int) -> Cache:
        """Keys and values of no token yet: two [L,B,S,K,H] in the compute dtype."""
        c = self.config
        shape = (c.num_layers, batch, length, c.num_kv_heads, c.head_dim)
        return jnp.zeros(shape, self.dtype), jnp.zeros(shape, self.dtype)

    def extend(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        cache: Cache,
        cache_positions: jax.Array,
        cache_segments: jax.Array,
        slot: jax.Array | int,
    ) -> tuple[jax.Array, Cache]:
        """Runs further tokens against a cache.

        Args:
          tokens: int32 [B,T], written to the cache slots slot..slot+T-1.
          positions: int32 [B,T].
          cache: (k, v) of `empty_cache`.
          cache_positions: int32 [B,S], the position of the token in each slot, the new ones included.
          cache_segments: int32 [B,S], 1 for slots that hold a token (the new ones included), 0 otherwise.
          slot: int32 scalar, the same for all rows: prompts of unequal length are padded on the left.

        Returns:
          (hidden [B,T,D], the extended cache).
        """
        where = {
            "q_positions": positions,
            "k_positions": cache_positions,
            "q_segments": jax.lax.dynamic_slice_in_dim(cache_segments, slot, tokens.shape[1], axis=1),
            "k_segments": cache_segments,
            "slot": slot,
        }
        return self._run(tokens, where, cache, None)

    def _run(
        self, tokens: jax.Array, where: dict[str, Any], cache: Cache | None, dropout_key: jax.Array | None
    ) -> tuple[jax.Array, Any]:
        c = self.config
        tables = rope.tables(where["q_positions"], rope.frequencies(c.head_dim, c.rope_theta, c.rope_scaling))
        x = sharding.constrain(self.embed_tokens(tokens, self.dtype), "batch", "length", None)
        # The module is split once; the scan's body sees one layer's slice of every stacked parameter.
        graph, stacked = nnx.split(self.layers)
        layer_keys = None if dropout_key is None else jax.random.split(dropout_key, c.num_layers)

        def layer(x: jax.Array, inputs: Any) -> tuple[jax.Array, Any]:
            state, layer_cache, key = inputs
            return nnx.merge(graph, state)(x, tables, where, layer_cache, key)

        if self.remat == "full":
            layer = jax.checkpoint(layer, prevent_cse=False)
        x, cache = jax.lax.scan(layer, x, (stacked, cache, layer_keys))
        return self.norm(x), cache

    def unembed(self, hidden: jax.Array) -> jax.Array:
        """[..., D] in the compute dtype -> float32 logits [..., V]; the product accumulates in float32."""
        if self.lm_head is None:
            table = self.embed_tokens.embedding[...].astype(hidden.dtype)
            return jnp.einsum("...D,VD->...V", hidden, table, preferred_element_type=jnp.float32)
        return self.lm_head(hidden, accumulate=jnp.float32)


@functools.partial(jax.jit, static_argnums=0)
def _logits(graph: Any, state: Any, tokens: jax.Array, positions: Any, segment_ids: Any) -> jax.Array:
    model = nnx.merge(graph, state)
    return model.unembed(model.hidden(tokens, positions, segment_ids))
