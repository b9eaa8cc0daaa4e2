"""Gated delta networks: layers that carry a state of one size from token to token (Yang et al. 2024, arXiv:2412.06464).

A head's state S [H_k, H_v] is zero where a document begins. Each token lets it decay, puts in the place of what it
holds for the token's key a part beta of the token's value, and reads it by the token's query:

    S = e^g S;  S = S + beta k (v - S^T k)^T;  o = S^T q

A chunk of tokens is a few matrix products, by the inverse of a triangular matrix (the WY form; Yang et al. 2024,
arXiv:2406.06484, section 3), and a scan carries the state from chunk to chunk. All of it is float32, whatever the
compute dtype. The numbers are those of transformers' `torch_chunk_gated_delta_rule`, and in a packed row each document
has those that it has alone.

B batch, T length, D embed, K key heads, V value heads, H head_dim (of keys or of values), C channels (of q, k and v
together), W taps of the convolution, L layers.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jaxtyping import Bool, Float, Float32, Int32

from specjax import sharding
from specjax.models.config import Delta, ModelConfig
from specjax.models.layers import Keys, Linear, RMSNorm, Wide, beside, parameter
from specjax.models.products import exact_float32

State = Float32[Array, "B V Hk Hv"]
States = tuple[Float[Array, "L B _ C"], Float32[Array, "L B V Hk Hv"]]  # of layers: the last inputs, the states

CHUNK = 64  # tokens, a power of two
SPAN = 16  # chunks whose products are made at once, and made again in the backward pass


class Tokens(NamedTuple):
    """What the rule is given, all float32. Where g and beta are 0, as for padding, a token changes nothing.

    Attributes:
      q: [B,T,K,H], of length 1/sqrt(H); value head v has key head v // (V/K).
      k: [B,T,K,H], of length 1.
      v: [B,T,V,H].
      g: [B,T,V], the logarithm of the decay, at most 0.
      beta: [B,T,V], from 0 to 1.
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array
    g: jax.Array
    beta: jax.Array


def starts(segments: Int32[Array, "B T"]) -> Bool[Array, "B T"]:
    """Where a document begins behind another; what a row begins with goes on from the state that it is given."""
    before = jnp.concatenate([segments[:, :1], segments[:, :-1]], axis=1)
    return (segments != before) & (segments > 0)


def delta_rule(x: Tokens, state: State, begins: Bool[Array, "B T"]) -> tuple[Float32[Array, "B T V Hv"], State]:
    """What the queries read, and the state behind the last token.

    Memory is linear in T: the backward pass has the inputs and the state before each span, and makes the rest again.

    Args:
      x: the tokens.
      state: before the first of them.
      begins: of `starts`: whose token finds a state of zeros.
    """
    length, heads = x.q.shape[1:3]
    chunks = max(1, -(-length // CHUNK))
    spans = -(-chunks // SPAN)
    size = CHUNK * -(-chunks // spans)  # tokens of a span: all alike, with little padding behind the last

    def head(state: jax.Array, *of_tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Of one head and row: [H,H], [T,...] each."""

        def cut(x: jax.Array) -> jax.Array:
            spare = [(0, spans * size - length), *[(0, 0)] * (x.ndim - 1)]
            return jnp.pad(x, spare).reshape(spans, size, *x.shape[1:])

        again = jax.checkpoint(_span, prevent_cse=False)
        state, out = jax.lax.scan(again, state, tuple(map(cut, of_tokens)))
        return state, out.reshape(-1, out.shape[-1])[:length]

    def by_head(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x, 1, 2)

    def grouped(x: jax.Array) -> jax.Array:
        return x.reshape(x.shape[0], heads, -1, *x.shape[2:])

    rule = jax.vmap(head, in_axes=(0, None, None, 0, 0, 0, None))  # the value heads of a key head
    rule = jax.vmap(rule, in_axes=(0, 0, 0, 0, 0, 0, None))
    of_values = (grouped(by_head(one)) for one in (x.v, x.g, x.beta))
    with exact_float32(jnp.float32):
        state, out = jax.vmap(rule)(grouped(state), by_head(x.q), by_head(x.k), *of_values, begins)
    state, out = (one.reshape(one.shape[0], -1, *one.shape[3:]) for one in (state, out))
    return by_head(out), state


def _span(state: jax.Array, tokens: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
    """Some chunks of one head and row: [H,H], [T,...] each -> the state behind them, what is read [T,H]."""

    def chunk(state: jax.Array, parts: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        values, keys, reads, scores, writes, kept = parts
        new = values - keys @ state
        return kept * state + writes.T @ new, reads @ state + scores @ new

    chunks = (x.reshape(-1, CHUNK, *x.shape[1:]) for x in tokens)
    state, out = jax.lax.scan(chunk, state, jax.vmap(_within)(*chunks))
    return state, out.reshape(-1, out.shape[-1])


def _within(
    q: jax.Array, k: jax.Array, v: jax.Array, g: jax.Array, beta: jax.Array, begins: jax.Array
) -> tuple[jax.Array, ...]:
    """What a chunk of one head is to the state S that it finds: see `_span`, whose `chunk` has the formulas.

    With `new` = `values` - `keys` S, the rows that the rule adds to the state, a token at a time.
    """
    decay, document = jnp.cumsum(g), jnp.cumsum(begins)
    first, last = document == 0, document == document[-1]  # the document of the state; the one behind the chunk
    earlier = jnp.tril(document[:, None] == document[None, :])
    between = jnp.exp(jnp.where(earlier, decay[:, None] - decay[None, :], -jnp.inf))  # no exp of what is above 0
    inverse = _inverse(jnp.tril(beta[:, None] * (k @ k.T) * between, -1))
    since = jnp.where(first, jnp.exp(decay), 0.0)[:, None]
    until = jnp.where(last, jnp.exp(decay[-1] - decay), 0.0)[:, None]
    values, keys = inverse @ (beta[:, None] * v), inverse @ (beta[:, None] * since * k)
    return values, keys, since * q, (q @ k.T) * between, until * k, since[-1:]


@jax.custom_vjp
def _inverse(lower: Float32[Array, "T T"]) -> Float32[Array, "T T"]:
    """(1 + lower)^-1 of a strictly lower triangle, of a power of two: exactly inverted blocks, two made one each time.

    It is products alone, and as exact as substitution: a series in powers of the matrix would not be, for where a text
    repeats itself they grow like binomials.
    """
    size = lower.shape[0]
    row, column = jnp.arange(size)[:, None], jnp.arange(size)[None, :]

    def twice(inverse: jax.Array, block: jax.Array) -> tuple[jax.Array, None]:
        below = (row // block % 2 == 1) & (row // block - 1 == column // block)
        return inverse - inverse @ jnp.where(below, lower, 0.0) @ inverse, None

    # A loop, whose two products are compiled once.
    blocks = jnp.asarray(1 << np.arange(size.bit_length() - 1), jnp.int32)
    return jax.lax.scan(twice, jnp.eye(size, dtype=lower.dtype), blocks)[0]


def _inverse_forward(lower: jax.Array) -> tuple[jax.Array, jax.Array]:
    inverse = _inverse(lower)
    return inverse, inverse


def _inverse_backward(inverse: jax.Array, gradient: jax.Array) -> tuple[jax.Array]:
    with exact_float32(jnp.float32):  # traced where the rule's own context has ended
        return (-jnp.tril(inverse.T @ gradient @ inverse.T, -1),)


_inverse.defvjp(_inverse_forward, _inverse_backward)


def one_step(x: Tokens, state: State) -> tuple[Float32[Array, "B 1 V Hv"], State]:
    """`delta_rule` of one token a row, by the rule itself."""
    q, k, v, g, beta = (one[:, 0] for one in x)
    q, k = (jnp.repeat(one, v.shape[1] // one.shape[1], axis=1) for one in (q, k))
    with exact_float32(jnp.float32):
        state = jnp.exp(g)[..., None, None] * state
        new = beta[..., None] * (v - jnp.einsum("BVHJ,BVH->BVJ", state, k))
        state += k[..., None] * new[..., None, :]
        return jnp.einsum("BVHJ,BVH->BVJ", state, q)[:, None], state


def convolve(
    x: Float[Array, "B _ C"], taps: Float[Array, "C W"], segments: Int32[Array, "B T"]
) -> Float[Array, "B T C"]:
    """The silu of each channel's sum over its last W inputs of the same document, in x's dtype.

    Args:
      x: [B,W-1+T,C], the inputs, W-1 of which stand before the tokens, in the document of the first of them.
      taps: the last one is the token's own.
      segments: of the tokens.
    """
    width, length = taps.shape[-1], segments.shape[1]
    around = jnp.concatenate([jnp.repeat(segments[:, :1], width - 1, axis=1), segments], axis=1)
    total = jnp.zeros((*segments.shape, x.shape[-1]), jnp.float32)
    for tap in range(width):
        at = slice(tap, tap + length)
        mine = (around[:, at] == segments)[..., None]
        weight = taps[None, None, :, tap].astype(x.dtype).astype(jnp.float32)
        total += jnp.where(mine, x[:, at], 0).astype(jnp.float32) * weight
    return jax.nn.silu(total.astype(x.dtype).astype(jnp.float32)).astype(x.dtype)


def no_states(layers: int, batch: int, sizes: Delta, dtype: Any) -> States:
    """The cache of no token yet."""
    inputs = jnp.zeros((layers, batch, sizes.taps - 1, sizes.channels), dtype)
    return inputs, jnp.zeros((layers, batch, *sizes.state), jnp.float32)


class GatedDeltaNet(nnx.Module):
    """What stands in attention's place (Qwen 3.5): a short convolution, the delta rule, a gated norm of each head.

    Attributes:
      conv1d: [(L,) C, 1, W], of the channels of q, k and v.
      A_log: [(L,) V]; the decay is exp(-exp(A_log) softplus(a + dt_bias)), as Mamba's.
      dt_bias: [(L,) V].
    """

    def __init__(self, config: ModelConfig, *, layers: int | None, rngs: nnx.Rngs | None):
        assert config.delta
        self.sizes, d = config.delta, config.embed_dim
        channels, taps, v = self.sizes.channels, self.sizes.taps, self.sizes.value_heads
        given: dict[str, Any] = {"layers": layers, "rngs": rngs}

        def into(shape: tuple[int, ...], *axes: str) -> Linear:
            return Linear((d,), shape, ("embed",), axes, **given)

        self.in_proj_qkv = into((channels,), "heads")
        self.in_proj_z = into((v, self.sizes.value_dim), "heads", "head_dim")
        self.in_proj_b, self.in_proj_a = into((v,), "heads"), into((v,), "heads")
        init = nnx.initializers
        self.conv1d = parameter(init.normal(1 / math.sqrt(taps)), (channels, 1, taps), ("heads", None, None), **given)
        self.A_log = parameter(_log_of_uniform, (v,), ("heads",), **given, kind=Wide)
        self.dt_bias = parameter(init.ones, (v,), ("heads",), **given)
        self.norm = RMSNorm((self.sizes.value_dim,), ("head_dim",), config.norm_eps, **given, kind=Wide)
        out_axes = (("heads", "head_dim"), ("embed",))
        stddev = 0.02 / math.sqrt(2 * config.num_layers)
        self.out_proj = Linear((v, self.sizes.value_dim), (d,), *out_axes, stddev=stddev, **given)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        where: dict[str, Any],
        cache: States | None = None,
        keys: Keys = (None,) * 5,
    ) -> tuple[Float[Array, "B T D"], States | None]:
        """The block's output, and the cache behind x.

        Args:
          x: the block's input.
          where: q_segments, 0 for padding; with a cache also `layer`, this layer's place there. A row there is one
            text, whose next tokens x are, with padding behind them, or before them where the cache is of no token.
          cache: None, or that of all layers of this shape.
          keys: dropout keys for qkv, z, b, a, out.
        """
        segments = where["q_segments"]
        real = (segments > 0)[..., None]
        qkv, z, b, a = beside(x, (self.in_proj_qkv, self.in_proj_z, self.in_proj_b, self.in_proj_a), keys)
        qkv = sharding.constrain(jnp.where(real, qkv, 0), "batch", None, "heads")
        held, layer = (cache, where["layer"]) if cache else (no_states(1, x.shape[0], self.sizes, qkv.dtype), 0)
        before, state = (jax.lax.dynamic_index_in_dim(part, layer, keepdims=False) for part in held)
        seen = jnp.concatenate([before.astype(qkv.dtype), qkv], axis=1)
        tokens = self._tokens(seen, a, b, segments)
        if cache is not None and x.shape[1] == 1:
            out, state = one_step(tokens, state)
        else:
            out, state = delta_rule(tokens, state, starts(segments))
        if cache is not None:
            # The inputs up to each row's last token: behind it there may be padding.
            behind = jnp.max(jnp.where(segments > 0, jnp.arange(1, x.shape[1] + 1, dtype=jnp.int32)[None], 0), axis=1)
            at = behind[:, None] + jnp.arange(self.sizes.taps - 1, dtype=jnp.int32)[None]
            last = jnp.take_along_axis(seen, at[..., None], axis=1).astype(cache[0].dtype)
            cache = (
                jax.lax.dynamic_update_index_in_dim(cache[0], last, layer, 0),
                jax.lax.dynamic_update_index_in_dim(cache[1], state, layer, 0),
            )
        gate = jax.checkpoint(_gated, prevent_cse=False)
        return self.out_proj(gate(self.norm(out.astype(x.dtype)), z), keys[4]), cache

    def _tokens(self, seen: jax.Array, a: jax.Array, b: jax.Array, segments: jax.Array) -> Tokens:
        """What the rule is given, of the convolution's inputs."""
        s = self.sizes

        def made(seen: jax.Array, a: jax.Array, b: jax.Array, *weights: jax.Array) -> Tokens:
            conv, a_log, bias = weights
            mixed = convolve(seen, conv[:, 0], segments).astype(jnp.float32)
            ends = (s.key_heads * s.key_dim, 2 * s.key_heads * s.key_dim)
            parts = jnp.split(mixed, ends, axis=-1)
            q, k, v = (
                sharding.constrain(part.reshape(*part.shape[:2], heads, -1), "batch", None, "heads", None)
                for part, heads in zip(parts, (s.key_heads, s.key_heads, s.value_heads), strict=True)
            )
            rate = jnp.exp(a_log.astype(jnp.float32))[None, None]
            bias = bias.astype(a.dtype).astype(jnp.float32)[None, None]
            g = -rate * jax.nn.softplus(a.astype(jnp.float32) + bias)
            beta = jax.nn.sigmoid(b).astype(jnp.float32)
            real = (segments > 0)[..., None]
            return Tokens(_unit(q) * s.key_dim**-0.5, _unit(k), v, jnp.where(real, g, 0), jnp.where(real, beta, 0))

        weights = (one[...] for one in (self.conv1d, self.A_log, self.dt_bias))
        return jax.checkpoint(made, prevent_cse=False)(seen, a, b, *weights)


def _unit(x: Float32[Array, "*shape H"]) -> Float32[Array, "*shape H"]:
    """Each head of length 1; 1e-6 is transformers' constant, and no config's."""
    return x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + 1e-6)


def _gated(x: Float[Array, "*shape"], gate: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """The product x silu(gate), computed in float32."""
    return (x.astype(jnp.float32) * jax.nn.silu(gate.astype(jnp.float32))).astype(x.dtype)


def _log_of_uniform(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    return jnp.log(jax.random.uniform(key, shape, dtype, 0.01, 16.0))
