"""The parts of a decoder: linear map (with room for LoRA), norm, embedding, attention and MLP blocks.

B batch, T length, D embed, N heads, K kv heads, H head_dim, F mlp, V vocab, L layers, R rank.

Every parameter carries its logical axes (`param.axes`), one name a dimension; `specjax.sharding` maps them to the mesh.
A module built with `layers=L` holds L layers' parameters stacked on a leading axis; `Decoder` scans over it and the
modules' methods see one layer's slice.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from specjax.models.attention import attend
from specjax.models.config import ModelConfig
from specjax.models.rope import rotate

Axes = tuple[str | None, ...]
Tables = tuple[jax.Array, jax.Array]  # cosines, sines
Cache = tuple[jax.Array, jax.Array]  # keys, values
Keys = tuple[jax.Array | None, ...]  # one dropout key a linear map


def parameter(
    init: Any, shape: tuple[int, ...], axes: Axes, layers: int | None, rngs: nnx.Rngs, dtype: Any = jnp.float32
) -> nnx.Param:
    """A Param of `shape`, stacked `layers` times when given, bearing its logical axes."""
    if layers is not None:
        shape, axes = (layers, *shape), ("layers", *axes)
    return nnx.Param(init(rngs.params(), shape, dtype), axes=axes)


class LoRA(nnx.Module):
    """Low-rank update y += scale * (dropout(x) A) B (Hu et al. 2021, arXiv:2106.09685), in PEFT's semantics.

    `a` is [(L,) *in_dims, R] and `b` [(L,) R, *out_dims], both float32 whatever the compute dtype.
    """

    def __init__(self, a: nnx.LoRAParam, b: nnx.LoRAParam, *, alpha: float, scale: float, dropout: float, rslora: bool):
        self.a, self.b = a, b
        self.alpha, self.scale, self.dropout, self.rslora = alpha, scale, dropout, rslora

    def __call__(self, x: jax.Array, in_dims: int, dropout_key: jax.Array | None) -> jax.Array:
        """[B,T,*in_dims] -> [B,T,*out_dims] in x's dtype; dropout only where a key is given."""
        if dropout_key is not None and self.dropout > 0:
            keep = jax.random.bernoulli(dropout_key, 1 - self.dropout, x.shape)
            x = jnp.where(keep, x / (1 - self.dropout), jnp.zeros_like(x))
        return _contract(_contract(x, self.a[...], in_dims), self.b[...], 1) * self.scale


def _contract(x: jax.Array, kernel: jax.Array, in_dims: int, out_dtype: Any = None) -> jax.Array:
    """Contracts the last `in_dims` axes of x with the first of the kernel, in x's dtype; the result in `out_dtype`."""
    return jnp.tensordot(x, kernel.astype(x.dtype), axes=in_dims, preferred_element_type=out_dtype)


class Linear(nnx.Module):
    """y = x W (+ bias) (+ the active LoRA), W [*in_shape, *out_shape].

    `lora` maps an adapter's name to its factors; `active` names the one in use, None is the base alone.
    """

    def __init__(
        self,
        in_shape: tuple[int, ...],
        out_shape: tuple[int, ...],
        in_axes: Axes,
        out_axes: Axes,
        *,
        bias: bool = False,
        layers: int | None = None,
        rngs: nnx.Rngs,
        stddev: float = 0.02,
    ):
        init = nnx.initializers.normal(stddev)
        self.kernel = parameter(init, in_shape + out_shape, in_axes + out_axes, layers, rngs)
        self.bias = parameter(nnx.initializers.zeros, out_shape, out_axes, layers, rngs) if bias else None
        self.in_dims = len(in_shape)
        self.lora = nnx.Dict()
        self.active: str | None = None

    def __call__(self, x: jax.Array, dropout_key: jax.Array | None = None, accumulate: Any = None) -> jax.Array:
        """[...,*in_shape] -> [...,*out_shape] in x's dtype, or in `accumulate` (the logits' float32)."""
        y = _contract(x, self.kernel[...], self.in_dims, accumulate)
        if self.bias is not None:
            y += jnp.broadcast_to(self.bias[...].astype(y.dtype), y.shape)
        if self.active is not None:
            y += self.lora[self.active](x, self.in_dims, dropout_key)
        return y


class RMSNorm(nnx.Module):
    """x / rms(x) * scale, computed in float32 (Zhang & Sennrich 2019, arXiv:1910.07467)."""

    def __init__(self, size: int, eps: float, *, layers: int | None = None, rngs: nnx.Rngs):
        self.scale = parameter(nnx.initializers.ones, (size,), ("embed",), layers, rngs)
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B,T,D] -> [B,T,D] in x's dtype."""
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        # As transformers: back to the compute dtype first, then the scale.
        return self.scale[...].astype(x.dtype)[None, None] * y.astype(x.dtype)


class Embed(nnx.Module):
    """Token embedding, [V,D]."""

    def __init__(self, vocab_size: int, embed_dim: int, *, rngs: nnx.Rngs, stddev: float = 0.02):
        init = nnx.initializers.normal(stddev)
        self.embedding = parameter(init, (vocab_size, embed_dim), ("vocab", "embed"), None, rngs)

    def __call__(self, tokens: jax.Array, dtype: Any) -> jax.Array:
        """int32 [B,T] -> [B,T,D] in `dtype`."""
        return jnp.take(self.embedding[...], tokens, axis=0).astype(dtype)


class Attention(nnx.Module):
    """Grouped-query self-attention with rotary positions."""

    def __init__(self, config: ModelConfig, *, layers: int | None, rngs: nnx.Rngs):
        d, n, k, h = config.embed_dim, config.num_heads, config.num_kv_heads, config.head_dim
        bias, out_stddev = config.attention_bias, 0.02 / math.sqrt(2 * config.num_layers)

        def into(heads: int, axis: str) -> Linear:
            return Linear((d,), (heads, h), ("embed",), (axis, "head_dim"), bias=bias, layers=layers, rngs=rngs)

        self.q_proj, self.k_proj, self.v_proj = into(n, "heads"), into(k, "kv_heads"), into(k, "kv_heads")
        self.o_proj = Linear(
            (n, h), (d,), ("heads", "head_dim"), ("embed",), bias=bias, layers=layers, rngs=rngs, stddev=out_stddev
        )
        self.window = config.sliding_window

    def __call__(
        self, x: jax.Array, rope: Tables, where: dict[str, Any], cache: Cache | None = None, keys: Keys = (None,) * 4
    ) -> tuple[jax.Array, Cache | None]:
        """[B,T,D] -> ([B,T,D], cache).

        Args:
          x: [B,T,D].
          rope: the tables of `rope.tables` for the queries' positions.
          where: q_positions, k_positions, q_segments, k_segments, and `slot`, the cache index of x's first token.
          cache: None, or this layer's (k, v), each [B,S,K,H]; x's keys and values are written at `slot`.
          keys: dropout keys for q, k, v, o.
        """
        cos, sin = rope
        q = rotate(self.q_proj(x, keys[0]), cos, sin)
        k = rotate(self.k_proj(x, keys[1]), cos, sin)
        v = self.v_proj(x, keys[2])
        slot = where["slot"]
        if cache is not None:
            k = jax.lax.dynamic_update_slice_in_dim(cache[0], k.astype(cache[0].dtype), slot, axis=1)
            v = jax.lax.dynamic_update_slice_in_dim(cache[1], v.astype(cache[1].dtype), slot, axis=1)
            cache = (k, v)
        sees = {name: value for name, value in where.items() if name != "slot"}
        return self.o_proj(attend(q, k, v, window=self.window, **sees), keys[3]), cache


class MLP(nnx.Module):
    """Gated MLP, down(silu(gate(x)) * up(x)) (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, config: ModelConfig, *, layers: int | None, rngs: nnx.Rngs):
        d, f, bias = config.embed_dim, config.mlp_dim, config.mlp_bias
        out_stddev = 0.02 / math.sqrt(2 * config.num_layers)
        self.gate_proj = Linear((d,), (f,), ("embed",), ("mlp",), bias=bias, layers=layers, rngs=rngs)
        self.up_proj = Linear((d,), (f,), ("embed",), ("mlp",), bias=bias, layers=layers, rngs=rngs)
        self.down_proj = Linear(
            (f,), (d,), ("mlp",), ("embed",), bias=bias, layers=layers, rngs=rngs, stddev=out_stddev
        )

    def __call__(self, x: jax.Array, keys: Keys = (None,) * 3) -> jax.Array:
        """[B,T,D] -> [B,T,D]; `keys` are dropout keys for gate, up, down."""
        return self.down_proj(jax.nn.silu(self.gate_proj(x, keys[0])) * self.up_proj(x, keys[1]), keys[2])
